"""What routes ask FastAPI for: by coroutines, as it runs plain functions in threads."""

import ipaddress
from datetime import UTC, datetime
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import Depends, Header, Request
from fastapi.security import OAuth2PasswordBearer
from fastapi.security.utils import get_authorization_scheme_param
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.config import Settings
from app.core.errors import Forbidden, Unauthenticated
from app.core.logs import about
from app.core.security import (
    ADMIN,
    CLOSED,
    EVERYTHING,
    KEY_PREFIX,
    METRICS,
    PRIVILEGED,
    Caller,
    digest,
    mark_of,
    user_of_token,
)
from app.db.session import get_db
from app.models import ApiKey, User
from app.services.conversations import Conversations
from app.services.extraction import Extractions
from app.services.jobs import Jobs
from app.services.new_run import Idempotency, Multitask
from app.services.runs import Runs
from app.services.schemas import Schemas

# Ended before the answer is sent: a stream may take hours.
Db = Annotated[AsyncSession, Depends(get_db, scope="function")]

# Swagger's Authorize button; `get_caller` does the reading.
swagger = OAuth2PasswordBearer("auth/token", auto_error=False)


async def get_settings(request: Request) -> Settings:
    return request.app.state.settings


SettingsDep = Annotated[Settings, Depends(get_settings)]


async def get_runs(request: Request) -> Runs:
    return request.app.state.runs


RunsDep = Annotated[Runs, Depends(get_runs)]


async def get_conversations(request: Request) -> Conversations:
    return request.app.state.conversations


ConversationsDep = Annotated[Conversations, Depends(get_conversations)]


async def get_extractions(request: Request) -> Extractions:
    return request.app.state.extractions


ExtractionsDep = Annotated[Extractions, Depends(get_extractions)]


async def get_jobs(request: Request) -> Jobs:
    return request.app.state.jobs


JobsDep = Annotated[Jobs, Depends(get_jobs)]


async def get_schemas(request: Request) -> Schemas:
    return request.app.state.schemas


SchemasDep = Annotated[Schemas, Depends(get_schemas)]


async def get_multitask(
    x_multitask_strategy: Annotated[Multitask, Header()] = "enqueue",
) -> Multitask:
    return x_multitask_strategy


MultitaskDep = Annotated[Multitask, Depends(get_multitask)]


IdempotencyKey = Annotated[
    str | None,
    Header(alias="Idempotency-Key", min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f]+$"),
]


def idempotent(route: str, *headers: str) -> Any:
    """What the request's `Idempotency-Key` stands for, where it has one: its body, what its path
    and its query name, and the headers that say what is asked."""

    async def read(request: Request, key: IdempotencyKey = None) -> Idempotency | None:
        if key is None:
            return None
        more = [*request.path_params.values(), request.url.query]
        more += [request.headers.get(name, "") for name in headers]
        return Idempotency.of(route, key, await request.body(), *filter(None, more))

    return Depends(read)


def is_loopback(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def is_local(request: Request) -> bool:
    """Whether a person at this machine asks, and not a web page that they happen to look at.

    The peer is loopback; the `Host` is loopback, or has neither dot nor port, as in-process
    clients name themselves: any other may have been rebound to this machine by whoever answers for
    names here. An `Origin`, where there is one, is loopback.
    """
    if not is_loopback(request.client.host if request.client else None):
        return False
    origin = request.headers.get("origin")
    try:
        named = urlsplit(f"//{request.headers.get('host', '')}")
        host, is_plain = named.hostname or "", named.port is None
        place = urlsplit(origin).hostname if origin is not None else "localhost"
    except ValueError:
        return False  # neither is a host
    is_plain = is_plain and not ("." in host or ":" in host)
    return is_loopback(place) and (is_loopback(host) or is_plain)


async def get_holder(
    request: Request,
    db: Db,
    _: Annotated[str | None, Depends(swagger)],
) -> Caller:
    """Whose the credential is, be it for numbers alone. Raises Unauthenticated; a bearer, where
    there is one, must be valid."""
    settings = await get_settings(request)
    header = request.headers.get("authorization")
    if header is None:
        if settings.auth_required:
            raise Unauthenticated("Send `Authorization: Bearer` with an API key or a token.")
        if not is_local(request):
            raise Unauthenticated(
                "Without a bearer only this machine is answered, as localhost or 127.0.0.1."
            )
        about(owner_id=request.app.state.local_admin_id)
        return Caller.of(request.app.state.local_admin_id, (EVERYTHING, ADMIN))
    scheme, bearer = get_authorization_scheme_param(header)
    if scheme.lower() != "bearer" or not bearer:
        raise Unauthenticated("The Authorization header must read `Bearer <key or token>`.")
    try:
        if bearer.startswith(KEY_PREFIX) or bearer.count(".") != 2:  # else a JWT
            return await _caller_of_key(db, bearer)
        return await _caller_of_token(db, bearer, settings.signing_key())
    finally:
        await db.close()  # the connection goes back: what follows may take long


async def _caller_of_key(db: AsyncSession, key: str) -> Caller:
    row = (
        await db.execute(
            select(ApiKey.user_id, ApiKey.scopes, ApiKey.expires_at, User.is_admin)
            .join(User, User.id == ApiKey.user_id)
            .where(ApiKey.digest == digest(key))
        )
    ).one_or_none()
    if row is None or (row.expires_at and row.expires_at <= datetime.now(UTC)):
        raise Unauthenticated("No such API key, or it was revoked or has expired.")
    scopes = frozenset(row.scopes.split())
    about(owner_id=row.user_id)
    allowed = scopes if row.is_admin else scopes - PRIVILEGED
    return Caller(row.user_id, allowed, row.expires_at)


async def _caller_of_token(db: AsyncSession, token: str, key: bytes) -> Caller:
    user_id, mark = user_of_token(token, key)
    query = select(User.is_admin, User.hashed_password).where(User.id == user_id)
    user = (await db.execute(query)).one_or_none()
    if user is None or user.hashed_password == CLOSED:
        raise Unauthenticated("The token's user does not exist any more.")
    if mark != mark_of(user.hashed_password, key):
        raise Unauthenticated("The password has changed since; log in again.")
    about(owner_id=user_id)
    return Caller.of(user_id, (EVERYTHING, ADMIN) if user.is_admin else (EVERYTHING,))


HolderDep = Annotated[Caller, Depends(get_holder)]


async def get_caller(holder: HolderDep) -> Caller:
    """Who is calling. Raises Unauthenticated, and Forbidden for a key that reads numbers alone."""
    if holder.scopes <= {METRICS}:
        raise Forbidden(f"The scope {METRICS!r} allows GET /metrics and nothing else.")
    return holder


CallerDep = Annotated[Caller, Depends(get_caller)]


async def get_admin(caller: CallerDep) -> Caller:
    if not caller.is_admin:
        raise Forbidden("This needs an administrator.")
    return caller


AdminDep = Annotated[Caller, Depends(get_admin)]


async def check_scraper(holder: HolderDep) -> None:
    if not holder.may(METRICS):
        raise Forbidden(f"This needs an administrator's key with the scope {METRICS!r}.")

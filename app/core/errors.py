"""What can go wrong, each with its status and code; one handler writes the envelope.

AppError 400
  Unauthenticated 401     Forbidden 403       NotFound 404       Conflict 409
  Invalid 422             TooMany 429         BadGateway 502     Unavailable 503
  Bug 500                 GatewayTimeout 504
"""

import logging
from collections.abc import Mapping, Sequence
from sqlite3 import SQLITE_CONSTRAINT_FOREIGNKEY
from typing import Any, ClassVar, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from app.core.json import whole

logger = logging.getLogger(__name__)


class AppError(Exception):
    """A refusal that the caller is told about. `message` names the value and the way out."""

    status: int = 400
    code: ClassVar[str] = "bad_request"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
        **details: Any,
    ) -> None:
        super().__init__(message)
        self.status = status or self.status
        self.message = message
        self.error_code = code or self.code
        self.param = param
        self.headers = dict(headers or {})
        self.details = details


class Unauthenticated(AppError):
    """No credential, or one that is not valid (any more)."""

    status = 401
    code = "unauthenticated"

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message, headers={"WWW-Authenticate": "Bearer"}, **details)


class Forbidden(AppError):
    status = 403
    code = "forbidden"


class NotFound(AppError):
    """No such thing, or somebody else's: the two look the same."""

    status = 404
    code = "not_found"


class Conflict(AppError):
    """Repeating the request does not cure it, and OpenAI's SDKs are told so: they would."""

    status = 409
    code = "conflict"

    def __init__(self, message: str, **more: Any) -> None:
        super().__init__(message, headers={"X-Should-Retry": "false"}, **more)


class DeletedMeanwhile(Conflict):
    """The account, or what the request goes on from, went while it was being read."""

    code = "deleted_meanwhile"

    def __init__(self) -> None:
        super().__init__("Your account, or what this refers to, was deleted meanwhile.")


class Invalid(AppError):
    """Well-formed, but not something that can be done."""

    status = 422
    code = "invalid"


class TooMany(AppError):
    """Try again later; `Retry-After` says when."""

    status = 429
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after: int = 2, **more: Any) -> None:
        super().__init__(message, headers={"Retry-After": str(retry_after)}, **more)


class BadGateway(AppError):
    """A service behind this one failed; what it said stays in the log."""

    status = 502
    code = "upstream_error"


class Unavailable(AppError):
    """Try again later; `Retry-After` says when."""

    status = 503
    code = "unavailable"

    def __init__(self, message: str, *, retry_after: int = 1, **more: Any) -> None:
        super().__init__(message, headers={"Retry-After": str(retry_after)}, **more)


class GatewayTimeout(AppError):
    """A service behind this one took longer than it was given."""

    status = 504
    code = "deadline"


class Bug(AppError):
    """Ours. The log has the rest."""

    status = 500
    code = "internal"


CODES = {
    400: "bad_request",
    401: "unauthenticated",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    413: "too_large",
    415: "unsupported_media_type",
    422: "invalid",
}

OPENAI = ("/v1/chat/", "/v1/responses", "/v1/conversations", "/v1/files")
OPENAI_CODES = {"unauthenticated": "invalid_api_key"}
"""What OpenAI's routes call it, where their clients look for their own word."""

EXTRACTION = ("/v1/extraction", "/v1/schemas", "/v1/evaluations")
LATER = (429, 503, 504)  # statuses of what may fare better in a moment

# Busy, locked, no memory, read-only, input or output, full, cannot open, locking protocol.
SQLITE_AWAY = (5, 6, 7, 8, 10, 13, 14, 15)

MAX_EXPLAINED = 100


def explain(errors: Sequence[Mapping[str, Any]], body: Any = None) -> tuple[str, str | None]:
    """One line for a person, and the first field's path in what was sent."""
    # A hostile body has any number of them, each to be compared with all others.
    found = [
        (_place(error, body), str(error["msg"]).removeprefix("Value error, "))
        for error in errors[:MAX_EXPLAINED]
    ]
    places = [place for place, _ in found]
    lines = list[tuple[str, str]]()
    for place, message in found:
        # Of several forms that a field may have, the one that was meant fails deeper inside.
        is_meant = not any(place and other.startswith(f"{place}.") for other in places)
        if is_meant and (place, message) not in lines:
            lines.append((place, message))
    said = [f"{place}: {message}" if place else message for place, message in lines]
    left = len(said) - 5 + max(0, len(errors) - MAX_EXPLAINED)
    more = f" (and {left} more)" if left > 0 else ""
    return whole("; ".join(said[:5]) + more), whole(lines[0][0]) or None


def _place(error: Mapping[str, Any], body: Any) -> str:
    """The field's path, without the names of the forms that it could have had."""
    loc: Sequence[Any] = error["loc"][1:]
    is_object = isinstance(body, dict)
    if not is_object:
        return ".".join(map(str, loc))
    path: list[str] = []
    value: Any = cast(Any, body)
    for at, part in enumerate(loc, 1):
        try:
            value = value[part]
        except (LookupError, TypeError):
            if at < len(loc) or error["type"] != "missing":
                continue
        path.append(str(part))
    return ".".join(path)


def error_body(error: AppError, scope: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What stands under `error`, in the answer to a request of this scope, or in a stream of
    OpenAI's."""
    path = path_of(scope) if scope else "/v1/"
    body: dict[str, Any] = {"code": error.error_code, "message": error.message}
    if path.startswith(EXTRACTION):
        pointer = "/" + error.param.replace(".", "/") if error.param else None
        nothing = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        body |= {"retryable": error.status in LATER, "pointer": pointer, "attempts": []}
        body |= {"usage": nothing, "request_id": scope and request_id_of(scope)}
    body |= error.details
    if path.startswith("/v1/"):
        code = OPENAI_CODES.get(error.error_code, error.error_code)
        body |= {"code": code, "type": error_type(error.status), "param": error.param}
    elif error.param:
        body["param"] = error.param
    return body


def answer(error: AppError, scope: Mapping[str, Any]) -> JSONResponse:
    """`{"error": {code, message, ...}}`; OpenAI's routes also get the `type` and `param`
    that its SDKs read, those of extraction what machines decide by."""
    return JSONResponse(
        {"error": error_body(error, scope)},
        status_code=error.status,
        headers=error.headers,
    )


def path_of(scope: Mapping[str, Any]) -> str:
    """By which its route is found: without the prefix that a proxy leaves (uvicorn's
    `--root-path`)."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def request_id_of(scope: Mapping[str, Any]) -> str | None:
    return scope.get("state", {}).get("request_id")


def error_type(status_code: int) -> str:
    """OpenAI's word for this class of error."""
    known = {
        401: "authentication_error",
        403: "permission_error",
        429: "rate_limit_error",
    }
    if status_code >= 500:
        return "server_error"
    return known.get(status_code, "invalid_request_error")


def database_away(error: Exception) -> bool:
    """Whether a database error says "later" and not "never": it is down, starting, full or busy.

    asyncpg's mostly come as plain DBAPIErrors, told apart by PostgreSQL's error classes
    (appendix A): connection, rollback, resources, intervention; while connecting, as they are.
    SQLite's are told apart by its result codes.
    """
    if not isinstance(error, DBAPIError):
        sqlstate = getattr(error, "sqlstate", None)
        return isinstance(error, (PoolTimeout, OSError, TimeoutError)) or _is_away(sqlstate)
    code = getattr(error.orig, "sqlite_errorcode", None)
    if code is not None:
        return code & 0xFF in SQLITE_AWAY
    return (
        isinstance(error, (OperationalError, InterfaceError))
        or error.connection_invalidated
        or _is_away(getattr(error.orig, "sqlstate", None))
    )


def is_orphan(error: Exception) -> bool:
    """Whether a row was to refer to one that is not there (any more)."""
    orig = getattr(error, "orig", None)
    code, state = getattr(orig, "sqlite_errorcode", None), getattr(orig, "sqlstate", None)
    return code == SQLITE_CONSTRAINT_FOREIGNKEY or state == "23503"


def _is_away(sqlstate: str | None) -> bool:
    return str(sqlstate)[:2] in ("08", "40", "53", "57")


def register_exception_handlers(app: FastAPI) -> None:
    """Every failure leaves as the same envelope, and nothing of a provider's words with it."""

    def reply(request: Request, error: AppError) -> JSONResponse:
        return answer(error, request.scope)

    @app.exception_handler(AppError)
    async def app_error_handler(request: Request, exc: AppError) -> JSONResponse:
        return reply(request, exc)

    @app.exception_handler(HTTPException)
    async def http_error_handler(request: Request, exc: HTTPException) -> JSONResponse:
        code = CODES.get(exc.status_code, "error")
        error = AppError(str(exc.detail), code=code, status=exc.status_code, headers=exc.headers)
        return reply(request, error)

    @app.exception_handler(RequestValidationError)
    async def validation_error_handler(
        request: Request, exc: RequestValidationError
    ) -> JSONResponse:
        first = exc.errors()[0]
        if first["type"] == "json_invalid":
            message, param = f"The body is not valid JSON (at character {first['loc'][-1]}).", None
        else:
            message, param = explain(exc.errors(), exc.body)
        openai = path_of(request.scope).startswith(OPENAI)
        # OpenAI's SDKs expect 400 where others use 422.
        error = Invalid(message, param=param, status=400 if openai else None)
        return reply(request, error)

    @app.exception_handler(DBAPIError)
    @app.exception_handler(PoolTimeout)
    @app.exception_handler(ConnectionError)
    @app.exception_handler(TimeoutError)
    async def database_error_handler(request: Request, exc: Exception) -> JSONResponse:
        if is_orphan(exc):
            logger.warning("what a request refers to was deleted meanwhile")
            return reply(request, DeletedMeanwhile())
        if not database_away(exc):
            raise exc
        logger.error("the database does not answer: %s", type(exc).__name__)
        return reply(request, Unavailable("The database does not answer; try again."))

    @app.exception_handler(Exception)
    async def bug_handler(request: Request, exc: Exception) -> JSONResponse:
        error = Bug("Something broke here.")
        if request_id := request_id_of(request.scope):  # this one is outside of all middleware
            error.headers["X-Request-Id"] = request_id
        return reply(request, error)

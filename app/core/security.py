"""Who is calling: passwords, session tokens, API keys."""

import asyncio
import hashlib
import hmac
import secrets
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from threading import BoundedSemaphore
from typing import TYPE_CHECKING, Any, TypeVar

from app.core.errors import TooMany, Unauthenticated

if TYPE_CHECKING:
    from pwdlib import PasswordHash

T = TypeVar("T")

ALGORITHM = "HS256"
ISSUER = AUDIENCE = "agent-backend"
KEY_PREFIX = "ab_"
EVERYTHING = "*"
ADMIN = "admin"
METRICS = "metrics"
PRIVILEGED = frozenset({ADMIN, METRICS})  # which administrators alone may have or give
UNUSABLE_PASSWORD = "!"  # no hash: nothing verifies against it
CLOSED = "!closed"  # nor against this: the account is being erased

# Each hash takes tens of milliseconds and 64 MiB on purpose; more at once would starve the rest.
# Threads of their own, not a semaphore: that would belong to one event loop, and let go of its
# place when a client leaves while the hash goes on.
_hashing = ThreadPoolExecutor(2, "hashing")
_room = BoundedSemaphore(16)  # hashes that wait or go on: seconds, for the last of them


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is asking, and what the credential allows. The model has no say in either."""

    user_id: int
    scopes: frozenset[str]
    until: datetime | None = None  # when the credential expires that makes no longer lasting ones

    def may(self, scope: str) -> bool:
        """`*` allows all but what administrators may, who need `admin` by name."""
        granted = EVERYTHING if scope not in PRIVILEGED else ADMIN
        return scope in self.scopes or granted in self.scopes

    @property
    def is_admin(self) -> bool:
        return ADMIN in self.scopes

    @property
    def scope(self) -> str:
        return " ".join(sorted(self.scopes))

    @classmethod
    def of(cls, user_id: int, scope: str | Iterable[str]) -> "Caller":
        return cls(user_id, frozenset(scope.split() if isinstance(scope, str) else scope))


@cache
def _hasher() -> "PasswordHash":
    from pwdlib import PasswordHash  # lazily: most requests carry a token, not a password

    return PasswordHash.recommended()


def hash_password(password: str) -> str:
    """Argon2id, slow by design: call it through `hash_password_async` in a request."""
    return _hasher().hash(password)


async def hash_password_async(password: str) -> str:
    """Raises TooMany where too many passwords wait."""
    return await _in_turn(hash_password, password)


async def _in_turn(work: Callable[..., T], *args: Any) -> T:
    if not _room.acquire(blocking=False):
        raise TooMany("Too many passwords are being checked; try again in a moment.")
    hashing = _hashing.submit(work, *args)
    hashing.add_done_callback(lambda _: _room.release())
    return await asyncio.wrap_future(hashing)


@cache
def _nobody() -> str:
    return hash_password(secrets.token_hex())


def _verify(password: str, hashed: str | None) -> bool:
    if hashed is None or hashed.startswith(UNUSABLE_PASSWORD):
        _hasher().verify(password, _nobody())
        return False
    return _hasher().verify(password, hashed)


async def verify_password(password: str, hashed: str | None) -> bool:
    """Whether it is the password; with no hash to compare, as slow as with one. Raises TooMany
    where too many wait."""
    return await _in_turn(_verify, password, hashed)


def session_token(user_id: int, hashed_password: str, key: bytes, lifetime: timedelta) -> str:
    """A signed token that names the user; what the user may do is looked up at each use, and
    whether their password is still the one that it was given for."""
    import jwt

    now = datetime.now(UTC)
    claims = {
        "sub": str(user_id),
        "pwd": mark_of(hashed_password, key),
        "iat": now,
        "exp": now + lifetime,
        "iss": ISSUER,
        "aud": AUDIENCE,
    }
    return jwt.encode(claims, key, algorithm=ALGORITHM)  # pyright: ignore[reportUnknownMemberType]


def mark_of(hashed_password: str, key: bytes) -> str:
    """What a token says of a password: nothing but whether it has changed."""
    return hmac.digest(key, hashed_password.encode(), "sha256").hex()[:16]


def user_of_token(token: str, key: bytes) -> tuple[int, str]:
    """The user's id and the mark of their password. Raises Unauthenticated for anything but a
    valid, unexpired token of ours."""
    import jwt

    try:
        claims = jwt.decode(  # pyright: ignore[reportUnknownMemberType]
            token,
            key,
            algorithms=[ALGORITHM],
            issuer=ISSUER,
            audience=AUDIENCE,
            options={"require": ["exp", "sub", "pwd", "iss", "aud"]},
        )
        return int(claims["sub"]), str(claims["pwd"])
    except (jwt.InvalidTokenError, ValueError) as error:
        raise Unauthenticated("The token is not valid, or not any more; log in again.") from error


def new_api_key() -> str:
    """192 random bits behind a prefix by which scanners and people know what it is."""
    return KEY_PREFIX + secrets.token_hex(24)


def digest(secret: str) -> str:
    """What is stored in place of an API key: its randomness makes a slow hash needless."""
    return hashlib.sha256(secret.encode()).hexdigest()

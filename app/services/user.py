"""Accounts and their API keys.

`create` and `get_by_*` ask for nobody's rights; what takes a `caller` does, and shows and changes
another's account only to an administrator: for anybody else it does not exist.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

from sqlalchemy import delete, func, or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.errors import Conflict, Forbidden, Invalid, NotFound
from app.core.security import (
    CLOSED,
    UNUSABLE_PASSWORD,
    Caller,
    digest,
    hash_password_async,
    new_api_key,
    verify_password,
)
from app.db.session import WRITE
from app.models.api_key import ApiKey
from app.models.user import User
from app.schemas.auth import ApiKeyCreate
from app.schemas.user import PASSWORD_LENGTH, UserCreate, UserUpdate, storable

LOCAL_ADMIN = "local@localhost"
MAX_ID = 2**31 - 1  # PostgreSQL's INTEGER
MAX_KEYS = 100
PREFIX_LENGTH = 11
SEARCH_LENGTH = 254


class UserNotFound(NotFound):
    """No such user, or somebody else: the two look the same."""

    code = "user_not_found"

    def __init__(self) -> None:
        super().__init__("User not found")


class KeyNotFound(NotFound):
    code = "api_key_not_found"

    def __init__(self) -> None:
        super().__init__("API key not found")


class EmailTaken(Conflict):
    code = "email_taken"

    def __init__(self) -> None:
        super().__init__("Another account has this e-mail address.", param="email")


class UserService:
    """User business logic."""

    def __init__(self, db: AsyncSession) -> None:
        self.db = db

    async def get_by_id(self, user_id: int) -> User | None:
        """Get user by ID."""
        if not 0 < user_id <= MAX_ID:
            return None
        result = await self.db.execute(select(User).where(User.id == user_id))
        return result.scalar_one_or_none()

    async def get_by_email(self, email: str) -> User | None:
        """Get user by email."""
        if not storable(email):
            return None
        result = await self.db.execute(select(User).where(User.email == email.strip().lower()))
        return result.scalar_one_or_none()

    async def create(self, data: UserCreate, *, is_admin: bool = False) -> User:
        """Create a new user. Raises EmailTaken."""
        user = User(
            email=data.email,
            name=data.name,
            hashed_password=await hash_password_async(data.password),
            is_admin=is_admin,
        )
        async with self._writing():
            self.db.add(user)
            await self._flush()
        await self.db.refresh(user)
        return user

    async def authenticate(self, email: str, password: str) -> User | None:
        """The user, if it is their password; an unknown e-mail takes as long as a wrong one."""
        user = await self.get_by_email(email)
        await self.db.commit()  # hashing needs no connection
        usable = len(password) <= PASSWORD_LENGTH and storable(password)
        hashed = user.hashed_password if user and usable else None
        return user if await verify_password(password if usable else "", hashed) else None

    async def get_own(self, caller: Caller) -> User:
        return await self.get(caller, caller.user_id)

    async def get(self, caller: Caller, user_id: int) -> User:
        """Raises UserNotFound."""
        user = await self.get_by_id(user_id) if _reaches(caller, user_id) else None
        if user is None or user.hashed_password == CLOSED:
            raise UserNotFound
        return user

    async def list(self, caller: Caller, *, limit: int = 100, after: int = 0) -> Sequence[User]:
        """By id, those above `after`. Raises Forbidden for all but administrators."""
        _require_admin(caller)
        result = await self.db.scalars(
            select(User).where(User.id > after).order_by(User.id).limit(limit)
        )
        return result.all()

    async def search(self, caller: Caller, text: str, limit: int = 20) -> Sequence[User]:
        """Users with `text` in their name or e-mail, by id. Raises Forbidden as `list` does."""
        _require_admin(caller)
        if len(text) > SEARCH_LENGTH or not storable(text):
            return ()
        result = await self.db.scalars(
            select(User)
            .where(
                or_(
                    User.name.icontains(text, autoescape=True),
                    User.email.icontains(text, autoescape=True),
                )
            )
            .order_by(User.id)
            .limit(max(0, min(limit, 100)))
        )
        return result.all()

    async def update_own(self, caller: Caller, changes: UserUpdate) -> User:
        return await self.update(caller, caller.user_id, changes)

    async def update(self, caller: Caller, user_id: int, changes: UserUpdate) -> User:
        """Change what is set in `changes`; one's own password only with the current one.

        Raises UserNotFound, EmailTaken, Conflict, and Invalid or Forbidden without the current
        password.
        """
        known = await self.get(caller, user_id)
        await self.db.commit()
        before, hashed = known.hashed_password, None
        if changes.password is not None:
            if user_id == caller.user_id:
                await _confirm(changes.current_password, before)
            hashed = await hash_password_async(changes.password)
        async with self._writing():
            user = await self._lock(user_id)
            if changes.email is not None and changes.email != user.email:
                _refuse_local_admin(user)
                user.email = changes.email
            if changes.name is not None:
                user.name = changes.name
            if hashed is not None:
                if user.hashed_password != before:
                    raise Conflict("The password was changed meanwhile; try again.")
                user.hashed_password = hashed
            await self._flush()
        await self.db.refresh(user)
        return user

    async def close(self, caller: Caller, user_id: int) -> None:
        """Begins to erase an account: nothing that is known of it lets anybody in any more.

        Raises UserNotFound, Conflict for the local admin.
        """
        _require_reach(caller, user_id)
        async with self._writing():
            user = await self._lock(user_id)
            _refuse_local_admin(user)
            user.hashed_password = CLOSED
            await self.db.execute(delete(ApiKey).where(ApiKey.user_id == user_id))

    async def delete(self, caller: Caller, user_id: int) -> None:
        """With all that the user owns. Raises UserNotFound, Conflict for the local admin."""
        _require_reach(caller, user_id)
        async with self._writing():
            user = await self._lock(user_id)
            _refuse_local_admin(user)
            await self.db.delete(user)

    async def create_key(self, caller: Caller, data: ApiKeyCreate) -> tuple[ApiKey, str]:
        """The key and its secret, of which only a digest is kept. One that is made with another
        lasts no longer than that.

        Raises Forbidden for scopes beyond the caller's own, Conflict at `MAX_KEYS`, UserNotFound.
        """
        beyond = [scope for scope in data.scopes if not caller.may(scope)]
        if beyond:
            raise Forbidden(f"You cannot give what you may not do: {', '.join(beyond)}.")
        secret = new_api_key()
        days = data.expires_in_days
        ends = [caller.until] if caller.until else []
        ends += [datetime.now(UTC) + timedelta(days=days)] if days else []
        key = ApiKey(
            user_id=caller.user_id,
            name=data.name,
            prefix=secret[:PREFIX_LENGTH],
            digest=digest(secret),
            scopes=" ".join(data.scopes),
            expires_at=min(ends, default=None),
        )
        async with self._writing():
            if (await self._lock(caller.user_id)).hashed_password == CLOSED:
                raise UserNotFound
            count = select(func.count()).where(ApiKey.user_id == caller.user_id)
            if (await self.db.scalar(count) or 0) >= MAX_KEYS:
                raise Conflict(f"You have {MAX_KEYS} API keys; revoke one first.")
            self.db.add(key)
        await self.db.refresh(key)
        return key, secret

    async def list_keys(self, caller: Caller) -> Sequence[ApiKey]:
        result = await self.db.scalars(
            select(ApiKey).where(ApiKey.user_id == caller.user_id).order_by(ApiKey.id)
        )
        return result.all()

    async def revoke_key(self, caller: Caller, key_id: int) -> None:
        """At once: the next request with it is refused. Raises KeyNotFound."""
        if not 0 < key_id <= MAX_ID:
            raise KeyNotFound
        async with self._writing():
            revoked = await self.db.scalar(
                delete(ApiKey)
                .where(ApiKey.id == key_id, ApiKey.user_id == caller.user_id)
                .returning(ApiKey.id)
            )
        if revoked is None:
            raise KeyNotFound

    async def ensure_local_admin(self) -> int:
        """The id of the user as whom AUTH=local answers; made at the first start."""
        known = select(User.id).where(User.email == LOCAL_ADMIN)
        user_id = await self.db.scalar(known)
        if user_id is not None:
            return user_id
        user = User(
            email=LOCAL_ADMIN,
            name="Local admin",
            is_admin=True,
            hashed_password=UNUSABLE_PASSWORD,
        )
        try:
            async with self._writing():
                self.db.add(user)
                await self._flush()
                return user.id
        except EmailTaken:  # by another process that starts now
            return (await self.db.scalars(known)).one()

    @asynccontextmanager
    async def _writing(self) -> AsyncGenerator[None]:
        """One transaction, committed at the end and undone by an exception."""
        await self.db.commit()  # what was only read before needs no lock
        async with self.db.begin():
            await self.db.connection(execution_options=WRITE)
            yield

    async def _lock(self, user_id: int) -> User:
        """The user as they are now, and stay until the transaction ends. Raises UserNotFound."""
        if not 0 < user_id <= MAX_ID:
            raise UserNotFound
        user = await self.db.scalar(
            select(User)
            .where(User.id == user_id)
            .with_for_update(key_share=True)
            .execution_options(populate_existing=True)
        )
        if user is None:
            raise UserNotFound
        return user

    async def _flush(self) -> None:
        try:
            await self.db.flush()
        except IntegrityError as error:
            raise EmailTaken from error


def _reaches(caller: Caller, user_id: int) -> bool:
    return user_id == caller.user_id or caller.is_admin


def _require_reach(caller: Caller, user_id: int) -> None:
    if not _reaches(caller, user_id):
        raise UserNotFound


def _require_admin(caller: Caller) -> None:
    if not caller.is_admin:
        raise Forbidden("This needs an administrator.")


def _refuse_local_admin(user: User) -> None:
    if user.email == LOCAL_ADMIN:
        raise Conflict("The local administrator stays: AUTH=local answers as this user.")


async def _confirm(password: str | None, hashed: str) -> None:
    if password is None:
        raise Invalid("A new password needs the current one.", param="current_password")
    if not await verify_password(password, hashed):
        raise Forbidden("The current password is wrong.", param="current_password")

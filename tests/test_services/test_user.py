import asyncio
import sqlite3
from collections.abc import AsyncGenerator
from contextlib import closing
from pathlib import Path
from time import perf_counter

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from app.config import Settings
from app.core.errors import Conflict, Forbidden, Invalid
from app.core.security import ADMIN, EVERYTHING, UNUSABLE_PASSWORD, Caller
from app.db.base import Base
from app.db.session import make_engine, make_sessions
from app.models import User
from app.schemas.auth import ApiKeyCreate
from app.schemas.user import UserCreate, UserUpdate
from app.services.user import LOCAL_ADMIN, MAX_KEYS, EmailTaken, UserNotFound, UserService

PASSWORD = "correct horse battery"

Sessions = async_sessionmaker[AsyncSession]


@pytest.fixture
async def users() -> AsyncGenerator[UserService]:
    """On a plain session, without the engine hooks of this app."""
    engine = create_async_engine("sqlite+aiosqlite:///:memory:")
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with async_sessionmaker(engine, expire_on_commit=False)() as session:
        yield UserService(session)
    await engine.dispose()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "test.db"


@pytest.fixture
async def sessions(file: Path) -> AsyncGenerator[Sessions]:
    engine = make_engine(Settings.model_validate({"database_url": f"sqlite:///{file}"}))
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield make_sessions(engine)
    await engine.dispose()


def data(name: str = "alice") -> UserCreate:
    return UserCreate(email=f"{name}@example.com", name=name, password=PASSWORD)


def as_user(user: User) -> Caller:
    return Caller.of(user.id, EVERYTHING)


def as_admin(user_id: int = 999) -> Caller:
    return Caller.of(user_id, (EVERYTHING, ADMIN))


async def test_a_created_user_is_found_by_id_and_by_email(users: UserService):
    alice = await users.create(data())

    assert await users.get_by_id(alice.id) is alice
    assert await users.get_by_email("alice@example.com") is alice
    assert not alice.is_admin


async def test_an_email_is_found_however_it_is_capitalised(users: UserService):
    alice = await users.create(
        UserCreate(email=" Alice@Example.COM ", name="Alice", password=PASSWORD)
    )

    assert alice.email == "alice@example.com"
    assert await users.get_by_email("ALICE@example.com") is alice


@pytest.mark.parametrize("user_id", [-1, 0, 2**31, 2**63, 10**40])
async def test_an_id_that_no_database_can_hold_is_nobodys(users: UserService, user_id: int):
    assert await users.get_by_id(user_id) is None
    with pytest.raises(UserNotFound):
        await users.delete(as_admin(), user_id)


async def test_a_second_account_with_the_same_email_is_refused(users: UserService):
    await users.create(data())

    with pytest.raises(EmailTaken):
        await users.create(data())

    assert (await users.create(data("bob"))).name == "bob"


async def test_of_several_simultaneous_accounts_with_one_email_one_is_made(sessions: Sessions):
    async def create() -> User | EmailTaken:
        async with sessions() as session:
            try:
                return await UserService(session).create(data())
            except EmailTaken as error:
                return error

    made = await asyncio.gather(*(create() for _ in range(5)))

    assert sum(isinstance(one, User) for one in made) == 1


async def test_a_deleted_users_id_is_not_given_to_the_next_one(users: UserService):
    alice = await users.create(data())
    await users.delete(as_user(alice), alice.id)

    assert (await users.create(data("bob"))).id != alice.id


async def test_only_the_right_password_authenticates(users: UserService):
    alice = await users.create(data())

    assert await users.authenticate("Alice@example.com", PASSWORD) is alice
    assert await users.authenticate("alice@example.com", PASSWORD + " ") is None
    assert await users.authenticate("nobody@example.com", PASSWORD) is None


@pytest.mark.parametrize("text", ["\0", "\ud800", "x" * 100_000])
async def test_impossible_credentials_are_wrong_ones(users: UserService, text: str):
    await users.create(data())

    assert await users.authenticate("alice@example.com", text) is None
    assert await users.authenticate(text, PASSWORD) is None


async def test_an_unknown_email_takes_as_long_as_a_wrong_password(users: UserService):
    await users.create(data())
    await users.authenticate("nobody@example.com", "warm up")

    async def fastest(email: str) -> float:
        times: list[float] = []
        for _ in range(5):
            start = perf_counter()
            await users.authenticate(email, "wrong password")
            times.append(perf_counter() - start)
        return min(times)

    assert 0.5 < await fastest("nobody@example.com") / await fastest("alice@example.com") < 2


async def test_neither_passwords_nor_keys_are_in_the_database(sessions: Sessions, file: Path):
    async with sessions() as session:
        users = UserService(session)
        alice = await users.create(data())
        _, secret = await users.create_key(as_user(alice), ApiKeyCreate(name="laptop"))

    with closing(sqlite3.connect(file)) as database:
        dump = "\n".join(database.iterdump())

    assert "alice@example.com" in dump
    assert PASSWORD not in dump
    assert secret not in dump


async def test_a_stranger_neither_changes_nor_deletes_an_account(users: UserService):
    alice, bob = await users.create(data()), await users.create(data("bob"))

    with pytest.raises(UserNotFound):
        await users.get(as_user(bob), alice.id)
    with pytest.raises(UserNotFound):
        await users.update(as_user(bob), alice.id, UserUpdate(name="Mallory"))
    with pytest.raises(UserNotFound):
        await users.delete(as_user(bob), alice.id)

    assert (await users.get_own(as_user(alice))).name == "alice"


async def test_what_is_not_set_stays(users: UserService):
    alice = await users.create(data())

    changed = await users.update_own(as_user(alice), UserUpdate(name="Alice Liddell"))

    assert (changed.name, changed.email) == ("Alice Liddell", "alice@example.com")
    assert await users.authenticate("alice@example.com", PASSWORD)


async def test_an_email_cannot_be_changed_to_anothers(users: UserService):
    alice, _ = await users.create(data()), await users.create(data("bob"))

    with pytest.raises(EmailTaken):
        await users.update_own(as_user(alice), UserUpdate(email="bob@example.com"))


async def test_ones_own_password_changes_only_with_the_current_one(users: UserService):
    alice = await users.create(data())
    new = "another long password"

    with pytest.raises(Invalid):
        await users.update_own(as_user(alice), UserUpdate(password=new))
    with pytest.raises(Forbidden):
        await users.update_own(as_user(alice), UserUpdate(password=new, current_password="guess"))
    await users.update_own(as_user(alice), UserUpdate(password=new, current_password=PASSWORD))

    assert await users.authenticate("alice@example.com", new)
    assert await users.authenticate("alice@example.com", PASSWORD) is None


async def test_of_two_simultaneous_password_changes_one_is_made(sessions: Sessions):
    async with sessions() as session:
        caller = as_user(await UserService(session).create(data()))

    async def change(password: str) -> str | Conflict:
        changes = UserUpdate(password=password, current_password=PASSWORD)
        async with sessions() as session:
            try:
                await UserService(session).update_own(caller, changes)
            except Conflict as error:
                return error
            return password

    outcomes = await asyncio.gather(change("first password"), change("second password"))

    (made,) = [outcome for outcome in outcomes if isinstance(outcome, str)]
    async with sessions() as session:
        assert await UserService(session).authenticate("alice@example.com", made)


async def test_only_an_administrator_searches_and_lists(users: UserService):
    alice = await users.create(data())

    with pytest.raises(Forbidden):
        await users.search(as_user(alice), "a")
    with pytest.raises(Forbidden):
        await users.list(as_user(alice))


async def test_search_takes_wildcards_and_quotes_literally(users: UserService):
    for name in ("100% Ada", "100 Bob", "snake_case", "back\\slash", "O'Hara"):
        await users.create(
            UserCreate(email=f"u{abs(hash(name))}@example.com", name=name, password=PASSWORD)
        )

    async def found(text: str) -> list[str]:
        return [user.name for user in await users.search(as_admin(), text)]

    assert await found("100%") == ["100% Ada"]
    assert await found("e_c") == ["snake_case"]
    assert await found("\\") == ["back\\slash"]
    assert await found("o'h") == ["O'Hara"]
    assert await found("' OR 1=1 --") == []
    assert await found("\0") == await found("\ud800") == await found("%" * 60_000) == []


async def test_search_finds_by_email_and_stops_at_its_limit(users: UserService):
    for name in ("ada", "bob", "cy"):
        await users.create(data(name))

    assert [user.name for user in await users.search(as_admin(), "BOB@EX")] == ["bob"]
    assert len(await users.search(as_admin(), "example.com", limit=2)) == 2
    assert len(await users.search(as_admin(), "example.com", limit=-1)) == 0


async def test_a_list_continues_after_the_last_id(users: UserService):
    made = [(await users.create(data(name))).id for name in ("ada", "bob", "cy")]

    first = await users.list(as_admin(), limit=2)
    rest = await users.list(as_admin(), limit=2, after=first[-1].id)

    assert [user.id for user in (*first, *rest)] == made


async def test_a_key_cannot_do_more_than_its_maker(users: UserService):
    alice = await users.create(data())
    reader = Caller.of(alice.id, "weather:read")

    for scopes in (["*"], ["weather:write"], ["weather:read", "admin"]):
        with pytest.raises(Forbidden):
            await users.create_key(reader, ApiKeyCreate(name="more", scopes=scopes))
    key, _ = await users.create_key(reader, ApiKeyCreate(name="same", scopes=["weather:read"]))

    assert key.scopes == "weather:read"


async def test_the_number_of_keys_is_bounded_also_for_simultaneous_requests(sessions: Sessions):
    async with sessions() as session:
        caller = as_user(await UserService(session).create(data()))

    async def create() -> bool:
        async with sessions() as session:
            try:
                await UserService(session).create_key(caller, ApiKeyCreate(name="one more"))
            except Conflict:
                return False
            return True

    made = await asyncio.gather(*(create() for _ in range(MAX_KEYS + 3)))

    assert sum(made) == MAX_KEYS


async def test_the_local_admin_is_made_once(users: UserService):
    user_id = await users.ensure_local_admin()

    assert await users.ensure_local_admin() == user_id
    admin = await users.get_by_email(LOCAL_ADMIN)
    assert admin is not None
    assert (admin.id, admin.is_admin) == (user_id, True)
    assert admin.hashed_password == UNUSABLE_PASSWORD
    assert await users.authenticate(LOCAL_ADMIN, UNUSABLE_PASSWORD) is None


async def test_simultaneous_starts_make_one_local_admin(sessions: Sessions):
    async def start() -> int:
        async with sessions() as session:
            return await UserService(session).ensure_local_admin()

    assert len(set(await asyncio.gather(*(start() for _ in range(5))))) == 1


async def test_the_local_admin_cannot_be_deleted_or_given_an_email(users: UserService):
    caller = as_admin(await users.ensure_local_admin())

    with pytest.raises(Conflict):
        await users.delete(caller, caller.user_id)
    with pytest.raises(Conflict):
        await users.update_own(caller, UserUpdate(email="me@example.com"))

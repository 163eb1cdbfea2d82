"""Real parts: both databases, the app on a real port, a scripted model, a real tool server."""

import asyncio
import gc
import json
import os
import shutil
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

sys.dont_write_bytecode = False  # as for the processes of the tests: see `clean_environ`

import pytest
from httpx2 import AsyncClient
from openai import AsyncOpenAI

from tests.server import ThreadedServer, clean_environ

for name in set(os.environ) - set(clean_environ()):
    del os.environ[name]

from app.config import Settings
from app.core.security import hash_password, session_token
from app.db.migrate import migrate
from app.db.session import make_engine, make_sessions
from app.models import User
from tests.plugins import plugged_in
from tests.postgres import Postgres, find_postgres
from tests.toolserver import ToolServer
from tests.upstream import Upstream

NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # reads no authorities, which takes 30 ms
PASSWORD = "correct horse battery"
SECRET = "a secret of the tests, thirty-two bytes"

NewUrl = Callable[[], str]

_postgres, _why_not = find_postgres()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="faults: take the time to find the rare")
    parser.addoption("--out", help="faults: file that gets the figures of each test as JSON")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        items[:] = [item for item in items if not item.get_closest_marker("long")]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        if report.when == "call" and report.user_properties:
            figures = dict(report.user_properties)
            terminalreporter.write_line(f"{report.nodeid.split('::')[1]}: {json.dumps(figures)}")
            if out := config.getoption("--out"):
                with open(out, "a") as file:
                    print(json.dumps({"test": report.nodeid, **figures}), file=file)
    if _postgres is None:
        terminalreporter.write_line(f"Not run on PostgreSQL: {_why_not}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _postgres is None and os.environ.get("CI") == "true" and session.exitstatus == 0:
        session.exitstatus = 1


@pytest.fixture(autouse=True, scope="module")
def collected() -> Iterator[None]:
    """Each app that starts keeps what there is from being collected, also the apps before it."""
    yield
    gc.unfreeze()
    gc.collect()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    assert _postgres is not None, _why_not
    with _postgres as server:
        yield server


DATABASES = ["sqlite", *(["postgres"] if _postgres else [])]


def _with_tables(url: str) -> None:
    async def bring_up() -> None:
        engine = make_engine(settings_of({"DATABASE_URL": url}))
        await migrate(engine)
        await engine.dispose()

    asyncio.run(bring_up())


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file to copy, with all tables."""
    path = tmp_path_factory.mktemp("template") / "template.db"
    _with_tables(f"sqlite+aiosqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def postgres_template(postgres: Postgres) -> str:
    """The name of a database to copy, with all tables."""
    name = postgres.create_database()
    _with_tables(postgres.url(name))
    return name


@pytest.fixture(params=DATABASES)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database of each kind, with all tables and nothing in them."""
    if request.param == "sqlite":
        shutil.copy(request.getfixturevalue("sqlite_template"), tmp_path / "test.db")
        yield f"sqlite+aiosqlite:///{tmp_path}/test.db"
        return
    server: Postgres = request.getfixturevalue("postgres")
    name = server.create_database(request.getfixturevalue("postgres_template"))
    yield server.url(name)
    server.drop_database(name)


@pytest.fixture
def new_url(request: pytest.FixtureRequest, database_url: str, tmp_path: Path) -> Iterator[NewUrl]:
    """Makes empty databases of the same kind as `database_url`, elsewhere."""
    made: list[str] = []

    def make() -> str:
        if database_url.startswith("sqlite"):
            made.append(f"sqlite+aiosqlite:///{tmp_path}/elsewhere{len(made)}/app.db")
        else:
            server: Postgres = request.getfixturevalue("postgres")
            made.append(server.url(server.create_database()))
        return made[-1]

    yield make
    for url in made:
        if not url.startswith("sqlite"):
            request.getfixturevalue("postgres").drop_database(url.rpartition("/")[2])


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        yield server


@pytest.fixture
def tools() -> Iterator[ToolServer]:
    with ToolServer() as server:
        yield server


@pytest.fixture
def tester() -> Iterator[None]:
    """The agent `tester`, whose tool `erase` needs a person's approval."""
    with plugged_in():
        yield


@pytest.fixture
def environ(database_url: str, upstream: Upstream, tools: ToolServer) -> dict[str, str]:
    """The environment of a server that requires a bearer and asks the scripted model."""
    return {
        "AUTH": "required",
        "SECRET_KEY": SECRET,
        "DATABASE_URL": database_url,
        "MODEL": "openai-chat:scripted",
        "OPENAI_API_KEY": "test-key",
        "OPENAI_BASE_URL": upstream.url,
        "WEATHER_API_URL": tools.url,
        "WEATHER_GEOCODING_URL": tools.url,
        "SHUTDOWN_TIMEOUT": "4",
    }


@cache
def _hashed() -> str:
    return hash_password(PASSWORD)  # slow by design: once is enough


def settings_of(environ: dict[str, str], **changes: Any) -> Settings:
    fields = {name.lower(): value for name, value in environ.items()}
    return Settings(_env_file=None, **{**fields, **changes})  # pyright: ignore[reportCallIssue]


@pytest.fixture
def server(environ: dict[str, str]) -> Iterator[ThreadedServer]:
    with ThreadedServer(settings_of(environ)) as running:
        yield running


@pytest.fixture
def bearer(environ: dict[str, str]) -> Callable[..., Any]:
    """Makes a user, once the server has made the tables, and returns a session token."""

    async def make(name: str, *, is_admin: bool = False) -> str:
        settings = settings_of(environ)
        engine = make_engine(settings)
        user = User(
            email=f"{name.lower()}@example.com",
            name=name,
            hashed_password=_hashed(),
            is_admin=is_admin,
        )
        async with make_sessions(engine)() as db:
            db.add(user)
            await db.commit()
        await engine.dispose()
        return session_token(
            user.id, user.hashed_password, settings.signing_key(), settings.session_lifetime
        )

    return make


def client_of(url: str, token: str | None = None) -> AsyncClient:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return AsyncClient(base_url=url, headers=headers, timeout=30, verify=NO_TLS)


@pytest.fixture
async def anonymous(server: ThreadedServer) -> AsyncIterator[AsyncClient]:
    async with client_of(server.url) as client:
        yield client


@pytest.fixture
async def alice(server: ThreadedServer, bearer: Callable[..., Any]) -> AsyncIterator[AsyncClient]:
    async with client_of(server.url, await bearer("Alice")) as client:
        yield client


@pytest.fixture
async def bob(server: ThreadedServer, bearer: Callable[..., Any]) -> AsyncIterator[AsyncClient]:
    async with client_of(server.url, await bearer("Bob")) as client:
        yield client


@pytest.fixture
async def admin(server: ThreadedServer, bearer: Callable[..., Any]) -> AsyncIterator[AsyncClient]:
    async with client_of(server.url, await bearer("Admin", is_admin=True)) as client:
        yield client


@pytest.fixture
async def local(environ: dict[str, str]) -> AsyncIterator[AsyncClient]:
    """This machine's own user, at a server with AUTH=local."""
    with ThreadedServer(settings_of(environ, auth="local")) as running:
        async with client_of(running.url) as client:
            yield client


@pytest.fixture
async def openai_client(alice: AsyncClient) -> AsyncIterator[AsyncOpenAI]:
    """The official client, as Alice."""
    token = alice.headers["Authorization"].removeprefix("Bearer ")
    async with AsyncOpenAI(
        base_url=f"{alice.base_url}/v1".replace("//v1", "/v1"), api_key=token, max_retries=0
    ) as client:
        yield client

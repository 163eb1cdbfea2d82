"""Models, schema.sql and migrations say the same, and databases get there once, and back."""

import asyncio
import os
import re
import shutil
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from sqlalchemy import Column, Connection, MetaData, String, event, inspect, text
from sqlalchemy.ext.asyncio import AsyncEngine

from app.config import settings
from app.db.atlas import (
    HOME,
    ROOT,
    atlas_url,
    downgrade,
    find_atlas,
    run_atlas,
    upgrade,
    write_schema,
)
from app.db.migrate import (
    FOLDERS,
    MIGRATIONS,
    CannotMigrate,
    add_up,
    exclusive,
    execute,
    migrate,
    revisions,
)
from app.db.session import make_engine
from app.models import User
from tests.postgres import Postgres, find_postgres

NewUrl = Callable[[], str]
NewEngine = Callable[[], AsyncEngine]


@pytest.fixture(params=["sqlite", "postgres"])
def new_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[NewUrl]:
    """Makes an empty database at each call; its URL."""
    names: list[str] = []
    if request.param == "sqlite":

        def new_sqlite() -> str:
            names.append(f"{len(names)}.db")
            return f"sqlite+aiosqlite:///{tmp_path / names[-1]}"

        yield new_sqlite
        return

    server = server_for(request)

    def new_postgres() -> str:
        names.append(server.create_database())
        return server.url(names[-1])

    yield new_postgres
    for name in names:
        server.drop_database(name)


@pytest_asyncio.fixture
async def new_engine(new_url: NewUrl) -> AsyncGenerator[NewEngine]:
    engines: list[AsyncEngine] = []

    def make() -> AsyncEngine:
        engines.append(make_engine(settings.model_copy(update={"database_url": new_url()})))
        return engines[-1]

    yield make
    for engine in engines:
        await engine.dispose()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A copy of what stands in `app/db`, to be changed."""
    shutil.copytree(MIGRATIONS, tmp_path / "db" / MIGRATIONS.name)
    return tmp_path / "db"


@pytest.fixture
def atlas(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real Atlas, and a PostgreSQL for it to work in. It may be missing, but not in CI."""
    try:
        find_atlas()
    except CannotMigrate as error:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(str(error))
    monkeypatch.setenv("DEV_DATABASE_URL", server_for(request).url("postgres"))


@pytest.fixture
def wider() -> MetaData:
    """The models, as they would be if users had a telephone."""
    metadata = MetaData()
    for table in User.metadata.sorted_tables:
        table.to_metadata(metadata)
    metadata.tables["users"].append_column(Column("phone", String(20), index=True))
    return metadata


async def test_migrations_make_what_the_models_say(new_engine: NewEngine):
    migrated, created = new_engine(), new_engine()

    await migrate(migrated)
    async with created.begin() as connection:
        await connection.run_sync(User.metadata.create_all)

    assert await reflect(migrated) == await reflect(created)


@pytest.mark.parametrize("new_url", ["postgres"], indirect=True)
async def test_schema_sql_makes_what_the_models_say(new_engine: NewEngine):
    loaded, created = new_engine(), new_engine()

    async with exclusive(loaded) as connection:
        await execute(connection, (HOME / "schema.sql").read_text())
    async with created.begin() as connection:
        await connection.run_sync(User.metadata.create_all)

    assert await reflect(loaded) == await reflect(created)


def test_schema_sql_is_as_generated(tmp_path: Path):
    write_schema(tmp_path)

    assert (tmp_path / "schema.sql").read_text() == (HOME / "schema.sql").read_text()


async def test_migrating_again_is_one_query(new_engine: NewEngine):
    engine = new_engine()
    first = await migrate(engine)
    queries: list[str] = []

    @event.listens_for(engine.sync_engine, "before_cursor_execute")
    def note(*args: Any) -> None:  # pyright: ignore[reportUnusedFunction]
        queries.append(args[2])

    assert first == [path.name for path in sorted(folder(engine, MIGRATIONS).glob("*.sql"))]
    assert await migrate(engine) == []
    assert [query for query in queries if not query.startswith("BEGIN")] == queries[-1:]


async def test_processes_that_start_at_once_migrate_once(new_url: NewUrl):
    url = new_url()

    async def start() -> tuple[int | None, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "app.db.migrate", "apply"),
            cwd=ROOT,
            env={**os.environ, "DATABASE_URL": url},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        return process.returncode, output.decode()

    ends = await asyncio.gather(*(start() for _ in range(3)))

    assert [status for status, _ in ends] == [0] * 3, ends
    assert sorted(output.split()[0] for _, output in ends) == ["Applied", *["Nothing"] * 2]


@pytest.mark.parametrize("change", ["edit", "add", "remove", "forget"])
async def test_files_that_atlas_sum_does_not_know_are_refused(
    new_engine: NewEngine, home: Path, change: str
):
    engine = new_engine()
    directory = folder(engine, home / "migrations")
    add(directory, "20990101000000_more.sql", "CREATE TABLE more (id integer);")
    match change:
        case "edit":
            with (directory / "20990101000000_more.sql").open("a") as file:
                file.write("DROP TABLE users;")
        case "add":
            (directory / "20990101000001_most.sql").write_text("DROP TABLE users;")
        case "remove":
            (directory / "20990101000000_more.sql").unlink()
        case _:
            (directory / "atlas.sum").unlink()

    with pytest.raises(CannotMigrate, match=r"atlas\.sum does not agree with"):
        await migrate(engine, home / "migrations")

    assert await tables(engine) == set()


async def test_a_database_that_was_made_otherwise_is_refused(new_engine: NewEngine):
    engine = new_engine()
    async with engine.begin() as connection:
        await connection.run_sync(User.metadata.create_all)

    with pytest.raises(CannotMigrate, match="no record of migrations"):
        await migrate(engine)

    assert revisions.name not in await tables(engine)


async def test_a_database_of_a_newer_version_is_refused(new_engine: NewEngine, home: Path):
    engine = new_engine()
    add(
        folder(engine, home / "migrations"),
        "20990101000000_more.sql",
        "CREATE TABLE more (id integer);",
    )
    await migrate(engine, home / "migrations")

    with pytest.raises(CannotMigrate, match="20990101000000, which is not among the files"):
        await migrate(engine)


async def test_a_migration_that_comes_too_late_is_refused(new_engine: NewEngine, home: Path):
    engine = new_engine()
    directory = folder(engine, home / "migrations")
    add(directory, "20990101000002_late.sql", "CREATE TABLE late (id integer);")
    await migrate(engine, home / "migrations")
    add(directory, "20990101000001_early.sql", "CREATE TABLE early (id integer);")

    with pytest.raises(CannotMigrate, match=r"20990101000001_early\.sql is older"):
        await migrate(engine, home / "migrations")


async def test_all_that_is_pending_is_applied_or_nothing(new_engine: NewEngine, home: Path):
    engine = new_engine()
    add(
        folder(engine, home / "migrations"),
        "20990101000000_half.sql",
        "CREATE TABLE half (id integer); INSERT INTO nowhere VALUES (1);",
    )

    with pytest.raises(CannotMigrate, match=r"half\.sql failed: .*nowhere"):
        await migrate(engine, home / "migrations")

    assert await tables(engine) == set()


@pytest.mark.parametrize("new_url", ["sqlite"], indirect=True)
async def test_rows_that_would_refer_to_nothing_are_refused(new_engine: NewEngine, home: Path):
    engine = new_engine()
    await migrate(engine)
    rows = await fill(engine)
    add(folder(engine, home / "migrations"), "20990101000000_empty.sql", "DELETE FROM users;")

    with pytest.raises(CannotMigrate, match="api_keys refers to one that is not in users"):
        await migrate(engine, home / "migrations")

    assert await read_rows(engine) == rows
    async with engine.connect() as connection:
        assert (await connection.exec_driver_sql("PRAGMA foreign_keys")).scalar() == 1


@pytest.mark.usefixtures("atlas")
async def test_atlas_goes_on_from_here_and_we_from_there(new_engine: NewEngine, home: Path):
    engine = new_engine()
    directory = folder(engine, home / "migrations")
    await migrate(engine, home / "migrations")
    assert "Already at latest version" in ask_atlas("status", engine, directory)

    add(directory, "20990101000001_more.sql", "CREATE TABLE more (id integer);")
    assert "Pending Files:    1" in ask_atlas("status", engine, directory)
    ask_atlas("apply", engine, directory)
    assert await migrate(engine, home / "migrations") == []

    add(directory, "20990101000002_most.sql", "CREATE TABLE most (id integer);")
    assert await migrate(engine, home / "migrations") == ["20990101000002_most.sql"]
    assert "Already at latest version" in ask_atlas("status", engine, directory)
    assert await tables(engine) >= {"users", "more", "most"}


@pytest.mark.usefixtures("atlas")
async def test_up_down_and_up_again_keeps_all_rows(
    new_engine: NewEngine, home: Path, wider: MetaData, capsys: pytest.CaptureFixture[str]
):
    engine = new_engine()
    migrations = home / "migrations"
    await migrate(engine, migrations)
    before = await reflect(engine)
    rows = await fill(engine)

    await upgrade(engine, "add_phone", home, wider)
    made = sorted(folder(engine, migrations).glob("*_add_phone.sql"))
    after = await reflect(engine)

    assert len(made) == 1
    assert "phone" in after["users"]["columns"]
    assert "phone VARCHAR(20)" in (home / "schema.sql").read_text()
    assert await read_rows(engine) == rows

    await downgrade(engine, migrations, agreed=lambda: True)

    assert "phone" in capsys.readouterr().out.partition("Undo ")[2]
    assert await reflect(engine) == before
    assert await read_rows(engine) == rows
    assert "Pending Files:    1" in ask_atlas("status", engine, folder(engine, migrations))

    assert await migrate(engine, migrations) == [made[0].name]
    assert await reflect(engine) == after
    assert await read_rows(engine) == rows
    assert "Already at latest version" in ask_atlas("status", engine, folder(engine, migrations))


@pytest.mark.usefixtures("atlas")
async def test_atlas_sees_no_difference_between_migrations_and_models(
    new_engine: NewEngine, home: Path
):
    await upgrade(new_engine(), "nothing", home)

    assert not list(home.rglob("*_nothing.sql"))


@pytest.mark.usefixtures("atlas")
async def test_the_first_migration_can_be_undone_too(new_engine: NewEngine):
    engine = new_engine()

    for _ in await migrate(engine):
        await downgrade(engine, agreed=lambda: True)

    assert await tables(engine) == {revisions.name}
    with pytest.raises(CannotMigrate, match="none to undo"):
        await downgrade(engine, agreed=lambda: True)
    assert await migrate(engine)


@pytest.mark.usefixtures("atlas")
async def test_nothing_is_undone_unless_agreed(
    new_engine: NewEngine, capsys: pytest.CaptureFixture[str]
):
    engine = new_engine()
    await migrate(engine)
    before = await reflect(engine)

    with pytest.raises(CannotMigrate, match="--yes"):
        await downgrade(engine, agreed=lambda: False)

    assert "DROP TABLE" in capsys.readouterr().out
    assert await reflect(engine) == before
    assert await migrate(engine) == []


def server_for(request: pytest.FixtureRequest) -> Postgres:
    """The test server; without one the test is skipped, which the summary counts as a failure in
    CI."""
    found, reason = find_postgres()
    if found is None:
        pytest.skip(reason)
    return request.getfixturevalue("postgres")


def folder(engine: AsyncEngine, migrations: Path) -> Path:
    return migrations / FOLDERS[engine.dialect.name]


def add(directory: Path, name: str, sql: str) -> None:
    """One more migration, properly entered in `atlas.sum`."""
    (directory / name).write_text(sql)
    (directory / "atlas.sum").write_text("\n".join(add_up(directory)[1]) + "\n")


def ask_atlas(question: str, engine: AsyncEngine, directory: Path) -> str:
    url = atlas_url(engine.url.render_as_string(hide_password=False))
    return run_atlas("migrate", question, "--dir", f"file://{directory}", "--url", url)


async def fill(engine: AsyncEngine) -> list[tuple[Any, ...]]:
    """A user, and a key that would go with them."""
    async with engine.begin() as connection:
        await connection.execute(
            text(
                "INSERT INTO users (id, email, name, hashed_password, is_admin)"
                " VALUES (7, 'ada@example.com', 'Ada', '-', true)"
            )
        )
        await connection.execute(
            text(
                "INSERT INTO api_keys (id, user_id, name, prefix, digest, scopes)"
                " VALUES (9, 7, 'mine', 'ab', 'cd', '*')"
            )
        )
    return await read_rows(engine)


async def read_rows(engine: AsyncEngine) -> list[tuple[Any, ...]]:
    query = text(
        "SELECT users.id, email, users.name, is_admin, users.created_at, digest, scopes"
        " FROM users JOIN api_keys ON users.id = user_id"
    )
    async with engine.connect() as connection:
        rows = [tuple(row) for row in await connection.execute(query)]
    assert len(rows) == 1
    return rows


async def tables(engine: AsyncEngine) -> set[str]:
    async with engine.connect() as connection:
        return await connection.run_sync(lambda sync: set(inspect(sync).get_table_names()))


async def reflect(engine: AsyncEngine) -> dict[str, dict[str, Any]]:
    """What the database says of each table, in no order. SQLite ignores lengths, and so do we."""

    def look(connection: Connection) -> dict[str, dict[str, Any]]:
        inspector = inspect(connection)
        sqlite = connection.dialect.name == "sqlite"

        def kind(column: Any) -> str:
            return re.sub(r"\(length=\d+\)", "()" if sqlite else r"\g<0>", repr(column["type"]))

        def source(name: str) -> str:
            query = text("SELECT sql FROM sqlite_master WHERE name = :name")
            return connection.execute(query, {"name": name}).scalar_one()

        def references(name: str) -> list[tuple[Any, ...]]:
            if sqlite:  # whose actions the inspector does not always find
                query = text(
                    'SELECT "from", "table", "to", on_delete FROM pragma_foreign_key_list(:name)'
                )
                return [tuple(row) for row in connection.execute(query, {"name": name})]
            return [
                (
                    foreign["constrained_columns"],
                    foreign["referred_table"],
                    foreign["referred_columns"],
                    sorted(foreign.get("options", {}).items()),
                )
                for foreign in inspector.get_foreign_keys(name)
            ]

        return {
            name: {
                "columns": {
                    column["name"]: (kind(column), column["nullable"], column["default"])
                    for column in inspector.get_columns(name)
                },
                "key": inspector.get_pk_constraint(name)["constrained_columns"],
                "refers to": sorted(references(name)),
                "indexes": {
                    index["name"]: (index["column_names"], bool(index["unique"]))
                    for index in inspector.get_indexes(name)
                },
                "reused ids": sqlite and "AUTOINCREMENT" not in source(name),
                "checks": {
                    check["name"]: check["sqltext"]
                    for check in inspector.get_check_constraints(name)
                },
            }
            for name in inspector.get_table_names()
            if name != revisions.name
        }

    async with engine.connect() as connection:
        return await connection.run_sync(look)


async def test_runs_from_before_there_were_turns_keep_their_order(
    new_engine: NewEngine, home: Path
):
    engine = new_engine()
    directory = folder(engine, home / "migrations")
    later = sorted(directory.glob("*.sql"))[1:]
    texts = {path.name: path.read_text() for path in later}
    for path in later:
        path.unlink()
    (directory / "atlas.sum").write_text("\n".join(add_up(directory)[1]) + "\n")
    await migrate(engine, home / "migrations")
    await fill(engine)
    async with engine.begin() as connection:
        await connection.execute(
            text("INSERT INTO conversations (id, owner_id, external_id) VALUES ('c', 7, 'chat')")
        )
        for day, (run, conversation, deleted, status) in enumerate(
            [
                ("b", "c", False, "completed"),
                ("x", "c", True, "completed"),
                ("a", "c", False, "waiting"),
                ("l", None, False, "completed"),
            ],
            start=1,
        ):
            await connection.execute(
                text(
                    "INSERT INTO runs (id, owner_id, conversation_id, kind, program, scopes,"
                    " status, options, created_at, deleted_at) VALUES (:id, 7, :conversation,"
                    " 'agent', 'assistant', '*', :status, '{}', :at, :deleted)"
                ),
                {
                    "id": run,
                    "conversation": conversation,
                    "status": status,
                    "at": datetime(2026, 1, day, tzinfo=UTC),
                    "deleted": datetime(2026, 2, 1, tzinfo=UTC) if deleted else None,
                },
            )

    for name, sql in texts.items():
        add(directory, name, sql)
    await migrate(engine, home / "migrations")

    async with engine.connect() as connection:
        query = text("SELECT id, position, turn_id, cancelling FROM runs ORDER BY id")
        rows = [tuple(row) for row in await connection.execute(query)]
    places = {run: (position, turn == run, bool(stops)) for run, position, turn, stops in rows}
    assert places == {
        "a": (2, True, True),
        "b": (1, True, False),
        "l": (None, True, False),
        "x": (None, True, False),
    }

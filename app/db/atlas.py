"""The developer's side of the schema: Atlas makes migrations from the models, and undoes them.

The models are the desired state. They are rendered as SQL and loaded into a throwaway database,
which every edition of Atlas can compare a directory of migrations with.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from sqlalchemy import Dialect, MetaData, inspect
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.schema import CreateIndex, CreateTable, ExecutableDDLElement

from app.config import settings
from app.db.migrate import (
    FOLDERS,
    MIGRATIONS,
    CannotMigrate,
    Migration,
    applied,
    exclusive,
    execute,
    migrate,
    pending,
    read,
    revisions,
)
from app.db.session import make_engine
from app.models import User

HOME = MIGRATIONS.parent
ROOT = HOME.parents[1]
HEADER = """\
-- The schema as the models say, for PostgreSQL. Generated: `just db-upgrade NAME` writes it.
"""
DIALECTS: dict[str, Callable[[], Dialect]] = {
    "sqlite": sqlite.dialect,
    "postgresql": postgresql.dialect,
}


async def upgrade(
    engine: AsyncEngine, name: str, home: Path = HOME, metadata: MetaData = User.metadata
) -> None:
    """Make the migrations from what those in `home` say to what `metadata` says, for both
    databases, write `schema.sql`, and apply what is pending to `engine`'s."""
    if not re.fullmatch(r"\w+", name, re.ASCII):
        raise CannotMigrate(f"{name!r} becomes part of a file's name: only letters, digits and _.")
    migrations = home / MIGRATIONS.name
    files = {dialect: _read(migrations / folder) for dialect, folder in FOLDERS.items()}
    changes = {
        dialect: await _difference(dialect, files[dialect], to=schema(make(), metadata))
        for dialect, make in DIALECTS.items()
    }
    write_schema(home, metadata)
    # One version for both, and newer than all.
    newest = max((int(file.version) for each in files.values() for file in each), default=0)
    version = max(int(datetime.now(UTC).strftime("%Y%m%d%H%M%S")), newest + 1)
    for dialect, change in changes.items():
        if change:
            path = migrations / FOLDERS[dialect] / f"{version}_{name}.sql"
            path.write_text(change)
            _hash(path.parent)
            print(f"Made {path}:\n{change}")
    if not any(changes.values()):
        print("The migrations already lead to the models.")
    for done in await migrate(engine, migrations):
        print(f"Applied {done}")


async def downgrade(
    engine: AsyncEngine, migrations: Path = MIGRATIONS, *, agreed: Callable[[], bool]
) -> None:
    """Undo the newest migration of `engine`'s database; its file stays. Prints the SQL first
    and does nothing unless `agreed()`.

    What the migration created goes, with the data in it; all other rows are kept.
    """
    dialect = engine.dialect.name
    files = read(migrations / FOLDERS[dialect])
    async with engine.connect() as connection:
        tables = await connection.run_sync(lambda sync: inspect(sync).get_table_names())
        done = await applied(connection) if revisions.name in tables else []
    pending(files, done)
    if not done:
        raise CannotMigrate("No migration is applied, so there is none to undo.")
    files = [file for file in files if file.version <= done[-1]]
    change = await _difference(dialect, files, to="\n".join(file.sql for file in files[:-1]))
    print(f"-- Undo {files[-1].name}:\n{change}", flush=True)
    if not agreed():
        raise CannotMigrate("Nothing was changed; `--yes` agrees without being asked.")
    async with exclusive(engine) as connection:
        if await applied(connection) != done:
            raise CannotMigrate("Somebody else has migrated meanwhile; nothing was changed.")
        await execute(connection, change)
        await connection.execute(revisions.delete().where(revisions.c.version == done[-1]))
    print(f"Undone {files[-1].name}")


def find_atlas() -> str:
    """The path of the Atlas program. Raises CannotMigrate when there is none."""
    built = ROOT / ".cache" / "atlas" / "atlas"
    found = os.environ.get("ATLAS") or shutil.which("atlas") or (built.exists() and str(built))
    if not found:
        raise CannotMigrate(
            "This needs Atlas: `curl -sSf https://atlasgo.sh | sh` installs it, or `.ci/atlas`"
            " builds it; ATLAS may say where it is."
        )
    return found


def run_atlas(*options: str) -> str:
    """What Atlas prints. Raises CannotMigrate with its words when it fails."""
    try:
        done = subprocess.run(
            [find_atlas(), *options],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "ATLAS_NO_UPDATE_NOTIFIER": "1"},
        )
    except OSError as error:
        raise CannotMigrate(f"Atlas does not start: {error}") from error
    if done.returncode:
        raise CannotMigrate(f"`atlas {' '.join(options[:2])}`: {done.stderr or done.stdout}")
    return done.stdout


def schema(dialect: Dialect, metadata: MetaData) -> str:
    """The models as SQL, always in the same order."""
    statements: list[str] = []
    for table in metadata.sorted_tables:
        indexes = sorted(table.indexes, key=lambda index: str(index.name))
        items: list[ExecutableDDLElement] = [CreateTable(table), *map(CreateIndex, indexes)]
        statements += [str(item.compile(dialect=dialect)) for item in items]
    text = "".join(f"{statement.strip()};\n\n" for statement in statements)
    return re.sub(r" +$", "", text, flags=re.M)


def write_schema(home: Path = HOME, metadata: MetaData = User.metadata) -> None:
    text = schema(postgresql.dialect(), metadata)
    (home / "schema.sql").write_text(f"{HEADER}\n{text}".rstrip() + "\n")


async def _difference(dialect: str, files: Sequence[Migration], *, to: str) -> str:
    """The SQL that leads from what `files` make to what the SQL `to` makes; empty if the same."""
    with _throwaway(dialect) as (url, dev_url):
        engine = make_engine(settings.model_copy(update={"database_url": url}))
        try:
            async with exclusive(engine) as connection:
                await execute(connection, to)
        finally:
            await engine.dispose()
        return _diff(files, atlas_url(url), dev_url)


def _diff(files: Sequence[Migration], desired_url: str, dev_url: str) -> str:
    with TemporaryDirectory() as place:
        directory = Path(place)
        for file in files:
            (directory / file.name).write_text(file.sql)
        _hash(directory)
        run_atlas(
            *("migrate", "diff", "change", "--dir", f"file://{directory}"),
            *("--to", desired_url, "--dev-url", dev_url),
        )
        names = {file.name for file in files}
        made = (path for path in directory.glob("*.sql") if path.name not in names)
        return "".join(path.read_text() for path in made)


@contextmanager
def _throwaway(dialect: str) -> Generator[tuple[str, str]]:
    """The URLs of two empty databases: SQLAlchemy's for a desired state, and Atlas' own for one
    to work in."""
    if dialect == "sqlite":
        with TemporaryDirectory() as place:
            yield f"sqlite+aiosqlite:///{place}/desired.db", "sqlite://dev?mode=memory&_fk=1"
        return

    from tests.postgres import find_postgres

    given = os.environ.get("DEV_DATABASE_URL")
    server, reason = find_postgres({"TEST_DATABASE_URL": given} if given else os.environ)
    if server is None:
        raise CannotMigrate(f"Atlas needs a PostgreSQL to work in (DEV_DATABASE_URL): {reason}.")
    with server:
        yield server.url(server.create_database()), atlas_url(server.url(server.create_database()))


def atlas_url(url: str) -> str:
    """A SQLAlchemy URL as Atlas writes it, for the schema `public` on PostgreSQL."""
    parts = make_url(url)
    if parts.get_backend_name() == "sqlite":
        return f"sqlite://{parts.database}?_fk=1"
    tls = parts.query.get("sslmode") or parts.query.get("ssl") or "disable"
    parts = parts.set(
        drivername="postgres",
        query={
            "search_path": "public",
            "sslmode": "disable" if tls in ("allow", "prefer") else tls,
        },
    )
    return parts.render_as_string(hide_password=False)


def _read(directory: Path) -> list[Migration]:
    """As `read`, but a directory without any migrations is a beginning."""
    return read(directory) if any(directory.glob("*.sql")) else []


def _hash(directory: Path) -> None:
    run_atlas("migrate", "hash", "--dir", f"file://{directory}")

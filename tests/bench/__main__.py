"""Measures our server beside the bare agent.

    python -m tests.bench                      one turn and a stream, on both databases
    python -m tests.bench --scenario start     time to the first healthy answer

Systems are driven in turn (A B C A B C ...), so that whatever the machine does meanwhile, it does
to all of them; what is printed are medians, and ratios within a round.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.bench.load import Ask, load
from tests.bench.report import TITLES, Figure, table
from tests.bench.servers import NotStarted, Server, get, processors, serve
from tests.postgres import Postgres, find_postgres

MODEL = "mock-t20-s200"
SYSTEMS = ("bare", "sqlite", "postgres")
ASKS = {
    "turn": Ask("assistant", stream=False, tokens=20),
    "stream": Ask("assistant", stream=True, tokens=200),
}
UVICORN = ("--no-access-log", "--log-level", "warning", "--workers", "1", "--port")
WARM = 2.0  # seconds of load before anything counts
HEADROOM = 10  # how many times faster than the servers the upstream has to be


class NotComparable(Exception):
    """A system answers wrongly, or asks the model for something else than the others."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What the systems share. Their databases outlive them, so that later starts find them."""

    place: Path
    cpu: int | None  # the servers'
    upstream: Server
    databases: Mapping[str, str]
    seen: dict[str, bytes] = field(default_factory=dict[str, bytes])

    @contextmanager
    def system(self, name: str) -> Generator[Server]:
        """The system's server, once it was seen to ask the model for what the others ask."""
        app = "tests.bench.bare:app" if name == "bare" else "app.main:app"
        environment = {
            "ENVIRONMENT": "development",
            "AUTH": "local",
            "MODEL": f"openai-chat:{MODEL}",
            "OPENAI_BASE_URL": f"http://127.0.0.1:{self.upstream.port}/v1",
            "OPENAI_API_KEY": "x",
            "DATABASE_URL": self.databases.get(name, ""),
            "OWNER_RATE": "1000000000",
            "BENCH_SEEN": str(self.place / "seen"),
        }
        with serve(("uvicorn", app, *UVICORN), self.place / name, environment, self.cpu) as server:
            for scenario, ask in ASKS.items():
                outcome = asyncio.run(load(server.port, ask, connections=1, seconds=0))
                if outcome.errors:
                    raise NotComparable(f"{name}, {scenario}: {dict(outcome.errors)}")
                seen = get(self.upstream.port, "/seen") or b""
                if seen != self.seen.setdefault(scenario, seen):
                    raise NotComparable(f"{name} asks the model otherwise: {seen.decode()}")
            yield server


@contextmanager
def prepare(systems: Sequence[str]) -> Generator[Bench]:
    """The machine divided, the upstream and the databases running, and the bare agent told what
    our server asks the model for."""
    cpus = processors()
    if cpus:
        os.sched_setaffinity(0, {cpus[0]})  # the upstream and PostgreSQL inherit it
        print(f"Servers on CPU {cpus[1]}; load, upstream and PostgreSQL on CPU {cpus[0]}.")
    if os.path.isdir("/var/tmp"):  # survives a reboot, so it is on a disk
        tempfile.tempdir = "/var/tmp"
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        upstream = stack.enter_context(serve(("tests.bench.upstream",), place / "upstream"))
        databases = {"sqlite": f"sqlite+aiosqlite:///{place / 'bench.db'}"}
        if "postgres" in systems:
            postgres = stack.enter_context(durable_postgres())
            databases["postgres"] = postgres.url(postgres.create_database())
        bench = Bench(place, cpus and cpus[1], upstream, databases)
        with bench.system("sqlite"):
            (place / "seen").write_bytes(bench.seen["turn"])
        yield bench


def durable_postgres() -> Postgres:
    """The tests' PostgreSQL, but one that waits for its disk."""
    server, found = find_postgres()
    if server is None:
        raise SystemExit(f"Nothing to measure PostgreSQL on ({found}). Try --only bare,sqlite.")
    return server if found == "TEST_DATABASE_URL" else Postgres(programs=Path(found), fsync=True)


def loads(bench: Bench, scenarios: Sequence[str], options: argparse.Namespace) -> Iterator[Figure]:
    """All systems run; all but the one that is measured stand still."""
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        for name in options.only:
            server = servers[name] = stack.enter_context(bench.system(name))
            for scenario in scenarios:
                asyncio.run(load(server.port, ASKS[scenario], options.connections, WARM))
            server.pause()
        for number in range(options.rounds):
            for scenario in scenarios:
                for name, server in servers.items():
                    server.resume()
                    yield measure(name, server, scenario, number, options)
                    server.pause()


def measure(
    name: str, server: Server, scenario: str, number: int, options: argparse.Namespace
) -> Figure:
    before = server.cpu()
    outcome = asyncio.run(load(server.port, ASKS[scenario], options.connections, options.seconds))
    after = server.cpu()
    cpu_ms = None
    if before is not None and after is not None and outcome.answers:
        cpu_ms = (after - before) / outcome.answers
    speed = outcome.answers / outcome.seconds
    return Figure(name, scenario, number, speed, cpu_ms, dict(outcome.errors))


def starts(bench: Bench, options: argparse.Namespace) -> Iterator[Figure]:
    """Each system begins and ends in turn. The first time counts for nothing: it may have
    modules to compile and tables to make."""
    for number in range(-1, options.pairs):
        for name in options.only:
            with bench.system(name) as server:
                figure = Figure(name, "start", number, server.start, server.start_cpu)
            if number >= 0:
                yield figure


def ceiling(bench: Bench, scenario: str, connections: int) -> float:
    """Requests a second that load and upstream reach with no server between them."""
    direct = Ask(MODEL, ASKS[scenario].stream, ASKS[scenario].tokens)
    outcome = asyncio.run(load(bench.upstream.port, direct, connections, WARM))
    return outcome.answers / outcome.seconds


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.bench")
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=7, help="rounds of --scenario start")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--scenario", default="turn,stream", help=",".join(TITLES))
    parser.add_argument("--only", default=None, help=",".join(SYSTEMS))
    parser.add_argument("--out", type=Path, help="file that gets each figure as a line of JSON")
    options = parser.parse_args(arguments)
    options.scenario = options.scenario.split(",")
    default = "bare,sqlite" if options.scenario == ["start"] else ",".join(SYSTEMS)
    options.only = (options.only or default).split(",")
    for given, known in ((options.scenario, TITLES), (options.only, SYSTEMS)):
        if unknown := set(given) - set(known):
            parser.error(f"No {', '.join(unknown)}; there is {', '.join(known)}.")
    return options


def run(bench: Bench, options: argparse.Namespace) -> Iterator[Figure]:
    loaded = [scenario for scenario in ASKS if scenario in options.scenario]
    if loaded:
        yield from loads(bench, loaded, options)
    if "start" in options.scenario:
        yield from starts(bench, options)


def main() -> int:
    options = options_of()
    figures: list[Figure] = []
    with ExitStack() as stack:
        out = stack.enter_context(options.out.open("a")) if options.out else None
        bench = stack.enter_context(prepare(options.only))
        ceilings = {
            scenario: ceiling(bench, scenario, options.connections)
            for scenario in ASKS
            if scenario in options.scenario
        }
        for figure in run(bench, options):
            figures.append(figure)
            line = json.dumps(asdict(figure))
            print(line, file=sys.stderr)
            if out:
                print(line, file=out, flush=True)
    for scenario in options.scenario:
        print(f"\n{table(figures, scenario)}")
        if scenario in ceilings:
            print(f"{'upstream':10}{ceilings[scenario]:12.2f}  with no server between")
    slow = [
        figure.scenario
        for figure in figures
        if figure.scenario in ceilings and figure.value * HEADROOM > ceilings[figure.scenario]
    ]
    for scenario in dict.fromkeys(slow):
        print(f"The upstream was too slow for {scenario}: it was measured, and not the servers.")
    wrong = [figure for figure in figures if figure.errors]
    for figure in wrong:
        print(f"No figure: {figure.system}, {figure.scenario}: {figure.errors}")
    return 1 if slow or wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (NotStarted, NotComparable) as error:
        sys.exit(str(error))

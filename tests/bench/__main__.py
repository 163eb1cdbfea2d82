"""Measures our server beside the bare agent.

    python -m tests.bench                      everything, on both databases: half an hour
    python -m tests.bench --scenario start     time to the first healthy answer
    python -m tests.bench --scenario stream --protocol ag-ui --only bare,sqlite

Systems are driven in turn (A B C A B C ...), so that whatever the machine does meanwhile, it does
to all of them; what is printed are medians, and ratios within a round. Streams are compared with
what PydanticAI's own AG-UI adapter brings. `results/` has the lines (`--out`) of some days, on
whatever machine there was: only ratios within a file mean anything.

Measure with a Python as servers have it, a distribution's or an image's. One that was built without
optimizations, as pyenv builds it, takes half as long again for all that is not C, and gives other
ratios: the files that are named by their date alone are of such a one.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.bench.load import PATIENCE, QUESTION, TOOL_QUESTION, Ask, Outcome, load
from tests.bench.report import TITLES, Figure, table
from tests.bench.servers import NotStarted, Server, get, ours, processors, serve
from tests.postgres import Postgres, find_postgres

SYSTEMS = ("bare", "sqlite", "postgres")
MODEL = "mock-t20-s200"
STREAMED = ("chat", "responses", "vercel", "ag-ui")
ANSWERED = ("chat", "responses")


@dataclass(frozen=True, slots=True)
class Scenario:
    """Load of one kind. `model` names the upstream's answers; `seconds` None is the option's, 0
    asks once on each connection and waits for `patience` seconds."""

    ask: Ask
    connections: int
    protocols: Sequence[str] = STREAMED
    model: str = MODEL
    seconds: float | None = None
    patience: float = PATIENCE


BURST = Ask("assistant", stream=True, tokens=200)
TURN = Ask("assistant", stream=False, tokens=20)
SCENARIOS = {
    "turn": Scenario(TURN, 32, ANSWERED),
    "single": Scenario(TURN, 1, ANSWERED),
    "tool": Scenario(replace(TURN, text=TOOL_QUESTION), 16, ANSWERED),
    "stream": Scenario(BURST, 16),
    "paced200": Scenario(BURST, 200, model="mock-s200-i5", seconds=0, patience=25),
    "paced1000": Scenario(BURST, 1000, model="mock-s200-i5", seconds=0, patience=25),
}
BARE = ("chat", "vercel", "ag-ui")  # what the bare agent speaks
CHECKED = ("turn", "stream")  # in which all must ask the model for the same
UVICORN = ("--no-access-log", "--log-level", "warning", "--workers", "1", "--port")
WARM = 2.0  # seconds of load before anything counts
HEADROOM = 10  # how many times faster than the servers the upstream has to be
TURNS = 500  # of a conversation


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
    def system(self, name: str, model: str = MODEL) -> Generator[Server]:
        """The system's server, once it was seen to ask the model for what the others ask."""
        app = "tests.bench.bare:app" if name == "bare" else "app.main:app"
        environment = {
            **ours(self.upstream, model, self.databases.get(name, "")),
            "ENVIRONMENT": "development",
            "OWNER_RATE": "1000000000",
            "BENCH_SEEN": str(self.place / "seen"),
            "BENCH_MODEL": model,
        }
        command = ("uvicorn", app, "--backlog", "4096", *UVICORN)
        with serve(command, self.place / name, environment, self.cpu) as server:
            for scenario in CHECKED:
                ask = SCENARIOS[scenario].ask
                outcome = asyncio.run(load(server.port, ask, connections=1, seconds=0))
                if outcome.errors or outcome.cut:
                    raise NotComparable(f"{name}, {scenario}: {dict(outcome.errors)}")
                asked: dict[str, Any] = json.loads(get(self.upstream.port, "/seen") or b"{}")
                asked.pop("model", None)
                seen = json.dumps(asked, sort_keys=True).encode()
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
    for model in dict.fromkeys(SCENARIOS[scenario].model for scenario in scenarios):
        chosen = [scenario for scenario in scenarios if SCENARIOS[scenario].model == model]
        with ExitStack() as stack:
            servers: dict[str, Server] = {}
            for name in options.only:
                server = servers[name] = stack.enter_context(bench.system(name, model))
                for scenario in chosen:
                    for ask in asks(name, scenario, options):
                        connections = min(SCENARIOS[scenario].connections, 32)
                        asyncio.run(load(server.port, ask, connections, WARM))
                server.pause()
            for number in range(options.rounds):
                for scenario in chosen:
                    for name, server in servers.items():
                        server.resume()
                        for ask in asks(name, scenario, options):
                            yield measure(name, server, scenario, ask, number, options)
                        server.pause()


def asks(name: str, scenario: str, options: argparse.Namespace) -> Iterator[Ask]:
    """What the system is asked, in each protocol that it speaks and that is wanted."""
    chosen = SCENARIOS[scenario]
    for protocol in chosen.protocols:
        wanted = protocol in (*options.protocol, "ag-ui") and protocol in BARE
        if wanted if name == "bare" else protocol in options.protocol:
            yield replace(chosen.ask, protocol=protocol)


def measure(
    name: str, server: Server, scenario: str, ask: Ask, number: int, options: argparse.Namespace
) -> Figure:
    chosen = SCENARIOS[scenario]
    seconds = options.seconds if chosen.seconds is None else chosen.seconds
    before, idle = server.cpu(), server.memory()
    connections = chosen.connections
    outcome, most = asyncio.run(watched(server, ask, connections, seconds, chosen.patience))
    after = server.cpu()
    errors = dict(outcome.errors)
    if outcome.cut and chosen.seconds is None:
        errors["no answer"] = outcome.cut
    parts = outcome.tokens / ask.tokens  # answers, and parts of those that were cut
    value = (outcome.tokens if ask.stream else outcome.answers) / outcome.seconds
    return Figure(
        name,
        scenario,
        ask.protocol,
        number,
        value,
        share(before, after, parts),
        p50_ms=middle(outcome.waits),
        first_ms=middle(outcome.firsts) if ask.stream else None,
        rss_mb=idle,
        grown_mb=most - idle if most is not None and idle is not None else None,
        cut=outcome.cut,
        errors=errors,
    )


async def watched(
    server: Server, ask: Ask, connections: int, seconds: float, patience: float
) -> tuple[Outcome, float | None]:
    """What came of the load, and the most memory that the server had meanwhile."""
    loading = asyncio.create_task(load(server.port, ask, connections, seconds, patience))
    most = server.memory()
    while most is not None and not loading.done():
        await asyncio.wait([loading], timeout=0.3)
        most = max(most, server.memory() or 0)
    return await loading, most


def share(before: float | None, after: float | None, parts: float) -> float | None:
    return (after - before) / parts if before is not None and after is not None and parts else None


def middle(seconds: Sequence[float]) -> float | None:
    return 1000 * statistics.median(seconds) if seconds else None


def conversations(bench: Bench, options: argparse.Namespace) -> Iterator[Figure]:
    """The milliseconds of a turn, one after the other in one conversation, around the fifth and
    around the last, and of a page of its items then. What a longer conversation costs the bare
    agent, which keeps it in memory, is sending it to the model."""
    for name in options.only:
        with bench.system(name) as server:
            ask = replace(TURN, chat=str(uuid.uuid4()))
            errors = Counter[str]()  # also of turns that are not measured: without them it is short
            for number, (turns, counts) in enumerate(((1, 0), (10, 1), (TURNS - 11, 0), (20, 1))):
                before = server.cpu()
                outcome = asyncio.run(turns_of(server.port, ask, turns))
                after = server.cpu()
                errors += outcome.errors
                if counts:
                    cpu = share(before, after, turns)
                    value = middle(outcome.waits) or 0
                    at = 5 if number == 1 else TURNS
                    told = dict(errors)
                    yield Figure(name, "conversation", f"turn {at}", at, value, cpu, errors=told)
                    if name != "bare":
                        value = listing(server.port, str(ask.chat))
                        yield Figure(
                            name, "conversation", f"items {at}", 0, value, None, errors=told
                        )


def listing(port: int, chat: str) -> float:
    """The milliseconds of a page of the conversation's items."""
    waits: list[float] = []
    for _ in range(20):
        begin = time.perf_counter()
        if get(port, f"/v1/conversations/{chat}/items") is None:
            raise NotComparable("a conversation's items are not listed")
        waits.append(time.perf_counter() - begin)
    return middle(waits) or 0


async def turns_of(port: int, ask: Ask, turns: int) -> Outcome:
    outcome = Outcome()
    for _ in range(turns):
        one = await load(port, ask, connections=1, seconds=0)
        outcome.waits += one.waits
        outcome.errors += one.errors + Counter({"no answer": one.cut})
    return outcome


def starts(bench: Bench, options: argparse.Namespace) -> Iterator[Figure]:
    """Each system begins and ends in turn. The first time counts for nothing: it may have
    modules to compile and tables to make."""
    for number in range(-1, options.pairs):
        for name in options.only:
            with bench.system(name) as server:
                memory = server.memory()
                start = server.start
                figure = Figure(name, "start", "", number, start, server.start_cpu, rss_mb=memory)
            if number >= 0:
                yield figure


def ceiling(bench: Bench, scenario: str) -> float:
    """Requests, of streams tokens, a second that load and upstream reach with no server between."""
    chosen = SCENARIOS[scenario]
    direct = replace(chosen.ask, model=chosen.model, text=QUESTION)
    seconds = WARM if chosen.seconds is None else 0
    outcome = asyncio.run(load(bench.upstream.port, direct, chosen.connections, seconds))
    if outcome.errors:
        raise NotComparable(f"the upstream, {scenario}: {dict(outcome.errors)}")
    return (outcome.tokens if direct.stream else outcome.answers) / outcome.seconds


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.bench")
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=7, help="rounds of --scenario start")
    parser.add_argument("--scenario", default=",".join(TITLES), help=",".join(TITLES))
    parser.add_argument("--protocol", default=",".join(STREAMED), help=",".join(STREAMED))
    parser.add_argument("--only", default=None, help=",".join(SYSTEMS))
    parser.add_argument("--out", type=Path, help="file that gets each figure as a line of JSON")
    options = parser.parse_args(arguments)
    options.scenario = options.scenario.split(",")
    options.protocol = options.protocol.split(",")
    default = "bare,sqlite" if options.scenario == ["start"] else ",".join(SYSTEMS)
    options.only = (options.only or default).split(",")
    given = options.scenario, options.protocol, options.only
    for names, known in zip(given, (TITLES, STREAMED, SYSTEMS), strict=True):
        if unknown := set(names) - set(known):
            parser.error(f"No {', '.join(unknown)}; there is {', '.join(known)}.")
    return options


def run(bench: Bench, options: argparse.Namespace) -> Iterator[Figure]:
    loaded = [scenario for scenario in SCENARIOS if scenario in options.scenario]
    if loaded:
        yield from loads(bench, loaded, options)
    if "conversation" in options.scenario:
        yield from conversations(bench, options)
    if "start" in options.scenario:
        yield from starts(bench, options)


def main() -> int:
    options = options_of()
    figures: list[Figure] = []
    with ExitStack() as stack:
        out = stack.enter_context(options.out.open("a")) if options.out else None
        bench = stack.enter_context(prepare(options.only))
        ceilings = {
            scenario: ceiling(bench, scenario)
            for scenario in SCENARIOS
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
            print(f"{'upstream':22}{ceilings[scenario]:10.2f}         with no server between")
    slow = [
        figure.scenario
        for figure in figures
        if figure.scenario in ceilings
        and SCENARIOS[figure.scenario].seconds is None
        and figure.value * HEADROOM > ceilings[figure.scenario]
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

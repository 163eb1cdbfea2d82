"""A site under load: server processes on one database, what they talk to, and clients that ask
until they are acknowledged."""

import asyncio
import contextlib
import itertools
import json
import re
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from httpx2 import AsyncClient, Limits, Response, TransportError
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from app.db.session import make_engine
from tests.conftest import NO_TLS, settings_of
from tests.server import ServerProcess
from tests.toolserver import ToolServer
from tests.upstream import Call, Json, Reply, Upstream

LEASE = 5.0  # seconds
GRACE = 30.0  # seconds beyond the lease in which every accepted run must have ended
OPEN = ("queued", "running", "waiting")
RUN_ID = re.compile(r"[0-9a-f]{32}")
AMOUNT: Json = {
    "title": "Amount",
    "type": "object",
    "properties": {"n": {"type": "integer"}},
    "required": ["n"],
}

Ask = tuple[str, Json, dict[str, str]]
"""Path, body and headers of a post."""

Seen = tuple[int, str, str]
"""The number of an event, its name and its data."""

STREAMS = {
    "errand": "/v1/responses/resp_{}?stream=true",
    "talk": "/v1/responses/resp_{}?stream=true",
    "number": "/v1/extractions/{}/events",
}
LAST = re.compile(r"(response|extraction)\.(completed|failed|incomplete)")


def errand(prompt: str) -> Ask:
    """A background response that uses one tool of each effect."""
    return "/v1/responses", {"model": "porter", "input": prompt, "background": True}, {}


def talk(prompt: str) -> Ask:
    """A chat stream."""
    messages = [{"role": "user", "content": prompt}]
    body = {"model": "porter", "messages": messages, "stream": True}
    return "/v1/chat/completions", body, {}


def number(prompt: str) -> Ask:
    """An extraction whose answer is fetched later."""
    body = {"input": {"text": prompt}, "schema": AMOUNT}
    return "/v1/extractions", body, {"Prefer": "respond-async"}


# Seconds of silence after which a client asks elsewhere. Who leaves a chat stream stops its run.
PATIENCE = {"errand": 5, "talk": 60, "number": 5}

ASKS: Mapping[str, Callable[[str], Ask]] = {"errand": errand, "talk": talk, "number": number}


def script(upstream: Upstream) -> None:
    """What the model answers to each of them."""
    upstream.when(
        "errand",
        Reply(calls=(Call("look"), Call("keep"))),
        Reply(calls=(Call("pay"),)),
        Reply(text="one two three", pace=0.01),
    )
    upstream.when("talk", Reply(text=" ".join(f"word{n}" for n in range(20)), pace=0.01))
    upstream.when("number", _amount)


def _amount(body: Json) -> Reply:
    n = int(prompt_of(body).split()[1])
    return Reply(calls=(Call("Amount", {"n": n}),), delay=0.05)


def prompt_of(body: Json) -> str:
    """The last message of the user's, in a request to the model."""
    return [message["content"] for message in body["messages"] if message["role"] == "user"][-1]


@dataclass(frozen=True, slots=True)
class Fault:
    """What a process had in hand when it was killed or stopped."""

    at: float
    running: Mapping[str, int]  # its runs, and the token of each


@dataclass
class Site:
    """Server processes that are up, and clients of one owner's. Prompts tell runs apart."""

    processes: Sequence[ServerProcess]
    upstream: Upstream
    tools: ToolServer
    engine: AsyncEngine
    client: AsyncClient
    accepted: dict[str, str] = field(default_factory=dict[str, str])  # prompt -> run
    refused: Counter[int] = field(default_factory=Counter[int])  # statuses of "later"
    faults: list[Fault] = field(default_factory=list[Fault])
    finished: dict[str, int] = field(default_factory=dict[str, int])
    """Of tool calls whose result a fault found committed: the requests by then, by key."""

    def __post_init__(self) -> None:
        self._numbers = itertools.count(1)
        self._turns = itertools.cycle(self.processes)

    @property
    def url(self) -> str:
        """Of each process in turn."""
        return next(self._turns).url

    async def post(self, kind: str) -> str:
        """The id of a new run, once a server has said it: until then each process is asked in
        turn, under the same key. A stream is read to its end."""
        prompt = f"{kind} {next(self._numbers)}"
        path, body, headers = ASKS[kind](prompt)
        headers |= {"Idempotency-Key": prompt}
        while prompt not in self.accepted:
            with contextlib.suppress(TransportError):
                async with self.client.stream(
                    "POST", self.url + path, json=body, headers=headers, timeout=PATIENCE[kind]
                ) as reply:
                    if reply.status_code not in (200, 202):
                        await self._refusal(reply)
                        continue
                    async for line in reply.aiter_lines():
                        if found := RUN_ID.search(line):
                            self.accepted.setdefault(prompt, found[0])
        return self.accepted[prompt]

    async def _refusal(self, reply: Response) -> None:
        """Waits. Raises AssertionError for an answer that does not say "later"."""
        await reply.aread()
        assert reply.status_code in (429, 503) and reply.headers["retry-after"], reply.text
        self.refused[reply.status_code] += 1
        await asyncio.sleep(0.1)

    async def get(self, path: str) -> Response:
        """What a process says that is there: those that were killed are so a while ago."""
        while True:
            with contextlib.suppress(TransportError):
                return await self.client.get(self.url + path)

    async def load(self, count: int, posters: int = 20) -> None:
        """So many runs of all kinds, as fast as they are acknowledged."""
        kinds = itertools.islice(itertools.cycle(ASKS), count)

        async def post() -> None:
            for kind in kinds:
                await self.post(kind)

        async with asyncio.TaskGroup() as group:
            for _ in range(posters):
                group.create_task(post())

    async def follow(self, path: str, url: str | None = None) -> tuple[list[Seen], int]:
        """All events of a stream, taken up again behind the last one wherever it broke off, and
        how often it did."""
        seen: list[Seen] = []
        again = -1
        while not (seen and LAST.fullmatch(seen[-1][1])):
            headers = {"Last-Event-ID": str(seen[-1][0])} if seen else {}
            with contextlib.suppress(TransportError):
                async with self.client.stream(
                    "GET", (url or self.url) + path, headers=headers
                ) as reply:
                    if reply.status_code != 200:
                        await self._refusal(reply)
                        continue
                    again += 1
                    fields: dict[str, str] = {}
                    async for line in reply.aiter_lines():
                        if line.startswith(("id: ", "event: ", "data: ")):
                            name, _, value = line.partition(": ")
                            fields[name] = value
                        elif not line and "id" in fields:
                            seen.append((int(fields["id"]), fields["event"], fields["data"]))
                            fields = {}
            await asyncio.sleep(0.05)
        return seen, again

    async def looks(self) -> tuple[int, int, int]:
        """The statuses of liveness, readiness and of a new run."""
        path, body, _ = errand("errand 0")
        url = self.url
        live, ready, posted = await asyncio.gather(
            self.client.get(f"{url}/health"),
            self.client.get(f"{url}/health/ready"),
            self.client.post(url + path, json=body),
        )
        assert posted.status_code != 503 or int(posted.headers["retry-after"]) > 0
        return live.status_code, ready.status_code, posted.status_code

    async def rows(self, query: str, **values: Any) -> Sequence[Any]:
        """From the database, past all servers."""
        async with self.engine.connect() as connection:
            return list(await connection.execute(text(query), values))

    async def kill(self, process: ServerProcess) -> Fault:
        """`kill -9`, and what it had in hand."""
        pid = process.pid
        await asyncio.to_thread(process.kill)
        return await self._fault(pid)

    async def pause(self, process: ServerProcess) -> Fault:
        """SIGSTOP, and what it has in hand."""
        process.pause()
        return await self._fault(process.pid)

    async def _fault(self, pid: int) -> Fault:
        at = time.monotonic()
        running = await self.rows(
            "SELECT id, token FROM runs WHERE status = 'running' AND worker LIKE :worker",
            worker=f"%:{pid}:%",
        )
        finished = await self.rows(
            "SELECT key FROM tool_calls WHERE status IN ('done', 'retry', 'failed')"
        )
        calls = self.calls()
        for row in finished:
            self.finished.setdefault(row.key, calls[row.key])
        fault = Fault(at, {row.id: row.token for row in running})
        self.faults.append(fault)
        return fault

    async def taken_over(self, fault: Fault) -> list[float]:
        """For each run of the fault's, the seconds until another process had it or its end."""
        left, found = dict(fault.running), list[float]()
        async with asyncio.timeout(LEASE + GRACE):
            while left:
                rows = await self.rows("SELECT id, token FROM runs WHERE status = 'running'")
                same = {row.id for row in rows if left.get(row.id) == row.token}
                found += [time.monotonic() - fault.at] * (len(left) - len(same))
                left = {run_id: left[run_id] for run_id in same}
                await asyncio.sleep(0.05)
        return found

    async def stuck(self) -> list[str]:
        """The accepted runs that have not ended when all should have."""
        until = time.monotonic() + LEASE + GRACE
        while True:
            rows = await self.rows(f"SELECT id FROM runs WHERE status IN {OPEN}")
            going = {row.id for row in rows} & set(self.accepted.values())
            if not going or time.monotonic() > until:
                return sorted(going)
            await asyncio.sleep(0.1)

    async def lost(self) -> list[str]:
        """What is said of the accepted runs that no server knows, or that were not answered as
        they should be. All have ended, but a server may be about to hear of it."""
        gate = asyncio.Semaphore(20)

        async def ask(prompt: str, run_id: str) -> str | None:
            kind, n = prompt.split()
            place = f"extractions/{run_id}" if kind == "number" else f"responses/resp_{run_id}"
            while True:
                async with gate:
                    reply = await self.get(f"/v1/{place}")
                said = reply.json()
                if said.get("status") not in ("queued", "in_progress", "running"):
                    break
                await asyncio.sleep(0.1)
            is_right = kind != "number" or said.get("data") == {"n": int(n)}
            if said.get("status") == "completed" and is_right:
                return None
            return f"{prompt}, {run_id}: {said.get('status')}, {said.get('error')}"

        said = await asyncio.gather(*(ask(*each) for each in self.accepted.items()))
        return [each for each in said if each]

    async def doubled(self) -> list[str]:
        """The prompts that more than one run was made of."""
        rows = await self.rows("SELECT options FROM runs")
        made = Counter(json.loads(row.options)["text"] for row in rows)
        return [prompt for prompt, count in made.items() if count > 1]

    def calls(self) -> Counter[str]:
        """The requests of tools, by idempotency key."""
        return Counter(call.headers["idempotency-key"] for call in list(self.tools.calls))

    def repeated_calls(self) -> int:
        """Requests for calls whose result was there already, or that count once at most."""
        now = self.calls()
        finished = sum(now[key] - count for key, count in self.finished.items())
        paid = [call for call in self.tools.calls if call.path == "/effects/pay"]
        return finished + len(paid) - len({call.headers["idempotency-key"] for call in paid})

    async def repeated_requests(self) -> tuple[int, int]:
        """Requests to the model that were made before: all, and those beyond one for each time
        that a run was taken over."""
        seen = Counter(
            (prompt_of(request.body), len(request.body["messages"]))
            for request in list(self.upstream.requests)
        )
        again = Counter[str]()
        for (prompt, _), count in seen.items():
            again[self.accepted.get(prompt, prompt)] += count - 1
        rows = await self.rows("SELECT id, token FROM runs")
        taken_over = Counter({row.id: row.token - 1 for row in rows})
        return again.total(), (again - taken_over).total()


@asynccontextmanager
async def open_site(
    environ: Mapping[str, str],
    bearer: Callable[..., Awaitable[str]],
    upstream: Upstream,
    tools: ToolServer,
    count: int = 1,
) -> AsyncGenerator[Site]:
    """So many running processes, and one owner."""
    script(upstream)
    environ = {"LEASE_SECONDS": str(LEASE), **environ}
    processes = [ServerProcess(**environ) for _ in range(count)]
    engine = make_engine(settings_of(dict(environ)))
    with ExitStack() as stack:
        for process in processes:
            process.command[1] = "tests.faults.app:app"
            process.command += ["--no-access-log", "--log-level", "warning"]
            stack.enter_context(process)
        headers = {"Authorization": f"Bearer {await bearer('Owner')}"}
        limits = Limits(max_connections=None, max_keepalive_connections=50)
        async with AsyncClient(headers=headers, limits=limits, timeout=30, verify=NO_TLS) as client:
            yield Site(processes, upstream, tools, engine, client)
    await engine.dispose()

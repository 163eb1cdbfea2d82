"""Who begins when: a crowd together, those behind it one by one, and nobody waits for nothing."""

import asyncio
import socket
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from httpx2 import AsyncClient, Limits, ReadTimeout
from openai import AsyncOpenAI

from app.api.entrance import BELOW, PATHS, Entrance
from app.main import create_app
from app.services.admission import CROWD, LONGEST, LOOK, Admission
from tests.server import ThreadedServer
from tests.serving import Serving
from tests.upstream import Reply, Upstream

TASKS: set[asyncio.Task[None]] = set()  # nobody else holds those that wait for ever


@pytest.fixture(autouse=True)
async def ends_its_tasks() -> AsyncGenerator[None]:
    yield
    for task in TASKS:
        task.cancel()
    await asyncio.gather(*TASKS, return_exceptions=True)
    TASKS.clear()


class Run:
    """Takes a turn, and ends it when it is told to."""

    def __init__(self, admission: Admission) -> None:
        self.has_begun = False
        self.may_end = asyncio.Event()
        self.task = asyncio.create_task(self._run(admission))
        TASKS.add(self.task)

    async def _run(self, admission: Admission) -> None:
        async with admission.turn() as end:
            self.has_begun = True
            await self.may_end.wait()
            end()
            end()  # a second time changes nothing


class Asking:
    """Enters, begins a run, and is over with it."""

    def __init__(self, admission: Admission) -> None:
        self.has_entered = False
        self.run: Run | None = None
        self.may_begin = asyncio.Event()
        self.task = asyncio.create_task(self._ask(admission))
        TASKS.add(self.task)

    async def _ask(self, admission: Admission) -> None:
        async with admission.entrance():
            self.has_entered = True
            await self.may_begin.wait()
            self.run = Run(admission)
            await self.run.task


class Crowd:
    """An app behind an entrance, of a process that always works. It answers agents' requests with
    their path, once `POST /go` was asked for."""

    url = ""

    def __init__(self) -> None:
        self.arrived = 0
        self._go = asyncio.Event()
        self.app = FastAPI()
        self.app.add_middleware(Entrance)
        self.app.state.admission = busy()
        self.app.add_api_route("/go", self._let_go, methods=["POST"])
        self.app.add_api_route("/{path:path}", self._answer, methods=["GET", "POST"])

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    async def fill(self, client: AsyncClient, path: str = "/api/chat") -> list[asyncio.Task[Any]]:
        """Asks until the next would have to wait."""
        tasks = [asyncio.create_task(client.post(path, json={})) for _ in range(CROWD)]
        async with asyncio.timeout(LONGEST / 2):
            while self.arrived < CROWD:
                await asyncio.sleep(0.01)
        return tasks

    async def _let_go(self) -> None:
        self._go.set()

    async def _answer(self, request: Request, streams: bool = False) -> Any:
        path = request.url.path
        if request.method == "POST" and not path.endswith(("cancel", "stop", "settle")):
            await request.body()
            self.arrived += 1
            if streams:
                return StreamingResponse(self._lines())
            await self._go.wait()
        return path

    async def _lines(self) -> AsyncGenerator[str]:
        yield "begun"
        await self._go.wait()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def begin(admission: Admission, count: int) -> list[Run]:
    runs = [Run(admission) for _ in range(count)]
    await settle()
    return runs


async def ask(admission: Admission, count: int, *, begin: bool) -> list[Asking]:
    requests = [Asking(admission) for _ in range(count)]
    for request in requests:
        if begin:
            request.may_begin.set()
    await settle()
    return requests


def entered(requests: list[Asking]) -> list[bool]:
    return [request.has_entered for request in requests]


def begun(runs: list[Run]) -> list[bool]:
    return [run.has_begun for run in runs]


async def end(*runs: Run) -> None:
    for run in runs:
        run.may_end.set()
    await settle()


def busy() -> Admission:
    """Of a process that always works."""
    return Admission(worked=time.monotonic)


async def test_those_behind_a_crowd_begin_one_by_one_in_their_order() -> None:
    admission = busy()
    crowd, others = await begin(admission, CROWD), await begin(admission, 3)

    assert all(begun(crowd))
    assert begun(others) == [False, False, False]
    assert admission.is_crowded
    await end(*crowd[1:])
    assert begun(others) == [False, False, False]
    await end(crowd[0])
    assert begun(others) == [True, False, False]
    late = await begin(admission, 1)
    await end(others[0])
    assert begun(others + late) == [True, True, False, False]
    await end(others[1])
    await end(others[2])
    assert begun(late) == [True]
    assert not admission.is_crowded
    assert all(begun(await begin(admission, CROWD - 1)))


async def test_who_gives_up_keeps_nobody_waiting() -> None:
    admission = busy()
    crowd, others = await begin(admission, CROWD), await begin(admission, 4)

    others[0].task.cancel()
    for run in crowd:
        run.may_end.set()
    while not others[1].has_begun:
        await asyncio.sleep(0)
    others[2].task.cancel()
    others[1].task.cancel()
    await settle()

    assert begun(others) == [False, True, False, True]
    await end(others[3])
    assert not admission.is_crowded


async def test_who_is_let_in_and_stopped_at_once_passes_it_on() -> None:
    admission = busy()
    async with admission.turn() as end_last:
        crowd, others = await begin(admission, CROWD - 1), await begin(admission, 2)
        await end(*crowd)
        end_last()
        others[0].task.cancel()  # it has been called, and has not heard of it yet
        await settle()

    assert begun(others) == [False, True]


async def test_nobody_waits_for_those_who_wait_for_somebody_else() -> None:
    admission = Admission(worked=lambda: 0.0)
    await begin(admission, CROWD)  # each waits, say, for its tools' server
    others = await begin(admission, 2 * CROWD + 1)
    assert admission.is_crowded

    async with asyncio.timeout(LONGEST):
        while not all(begun(others)):
            await asyncio.sleep(LOOK / 5)
    assert not admission.is_crowded


async def test_a_long_turn_keeps_a_busy_process_waiting_once() -> None:
    admission = busy()
    crowd, others = await begin(admission, CROWD), await begin(admission, 2 * CROWD)

    await asyncio.sleep(3 * LOOK)
    assert not any(begun(others))
    async with asyncio.timeout(10 * LONGEST):
        while not any(begun(others)):
            await asyncio.sleep(LOOK)
    assert begun(others) == CROWD * [True] + CROWD * [False]
    await end(*others[:CROWD])  # those before them still take their time
    assert begun(others) == (CROWD + 1) * [True] + (CROWD - 1) * [False]
    await end(*crowd)
    assert begun(others) == (CROWD + 1) * [True] + (CROWD - 1) * [False]


async def test_who_is_gone_makes_no_crowd() -> None:
    admission = busy()
    await begin(admission, CROWD)
    [other] = await begin(admission, 1)
    assert admission.is_crowded

    other.task.cancel()
    await settle()

    assert not admission.is_crowded


async def test_behind_those_who_wait_for_a_turn_requests_wait_outside() -> None:
    admission = busy()
    inside = await ask(admission, 2 * CROWD, begin=True)
    outside = await ask(admission, 3, begin=True)
    runs = [request.run for request in inside if request.run]

    assert len(runs) == 2 * CROWD
    assert begun(runs) == CROWD * [True] + CROWD * [False]
    assert entered(outside) == [False, False, False]
    await end(*runs[:CROWD])  # the next has its turn, and leaves its place to a request
    assert begun(runs) == (CROWD + 1) * [True] + (CROWD - 1) * [False]
    assert entered(outside) == [True, False, False]
    await end(runs[CROWD])
    assert entered(outside) == [True, True, False]


async def test_who_enters_and_begins_nothing_keeps_its_place_until_it_is_over() -> None:
    admission = busy()
    inside = await ask(admission, CROWD, begin=False)
    outside = await ask(admission, 3, begin=False)

    assert entered(inside) == CROWD * [True]
    assert entered(outside) == [False, False, False]
    inside[0].task.cancel()
    outside[0].task.cancel()
    await settle()
    assert entered(outside) == [False, True, False]
    inside[1].may_begin.set()  # there is room to begin
    await settle()
    assert entered(outside) == [False, True, True]
    assert not admission.is_crowded


async def test_nobody_waits_for_requests_that_are_slow_to_come() -> None:
    admission = Admission(worked=lambda: 0.0)
    await ask(admission, CROWD, begin=False)
    outside = await ask(admission, 2 * CROWD + 1, begin=False)
    assert not any(entered(outside))

    async with asyncio.timeout(LONGEST):
        while not all(entered(outside)):
            await asyncio.sleep(LOOK / 5)


@pytest.fixture
def crowd() -> Iterator[Crowd]:
    crowd = Crowd()
    with Serving(crowd.app) as server:
        crowd.url = server.url
        yield crowd


@pytest.fixture
async def client(crowd: Crowd) -> AsyncGenerator[AsyncClient]:
    limits = Limits(max_connections=None)
    async with AsyncClient(base_url=crowd.url, limits=limits, timeout=10) as client:
        yield client


async def test_places_that_are_held_for_long_are_given_to_others_though_some_move() -> None:
    admission = busy()
    await ask(admission, CROWD - 1, begin=False)
    others = await ask(admission, 2 * CROWD, begin=False)

    async with asyncio.timeout(2 * LONGEST):
        while (count := sum(entered(others))) < CROWD:
            others[count - 1].task.cancel()  # the next has its place
            await asyncio.sleep(LONGEST / 8)


async def test_runs_that_no_request_is_behind_leave_requests_their_room() -> None:
    admission = busy()
    claimed = await begin(admission, 4 * CROWD)
    asked = await ask(admission, CROWD + 1, begin=True)

    assert admission.is_crowded
    assert entered(asked) == CROWD * [True] + [False]
    for run in claimed:
        run.may_end.set()
    async with asyncio.timeout(LONGEST / 2):
        while not all(entered(asked)):
            await settle()


async def test_runs_that_are_waited_for_and_queued_ones_begin_by_turns() -> None:
    admission = busy()
    claimed = await begin(admission, CROWD + 3)
    asked = await ask(admission, 3, begin=True)
    queued, runs = claimed[CROWD:], [one.run for one in asked if one.run]
    order: list[str] = []

    await end(*claimed[:CROWD])
    while len(order) < 6:
        for name, some in (("asked", runs), ("queued", queued)):
            for run in [run for run in some if run.has_begun]:
                order.append(name)
                some.remove(run)
                await end(run)
    assert order == 3 * ["asked", "queued"]


async def test_only_requests_for_an_agents_answer_wait_outside(
    crowd: Crowd, client: AsyncClient
) -> None:
    asked = await crowd.fill(client)
    agents = ("/v1/chat/completions", "/v1/responses", "/api/chat", "/ag-ui/assistant")
    others = ("/v1/responses/resp_1/cancel", "/api/chat/c/stop", "/v1/tool-calls/k/settle")

    asked += [asyncio.create_task(client.post(path, json={})) for path in agents]
    for path in others:
        assert (await client.post(path, json={})).json() == path
    assert (await client.get("/v1/responses")).json() == "/v1/responses"
    assert crowd.arrived == CROWD
    await client.post("/go")

    answers = [(await task).json() for task in asked]
    assert sorted(answers[CROWD:]) == sorted(agents)


async def test_who_is_answered_for_long_keeps_nobody_outside(
    crowd: Crowd, client: AsyncClient
) -> None:
    asked = await crowd.fill(client, "/api/chat?streams=1")

    async with asyncio.timeout(LONGEST / 2):
        asked.append(asyncio.create_task(client.post("/v1/responses", json={})))
        while crowd.arrived <= CROWD:
            await asyncio.sleep(0.01)
    await client.post("/go")
    assert [(await task).status_code for task in asked] == (CROWD + 1) * [200]


@pytest.mark.parametrize("body", [b"", b"{"])
async def test_a_slow_body_keeps_nobody_outside(
    crowd: Crowd, client: AsyncClient, body: bytes
) -> None:
    head = b"POST /api/chat HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n"
    with ExitStack() as slow:
        for _ in range(CROWD):
            one = slow.enter_context(socket.create_connection(("127.0.0.1", crowd.port)))
            one.sendall(head + body)
        await client.post("/go")
        async with asyncio.timeout(LONGEST / 2):
            assert (await client.post("/api/chat", json={})).json() == "/api/chat"


async def test_who_leaves_meanwhile_is_not_let_in(crowd: Crowd, client: AsyncClient) -> None:
    asked = await crowd.fill(client)
    with pytest.raises(ReadTimeout):
        await client.post("/api/chat", json={}, timeout=0.2)
    asked.append(asyncio.create_task(client.post("/api/chat", json={})))
    await client.post("/go")

    assert [(await task).status_code for task in asked] == (CROWD + 1) * [200]
    assert crowd.arrived == CROWD + 1


async def test_a_prefix_that_a_proxy_leaves_makes_no_difference(
    crowd: Crowd, client: AsyncClient
) -> None:
    crowd.app.root_path = "/backend"
    asked = await crowd.fill(client, "/backend/api/chat")

    with pytest.raises(ReadTimeout):
        await client.post("/backend/api/chat", json={}, timeout=0.2)

    assert crowd.arrived == CROWD
    await client.post("/go")
    assert [(await task).status_code for task in asked] == CROWD * [200]


def test_all_routes_that_ask_an_agent_are_behind_the_entrance() -> None:
    posts = {path for path, route in create_app().openapi()["paths"].items() if "post" in route}

    assert posts >= {*PATHS, f"{BELOW}{{agent}}"}


async def test_a_crowd_of_streams_comes_whole(
    server: ThreadedServer, bearer: Callable[..., Any], upstream: Upstream
) -> None:
    text = "".join(f"word{n} " for n in range(40))
    upstream.when("recite", Reply(text=text, pace=0.01))
    client = AsyncOpenAI(base_url=f"{server.url}/v1", api_key=await bearer("Alice"), max_retries=0)

    async def recite(stream: bool) -> str:
        asked: Any = [{"role": "user", "content": "recite"}]
        create: Any = client.chat.completions.create
        answer = await create(model="assistant", messages=asked, stream=stream)
        if not stream:
            return answer.choices[0].message.content
        chunks = [chunk async for chunk in answer]
        return "".join(choice.delta.content or "" for each in chunks for choice in each.choices)

    async with client:
        answers = await asyncio.gather(*(recite(n % 8 > 0) for n in range(3 * CROWD)))

    assert answers == 3 * CROWD * [text]

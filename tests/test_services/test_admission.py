"""Who begins when: a crowd together, those behind it one by one, and nobody waits for nothing."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from openai import AsyncOpenAI

from app.services.admission import CROWD, LONGEST, LOOK, Admission
from tests.server import ThreadedServer
from tests.upstream import Reply, Upstream


class Run:
    """Takes a turn, and ends it when it is told to."""

    def __init__(self, admission: Admission) -> None:
        self.has_begun = False
        self.may_end = asyncio.Event()
        self.task = asyncio.create_task(self._run(admission))

    async def _run(self, admission: Admission) -> None:
        async with admission.turn() as end:
            self.has_begun = True
            await self.may_end.wait()
            end()
            end()  # a second time changes nothing


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def begin(admission: Admission, count: int) -> list[Run]:
    runs = [Run(admission) for _ in range(count)]
    await settle()
    return runs


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

"""The one writer of the run log: what was seen is stored, in one numbering for every reader."""

import asyncio
import json
import sqlite3
from collections.abc import Callable
from typing import Any, Self

import pytest
from pydantic_ai.messages import (
    PartDeltaEvent,
    PartEndEvent,
    PartStartEvent,
    TextPart,
    TextPartDelta,
    ThinkingPartDelta,
    ToolCallPartDelta,
)
from sqlalchemy.exc import IntegrityError

from app.core import metrics
from app.services.changes import INSERT_MESSAGE
from app.services.execution import Job, Outcome
from app.services.journal import TOUCH, Journal, LeaseLost
from app.services.run_log import Entry, RunLog
from tests.conftest import client_of, settings_of
from tests.core import DONE, Core, open_core
from tests.proxy import Proxy
from tests.server import ThreadedServer
from tests.upstream import Reply, Upstream

START = PartStartEvent(index=0, part=TextPart(""))


def says(text: str, index: int = 0) -> PartDeltaEvent:
    return PartDeltaEvent(index=index, delta=TextPartDelta(text))


def text_of(entries: list[Entry]) -> str:
    return "".join(
        entry.event.delta.content_delta
        for entry in entries
        if isinstance(entry.event, PartDeltaEvent) and isinstance(entry.event.delta, TextPartDelta)
    )


async def never(journal: Journal, job: Job) -> Outcome:
    raise AssertionError


async def test_what_is_said_within_a_tick_is_one_entry(environ: dict[str, str]) -> None:
    async def speak(journal: Journal, job: Job) -> Outcome:
        journal.append(job.log, START)
        for number in range(100):
            journal.append(job.log, says(f"{number} "))
        return DONE

    async with open_core(settings_of(environ), speak) as core:
        entries = await core.runs.wait(await core.accept())

    assert [type(entry.event).__name__ for entry in entries] == [
        "PartStartEvent",
        "PartDeltaEvent",
        "RunEnded",
    ]
    assert text_of(entries) == "".join(f"{number} " for number in range(100))


async def test_what_is_wanted_in_a_rush_is_stored_together(environ: dict[str, str]) -> None:
    async with open_core(settings_of(environ), never, beats=False) as core:
        counts = [await rush(core) for _ in range(20)]

    assert min(counts) == 1  # without: the first by itself, and then the others


async def rush(core: Core) -> float:
    """How many transactions store what one wants, and then three more, right behind two."""
    touch = TOUCH[core.engine.dialect.name], dict[str, Any]()
    await asyncio.gather(*(core.journal.commit([touch]) for _ in range(2)))
    before = transactions()
    first = asyncio.create_task(core.journal.commit([touch]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await asyncio.gather(first, *(core.journal.commit([touch]) for _ in range(3)))
    return transactions() - before


def transactions() -> float:
    [numbers] = metrics.commits.numbers.values()
    return sum(numbers[:-1])


async def test_only_what_continues_the_same_part_is_merged(environ: dict[str, str]) -> None:
    said = [
        says("a", 0),
        says("b", 1),
        says("c", 1),
        PartDeltaEvent(index=1, delta=ThinkingPartDelta(content_delta="d")),
        PartDeltaEvent(index=2, delta=ToolCallPartDelta(args_delta="e", tool_call_id="1")),
        PartDeltaEvent(index=2, delta=ToolCallPartDelta(args_delta="f", tool_call_id="1")),
        PartDeltaEvent(index=2, delta=ToolCallPartDelta(args_delta="g", tool_call_id="2")),
        PartEndEvent(index=2, part=TextPart("")),
        says("h", 2),
    ]

    async def speak(journal: Journal, job: Job) -> Outcome:
        for event in said:
            journal.append(job.log, event)
        return DONE

    async with open_core(settings_of(environ), speak) as core:
        run = await core.accept()
        entries = await core.runs.wait(run)
        stored = await core.stored(run)

    deltas = [entry.event.delta for entry in entries if isinstance(entry.event, PartDeltaEvent)]
    texts = [getattr(delta, "content_delta", None) or delta.args_delta for delta in deltas]  # pyright: ignore[reportAttributeAccessIssue]
    assert texts == ["a", "bc", "d", "ef", "g", "h"]
    assert stored == entries


async def test_what_a_follower_sees_is_in_the_database(environ: dict[str, str]) -> None:
    async def speak(journal: Journal, job: Job) -> Outcome:
        journal.append(job.log, START)
        for number in range(30):
            journal.append(job.log, says(f"{number} "))
            await asyncio.sleep(0.004)
        return DONE

    async with open_core(settings_of(environ), speak) as core:
        run = await core.accept()
        seen: list[Entry] = []
        async for entry in core.runs.follow(run):
            seen.append(entry)
            stored = await core.stored(run)
            assert stored[: len(seen)] == seen

    assert [entry.seq for entry in seen] == list(range(1, len(seen) + 1))
    assert text_of(seen) == "".join(f"{number} " for number in range(30))
    assert len(seen) > 4  # it came in pieces


async def test_text_that_no_json_may_hold_raw_survives_the_log(environ: dict[str, str]) -> None:
    odd = 'nul \x00, quote ", break \r\n, event: x, é, \u2028, 🙂'

    async def speak(journal: Journal, job: Job) -> Outcome:
        journal.append(job.log, START)
        journal.append(job.log, says(odd[:20]))
        journal.append(job.log, says(odd[20:]))
        return DONE

    async with open_core(settings_of(environ), speak) as core:
        run = await core.accept()
        entries = await core.runs.wait(run)

        assert text_of(entries) == odd
        assert text_of(await core.stored(run)) == odd


async def test_half_characters_are_mended_before_they_are_stored(environ: dict[str, str]) -> None:
    """Some model servers cut an emoji in two, or never say its second half."""

    async def speak(journal: Journal, job: Job) -> Outcome:
        journal.append(job.log, START)
        journal.append(job.log, says("\ud83d"))
        journal.append(job.log, says("\ude42 and \ud83d!"))
        return DONE

    async with open_core(settings_of(environ), speak) as core:
        run = await core.accept()
        entries = await core.runs.wait(run)

        assert text_of(entries) == "🙂 and \ufffd!"
        assert text_of(await core.stored(run)) == "🙂 and \ufffd!"


async def test_a_failed_write_fails_only_the_guilty(environ: dict[str, str]) -> None:
    go = asyncio.Event()

    async def speak(journal: Journal, job: Job) -> Outcome:
        await go.wait()
        journal.append(job.log, START)
        journal.append(job.log, says("unharmed"))
        await journal.commit([], job.log)
        return DONE

    async with open_core(settings_of(environ), speak) as core:
        runs = [await core.accept() for _ in range(3)]
        go.set()
        nobody = {"run_id": "0" * 32, "seq": 0, "body": "{}"}
        results = await asyncio.gather(
            core.accept(),
            core.journal.commit([(INSERT_MESSAGE, nobody)]),
            core.accept(),
            return_exceptions=True,
        )

        assert [type(result).__name__ for result in results] == ["Run", "IntegrityError", "Run"]
        assert isinstance(results[1], IntegrityError)
        for run in runs:
            entries = await core.runs.wait(run)
            assert [entry.seq for entry in entries] == list(range(1, len(entries) + 1))
            assert text_of(entries) == "unharmed"


async def test_a_log_whose_token_moved_on_takes_nothing_more(environ: dict[str, str]) -> None:
    lost = asyncio.get_running_loop().create_future()
    go = asyncio.Event()

    async def speak(journal: Journal, job: Job) -> Outcome:
        journal.append(job.log, START)
        await journal.commit([], job.log)
        await go.wait()
        journal.append(job.log, says("too late"))
        row = {"run_id": job.run.id, "seq": 5, "body": "{}"}
        try:
            await journal.commit([(INSERT_MESSAGE, row)], job.log)
        except LeaseLost as error:
            lost.set_result(error)
            raise
        return DONE

    async with open_core(settings_of(environ), speak) as core:
        run = await core.accept()
        async for _ in core.runs.follow(run):
            break
        await core.sql(
            "UPDATE runs SET token = token + 1, worker = 'elsewhere:1:x' WHERE id = :id",
            id=run.id,
        )
        go.set()
        await asyncio.wait_for(lost, 5)

        assert [entry.event for entry in await core.stored(run)] == [START]
        rows = await core.sql("SELECT seq FROM messages WHERE run_id = :id", id=run.id)
        assert [row.seq for row in rows] == [0]


async def test_a_log_without_its_run_is_lost(environ: dict[str, str]) -> None:
    async with open_core(settings_of(environ), never) as core:
        nobodys = RunLog("0" * 32, token=1)
        core.journal.append(nobodys, START)

        with pytest.raises(LeaseLost):
            await core.journal.commit([], nobodys)
        assert nobodys.closed


async def test_nobody_waits_for_a_journal_that_is_closed(environ: dict[str, str]) -> None:
    async with open_core(settings_of(environ), never) as core:
        await core.journal.close()

        with pytest.raises(ConnectionError):
            await asyncio.wait_for(core.journal.commit([], RunLog("0" * 32, token=1)), 5)


class Outage:
    """A database that can be gone for a moment: behind a proxy, or locked by another program."""

    def __init__(self, url: str) -> None:
        self._path = url.removeprefix("sqlite+aiosqlite:///")
        self._proxy = None if url.startswith("sqlite") else Proxy(url)
        self._lock: sqlite3.Connection | None = None
        self.url = url
        self.noticed = 1 if self._proxy else 11  # seconds; SQLite waits ten for its turn

    def begin(self) -> None:
        if self._proxy:
            self._proxy.cut()
        else:
            self._lock = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
            self._lock.execute("BEGIN IMMEDIATE")

    def end(self) -> None:
        if self._proxy:
            self._proxy.restore()
        elif self._lock:
            self._lock.close()

    def __enter__(self) -> Self:
        if self._proxy:
            self.url = self._proxy.__enter__().url
        return self

    def __exit__(self, *_: object) -> None:
        if self._proxy:
            self._proxy.__exit__()
        elif self._lock:
            self._lock.close()


async def test_without_its_database_it_answers_503_and_recovers_by_itself(
    environ: dict[str, str], bearer: Callable[..., Any], upstream: Upstream
) -> None:
    upstream.when("hello", Reply(text="hello to you"))
    body = {"model": "assistant", "input": "hello"}
    with (
        Outage(environ["DATABASE_URL"]) as outage,
        ThreadedServer(settings_of(environ, database_url=outage.url)) as server,
    ):
        async with client_of(server.url, await bearer("Alice")) as alice:
            outage.begin()
            refused = await alice.post("/v1/responses", json=body)
            outage.end()
            accepted = await alice.post("/v1/responses", json=body)

    assert refused.status_code == 503
    assert int(refused.headers["Retry-After"]) >= 1
    assert refused.json()["error"]["code"] == "unavailable"
    assert accepted.status_code == 200
    assert accepted.json()["status"] == "completed"


async def test_a_stream_goes_on_without_gaps_when_its_database_comes_back(
    environ: dict[str, str], bearer: Callable[..., Any], upstream: Upstream
) -> None:
    words = " ".join(str(number) for number in range(60))
    upstream.when("count", Reply(text=words, pace=0.05))
    body = {"model": "assistant", "input": "count", "stream": True}
    events: list[dict[str, Any]] = []
    with (
        Outage(environ["DATABASE_URL"]) as outage,
        ThreadedServer(settings_of(environ, database_url=outage.url)) as server,
    ):
        async with client_of(server.url, await bearer("Alice")) as alice:
            async with alice.stream("POST", "/v1/responses", json=body) as reply:
                async for line in reply.aiter_lines():
                    if not line.startswith("data: "):
                        continue
                    events.append(json.loads(line.removeprefix("data: ")))
                    said = [event for event in events if "delta" in event]
                    if len(said) == 3:
                        outage.begin()
                        asyncio.get_running_loop().call_later(0.5, outage.end)
            again = await alice.get(f"/v1/responses/{events[0]['response']['id']}")

    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1]["type"] == "response.completed"
    assert "".join(event["delta"] for event in events if "delta" in event) == words
    assert again.json()["output"] == events[-1]["response"]["output"]


async def test_an_end_that_could_not_be_stored_is_stored_when_the_database_comes_back(
    environ: dict[str, str], bearer: Callable[..., Any], upstream: Upstream
) -> None:
    environ["LEASE_SECONDS"] = "2"
    upstream.when("count", Reply(text="one two three", delay=0.5))
    body = {"model": "assistant", "input": "count", "background": True}
    with (
        Outage(environ["DATABASE_URL"]) as outage,
        ThreadedServer(settings_of(environ, database_url=outage.url)) as server,
    ):
        async with client_of(server.url, await bearer("Alice")) as alice:
            begun = (await alice.post("/v1/responses", json=body)).json()
            await upstream.wait_for_async(1)
            outage.begin()
            await upstream.wait_until_async(lambda: upstream.requests[0].finished)
            await asyncio.sleep(outage.noticed)
            outage.end()
            url = f"/v1/responses/{begun['id']}?stream=true"
            reply = await asyncio.wait_for(alice.get(url), 20)

    last = [line for line in reply.text.splitlines() if line.startswith("data: ")][-1]
    assert json.loads(last.removeprefix("data: "))["type"] == "response.completed"

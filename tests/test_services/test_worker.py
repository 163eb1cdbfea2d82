"""A run has one owner at a time, and an end, whoever dies, stalls or is stopped."""

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, ExitStack, closing
from dataclasses import replace
from typing import Any

import pytest
from httpx2 import AsyncClient
from pydantic_ai.messages import PartDeltaEvent, PartStartEvent, TextPart, TextPartDelta
from sqlalchemy import event, text
from sqlalchemy.engine import make_url

from app.models import Run
from app.services.allowances import Amount, Move
from app.services.changes import CANCEL_RUN, INSERT_MESSAGE
from app.services.execution import Job, Outcome
from app.services.journal import FENCE, Journal
from app.services.operations import Operations
from app.services.run_log import RunEnded, RunRestarted
from tests.conftest import client_of, settings_of
from tests.core import DONE, Core, open_core
from tests.server import ServerProcess
from tests.upstream import Reply, Upstream

HERE, THERE = "host-a:1:aaaa", "host-b:1:bbbb"


async def until(claim: Callable[[], Awaitable[bool]], timeout: float = 10) -> None:
    """Returns once the claim holds. Raises TimeoutError."""
    async with asyncio.timeout(timeout):
        while not await claim():
            await asyncio.sleep(0.01)


def dead(environ: dict[str, str], *, lease: float = 0.001) -> AbstractAsyncContextManager[Core]:
    """A process on another machine that hangs. Its leases end in so many seconds."""
    settings = settings_of(environ, lease_seconds=lease, shutdown_timeout=0.1)
    return open_core(settings, never, name=THERE, beats=False)


async def never(journal: Journal, job: Job) -> Outcome:
    await asyncio.Event().wait()
    raise AssertionError


async def at_once(journal: Journal, job: Job) -> Outcome:
    return DONE


async def test_a_run_is_executed_and_ends_once(environ: dict[str, str]) -> None:
    async with open_core(settings_of(environ), at_once) as core:
        run = await core.accept()
        entries = await core.runs.wait(run)

        assert [entry.is_last for entry in entries] == [True]
        row = await core.row(run)
        assert (row.status, row.worker, row.lease_until, row.token) == ("completed", None, None, 1)


async def test_a_run_that_was_taken_over_is_written_by_its_new_owner_alone(
    environ: dict[str, str],
) -> None:
    begun, go = asyncio.Event(), asyncio.Event()

    async def slow(journal: Journal, job: Job) -> Outcome:
        journal.append(job.log, PartStartEvent(index=0, part=TextPart("old")))
        await journal.commit([], job.log)
        begun.set()
        await asyncio.shield(go.wait())
        journal.append(job.log, PartDeltaEvent(index=0, delta=TextPartDelta("too late")))
        return replace(DONE, text="old")

    async def quick(journal: Journal, job: Job) -> Outcome:
        journal.append(job.log, PartStartEvent(index=0, part=TextPart("new")))
        return replace(DONE, text="new")

    settings = settings_of(environ, lease_seconds=60)
    async with open_core(settings, slow, name=HERE, beats=False) as old:
        run = await old.accept()
        watching = asyncio.create_task(old.runs.wait(run))
        await begun.wait()
        async with open_core(settings, quick, name=THERE) as new:
            await until(lambda: _is_taken(new, run))
            await new.runs.wait(run)
            go.set()
            await until(lambda: _is_forgotten(old, run))
            entries = await new.stored(run)
            assert await asyncio.wait_for(watching, 5) == entries
            row = await new.row(run)

    assert [entry.seq for entry in entries] == [1, 2, 3, 4]
    assert isinstance(entries[1].event, RunRestarted)
    assert [entry.event.output for entry in entries if isinstance(entry.event, RunEnded)] == ["new"]
    assert (row.status, row.token, json.loads(row.output)) == ("completed", 2, "new")


async def _is_taken(core: Core, run: Run) -> bool:
    """Whether another process has it."""
    await core.sql("UPDATE runs SET lease_until = 0 WHERE id = :id AND token = 1", id=run.id)
    core.worker.nudge()
    return (await core.row(run)).token > 1


async def _is_forgotten(core: Core, run: Run) -> bool:
    return core.worker.log(run.id) is None


async def test_a_worker_stops_what_it_lost(environ: dict[str, str]) -> None:
    stopped = asyncio.Event()

    async def slow(journal: Journal, job: Job) -> Outcome:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()
        raise AssertionError

    async with open_core(settings_of(environ), slow, name=HERE) as core:
        run = await core.accept()
        await until(lambda: _is_live(core, run))
        await core.sql(
            "UPDATE runs SET token = token + 1, worker = :there WHERE id = :id",
            there=THERE,
            id=run.id,
        )

        await asyncio.wait_for(stopped.wait(), 3)
        assert await core.stored(run) == []
        assert (await core.row(run)).status == "running"


async def _is_live(core: Core, run: Run) -> bool:
    return core.worker.log(run.id) is not None


async def test_a_dead_workers_run_is_taken_over_when_its_lease_is_over(
    environ: dict[str, str],
) -> None:
    async with dead(environ, lease=1) as other, open_core(settings_of(environ), at_once) as core:
        run = await other.accept()
        assert (await core.row(run)).worker == THERE

        entries = await asyncio.wait_for(core.runs.wait(run), 5)

        assert entries[-1].is_last
        assert (await core.row(run)).crashes == 1


async def test_a_process_that_ends_begins_nothing_that_it_was_about_to_take(
    environ: dict[str, str],
) -> None:
    begun: list[str] = []
    go = asyncio.Event()

    async def slow(journal: Journal, job: Job) -> Outcome:
        begun.append(job.run.id)
        await go.wait()
        return DONE

    async with dead(environ) as other, open_core(settings_of(environ), slow, beats=False) as core:
        left, own = await other.accept(), await core.accept()
        closings: list[asyncio.Task[None]] = []

        @event.listens_for(core.engine.sync_engine, "before_cursor_execute")
        def _end(_connection: object, _cursor: object, statement: str, *_: object) -> None:
            if "UPDATE runs SET" in statement and "crashes" in statement:  # it takes
                closings.append(asyncio.create_task(core.worker.close()))

        core.worker.begin()
        await until(lambda: _is_queued(core, left))
        go.set()
        await asyncio.gather(*closings)

        assert closings and begun == [own.id]
        assert (await core.row(own)).status == "completed"


async def _is_queued(core: Core, run: Run) -> bool:
    return (await core.row(run)).status == "queued"


async def test_a_run_whose_lease_holds_is_left_alone(environ: dict[str, str]) -> None:
    async with dead(environ, lease=60) as other, open_core(settings_of(environ), at_once) as core:
        held = await other.accept()
        await core.runs.wait(await core.accept(queue=True))  # so it has looked for work

        assert (await core.row(held)).worker == THERE


async def test_runs_of_other_workers_do_not_hide_what_waits(environ: dict[str, str]) -> None:
    async with dead(environ, lease=60) as other, open_core(settings_of(environ), at_once) as core:
        for _ in range(30):
            await other.accept()
        other.worker.lease = -1
        expired = await other.accept()
        queued = await core.accept(queue=True)

        for run in (queued, expired):
            await asyncio.wait_for(core.runs.wait(run), 5)


async def test_a_run_whose_end_was_not_stored_is_taken_up_again(environ: dict[str, str]) -> None:
    attempts: list[int] = []

    async def fails_once(journal: Journal, job: Job) -> Outcome:
        attempts.append(job.run.token)
        if len(attempts) == 1:  # a row that the database refuses
            twice = {"run_id": job.run.id, "seq": 0, "body": "{}"}
            return replace(DONE, rows=[(INSERT_MESSAGE, twice)])
        return DONE

    async with open_core(settings_of(environ, lease_seconds=0.5), fails_once) as core:
        run = await core.accept()

        entries = await asyncio.wait_for(core.runs.wait(run), 10)

        assert attempts == [1, 2]
        assert [entry.is_last for entry in entries].count(True) == 1


@pytest.mark.parametrize("steps", range(6))
async def test_a_log_says_that_its_run_has_ended_only_where_that_is_stored(
    environ: dict[str, str], steps: int
) -> None:
    """However far a hold of the run's is on its way by then."""
    attempts: list[int] = []
    holds: list[asyncio.Task[None]] = []

    async def fails_once(journal: Journal, job: Job) -> Outcome:
        attempts.append(job.run.token)
        if len(attempts) > 1:
            return DONE
        holds.append(asyncio.create_task(job.purse.hold(Amount(10))))
        for _ in range(steps):
            await asyncio.sleep(0)
        twice = {"run_id": job.run.id, "seq": 0, "body": "{}"}  # refused by the database
        return replace(DONE, rows=[(INSERT_MESSAGE, twice)])

    async with open_core(settings_of(environ, lease_seconds=0.5), fails_once) as core:
        run = await core.accept()
        await until(lambda: _has_ended(core, run))

        assert [entry.is_last for entry in await core.stored(run)].count(True) == 1


async def _has_ended(core: Core, run: Run) -> bool:
    return (await core.row(run)).finished_at is not None


async def test_a_run_that_was_committed_but_never_begun_is_begun(environ: dict[str, str]) -> None:
    """Its process was told of a failure between its commit and its start."""

    async def first_never(journal: Journal, job: Job) -> Outcome:
        return await (never if job.options.text == "first" else at_once)(journal, job)

    settings = settings_of(environ, lease_seconds=0.5)
    async with dead(environ, lease=0.5) as other, open_core(settings, first_never) as core:
        await core.accept(prompt="first")  # so that there are leases to renew
        run = await other.accept()
        await core.sql(
            "UPDATE runs SET worker = :here WHERE id = :id", here=core.worker.name, id=run.id
        )

        await asyncio.wait_for(core.runs.wait(run), 10)


async def test_the_log_of_a_resumed_run_is_never_seen_shorter_than_it_is(
    environ: dict[str, str],
) -> None:
    begun = asyncio.Event()

    async def speak(journal: Journal, job: Job) -> Outcome:
        journal.append(job.log, PartStartEvent(index=0, part=TextPart("")))
        await journal.commit([], job.log)
        begun.set()
        return await never(journal, job)

    settings = settings_of(environ, lease_seconds=60, shutdown_timeout=0.1)
    async with open_core(settings, speak, name=THERE) as old, dead(environ) as new:
        run = await old.accept()
        await begun.wait()
        new.worker.start(run)

        assert len(await new.runs.entries(run)) == 1


async def test_a_run_that_kills_every_process_is_given_up(
    environ: dict[str, str], bearer: Callable[..., Any], upstream: Upstream
) -> None:
    upstream.when("deadly", Reply(text="one two three", hang=True))
    process = ServerProcess(**environ, POISON_ATTEMPTS="2")
    with process:
        token = await bearer("Owner")
        async with client_of(process.url, token) as owner:
            body = {"model": "assistant", "input": "deadly", "background": True}
            begun = (await owner.post("/v1/responses", json=body)).json()
            for attempt in (1, 2):
                await upstream.wait_for_async(attempt)
                process.kill()
                process.start()
            events = await follow(owner, begun["id"])

    assert len(upstream.requests) == 2
    assert events[-1]["type"] == "response.failed"
    assert "2 processes died" in events[-1]["response"]["error"]["message"]


async def follow(client: AsyncClient, response_id: str) -> list[dict[str, Any]]:
    async with client.stream("GET", f"/v1/responses/{response_id}?stream=true") as reply:
        return [event async for event in events_of(reply.aiter_lines())]


async def events_of(lines: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
    async for line in lines:
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


shared = pytest.mark.parametrize("database_url", ["postgres"], indirect=True)


async def test_another_process_follows_and_cancels(
    environ: dict[str, str], bearer: Callable[..., Any], upstream: Upstream
) -> None:
    upstream.when("slow", Reply(text="one two three", hang=True))
    with ExitStack() as stack:
        processes = [stack.enter_context(ServerProcess(**environ)) for _ in range(3)]
        token = await bearer("Owner")
        async with (
            client_of(processes[0].url, token) as accepting,
            client_of(processes[1].url, token) as following,
            client_of(processes[2].url, token) as cancelling,
        ):
            body = {"model": "assistant", "input": "slow", "background": True}
            begun = (await accepting.post("/v1/responses", json=body)).json()
            await upstream.wait_for_async(1)
            watching = asyncio.create_task(follow(following, begun["id"]))
            cancelled = await asyncio.wait_for(
                cancelling.post(f"/v1/responses/{begun['id']}/cancel"), 2
            )
            await upstream.wait_until_async(lambda: upstream.requests[0].aborted, 2)
            events = await asyncio.wait_for(watching, 2)

    assert cancelled.json()["status"] == "cancelled"
    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"] == cancelled.json()
    assert len(upstream.requests) == 1


async def pause_between_writes(process: ServerProcess, database_url: str) -> None:
    """Whoever stands still while it writes keeps SQLite's lock from all others, for ever."""
    url = make_url(database_url)
    while True:
        process.pause()
        if not url.drivername.startswith("sqlite"):
            return
        with closing(sqlite3.connect(str(url.database), timeout=0.2, isolation_level=None)) as file:
            try:
                file.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError:
                process.resume()
        await asyncio.sleep(0.05)


async def test_a_process_that_was_stopped_past_its_lease_writes_nothing_more(
    environ: dict[str, str], bearer: Callable[..., Any], upstream: Upstream
) -> None:
    answers = iter([Reply(text="one two three", hang=True, hang_after=2)])
    upstream.when("count", lambda _: next(answers, Reply(text="four five six")))
    environ["LEASE_SECONDS"] = "1"
    with ExitStack() as stack:
        first, second = (stack.enter_context(ServerProcess(**environ)) for _ in range(2))
        token = await bearer("Owner")
        async with client_of(first.url, token) as owner:
            body = {"model": "assistant", "input": "count", "stream": True}
            async with owner.stream("POST", "/v1/responses", json=body) as reply:
                said = events_of(reply.aiter_lines())
                begun = await anext(said)
                async for event in said:
                    if event["type"] == "response.output_text.delta":
                        break
        async with client_of(second.url, token) as owner:
            await pause_between_writes(first, environ["DATABASE_URL"])
            await upstream.wait_for_async(2)
            first.resume()
            events = await follow(owner, begun["response"]["id"])
            await upstream.wait_until_async(lambda: upstream.requests[0].aborted, 5)
            again = await follow(owner, begun["response"]["id"])

    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1]["type"] == "response.completed"
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "four five six"
    assert again == events
    assert len(upstream.requests) == 2


@shared
async def test_a_run_that_begins_while_leases_are_renewed_keeps_its_own(
    environ: dict[str, str],
) -> None:
    stopped: list[str] = []

    async def waits(journal: Journal, job: Job) -> Outcome:
        try:
            return await never(journal, job)
        except asyncio.CancelledError:
            stopped.append(job.run.id)
            raise

    async with open_core(settings_of(environ), waits) as core:
        first = await core.accept()
        async with core.engine.begin() as connection:  # renewing waits for this row
            lock = text("SELECT 1 FROM runs WHERE id = :id FOR UPDATE")
            await connection.execute(lock, {"id": first.id})
            await until(lambda: _waits_for_a_lock(core))
            second = await core.accept()
            await until(lambda: _is_live(core, second))
            await asyncio.sleep(0.2)
        await until(lambda: _is_renewed(core, second))

        assert stopped == []


@shared
async def test_who_accepts_a_run_and_stops_another_locks_as_all_others_do(
    environ: dict[str, str],
) -> None:
    async with open_core(settings_of(environ), never, beats=False) as core:
        other = await core.accept()
        limits = Move(owner_id=core.caller.user_id, limits=core.worker.limits)
        async with core.engine.begin() as connection:
            await connection.execute(FENCE, {"ids": [other.id]})
            stop = core.journal.commit([(CANCEL_RUN, {"of_run": other.id})], move=limits)
            stopping = asyncio.create_task(stop)
            await until(lambda: _waits_for_a_lock(core))
            await connection.execute(text("SELECT 1 FROM allowances FOR UPDATE"))
        await stopping


async def _waits_for_a_lock(core: Core) -> bool:
    return bool(await core.sql("SELECT 1 FROM pg_locks WHERE NOT granted"))


async def _is_renewed(core: Core, run: Run) -> bool:
    [row] = await core.sql(
        "SELECT lease_until - extract(epoch FROM clock_timestamp()) AS rest FROM runs "
        "WHERE id = :id",
        id=run.id,
    )
    return float(row.rest) > core.worker.lease - 0.5


async def test_an_operator_ends_also_what_waits_for_a_person(environ: dict[str, str]) -> None:
    async def asks(journal: Journal, job: Job) -> Outcome:
        return Outcome("waiting")

    async with open_core(settings_of(environ), asks) as core:
        run = await core.accept()
        async for _ in core.runs.follow(run, pause=True):
            pass
        await Operations(core.engine).cancel(run.id)

        entries = await asyncio.wait_for(core.runs.wait(run), 10)

    assert isinstance(entries[-1].event, RunEnded)
    assert entries[-1].event.status == "cancelled"

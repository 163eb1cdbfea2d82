"""Any number of processes at one database: fair, told at once, and none of them indispensable."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pytest
from pydantic_ai.messages import PartDeltaEvent, PartStartEvent, TextPart, TextPartDelta
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from app.core.security import EVERYTHING, Caller
from app.models import Run
from app.services.changes import INSERT_MESSAGE, PROGRESS
from app.services.execution import Job, Outcome
from app.services.journal import Journal
from app.services.queue import TURNS
from app.services.refusals import Stopping
from app.services.run_log import RunEnded
from tests.conftest import settings_of
from tests.core import DONE, Core, open_core
from tests.proxy import Proxy

HERE, THERE = "host-a:1:aaaa", "host-b:1:bbbb"

shared = pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
"""Where processes tell each other."""


async def until(claim: Callable[[], Awaitable[bool]], timeout: float = 20) -> None:
    """Returns once the claim holds. Raises TimeoutError."""
    async with asyncio.timeout(timeout):
        while not await claim():
            await asyncio.sleep(0.02)


async def never(journal: Journal, job: Job) -> Outcome:
    await asyncio.Event().wait()
    raise AssertionError


async def at_once(journal: Journal, job: Job) -> Outcome:
    return DONE


class Crowd:
    """An executor that knows which runs it executes, and in what order it began them."""

    def __init__(self, pause: float = 0.0) -> None:
        self.begun: list[Job] = []
        self.most = 0
        self._now = 0
        self._pause = pause

    async def __call__(self, journal: Journal, job: Job) -> Outcome:
        self.begun.append(job)
        self._now += 1
        self.most = max(self.most, self._now)
        await asyncio.sleep(self._pause)
        self._now -= 1
        return DONE


def only_accepts(environ: dict[str, str]) -> Any:
    """A process that begins nothing of what it queues."""
    return open_core(settings_of(environ), never, name=THERE, beats=False)


async def enqueue(core: Core, count: int) -> list[Run]:
    return list(await asyncio.gather(*(core.accept(queue=True) for _ in range(count))))


async def another_owner(core: Core, number: int) -> Caller:
    [row] = await core.sql(
        "INSERT INTO users (email, name, hashed_password, is_admin) "
        "VALUES (:email, 'Other', '!', false) RETURNING id",
        email=f"other{number}@example.com",
    )
    return Caller.of(row.id, EVERYTHING)


async def all_ended(core: Core) -> bool:
    rows = await core.sql("SELECT 1 FROM runs WHERE finished_at IS NULL")
    return not rows


@pytest.mark.parametrize("room", [1, 2, 5])
async def test_an_owner_with_many_runs_lets_others_have_their_turn(
    environ: dict[str, str], room: int
) -> None:
    crowd = Crowd()
    async with only_accepts(environ) as before:
        await enqueue(before, 40)
        others = [replace(before, caller=await another_owner(before, n)) for n in range(2)]
        for other in others:
            await enqueue(other, 3)
        settings = settings_of(environ, worker_runs=room)
        async with open_core(settings, crowd, name=HERE) as core:
            await until(lambda: all_ended(core))

    owners = [job.run.owner_id for job in crowd.begun]
    assert len(owners) == 46
    for other in others:  # theirs are among the first, however many each look took
        assert owners[: 9 + 2 * room].count(other.caller.user_id) == 3


async def test_runs_of_one_owner_begin_in_their_order(environ: dict[str, str]) -> None:
    crowd = Crowd()
    async with only_accepts(environ) as before:
        runs = [await before.accept(queue=True) for _ in range(8)]
        async with open_core(settings_of(environ, worker_runs=1), crowd, name=HERE) as core:
            await until(lambda: all_ended(core))

    assert [job.run.id for job in crowd.begun] == [run.id for run in runs]


async def test_a_process_takes_no_more_from_the_queue_than_it_may(environ: dict[str, str]) -> None:
    crowd = Crowd(pause=0.05)
    async with open_core(settings_of(environ, worker_runs=3), crowd) as core:
        await enqueue(core, 12)
        await until(lambda: all_ended(core))

    assert crowd.most == 3


async def test_what_is_not_queued_waits_for_no_room(environ: dict[str, str]) -> None:
    async def hangs(journal: Journal, job: Job) -> Outcome:
        return await (never if job.options.text == "hang" else at_once)(journal, job)

    settings = settings_of(environ, worker_runs=1, shutdown_timeout=0.1)
    async with open_core(settings, hangs) as core:
        full = await core.accept(prompt="hang", queue=True)
        await until(lambda: is_live(core, full))

        await asyncio.wait_for(core.runs.wait(await core.accept()), 10)


async def is_live(core: Core, run: Run) -> bool:
    return core.worker.log(run.id) is not None


async def test_no_more_of_an_owners_runs_go_on_than_may_in_all_processes(
    environ: dict[str, str],
) -> None:
    crowd = Crowd(pause=0.05)
    settings = settings_of(environ, owner_runs=3)
    async with AsyncExitStack() as stack:
        cores = [
            await stack.enter_async_context(open_core(settings, crowd, name=f"host-{n}:1:a"))
            for n in range(3)
        ]
        for core in cores:
            await enqueue(core, 6)
        await until(lambda: all_ended(cores[0]))

    assert crowd.most == 3
    assert len(crowd.begun) == len({job.run.id for job in crowd.begun}) == 18


async def test_a_queued_run_is_not_begun_before_its_time(environ: dict[str, str]) -> None:
    crowd = Crowd()
    async with only_accepts(environ) as before:
        later, now = await enqueue(before, 2)
        await before.sql("UPDATE runs SET lease_until = 9e9 WHERE id = :id", id=later.id)
        async with open_core(settings_of(environ), crowd, name=HERE) as core:
            await core.runs.wait(now)
            assert (await core.row(later)).status == "queued"
            await core.sql("UPDATE runs SET lease_until = 1 WHERE id = :id", id=later.id)

            await asyncio.wait_for(core.runs.wait(later), 10)


async def test_a_queued_run_is_cancelled_though_there_is_no_room(environ: dict[str, str]) -> None:
    settings = settings_of(environ, worker_runs=1, shutdown_timeout=0.1)
    async with open_core(settings, never) as core:
        full = await core.accept(queue=True)
        await until(lambda: is_live(core, full))
        waits = await core.accept(queue=True)
        await core.runs.cancel(core.caller, waits.id)

        entries = await asyncio.wait_for(core.runs.wait(waits), 10)

        assert isinstance(entries[-1].event, RunEnded)
        assert entries[-1].event.status == "cancelled"
        assert (await core.row(full)).status == "running"


async def speak(journal: Journal, job: Job) -> Outcome:
    journal.append(job.log, PartStartEvent(index=0, part=TextPart("")))
    for number in range(10):
        journal.append(job.log, PartDeltaEvent(index=0, delta=TextPartDelta(f"{number} ")))
        await asyncio.sleep(0.05)
    return DONE


@shared
async def test_who_follows_elsewhere_is_told_of_each_entry(environ: dict[str, str]) -> None:
    async with (
        open_core(settings_of(environ), speak, name=HERE) as here,
        open_core(settings_of(environ), never, name=THERE) as there,
    ):
        there.worker.signals.look = 60  # it hardly looks by itself
        await until(lambda: hears(there, here))
        run = await here.accept()

        entries, others = await asyncio.wait_for(
            asyncio.gather(there.runs.wait(run), there.runs.wait(run)), 20
        )

        assert entries == others == await here.stored(run)


async def hears(core: Core, other: Core) -> bool:
    watch = core.worker.signals.following("nobody")
    other.worker.signals.tell("moved", "nobody")
    await watch.moved(0, 0.2)
    return watch.moves > 0


@shared
async def test_nothing_is_told_of_a_run_that_nobody_follows_elsewhere(
    environ: dict[str, str],
) -> None:
    heard: list[str] = []
    async with open_core(settings_of(environ), speak) as core, core.engine.connect() as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        await driver.add_listener("runs", lambda *said: heard.append(said[-1]))
        await core.runs.wait(await core.accept())
        await core.runs.wait(await core.accept(queue=True))
        core.worker.signals.tell("moved", "all")
        await until(lambda: is_in(heard, "moved all"))
        driver.terminate()

    assert [said for said in heard if not said.startswith("follow")] == ["moved all"]


async def is_in(heard: list[str], said: str) -> bool:
    return said in heard


@shared
async def test_a_process_that_is_cut_off_from_the_others_hears_later(
    environ: dict[str, str],
) -> None:
    with Proxy(environ["DATABASE_URL"]) as proxy:
        settings = settings_of(environ, database_url=proxy.url)
        async with (
            open_core(settings_of(environ), speak, name=HERE) as here,
            open_core(settings, never, name=THERE) as there,
        ):
            await until(lambda: hears(there, here))
            run = await here.accept()
            following = there.runs.follow(run)
            entries = [await anext(following)]
            proxy.cut()
            await here.runs.wait(run)
            proxy.restore()

            async with asyncio.timeout(20):
                entries += [entry async for entry in following]

        assert entries == await here.runs.wait(run)


@shared
async def test_a_run_behind_one_elsewhere_begins_when_that_ends(environ: dict[str, str]) -> None:
    go = asyncio.Event()

    async def waits(journal: Journal, job: Job) -> Outcome:
        if job.options.text == "first":
            await go.wait()
        return DONE

    async with (
        open_core(settings_of(environ), waits, name=HERE) as here,
        open_core(settings_of(environ), waits, name=THERE) as there,
    ):
        first = await here.accept(prompt="first", chat="chat")
        second = await there.accept(prompt="second", chat="chat")
        assert second.status == "queued"
        go.set()

        await asyncio.wait_for(there.runs.wait(second), 10)

        assert (await here.row(first)).finished_at <= (await here.row(second)).finished_at


async def test_a_deploy_is_no_crash_however_often(environ: dict[str, str]) -> None:
    settings = settings_of(environ, poison_attempts=2, shutdown_timeout=0.4)
    async with only_accepts(environ) as before:
        [run] = await enqueue(before, 1)
        for number in range(4):
            async with open_core(settings, never, name=f"host-{number}:1:a") as core:
                await until(lambda core=core: is_live(core, run))
        row = await before.row(run)
        assert (row.status, row.crashes, row.worker) == ("queued", 0, None)

        async with open_core(settings, at_once, name=HERE) as core:
            entries = await asyncio.wait_for(core.runs.wait(run), 10)

    assert [entry.event.status for entry in entries if isinstance(entry.event, RunEnded)] == [
        "completed"
    ]


async def test_a_run_that_is_stopped_during_a_deploy_waits_for_no_turn(
    environ: dict[str, str],
) -> None:
    stubborn = Stubborn()
    settings = settings_of(environ, worker_runs=1, shutdown_timeout=0.5)
    async with (
        open_core(settings, stubborn, name=HERE, beats=False) as old,
        open_core(settings, never, name=THERE) as new,
    ):
        try:
            run = await old.accept()
            await until(lambda: is_live(old, run))
            full = await new.accept(queue=True)
            await until(lambda: is_live(new, full))
            await old.sql("UPDATE runs SET cancelling = true WHERE id = :id", id=run.id)
            await old.worker.close()

            entries = await asyncio.wait_for(new.runs.wait(run), 10)
        finally:
            stubborn.go.set()

    assert [entry.event.status for entry in entries if isinstance(entry.event, RunEnded)] == [
        "cancelled"
    ]


async def test_progress_forgets_the_crashes_before(environ: dict[str, str]) -> None:
    crashes: list[int] = []

    async def progresses(journal: Journal, job: Job) -> Outcome:
        crashes.append(job.run.crashes)
        if len(crashes) == 3:  # then its process dies again, but it came further
            await journal.commit([(PROGRESS, {"of_run": job.run.id})], job.log)
        return DONE if len(crashes) > 4 else await never(journal, job)

    settings = settings_of(environ, poison_attempts=3, lease_seconds=60, shutdown_timeout=0.1)
    async with only_accepts(environ) as before:
        [run] = await enqueue(before, 1)
        for number in range(5):
            async with open_core(settings, progresses, name=f"host-{number}:1:a") as core:
                await until(lambda n=number: is_in_number(crashes, n + 1))
                if number < 4:  # it dies: it neither beats nor hands over
                    await core.sql(
                        "UPDATE runs SET lease_until = :soon, token = token + 1, worker = 'x:1:y' "
                        "WHERE id = :id",
                        id=run.id,
                        soon=time.time() + 1,  # until when it is closed
                    )
        row = await before.row(run)

    assert crashes == [0, 1, 2, 1, 2]
    assert row.status == "completed"


async def is_in_number(crashes: list[int], number: int) -> bool:
    return len(crashes) >= number


class Stubborn:
    """An executor that heeds no cancellation, as a tool in a thread does."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def __call__(self, journal: Journal, job: Job) -> Outcome:
        while not self.go.is_set():
            try:
                await self.go.wait()
            except asyncio.CancelledError:
                continue
        return replace(DONE, text="too late")


async def test_a_run_that_cannot_be_stopped_is_handed_over_all_the_same(
    environ: dict[str, str],
) -> None:
    stubborn = Stubborn()
    settings = settings_of(environ, shutdown_timeout=1)
    async with (
        open_core(settings, stubborn, name=HERE) as old,
        open_core(settings_of(environ), at_once, name=THERE) as new,
    ):
        run = await old.accept()
        following = asyncio.create_task(old.runs.wait(run))
        await until(lambda: is_live(old, run))
        begun = asyncio.get_running_loop().time()
        try:
            await old.worker.close()
            took = asyncio.get_running_loop().time() - begun
            with pytest.raises(Stopping):
                await asyncio.wait_for(following, 5)
            entries = await asyncio.wait_for(new.runs.wait(run), 10)
        finally:
            stubborn.go.set()
        await until(lambda: is_forgotten(old, run))

        assert await new.stored(run) == entries
        assert [entry.event.output for entry in entries if isinstance(entry.event, RunEnded)] == [
            "done"
        ]
        row = await new.row(run)
        assert (row.status, row.crashes, row.token) == ("completed", 0, 2)
    assert took < 3  # on a busy machine


async def is_forgotten(core: Core, run: Run) -> bool:
    return core.worker.log(run.id) is None


@shared
async def test_a_commit_that_nobody_confirmed_counts_once(environ: dict[str, str]) -> None:
    """The database has it, and the connection is lost before it says so."""
    written, go = asyncio.Event(), asyncio.Event()

    async def steps(journal: Journal, job: Job) -> Outcome:
        await go.wait()
        journal.append(job.log, PartStartEvent(index=0, part=TextPart("one")))
        row = {"run_id": job.run.id, "seq": 1, "body": "{}"}
        await journal.commit([(INSERT_MESSAGE, row)], job.log)
        written.set()
        return DONE

    with Proxy(environ["DATABASE_URL"]) as proxy:
        settings = settings_of(environ, database_url=proxy.url, database_timeout=5)
        async with (
            open_core(settings_of(environ), never, name=THERE, beats=False) as other,
            open_core(settings, steps, name=HERE) as core,
        ):
            run = await core.accept()
            await until(lambda: is_live(core, run))
            proxy.doom(b"pg_current_xact_id", asking=b"COMMIT")
            go.set()
            await asyncio.wait_for(written.wait(), 20)
            assert proxy.is_doom_done
            entries = await asyncio.wait_for(core.runs.wait(run), 20)

            assert await other.stored(run) == entries
            assert [entry.seq for entry in entries] == [1, 2]
            row = await other.row(run)
            assert (row.status, row.token) == ("completed", 1)


@shared
async def test_a_process_that_stops_amid_a_transaction_does_not_keep_its_runs(
    environ: dict[str, str],
) -> None:
    settings = settings_of(environ, database_timeout=2, lease_seconds=0.5)
    async with (
        open_core(settings, never, name=HERE, beats=False) as stopped,
        open_core(settings, at_once, name=THERE) as core,
        stopped.engine.connect() as connection,
    ):
        run = await stopped.accept()
        lock = text("SELECT token FROM runs WHERE id = :id FOR NO KEY UPDATE")
        await connection.execute(lock, {"id": run.id})

        entries = await asyncio.wait_for(core.runs.wait(run), 20)

        assert entries[-1].is_last
        assert (await core.row(run)).token == 2
        with pytest.raises(DBAPIError):
            await connection.execute(lock, {"id": run.id})


async def test_owners_who_can_begin_nothing_stand_in_nobodys_way(
    environ: dict[str, str],
) -> None:
    settings = settings_of(environ, owner_runs=1, shutdown_timeout=0.1)
    async with only_accepts(environ) as before:
        for number in range(TURNS):
            full = replace(before, caller=await another_owner(before, number))
            await full.accept()
            await full.accept(queue=True)
        last = replace(before, caller=await another_owner(before, TURNS))
        waits = await last.accept(queue=True)
        async with open_core(settings, at_once, name=HERE) as core:
            await asyncio.wait_for(core.runs.wait(waits), 10)

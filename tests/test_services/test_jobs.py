"""Jobs below their routes: what a driver takes, how much at a time, and what is swept away."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from app.core.errors import Conflict, Invalid
from app.core.security import Caller
from app.schemas.extraction import ExtractionSpec
from app.schemas.job import JobItem, JobSettings
from app.services.driver import Concurrency, JobExecutor
from app.services.execution import Job, Outcome
from app.services.jobs import Jobs, Place
from app.services.journal import Journal
from app.services.operations import Operations
from app.services.webhooks import announce
from tests.conftest import settings_of
from tests.core import Core, open_core
from tests.keeping import sweep

HOOK = "https://example.com/hook"
FOUND = Outcome(
    "completed",
    finish_reason="stop",
    output='{"data": 1, "failed_ranges": []}',
    usage={"requests": 1, "input_tokens": 10, "output_tokens": 5},
)


class Given:
    """An upload that is here already."""

    settings = JobSettings.model_validate({"schema": True})
    digest = b""

    def __init__(self, *texts: str, concurrency: int = 4, webhook: str | None = None) -> None:
        self.texts = texts
        self.settings = JobSettings.model_validate(
            {
                "schema": True,
                "options": {"concurrency": concurrency},
                "webhook": webhook and {"url": webhook},
            }
        )

    async def items(self) -> AsyncIterator[tuple[Place, JobItem]]:
        for number, text in enumerate(self.texts):
            yield place(number), JobItem(custom_id=f"c{number}", text=text)


def place(number: int) -> Place:
    return Place(f"items/{number}", f"items/{number}")


async def spec(caller: Caller, settings: JobSettings) -> ExtractionSpec:
    return ExtractionSpec(body={}, sha256="0" * 64)


def jobs_of(core: Core, environ: dict[str, str]) -> Jobs:
    executors: Any = core.worker._executors  # pyright: ignore[reportPrivateUsage]
    executors["job"] = JobExecutor(core.engine, core.journal, core.worker)
    return Jobs(settings_of(environ), core.engine, core.journal, core.worker, core.runs, "m")


async def over(core: Core, jobs: Jobs, job_id: str) -> Any:
    async with asyncio.timeout(20):
        entries = await jobs.follow(core.caller, job_id)
        assert entries
        async for _ in entries:
            pass
    return await jobs.get(core.caller, job_id)


async def test_no_more_items_are_asked_at_a_time_than_was_said(environ: dict[str, str]) -> None:
    at_once = [0, 0]

    async def slow(journal: Journal, job: Job) -> Outcome:
        at_once[0] += 1
        at_once[1] = max(at_once)
        await asyncio.sleep(0.01)
        at_once[0] -= 1
        return FOUND

    async with open_core(settings_of(environ), slow) as core:
        jobs = jobs_of(core, environ)
        texts = [f"text {n}" for n in range(40)]
        job = await jobs.accept(core.caller, Given(*texts, concurrency=3), spec)

        done = await over(core, jobs, job.id)

    assert done.counts.succeeded == 40
    assert at_once[1] == 3
    assert done.usage.total_tokens == 600


async def test_only_its_driver_takes_a_jobs_items(environ: dict[str, str]) -> None:
    async def once(journal: Journal, job: Job) -> Outcome:
        return FOUND

    async with open_core(settings_of(environ), once) as core:
        jobs = jobs_of(core, environ)
        job = await jobs.accept(core.caller, Given("one", "two"), spec)
        await over(core, jobs, job.id)
        await core.sql("UPDATE runs SET status = 'queued' WHERE batch_id = :id", id=job.id)
        await core.runs.wait(await core.accept(queue=True))  # so the worker has looked for work
        rows = await core.sql("SELECT status FROM runs WHERE batch_id = :id", id=job.id)

    assert [row.status for row in rows] == ["queued", "queued"]


async def test_items_whose_first_was_never_answered_are_asked_themselves(
    environ: dict[str, str],
) -> None:
    asked: list[int | None] = []

    async def note(journal: Journal, job: Job) -> Outcome:
        asked.append(job.run.position)
        return FOUND

    async with open_core(settings_of(environ), note, beats=False) as core:
        jobs = jobs_of(core, environ)
        job = await jobs.accept(core.caller, Given("same", "same", "same", "other"), spec)
        await core.sql(
            "UPDATE runs SET status = 'cancelled' WHERE batch_id = :id AND position = 1", id=job.id
        )
        core.worker.begin()
        done = await over(core, jobs, job.id)

    assert sorted(place or 0 for place in asked) == [2, 3, 4]
    assert done.counts.succeeded == 3 and done.counts.cancelled == 1


async def test_a_bug_in_the_driver_is_told_and_retried(environ: dict[str, str]) -> None:
    async def once(journal: Journal, job: Job) -> Outcome:
        return FOUND

    async def broken(job: Job) -> Outcome:
        raise RuntimeError

    async with open_core(settings_of(environ), once) as core:
        jobs = jobs_of(core, environ)
        executors: Any = core.worker._executors  # pyright: ignore[reportPrivateUsage]
        works, executors["job"] = executors["job"], broken
        job = await jobs.accept(core.caller, Given("one"), spec)
        failed = await over(core, jobs, job.id)
        executors["job"] = works
        await jobs.retry(core.caller, job.id)
        done = await over(core, jobs, job.id)

    assert failed.status == "failed" and failed.error.code == "internal"
    assert done.status == "completed" and done.counts.succeeded == 1


async def test_every_end_of_a_job_is_told_once(environ: dict[str, str]) -> None:
    async def once(journal: Journal, job: Job) -> Outcome:
        if job.options.text == "waits":
            await asyncio.Event().wait()
        return FOUND

    async def broken(job: Job) -> Outcome:
        raise RuntimeError

    async with open_core(settings_of(environ), once) as core:
        jobs = jobs_of(core, environ)
        worker: Any = core.worker
        worker._announce = announce
        works, worker._executors["job"] = worker._executors["job"], broken
        job = await jobs.accept(core.caller, Given("one", webhook=HOOK), spec)
        await over(core, jobs, job.id)
        worker._executors["job"] = works
        await jobs.retry(core.caller, job.id)
        await over(core, jobs, job.id)
        other = await jobs.accept(core.caller, Given("waits", webhook=HOOK), spec)
        for _ in range(2):
            await jobs.cancel(core.caller, other.id)
        rows = await core.sql("SELECT options FROM runs WHERE kind = 'webhook' ORDER BY created_at")

    told = [json.loads(json.loads(row.options)["text"]) for row in rows]
    assert [(event["type"], event["data"]["id"], event["data"]["status"]) for event in told] == [
        ("extraction_job.failed", job.id, "failed"),
        ("extraction_job.completed", job.id, "completed"),
        ("extraction_job.cancelled", other.id, "cancelled"),
    ]
    assert [event["data"].get("counts", {}).get("total") for event in told] == [None, 1, 1]


async def test_a_retried_job_goes_on_from_what_it_has_spent(environ: dict[str, str]) -> None:
    fails = True

    async def half(journal: Journal, job: Job) -> Outcome:
        if fails and job.options.text == "two":
            return Outcome("failed", error={"code": "x", "message": "x"}, usage=FOUND.usage)
        return replace(FOUND, usage={name: 2 * count for name, count in FOUND.usage.items()})

    async with open_core(settings_of(environ), half) as core:
        jobs = jobs_of(core, environ)
        job = await jobs.accept(core.caller, Given("one", "two"), spec)
        before = await over(core, jobs, job.id)
        fails = False
        begun = await jobs.retry(core.caller, job.id)
        after = await over(core, jobs, job.id)

    assert before.usage.total_tokens == begun.usage.total_tokens == 45
    assert after.status == "completed" and after.usage.total_tokens == 60


async def test_a_cancelled_job_is_taken_up_again_where_that_is_asked_for(
    environ: dict[str, str],
) -> None:
    waits = True

    async def patient(journal: Journal, job: Job) -> Outcome:
        if waits:
            await asyncio.Event().wait()
        return FOUND

    async with open_core(settings_of(environ), patient) as core:
        jobs = jobs_of(core, environ)
        job = await jobs.accept(core.caller, Given("one", "two", "one", concurrency=1), spec)
        async with asyncio.timeout(10):
            while not (await jobs.get(core.caller, job.id)).counts.running:
                await asyncio.sleep(0.01)
            await jobs.cancel(core.caller, job.id)
            while (await jobs.get(core.caller, job.id)).counts.running:
                await asyncio.sleep(0.01)
        with pytest.raises(Conflict, match="No item of this job failed"):
            await jobs.retry(core.caller, job.id)
        waits = False
        await jobs.retry(core.caller, job.id, "cancelled")
        done = await over(core, jobs, job.id)

    assert done.status == "completed" and done.counts.succeeded == 3


async def test_what_a_dead_process_cancelled_is_not_asked_again(environ: dict[str, str]) -> None:
    """It died behind its first transaction, and its items run nowhere."""

    async def never(journal: Journal, job: Job) -> Outcome:
        raise AssertionError

    async with open_core(settings_of(environ), never, beats=False) as core:
        jobs = jobs_of(core, environ)
        job = await jobs.accept(core.caller, Given("one", "two"), spec)
        await core.sql(
            "UPDATE runs SET status = 'running', worker = 'elsewhere:1:x', lease_until = 0, "
            "cancelling = true WHERE batch_id = :id",
            id=job.id,
        )
        await core.sql("UPDATE runs SET status = 'cancelled' WHERE id = :id", id=job.id)
        core.worker.begin()
        async with asyncio.timeout(10):
            while (await jobs.get(core.caller, job.id)).counts.cancelled < 2:
                await asyncio.sleep(0.02)


async def test_an_item_that_an_operator_cancels_is_left_to_its_driver(
    environ: dict[str, str],
) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def waits(journal: Journal, job: Job) -> Outcome:
        if job.run.batch_id:
            begun.set()
            await go_on.wait()
        return FOUND

    async with open_core(settings_of(environ), waits) as core:
        jobs = jobs_of(core, environ)
        job = await jobs.accept(core.caller, Given("one", "two", "three", concurrency=1), spec)
        await begun.wait()
        items = "SELECT id, status, token FROM runs WHERE batch_id = :id ORDER BY position"
        last = (await core.sql(items, id=job.id))[-1]
        operations = Operations(core.engine)
        with pytest.raises(Conflict, match=f"requeue its job, {job.id}"):
            await operations.requeue(last.id)
        await operations.cancel(last.id)
        await core.runs.wait(await core.accept(queue=True))  # so the worker has looked for work
        left = (await core.sql(items, id=job.id))[-1]
        go_on.set()
        done = await over(core, jobs, job.id)
        [allowance] = await core.sql("SELECT held_tokens FROM allowances")

    assert (left.status, left.token) == ("running", last.token)
    assert (done.counts.succeeded, done.counts.cancelled) == (2, 1)
    assert allowance.held_tokens == 0


async def test_what_was_never_accepted_leaves_nothing(environ: dict[str, str]) -> None:
    async def never(journal: Journal, job: Job) -> Outcome:
        raise AssertionError

    class Breaks(Given):
        async def items(self) -> AsyncIterator[tuple[Place, JobItem]]:
            for number in range(700):
                yield place(number), JobItem(custom_id=f"c{number}", text=f"text {number}")
            raise Invalid("No more.")

    async with open_core(settings_of(environ), never, beats=False) as core:
        jobs = jobs_of(core, environ)
        with pytest.raises(Invalid):
            await jobs.accept(core.caller, Breaks(), spec)
        assert await core.sql("SELECT id FROM runs") == []

        kept = await jobs.accept(core.caller, Given("one"), spec)
        left = await jobs.accept(core.caller, Given("two"), spec)
        long_ago = datetime.now(UTC).replace(tzinfo=None) - timedelta(hours=2)
        await core.sql(
            "UPDATE runs SET status = 'accepting', created_at = :at WHERE id = :id",
            id=left.id,
            at=str(long_ago)
            if "sqlite" in environ["DATABASE_URL"]
            else long_ago.replace(tzinfo=UTC),
        )
        await sweep(environ)
        rows = await core.sql("SELECT id FROM runs WHERE kind = 'job'")

    assert [row.id for row in rows] == [kept.id]


def test_concurrency_halves_when_the_provider_says_so_and_grows_back() -> None:
    places = Concurrency(16)

    places.throttled(None)
    places.throttled(None)  # of the same moment
    halved = places.limit
    for _ in range(8):
        places.succeeded()
    grown = places.limit
    for _ in range(1000):
        places.succeeded()

    assert (halved, grown, places.limit) == (8, 8, 16)


def test_nothing_begins_before_the_provider_wants_it() -> None:
    places = Concurrency(16)

    places.throttled(60)

    assert places.limit == 0

"""Executes jobs: claims their items, a few at a time, and ends when all have ended."""

import asyncio
import json
import math
import time
from collections import Counter, deque
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any, cast

from pydantic_core import to_json
from sqlalchemy import (
    JSON,
    ColumnElement,
    and_,
    exists,
    func,
    or_,
    select,
    type_coerce,
)
from sqlalchemy import cast as sql_cast
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.orm import aliased

from app.core.json import dump_any
from app.db.session import reading
from app.models import Run
from app.models.run import OPEN
from app.schemas.extraction import ExtractionSchema, ExtractionSpec, Usage
from app.schemas.job import CONCURRENCY, JobCounts, JobError, JobStatus
from app.schemas.job import Job as ShownJob
from app.schemas.run import Options
from app.services import prices
from app.services.allowances import ANSWER, NOTHING, Amount, LimitReached, Move, Spent, lost
from app.services.changes import CLAIM_ITEM, END_TWINS, LOG_TWINS, NOTE_USAGE, Rows
from app.services.compaction import BYTES
from app.services.documents import Document
from app.services.execution import Fresh, Job, Outcome
from app.services.extraction import again, cache_key
from app.services.extraction_log import JobProgress
from app.services.journal import Journal
from app.services.queue import LEFT
from app.services.run_log import RunEnded, entry
from app.services.worker import Worker

BEAT = 0.5  # seconds between two entries of progress, and looks at items that run elsewhere
CALM = 1.0  # seconds in which the limit is halved at most once
LOOK = 5.0  # seconds between looks for an allowance that was used up
LONGEST_PAUSE = 60.0  # seconds that a provider can stop new items for at a time
TOKENS = ("input_tokens", "output_tokens")

STATUS: dict[str, str] = {"completed": "succeeded"}
"""What the status of an item's run is called in a job, where that differs."""


async def count_items(connection: AsyncConnection, jobs: Sequence[str]) -> dict[str, JobCounts]:
    """How many items are in which status, for each job, from an index alone."""
    rows = await connection.execute(
        select(Run.batch_id, Run.status, func.count().label("items"))
        .where(Run.batch_id.in_(jobs))
        .group_by(Run.batch_id, Run.status)
    )
    found = {job: Counter[str]() for job in jobs}
    for row in rows:
        status = str(row.status)
        found[str(row.batch_id)][STATUS.get(status, status)] = row.items
    return {job: JobCounts(**{"total": counts.total(), **counts}) for job, counts in found.items()}


def status_of(status: str, counts: JobCounts) -> JobStatus:
    """The job's, of its driver's."""
    if status == "completed" and counts.failed + counts.cancelled:
        return "completed_with_errors"
    return cast(JobStatus, status)


def show(job: Run, driver: Run, counts: JobCounts, model: str) -> ShownJob:
    """The job as its newest driver leaves it. `model` is asked where the job names none."""
    spec = Options.model_validate_json(job.options).extraction or ExtractionSpec()
    usage = Usage.of(json.loads(driver.usage or "{}"))
    model = spec.model or model
    cost = prices.total(model, usage.prompt_tokens, usage.completion_tokens)
    return ShownJob(
        id=job.id,
        status=status_of(driver.status, counts),
        counts=counts,
        usage=usage,
        cost=None if spec.options.fallback_models else cost,
        schema_=ExtractionSchema(name=spec.name, version=spec.version, sha256=spec.sha256),
        model=model,
        error=JobError(**json.loads(driver.error)) if driver.error else None,
        created_at=job.created_at,
        finished_at=driver.finished_at,
    )


def _first(text: str, spec: ExtractionSpec | None) -> Amount:
    """What the first request of an item may take."""
    spec = spec or ExtractionSpec()
    size = min(len(text.encode()) // BYTES, spec.options.token_budget)
    return Amount.of(spec.model or "", size, ANSWER)


class Concurrency:
    """How many items may be asked at a time: a step more for as many successes as there are
    places, half as many when the provider says that it is too much (AIMD)."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._limit = float(most)
        self._halved = -math.inf
        self._closed_until = 0.0

    @property
    def limit(self) -> int:
        """0 for as long as the provider wants to be left alone."""
        return 0 if time.monotonic() < self._closed_until else int(self._limit)

    def succeeded(self) -> None:
        self._limit = min(self._most, self._limit + 1 / self._limit)

    def throttled(self, retry_after: float | None) -> None:
        """The provider answered 429, and named these seconds, if it did."""
        now = time.monotonic()
        if now >= self._halved + CALM:
            self._halved = now
            self._limit = max(1.0, self._limit / 2)
        pause = min(retry_after or 0.0, LONGEST_PAUSE)
        self._closed_until = max(self._closed_until, now + pause)


class JobExecutor:
    """Executes runs of kind `job`, each the driver of its items."""

    def __init__(self, engine: AsyncEngine, journal: Journal, worker: Worker) -> None:
        self.reads = reading(engine)
        self.journal = journal
        self.worker = worker
        self._drives: dict[str, _Drive] = {}

    async def __call__(self, job: Job) -> Outcome:
        drive = _Drive(self, job)
        self._drives[drive.job_id] = drive
        try:
            return await drive.run()
        except asyncio.CancelledError:
            return Outcome("cancelled")
        finally:
            self._drives.pop(drive.job_id, None)

    def throttled(self, job_id: str, retry_after: float | None) -> None:
        """An item of the job was answered 429."""
        if drive := self._drives.get(job_id):
            drive.limit.throttled(retry_after)


class _Drive:
    """One execution of a job. Its items are claimed under its own fence, by nobody else."""

    def __init__(self, executor: JobExecutor, job: Job) -> None:
        self.job_id = job.run.parent_id or job.run.id
        self._most = job.options.concurrency or CONCURRENCY
        self.limit = Concurrency(self._most)
        self._of = executor
        self._job = job
        self._ahead: deque[Run] = deque()
        self._after = 0  # the position up to which items were taken
        self._through = False  # there is nothing behind it
        self._running = 0
        self._spent: Counter[str] = Counter()
        self._twins = False
        self._moved = True
        self._told = -math.inf
        self._wake = asyncio.Event()

    async def run(self) -> Outcome:
        await self._begin()
        while True:
            await self._start()
            if self._moved and time.monotonic() >= self._told + BEAT:
                await self._tell()
            if self._through and not self._running and not self._ahead:
                if await self._look_again():
                    continue
                counts = await self._count()
                if not counts.queued and not counts.running:
                    return self._outcome(counts)
            await self._pause()

    async def _begin(self) -> None:
        """Reads what earlier drivers spent, and whether texts stand in the job twice."""
        items = Run.batch_id == self.job_id
        async with self._of.reads.connect() as connection:
            is_sqlite = connection.dialect.name == "sqlite"
            spent: Any = type_coerce(Run.usage, JSON) if is_sqlite else sql_cast(Run.usage, JSON)
            sums = select(*(func.sum(spent[name].as_integer()).label(name) for name in TOKENS))
            row = (await connection.execute(sums.where(items, Run.usage.is_not(None)))).one()
            self._spent.update({name: int(getattr(row, name) or 0) for name in TOKENS})
            twins = select(exists().where(items, Run.parent_id.is_not(None)))
            self._twins = bool(await connection.scalar(twins))

    async def _start(self) -> None:
        """Claims an item for each free place."""
        free = self.limit.limit - self._running
        if free <= 0:
            return
        if len(self._ahead) < free and not self._through:
            await self._read()
        items = [self._ahead.popleft() for _ in range(min(free, len(self._ahead)))]
        while items:
            try:
                await self._claim(items)
                return
            except LimitReached:  # fewer at a time; without any, the job waits, maybe for a day
                half = len(items) // 2
                self._ahead.extendleft(reversed(items[half:]))
                items = items[:half]
                self.limit.throttled(None if items or self._running else LOOK)

    async def _claim(self, items: Sequence[Run]) -> None:
        """Claims these items and begins them. Raises LimitReached: then it does neither."""
        worker, spec = self._of.worker, self._job.options.extraction
        claims: list[tuple[Any, dict[str, Any]]] = []
        begun: list[tuple[Run, Options, Amount, str | None]] = []
        spent: dict[tuple[str, str], Spent] = {}
        more, limits = NOTHING, worker.limits
        for item in items:
            item.program = self._job.run.program  # under which its usage is shown
            options = Options.model_validate_json(item.options)
            key = cache_key(spec, Document(options.text)) if spec else None
            hold, held = _first(options.text, spec), Amount(item.held_tokens, item.held_cost)
            if hold.exceeds(limits.day):
                hold = NOTHING  # there is never enough for this one, as it will be told
            for where, each in lost(item.program, held).items():  # by a dead process
                spent.setdefault(where, Spent()).add(each)
            more += hold - held
            claim = {
                "of_run": item.id,
                "old_token": item.token,
                "by": worker.name,
                "lease_seconds": worker.lease,
                "key": key,
                "hold_tokens": hold.tokens,
                "hold_cost": hold.cost,
            }
            claims.append((CLAIM_ITEM, claim))
            begun.append((item, options, hold, key))
        owner_id = self._job.run.owner_id
        move = Move(owner_id=owner_id, held=more, spent=spent, limits=limits)
        await self._of.journal.commit(claims, self._job.log, move)
        also = self._settle if self._twins else None
        for item, options, hold, key in begun:
            item.crashes += item.status == "running"
            item.status, item.worker, item.token = "running", worker.name, item.token + 1
            item.held_tokens, item.held_cost, item.cache_key = hold.tokens, hold.cost, key
            fresh = Fresh(options, [], "") if item.token == 1 else None
            self._running += 1
            task = worker.start(item, fresh, also, ready=True)
            task.add_done_callback(partial(self._ended, item.usage))

    async def _read(self) -> None:
        """Reads ahead. From the beginning, what a dead process or another one left is among it."""
        first = aliased(Run)
        free: ColumnElement[bool] = (Run.status == "queued") & Run.parent_id.is_(None)
        given: dict[str, Any] = {}
        if not self._after:
            undone = exists().where(first.id == Run.parent_id, first.status.in_(OPEN))
            free = or_(and_(Run.status == "queued", ~undone), LEFT)
            given["workers"] = await self._of.worker.gone()
        query = (
            select(Run)
            .where(Run.batch_id == self.job_id, free, Run.position > self._position)
            .order_by(Run.position)
            .limit(2 * self._most)
        )
        async with self._of.reads.connect() as connection:
            rows = list((await connection.execute(query, given)).mappings())
        self._ahead += [Run(**row) for row in rows]
        self._through = not rows
        if rows:
            self._after = int(rows[-1]["position"])

    @property
    def _position(self) -> int:
        return self._ahead[-1].position or 0 if self._ahead else self._after

    async def _look_again(self) -> bool:
        """Whether there is still something to take, from the beginning."""
        self._after, self._through = 0, False
        await self._read()
        return bool(self._ahead)

    def _ended(self, before: str | None, task: "asyncio.Task[Outcome | None]") -> None:
        self._running -= 1
        self._moved = True
        self._wake.set()
        outcome = None if task.cancelled() or task.exception() else task.result()
        if outcome:
            self._spent.update(outcome.usage)
            self._spent.subtract(json.loads(before or "{}"))  # of a retried item, counted already
            if outcome.status == "completed":
                self.limit.succeeded()

    def _settle(self, run: Run, outcome: Outcome) -> Rows:
        """The same end for the items with the same text, which cost nothing."""
        same, now = again(outcome, "coalesced"), datetime.now(UTC)
        ended = RunEnded(
            status=same.status,
            at=int(now.timestamp()),
            finish_reason=same.finish_reason,
            output=same.output,
            error=same.error,
        )
        which = {"of_run": run.id, "of_job": self.job_id}
        end = {
            "now": same.status,
            "output": None if same.output is None else dump_any(same.output),
            "error": None if same.error is None else dump_any(same.error),
            "usage": "{}",
            "finish_reason": same.finish_reason,
            "at": now,
        }
        body = entry(1, ended).body
        return [(LOG_TWINS, {**which, "body": body}), (END_TWINS, {**which, **end})]

    async def _count(self) -> JobCounts:
        async with self._of.reads.connect() as connection:
            return (await count_items(connection, [self.job_id]))[self.job_id]

    async def _tell(self) -> None:
        """Writes down how far the job is, and that it is no process's death."""
        self._moved, self._told = False, time.monotonic()
        counts = await self._count()
        self._of.journal.append(self._job.log, JobProgress(counts=counts.model_dump()))
        usage = {"of_run": self._job.run.id, "usage": to_json(self._spent).decode()}
        await self._of.journal.commit([(NOTE_USAGE, usage)], self._job.log)

    async def _pause(self) -> None:
        """Until an item has ended, or it is time to look around."""
        later = asyncio.get_running_loop().call_later(BEAT, self._wake.set)
        await self._wake.wait()
        later.cancel()
        self._wake.clear()

    def _outcome(self, counts: JobCounts) -> Outcome:
        output = {"status": status_of("completed", counts), "counts": counts.model_dump()}
        return Outcome("completed", "stop", output=output, usage=dict(self._spent))

"""Jobs: many texts under one schema, accepted as they arrive, and seen by their owner alone.

A job is a run of kind `job`, the driver of its items; an item is a run of kind `extraction` with
the job's id as its `batch_id`. A retried job has a further driver, whose parent is the job.
"""

import hashlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple, Protocol

from pydantic_core import to_json
from sqlalchemy import (
    ColumnElement,
    Select,
    and_,
    delete,
    func,
    insert,
    literal,
    select,
    tuple_,
    update,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app.config import Settings
from app.core import traces
from app.core.errors import Conflict, Invalid, NotFound
from app.core.security import Caller
from app.db.session import reading, writing
from app.models import Event, Run
from app.models.run import OPEN
from app.schemas.extraction import ExtractionSpec
from app.schemas.job import Job, JobItem, JobSettings
from app.schemas.run import Options
from app.services import webhooks
from app.services.allowances import LimitReached, Move, move
from app.services.branches import is_open
from app.services.changes import INSERT_RUN, NEXT_SEQ, OPEN_JOB
from app.services.deletion import STAGE, discard_job
from app.services.driver import STATUS, count_items, show
from app.services.extraction import program_of
from app.services.journal import Journal
from app.services.new_run import Idempotency, new_run, run_rows
from app.services.refusals import Stopping
from app.services.run_log import Entry, RunEnded, entry
from app.services.runs import Runs
from app.services.worker import Worker

STAGE_BYTES = 4 * 2**20
ACCEPTING, DISCARDED = "accepting", "discarded"
ENDED = ("completed", "failed", "cancelled")
NO_ITEM = {"failed": "failed", "cancelled": "was cancelled"}


class JobNotFound(NotFound):
    """No such job, or somebody else's: the two look the same."""

    code = "job_not_found"


class Place(NamedTuple):
    """Of an item that arrives: `items/1`, and what it is called, such as `line 2`."""

    param: str
    name: str


class InvalidItem(Invalid):
    """`field` is a place within the item."""

    code = "invalid_item"

    def __init__(self, place: Place, message: str, field: str = "") -> None:
        below = f"/{field}" if field else ""
        super().__init__(f"{place.name}{below}: {message}", param=f"{place.param}{below}")


class Upload(Protocol):
    """A job as it arrives. All but `items` is known once they are through."""

    def items(self) -> AsyncIterator[tuple[Place, JobItem]]:
        """Each with its place, for what is said of it. Raises Invalid."""
        ...

    @property
    def settings(self) -> JobSettings: ...

    @property
    def digest(self) -> bytes:
        """Equal for equal uploads."""
        ...


class Result(NamedTuple):
    """An item that has ended. `output`, `error` and `usage` are JSON, as its run keeps them."""

    id: str
    position: int
    custom_id: str
    status: str
    finish_reason: str | None
    output: str | None
    error: str | None
    usage: str | None

    @property
    def shown_status(self) -> str:
        """ "partial" where parts of the text have no answer."""
        if self.status == "completed" and self.finish_reason == "partial":
            return "partial"
        return STATUS.get(self.status, self.status)


SpecOf = Callable[[Caller, JobSettings], Awaitable[ExtractionSpec]]


class Jobs:
    """All jobs of all owners. `model` is asked where a job names none."""

    def __init__(
        self,
        settings: Settings,
        engine: AsyncEngine,
        journal: Journal,
        worker: Worker,
        runs: Runs,
        model: str,
    ) -> None:
        self._settings = settings
        self._journal = journal
        self._worker = worker
        self._runs = runs
        self._model = model
        self._reads = reading(engine)
        self._writes = writing(engine)

    async def accept(
        self, caller: Caller, upload: Upload, spec_of: SpecOf, key: str | None = None
    ) -> Job:
        """Commits the job once all of it is here and good; until then nobody sees it.

        The same idempotency key returns the same job. Raises Invalid for the items, what
        `spec_of` raises, IdempotencyConflict, LimitReached and Stopping.
        """
        if self._worker.closing:
            raise Stopping
        if key and await self._is_known(caller, key):
            async for _ in upload.items():
                pass
            return await self._repeated(caller, Idempotency.of("jobs", key, upload.digest))
        draft = _Draft(caller, self._journal, self._settings.max_job_items)
        try:
            async for place, item in upload.items():
                await draft.add(place, item)
            await draft.finish()
            settings = upload.settings
            if settings.webhook:
                webhooks.check_url(settings.webhook.url, self._settings)
            spec = await spec_of(caller, settings)
            idempotency = Idempotency.of("jobs", key, upload.digest) if key else None
            options = Options(
                extraction=spec,
                webhook=settings.webhook and settings.webhook.url,
                total=draft.total,
                concurrency=settings.options.concurrency,
                trace=traces.here(),
            )
            row = {
                "of_run": draft.job_id,
                "program": program_of(spec),
                "options": options.model_dump_json(exclude_defaults=True),
                "idempotency_key": idempotency and idempotency.key,
                "fingerprint": idempotency and idempotency.fingerprint,
            }
            try:
                await self._journal.commit([(OPEN_JOB, row)], move=self._begins(caller))
            except (IntegrityError, LimitReached):
                if idempotency is None or not await self._runs.repeated(caller, idempotency):
                    raise
                known = await self._repeated(caller, idempotency)
                await discard_job(self._writes, draft.job_id)
                return known
        except Exception:
            await discard_job(self._writes, draft.job_id)
            raise
        self._worker.nudge()
        return await self.get(caller, draft.job_id)

    def _begins(self, caller: Caller) -> Move:
        return Move(owner_id=caller.user_id, begins="queued", limits=self._worker.limits)

    async def _is_known(self, caller: Caller, key: str) -> bool:
        query = select(Run.id).where(
            Run.owner_id == caller.user_id,
            Run.idempotency_key == Idempotency.of("jobs", key, b"").key,
        )
        async with self._reads.connect() as connection:
            return await connection.scalar(query) is not None

    async def _repeated(self, caller: Caller, idempotency: Idempotency) -> Job:
        run = await self._runs.repeated(caller, idempotency)
        if run is None:
            raise JobNotFound("The job of this Idempotency-Key was deleted.")
        return await self.get(caller, run.id)

    async def get(self, caller: Caller, job_id: str) -> Job:
        """The caller's job as it is now. Raises JobNotFound."""
        async with self._reads.connect() as connection:
            job = await self._find(connection, caller, job_id)
            [shown] = await self._show(connection, [job])
        return shown

    async def list(
        self, caller: Caller, *, after: str | None = None, limit: int = 20
    ) -> Sequence[Job]:
        """The caller's jobs, the newest first, those behind `after`."""
        place = tuple_(Run.created_at, Run.id)
        query = select(Run).where(_usable(caller)).limit(limit)
        async with self._reads.connect() as connection:
            if after:
                last = await self._find(connection, caller, after)
                query = query.where(place < tuple_(last.created_at, last.id))
            query = query.order_by(Run.created_at.desc(), Run.id.desc())
            jobs = [Run(**row) for row in (await connection.execute(query)).mappings()]
            return await self._show(connection, jobs)

    async def _find(self, connection: AsyncConnection, caller: Caller, job_id: str) -> Run:
        row = None
        if job_id.isalnum():  # as all ids are; others may hold what no database takes
            query = select(Run).where(Run.id == job_id, _usable(caller))
            row = (await connection.execute(query)).mappings().one_or_none()
        if row is None:
            raise JobNotFound(f"No job {job_id[:64]!r}.")
        return Run(**row)

    async def _show(self, connection: AsyncConnection, jobs: Sequence[Run]) -> Sequence[Job]:
        ids = [job.id for job in jobs]
        counts = await count_items(connection, ids)
        again = select(Run).where(Run.parent_id.in_(ids), Run.kind == "job")
        rows = (await connection.execute(again.order_by(Run.created_at))).mappings()
        newest = {row["parent_id"]: Run(**row) for row in rows}
        return [show(job, newest.get(job.id, job), counts[job.id], self._model) for job in jobs]

    async def _driver(self, connection: AsyncConnection, job: Run) -> Run:
        """The newest."""
        query = (
            select(Run)
            .where(Run.parent_id == job.id, Run.kind == "job")
            .order_by(Run.created_at.desc())
            .limit(1)
        )
        row = (await connection.execute(query)).mappings().one_or_none()
        return Run(**row) if row else job

    async def follow(
        self, caller: Caller, job_id: str, after: int = 0
    ) -> AsyncIterator[Entry] | None:
        """The newest driver's log above `after`, or from its beginning where it is not that long;
        None where there is nothing more to come. Raises JobNotFound."""
        async with self._reads.connect() as connection:
            driver = await self._driver(connection, await self._find(connection, caller, job_id))
            last = select(func.max(Event.seq)).where(Event.run_id == driver.id)
            # When its events are gone, its end alone is told again.
            seq = await connection.scalar(last) or int(not is_open(driver))
        if after == seq and not is_open(driver):
            return None
        return self._runs.follow(driver, after if after <= seq else 0)

    async def spec(self, caller: Caller, job_id: str) -> ExtractionSpec:
        """What its items fulfil. Raises JobNotFound."""
        async with self._reads.connect() as connection:
            job = await self._find(connection, caller, job_id)
        spec = Options.model_validate_json(job.options).extraction
        assert spec
        return spec

    async def results(
        self, job_id: str, statuses: Sequence[str] = ENDED, finish_reason: str | None = None
    ) -> AsyncIterator[Sequence[Result]]:
        """The items that have ended so, in the order in which they came, a page at a time.

        No connection is held in between.
        """
        columns = (Run.id, Run.position, Run.message_id, Run.status, Run.finish_reason)
        so = Run.status.in_(statuses)
        if finish_reason:
            so &= Run.finish_reason == finish_reason
        after = 0
        while True:
            query = (
                select(*columns, Run.output, Run.error, Run.usage)
                .where(Run.batch_id == job_id, Run.position > after, so)
                .order_by(Run.position)
                .limit(STAGE)
            )
            async with self._reads.connect() as connection:
                page = [Result(*row) for row in await connection.execute(query)]
            if not page:
                return
            yield page
            after = page[-1].position

    async def cancel(self, caller: Caller, job_id: str) -> Job:
        """Ends the job. Its driver claims nothing more: its token does not hold any more."""
        now, items = datetime.now(UTC), Run.batch_id == job_id
        running = items & (Run.status == "running")
        # Whoever writes an item may wait for its driver, which is held here.
        free = select(Run.id).where(running).with_for_update(skip_locked=True, key_share=True)
        async with self._writes.begin() as connection:
            job = await self._find(connection, caller, job_id)
            driver = await self._driver(connection, job)
            ended = await connection.execute(
                update(Run)
                .where(Run.id == driver.id, Run.status.in_(OPEN))
                .values(
                    status="cancelled",
                    token=Run.token + 1,
                    finished_at=now,
                    worker=None,
                    lease_until=None,
                )
            )
            if ended.rowcount:
                last = RunEnded(status="cancelled", at=int(now.timestamp()))
                seq = await connection.scalar(
                    select(func.max(Event.seq)).where(Event.run_id == driver.id)
                )
                body = entry((seq or 0) + 1, last)
                await connection.execute(insert(Event).values(run_id=driver.id, **body.columns))
                queued = items & (Run.status == "queued")
                await connection.execute(
                    insert(Event).from_select(
                        ["run_id", "seq", "body"],
                        select(
                            Run.id,
                            NEXT_SEQ,
                            literal(body.body),
                        ).where(queued),
                    )
                )
                await connection.execute(
                    update(Run)
                    .where(queued)
                    .values(status="cancelled", token=Run.token + 1, finished_at=now)
                )
                if url := Options.model_validate_json(driver.options).webhook:
                    counts = (await count_items(connection, [job_id]))[job_id]
                    told = {"id": job_id, "status": "cancelled", "counts": counts.model_dump()}
                    event = "extraction_job.cancelled"
                    statement, row = webhooks.announcement(
                        driver.owner_id, driver.scopes, url, event, told
                    )
                    await connection.execute(statement, row)
            await connection.execute(
                update(Run).where(running, Run.id.in_(free)).values(cancelling=True)
            )
        async with self._writes.begin() as connection:  # and those that were just written
            stopped = list(
                await connection.scalars(
                    update(Run)
                    .where(Run.id.in_(_locked(running)))
                    .values(cancelling=True)
                    .returning(Run.id)
                )
            )
        self._worker.drop(driver.id)
        for item in stopped:
            self._worker.cancel(item)
        return await self.get(caller, job_id)

    async def retry(
        self,
        caller: Caller,
        job_id: str,
        only: Literal["failed", "cancelled"] = "failed",
        idempotency: Idempotency | None = None,
    ) -> Job:
        """Asks again for the items that ended so; with the same idempotency key, once. Raises
        Conflict while the job goes on, and where there are none."""
        which = (Run.batch_id == job_id) & (Run.status == only)
        async with self._writes.begin() as connection:
            await self._find(connection, caller, job_id)
            # Locked first: of two at once, the second sees the driver of the first, or that it
            # was deleted.
            await connection.execute(select(Run.id).where(Run.id == job_id).with_for_update())
            job = await self._find(connection, caller, job_id)
            if await self._runs.repeated(caller, idempotency):
                [shown] = await self._show(connection, [job])
                return shown
            driver = await self._driver(connection, job)
            if is_open(driver):
                raise Conflict("The job goes on; wait for its end.", code="job_running")
            # Before their events, as a sweep does.
            await connection.execute(_locked(which))
            await connection.execute(
                delete(Event).where(Event.run_id.in_(select(Run.id).where(which)))
            )
            again = await connection.execute(
                update(Run)
                .where(which)
                .values(
                    status="queued",
                    token=Run.token + 1,
                    crashes=0,
                    cancelling=False,
                    output=None,
                    error=None,
                    finish_reason=None,
                    finished_at=None,
                )
            )
            if not again.rowcount and driver.status != "failed":
                raise Conflict(f"No item of this job {NO_ITEM[only]}.", code="nothing_to_retry")
            run = _driver(
                caller,
                job,
                status="queued",
                program=job.program,
                options=job.options,
                usage=driver.usage,
                idempotency_key=idempotency and idempotency.key,
                fingerprint=idempotency and idempotency.fingerprint,
            )
            [(statement, row)] = run_rows(run, [])
            await connection.execute(statement, row)
            for refused in (await connection.run_sync(move, {0: self._begins(caller)})).values():
                raise refused
        self._worker.nudge()
        return await self.get(caller, job_id)

    async def delete(self, caller: Caller, job_id: str) -> None:
        """Stops and forgets the job with its items. Raises JobNotFound."""
        await self.cancel(caller, job_id)
        async with self._writes.begin() as connection:
            hidden = {"status": DISCARDED, "deleted_at": datetime.now(UTC)}
            await connection.execute(update(Run).where(Run.id == job_id).values(**hidden))
        await discard_job(self._writes, job_id)


def _locked(which: ColumnElement[bool]) -> Select[str]:
    """The ids of these runs, locked in the order in which the journal locks them."""
    return select(Run.id).where(which).order_by(Run.id).with_for_update(key_share=True)


def _usable(caller: Caller) -> ColumnElement[bool]:
    return and_(
        Run.owner_id == caller.user_id,
        Run.kind == "job",
        Run.parent_id.is_(None),
        Run.status != ACCEPTING,
        Run.deleted_at.is_(None),
    )


def _driver(caller: Caller, job: Run | None, **fields: Any) -> Run:
    run_id = uuid.uuid4().hex
    return new_run(
        caller, id=run_id, turn_id=run_id, parent_id=job and job.id, kind="job", token=0, **fields
    )


class _Draft:
    """A job that is being accepted: its items are stored as they come, and seen by nobody."""

    def __init__(self, caller: Caller, journal: Journal, most: int) -> None:
        self._journal = journal
        self._most = most
        job = _driver(caller, None, status=ACCEPTING, program="job", options="{}")
        self.job_id = job.id
        self.total = 0
        item = new_run(caller, kind="extraction", program="item", status="queued", token=0)
        item.batch_id = job.id
        [(_, self._template)] = run_rows(item, [])
        self._rows = run_rows(job, [])
        self._size = 0
        self._ids: set[bytes] = set()  # digests of the items' ids
        self._texts: dict[bytes, int] = {}  # digests of the texts -> where each stands first

    def _id(self, position: int) -> str:
        return f"{self.job_id[:24]}{position:08x}"

    async def add(self, place: Place, item: JobItem) -> None:
        self.total += 1
        if self.total > self._most:
            raise Invalid(f"A job has at most {self._most} items.", code="too_many_items")
        name = _digest(item.custom_id)
        if name in self._ids:
            raise InvalidItem(place, f"The custom_id {item.custom_id!r} stands here twice.")
        self._ids.add(name)
        first = self._texts.setdefault(_digest(item.text), self.total)
        run_id = self._id(self.total)
        row = {
            **self._template,
            "id": run_id,
            "turn_id": run_id,
            "parent_id": None if first == self.total else self._id(first),
            "position": self.total,
            "message_id": item.custom_id,
            "options": to_json({"text": item.text}).decode(),
        }
        self._rows.append((INSERT_RUN, row))
        self._size += len(item.text)
        if len(self._rows) >= STAGE or self._size >= STAGE_BYTES:
            await self._store()

    async def finish(self) -> None:
        if not self.total:
            raise Invalid("A job has at least one item.", param="items")
        await self._store()

    async def _store(self) -> None:
        rows, self._rows, self._size = self._rows, [], 0
        if rows:
            await self._journal.commit(rows)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()

"""Runs as operators see them: of all owners, beside whatever servers are running."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, and_, exists, func, or_, select, text, true, update
from sqlalchemy.ext.asyncio import AsyncEngine

from app.core.errors import Conflict, Invalid, NotFound, database_away
from app.db.base import epoch_now
from app.db.session import reading, writing
from app.models import Event, Run, ToolCall, User
from app.models.run import OPEN
from app.services.changes import CANCEL_RUN
from app.services.conversation import own_messages
from app.services.queue import behind
from app.services.run_log import parse
from app.services.steps import Step, steps_of

if TYPE_CHECKING:
    from prometheus_client import Metric

FRESH = 5.0  # seconds for which what the database said of open runs is said again
QUEUED = timedelta(minutes=1)  # after which a run should have begun
SILENT = timedelta(minutes=10)  # after which a run should have said something


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """Which runs to list; the newest are first."""

    status: Sequence[str] = ()
    owner: str | None = None  # an id or an e-mail address
    program: str | None = None
    stuck: bool = False
    unknown: bool = False
    items: bool = False  # those of jobs among them
    limit: int = 20


@dataclass(slots=True)
class Seen:
    """A run, and what is remarkable about it."""

    run: Run
    flags: list[str] = field(default_factory=list[str])

    @property
    def usage(self) -> dict[str, int]:
        return json.loads(self.run.usage or "{}")

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.run.error or "{}")

    @property
    def seconds(self) -> float:
        """From its acceptance to its end, or until now."""
        return ((self.run.finished_at or datetime.now(UTC)) - self.run.created_at).total_seconds()


class Operations:
    """What only operators may do. Nothing here asks whose a run is."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._reads = reading(engine)
        self._writes = writing(engine)
        self._open: dict[str, int] = {}
        self._oldest = 0.0
        self._until = 0.0

    async def find(self, wanted: Wanted) -> list[Seen]:
        """Raises NotFound for an owner that there is not."""
        where: list[ColumnElement[bool]] = []
        if wanted.status:
            where.append(Run.status.in_(wanted.status))
        if wanted.owner:
            where.append(Run.owner_id == await self._owner(wanted.owner))
        if wanted.program:
            where.append(Run.program == wanted.program)
        if wanted.stuck:
            where.append(_is_stuck())
        if wanted.unknown:
            where.append(_has_unknown())
        if not wanted.items:
            where.append(Run.batch_id.is_(None))
        return await self._seen(where, wanted.limit)

    async def _seen(self, where: Sequence[ColumnElement[bool]], limit: int) -> list[Seen]:
        over = (Run.status == "running") & (Run.lease_until < epoch_now())
        query = (
            select(
                Run,
                _has_unknown().label("has_unknown"),
                _is_silent().label("is_silent"),
                over.label("is_over"),
            )
            .where(*where)
            .order_by(Run.created_at.desc(), Run.id)
            .limit(limit)
        )
        found: list[Seen] = []
        async with self._reads.connect() as connection:
            for row in (await connection.execute(query)).mappings():
                columns = dict(row)
                says = {
                    "unknown outcome": columns.pop("has_unknown"),
                    "silent": columns.pop("is_silent"),
                    "lease over": columns.pop("is_over"),
                }
                run = Run(**columns)
                says |= {
                    f"{run.crashes} crashes": run.crashes,
                    "stopping": run.cancelling and run.status in OPEN,
                    "deleted": run.deleted_at,
                }
                found.append(Seen(run, [flag for flag, is_so in says.items() if is_so]))
        return found

    async def _owner(self, given: str) -> int:
        if given.isdecimal():
            return int(given)
        async with self._reads.connect() as connection:
            found = await connection.scalar(select(User.id).where(User.email == given.lower()))
        if found is None:
            raise NotFound(f"No user {given!r}.")
        return found

    async def get(self, given: str) -> Seen:
        """The one run whose id, as any protocol writes it, begins so. Raises NotFound, Invalid."""
        start = given.rpartition("_")[2].lower()
        if not start.isalnum():
            raise NotFound(f"No run {given!r}.")
        found = await self._seen([Run.id.startswith(start, autoescape=True)], 2)
        if not found:
            raise NotFound(f"No run {given!r}.")
        if len(found) > 1 and found[0].run.id != start:
            raise Invalid(f"Several runs begin with {given!r}; give more of it.")
        return found[0]

    async def steps(self, run: Run) -> list[Step]:
        """What became of it, in order."""
        async with self._reads.connect() as connection:
            messages = await own_messages(connection, run.id)
            calls = await connection.execute(select(ToolCall).where(ToolCall.run_id == run.id))
            known = [ToolCall(**row) for row in calls.mappings()]
            rows = await connection.execute(
                select(Event.seq, Event.body, Event.created_at)
                .where(Event.run_id == run.id)
                .order_by(Event.seq)
            )
            entries = [(row.created_at, parse(row.seq, row.body).event) for row in rows]
        return steps_of(run, messages, known, entries)

    async def cancel(self, given: str) -> Run:
        """Has the run stopped by whichever process executes it, or, where none does, by whoever
        looks first. Raises Conflict."""
        run = (await self.get(given)).run
        _check_open(run)
        async with self._writes.begin() as connection:
            await connection.execute(CANCEL_RUN, {"of_run": run.id})
        return run

    async def requeue(self, given: str, *, force: bool = False) -> Run:
        """Takes the run from its worker, which can write nothing more; any goes on with it.

        Raises Conflict for a run that has ended or waits for a person, for a job's item, and
        without `force` for a run whose worker is alive.
        """
        run = (await self.get(given)).run
        _check_open(run)
        if run.status == "waiting":
            raise Conflict(f"{run.id} waits for a decision or for its time; it can be cancelled.")
        if run.batch_id:
            raise Conflict(f"{run.id} is an item; requeue its job, {run.batch_id}.")
        free = true() if force else or_(Run.status == "queued", Run.lease_until < epoch_now())
        async with self._writes.begin() as connection:
            done = await connection.execute(
                update(Run)
                .where(Run.id == run.id, Run.token == run.token, Run.status == run.status, free)
                .values(
                    status="queued",
                    worker=None,
                    lease_until=None,
                    crashes=0,
                    token=Run.token + int(run.status == "running"),
                )
            )
        if not done.rowcount:
            raise Conflict(
                f"{run.id} is executed by {run.worker}, which renews its lease; --force takes it "
                "away, and a call that is under way counts as one of unknown outcome."
            )
        return run

    async def gauges(self) -> "list[Metric]":
        """What the database knows of open runs, for Prometheus."""
        from prometheus_client.core import GaugeMetricFamily

        up = GaugeMetricFamily("agent_database_up", "Whether the database answers.")
        try:
            await self._count()
        except Exception as error:
            if not database_away(error):
                raise
            up.add_metric((), 0)
            return [up]
        up.add_metric((), 1)
        runs = GaugeMetricFamily("agent_runs", "Runs that have not ended.", labels=("status",))
        for status in OPEN:
            runs.add_metric((status,), self._open.get(status, 0))
        oldest = GaugeMetricFamily(
            "agent_oldest_queued_seconds", "How long the run has waited that should begin first."
        )
        oldest.add_metric((), self._oldest)
        return [up, runs, oldest]

    async def _count(self) -> None:
        if time.monotonic() < self._until:
            return
        counts = (
            select(Run.status, func.count().label("runs"))
            .where(Run.status.in_(OPEN))
            .group_by(Run.status)
        )
        first = select(func.min(Run.created_at)).where(_could_begin())
        async with self._reads.connect() as connection:
            self._open = {row.status: row.runs for row in await connection.execute(counts)}
            since: datetime | None = await connection.scalar(first)
        self._oldest = (datetime.now(UTC) - since).total_seconds() if since else 0.0
        self._until = time.monotonic() + FRESH


def _check_open(run: Run) -> None:
    if run.status not in OPEN:
        raise Conflict(f"{run.id} has ended ({run.status}), and an end is never taken back.")


def _could_begin() -> ColumnElement[bool]:
    """Queued, and nothing is to be waited for but a worker."""
    return and_(
        Run.status == "queued",
        Run.batch_id.is_(None),
        or_(Run.lease_until.is_(None), Run.lease_until < epoch_now()),
        text(f"NOT EXISTS ({behind('runs.parent_id')})"),
    )


def _is_stuck() -> ColumnElement[bool]:
    late = and_(_could_begin(), Run.created_at < datetime.now(UTC) - QUEUED)
    lost = and_(Run.status == "running", Run.lease_until < epoch_now())
    return or_(late, lost, _is_silent())


def _is_silent() -> ColumnElement[bool]:
    newest = select(func.max(Event.created_at)).where(Event.run_id == Run.id)
    since = func.coalesce(newest.correlate(Run).scalar_subquery(), Run.created_at)
    return and_(Run.status == "running", since < datetime.now(UTC) - SILENT)


def _has_unknown() -> ColumnElement[bool]:
    return exists().where(ToolCall.run_id == Run.id, ToolCall.status == "unknown")

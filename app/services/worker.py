"""Claims runs with a lease and a fencing token, executes them, and ends them.

A worker that dies loses its lease; another continues from what was committed.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic_ai.messages import ModelMessage, ToolCallPart
from sqlalchemy import ColumnElement, and_, case, or_, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import aliased

from app.config import Settings
from app.core.json import dump_any
from app.db.base import epoch_now
from app.db.session import reading, writing
from app.models import Event, Run
from app.schemas.run import Options
from app.services.conversation import (
    Turn,
    digest_turns,
    dump_message,
    has_parts,
    lineage,
    own_messages,
)
from app.services.journal import (
    END_RUN,
    INSERT_MESSAGE,
    PAUSE_RUN,
    REQUEUE_RUN,
    Journal,
    LeaseLost,
    Rows,
    RunEnded,
    RunLog,
    RunPaused,
    RunRestarted,
    parse,
)

logger = logging.getLogger(__name__)

OPEN = ("queued", "running", "waiting")
Status = Literal["completed", "failed", "cancelled", "incomplete", "waiting"]

BEFORE = ("queued", "running")  # what a run behind it waits for

NOT_DECIDED = (
    "The conversation waits for a decision: approve or deny what was asked, or send "
    "X-Multitask-Strategy: interrupt to give it up."
)

HEARTBEAT = 1.0  # seconds between renewals of the leases and looks for work
CLAIMS = 20  # runs taken at a time


@dataclass(slots=True)
class Outcome:
    """How an execution ended, with the messages that are not stored yet.

    `text` is what a person sees of the answer; `output` the answer as a value.
    """

    status: Status
    finish_reason: str | None = None
    text: str = ""
    output: Any = None
    error: dict[str, Any] | None = None
    usage: dict[str, int] = field(default_factory=dict[str, int])
    messages: Sequence[ModelMessage] = ()
    rows: Rows = ()  # what else is to be committed with the end
    asks: Sequence[ToolCallPart] = ()  # the calls that a person has to decide on
    keys: Sequence[str] = ()  # what each of them is decided by
    wait: float | None = None  # seconds until it goes on by itself, where no person decides


@dataclass(slots=True)
class Job:
    """A claimed run, as an executor gets it. `messages` are the run's own, stored already."""

    run: Run
    options: Options
    log: RunLog
    messages: list[ModelMessage]
    transcript: str = ""  # digest of the visible turns before the prompt
    waits: bool = False  # what the run goes on from asks a person


@dataclass(frozen=True, slots=True)
class Fresh:
    """What is known of a run at its acceptance, and need not be read back."""

    options: Options
    messages: list[ModelMessage]
    transcript: str


Executor = Callable[[Job], Awaitable[Outcome]]
"""Executes a job to its end. A cancelled task must return what it has, as `cancelled`."""

Also = Callable[[Run, Outcome], Rows]
"""What else is committed with a run's end, seen from outside of its executor."""

Announce = Callable[[Job, Outcome], Rows]
"""Who is told of a run's end, whoever ended it: committed with it."""


def to_nobody(_job: Job, _outcome: Outcome) -> Rows:
    return ()


def is_gone(worker: str) -> bool:
    """Whether this was a process of this machine that runs no more."""
    host, pid, boot = worker.rsplit(":", 2)
    if host != socket.gethostname() or boot == BOOT:
        return False
    if int(pid) == os.getpid():
        return True
    if os.name != "posix":
        return False  # there is no harmless way to ask
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


BOOT = secrets.token_hex(4)


@dataclass(slots=True)
class _Running:
    """A run in this process. Only its executor is ever cancelled, never the storing of its end."""

    log: RunLog
    drives: bool = False  # other runs, which end by themselves once it begins no more of them
    also: Also | None = None
    task: asyncio.Task[Outcome | None] | None = None
    loaded: bool = False  # the log has all that was committed before
    executing: bool = False
    stopped: bool = False  # nobody wants it to go on
    cancelled: bool = False  # its owner stopped it

    def stop(self) -> None:
        if not self.stopped:
            self.stopped = True
            if self.executing and self.task:
                self.task.cancel()


class Worker:
    """Executes runs in tasks of their own, in this process."""

    def __init__(
        self,
        settings: Settings,
        engine: AsyncEngine,
        journal: Journal,
        executors: Mapping[str, Executor],
        announce: Announce = to_nobody,
    ) -> None:
        self.name = f"{socket.gethostname()}:{os.getpid()}:{BOOT}"
        self.lease = settings.lease_seconds
        self._poison = settings.poison_attempts
        self._patience = settings.shutdown_timeout.total_seconds()
        self._wait = settings.approval_timeout.total_seconds()
        self._journal = journal
        self._executors = executors
        self._announce = announce
        self._reads = reading(engine)
        self._writes = writing(engine)
        self._running: dict[str, _Running] = {}
        self._awaited: set[str] = set()  # runs that others here are queued behind
        self._nudged = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    def log(self, run_id: str) -> RunLog | None:
        """The live log of a run that this process executes."""
        running = self._running.get(run_id)
        return running.log if running and running.loaded else None

    def begin(self) -> None:
        self._loop = asyncio.create_task(self._work(), name="worker")

    async def close(self) -> None:
        """Lets runs end for as long as there is patience, then hands the rest over."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(), name="closing")
        await asyncio.shield(self._closing)

    @property
    def closing(self) -> bool:
        """Whether nothing more is begun here."""
        return self._closing is not None

    async def _close(self) -> None:
        if self._loop:
            self._loop.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loop
        for hand_over in (False, True):
            for running in self._running.values():
                if hand_over or running.drives:
                    running.stop()
            tasks = [running.task for running in self._running.values() if running.task]
            if tasks:
                await asyncio.wait(tasks, timeout=self._patience / 2)

    def start(
        self, run: Run, fresh: Fresh | None = None, also: Also | None = None
    ) -> asyncio.Task[Outcome | None]:
        """Executes a run that was claimed in this worker's name, or has just been accepted.

        The task returns how the run ended, or None where it goes on elsewhere.
        """
        running = _Running(
            RunLog(run.id, run.token), run.kind == "job", also, loaded=fresh is not None
        )
        self._running[run.id] = running
        execution = self._execute(run, running, fresh)
        running.task = task = asyncio.create_task(execution, name=f"run {run.id}")
        task.add_done_callback(lambda _: self._forget(run.id, running))
        return task

    def _forget(self, run_id: str, running: _Running) -> None:
        if self._running.get(run_id) is running:
            del self._running[run_id]
        running.log.close()
        if run_id in self._awaited:
            self._awaited.discard(run_id)
            self.nudge()

    def nudge(self, after: str | None = None) -> None:
        """There is work now, or there will be when the run `after` has ended."""
        if after in self._running:
            self._awaited.add(str(after))
        else:
            self._nudged.set()

    def cancel(self, run_id: str) -> None:
        """Stops the run if it is executed here; other workers see its flag at their heartbeat."""
        if running := self._running.get(run_id):
            running.cancelled = True
            running.stop()
        else:
            self.nudge()

    def drop(self, run_id: str) -> None:
        """Stops the run if it is executed here; its end was written already."""
        if running := self._running.get(run_id):
            running.log.lost = True
            running.stop()

    async def _work(self) -> None:
        while not self.closing:  # a driver may turn a cancellation into an error of its own
            try:
                await self._renew()
                await self._claim()
            except Exception:
                logger.exception("worker: the database did not answer")
                await asyncio.sleep(HEARTBEAT)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._nudged.wait(), min(HEARTBEAT, self.lease / 3))
            self._nudged.clear()

    async def _renew(self) -> None:
        """Prolongs the leases; stops what was cancelled elsewhere or taken over."""
        held = dict(self._running)  # one that begins while the database thinks is not lost
        if not held:
            return
        async with self._writes.begin() as connection:
            rows = await connection.execute(
                update(Run)
                .where(Run.id.in_(held), Run.worker == self.name)
                .values(lease_until=epoch_now() + self.lease)
                .returning(Run.id, Run.token, Run.cancelling)
            )
            kept = {row.id: row for row in rows}
        for run_id, running in held.items():
            row = kept.get(run_id)
            if row and row.token == running.log.token:
                if row.cancelling:
                    self.cancel(run_id)
            elif running.executing:
                running.log.lost = True
                running.stop()

    async def left(self) -> ColumnElement[bool]:
        """What dead workers left running."""
        async with self._reads.connect() as connection:
            workers = await connection.scalars(
                select(Run.worker).where(Run.status == "running").distinct()
            )
            gone = [name for name in workers if name and is_gone(name)]
        return and_(
            Run.status == "running", or_(Run.lease_until < epoch_now(), Run.worker.in_(gone))
        )

    async def _claim(self) -> None:
        """Takes what is queued and what a dead worker left. The token decides who gets it.

        A job's items are its driver's to take, but for what is to be stopped.
        """
        parent = aliased(Run)
        single = Run.batch_id.is_(None)
        left = await self.left()
        async with self._reads.connect() as connection:
            rows = await connection.execute(
                select(Run.id, Run.token)
                .outerjoin(parent, parent.id == Run.parent_id)
                .where(
                    or_(
                        and_(Run.status.in_(("queued", "waiting")), Run.cancelling),
                        and_(
                            single,
                            Run.status == "queued",
                            or_(Run.parent_id.is_(None), parent.status.not_in(BEFORE)),
                        ),
                        and_(left, or_(single, Run.cancelling)),
                        and_(Run.status == "waiting", Run.lease_until < epoch_now()),
                    ),
                    Run.id.not_in(self._running),
                )
                .order_by(Run.created_at)
                .limit(CLAIMS)
            )
            free = list(rows)
        if not free:
            return
        claimed: list[Run] = []
        async with self._writes.begin() as connection:
            for row in free:
                taken = await connection.execute(
                    update(Run)
                    .where(Run.id == row.id, Run.token == row.token, Run.status.in_(OPEN))
                    .values(
                        status="running",
                        worker=self.name,
                        token=Run.token + 1,
                        lease_until=epoch_now() + self.lease,
                        crashes=case((Run.status == "running", Run.crashes + 1), else_=Run.crashes),
                    )
                    .returning(*Run.__table__.c)
                )
                claimed += [Run(**found) for found in taken.mappings()]
        for run in claimed:
            self.start(run)

    async def _execute(self, run: Run, running: _Running, fresh: Fresh | None) -> Outcome | None:
        """One run from its claim to its end, whatever happens in between."""
        try:
            if fresh:
                job = Job(run, fresh.options, running.log, fresh.messages, fresh.transcript)
            else:
                job = await self._job(run, running)
            outcome = await self._outcome(job, running)
            if running.log.lost:
                return None
            if running.stopped and not running.cancelled and outcome.status == "cancelled":
                # Nothing of a half-finished step is kept, so that it is done again as a whole.
                await self._journal.commit([(REQUEUE_RUN, {"of_run": run.id})], running.log)
                return None
            rows = [*outcome.rows, *(running.also(run, outcome) if running.also else ())]
            await self._end(job, outcome, rows)
            return outcome
        except LeaseLost:
            logger.warning("run %s: taken over by another worker", run.id)
        except Exception:
            # Not written, so not ended: when the lease is over, it is taken up again.
            logger.exception("run %s: its outcome could not be stored", run.id)
        return None

    async def _job(self, run: Run, running: _Running) -> Job:
        run_log = running.log
        async with self._reads.connect() as connection:
            messages = await own_messages(connection, run.id)
            options = Options.model_validate_json(run.options)
            before = options.earlier
            waits = False
            if run.parent_id:
                query = select(Run.transcript).where(Run.id == run.parent_id)
                before = await connection.scalar(query) or run.parent_id
                above = await connection.execute(lineage(run.parent_id))
                waits = any(row.status == "waiting" for row in above)
            if run.token > 1:
                rows = await connection.execute(
                    select(Event.seq, Event.body).where(Event.run_id == run.id).order_by(Event.seq)
                )
                run_log.entries += [parse(row.seq, row.body) for row in rows]
        running.loaded = True
        if run_log.entries and not isinstance(run_log.entries[-1].event, RunPaused):
            replies = sum(has_parts(message) for message in messages)
            self._journal.append(run_log, RunRestarted(replies=replies))
        return Job(run, options, run_log, messages, before, waits)

    async def _outcome(self, job: Job, running: _Running) -> Outcome:
        run = job.run
        if running.stopped or run.cancelling:
            return Outcome("cancelled")
        if run.crashes >= self._poison:
            message = f"Gave up: {run.crashes} processes died at this run."
            return Outcome("failed", error={"code": "poisoned", "message": message})
        if job.waits:  # its client is told at once, as those are who come later
            error = {"code": "not_decided", "message": NOT_DECIDED}
            return Outcome("failed", error=error)
        running.executing = True
        try:
            return await self._executors[run.kind](job)
        except asyncio.CancelledError:
            return Outcome("cancelled")  # before there was anything to keep
        except (LeaseLost, DBAPIError, ConnectionError):
            raise  # not an outcome: whoever has the lease next goes on
        except Exception:
            logger.exception("run %s: a bug in %s", run.id, run.program)
            message = f"Something broke in {run.program!r}."
            return Outcome("failed", error={"code": "internal", "message": message})
        finally:
            running.executing = False

    def _messages(self, job: Job, outcome: Outcome) -> list[tuple[Any, dict[str, Any]]]:
        return [
            (INSERT_MESSAGE, {"run_id": job.run.id, "seq": seq, "body": dump_message(message)})
            for seq, message in enumerate(outcome.messages, len(job.messages))
        ]

    async def _end(self, job: Job, outcome: Outcome, more: Rows) -> None:
        rows = [*self._messages(job, outcome), *more]
        if outcome.status == "waiting":
            wait = self._wait if outcome.wait is None else outcome.wait
            until = int(time.time() + wait)
            paused = RunPaused(calls=list(outcome.asks), keys=list(outcome.keys), until=until)
            self._journal.append(job.log, paused)
            pause = {"of_run": job.run.id, "wait_seconds": wait}
            await self._journal.commit([*rows, (PAUSE_RUN, pause)], job.log)
            return
        now = datetime.now(UTC)
        self._journal.append(
            job.log,
            RunEnded(
                status=outcome.status,
                at=int(now.timestamp()),
                finish_reason=outcome.finish_reason,
                output=outcome.output if outcome.output is not None else outcome.text,
                error=outcome.error,
                usage=outcome.usage,
            ),
        )
        turns: list[Turn] = [
            (job.options.role, job.options.text),
            ("assistant", outcome.text),
        ]
        ended = {
            "of_run": job.run.id,
            "now": outcome.status,
            "output": outcome.output if outcome.output is not None else outcome.text,
            "error": outcome.error,
            "usage": outcome.usage,
            "finish_reason": outcome.finish_reason,
            "transcript": digest_turns(job.transcript, turns),
            "at": now,
        }
        for name in ("output", "error", "usage"):
            ended[name] = None if ended[name] is None else dump_any(ended[name])
        rows += self._announce(job, outcome)
        await self._journal.commit([*rows, (END_RUN, ended)], job.log)

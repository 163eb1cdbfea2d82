"""Claims runs with a lease and a fencing token, executes them, and ends them.

A worker that dies loses its lease; another continues from what was committed.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from pydantic_ai.messages import (
    FunctionToolResultEvent,
    ModelRequest,
)
from sqlalchemy import select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from app.config import Settings
from app.core.errors import database_away
from app.core.json import dump_any
from app.db.base import epoch_now
from app.db.session import reading, writing
from app.models import Event, Run
from app.schemas.run import Options
from app.services import queue
from app.services.allowances import Limits
from app.services.changes import END_RUN, INSERT_MESSAGE, PAUSE_RUN, REQUEUE_RUN, Rows
from app.services.conversation import (
    Turn,
    digest_turns,
    dump_message,
    has_parts,
    own_messages,
    waiting,
)
from app.services.execution import Also, Announce, Executor, Fresh, Job, Outcome, to_nobody
from app.services.journal import Journal, LeaseLost
from app.services.ledger import conclude
from app.services.process import is_gone, process_name
from app.services.purse import Purse
from app.services.refusals import NOT_DECIDED
from app.services.run_log import RunEnded, RunLog, RunPaused, RunRestarted, parse
from app.services.signals import Signals, Verb
from app.services.watch import watched

logger = logging.getLogger(__name__)

TIMED = ("agent", "extraction", "evaluation")  # others go on for as long as there is work
HEARTBEAT = 1.0  # seconds between renewals of the leases and looks for work
CLAIMS = 20  # runs taken at a time of those that others left
FOLLOWED = 3.0  # seconds for which a process that follows a run elsewhere is told of it
BUSY = 0.05  # seconds until the next try while another process takes from the queue


@dataclass(slots=True)
class _Running:
    """A run in this process. Only its executor is ever cancelled, never the storing of its end."""

    log: RunLog
    purse: Purse
    drives: bool = False  # other runs, which end by themselves once it begins no more of them
    claimed: bool = False  # it was taken from the queue, or from a dead worker
    also: Also | None = None
    task: asyncio.Task[Outcome | None] | None = None
    loaded: bool = False  # the log has all that was committed before
    executing: bool = False
    stopped: bool = False  # nobody wants it to go on
    cancelled: bool = False  # its owner stopped it
    late: bool = False  # its time is over

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
        self.name = process_name()
        self.lease = settings.lease_seconds
        self.signals = Signals(engine)
        self.limits = Limits.of(settings)
        self._most = settings.worker_runs
        self._owner_runs = settings.owner_runs
        self._longest = settings.run_seconds.total_seconds()
        self._poison = settings.poison_attempts
        self._patience = settings.shutdown_timeout.total_seconds()
        self._wait = settings.approval_timeout.total_seconds()
        self._journal = journal
        self._executors = executors
        self._announce = announce
        self._reads = reading(engine)
        self._writes = writing(engine)
        self._running: dict[str, _Running] = {}
        self._awaited: set[str] = set()  # runs that others are queued behind
        self._followed: dict[str, float] = {}  # runs that others read, and until when they said so
        self._turn = 0  # the owner after whom the queue is looked at next
        self._is_full = False  # others are to take what is queued
        self._is_queued = False  # there was something, be it blocked, when it was last looked at
        self._nudged = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._is_over = False

    def log(self, run_id: str) -> RunLog | None:
        """The live log of a run that this process executes."""
        running = self._running.get(run_id)
        return running.log if running and running.loaded else None

    def begin(self) -> None:
        self._loop = asyncio.create_task(self._work(), name="worker")
        self.signals.start(self._hear)

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
        """Takes at most seven eighths of the patience."""
        self.signals.move()  # who follows what goes on elsewhere is sent there
        self.signals.tell("queued")
        for hand_over, share in ((False, 1 / 2), (True, 1 / 8)):
            for running in self._running.values():
                if hand_over or running.drives:
                    running.stop()
            tasks = [running.task for running in self._running.values() if running.task]
            if tasks:
                await asyncio.wait(tasks, timeout=self._patience * share)
        if self._running:
            await asyncio.wait(
                [asyncio.create_task(self._abandon(running)) for running in self._running.values()],
                timeout=self._patience / 8,
            )
        self._is_over = True
        if self._loop:
            self._loop.cancel()
            await asyncio.wait([self._loop], timeout=self._patience / 16)
        self.signals.tell("queued")
        await self.signals.close()

    async def _abandon(self, running: _Running) -> None:
        """Hands over a run whose tool heeds no cancellation: what it still does counts no more."""
        run_id = running.log.run_id
        logger.warning("run %s: does not let itself be stopped, and is handed over", run_id)
        try:
            await running.purse.settle([(REQUEUE_RUN, {"of_run": run_id})])
        except Exception as error:
            logger.warning("run %s: could not be handed over: %s", run_id, type(error).__name__)
        running.log.close()

    def start(
        self,
        run: Run,
        fresh: Fresh | None = None,
        also: Also | None = None,
        *,
        ready: bool = False,
    ) -> asyncio.Task[Outcome | None]:
        """Executes a run that was claimed in this worker's name, or has just been accepted.

        ready: what the run holds of its owner's allowance is for this execution, as it always is
        of a fresh one; else it was a dead process's.
        The task returns how the run ended, or None where it goes on elsewhere.
        """
        log = RunLog(run.id, run.token)
        purse = Purse(run, log, self._journal, self.limits, ready=ready or fresh is not None)
        running = _Running(log, purse, run.kind == "job", also=also, loaded=fresh is not None)
        if run.id in self._followed:
            log.moved = self._moved
        if before := self._running.get(run.id):  # lost meanwhile, and taken again
            before.log.lost = True
            before.stop()
        self._running[run.id] = running
        execution = watched(run, self._execute(run, running, fresh))
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
        elif running.claimed and self._is_queued:
            self._nudged.set()

    def nudge(self, after: str | None = None) -> None:
        """There is work now, or there will be when the run `after` has ended."""
        if after in self._running:
            self._awaited.add(str(after))
            return
        self._nudged.set()
        if after:
            self.signals.tell("awaited", after)
        elif self._is_full or self.closing:
            self.signals.tell("queued")

    def cancel(self, run_id: str) -> None:
        """Stops the run if it is executed here; another worker is told to see its flag."""
        if running := self._running.get(run_id):
            running.cancelled = True
            running.stop()
        else:
            self.signals.tell("cancel", run_id)
            self.nudge()

    def drop(self, run_id: str) -> None:
        """Stops the run wherever it is executed; its end was written already."""
        if running := self._running.get(run_id):
            running.log.lost = True
            running.stop()
        else:
            self.signals.tell("cancel", run_id)

    def _hear(self, verb: Verb, run_id: str) -> None:
        if verb == "queued" or (verb == "cancel" and run_id in self._running):
            self._nudged.set()
        elif verb == "awaited" and run_id in self._running:
            self._awaited.add(run_id)
        elif verb == "follow":
            self._followed[run_id] = time.monotonic() + FOLLOWED
            running = self._running.get(run_id)
            if running and running.log.moved is None:
                running.log.moved = self._moved
                self._moved(run_id)

    def _moved(self, run_id: str) -> None:
        """Tells those elsewhere who follow the run, unless they have not said so for a while."""
        if self._followed.get(run_id, 0) > time.monotonic():
            self.signals.tell("moved", run_id)
        elif running := self._running.get(run_id):
            running.log.moved = None

    async def _work(self) -> None:
        while not self._is_over:  # a driver may turn a cancellation into an error of its own
            try:
                await self._renew()
                if not self.closing:
                    await self._claim()
            except Exception:
                logger.exception("worker: the database did not answer")
                await asyncio.sleep(HEARTBEAT)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._nudged.wait(), min(HEARTBEAT, self.lease / 3))
            self._nudged.clear()

    async def _renew(self) -> None:
        """Prolongs the leases; stops what was cancelled elsewhere or taken over."""
        now = time.monotonic()
        self._followed = {key: until for key, until in self._followed.items() if until > now}
        held = dict(self._running)  # one that begins while the database thinks is not lost
        if not held:
            return
        # Locked in the order in which the journal locks them.
        mine = (
            select(Run.id)
            .where(Run.id.in_(held), Run.worker == self.name)
            .order_by(Run.id)
            .with_for_update(key_share=True)
        )
        async with self._writes.begin() as connection:
            rows = await connection.execute(
                update(Run)
                .where(Run.id.in_(mine), Run.worker == self.name)
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

    async def gone(self) -> list[str]:
        """The dead workers that left something running."""
        async with self._reads.connect() as connection:
            workers = await connection.scalars(
                select(Run.worker).where(Run.status == "running").distinct()
            )
            return [name for name in workers if name and is_gone(name)]

    async def _claim(self) -> None:
        """Takes what dead workers left, and of what is queued as much as there is room for.

        What this worker holds has just been renewed, and is nothing of that.
        """
        gone = await self.gone()
        async with self._reads.connect() as connection:
            is_left, self._is_queued = await queue.look(connection, gone)
        if is_left:
            async with self._writes.begin() as connection:
                claimed = await queue.take_left(connection, gone, CLAIMS, self.name, self.lease)
            self._start(claimed)
            if len(claimed) == CLAIMS:
                self._nudged.set()
        free = self._most - sum(running.claimed for running in self._running.values())
        self._is_full = free <= 0
        if not self._is_queued or self._is_full or self.closing:
            return
        async with self._writes.begin() as connection:
            taken = await queue.take_queued(
                connection, self._turn, free, self._owner_runs, self.name, self.lease
            )
        if taken is None:
            asyncio.get_running_loop().call_later(BUSY, self._nudged.set)
            return
        runs, self._turn = taken
        self._is_full = len(runs) == free
        self._start(runs)

    def _start(self, claimed: Sequence[Run]) -> None:
        for run in claimed:
            self.start(run)
            self._running[run.id].claimed = True
            if self.closing:  # since the worker looked: it goes back, so that another takes it
                self._running[run.id].stop()

    async def _execute(self, run: Run, running: _Running, fresh: Fresh | None) -> Outcome | None:
        """One run from its claim to its end, whatever happens in between."""
        try:
            if fresh:
                job = Job(
                    run,
                    fresh.options,
                    running.log,
                    running.purse,
                    fresh.messages,
                    fresh.transcript,
                )
            else:
                job = await self._job(run, running)
            late = None
            if run.kind in TIMED:
                loop = asyncio.get_running_loop()
                late = loop.call_later(self._longest, self._expire, running)
            try:
                outcome = await self._outcome(job, running)
            finally:
                if late:
                    late.cancel()
            if running.log.lost:
                return None
            if running.late and outcome.status == "cancelled":
                outcome = self._too_long(job, outcome)
            if running.stopped and not running.cancelled and outcome.status == "cancelled":
                # Nothing of a half-finished step is kept, so that it is done again as a whole.
                await running.purse.settle([(REQUEUE_RUN, {"of_run": run.id})])
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
                waits = bool(await waiting(connection, run.parent_id))
            if run.token > 1:
                rows = await connection.execute(
                    select(Event.seq, Event.body).where(Event.run_id == run.id).order_by(Event.seq)
                )
                run_log.entries += [parse(row.seq, row.body) for row in rows]
        running.loaded = True
        self.signals.move(run.id)
        if run_log.entries and not isinstance(run_log.entries[-1].event, RunPaused):
            replies = sum(has_parts(message) for message in messages)
            self._journal.append(run_log, RunRestarted(replies=replies))
        return Job(run, options, run_log, running.purse, messages, before, waits)

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
        except (LeaseLost, ConnectionError):
            raise  # not an outcome: whoever has the lease next goes on
        except Exception as error:
            if isinstance(error, DBAPIError) and database_away(error):
                raise  # neither
            logger.exception("run %s: a bug in %s", run.id, run.program)
            message = f"Something broke in {run.program!r}."
            error = {"code": "internal", "message": message}
            return Outcome("failed", error=error, usage=job.usage)
        finally:
            running.executing = False

    def _expire(self, running: _Running) -> None:
        running.late = not running.stopped
        running.stop()

    def _too_long(self, job: Job, outcome: Outcome) -> Outcome:
        """The end of a run whose time was over: of an agent's, what it has said is kept."""
        if job.run.kind == "agent":
            return replace(outcome, status="incomplete", finish_reason="max_time")
        message = f"There was no answer within {self._longest:g} seconds, all that a run is given."
        error = {"code": "deadline", "message": message}
        return replace(outcome, status="failed", error=error)

    def _messages(self, job: Job, outcome: Outcome) -> list[tuple[Any, dict[str, Any]]]:
        return [
            (INSERT_MESSAGE, {"run_id": job.run.id, "seq": seq, "body": dump_message(message)})
            for seq, message in enumerate(outcome.messages, len(job.messages))
        ]

    async def _conclude(self, job: Job, outcome: Outcome) -> Rows:
        """Leaves no call without a result, so that the conversation can go on."""
        theirs = job.options.tools if outcome.finish_reason == "tool_call" else ()
        parts, rows = await conclude(
            self._reads,
            job.run,
            [*job.messages, *outcome.messages],
            {tool.name for tool in theirs},
        )
        if parts:
            outcome.messages = [*outcome.messages, ModelRequest(parts)]
        told = {
            entry.event.tool_call_id
            for entry in job.log.entries
            if isinstance(entry.event, FunctionToolResultEvent)
        }
        for part in parts:
            if part.outcome in ("success", "failed") and part.tool_call_id not in told:
                self._journal.append(job.log, FunctionToolResultEvent(part))
        return rows

    async def _end(self, job: Job, outcome: Outcome, more: Rows) -> None:
        if outcome.status != "waiting" and job.run.kind == "agent":
            more = [*more, *await self._conclude(job, outcome)]
        rows = [*self._messages(job, outcome), *more]
        if outcome.status == "waiting":
            wait = self._wait if outcome.wait is None else outcome.wait
            until = int(time.time() + wait)
            paused = RunPaused(calls=list(outcome.asks), keys=list(outcome.keys), until=until)
            pause = {"of_run": job.run.id, "wait_seconds": wait}
            await job.purse.settle([*rows, (PAUSE_RUN, pause)], paused)
            return
        now = datetime.now(UTC)
        last = RunEnded(
            status=outcome.status,
            at=int(now.timestamp()),
            finish_reason=outcome.finish_reason,
            output=outcome.output if outcome.output is not None else outcome.text,
            error=outcome.error,
            usage=outcome.usage,
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
        await job.purse.settle([*rows, (END_RUN, ended)], last)

"""The only entrance to runs: accept, wait, follow, cancel, delete.

Ownership, limits and idempotency live here, so that no protocol can forget them.
"""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

from pydantic_ai.messages import (
    FunctionToolCallEvent,
    ModelMessage,
    ModelRequest,
    ModelResponse,
    ToolReturnPart,
    UserPromptPart,
)
from sqlalchemy import and_, exists, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from agents import all_agents
from app.core import traces
from app.core.errors import (
    AppError,
    DeletedMeanwhile,
    Invalid,
    database_away,
    is_orphan,
)
from app.core.json import dump_any
from app.core.logs import answered_by
from app.core.security import Caller
from app.db.session import writing
from app.models import Event, Run
from app.models.run import OPEN
from app.schemas.run import Options
from app.services.admission import give_up_place
from app.services.allowances import ANSWER, Amount, Move, answer_of
from app.services.attachments import Attachments
from app.services.branches import Branches, Place
from app.services.changes import (
    CANCEL_RUN,
    INSERT_CONVERSATION,
    INSERT_EVENT,
)
from app.services.compaction import estimate
from app.services.conversation import (
    as_messages,
    digest_turns,
    own_messages,
    text_of,
)
from app.services.decisions import Decision, decide
from app.services.deletion import forget
from app.services.execution import Fresh
from app.services.journal import Journal
from app.services.ledger import as_told, audit
from app.services.new_run import Idempotency, NewRun, check_ids, check_names, new_run, run_rows
from app.services.refusals import (
    ConversationBusy,
    EventsGone,
    IdempotencyConflict,
    RunDeleted,
    RunNotFound,
    Stopping,
    deleted,
    unknown_agent,
)
from app.services.replay import questions, replay
from app.services.run_log import Entry, RunEnded, RunPaused, entry, parse
from app.services.signals import Following
from app.services.worker import Worker

T = TypeVar("T")

AGAIN = 0.25  # seconds between attempts to read on while the database is away
CONTENDERS = 100  # how many others may take a message's place in its conversation before it


class Runs(Branches):
    """All runs of all owners, each seen by its owner alone."""

    def __init__(
        self,
        engine: AsyncEngine,
        journal: Journal,
        worker: Worker,
        attachments: Attachments,
        model: str = "",
    ) -> None:
        self._model = model  # by whose price it is estimated what a request takes
        self._attachments = attachments
        self._journal = journal
        self._worker = worker
        super().__init__(engine)
        self._writes = writing(engine)

    async def accept(self, caller: Caller, new: NewRun) -> Run:
        """Commits the run and its prompt; what is returned will be executed, come what may.

        The same idempotency key returns the same run. Raises UnknownAgent, RunNotFound (the
        parent), IdempotencyConflict, ConversationBusy, NotDecided, Invalid for attachments,
        LimitReached, DeletedMeanwhile, and Stopping.
        """
        if known := await self.repeated(caller, new.idempotency):
            return known
        try:
            return await self._accept(caller, new)
        except (AppError, IntegrityError):
            # Somebody else may have been first with this key, and be what it was refused for.
            if known := await self.repeated(caller, new.idempotency):
                return known
            raise

    async def _accept(self, caller: Caller, new: NewRun) -> Run:
        if self._worker.closing:
            raise Stopping
        if new.kind == "agent":
            if new.program not in all_agents():
                raise unknown_agent(new.program)
            check_names(new)
        check_ids(new)
        new.prompt = await self._attachments.load(caller, new.prompt, new.param)
        others = 0
        while True:
            place = await self.place(caller, new)
            if place.same and new.multitask == "enqueue":
                return _again(place.same, new)
            if place.parent and new.multitask == "enqueue":
                await self.check_not_waiting(place)
            if place.open and new.multitask == "reject":
                raise ConversationBusy(
                    "The conversation is busy with an earlier message; wait, stop it, or send "
                    "X-Multitask-Strategy: enqueue or interrupt."
                )
            run, rows, fresh = await self._prepare(caller, new, place)
            given_up = place.open if new.multitask == "interrupt" else []
            rows += [(CANCEL_RUN, {"of_run": other.id}) for other in given_up]
            try:
                await self._journal.commit(rows, move=self._move(run))
                break
            except IntegrityError as error:
                # Somebody else was first with this key, this chat id or this place in the chat; or
                # what it was to stand below is gone.
                if await self.repeated(caller, new.idempotency):
                    raise
                others += 1
                chat = new.chat if place.conversation_id and is_orphan(error) else None
                if chat and await self.conversation(caller, chat) is None:
                    raise DeletedMeanwhile from error  # it does not come back by itself
                contended = run.conversation_id and not is_orphan(error)
                if not (contended or place.parent) or others > CONTENDERS:
                    raise
        answered_by(run.id)
        for other in given_up:
            self._worker.cancel(other.id)
        if run.status == "running":
            self._worker.start(run, fresh)
        else:
            self._worker.nudge(after=run.parent_id)
        return run

    async def repeated(self, caller: Caller, idempotency: Idempotency | None) -> Run | None:
        """The run that this request has made before. Raises IdempotencyConflict where another
        request had the key, and RunDeleted."""
        if idempotency is None:
            return None
        run = await self.one(
            select(Run).where(
                Run.owner_id == caller.user_id, Run.idempotency_key == idempotency.key
            )
        )
        if run and run.fingerprint != idempotency.fingerprint:
            raise IdempotencyConflict("This Idempotency-Key was used with another request.")
        if run and run.deleted_at:
            raise RunDeleted("What this Idempotency-Key began was deleted; send another key.")
        return run

    async def _prepare(
        self, caller: Caller, new: NewRun, place: Place
    ) -> tuple[Run, list[tuple[Any, dict[str, Any]]], Fresh]:
        parent, conversation_id = place.parent, place.conversation_id
        prompt = await self._prompt(new, parent)
        earlier = () if parent else new.earlier
        rows: list[tuple[Any, dict[str, Any]]] = []
        if conversation_id is None and place.position:
            conversation_id = uuid.uuid4().hex
            conversation = {
                "id": conversation_id,
                "owner_id": caller.user_id,
                "external_id": new.chat,
            }
            rows.append((INSERT_CONVERSATION, conversation))
        text = "\n".join(new.results.values()) if new.results else text_of(new.prompt)
        options = new.options.model_copy(
            update={
                "role": "tool" if new.results else "user",
                "text": text,
                "earlier": digest_turns("", earlier),
                "trace": traces.here(),
            }
        )
        queued = new.queue or place.behind is not None
        run = new_run(
            caller,
            id=(run_id := uuid.uuid4().hex),
            conversation_id=conversation_id,
            position=place.position,
            parent_id=parent and parent.id,
            turn_id=parent.turn_id if parent and new.results else run_id,
            message_id=new.message_id,
            kind=new.kind,
            program=new.program,
            status="queued" if queued else "running",
            options=options.model_dump_json(exclude_defaults=True),
            worker=None if queued else self._worker.name,
            token=0 if queued else 1,
            cache_key=new.cache_key,
            idempotency_key=new.idempotency and new.idempotency.key,
            fingerprint=new.idempotency and new.idempotency.fingerprint,
        )
        messages = [*as_messages(earlier), prompt]
        if not queued:
            hold = self._first(new, messages, parent)
            run.held_tokens, run.held_cost = hold.tokens, hold.cost
        rows += run_rows(run, messages, lease_seconds=None if queued else self._worker.lease)
        before = (parent.transcript or parent.id) if parent else options.earlier
        return run, rows, Fresh(options, messages, before)

    def _first(self, new: NewRun, messages: Sequence[ModelMessage], parent: Run | None) -> Amount:
        """What the first model request may take."""
        size, answer, model = sum(map(estimate, messages)), ANSWER, self._model
        if spec := new.options.extraction:
            size, model = min(size, spec.options.token_budget), spec.model or model
        elif new.kind == "agent":
            answer = answer_of(new.options.settings, all_agents()[new.program].settings)
        if parent and parent.usage:  # about as long as what the last request was about
            used = json.loads(parent.usage)
            size += used.get("input_tokens", 0) // max(used.get("requests", 0), 1)
            size += used.get("output_tokens", 0)
        return Amount.of(model, size, answer)

    def _move(self, run: Run) -> Move:
        """What the acceptance of the run does to its owner's allowance."""
        return Move(
            owner_id=run.owner_id,
            held=Amount(run.held_tokens, run.held_cost),
            begins="queued" if run.status == "queued" else "running",
            limits=self._worker.limits,
        )

    async def _prompt(self, new: NewRun, parent: Run | None) -> ModelRequest:
        """The message that the run begins with. Results must answer all that was called."""
        if not new.results:
            return ModelRequest([UserPromptPart(new.prompt)])
        calls: dict[str, str] = {}
        if parent and parent.finish_reason == "tool_call":
            async with self._reads.connect() as connection:
                messages = await own_messages(connection, parent.id)
            own = {tool.name for tool in Options.model_validate_json(parent.options).tools}
            last = [message for message in messages if isinstance(message, ModelResponse)][-1:]
            calls = {
                call.tool_call_id: call.tool_name
                for message in last
                for call in message.tool_calls
                if call.tool_name in own
            }
        if set(calls) != set(new.results):
            raise Invalid(
                "These are not the results of the calls that were made; "
                f"awaited: {', '.join(calls) or 'none'}.",
                code="unknown_tool_call",
                param=new.param,
            )
        return ModelRequest(
            [
                ToolReturnPart(name, new.results[call_id], tool_call_id=call_id)
                for call_id, name in calls.items()
            ]
        )

    async def note(
        self, caller: Caller, chat: str, program: str, messages: Sequence[ModelMessage]
    ) -> Run:
        """Adds messages to the conversation that nobody is to answer: a run that is over."""
        now = datetime.now(UTC)
        ended = entry(1, RunEnded(status="completed", at=int(now.timestamp())))
        others = 0
        while True:
            place = await self.place(caller, NewRun(program=program, chat=chat))
            if place.conversation_id is None:
                raise RunNotFound(f"No conversation {chat!r}.")
            if place.open:
                raise ConversationBusy("The conversation is busy with an earlier message.")
            run = new_run(
                caller,
                id=(run_id := uuid.uuid4().hex),
                conversation_id=place.conversation_id,
                position=place.position,
                parent_id=place.parent and place.parent.id,
                turn_id=run_id,
                kind="agent",
                program=program,
                status="completed",
                options=Options(note=True).model_dump_json(exclude_defaults=True),
                finished_at=now,
                token=0,
            )
            rows = run_rows(run, messages)
            rows.append((INSERT_EVENT, {"run_id": run.id, **ended.columns}))
            try:
                await self._journal.commit(rows)
                return run
            except IntegrityError:
                others += 1
                if others > CONTENDERS:
                    raise

    async def refuse(self, caller: Caller, new: NewRun, error: AppError) -> Run:
        """Writes down a run that could not be accepted, for an owner who was not there to be told.

        The same idempotency key returns the same run.
        """
        now = datetime.now(UTC)
        told = {"code": error.error_code, "message": error.message}
        ended = entry(1, RunEnded(status="failed", at=int(now.timestamp()), error=told))
        run = new_run(
            caller,
            id=(run_id := uuid.uuid4().hex),
            turn_id=run_id,
            kind=new.kind,
            program=new.program,
            status="failed",
            options=new.options.model_copy(update={"text": text_of(new.prompt)}).model_dump_json(
                exclude_defaults=True
            ),
            error=dump_any(told),
            finished_at=now,
            token=0,
            idempotency_key=new.idempotency and new.idempotency.key,
            fingerprint=new.idempotency and new.idempotency.fingerprint,
        )
        rows = run_rows(run, [ModelRequest([UserPromptPart(new.prompt)])])
        rows.append((INSERT_EVENT, {"run_id": run.id, **ended.columns}))
        try:
            await self._journal.commit(rows)
        except IntegrityError:
            known = new.idempotency and await self.repeated(caller, new.idempotency)
            if not known:
                raise
            return known
        return run

    async def follow(
        self, run: Run, after: int = 0, *, pause: bool = False, alone: bool = False
    ) -> AsyncIterator[Entry]:
        """Entries numbered above `after`, then new ones as they are committed, to the last; with
        `pause` at most to where the run waits for a person.

        No database connection is held in between. Raises Stopping where the run goes on, but
        not here, and RunNotFound where it is deleted meanwhile. `alone` is who can only ask for
        the same once more: then the run is stopped, and nobody pays for it twice.
        """
        log = self._worker.log(run.id)
        if log is None:  # the run is not about to begin here
            give_up_place.get()()
        following: Following | None = None
        moves, begun = 0, False
        while True:
            if log:
                entries = log.entries[after:]
            else:
                following = following or self._worker.signals.following(run.id)
                moves = following.moves
                read = partial(self._read, run.id, after)
                entries = await patiently(partial(following.once, after, read), begun=begun)
            begun = True
            for each in entries:
                yield each
                if each.is_last:
                    return
                after = each.seq
            live = log is not None and not log.closed
            quiet = isinstance(entries[-1].event, RunPaused) if entries else not live
            if pause and quiet and await patiently(partial(self._is_waiting, run.id)):
                return
            if log and live:
                await log.changed(after)
                continue
            if not entries and self._worker.closing:
                if not alone:
                    raise Stopping
                await self._cancel(run.id)
                told = await self._read(run.id, 0)
                for each in told[after:]:
                    yield each
                if told and told[-1].is_last:
                    return  # it was faster
                acted = any(isinstance(each.event, FunctionToolCallEvent) for each in told)
                raise Stopping(acted=acted)
            if log is None and following:
                self._worker.signals.tell("follow", run.id)
                await following.moved(moves, self._worker.signals.look)
            log = self._worker.log(run.id)
            if log and log.closed:
                log = None  # the worker has not forgotten it yet: what it lacks is elsewhere

    async def entries(self, run: Run) -> list[Entry]:
        """All entries that are committed by now."""
        if log := self._worker.log(run.id):
            return list(log.entries)
        return await self._read(run.id, 0)

    async def _read(self, run_id: str, after: int) -> list[Entry]:
        query = (
            select(Run.finished_at, Event.seq, Event.body)
            .select_from(Run)
            .outerjoin(Event, and_(Event.run_id == Run.id, Event.seq > after))
            .where(Run.id == run_id)
            .order_by(Event.seq)
        )
        async with self._reads.connect() as connection:
            rows = list(await connection.execute(query))
            if not rows:
                raise deleted(run_id)
            if rows[0].seq is None and rows[0].finished_at:
                return await self._replay(connection, run_id, after)
        return [parse(row.seq, row.body) for row in rows if row.seq is not None]

    async def _replay(self, connection: AsyncConnection, run_id: str, after: int) -> list[Entry]:
        """The entries above `after`, at least the last, of a log that is kept no longer."""
        found = await connection.execute(select(Run).where(Run.id == run_id))
        row = found.mappings().one_or_none()
        messages = [as_told(each) for each in await own_messages(connection, run_id)]
        if row is None or (row["deleted_at"] and not messages):
            raise deleted(run_id)
        asked = await questions(connection, [run_id])
        entries = replay(Run(**row), messages, asked.get(run_id, {}))
        return entries[after:] or entries[-1:]

    async def check_kept(self, run: Run) -> None:
        """Raises EventsGone where nobody can go on in the midst of the log: its events are gone,
        and what its messages remember has other numbers."""
        kept = exists().where(Event.run_id == run.id)
        query = select(Run.id).where(Run.id == run.id, Run.finished_at.is_not(None), ~kept)
        async with self._reads.connect() as connection:
            if await connection.scalar(query):
                raise EventsGone

    async def wait(self, run: Run, *, pause: bool = False, alone: bool = False) -> list[Entry]:
        """The whole log, once the run has ended, or with `pause` once somebody has to decide."""
        return [each async for each in self.follow(run, pause=pause, alone=alone)]

    async def _is_waiting(self, run_id: str) -> bool:
        async with self._reads.connect() as connection:
            query = select(Run.status).where(Run.id == run_id)
            return await connection.scalar(query) == "waiting"

    async def decide(self, caller: Caller, decisions: Sequence[Decision]) -> Run:
        """Answers questions that a run waits for; once all are answered, it goes on.

        The same answer once more is no other one. Raises Conflict for what nobody asks the caller
        (any more): then no answer counts.
        """
        async with self._writes.begin() as connection:
            run, fresh = await decide(connection, caller, decisions)
        for decision, tool in fresh:
            if not decision.approve:
                audit(run.id, tool, "its owner denied it")
        if fresh:
            self._worker.nudge()
        return run

    async def cancel(self, caller: Caller, run_id: str, kind: str | None = None) -> Run:
        """Stops the run wherever it is executed, and returns it. Ended runs stay as they are."""
        run = await self.get(caller, run_id, kind)
        if run.status in OPEN:
            await self._cancel(run_id)
        return run

    async def _cancel(self, run_id: str) -> None:
        async with self._writes.begin() as connection:
            await connection.execute(CANCEL_RUN, {"of_run": run_id})
        self._worker.cancel(run_id)

    async def stop(self, caller: Caller, chat: str) -> list[Run]:
        """Stops all that goes on in the caller's conversation, and returns it."""
        conversation_id = await self.conversation(caller, chat)
        if conversation_id is None:
            return []
        query = select(Run.id).where(
            Run.conversation_id == conversation_id, Run.status.in_(OPEN), Run.deleted_at.is_(None)
        )
        async with self._reads.connect() as connection:
            found = list(await connection.scalars(query))
        return [await self.cancel(caller, run_id) for run_id in found]

    async def delete(self, caller: Caller, run_id: str, kind: str | None = None) -> None:
        """Stops and forgets the run. What later runs continue from stays with them, unseen."""
        run = await self.cancel(caller, run_id, kind)
        if run.status in OPEN:
            await self.wait(run)
        async with self._writes.begin() as connection:
            await forget(connection, [run_id])


async def patiently(read: Callable[[], Awaitable[T]], *, begun: bool = True) -> T:
    """What the database answers, whenever it is back; who has not `begun` is told at once."""
    while True:
        try:
            return await read()
        except Exception as error:
            if not begun or not database_away(error):
                raise
        await asyncio.sleep(AGAIN)


def _again(run: Run, new: NewRun) -> Run:
    """The run that answers this very message already. Raises ConversationBusy for another one:
    also for one with a key of its own, for which nothing would be kept."""
    same = run.program == new.program and text_of(new.prompt) == _text(run) and not new.results
    if same and not new.idempotency:
        return run
    raise ConversationBusy(
        "The message is being answered as it was before; stop that, or send "
        "X-Multitask-Strategy: interrupt."
    )


def _text(run: Run) -> str:
    return Options.model_validate_json(run.options).text

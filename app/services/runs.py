"""The only entrance to runs: accept, wait, follow, cancel, delete.

Ownership, limits and idempotency live here, so that no protocol can forget them.
"""

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic_ai.messages import (
    ModelRequest,
    ModelResponse,
    ToolReturnPart,
    UserContent,
    UserPromptPart,
)
from sqlalchemy import Select, delete, exists, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import aliased

from agents import all_agents
from app.core.errors import (
    AppError,
    BadGateway,
    Bug,
    Conflict,
    Invalid,
    NotFound,
    TooMany,
    Unavailable,
)
from app.core.security import Caller
from app.db.session import reading, writing
from app.models import Conversation, Event, Run, ToolCall
from app.schemas.run import Options
from app.services.conversation import (
    Turn,
    as_messages,
    digest_turns,
    dump_message,
    own_messages,
    text_of,
)
from app.services.journal import (
    INSERT_CONVERSATION,
    INSERT_MESSAGE,
    INSERT_RUN,
    Entry,
    Journal,
    RunPaused,
    parse,
)
from app.services.worker import Fresh, Worker

OPEN = ("queued", "running", "waiting")
POLL = 0.25  # seconds between looks at a run that another process executes


class RunNotFound(NotFound):
    """No such run, or somebody else's: the two look the same."""

    code = "run_not_found"


class UnknownAgent(NotFound):
    code = "model_not_found"


def unknown_agent(name: str) -> UnknownAgent:
    return UnknownAgent(f"No agent {name!r}; available: {', '.join(all_agents())}.", param="model")


STATUS: Mapping[str, type[AppError]] = {
    "rate_limit_exceeded": TooMany,
    "context_length_exceeded": AppError,
    "extraction_invalid": Invalid,
    "output_truncated": Invalid,
    "model_refused": Invalid,
    "model_unavailable": BadGateway,
    "internal": Bug,
    "poisoned": Bug,
}
"""The status of each code that a run fails with; the rest are a bad gateway."""


def run_failed(error: Mapping[str, Any]) -> AppError:
    """What a failed run answers its client, by the code that it ended with."""
    code = str(error.get("code", "internal"))
    return STATUS.get(code, BadGateway)(str(error.get("message", "The run failed.")), code=code)


class Stopping(Unavailable):
    """This process ends; what was accepted goes on elsewhere, or when it is back."""

    def __init__(self) -> None:
        super().__init__("The server is stopping; try again in a moment.", code="stopping")


class IdempotencyConflict(Conflict):
    """The key was used before, with another body."""

    code = "idempotency_conflict"


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A key of the client's and what it stands for. Equal requests have equal fingerprints."""

    key: str
    fingerprint: str

    @classmethod
    def of(cls, route: str, key: str, body: bytes) -> "Idempotency":
        return cls(
            hashlib.sha256(f"{route}\n{key}".encode()).hexdigest(),
            hashlib.sha256(body).hexdigest(),
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """A person's answer to the question whether a call may be made."""

    call_id: str
    approve: bool
    reason: str | None = None


@dataclass(kw_only=True, slots=True)
class NewRun:
    """What a protocol asks for.

    `earlier` are turns that this server may not know: role and text, oldest first. Where the
    caller had exactly these turns here, the run continues from them; else they are taken as text.
    `results` answer the calls of the caller's own functions with which the parent ended; they
    stand in the place of a prompt.
    """

    program: str
    prompt: str | Sequence[UserContent] = ""
    kind: Literal["agent", "extraction"] = "agent"
    results: Mapping[str, str] = field(default_factory=dict[str, str])  # call id -> result
    parent: str | None = None
    earlier: Sequence[Turn] = ()
    chat: str | None = None  # the frontend's own id of the conversation
    queue: bool = False  # any worker may take it; else this process begins at once
    idempotency: Idempotency | None = None
    options: Options = field(default_factory=Options)


class Runs:
    """All runs of all owners, each seen by its owner alone."""

    def __init__(self, engine: AsyncEngine, journal: Journal, worker: Worker) -> None:
        self._journal = journal
        self._worker = worker
        self._reads = reading(engine)
        self._writes = writing(engine)

    async def accept(self, caller: Caller, new: NewRun) -> Run:
        """Commits the run and its prompt; what is returned will be executed, come what may.

        The same idempotency key returns the same run. Raises UnknownAgent, RunNotFound (the
        parent), IdempotencyConflict, and Stopping.
        """
        if self._worker.closing:
            raise Stopping
        if new.kind == "agent" and new.program not in all_agents():
            raise unknown_agent(new.program)
        if new.kind == "agent":
            _check_names(new)
        if new.idempotency and (known := await self._repeated(caller, new.idempotency)):
            return known
        run, rows, fresh = await self._prepare(caller, new)
        try:
            await self._journal.commit(rows)
        except IntegrityError:
            # Somebody else was first with this key, or with this chat id.
            if new.idempotency and (known := await self._repeated(caller, new.idempotency)):
                return known
            if new.chat is None:
                raise
            run, rows, fresh = await self._prepare(caller, new)
            await self._journal.commit(rows)
        if run.status == "running":
            self._worker.start(run, fresh)
        else:
            self._worker.nudge(after=run.parent_id)
        return run

    async def _repeated(self, caller: Caller, idempotency: Idempotency) -> Run | None:
        run = await self._one(
            select(Run).where(
                Run.owner_id == caller.user_id, Run.idempotency_key == idempotency.key
            )
        )
        if run and run.fingerprint != idempotency.fingerprint:
            raise IdempotencyConflict("This Idempotency-Key was used with another request.")
        return run

    async def _prepare(
        self, caller: Caller, new: NewRun
    ) -> tuple[Run, list[tuple[Any, dict[str, Any]]], Fresh]:
        parent = await self.get(caller, new.parent, new.kind) if new.parent else None
        conversation_id = parent.conversation_id if parent else None
        if new.chat and not parent:
            conversation_id = await self._conversation(caller, new.chat)
            if conversation_id and not new.earlier:
                parent = await self._latest(caller, conversation_id)
        if new.earlier and not parent:
            parent = await self._known(caller, new, conversation_id)
            conversation_id = conversation_id or (parent and parent.conversation_id)
        prompt = await self._prompt(new, parent)
        earlier = () if parent else new.earlier
        rows: list[tuple[Any, dict[str, Any]]] = []
        if conversation_id is None and new.chat:
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
            }
        )
        queued = new.queue or (parent is not None and parent.status in OPEN)
        run = Run(
            id=uuid.uuid4().hex,
            owner_id=caller.user_id,
            conversation_id=conversation_id,
            parent_id=parent and parent.id,
            kind=new.kind,
            program=new.program,
            scopes=caller.scope,
            status="queued" if queued else "running",
            options=options.model_dump_json(exclude_defaults=True),
            worker=None if queued else self._worker.name,
            token=0 if queued else 1,
            crashes=0,
            cancelling=False,
            idempotency_key=new.idempotency and new.idempotency.key,
            fingerprint=new.idempotency and new.idempotency.fingerprint,
            created_at=datetime.now(UTC),
        )
        row = {name: value for name, value in vars(run).items() if not name.startswith("_")}
        row["lease_seconds"] = None if queued else self._worker.lease
        rows.append((INSERT_RUN, row))
        messages = [*as_messages(earlier), prompt]
        rows += [
            (INSERT_MESSAGE, {"run_id": run.id, "seq": seq, "body": dump_message(message)})
            for seq, message in enumerate(messages)
        ]
        before = (parent.transcript or parent.id) if parent else options.earlier
        return run, rows, Fresh(options, messages, before)

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
                param="messages",
            )
        return ModelRequest(
            [
                ToolReturnPart(name, new.results[call_id], tool_call_id=call_id)
                for call_id, name in calls.items()
            ]
        )

    async def _conversation(self, caller: Caller, chat: str) -> str | None:
        async with self._reads.connect() as connection:
            return await connection.scalar(
                select(Conversation.id).where(
                    Conversation.owner_id == caller.user_id, Conversation.external_id == chat
                )
            )

    async def _latest(self, caller: Caller, conversation_id: str) -> Run | None:
        return await self._one(
            select(Run)
            .where(Run.conversation_id == conversation_id, Run.deleted_at.is_(None))
            .order_by(Run.created_at.desc())
            .limit(1)
        )

    async def _known(self, caller: Caller, new: NewRun, conversation_id: str | None) -> Run | None:
        """The caller's latest run that ended with exactly these turns."""
        query = (
            select(Run)
            .where(
                Run.owner_id == caller.user_id,
                Run.kind == new.kind,
                Run.transcript == digest_turns("", new.earlier),
                Run.deleted_at.is_(None),
            )
            .order_by(Run.created_at.desc())
            .limit(1)
        )
        if conversation_id:
            query = query.where(Run.conversation_id == conversation_id)
        return await self._one(query)

    async def get(self, caller: Caller, run_id: str, kind: str | None = None) -> Run:
        """The caller's run. Raises RunNotFound."""
        run = None
        if run_id.isalnum():  # as all ids are; others may hold what no database takes
            run = await self._one(
                select(Run).where(
                    Run.id == run_id, Run.owner_id == caller.user_id, Run.deleted_at.is_(None)
                )
            )
        if run is None or (kind and run.kind != kind):
            raise RunNotFound(f"No run {run_id!r}.")
        return run

    async def _one(self, query: Select[Run]) -> Run | None:
        async with self._reads.connect() as connection:
            row = (await connection.execute(query)).mappings().one_or_none()
        return Run(**row) if row else None

    async def follow(self, run: Run, after: int = 0) -> AsyncIterator[Entry]:
        """Entries numbered above `after`, then new ones as they are committed, to the last.

        No database connection is held in between. Raises Stopping where the run goes on, but
        not here.
        """
        log = self._worker.log(run.id)
        while True:
            entries = log.entries[after:] if log else await self._read(run.id, after)
            for entry in entries:
                yield entry
                if entry.is_last:
                    return
                after = entry.seq
            if log and not log.closed:
                await log.changed(after)
                continue
            if not entries:
                if self._worker.closing:
                    raise Stopping
                if log is None:
                    await asyncio.sleep(POLL)
            log = self._worker.log(run.id)
            if log and log.closed:
                log = None  # the worker has not forgotten it yet: what it lacks is elsewhere

    async def entries(self, run: Run) -> list[Entry]:
        """All entries that are committed by now."""
        if log := self._worker.log(run.id):
            return list(log.entries)
        return await self._read(run.id, 0)

    async def _read(self, run_id: str, after: int) -> list[Entry]:
        async with self._reads.connect() as connection:
            rows = await connection.execute(
                select(Event.seq, Event.body)
                .where(Event.run_id == run_id, Event.seq > after)
                .order_by(Event.seq)
            )
            return [parse(row.seq, row.body) for row in rows]

    async def wait(self, run: Run, *, pause: bool = False) -> list[Entry]:
        """The whole log, once the run has ended, or with `pause` once somebody has to decide."""
        entries: list[Entry] = []
        async for entry in self.follow(run):
            entries.append(entry)
            if pause and isinstance(entry.event, RunPaused) and await self._is_waiting(run.id):
                break
        return entries

    async def _is_waiting(self, run_id: str) -> bool:
        async with self._reads.connect() as connection:
            query = select(Run.status).where(Run.id == run_id)
            return await connection.scalar(query) == "waiting"

    async def decide(self, caller: Caller, run_id: str, decisions: Sequence[Decision]) -> Run:
        """Answers questions that the run waits for; once all are answered, it goes on.

        Raises RunNotFound, and Conflict for a call that nobody asks about (any more): then none
        of the answers counts.
        """
        run = await self.get(caller, run_id)
        async with self._writes.begin() as connection:
            # Locked first: of two who decide at once on two calls, the second sees both answered.
            status = await connection.scalar(
                select(Run.status).where(Run.id == run_id).with_for_update()
            )
            for decision in decisions:
                answered = await connection.execute(
                    update(ToolCall)
                    .where(
                        ToolCall.run_id == run_id,
                        ToolCall.call_id == decision.call_id,
                        ToolCall.status == "asked",
                    )
                    .values(
                        status="approved" if decision.approve else "denied",
                        decided=True,
                        result=None if decision.approve else decision.reason,
                    )
                )
                if status != "waiting" or answered.rowcount == 0:
                    raise Conflict(
                        f"No decision on {decision.call_id!r} is awaited.", code="not_awaited"
                    )
            unanswered = exists().where(ToolCall.run_id == run_id, ToolCall.status == "asked")
            await connection.execute(
                update(Run).where(Run.id == run_id, ~unanswered).values(status="queued")
            )
        self._worker.nudge()
        return run

    async def cancel(self, caller: Caller, run_id: str, kind: str | None = None) -> Run:
        """Stops the run wherever it is executed, and returns it. Ended runs stay as they are."""
        run = await self.get(caller, run_id, kind)
        if run.status not in OPEN:
            return run
        async with self._writes.begin() as connection:
            await connection.execute(
                update(Run).where(Run.id == run_id, Run.status.in_(OPEN)).values(cancelling=True)
            )
        self._worker.cancel(run_id)
        return run

    async def delete(self, caller: Caller, run_id: str, kind: str | None = None) -> None:
        """Stops and forgets the run. What later runs continue from stays with them, unseen."""
        run = await self.cancel(caller, run_id, kind)
        if run.status in OPEN:
            await self.wait(run)
        child = aliased(Run)
        async with self._writes.begin() as connection:
            await connection.execute(
                update(Run).where(Run.id == run_id).values(deleted_at=datetime.now(UTC))
            )
            await connection.execute(
                delete(Run).where(Run.id == run_id, ~exists().where(child.parent_id == run_id))
            )


def _check_names(new: NewRun) -> None:
    """Raises Invalid where the model could not tell the caller's functions apart."""
    names = [tool.name for tool in new.options.tools]
    taken = {name for name in names if names.count(name) > 1}
    taken |= set(names) & set(all_agents()[new.program].tools)
    if taken:
        raise Invalid(
            f"The name {sorted(taken)[0]!r} is taken by another tool; call yours differently.",
            param="tools",
            status=400,
        )

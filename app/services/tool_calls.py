"""Tool calls of ended runs: what became of them, and the owner's word where nobody knows."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

from pydantic_ai import Agent, DeferredToolRequests, DeferredToolResults
from pydantic_ai.messages import ModelMessage, ModelRequest, ModelResponse, ToolReturnPart
from pydantic_graph import End
from sqlalchemy import Select, func, insert, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from typing_extensions import override

from agents import all_agents
from app.core.errors import Conflict, GatewayTimeout, Invalid, NotFound
from app.core.security import Caller
from app.db.base import epoch_now
from app.db.session import reading, writing
from app.models import Conversation, Message, Run, ToolCall
from app.services.agent import AgentExecutor
from app.services.branches import is_open
from app.services.conversation import MESSAGE, dump_message, own_messages
from app.services.decisions import check_may
from app.services.json_schema import check_value
from app.services.ledger import Ledger, dump_result, part_of
from app.services.process import is_gone, process_name
from app.services.run_log import RunLog

LONGEST = 60.0  # seconds for a call that is made again
SLACK = 15.0  # seconds in which its result is stored
MAX_RESULT = 100_000  # characters of a result that an owner tells

How = Literal["done", "retry"]


class ToolCallNotFound(NotFound):
    """No such call, or somebody else's: the two look the same."""

    code = "tool_call_not_found"


@dataclass(frozen=True, slots=True)
class Listed:
    """A call, with what is to be known of its run. `asked_at`: when the model asked for it."""

    call: ToolCall
    agent: str
    run_status: str
    conversation: str | None
    arguments: Any
    asked_at: datetime


@dataclass(kw_only=True)
class _Again(Ledger):
    """The ledger of one call that is made again: what it comes to is stored by whoever asked."""

    outcome: tuple[str, str | None] | None = None

    @override
    async def _settle(
        self, row: dict[str, Any], status: str, result: str | None, *, written: bool = True
    ) -> None:
        self.outcome = (status, result)


class ToolCalls:
    """All calls of all owners, each seen by its owner alone."""

    def __init__(self, engine: AsyncEngine, executor: AgentExecutor) -> None:
        self._executor = executor
        self._reads = reading(engine)
        self._writes = writing(engine)

    async def list(
        self, caller: Caller, *, status: str | None = None, after: str | None = None, limit: int
    ) -> Sequence[Listed]:
        """The caller's calls, those of the newest runs first, behind the one with the key `after`.

        Raises ToolCallNotFound where there is no such key.
        """
        place = tuple_(Run.created_at, Run.id, ToolCall.step, ToolCall.call_id)
        query = _calls(caller).order_by(
            Run.created_at.desc(), Run.id.desc(), ToolCall.step.desc(), ToolCall.call_id.desc()
        )
        if status:
            query = query.where(ToolCall.status == status)
        async with self._reads.connect() as connection:
            if after is not None:
                await self._one(connection, caller, after)
                last = _calls(caller).where(ToolCall.key == after).with_only_columns(*place)
                row = (await connection.execute(last)).one()
                query = query.where(place < tuple_(*row))
            rows = await connection.execute(query.limit(limit))
            return [_listed(row) for row in rows.mappings()]

    async def get(self, caller: Caller, key: str) -> Listed:
        """The caller's call. Raises ToolCallNotFound."""
        async with self._reads.connect() as connection:
            return await self._one(connection, caller, key)

    async def _one(self, connection: AsyncConnection, caller: Caller, key: str) -> Listed:
        row = None
        if key.isalnum():  # as all keys are; others may hold what no database takes
            found = await connection.execute(_calls(caller).where(ToolCall.key == key))
            row = found.mappings().one_or_none()
        if row is None:
            raise ToolCallNotFound(f"No tool call {key[:64]!r}.")
        return _listed(row)

    async def settle(self, caller: Caller, key: str, result: Any) -> Listed:
        """Records that the call took effect, and with what result, as its owner found out.

        Raises ToolCallNotFound, Forbidden without the tool's scope, Invalid for the result, and
        Conflict where the outcome is known or the run goes on.
        """
        check_value(result, "result")
        told = dump_result(result)
        if len(told) > MAX_RESULT:
            raise Invalid(f"A result has at most {MAX_RESULT} characters.", param="result")
        async with self._writes.begin() as connection:
            if found := await self._unknown(connection, caller, key, "done", told):
                await self._record(connection, found[1], "done", told, how="done")
        return await self.get(caller, key)

    async def retry(self, caller: Caller, key: str) -> Listed:
        """Makes the call again, under its key, with the rights that the caller has now.

        It stays unknown until its result is stored, also where the process dies meanwhile; until
        then nobody else makes it. Raises as `settle` does, and GatewayTimeout.
        """
        async with self._writes.begin() as connection:
            found = await self._unknown(connection, caller, key, "retry")
            if found is None:
                return await self._one(connection, caller, key)
            run, call = found
            lease = await connection.scalar(
                update(Run)
                .where(Run.id == run.id)
                .values(worker=process_name(), lease_until=epoch_now() + LONGEST + SLACK)
                .returning(Run.lease_until)
            )
            messages = await own_messages(connection, run.id)
        status, result = "unknown", None
        try:
            async with asyncio.timeout(LONGEST):
                status, result = await self._make(caller, run, call, messages)
        except TimeoutError as error:
            raise GatewayTimeout(
                f"The call took longer than {LONGEST:.0f} s; whether it took effect stays unknown."
            ) from error
        finally:
            async with self._writes.begin() as connection:
                kept = await connection.execute(
                    update(Run)
                    .where(Run.id == run.id, Run.lease_until == lease, Run.deleted_at.is_(None))
                    .values(worker=None, lease_until=None)
                )
                if kept.rowcount and status != "unknown":
                    await self._record(connection, call, status, result, how="retry")
        return await self.get(caller, key)

    async def _unknown(
        self,
        connection: AsyncConnection,
        caller: Caller,
        key: str,
        how: How,
        told: str | None = None,
    ) -> tuple[Run, ToolCall] | None:
        """The call and its run, which is locked; None where it was settled so before."""
        found = await self._one(connection, caller, key)
        is_leased = func.coalesce(Run.lease_until > epoch_now(), False).label("is_leased")
        locked = await connection.execute(
            select(Run, is_leased).where(Run.id == found.call.run_id).with_for_update()
        )
        row = dict(locked.mappings().one())
        leased = row.pop("is_leased")
        run = Run(**row)
        call = (await self._one(connection, caller, key)).call
        if is_open(run):
            raise Conflict(
                "The run goes on: wait for its end, or cancel it with "
                f"POST /v1/responses/resp_{run.id}/cancel.",
                code="run_open",
            )
        check_may(caller, run.program, call.tool)
        if call.status != "unknown":
            part = _find(await _after(connection, call), call)[1]
            so = part and part.metadata and part.metadata.get("settled") == how
            if so and (how == "retry" or call.result == told):
                return None
            raise Conflict(f"The call's outcome is known: {call.status}.", code="not_unknown")
        if leased and not is_gone(run.worker or ""):
            raise Conflict(
                "A call of this run is being made again; look at it in a moment.", code="settling"
            )
        return run, call

    async def _make(
        self, caller: Caller, run: Run, call: ToolCall, messages: Sequence[ModelMessage]
    ) -> tuple[str, str | None]:
        """The call's new status and result. It is made as its run made it: by the agent."""
        listed = all_agents().get(run.program)
        item = listed.tools.get(call.tool) if listed else None
        reply = messages[call.step]
        assert isinstance(reply, ModelResponse)
        asked = [part for part in reply.tool_calls if part.tool_call_id == call.call_id]
        if listed is None or item is None:
            raise Conflict(f"There is no tool {call.tool!r} any more.", code="tool_gone")
        ledger = _Again(
            journal=self._executor.journal,
            log=RunLog(run.id, run.token),
            turn=asyncio.Semaphore(1),
            step=call.step,
            known={(call.step, call.call_id): _approved(call)},
        )
        approvals = DeferredToolResults(approvals={call.call_id: True})
        again = listed.agent.iter(
            message_history=[*messages[: call.step], replace(reply, parts=asked)],
            deferred_tool_results=approvals if item.requires_approval else None,
            output_type=[listed.agent.output_type, DeferredToolRequests],
            model=self._executor.models.model,
            deps=self._executor.deps(caller, run.id),
            infer_name=False,
        )
        async with ledger.recording(again) as running:
            node = running.next_node
            made = False
            while not made and not isinstance(node, End):
                made = Agent.is_call_tools_node(node)
                node = await running.next(node)
        if ledger.outcome is None:
            raise Conflict(
                f"The arguments do not fit {call.tool!r} any more, so it was not called.",
                code="not_made",
            )
        return ledger.outcome

    async def _record(
        self, connection: AsyncConnection, call: ToolCall, status: str, result: str | None, how: How
    ) -> None:
        """What the ledger knows now, and what later turns tell the model of the call."""
        call.status, call.result = status, result
        await connection.execute(
            update(ToolCall)
            .where(
                ToolCall.run_id == call.run_id,
                ToolCall.step == call.step,
                ToolCall.call_id == call.call_id,
            )
            .values(status=status, result=result)
        )
        after = await _after(connection, call)
        seq, old = _find(after, call)
        was = old.outcome if old else "interrupted"
        part = part_of(call, metadata={"settled": how, "was": was})
        request = after.get(seq, ModelRequest([]))
        if old:
            part = replace(part, timestamp=old.timestamp)
            parts = [part if each is old else each for each in request.parts]
        else:
            parts = [part, *request.parts]
        body = dump_message(replace(request, parts=parts))
        here = {"run_id": call.run_id, "seq": seq}
        if seq in after:
            await connection.execute(update(Message).filter_by(**here).values(body=body))
        else:
            await connection.execute(insert(Message).values(**here, body=body))


def _approved(call: ToolCall) -> ToolCall:
    """The same call, as the ledger makes it: its owner wants it."""
    row = {column.key: getattr(call, column.key) for column in ToolCall.__table__.c}
    return ToolCall(**{**row, "status": "approved"})


async def _after(connection: AsyncConnection, call: ToolCall) -> dict[int, ModelRequest]:
    """The messages between the call and the next reply, by their numbers."""
    rows = await connection.execute(
        select(Message.seq, Message.body)
        .where(Message.run_id == call.run_id, Message.seq > call.step)
        .order_by(Message.seq)
    )
    found: dict[int, ModelRequest] = {}
    for row in rows:
        message = MESSAGE.validate_json(row.body)
        if not isinstance(message, ModelRequest):
            break
        found[row.seq] = message
    return found


def _find(after: dict[int, ModelRequest], call: ToolCall) -> tuple[int, ToolReturnPart | None]:
    """The call's result, and the number of the message that has it or is to get it."""
    for seq, message in after.items():
        for part in message.parts:
            if isinstance(part, ToolReturnPart) and part.tool_call_id == call.call_id:
                return seq, part
    return min(after, default=call.step + 1), None


def _calls(caller: Caller) -> Select[Any]:
    return (
        select(
            *ToolCall.__table__.c,
            Run.program,
            Run.status.label("run_status"),
            Conversation.external_id,
            Message.body,
        )
        .select_from(ToolCall)
        .join(Run, Run.id == ToolCall.run_id)
        .join(Message, (Message.run_id == ToolCall.run_id) & (Message.seq == ToolCall.step))
        .outerjoin(Conversation, Conversation.id == Run.conversation_id)
        .where(Run.owner_id == caller.user_id, Run.deleted_at.is_(None))
    )


def _listed(row: Any) -> Listed:
    call = ToolCall(**{column.key: row[column.key] for column in ToolCall.__table__.c})
    reply = MESSAGE.validate_json(row["body"])
    assert isinstance(reply, ModelResponse)
    [asked] = [part for part in reply.tool_calls if part.tool_call_id == call.call_id]
    try:
        arguments = json.loads(asked.args_as_json_str())
    except ValueError:
        arguments = asked.args
    return Listed(
        call, row["program"], row["run_status"], row["external_id"], arguments, reply.timestamp
    )

"""The tool ledger: what became of each tool call, so that none that counts is made twice."""

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncGenerator, Container, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, cast

import httpx2
from openai import OpenAIError
from pydantic import TypeAdapter, ValidationError
from pydantic_ai import (
    DeferredToolResults,
    ModelRetry,
    RunContext,
    ToolDenied,
    ToolFailed,
    ToolReturn,
)
from pydantic_ai.exceptions import ToolFailedError, ToolRetryError
from pydantic_ai.messages import (
    InstructionPart,
    ModelMessage,
    ModelRequest,
    ModelRequestPart,
    ModelResponse,
    RetryPromptPart,
    ToolCallPart,
    ToolReturnPart,
)
from pydantic_ai.run import AgentRun
from pydantic_ai.tools import DeferredToolApprovalResult, ToolDefinition
from pydantic_ai.toolsets import WrapperToolset
from pydantic_ai.toolsets.abstract import ToolsetTool
from pydantic_core import to_json
from sqlalchemy import Executable, bindparam, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from typing_extensions import override

from agents import all_agents
from app.core import metrics
from app.core.errors import Forbidden, NotFound
from app.core.json import dump
from app.core.tasks import unbroken
from app.deps import Deps, call_key
from app.models import Run, ToolCall
from app.services.call_ids import CallIds
from app.services.changes import INSERT_CALL, SETTLE_CALL, Rows
from app.services.conversation import is_reply
from app.services.journal import Journal
from app.services.outbound import OutboundRefused
from app.services.run_log import RunLog
from tools import declared

logger = logging.getLogger(__name__)

SETTLED = ("done", "retry", "failed", "unknown")

DENIED = "The person who was asked did not agree to this call."

EXPIRED = "The person who was asked did not answer in time, so this call was not made."

UNKNOWN = (
    "outcome unknown: this call was cut off, so it may or may not have taken effect. It was not "
    "repeated. Say so, and check before trying again."
)

INTERRUPTED = "The run ended first: this call was not made, or not to its end."

RICH = "ToolReturn "  # before the JSON of a result that is more than a value


class _Uncaught(ToolFailed):
    """What the ledger tells of a failure that the tool did not catch."""


class ToolBroke(Exception):
    """A tool has a bug that would pass for a failure of the model, or of our own database."""


CALLS = select(ToolCall).where(ToolCall.run_id == bindparam("run_id"))

Key = tuple[int, str]  # the number of the message that asked, and the call's id


async def recorded(connection: AsyncConnection, run_id: str) -> dict[Key, ToolCall]:
    """All calls of the run that were begun."""
    rows = await connection.execute(CALLS, {"run_id": run_id})
    return {(row["step"], row["call_id"]): ToolCall(**row) for row in rows.mappings()}


def call_key_of(run_id: str, step: int, call_id: str, args: dict[str, Any]) -> str:
    """The same for the same call, also after a crash; different for any other."""
    canonical = json.dumps(args, sort_keys=True, default=lambda value: to_json(value).decode())
    return hashlib.sha256(f"{run_id}\n{step}\n{call_id}\n{canonical}".encode()).hexdigest()[:40]


@dataclass(kw_only=True)
class Ledger:
    """Commits each call before it is made and again with its result, and replays after a crash.

    A call that was in flight when a process died is repeated, under the same idempotency key, if
    the tool is `read` or `idempotent`; a `once` call becomes "outcome unknown".
    """

    journal: Journal
    log: RunLog
    turn: asyncio.Semaphore  # so many calls are made at a time
    known: dict[Key, ToolCall] = field(default_factory=dict[Key, ToolCall])
    step: int = 0  # number of the run's message that holds the calls now made
    ids: CallIds = field(default_factory=CallIds)

    def asked(self, calls: Sequence[ToolCallPart]) -> Rows:
        """The rows of calls that a person has to decide on."""
        return [(INSERT_CALL, self._row(call, call.args_as_dict(), "asked")) for call in calls]

    def decisions(self, others: Sequence[str] = ()) -> DeferredToolResults | None:
        """What was decided on this step's calls; None where nobody was asked.

        With the decisions all calls of the step go on, also the `others`: the client's own.
        """
        decided: dict[str, bool | DeferredToolApprovalResult] = {
            call.call_id: _decision(call)
            for (step, _), call in self.known.items()
            if step == self.step and (call.decided or call.status == "denied")
        }
        if not decided:
            return None
        return DeferredToolResults(approvals=dict.fromkeys(others, True) | decided)

    async def expire(self) -> None:
        """Denies what nobody has answered: the run goes on, so the wait is over."""
        for call in self.known.values():
            if call.status == "asked":
                audit(call.run_id, call.tool, "nobody agreed in time")
                call.status, call.result = "denied", EXPIRED
                await self._commit(settlement(call))

    @asynccontextmanager
    async def recording(
        self, run: AbstractAsyncContextManager[AgentRun[Deps, Any]]
    ) -> AsyncGenerator[AgentRun[Deps, Any]]:
        """The agent's run, with all calls of its tools made by this ledger.

        By a toolset around all that the run has, which costs something where a tool is called: a
        capability has a part in each step of each run, an eighth of the time of a short one; and
        toolsets that override an agent's leave out what its capabilities bring.
        """
        async with run as running:
            deps = running.ctx.deps
            toolset = _Recorded(deps.tool_manager.toolset, self)
            deps.tool_manager = replace(deps.tool_manager, toolset=toolset)
            yield running

    async def call(
        self,
        call: ToolCallPart,
        args: dict[str, Any],
        tool_def: ToolDefinition,
        ctx: RunContext[Deps],
        handler: Any,
    ) -> Any:
        """Makes the call by `handler`, with its arguments as they were validated, or tells what
        came of it before. Raises what the tool does, ToolFailed in the place of what the model can
        act on, and ToolBroke."""
        says = declared(tool_def)
        if says.needs and not ctx.deps.caller.may(says.needs):
            audit(self.log.run_id, call.tool_name, f"the caller lacks the scope {says.needs!r}")
            raise ToolFailed(f"The caller lacks the scope {says.needs!r}.")
        found = self.known.get((self.step, call.tool_call_id))
        if found and found.status in SETTLED:
            return _replay(found)
        row = self._row(call, args, "started")
        if found:
            row["key"] = found.key  # also where the tool reads its arguments otherwise by now
        if found and found.status == "started" and says.effect == "once":
            await self._settle(row, "unknown", UNKNOWN)
            raise ToolFailed(UNKNOWN)
        if found and found.status == "approved":
            await self._settle(row, "started", None)
        written = found is not None
        if not written and says.effect != "read":  # of a read, its result alone is written
            await self._commit((INSERT_CALL, row))
            written = True
        try:
            result = await self._call(row["key"], args, handler)
        except (ModelRetry, ToolRetryError, ToolFailed, ToolFailedError) as error:
            if says.effect == "once" and _may_have_happened(error):
                await self._settle(row, "unknown", UNKNOWN)
                raise ToolFailed(UNKNOWN) from error
            if isinstance(error, (ToolFailed, ToolFailedError)):
                if isinstance(error.__cause__, REFUSALS):
                    audit(self.log.run_id, call.tool_name, type(error.__cause__).__name__)
                await self._settle(row, "failed", _message(error), written=written)
                raise
            await self._settle(row, "retry", _message(error), written=written)
            raise
        await self._settle(row, "done", dump_result(result), written=written)
        return result

    async def _call(self, key: str, args: dict[str, Any], handler: Any) -> Any:
        """Makes the call under its key. A failed HTTP call is something the model can act on."""
        token = call_key.set(key)
        try:
            return await handler(args)
        except FAILURES as error:
            raise _Uncaught(_explain(error)) from error
        except AMBIGUOUS as error:
            raise ToolBroke(type(error).__name__) from error
        finally:
            call_key.reset(token)

    def _row(self, call: ToolCallPart, args: dict[str, Any], status: str) -> dict[str, Any]:
        return {
            "run_id": self.log.run_id,
            "step": self.step,
            "call_id": call.tool_call_id,
            "tool": call.tool_name,
            "key": call_key_of(self.log.run_id, self.step, call.tool_call_id, args),
            "status": status,
            "decided": False,
            "result": None,
        }

    async def _settle(
        self, row: dict[str, Any], status: str, result: str | None, *, written: bool = True
    ) -> None:
        if status in SETTLED:
            metrics.tool_calls.add(row["tool"], status)
        if not written:
            await self._commit((INSERT_CALL, {**row, "status": status, "result": result}))
            return
        settled = {
            "of_run": row["run_id"],
            "of_step": row["step"],
            "of_call": row["call_id"],
            "now": status,
            "outcome": result,
        }
        await self._commit((SETTLE_CALL, settled))

    async def _commit(self, row: tuple[Executable, dict[str, Any]]) -> None:
        """Stores it also where the run is stopped meanwhile: its end tells what is stored."""
        await unbroken(self.journal.commit([row], self.log))


@dataclass
class _Recorded(WrapperToolset[Deps]):
    """A toolset whose calls are made by a ledger, but for those that are the agent's answer."""

    ledger: Ledger

    @override
    async def get_instructions(
        self, ctx: RunContext[Deps]
    ) -> str | InstructionPart | Sequence[str | InstructionPart] | None:
        return await self.wrapped.get_instructions(ctx)  # of one: nothing to gather in tasks

    @override
    async def call_tool(
        self, name: str, tool_args: dict[str, Any], ctx: RunContext[Deps], tool: ToolsetTool[Deps]
    ) -> Any:
        async def make(args: dict[str, Any]) -> Any:
            return await self.wrapped.call_tool(name, args, ctx, tool)

        if tool.tool_def.kind == "output":
            return await make(tool_args)
        call = ToolCallPart(name, tool_args, ctx.tool_call_id or "")
        async with self.ledger.turn:
            return await self.ledger.call(call, tool_args, tool.tool_def, ctx, make)


def audit(run_id: str, tool: str | None, why: str) -> None:
    """Logs a call that was refused, without its arguments: they are the user's. `tool` is None
    where there is none of that name: then the name is the model's."""
    name = "an unknown tool" if tool is None else repr(tool)
    logger.warning("run %s: a call of %s was refused: %s", run_id, name, why)


def _decision(call: ToolCall) -> bool | DeferredToolApprovalResult:
    return ToolDenied(call.result or DENIED) if call.status == "denied" else True


# What a service does wrong, or a model with a URL: something that the model can act on.
FAILURES = (httpx2.HTTPError, httpx2.InvalidURL, ValidationError, json.JSONDecodeError)


# Of these, what says that the service was not asked at all.
NEVER_SENT = (
    httpx2.ConnectError,
    httpx2.ConnectTimeout,
    httpx2.PoolTimeout,
    httpx2.InvalidURL,
    httpx2.UnsupportedProtocol,
    OutboundRefused,
)

# What a tool may raise, and others that are no part of it.
AMBIGUOUS = (ConnectionError, DBAPIError, OpenAIError)

# What a tool refuses on the caller's behalf: a right, another's id, an address.
REFUSALS = (Forbidden, NotFound, OutboundRefused)


def _may_have_happened(error: Exception) -> bool:
    """Whether nobody can tell how far the call came: it was cut off, its answer cannot be read, or
    a server failed at it."""
    if isinstance(error, ModelRetry):
        return error.message.startswith("Timed out")  # as PydanticAI says of a tool's time-out
    cause = error.__cause__
    if isinstance(cause, httpx2.HTTPStatusError):
        return cause.response.status_code >= 500
    failures = FAILURES if isinstance(error, _Uncaught) else httpx2.HTTPError
    return isinstance(cause, failures) and not isinstance(cause, NEVER_SENT)


@cache
def _returns() -> TypeAdapter[ToolReturn[Any]]:
    return TypeAdapter(ToolReturn[Any])


def _replay(found: ToolCall) -> Any:
    result = found.result or ""
    if found.status == "done" and result.startswith(RICH):
        return _returns().validate_json(result.removeprefix(RICH))
    if found.status == "done":
        return json.loads(result)
    if found.status == "retry":
        raise ModelRetry(result)
    raise ToolFailed(result)


def dump_result(result: Any) -> str:
    """What a tool returned, as the ledger keeps it."""
    if isinstance(result, ToolReturn):
        return RICH + dump(_returns(), cast(ToolReturn[Any], result))
    return to_json(result, fallback=str).decode()


def load_result(call: ToolCall) -> Any:
    """What the call came to, as a value; where it came to nothing, what the model was told."""
    if call.status != "done" or call.result is None:
        return call.result
    value = _replay(call)
    return value.return_value if isinstance(value, ToolReturn) else value


def part_of(call: ToolCall, **more: Any) -> ToolReturnPart:
    """What the model is told of a call that has an outcome."""
    outcome = {"done": "success", "denied": "denied"}.get(call.status, "failed")
    content = load_result(call)
    if outcome == "denied":
        content = content or DENIED
    return ToolReturnPart(
        call.tool, content, tool_call_id=call.call_id, outcome=cast(Any, outcome), **more
    )


def as_told(message: ModelMessage) -> ModelMessage:
    """The message as its run had it, also where a call's owner has settled the call since."""
    if not isinstance(message, ModelRequest):
        return message
    return replace(message, parts=[_unsettled(part) for part in message.parts])


def _unsettled(part: ModelRequestPart) -> ModelRequestPart:
    match part:
        case ToolReturnPart(metadata={"settled": _, **more}):
            was = more.get("was", "failed")
            content = INTERRUPTED if was == "interrupted" else UNKNOWN
            return replace(part, content=content, outcome=was, metadata=None)
        case _:
            return part


async def conclude(
    engine: AsyncEngine, run: Run, messages: Sequence[ModelMessage], others: Container[str]
) -> tuple[list[ToolReturnPart], Rows]:
    """Results for the calls that have none as their run ends, but those of the `others`: the
    client's own tools. And what became of them, for the ledger.

    What had come is kept; of a call that was being made, nobody knows whether it took effect.
    """
    step = max((at for at, message in enumerate(messages) if is_reply(message)), default=0)
    if not messages or not isinstance(reply := messages[step], ModelResponse):
        return [], []
    answered = {
        part.tool_call_id
        for message in messages[step + 1 :]
        for part in message.parts
        if isinstance(part, (ToolReturnPart, RetryPromptPart))
    }
    calls = [
        call
        for call in reply.tool_calls
        if call.tool_call_id not in answered and call.tool_name not in others
    ]
    if not calls:
        return [], []
    async with engine.connect() as connection:
        known = await recorded(connection, run.id)
    listed = all_agents().get(run.program)  # None: its file is gone, the run is still there
    parts: list[ToolReturnPart] = []
    rows: list[tuple[Any, dict[str, Any]]] = []
    for call in calls:
        found = known.get((step, call.tool_call_id))
        item = listed and listed.tools.get(call.tool_name)
        is_once = item is None or declared(item.tool_def).effect == "once"
        if found and found.status == "started" and is_once:
            found.status, found.result = "unknown", UNKNOWN
            rows.append(settlement(found))
        if found and found.status in (*SETTLED, "denied"):
            parts.append(part_of(found))
        else:
            parts.append(
                ToolReturnPart(
                    call.tool_name,
                    INTERRUPTED,
                    tool_call_id=call.tool_call_id,
                    outcome="interrupted",
                )
            )
    return parts, rows


def settlement(call: ToolCall) -> tuple[Any, dict[str, Any]]:
    """What the journal is to commit for a call whose status and result are new."""
    return SETTLE_CALL, {
        "of_run": call.run_id,
        "of_step": call.step,
        "of_call": call.call_id,
        "now": call.status,
        "outcome": call.result,
    }


def _message(error: ModelRetry | ToolRetryError | ToolFailed | ToolFailedError) -> str:
    match error:
        case ToolRetryError(tool_retry=part) | ToolFailedError(tool_failed=part):  # of another call
            return part.content if isinstance(part.content, str) else str(error)
        case ModelRetry(message=message) | ToolFailed(message=message):
            return message


def _explain(error: Exception) -> str:
    """What the model may know of a failed request: no address, no key, no body."""
    if isinstance(error, httpx2.InvalidURL):
        return "That is no URL."
    if not isinstance(error, httpx2.HTTPError):
        return "The service answered something that could not be read."
    if isinstance(error, httpx2.HTTPStatusError):
        return f"The service answered with status {error.response.status_code}."
    if isinstance(error, httpx2.TimeoutException):
        return "The service did not answer in time."
    return "The service could not be reached."

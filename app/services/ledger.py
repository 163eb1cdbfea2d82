"""The tool ledger: what became of each tool call, so that none that counts is made twice."""

import asyncio
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import httpx2
from pydantic import TypeAdapter, ValidationError
from pydantic_ai import (
    DeferredToolResults,
    ModelRetry,
    RunContext,
    ToolDenied,
    ToolFailed,
    ToolReturn,
)
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.exceptions import ToolFailedError, ToolRetryError
from pydantic_ai.messages import ToolCallPart
from pydantic_ai.tools import DeferredToolApprovalResult, ToolDefinition
from pydantic_core import to_json
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.core.json import dump
from app.deps import Deps, call_key
from app.models import ToolCall
from app.services.journal import INSERT_CALL, SETTLE_CALL, Journal, Rows, RunLog
from app.services.outbound import OutboundRefused
from tools import declared

SETTLED = ("done", "retry", "failed", "unknown")

DENIED = "The person who was asked did not agree to this call."

EXPIRED = "The person who was asked did not answer in time, so this call was not made."

UNKNOWN = (
    "outcome unknown: the process stopped during this call, so it may or may not have taken "
    "effect. It was not repeated. Say so, and check before trying again."
)

RICH = "ToolReturn "  # before the JSON of a result that is more than a value

Key = tuple[int, str]  # the number of the message that asked, and the call's id


async def recorded(connection: AsyncConnection, run_id: str) -> dict[Key, ToolCall]:
    """All calls of the run that were begun."""
    rows = await connection.execute(select(ToolCall).where(ToolCall.run_id == run_id))
    return {(row["step"], row["call_id"]): ToolCall(**row) for row in rows.mappings()}


def call_key_of(run_id: str, step: int, call_id: str, args: dict[str, Any]) -> str:
    """The same for the same call, also after a crash; different for any other."""
    canonical = json.dumps(args, sort_keys=True, default=lambda value: to_json(value).decode())
    return hashlib.sha256(f"{run_id}\n{step}\n{call_id}\n{canonical}".encode()).hexdigest()[:40]


@dataclass(kw_only=True)
class Ledger(AbstractCapability[Deps]):
    """Commits each call before it is made and again with its result, and replays after a crash.

    A call that was in flight when a process died is repeated, under the same idempotency key, if
    the tool is `read` or `idempotent`; a `once` call becomes "outcome unknown".
    """

    journal: Journal
    log: RunLog
    turn: asyncio.Semaphore  # so many calls are made at a time
    known: dict[Key, ToolCall] = field(default_factory=dict[Key, ToolCall])
    step: int = 0  # number of the run's message that holds the calls now made

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
                call.status, call.result = "denied", EXPIRED
                row = {"run_id": call.run_id, "step": call.step, "call_id": call.call_id}
                await self._settle(row, "denied", EXPIRED)

    async def wrap_tool_execute(
        self,
        ctx: RunContext[Deps],
        *,
        call: ToolCallPart,
        tool_def: ToolDefinition,
        args: dict[str, Any],
        handler: Any,
    ) -> Any:
        async with self.turn:
            return await self._execute(ctx, call, tool_def, args, handler)

    async def _execute(
        self,
        ctx: RunContext[Deps],
        call: ToolCallPart,
        tool_def: ToolDefinition,
        args: dict[str, Any],
        handler: Any,
    ) -> Any:
        says = declared(tool_def)
        if says.needs and not ctx.deps.caller.may(says.needs):
            raise ToolFailed(f"The caller lacks the scope {says.needs!r}.")
        found = self.known.get((self.step, call.tool_call_id))
        if found and found.status in SETTLED:
            return _replay(found)
        row = self._row(call, args, "started")
        if found and found.status == "started" and says.effect == "once":
            await self._settle(row, "unknown", UNKNOWN)
            raise ToolFailed(UNKNOWN)
        if found and found.status == "approved":
            await self._settle(row, "started", None)
        written = found is not None
        if not written and says.effect != "read":  # of a read, its result alone is written
            await self.journal.commit([(INSERT_CALL, row)], self.log)
            written = True
        try:
            result = await self._call(row["key"], args, handler)
        except (ModelRetry, ToolRetryError, ToolFailed, ToolFailedError) as error:
            if says.effect == "once" and _may_have_happened(error):
                await self._settle(row, "unknown", UNKNOWN)
                raise ToolFailed(UNKNOWN) from error
            if isinstance(error, (ToolFailed, ToolFailedError)):
                await self._settle(row, "failed", _message(error), written=written)
                raise
            await self._settle(row, "retry", _message(error), written=written)
            raise
        if isinstance(result, ToolReturn):
            result_json = RICH + dump(_returns(), cast(ToolReturn[Any], result))
        else:
            result_json = to_json(result, fallback=str).decode()
        await self._settle(row, "done", result_json, written=written)
        return cast(Any, result)

    async def _call(self, key: str, args: dict[str, Any], handler: Any) -> Any:
        """Makes the call under its key. A failed HTTP call is something the model can act on."""
        token = call_key.set(key)
        try:
            return await handler(args)
        except FAILURES as error:
            raise ToolFailed(_explain(error)) from error
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
        if not written:
            await self.journal.commit(
                [(INSERT_CALL, {**row, "status": status, "result": result})], self.log
            )
            return
        settled = {
            "of_run": row["run_id"],
            "of_step": row["step"],
            "of_call": row["call_id"],
            "now": status,
            "outcome": result,
        }
        await self.journal.commit([(SETTLE_CALL, settled)], self.log)


def _decision(call: ToolCall) -> bool | DeferredToolApprovalResult:
    return ToolDenied(call.result or DENIED) if call.status == "denied" else True


# What a service does wrong, or a model with a URL: something that the model can act on.
FAILURES = (httpx2.HTTPError, httpx2.InvalidURL, ValidationError, json.JSONDecodeError)


def _may_have_happened(error: Exception) -> bool:
    """Whether the call was cut off where nobody can tell how far it came."""
    if isinstance(error, ToolRetryError):
        return _message(error).startswith("Timed out")  # as PydanticAI says of a tool's time-out
    cause = error.__cause__
    return isinstance(cause, httpx2.TransportError) and not isinstance(
        cause, (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, OutboundRefused)
    )


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


def _message(error: Exception) -> str:
    match error:
        case ToolRetryError(tool_retry=part):
            return part.content if isinstance(part.content, str) else str(error)
        case ToolFailedError(tool_failed=part):
            return str(part.content)
        case ModelRetry(message=message) | ToolFailed(message=message):
            return message
        case _:
            return str(error)


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

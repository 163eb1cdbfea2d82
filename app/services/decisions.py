"""What a person decides on calls that an agent asks for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import and_, exists, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from agents import all_agents
from app.core.errors import Conflict, Forbidden, Invalid
from app.core.security import Caller
from app.db.base import epoch_now
from app.models import Run, ToolCall
from tools import declared

MAX_DECISIONS = 100


@dataclass(frozen=True, slots=True)
class Decision:
    """A person's answer to the question whether a call may be made.

    `key` is the ledger's: it stands for this run, this call and these arguments.
    """

    key: str
    approve: bool
    reason: str | None = None


async def decide(
    connection: AsyncConnection, caller: Caller, decisions: Sequence[Decision]
) -> tuple[Run, list[tuple[Decision, str]]]:
    """Answers questions that one run waits for; once all are answered, it is queued.

    Returns the run, and the answers that are new, each with its tool's name. The same answer once
    more is no other one. Raises Conflict for what nobody asks the caller (any more), Forbidden,
    and Invalid for too many: then no answer counts.
    """
    if len(decisions) > MAX_DECISIONS:
        raise Invalid(f"At most {MAX_DECISIONS} decisions are made at once.", status=400)
    given = {decision.key: decision for decision in decisions if decision.key.isalnum()}
    asked = (
        select(ToolCall.run_id, ToolCall.key, ToolCall.tool, ToolCall.status, ToolCall.decided)
        .join(Run, Run.id == ToolCall.run_id)
        .where(ToolCall.key.in_(given), Run.owner_id == caller.user_id, Run.deleted_at.is_(None))
    )
    runs = list({call.run_id for call in await connection.execute(asked)})
    # Locked first: of two who decide at once, the second sees what the first has answered.
    is_awaited = and_(Run.status == "waiting", Run.lease_until > epoch_now())
    locked = await connection.execute(
        select(Run, is_awaited.label("is_awaited"))
        .where(Run.id.in_(runs if len(runs) == 1 else ()))
        .with_for_update()
    )
    row = dict(locked.mappings().one_or_none() or {"is_awaited": False})
    is_waiting = row.pop("is_awaited")
    calls = list(await connection.execute(asked)) if row else []
    fresh = [call for call in calls if is_waiting and call.status == "asked"]
    same = [call for call in calls if call.decided and _is_made(given[call.key], call)]
    if not calls or len(fresh) + len(same) != len(decisions):
        raise Conflict(
            "No such decision is awaited: it was made, its time is over, or nobody asked.",
            code="not_awaited",
        )
    for call in fresh:
        decision = given[call.key]
        if decision.approve:
            check_may(caller, row["program"], call.tool)
        await connection.execute(
            update(ToolCall)
            .where(ToolCall.run_id == call.run_id, ToolCall.key == call.key)
            .values(
                status="approved" if decision.approve else "denied",
                decided=True,
                result=None if decision.approve else decision.reason,
            )
        )
    if fresh:
        unanswered = exists().where(ToolCall.run_id == runs[0], ToolCall.status == "asked")
        await connection.execute(
            update(Run)
            .where(Run.id == runs[0], ~unanswered)
            .values(status="queued", lease_until=None)
        )
    return Run(**row), [(given[call.key], call.tool) for call in fresh]


def _is_made(decision: Decision, call: Any) -> bool:
    """Whether the call that was decided on was decided so."""
    return decision.approve == (call.status != "denied")


def check_may(caller: Caller, program: str, tool: str) -> None:
    """Raises Forbidden: nobody lets a call happen that they could not make."""
    listed = all_agents().get(program)
    item = listed.tools.get(tool) if listed else None
    needs = declared(item.tool_def).needs if item else None
    if needs and not caller.may(needs):
        raise Forbidden(f"To let {tool!r} be called takes the scope {needs!r}.")

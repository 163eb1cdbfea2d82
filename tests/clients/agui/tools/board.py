"""Tools that change what the frontend shows, and one that a person has to agree to."""

from typing import Any

from pydantic_ai import RunContext, ToolReturn

from app.deps import Deps
from tools import tool


@tool(effect="read")
async def plan(steps: list[str]) -> ToolReturn[str]:
    """Writes a new plan on the board.

    Args:
        steps: What to do, in order.
    """
    shown = {"type": "STATE_SNAPSHOT", "snapshot": {"steps": steps}}
    return ToolReturn(f"{len(steps)} steps", metadata=shown)


@tool(effect="read")
async def replan(step: str) -> ToolReturn[str]:
    """Adds a step to the plan on the board.

    Args:
        step: What to do last.
    """
    added: dict[str, Any] = {"op": "add", "path": "/steps/-", "value": step}
    shown = {"type": "STATE_DELTA", "delta": [added]}
    return ToolReturn("added", metadata=[shown, {"type": "other"}])


@tool(effect="once", approve=True)
async def pay(ctx: RunContext[Deps], amount: int) -> str:
    """Pays.

    Args:
        amount: Whole euros.
    """
    reply = await ctx.deps.http.post(f"{ctx.deps.settings.weather_api_url}/effects/pay-{amount}")
    reply.raise_for_status()
    return f"paid {amount}"

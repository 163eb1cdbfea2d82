"""Effects that a tool server counts, behind a person's approval."""

from pydantic_ai import RunContext

from app.deps import Deps
from tools import tool


@tool(effect="once", approve=True)
async def pay(ctx: RunContext[Deps], amount: int) -> str:
    """Pays.

    Args:
        amount: Whole euros.
    """
    reply = await ctx.deps.http.post(f"{ctx.deps.settings.weather_api_url}/effects/pay-{amount}")
    reply.raise_for_status()
    return f"paid {amount}"

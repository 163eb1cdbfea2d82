"""One tool of each effect, counted where it is felt."""

from pydantic_ai import RunContext

from app.deps import Deps
from tools import tool


async def _have(ctx: RunContext[Deps], effect: str) -> str:
    url = f"{ctx.deps.settings.weather_api_url}/effects/{effect}"
    (await ctx.deps.http.post(url)).raise_for_status()
    return "done"


@tool(effect="read")
async def look(ctx: RunContext[Deps]) -> str:
    """Looks."""
    return await _have(ctx, "look")


@tool(effect="idempotent")
async def keep(ctx: RunContext[Deps]) -> str:
    """Puts something where it belongs."""
    return await _have(ctx, "keep")


@tool(effect="once")
async def pay(ctx: RunContext[Deps]) -> str:
    """Pays."""
    return await _have(ctx, "pay")

"""Tools that do what a test needs to see."""

import asyncio
from typing import Any

from httpx2 import HTTPStatusError
from pydantic_ai import RunContext, ToolFailed
from pydantic_ai.models import Model
from sqlalchemy.exc import IntegrityError

from app.deps import Deps
from tools import tool


@tool(effect="once", needs="orders:write")
async def pay(ctx: RunContext[Deps], amount: int) -> str:
    """Pays, after a look at the rate.

    Args:
        amount: In euros.
    """
    shop = ctx.deps.settings.weather_api_url
    (await ctx.deps.http.get(f"{shop}/effects/rate")).raise_for_status()
    paid = await ctx.deps.http.post(f"{shop}/effects/pay", json={"amount": amount})
    paid.raise_for_status()
    return ctx.deps.idempotency_key


@tool(effect="idempotent")
async def save(ctx: RunContext[Deps], text: str) -> str:
    """Saves a note.

    Args:
        text: The note.
    """
    shop = ctx.deps.settings.weather_api_url
    (await ctx.deps.http.put(f"{shop}/effects/save", json={"text": text})).raise_for_status()
    return ctx.deps.idempotency_key


@tool(effect="idempotent", approve=True)
async def erase(ctx: RunContext[Deps]) -> str:
    """Erases everything."""
    return "erased"


@tool(effect="read", timeout=0.2)
async def dawdle() -> str:
    """Takes forever."""
    await asyncio.Event().wait()
    return "never"


@tool(effect="once", timeout=0.2)
async def order(ctx: RunContext[Deps]) -> str:
    """Orders, and waits in vain to be told the number."""
    await ctx.deps.http.post(f"{ctx.deps.settings.weather_api_url}/effects/order")
    await asyncio.Event().wait()
    return "never"


@tool(effect="once")
async def buy(ctx: RunContext[Deps]) -> Any:
    """Buys, and reads the bill."""
    paid = await ctx.deps.http.post(f"{ctx.deps.settings.weather_api_url}/effects/buy")
    paid.raise_for_status()
    return paid.json()


@tool(effect="once")
async def book(ctx: RunContext[Deps]) -> str:
    """Books, and says itself what went wrong."""
    booked = await ctx.deps.http.post(f"{ctx.deps.settings.weather_api_url}/effects/book")
    try:
        booked.raise_for_status()
    except HTTPStatusError as error:
        raise ToolFailed("The shop is closed.") from error
    return "booked"


@tool(effect="read")
async def fetch(ctx: RunContext[Deps], url: str) -> int:
    """The status of a page."""
    return (await ctx.deps.http.get(url, follow_redirects=True)).status_code


@tool(effect="read")
async def stumble() -> str:
    """Has a bug."""
    raise RuntimeError("canary: the internals of a bug")


@tool(effect="read")
async def collide() -> str:
    """Has a bug that looks like a database's."""
    raise IntegrityError("INSERT", {}, Exception("canary: a duplicate"))


@tool(effect="read")
async def hang_up() -> str:
    """Has a bug that looks like a lost connection."""
    raise ConnectionResetError("canary: somebody's socket")


@tool(effect="idempotent")
async def delegate(ctx: RunContext[Deps], task: str) -> str:
    """Has the agent do a task in a run of its own.

    Args:
        task: What to do.
    """
    from agents.tester import agent

    assert isinstance(ctx.model, Model)
    return (await agent.run(task, model=ctx.model, deps=ctx.deps)).output


async def shout(text: str) -> str:
    """Says it louder.

    Args:
        text: What to say.
    """
    return f"{text.upper()}!"


def whisper(text: str) -> str:
    """Says it quietly, without async."""
    return f"({text.lower()})"


def _helper() -> str:
    return "no tool"

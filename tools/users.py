"""The user service as tools, with the caller's own rights."""

from pydantic import BaseModel, ConfigDict
from pydantic_ai import ModelRetry, RunContext, ToolFailed

from app.core.errors import AppError
from app.deps import Deps
from app.schemas.user import UserUpdate
from tools import tool


class Account(BaseModel):
    """What the service knows of a user."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    name: str
    email: str


@tool(effect="read", needs="users:read")
async def get_my_account(ctx: RunContext[Deps]) -> Account:
    """The account of the person who asks: who they are, their name and e-mail address."""
    async with ctx.deps.users() as users:
        return Account.model_validate(await users.get_own(ctx.deps.caller))


@tool(effect="idempotent", needs="users:write")
async def rename_me(ctx: RunContext[Deps], name: str) -> Account:
    """Changes the name of the person who asks; only when they ask for it.

    Args:
        name: The new name, e.g. "Ada Lovelace".
    """
    try:
        changes = UserUpdate(name=name)
    except ValueError as error:
        raise ModelRetry("A name has 1 to 100 characters.") from error
    async with ctx.deps.users() as users:
        return Account.model_validate(await users.update_own(ctx.deps.caller, changes))


@tool(effect="read", needs="admin")
async def search_users(ctx: RunContext[Deps], text: str) -> list[Account]:
    """Finds users by a part of their name or e-mail address; at most 20.

    Args:
        text: What to look for, e.g. "ada".
    """
    try:
        async with ctx.deps.users() as users:
            found = await users.search(ctx.deps.caller, text)
    except AppError as error:
        raise ToolFailed(error.message) from error
    return [Account.model_validate(user) for user in found]

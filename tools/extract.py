"""Structured extraction as a tool: the engine of `/v1/extractions`, for agents."""

from typing import Any

from pydantic_ai import ModelRetry, RunContext, ToolFailed

from app.core.errors import AppError, NotFound
from app.deps import Deps
from tools import tool


@tool(effect="read", timeout=120)
async def extract_document(ctx: RunContext[Deps], text: str, schema: str) -> Any:
    """Extracts a document of a known schema out of a long text that the person pasted.

    Args:
        text: The text, word for word.
        schema: The schema's name, e.g. "invoice" or "contact".
    """
    try:
        return await ctx.deps.extract(text, schema)
    except NotFound as error:
        raise ModelRetry(error.message) from error
    except AppError as error:
        raise ToolFailed(error.message) from error

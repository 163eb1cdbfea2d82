"""What a tool sees, for testing one without a model."""

from contextlib import asynccontextmanager
from typing import Any

import httpx2
from pydantic_ai import RunContext
from pydantic_ai.models.test import TestModel
from pydantic_ai.usage import RunUsage

from app.config import Settings
from app.core.security import EVERYTHING, Caller
from app.deps import Deps


@asynccontextmanager
async def no_users():
    raise AssertionError("This tool was not expected to use the user service.")
    yield


async def no_extraction(text: str, schema: str) -> Any:
    raise AssertionError("This tool was not expected to extract.")


def context(transport: httpx2.AsyncBaseTransport) -> RunContext[Deps]:
    """A run's context whose HTTP requests go to this transport."""
    deps = Deps(
        caller=Caller.of(1, EVERYTHING),
        users=no_users,
        http=httpx2.AsyncClient(transport=transport),
        settings=Settings(_env_file=None),  # pyright: ignore[reportCallIssue]
        run_id="test",
        extract=no_extraction,
    )
    return RunContext(deps=deps, model=TestModel(), usage=RunUsage())

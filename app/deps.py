"""What a run hands to its tools. A tool knows this, and nothing of requests or agents."""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import httpx2

from app.config import Settings
from app.core.security import Caller
from app.services.user import UserService

# Set around each tool call, and read by `Deps` and by the outbound client: tools run in
# parallel, and each call has a key of its own.
call_key: ContextVar[str | None] = ContextVar("call_key", default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deps:
    """Everything a tool may touch.

    caller: who asks. Rights come from here, never from the model.
    users: opens the user service for one unit of work: `async with ctx.deps.users() as users:`.
    http: the guarded client; inside a call it sends `Idempotency-Key` with all but GET.
    settings: base URLs and keys of external APIs.
    extract: a text as a document of the named schema. Raises AppError.
    """

    caller: Caller
    users: Callable[[], AbstractAsyncContextManager[UserService]]
    http: httpx2.AsyncClient
    settings: Settings
    run_id: str
    extract: Callable[[str, str], Awaitable[Any]]

    @property
    def idempotency_key(self) -> str:
        """The same for every attempt at this one tool call, also after a crash."""
        key = call_key.get()
        if key is None:
            raise RuntimeError("There is an idempotency key only inside a tool call.")
        return key

"""Work that a cancellation must not cut in two, and work that must heed one."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

AGAIN = 0.2  # seconds in which a task heeds its cancellation


async def unbroken(work: Coroutine[Any, Any, T]) -> T:
    """Does the work to its end. Where its caller is cancelled meanwhile, that is raised once the
    work is done, whatever came of it."""
    task = asyncio.create_task(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # seen; the cancellation says more
        raise


async def end(task: "asyncio.Task[Any]") -> None:
    """Cancels the task until it has ended: a database's driver may take a cancellation for a
    failure, which the task survives."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=AGAIN)

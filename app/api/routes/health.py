import asyncio
import logging

from fastapi import APIRouter, Request
from sqlalchemy import select

from app.api.deps import Db
from app.core.errors import Unavailable

PATIENCE = 2  # seconds

logger = logging.getLogger(__name__)

router = APIRouter(prefix="/health", tags=["health"])


@router.get("")
async def health() -> dict[str, str]:
    """Whether the process answers at all; never asks the database."""
    return {"status": "ok"}


@router.get("/ready", responses={503: {"description": "Send requests elsewhere for now."}})
async def ready(request: Request, db: Db) -> dict[str, str]:
    """Whether to send requests here: the database answers, and the process is not stopping."""
    if getattr(request.app.state, "stopping", False):
        raise Unavailable("This process is stopping.")
    try:
        async with asyncio.timeout(PATIENCE):
            await db.execute(select(1))
    except Exception as error:
        logger.warning("not ready: %s", type(error).__name__)
        raise Unavailable("The database does not answer.") from error
    return {"status": "ready"}

from fastapi import APIRouter, Request

from app.core.errors import Unavailable
from app.services.readiness import Readiness
from app.services.refusals import Stopping

router = APIRouter(prefix="/health", tags=["health"])


@router.get("")
async def health() -> dict[str, str]:
    """Whether the process answers at all; never asks the database."""
    return {"status": "ok"}


@router.get("/ready", responses={503: {"description": "Send requests elsewhere for now."}})
async def ready(request: Request) -> dict[str, str]:
    """Whether to send requests here: the database answers and can be written to, and the process
    is not stopping."""
    if request.app.state.stopping:
        raise Stopping
    readiness: Readiness = request.app.state.readiness
    if trouble := await readiness.trouble():
        raise Unavailable(trouble)
    return {"status": "ready"}

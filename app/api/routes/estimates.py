"""What an extraction or a job would take."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request

from app.api.deps import CallerDep
from app.schemas.evaluation import Estimate, EstimateRequest
from app.services.estimates import Estimates

router = APIRouter(prefix="/v1/extractions", tags=["extractions"])


async def get_estimates(request: Request) -> Estimates:
    return request.app.state.estimates


@router.post("/estimate")
async def estimate(
    body: EstimateRequest,
    caller: CallerDep,
    estimates: Annotated[Estimates, Depends(get_estimates)],
) -> Estimate:
    """Tokens, calls and a range of costs, of an extraction or a job; no model is asked."""
    return await estimates.estimate(caller, body)

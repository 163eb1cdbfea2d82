"""Prometheus asks here."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from app.api.deps import check_scraper
from app.core import metrics, siblings
from app.services import prices
from app.services.operations import Operations

router = APIRouter(tags=["health"])


async def get_operations(request: Request) -> Operations:
    return request.app.state.operations


@router.get("/metrics", dependencies=[Depends(check_scraper)])
async def show(operations: Annotated[Operations, Depends(get_operations)]) -> Response:
    """Prometheus's text format; for administrators, and their keys with the scope `metrics`."""
    from prometheus_client import CONTENT_TYPE_LATEST

    text = metrics.render(siblings.counted(), await operations.gauges(), prices.total)
    return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})

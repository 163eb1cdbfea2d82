"""Structured extraction: a valid answer, or an error that carries every attempt."""

from typing import Annotated, Any

from fastapi import APIRouter, Header, Request

from app.api.deps import CallerDep, ExtractionsDep, RunsDep
from app.core.errors import Conflict
from app.models import Run
from app.schemas.extraction import (
    Attempt,
    ExtractionRequest,
    ExtractionResponse,
    ExtractionSchema,
    Usage,
)
from app.services.journal import RunEnded
from app.services.runs import Idempotency, Runs, run_failed

router = APIRouter(prefix="/v1/extractions", tags=["extractions"])


@router.post("")
async def extract(
    request: Request,
    body: ExtractionRequest,
    caller: CallerDep,
    extractions: ExtractionsDep,
    runs: RunsDep,
    idempotency_key: Annotated[str | None, Header(max_length=255)] = None,
) -> ExtractionResponse:
    """Text in, a document of the schema out."""
    idempotency = (
        Idempotency.of("extractions", idempotency_key, await request.body())
        if idempotency_key
        else None
    )
    return await respond(await extractions.accept(caller, body, idempotency), runs)


@router.get("/{extraction_id}")
async def get_extraction(
    extraction_id: str, caller: CallerDep, runs: RunsDep
) -> ExtractionResponse:
    """The answer, once there is one; a failed extraction answers with its error again."""
    return await respond(await runs.get(caller, extraction_id, "extraction"), runs)


async def respond(run: Run, runs: Runs) -> ExtractionResponse:
    event = (await runs.wait(run))[-1].event
    assert isinstance(event, RunEnded)
    if event.status == "cancelled":
        raise Conflict("The extraction was stopped.", code="run_cancelled")
    usage = usage_of(event.usage)
    if event.status != "completed":
        error = run_failed(event.error or {})
        error.details |= {
            "attempts": (event.error or {}).get("attempts", []),
            "usage": usage.model_dump(),
        }
        raise error
    output: dict[str, Any] = event.output
    return ExtractionResponse(
        id=run.id,
        status="completed",
        data=output["data"],
        attempts=[Attempt.model_validate(attempt) for attempt in output["attempts"]],
        usage=usage,
        model=output["model"],
        schema_=ExtractionSchema.model_validate(output["schema"]),
    )


def usage_of(usage: dict[str, int]) -> Usage:
    sent, received = usage.get("input_tokens", 0), usage.get("output_tokens", 0)
    return Usage(prompt_tokens=sent, completion_tokens=received, total_tokens=sent + received)

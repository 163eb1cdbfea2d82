"""Structured extraction: a valid answer, or an error that carries every attempt."""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from app.api.deps import CallerDep, ExtractionsDep, RunsDep, idempotent
from app.api.extraction_events import encode, encoded
from app.api.sse import EventStream
from app.api.view import HEADERS, render
from app.core.errors import AppError, Conflict, Invalid, error_body
from app.core.json import dump_exact, load_exact
from app.core.security import Caller
from app.models import Run
from app.schemas.extraction import (
    Extracted,
    ExtractionAccepted,
    ExtractionRequest,
    ExtractionResponse,
    ExtractionSpec,
    Usage,
)
from app.schemas.run import Options
from app.services.branches import is_open
from app.services.extraction import extracted_of
from app.services.extractor import target_of
from app.services.new_run import Idempotency
from app.services.partials import Partial
from app.services.refusals import run_failed
from app.services.run_log import RunEnded
from app.services.runs import Runs

router = APIRouter(prefix="/v1/extractions", tags=["extractions"])

KIND = "extraction"
Json = dict[str, Any]


async def wants_async(request: Request) -> bool:
    """Whether the client does not want to wait (`Prefer: respond-async`, RFC 7240)."""
    said = ",".join(request.headers.getlist("prefer")).split(",")
    return "respond-async" in {each.partition(";")[0].strip().lower() for each in said}


AsyncDep = Annotated[bool, Depends(wants_async)]


def accepted(run: Run, path: str) -> JSONResponse:
    """202: the run goes on, and `path` is where it can be asked for."""
    status = "queued" if run.status == "queued" else "running"
    return JSONResponse(
        ExtractionAccepted(id=run.id, status=status).model_dump(),
        status_code=202,
        headers={"Location": f"{path}/{run.id}", "Preference-Applied": "respond-async"},
    )


@router.post("", response_model=ExtractionResponse, responses={202: {"model": ExtractionAccepted}})
async def extract(
    request: Request,
    body: ExtractionRequest,
    caller: CallerDep,
    extractions: ExtractionsDep,
    runs: RunsDep,
    is_async: AsyncDep,
    idempotency: Annotated[Idempotency | None, idempotent("extractions")],
) -> Response:
    """Text in, a document of the schema out: at once, as a stream, or later.

    With `Prefer: respond-async` the answer is 202 and an id. A plain stream (`stream: true`) stops
    the extraction when its reader leaves.
    """
    run = await runs.repeated(caller, idempotency)
    run = run or await extractions.accept(caller, body, idempotency)
    if is_async:
        return accepted(run, "/v1/extractions")
    alone = idempotency is None  # with a key, the same request gets the answer
    if body.stream:
        leave = partial(runs.cancel, caller, run.id)
        return _stream(request, run, runs, leave=leave, alone=alone)
    event = (await runs.wait(run, alone=alone))[-1].event
    assert isinstance(event, RunEnded)
    options = Options.model_validate_json(run.options)
    return respond(run.id, event.status, event.output, event.error, event.usage, options)


@router.get("/{extraction_id}", response_model=ExtractionResponse | ExtractionAccepted)
async def get_extraction(extraction_id: str, caller: CallerDep, runs: RunsDep) -> Response:
    """The answer, or how far it is; a failed extraction answers with its error again."""
    run = await runs.get(caller, extraction_id, KIND)
    if is_open(run):
        return JSONResponse({"id": run.id, "status": run.status})
    return respond(*ended(run))


@router.get("/{extraction_id}/events")
async def follow_extraction(
    request: Request,
    extraction_id: str,
    caller: CallerDep,
    runs: RunsDep,
    last_event_id: Annotated[int | None, Header(ge=0)] = None,
) -> Response:
    """All that has happened and will happen, above the event `Last-Event-ID`."""
    run = await runs.get(caller, extraction_id, KIND)
    if last_event_id:
        await runs.check_kept(run)
    known = len(await runs.entries(run))
    if last_event_id is not None and last_event_id > known:
        raise Invalid(
            f"The last event so far is {known}; none is numbered {last_event_id}.",
            param="Last-Event-ID",
            status=400,
        )
    return _stream(request, run, runs, after=last_event_id)


@router.get("/{extraction_id}/view", response_class=HTMLResponse)
async def view_extraction(extraction_id: str, caller: CallerDep, runs: RunsDep) -> Response:
    """A page that shows where in the text each value stands."""
    run = await runs.get(caller, extraction_id, KIND)
    if is_open(run):
        raise Conflict("The extraction goes on; look again when it has ended.", code="not_ended")
    _, status, output, error, usage, options = ended(run)
    if status != "completed":
        raise failure_of(run.id, status, error, usage)
    return HTMLResponse(render(run.id, options.text, extracted_of(output)), headers=HEADERS)


@router.post("/{extraction_id}/cancel")
async def cancel_extraction(extraction_id: str, caller: CallerDep, runs: RunsDep) -> dict[str, str]:
    """Stops it. What has ended stays as it is."""
    await _own(caller, extraction_id, runs)
    run = await runs.cancel(caller, extraction_id, KIND)
    if is_open(run):
        await runs.wait(run)
        run = await runs.get(caller, extraction_id, KIND)
    return {"id": run.id, "status": run.status}


@router.delete("/{extraction_id}", status_code=204)
async def delete_extraction(extraction_id: str, caller: CallerDep, runs: RunsDep) -> None:
    """Stops and forgets it; nothing is answered from it any more."""
    await _own(caller, extraction_id, runs)
    await runs.delete(caller, extraction_id, KIND)


async def _own(caller: Caller, extraction_id: str, runs: Runs) -> None:
    """Raises Conflict for an item of a job: others may have their answer from it."""
    run = await runs.get(caller, extraction_id, KIND)
    if run.batch_id:
        raise Conflict(
            f"This is an item of the job {run.batch_id!r}; stop or delete that.", code="job_item"
        )


Ended = tuple[str, str, Any, Json | None, dict[str, int], Options]


def ended(run: Run) -> Ended:
    """What `respond` needs of a run that is over."""
    output, error, usage = (
        None if text is None else load_exact(text) for text in (run.output, run.error, run.usage)
    )
    return run.id, run.status, output, error, usage or {}, Options.model_validate_json(run.options)


def respond(
    run_id: str,
    status: str,
    output: Any,
    error: Json | None,
    usage: dict[str, int],
    options: Options,
) -> Response:
    """The answer as it goes over the wire. Raises what the extraction failed with."""
    if status != "completed":
        raise failure_of(run_id, status, error, usage)
    body = answer_of(run_id, extracted_of(output), options)
    return Response(dump_exact(body), media_type="application/json")


def answer_of(run_id: str, found: Extracted, options: Options) -> Json:
    """`ExtractionResponse`, its numbers with all their digits."""
    text = {"text": options.text} if options.echo.get("of_file") else {}
    return {"id": run_id, **found.model_dump(), **text}


def failure_of(
    run_id: str, status: str, error: Mapping[str, Any] | None, usage: dict[str, int]
) -> AppError:
    """What an extraction that did not complete answers."""
    if status == "cancelled":
        failed: AppError = Conflict(
            "The extraction was stopped; to begin it anew send another Idempotency-Key, or none.",
            code="run_cancelled",
        )
    else:
        failed = run_failed(error or {}, acted=False)
        kept = ("attempts", "pointer", "retryable", "transport_retries")
        failed.details |= {name: (error or {})[name] for name in kept if name in (error or {})}
    failed.details |= {"id": run_id, "usage": Usage.of(usage).model_dump()}
    return failed


def _stream(
    request: Request,
    run: Run,
    runs: Runs,
    *,
    after: int | None = None,
    leave: Any = None,
    alone: bool = False,
) -> EventStream:
    options = Options.model_validate_json(run.options)
    spec = options.extraction or ExtractionSpec()
    chunking = spec.options.chunking
    is_chunked = chunking and len(options.text) > chunking.max_chars

    def growing() -> Partial:
        target = target_of(spec)
        return Partial(target.schema, target.envelope)

    def completed(event: RunEnded) -> Json:
        return answer_of(run.id, extracted_of(event.output), options)

    def body_of(error: AppError) -> Json:
        return {"error": error_body(error, request.scope)}

    def failed(event: RunEnded) -> Json:
        return body_of(failure_of(run.id, event.status, event.error, event.usage))

    def broken_off(error: AppError) -> bytes:
        error.details["id"] = run.id
        return encoded("extraction.failed", body_of(error))

    frames = encode(
        runs.follow(run, alone=alone),
        run_id=run.id,
        # What OpenAI's strict subset makes of a schema is not how its document grows.
        partial=growing if options.stream and spec.mode != "strict" else None,
        list_path=chunking.list_path if chunking and is_chunked else None,
        after=after,
        completed=completed,
        failed=failed,
    )
    return EventStream(frames, leave=leave, failed=broken_off)

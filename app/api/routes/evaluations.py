"""Evaluations: golden documents against a schema and a model."""

from typing import Annotated, Any, cast

from fastapi import APIRouter, Depends, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from pydantic_core import from_json
from starlette.datastructures import UploadFile

from app.api.bodies import MAX_VALUES
from app.api.deps import CallerDep, IdempotencyKey, RunsDep
from app.api.routes.extractions import AsyncDep, accepted, ended, failure_of
from app.core.errors import AppError, Conflict, Invalid
from app.schemas.evaluation import EvaluationAccepted, EvaluationReport, EvaluationRequest
from app.services.branches import is_open
from app.services.evaluations import Evaluations
from app.services.new_run import Idempotency
from app.services.run_log import RunEnded

router = APIRouter(prefix="/v1/evaluations", tags=["evaluations"])

KIND = "evaluation"
BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "description": "Settings as in `POST /v1/extractions`, and "
                "`items: [{text, expected, name?}]`.",
                "required": ["items"],
            }
        },
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file", "request"],
                "properties": {
                    "file": {
                        "type": "string",
                        "format": "binary",
                        "description": "One item a line (JSONL).",
                    },
                    "request": {"type": "string", "description": "The settings, in JSON."},
                },
            }
        },
    },
}


async def get_evaluations(request: Request) -> Evaluations:
    return request.app.state.evaluations


EvaluationsDep = Annotated[Evaluations, Depends(get_evaluations)]


async def read_request(request: Request) -> EvaluationRequest:
    """The body: JSON, or a form with the items as JSONL in `file`, and the rest in `request`."""
    if request.headers.get("content-type", "").lower().startswith("multipart/"):
        async with request.form(max_files=2, max_fields=2) as form:
            parts = {name: await _bytes(form.get(name), name) for name in ("file", "request")}
        fields = _json(parts["request"], "request")
        if not isinstance(fields, dict) or "items" in fields:
            raise Invalid("`request` is one JSON object, its items are in `file`.", param="request")
        _check_size(parts["file"], "file")  # as a whole: each line may be small
        lines = enumerate(parts["file"].splitlines(), 1)
        items = [_json(line, f"line {number} of file") for number, line in lines if line.strip()]
        body: Any = {**cast(dict[str, Any], fields), "items": items}
    else:
        body = _json(await request.body(), "body")
    try:
        return EvaluationRequest.model_validate(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False)
        found = [{**each, "loc": ("body", *each["loc"])} for each in errors]
        raise RequestValidationError(found, body=body) from error


async def _bytes(part: UploadFile | str | None, name: str) -> bytes:
    if part is None:
        raise Invalid(f"The form has no part {name!r}.", param=name)
    return part.encode() if isinstance(part, str) else await part.read()


def _check_size(data: bytes, name: str) -> None:
    if sum(data.count(mark) for mark in b",[{") > MAX_VALUES:
        raise AppError(
            f"The {name} has more than {MAX_VALUES} values; send less.",
            status=413,
            code="too_large",
        )


def _json(data: bytes, name: str) -> Any:
    _check_size(data, name)
    try:
        return from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise Invalid(f"The {name} is not valid JSON: {error}.") from error


@router.post(
    "",
    response_model=EvaluationReport,
    responses={202: {"model": EvaluationAccepted}},
    openapi_extra={"requestBody": BODY},
)
async def evaluate(
    caller: CallerDep,
    body: Annotated[EvaluationRequest, Depends(read_request)],
    evaluations: EvaluationsDep,
    runs: RunsDep,
    is_async: AsyncDep,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """How well a model finds what is known to be in some texts.

    It goes on without its client; with `Prefer: respond-async` the answer is 202 and an id.
    """
    idempotency = (
        Idempotency.of("evaluations", idempotency_key, body.model_dump_json().encode())
        if idempotency_key
        else None
    )
    run = await runs.repeated(caller, idempotency)
    run = run or await evaluations.accept(caller, body, idempotency)
    if is_async:
        return accepted(run, "/v1/evaluations")
    event = (await runs.wait(run, alone=idempotency is None))[-1].event
    assert isinstance(event, RunEnded)
    return respond(run.id, event.status, event.output, event.error, event.usage)


@router.get("/{evaluation_id}", response_model=EvaluationReport | EvaluationAccepted)
async def get_evaluation(evaluation_id: str, caller: CallerDep, runs: RunsDep) -> Response:
    """The report, or how far it is."""
    run = await runs.get(caller, evaluation_id, KIND)
    if is_open(run):
        return JSONResponse({"id": run.id, "status": run.status})
    return respond(*ended(run)[:-1])


@router.post("/{evaluation_id}/cancel")
async def cancel_evaluation(evaluation_id: str, caller: CallerDep, runs: RunsDep) -> dict[str, str]:
    """Stops it. What has ended stays as it is."""
    run = await runs.cancel(caller, evaluation_id, KIND)
    if is_open(run):
        await runs.wait(run)
        run = await runs.get(caller, evaluation_id, KIND)
    return {"id": run.id, "status": run.status}


def respond(
    run_id: str, status: str, output: Any, error: dict[str, Any] | None, usage: dict[str, int]
) -> Response:
    """The report as it goes over the wire. Raises what the evaluation failed with."""
    if status == "cancelled":
        raise Conflict("The evaluation was stopped.", code="run_cancelled")
    if status != "completed":
        raise failure_of(run_id, status, error, usage)
    report = EvaluationReport.model_validate({**output, "id": run_id})
    return Response(report.model_dump_json(), media_type="application/json")

"""Jobs: one schema for many texts, each as durable as if it were asked alone."""

from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import Response, StreamingResponse
from pydantic_core import to_json

from app.api.deps import (
    CallerDep,
    ExtractionsDep,
    IdempotencyKey,
    JobsDep,
    SettingsDep,
    idempotent,
)
from app.api.routes.files import FilesDep
from app.api.sse import EventStream
from app.api.uploads import FormUpload, JsonUpload
from app.schemas.extraction import ExtractionSpec
from app.schemas.job import Job, JobList, Retry
from app.services.extraction_log import JobProgress
from app.services.jobs import Upload
from app.services.new_run import Idempotency
from app.services.results import Pages, as_csv, as_parquet, jsonl
from app.services.run_log import Entry, RunEnded

PREFIX = "/v1/extraction-jobs"
SMALL = 64 * 1024  # bytes of any other body here

uploads = APIRouter(prefix=PREFIX, tags=["extraction jobs"])
"""The one route whose bodies may be large."""

router = APIRouter(prefix=PREFIX, tags=["extraction jobs"], max_body_size=SMALL)

Format = Literal["jsonl", "csv", "parquet"]
SUCCEEDED = ("completed",)
STATUSES: dict[str, dict[str, Any]] = {
    "succeeded": {"statuses": SUCCEEDED},
    "partial": {"statuses": SUCCEEDED, "finish_reason": "partial"},
    "failed": {"statuses": ("failed",)},
    "cancelled": {"statuses": ("cancelled",)},
}
TYPES = {
    "jsonl": "application/jsonl",
    "csv": "text/csv; charset=utf-8",
    "parquet": "application/vnd.apache.parquet",
}
WRITERS: dict[str, Callable[[Pages, ExtractionSpec], AsyncIterator[bytes]]] = {
    "jsonl": jsonl,
    "csv": as_csv,
    "parquet": as_parquet,
}


BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["items"],
                "description": "`schema` or `schema_ref`, `items: [{custom_id, text}]`, and as in "
                "`POST /v1/extractions`: `instructions`, `model`, `webhook` and `options`, which "
                "here has `concurrency` too.",
            }
        },
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["request", "file"],
                "properties": {
                    "request": {
                        "type": "string",
                        "contentMediaType": "application/json",
                        "description": "The JSON body without `items`.",
                    },
                    "file": {
                        "type": "string",
                        "format": "binary",
                        "description": 'JSONL: `{"custom_id": "...", "text": "..."}` a line.',
                    },
                },
            }
        },
    },
}


@uploads.post("", status_code=202, openapi_extra={"requestBody": BODY})
async def create_job(
    request: Request,
    caller: CallerDep,
    jobs: JobsDep,
    extractions: ExtractionsDep,
    files: FilesDep,
    settings: SettingsDep,
    idempotency_key: IdempotencyKey = None,
) -> Job:
    """Takes the items in, all or none; the job goes on without its client.

    Items stand in `items` as `{custom_id, text}`, in a file of `/v1/files` as
    `{"items": {"file_id": "..."}}`, or are sent along as JSON lines.
    """
    kind = request.headers.get("content-type", "").lower()
    upload: Upload
    if kind.startswith("multipart/"):
        upload = await FormUpload.of(request, settings)
    else:
        upload = JsonUpload(request, caller, files, settings)
    return await jobs.accept(caller, upload, extractions.spec, idempotency_key)


@router.get("")
async def list_jobs(
    caller: CallerDep,
    jobs: JobsDep,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(description="The last id seen.")] = None,
) -> JobList:
    """Your jobs, the newest first."""
    found = await jobs.list(caller, after=after, limit=limit + 1)
    return JobList(data=list(found[:limit]), has_more=len(found) > limit)


@router.get("/{job_id}")
async def get_job(job_id: str, caller: CallerDep, jobs: JobsDep) -> Job:
    return await jobs.get(caller, job_id)


@router.get("/{job_id}/events")
async def follow_job(
    job_id: str,
    caller: CallerDep,
    jobs: JobsDep,
    last_event_id: Annotated[int, Header(ge=0)] = 0,
) -> Response:
    """Server-sent events: `job.progress` with the counts, then one `job.completed`,
    `job.cancelled` or `job.failed` with the job."""
    entries = await jobs.follow(caller, job_id, last_event_id)
    if entries is None:
        return Response(status_code=204)  # a browser then comes back no more
    return EventStream(_frames(entries, partial(jobs.get, caller, job_id)))


async def _frames(entries: AsyncIterator[Entry], look: Callable[[], Any]) -> AsyncIterator[bytes]:
    async for entry in entries:
        match entry.event:
            case JobProgress(counts=counts):
                yield _frame(entry.seq, "job.progress", {"counts": counts})
            case RunEnded(status=status):
                job: Job = await look()
                yield _frame(entry.seq, f"job.{status}", {"job": job.model_dump(by_alias=True)})
            case _:
                pass


def _frame(seq: int, name: str, data: dict[str, Any]) -> bytes:
    body = to_json({"type": name, **data})
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (seq, name.encode(), body)


@router.get("/{job_id}/results", response_class=StreamingResponse)
async def get_results(
    job_id: str,
    caller: CallerDep,
    jobs: JobsDep,
    format: Format = "jsonl",
    status: Literal["succeeded", "partial", "failed", "cancelled"] | None = None,
) -> StreamingResponse:
    """The items that have ended by now, in the order in which they were sent.

    JSON lines are `{custom_id, status, data | error, usage}`, with `id`, `evidence` and
    `field_status` where evidence was asked for. `status` is `partial` where parts of a long text
    have no answer; asking for `succeeded` brings these too. A table has a column for each
    property at the top of the documents, under `data.<name>` where the table itself has one of
    that name; Parquet has an `error_code` too.
    """
    spec = await jobs.spec(caller, job_id)
    pages = partial(jobs.results, job_id, **(STATUSES[status] if status else {}))
    return StreamingResponse(
        WRITERS[format](pages, spec),
        media_type=TYPES[format],
        headers={
            "Content-Disposition": f'attachment; filename="{job_id}.{format}"',
            "X-Content-Type-Options": "nosniff",
        },
    )


@router.post("/{job_id}/cancel")
async def cancel_job(job_id: str, caller: CallerDep, jobs: JobsDep) -> Job:
    """Stops the job. What has ended keeps its result; a job that has ended stays as it is."""
    return await jobs.cancel(caller, job_id)


@router.post("/{job_id}/retry", status_code=202)
async def retry_job(
    job_id: str,
    caller: CallerDep,
    jobs: JobsDep,
    idempotency: Annotated[Idempotency | None, idempotent("retry")],
    body: Retry | None = None,
) -> Job:
    """Asks again for the items that failed, or that were cancelled."""
    return await jobs.retry(caller, job_id, (body or Retry()).only, idempotency)


@router.delete("/{job_id}", status_code=204)
async def delete_job(job_id: str, caller: CallerDep, jobs: JobsDep) -> None:
    """Stops and forgets the job, its items and their results."""
    await jobs.delete(caller, job_id)

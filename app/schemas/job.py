"""The wire shapes of jobs: many texts, one schema."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from app.schemas.extraction import (
    ExtractionOptions,
    ExtractionSchema,
    SpecRequest,
    Strict,
    Text,
    Usage,
    Webhook,
)
from app.schemas.user import Storable

CONCURRENCY = 16
MAX_CONCURRENCY = 256


class JobItem(Strict):
    """One text. `custom_id` is the caller's own name for it, one of a kind in its job."""

    custom_id: Annotated[str, Field(min_length=1, max_length=255), Storable]
    text: Annotated[Text, Field(min_length=1)]


class ItemsFile(Strict):
    """A file of `/v1/files` with one item a line (JSONL)."""

    file_id: str


class JobOptions(ExtractionOptions):
    """Of each item, but for `concurrency`: how many are asked at a time, at most."""

    concurrency: Annotated[int, Field(ge=1, le=MAX_CONCURRENCY)] = CONCURRENCY


class JobSettings(SpecRequest):
    """What every item of a job is to fulfil, and who is told of its end."""

    webhook: Webhook | None = None
    options: JobOptions = JobOptions()  # pyright: ignore[reportIncompatibleVariableOverride]


class JobRequest(JobSettings):
    items: list[JobItem] | ItemsFile


class JobCounts(BaseModel):
    total: int = 0
    queued: int = 0
    running: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0


JobStatus = Literal[
    "queued", "running", "completed", "completed_with_errors", "cancelled", "failed"
]


class JobError(BaseModel):
    code: str
    message: str


class Job(BaseModel):
    """A job as it is now. `cost` in US dollars, where the model has a known price.

    completed_with_errors: some of its items failed, and their errors are in its results.
    failed: the job itself could not go on; retry takes it up again.
    """

    id: str
    object: Literal["extraction.job"] = "extraction.job"
    status: JobStatus
    counts: JobCounts
    usage: Usage = Usage()
    cost: float | None = None
    schema_: ExtractionSchema = Field(serialization_alias="schema")
    model: str | None = None
    error: JobError | None = None
    created_at: datetime
    finished_at: datetime | None = None


class JobList(BaseModel):
    """The newest first."""

    object: Literal["list"] = "list"
    data: list[Job]
    has_more: bool


class Retry(Strict):
    """Which items are asked again."""

    only: Literal["failed", "cancelled"] = "failed"

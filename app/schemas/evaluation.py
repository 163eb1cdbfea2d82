"""The wire shapes of evaluations and of estimates."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from app.schemas.extraction import (
    ExtractionInput,
    ExtractionSchema,
    SpecRequest,
    Strict,
    Text,
    Usage,
    Webhook,
)
from app.schemas.job import JobItem, JobOptions

MAX_ITEMS = 1000


class EvaluationItem(Strict):
    """A text and the document that a person found in it; `name` for the report."""

    text: Text = Field(min_length=1)
    expected: Any
    name: Text | None = Field(None, max_length=255)


class EvaluationRequest(SpecRequest):
    items: list[EvaluationItem] = Field(min_length=1, max_length=MAX_ITEMS)


class EvaluationAccepted(BaseModel):
    """An evaluation that goes on."""

    id: str
    status: Literal["queued", "running"]


class FieldScore(BaseModel):
    """Of one path, over all documents. support: how many values were expected."""

    precision: float
    recall: float
    f1: float
    support: int


class EvaluationError(BaseModel):
    code: str
    message: str


class EvaluationCase(BaseModel):
    """One item. `name` is its own, or its number from 1."""

    name: str
    f1: float
    exact: bool
    error: EvaluationError | None = None


class Evaluated(BaseModel):
    """How well the items' documents were found; shares go from 0 to 1.

    failed: items without a valid answer; all that was expected of them counts as not found.
    invalid_expected: items whose expected document does not fit the schema, so no answer can.
    exact: share of documents that are equal, the order of lists included.
    precision, recall, f1: over all values of all documents (micro-averaged).
    fields: by JSON Pointer, with `*` for each place in a list.
    cost: in US dollars, None for models without a known price.
    """

    model: str
    schema_: ExtractionSchema = Field(validation_alias="schema", serialization_alias="schema")
    items: int
    failed: int
    invalid_expected: int
    exact: float
    precision: float
    recall: float
    f1: float
    fields: dict[str, FieldScore]
    cases: list[EvaluationCase]
    usage: Usage
    cost: float | None

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)


class EvaluationReport(Evaluated):
    id: str
    status: Literal["completed"] = "completed"


class EstimateRequest(SpecRequest):
    """An extraction (`input`) or a job (`items`) that is not made yet."""

    input: ExtractionInput | None = None
    items: Annotated[list[JobItem], Field(min_length=1)] | None = None
    options: JobOptions = JobOptions()  # pyright: ignore[reportIncompatibleVariableOverride]
    stream: bool = False
    webhook: Webhook | None = None

    @model_validator(mode="after")
    def _one(self) -> "EstimateRequest":
        if (self.input is None) == (self.items is None):
            raise ValueError("give exactly one of input and items")
        return self


class CostRange(BaseModel):
    """In US dollars."""

    min: float
    max: float


class Estimate(BaseModel):
    """What an extraction or a job may take.

    items, unique_items: texts, and different ones: equal ones are asked once.
    prompt_tokens_estimated: of asking once for each.
    max_calls: of the model, where each attempt is needed; retries of a broken connection are not
    counted. cost: from every first answer being valid (and next to empty) to every attempt being
    needed; None for models without a known price.
    """

    items: int
    unique_items: int
    prompt_tokens_estimated: int
    max_calls: int
    cost: CostRange | None

"""The wire shapes of extraction, and the spec that a run keeps of one."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, model_validator

SCHEMA_NAME = r"^[A-Za-z][A-Za-z0-9_-]{0,63}$"


def _unicode(text: str) -> str:
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError("must not contain half of a surrogate pair")
    return text


Text = Annotated[str, AfterValidator(_unicode)]


class Strict(BaseModel):
    """Internal tools are told of a field that has no effect, rather than left to wonder."""

    model_config = ConfigDict(extra="forbid")


class ExtractionInput(Strict):
    """Exactly one of `text`, `file_id` (of `/v1/files`) and `data` (a data URL)."""

    text: Text | None = Field(None, min_length=1)
    file_id: str | None = None
    data: str | None = None

    @model_validator(mode="after")
    def _one(self) -> "ExtractionInput":
        if sum(each is not None for each in (self.text, self.file_id, self.data)) != 1:
            raise ValueError("give exactly one of text, file_id and data")
        return self


class Chunking(Strict):
    """How a long text is cut. Sizes in characters (code points); `list_path` is the JSON Pointer
    of the list whose elements are gathered from all chunks."""

    max_chars: Annotated[int, Field(ge=200, le=1_000_000)] = 8000
    overlap_chars: Annotated[int, Field(ge=0)] = 400
    list_path: str | None = None  # by default the schema's only list
    dedupe: Literal["by_span", "by_value", "none"] = "by_span"

    @model_validator(mode="after")
    def _overlap(self) -> "Chunking":
        if self.overlap_chars * 2 > self.max_chars:
            raise ValueError("overlap_chars must be at most half of max_chars")
        return self


class ExtractionOptions(Strict):
    """Limits of one extraction, and what counts as a good answer.

    max_attempts: model answers asked for, over all models (for each chunk, where there are some).
    max_transport_retries: for each of them. token_budget: a call starts while less is spent.
    """

    max_attempts: Annotated[int, Field(ge=1, le=10, strict=True)] = 3
    max_transport_retries: Annotated[int, Field(ge=0, le=10, strict=True)] = 2
    token_budget: Annotated[int, Field(ge=1, strict=True)] = 20_000
    deadline_s: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)] = 60
    temperature: Annotated[float, Field(ge=0, le=2)] = 0
    fallback_models: Annotated[list[str], Field(max_length=10)] = []
    evidence: Literal["none", "optional", "required"] = "none"
    on_ungrounded: Literal["fail", "null", "flag"] = "fail"
    chunking: Chunking | None = None
    on_chunk_failure: Literal["partial", "fail"] = "partial"
    cache: Literal["use", "bypass"] = "use"


class SchemaChoice(Strict):
    """Exactly one of `schema` (a JSON Schema) and `schema_ref`: a registered class's name, or a
    stored schema's, with its version or `latest` behind an @."""

    inline: dict[str, Any] | StrictBool | None = Field(None, alias="schema")
    schema_ref: str | None = None

    @model_validator(mode="after")
    def _one_schema(self) -> "SchemaChoice":
        if (self.inline is None) == (self.schema_ref is None):
            raise ValueError("give exactly one of schema and schema_ref")
        return self


class Webhook(Strict):
    url: str = Field(min_length=1, max_length=2048)


class SpecRequest(SchemaChoice):
    """What every request for extractions may say of them."""

    instructions: Text | None = None
    model: str | None = None
    options: ExtractionOptions = ExtractionOptions()


class ExtractionRequest(SpecRequest):
    input: ExtractionInput
    stream: StrictBool = False
    webhook: Webhook | None = None


class ExtractionSpec(BaseModel):
    """All that decides what an extraction answers, but its text.

    body: the JSON Schema; None for a registered class, which `name` names. mode: how the model is
    asked for JSON.
    """

    name: str = "inline"
    version: int | None = None
    body: dict[str, Any] | None = None
    sha256: str = ""
    instructions: str | None = None
    model: str | None = None
    mode: str = "tools"
    options: ExtractionOptions = ExtractionOptions()


class AttemptError(BaseModel):
    """One thing wrong with an answer: where, by which rule, in words."""

    pointer: str
    keyword: str
    code: str
    message: str


class Usage(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0

    @classmethod
    def of(cls, spent: Mapping[str, int]) -> "Usage":
        """Of a run's own `usage`."""
        sent, received = spent.get("input_tokens", 0), spent.get("output_tokens", 0)
        return cls(prompt_tokens=sent, completion_tokens=received, total_tokens=sent + received)


class Attempt(BaseModel):
    """One answer of the model's, and what was wrong with it. `chunk` counts from 0."""

    model: str
    ok: bool
    errors: list[AttemptError] = []
    usage: Usage = Usage()
    raw: str | None = None
    chunk: int | None = None


class Evidence(BaseModel):
    """Where the text says it: `quote` is `text[start:end]`, in Unicode code points.

    `path` is the JSON Pointer of the value. "normalized": the model's quote differed from the
    text in white space or composition alone.
    """

    path: str
    start: int
    end: int
    quote: str
    match: Literal["exact", "normalized"]


class Range(BaseModel):
    """Of the text, in code points."""

    start: int
    end: int


class ChunkError(BaseModel):
    """Why a part of the text is lost. `chunk` counts from 0."""

    chunk: int
    code: str
    message: str


class Chunks(BaseModel):
    total: int = 1
    failed: int = 0


class ExtractionSchema(BaseModel):
    name: str
    version: int | None = None
    sha256: str


class Extracted(BaseModel):
    """What a run of an extraction has found: valid against the schema, as a run keeps it.

    field_status: JSON Pointer -> whether the text says it. cost in US dollars, None for models
    without a known price.
    """

    status: Literal["completed", "partial"] = "completed"
    data: Any
    evidence: list[Evidence] = []
    field_status: dict[str, Literal["grounded", "ungrounded"]] = {}
    attempts: list[Attempt] = []
    transport_retries: int = 0
    chunks: Chunks = Chunks()
    failed_ranges: list[Range] = []
    chunk_errors: list[ChunkError] = []
    usage: Usage = Usage()
    cost: float | None = None
    cache: Literal["miss", "hit", "coalesced"] = "miss"
    model: str
    schema_: ExtractionSchema = Field(alias="schema")

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)


class ExtractionResponse(Extracted):
    """What was extracted: always valid against the schema.

    `text` is what the evidence counts its characters in, where a file was sent.
    """

    id: str
    text: str | None = None


class ExtractionAccepted(BaseModel):
    """An extraction that goes on."""

    id: str
    status: Literal["queued", "running"]

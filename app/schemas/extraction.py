"""The wire shapes of extraction."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, model_validator


def _unicode(text: str) -> str:
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError("must not contain half of a surrogate pair")
    return text


Text = Annotated[str, AfterValidator(_unicode)]


class Strict(BaseModel):
    """Internal tools are told of a field that has no effect, rather than left to wonder."""

    model_config = ConfigDict(extra="forbid")


class ExtractionInput(Strict):
    text: Text = Field(min_length=1)


class ExtractionOptions(Strict):
    max_attempts: Annotated[int, Field(ge=1, le=10)] = 3
    temperature: Annotated[float, Field(ge=0, le=2)] = 0


class ExtractionRequest(Strict):
    """Exactly one of `schema` (a JSON Schema) and `schema_ref` (a registered class)."""

    input: ExtractionInput
    inline: dict[str, Any] | StrictBool | None = Field(None, alias="schema")
    schema_ref: str | None = None
    instructions: Text | None = None
    model: str | None = None
    options: ExtractionOptions = ExtractionOptions()

    @model_validator(mode="after")
    def _one_schema(self) -> "ExtractionRequest":
        if (self.inline is None) == (self.schema_ref is None):
            raise ValueError("give exactly one of schema and schema_ref")
        return self


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


class Attempt(BaseModel):
    """One answer of the model's, and what was wrong with it."""

    model: str
    ok: bool
    errors: list[AttemptError] = []
    usage: Usage = Usage()
    raw: str | None = None


class ExtractionSchema(BaseModel):
    name: str
    sha256: str


class ExtractionResponse(BaseModel):
    """What was extracted: always valid against the schema."""

    id: str
    status: Literal["completed"]
    data: Any
    attempts: list[Attempt]
    usage: Usage
    model: str
    schema_: ExtractionSchema = Field(serialization_alias="schema")

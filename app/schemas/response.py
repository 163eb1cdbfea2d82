"""OpenAI's Responses request, as far as it has a meaning for an agent."""

from typing import Annotated, Any, Literal, cast, get_args

from pydantic import Discriminator, Field, Tag, model_validator

from app.schemas.chat import Asking, Function, Id, Ignoring, Name, Tokens
from app.schemas.user import Storable


class InputText(Ignoring):
    type: Literal["input_text", "output_text", "text"]
    text: str


class InputImage(Ignoring):
    type: Literal["input_image"]
    image_url: str

    @property
    def url(self) -> str:
        return self.image_url


InputContent = Annotated[InputText | InputImage, Field(discriminator="type")]


class InputMessage(Ignoring):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Annotated[list[InputContent], Field(min_length=1)] = ""

    @model_validator(mode="after")
    def _says_something(self) -> "InputMessage":
        if self.role != "assistant" and "content" not in self.model_fields_set:
            raise ValueError("content is required")
        return self


class FunctionCallOutput(Ignoring):
    type: Literal["function_call_output"]
    call_id: Id
    output: str | list[InputText]


class ApprovalResponse(Ignoring):
    type: Literal["mcp_approval_response"]
    approval_request_id: Annotated[str, Storable]
    approve: bool
    reason: Annotated[str, Storable] | None = None


class PastItem(Ignoring):
    """What a response gave out and its client sends back as history: it has no effect."""

    type: Literal["reasoning", "function_call", "mcp_call", "mcp_approval_request"]


def _kind(value: Any) -> str:
    is_json = isinstance(value, dict)
    kind = cast(dict[str, Any], value).get("type") if is_json else getattr(value, "type", None)
    past = get_args(PastItem.model_fields["type"].annotation)
    return "past" if kind in past else str(kind or "message")


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[ApprovalResponse, Tag("mcp_approval_response")]
    | Annotated[PastItem, Tag("past")],
    Discriminator(_kind),
]


class FunctionDefinition(Function):
    type: Literal["function"]


class NamedFunction(Ignoring):
    type: Literal["function"]
    name: str


class TextFormat(Ignoring):
    type: Literal["text"]


class JsonFormat(Ignoring):
    type: Literal["json_object"]


class JsonSchemaFormat(Ignoring):
    type: Literal["json_schema"]
    name: Name = "answer"
    json_schema: dict[str, Any] = Field(alias="schema")


class TextConfig(Ignoring):
    format: Annotated[
        TextFormat | JsonFormat | JsonSchemaFormat | None, Field(discriminator="type")
    ] = None


class ResponseRequest(Asking):
    """An agent is a model: `model` names an agent, never an LLM."""

    model: Id
    input: str | Annotated[list[InputItem], Field(min_length=1)]
    instructions: str | None = None
    previous_response_id: Id | None = None
    stream: bool = False
    background: bool = False
    store: bool = True
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    max_output_tokens: Tokens | None = None
    parallel_tool_calls: bool | None = None
    tools: list[FunctionDefinition] = []
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    text: TextConfig | None = None
    metadata: dict[str, str] = {}
    truncation: Literal["auto", "disabled"] | None = None
    user: str | None = None

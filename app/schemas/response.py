"""OpenAI's Responses request, as far as it has a meaning for an agent."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from app.schemas.chat import Function, Ignoring


class InputText(Ignoring):
    type: Literal["input_text", "output_text", "text"]
    text: str


class InputImage(Ignoring):
    type: Literal["input_image"]
    image_url: str


InputContent = Annotated[InputText | InputImage, Field(discriminator="type")]


class InputMessage(Ignoring):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputContent]


class FunctionCallOutput(Ignoring):
    type: Literal["function_call_output"]
    call_id: str
    output: str


class ApprovalResponse(Ignoring):
    type: Literal["mcp_approval_response"]
    approval_request_id: str
    approve: bool
    reason: str | None = None


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return str(value.get("type", "message"))  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
    return str(getattr(value, "type", "message"))


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[ApprovalResponse, Tag("mcp_approval_response")],
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
    name: str = "answer"
    json_schema: dict[str, Any] = Field(alias="schema")


class TextConfig(Ignoring):
    format: Annotated[
        TextFormat | JsonFormat | JsonSchemaFormat | None, Field(discriminator="type")
    ] = None


class ResponseRequest(Ignoring):
    """An agent is a model: `model` names an agent, never an LLM."""

    model: str
    input: str | list[InputItem]
    instructions: str | None = None
    previous_response_id: str | None = None
    stream: bool = False
    background: bool = False
    store: bool = True
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    max_output_tokens: int | None = Field(None, ge=1)
    parallel_tool_calls: bool | None = None
    tools: list[FunctionDefinition] = []
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    text: TextConfig | None = None
    metadata: dict[str, str] = {}
    truncation: Literal["auto", "disabled"] | None = None
    user: str | None = None

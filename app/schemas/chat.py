"""OpenAI's Chat Completions request, as far as it has a meaning for an agent."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Ignoring(BaseModel):
    """Clients send more with every version; what is not known here has no effect."""

    model_config = ConfigDict(extra="ignore")


class TextContent(Ignoring):
    type: Literal["text"]
    text: str


class ImageUrl(Ignoring):
    url: str


class ImageContent(Ignoring):
    type: Literal["image_url"]
    image_url: ImageUrl


Content = Annotated[TextContent | ImageContent, Field(discriminator="type")]


class Instructions(Ignoring):
    role: Literal["system", "developer"]
    content: str | list[TextContent]


class UserMessage(Ignoring):
    role: Literal["user"]
    content: str | list[Content]


class CalledFunction(Ignoring):
    name: str
    arguments: str = ""


class Called(Ignoring):
    id: str
    function: CalledFunction


class AssistantMessage(Ignoring):
    role: Literal["assistant"]
    content: str | list[TextContent] | None = None
    tool_calls: list[Called] | None = None


class ToolMessage(Ignoring):
    role: Literal["tool"]
    tool_call_id: str
    content: str | list[TextContent]


ChatMessage = Annotated[
    Instructions | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class Function(Ignoring):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str = ""
    parameters: dict[str, Any] = {}
    strict: bool | None = None


class FunctionTool(Ignoring):
    type: Literal["function"]
    function: Function


class NamedFunction(Ignoring):
    name: str


class NamedTool(Ignoring):
    type: Literal["function"]
    function: NamedFunction


class TextFormat(Ignoring):
    type: Literal["text"]


class JsonFormat(Ignoring):
    type: Literal["json_object"]


class SchemaFormat(Ignoring):
    name: str = "answer"
    json_schema: dict[str, Any] = Field(alias="schema", default_factory=dict[str, Any])
    strict: bool | None = None


class JsonSchemaFormat(Ignoring):
    type: Literal["json_schema"]
    json_schema: SchemaFormat


class StreamOptions(Ignoring):
    include_usage: bool = False


class ChatRequest(Ignoring):
    """An agent is a model: `model` names an agent, never an LLM."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    stop: str | list[str] | None = None
    seed: int | None = None
    response_format: Annotated[
        TextFormat | JsonFormat | JsonSchemaFormat | None, Field(discriminator="type")
    ] = None
    tools: list[FunctionTool] = []
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    n: Literal[1] | None = None
    metadata: dict[str, str] | None = None
    logprobs: Literal[False] | None = None

    @model_validator(mode="after")
    def _ends_with_a_question(self) -> "ChatRequest":
        if self.messages[-1].role not in ("user", "tool"):
            raise ValueError("the last message must be the user's, or a tool's result")
        return self

"""OpenAI's Chat Completions request, as far as it has a meaning for an agent."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from app.schemas.user import Storable

Id = Annotated[str, Field(max_length=255), Storable]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Tokens = Annotated[int, Field(ge=1, le=2**31 - 1)]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Ignoring(BaseModel):
    """Clients send more with every version; what is not known here has no effect.

    A null is the same as nothing.
    """

    model_config = ConfigDict(extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}  # pyright: ignore[reportUnknownVariableType]


class Asking(Ignoring):
    """A whole request."""

    @model_validator(mode="before")
    @classmethod
    def _is_unicode(cls, data: Any) -> Any:
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except RecursionError as error:
            raise ValueError("the request is nested too deep") from error
        except ValueError as error:
            raise ValueError("a text holds half of a surrogate pair") from error
        return data


class TextContent(Ignoring):
    type: Literal["text"]
    text: str


class ImageUrl(Ignoring):
    url: str


class ImageContent(Ignoring):
    type: Literal["image_url"]
    image_url: ImageUrl

    @property
    def url(self) -> str:
        return self.image_url.url


Content = Annotated[TextContent | ImageContent, Field(discriminator="type")]


class Instructions(Ignoring):
    role: Literal["system", "developer"]
    content: str | list[TextContent]


class UserMessage(Ignoring):
    role: Literal["user"]
    content: str | Annotated[list[Content], Field(min_length=1)]


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
    tool_call_id: Id
    content: str | list[TextContent]


ChatMessage = Annotated[
    Instructions | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


class Function(Ignoring):
    name: Name
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

    @property
    def name(self) -> str:
        return self.function.name


class TextFormat(Ignoring):
    type: Literal["text"]


class JsonFormat(Ignoring):
    type: Literal["json_object"]


class SchemaFormat(Ignoring):
    name: Name = "answer"
    json_schema: dict[str, Any] = Field(alias="schema", default_factory=dict[str, Any])


class JsonSchemaFormat(Ignoring):
    type: Literal["json_schema"]
    json_schema: SchemaFormat


class StreamOptions(Ignoring):
    include_usage: bool = False


class ChatRequest(Asking):
    """An agent is a model: `model` names an agent, never an LLM."""

    model: Id
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    stop: Annotated[list[str] | None, BeforeValidator(_listed)] = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
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

"""OpenAI's Chat Completions request, as far as it has a meaning for an agent."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from app.schemas.user import Storable

Id = Annotated[str, Field(max_length=255), Storable]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Tokens = Annotated[int, Field(ge=1, le=2**31 - 1)]
MAX_TOOLS = 128  # in one request, as at OpenAI
MAX_ITEMS = 2048  # in one list, as at OpenAI; each costs time in which nobody else is answered
Stop = Annotated[str, Field(min_length=1)]


def _few(value: Any) -> Any:
    """Counts the pairs before each is looked at."""
    if isinstance(value, dict) and len(value) > MAX_PAIRS:  # pyright: ignore[reportUnknownArgumentType]
        raise ValueError(f"has at most {MAX_PAIRS} pairs")
    return value  # pyright: ignore[reportUnknownVariableType]


MAX_PAIRS = 16
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=MAX_PAIRS),
    BeforeValidator(_few),
]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def refused(why: str, *nothing: Any) -> BeforeValidator:
    """Refuses what has no meaning here, unless it is `nothing` that was asked for."""

    def check(value: Any) -> None:
        if value not in nothing:
            raise PydanticCustomError("unsupported", why)  # pyright: ignore[reportArgumentType]

    return BeforeValidator(check)


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
        if isinstance(data, bytes):  # sent as another type than JSON
            return data
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
    detail: Literal["auto", "low", "high"] | None = None


class ImageContent(Ignoring):
    type: Literal["image_url"]
    image_url: ImageUrl


class FileData(Ignoring):
    file_id: str | None = None
    file_data: str | None = None  # base64 or a data URL
    filename: str | None = None


class FileContent(Ignoring):
    type: Literal["file"]
    file: FileData


Content = Annotated[TextContent | ImageContent | FileContent, Field(discriminator="type")]


class Instructions(Ignoring):
    role: Literal["system", "developer"]
    content: str | Annotated[list[TextContent], Field(max_length=MAX_ITEMS)]


class UserMessage(Ignoring):
    role: Literal["user"]
    content: str | Annotated[list[Content], Field(min_length=1, max_length=MAX_ITEMS)]


class CalledFunction(Ignoring):
    name: str
    arguments: str = ""


class Called(Ignoring):
    id: str
    function: CalledFunction


class RefusalContent(Ignoring):
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


AssistantContent = Annotated[TextContent | RefusalContent, Field(discriminator="type")]


class AssistantMessage(Ignoring):
    role: Literal["assistant"]
    content: str | Annotated[list[AssistantContent], Field(max_length=MAX_ITEMS)] | None = None
    tool_calls: Annotated[list[Called], Field(max_length=MAX_ITEMS)] | None = None


class ToolMessage(Ignoring):
    role: Literal["tool"]
    tool_call_id: Id
    content: str | Annotated[list[TextContent], Field(max_length=MAX_ITEMS)]


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


class AllowedNames(Ignoring):
    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1, max_length=MAX_TOOLS)


class AllowedTools(Ignoring):
    """Some of the request's tools: the others are not offered."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedNames

    @property
    def names(self) -> list[str]:
        return [tool.name for tool in self.allowed_tools.tools]


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
    """An agent is a model: `model` names an agent, never an LLM.

    What tunes the provider's caches, storage and abuse watch (`store`, `prompt_cache_key`, ...)
    changes no answer, and is the operator's to choose: it has no effect.
    """

    model: Id
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_ITEMS)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[int, Field(ge=-100, le=100)]] | None = None
    stop: Annotated[list[Stop] | None, BeforeValidator(_listed), Field(max_length=4)] = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
    verbosity: Literal["low", "medium", "high"] | None = None
    user: Id | None = None
    safety_identifier: Id | None = None  # OpenAI's new word for `user`
    response_format: Annotated[
        TextFormat | JsonFormat | JsonSchemaFormat | None, Field(discriminator="type")
    ] = None
    tools: list[FunctionTool] = Field([], max_length=MAX_TOOLS)
    tool_choice: (
        Literal["none", "auto", "required"]
        | Annotated[NamedTool | AllowedTools, Field(discriminator="type")]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    metadata: Metadata | None = None
    n: Literal[1] | None = None
    modalities: list[Literal["text"]] | None = None
    service_tier: Literal["auto", "default"] | None = None
    audio: Annotated[None, refused("Answers are text; leave it out.", {})] = None
    functions: Annotated[None, refused("Send functions as `tools`.", [])] = None
    function_call: Annotated[None, refused("Send it as `tool_choice`.", "auto")] = None
    logprobs: Annotated[None, refused("An agent's answer has none; leave it out.", False)] = None
    top_logprobs: Annotated[None, refused("An agent's answer has none; leave it out.", 0)] = None
    prediction: Annotated[None, refused("An agent's answer is not predicted; leave it out.")] = None
    moderation: Annotated[None, refused("It is not offered here; leave it out.")] = None
    web_search_options: Annotated[
        None, refused("What an agent may search, its tools say; leave it out.")
    ] = None

    @model_validator(mode="after")
    def _ends_with_a_question(self) -> "ChatRequest":
        if self.messages[-1].role not in ("user", "tool"):
            raise ValueError("the last message must be the user's, or a tool's result")
        return self

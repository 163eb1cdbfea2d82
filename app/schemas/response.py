"""OpenAI's Responses request, as far as it has a meaning for an agent."""

from typing import Annotated, Any, Literal, cast, get_args

from pydantic import AliasChoices, Discriminator, Field, Tag, model_validator

from app.schemas.chat import MAX_ITEMS, MAX_TOOLS, Asking, Function, Id, Ignoring, Name, Tokens
from app.schemas.user import Storable

Label = Annotated[str, Field(max_length=64), Storable]
Metadata = Annotated[
    dict[Label, Annotated[str, Field(max_length=512), Storable]], Field(max_length=16)
]

Include = Literal[
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
]
"""What may be asked for beside the items. Only the addresses of images exist here."""


class InputText(Ignoring):
    type: Literal["input_text", "output_text", "text", "refusal"]
    text: str = Field(validation_alias=AliasChoices("text", "refusal"))


class InputImage(Ignoring):
    type: Literal["input_image"]
    image_url: str | None = None
    file_id: str | None = None
    detail: Literal["auto", "low", "high", "original"] | None = None


class InputFile(Ignoring):
    type: Literal["input_file"]
    file_id: str | None = None
    file_data: str | None = None  # base64 or a data URL
    file_url: str | None = None
    filename: str | None = None


InputContent = Annotated[InputText | InputImage | InputFile, Field(discriminator="type")]


class InputMessage(Ignoring):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Annotated[list[InputContent], Field(min_length=1, max_length=MAX_ITEMS)] = ""

    @model_validator(mode="after")
    def _says_something(self) -> "InputMessage":
        if self.role != "assistant" and "content" not in self.model_fields_set:
            raise ValueError("content is required")
        return self


class FunctionCallOutput(Ignoring):
    type: Literal["function_call_output"]
    call_id: Id
    output: str | Annotated[list[InputContent], Field(max_length=MAX_ITEMS)]


class ApprovalResponse(Ignoring):
    type: Literal["mcp_approval_response"]
    approval_request_id: Annotated[str, Storable]
    approve: bool
    reason: Annotated[str, Storable] | None = None


class ItemReference(Ignoring):
    """An item that this server gave out and still has."""

    type: Literal["item_reference"] = "item_reference"
    id: Id


class PastItem(Ignoring):
    """What a response gave out and its client sends back as history: it has no effect."""

    type: Literal[
        "code_interpreter_call",
        "compaction",
        "computer_call",
        "computer_call_output",
        "custom_tool_call",
        "custom_tool_call_output",
        "file_search_call",
        "function_call",
        "image_generation_call",
        "local_shell_call",
        "local_shell_call_output",
        "mcp_approval_request",
        "mcp_call",
        "mcp_list_tools",
        "reasoning",
        "web_search_call",
    ]


PAST = get_args(PastItem.model_fields["type"].annotation)


def _kind(value: Any) -> str:
    if not isinstance(value, dict):
        return str(getattr(value, "type", "message"))
    fields = cast(dict[str, Any], value)
    kind = fields.get("type")
    if kind is None and "role" not in fields and "id" in fields:
        return "item_reference"
    return "past" if kind in PAST else str(kind or "message")


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[ApprovalResponse, Tag("mcp_approval_response")]
    | Annotated[ItemReference, Tag("item_reference")]
    | Annotated[PastItem, Tag("past")],
    Discriminator(_kind),
]


class FunctionDefinition(Function):
    type: Literal["function"]

    @model_validator(mode="before")
    @classmethod
    def _is_a_function(cls, data: Any) -> Any:
        if isinstance(data, dict) and cast(dict[str, Any], data).get("type") != "function":
            raise ValueError("only functions of your own can be added; the agent has its tools")
        return data  # pyright: ignore[reportUnknownVariableType]


class NamedFunction(Ignoring):
    type: Literal["function"]
    name: str


class AllowedFunctions(Ignoring):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"] = "auto"
    tools: Annotated[list[NamedFunction], Field(min_length=1, max_length=MAX_TOOLS)]


class TextFormat(Ignoring):
    type: Literal["text"]


class JsonFormat(Ignoring):
    type: Literal["json_object"]


class JsonSchemaFormat(Ignoring):
    type: Literal["json_schema"]
    name: Name = "answer"
    description: str | None = None
    strict: bool | None = None
    json_schema: dict[str, Any] = Field(alias="schema")


class TextConfig(Ignoring):
    format: Annotated[
        TextFormat | JsonFormat | JsonSchemaFormat | None, Field(discriminator="type")
    ] = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(Ignoring):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class ConversationParam(Ignoring):
    id: Id


class ResponseRequest(Asking):
    """An agent is a model: `model` names an agent, never an LLM."""

    model: Id
    input: str | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_ITEMS)]
    instructions: str | None = None
    previous_response_id: Id | None = None
    conversation: Id | ConversationParam | None = None
    stream: bool = False
    background: bool = False
    store: bool = True
    include: list[Include] = []
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    max_output_tokens: Tokens | None = None
    max_tool_calls: Tokens | None = None
    parallel_tool_calls: bool | None = None
    tools: list[FunctionDefinition] = Field([], max_length=MAX_TOOLS)
    tool_choice: (
        Literal["none", "auto", "required"]
        | Annotated[NamedFunction | AllowedFunctions, Field(discriminator="type")]
        | None
    ) = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    metadata: Metadata = {}
    truncation: Literal["auto", "disabled"] | None = None
    service_tier: (
        Literal["auto", "default", "fast", "flex", "priority", "scale", "ultrafast"] | None
    ) = None
    top_logprobs: Literal[0] | None = None  # the agents' models are asked for none
    user: str | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    prompt: None = None  # OpenAI's stored prompts; here they are files of the agents

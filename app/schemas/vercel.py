"""What `useChat` posts, as far as it counts here."""

from typing import Annotated, Any, Literal, cast

from pydantic import AliasChoices, BeforeValidator, Field, StrictBool

from app.schemas.chat import MAX_ITEMS, MAX_TOOLS, Asking, Function, Id, Ignoring
from app.schemas.user import Storable


class Approval(Ignoring):
    """A person's answer, once `approved` says so; before, the question."""

    id: Id
    approved: StrictBool | None = None
    reason: Annotated[str, Field(max_length=2000), Storable] | None = None


class Part(Ignoring):
    """A part of a message: each type of part has some of these fields, and others."""

    type: str
    text: str = ""
    url: str | None = None
    media_type: str | None = Field(None, alias="mediaType")
    filename: str | None = None
    tool_name: str = Field("", alias="toolName")
    tool_call_id: str = Field("", alias="toolCallId")
    state: str | None = None
    output: Any = None
    error_text: str = Field("", alias="errorText")
    approval: Approval | None = None

    @property
    def tool(self) -> str | None:
        """The tool whose call this is."""
        if self.type == "dynamic-tool":
            return self.tool_name
        return self.type.removeprefix("tool-") if self.type.startswith("tool-") else None


class Message(Ignoring):
    id: Id | None = None
    role: Literal["system", "user", "assistant"]
    parts: list[Part] = Field([], max_length=MAX_ITEMS)


class Tool(Function):
    """A function that the page itself runs."""

    parameters: dict[str, Any] = Field(
        {}, validation_alias=AliasChoices("inputSchema", "parameters")
    )


def _named(tools: Any) -> Any:
    """The AI SDK's own form is an object: its keys are the names."""
    if not isinstance(tools, dict):
        return tools
    return [
        {**cast(dict[str, Any], tool), "name": name} if isinstance(tool, dict) else tool
        for name, tool in cast(dict[str, Any], tools).items()
    ]


class ChatRequest(Asking):
    """The page's view of the chat, of which the last message counts, and the ids before it.

    message: where the page sends that one alone, instead of `messages`.
    message_id: which message is edited, continued or answered again.
    tools: functions that the page runs, as a list or by name; the SDK has no field of its own.
    """

    id: Annotated[Id, Field(min_length=1)]
    messages: list[Message] = Field([], max_length=MAX_ITEMS)
    message: Message | None = None
    trigger: Literal["submit-message", "regenerate-message"] = "submit-message"
    message_id: Id | None = Field(None, alias="messageId")
    agent: Id | None = None
    tools: Annotated[list[Tool], BeforeValidator(_named), Field(max_length=MAX_TOOLS)] = []

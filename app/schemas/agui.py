"""AG-UI's request (RunAgentInput), as far as it has a meaning here."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, StrictBool, Tag
from pydantic.alias_generators import to_camel

from app.schemas.chat import MAX_ITEMS, MAX_TOOLS, Asking, Function, Id, Ignoring
from app.schemas.user import Storable


class Camel(Ignoring):
    model_config = ConfigDict(alias_generator=to_camel)


class TextPart(Camel):
    type: Literal["text"]
    text: str


class Source(Camel):
    """Bytes in base64, an address, or the id of a file of this server."""

    type: Literal["data", "url", "file"]
    value: str
    mime_type: str | None = None


class MediaPart(Camel):
    type: Literal["image", "audio", "video", "document"]
    source: Source


class BinaryPart(Camel):
    """What came before `MediaPart`."""

    type: Literal["binary"]
    mime_type: str
    id: str | None = None
    url: str | None = None
    data: str | None = None
    filename: str | None = None


Part = Annotated[TextPart | MediaPart | BinaryPart, Field(discriminator="type")]


class HumanMessage(Camel):
    id: Id
    role: Literal["user"]
    content: str | Annotated[list[Part], Field(min_length=1, max_length=MAX_ITEMS)]


class ResultMessage(Camel):
    id: Id
    role: Literal["tool"]
    tool_call_id: Id
    content: str | Annotated[list[Part], Field(max_length=MAX_ITEMS)]
    error: str | None = None


class OtherMessage(Camel):
    """Counts by its id alone: the history is the server's."""

    id: Id
    role: str


def _role(message: Any) -> str:
    role = message.get("role") if isinstance(message, dict) else None  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
    return role if role in ("user", "tool") else "other"


Message = Annotated[
    Annotated[HumanMessage, Tag("user")]
    | Annotated[ResultMessage, Tag("tool")]
    | Annotated[OtherMessage, Tag("other")],
    Discriminator(_role),
]


class Context(Camel):
    description: str
    value: str


class Answer(Camel):
    """A person's answer to the question whether a call may be made."""

    approved: StrictBool
    reason: Annotated[str, Field(max_length=2000), Storable] | None = None
    edited_args: Any = None


class Resolved(Camel):
    interrupt_id: Id
    status: Literal["resolved"]
    payload: Answer


class Abandoned(Camel):
    interrupt_id: Id
    status: Literal["cancelled"]


Resume = Annotated[Resolved | Abandoned, Field(discriminator="status")]


class RunAgentInput(Camel, Asking):
    """What HttpAgent sends; of the messages only the last, and the others' ids, have an effect."""

    thread_id: Annotated[Id, Field(min_length=1)]
    run_id: Id
    parent_run_id: Id | None = None
    protocol_version: str | None = None  # None: from before 1.0
    state: Any = None
    messages: list[Message] = Field([], max_length=MAX_ITEMS)
    tools: list[Function] = Field([], max_length=MAX_TOOLS)
    context: list[Context] = Field([], max_length=MAX_ITEMS)
    resume: list[Resume] = Field([], max_length=MAX_ITEMS)

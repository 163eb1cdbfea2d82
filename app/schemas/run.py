"""How a run is to be executed, as it is stored with it."""

from typing import Any, Literal

from pydantic import BaseModel

from app.schemas.extraction import ExtractionSpec


class ClientTool(BaseModel):
    """A function of the caller's own: offered to the model, run by the client."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = {}
    strict: bool | None = None


class Options(BaseModel):
    """What a run was asked for beside its prompt.

    settings: PydanticAI model settings that go above the agent's own.
    output: a JSON Schema that the answer must fulfil, and the name for it.
    tool_choice: for the first model request.
    max_tool_calls: where fewer than the server allows.
    role, text: the prompt as a person would read it.
    earlier: a digest of the visible turns before the prompt, where they were taken as text.
    extraction: what an extraction, or each item of a job, is to fulfil.
    stream: the reader wants the answer as it grows.
    webhook: an address that is told of the run's end.
    total, concurrency: of a job's items.
    note: nobody answers these messages; they were only added to a conversation.
    echo: what the protocol wants to show again of its request.
    trace: the W3C traceparent of the request, where requests are traced.
    """

    stream: bool = False
    settings: dict[str, Any] = {}
    instructions: str | None = None
    output: dict[str, Any] | None = None
    output_name: str = "answer"
    tools: list[ClientTool] = []
    tool_choice: str | list[str] | None = None
    max_tool_calls: int | None = None
    role: Literal["user", "tool"] = "user"
    text: str = ""
    earlier: str = ""
    extraction: ExtractionSpec | None = None
    webhook: str | None = None
    total: int = 0
    concurrency: int = 0
    note: bool = False
    echo: dict[str, Any] = {}
    trace: str = ""

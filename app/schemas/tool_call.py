"""Tool calls, and what their owner says of one whose outcome nobody knows."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Status = Literal["asked", "approved", "denied", "started", "done", "retry", "failed", "unknown"]


class Done(BaseModel):
    """The call took effect. `result` is what it would have returned, as the model is to see it."""

    model_config = ConfigDict(extra="forbid")

    outcome: Literal["done"]
    result: Any = None


class Retry(BaseModel):
    """The call is to be made again, now."""

    model_config = ConfigDict(extra="forbid")

    outcome: Literal["retry"]


Settlement = Annotated[Done | Retry, Field(discriminator="outcome")]


class ShownToolCall(BaseModel):
    """`result` is what the tool returned, or why it did not. `created_at`, in seconds since 1970,
    is when the model asked for the call."""

    object: Literal["tool_call"] = "tool_call"
    key: str
    created_at: int
    tool: str
    arguments: Any
    status: Status
    result: Any
    agent: str
    run_id: str
    run_status: str
    response_id: str
    conversation: str | None


class ToolCallList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ShownToolCall]
    has_more: bool

"""The wire shapes of what was spent: buckets as of OpenAI's usage API, and the day's allowance."""

from datetime import date
from typing import Literal

from pydantic import BaseModel

GroupBy = Literal["day", "agent", "model"]


class UsageResult(BaseModel):
    """A sum. `agent` (or the name of a schema) and `model` where it is grouped by them."""

    object: Literal["usage.result"] = "usage.result"
    agent: str | None = None
    model: str | None = None
    num_model_requests: int
    input_tokens: int
    input_cached_tokens: int
    output_tokens: int
    cost: float


class UsageBucket(BaseModel):
    """From `start_time` on and before `end_time`, in seconds since 1970."""

    object: Literal["bucket"] = "bucket"
    start_time: int
    end_time: int
    results: list[UsageResult]


class Tokens(BaseModel):
    limit: int
    spent: int
    held: int
    left: int


class Dollars(BaseModel):
    limit: float
    spent: float
    held: float
    left: float


class ShownAllowance(BaseModel):
    """Of today, in UTC. What is held is for model requests that are being answered."""

    day: date
    tokens: Tokens
    cost: Dollars


class ShownUsage(BaseModel):
    """`cost` is in US dollars, as far as prices are known."""

    object: Literal["page"] = "page"
    data: list[UsageBucket]
    has_more: bool = False
    next_page: None = None
    allowance: ShownAllowance

"""Runs that begin later."""

from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from app.schemas.response import ResponseRequest
from app.schemas.user import Storable


class ScheduleRequest(BaseModel):
    """What is to begin, and when: at a time, or again and again."""

    model_config = ConfigDict(extra="forbid")

    response: ResponseRequest
    at: AwareDatetime | None = None
    cron: Annotated[str, Field(max_length=100), Storable] | None = None
    timezone: Annotated[str, Field(max_length=64), Storable] = "UTC"


class ScheduleChange(BaseModel):
    model_config = ConfigDict(extra="forbid")

    paused: bool


class ShownSchedule(BaseModel):
    """Times are in seconds since 1970. `next_at` is null where nothing is to come."""

    id: str
    object: Literal["schedule"] = "schedule"
    created_at: int
    cron: str | None
    timezone: str
    next_at: int | None
    paused: bool
    last_response_id: str | None
    response: dict[str, Any]


class ScheduleList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ShownSchedule]


class DeletedSchedule(BaseModel):
    id: str
    object: Literal["schedule"] = "schedule"
    deleted: Literal[True] = True

"""Responses that begin at a time, or again and again."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request

from app.api.deps import CallerDep, ConversationsDep, idempotent
from app.api.inputs import check, input_of, read
from app.api.responses import response_id
from app.core.errors import Invalid
from app.models import Schedule
from app.schemas.response import ResponseRequest
from app.schemas.schedule import (
    DeletedSchedule,
    ScheduleChange,
    ScheduleList,
    ScheduleRequest,
    ShownSchedule,
)
from app.services.new_run import Idempotency, NewRun
from app.services.schedules import Schedules, load

router = APIRouter(prefix="/v1/schedules", tags=["schedules"])

PREFIX = "sched_"


async def get_schedules(request: Request) -> Schedules:
    return request.app.state.schedules


SchedulesDep = Annotated[Schedules, Depends(get_schedules)]


@router.post("", status_code=201)
async def create_schedule(
    body: ScheduleRequest,
    caller: CallerDep,
    schedules: SchedulesDep,
    conversations: ConversationsDep,
    idempotency: Annotated[Idempotency | None, idempotent("schedules")],
) -> ShownSchedule:
    """`response` is what `POST /v1/responses` takes; each time it begins in the background, with
    the rights that its owner has now."""
    new = _asked(body.response)
    if new.chat:
        await conversations.get(caller, new.chat)
    made = await schedules.create(
        caller, new, at=body.at, cron=body.cron, timezone=body.timezone, idempotency=idempotency
    )
    return _shown(made)


@router.get("")
async def list_schedules(caller: CallerDep, schedules: SchedulesDep) -> ScheduleList:
    return ScheduleList(data=[_shown(each) for each in await schedules.list(caller)])


@router.get("/{schedule_id}")
async def get_schedule(
    schedule_id: str, caller: CallerDep, schedules: SchedulesDep
) -> ShownSchedule:
    return _shown(await schedules.get(caller, schedule_id.removeprefix(PREFIX)))


@router.patch("/{schedule_id}")
async def change_schedule(
    schedule_id: str, body: ScheduleChange, caller: CallerDep, schedules: SchedulesDep
) -> ShownSchedule:
    """Pauses it, or lets it go on from now: what it has missed is not made up for."""
    name = schedule_id.removeprefix(PREFIX)
    return _shown(await schedules.pause(caller, name, body.paused))


@router.delete("/{schedule_id}")
async def delete_schedule(
    schedule_id: str, caller: CallerDep, schedules: SchedulesDep
) -> DeletedSchedule:
    """What it has begun goes on."""
    await schedules.delete(caller, schedule_id.removeprefix(PREFIX))
    return DeletedSchedule(id=schedule_id)


def _asked(body: ResponseRequest) -> NewRun:
    """Raises Invalid for what makes no sense later, when nobody is there."""
    if body.previous_response_id:
        raise Invalid(
            "A schedule goes on from no response; name a conversation instead.",
            param="response.previous_response_id",
        )
    body = body.model_copy(update={"background": True, "stream": False})
    check(body)
    new = read(body, input_of(body))
    if new.results or new.earlier or not isinstance(new.prompt, str):
        raise Invalid("A schedule asks one question, as text.", param="response.input")
    return new


def _shown(schedule: Schedule) -> ShownSchedule:
    asked = load(schedule)
    return ShownSchedule(
        id=f"{PREFIX}{schedule.id}",
        created_at=int(schedule.created_at.timestamp()),
        cron=schedule.cron,
        timezone=schedule.timezone,
        next_at=None if schedule.next_at is None else int(schedule.next_at),
        paused=schedule.paused,
        last_response_id=response_id(schedule.last_run_id) if schedule.last_run_id else None,
        response={**asked.options.echo, "model": asked.program, "input": asked.prompt},
    )

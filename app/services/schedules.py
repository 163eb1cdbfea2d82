"""Runs that begin at a time, once or by cron: exactly once, on however many processes look.

A due time is an idempotency key, so whoever is slower is given the run that is there already.
"""

import asyncio
import hashlib
import json
import logging
import uuid
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from agents import all_agents
from app.core.errors import (
    AppError,
    Invalid,
    NotFound,
    Unauthenticated,
    Unavailable,
    database_away,
)
from app.core.security import ADMIN, Caller
from app.core.tasks import end
from app.db.base import epoch_now
from app.db.session import reading, writing
from app.models import Conversation, Schedule, User
from app.schemas.run import Options
from app.services.new_run import Idempotency, NewRun
from app.services.refusals import IdempotencyConflict, RunDeleted, unknown_agent
from app.services.runs import Runs

logger = logging.getLogger(__name__)

LOOK = 1.0  # seconds between looks at what is due
AT_ONCE = 20  # schedules that one look begins
MOST = 100  # schedules of one owner
LONGEST = 100_000  # characters of what one asks for, as JSON
FIELDS = 5  # of a cron expression


class ScheduleNotFound(NotFound):
    """No such schedule, or somebody else's: the two look the same."""

    code = "schedule_not_found"


class Schedules:
    """All schedules of all owners, each seen by its owner alone."""

    def __init__(self, engine: AsyncEngine, runs: Runs) -> None:
        self._runs = runs
        self._reads = reading(engine)
        self._writes = writing(engine)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._work(), name="schedules")

    async def close(self) -> None:
        if self._task:
            await end(self._task)

    async def create(
        self,
        caller: Caller,
        new: NewRun,
        *,
        at: datetime | None = None,
        cron: str | None = None,
        timezone: str = "UTC",
        idempotency: Idempotency | None = None,
    ) -> Schedule:
        """Stores what is to begin `at` a time or by `cron`, with the caller's rights of today.

        The same idempotency key returns the same schedule. Raises UnknownAgent, Invalid and
        IdempotencyConflict.
        """
        if new.program not in all_agents():
            raise unknown_agent(new.program)
        now = datetime.now(UTC)
        if (at is None) == (cron is None):
            raise Invalid("Send `at` or `cron`, and not both.", param="at")
        made = Schedule(
            id=_id(caller, idempotency),
            owner_id=caller.user_id,
            scopes=caller.scope,
            program=new.program,
            request=_dump(new, idempotency),
            cron=cron,
            timezone=timezone,
            next_at=at.timestamp() if at else next_time(cron or "", timezone, now),
            paused=False,
            created_at=now,
        )
        row = {column.key: getattr(made, column.key) for column in Schedule.__table__.c}
        if len(made.request) > LONGEST:
            raise Invalid(f"What a schedule asks for has at most {LONGEST} characters.")
        async with self._writes.begin() as connection:
            # One at a time, so that counting is exact; the owner's runs go on meanwhile.
            owner = select(User.id).where(User.id == caller.user_id)
            if await connection.scalar(owner.with_for_update(key_share=True)) is None:
                raise Unauthenticated("The account does not exist any more.")
            if known := await self._find(connection, caller, made.id):
                if idempotency and json.loads(known.request)["of"] == idempotency.fingerprint:
                    return known
                raise IdempotencyConflict("This Idempotency-Key was used with another request.")
            if at and at <= now:
                raise Invalid(f"`at` lies in the past: it is {now:%Y-%m-%dT%H:%M:%SZ}.", param="at")
            count = select(func.count()).where(Schedule.owner_id == caller.user_id)
            if (await connection.scalar(count) or 0) >= MOST:
                raise Invalid(f"You have {MOST} schedules; delete one first.")
            await connection.execute(insert(Schedule).values(row))
        return made

    async def list(self, caller: Caller) -> Sequence[Schedule]:
        """The caller's schedules, the newest first."""
        query = (
            select(Schedule)
            .where(Schedule.owner_id == caller.user_id)
            .order_by(Schedule.created_at.desc(), Schedule.id)
        )
        async with self._reads.connect() as connection:
            return [Schedule(**row) for row in (await connection.execute(query)).mappings()]

    async def get(self, caller: Caller, schedule_id: str) -> Schedule:
        """The caller's schedule. Raises ScheduleNotFound."""
        found = None
        if schedule_id.isalnum():  # as all ids are; others may hold what no database takes
            async with self._reads.connect() as connection:
                found = await self._find(connection, caller, schedule_id)
        if found is None:
            raise ScheduleNotFound(f"No schedule {schedule_id[:64]!r}.")
        return found

    async def _find(
        self, connection: AsyncConnection, caller: Caller, schedule_id: str
    ) -> Schedule | None:
        query = select(Schedule).where(
            Schedule.id == schedule_id, Schedule.owner_id == caller.user_id
        )
        row = (await connection.execute(query)).mappings().one_or_none()
        return Schedule(**row) if row else None

    async def pause(self, caller: Caller, schedule_id: str, paused: bool) -> Schedule:
        """Stops it from beginning anything, or lets it go on from now. Raises ScheduleNotFound."""
        found = await self.get(caller, schedule_id)
        changes: dict[str, Any] = {"paused": paused}
        if found.cron and not paused:  # what it has missed was meant to be missed
            changes["next_at"] = next_time(found.cron, found.timezone, datetime.now(UTC))
        async with self._writes.begin() as connection:
            await connection.execute(
                update(Schedule)
                .where(Schedule.id == found.id, Schedule.paused.is_(not paused))
                .values(changes)
            )
        return await self.get(caller, schedule_id)

    async def delete(self, caller: Caller, schedule_id: str) -> None:
        """Forgets the schedule; the runs that it began stay. Raises ScheduleNotFound."""
        found = await self.get(caller, schedule_id)
        async with self._writes.begin() as connection:
            await connection.execute(delete(Schedule).where(Schedule.id == found.id))

    async def _work(self) -> None:
        while True:
            try:
                await self.begin_due()
            except Unavailable:
                pass  # of this process; others look too
            except Exception as error:
                logger.warning("schedules: nothing was begun: %s", type(error).__name__)
            await asyncio.sleep(LOOK)

    async def begin_due(self) -> None:
        """Begins what is due. What was missed meanwhile is begun once."""
        query = (
            select(Schedule, User.is_admin)
            .join(User, User.id == Schedule.owner_id)
            .where(Schedule.next_at <= epoch_now(), Schedule.paused.is_(False))
            .order_by(Schedule.next_at)
            .limit(AT_ONCE)
        )
        async with self._reads.connect() as connection:
            rows = [dict(row) for row in (await connection.execute(query)).mappings()]
        for row in rows:
            is_admin = row.pop("is_admin")
            schedule = Schedule(**row)
            try:
                await self._begin(schedule, is_admin=is_admin)
            except Exception as error:
                if isinstance(error, Unavailable) or database_away(error):
                    raise
                logger.exception("schedule %s cannot be begun, and is paused", schedule.id)
                await self._pause(schedule.id)

    async def _pause(self, schedule_id: str) -> None:
        async with self._writes.begin() as connection:
            await connection.execute(
                update(Schedule).where(Schedule.id == schedule_id).values(paused=True)
            )

    async def _begin(self, schedule: Schedule, *, is_admin: bool) -> None:
        due = schedule.next_at
        scopes = set(schedule.scopes.split()) - (set() if is_admin else {ADMIN})
        caller = Caller.of(schedule.owner_id, scopes)
        key = Idempotency.of("schedules", f"{schedule.id}/{due}", b"")
        new = replace(load(schedule), idempotency=key)
        try:
            if new.chat:
                await self._check_conversation(caller, new.chat)
            run = await self._runs.accept(caller, new)
        except Unavailable:
            raise
        except RunDeleted:
            run = None  # it was made already, and is wanted no more
        except AppError as error:
            run = await self._runs.refuse(caller, new, error)
        again = None
        if schedule.cron:
            again = next_time(schedule.cron, schedule.timezone, datetime.now(UTC))
        async with self._writes.begin() as connection:
            await connection.execute(
                update(Schedule)
                .where(Schedule.id == schedule.id, Schedule.next_at == due)
                .values(next_at=again, last_run_id=run and run.id)
            )

    async def _check_conversation(self, caller: Caller, name: str) -> None:
        """Raises NotFound: what was deleted does not come back by itself."""
        query = select(Conversation.id).where(
            Conversation.owner_id == caller.user_id, Conversation.external_id == name
        )
        async with self._reads.connect() as connection:
            if await connection.scalar(query) is None:
                raise NotFound(f"No conversation {name!r}.", code="conversation_not_found")


def _id(caller: Caller, idempotency: Idempotency | None) -> str:
    if idempotency is None:
        return uuid.uuid4().hex
    return hashlib.sha256(f"{caller.user_id}\n{idempotency.key}".encode()).hexdigest()[:32]


def _dump(new: NewRun, idempotency: Idempotency | None) -> str:
    return json.dumps(
        {
            "prompt": new.prompt,
            "chat": new.chat,
            "options": new.options.model_dump(mode="json", exclude_defaults=True),
            "of": idempotency and idempotency.fingerprint,
        }
    )


def load(schedule: Schedule) -> NewRun:
    """What the schedule asks for."""
    stored = json.loads(schedule.request)
    return NewRun(
        program=schedule.program,
        prompt=stored["prompt"],
        chat=stored["chat"],
        options=Options.model_validate(stored["options"]),
        queue=True,
        param="response.input",
    )


def next_time(cron: str, timezone: str, after: datetime) -> float:
    """In seconds since 1970. Where clocks change, as Debian's cron does. Raises Invalid."""
    from cronsim import CronSim, CronSimError

    try:
        zone = ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise Invalid(
            f"No time zone {timezone[:64]!r}; it is named as in `Europe/Berlin`.", param="timezone"
        ) from error
    try:
        if len(cron.split()) != FIELDS:
            raise CronSimError(f"it has {FIELDS} fields")
        return next(CronSim(cron, after.astimezone(zone))).timestamp()
    except CronSimError as error:
        raise Invalid(
            f"{cron[:100]!r} is no cron expression: {str(error).lower()}. Every weekday at nine "
            "is `0 9 * * 1-5`.",
            param="cron",
        ) from error
    except StopIteration as error:
        raise Invalid(f"{cron[:100]!r} names no day that comes.", param="cron") from error

"""Where runs stand in their conversations: in trees, by what each of them goes on from."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from pydantic_ai.messages import ModelMessage
from sqlalchemy import ColumnElement, Select, bindparam, func, or_, select, text
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import aliased

from app.core.security import Caller
from app.db.session import reading
from app.models import Conversation, Run, ToolCall
from app.models.run import OPEN
from app.services.conversation import (
    PATH,
    branch,
    digest_turns,
    lineage,
    messages_by_run,
    waiting,
)
from app.services.new_run import NewRun
from app.services.queue import behind
from app.services.refusals import NotDecided, RunNotFound

KNOWN = 200  # ids of a client's last messages that are looked for

CONVERSATION = select(Conversation.id).where(
    Conversation.owner_id == bindparam("owner"), Conversation.external_id == bindparam("chat")
)

BEHIND = select(Run).where(text(f"runs.id IN ({behind(':parent', OPEN)})"))


@dataclass(slots=True)
class Place:
    """Where a new run stands."""

    parent: Run | None = None
    conversation_id: str | None = None
    position: int | None = None
    open: list[Run] = field(default_factory=list[Run])  # what goes on in its conversation
    same: Run | None = None  # the same message, while it is being answered
    behind: Run | None = None  # what is to end before it begins


class Branches:
    """The runs of all owners as they stand, each seen by its owner alone."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._reads = reading(engine)

    async def get(self, caller: Caller, run_id: str, kind: str | None = None) -> Run:
        """The caller's run. Raises RunNotFound."""
        run = None
        if run_id.isalnum():  # as all ids are; others may hold what no database takes
            run = await self.one(
                select(Run).where(
                    Run.id == run_id, Run.owner_id == caller.user_id, Run.deleted_at.is_(None)
                )
            )
        if run is None or (kind and run.kind != kind):
            raise RunNotFound(f"No run {run_id!r}.")
        return run

    async def conversation(self, caller: Caller, chat: str | None) -> str | None:
        """The id of the caller's conversation of this name; None where there is none."""
        if chat is None:
            return None
        async with self._reads.connect() as connection:
            return await connection.scalar(CONVERSATION, {"owner": caller.user_id, "chat": chat})

    async def newest(self, caller: Caller, chat: str) -> Run | None:
        """The newest run of the caller's conversation; None where there is none."""
        conversation_id = await self.conversation(caller, chat)
        if conversation_id is None:
            return None
        return await self.one(
            select(Run)
            .where(Run.conversation_id == conversation_id, Run.deleted_at.is_(None))
            .order_by(Run.position.desc())
            .limit(1)
        )

    async def branch(self, run: Run) -> list[str]:
        """The ids of the runs from the root to this one that were not deleted."""
        async with self._reads.connect() as connection:
            return await branch(connection, run.id)

    async def turns(
        self, caller: Caller, run: Run, ids: Sequence[str] | None = None
    ) -> list[tuple[Run, list[ModelMessage]]]:
        """The runs from the root to this one, each with its own messages; those with these ids
        alone."""
        return await self._turns(caller, run, *([] if ids is None else [Run.id.in_(ids)]))

    async def turns_named(
        self, caller: Caller, run: Run, names: Collection[str]
    ) -> list[tuple[Run, list[ModelMessage]]]:
        """Of the runs from the root to this one those of messages with these names: a client's
        own, or a `turn_id`."""
        named = Run.turn_id.in_(names) | Run.message_id.in_(names)
        return await self._turns(caller, run, named)

    async def turns_going_on(
        self, caller: Caller, run: Run
    ) -> list[tuple[Run, list[ModelMessage]]]:
        """Of the runs from the root to this one those of messages that are not answered to the
        end yet."""
        other = aliased(Run)
        is_on_path = PATH.c.id == other.id
        turns = select(other.turn_id).join(PATH, is_on_path).where(other.status.in_(OPEN))
        return await self._turns(caller, run, Run.turn_id.in_(turns))

    async def _turns(
        self, caller: Caller, run: Run, *where: ColumnElement[bool]
    ) -> list[tuple[Run, list[ModelMessage]]]:
        async with self._reads.connect() as connection:
            runs = await lineage(connection, run.id, *where)
            ids = [each.id for each in runs] if where else None
            messages = await messages_by_run(connection, run.id, ids)
        return [
            (each, messages.get(each.id, []))
            for each in runs
            if each.owner_id == caller.user_id and each.deleted_at is None
        ]

    async def place(self, caller: Caller, new: NewRun) -> Place:
        """Where the run goes on from, as it is now; somebody else may be faster."""
        place = await self._place(caller, new)
        place.behind = await self._behind(place.parent)
        if place.behind and place.conversation_id is None:
            place.open = [place.behind]
        return place

    async def _place(self, caller: Caller, new: NewRun) -> Place:
        parent = await self.get(caller, new.parent, new.kind) if new.parent else None
        chat = parent.conversation_id if parent else await self.conversation(caller, new.chat)
        if chat is None and parent is None and new.earlier:
            parent = await self._known(caller, new, None)
            chat = parent.conversation_id if parent and not new.chat else None
        if chat is None:
            position = 1 if new.chat else None
            return Place(parent, None, position)
        runs = await self._runs_around(chat, new)
        newest = runs[-1] if runs else None
        place = Place(parent, chat, 1 + ((newest and newest.position) or 0))
        place.open = [run for run in runs if is_open(run)]
        if parent:
            return place
        same = [run for run in runs if new.message_id and run.message_id == new.message_id]
        if same:
            above = same[-1].parent_id
            place.parent = await self.get(caller, above) if above else None
            place.same = same[-1] if is_open(same[-1]) else None
            return place
        place.parent = _last_known(runs, new.after or ())
        if place.parent is None and new.earlier:
            place.parent = await self._known(caller, new, chat)
        elif place.parent is None and new.after != ():
            place.parent = newest
        if newest and not new.exact and _follows(newest, place.parent, place.open):
            place.parent = newest  # its client did not know yet that there is another message
        return place

    async def _behind(self, run: Run | None) -> Run | None:
        """What is to end before the run that goes on from this one begins: this one, or, where it
        ended without its turn, what it waited for itself."""
        if run is None or is_open(run):
            return run
        if run.usage not in (None, "{}") or run.parent_id is None:  # it had its turn
            return None
        return await self.one(BEHIND.params(parent=run.id))

    async def _runs_around(self, conversation_id: str, new: NewRun) -> list[Run]:
        """The runs that decide where the new one stands, by position; the newest is the last."""
        newest = (
            select(func.max(Run.position))
            .where(Run.conversation_id == conversation_id, Run.deleted_at.is_(None))
            .scalar_subquery()
        )
        wanted = [Run.status.in_(OPEN), Run.position == newest]
        if new.message_id:
            wanted.append(Run.message_id == new.message_id)
        if new.after:
            ids = list(new.after)[-KNOWN:]
            by_prompt = aliased(Run)
            turns = select(by_prompt.turn_id).where(
                by_prompt.conversation_id == conversation_id, by_prompt.message_id.in_(ids)
            )
            wanted += [Run.turn_id.in_(ids), Run.turn_id.in_(turns)]
        query = (
            select(Run)
            .where(Run.conversation_id == conversation_id, Run.deleted_at.is_(None), or_(*wanted))
            .order_by(Run.position)
        )
        async with self._reads.connect() as connection:
            return [Run(**row) for row in (await connection.execute(query)).mappings()]

    async def check_not_waiting(self, place: Place) -> None:
        """Raises NotDecided where a message would wait for a person, maybe for days."""
        asking = {run.id: run for run in place.open if run.status == "waiting"}
        if not asking or place.parent is None:
            return
        async with self._reads.connect() as connection:
            for run in filter(None, map(asking.get, await waiting(connection, place.parent.id))):
                query = select(ToolCall.key).where(
                    ToolCall.run_id == run.id, ToolCall.status == "asked"
                )
                raise NotDecided(run, list(await connection.scalars(query)))

    async def _known(self, caller: Caller, new: NewRun, conversation_id: str | None) -> Run | None:
        """The caller's latest run that ended with exactly these turns."""
        query = (
            select(Run)
            .where(
                Run.owner_id == caller.user_id,
                Run.kind == new.kind,
                Run.transcript == digest_turns("", new.earlier),
                Run.deleted_at.is_(None),
            )
            .order_by(Run.created_at.desc())
            .limit(1)
        )
        if conversation_id:
            query = query.where(Run.conversation_id == conversation_id)
        return await self.one(query)

    async def one(self, query: Select[Run]) -> Run | None:
        async with self._reads.connect() as connection:
            row = (await connection.execute(query)).mappings().one_or_none()
        return Run(**row) if row else None


def is_open(run: Run) -> bool:
    return run.status in OPEN


def _last_known(runs: Sequence[Run], ids: Sequence[str]) -> Run | None:
    """The run that the last known of these ids leads to: of a turn, its newest."""
    turns = {run.turn_id: run for run in runs}
    messages = {run.message_id: turns[run.turn_id] for run in runs if run.message_id}
    known = [turns.get(each) or messages.get(each) for each in ids]
    return next((run for run in reversed(known) if run), None)


def _follows(newest: Run, parent: Run | None, open_runs: Sequence[Run]) -> bool:
    """Whether all between the two goes on still."""
    by_id = {run.id: run for run in open_runs}
    above = by_id.get(newest.id)
    while above and above.parent_id in by_id:
        above = by_id[above.parent_id]
    return above is not None and above.parent_id == (parent and parent.id)

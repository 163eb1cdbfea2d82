"""Conversations by name: what their frontends know them as, and what belongs to one."""

import json
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from pydantic_ai.messages import ModelRequest
from sqlalchemy import delete, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import aliased

from app.core.errors import Conflict, NotFound
from app.core.security import Caller
from app.db.session import reading, writing
from app.models import Conversation, Message, Run, ToolCall
from app.schemas.run import Options
from app.schemas.user import storable
from app.services.conversation import dump_message
from app.services.runs import Runs

PREFIX = "conv_"


class ConversationNotFound(NotFound):
    """No such conversation, or somebody else's: the two look the same."""

    code = "conversation_not_found"


class Conversations:
    """All conversations of all owners, each seen by its owner alone."""

    def __init__(self, engine: AsyncEngine, runs: Runs) -> None:
        self._runs = runs
        self._reads = reading(engine)
        self._writes = writing(engine)

    async def create(self, caller: Caller, labels: Mapping[str, str]) -> Conversation:
        made = Conversation(
            id=uuid.uuid4().hex,
            owner_id=caller.user_id,
            external_id=f"{PREFIX}{uuid.uuid4().hex}",
            labels=json.dumps(labels),
            created_at=datetime.now(UTC),
        )
        row = {column.key: getattr(made, column.key) for column in Conversation.__table__.c}
        async with self._writes.begin() as connection:
            await connection.execute(insert(Conversation).values(row))
        return made

    async def get(self, caller: Caller, name: str) -> Conversation:
        """The caller's conversation. Raises ConversationNotFound."""
        if not storable(name):
            raise ConversationNotFound("No such conversation.")
        query = select(Conversation).where(
            Conversation.owner_id == caller.user_id, Conversation.external_id == name
        )
        async with self._reads.connect() as connection:
            row = (await connection.execute(query)).mappings().one_or_none()
        if row is None:
            raise ConversationNotFound(f"No conversation {name[:64]!r}.")
        return Conversation(**row)

    async def label(self, caller: Caller, name: str, labels: Mapping[str, str]) -> Conversation:
        """Replaces the labels. Raises ConversationNotFound."""
        found = await self.get(caller, name)
        found.labels = json.dumps(labels)
        async with self._writes.begin() as connection:
            await connection.execute(
                update(Conversation).where(Conversation.id == found.id).values(labels=found.labels)
            )
        return found

    async def delete(self, caller: Caller, name: str) -> None:
        """Stops and forgets the conversation with all its runs.

        What a run outside of it goes on from stays with that one, unseen.
        Raises ConversationNotFound.
        """
        found = await self.get(caller, name)
        for run in await self._runs.stop(caller, name):
            await self._runs.wait(run)
        inside = Run.conversation_id == found.id
        child = aliased(Run)
        async with self._writes.begin() as connection:
            # Locked: a run that is just accepted below one of these is seen, or sees it gone.
            rows = await connection.execute(
                select(Run.id, Run.parent_id).where(inside).with_for_update()
            )
            parents = {row.id: row.parent_id for row in rows}
            used = await connection.scalars(
                select(Run.id)
                .join(child, child.parent_id == Run.id)
                .where(inside, child.conversation_id.is_distinct_from(found.id))
            )
            kept: set[str] = set()
            for run_id in used:
                above: str | None = run_id
                while above and above in parents and above not in kept:
                    kept.add(above)
                    above = parents[above]
            if kept:
                await connection.execute(
                    update(Run)
                    .where(Run.id.in_(kept))
                    .values(conversation_id=None, position=None, deleted_at=datetime.now(UTC))
                )
            # Unlinked first: a database follows a chain of deletions only so far.
            await connection.execute(update(Run).where(inside).values(parent_id=None))
            await connection.execute(delete(Conversation).where(Conversation.id == found.id))

    async def name_of(self, run: Run) -> str | None:
        """What the run's frontend calls its conversation."""
        if run.conversation_id is None:
            return None
        query = select(Conversation.external_id).where(Conversation.id == run.conversation_id)
        async with self._reads.connect() as connection:
            return await connection.scalar(query)

    async def questions(self, runs: Sequence[Run]) -> dict[str, dict[tuple[int, str], str]]:
        """What each run asked a person: (number of its message, call id) -> key."""
        query = select(ToolCall.run_id, ToolCall.step, ToolCall.call_id, ToolCall.key).where(
            ToolCall.run_id.in_([run.id for run in runs]),
            or_(ToolCall.decided, ToolCall.status == "asked"),
        )
        found: dict[str, dict[tuple[int, str], str]] = {}
        async with self._reads.connect() as connection:
            for row in await connection.execute(query):
                found.setdefault(row.run_id, {})[row.step, row.call_id] = row.key
        return found

    async def has_asked(self, caller: Caller, name: str, keys: Sequence[str]) -> bool:
        """Whether runs of the conversation asked all of these questions."""
        query = (
            select(ToolCall.key)
            .join(Run, Run.id == ToolCall.run_id)
            .join(Conversation, Conversation.id == Run.conversation_id)
            .where(
                Conversation.owner_id == caller.user_id,
                Conversation.external_id == name,
                ToolCall.key.in_(keys),
            )
        )
        async with self._reads.connect() as connection:
            return set(await connection.scalars(query)) == set(keys)

    async def blank(self, run: Run, seq: int) -> None:
        """Takes a message out of what was added to a conversation; the others keep their places.

        Raises Conflict where it is part of a run, which would not make sense without it.
        """
        if not Options.model_validate_json(run.options).note:
            raise Conflict(
                f"This item is part of the response 'resp_{run.id}', and goes only with it or "
                "with the whole conversation.",
                code="item_in_use",
            )
        async with self._writes.begin() as connection:
            await connection.execute(
                update(Message)
                .where(Message.run_id == run.id, Message.seq == seq)
                .values(body=dump_message(ModelRequest(parts=[])))
            )

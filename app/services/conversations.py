"""Conversations by name: what their frontends know them as, and what belongs to one."""

import json
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from pydantic_ai.messages import ModelRequest
from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncEngine

from app.core.errors import Conflict, NotFound
from app.core.security import Caller
from app.db.session import reading, writing
from app.models import Conversation, Message, Run, ToolCall
from app.schemas.run import Options
from app.schemas.user import storable
from app.services.conversation import dump_message
from app.services.deletion import forget_conversation
from app.services.replay import Questions, questions
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
        async with self._writes.begin() as connection:
            await forget_conversation(connection, found.id)

    async def name_of(self, run: Run) -> str | None:
        """What the run's frontend calls its conversation."""
        if run.conversation_id is None:
            return None
        query = select(Conversation.external_id).where(Conversation.id == run.conversation_id)
        async with self._reads.connect() as connection:
            return await connection.scalar(query)

    async def questions(self, runs: Sequence[Run]) -> Mapping[str, Questions]:
        """What each run asked a person."""
        async with self._reads.connect() as connection:
            return await questions(connection, [run.id for run in runs])

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

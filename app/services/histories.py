"""Long histories that this process went on from lately, so that their next turns read little."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic_ai.messages import ModelMessage
from sqlalchemy import String, bindparam, exists, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.models import Message, Run, ToolCall
from app.services.conversation import MESSAGE, MESSAGES_ABOVE, PATH

LONG = 50  # messages: fewer are read as fast as they are kept
MOST = 8_000_000  # characters of all that is kept, as it is stored: in memory some five times that
SHARE = 4  # what is larger than one part in so many of that is not kept
SECONDS = 600.0  # for which something is kept at most

_RUN = bindparam("run_id", type_=String)
_IS_UNKNOWN = ToolCall.status == "unknown"
# Of all from the root of the tree to and with a run, and of this run alone: the messages, and
# whether there is a call of which nobody knows what became of it.
ABOVE = (
    MESSAGES_ABOVE.with_only_columns(Message.body),
    select(exists().where(ToolCall.run_id == PATH.c.id, _IS_UNKNOWN)),
)
OWN = (
    select(Message.body).where(Message.run_id == _RUN).order_by(Message.seq),
    select(exists().where(ToolCall.run_id == _RUN, _IS_UNKNOWN)),
)


@dataclass(frozen=True, slots=True)
class _Kept:
    messages: Sequence[ModelMessage]
    size: int


NOTHING = _Kept((), 0)


class Histories:
    """What runs of this process began with, for the runs that go on from these.

    To have it here and to read it is the same: what ended changes no more, but for calls of which
    nobody knew what became of them, and no history with such a call is kept. Who gets messages
    here may not change them.
    """

    def __init__(self, most: int = MOST, seconds: float = SECONDS) -> None:
        self._most = most
        self._seconds = seconds
        self._kept: dict[str, _Kept] = {}  # by the run that began with it, the oldest first
        self._size = 0

    async def before(self, connection: AsyncConnection, run: Run) -> Sequence[ModelMessage]:
        """All messages from the root of the tree to and with the run's parent."""
        if run.parent_id is None:
            return ()
        here = {"run_id": run.parent_id}
        kept = self._take(run.parent_id)
        stored, unknown = OWN if kept else ABOVE
        kept = kept or NOTHING
        bodies = list(await connection.scalars(stored, here))
        messages = (*kept.messages, *map(MESSAGE.validate_json, bodies))
        size = kept.size + sum(map(len, bodies))
        is_worth_it = len(messages) >= LONG and size <= self._most // SHARE
        if is_worth_it and not await connection.scalar(unknown, here):
            self._keep(run.id, _Kept(messages, size))
        return messages

    def _keep(self, run_id: str, kept: _Kept) -> None:
        self._take(run_id)
        self._kept[run_id] = kept
        self._size += kept.size
        while self._size > self._most:
            self._take(next(iter(self._kept)))
        asyncio.get_running_loop().call_later(self._seconds, self._take, run_id)

    def _take(self, run_id: str) -> _Kept | None:
        kept = self._kept.pop(run_id, None)
        if kept:
            self._size -= kept.size
        return kept

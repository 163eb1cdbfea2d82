"""Long histories that this process went on from lately, so that their next turns read little."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic_ai.messages import ModelMessage
from sqlalchemy import ColumnElement, Select, String, bindparam, exists, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from app.models import Message, Run, ToolCall
from app.models.run import OPEN
from app.services.conversation import MESSAGE, MESSAGES_ABOVE, PATH

LONG = 50  # messages: fewer are read as fast as they are kept
MOST = 8_000_000  # characters of all that is kept, as it is stored: in memory some five times that
SHARE = 4  # what is larger than one part in so many of that is not kept
SECONDS = 600.0  # for which something is kept that nobody goes on from


def _with_may_change(messages: Select[str, str], run_id: ColumnElement[str]) -> Select[str, bool]:
    """The messages, as they are stored, and whether any of theirs may still be another one: of a
    run that goes on, of one that was only noted (its items can be deleted), and where nobody knows
    what became of a call (its owner may find out). Both as of one moment."""
    goes_on = exists().where(Run.id == run_id, or_(Run.status.in_(OPEN), Run.token == 0))
    unknown = exists().where(ToolCall.run_id == run_id, ToolCall.status == "unknown")
    may_change = or_(goes_on.correlate(None), unknown.correlate(None))
    return messages.with_only_columns(Message.body, may_change)


_RUN = bindparam("run_id", type_=String)
# Of all from the root of the tree to and with a run, and of this run alone.
ABOVE = _with_may_change(MESSAGES_ABOVE, PATH.c.id)
OWN = _with_may_change(
    select(Message.run_id, Message.body).where(Message.run_id == _RUN).order_by(Message.seq), _RUN
)


@dataclass(slots=True)
class _Kept:
    messages: Sequence[ModelMessage]
    size: int
    timer: asyncio.TimerHandle | None = None


NOTHING = _Kept((), 0)


class Histories:
    """What runs of this process began with, for the runs that go on from these.

    To have it here and to read it is the same: nothing is kept that may still change. Who gets
    messages here may not change them either.
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
        if kept := self._kept.get(run.id):  # it was here before, and goes on
            return kept.messages
        kept = self._take(run.parent_id)
        rows = (await connection.execute(OWN if kept else ABOVE, {"run_id": run.parent_id})).all()
        kept = kept or NOTHING
        messages = (*kept.messages, *(MESSAGE.validate_json(body) for body, _ in rows))
        size = kept.size + sum(len(body) for body, _ in rows)
        stays = bool(rows) and not rows[0][1]
        if stays and len(messages) >= LONG and size <= self._most // SHARE:
            self._keep(run.id, _Kept(messages, size))
        return messages

    def _keep(self, run_id: str, kept: _Kept) -> None:
        self._take(run_id)
        self._kept[run_id] = kept
        self._size += kept.size
        kept.timer = asyncio.get_running_loop().call_later(self._seconds, self._take, run_id)
        while self._size > self._most:
            self._take(next(iter(self._kept)))

    def _take(self, run_id: str) -> _Kept | None:
        if kept := self._kept.pop(run_id, None):
            self._size -= kept.size
            if kept.timer:
                kept.timer.cancel()
        return kept

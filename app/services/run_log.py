"""The log of a run: what happened in it, numbered, as all protocols read it."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ConfigDict, TypeAdapter
from pydantic_ai import CustomEvent
from pydantic_ai.messages import (
    AgentStreamEvent,
    PartDeltaEvent,
    PartStartEvent,
    TextPartDelta,
    ThinkingPartDelta,
    ToolCallPart,
    ToolCallPartDelta,
)
from pydantic_core import PydanticSerializationError

from app.core.json import dump


@dataclass(kw_only=True)
class RunRestarted(CustomEvent, name="run.restarted", ui=False):
    """Another worker took over. Model replies after the first `replies` of the log are void."""

    replies: int


@dataclass(kw_only=True)
class RunPaused(CustomEvent, name="run.paused", ui=False):
    """The run waits until these calls are approved or denied; then the log goes on.

    Each call is decided on by the key in its place. `until`, in seconds since 1970, ends the
    wait: what was not decided by then is denied.
    """

    calls: list[ToolCallPart]
    keys: list[str] = field(default_factory=list[str])
    until: int = 0

    def __post_init__(self) -> None:
        self.keys += [""] * (len(self.calls) - len(self.keys))  # in logs from before there were any


@dataclass(kw_only=True)
class RunEnded(CustomEvent, name="run.ended", ui=False):
    """The last entry of every log. `at` is in seconds since 1970."""

    status: str
    at: int
    finish_reason: str | None = None
    output: Any = None
    error: dict[str, Any] | None = None
    usage: dict[str, int] = field(default_factory=dict[str, int])


# Built at its first use, not at every start.
EVENTS: TypeAdapter[AgentStreamEvent] = TypeAdapter(
    AgentStreamEvent, config=ConfigDict(defer_build=True)
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One committed entry of a log."""

    seq: int
    event: AgentStreamEvent
    body: str = field(default="", compare=False)  # as it is stored

    @property
    def columns(self) -> dict[str, Any]:
        return {"seq": self.seq, "body": self.body}

    @property
    def is_last(self) -> bool:
        return isinstance(self.event, RunEnded)


def settled(entries: Sequence[Entry]) -> list[Entry]:
    """The entries without what restarts took back, and without the restarts."""
    kept: list[Entry] = []
    replies: list[int] = []  # where each model reply begins
    for entry in entries:
        match entry.event:
            case RunRestarted(replies=count):
                if count < len(replies):
                    del kept[replies[count] :], replies[count:]
                continue
            case PartStartEvent(index=0):
                replies.append(len(kept))
            case _:
                pass
        kept.append(entry)
    return kept


def parse(seq: int, body: str) -> Entry:
    return Entry(seq, EVENTS.validate_json(body))


def entry(seq: int, event: AgentStreamEvent) -> Entry:
    """The event as it will be read: the same for those who follow and those who come later."""
    try:
        return Entry(seq, event, EVENTS.dump_json(event).decode())
    except (PydanticSerializationError, UnicodeEncodeError):
        body = dump(EVENTS, event)
        return Entry(seq, EVENTS.validate_json(body), body)


class RunLog:
    """The log of a run that this process executes: all committed entries, and what is pending.

    `token` is the fence under which it may be written.
    """

    def __init__(self, run_id: str, token: int, entries: Iterable[Entry] = ()) -> None:
        self.run_id = run_id
        self.token = token
        self.entries = list(entries)
        self.closed = False  # nothing more will be appended here, ended or not
        self.lost = False  # another worker has the run now
        self.moved: Callable[[str], None] | None = None  # told of each change, for who is elsewhere
        self._pending: list[AgentStreamEvent] = []
        self._texts: list[str] = []  # deltas that go on from the last pending event
        self._changed: asyncio.Event | None = None

    @property
    def ended(self) -> bool:
        return bool(self.entries) and self.entries[-1].is_last

    @property
    def dirty(self) -> bool:
        return bool(self._pending)

    def put(self, event: AgentStreamEvent) -> None:
        if self._pending and _continues(self._pending[-1], event):
            assert isinstance(event, PartDeltaEvent)
            self._texts.append(getattr(event.delta, TEXT[type(event.delta)]))
            return
        self._seal()
        self._pending.append(event)

    def _seal(self) -> None:
        if self._texts:
            last = self._pending.pop()
            self._pending.append(_longer(last, "".join(self._texts)))
            self._texts.clear()

    def take(self) -> list[Entry]:
        """The pending events, numbered; `put_back` if they could not be stored."""
        self._seal()
        start = len(self.entries) + 1
        taken = [entry(seq, event) for seq, event in enumerate(self._pending, start)]
        self._pending = []
        return taken

    def put_back(self, taken: list[Entry]) -> None:
        self._seal()
        self._pending = [entry.event for entry in taken] + self._pending

    def committed(self, taken: list[Entry]) -> None:
        self.entries += taken
        self.closed = self.closed or self.ended
        self._wake()

    def close(self) -> None:
        """Sends followers back to the database."""
        self.closed = True
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, None
        if changed:
            changed.set()
        if self.moved:
            self.moved(self.run_id)

    async def changed(self, seq: int) -> None:
        """Returns when there is an entry above `seq`, or no more to come from here."""
        while len(self.entries) <= seq and not self.closed:
            if self._changed is None:
                self._changed = asyncio.Event()
            await self._changed.wait()


# The field of each kind of delta that carries its text.
TEXT: dict[type, str] = {
    TextPartDelta: "content_delta",
    ThinkingPartDelta: "content_delta",
    ToolCallPartDelta: "args_delta",
}


def _continues(last: AgentStreamEvent, event: AgentStreamEvent) -> bool:
    """Whether the event only adds text to what the last one began to say."""
    if not (isinstance(last, PartDeltaEvent) and isinstance(event, PartDeltaEvent)):
        return False
    if last.index != event.index or type(last.delta) is not type(event.delta):
        return False
    ours, theirs = vars(last.delta), vars(event.delta)
    text = TEXT.get(type(event.delta))
    return (
        text is not None
        and isinstance(ours[text], str)
        and all(
            isinstance(value, str) if key == text else value == ours[key]
            for key, value in theirs.items()
        )
    )


def _longer(event: AgentStreamEvent, more: str) -> AgentStreamEvent:
    assert isinstance(event, PartDeltaEvent)
    text = TEXT[type(event.delta)]
    return replace(event, delta=replace(event.delta, **{text: getattr(event.delta, text) + more}))

"""Server-sent events of an extraction's log."""

from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from pydantic_ai.messages import (
    PartDeltaEvent,
    PartStartEvent,
    TextPart,
    TextPartDelta,
    ToolCallPart,
    ToolCallPartDelta,
)

from app.core.json import dump_exact, load_exact
from app.services.extraction_log import AttemptFailed, ChunkExtracted, ChunkFailed
from app.services.json_schema import Json
from app.services.partials import MISSING, Item, Partial
from app.services.places import keys
from app.services.run_log import Entry, RunEnded, RunRestarted

# Each partial repeats all before it. A long answer's are sent less often, so that all of them
# together grow with its length and not with its square: they are at most 1 % behind.
OFTEN = 16_384  # characters
SHARE = 128

RESTARTED = {
    "pointer": "",
    "keyword": "restarted",
    "code": "restarted",
    "message": "Another process took over; the answer begins anew.",
}

INTERRUPTED = {
    "pointer": "",
    "keyword": "interrupted",
    "code": "interrupted",
    "message": "The connection to the model broke; the answer begins anew.",
}

Frame = tuple[str, Json]  # the event's name and its data


async def encode(
    entries: AsyncIterator[Entry],
    *,
    run_id: str,
    partial: Callable[[], Partial] | None = None,
    completed: Callable[[RunEnded], Json],
    failed: Callable[[RunEnded], Json],
    list_path: str | None = None,
    after: int | None = None,
) -> AsyncIterator[bytes]:
    """The events of the entries numbered above `after`, or all. They depend on the log alone.

    entries: the whole log from 1, also where it was seen before. partial: for one more answer;
    None where none is shown before it is whole. completed, failed: the last event's data.
    list_path: of the list that is gathered from a chunked text's answers; None where the text
    is whole.
    """
    if after is None:
        yield encoded("extraction.started", {"id": run_id}, 0)
    shown = _Shown(partial) if list_path is None else _ShownChunks(list_path)
    async for entry in entries:
        match entry.event:
            case RunEnded(status="completed") as event:
                frames = [("extraction.completed", completed(event))]
            case RunEnded() as event:
                frames = [("extraction.failed", failed(event))]
            case _:
                frames = list(shown.frames(entry))
        if entry.seq > (after or 0):
            # The number is told with the last: who comes back in between hears all of them again.
            for left, (name, data) in enumerate(frames, 1 - len(frames)):
                yield encoded(name, data, None if left else entry.seq)


def encoded(name: str, data: Json, seq: int | None = None) -> bytes:
    """One event; `seq` is the entry that it is the last of."""
    number = "" if seq is None else f"id: {seq}\n"
    return f"{number}event: {name}\ndata: {dump_exact(data)}\n\n".encode()


@dataclass(slots=True)
class _Shown:
    """One answer after the other, each as it grows."""

    new: Callable[[], Partial] | None
    attempt: int = 1
    partial: Partial | None = None
    delta: type = TextPartDelta  # by which it grows
    said: str = ""  # the last partial, as JSON
    length: int = 0  # of the answer so far
    shown: int = 0  # of it, as of the last partial

    def frames(self, entry: Entry) -> Iterator[Frame]:
        match entry.event:
            case PartStartEvent(part=TextPart() | ToolCallPart() as part):
                if self.said:
                    yield _attempt_failed(self.attempt, [INTERRUPTED])
                self._reset()
                self.partial = self.new() if self.new else None
                self.delta = TextPartDelta if isinstance(part, TextPart) else ToolCallPartDelta
                yield from self._grow(_begun(part))
            case PartDeltaEvent(
                delta=TextPartDelta(content_delta=text)
                | ToolCallPartDelta(args_delta=str(text)) as delta
            ) if isinstance(delta, self.delta):
                yield from self._grow(text)
            case AttemptFailed(attempt=attempt, body=body):
                self.attempt = attempt + 1
                self._reset()
                yield _attempt_failed(attempt, body["errors"])
            case RunRestarted():
                if self.said:
                    yield _attempt_failed(self.attempt, [RESTARTED])
                self._reset()
            case _:
                pass

    def _reset(self) -> None:
        self.partial, self.said, self.length, self.shown = None, "", 0, 0

    def _grow(self, text: str) -> Iterator[Frame]:
        if self.partial is None:
            return
        self.partial.add(text)
        self.length += len(text)
        for item in self.partial.items():
            yield _item(self.attempt, item)
        is_due = (self.length - self.shown) * SHARE >= self.length - OFTEN
        if self.partial.value is MISSING or not (is_due or self.partial.closed):
            return
        said = dump_exact(self.partial.value)
        if said != self.said:
            self.said, self.shown = said, self.length
            data = {"attempt": self.attempt, "partial": self.partial.value}
            yield "extraction.partial", data


@dataclass(slots=True)
class _ShownChunks:
    """Each chunk once it is read: several are at the same time."""

    list_path: str
    failed: Counter[int] = field(default_factory=Counter[int])

    def frames(self, entry: Entry) -> Iterator[Frame]:
        match entry.event:
            case AttemptFailed(chunk=chunk, attempt=attempt, body=body):
                self.failed[chunk] = attempt
                yield _attempt_failed(attempt, body["errors"], chunk=chunk)
            case ChunkExtracted(chunk=chunk, document=document):
                for index, value in enumerate(_elements(load_exact(document), self.list_path)):
                    item = Item(self.list_path, index, value)
                    yield _item(self.failed[chunk] + 1, item, chunk=chunk)
            case ChunkFailed(chunk=chunk, start=start, end=end, error=error):
                lost = {"chunk": chunk, "start": start, "end": end, "error": error}
                yield "extraction.chunk_failed", lost
            case _:
                pass


def _attempt_failed(attempt: int, errors: list[Any], **chunk: int) -> Frame:
    return "extraction.attempt_failed", {"attempt": attempt, "errors": errors, **chunk}


def _item(attempt: int, item: Item, **chunk: int) -> Frame:
    data = {"attempt": attempt, "path": item.path, "index": item.index, "item": item.item, **chunk}
    return "extraction.item", data


def _begun(part: TextPart | ToolCallPart) -> str:
    said = part.content if isinstance(part, TextPart) else part.args
    return said if isinstance(said, str) else ""


def _elements(data: Any, path: str) -> list[Any]:
    for key in keys(path):
        data = cast(Json, data).get(key) if isinstance(data, dict) else None
    return cast(list[Any], data) if isinstance(data, list) else []

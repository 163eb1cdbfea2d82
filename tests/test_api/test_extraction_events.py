"""The stream of an extraction: a function of its log, the same for who comes back to it."""

import json
from collections.abc import AsyncIterator, Sequence
from decimal import Decimal
from typing import Any

from pydantic_ai.messages import (
    AgentStreamEvent,
    PartDeltaEvent,
    PartStartEvent,
    TextPart,
    TextPartDelta,
    ThinkingPart,
    ThinkingPartDelta,
    ToolCallPart,
    ToolCallPartDelta,
)

from app.api.extraction_events import OFTEN, encode
from app.services.extraction_log import AttemptFailed, ChunkExtracted, ChunkFailed
from app.services.partials import Partial
from app.services.run_log import Entry, RunEnded, RunRestarted

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "tier": {"enum": ["go", "gold"]},
        "lines": {"type": "array", "items": {"type": "string"}},
    },
}
ENDED = RunEnded(status="completed", at=0, output={"data": {}})
WRONG = {"pointer": "/tier", "keyword": "enum", "code": "enum", "message": "neither"}

Told = tuple[str | None, str, Any]  # id, event, data


def calls(text: str = "", index: int = 0) -> PartStartEvent:
    return PartStartEvent(index=index, part=ToolCallPart("answer", text or None))


def more(text: str, index: int = 0) -> PartDeltaEvent:
    return PartDeltaEvent(index=index, delta=ToolCallPartDelta(args_delta=text))


def void(attempt: int = 1, chunk: int = 0) -> AttemptFailed:
    return AttemptFailed(chunk=chunk, attempt=attempt, body={"errors": [WRONG], "raw": "{"})


async def log(events: Sequence[AgentStreamEvent]) -> AsyncIterator[Entry]:
    for seq, event in enumerate(events, 1):
        yield Entry(seq, event)


async def frames(*events: AgentStreamEvent, **options: Any) -> list[bytes]:
    encoded = encode(
        log(events),
        **{
            "run_id": "run_1",
            "partial": lambda: Partial(SCHEMA),
            "completed": lambda event: event.output,
            "failed": lambda event: {"error": event.error},
            **options,
        },
    )
    return [frame async for frame in encoded]


def read(frame: bytes) -> Told:
    fields = dict(line.split(": ", 1) for line in frame.decode().removesuffix("\n\n").split("\n"))
    return fields.get("id"), fields["event"].removeprefix("extraction."), json.loads(fields["data"])


async def told(*events: AgentStreamEvent, **options: Any) -> list[Told]:
    return [read(frame) for frame in await frames(*events, **options)]


async def test_an_answer_is_told_as_it_grows() -> None:
    said = await told(calls('{"tier":'), more('"go'), more('ld","lines":["a'), more('"]}'), ENDED)

    assert said == [
        ("0", "started", {"id": "run_1"}),
        ("1", "partial", {"attempt": 1, "partial": {}}),
        ("3", "partial", {"attempt": 1, "partial": {"tier": "gold", "lines": ["a"]}}),
        ("4", "item", {"attempt": 1, "path": "/lines", "index": 0, "item": "a"}),
        ("5", "completed", {"data": {}}),
    ]


async def test_an_answer_in_text_is_told_too_and_thoughts_are_not() -> None:
    said = await told(
        PartStartEvent(index=0, part=ThinkingPart("hm")),
        PartDeltaEvent(index=0, delta=ThinkingPartDelta(content_delta="{}")),
        PartStartEvent(index=0, part=TextPart("{")),
        more('"lines":["of a call"]'),
        PartDeltaEvent(index=0, delta=TextPartDelta('"lines":["b"]}')),
        ENDED,
    )

    assert [data["partial"] for _, event, data in said if event == "partial"] == [
        {},
        {"lines": ["b"]},
    ]


async def test_a_failed_attempt_begins_anew() -> None:
    said = await told(calls('{"lines":["x"'), void(), calls(), more('{"lines":["y"'), ENDED)

    assert [(event, data.get("attempt")) for _, event, data in said] == [
        ("started", None),
        ("item", 1),
        ("partial", 1),
        ("attempt_failed", 1),
        ("item", 2),
        ("partial", 2),
        ("completed", None),
    ]
    assert said[3][2] == {"attempt": 1, "errors": [WRONG]}
    assert said[5][2]["partial"] == {"lines": ["y"]}


async def test_a_restart_voids_what_was_shown_of_an_attempt() -> None:
    restarted = RunRestarted(replies=0)

    said = await told(void(), calls('{"lines":["x"'), restarted, calls('{"lines":["x"'), ENDED)
    silent = await told(calls(), restarted, calls('{"lines":["x"'), ENDED)

    assert [event for _, event, _ in said[1:]] == [
        *("attempt_failed", "item", "partial"),
        *("attempt_failed", "item", "partial", "completed"),
    ]
    assert said[4][2]["attempt"] == 2
    assert said[4][2]["errors"][0]["code"] == "restarted"
    assert "attempt_failed" not in [event for _, event, _ in silent]


async def test_only_the_last_event_of_an_entry_tells_its_number() -> None:
    said = await told(calls('{"lines":["a","b"]'), more("}"), ENDED)

    assert [(seq, event) for seq, event, _ in said] == [
        ("0", "started"),
        (None, "item"),
        (None, "item"),
        ("1", "partial"),
        ("3", "completed"),
    ]


async def test_who_comes_back_hears_exactly_the_rest() -> None:
    answer = '{"tier":"gold","lines":["a","ü\\n","c"]}'
    events = [
        calls(answer[:20]),
        void(),
        calls(),
        *map(more, answer),
        RunRestarted(replies=0),
        calls(answer[:30]),
        more(answer[30:]),
        ENDED,
    ]
    whole = await frames(*events)

    for seen in range(1, len(events)):
        numbers = [read(frame)[0] for frame in whole]
        heard = max(at for at, number in enumerate(numbers) if number and int(number) <= seen)
        assert await frames(*events, after=seen) == whole[heard + 1 :]


async def test_a_run_that_did_not_succeed_ends_in_one_failure() -> None:
    for status in ("failed", "cancelled", "incomplete"):
        ended = RunEnded(status=status, at=0, error={"code": "deadline", "message": "late"})

        said = await told(calls('{"tier":"gold"'), ended)

        assert said[-1] == ("2", "failed", {"error": {"code": "deadline", "message": "late"}})
        assert {"completed", "failed"} & {event for _, event, _ in said} == {"failed"}


async def test_a_chunked_text_tells_its_chunks_as_they_are_read() -> None:
    error = {"code": "deadline", "message": "late"}

    said = await told(
        calls('{"lines":["a"', index=0),
        calls('{"lines":["x"', index=1),
        more("]}", index=0),
        void(chunk=1),
        ChunkExtracted(chunk=0, document='{"lines":["a","b"]}'),
        ChunkFailed(chunk=2, start=20, end=30, error=error),
        RunRestarted(replies=0),
        ChunkExtracted(chunk=1, document='{"lines":[1.50]}'),
        ChunkExtracted(chunk=3, document='{"lines":null}'),
        ENDED,
        list_path="/lines",
    )

    item = {"attempt": 1, "path": "/lines", "chunk": 0}
    assert said == [
        ("0", "started", {"id": "run_1"}),
        ("4", "attempt_failed", {"attempt": 1, "errors": [WRONG], "chunk": 1}),
        (None, "item", {**item, "index": 0, "item": "a"}),
        ("5", "item", {**item, "index": 1, "item": "b"}),
        ("6", "chunk_failed", {"chunk": 2, "start": 20, "end": 30, "error": error}),
        ("8", "item", {"attempt": 2, "path": "/lines", "chunk": 1, "index": 0, "item": 1.5}),
        ("10", "completed", {"data": {}}),
    ]


async def test_without_partials_the_failures_and_the_end_are_told() -> None:
    said = await told(calls('{"lines":["a"'), void(), calls("{}"), ENDED, partial=None)

    assert [event for _, event, _ in said] == ["started", "attempt_failed", "completed"]


async def test_numbers_keep_their_digits_and_every_event_is_one_line() -> None:
    ended = RunEnded(status="completed", at=0, output={"a": Decimal("1.50"), "b": "x\n\r\u2028ü"})

    *_, partial, completed = await frames(calls('{"a": 0.10, "b": 9007199254740993 '), ended)

    assert '"partial": {"a": 0.10, "b": 9007199254740993}' in partial.decode()
    assert '"a": 1.50' in completed.decode()
    assert partial.count(b"\n") == completed.count(b"\n") == 4  # id, event, data, and a blank


async def test_all_partials_of_a_long_answer_together_grow_with_its_length() -> None:
    text = "long text " * 40_000
    pieces = [text[at : at + 10] for at in range(0, len(text), 10)]

    sent = await frames(calls('{"note":"'), *map(more, pieces), more('"}'), ENDED)
    short = await frames(calls('{"note":"'), *map(more, pieces[: OFTEN // 10 - 1]))

    assert len(short) == OFTEN // 10 + 1  # one for each piece
    assert sum(map(len, sent)) < 400 * len(text)
    assert read(sent[-2])[2]["partial"] == {"note": text}

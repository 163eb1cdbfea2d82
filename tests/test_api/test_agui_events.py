"""A run's log as AG-UI's events."""

import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic_ai.messages import (
    FunctionToolCallEvent,
    FunctionToolResultEvent,
    PartDeltaEvent,
    PartEndEvent,
    PartStartEvent,
    TextPart,
    TextPartDelta,
    ThinkingPart,
    ToolCallPart,
    ToolReturnPart,
)

from app.api.agui import AguiEncoder
from app.models import Run
from app.schemas.agui import RunAgentInput
from app.services.run_log import Entry, RunEnded, RunPaused, entry, parse
from tests.agui import Json, asking, parsed

RUN = Run(
    id="a" * 32, turn_id="a" * 32, program="assistant", options="{}", created_at=datetime.now(UTC)
)
CALL = ToolCallPart("pay", {"amount": 5}, tool_call_id="c1")

LOG = [
    PartStartEvent(index=0, part=ThinkingPart("Hm", id="secret", signature="sealed")),
    PartEndEvent(index=0, part=ThinkingPart("Hm", id="secret", signature="sealed")),
    PartStartEvent(index=1, part=CALL),
    PartEndEvent(index=1, part=CALL),
    FunctionToolCallEvent(CALL),
    RunPaused(calls=[CALL], keys=["k" * 40], until=2**31),
    FunctionToolResultEvent(
        ToolReturnPart(
            "pay",
            "paid",
            tool_call_id="c1",
            metadata=[{"type": "STATE_SNAPSHOT", "snapshot": 1}, {"type": "RAW", "event": 2}],
        )
    ),
    PartStartEvent(index=0, part=TextPart("")),
    PartDeltaEvent(index=0, delta=TextPartDelta("Done.")),
    PartEndEvent(index=0, part=TextPart("Done.")),
    RunEnded(status="completed", at=0, finish_reason="stop", usage={"input_tokens": 3}),
]


async def encoded(entries: list[Entry], **more: Any) -> list[Json]:
    body = RunAgentInput.model_validate(asking())

    async def given() -> AsyncIterator[Entry]:
        for each in entries:
            yield each

    frames = [frame async for frame in AguiEncoder(RUN, body, **more).frames(given())]
    return parsed(b"".join(frames).decode())


async def test_events_are_a_function_of_the_log_alone() -> None:
    live = [entry(seq, event) for seq, event in enumerate(LOG, 1)]
    stored = [parse(each.seq, each.body) for each in live]

    first, second = await encoded(live), await encoded(stored)

    assert first == second
    assert "sealed" not in json.dumps(first)
    ids = [event.get("messageId") for event in first if event["type"].endswith("_START")]
    assert all(each is None or each.startswith(f"{RUN.id}-") for each in ids)
    assert [event["snapshot"] for event in first if event["type"] == "STATE_SNAPSHOT"] == [1]


async def test_a_run_that_resumes_tells_only_what_is_new_and_with_the_same_ids() -> None:
    log = [entry(seq, event) for seq, event in enumerate(LOG, 1)]
    whole = await encoded(log)

    before = await encoded(log[:6])
    rest = await encoded(log, after=6)

    assert before[-1]["outcome"]["type"] == "interrupt"
    assert before[:-1] == whole[: len(before) - 1]
    assert rest[0]["type"] == "RUN_STARTED"
    assert rest[1:-1] == whole[len(before) - 1 : -1]
    assert "usage" in whole[-1] and "usage" not in rest[-1]


@pytest.mark.parametrize("status", ["failed", "cancelled", "incomplete"])
@pytest.mark.parametrize("length", range(len(LOG)))
async def test_whatever_was_begun_is_closed(status: str, length: int) -> None:
    error = {"code": "model_unavailable", "message": "No answer."} if status == "failed" else None
    events = [*LOG[:length], RunEnded(status=status, at=0, error=error)]

    told = await encoded([entry(seq, event) for seq, event in enumerate(events, 1)])

    for began, ended, name in (
        ("TEXT_MESSAGE_START", "TEXT_MESSAGE_END", "messageId"),
        ("TOOL_CALL_START", "TOOL_CALL_END", "toolCallId"),
        ("REASONING_START", "REASONING_END", "messageId"),
        ("REASONING_MESSAGE_START", "REASONING_MESSAGE_END", "messageId"),
    ):
        opened = [event[name] for event in told if event["type"] == began]
        assert opened == [event[name] for event in told if event["type"] == ended]
    last = told[-1]
    if status == "failed":
        assert (last["type"], last["code"]) == ("RUN_ERROR", "model_unavailable")
    else:
        assert last["outcome"] == {"type": "cancelled"}


async def test_what_a_dead_process_began_to_say_is_closed_before_another_begins() -> None:
    events = [
        PartStartEvent(index=0, part=TextPart("On")),
        PartStartEvent(index=0, part=TextPart("One.")),
        PartEndEvent(index=0, part=TextPart("One.")),
        RunEnded(status="completed", at=0, finish_reason="stop"),
    ]

    told = await encoded([entry(seq, event) for seq, event in enumerate(events, 1)])

    assert [event["type"] for event in told[1:-1]] == [
        "TEXT_MESSAGE_START",
        "TEXT_MESSAGE_CONTENT",
        "TEXT_MESSAGE_END",
    ] * 2
    assert told[1]["messageId"] != told[4]["messageId"]


async def test_a_bug_is_told_without_its_words_and_raised() -> None:
    body = RunAgentInput.model_validate(asking())

    async def broken() -> AsyncIterator[Entry]:
        yield entry(1, PartStartEvent(index=0, part=TextPart("Hel")))
        raise RuntimeError("canary: the internals of a bug")

    frames: list[bytes] = []
    with pytest.raises(RuntimeError):
        async for frame in AguiEncoder(RUN, body).frames(broken()):
            frames.append(frame)

    *_, closed, last = parsed(b"".join(frames).decode())
    assert closed["type"] == "TEXT_MESSAGE_END"
    assert (last["type"], last["code"]) == ("RUN_ERROR", "internal")
    assert b"canary" not in b"".join(frames)

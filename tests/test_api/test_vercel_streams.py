"""Vercel AI SDK UI: what a page is told, also one that comes back."""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from httpx2 import AsyncClient
from pydantic_ai.messages import (
    PartDeltaEvent,
    PartEndEvent,
    PartStartEvent,
    TextPart,
    TextPartDelta,
)

from app.api.vercel import VercelEncoder
from app.models import Run
from app.services.run_log import Entry, RunEnded
from tests.plugins import plugged_in
from tests.toolserver import ToolServer
from tests.upstream import Call, Reply, Upstream
from tests.vercel import (
    TALE,
    URL,
    asking,
    chunks_of,
    frames_of,
    messages_of,
    said_in,
    told,
    types,
    user,
)


async def test_the_stream_is_marked_and_ends(alice: AsyncClient, upstream: Upstream) -> None:
    reply = await alice.post(URL, json=asking(user("Hello")))

    assert reply.headers["x-vercel-ai-ui-message-stream"] == "v1"
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert types(reply) == [
        *("start", "start-step", "text-start", "text-delta", "text-end"),
        *("finish-step", "finish"),
    ]
    assert chunks_of(reply)[-1]["finishReason"] == "stop"


async def test_whoever_comes_back_gets_what_is_missing(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when(
        "weather",
        Reply(reasoning="Hm.", text="I look.", calls=(Call("get_weather", {"location": "Tokyo"}),)),
        Reply(text="It is fine in Tokyo.", pace=0.05),
    )
    whole = frames_of(await alice.post(URL, json=asking(user("weather?"))))

    for at, (place, _) in enumerate(whole[1:], 2):
        reply = await alice.get(f"{URL}/chat/stream", headers={"Last-Event-ID": place})
        assert reply.status_code == (204 if at == len(whole) else 200)
        assert frames_of(reply) == whole[at:]
    assert len({place for place, _ in whole}) == len(whole)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply(text="Once upon", finish="length"), "length"),
        (Reply(text="Once upon", finish="content_filter"), "content-filter"),
        (Reply(calls=(Call("get_weather", '{"location": "To'),), finish="length"), "length"),
    ],
)
async def test_an_answer_cut_short_says_why(
    alice: AsyncClient, upstream: Upstream, reply: Reply, reason: str
) -> None:
    upstream.when("tale", reply)

    told_so = chunks_of(await alice.post(URL, json=asking(user("tale"))))

    assert told_so[-1] == {"type": "finish", "finishReason": reason}
    assert "error" not in [chunk["type"] for chunk in told_so]
    assert (await messages_of(alice))[0] == user("tale") | {"parts": [TALE]}


async def test_nothing_of_the_provider_is_told(alice: AsyncClient, upstream: Upstream) -> None:
    upstream.when("Why", Reply(reasoning="Hm.", text="So.", error={"message": "canary"}))

    reply = await alice.post(URL, json=asking(user("Why?")))
    shown = await alice.get(f"{URL}/chat")

    for text in (reply.text, shown.text):
        assert "canary" not in text and "provider" not in text.lower() and "openai" not in text
    assert types(reply)[-3:] == ["error", "finish-step", "finish"]


async def test_a_call_with_bad_arguments_is_shown_as_failed(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when("weather", Reply(calls=(Call("get_weather", {"city": 1}),)), Reply(text="Sorry."))

    reply = await alice.post(URL, json=asking(user("weather?")))

    assert "tool-input-error" in types(reply)
    assert (await messages_of(alice))[-1]["parts"][1]["state"] == "output-error"


async def test_two_messages_at_once_are_both_answered_and_both_told_after_a_reload(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("One", Reply(text="first answer", delay=1))
    upstream.when("Two", Reply(text="second answer"))
    one = asyncio.create_task(alice.post(URL, json=asking(user("One"))))
    await upstream.wait_for_async(1)
    two = asyncio.create_task(alice.post(URL, json=asking(user("One"), user("Two", "u2"))))
    shown: list[dict[str, Any]] = []
    while len(shown) < 3:
        shown = await messages_of(alice)

    whole = await alice.get(f"{URL}/chat/stream")

    assert [message["parts"] == [] for message in shown] == [False, True, False]
    assert said_in(await one) == "first answer" and said_in(await two) == "second answer"
    starts = [chunk["messageId"] for chunk in chunks_of(whole) if chunk["type"] == "start"]
    after = await messages_of(alice)
    assert starts == [after[1]["id"], after[3]["id"]] and starts[0] == shown[1]["id"]
    assert said_in(whole) == "first answersecond answer"
    assert told(upstream) == ["One", "first answer", "Two"]
    busy = await alice.post(
        URL, json=asking(user("One")), headers={"X-Multitask-Strategy": "guess"}
    )
    assert busy.status_code == 422


async def test_a_reply_that_a_process_died_in_is_taken_back() -> None:
    run = Run(id="r", turn_id="r", program="assistant", options="{}")
    events = [
        PartStartEvent(index=0, part=TextPart("On")),
        PartDeltaEvent(index=0, delta=TextPartDelta("ce")),
        PartStartEvent(index=0, part=TextPart("Once")),
        PartEndEvent(index=0, part=TextPart("Once")),
        RunEnded(status="completed", at=0, finish_reason="stop"),
    ]

    async def log() -> AsyncIterator[Entry]:
        for seq, event in enumerate(events, 1):
            yield Entry(seq, event)

    said = [frame.decode() async for frame in VercelEncoder(run).frames(log())]

    assert [re.findall('"type":"([a-z-]+)"', frame) for frame in said] == [
        ["start"],
        ["start-step", "text-start", "text-delta"],
        ["text-delta"],
        ["reset-step", "text-start", "text-delta"],
        ["text-end"],
        ["finish-step", "finish"],
    ]


STRUCTURED = '''
"""Answers with a city."""
from pydantic import BaseModel
from pydantic_ai import Agent, ToolReturn
from app.deps import Deps

class City(BaseModel):
    name: str

async def look(text: str) -> ToolReturn:
    """Looks it up."""
    return ToolReturn("found", metadata=[
        {"type": "source-url", "sourceId": "1", "url": "https://example.com/", "title": "Example"},
        {"type": "unknown"},
    ])

agent = Agent(name="cities", deps_type=Deps, output_type=City, tools=[look])
'''


async def test_values_are_shown_as_text_and_sources_as_sources(
    alice: AsyncClient, upstream: Upstream, tmp_path: Path
) -> None:
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "cities.py").write_text(STRUCTURED)
    upstream.when(
        "capital",
        Reply(text="Hm.", calls=(Call("look", {"text": "France"}),)),
        Reply(calls=(Call("final_result", {"name": "Paris"}),)),
    )

    with plugged_in(tmp_path):
        reply = await alice.post(URL, json=asking(user("Which capital?"), agent="cities"))
        shown = (await messages_of(alice))[-1]["parts"]

    assert said_in(reply) == '{"name":"Paris"}'
    assert "final_result" not in reply.text
    source = {"sourceId": "1", "url": "https://example.com/", "title": "Example"}
    assert {"type": "source-url", **source} in chunks_of(reply)
    assert [part["type"] for part in shown] == [
        *("step-start", "tool-look", "source-url", "step-start", "text"),
    ]
    assert shown[2] == {"type": "source-url", **source}
    assert shown[-1]["text"] == '{"name":"Paris"}'


@pytest.mark.parametrize(
    "result",
    ["[" * 20_000, "[" * 300 + "]" * 300, '["\\ud800"]', "[NaN]", "[1e999]", "[" * 100 + "]" * 100],
)
async def test_what_a_pages_tool_said_stays_readable(
    alice: AsyncClient, upstream: Upstream, result: str
) -> None:
    upstream.when("look", Reply(calls=(Call("look", {}),)), Reply("Seen."))
    tool = {"type": "function", "function": {"name": "look"}}
    said: list[Any] = [{"role": "user", "content": "look"}]
    headers = {"X-Chat-Id": "c"}
    chat = {"model": "assistant", "tools": [tool]}
    first = await alice.post(
        "/v1/chat/completions", json=chat | {"messages": said}, headers=headers
    )
    message = first.json()["choices"][0]["message"]
    call_id = message["tool_calls"][0]["id"]
    said += [message, {"role": "tool", "tool_call_id": call_id, "content": result}]
    done = await alice.post("/v1/chat/completions", json=chat | {"messages": said}, headers=headers)

    assert done.status_code == 200, done.text
    assert (await alice.get(f"{URL}/c")).status_code == 200


async def test_an_id_of_no_event_is_refused(alice: AsyncClient, upstream: Upstream) -> None:
    upstream.when("Slowly", Reply("one two three", pace=60))
    asked = asyncio.create_task(alice.post(URL, json=asking(user("Slowly"))))
    await upstream.wait_for_async(1)

    for odd in ("garbage", "-1", "99999", "1.5.2"):
        refused = await alice.get(f"{URL}/chat/stream", headers={"Last-Event-ID": odd})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "Last-Event-ID")
    await alice.post(f"{URL}/chat/stop")
    await asked

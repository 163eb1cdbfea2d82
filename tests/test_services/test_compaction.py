"""What a model with a small window is sent of a long history, and what is stored of it."""

import json
from itertools import pairwise
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from pydantic_ai.messages import (
    BinaryContent,
    ModelMessage,
    ModelRequest,
    ModelResponse,
    SystemPromptPart,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)
from pydantic_ai.usage import RequestUsage

from app.db.session import make_engine
from app.services.compaction import DOCUMENT, IMAGE, KEPT, UNDERRATED, compact, estimate, measure
from app.services.conversation import messages_by_run
from tests.conftest import settings_of
from tests.toolserver import ToolServer
from tests.upstream import Call, Reply, Upstream

TOKEN = "word"  # by the estimate


def says(text: str, **usage: Any) -> ModelResponse:
    return ModelResponse([TextPart(text)], usage=RequestUsage(**usage))


def asks(text: str) -> ModelRequest:
    return ModelRequest([UserPromptPart(text)])


def turn(name: str, tokens: int = 100) -> list[ModelMessage]:
    return [asks(f"{name}? {TOKEN * tokens}"), says(f"{name}.")]


def called(name: str, result: Any, **more: Any) -> list[ModelMessage]:
    """A turn with a tool call."""
    call = ToolCallPart("look", {"at": name}, tool_call_id=name)
    return [
        asks(f"{name}?"),
        ModelResponse([call]),
        ModelRequest([ToolReturnPart("look", result, tool_call_id=name, **more)]),
        says(f"{name}."),
    ]


def prompts(messages: list[ModelMessage]) -> list[str]:
    return [
        str(part.content)
        for message in messages
        for part in message.parts
        if isinstance(part, UserPromptPart)
    ]


def results(messages: list[ModelMessage]) -> list[str]:
    return [
        part.model_response_str()
        for message in messages
        for part in message.parts
        if isinstance(part, ToolReturnPart)
    ]


def total(messages: list[ModelMessage]) -> int:
    return sum(map(estimate, messages))


def test_what_fits_is_sent_as_it_is():
    messages = [*turn("one"), *turn("two")]

    assert compact(messages, total(messages)) is messages


def test_large_results_are_shortened_first_and_the_oldest_of_them():
    big = {"rows": ["x" * 40] * 1000}
    messages = [*called("one", big), *called("two", big), *called("three", "small"), *turn("now")]
    limit = total(messages) - 1

    sent = compact(messages, limit)

    assert prompts(sent) == prompts(messages)
    first, *others = results(sent)
    assert others == results(messages)[1:]
    assert first.startswith(results(messages)[0][:KEPT])
    assert first.endswith(f"[{len(results(messages)[0]) - KEPT} more characters left out]")
    assert total(sent) <= limit


def test_results_of_the_last_turn_and_failures_stay_whole():
    messages = [
        *called("one", "x" * 9000, outcome="failed"),
        *called("now", "x" * 9000)[:-1],
    ]

    sent = compact(messages, 100)

    assert results(sent) == ["x" * 9000]
    assert prompts(sent)[0].endswith("now?")


def test_then_the_oldest_turns_are_left_out_with_a_note():
    messages = [message for name in "abcdefgh" for message in turn(name)]
    limit = total(messages) * 3 // 4

    sent = compact(messages, limit)

    assert total(sent) <= limit
    note, question = prompts(sent)[0].split("\n\n")
    assert note == (
        "[The conversation is too long to be read at once: its first 3 turns were left out.]"
    )
    assert question.startswith("d?")
    assert sent[1:] == messages[7:]
    assert prompts(messages)[0].startswith("a?")  # the history itself is as it was


def test_the_note_stands_before_an_attachment_too():
    image = BinaryContent(b"\x89PNG", media_type="image/png")
    messages = [*turn("one", 3000), ModelRequest([UserPromptPart(["What is it?", image])])]

    [sent] = compact(messages, 2000)

    [part] = sent.parts
    assert isinstance(part, UserPromptPart)
    note, *content = part.content
    assert "its first turn was left out" in str(note)
    assert content == ["What is it?", image]


def test_the_last_turn_stays_even_if_it_does_not_fit():
    messages = [*turn("one"), *called("now", "x" * 9000)]

    sent = compact(messages, 10)

    assert sent[1:] == messages[3:]
    assert compact(sent, 10) is sent


def test_system_prompts_stay():
    first = ModelRequest([SystemPromptPart("Be kind."), UserPromptPart(TOKEN * 500)])
    messages = [first, says("ok"), *turn("two"), *turn("now")]

    sent = compact(messages, 250)

    assert sent[0].parts[0] == SystemPromptPart("Be kind.", timestamp=first.parts[0].timestamp)  # pyright: ignore
    assert prompts(sent)[0].endswith(TOKEN)
    assert len(prompts(sent)) == 2


def test_a_call_keeps_its_result_where_the_next_question_came_with_it():
    """As after a run that was stopped: its results and the next prompt are one request."""
    stopped = called("stopped", "late")[:2]
    both = ModelRequest(
        [ToolReturnPart("look", "late", tool_call_id="stopped"), UserPromptPart("and now?")]
    )
    messages = [*turn("one", 1000), *stopped, both, says("so"), *turn("two"), *turn("now")]

    for limit in range(10, total(messages), 20):
        sent = compact(messages, limit)
        calls = [
            call.tool_call_id for m in sent if isinstance(m, ModelResponse) for call in m.tool_calls
        ]
        assert calls == ["stopped"] * len(results(sent))
        assert "now?" in prompts(sent)[-1]


def test_requests_that_follow_each_other_mostly_begin_alike():
    messages: list[ModelMessage] = []
    beginnings: list[str] = []
    for number in range(200):
        messages += turn(str(number), 20)
        sent = compact(messages, 1000)
        assert total(sent) <= 1050  # the note is not counted
        beginnings.append(prompts(sent)[0])

    changes = sum(a != b for a, b in pairwise(beginnings))
    assert 10 < changes < 30  # of 199


def test_the_same_history_is_always_cut_alike():
    messages = [message for name in "abcdefgh" for message in turn(name)]

    assert compact(messages, 500) == compact(list(messages), 500)


def test_estimates():
    image = BinaryContent(b"\x89PNG" * 99, media_type="image/png")
    pdf = BinaryContent(b"%PDF-" * 99, media_type="application/pdf")
    text = BinaryContent(b"word" * 99, media_type="text/plain")

    def size(*content: Any) -> int:
        return estimate(ModelRequest([UserPromptPart(list(content))])) - estimate(asks(""))

    assert size("word" * 50) == 50
    assert size("猫" * 100) == 75
    assert size(image) == IMAGE
    assert size(pdf) == DOCUMENT
    assert size(text) == 99
    assert estimate(ModelResponse([ThinkingPart("x" * 999)])) == 0


def test_the_models_own_count_is_believed_where_it_is_more():
    messages: list[ModelMessage] = [
        asks(TOKEN * 100),
        says("ok", input_tokens=150 + 200, output_tokens=3000),  # thoughts are not sent again
        asks(TOKEN * 100),
        says("ok", input_tokens=150 + 200 + 300, output_tokens=1),
        asks(TOKEN * 100),
        says("ok", input_tokens=10, output_tokens=1),  # shortened meanwhile
        asks(TOKEN * 100),
        says("ok", input_tokens=90_000, output_tokens=1),  # and not any more
        asks(TOKEN * 100),
    ]

    sizes = measure(messages, fixed=150)

    rough = estimate(messages[0])
    assert sizes[0] == 200
    assert 290 <= sum(sizes[1:3]) <= 300
    assert sum(sizes[3:5]) == rough + 4
    assert sum(sizes[5:7]) == UNDERRATED * (rough + 4)
    assert sizes[-1] == rough


# Through the server


@pytest.fixture
def environ(environ: dict[str, str]) -> dict[str, str]:
    return {**environ, "CONTEXT_TOKENS": "4000"}


@pytest.mark.parametrize("stream", [True, False])
async def test_the_model_is_sent_a_part_and_the_whole_is_stored(
    openai_client: AsyncOpenAI, upstream: Upstream, environ: dict[str, str], stream: bool
) -> None:
    last: str | None = None
    for number in range(12):
        asked: Any = {"input": f"Question {number}: {TOKEN * 300}", "previous_response_id": last}
        reply: Any = await openai_client.responses.create(model="assistant", stream=stream, **asked)
        if stream:
            reply = [event async for event in reply][-1].response
        assert reply.status == "completed"
        last = reply.id

    sent = [request.body["messages"] for request in upstream.requests]
    assert max(len(json.dumps(request.body)) // 4 for request in upstream.requests) < 4000
    assert all(messages[0]["role"] == "system" for messages in sent)
    assert "too long to be read at once" not in str(sent[2])
    assert sent[-1][1]["content"].startswith("[The conversation is too long")
    assert sent[-1][-1]["content"].startswith("Question 11")
    engine = make_engine(settings_of(environ))
    async with engine.connect() as connection:
        by_run = await messages_by_run(connection, str(last).removeprefix("resp_"))
    await engine.dispose()
    stored = [message for messages in by_run.values() for message in messages]
    questions = [f"Question {number}: {TOKEN * 300}" for number in range(12)]
    assert prompts(stored) == questions
    assert len(stored) == 24


async def test_steps_of_a_compacted_run_are_stored_as_ever(
    openai_client: AsyncOpenAI, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when("Weather", Reply(calls=(Call("get_weather", {"location": "Tokyo"}),)), Reply("!"))
    first = await openai_client.responses.create(model="assistant", input=TOKEN * 3500)

    second = await openai_client.responses.create(
        model="assistant", input="Weather?", previous_response_id=first.id
    )
    await openai_client.responses.create(
        model="assistant", input="Thanks", previous_response_id=second.id
    )

    assert [item.type for item in second.output] == ["mcp_call", "message"]
    roles = [[part["role"] for part in seen.body["messages"]] for seen in upstream.requests]
    assert roles[1:] == [
        ["system", "user"],
        ["system", "user", "assistant", "tool"],
        ["system", "user", "assistant", "tool", "assistant", "user"],
    ]
    assert "its first turn was left out" in upstream.requests[-1].body["messages"][1]["content"]
    assert tools.count("/v1/search") == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_what_is_too_long_even_so_fails_as_such(
    openai_client: AsyncOpenAI, upstream: Upstream, stream: bool
) -> None:
    error = {"code": "context_length_exceeded", "message": "Too long.", "type": "invalid"}
    upstream.when("word", Reply(status=400, error=error))

    with pytest.raises(openai.BadRequestError) as caught:
        await openai_client.chat.completions.create(
            model="assistant", messages=[{"role": "user", "content": TOKEN * 9000}], stream=stream
        )

    assert caught.value.code == "context_length_exceeded"

"""A model that fails, hangs or never ends: asked again as often as said, and never for ever."""

import asyncio
import gzip
import json
import time
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from pydantic_ai.exceptions import ModelAPIError, ModelHTTPError
from pydantic_ai.messages import (
    ModelMessage,
    ModelRequest,
    ModelResponse,
    PartDeltaEvent,
    PartStartEvent,
    TextPart,
    TextPartDelta,
    UserPromptPart,
)
from pydantic_ai.models import ModelRequestParameters

from app.services.attempts import ModelResting, ReplyVoid
from app.services.model import Models, make_models
from tests.conftest import settings_of
from tests.upstream import Reply, Upstream

SOON = 10  # seconds in which all of this must have ended, whoever else is busy here

BROKEN: dict[str, Reply] = {
    "500": Reply(status=500),
    "429": Reply(status=429),
    "429, later": Reply(status=429, headers={"retry-after": "nan"}),
    "408": Reply(status=408),
    "dropped before the status line": Reply("one two", drop_after=0),
    "dropped before the first token": Reply("one two", drop_after=1),
    "no JSON": Reply(raw=(b"data: {nonsense\n\n",)),
    "no UTF-8": Reply(raw=(b"data: \xff\xfe\n\n",)),
    "nothing": Reply(raw=(b"",)),
    "another coding": Reply("one", headers={"content-encoding": "br"}),
    "no gzip": Reply("one two", headers={"content-encoding": "gzip"}),
    "an error in the stream": Reply(error={"message": "down", "type": "server_error"}),
}


def chunk(**delta: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1790000000, "model": "m"}
    return b"data: " + json.dumps({**head, "choices": [choice]}).encode() + b"\n\n"


HANGING: dict[str, Reply] = {
    "accepts and never answers": Reply("one", hang=True, hang_after=0),
    "headers, then nothing": Reply(raw=(b"", b"x"), hang=True),
    "the role, then nothing": Reply("one", hang=True),
    "comments for ever": Reply(raw=(b": ping\n\n",), endless=True, pace=0.02),
    "empty chunks for ever": Reply(raw=(chunk(content=""),), endless=True, pace=0.02),
    "a byte at a time": Reply(raw=(b"d",), endless=True, pace=0.02),
}


@asynccontextmanager
async def asking(upstream: Upstream, **changes: Any) -> AsyncIterator[Models]:
    settings = settings_of(
        {"OPENAI_BASE_URL": upstream.url, "OPENAI_API_KEY": "k"},
        **{"model": "openai-chat:first", "model_retries": 2, **changes},
    )
    models = make_models(settings)
    assert models.model  # what it imports takes long, and is not what is timed here
    try:
        yield models
    finally:
        await models.close()


async def ask(models: Models, text: str = "Go.", *, stream: bool = True) -> ModelResponse:
    messages: list[ModelMessage] = [ModelRequest([UserPromptPart(text)])]
    parameters = ModelRequestParameters()
    if not stream:
        return await models.model.request(messages, None, parameters)
    async with models.model.request_stream(messages, None, parameters) as reply:
        async for _ in reply:
            pass
        return reply.get()


async def told(models: Models, text: str = "Go.") -> list[str]:
    """What was said, piece by piece; `VOID` where it was taken back."""
    messages: list[ModelMessage] = [ModelRequest([UserPromptPart(text)])]
    said: list[str] = []
    async with models.model.request_stream(messages, None, ModelRequestParameters()) as reply:
        async for event in reply:
            match event:
                case PartStartEvent(part=TextPart(content=piece)):
                    said.append(piece)
                case PartDeltaEvent(delta=TextPartDelta(content_delta=piece)):
                    said.append(piece)
                case _ if isinstance(event, ReplyVoid):
                    said.append("VOID")
                case _:
                    pass
    return said


def asked(upstream: Upstream) -> list[str]:
    return [request.body["model"] for request in upstream.requests]


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("fault", BROKEN)
async def test_a_failing_model_is_asked_once_and_as_often_again_as_said(
    upstream: Upstream, fault: str, stream: bool
) -> None:
    upstream.when("", BROKEN[fault])

    async with asking(upstream) as models:
        with pytest.raises(Exception) as caught:
            await ask(models, stream=stream)

    assert type(caught.value).__name__ in (
        *("ModelAPIError", "ModelHTTPError", "UnexpectedModelBehavior"),
    )
    assert len(upstream.requests) == 3


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_no_retries_means_one_request(upstream: Upstream, stream: bool) -> None:
    upstream.when("", Reply(status=503))

    async with asking(upstream, model_retries=0) as models:
        with pytest.raises(ModelHTTPError):
            await ask(models, stream=stream)

    assert len(upstream.requests) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
async def test_what_will_not_pass_is_asked_once(upstream: Upstream, status: int) -> None:
    upstream.when("", Reply(status=status))

    async with asking(upstream) as models:
        with pytest.raises(ModelHTTPError) as caught:
            await ask(models)

    assert caught.value.status_code == status
    assert len(upstream.requests) == 1


async def test_a_server_that_says_not_to_ask_again_is_heeded(upstream: Upstream) -> None:
    upstream.when("", Reply(status=429, headers={"x-should-retry": "false"}))

    async with asking(upstream) as models:
        with pytest.raises(ModelHTTPError):
            await ask(models)

    assert len(upstream.requests) == 1


async def test_retry_after_is_honoured(upstream: Upstream) -> None:
    times = iter([Reply(status=429, headers={"retry-after": "1"}), Reply("well")])
    upstream.when("", lambda _: next(times))

    async with asking(upstream) as models:
        assert (await ask(models)).text == "well"

    first, second = upstream.requests
    assert second.at - first.at >= 1


async def test_who_wants_to_be_left_alone_for_long_is_not_waited_for(upstream: Upstream) -> None:
    upstream.when("", Reply(status=429, headers={"retry-after": "600"}))

    async with asking(upstream) as models:
        with pytest.raises(ModelHTTPError):
            await ask(models)

    assert len(upstream.requests) == 1


@pytest.mark.parametrize("fault", HANGING)
async def test_a_stream_without_a_token_ends_in_time(upstream: Upstream, fault: str) -> None:
    upstream.when("", HANGING[fault])

    async with asking(upstream, model_retries=1, first_token_timeout=0.3) as models:
        begun = time.monotonic()
        with pytest.raises(ModelAPIError):
            await ask(models)

    assert time.monotonic() - begun < SOON
    assert len(upstream.requests) == 2
    upstream.wait_until(lambda: all(request.aborted for request in upstream.requests))


@pytest.mark.parametrize(
    "silence",
    [
        Reply("one two three", hang=True, hang_after=2),
        Reply(raw=(chunk(content="one"), b": ping\n\n"), endless=True, pace=0.02),
        Reply(raw=(chunk(content="one"), chunk(content="")), endless=True, pace=0.02),
        Reply(raw=(chunk(content="one"), b"d"), endless=True, pace=0.02),
    ],
    ids=["nothing", "comments", "empty chunks", "bytes"],
)
async def test_a_stream_that_falls_silent_ends_in_time(upstream: Upstream, silence: Reply) -> None:
    upstream.when("", silence)

    async with asking(upstream, model_retries=0, model_timeout=0.3) as models:
        begun = time.monotonic()
        with pytest.raises(ModelAPIError):
            await ask(models)

    assert time.monotonic() - begun < SOON
    upstream.wait_until(lambda: upstream.requests[0].aborted)


async def test_tokens_that_come_slowly_are_no_silence(upstream: Upstream) -> None:
    upstream.when("", Reply("one two three four five six", pace=0.15))

    async with asking(
        upstream, model_retries=0, model_timeout=0.6, first_token_timeout=1
    ) as models:
        assert (await ask(models)).text == "one two three four five six"


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_no_reply_takes_longer_than_the_whole_may(upstream: Upstream, stream: bool) -> None:
    upstream.when("", Reply(raw=(chunk(content="on and "),), endless=True, pace=0.05))

    async with asking(upstream, reply_timeout=0.7) as models:
        begun = time.monotonic()
        with pytest.raises(ModelAPIError):
            await ask(models, stream=stream)

    assert time.monotonic() - begun < SOON
    assert len(upstream.requests) == 1  # there is no time left for another


ZEROS = gzip.compress(bytes(300 * 1024 * 1024), 1)
BOMB = tuple(ZEROS[at : at + 65536] for at in range(0, len(ZEROS), 65536))
ENDLESS: dict[str, Reply] = {
    "a body": Reply(raw=(b"x" * 65536,), endless=True),
    "lines": Reply(raw=(b"abc\n" * 16384,), endless=True),
    "a gzip bomb": Reply(raw=BOMB, headers={"content-encoding": "gzip"}),
    "tokens": Reply(raw=(chunk(content="word " * 10000),), endless=True),
}


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("fault", ENDLESS)
async def test_a_reply_without_end_costs_little_memory(
    upstream: Upstream, fault: str, stream: bool
) -> None:
    upstream.when("", ENDLESS[fault])

    async with asking(upstream, model_retries=0) as models:
        tracemalloc.start()
        try:
            with pytest.raises(Exception) as caught:
                await ask(models, stream=stream)
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

    assert type(caught.value).__name__ in ("ModelAPIError", "UnexpectedModelBehavior")
    assert most < 50 * 1024 * 1024


@pytest.mark.parametrize("whole", [True, False], ids=["before it spoke", "while it spoke"])
async def test_a_reply_that_breaks_off_is_made_anew(upstream: Upstream, whole: bool) -> None:
    times = iter([Reply("one two", pace=0.1, drop_after=1 if whole else 2), Reply("three four")])
    upstream.when("", lambda _: next(times))

    async with asking(upstream) as models:
        said = "".join(await told(models))

    assert said == ("three four" if whole else "one VOIDthree four")
    assert len(upstream.requests) == 2


async def test_what_was_said_stays_where_nothing_better_comes(upstream: Upstream) -> None:
    times = iter([Reply("one two", pace=0.1, drop_after=2), Reply(status=500), Reply(status=500)])
    upstream.when("", lambda _: next(times))
    messages: list[ModelMessage] = [ModelRequest([UserPromptPart("Go.")])]

    async with asking(upstream) as models:
        model = models.model
        async with model.request_stream(messages, None, ModelRequestParameters()) as reply:
            with pytest.raises(ModelAPIError):
                async for event in reply:
                    assert not isinstance(event, ReplyVoid)
            assert reply.get().text == "one "

    assert len(upstream.requests) == 3


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("status", [401, 404, 429, 500])
async def test_another_model_stands_in(upstream: Upstream, status: int, stream: bool) -> None:
    def answer(body: dict[str, Any]) -> Reply:
        return Reply("I am here") if body["model"] == "second" else Reply(status=status)

    upstream.when("", answer)

    async with asking(upstream, model_retries=1, fallback_models="openai-chat:second") as models:
        reply = await ask(models, stream=stream)

    assert (reply.text, reply.model_name) == ("I am here", "second")
    assert asked(upstream) == [*["first"] * (2 if status >= 429 else 1), "second"]


async def test_another_model_goes_on_where_one_breaks_off(upstream: Upstream) -> None:
    def answer(body: dict[str, Any]) -> Reply:
        second = body["model"] == "second"
        return Reply("I am here") if second else Reply("one two", pace=0.1, drop_after=2)

    upstream.when("", answer)

    async with asking(upstream, model_retries=1, fallback_models="openai-chat:second") as models:
        said = "".join(await told(models))

    assert said == "one VOIDone VOIDI am here"
    assert asked(upstream) == ["first", "first", "second"]


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_nobody_stands_in_for_a_request_at_fault(upstream: Upstream, status: int) -> None:
    upstream.when("", Reply(status=status))

    async with asking(upstream, fallback_models="openai-chat:second") as models:
        with pytest.raises(ModelHTTPError):
            await ask(models)

    assert asked(upstream) == ["first"]


async def test_the_first_model_s_failure_is_what_is_told(upstream: Upstream) -> None:
    upstream.when("", lambda body: Reply(status=503 if body["model"] == "first" else 401))

    async with asking(upstream, model_retries=0, fallback_models="openai-chat:second") as models:
        with pytest.raises(ModelHTTPError) as caught:
            await ask(models)

    assert caught.value.status_code == 503
    assert asked(upstream) == ["first", "second"]


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
async def test_a_model_that_keeps_failing_is_left_alone_and_tried_again(
    upstream: Upstream, stream: bool
) -> None:
    down = [True]
    upstream.when("", lambda _: Reply(status=500) if down[0] else Reply("back"))

    async with asking(upstream, model_retries=0, breaker_failures=3, breaker_pause=1) as models:
        for _ in range(3):
            with pytest.raises(ModelHTTPError):
                await ask(models, stream=stream)
        breaker = models.breakers["first"]
        assert (breaker.state, breaker.opened) == ("open", 1)
        with pytest.raises(ModelResting) as resting:
            await ask(models, stream=stream)
        assert 0 < resting.value.seconds <= 1
        assert len(upstream.requests) == 3  # nobody was asked

        while breaker.state == "open":
            await asyncio.sleep(0.05)
        with pytest.raises(ModelHTTPError):  # the trial
            await ask(models, stream=stream)
        assert (len(upstream.requests), breaker.state, breaker.opened) == (4, "open", 2)

        down[0] = False
        while breaker.state == "open":
            await asyncio.sleep(0.05)
        assert (await ask(models, stream=stream)).text == "back"
        assert (breaker.state, breaker.failures) == ("closed", 0)


async def test_one_request_alone_tries_a_model_that_rests(upstream: Upstream) -> None:
    times = iter([Reply(status=500), Reply("back", delay=1)])
    upstream.when("", lambda _: next(times))

    async with asking(upstream, model_retries=0, breaker_failures=1, breaker_pause=0.2) as models:
        with pytest.raises(ModelHTTPError):
            await ask(models)
        breaker = models.breakers["first"]
        await asyncio.sleep(0.3)
        trial = asyncio.create_task(ask(models))
        await upstream.wait_for_async(2)
        with pytest.raises(ModelResting):
            await ask(models)
        assert (await trial).text == "back"
        assert breaker.state == "closed"


async def test_a_trial_that_nobody_waits_for_makes_room_for_another(upstream: Upstream) -> None:
    times = iter([Reply(status=500), Reply("", hang=True, hang_after=0), Reply("back")])
    upstream.when("", lambda _: next(times))

    async with asking(upstream, model_retries=0, breaker_failures=1, breaker_pause=0.2) as models:
        with pytest.raises(ModelHTTPError):
            await ask(models)
        await asyncio.sleep(0.3)
        trial = asyncio.create_task(ask(models))
        await upstream.wait_for_async(2)
        trial.cancel()
        await asyncio.gather(trial, return_exceptions=True)
        assert (await ask(models)).text == "back"


@pytest.mark.parametrize("status", [400, 401, 429])
async def test_a_model_that_answers_is_not_left_alone(upstream: Upstream, status: int) -> None:
    upstream.when("", Reply(status=status))

    async with asking(upstream, model_retries=0, breaker_failures=1) as models:
        for _ in range(3):
            with pytest.raises(ModelHTTPError):
                await ask(models)

    assert models.breakers["first"].state == "closed"


async def test_while_a_model_rests_another_stands_in_at_once(upstream: Upstream) -> None:
    upstream.when(
        "", lambda body: Reply("here") if body["model"] == "second" else Reply(status=500)
    )

    async with asking(
        upstream, model_retries=0, breaker_failures=1, fallback_models="openai-chat:second"
    ) as models:
        await ask(models)
        await ask(models)

    assert asked(upstream) == ["first", "second", "second"]


@pytest.mark.parametrize("name", ["second", "nowhere:second", "anthropic:second"])
def test_a_stand_in_that_cannot_be_is_refused_at_the_start(name: str) -> None:
    settings = settings_of({"MODEL": "openai-chat:first"}, fallback_models=name)

    with pytest.raises(ValueError, match="FALLBACK_MODELS"):
        make_models(settings)

"""`useChat` of @ai-sdk/react 4 with ai 7, unmodified and not configured, against the server."""

import re
from typing import Any

import pytest
from httpx2 import AsyncClient

from tests.clients.node import Node
from tests.server import ServerProcess
from tests.toolserver import ToolServer
from tests.upstream import Call, Reply, Upstream

WEATHER = Call("get_weather", {"location": "Tokyo"})


async def play(node: Node, *arguments: str, **environ: Any) -> dict[str, Any]:
    """What the page shows at the scenario's end."""
    [end] = await node("vercel", *arguments, **environ)
    return end


def text(said: str) -> dict[str, Any]:
    return {"text": said, "state": "done"}


def parts(page: dict[str, Any], message: int = -1, of: str = "messages") -> list[Any]:
    return page[of][message]["parts"]


def tool(page: dict[str, Any], at: int, of: str = "messages") -> dict[str, Any]:
    return [part for part in parts(page, of=of) if "tool" in part][at]


def told(upstream: Upstream, request: int = -1) -> list[dict[str, Any]]:
    """What the model was told, below the instructions."""
    messages = upstream.requests[request].body["messages"]
    return [message for message in messages if message["role"] != "system"]


async def test_a_text_is_streamed_into_one_message(node: Node, upstream: Upstream) -> None:
    upstream.when("Hello", Reply(text="Hello to you.", pace=0.05))

    page = await play(node, "ask", "Hello")

    assert parts(page) == ["step", text("Hello to you.")]
    assert [message["role"] for message in page["messages"]] == ["user", "assistant"]
    assert page["error"] is None and "streaming" in page["seen"] and page["posts"] == 1


async def test_the_history_is_the_servers(node: Node, upstream: Upstream) -> None:
    await play(node, "ask", "My name is Ada", "Who am I?", "Are you sure?")

    assert [message["content"] for message in told(upstream)] == [
        *("My name is Ada", "ok"),
        *("Who am I?", "ok"),
        "Are you sure?",
    ]


async def test_the_servers_tools_run_there_and_are_shown(
    node: Node, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when("weather", Reply(text="Let me look.", calls=(WEATHER,)), Reply(text="Fine."))

    page = await play(node, "ask", "weather in Tokyo?")

    step, look, call, next_step, answer = parts(page)
    assert (step, next_step) == ("step", "step")
    assert (look, answer) == (text("Let me look."), text("Fine."))
    assert (call["tool"], call["state"]) == ("get_weather", "output-available")
    assert call["input"] == {"location": "Tokyo"} and "Tokyo" in str(call["output"])
    assert tools.count("/v1/search") == 1 and page["posts"] == 1


async def test_parallel_calls_are_parts_of_one_step(node: Node, upstream: Upstream) -> None:
    cities = ("Tokyo", "Lisbon", "Nowhere")
    calls = tuple(Call("get_weather", {"location": city}) for city in cities)
    upstream.when("weather", Reply(calls=calls), Reply(text="Fine."))

    page = await play(node, "ask", "weather?")

    calls_shown = [part for part in parts(page) if "tool" in part]
    assert [call["input"]["location"] for call in calls_shown] == list(cities)
    assert [call["state"] for call in calls_shown] == ["output-available"] * 2 + ["output-error"]
    assert parts(page).count("step") == 2


async def test_reasoning_is_shown_apart(node: Node, upstream: Upstream) -> None:
    upstream.when("Why", Reply(reasoning="Because of that.", text="Therefore."))

    page = await play(node, "ask", "Why?")

    said = {"reasoning": "Because of that.", "state": "done"}
    assert parts(page) == ["step", said, text("Therefore.")]


async def test_a_tool_of_the_pages_own_goes_on_in_the_same_message(
    node: Node, upstream: Upstream
) -> None:
    upstream.when("door", Reply(calls=(Call("open_door", {"number": 3}),)), Reply(text="Open."))

    page = await play(node, "clientTool")

    assert [message["role"] for message in page["messages"]] == ["user", "assistant"]
    assert parts(page)[2:] == ["step", text("Open.")]
    assert tool(page, 0)["output"] == {"open": True}
    assert page["called"] == ["open_door"] and page["posts"] == 2
    assert page["reloaded"] == page["messages"]
    assert told(upstream)[-1]["role"] == "tool"
    assert told(upstream)[-1]["content"] == '{"open":true}'
    assert [each["function"]["name"] for each in upstream.requests[-1].body["tools"]].count(
        "open_door"
    ) == 1


async def test_a_tool_of_the_pages_own_may_fail(node: Node, upstream: Upstream) -> None:
    upstream.when("door", Reply(calls=(Call("open_door", {"number": 3}),)), Reply(text="A pity."))

    page = await play(node, "clientTool", "It is stuck.")

    assert parts(page)[-1] == text("A pity.")
    assert told(upstream)[-1]["content"] == "Error: It is stuck."


async def test_an_approved_tool_runs_and_its_result_is_shown_in_the_same_message(
    tester: None, node: Node, upstream: Upstream
) -> None:
    upstream.when("Erase", Reply(text="Sure?", calls=(Call("erase"),)), Reply(text="Done."))

    page = await play(node, "approve", "Erase it", "yes", AGENT="tester")

    assert tool(page, 0, of="waiting")["state"] == "approval-requested"
    assert page["idle"] == 204
    assert page["loaded"] == page["waiting"] and page["keys"] == page["asked"]
    assert re.fullmatch("[0-9a-f]{40}", page["keys"][0])
    assert tool(page, 0)["output"] == "erased"
    assert parts(page)[-2:] == ["step", text("Done.")]
    assert len(page["messages"]) == 2 and page["error"] is None
    assert page["reloaded"] == page["messages"]


async def test_a_denied_tool_does_not_run_and_the_model_is_told_why(
    tester: None, node: Node, upstream: Upstream
) -> None:
    upstream.when("Erase", Reply(calls=(Call("erase"),)), Reply(text="I let it be."))

    page = await play(node, "approve", "Erase it", "Not today.", AGENT="tester")

    assert tool(page, 0)["state"] == "output-denied"
    assert parts(page)[-2:] == ["step", text("I let it be.")]
    assert "Not today." in told(upstream)[-1]["content"]


async def test_each_of_two_questions_has_its_own_answer(
    tester: None, node: Node, upstream: Upstream
) -> None:
    calls = (Call("erase"), Call("shout", {"text": "hi"}), Call("erase"))
    upstream.when("Erase", Reply(calls=calls), Reply(text="Half done."))

    page = await play(node, "approve", "Erase it", "yes", "Not twice.", AGENT="tester")

    states = [part["state"] for part in parts(page) if "tool" in part]
    assert states == ["output-available", "output-available", "output-denied"]
    assert parts(page)[-1] == text("Half done.")


async def test_a_question_can_be_answered_after_a_reload(
    tester: None, node: Node, upstream: Upstream
) -> None:
    upstream.when("Erase", Reply(calls=(Call("erase"),)), Reply(text="Done."))

    page = await play(node, "approveAfterReload", "Erase it", AGENT="tester")

    assert tool(page, 0)["output"] == "erased" and parts(page)[-1] == text("Done.")
    assert len(page["messages"]) == 2 and page["error"] is None


PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJg"
    "gg=="
)


async def test_an_image_reaches_the_model_and_comes_back_with_a_reload(
    node: Node, upstream: Upstream
) -> None:
    url = f"data:image/png;base64,{PIXEL}"
    upstream.when("What is this", Reply(text="A pixel."))

    page = await play(node, "image", url, "pixel.png")

    image, question = told(upstream)[-1]["content"]
    assert image["image_url"]["url"] == url and question["text"] == "What is this?"
    assert parts(page)[-1] == text("A pixel.")
    asked = page["reloaded"][0]["parts"]
    assert asked[0]["url"] == url and asked[0]["mediaType"] == "image/png"


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply(status=500), "The model did not answer; try again."),
        (Reply(status=429), "The model is overloaded; try again later."),
        (Reply(status=401), "The model refused this server's credential."),
        (Reply(text="Once upon a time", drop_after=3), "The model did not answer; try again."),
    ],
)
async def test_a_failure_of_the_model_is_an_error_of_the_chat(
    node: Node, upstream: Upstream, reply: Reply, message: str
) -> None:
    upstream.when("tale", reply)

    page = await play(node, "ask", "A tale, please")

    assert (page["status"], page["error"]) == ("error", message)
    said = parts(page)
    assert "streaming" not in str(said)
    assert ("Once" in str(said)) == bool(reply.text)


async def test_after_a_failure_the_chat_goes_on(node: Node, upstream: Upstream) -> None:
    upstream.when("first", Reply(status=500))
    upstream.when("second", Reply(text="Here I am."))

    page = await play(node, "ask", "first", "second")

    assert (page["status"], page["error"]) == ("ready", None)
    assert parts(page)[-1] == text("Here I am.")


async def test_stop_ends_the_models_answer_and_the_chat_goes_on(
    node: Node, upstream: Upstream
) -> None:
    upstream.when("tale", Reply(text="Once upon a time " * 200, pace=0.05))
    upstream.when("Thanks", Reply(text="Welcome."))

    page = await play(node, "stop", "A tale", "Thanks")

    assert page["stopped"]["stopped"] == [page["before"][1]["id"]]
    await upstream.wait_until_async(lambda: upstream.requests[0].aborted, 2)
    assert parts(page)[-1] == text("Welcome.") and page["error"] is None
    assert [message["role"] for message in told(upstream)][-1] == "user"


async def test_regenerate_answers_the_same_question_anew(node: Node, upstream: Upstream) -> None:
    answers = iter(["One.", "Two."])
    upstream.when("Say", lambda _: Reply(text=next(answers)))

    page = await play(node, "regenerate", "Say something")

    assert page["first"][-1]["parts"][-1] == text("One.")
    assert parts(page)[-1] == text("Two.") and len(page["messages"]) == 2
    assert page["reloaded"] == page["messages"]
    assert [message["content"] for message in told(upstream)] == ["Say something"]


async def test_an_edited_message_begins_another_branch(node: Node, upstream: Upstream) -> None:
    upstream.when("", lambda body: Reply(text=f"{len(body['messages'])} heard."))

    page = await play(node, "edit", "one", "two", "three", "zwei")

    assert [message["content"] for message in told(upstream) if message["role"] == "user"] == [
        "one",
        "zwei",
    ]
    assert len(page["messages"]) == 4
    assert page["reloaded"] == page["messages"]


TALE = "Once upon a time there was a stream that nobody could cut in two."


@pytest.mark.parametrize("enough", ["Once", "upon", "stream"])
async def test_a_reload_in_mid_answer_loses_and_repeats_nothing(
    node: Node, upstream: Upstream, enough: str
) -> None:
    upstream.when("tale", Reply(text=TALE, pace=0.06))

    page = await play(node, "reload", "chat/1 ?", "A tale", enough)

    assert page["before"] != TALE
    assert [message["role"] for message in page["loaded"]] == ["user"]
    assert parts(page) == ["step", text(TALE)] and len(page["messages"]) == 2
    assert all(TALE.startswith(seen) for seen in page["texts"])
    assert page["reloaded"] == page["messages"] and page["again"] == 204
    assert len(upstream.requests) == 1


async def test_a_reload_among_tools_loses_and_repeats_nothing(
    node: Node, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when(
        "weather",
        Reply(reasoning="Hm, where?", text="Let me look.", calls=(WEATHER,)),
        Reply(text="It is fine weather in Tokyo.", pace=0.1),
    )

    page = await play(node, "reload", "chat", "weather?", "is fine")

    assert parts(page)[1:3] == [
        {"reasoning": "Hm, where?", "state": "done"},
        text("Let me look."),
    ]
    assert parts(page)[-1] == text("It is fine weather in Tokyo.")
    assert page["reloaded"] == page["messages"]
    assert tools.count("/v1/search") == 1


async def test_a_reload_after_an_approval_loses_and_repeats_nothing(
    tester: None, node: Node, upstream: Upstream
) -> None:
    calls = (Call("erase"), Call("shout", {"text": "hi"}))
    upstream.when("Erase", Reply(text="Sure?", calls=calls), Reply(text=TALE, pace=0.06))

    page = await play(node, "reload", "chat", "Erase it", "upon", "yes", AGENT="tester")

    assert [message["role"] for message in page["loaded"]] == ["user"]
    assert [part["output"] for part in parts(page) if "tool" in part] == ["erased", "HI!"]
    assert parts(page)[1] == text("Sure?") and parts(page)[-1] == text(TALE)
    assert page["reloaded"] == page["messages"] and len(page["messages"]) == 2


async def test_a_server_that_was_killed_in_mid_answer_loses_and_repeats_nothing(
    environ: dict[str, str], upstream: Upstream, bearer: Any
) -> None:
    upstream.when("tale", Reply(text=TALE, pace=0.05))
    page: Any = None
    with ServerProcess(**environ, LEASE_SECONDS="2") as server:
        node = Node(server.url, await bearer("Alice"))
        async for line in node.lines("vercel", "restart", "chat", "A tale", "upon"):
            if line == "half":
                server.kill()
                server.start()
            page = line

    assert page["broken"] == "error"
    assert parts(page) == ["step", text(TALE)] and len(page["messages"]) == 2
    assert page["reloaded"] == page["messages"] and page["posts"] == 1


async def test_a_refusal_is_the_errors_text(alice: AsyncClient) -> None:
    node = Node(str(alice.base_url), "not-a-token")

    page = await play(node, "ask", "Hello")

    assert page["status"] == "error" and "unauthenticated" in page["error"]

"""@ag-ui/client's HttpAgent, unmodified: its verifier and its reducer judge every event."""

import asyncio
import base64
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from httpx2 import AsyncClient

from tests.clients.node import Node
from tests.plugins import plugged_in
from tests.toolserver import ToolServer
from tests.upstream import Call, Reply, Upstream

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@pytest.fixture(autouse=True)
def planner() -> Iterator[None]:
    """The agents `planner` and `reporter` are there."""
    with plugged_in(Path(__file__).parent / "agui"):
        yield


Json = dict[str, Any]
Play = Callable[..., Awaitable[list[Json]]]


@pytest.fixture
def agui(node: Node, request: pytest.FixtureRequest) -> Play:
    """Plays a scenario of `agui.mjs` and returns what each of its runs brought."""
    package = getattr(request, "param", "@ag-ui/client")
    return partial(node, "agui", CLIENT=package)


both = pytest.mark.parametrize("agui", ["@ag-ui/client", "copilotkit-client"], indirect=True)
"""Also with the version that CopilotKit's runtime brings: from before AG-UI 1.0."""


def kinds(run: Json) -> list[str]:
    return [event["type"] for event in run["events"]]


def last(run: Json) -> Json:
    return run["events"][-1]


def said(run: Json) -> list[tuple[str, Any]]:
    """Role and text of each message that the application has."""
    return [(message["role"], message.get("content")) for message in run["messages"]]


def told(upstream: Upstream, request: int = -1) -> list[Json]:
    """What the model was told, below the instructions."""
    messages = upstream.requests[request].body["messages"]
    return [message for message in messages if message["role"] != "system"]


def heard(upstream: Upstream, request: int = -1) -> list[tuple[str, Any]]:
    return [(message["role"], message.get("content")) for message in told(upstream, request)]


@both
async def test_text_streams_into_one_message(agui: Play, upstream: Upstream) -> None:
    upstream.when("Hello", Reply(text="Hello to you.", usage=(7, 3)))

    [run] = await agui("talk", "assistant", "Hello")

    assert run["error"] is None
    assert said(run) == [("user", "Hello"), ("assistant", "Hello to you.")]
    assert kinds(run)[0] == "RUN_STARTED" and run["events"][0]["threadId"] == "thread"
    assert last(run)["outcome"] == {"type": "success"}
    assert last(run)["runId"] == run["events"][0]["runId"]
    assert last(run)["usage"] == [{"inputTokens": 7, "outputTokens": 3, "totalTokens": 10}]


@both
async def test_reasoning_is_a_message_of_its_own(agui: Play, upstream: Upstream) -> None:
    upstream.when("Hello", Reply(reasoning="They greet me.", text="Hello!"))

    [run] = await agui("talk", "assistant", "Hello")

    assert said(run)[1:] == [("reasoning", "They greet me."), ("assistant", "Hello!")]
    assert "REASONING_ENCRYPTED_VALUE" not in kinds(run)


async def test_a_tool_of_the_server_is_shown_with_its_result(
    agui: Play, upstream: Upstream
) -> None:
    upstream.when(
        "weather",
        Reply(text="Let me look.", calls=(Call("get_weather", {"location": "Tokyo"}),)),
        Reply(text="Fine."),
    )

    [run] = await agui("talk", "assistant", "weather?")

    roles = [message["role"] for message in run["messages"]]
    assert roles == ["user", "assistant", "tool", "assistant"]
    [call] = run["messages"][1]["toolCalls"]
    assert json.loads(call["function"]["arguments"]) == {"location": "Tokyo"}
    assert run["messages"][2]["toolCallId"] == call["id"]
    assert "clear sky" in run["messages"][2]["content"]
    assert run["messages"][3]["content"] == "Fine."


async def test_parallel_calls_each_get_their_result(agui: Play, upstream: Upstream) -> None:
    cities = ("Tokyo", "Lisbon", "Paris")
    upstream.when(
        "weather",
        Reply(calls=tuple(Call("get_weather", {"location": city}) for city in cities)),
        Reply(text="Fine."),
    )

    [run] = await agui("talk", "assistant", "weather?")

    calls = [call["id"] for call in run["messages"][1]["toolCalls"]]
    results = [message for message in run["messages"] if message["role"] == "tool"]
    assert sorted(result["toolCallId"] for result in results) == sorted(calls)
    assert len({message["id"] for message in run["messages"]}) == len(run["messages"])


@both
async def test_a_tool_of_the_frontend_makes_a_round_trip(agui: Play, upstream: Upstream) -> None:
    upstream.when("door", Reply(calls=(Call("open_door", {"number": 7}),)), Reply(text="It is."))

    asked, done = await agui("frontendTool", "assistant", "Open the door")

    assert last(asked)["outcome"] == {"type": "success"}
    assert "TOOL_CALL_RESULT" not in kinds(asked)
    assert done["error"] is None
    assert said(done)[-1] == ("assistant", "It is.")
    assert heard(upstream)[-1] == ("tool", "opened")
    assert [message["role"] for message in told(upstream)] == ["user", "assistant", "tool"]


async def test_calls_of_both_sides_in_one_reply(agui: Play, upstream: Upstream) -> None:
    both = (Call("get_weather", {"location": "Tokyo"}), Call("open_door", {"number": 7}))
    upstream.when("door", Reply(calls=both), Reply(text="It is."))

    asked, done = await agui("frontendTool", "assistant", "Open the door")

    assert kinds(asked).count("TOOL_CALL_RESULT") == 1
    assert done["error"] is None, done["error"]
    assert said(done)[-1] == ("assistant", "It is.")


@both
async def test_an_approved_call_is_made_in_the_run_that_resumes(
    agui: Play, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when("Pay", Reply(calls=(Call("pay", {"amount": 5}),)), Reply(text="Paid."))

    asked, done = await agui("approval", "planner", "Pay 5", '{"approved": true}')

    [interrupt] = last(asked)["outcome"]["interrupts"]
    assert interrupt["reason"] == "tool_call"
    assert interrupt["message"] == 'Approve pay({"amount": 5})?'
    assert "editedArgs" not in interrupt["responseSchema"]["properties"]
    assert interrupt["toolCallId"] == asked["messages"][1]["toolCalls"][0]["id"]
    assert done["error"] is None, done["error"]
    assert done["pendingInterrupts"] == []
    assert "TOOL_CALL_START" not in kinds(done), "the call was told before"
    roles = [message["role"] for message in done["messages"]]
    assert roles == ["user", "assistant", "tool", "assistant"]
    assert said(done)[-2:] == [("tool", "paid 5"), ("assistant", "Paid.")]
    assert tools.count("/effects/pay-5") == 1


async def test_a_denied_call_is_not_made_and_the_model_learns_why(
    agui: Play, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when("Pay", Reply(calls=(Call("pay", {"amount": 5}),)), Reply(text="I did not."))

    payload = '{"approved": false, "reason": "Too dear."}'
    _, done = await agui("approval", "planner", "Pay 5", payload)

    assert said(done)[-1] == ("assistant", "I did not.")
    assert "Too dear." in told(upstream)[-1]["content"]
    assert tools.count("/effects/pay-5") == 0


async def test_an_abandoned_interrupt_denies(
    agui: Play, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when("Pay", Reply(calls=(Call("pay", {"amount": 5}),)), Reply(text="I did not."))

    _, done = await agui("approval", "planner", "Pay 5")

    assert done["error"] is None
    assert said(done)[-1] == ("assistant", "I did not.")
    assert tools.count("/effects/pay-5") == 0


async def test_who_abandons_may_send_the_next_message_at_once(
    agui: Play, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when("Pay", Reply(calls=(Call("pay", {"amount": 5}),)), Reply(text="Paid."))
    upstream.when("Never mind", Reply(text="All right."))

    _, done = await agui("abandon", "planner", "Pay 5", "Never mind")

    assert done["error"] is None, done["error"]
    assert done["pendingInterrupts"] == []
    assert said(done)[-1] == ("assistant", "All right.")
    assert tools.count("/effects/pay-5") == 0


async def test_edited_arguments_are_refused_and_nothing_is_decided(
    agui: Play, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when("Pay", Reply(calls=(Call("pay", {"amount": 5}),)), Reply(text="Paid."))

    payload = '{"approved": true, "editedArgs": {"amount": 500}}'
    _, refused = await agui("approval", "planner", "Pay 5", payload)

    assert refused["error"]["status"] == 400
    assert refused["error"]["payload"]["error"]["param"] == "resume.payload.editedArgs"
    assert len(refused["pendingInterrupts"]) == 1
    assert tools.count("/effects/pay-500") == 0


async def test_a_run_of_another_protocol_is_approved_from_here(
    agui: Play, alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when("Pay", Reply(calls=(Call("pay", {"amount": 5}),)), Reply(text="Paid."))
    asked = (await alice.post("/v1/responses", json={"model": "planner", "input": "Pay 5"})).json()
    [request] = [item for item in asked["output"] if item["type"] == "mcp_approval_request"]
    key = request["id"].removeprefix("mcpr_")

    [run] = await agui("approveFromElsewhere", "planner", "any", key)

    assert run["error"] is None, run["error"]
    assert said(run) == [("tool", "paid 5"), ("assistant", "Paid.")]


async def test_the_history_is_the_servers(agui: Play, upstream: Upstream) -> None:
    upstream.when(
        "weather",
        Reply(text="Let me look.", calls=(Call("get_weather", {"location": "Tokyo"}),)),
        Reply(text="Fine."),
    )

    _, second = await agui("talk", "assistant", "weather?", "Thanks")

    assert second["error"] is None
    assert [message["role"] for message in told(upstream)] == [
        "user",
        "assistant",
        "tool",
        "assistant",
        "user",
    ]


async def test_a_page_that_was_reloaded_goes_on(agui: Play, upstream: Upstream) -> None:
    upstream.when("Ada", Reply(text="Hello, Ada."))

    await agui("reload", "assistant", "I am Ada", "Who am I?")

    assert heard(upstream) == [
        ("user", "I am Ada"),
        ("assistant", "Hello, Ada."),
        ("user", "Who am I?"),
    ]


async def test_regenerate_and_edit_are_branches(agui: Play, upstream: Upstream) -> None:
    answers = iter(("One.", "Two."))
    upstream.when("First", Reply(text="Yes."))
    upstream.when("Second", lambda _: Reply(text=next(answers)))
    upstream.when("Other", Reply(text="Three."))

    _, one, two, three = await agui("branches", "assistant", "First", "Second", "Other")

    assert [said(run)[-1][1] for run in (one, two, three)] == ["One.", "Two.", "Three."]
    for request, prompt in ((2, "Second"), (3, "Other")):
        assert heard(upstream, request) == [
            ("user", "First"),
            ("assistant", "Yes."),
            ("user", prompt),
        ]


async def test_state_and_context_are_data_to_the_model_and_state_comes_back(
    agui: Play, upstream: Upstream
) -> None:
    state, context = {"theme": "dark"}, [{"description": "User's name", "value": "Ada"}]

    [run] = await agui("state", "assistant", "Hello", json.dumps(state), json.dumps(context))

    [snapshot] = [event for event in run["events"] if event["type"] == "STATE_SNAPSHOT"]
    assert snapshot["snapshot"] == state == run["state"]
    instructions = str(upstream.requests[0].body["messages"][1])
    assert "dark" in instructions and "Ada" in instructions and "frontend" in instructions
    assert heard(upstream) == [("user", "Hello")]


@both
async def test_tools_of_the_server_change_the_state(agui: Play, upstream: Upstream) -> None:
    upstream.when(
        "Plan",
        Reply(calls=(Call("plan", {"steps": ["wake", "eat"]}),)),
        Reply(calls=(Call("replan", {"step": "work"}),)),
        Reply(text="Done."),
    )

    [run] = await agui("talk", "planner", "Plan my day")

    assert run["error"] is None
    assert run["state"] == {"steps": ["wake", "eat", "work"]}
    assert said(run)[-1] == ("assistant", "Done.")
    assert told(upstream)[2]["content"] == "2 steps"


async def test_an_image_reaches_the_model(agui: Play, upstream: Upstream) -> None:
    await agui("image", "assistant", base64.b64encode(PNG).decode(), "image/png")

    text, image = told(upstream)[0]["content"]
    assert text["text"] == "What is this?"
    assert image["image_url"]["url"].startswith("data:image/png;base64,")


async def test_an_answer_that_is_a_value_is_shown_as_text(agui: Play, upstream: Upstream) -> None:
    value = {"city": "Tokyo", "sunny": True}
    upstream.when(
        "Report",
        Reply(calls=(Call("get_weather", {"location": "Tokyo"}),)),
        Reply(text="Here:", calls=(Call("final_result", value),)),
    )

    [run] = await agui("talk", "reporter", "Report")

    assert run["error"] is None
    calls = [call for message in run["messages"] for call in message.get("toolCalls") or ()]
    assert [call["function"]["name"] for call in calls] == ["get_weather"]
    assert json.loads(run["messages"][-1]["content"]) == value


@both
async def test_closing_the_connection_stops_the_run(
    agui: Play, alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Tell", Reply(text="word " * 200, pace=0.05))

    [run] = await agui("abort", "assistant", "Tell me all")
    left = time.monotonic()
    run_id = run["messages"][-1]["id"].split("-")[0]
    status = "in_progress"
    while status == "in_progress":
        status = (await alice.get(f"/v1/responses/resp_{run_id}")).json()["status"]
        await asyncio.sleep(0.02)

    assert status == "cancelled"
    assert time.monotonic() - left < 2
    await upstream.wait_until_async(lambda: upstream.requests[0].aborted, 2)


async def test_the_thread_goes_on_after_a_stop(
    agui: Play, alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Tell", Reply(text="word " * 200, pace=0.05))
    await agui("abort", "assistant", "Tell me all")

    [run] = await agui("talk", "assistant", "Hello")

    assert said(run)[-1] == ("assistant", "ok")
    assert heard(upstream)[0] == ("user", "Tell me all")


async def test_a_run_that_somebody_else_stopped_is_cancelled(
    agui: Play, upstream: Upstream
) -> None:
    upstream.when("Tell", Reply(text="word " * 200, pace=0.05))

    [run] = await agui("stopped", "assistant", "Tell me all")

    assert run["error"] is None
    assert last(run)["outcome"] == {"type": "cancelled"}
    assert kinds(run)[-2] == "TEXT_MESSAGE_END"


@pytest.mark.parametrize("agui", ["copilotkit-client"], indirect=True)
async def test_older_clients_are_spared_what_they_would_refuse(
    agui: Play, upstream: Upstream
) -> None:
    upstream.when("Tell", Reply(text="Once upon", finish="length"))

    [run] = await agui("talk", "assistant", "Tell me all")

    assert said(run)[-1] == ("assistant", "Once upon")
    assert run["error"] is None
    assert "outcome" not in last(run)


async def test_an_answer_that_was_cut_off_is_no_success(agui: Play, upstream: Upstream) -> None:
    upstream.when("Tell", Reply(text="Once upon", finish="length"))

    [run] = await agui("talk", "assistant", "Tell me all")

    assert said(run)[-1] == ("assistant", "Once upon")
    assert last(run)["outcome"] == {"type": "cancelled"}
    assert last(run)["metadata"] == {"status": "incomplete", "reason": "length"}


FAILURES = {
    "500": (Reply(status=500), "model_unavailable"),
    "429": (Reply(status=429), "rate_limit_exceeded"),
    "drop": (Reply(text="one two three four", drop_after=3), "model_unavailable"),
    "error in the stream": (
        Reply(text="one two", error={"message": "canary: the provider's words"}),
        "model_unavailable",
    ),
}


@both
@pytest.mark.parametrize("case", FAILURES)
async def test_a_failure_of_the_model_is_an_error_and_the_last_event(
    agui: Play, upstream: Upstream, case: str
) -> None:
    reply, code = FAILURES[case]
    upstream.when("Hello", reply)

    [run] = await agui("talk", "assistant", "Hello")

    assert kinds(run).count("RUN_ERROR") == 1
    assert last(run)["type"] == "RUN_ERROR"
    assert last(run)["code"] == code
    assert "canary" not in json.dumps(run)


async def test_a_refusal_before_the_stream_is_an_http_error(agui: Play) -> None:
    [run] = await agui("talk", "nobody", "Hello")

    assert run["events"] == []
    assert run["error"]["status"] == 404
    assert run["error"]["payload"]["error"]["code"] == "model_not_found"

"""The official openai client for JavaScript on responses and conversations, unmodified."""

import pytest

from tests.clients.node import Node
from tests.test_api.conftest import cashier as cashier
from tests.toolserver import ToolServer
from tests.upstream import Call, Reply, Upstream


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_responses_and_conversations_are_served(
    cashier: None, node: Node, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when("Hello", Reply(text="Hello to you.", usage=(7, 3)))
    upstream.when(
        "weather",
        Reply(
            text="Let me look.",
            reasoning="Hm.",
            calls=(Call("get_weather", {"location": "Tokyo"}),),
        ),
        Reply(text="Fine."),
    )
    upstream.when("door", Reply(calls=(Call("open_door", {"number": 3}),)), Reply(text="Open."))
    upstream.when("capital", Reply(text='{"name": "Paris", "country": "France"}'))
    asks = [Reply(calls=(Call("pay", {"amount": amount}),)) for amount in (1, 2)]
    upstream.when("pay", *asks, Reply(text="Both are paid."))

    assert await node("openai_responses") == [
        ["Hello to you.", "completed", 10],
        [True, ["reasoning", "message", "mcp_call", "message"]],
        [{"number": 3}, "Open."],
        {"name": "Paris", "country": "France"},
        ["Hello to you.", 3, True],
        [["completed", "completed"], "Both are paid."],
        [
            [["user", "I am Ada."], ["user", "Hello"], ["assistant", "Hello to you."]],
            {"topic": "names"},
            True,
        ],
        ["BadRequestError", 400, "previous_response_not_found", "previous_response_id"],
    ]
    assert [call.path for call in tools.calls if "pay" in call.path] == [
        "/effects/pay-1",
        "/effects/pay-2",
    ]

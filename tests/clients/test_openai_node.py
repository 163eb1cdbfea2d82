"""The official openai client for JavaScript, unmodified, against the running server."""

import pytest

from tests.clients.node import Node
from tests.clients.scenarios import scripted
from tests.toolserver import ToolServer
from tests.upstream import Upstream

BOTH = [["open_door", {"number": 3}], ["open_door", {"number": 4}]]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_openai_for_javascript_is_served(
    node: Node, upstream: Upstream, tools: ToolServer
) -> None:
    scripted(upstream)
    script = node.lines("openai")

    assert await anext(script) == ["Hello to you.", "stop", 10]
    sent = upstream.requests[-1].body
    assert (sent["temperature"], sent["stop"], sent["seed"]) == (0.5, ["END"], 1)
    assert await anext(script) == ["Hello to you.", "stop", 10]
    assert await anext(script) == ["Fine in Paris.", 'get_weather({"location": "Paris"})']
    assert tools.count("/v1/search") == 1
    assert await anext(script) == [BOTH, "tool_calls", "Both are open."]
    assert await anext(script) == [[3, 4], "Both are open.", 2]
    results = [message["content"] for message in upstream.requests[-1].body["messages"]]
    assert results[-2:] == ["door 3 is open", "door 4 is open"]
    assert await anext(script) == {"name": "Paris", "country": "France"}
    assert await anext(script) == "I see data:image/png."

    assert [await anext(script) for _ in range(7)] == [
        ["AuthenticationError", 401, "invalid_api_key"],
        ["NotFoundError", 404, "model_not_found"],
        ["BadRequestError", 400, "invalid"],
        ["BadRequestError", 400, "context_length_exceeded"],
        ["RateLimitError", 429, "rate_limit_exceeded"],
        ["InternalServerError", 502, "model_unavailable"],
        ["APIError", None, "model_unavailable"],
    ]
    assert await anext(script) == [None]
    assert await anext(script) == ["APIConnectionTimeoutError", None, None]
    await upstream.wait_until_async(lambda: upstream.requests[-1].aborted, 2)

    assert await anext(script) == "APIUserAbortError"
    await upstream.wait_until_async(lambda: upstream.requests[-1].aborted, 2)
    await script.aclose()  # pyright: ignore[reportAttributeAccessIssue]

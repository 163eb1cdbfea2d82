"""LiteLLM as a client of the running server."""

import pytest
from httpx2 import AsyncClient

from tests.clients.scenarios import Script, scripted
from tests.toolserver import ToolServer
from tests.upstream import Upstream

ONE = ["open_door", {"number": 3}]
BOTH = [ONE, ["open_door", {"number": 4}]]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_litellm_is_served(alice: AsyncClient, upstream: Upstream, tools: ToolServer) -> None:
    scripted(upstream)
    token = alice.headers["Authorization"].removeprefix("Bearer ")

    async with Script.run("litellm_client", str(alice.base_url), token) as script:
        assert await script.says() == ["Hello to you.", "stop", 10]
        sent = upstream.requests[-1].body
        assert (sent["temperature"], sent["stop"], sent["seed"]) == (0.5, ["END"], 1)
        assert await script.says() == ["Hello to you.", "stop", 10]
        weather = ["Fine in Paris.", 'get_weather({"location": "Paris"})']
        assert [await script.says(), await script.says()] == [weather, weather]
        assert tools.count("/v1/search") == 2
        assert await script.says() == [[ONE], "It is open."]
        assert await script.says() == [BOTH, "Both are open."]
        assert await script.says() == [BOTH, "tool_calls"]
        assert await script.says() == {"name": "Paris", "country": "France"}
        assert await script.says() == "I see data:image/png."

        names = [await script.says() for _ in range(7)]
        kinds = [
            "AuthenticationError",
            "NotFoundError",
            "ContextWindowExceededError",
            "RateLimitError",
            "BadGatewayError",
            "MidStreamFallbackError",
            "Timeout",  # what hangs is given up by the client
        ]
        assert [name[0] for name in names] == kinds
        await upstream.wait_until_async(lambda: upstream.requests[-1].aborted, 2)
        await script.go_on()

        assert await script.says() == "left"
        await upstream.wait_until_async(lambda: upstream.requests[-1].aborted, 2)
        await script.go_on()

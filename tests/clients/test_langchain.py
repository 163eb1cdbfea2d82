"""langchain-openai as a client of the running server."""

import pytest
from httpx2 import AsyncClient

from tests.clients.scenarios import Script, scripted
from tests.toolserver import ToolServer
from tests.upstream import Upstream

CITY = {"name": "Paris", "country": "France"}
ONE = ["open_door", {"number": 3}]
BOTH = [ONE, ["open_door", {"number": 4}]]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_langchain_is_served(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    scripted(upstream)
    token = alice.headers["Authorization"].removeprefix("Bearer ")

    async with Script.run("langchain_client", str(alice.base_url), token) as script:
        assert await script.says() == ["Hello to you.", "stop", 10]
        sent = upstream.requests[-1].body
        assert (sent["temperature"], sent["stop"], sent["seed"]) == (0.5, ["END"], 1)
        assert await script.says() == ["Hello to you.", "stop", 10]
        assert await script.says() == "Fine in Paris."
        assert tools.count("/v1/search") == 1
        assert await script.says() == [[ONE], "It is open."]
        assert await script.says() == [BOTH, "Both are open."]
        assert upstream.requests[-1].body["messages"][-1]["content"] == "door 4 is open"
        assert await script.says() == [BOTH, "tool_calls"]
        assert [await script.says() for _ in range(3)] == [CITY, CITY, CITY]
        assert await script.says() == "I see data:image/png."

        errors = [await script.says() for _ in range(7)]
        names, codes = zip(*errors, strict=True)
        kinds = [
            "AuthenticationError",
            "NotFoundError",
            "ContextOverflowError",
            "RateLimitError",
            "InternalServerError",
            "APIError",
            "APITimeoutError",  # what hangs is given up by the client
        ]
        assert [kind in name for kind, name in zip(kinds, names, strict=True)] == [True] * 7, names
        assert codes[:-1] == (
            "invalid_api_key",
            "model_not_found",
            "context_length_exceeded",
            "rate_limit_exceeded",
            "model_unavailable",
            "model_unavailable",
        )
        await upstream.wait_until_async(lambda: upstream.requests[-1].aborted, 2)
        await script.go_on()

        assert await script.says() == "left"
        await upstream.wait_until_async(lambda: upstream.requests[-1].aborted, 2)
        await script.go_on()

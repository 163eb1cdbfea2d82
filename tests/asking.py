"""A question to an agent, and what its model was told."""

from typing import Any

from httpx2 import AsyncClient, Response

from tests.upstream import Call, Reply, Upstream


async def ask(client: AsyncClient, text: str = "Go.", *, agent: str = "assistant") -> Response:
    message = {"role": "user", "content": text}
    return await client.post("/v1/chat/completions", json={"model": agent, "messages": [message]})


def calls(tool: str, /, **arguments: Any) -> Reply:
    return Reply(calls=(Call(tool, arguments),))


def told(upstream: Upstream) -> str:
    """The result of the last tool call, as the model got it."""
    message = upstream.requests[-1].body["messages"][-1]
    assert message["role"] == "tool", message
    return message["content"]


def offered(upstream: Upstream) -> list[str]:
    """The names of the tools that the model could choose from, last."""
    return [item["function"]["name"] for item in upstream.requests[-1].body.get("tools", [])]

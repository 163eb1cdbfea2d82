"""Requests for chat completions, and what comes of them."""

import json
from collections.abc import AsyncIterator
from typing import Any

from httpx2 import AsyncClient

from tests.upstream import Upstream

URL = "/v1/chat/completions"
FUNCTION = {"type": "function", "function": {"name": "open_door"}}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def asking(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model": "assistant", "messages": list(messages), **more}


def told(upstream: Upstream, request: int = -1) -> list[dict[str, Any]]:
    """What the model was told, below the instructions."""
    messages = upstream.requests[request].body["messages"]
    return [message for message in messages if message["role"] != "system"]


def texts(messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(message["role"], message.get("content") or "") for message in messages]


async def chunks_of(lines: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
    async for line in lines:
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


async def streamed(
    client: AsyncClient, body: dict[str, Any], **headers: str
) -> list[dict[str, Any]]:
    body = {**body, "stream": True}
    async with client.stream("POST", URL, json=body, headers=headers) as reply:
        assert reply.status_code == 200, await reply.aread()
        return [chunk async for chunk in chunks_of(reply.aiter_lines())]


def joined(chunks: list[dict[str, Any]], name: str = "content") -> str:
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    return "".join(delta.get(name) or "" for delta in deltas)


def reasons(chunks: list[dict[str, Any]]) -> list[str]:
    found = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    return [reason for reason in found if reason]


def content_of(reply: Any) -> str:
    assert reply.status_code == 200, reply.text
    [choice] = reply.json()["choices"]
    assert choice["finish_reason"] == "stop"
    return choice["message"]["content"]

"""Requests of pages with the Vercel AI SDK, and what they are told."""

import json
from typing import Any

from httpx2 import AsyncClient, Response

from tests.upstream import Upstream

URL = "/api/chat"
TALE = {"type": "text", "text": "tale", "state": "done"}
DOOR = {"name": "open_door", "inputSchema": {"type": "object", "properties": {}}}


def user(text: str, id: str = "u1") -> dict[str, Any]:
    return {"id": id, "role": "user", "parts": [{"type": "text", "text": text}]}


def assistant(*parts: dict[str, Any], id: str = "a1") -> dict[str, Any]:
    return {"id": id, "role": "assistant", "parts": list(parts)}


def asking(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"id": "chat", "messages": list(messages), "trigger": "submit-message", **more}


def frames_of(reply: Response) -> list[tuple[str, str]]:
    """The id and the data of each event."""
    found: list[tuple[str, str]] = []
    for block in filter(None, reply.text.split("\n\n")):
        fields = dict(line.split(": ", 1) for line in block.splitlines())
        found.append((fields["id"], fields["data"]))
    return found


def chunks_of(reply: Response) -> list[dict[str, Any]]:
    assert reply.status_code == 200, reply.text
    *chunks, done = [data for _, data in frames_of(reply)]
    assert done == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


def said_in(reply: Response) -> str:
    return "".join(chunk["delta"] for chunk in chunks_of(reply) if chunk["type"] == "text-delta")


def types(reply: Response) -> list[str]:
    return [chunk["type"] for chunk in chunks_of(reply)]


def told(upstream: Upstream, request: int = -1) -> list[str]:
    """What the model was told, below the instructions."""
    messages = upstream.requests[request].body["messages"]
    return [message["content"] for message in messages if message["role"] != "system"]


async def messages_of(client: AsyncClient, chat: str = "chat") -> list[dict[str, Any]]:
    reply = await client.get(f"{URL}/{chat}")
    assert reply.status_code == 200, reply.text
    return reply.json()["messages"]

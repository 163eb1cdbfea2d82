"""Requests of AG-UI clients, and the events that come of them."""

import json
from typing import Any

from ag_ui.core import BaseEvent, Event
from httpx2 import AsyncClient, Response
from pydantic import TypeAdapter

URL = "/ag-ui/assistant"
EVENT: TypeAdapter[BaseEvent] = TypeAdapter(Event)

Json = dict[str, Any]


def user(content: Any, name: str = "u1") -> Json:
    return {"id": name, "role": "user", "content": content}


def asking(*messages: Json, **more: Any) -> Json:
    """A request as HttpAgent sends it."""
    return {
        "threadId": "thread",
        "runId": "run",
        "protocolVersion": "1.0",
        "state": {},
        "messages": list(messages),
        "tools": [],
        "context": [],
        "forwardedProps": {},
        **more,
    }


def parsed(body: str) -> list[Json]:
    """The events of a stream, each as AG-UI's own types read it, with the frame's id as `seq`."""
    events: list[Json] = []
    for frame in body.split("\n\n")[:-1]:
        lines = dict(line.split(": ", 1) for line in frame.split("\n"))
        assert set(lines) <= {"id", "data"}
        event = EVENT.validate_json(lines["data"])
        assert event.model_dump(mode="json", by_alias=True) == json.loads(lines["data"])
        events.append({"seq": int(lines.get("id", 0)), **json.loads(lines["data"])})
    return events


async def ask(client: AsyncClient, body: Json, url: str = URL, **headers: str) -> list[Json]:
    reply = await client.post(url, json=body, headers=headers)
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    return parsed(reply.text)


def error(reply: Response) -> Json:
    assert reply.headers["content-type"] == "application/json"
    return reply.json()["error"]

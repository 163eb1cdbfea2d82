"""Requests for responses, and what comes of them."""

import json
from collections.abc import AsyncIterator
from typing import Any

from httpx2 import AsyncClient, Response
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from tests.upstream import Call, Reply

URL = "/v1/responses"
TERMINAL = ("response.completed", "response.incomplete", "response.failed")

Event = dict[str, Any]

OFFICIAL: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def asking(said: Any, /, **more: Any) -> dict[str, Any]:
    return {"model": "assistant", "input": said, **more}


async def events_of(lines: AsyncIterator[str]) -> AsyncIterator[Event]:
    """The events; their ids and names must be what their data says."""
    event_id = name = None
    async for line in lines:
        if line.startswith("id: "):
            event_id = int(line.removeprefix("id: "))
        elif line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            assert (event["sequence_number"], event["type"]) == (event_id, name)
            yield event


async def stream(client: AsyncClient, **body: Any) -> list[Event]:
    async with client.stream("POST", URL, json=body | {"stream": True}) as reply:
        assert reply.status_code == 200, await reply.aread()
        return [event async for event in events_of(reply.aiter_lines())]


async def follow(
    client: AsyncClient, response_id: str, after: int | None = None, **headers: str
) -> list[Event]:
    url = f"{URL}/{response_id}?stream=true"
    url += "" if after is None else f"&starting_after={after}"
    async with client.stream("GET", url, headers=headers) as reply:
        assert reply.status_code == 200, await reply.aread()
        return [event async for event in events_of(reply.aiter_lines())]


def weather_in(*cities: str) -> tuple[Reply, Reply]:
    calls = tuple(Call("get_weather", {"location": city}) for city in cities)
    return Reply(text="Let me look.", calls=calls), Reply(text="It is fine there.")


def says(text: str, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": text}


def requests_in(response: dict[str, Any]) -> list[dict[str, Any]]:
    return [item for item in response["output"] if item["type"] == "mcp_approval_request"]


def decision(request: dict[str, Any], approve: bool, **more: Any) -> dict[str, Any]:
    return {
        "type": "mcp_approval_response",
        "approval_request_id": request["id"],
        "approve": approve,
        **more,
    }


def deciding(response: dict[str, Any], *decisions: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "model": "cashier",
        "previous_response_id": response["id"],
        "input": list(decisions),
        **more,
    }


async def respond(client: AsyncClient, said: Any = "Hello", /, **more: Any) -> dict[str, Any]:
    """The response, streamed or not."""
    reply = await client.post(URL, json=asking(said, **more))
    assert reply.status_code == 200, reply.text
    return events_in(reply)[-1]["response"] if more.get("stream") else reply.json()


def events_in(reply: Response) -> list[Event]:
    assert reply.status_code == 200, reply.text
    lines = (line.removeprefix("data: ") for line in reply.text.splitlines())
    return [json.loads(line) for line in lines if line.startswith("{")]


def id_of(response: dict[str, Any]) -> str:
    """The run's."""
    return response["id"].removeprefix("resp_")[:32]

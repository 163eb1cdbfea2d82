"""Extractions as tests ask for them, and the answers of a model that is made to."""

import json
from collections.abc import Callable
from typing import Any

from httpx2 import AsyncClient, Response

from tests.upstream import Call, Reply, Upstream

Json = dict[str, Any]

PERSON: Json = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
ADA = {"name": "Ada", "age": 36}


def fills(answer: Any, **reply: Any) -> Callable[[Json], Reply]:
    """The model calls the function that it is offered, with this as its arguments."""
    return lambda body: Reply(
        calls=(Call(body["tools"][0]["function"]["name"], answer),), **{"usage": (7, 3), **reply}
    )


async def extract(client: AsyncClient, text: str = "Ada is 36.", **body: Any) -> Response:
    """Posts, past the cache."""
    if not body.keys() & {"schema", "schema_ref"}:
        body["schema"] = PERSON
    body["options"] = {"cache": "bypass", **body.get("options", {})}
    return await client.post("/v1/extractions", json={"input": {"text": text}, **body})


async def document(client: AsyncClient, **body: Any) -> Any:
    answer = await extract(client, **body)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


async def refusal(client: AsyncClient, status: int, **body: Any) -> Json:
    answer = await extract(client, **body)
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    assert '"data"' not in answer.text
    return answer.json()["error"]


def told(upstream: Upstream) -> str:
    """What the model was told last."""
    return upstream.requests[-1].body["messages"][-1]["content"]


def shown(upstream: Upstream) -> Json:
    """The function that the model was offered."""
    return upstream.requests[-1].body["tools"][0]["function"]


def quotes(data: Any, *claims: tuple[str, str], **reply: Any) -> Callable[[Json], Reply]:
    """The model answers with a document and where the text says it: paths and quotes."""
    evidence = [{"path": path, "quote": quote} for path, quote in claims]
    return fills({"data": data, "evidence": evidence}, **reply)


def events_of(text: str) -> list[tuple[str | None, str, Json]]:
    """The id, the name and the data of each event of a stream."""
    found: list[tuple[str | None, str, Json]] = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line)
        if "event" in fields:
            found.append((fields.get("id"), fields["event"], json.loads(fields["data"])))
    return found

"""Bodies that would keep everybody else waiting are refused before they are read."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from httpx2 import AsyncClient

from app.api.bodies import MAX_VALUES
from tests.conftest import client_of, settings_of
from tests.server import ThreadedServer

JSON = {"Content-Type": "application/json"}
CHAT = "/v1/chat/completions"
MEGABYTES = 15 * 2**20


def filled(
    value: bytes, count: int, around: bytes = b'{"model":"assistant","messages":[%s]}'
) -> bytes:
    return around % b",".join([value] * count)


TOLD = b'{"model":"assistant","messages":[{"role":"user","content":%s}]}'

HOSTILE = {
    "numbers": filled(b"1", MEGABYTES // 2),
    "objects": filled(b"{}", MEGABYTES // 3),
    "fewer numbers": filled(b"1", MAX_VALUES - 100),
    "messages": filled(b'{"role":"user","content":"x"}', MAX_VALUES // 4),
    "parts": TOLD % (b"[%s]" % filled(b'{"type":"text","text":"x"}', MAX_VALUES // 4, b"%s")),
    "metadata": b'{"model":"assistant","messages":[{"role":"user","content":"x"}],"metadata":{%s}}'
    % b",".join(b'"%d":1' % number for number in range(MAX_VALUES - 100)),
    "nothing known": b'{"model":"assistant","x":[%s]}' % b",".join([b"[]"] * (MEGABYTES // 3)),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_others_are_answered_while_a_hostile_body_is_refused(
    alice: AsyncClient, anonymous: AsyncClient, name: str
) -> None:
    waits: list[float] = []

    async def look() -> None:
        while True:
            started = time.monotonic()
            await anonymous.get("/health")
            waits.append(time.monotonic() - started)
            await asyncio.sleep(0.01)

    looking = asyncio.create_task(look())
    reply = await alice.post(CHAT, content=HOSTILE[name], headers=JSON)
    looking.cancel()

    assert reply.status_code in (400, 413), reply.text
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert len(reply.text) < 2000
    assert max(waits) < 2  # where it took from many seconds to minutes


async def test_a_long_text_is_no_many_values(alice: AsyncClient) -> None:
    text = "Hello, {world}. " * (MAX_VALUES // 4)
    body: dict[str, Any] = {"model": "assistant", "messages": [{"role": "user", "content": text}]}

    assert (await alice.post(CHAT, json=body)).status_code == 200


MANY_TOOLS = [{"type": "function", "function": {"name": f"f{n}"}} for n in range(30_000)]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"model": "assistant", "messages": [], "tools": MANY_TOOLS}),
        ("/v1/responses", {"model": "assistant", "input": "x", "tools": MANY_TOOLS}),
        ("/api/chat", {"id": "c", "messages": [], "tools": MANY_TOOLS}),
        ("/ag-ui/assistant", {"threadId": "t", "runId": "r", "messages": [], "tools": MANY_TOOLS}),
        (
            "/v1/chat/completions",
            {
                "model": "assistant",
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {
                                "type": "image_url",
                                "image_url": {"url": "data:a" + " " * 60_000 + "b,x"},
                            }
                        ],
                    }
                ],
            },
        ),
        (
            "/api/chat",
            {
                "id": "c",
                "messages": [
                    {"id": "m", "role": "user", "parts": [{"type": "x"}] * 30_000},
                ],
            },
        ),
    ],
)
async def test_what_would_keep_others_waiting_is_refused_at_once(
    alice: AsyncClient, path: str, body: dict[str, Any]
) -> None:
    asking = asyncio.create_task(alice.post(path, json=body))
    health = [await alice.get("/health") for _ in range(3)]

    assert (await asking).status_code in (400, 413, 422)
    assert max(reply.elapsed.total_seconds() for reply in health) < 3


async def test_a_body_over_the_limit_is_refused_as_all_else_is(
    environ: dict[str, str], bearer: Callable[..., Any]
) -> None:
    with ThreadedServer(settings_of(environ, max_body_bytes=10_000)) as server:
        async with client_of(server.url, await bearer("Alice")) as client:
            for content in (b"x" * 10_001, _pieces()):
                reply = await client.post("/v1/extractions", content=content, headers=JSON)

                assert (reply.status_code, reply.json()["error"]["code"]) == (413, "too_large")
                assert reply.json()["error"]["request_id"] == reply.headers["x-request-id"]


async def _pieces() -> AsyncIterator[bytes]:
    for _ in range(11):
        yield b"x" * 1000


async def test_a_prefix_that_a_proxy_leaves_changes_no_refusal(
    server: ThreadedServer, alice: AsyncClient
) -> None:
    server.app.root_path = "/backend"
    paths = (CHAT, "/v1/extractions", "/ag-ui/assistant")

    for body in (b"{", b'{"a": "' + b"x" * 2 * MEGABYTES + b'"}'):
        for path in paths:
            plain = await alice.post(path, content=body, headers=JSON)
            behind = await alice.post(f"/backend{path}", content=body, headers=JSON)

            said = [reply.json()["error"] | {"request_id": None} for reply in (plain, behind)]
            assert (behind.status_code, said[1]) == (plain.status_code, said[0])
    items = {"items": [], "x": [1] * (MAX_VALUES + 1)}
    job = await alice.post("/backend/v1/extraction-jobs", json=items)
    assert "beside its items" in job.text  # it was counted where jobs are

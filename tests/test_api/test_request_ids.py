"""Every answer names its request."""

import re

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from app.api.request_ids import RequestIds


async def _own(request: Request) -> PlainTextResponse:
    return PlainTextResponse(request.state.request_id)


async def _stream(request: Request) -> StreamingResponse:
    return StreamingResponse(iter([b"a", b"b"]))


def client() -> httpx2.AsyncClient:
    app = RequestIds(Starlette(routes=[Route("/", _own), Route("/stream", _stream)]))
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test")


async def test_each_request_gets_an_id_of_its_own() -> None:
    async with client() as http:
        first, second = await http.get("/"), await http.get("/stream")

    assert re.fullmatch("req_[0-9a-f]{32}", first.headers["x-request-id"])
    assert first.text == first.headers["x-request-id"] != second.headers["x-request-id"]
    assert second.text == "ab"


@pytest.mark.parametrize("given", ["a", "req_1.2-3", "Z" * 64])
async def test_the_clients_id_is_kept(given: str) -> None:
    async with client() as http:
        reply = await http.get("/", headers={"X-Request-Id": given})

    assert reply.text == reply.headers["x-request-id"] == given
    assert reply.headers.get_list("x-request-id") == [given]


@pytest.mark.parametrize("given", ["", "Z" * 65, "a b", "a\n", "é", "<script>", "a,b"])
async def test_what_could_not_stand_in_a_log_is_replaced(given: str) -> None:
    async with client() as http:
        reply = await http.get("/", headers=[(b"x-request-id", given.encode("latin-1"))])

    assert re.fullmatch("req_[0-9a-f]{32}", reply.headers["x-request-id"])


async def test_pieces_of_a_body_pass_as_they_are() -> None:
    pieces: list[Message] = [
        {"type": "http.response.start", "status": 200, "headers": []},
        {"type": "http.response.body", "body": b"a"},
    ]
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for piece in pieces:
            await send(piece)

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError

    await RequestIds(app)({"type": "http", "headers": []}, receive, send)

    assert sent[1] is pieces[1]


async def test_other_scopes_are_left_alone() -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    async def receive() -> Message:
        raise AssertionError

    async def send(message: Message) -> None:
        raise AssertionError

    await RequestIds(app)({"type": "lifespan"}, receive, send)

    assert seen == [{"type": "lifespan"}]

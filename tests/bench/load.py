"""Closed-loop load over raw HTTP/1.1: as many requests at a time as there are connections.

Small enough to share a processor with the upstream and still wait for the server.
"""

import asyncio
import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.bench.upstream import MARK, TOOL

LAST_CHUNK = b"\r\n0\r\n\r\n"
PATIENCE = 30.0  # seconds that requests under way may take when the time is over
QUESTION = "What is the weather in Tokyo?"
TOOL_QUESTION = f"Who am I? Ask {TOOL}."

Json = dict[str, Any]


def _chat(model: str, text: str, stream: bool) -> Json:
    asked: Json = {"model": model, "messages": [{"role": "user", "content": text}]}
    if stream:
        asked |= {"stream": True, "stream_options": {"include_usage": True}}
    return asked


def _responses(model: str, text: str, stream: bool) -> Json:
    return {"model": model, "input": text, "stream": stream}


def _vercel(model: str, text: str, _stream: bool) -> Json:
    message = {"id": _id(), "role": "user", "parts": [{"type": "text", "text": text}]}
    return {"trigger": "submit-message", "id": _id(), "messages": [message], "agent": model}


def _agui(_model: str, text: str, _stream: bool) -> Json:
    message = {"id": _id(), "role": "user", "content": text}
    more: Json = {"state": {}, "tools": [], "context": [], "forwardedProps": {}}
    return {"threadId": _id(), "runId": _id(), "messages": [message], **more}


def _id() -> str:
    return str(uuid.uuid4())


PROTOCOLS: Mapping[str, tuple[str, Callable[[str, str, bool], Json]]] = {
    "chat": ("/v1/chat/completions", _chat),
    "responses": ("/v1/responses", _responses),
    "vercel": ("/api/chat", _vercel),
    "ag-ui": ("/ag-ui/assistant", _agui),
}


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, and the number of tokens that its answer must hold."""

    model: str
    stream: bool
    tokens: int
    protocol: str = "chat"
    text: str = QUESTION
    chat: str | None = None  # the conversation that it goes on with

    def request(self) -> bytes:
        path, body_of = PROTOCOLS[self.protocol]
        body = json.dumps(body_of(self.model, self.text, self.stream)).encode()
        chat = f"x-chat-id: {self.chat}\r\n" if self.chat else ""
        return (
            f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: text/event-stream\r\n{chat}"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        ).encode() + body


@dataclass(slots=True)
class Outcome:
    """What came of it. An answer with a wrong status or too few tokens counts as an error, and so
    does a connection that was lost, which asks no more.

    `tokens` also of answers that were `cut` off as the time was over; `waits` and `firsts` are the
    seconds until each answer was whole, and until its first token, or its end where it had none.
    """

    seconds: float = 0
    answers: int = 0
    tokens: int = 0
    cut: int = 0
    waits: list[float] = field(default_factory=list[float])
    firsts: list[float] = field(default_factory=list[float])
    errors: Counter[str] = field(default_factory=Counter[str])


class _Client(asyncio.Protocol):
    """Asks again as soon as it was answered, until the time is over."""

    def __init__(self, ask: Ask, until: float, outcome: Outcome) -> None:
        self._ask = ask
        self._until = until
        self._outcome = outcome
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._go()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self._outcome.errors["connection lost"] += 1
            self.done.set_result(None)

    def _go(self) -> None:
        self._received = bytearray()
        self._body = 0  # where it begins; 0 while the head is not complete
        self._length: int | None = None  # None: in chunks
        self._counted = 0  # bytes in which tokens were counted
        self._tokens = 0
        self._asked = time.perf_counter()
        self._transport.write(self._ask.request())

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        if not self._body:
            end = received.find(b"\r\n\r\n")
            if end < 0:
                return
            self._body = end + 4
            head = bytes(received[:end]).lower()
            _, found, length = head.partition(b"\r\ncontent-length:")
            self._length = int(length.split(b"\r\n")[0]) if found else None
        self._count()
        if self._length is None:
            complete = received.endswith(LAST_CHUNK)
        else:
            complete = len(received) >= self._body + self._length
        if complete:
            self._judge()
            if time.perf_counter() < self._until:
                self._go()
            else:
                self.done.set_result(None)
                self._transport.close()

    def _count(self) -> None:
        new = self._received.count(MARK, max(self._counted - 1, 0))
        self._counted = len(self._received)
        if new and not self._tokens:
            self._outcome.firsts.append(time.perf_counter() - self._asked)
        self._tokens += new
        self._outcome.tokens += min(new, max(self._ask.tokens - self._tokens + new, 0))

    def leave(self) -> None:
        if not self.done.done():
            self.done.set_result(None)
            self._outcome.cut += 1
            if not self._tokens:  # what it waited is the least that it would have
                self._outcome.firsts.append(time.perf_counter() - self._asked)
        self._transport.abort()

    def _judge(self) -> None:
        status = int(self._received[9:12])
        if status != 200:
            self._outcome.errors[f"status {status}"] += 1
        elif self._tokens < self._ask.tokens:
            self._outcome.errors["too few tokens"] += 1
        else:
            self._outcome.answers += 1
            self._outcome.waits.append(time.perf_counter() - self._asked)


async def load(
    port: int, ask: Ask, connections: int, seconds: float, patience: float = PATIENCE
) -> Outcome:
    """Asks for so many seconds, and waits for what is then under way, as long as there is
    patience."""
    loop = asyncio.get_running_loop()
    outcome = Outcome()
    begin = time.perf_counter()
    clients: list[_Client] = []
    for _ in range(connections):
        _, client = await loop.create_connection(
            lambda: _Client(ask, begin + seconds, outcome), "127.0.0.1", port
        )
        clients.append(client)
    await asyncio.wait([client.done for client in clients], timeout=seconds + patience)
    outcome.seconds = time.perf_counter() - begin
    for client in clients:
        client.leave()
    return outcome

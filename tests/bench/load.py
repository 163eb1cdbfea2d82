"""Closed-loop load over raw HTTP/1.1: as many requests at a time as there are connections.

Small enough to share a processor with the upstream and still wait for the server.
"""

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from tests.bench.upstream import MARK

LAST_CHUNK = b"\r\n0\r\n\r\n"
PATIENCE = 30.0  # seconds that requests under way may take when the time is over


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, and the number of tokens that its answer must hold."""

    model: str
    stream: bool
    tokens: int

    def request(self) -> bytes:
        asked: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": "What is the weather in Tokyo?"}],
        }
        if self.stream:
            asked |= {"stream": True, "stream_options": {"include_usage": True}}
        body = json.dumps(asked).encode()
        return (
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        )


@dataclass(slots=True)
class Outcome:
    """What came of it. An answer with a wrong status or too few tokens counts as an error."""

    seconds: float = 0
    answers: int = 0
    errors: Counter[str] = field(default_factory=Counter[str])


class _Client(asyncio.Protocol):
    """Asks again as soon as it was answered, until the time is over."""

    def __init__(self, ask: Ask, until: float, outcome: Outcome) -> None:
        self._request = ask.request()
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
        self._transport.write(self._request)

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

    def leave(self) -> None:
        if not self.done.done():
            self.done.set_result(None)
        self._transport.abort()

    def _judge(self) -> None:
        status = int(self._received[9:12])
        if status != 200:
            self._outcome.errors[f"status {status}"] += 1
        elif self._received.count(MARK) < self._ask.tokens:
            self._outcome.errors["too few tokens"] += 1
        else:
            self._outcome.answers += 1


async def load(port: int, ask: Ask, connections: int, seconds: float) -> Outcome:
    """Asks for so many seconds, and waits for what is then under way."""
    loop = asyncio.get_running_loop()
    outcome = Outcome()
    begin = time.perf_counter()
    clients: list[_Client] = []
    for _ in range(connections):
        _, client = await loop.create_connection(
            lambda: _Client(ask, begin + seconds, outcome), "127.0.0.1", port
        )
        clients.append(client)
    _, late = await asyncio.wait([client.done for client in clients], timeout=seconds + PATIENCE)
    outcome.seconds = time.perf_counter() - begin
    if late:
        outcome.errors["no answer"] += len(late)
    for client in clients:
        client.leave()
    return outcome

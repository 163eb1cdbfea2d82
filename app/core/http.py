"""HTTP/1.1 as this server reads it: what stands around a body is bounded, in bytes and in time."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from typing_extensions import override
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 64 * 1024  # bytes of a request's line and headers, and of what follows a body's chunks


class Protocol(HttpToolsProtocol):
    """uvicorn's, which keeps headers as long as they come, and waits for their end for ever."""

    head_seconds = 15.0  # in which a request's head is here

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._around = 0  # bytes since the last that belonged to a body, or ended a head
        self._deadline: asyncio.TimerHandle | None = None

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._expect_head(transport.close)  # a browser's may be there for what comes later

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    @override
    def data_received(self, data: bytes) -> None:
        self._around += len(data)
        super().data_received(data)
        if self._around > MAX_HEAD:
            self._refuse(b"431 Request Header Fields Too Large")

    @override
    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_head(partial(self._refuse, b"408 Request Timeout"))

    @override
    def on_headers_complete(self) -> None:
        self._around = 0
        self._stop_waiting()
        super().on_headers_complete()

    @override
    def on_body(self, body: bytes) -> None:
        self._around = 0
        super().on_body(body)

    @override
    def on_message_complete(self) -> None:
        self._around = 0
        super().on_message_complete()

    def _expect_head(self, late: Callable[[], None]) -> None:
        self._stop_waiting()
        self._deadline = self.loop.call_later(self.head_seconds, late)

    def _stop_waiting(self) -> None:
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None

    def _refuse(self, status: bytes) -> None:
        """Ends the connection, and says why where no answer has begun on it."""
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:  # pyright: ignore[reportUnnecessaryComparison]
            head = b"HTTP/1.1 %b\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
            self.transport.write(head % status)
        self.transport.close()

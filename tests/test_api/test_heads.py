"""What stands around a body costs its sender a connection, and nobody else anything."""

import socket
from collections.abc import Iterator

import pytest

from app.core.http import MAX_HEAD, Protocol
from tests.conftest import settings_of
from tests.server import ThreadedServer

GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = b"POST /auth/token HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
MEGABYTES = 20 * 2**20


class Hasty(Protocol):
    head_seconds = 0.5


@pytest.fixture
def server(environ: dict[str, str]) -> Iterator[ThreadedServer]:
    with ThreadedServer(settings_of(environ), Hasty) as running:
        yield running


def tell(server: ThreadedServer, *parts: bytes) -> bytes:
    """All that the server says, until it closes the connection."""
    host, port = server.url.removeprefix("http://").split(":")
    said = b""
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        try:
            for part in parts:
                connection.sendall(part)
            while piece := connection.recv(65536):
                said += piece
        except (ConnectionResetError, BrokenPipeError):
            pass  # it was closed while more was on its way
    return said


def test_headers_may_be_long_but_end(server: ThreadedServer) -> None:
    close = b"Connection: close\r\n\r\n"

    said = tell(server, GET, b"X: %b\r\n" % (b"x" * (MAX_HEAD // 2)), close)

    assert said.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "parts",
    [
        (GET, b"a: b\r\n" * (MEGABYTES // 6)),
        (GET, b"X: " + b"x" * MEGABYTES),
        (b"GET /" + b"x" * MEGABYTES,),
        (CHUNKED, b"1\r\na\r\n0\r\n", b"a: b\r\n" * (MEGABYTES // 6)),
        (CHUNKED, b"1\r\na\r\n0\r\nX: ", b"x" * MEGABYTES),
        (CHUNKED, b"1;" + b"x" * MEGABYTES),
    ],
)
def test_what_does_not_end_is_refused(server: ThreadedServer, parts: tuple[bytes, ...]) -> None:
    said = tell(server, *parts)

    assert said[:13] in (b"", b"HTTP/1.1 431 ", b"HTTP/1.1 400 ")
    assert tell(server, GET, b"Connection: close\r\n\r\n").startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("parts", "answer"), [((), b""), ((GET,), b"HTTP/1.1 408 Request Timeout")]
)
def test_who_says_nothing_more_is_not_waited_for(
    server: ThreadedServer, parts: tuple[bytes, ...], answer: bytes
) -> None:
    said = tell(server, *parts)

    assert said.split(b"\r\n")[0] == answer


def test_nor_after_an_answer(server: ThreadedServer) -> None:
    said = tell(server, GET + b"\r\n", GET)

    assert said.startswith(b"HTTP/1.1 200 ")
    assert b"HTTP/1.1 408 " in said

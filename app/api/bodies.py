"""What a request's body may be, before anybody parses it."""

import re
from collections.abc import Awaitable, Iterator

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.core.errors import path_of

MAX_VALUES = 200_000
JOBS = "/v1/extraction-jobs"  # read an item at a time, and counted there


class FewValues:
    """Refuses text with more than MAX_VALUES of what JSON puts before its values.

    A picture of ten megabytes is one string and read at once; as many brackets take seconds, in
    which nobody else is answered. Inside of strings they count too: a text that has so many is
    longer than any model reads.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] == "http" and path_of(scope) != JOBS and not _is_binary(scope):
            receive = _counting(receive)
        return self._app(scope, receive, send)


def _is_binary(scope: Scope) -> bool:
    return Headers(scope=scope).get("content-type", "").lower().startswith("multipart/")


def _counting(receive: Receive) -> Receive:
    left = MAX_VALUES

    async def counted() -> Message:
        nonlocal left
        message = await receive()
        body: bytes = message.get("body", b"")
        left -= body.count(b",") + body.count(b"[") + body.count(b"{")
        if left < 0:
            raise HTTPException(413, f"The body has more than {MAX_VALUES} values; send less.")
        return message

    return counted


class Splitter:
    """Takes a JSON object apart while it arrives: the elements of one of its arrays, and the rest.

    Judges nothing: what comes out is to be parsed. `most`: bytes of one element, and of the rest.
    """

    def __init__(self, name: str, most: int) -> None:
        self._opening = re.compile(rb'(?<!\\)"%b"\s*:\s*\Z' % name.encode())
        self._most = most
        self._depth = 0
        self._in_string = False
        self._inside = False  # of the array
        self._split = False  # it was there
        self._some = False  # element came before
        self._piece = bytearray()  # of the element that is coming
        self._rest = bytearray()
        self._cut = b""  # a backslash whose other half is coming

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """The elements that are whole now. Raises HTTPException (413)."""
        chunk, self._cut = self._cut + chunk, b""
        at = begin = 0
        while at < len(chunk):
            if self._in_string:
                at = _end(IN_STRING.match(chunk, at), chunk)
                if chunk[at : at + 1] == b"\\":
                    chunk, self._cut = chunk[:at], chunk[at:]
                elif at < len(chunk):
                    self._in_string, at = False, at + 1
                continue
            mark = MARK.search(chunk, at)
            at = _end(mark, chunk)
            match chunk[at - 1 : at] if mark else b"":
                case b'"':
                    self._in_string = True
                case b"[" if (
                    self._depth == 1 and not self._split and self._opens(chunk[begin : at - 1])
                ):
                    self._keep(chunk[begin:at])
                    self._depth, self._inside, self._split, begin = 2, True, True, at
                case b"[" | b"{":
                    self._depth += 1
                case b"," if self._inside and self._depth == 2:
                    yield bytes(self._piece) + chunk[begin : at - 1]
                    self._piece, self._some, begin = bytearray(), True, at
                case b"]" if self._inside and self._depth == 2:
                    last = bytes(self._piece) + chunk[begin : at - 1]
                    if last.strip() or self._some:
                        yield last
                    self._piece, self._inside = bytearray(), False
                    self._depth, begin = 1, at - 1
                case b"]" | b"}":
                    self._depth -= 1
                case _:
                    pass
        self._keep(chunk[begin:])

    def _opens(self, text: bytes) -> bool:
        return self._opening.search(bytes(self._rest[-TAIL:]) + text[-TAIL:]) is not None

    def _keep(self, piece: bytes) -> None:
        if self._inside:
            self._piece += piece
        else:
            self._rest += piece
        if max(len(self._piece), len(self._rest)) > self._most:
            raise HTTPException(413, f"One item, or all the rest, has over {self._most} bytes.")

    def rest(self) -> bytes:
        """The object without the elements, once it is all here."""
        return bytes(self._rest + self._piece) + self._cut


IN_STRING = re.compile(rb'(?:[^"\\]+|\\.)*+', re.DOTALL)
MARK = re.compile(rb'["\[\]{},]')
TAIL = 200  # bytes in which the array's name and its opening bracket stand


def _end(found: re.Match[bytes] | None, chunk: bytes) -> int:
    return found.end() if found else len(chunk)

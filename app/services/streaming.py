"""Chat Completions streams, read by the tick instead of token by token.

Most of a streamed token's cost is building SDK objects for a few letters. Here plain text and
reasoning are taken from the bytes, and what came within a tick becomes one chunk; every other
event goes the SDK's way.
"""

import asyncio
import contextlib
import re
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import httpx2
from aiohttp import ClientResponse
from openai import AsyncStream
from openai._streaming import ServerSentEvent, SSEDecoder
from openai.types.chat import ChatCompletionChunk
from openai.types.chat.chat_completion_chunk import Choice, ChoiceDelta
from pydantic import BaseModel
from pydantic_ai.models import ModelRequestParameters
from pydantic_ai.models.openai import (
    OpenAIChatModel,
    OpenAIChatModelSettings,
    OpenAIStreamedResponse,
)
from pydantic_ai.tools import ToolDefinition
from pydantic_core import from_json
from typing_extensions import override

from app.services.admission import Admission
from app.services.journal import TICK

PLAIN = frozenset(
    ("id", "object", "created", "model", "system_fingerprint", "service_tier", "obfuscation")
)
"""What a chunk may say beside its one choice without meaning anything to PydanticAI."""

READ_AHEAD = 1000  # pieces of a response that may wait to be looked at
PIECE = 16 * 1024  # bytes of the largest that the SDK's transport gives

STRETCH = 10  # times as long as it was late, text waits where the process is behind its streams
LONGEST = 0.5  # seconds that it waits for that at most, and where runs wait to begin
HICCUP = TICK / 4  # seconds of being late that mean nothing

TOOLS = 1000  # that are known at a time

FRAMES = 5  # forms that a stream's events may take before no more are looked for

TEXTS = ("content", "reasoning", "reasoning_content")
SILENT = ("refusal", "tool_calls", "function_call")


class ChatModel(OpenAIChatModel):
    """PydanticAI's model, but for how the bytes of a streamed response are read, and for tools
    that are known already: their schemas are turned into OpenAI's once."""

    def __init__(self, model_name: str, *, admission: Admission | None = None, **how: Any) -> None:
        super().__init__(model_name, **how)
        self._admission = admission or Admission()

    @cached_property
    def _customized(self) -> dict[str, tuple[ToolDefinition, ToolDefinition]]:
        return {}

    @override
    def customize_request_parameters(
        self, model_request_parameters: ModelRequestParameters
    ) -> ModelRequestParameters:
        rest = super().customize_request_parameters(
            replace(model_request_parameters, function_tools=[])
        )
        tools = [self._customize(tool) for tool in model_request_parameters.function_tools]
        return replace(rest, function_tools=tools)

    def _customize(self, tool: ToolDefinition) -> ToolDefinition:
        known = self._customized.get(tool.name)
        if known and known[0] == tool:
            return known[1]
        alone = ModelRequestParameters(function_tools=[tool])
        [customized] = super().customize_request_parameters(alone).function_tools
        if len(self._customized) >= TOOLS:  # most of them some clients' own
            self._customized.clear()
        self._customized[tool.name] = tool, customized
        return customized

    @override
    async def _process_streamed_response(
        self,
        response: AsyncStream[ChatCompletionChunk],
        model_request_parameters: ModelRequestParameters,
        model_settings: OpenAIChatModelSettings | None = None,
    ) -> OpenAIStreamedResponse:
        tags = self.profile.get("thinking_tags") or ()
        apart = frozenset(tag[0] for tag in tags)
        merged: Any = MergedStream(response, apart, self._admission)
        return await super()._process_streamed_response(
            merged, model_request_parameters, model_settings
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """A chunk that says nothing but text. `head` is (id, created, model)."""

    head: tuple[str, int, str]
    kind: str  # one of TEXTS
    text: str

    def chunk(self) -> ChatCompletionChunk:
        request_id, created, model = self.head
        delta = _construct(ChoiceDelta, **{self.kind: self.text})
        choice = _construct(Choice, index=0, delta=delta)
        return _construct(
            ChatCompletionChunk,
            id=request_id,
            created=created,
            model=model,
            object="chat.completion.chunk",
            choices=[choice],
        )


def _construct(cls: type[BaseModel], **fields: Any) -> Any:
    """Pydantic's own way past validation: the SDK's looks at each field."""
    return cast(Any, BaseModel.model_construct).__func__(cls, **fields)


def piece_of(data: bytes) -> Piece | None:
    """The text in an event's data; None where there is more to it, or anything unexpected."""
    try:
        chunk: Any = from_json(data)
        [choice] = chunk.pop("choices")
        delta = choice.pop("delta")
        if choice.pop("index") != 0 or any(value is not None for value in choice.values()):
            return None
        if chunk.pop("usage", None) is not None or not chunk.keys() <= PLAIN:
            return None
        if delta.pop("role", None) not in (None, "assistant"):
            return None
        if any(delta.pop(name, None) is not None for name in SILENT):
            return None
        [(kind, text)] = [(name, value) for name, value in delta.items() if value]
        head = chunk["id"], chunk["created"], chunk["model"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if not (kind in TEXTS and delta.keys() <= set(TEXTS)):
        return None
    if [type(value) for value in (*head, text)] != [str, int, str, str]:
        return None
    return Piece(head, kind, text) if head[0] and head[2] else None


def chunk_of(event: ServerSentEvent) -> ChatCompletionChunk | None:
    """What the SDK would make of an event as it should be; None for any other, and for errors.

    The SDK takes whatever comes, and takes its time.
    """
    if event.event is not None:
        return None
    try:
        chunk = ChatCompletionChunk.model_validate_json(event.data, strict=True)
    except ValueError:
        return None
    return None if "error" in (chunk.model_extra or ()) else chunk


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around the text of an event: most events of a stream differ in nothing else."""

    head: tuple[str, int, str]
    kind: str
    before: bytes
    after: bytes

    def piece_in(self, block: bytes) -> Piece | None:
        """The text in an event of this form; None for any other."""
        if not (block.startswith(self.before) and block.endswith(self.after)):
            return None
        value = block[len(self.before) : len(block) - len(self.after)]
        if not value.startswith(b'"'):
            return None
        try:
            text: str = from_json(value)
        except ValueError:
            return None
        return Piece(self.head, self.kind, text) if text else None


def frame_of(block: bytes, piece: Piece) -> Frame | None:
    """The form of an event, of which `piece` is the text; None where it is not certain.

    In JSON, a quoted word before a colon is a key, so what is found is a value and may be any
    other text; that it is the one that counts, an event with another text shows.
    """
    for found in re.finditer(rb'"%b" ?: ?("(?:[^"\\]|\\.)*")' % piece.kind.encode(), block):
        frame = Frame(piece.head, piece.kind, block[: found.start(1)], block[found.end(1) :])
        trial = piece_of((frame.before + b'"?"' + frame.after)[6:].rstrip(b"\r\n"))
        if trial == Piece(piece.head, piece.kind, "?"):
            return frame
    return None


@dataclass
class MergedStream:
    """An SDK's stream in whose place it is read: the same chunks, but texts that came together
    are one."""

    source: AsyncStream[ChatCompletionChunk]
    apart: frozenset[str] = frozenset()  # a text with one of these letters stays by itself
    admission: Admission = field(default_factory=Admission)
    _others: deque[ServerSentEvent] = field(default_factory=deque[ServerSentEvent])
    _decoder: SSEDecoder = field(default_factory=SSEDecoder)
    _frame: Frame | None = None
    _frames: int = 0  # that were looked for
    _iterator: AsyncIterator[ChatCompletionChunk] | None = None

    def __aiter__(self) -> AsyncIterator[ChatCompletionChunk]:
        if self._iterator is None:
            self._iterator = self._chunks()
        return self._iterator

    async def close(self) -> None:
        await self.source.close()

    async def _chunks(self) -> AsyncGenerator[ChatCompletionChunk]:
        # The SDK's own loop turns events into chunks, errors and the end; it gets them from here.
        cast(Any, self.source)._iter_events = self._give
        try:
            rest = b""
            async for read in reads(self.source.response, self.admission):
                *blocks, rest = split(rest + read)
                for item in self._merged(blocks):
                    if isinstance(item, Piece):
                        yield item.chunk()
                    elif chunk := chunk_of(item):
                        yield chunk
                    else:
                        self._others.append(item)
                        try:
                            yield await anext(self.source)
                        except StopAsyncIteration:
                            return
            for event in self._events(rest):
                self._others.append(event)
            async for chunk in self.source:
                yield chunk
        finally:
            await self.source.close()

    async def _give(self) -> AsyncGenerator[ServerSentEvent]:
        while self._others:
            yield self._others.popleft()

    def _merged(self, blocks: list[bytes]) -> Iterator[Piece | ServerSentEvent]:
        """The blocks of one read, in order; texts that follow each other are one."""
        head, kind, texts = None, "", list[str]()
        for block in blocks:
            piece = (self._frame and self._frame.piece_in(block)) or self._piece_of(block)
            if piece and head == piece.head and kind == piece.kind and self._joins(piece.text):
                texts.append(piece.text)
                continue
            if head and texts:
                yield Piece(head, kind, "".join(texts))
            head, texts = None, []
            if piece is None:
                yield from self._events(block)
            elif self._joins(piece.text):
                head, kind, texts = piece.head, piece.kind, [piece.text]
            else:
                yield piece
        if head and texts:
            yield Piece(head, kind, "".join(texts))

    def _piece_of(self, block: bytes) -> Piece | None:
        data = block.rstrip(b"\r\n")
        if not data.startswith(b"data: {") or b"\n" in data or b"\r" in data:
            return None
        piece = piece_of(data[6:])
        if piece and self._frames < FRAMES:
            self._frames += 1
            self._frame = frame_of(block, piece)
        return piece

    def _joins(self, text: str) -> bool:
        """PydanticAI looks at each text for a tag alone, and for blanks alone."""
        return not text.isspace() and self.apart.isdisjoint(text)

    def _events(self, block: bytes) -> Iterator[ServerSentEvent]:
        for line in block.splitlines():
            if event := self._decoder.decode(line.decode()):
                yield event


async def reads(response: httpx2.Response, admission: Admission) -> AsyncGenerator[bytes]:
    """The response's bytes, those together that came in the time in which the run log waits anyway.

    The first waits for nothing, nor does the last where the process keeps up. Where it has more to
    do than it can, all but the first two wait longer, and unread: looking less often lets all
    streams end sooner. It has where it was late twice running, and where runs wait to begin.
    """
    loop = asyncio.get_running_loop()
    waiting: list[bytes] = []
    came = 0.0  # when the first of those waiting did
    arrived, enough, room = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def read() -> None:
        nonlocal came
        try:
            async for piece in response.aiter_bytes():
                if not waiting:
                    came = loop.time()
                waiting.append(piece)
                arrived.set()
                if len(waiting) >= READ_AHEAD:
                    enough.set()
                    room.clear()
                    await room.wait()
                early = due - TICK - loop.time()  # what waited is to be here when it is looked for
                if early > 0 and len(piece) < PIECE:  # else there is more already
                    await _left_unread(response, early)
        finally:
            arrived.set()
            enough.set()

    reading = asyncio.create_task(read())
    due, late, has_begun = loop.time(), 0.0, False
    try:
        while True:
            await arrived.wait()
            if not reading.done() and (early := due - loop.time()) > 0:
                with contextlib.suppress(TimeoutError):  # `wait_for` may lose a cancellation
                    async with asyncio.timeout(early):
                        await enough.wait()
            arrived.clear()
            enough.clear()
            now = loop.time()
            before, late = late, max(0.0, now - max(due, came) - HICCUP)
            wait = min(TICK + STRETCH * min(before, late), LONGEST)
            if admission.is_crowded and has_begun:  # the first piece often says no more than a role
                wait = LONGEST
            due, has_begun = now + wait, True
            data = b"".join(waiting)
            waiting.clear()
            room.set()
            if data:
                yield data
            if reading.done() and not waiting:
                reading.result()
                return
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def _left_unread(response: httpx2.Response, seconds: float) -> None:
    """Waits, unless all was read. What comes meanwhile waits in the socket, where it costs nothing.

    Not below TLS: there uvloop forgets what it has decrypted and not given away when the sender
    closes the connection, so what comes waits in the client's buffer.
    """
    below: ClientResponse | None = response.extensions.get("aiohttp_response")
    if below is None or below.connection is None:  # which is the next response's by now
        return
    socket = below.connection.transport
    if socket is None or socket.get_extra_info("sslcontext"):
        await asyncio.sleep(seconds)
        return
    socket.pause_reading()
    try:
        await asyncio.sleep(seconds)
    finally:
        socket.resume_reading()


def split(data: bytes) -> list[bytes]:
    """The blocks of a stream of server-sent events, each with its blank line, and the rest."""
    if b"\r" not in data:
        *blocks, rest = data.split(b"\n\n")
        return [*(block + b"\n\n" for block in blocks), rest]
    blocks: list[bytes] = []
    rest = b""
    for line in data.splitlines(keepends=True):
        rest += line
        if rest.endswith((b"\r\r", b"\n\n", b"\r\n\r\n")):
            blocks.append(rest)
            rest = b""
    return [*blocks, rest]

"""A model provider that costs next to nothing: OpenAI's chat completions, without any delay.

    python -m tests.bench.upstream PORT

The model's name says how long its answers are: `mock-t20-s200` answers with 20 tokens, or with
200 where they are streamed. Every token holds `MARK`, so that a reader can count tokens whatever
the format around them. A stream leaves in one write, one HTTP chunk per event, as from a provider
that is faster than its reader; `mock-s200-i5` says a token every 5 ms. Who asks about `TOOL` is
first told to call it. `GET /seen` returns the body of the latest request for an answer.
"""

import asyncio
import json
import re
import sys
import time
from functools import cache
from itertools import accumulate
from typing import Any, ClassVar

MARK = b"qz"
TOOL = "get_my_account"
HEAD = {"id": "chatcmpl-mock", "created": 1790000000, "system_fingerprint": "fp_mock"}
CALL = {"id": "call_mock", "type": "function", "function": {"name": TOOL, "arguments": "{}"}}
TICK = 0.005  # seconds between looks at all streams that have a pace


def _words(count: int) -> list[str]:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [f" qz{letters[n % 26]}{letters[n // 26 % 26]}" for n in range(count)]


def _field(model: str, letter: str, default: int) -> int:
    found = re.search(rf"-{letter}(\d+)", model)
    return int(found[1]) if found else default


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 12, "completion_tokens": tokens, "total_tokens": 12 + tokens}


def _reply(body: bytes) -> bytes:
    head = (
        f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@cache
def _whole(model: str, calls: bool) -> bytes:
    tokens = _field(model, "t", 20)
    message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
    if calls:
        message["tool_calls"] = [CALL]
    else:
        message["content"] = "".join(_words(tokens))
    finish = "tool_calls" if calls else "stop"
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
    answer = {**HEAD, "object": "chat.completion", "model": model, "choices": [choice]}
    return _reply(json.dumps({**answer, "usage": _usage(tokens)}).encode())


@cache
def _stream(model: str, counted: bool) -> tuple[bytes, list[int]]:
    """The response, and where in it each of its events ends."""
    tokens = _field(model, "s", 20)
    head: dict[str, Any] = {**HEAD, "object": "chat.completion.chunk", "model": model}
    if counted:
        head["usage"] = None

    def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**head, "choices": [choice]}

    chunks = [chunk({"role": "assistant", "content": "", "refusal": None})]
    chunks += [chunk({"content": word}) for word in _words(tokens)]
    chunks.append(chunk({}, "stop"))
    if counted:
        chunks.append({**head, "choices": [], "usage": _usage(tokens)})
    events = [f"data: {json.dumps(item)}\n\n" for item in chunks] + ["data: [DONE]\n\n"]
    pieces = [f"{len(event):x}\r\n{event}\r\n".encode() for event in events]
    pieces[0] = (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        + pieces[0]
    )
    pieces[-1] += b"0\r\n\r\n"
    return b"".join(pieces), list(accumulate(map(len, pieces)))


class Paced:
    """A stream that is being told: what is due by now goes in one write."""

    active: ClassVar[set["Paced"]] = set()

    def __init__(self, transport: asyncio.Transport, answer: bytes, ends: list[int], pause: float):
        self._transport, self._answer, self._ends, self._pause = transport, answer, ends, pause
        self._begun = time.perf_counter()
        self._told = ends[0]  # bytes

    def tell(self, now: float) -> None:
        due = int((now - self._begun) / self._pause)
        end = self._ends[min(due, len(self._ends) - 1)]
        if end > self._told:
            self._transport.write(self._answer[self._told : end])
            self._told = end
        if due >= len(self._ends) - 1 or self._transport.is_closing():
            Paced.active.discard(self)

    @classmethod
    async def all(cls) -> None:
        while True:
            await asyncio.sleep(TICK)
            now = time.perf_counter()
            for each in list(cls.active):
                each.tell(now)


class Upstream(asyncio.Protocol):
    """One connection, kept alive. Its client waits for each answer before it asks again."""

    seen = b"{}"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._received = b""

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, blank, body = self._received.partition(b"\r\n\r\n")
        if not blank:
            return
        length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
        if length and len(body) < int(length[1]):
            return
        self._received = b""
        self._transport.write(self._answer(head, body))

    def _answer(self, head: bytes, body: bytes) -> bytes:
        """What is to be said at once."""
        if head.startswith(b"GET"):
            return _reply(Upstream.seen)
        Upstream.seen = body
        asked: dict[str, Any] = json.loads(body)
        model: str = asked["model"]
        if not asked.get("stream"):
            last = asked["messages"][-1]
            return _whole(model, last["role"] == "user" and TOOL in str(last["content"]))
        answer, ends = _stream(model, asked.get("stream_options") == {"include_usage": True})
        pause = _field(model, "i", 0)
        if not pause:
            return answer
        Paced.active.add(Paced(self._transport, answer, ends, pause / 1000))
        return answer[: ends[0]]


async def serve(port: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Upstream, "127.0.0.1", port, backlog=4096)
    pacing = asyncio.create_task(Paced.all())
    await server.serve_forever()
    await pacing


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))

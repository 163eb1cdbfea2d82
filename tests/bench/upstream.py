"""A model provider that costs next to nothing: OpenAI's chat completions, without any delay.

    python -m tests.bench.upstream PORT

The model's name says how long its answers are: `mock-t20-s200` answers with 20 tokens, or with
200 where they are streamed. Every token holds `MARK`, so that a reader can count tokens whatever
the format around them. A stream leaves in one write, one HTTP chunk per event, as from a provider
that is faster than its reader; `mock-s200-i100` waits 100 ms between its events. `GET /seen`
returns the body of the latest request for an answer.
"""

import asyncio
import json
import re
import sys
from functools import cache
from typing import Any

MARK = b"qz"
HEAD = {"id": "chatcmpl-mock", "created": 1790000000, "system_fingerprint": "fp_mock"}


def _words(count: int) -> list[str]:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [f" qz{letters[n % 26]}{letters[n // 26 % 26]}" for n in range(count)]


def _tokens(model: str, letter: str) -> int:
    found = re.search(rf"-{letter}(\d+)", model)
    return int(found[1]) if found else 20


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 12, "completion_tokens": tokens, "total_tokens": 12 + tokens}


def _reply(body: bytes) -> bytes:
    head = (
        f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@cache
def _whole(model: str) -> bytes:
    tokens = _tokens(model, "t")
    text = "".join(_words(tokens))
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    answer = {**HEAD, "object": "chat.completion", "model": model, "choices": [choice]}
    return _reply(json.dumps({**answer, "usage": _usage(tokens)}).encode())


@cache
def _stream(model: str, counted: bool) -> bytes:
    tokens = _tokens(model, "s")
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
    return (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        + b"".join(f"{len(event):x}\r\n{event}\r\n".encode() for event in events)
        + b"0\r\n\r\n"
    )


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
        answer = self._answer(head, body)
        model = Upstream.seen if head.startswith(b"POST") else b""
        if pace := re.search(rb"mock[^\"]*-i(\d+)", model):
            self._pieces = re.split(rb"(?<=\r\n)(?=[0-9a-f]+\r\n)", answer)
            self._next(int(pace[1]) / 1000)
        else:
            self._transport.write(answer)

    def _next(self, pause: float) -> None:
        if self._pieces and not self._transport.is_closing():
            self._transport.write(self._pieces.pop(0))
            asyncio.get_running_loop().call_later(pause, self._next, pause)

    def _answer(self, head: bytes, body: bytes) -> bytes:
        if head.startswith(b"GET"):
            return _reply(Upstream.seen)
        Upstream.seen = body
        asked: dict[str, Any] = json.loads(body)
        if not asked.get("stream"):
            return _whole(asked["model"])
        return _stream(asked["model"], asked.get("stream_options") == {"include_usage": True})


async def serve(port: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Upstream, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))

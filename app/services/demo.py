"""The demo model: an OpenAI-compatible server inside this process, for when there is no other."""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx2
from pydantic import ValidationError
from pydantic_core import to_json

from app.services.demo_answers import Chat, answer

MODEL = "demo"

Object = dict[str, Any]

_PIECE = re.compile(r"(?:\S{1,40}\s*){1,3}")  # up to three words, and no long ones


class DemoTransport(httpx2.AsyncBaseTransport):
    """Answers the OpenAI client without a network: put it under its `http_client`.

    The same request gets the same answer. `delay` is in seconds, between a stream's chunks.
    """

    def __init__(self, delay: float = 0.0) -> None:
        self._delay = delay

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """A completion, a stream of it, the list of models, or an error in OpenAI's form."""
        body, path = await request.aread(), request.url.path.rstrip("/")
        if request.method == "GET" and path.endswith("/models"):
            model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "built-in demo"}
            return httpx2.Response(200, json={"object": "list", "data": [model]})
        if request.method != "POST" or not path.endswith("/chat/completions"):
            return _refusal(404, f"The demo model has no {request.method} {request.url.path}.")
        try:
            asked = Chat.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or None
            return _refusal(400, f"{where or 'body'}: {first['msg']}", where)
        if asked.must_call and not asked.offered:
            return _refusal(400, "tool_choice asks for a tool that tools lacks.", "tool_choice")
        completion = _completion(asked)
        if not asked.stream:
            return httpx2.Response(200, json=completion)
        usage = bool((asked.stream_options or {}).get("include_usage"))
        kind = {"content-type": "text/event-stream; charset=utf-8"}
        events = self._events(_chunks(completion, usage))
        return httpx2.Response(200, headers=kind, content=events)

    async def _events(self, chunks: Iterator[Object]) -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield b"data: " + to_json(chunk) + b"\n\n"
            await asyncio.sleep(self._delay)
        yield b"data: [DONE]\n\n"


def _completion(asked: Chat) -> Object:
    given = answer(asked)
    seed = asked.model_dump_json(exclude={"stream", "stream_options"})
    name = hashlib.sha256(seed.encode()).hexdigest()[:24]
    limits = [each for each in (asked.max_tokens, asked.max_completion_tokens) if each]
    most = 4 * min(limits, default=10**6) - 1  # characters
    prose = isinstance(given, str)
    whole = [given] if prose else [arguments for _, arguments in given]
    texts = [text[:most] for text in whole]
    reason = "length" if texts != whole else "stop" if prose else "tool_calls"
    message: Object = {"role": "assistant", "content": texts[0] if prose else None}
    for at, (tool, _) in enumerate([] if prose else given):
        function = {"name": tool, "arguments": texts[at]}
        call = {"id": f"call_{name}{at}", "type": "function", "function": function}
        message["tool_calls"] = [*message.get("tool_calls", []), call]
    read, written = len(seed) // 4 + 1, sum(map(len, texts)) // 4 + 1
    usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    return {
        "id": f"chatcmpl-{name}",
        "object": "chat.completion",
        "created": 0,
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "finish_reason": reason}],
        "usage": usage,
    }


def _chunks(completion: Object, usage: bool) -> Iterator[Object]:
    """The role, the answer in small pieces, the finish and, if asked for, the usage."""
    frame = {**completion, "object": "chat.completion.chunk", "usage": None}
    choice = completion["choices"][0]
    for delta in [*_deltas(choice["message"]), {}]:
        reason = None if delta else choice["finish_reason"]
        yield {**frame, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
    if usage:
        yield {**frame, "choices": [], "usage": completion["usage"]}


def _deltas(message: Object) -> Iterator[Object]:
    text = message["content"]
    yield {"role": "assistant", "content": None if text is None else ""}
    for piece in _PIECE.findall(text or ""):
        yield {"content": piece}
    for index, call in enumerate(message.get("tool_calls", [])):
        opened = {**call["function"], "arguments": ""}
        yield {"tool_calls": [{**call, "index": index, "function": opened}]}
        for piece in _PIECE.findall(call["function"]["arguments"]):
            yield {"tool_calls": [{"index": index, "function": {"arguments": piece}}]}


def _refusal(status: int, message: str, param: str | None = None) -> httpx2.Response:
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": None}
    return httpx2.Response(status, json={"error": error})

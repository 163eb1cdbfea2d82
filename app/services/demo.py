"""The demo model: an OpenAI-compatible server inside this process, for when there is no other."""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import httpx2
from pydantic import BaseModel, Field, JsonValue, ValidationError
from pydantic_core import to_json

from app.services.demo_answers import Chat, answer

MODEL = "demo"

Object = dict[str, JsonValue]


class StreamOptions(BaseModel):
    """What else a stream should tell."""

    include_usage: bool | None = None


class CompletionRequest(Chat):
    """Body of `POST /v1/chat/completions`; what the demo model does not read is ignored."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    n: int | None = Field(default=None, ge=1, le=1)

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer."""
        limits = [each for each in (self.max_tokens, self.max_completion_tokens) if each]
        return min(limits) if limits else None


class DemoTransport(httpx2.AsyncBaseTransport):
    """Answers the OpenAI client without a network: put it under its `http_client`.

    The same request gets the same answer, which says that it is the demo model's. `delay` is the
    pause in seconds between the chunks of a stream.
    """

    def __init__(self, delay: float = 0.0) -> None:
        self._delay = delay

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """A completion, a stream of it, the list of models, or an error in OpenAI's form."""
        body = await request.aread()
        path = request.url.path.rstrip("/")
        if request.method == "GET" and path.endswith("/models"):
            return httpx2.Response(200, json=_models())
        if request.method != "POST" or not path.endswith("/chat/completions"):
            return _refusal(404, f"The demo model has no {request.method} {request.url.path}.")
        try:
            asked = CompletionRequest.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or None
            return _refusal(400, f"{where or 'body'}: {first['msg']}", where)
        if asked.tool_choice == "required" or asked.wanted is not None:
            offered = [each.name for each in asked.functions]
            if not offered or asked.wanted not in {None, *offered}:
                return _refusal(400, f"No such tool; tools holds {offered}.", "tool_choice")
        completion = _completion(asked)
        if not asked.stream:
            return httpx2.Response(200, json=completion.whole())
        usage = bool(asked.stream_options and asked.stream_options.include_usage)
        return httpx2.Response(
            200,
            headers={"content-type": "text/event-stream; charset=utf-8"},
            stream=_Events(completion.chunks(usage), self._delay),
        )


class _Events(httpx2.AsyncByteStream):
    def __init__(self, chunks: Iterator[Object], delay: float) -> None:
        self._chunks = chunks
        self._delay = delay

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self._chunks:
            yield b"data: " + to_json(chunk) + b"\n\n"
            await asyncio.sleep(self._delay)
        yield b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class _Completion:
    id: str
    text: str
    calls: list[Object]
    reason: str
    usage: Object

    def _form(self, kind: str, choices: list[JsonValue]) -> Object:
        return {
            "id": f"chatcmpl-{self.id}",
            "object": kind,
            "created": 0,
            "model": MODEL,
            "system_fingerprint": "demo",
            "choices": choices,
        }

    def whole(self) -> Object:
        message: Object = {"role": "assistant", "content": self.text or None, "refusal": None}
        if self.calls:
            message["tool_calls"] = [*self.calls]
        choice: Object = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": self.reason,
        }
        return {**self._form("chat.completion", [choice]), "usage": self.usage}

    def chunks(self, usage: bool) -> Iterator[Object]:
        """The role, the answer in small pieces, the finish and, if asked for, the usage."""
        for delta, reason in self._deltas():
            choice: Object = {
                "index": 0,
                "delta": delta,
                "logprobs": None,
                "finish_reason": reason,
            }
            chunk = self._form("chat.completion.chunk", [choice])
            yield {**chunk, "usage": None} if usage else chunk
        if usage:
            yield {**self._form("chat.completion.chunk", []), "usage": self.usage}

    def _deltas(self) -> Iterator[tuple[Object, str | None]]:
        yield {"role": "assistant", "content": None if self.calls else ""}, None
        for piece in _pieces(self.text):
            yield {"content": piece}, None
        for index, call in enumerate(self.calls):
            function = call["function"]
            assert isinstance(function, dict)
            opened: Object = {**call, "index": index, "function": {**function, "arguments": ""}}
            yield {"tool_calls": [opened]}, None
            for piece in _pieces(str(function["arguments"])):
                yield {"tool_calls": [{"index": index, "function": {"arguments": piece}}]}, None
        yield {}, self.reason


def _completion(asked: CompletionRequest) -> _Completion:
    given = answer(asked)
    seed = asked.model_dump_json(exclude={"stream", "stream_options"})
    name = hashlib.sha256(seed.encode()).hexdigest()[:24]
    text, reason = given.text, "tool_calls" if given.calls else "stop"
    calls = [
        (call.name, to_json(call.arguments, inf_nan_mode="null").decode()) for call in given.calls
    ]
    most = 4 * asked.limit - 1 if asked.limit else None
    if most is not None and len(text) + sum(len(arguments) for _, arguments in calls) > most:
        text, reason = text[:most], "length"
        for index, (tool, arguments) in enumerate(calls):
            calls[index] = tool, arguments[:most]
            most -= len(calls[index][1])
    wire: list[Object] = [
        {
            "id": f"call_{name}{index}",
            "type": "function",
            "function": {"name": tool, "arguments": arguments},
        }
        for index, (tool, arguments) in enumerate(calls)
    ]
    read = _tokens(seed)
    written = _tokens(text + "".join(arguments for _, arguments in calls))
    usage: Object = {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
    }
    return _Completion(name, text, wire, reason, usage)


def _tokens(text: str) -> int:
    return len(text) // 4 + 1


def _pieces(text: str) -> list[str]:
    """`text` in pieces of up to three words, no word longer than 40 characters."""
    return re.findall(r"(?:\S{1,40}\s*){1,3}", text)


def _models() -> Object:
    model: Object = {"id": MODEL, "object": "model", "created": 0, "owned_by": "built-in demo"}
    return {"object": "list", "data": [model]}


def _refusal(status: int, message: str, param: str | None = None) -> httpx2.Response:
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": None}
    return httpx2.Response(status, json={"error": error})

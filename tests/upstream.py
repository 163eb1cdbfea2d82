"""A model provider that follows a script: OpenAI's chat completions over real HTTP."""

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Self, TypeAlias

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.serving import Delivery, Outcome, Serving

Json: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """One tool call; arguments given as a string go out as they are, valid JSON or not."""

    name: str
    arguments: Json | str = field(default_factory=dict[str, Any])
    id: str | None = None


@dataclass(frozen=True)
class Reply:
    """What the model says in one response, and how well the connection carries it.

    A chunk is one SSE event, the role and `[DONE]` included; a response that is not
    streamed counts as two, the halves of its JSON.
    """

    text: str = ""
    calls: tuple[Call, ...] = ()
    reasoning: str = ""
    """Sent as `reasoning_content`, as DeepSeek and vLLM do."""
    refusal: str = ""
    finish: str | None = None
    """Finish reason; by default "tool_calls" with calls, else "stop"."""
    status: int = 200
    error: Json | None = None
    """The object under "error". With status 200 it ends the stream in place of the finish."""
    headers: dict[str, str] = field(default_factory=dict[str, str])
    delay: float = 0
    """Seconds before the first byte."""
    pace: float = 0
    """Seconds between chunks."""
    chunks: int | None = None
    """Number of text deltas; by default one per word with the space after it."""
    drop_after: int | None = None
    """Abort the connection after so many chunks, before the last at the latest."""
    hang: bool = False
    """Send the first `hang_after` chunks, then nothing until the client goes away."""
    hang_after: int = 1
    """With 0, not even the status line."""
    raw: tuple[bytes, ...] = ()
    """Sent as they are, in place of what the model says; one is a chunk."""
    endless: bool = False
    """Send the last chunk again and again."""
    usage: tuple[int, int] = (10, 5)
    """Prompt and completion tokens."""


Answer: TypeAlias = Reply | Callable[[Json], Reply]


@dataclass
class Seen:
    """One request for a completion."""

    body: Json
    headers: dict[str, str]
    """By lower-case name."""
    at: float
    """`time.monotonic()` on arrival."""
    finished: bool = False
    """The whole response was sent."""
    aborted: bool = False
    """The client went away before the end."""


class Upstream(Serving):
    """`with Upstream() as upstream:` serves OpenAI's API at `upstream.url`.

    Which reply a request gets depends on its messages alone, so a client that crashed and
    asks again is answered the same.
    """

    def __init__(self) -> None:
        super().__init__(
            Starlette(
                routes=[
                    Route("/v1/chat/completions", self._complete, methods=["POST"]),
                    Route("/v1/models", self._models),
                ]
            )
        )
        self.requests: list[Seen] = []
        self._rules: list[tuple[str, tuple[Answer, ...]]] = []

    @property
    def url(self) -> str:
        return f"{super().url}/v1"

    def when(self, text: str, first: Answer, *then: Answer) -> None:
        """Answer turns whose last user message contains `text`; the newest match wins.

        The replies are the model's steps in that turn: `first` to the user, then one per
        assistant message since; the last one repeats. Callables get the request body.
        """
        self._rules.append((text, (first, *then)))

    def wait_for(self, n: int, timeout: float = 10) -> None:
        """Return once `n` requests were seen; AssertionError after `timeout` seconds."""
        self.wait_until(lambda: len(self.requests) >= n, timeout)

    async def wait_for_async(self, n: int, timeout: float = 10) -> None:
        """`wait_for` that leaves the event loop free."""
        await self.wait_until_async(lambda: len(self.requests) >= n, timeout)

    async def _complete(self, request: Request) -> Response:
        body: Json = await request.json()
        seen = Seen(body, dict(request.headers), time.monotonic())
        self.requests.append(seen)
        self._notice()
        turn = _Turn.of(body["messages"])
        reply = self._reply(turn, body)

        def ended(outcome: Outcome) -> None:
            seen.finished = outcome == "sent"
            seen.aborted = outcome == "left"
            self._notice()

        streams = reply.status == 200 and body.get("stream") is True
        said = _events(body, turn, reply) if streams else _halves(_document(body, turn, reply))
        return Delivery(
            reply.raw or said,
            status=reply.status,
            media_type="text/event-stream" if streams else "application/json",
            headers={"x-request-id": f"req_{turn.key}_{turn.step}"} | reply.headers,
            delay=reply.delay,
            pace=reply.pace,
            hang_after=reply.hang_after if reply.hang else None,
            endless=reply.endless,
            drop_after=reply.drop_after,
            ended=ended,
        )

    def _reply(self, turn: "_Turn", body: Json) -> Reply:
        for text, answers in reversed(self._rules):
            if text in turn.text:
                answer = answers[min(turn.step, len(answers) - 1)]
                return answer if isinstance(answer, Reply) else answer(body)
        return Reply("ok")

    async def _models(self, _: Request) -> Response:
        model = {"id": "scripted", "object": "model", "created": 0, "owned_by": "tests"}
        return JSONResponse({"object": "list", "data": [model]})


@dataclass(frozen=True)
class _Turn:
    """Where a conversation stands: its last user message and the model's steps since."""

    text: str
    step: int
    key: str
    """Differs between turns that say the same, so that call ids do too."""

    @classmethod
    def of(cls, messages: list[Json]) -> Self:
        users = [place for place, message in enumerate(messages) if message["role"] == "user"]
        last = users[-1] if users else -1
        text = _text(messages[last]) if users else ""
        step = sum(message["role"] == "assistant" for message in messages[last + 1 :])
        return cls(text, step, sha256(f"{len(users)}:{text}".encode()).hexdigest()[:8])

    def calls(self, reply: Reply) -> list[Json]:
        return [
            {
                "id": call.id or f"call_{self.key}_{self.step}_{index}",
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": call.arguments
                    if isinstance(call.arguments, str)
                    else json.dumps(call.arguments),
                },
            }
            for index, call in enumerate(reply.calls)
        ]


def _text(message: Json) -> str:
    content: str | list[Json] = message["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


def _document(body: Json, turn: _Turn, reply: Reply) -> Json:
    if reply.status != 200 or reply.error:
        return {"error": reply.error or _error(reply.status)}
    message: Json = {
        "role": "assistant",
        "content": reply.text or (None if reply.calls or reply.refusal else ""),
        "refusal": reply.refusal or None,
    }
    if reply.reasoning:
        message["reasoning_content"] = reply.reasoning
    if reply.calls:
        message["tool_calls"] = turn.calls(reply)
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish(reply)}
    head = _head(body, turn, "chat.completion")
    return head | {"choices": [choice], "usage": _usage(reply)}


def _events(body: Json, turn: _Turn, reply: Reply) -> list[bytes]:
    head = _head(body, turn, "chat.completion.chunk")
    options: Json = body.get("stream_options") or {}
    counted = options.get("include_usage") is True
    if counted:
        head["usage"] = None

    def chunk(delta: Json, finish: str | None = None) -> Json:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return head | {"choices": [choice]}

    events = [chunk(delta) for delta in _deltas(turn, reply)]
    if reply.error:
        events.append({"error": reply.error})
    else:
        events.append(chunk({}, _finish(reply)))
        if counted:
            events.append(head | {"choices": [], "usage": _usage(reply)})
    return [b"data: " + _dump(event) + b"\n\n" for event in events] + [b"data: [DONE]\n\n"]


def _deltas(turn: _Turn, reply: Reply) -> Iterator[Json]:
    speaks = reply.text or not reply.calls
    yield {"role": "assistant", "content": "" if speaks else None, "refusal": None}
    for piece in _words(reply.reasoning):
        yield {"reasoning_content": piece}
    for piece in _cut(reply.text, reply.chunks) if reply.chunks else _words(reply.text):
        yield {"content": piece}
    for piece in _words(reply.refusal):
        yield {"refusal": piece}
    for index, call in enumerate(turn.calls(reply)):
        arguments: str = call["function"]["arguments"]
        opening = {"name": call["function"]["name"], "arguments": ""}
        yield {"tool_calls": [call | {"index": index, "function": opening}]}
        for piece in _cut(arguments, max(2, len(arguments) // 16)):
            yield {"tool_calls": [{"index": index, "function": {"arguments": piece}}]}


def _head(body: Json, turn: _Turn, kind: str) -> Json:
    return {
        "id": f"chatcmpl-{turn.key}-{turn.step}",
        "object": kind,
        "created": int(time.time()),
        "model": body["model"],
        "system_fingerprint": None,
    }


def _finish(reply: Reply) -> str:
    return reply.finish or ("tool_calls" if reply.calls else "stop")


def _usage(reply: Reply) -> Json:
    prompt, completion = reply.usage
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _error(status: int) -> Json:
    return {
        "message": f"Scripted status {status}.",
        "type": "server_error" if status >= 500 else "invalid_request_error",
        "param": None,
        "code": None,
    }


def _words(text: str) -> list[str]:
    """`text` cut after the space behind each word."""
    return re.findall(r"\s*\S+\s*|\s+", text)


def _cut(text: str, n: int) -> list[str]:
    """`text` in `n` pieces of about one length, or one per character if that is fewer."""
    n = min(n, len(text))
    return [text[len(text) * i // n : len(text) * (i + 1) // n] for i in range(n)]


def _halves(document: Json) -> list[bytes]:
    data = _dump(document)
    return [data[: len(data) // 2], data[len(data) // 2 :]]


def _dump(document: Json) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()

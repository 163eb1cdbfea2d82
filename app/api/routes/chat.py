"""OpenAI Chat Completions: an agent is a model."""

import json
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request
from fastapi.responses import JSONResponse, Response
from pydantic_ai.messages import (
    PartDeltaEvent,
    PartEndEvent,
    PartStartEvent,
    TextPart,
    TextPartDelta,
    ToolCallPart,
    ToolCallPartDelta,
    UserContent,
)
from pydantic_core import to_json

from agents import all_agents
from app.api.deps import CallerDep, RunsDep, SettingsDep
from app.api.options import (
    OBJECT,
    output_of,
    prompt_of,
    settings_of,
    tool_choice_of,
    tools_of,
)
from app.api.sse import EventStream, unless_gone
from app.core.errors import AppError, Conflict, error_body
from app.models import Run
from app.schemas.chat import (
    AssistantMessage,
    ChatMessage,
    ChatRequest,
    Id,
    Instructions,
    JsonFormat,
    JsonSchemaFormat,
    TextContent,
    TextFormat,
    ToolMessage,
    UserMessage,
)
from app.schemas.run import Options
from app.services.agent import BETWEEN, answers_in_text
from app.services.conversation import Turn, text_of, text_of_output
from app.services.journal import Entry, RunEnded
from app.services.runs import Idempotency, NewRun, run_failed, unknown_agent

router = APIRouter(prefix="/v1", tags=["chat"])


@router.get("/models")
async def list_models(caller: CallerDep, settings: SettingsDep) -> dict[str, Any]:
    """The agents that may be named as `model`."""
    return {"object": "list", "data": [_model(name, settings.demo) for name in all_agents()]}


@router.get("/models/{name}")
async def get_model(name: str, caller: CallerDep, settings: SettingsDep) -> dict[str, Any]:
    if name not in all_agents():
        raise unknown_agent(name)
    return _model(name, settings.demo)


def _model(name: str, demo: bool) -> dict[str, Any]:
    description = all_agents()[name].description
    if demo:
        description += " (Answered by the built-in demo model, as no MODEL is set.)"
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "agent-backend (demo model)" if demo else "agent-backend",
        "description": description,
    }


@router.post("/chat/completions")
async def complete(
    request: Request,
    body: ChatRequest,
    caller: CallerDep,
    runs: RunsDep,
    idempotency_key: Annotated[str | None, Header(max_length=255)] = None,
    x_chat_id: Annotated[Id | None, Header()] = None,
    x_openwebui_chat_id: Annotated[Id | None, Header()] = None,
) -> Response:
    """Asks an agent. Closing the connection is the only stop that this protocol has."""
    new = read(body)
    new.chat = x_chat_id or x_openwebui_chat_id
    if idempotency_key:
        new.idempotency = Idempotency.of("chat", idempotency_key, await request.body())
    run = await runs.accept(caller, new)

    async def leave() -> None:
        await runs.cancel(caller, run.id)

    chat = ChatEncoder(run, body)
    if body.stream:
        return EventStream(chat.frames(runs.follow(run)), leave=leave)
    entries = await unless_gone(request, runs.wait(run))
    if entries is None:
        await leave()
        return Response(status_code=499)  # nobody reads it
    return JSONResponse(chat.whole(entries))


def read(body: ChatRequest) -> NewRun:
    """The run that a request asks for. Raises Invalid with the parameter at fault."""
    before, results = list(body.messages), dict[str, str]()
    while before and isinstance(last := before[-1], ToolMessage):
        results[last.tool_call_id] = _text(last.content)
        before.pop()
    prompt: str | list[UserContent] = ""
    if not results and isinstance(last := before.pop(), UserMessage):
        prompt = prompt_of(last.content, "messages")
    instructions = [_text(item.content) for item in before if isinstance(item, Instructions)]
    tools = tools_of([tool.function for tool in body.tools])
    return NewRun(
        program=body.model,
        prompt=prompt,
        results=dict(reversed(results.items())),
        earlier=_turns(before),
        options=Options(
            stream=body.stream,
            settings=settings_of(body),
            instructions="\n\n".join(instructions) or None,
            tools=tools,
            tool_choice=tool_choice_of(body.tool_choice, tools),
            **_output(body.response_format),
        ),
    )


def _text(content: str | Sequence[TextContent] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content)


def _turns(messages: Sequence[ChatMessage]) -> list[Turn]:
    """The visible turns; the results of the caller's own functions that stand together are one."""
    turns: list[Turn] = []
    after: ChatMessage | None = None
    for message in messages:
        match message:
            case UserMessage():
                turns.append(("user", text_of(prompt_of(message.content, "messages"))))
            case AssistantMessage():
                turns.append(("assistant", _text(message.content)))
            case ToolMessage() if isinstance(after, ToolMessage):
                turns[-1] = ("tool", f"{turns[-1][1]}\n{_text(message.content)}")
            case ToolMessage():
                turns.append(("tool", _text(message.content)))
            case _:
                pass
        after = message
    return turns


def _output(form: TextFormat | JsonFormat | JsonSchemaFormat | None) -> dict[str, Any]:
    match form:
        case JsonSchemaFormat(json_schema=asked):
            return output_of(asked.json_schema, asked.name, "response_format")
        case JsonFormat():
            return {"output": OBJECT}
        case _:
            return {}


class ChatEncoder:
    """A run's log as a chat completion, whole or in chunks."""

    def __init__(self, run: Run, body: ChatRequest) -> None:
        self._usage = body.stream_options is not None and body.stream_options.include_usage
        self._own = {tool.function.name for tool in body.tools}
        self._texts = answers_in_text(run)
        self._head: dict[str, Any] = {
            "id": f"chatcmpl-{run.id}",
            "created": int(run.created_at.timestamp()),
            "model": run.program,
        }
        self._said = False
        self._apart = False  # what is said next is another text, after calls
        self._parts: dict[int, int] = {}  # part of the reply -> number of the caller's call
        self._calls: list[dict[str, Any]] = []
        head = json.dumps({**self._head, "object": "chat.completion.chunk"})[:-1]
        usage = ',"usage":null' if self._usage else ""
        self._open = f'data: {head}{usage},"choices":[{{"index":0,"delta":'.encode()

    async def frames(self, entries: AsyncIterator[Entry]) -> AsyncIterator[bytes]:
        begun = False
        async for entry in entries:
            event = entry.event
            frames: list[bytes] = []
            match event:
                case PartStartEvent(part=TextPart(content=text)) if self._texts:
                    self._apart = self._said
                    frames += self._say(text)
                case PartDeltaEvent(delta=TextPartDelta(content_delta=text)) if self._texts:
                    frames += self._say(text)
                case PartStartEvent(part=ToolCallPart() as part) if part.tool_name in self._own:
                    frames += self._call(event.index, part)
                case PartDeltaEvent(delta=ToolCallPartDelta(args_delta=str(more))):
                    if (number := self._parts.get(event.index)) is not None:
                        frames.append(self._arguments(number, more))
                case PartStartEvent():
                    self._parts.pop(event.index, None)
                case RunEnded():
                    frames += self._end(event)
                case _:
                    pass
            if frames:
                if not begun:
                    begun = True
                    frames.insert(0, self._delta(role="assistant", content=""))
                yield f"id: {entry.seq}\n".encode() + b"".join(frames)

    def _delta(self, **delta: Any) -> bytes:
        return self._open + json.dumps(delta).encode() + b',"finish_reason":null}]}\n\n'

    def _say(self, text: str) -> list[bytes]:
        if not text:
            return []
        between = BETWEEN if self._apart else ""
        self._said, self._apart = True, False
        return [self._delta(content=between + text)]

    def _call(self, index: int, part: ToolCallPart) -> list[bytes]:
        number = self._parts[index] = len(self._calls)
        call = {
            "id": part.tool_call_id,
            "type": "function",
            "function": {"name": part.tool_name, "arguments": ""},
        }
        self._calls.append(call)
        frames = [self._delta(tool_calls=[{"index": number, **call}])]
        if part.args:
            frames.append(self._arguments(number, part.args_as_json_str()))
        return frames

    def _arguments(self, number: int, more: str) -> bytes:
        return self._delta(tool_calls=[{"index": number, "function": {"arguments": more}}])

    def _end(self, event: RunEnded) -> list[bytes]:
        try:
            reason = finish_reason(event)
        except AppError as error:
            if not self._said and not self._calls:
                raise
            return [b"data: " + to_json({"error": error_body(error)}) + b"\n\n"]
        frames: list[bytes] = []
        if not self._texts and reason == "stop":
            frames.append(self._delta(content=text_of_output(event.output)))
        closing = json.dumps(reason).encode()
        frames.append(self._open + b'{},"finish_reason":' + closing + b"}]}\n\n")
        if self._usage:
            chunk: dict[str, Any] = {**self._head, "object": "chat.completion.chunk", "choices": []}
            frames.append(b"data: " + to_json({**chunk, "usage": usage_of(event)}) + b"\n\n")
        frames.append(b"data: [DONE]\n\n")
        return frames

    def whole(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """The completion of a run that has ended. Raises what it failed with."""
        event = entries[-1].event
        assert isinstance(event, RunEnded)
        reason = finish_reason(event)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": text_of_output(event.output) or None,
            "refusal": None,
        }
        if reason == "tool_calls":
            message["tool_calls"] = [
                {
                    "id": part.tool_call_id,
                    "type": "function",
                    "function": {"name": part.tool_name, "arguments": part.args_as_json_str()},
                }
                for entry in entries
                if isinstance(entry.event, PartEndEvent)
                and isinstance(part := entry.event.part, ToolCallPart)
                and part.tool_name in self._own
            ]
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage_of(event),
        }


def finish_reason(event: RunEnded) -> str:
    """OpenAI's word for how the run ended. Raises the error where it did not end well."""
    if event.status == "failed":
        raise run_failed(event.error or {})
    if event.status == "cancelled":
        raise Conflict("The run was stopped.", code="run_cancelled")
    if event.status == "incomplete":
        return "content_filter" if event.finish_reason == "content_filter" else "length"
    return "tool_calls" if event.finish_reason == "tool_call" else "stop"


def usage_of(event: RunEnded) -> dict[str, Any]:
    sent, received = event.usage.get("input_tokens", 0), event.usage.get("output_tokens", 0)
    return {
        "prompt_tokens": sent,
        "completion_tokens": received,
        "total_tokens": sent + received,
        "prompt_tokens_details": {"cached_tokens": event.usage.get("cached_tokens", 0)},
    }

"""OpenAI Chat Completions: an agent is a model."""

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, TypeAlias

from fastapi import APIRouter, Header, Request
from fastapi.responses import JSONResponse, Response
from pydantic_ai.messages import (
    AgentStreamEvent,
    FunctionToolCallEvent,
    FunctionToolResultEvent,
    PartDeltaEvent,
    PartEndEvent,
    PartStartEvent,
    RetryPromptPart,
    TextPart,
    TextPartDelta,
    ThinkingPart,
    ThinkingPartDelta,
    ToolCallPart,
    ToolCallPartDelta,
    ToolReturnPart,
    UserContent,
)
from pydantic_core import to_json

from agents import all_agents
from app.api.deps import CallerDep, MultitaskDep, RunsDep, SettingsDep, idempotent
from app.api.options import (
    OBJECT,
    only,
    output_of,
    prompt_of,
    settings_of,
    tool_choice_of,
    tools_of,
)
from app.api.sse import EventStream, failed_frame, unless_gone
from app.api.ui import told
from app.core.errors import AppError, BadGateway, Conflict, Invalid
from app.models import Run
from app.schemas.chat import (
    AllowedTools,
    AssistantMessage,
    ChatMessage,
    ChatRequest,
    Id,
    Instructions,
    JsonFormat,
    JsonSchemaFormat,
    RefusalContent,
    TextContent,
    TextFormat,
    ToolMessage,
    UserMessage,
)
from app.schemas.run import Options
from app.services.agent import BETWEEN, answers_in_text
from app.services.conversation import Turn, arguments_of, text_of, text_of_output
from app.services.decisions import Decision
from app.services.new_run import Idempotency, NewRun
from app.services.refusals import NotDecided, run_failed, unknown_agent
from app.services.run_log import Entry, RunEnded, RunPaused, RunRestarted, settled
from app.services.runs import Runs

router = APIRouter(prefix="/v1", tags=["chat"])

Delta: TypeAlias = dict[str, Any]

KEY = 40  # hex digits of an approval's key
DECISION = re.compile(r"/(?P<verb>approve|deny)\s+(?P<key>[0-9a-fA-F]{8,40})(\s+(?P<reason>.+))?")


AWAY = "model_unavailable"
VOID = "The model's reply broke off, and what was said of it is void; try again."

ANY_DECISION = re.compile(r"\s*/(approve|deny)\b", re.IGNORECASE)


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
    multitask: MultitaskDep,
    idempotency: Annotated[
        Idempotency | None, idempotent("chat", "X-Chat-Id", "X-OpenWebUI-Chat-Id")
    ],
    x_chat_id: Annotated[Id | None, Header()] = None,
    x_openwebui_chat_id: Annotated[Id | None, Header()] = None,
    x_openwebui_message_id: Annotated[Id | None, Header()] = None,
    x_openwebui_user_message_parent_id: Annotated[Id | None, Header()] = None,
    x_openwebui_task: Annotated[str | None, Header()] = None,
    last_event_id: Annotated[int, Header(ge=0)] = 0,
) -> Response:
    """Asks an agent. Closing the connection is the only stop that this protocol has.

    Where a tool needs approval, the answer says so and ends; the next user message
    `/approve <key>` or `/deny <key> [reason]` is the decision, and its answer what follows.

    `X-Chat-Id` names the conversation. Open WebUI's headers also say where in it a message
    stands, and `X-OpenWebUI-Task` that a title or the like is wanted: that is no part of it.
    """
    new = read(body)
    new.multitask = multitask
    is_untold = bool(x_openwebui_chat_id) and x_openwebui_task is None
    if x_openwebui_task or (is_untold and _is_task(text_of(new.prompt))):
        new.options.tool_choice, new.options.tools = "none", []
    else:
        new.chat = x_chat_id or x_openwebui_chat_id or None
        if x_openwebui_message_id and not new.results:
            new.message_id = x_openwebui_message_id
            new.after = _after(x_openwebui_user_message_parent_id, new.earlier)
            new.exact = new.after is not None
    new.idempotency = idempotency
    after = 0
    if known := await runs.repeated(caller, idempotency):
        run = known
        if last_event_id:
            await runs.check_kept(run)
    elif decisions := decisions_of(text_of(new.prompt)):
        run = await runs.decide(caller, decisions)
        paused = await _pause(runs, run, {decision.key for decision in decisions})
        after = paused.seq - 1  # it is said again where another call still waits
    else:
        try:
            run = await runs.accept(caller, new)
        except NotDecided as error:
            if ANY_DECISION.match(text_of(new.prompt)):
                raise Invalid(
                    "This is no decision. Write `/approve <key>` or `/deny <key> <reason>`, one "
                    f"line for each call and nothing else; a key has {KEY} hex digits. Waiting: "
                    f"{', '.join(error.details['keys'])}.",
                    param="messages",
                ) from error
            keys = set(error.details["keys"])
            chat, asked = ChatEncoder(error.run, body), [await _pause(runs, error.run, keys)]
            if body.stream:
                return EventStream(chat.frames(_each(asked)))
            return JSONResponse(chat.whole(asked))

    async def leave() -> None:
        await runs.cancel(caller, run.id)

    chat = ChatEncoder(run, body)
    # With a key the same request gets the answer, and so does the same decision.
    alone = idempotency is None and not after
    if body.stream:
        entries = told(runs, run, after, pause=True, restarts=True, alone=alone)
        void = leave if alone else None
        return EventStream(chat.frames(entries, last_event_id, void), leave=leave)
    log = await unless_gone(request, runs.wait(run, pause=True, alone=alone))
    if log is None:
        await leave()
        return Response(status_code=499)  # nobody reads it
    return JSONResponse(chat.whole([entry for entry in settled(log) if entry.seq > after]))


def _is_task(text: str) -> bool:
    """Whether Open WebUI wants a title or the like of a chat. Its templates for those quote the
    chat; the one that puts documents before a user's question begins alike, but does not."""
    return text.startswith("### Task:") and "<chat_history>" in text


def _after(parent: str | None, earlier: Sequence[Turn]) -> tuple[str, ...] | None:
    """What a message stands below: Open WebUI sends an empty parent for the first of a chat."""
    if parent:
        return (parent,)
    return () if parent == "" or not earlier else None


async def _pause(runs: Runs, run: Run, keys: set[str]) -> Entry:
    """Where the run asked last about one of these."""
    return next(
        entry
        for entry in reversed(await runs.entries(run))
        if isinstance(entry.event, RunPaused) and keys & set(entry.event.keys)
    )


async def _each(entries: Sequence[Entry]) -> AsyncIterator[Entry]:
    for entry in entries:
        yield entry


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
    choice = body.tool_choice
    if isinstance(choice, AllowedTools):
        tools = only(choice.names, tools)
        is_forced = choice.allowed_tools.mode == "required"
        tool_choice = [tool.name for tool in tools] if is_forced else None
    else:
        tool_choice = tool_choice_of(choice, tools)
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
            tool_choice=tool_choice,
            echo={"metadata": body.metadata} if body.metadata else {},
            **_output(body.response_format),
        ),
    )


def decisions_of(text: str) -> list[Decision]:
    """The decisions that a message is, one a line; none where it is anything else.

    Raises Invalid for a key that is not whole.
    """
    decisions: list[Decision] = []
    for line in text.strip().splitlines():
        found = DECISION.fullmatch(line.strip())
        is_approval = found is not None and found["verb"] == "approve"
        if found is None or (is_approval and found["reason"]):
            return []
        if len(found["key"]) != KEY:
            raise Invalid(
                f"{found['key']!r} is not a whole key: give all of its {KEY} digits.",
                param="messages",
            )
        decisions.append(Decision(found["key"].lower(), is_approval, found["reason"]))
    return decisions


def _text(content: str | Sequence[TextContent | RefusalContent] | None) -> str:
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
    """A run's log, from any entry on, as a chat completion: whole or in chunks.

    What the agent thinks and what its own tools do goes into `reasoning_content`, as DeepSeek and
    vLLM call it; clients that do not know the field pass over it.
    """

    def __init__(self, run: Run, body: ChatRequest) -> None:
        self._usage = body.stream_options is not None and body.stream_options.include_usage
        self._own = {tool.name for tool in Options.model_validate_json(run.options).tools}
        self._texts = answers_in_text(run)
        self._head: dict[str, Any] = {
            "id": f"chatcmpl-{run.id}",
            "created": int(run.created_at.timestamp()),
            "model": run.program,
        }
        self._said = False
        self._loose = False  # of the reply that may still be taken back, something was said
        self._apart = False  # what is said next is another text, after calls
        self._open_line = False  # of the reasoning
        self._parts: dict[int, int] = {}  # part of the reply -> number of the caller's call
        self._calls = 0
        head = json.dumps({**self._head, "object": "chat.completion.chunk"})[:-1]
        usage = ',"usage":null' if self._usage else ""
        self._open = f'data: {head}{usage},"choices":[{{"index":0,"delta":'.encode()

    async def frames(
        self,
        entries: AsyncIterator[Entry],
        after: int = 0,
        leave: Callable[[], Awaitable[None]] | None = None,
    ) -> AsyncIterator[bytes]:
        """Chunks as server-sent events; those of entries up to `after` were read before.

        What was said cannot be taken back here. Where it is void, an error says so, and the run
        is left, if there is a way to.
        """
        begun = False
        last: Entry | None = None
        async for entry in entries:
            last = entry
            if isinstance(entry.event, RunRestarted) and self._loose:
                if leave:
                    await leave()
                yield f"id: {entry.seq}\n".encode() + failed_frame(BadGateway(VOID, code=AWAY))
                return
            frames = [self._chunk(delta) for delta in self._deltas(entry.event)]
            if isinstance(entry.event, RunEnded):
                frames += self._end(entry.event, begun)
            if frames:
                if not begun:
                    begun = True
                    frames.insert(0, self._chunk({"role": "assistant", "content": ""}))
                if entry.seq > after:
                    yield f"id: {entry.seq}\n".encode() + b"".join(frames)
        if last and isinstance(last.event, RunPaused):
            frames = [] if begun else [self._chunk({"role": "assistant", "content": ""})]
            frames += [self._chunk(delta) for delta in self._ask(last.event)]
            yield f"id: {last.seq}\n".encode() + b"".join([*frames, *self._finish("stop")])

    def whole(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """The completion of a run that ended or waits. Raises what it failed with."""
        last = entries[-1].event
        reason = finish_reason(last) if isinstance(last, RunEnded) else "stop"
        deltas = [delta for entry in entries for delta in self._deltas(entry.event)]
        if isinstance(last, RunPaused):
            deltas += self._ask(last)
        content = "".join(delta.get("content", "") for delta in deltas)
        if isinstance(last, RunEnded) and entries[0].seq == 1:
            content = text_of_output(last.output)  # also what was said when the run was cut off
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content or None,
            "refusal": None,
        }
        if reasoning := "".join(delta.get("reasoning_content", "") for delta in deltas):
            message["reasoning_content"] = reasoning
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
            "usage": usage_of(last),
        }

    def _deltas(self, event: AgentStreamEvent) -> list[Delta]:
        match event:
            case PartStartEvent(part=TextPart(content=text)) if self._texts:
                self._apart = self._said
                return self._say(text)
            case PartDeltaEvent(delta=TextPartDelta(content_delta=text)) if self._texts:
                return self._say(text)
            case PartStartEvent(part=ThinkingPart(content=text)):
                return self._think(text, apart=True)
            case PartDeltaEvent(delta=ThinkingPartDelta(content_delta=str(text))):
                return self._think(text)
            case PartStartEvent(part=ToolCallPart() as part) if part.tool_name in self._own:
                return self._call(event.index, part)
            case PartDeltaEvent(delta=ToolCallPartDelta(args_delta=str(more))):
                number = self._parts.get(event.index)
                return [] if number is None else [_arguments(number, more)]
            case PartStartEvent():
                self._parts.pop(event.index, None)
            case FunctionToolCallEvent(part=part) if part.tool_name not in self._own:
                self._loose = False  # a reply whose calls are made stays
                called = f"{part.tool_name}({short(part.args_as_json_str(), 200)})"
                return self._think(f"{called}\n", apart=True)
            case FunctionToolResultEvent(part=part) if part.tool_name not in self._own:
                return self._think(f"{part.tool_name}: {outcome_of(part)}\n", apart=True)
            case RunEnded(status="completed", finish_reason="stop") if not self._texts:
                return [{"content": text_of_output(event.output)}]
            case _:
                pass
        return []

    def _chunk(self, delta: Delta) -> bytes:
        return self._open + json.dumps(delta).encode() + b',"finish_reason":null}]}\n\n'

    def _say(self, text: str) -> list[Delta]:
        if not text:
            return []
        between = BETWEEN if self._apart else ""
        self._said, self._apart, self._loose = True, False, True
        return [{"content": between + text}]

    def _ask(self, event: RunPaused) -> list[Delta]:
        self._apart = self._said
        return self._say(question(event))

    def _think(self, text: str, *, apart: bool = False) -> list[Delta]:
        between = "\n" if apart and self._open_line else ""
        if not between + text:
            return []
        self._open_line = not (between + text).endswith("\n")
        return [{"reasoning_content": between + text}]

    def _call(self, index: int, part: ToolCallPart) -> list[Delta]:
        number = self._parts[index] = self._calls
        self._calls += 1
        self._loose = True
        call = {
            "index": number,
            "id": part.tool_call_id,
            "type": "function",
            "function": {"name": part.tool_name, "arguments": ""},
        }
        begun: Delta = {"tool_calls": [call]}
        return [begun, _arguments(number, arguments_of(part))] if part.args else [begun]

    def _end(self, event: RunEnded, begun: bool) -> list[bytes]:
        try:
            return self._finish(finish_reason(event), event)
        except AppError as error:
            if not begun:
                raise
            return [failed_frame(error)]

    def _finish(self, reason: str, event: AgentStreamEvent | None = None) -> list[bytes]:
        closing = json.dumps(reason).encode()
        frames = [self._open + b'{},"finish_reason":' + closing + b"}]}\n\n"]
        if self._usage:
            chunk: dict[str, Any] = {**self._head, "object": "chat.completion.chunk", "choices": []}
            frames.append(b"data: " + to_json({**chunk, "usage": usage_of(event)}) + b"\n\n")
        return [*frames, b"data: [DONE]\n\n"]


def _arguments(number: int, more: str) -> Delta:
    return {"tool_calls": [{"index": number, "function": {"arguments": more}}]}


def short(text: str, most: int) -> str:
    """The text on one line of at most so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def outcome_of(part: ToolReturnPart | RetryPromptPart) -> str:
    """What became of a call, in a few words."""
    if isinstance(part, RetryPromptPart):
        return f"asked to call again: {short(part.model_response(), 100)}"
    how = "" if part.outcome == "success" else f"{part.outcome}: "
    return how + short(part.model_response_str(wrap_if_error=False), 100)


def question(event: RunPaused) -> str:
    """What a person is told of the calls that wait for a decision, and how to answer."""
    until = datetime.fromtimestamp(event.until, UTC)
    lines = [
        f"- `{call.tool_name}({call.args_as_json_str()})`: "
        f"`/approve {key}` or `/deny {key} <reason>`"
        for call, key in zip(event.calls, event.keys, strict=True)
    ]
    return (
        "Your approval is needed; until then no other message is taken up here. Answer before "
        f"{until:%Y-%m-%d %H:%M} UTC, with one line for each call.\n\n" + "\n".join(lines)
    )


def finish_reason(event: RunEnded) -> str:
    """OpenAI's word for how the run ended. Raises the error where it did not end well."""
    if event.status == "failed":
        raise run_failed(event.error or {}, acted=bool(event.usage.get("tool_calls")))
    if event.status == "cancelled":
        raise Conflict("The run was stopped.", code="run_cancelled")
    if event.status == "incomplete":
        return "content_filter" if event.finish_reason == "content_filter" else "length"
    return "tool_calls" if event.finish_reason == "tool_call" else "stop"


def usage_of(event: AgentStreamEvent | None) -> dict[str, Any]:
    """The whole run's usage, counted once, at its end: a run that waits has none yet."""
    usage = event.usage if isinstance(event, RunEnded) else {}
    sent, received = usage.get("input_tokens", 0), usage.get("output_tokens", 0)
    return {
        "prompt_tokens": sent,
        "completion_tokens": received,
        "total_tokens": sent + received,
        "prompt_tokens_details": {"cached_tokens": usage.get("cached_tokens", 0)},
    }

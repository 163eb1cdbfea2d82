"""The AI SDK's messages and chunks of a run. Imported when first needed: its types take a while."""

import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal, cast

from pydantic import TypeAdapter, ValidationError
from pydantic_ai import CustomEvent, RunCancelled
from pydantic_ai.messages import (
    AgentStreamEvent,
    BinaryContent,
    FunctionToolCallEvent,
    FunctionToolResultEvent,
    ModelMessage,
    ModelRequest,
    ModelResponse,
    PartEndEvent,
    PartStartEvent,
    RetryPromptPart,
    TextPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)
from pydantic_ai.ui import NativeEvent
from pydantic_ai.ui.vercel_ai import VercelAIAdapter, VercelAIEventStream
from pydantic_ai.ui.vercel_ai.request_types import (
    FileUIPart,
    StepStartUIPart,
    ToolApprovalRequested,
    ToolApprovalRequestedPart,
    ToolApprovalResponded,
    ToolInputAvailablePart,
    ToolOutputDeniedPart,
    ToolOutputErrorPart,
    UIMessage,
    UIMessagePart,
)
from pydantic_ai.ui.vercel_ai.response_types import (
    AbortChunk,
    BaseChunk,
    DataChunk,
    DoneChunk,
    ErrorChunk,
    FileChunk,
    FinishReason,
    FinishStepChunk,
    SourceDocumentChunk,
    SourceUrlChunk,
    StartChunk,
    ToolApprovalRequestChunk,
)
from pydantic_core import from_json, to_jsonable_python
from typing_extensions import override

from agents import all_agents
from app.api.sse import RETRY
from app.api.ui import Shown
from app.core.errors import AppError
from app.models import Run
from app.schemas.run import Options
from app.services.agent import answers_in_text
from app.services.branches import is_open
from app.services.conversation import is_reply, text_of_output
from app.services.json_schema import MAX_DEPTH, measure
from app.services.refusals import Stopping, run_failed
from app.services.run_log import Entry, RunEnded, RunPaused

SDK: Literal[7] = 7

PROVIDERS = {"provider_metadata", "call_provider_metadata"}
"""What a provider wants to see again stays here, with the history."""

ELSEWHERE = "The server is stopping, and the answer goes on: reload the page in a moment."

NOT_MADE = "The run ended first: this call may or may not have been made."

Extra = SourceUrlChunk | SourceDocumentChunk | FileChunk | DataChunk
EXTRA: TypeAdapter[Extra] = TypeAdapter(Extra)

Turns = Sequence[tuple[Run, Sequence[ModelMessage]]]


@dataclass(kw_only=True)
class _Told(CustomEvent, name="vercel.told", ui=False):
    """All that there is to tell of an entry was told."""


class _Mark(BaseChunk):
    """The same, among the chunks."""


class _ResetStep(BaseChunk):
    """What was told of the step is void. (PydanticAI has no class for it.)"""

    type: Literal["reset-step"] = "reset-step"


class _CutShort(Exception):
    """A limit ended the run: what is open is closed, and nothing failed."""


class VercelEncoder(VercelAIEventStream[Any, Any]):
    """A run's log as chunks of the assistant's message: PydanticAI's encoder, with ids that depend
    on the log alone.

    before: the messages of the same turn before the run, and its own that answer them; they are
    told again first.
    after: entries up to this one were told before,
    chunk: and so many chunks of the next.
    begins: whether the message is told from its start, or goes on in the midst of the stream.
    ends: whether the stream ends with this run.
    """

    def __init__(
        self,
        run: Run,
        *,
        before: Turns = (),
        after: int = 0,
        chunk: int = 0,
        begins: bool = True,
        ends: bool = True,
    ) -> None:
        super().__init__(sdk_version=SDK)
        self._run = run
        self._before = before
        self.waits = False  # the log goes on later: a person has to decide, or this process ends
        self._elsewhere = False  # the latter
        self._next = (after + 1, chunk)  # an entry, and how many of its chunks were told before
        self._told = after  # the last entry that was told to its end
        self._begins = begins
        self._ends = ends
        self._seq = 0
        self._parts = 0
        self._of = run.turn_id
        self._shown = Shown(run)

    async def frames(self, entries: AsyncIterator[Entry]) -> AsyncIterator[bytes]:
        """Server-sent events, each with an id by which to go on behind it: the last of an entry's
        has the entry's number, those before it also their own ("12.1", "12.2", "12")."""
        chunks: list[BaseChunk] = []
        async for chunk in self.transform_stream(self._events(entries)):
            if not isinstance(chunk, _Mark):
                chunks.append(chunk)
                continue
            if chunks and (self._seq > self._told or not self._seq):
                yield self._frames(chunks)
            self._told = max(self._seq, self._told)
            chunks = []
        if self._seq <= self._told:  # nothing is new but how it ends
            old = (ToolApprovalRequestChunk, FinishStepChunk)
            chunks = [chunk for chunk in chunks if not isinstance(chunk, old)]
        if chunks:
            yield (RETRY if self._elsewhere else b"") + self._frames(chunks)

    def _frames(self, chunks: Sequence[BaseChunk]) -> bytes:
        """The chunks of an entry, or of none, as far as they were not told before."""
        if self._seq <= self._told:
            names = [str(self._told)] * len(chunks)
        else:
            names = [f"{self._seq}.{number}" for number in range(1, len(chunks))]
            names.append(str(self._seq))
        entry, told = self._next
        frames = [
            f"id: {name}\ndata: {_json(chunk)}\n\n"
            for name, chunk in zip(names, chunks, strict=True)
        ]
        return "".join(frames[told if self._told < self._seq == entry else 0 :]).encode()

    async def _events(self, entries: AsyncIterator[Entry]) -> AsyncIterator[AgentStreamEvent]:
        """What PydanticAI's encoder is to be told. Raises what the run ended with."""
        for run, messages in self._before:
            for event in _again(_shown(run, messages)):
                yield event
        if self._before:
            yield _Told()
        self._parts, self._of = 0, self._run.id
        paused: RunPaused | None = None
        try:
            async for entry in entries:
                self._seq, event, paused = entry.seq, entry.event, None
                match event:
                    case RunPaused():
                        paused = event
                    case RunEnded():
                        for each in self._ended(event):
                            yield each
                    case _ if self._shown(event):
                        yield event
                        yield _Told()
                    case _:
                        pass
        except Stopping:  # no error of the run's: nothing that is open is closed
            self.waits = self._elsewhere = True
            return
        if paused:
            self.waits = self._ends = True
            self._finish_reason = "tool-calls"
            yield paused

    def _ended(self, event: RunEnded) -> Iterator[AgentStreamEvent]:
        if event.status == "failed":
            raise run_failed(event.error or {})
        if event.status == "cancelled":
            raise RunCancelled("The run was stopped.")
        if event.status == "incomplete":
            filtered = event.finish_reason == "content_filter"
            self._finish_reason = "content-filter" if filtered else "length"
            raise _CutShort
        reason: FinishReason = "tool-calls" if event.finish_reason == "tool_call" else "stop"
        self._finish_reason = reason
        yield from self._shown.answer(event)

    @override
    def new_message_id(self) -> str:
        self._parts += 1
        self.message_id = f"{self._of}-{self._parts}"
        return self.message_id

    @override
    async def before_stream(self) -> AsyncIterator[BaseChunk]:
        if self._begins:
            yield StartChunk(message_id=self._run.turn_id)
            yield _Mark()

    @override
    async def after_stream(self) -> AsyncIterator[BaseChunk]:
        if self._elsewhere:
            yield ErrorChunk(error_text=ELSEWHERE)
            return
        async for chunk in super().after_stream():
            if self._ends or not isinstance(chunk, DoneChunk):
                yield chunk

    @override
    async def on_error(self, error: Exception) -> AsyncIterator[BaseChunk]:
        if not isinstance(error, (AppError, _CutShort)):
            raise error
        reason = self._finish_reason
        async for chunk in super().on_error(error):
            if not isinstance(chunk, ErrorChunk) or isinstance(error, AppError):
                yield chunk
        if isinstance(error, _CutShort):
            self._finish_reason = reason

    @override
    async def on_cancelled(self, cancelled: RunCancelled) -> AsyncIterator[BaseChunk]:
        yield AbortChunk(reason=cancelled.message)

    @override
    async def handle_event(self, event: NativeEvent) -> AsyncIterator[BaseChunk]:
        match event:
            case _Told():
                yield _Mark()
            case PartStartEvent(index=0) if self._open_part:
                # Only of a reply that a process died in, a part has no end: this one replaces it.
                self._streamed_call_parts.clear()
                yield _ResetStep()
                async for chunk in super().handle_event(event):
                    yield chunk
            case RunPaused():
                for call, key in zip(event.calls, event.keys, strict=True):
                    yield ToolApprovalRequestChunk(approval_id=key, tool_call_id=call.tool_call_id)
            case _:
                async for chunk in super().handle_event(event):
                    yield chunk

    @override
    async def handle_function_tool_result(
        self, event: FunctionToolResultEvent
    ) -> AsyncIterator[BaseChunk]:
        if isinstance(event.part, ToolReturnPart):
            event = replace(event, part=_with_extras(event.part))
        async for chunk in super().handle_function_tool_result(event):
            yield chunk


def _json(chunk: BaseChunk) -> str:
    if isinstance(chunk, DoneChunk):
        return chunk.encode(SDK)
    return chunk.model_dump_json(by_alias=True, exclude_none=True, exclude=PROVIDERS)


def _own_tools(run: Run) -> set[str]:
    """The tools that the page runs."""
    return {tool.name for tool in Options.model_validate_json(run.options).tools}


def _tools(run: Run) -> set[str]:
    """All tools that the run can call."""
    listed = all_agents().get(run.program)
    return _own_tools(run) | set(listed.tools if listed else ())


def _as_shown(part: ToolReturnPart, own: set[str]) -> ToolReturnPart:
    """The result; one of the page's own, which the model is told as text, as the page knows it."""
    if part.tool_name not in own or not isinstance(part.content, str):
        return _with_extras(part)
    if part.content[:1] not in ("{", "["):
        return part
    try:
        value = from_json(part.content)
        if measure(value)[0] > MAX_DEPTH:
            return part
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # as the page will get it
    except ValueError:
        return part  # text that only begins so
    return replace(part, content=value)


def _with_extras(part: ToolReturnPart) -> ToolReturnPart:
    """The result with the sources, files and data in its metadata as the chunks that they are."""
    said: Any = to_jsonable_python(part.metadata)
    found: list[Extra] = []
    for item in cast(list[Any], said) if isinstance(said, list) else [said]:
        try:
            found.append(EXTRA.validate_python(item))
        except ValidationError:
            continue  # metadata of another kind
    return replace(part, metadata=found or None)


def _shown(run: Run, messages: Sequence[ModelMessage]) -> list[ModelMessage]:
    """The run's messages as they are shown: an answer that is a value is text."""
    shown: list[ModelMessage] = []
    in_text = answers_in_text(run)
    own = _own_tools(run)
    tools = _tools(run)
    for message in messages:
        if isinstance(message, ModelRequest):
            parts = [
                _as_shown(part, own) if isinstance(part, ToolReturnPart) else part
                for part in message.parts
                if not (isinstance(part, ToolReturnPart) and part.outcome == "interrupted")
            ]
            shown.append(replace(message, parts=parts))
        elif in_text or not is_reply(message):
            shown.append(message)
        else:
            said = [
                part
                for part in message.parts
                if not isinstance(part, TextPart)
                and not (isinstance(part, ToolCallPart) and part.tool_name not in tools)
            ]
            shown.append(replace(message, parts=said))
    if not in_text and run.status == "completed" and run.finish_reason != "tool_call":
        answer = TextPart(text_of_output(json.loads(run.output or "null")))
        shown.append(ModelResponse([answer]))
    return shown


def _again(messages: Sequence[ModelMessage]) -> Iterator[AgentStreamEvent]:
    """What was streamed when the messages were new."""
    for message in messages:
        if isinstance(message, ModelRequest):
            for part in message.parts:
                if isinstance(part, ToolReturnPart) or (
                    isinstance(part, RetryPromptPart) and part.tool_name
                ):
                    yield FunctionToolResultEvent(part)
        elif is_reply(message):
            for index, part in enumerate(message.parts):
                yield PartStartEvent(index=index, part=part)
                yield PartEndEvent(index=index, part=part)
            for call in message.tool_calls:
                yield FunctionToolCallEvent(call, args_valid=True)


def ui_messages(turns: Turns, keys: Mapping[str, str]) -> list[dict[str, Any]]:
    """The conversation as its page shows it: each turn is a message of the user's and one of the
    assistant's. A reply that goes on is left out: the stream tells it from its start.

    keys: of each call that waits for a person, by the call's id.
    """
    said: list[UIMessage] = []
    groups = [list(group) for _, group in groupby(turns, lambda each: each[0].turn_id)]
    for group in groups:
        said += _ui_turn(group, keys, is_last=group is groups[-1])
    return [
        message.model_dump(
            mode="json",
            by_alias=True,
            exclude_none=True,
            exclude={"metadata": True, "parts": {"__all__": PROVIDERS}},
        )
        for message in said
    ]


def _ui_turn(group: Turns, keys: Mapping[str, str], *, is_last: bool) -> list[UIMessage]:
    first, last = group[0][0], group[-1][0]
    messages = [message for run, own in group for message in _shown(run, own)]
    begun = next((at for at, each in enumerate(messages) if is_reply(each)), len(messages))
    asked = [each for each in messages[:begun] if _is_prompt(each)]
    goes_on = is_open(last) and last.status != "waiting"

    def name(message: ModelMessage, role: Literal["system", "user", "assistant"], at: int) -> str:
        if role == "assistant":
            return first.turn_id if is_reply(message) else f"{first.id}-{at}"
        if asked and message is asked[-1]:
            return first.message_id or f"user-{first.id}"
        return f"{first.id}-{at}" if message in asked else ""

    said: list[UIMessage] = []
    reply = UIMessage(id=first.turn_id, role="assistant", parts=[])
    shown = messages[:begun] if goes_on else messages
    for each in VercelAIAdapter.dump_messages(shown, generate_message_id=name, sdk_version=SDK):
        if each.role == "assistant" and each.id == first.turn_id:
            reply.parts += [StepStartUIPart(), *each.parts]
        elif each.id and each.role != "system":
            said.append(each)
    if said and asked and said[-1].role == "user":
        _name_files(said[-1], asked[-1])
    own: set[str] = set()
    if last.status in ("completed", "waiting"):
        own = _own_tools(last)
    reply.parts = [_settled(part, keys, own) for part in reply.parts]
    if reply.parts or (goes_on and not is_last):
        said.append(reply)
    return said


def _name_files(message: UIMessage, asked: ModelMessage) -> None:
    """Gives the files of the prompt their names back, which PydanticAI's adapter drops."""
    contents = [part.content for part in asked.parts if isinstance(part, UserPromptPart)]
    files = [
        item
        for content in contents
        if not isinstance(content, str)
        for item in content
        if isinstance(item, BinaryContent)
    ]
    shown = [part for part in message.parts if isinstance(part, FileUIPart)]
    for part, item in zip(shown, files, strict=True):
        if "." in item.identifier:  # else it is a digest: the file had no name
            part.filename = item.identifier


def _is_prompt(message: ModelMessage) -> bool:
    return isinstance(message, ModelRequest) and any(
        isinstance(part, UserPromptPart) for part in message.parts
    )


def _settled(part: UIMessagePart, keys: Mapping[str, str], own: set[str]) -> UIMessagePart:
    """The part; a call without a result waits for a person, for the page, or for nobody."""
    if isinstance(part, ToolOutputDeniedPart) and isinstance(part.approval, ToolApprovalResponded):
        part.approval.id = part.tool_call_id  # else it were random
    if not isinstance(part, ToolApprovalRequestedPart):
        return part
    call: dict[str, Any] = {
        "type": part.type,
        "tool_call_id": part.tool_call_id,
        "input": part.input,
    }
    if key := keys.get(part.tool_call_id):
        return ToolApprovalRequestedPart(**call, approval=ToolApprovalRequested(id=key))
    if part.type.removeprefix("tool-") in own:
        return ToolInputAvailablePart(**call)
    return ToolOutputErrorPart(**call, error_text=NOT_MADE)

"""AG-UI's events of a run. Imported when it is first needed: AG-UI's types take a while."""

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated, Any, cast

from ag_ui.core import (
    PROTOCOL_VERSION,
    BaseEvent,
    Interrupt,
    ReasoningEncryptedValueEvent,
    RunErrorEvent,
    RunFinishedCancelledOutcome,
    RunFinishedEvent,
    RunFinishedInterruptOutcome,
    RunFinishedSuccessOutcome,
    RunStartedEvent,
    StateDeltaEvent,
    StateSnapshotEvent,
    TokenUsage,
    ToolCallResultEvent,
)
from pydantic import Field, TypeAdapter
from pydantic_ai import RunCancelled
from pydantic_ai.messages import (
    AgentStreamEvent,
    FunctionToolResultEvent,
    PartEndEvent,
    PartStartEvent,
    ThinkingPart,
    ToolReturnPart,
)
from pydantic_ai.ui.ag_ui import AGUIEventStream
from pydantic_core import to_jsonable_python
from typing_extensions import override

from app.api.ui import Shown
from app.core.errors import AppError, Bug
from app.models import Run
from app.schemas.agui import RunAgentInput
from app.services.refusals import run_failed
from app.services.run_log import Entry, RunEnded, RunPaused

ANSWER: dict[str, Any] = {
    "type": "object",
    "properties": {"approved": {"type": "boolean"}, "reason": {"type": "string"}},
    "required": ["approved"],
}

STATE_EVENT: TypeAdapter[BaseEvent] = TypeAdapter(
    Annotated[StateSnapshotEvent | StateDeltaEvent, Field(discriminator="type")]
)
STATE_TYPES = ("STATE_SNAPSHOT", "STATE_DELTA")


class AguiEncoder(AGUIEventStream[Any, Any]):
    """A run's log as AG-UI's events: PydanticAI's encoder, with ids that depend on the log alone.

    after: entries up to this one were told before; the run's parts go on from there.
    decided: keys that this request has just decided on.
    """

    def __init__(
        self, run: Run, body: RunAgentInput, *, after: int = 0, decided: Sequence[str] = ()
    ) -> None:
        super().__init__(thread_id=body.thread_id, run_id=body.run_id)
        self._run = run
        self._body = body
        self._after = after
        self._decided = decided
        self._seq = 0
        self._named: dict[str, str] = {}  # PydanticAI's random ids -> ours
        self._count: Counter[int] = Counter()  # how many ids each entry gave
        self._usage: list[TokenUsage] | None = None
        self._end: RunFinishedEvent | None = None
        self._shown = Shown(run)

    async def frames(self, entries: AsyncIterator[Entry]) -> AsyncIterator[bytes]:
        """Server-sent events. A failure is the last of them, and raised where it is a bug."""
        async for event in self.transform_stream(self._events(entries)):
            ends = isinstance(event, (RunFinishedEvent, RunErrorEvent))
            if 0 < self._seq <= self._after and not ends:
                continue
            event.timestamp = None
            self._name(event)
            at = f"id: {self._seq}\n" if self._seq else ""
            yield f"{at}{self.encode_event(event)}".encode()

    def _name(self, event: BaseEvent) -> None:
        fields = ["message_id", "parent_message_id"]
        if isinstance(event, ReasoningEncryptedValueEvent) and event.subtype == "message":
            fields.append("entity_id")
        for field in fields:
            if minted := getattr(event, field, None):
                setattr(event, field, self._name_of(minted))

    def _name_of(self, minted: str) -> str:
        if minted not in self._named:
            run = self._run
            begun = run.id if run.turn_id == run.id else f"{run.turn_id}-{run.id}"
            more = f".{count}" if (count := self._count[self._seq]) else ""
            self._named[minted] = f"{begun}-{self._seq}{more}"
            self._count[self._seq] += 1
        return self._named[minted]

    async def _events(self, entries: AsyncIterator[Entry]) -> AsyncIterator[AgentStreamEvent]:
        """What PydanticAI's encoder is to be told. Raises what the run failed with."""
        paused: RunPaused | None = None
        async for entry in entries:
            self._seq, event, paused = entry.seq, entry.event, None
            match event:
                case RunPaused():
                    paused = event
                case RunEnded():
                    for each in self._ended(event):
                        yield each
                case _ if self._shown(event):
                    if isinstance(event, PartStartEvent) and self._open_part:
                        # The process that spoke died, and another one says it again.
                        yield PartEndEvent(index=self._open_part_index, part=self._open_part)
                    yield event
                case _:
                    pass
        if paused:
            self._end = self._finished(RunFinishedInterruptOutcome(interrupts=self._asks(paused)))

    def _ended(self, event: RunEnded) -> list[AgentStreamEvent]:
        """What is still to be said. Raises the run's failure, and RunCancelled for an early end."""
        self._usage = None if self._after else _usage(event)
        if event.status == "failed":
            raise run_failed(event.error or {})
        if event.status != "completed":
            # Who speaks of no version knows this outcome not.
            spoken = self._body.protocol_version
            self._end = self._finished(RunFinishedCancelledOutcome() if spoken else None)
            self._end.metadata = {"status": event.status}
            if event.finish_reason:
                self._end.metadata["reason"] = event.finish_reason
            raise RunCancelled("The run was stopped.")
        self._end = self._finished(RunFinishedSuccessOutcome())
        return self._shown.answer(event)

    def _asks(self, paused: RunPaused) -> list[Interrupt]:
        until = datetime.fromtimestamp(paused.until, UTC).isoformat()
        return [
            Interrupt(
                id=key,
                reason="tool_call",
                message=f"Approve {call.tool_name}({call.args_as_json_str()})?",
                tool_call_id=call.tool_call_id,
                response_schema=ANSWER,
                expires_at=until,
            )
            for call, key in zip(paused.calls, paused.keys, strict=True)
            if key not in self._decided
        ]

    def _finished(self, outcome: Any) -> RunFinishedEvent:
        return RunFinishedEvent(
            thread_id=self.thread_id, run_id=self.run_id, outcome=outcome, usage=self._usage
        )

    @override
    async def before_stream(self) -> AsyncIterator[BaseEvent]:
        yield RunStartedEvent(
            thread_id=self.thread_id,
            run_id=self.run_id,
            parent_run_id=self._body.parent_run_id,
            protocol_version=PROTOCOL_VERSION,
        )
        if self._body.state:
            yield StateSnapshotEvent(snapshot=self._body.state)

    @override
    async def after_stream(self) -> AsyncIterator[BaseEvent]:
        if self._end:
            yield self._end

    @override
    async def on_error(self, error: Exception) -> AsyncIterator[BaseEvent]:
        known = error if isinstance(error, AppError) else Bug("Something broke here.")
        yield RunErrorEvent(message=known.message, code=known.error_code, usage=self._usage)
        if known is not error:
            raise error

    @override
    async def handle_thinking_end(
        self, part: ThinkingPart, followed_by_thinking: bool = False
    ) -> AsyncIterator[BaseEvent]:
        # What a provider wants to see again stays here, with the history.
        bare = ThinkingPart(part.content)
        async for event in super().handle_thinking_end(bare, followed_by_thinking):
            yield event

    @override
    async def handle_function_tool_result(
        self, event: FunctionToolResultEvent
    ) -> AsyncIterator[BaseEvent]:
        states: list[BaseEvent] = []
        if isinstance(event.part, ToolReturnPart):
            states = _states(event.part.metadata)
            event = replace(event, part=replace(event.part, metadata=None))
        async for each in super().handle_function_tool_result(event):
            if isinstance(each, (ToolCallResultEvent, ReasoningEncryptedValueEvent)):
                yield each
        for each in states:
            yield each


def _states(metadata: Any) -> list[BaseEvent]:
    """The changes of the frontend's state in the metadata that a tool returned, alone or listed.

    Only these: any other event would have to be told again, word for word, from the log.
    """
    said: Any = to_jsonable_python(metadata)
    items = cast(list[Any], said) if isinstance(said, list) else [said]
    return [
        STATE_EVENT.validate_python(item)
        for item in items
        if isinstance(item, dict) and item.get("type") in STATE_TYPES  # pyright: ignore[reportUnknownMemberType]
    ]


def _usage(event: RunEnded) -> list[TokenUsage] | None:
    sent, received = event.usage.get("input_tokens", 0), event.usage.get("output_tokens", 0)
    if not sent + received:
        return None  # nobody counted
    return [
        TokenUsage(
            input_tokens=sent,
            output_tokens=received,
            total_tokens=sent + received,
            cached_input_tokens=event.usage.get("cached_tokens") or None,
        )
    ]

"""The ids of tool calls: the ledger and every protocol tell calls apart by them.

Providers mean each to be its call's own. Some model servers repeat one, change it on the way, or
send what no database keeps as a key; such a call gets another id before anybody hears of it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from pydantic_ai.messages import (
    AgentStreamEvent,
    ModelMessage,
    ModelResponse,
    PartDeltaEvent,
    PartEndEvent,
    PartStartEvent,
    ToolCallPart,
    ToolCallPartDelta,
)

MAX_CALL_ID = 200  # characters


@dataclass(slots=True)
class CallIds:
    """Of one reply after the other: a call has the same id in the events and in the message."""

    taken: set[str] = field(default_factory=set[str])  # by the calls of earlier messages
    _given: dict[int, str] = field(default_factory=dict[int, str])  # by the part's index

    @classmethod
    def after(cls, messages: Iterable[ModelMessage]) -> "CallIds":
        """For replies that come after these messages."""
        return cls(
            {
                call.tool_call_id
                for message in messages
                if isinstance(message, ModelResponse)
                for call in message.tool_calls
            }
        )

    def event(self, event: AgentStreamEvent) -> AgentStreamEvent:
        """The event of a reply that is being said, with the call's id."""
        match event:
            case PartStartEvent(index=index, part=part):
                if index == 0:
                    self._given.clear()  # what was said of another attempt at the reply is void
                if isinstance(part, ToolCallPart):
                    return replace(event, part=self._named(index, part))
            case PartDeltaEvent(delta=ToolCallPartDelta() as delta) if delta.tool_call_id:
                given = self._given.get(event.index, delta.tool_call_id)
                if given != delta.tool_call_id:
                    return replace(event, delta=replace(delta, tool_call_id=given))
            case PartEndEvent(index=index, part=ToolCallPart() as part):
                return replace(event, part=self._named(index, part))
            case _:
                pass
        return event

    def name(self, reply: ModelResponse) -> None:
        """Gives the calls of a reply that is whole their ids."""
        reply.parts = [
            self._named(index, part) if isinstance(part, ToolCallPart) else part
            for index, part in enumerate(reply.parts)
        ]

    def done(self) -> None:
        """The reply is stored: the next one has other calls."""
        self.taken.update(self._given.values())
        self._given.clear()

    def _named(self, index: int, part: ToolCallPart) -> ToolCallPart:
        given = self._given.get(index)
        if given is None:
            given = self._given[index] = self._free(part.tool_call_id, index)
        return part if given == part.tool_call_id else replace(part, tool_call_id=given)

    def _free(self, wanted: str, index: int) -> str:
        is_usable = bool(wanted.strip()) and len(wanted) <= MAX_CALL_ID and wanted.isprintable()
        base = found = wanted if is_usable else "call"
        number = index
        while found in self.taken or found in self._given.values():
            found, number = f"{base}_{number}", number + 1
        return found

"""What is left of a run's log when its events are gone: the messages, and how it ended."""

from collections.abc import Callable, Mapping, Sequence

from pydantic_ai.messages import (
    AgentStreamEvent,
    FunctionToolCallEvent,
    FunctionToolResultEvent,
    ModelMessage,
    ModelRequest,
    PartEndEvent,
    PartStartEvent,
    RetryPromptPart,
    ToolCallPart,
    ToolReturnPart,
)
from pydantic_core import from_json
from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from agents import all_agents
from app.models import Run, ToolCall
from app.schemas.run import Options
from app.services.agent import answers_in_text
from app.services.conversation import is_reply
from app.services.run_log import Entry, RunEnded, RunPaused

Questions = Mapping[tuple[int, str], str]
"""What a run asked a person: (number of the message, call id) -> key."""


async def questions(connection: AsyncConnection, run_ids: Sequence[str]) -> Mapping[str, Questions]:
    """What each run asked a person, whether it was answered or the time ran out."""
    query = select(ToolCall.run_id, ToolCall.step, ToolCall.call_id, ToolCall.key).where(
        ToolCall.run_id.in_(run_ids),
        or_(ToolCall.decided, ToolCall.status.in_(("asked", "denied"))),
    )
    found: dict[str, dict[tuple[int, str], str]] = {}
    for row in await connection.execute(query):
        found.setdefault(row.run_id, {})[row.step, row.call_id] = row.key
    return found


def replay(run: Run, messages: Sequence[ModelMessage], asked: Questions) -> list[Entry]:
    """The log of a run that has ended, as its messages remember it.

    Each part is there at once, so there are fewer entries than there were, with other numbers.
    """
    is_tool = _tools(run)
    events: list[AgentStreamEvent] = []
    results: dict[str, FunctionToolResultEvent] = {}  # of the reply before, by call id
    # Whenever that was; else a limit was reached, before the last reply's calls were made.
    stopped = run.status in ("cancelled", "failed") or run.finish_reason == "max_time"
    limited = run.status == "incomplete" and not stopped
    for n, message in reversed(list(enumerate(messages))):
        if isinstance(message, ModelRequest):
            found = [
                FunctionToolResultEvent(part)
                for part in message.parts
                if (isinstance(part, ToolReturnPart) and part.outcome != "interrupted")
                or (isinstance(part, RetryPromptPart) and part.tool_name)
            ]
            results = {result.tool_call_id: result for result in found} | results
        if not is_reply(message):
            continue
        said: list[AgentStreamEvent] = []
        cut = message.state == "interrupted"  # in the middle of what was said
        for index, part in enumerate(message.parts):
            said.append(PartStartEvent(index=index, part=part))
            if not (cut and part is message.parts[-1]):
                said.append(PartEndEvent(index=index, part=part))
        calls = [call for call in message.tool_calls if is_tool(call.tool_name)]
        said += [
            _called(call, results.get(call.tool_call_id))
            for call in calls
            if call.tool_call_id in results or not (cut or limited)
        ]
        questions = [call for call in calls if (n, call.tool_call_id) in asked]
        late = [results.pop(call.tool_call_id, None) for call in questions]
        said += [result for result in results.values() if is_tool(result.part.tool_name or "")]
        if questions:
            keys = [asked[n, call.tool_call_id] for call in questions]
            said.append(RunPaused(calls=questions, keys=keys, until=0))
        events = [*said, *filter(None, late), *events]
        results = {}
    if run.finished_at:
        events.append(
            RunEnded(
                status=run.status,
                at=int(run.finished_at.timestamp()),
                finish_reason=run.finish_reason,
                output=from_json(run.output) if run.output else None,
                error=from_json(run.error) if run.error else None,
                usage=from_json(run.usage) if run.usage else {},
            )
        )
    return [Entry(seq, event) for seq, event in enumerate(events, 1)]


def _tools(run: Run) -> Callable[[str], bool]:
    """Whether something of that name is called to be made, rather than to give the answer."""
    if answers_in_text(run):
        return lambda name: True
    listed = all_agents().get(run.program)
    names = {tool.name for tool in Options.model_validate_json(run.options).tools}
    return (names | set(listed.tools if listed else ())).__contains__


def _called(call: ToolCallPart, result: FunctionToolResultEvent | None) -> FunctionToolCallEvent:
    part = result and result.part
    refused = isinstance(part, RetryPromptPart) and not isinstance(part.content, str)
    return FunctionToolCallEvent(call, args_valid=not refused)

"""What the encoders for user interfaces have in common."""

import asyncio
import gc
from collections.abc import AsyncIterator
from importlib import import_module
from types import ModuleType
from typing import Any

from pydantic_ai.messages import (
    AgentStreamEvent,
    FinalResultEvent,
    FunctionToolCallEvent,
    FunctionToolResultEvent,
    OutputToolCallEvent,
    OutputToolResultEvent,
    PartDeltaEvent,
    PartEndEvent,
    PartStartEvent,
    TextPart,
    TextPartDelta,
    ToolCallPart,
    ToolCallPartDelta,
)

from agents import all_agents
from app.models import Run
from app.schemas.run import Options
from app.services.agent import answers_in_text
from app.services.conversation import text_of_output
from app.services.run_log import Entry, RunEnded, RunRestarted, settled
from app.services.runs import Runs

_modules: dict[str, ModuleType] = {}


async def late_import(name: str) -> Any:
    """A module that takes a while to import, and not all need: the first time in a thread."""
    if name not in _modules:
        _modules[name] = await asyncio.to_thread(import_module, name)
        gc.freeze()  # it stays, as what is there from the start: see `app.main`
    return _modules[name]


async def told(
    runs: Runs,
    run: Run,
    after: int = 0,
    *,
    pause: bool = False,
    restarts: bool = False,
    alone: bool = False,
) -> AsyncIterator[Entry]:
    """The run's entries above `after` for somebody who hears them for the first time.

    What restarts took back is left out, as far as it is not being told already; so is what a
    restarted or resumed run says of its calls a second time. With `pause` they end where the run
    waits for a person. With `restarts` it is also told where what was told already is taken back.
    `alone` is as in `Runs.follow`.
    """
    known = await runs.entries(run)
    last = known[-1].seq if known else 0
    said: set[tuple[type, str]] = set()
    for entry in settled(known):
        if _is_new(entry, said) and entry.seq > after:
            yield entry
    if known and known[-1].is_last:
        return
    async for entry in runs.follow(run, last, pause=pause, alone=alone):
        if _is_new(entry, said) and (restarts or not isinstance(entry.event, RunRestarted)):
            yield entry


def _is_new(entry: Entry, said: set[tuple[type, str]]) -> bool:
    event = entry.event
    match event:
        case PartStartEvent(part=ToolCallPart(tool_call_id=call_id)):
            said -= {(FunctionToolCallEvent, call_id), (FunctionToolResultEvent, call_id)}
        case FunctionToolCallEvent() | FunctionToolResultEvent():
            key = (type(event), event.tool_call_id)
            if key in said:
                return False
            said.add(key)
        case _:
            pass
    return True


class Shown:
    """Which events of a run are shown as they come. An answer that is a value is not: it is said
    as text, once it is whole."""

    def __init__(self, run: Run) -> None:
        self._in_text = answers_in_text(run)
        listed = all_agents().get(run.program)  # None: its file is gone, the run is still there
        self._tools = {tool.name for tool in Options.model_validate_json(run.options).tools}
        self._tools |= set(listed.tools if listed else ())
        self._hidden: set[str] = set()  # calls by which such an answer is given

    def __call__(self, event: AgentStreamEvent) -> bool:
        if self._in_text:
            return True
        match event:
            case PartStartEvent(part=ToolCallPart() as part) if part.tool_name not in self._tools:
                self._hidden.add(part.tool_call_id)
                return False
            case PartDeltaEvent(delta=ToolCallPartDelta(tool_call_id=call_id)):
                return call_id not in self._hidden
            case PartEndEvent(part=ToolCallPart() as part):
                return part.tool_call_id not in self._hidden
            case (
                PartStartEvent(part=TextPart())
                | PartDeltaEvent(delta=TextPartDelta())
                | PartEndEvent(part=TextPart())
                | FinalResultEvent()
                | OutputToolCallEvent()
                | OutputToolResultEvent()
            ):
                return False
            case _:
                return True

    def answer(self, event: RunEnded) -> list[AgentStreamEvent]:
        """The answer that was not shown; nothing where there is none."""
        if self._in_text or event.status != "completed" or event.finish_reason != "stop":
            return []
        part = TextPart(text_of_output(event.output))
        return [PartStartEvent(index=0, part=part), PartEndEvent(index=0, part=part)]

"""What became of a run, step by step, from its log, its messages and the ledger of its calls."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pydantic_ai import CustomEvent
from pydantic_ai.messages import (
    AgentStreamEvent,
    FunctionToolCallEvent,
    FunctionToolResultEvent,
    ModelMessage,
    PartStartEvent,
    TextPart,
    ToolCallPart,
)

from agents import all_agents
from app.core.json import dump_any
from app.models import Run, ToolCall
from app.schemas.run import Options
from app.services.conversation import is_reply
from app.services.extraction_log import AttemptFailed, ChunkFailed, JobProgress
from app.services.run_log import RunEnded, RunPaused, RunRestarted
from tools import declared

Entries = Sequence[tuple[datetime, AgentStreamEvent]]


@dataclass(slots=True)
class Step:
    """`facts` are of our making; `content` is what somebody said, by the name of what it is."""

    at: datetime | None
    what: str
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    content: dict[str, str] = field(default_factory=dict[str, str])


def steps_of(
    run: Run, messages: Sequence[ModelMessage], calls: Sequence[ToolCall], entries: Entries
) -> list[Step]:
    return _Steps(run, messages, calls).walk(entries)


class _Steps:
    def __init__(
        self, run: Run, messages: Sequence[ModelMessage], calls: Sequence[ToolCall]
    ) -> None:
        self._run = run
        self._replies = [(at, each) for at, each in enumerate(messages) if is_reply(each)]
        self._calls = {(call.step, call.call_id): call for call in calls}
        self._effects = _effects(run)
        self._steps: list[Step] = []
        self._told: dict[int, Step] = {}  # replies by number
        self._number = 0

    def walk(self, entries: Entries) -> list[Step]:
        run = self._run
        options = Options.model_validate_json(run.options)
        accepted = {"owner": run.owner_id, "kind": run.kind, "program": run.program}
        accepted |= {"parent": run.parent_id} if run.parent_id else {}
        accepted |= {"job": run.batch_id} if run.batch_id else {}
        self._add(run.created_at, "accepted", accepted, {"prompt": options.text})
        if run.worker:
            claims = {"worker": run.worker, "token": run.token, "crashes": run.crashes}
            self._add(None, "claimed", claims)
        results: dict[str, Step] = {}
        for at, event in entries:
            match event:
                case PartStartEvent(index=0):
                    self._reply(at)
                case RunRestarted(replies=replies):
                    self._restart(at, replies)
                case FunctionToolCallEvent(part=part):
                    results[part.tool_call_id] = self._call(at, part)
                case FunctionToolResultEvent():
                    if (call := results.get(event.tool_call_id)) and call.at:
                        call.facts["seconds"] = (at - call.at).total_seconds()
                case RunPaused(calls=asked, until=until):
                    facts: dict[str, Any] = {"tools": [call.tool_name for call in asked]}
                    facts |= {"until": datetime.fromtimestamp(until, UTC).isoformat()}
                    self._add(at, "waits", facts)
                case AttemptFailed(attempt=attempt, chunk=chunk, body=body):
                    codes = [error["code"] for error in body["errors"]]
                    facts = {"attempt": attempt, "chunk": chunk, "codes": codes}
                    facts |= body["usage"]
                    self._add(at, "attempt failed", facts, {"answer": str(body["raw"])})
                case ChunkFailed(chunk=chunk, error=error):
                    self._add(at, "chunk failed", {"chunk": chunk, "code": error.get("code")})
                case JobProgress(counts=counts):
                    if self._steps[-1].what == "progress":
                        self._steps.pop()
                    self._add(at, "progress", dict(counts))
                case RunEnded():
                    pass
                case CustomEvent():
                    self._add(at, event.name)
                case _:
                    pass
        while self._number < len(self._replies):  # of which the log says nothing (any more)
            self._reply(None)
        self._end()
        return self._steps

    def _add(
        self,
        at: datetime | None,
        what: str,
        facts: dict[str, Any] | None = None,
        content: dict[str, str] | None = None,
    ) -> Step:
        step = Step(at, what, facts or {}, content or {})
        self._steps.append(step)
        return step

    def _reply(self, at: datetime | None) -> None:
        self._number += 1
        step = self._add(at, f"reply {self._number}")
        self._told[self._number] = step
        if self._number > len(self._replies):
            return
        place, reply = self._replies[self._number - 1]
        step.at = step.at or reply.timestamp
        step.facts |= {
            "model": reply.model_name,
            "input_tokens": reply.usage.input_tokens,
            "output_tokens": reply.usage.output_tokens,
            "finish": reply.finish_reason,
        }
        texts = [part.content for part in reply.parts if isinstance(part, TextPart)]
        step.content["text"] = "".join(texts)
        if at is None:
            for part in reply.tool_calls:
                self._call(None, part, place)

    def _restart(self, at: datetime, replies: int) -> None:
        for number in [each for each in self._told if each > replies]:
            void = self._told.pop(number)
            void.what, void.facts, void.content = f"reply {number}, cut off", {}, {}
        self._number = replies
        self._add(at, "restarted", {"replies_kept": replies})

    def _call(self, at: datetime | None, part: ToolCallPart, place: int | None = None) -> Step:
        if place is None:
            known = self._number <= len(self._replies) and self._number > 0
            place = self._replies[self._number - 1][0] if known else -1
        step = self._add(at, f"call {part.tool_name}", {"call_id": part.tool_call_id})
        step.facts["effect"] = self._effects.get(part.tool_name)
        if call := self._calls.get((place, part.tool_call_id)):
            step.facts |= {"status": call.status, "key": call.key}
            step.content["result"] = call.result or ""
        step.content["arguments"] = part.args_as_json_str()
        return step

    def _end(self) -> None:
        run = self._run
        if run.finished_at is None:
            self._add(None, run.status)
            return
        error: dict[str, Any] = json.loads(run.error or "{}")
        facts: dict[str, Any] = {"reason": error.get("code") or run.finish_reason}
        facts |= json.loads(run.usage or "{}")
        facts["claims"] = run.token
        facts["seconds"] = round((run.finished_at - run.created_at).total_seconds(), 3)
        output = json.loads(run.output) if run.output else ""
        said = output if isinstance(output, str) else dump_any(output)
        content = {"output": said, "error": str(error.get("message", ""))}
        self._add(run.finished_at, run.status, facts, content)


def _effects(run: Run) -> dict[str, str]:
    """What a second call of each of the agent's tools would do; its file may be gone."""
    listed = all_agents().get(run.program) if run.kind == "agent" else None
    tools = listed.tools if listed else {}
    return {name: declared(tool.tool_def).effect for name, tool in tools.items()}

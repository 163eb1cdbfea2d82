"""A run's log as OpenAI Responses events: a pure function of the entries.

So the same run gives the same events with the same numbers to every reader, live or later.
"""

import json
from typing import Any

from pydantic_ai.messages import (
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
)

from agents import all_agents
from app.models import Run
from app.schemas.run import Options
from app.services.agent import answers_in_text
from app.services.conversation import text_of_output
from app.services.journal import Entry, RunEnded, RunPaused, RunRestarted

SERVER = "agent-backend"  # the label of the tools that run here

Item = dict[str, Any]
ResponseEvent = dict[str, Any]


def frame(event: ResponseEvent) -> bytes:
    """One server-sent event; its id is its sequence number."""
    head = f"id: {event['sequence_number']}\nevent: {event['type']}\ndata: "
    return head.encode() + json.dumps(event).encode() + b"\n\n"


class ResponseEncoder:
    """Feed it a run's entries in order; it returns the events that each one becomes."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._options = Options.model_validate_json(run.options)
        self._texts = answers_in_text(run)
        self._own = {tool.name for tool in self._options.tools}
        listed = all_agents().get(run.program)  # None: its file is gone, the run is still there
        self._server = set(listed.tools) if listed else set[str]()
        self.emitted = 0
        self._status = "queued" if run.status == "queued" else "in_progress"
        self._end: RunEnded | None = None
        self._output: list[Item] = []
        self._replies: list[int] = []  # the model reply that each item is of
        self._reply = 0
        self._parts: dict[int, Item] = {}  # open parts of the reply: index -> item
        self._calls: dict[str, Item] = {}  # open calls of the server's tools: call id -> item
        self._opened = False

    @staticmethod
    def number(event: ResponseEvent) -> int:
        return event["sequence_number"]

    def opening(self) -> list[ResponseEvent]:
        """What every stream begins with; nothing when it was taken already."""
        if self._opened:
            return []
        self._opened = True
        self._status = "queued" if self._options.echo.get("background") else "in_progress"
        created = self._event("response.created", response=self.response())
        self._status = "in_progress"
        return [created, self._event("response.in_progress", response=self.response())]

    def feed(self, entry: Entry) -> list[ResponseEvent]:
        opening, event = self.opening(), entry.event
        match event:
            case PartStartEvent(index=0):
                self._reply += 1
                self._parts = {}
            case _:
                pass
        match event:
            case PartStartEvent(part=TextPart() | ThinkingPart() | ToolCallPart()):
                events = self._start(entry.seq, event)
            case PartDeltaEvent():
                events = self._delta(event)
            case PartEndEvent():
                events = self._finish(event)
            case FunctionToolResultEvent():
                events = self._result(event)
            case RunPaused():
                events = self._ask(event)
            case RunRestarted():
                events = self._void(event.replies)
            case RunEnded():
                events = self._ended(entry.seq, event)
            case _:
                events = []
        return opening + events

    def _event(self, type_: str, **fields: Any) -> ResponseEvent:
        event = {"type": type_, "sequence_number": self.emitted, **fields}
        self.emitted += 1
        return event

    def _of(self, item: Item, type_: str, **fields: Any) -> ResponseEvent:
        at = self._output.index(item)
        return self._event(type_, item_id=item["id"], output_index=at, **fields)

    def _add(self, item: Item) -> ResponseEvent:
        self._output.append(item)
        self._replies.append(self._reply)
        at = len(self._output) - 1
        shown: Item = {**item, "content": []} if item["type"] == "message" else dict(item)
        return self._event("response.output_item.added", output_index=at, item=shown)

    def _done(self, item: Item, status: str = "completed") -> ResponseEvent:
        item["status"] = status
        at = self._output.index(item)
        return self._event("response.output_item.done", output_index=at, item=dict(item))

    # Parts of a model reply

    def _start(self, seq: int, event: PartStartEvent) -> list[ResponseEvent]:
        part, item_id = event.part, f"{self._run.id}_{seq}"
        match part:
            case TextPart(content=text) if self._texts:
                events = self._open_text(item_id)
                item = self._parts[event.index] = self._output[-1]
                return events + self._say(item, text)
            case ThinkingPart(content=text):
                item = {
                    "id": f"rs_{item_id}",
                    "type": "reasoning",
                    "status": "in_progress",
                    "summary": [],
                    "content": [{"type": "reasoning_text", "text": ""}],
                }
                self._parts[event.index] = item
                return [self._add(item), *self._say(item, text)]
            case ToolCallPart(tool_name=name) if name in self._own:
                item = {
                    "id": f"fc_{item_id}",
                    "type": "function_call",
                    "status": "in_progress",
                    "call_id": part.tool_call_id,
                    "name": name,
                    "arguments": "",
                }
                self._parts[event.index] = item
                return [self._add(item), *self._argue(item, part)]
            case ToolCallPart(tool_name=name) if name in self._server:
                item = {
                    "id": f"mcp_{item_id}",
                    "type": "mcp_call",
                    "status": "in_progress",
                    "server_label": SERVER,
                    "name": name,
                    "arguments": "",
                    "approval_request_id": None,
                    "output": None,
                    "error": None,
                }
                self._parts[event.index] = self._calls[part.tool_call_id] = item
                events = [self._add(item), self._of(item, "response.mcp_call.in_progress")]
                return events + self._argue(item, part)
            case _:
                return []  # the call by which a structured answer is given

    def _open_text(self, item_id: str) -> list[ResponseEvent]:
        part: Item = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item: Item = {
            "id": f"msg_{item_id}",
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": [part],
        }
        added = self._add(item)
        return [
            added,
            self._of(item, "response.content_part.added", content_index=0, part=dict(part)),
        ]

    def _say(self, item: Item, text: str) -> list[ResponseEvent]:
        if not text:
            return []
        item["content"][0]["text"] += text
        if item["type"] == "reasoning":
            return [self._of(item, "response.reasoning_text.delta", content_index=0, delta=text)]
        return [
            self._of(item, "response.output_text.delta", content_index=0, delta=text, logprobs=[])
        ]

    def _argue(self, item: Item, part: ToolCallPart) -> list[ResponseEvent]:
        return self._more_arguments(item, part.args_as_json_str()) if part.args else []

    def _more_arguments(self, item: Item, more: str) -> list[ResponseEvent]:
        item["arguments"] += more
        return [self._of(item, f"response.{_arguments(item)}.delta", delta=more)]

    def _delta(self, event: PartDeltaEvent) -> list[ResponseEvent]:
        item = self._parts.get(event.index)
        if item is None:
            return []
        match event.delta:
            case TextPartDelta(content_delta=text):
                return self._say(item, text)
            case ThinkingPartDelta(content_delta=str(text)):
                return self._say(item, text)
            case ToolCallPartDelta(args_delta=str(more)) if more:
                return self._more_arguments(item, more)
            case _:
                return []

    def _finish(self, event: PartEndEvent) -> list[ResponseEvent]:
        item = self._parts.pop(event.index, None)
        if item is None:
            return []
        match item["type"]:
            case "message":
                return self._close_text(item)
            case "reasoning":
                text = item["content"][0]["text"]
                said = self._of(item, "response.reasoning_text.done", content_index=0, text=text)
                return [said, self._done(item)]
            case kind:
                done = self._of(
                    item,
                    f"response.{_arguments(item)}.done",
                    arguments=item["arguments"],
                    **({"name": item["name"]} if kind == "function_call" else {}),
                )
                return [done, self._done(item)] if kind == "function_call" else [done]

    def _close_text(self, item: Item) -> list[ResponseEvent]:
        part = item["content"][0]
        text = part["text"]
        return [
            self._of(item, "response.output_text.done", content_index=0, text=text, logprobs=[]),
            self._of(item, "response.content_part.done", content_index=0, part=dict(part)),
            self._done(item),
        ]

    # What becomes of calls

    def _result(self, event: FunctionToolResultEvent) -> list[ResponseEvent]:
        item = self._calls.pop(event.tool_call_id, None)
        if item is None:
            return []  # replayed after a crash: told already
        match event.part:
            case ToolReturnPart(outcome="success") as part:
                item["output"] = part.model_response_str()
                return [self._of(item, "response.mcp_call.completed"), self._done(item)]
            case ToolReturnPart() as part:
                message = part.model_response_str(wrap_if_error=False)
            case RetryPromptPart() as part:
                message = part.model_response()
        item["error"] = {
            "type": "mcp_tool_execution_error",
            "content": [{"type": "text", "text": message}],
        }
        return [self._of(item, "response.mcp_call.failed"), self._done(item, "failed")]

    def _ask(self, event: RunPaused) -> list[ResponseEvent]:
        events: list[ResponseEvent] = []
        for call in event.calls:
            item: Item = {
                "id": f"mcpr_{call.tool_call_id}",
                "type": "mcp_approval_request",
                "server_label": SERVER,
                "name": call.tool_name,
                "arguments": call.args_as_json_str(),
            }
            if asking := self._calls.get(call.tool_call_id):
                asking["approval_request_id"] = item["id"]
            events.append(self._add(item))
            at = len(self._output) - 1
            events.append(
                self._event("response.output_item.done", output_index=at, item=dict(item))
            )
        return events

    def _void(self, replies: int) -> list[ResponseEvent]:
        """Takes back the items of replies that will be asked for again; their places are free."""
        keep = sum(reply <= replies for reply in self._replies)
        events = [
            self._done(item, "incomplete")
            for item in self._output[keep:]
            if item.get("status") == "in_progress"
        ]
        void = {item["id"] for item in self._output[keep:]}
        self._calls = {key: item for key, item in self._calls.items() if item["id"] not in void}
        del self._output[keep:], self._replies[keep:]
        self._parts, self._reply = {}, replies
        return events

    # The end

    def _ended(self, seq: int, event: RunEnded) -> list[ResponseEvent]:
        events: list[ResponseEvent] = []
        for item in self._output:
            if item.get("status") == "in_progress":
                events.append(self._done(item, "incomplete"))
        if event.status == "completed" and not self._texts and event.finish_reason == "stop":
            events += self._open_text(f"{self._run.id}_{seq}")
            item = self._output[-1]
            events += self._say(item, text_of_output(event.output))
            events += self._close_text(item)
        self._end = event
        self._status = event.status
        closing = "incomplete" if event.status == "cancelled" else event.status
        events.append(self._event(f"response.{closing}", response=self.response()))
        return events

    def response(self) -> dict[str, Any]:
        """The response object, as of the entries that were fed."""
        end, echo = self._end, self._options.echo
        usage = end.usage if end else {}
        sent, received = usage.get("input_tokens", 0), usage.get("output_tokens", 0)
        incomplete = self._status in ("incomplete", "cancelled") and end is not None
        return {
            "id": f"resp_{self._run.id}",
            "object": "response",
            "created_at": int(self._run.created_at.timestamp()),
            "completed_at": end.at if end else None,
            "status": self._status,
            "model": self._run.program,
            "output": [dict(item) for item in self._output],
            "error": _error(end.error) if end and end.error else None,
            "incomplete_details": {"reason": _reason(end)} if incomplete and end else None,
            "instructions": echo.get("instructions"),
            "metadata": echo.get("metadata", {}),
            "previous_response_id": self._run.parent_id and f"resp_{self._run.parent_id}",
            "background": echo.get("background", False),
            "store": echo.get("store", True),
            "temperature": echo.get("temperature"),
            "top_p": echo.get("top_p"),
            "max_output_tokens": echo.get("max_output_tokens"),
            "parallel_tool_calls": echo.get("parallel_tool_calls", True),
            "tool_choice": echo.get("tool_choice") or "auto",
            "tools": echo.get("tools", []),
            "text": echo.get("text") or {"format": {"type": "text"}},
            "truncation": echo.get("truncation") or "disabled",
            "user": echo.get("user"),
            "usage": {
                "input_tokens": sent,
                "input_tokens_details": {
                    "cached_tokens": usage.get("cached_tokens", 0),
                    "cache_write_tokens": 0,
                },
                "output_tokens": received,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": sent + received,
            }
            if end
            else None,
        }


def _arguments(item: Item) -> str:
    kind = item["type"]
    return "mcp_call_arguments" if kind == "mcp_call" else f"{kind}_arguments"


def _error(error: dict[str, Any]) -> dict[str, Any]:
    return {"code": error.get("code", "server_error"), "message": error.get("message", "")}


def _reason(end: RunEnded) -> str:
    if end.status == "cancelled":
        return "cancelled"
    return {"length": "max_output_tokens"}.get(str(end.finish_reason), str(end.finish_reason))

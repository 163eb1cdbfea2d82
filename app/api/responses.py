"""A run's log as OpenAI Responses: a pure function of the entries.

So the same run gives the same events with the same numbers to every reader, live or later. A run
that asks a person is several responses, as it would be at OpenAI: each question ends one, and the
answers begin the next.
"""

import json
import re
from dataclasses import dataclass
from typing import Any, cast

from pydantic_ai.messages import (
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
)

from agents import all_agents
from app.models import Run
from app.schemas.run import Options
from app.services.agent import answers_in_text
from app.services.conversation import arguments_of, text_of_output
from app.services.run_log import Entry, RunEnded, RunPaused, RunRestarted

SERVER = "agent-backend"  # the label of the tools that run here
APPROVAL = "mcpr_"  # what stands before a question's key
PREFIX = "resp_"
ID = re.compile(rf"{PREFIX}([0-9a-f]{{32}})(?:_([1-9][0-9]{{0,3}}))?")

Json = dict[str, Any]
ResponseEvent = dict[str, Any]


def response_id(run_id: str, leg: int = 1) -> str:
    """The id of a run's response: of the `leg`th, where questions divide the run."""
    return f"{PREFIX}{run_id}" if leg == 1 else f"{PREFIX}{run_id}_{leg}"


def parse_id(text: str) -> tuple[str, int] | None:
    """The run's id and the leg; None for what cannot be a response's id."""
    found = ID.fullmatch(text)
    if found is None or found[2] == "1":
        return None
    return found[1], int(found[2] or 1)


def frame(event: ResponseEvent) -> bytes:
    """One server-sent event; its id is its sequence number."""
    head = f"id: {event['sequence_number']}\nevent: {event['type']}\ndata: "
    return head.encode() + json.dumps(event).encode() + b"\n\n"


@dataclass(slots=True, eq=False)
class _Item:
    """An item of the output, and its place in the stream."""

    body: Json
    at: int  # its output_index
    reply: int  # the model reply that it is of
    void: bool = False  # a restart took it back

    @property
    def is_open(self) -> bool:
        return self.body.get("status") == "in_progress"


@dataclass(slots=True)
class _Call:
    """A call that a person was asked about, as it will be shown once it is made."""

    part: ToolCallPart
    key: str
    item_id: str


class ResponseEncoder:
    """Feed it a run's entries in order; it returns the events that each one becomes.

    It tells of one leg of the run and passes over the others. `conversation` is the name of the
    one that the run belongs to.
    """

    def __init__(self, run: Run, leg: int = 1, conversation: str | None = None) -> None:
        self._run = run
        self._leg = leg
        self._conversation = conversation
        options = Options.model_validate_json(run.options)
        self._echo = options.echo
        self._texts = answers_in_text(run)
        self._own = {tool.name for tool in options.tools}
        # None: its file is gone, the run is still there.
        self._listed = all_agents().get(run.program)
        self._server = self._listed.tools if self._listed else {}
        self.emitted = 0
        self.legs = 1  # how many the entries so far make
        self.ended = False  # there is no more to tell of this leg
        self._begun = False
        self._went_on = False  # there was an answer to what this leg asked
        self._opened = False
        self._status = "queued" if run.status in ("queued", "waiting") else "in_progress"
        self._end: RunEnded | None = None
        self._output: list[_Item] = []
        self._reply = 0
        self._again = 0  # how often the run was begun again
        self._parts: dict[int, _Item] = {}  # open parts of the reply, by index
        self._calls: dict[str, _Item] = {}  # open calls of the server's tools, by call id
        self._places: dict[str, str] = {}  # the ids of calls' items, by call id
        self._asked: dict[str, _Call] = {}  # what the leg before has asked, by call id

    @staticmethod
    def number(event: ResponseEvent) -> int:
        return event["sequence_number"]

    def opening(self) -> list[ResponseEvent]:
        """What every stream begins with; nothing when it was taken already."""
        if self._opened:
            return []
        self._opened = True
        background = self._echo.get("background")
        status, self._status = self._status, "queued" if background else "in_progress"
        events = [self._event("response.created", response=self.response())]
        if background:
            events.append(self._event("response.queued", response=self.response()))
        self._status = "in_progress"
        events.append(self._event("response.in_progress", response=self.response()))
        self._status = "in_progress" if self._begun else status
        return events

    def feed(self, entry: Entry) -> list[ResponseEvent]:
        event = entry.event
        match event:
            case PartStartEvent(index=0):
                self._reply += 1
                self._parts = {}
            case RunRestarted():
                self._reply = event.replies
                self._again += 1
            case _:
                pass
        match event:
            case PartStartEvent(part=ToolCallPart(tool_call_id=call_id)):
                self._places[call_id] = f"{self._run.id}_{self._reply_name}_{event.index}"
            case _:
                pass
        if self.ended or self.legs < self._leg:
            self._pass_over(event)
            return []
        self._begun = True
        opening = self.opening()
        self._status = "in_progress"
        return opening + self._tell(event)

    def _pass_over(self, event: Any) -> None:
        match event:
            case RunPaused():
                self.legs += 1
                if self.legs == self._leg:
                    self._asked = {
                        call.tool_call_id: _Call(call, key, self._place(call))
                        for call, key in zip(event.calls, event.keys, strict=True)
                    }
            case RunEnded(status="cancelled") if self.legs == self._leg + 1 and not self._went_on:
                self._status = "cancelled"  # nobody answered: the questions were withdrawn
            case RunEnded():
                pass
            case _:
                self._went_on = True

    @property
    def _reply_name(self) -> str:
        """No two replies share it, also if one was taken back."""
        return f"{self._reply}r{self._again}" if self._again else str(self._reply)

    def _place(self, call: ToolCallPart) -> str:
        return self._places.get(call.tool_call_id, f"{self._run.id}_{self._reply_name}_x")

    def _tell(self, event: Any) -> list[ResponseEvent]:
        match event:
            case PartStartEvent(part=TextPart() | ThinkingPart() | ToolCallPart()):
                return self._start(event)
            case PartDeltaEvent():
                return self._delta(event)
            case PartEndEvent():
                return self._finish(event)
            case FunctionToolCallEvent():
                return self._resume(event.tool_call_id)
            case FunctionToolResultEvent():
                return self._resume(event.tool_call_id) + self._result(event)
            case RunPaused():
                return self._ask(event)
            case RunRestarted():
                return self._void(event.replies)
            case RunEnded():
                return self._ended(event)
            case _:
                return []

    def _event(self, type_: str, **fields: Any) -> ResponseEvent:
        event = {"type": type_, "sequence_number": self.emitted, **fields}
        self.emitted += 1
        return event

    def _of(self, item: _Item, type_: str, **fields: Any) -> ResponseEvent:
        return self._event(type_, item_id=item.body["id"], output_index=item.at, **fields)

    def _add(self, body: Json) -> tuple[_Item, ResponseEvent]:
        item = _Item(body, len(self._output), self._reply)
        self._output.append(item)
        shown: Json = {**body, "content": []} if "content" in body else dict(body)
        return item, self._event("response.output_item.added", output_index=item.at, item=shown)

    def _done(self, item: _Item, status: str | None = "completed") -> ResponseEvent:
        if status:
            item.body["status"] = status
        return self._event("response.output_item.done", output_index=item.at, item=_copy(item.body))

    # Parts of a model reply

    def _start(self, event: PartStartEvent) -> list[ResponseEvent]:
        part, item_id = event.part, f"{self._run.id}_{self._reply_name}_{event.index}"
        match part:
            case TextPart(content=text) if self._texts:
                item, events = self._open_text(item_id)
                self._parts[event.index] = item
                return events + self._say(item, text)
            case ThinkingPart(content=text):
                item, events = self._open(
                    {
                        "id": f"rs_{item_id}",
                        "type": "reasoning",
                        "status": "in_progress",
                        "summary": [],
                        "content": [{"type": "reasoning_text", "text": ""}],
                    }
                )
                self._parts[event.index] = item
                return events + self._say(item, text)
            case ToolCallPart(tool_name=name) if name in self._own:
                item, added = self._add(
                    {
                        "id": f"fc_{item_id}",
                        "type": "function_call",
                        "status": "in_progress",
                        "call_id": part.tool_call_id,
                        "name": name,
                        "arguments": "",
                    }
                )
                self._parts[event.index] = item
                return [added, *self._argue(item, part)]
            case ToolCallPart(tool_name=name) if name in self._server:
                if self._server[name].requires_approval:
                    return []  # it is shown when it is asked about, and again when it is made
                item, events = self._call(part, item_id)
                self._parts[event.index] = item
                return events + self._argue(item, part)
            case _:
                return []  # the call by which a structured answer is given

    def _open(self, body: Json) -> tuple[_Item, list[ResponseEvent]]:
        item, added = self._add(body)
        part = dict(body["content"][0])
        return item, [
            added,
            self._of(item, "response.content_part.added", content_index=0, part=part),
        ]

    def _open_text(self, item_id: str) -> tuple[_Item, list[ResponseEvent]]:
        return self._open(
            {
                "id": f"msg_{item_id}",
                "type": "message",
                "role": "assistant",
                "status": "in_progress",
                "content": [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}],
            }
        )

    def _call(self, part: ToolCallPart, item_id: str) -> tuple[_Item, list[ResponseEvent]]:
        item, added = self._add(
            {
                "id": f"mcp_{item_id}",
                "type": "mcp_call",
                "status": "in_progress",
                "server_label": SERVER,
                "name": part.tool_name,
                "arguments": "",
                "approval_request_id": None,
                "output": None,
                "error": None,
            }
        )
        self._calls[part.tool_call_id] = item
        return item, [added, self._of(item, "response.mcp_call.in_progress")]

    def _say(self, item: _Item, text: str) -> list[ResponseEvent]:
        if not text:
            return []
        item.body["content"][0]["text"] += text
        if item.body["type"] == "reasoning":
            return [self._of(item, "response.reasoning_text.delta", content_index=0, delta=text)]
        return [
            self._of(item, "response.output_text.delta", content_index=0, delta=text, logprobs=[])
        ]

    def _argue(self, item: _Item, part: ToolCallPart) -> list[ResponseEvent]:
        return self._more_arguments(item, arguments_of(part)) if part.args else []

    def _more_arguments(self, item: _Item, more: str) -> list[ResponseEvent]:
        item.body["arguments"] += more
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
        match item.body["type"]:
            case "message" | "reasoning":
                return self._close(item)
            case "function_call":
                return [self._argued(item, name=item.body["name"]), self._done(item)]
            case _:
                return [self._argued(item)]

    def _argued(self, item: _Item, **more: Any) -> ResponseEvent:
        kind = f"response.{_arguments(item)}.done"
        item.body["arguments"] = item.body["arguments"] or "{}"
        return self._of(item, kind, arguments=item.body["arguments"], **more)

    def _close(self, item: _Item, status: str = "completed") -> list[ResponseEvent]:
        part = item.body["content"][0]
        if part["type"] == "reasoning_text":
            kind, extra = "response.reasoning_text.done", {}
        else:
            kind, extra = "response.output_text.done", {"logprobs": list[Any]()}
        return [
            self._of(item, kind, content_index=0, text=part["text"], **extra),
            self._of(item, "response.content_part.done", content_index=0, part=dict(part)),
            self._done(item, status),
        ]

    # What becomes of calls

    def _resume(self, call_id: str) -> list[ResponseEvent]:
        """Shows the call that was asked about, now that there is an answer."""
        asked = self._asked.pop(call_id, None)
        if asked is None:
            return []
        item, events = self._call(asked.part, asked.item_id)
        item.body["approval_request_id"] = f"{APPROVAL}{asked.key}"
        return [*events, *self._argue(item, asked.part), self._argued(item)]

    def _result(self, event: FunctionToolResultEvent) -> list[ResponseEvent]:
        item = self._calls.pop(event.tool_call_id, None)
        if item is None:
            return []  # replayed after a crash: told already
        match event.part:
            case ToolReturnPart(outcome="success") as part:
                item.body["output"] = part.model_response_str()
                return [self._of(item, "response.mcp_call.completed"), self._done(item)]
            case ToolReturnPart() as part:
                message = part.model_response_str(wrap_if_error=False)
            case RetryPromptPart() as part:
                message = part.model_response()
        item.body["error"] = {
            "type": "mcp_tool_execution_error",
            "content": [{"type": "text", "text": message}],
        }
        return [self._of(item, "response.mcp_call.failed"), self._done(item, "failed")]

    def _ask(self, event: RunPaused) -> list[ResponseEvent]:
        self.legs += 1
        self.ended = True
        self._status = "completed"
        events: list[ResponseEvent] = []
        for call, key in zip(event.calls, event.keys, strict=True):
            item, added = self._add(
                {
                    "id": f"{APPROVAL}{key}",
                    "type": "mcp_approval_request",
                    "server_label": SERVER,
                    "name": call.tool_name,
                    "arguments": call.args_as_json_str(),
                }
            )
            events += [added, self._done(item, None)]
        return [
            *self._break_off(),
            *events,
            self._event("response.completed", response=self.response()),
        ]

    def _break_off(self) -> list[ResponseEvent]:
        """Closes what is still open: it will not be finished."""
        return [self._done(item, "incomplete") for item in self._output if item.is_open]

    def _void(self, replies: int) -> list[ResponseEvent]:
        """Takes back the items of replies that will be asked for again. Their places in the
        stream stay theirs, so that nobody takes what comes for a part of them."""
        events: list[ResponseEvent] = []
        for item in self._output:
            if item.reply > replies and not item.void:
                item.void = True
                if item.is_open:
                    events.append(self._done(item, "incomplete"))
        self._calls = {key: item for key, item in self._calls.items() if not item.void}
        self._parts = {}
        return events

    # The end

    def _ended(self, event: RunEnded) -> list[ResponseEvent]:
        self.ended = True
        events = self._break_off()
        if event.status == "completed" and not self._texts and event.finish_reason == "stop":
            item, opened = self._open_text(f"{self._run.id}_{self._reply_name}_answer")
            events += opened
            events += self._say(item, text_of_output(event.output))
            events += self._close(item)
        self._end = event
        self._status = event.status
        closing = "incomplete" if event.status == "cancelled" else event.status
        events.append(self._event(f"response.{closing}", response=self.response()))
        return events

    def items(self) -> list[Json]:
        """The output, as of the entries that were fed."""
        return [_copy(item.body) for item in self._output if not item.void]

    def response(self) -> Json:
        """The response object, as of the entries that were fed."""
        end, echo = self._end, self._echo
        cut = end is not None and end.status in ("incomplete", "cancelled")
        settings = cast(Json, self._listed.settings if self._listed else {}) | echo
        conversation = echo.get("conversation") or self._conversation
        if isinstance(conversation, str):
            conversation = {"id": conversation}
        before = echo.get("previous_response_id")
        if self._leg > 1:
            before = response_id(self._run.id, self._leg - 1)
        return {
            "id": response_id(self._run.id, self._leg),
            "object": "response",
            "created_at": int(self._run.created_at.timestamp()),
            "completed_at": end.at if end and end.status == "completed" else None,
            "status": self._status,
            "background": echo.get("background", False),
            "conversation": conversation,
            "error": _error(end.error) if end and end.error else None,
            "frequency_penalty": echo.get("frequency_penalty", 0.0),
            "incomplete_details": {"reason": _reason(end)} if cut and end else None,
            "instructions": echo.get("instructions"),
            "max_output_tokens": echo.get("max_output_tokens"),
            "max_tool_calls": echo.get("max_tool_calls"),
            "metadata": echo.get("metadata", {}),
            "model": self._run.program,
            "output": self.items(),
            "parallel_tool_calls": echo.get("parallel_tool_calls", True),
            "presence_penalty": echo.get("presence_penalty", 0.0),
            "previous_response_id": before,
            "prompt_cache_key": echo.get("prompt_cache_key"),
            "reasoning": {"effort": None, "summary": None} | echo.get("reasoning", {}),
            "safety_identifier": echo.get("safety_identifier"),
            "service_tier": "default",
            "store": echo.get("store", True),
            "temperature": settings.get("temperature", 1.0),
            "text": {"format": {"type": "text"}} | echo.get("text", {}),
            "tool_choice": echo.get("tool_choice", "auto"),
            "tools": [
                {"description": None, "parameters": None, "strict": None} | tool
                for tool in echo.get("tools", [])
            ],
            "top_logprobs": 0,
            "top_p": settings.get("top_p", 1.0),
            "truncation": echo.get("truncation", "disabled"),
            "usage": _usage(end.usage if end else {}) if self.ended else None,
            "user": echo.get("user"),
        }


def _copy(body: Json) -> Json:
    """Later events must not change what was told."""
    if "content" in body:
        return {**body, "content": [dict(part) for part in body["content"]]}
    return dict(body)


def _arguments(item: _Item) -> str:
    kind = item.body["type"]
    return "mcp_call_arguments" if kind == "mcp_call" else f"{kind}_arguments"


def _usage(usage: dict[str, int]) -> Json:
    """Zero where a question ends the response: what the run used is told where it ends."""
    sent, received = usage.get("input_tokens", 0), usage.get("output_tokens", 0)
    return {
        "input_tokens": sent,
        "input_tokens_details": {
            "cached_tokens": usage.get("cached_tokens", 0),
            "cache_write_tokens": 0,
        },
        "output_tokens": received,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": sent + received,
    }


def _error(error: Json) -> Json:
    return {"code": error.get("code", "server_error"), "message": error.get("message", "")}


def _reason(end: RunEnded) -> str:
    if end.status == "cancelled":
        return "cancelled"
    return {"length": "max_output_tokens"}.get(str(end.finish_reason), str(end.finish_reason))

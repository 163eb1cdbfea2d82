"""A run as items: what was given to it and what it said, with the same ids as its responses."""

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Annotated, Literal

from fastapi import Depends, Query
from pydantic_ai.messages import (
    BinaryContent,
    FunctionToolResultEvent,
    ModelMessage,
    RetryPromptPart,
    SystemPromptPart,
    TextPart,
    ToolReturnPart,
    UserContent,
    UserPromptPart,
)

from app.api.responses import APPROVAL, Json, ResponseEncoder
from app.core.errors import Invalid
from app.core.security import Caller
from app.models import Run
from app.schemas.response import Include
from app.schemas.run import Options
from app.services.branches import is_open
from app.services.conversation import is_reply
from app.services.conversations import Conversations
from app.services.replay import replay
from app.services.run_log import Entry, RunPaused
from app.services.runs import Runs

Order = Literal["asc", "desc"]

WINDOW = 20  # runs that are read at a time, at least
ANSWER = "mcpa_"  # what stands before the key of a question that was answered
ID = re.compile(r"(?:msg|rs|fc|fco|mcp)_([0-9a-f]{32})_[0-9a-z_]{1,40}")
GIVEN = re.compile(r"_0_([0-9]{1,6})$")


def run_of(item_id: str) -> str | None:
    """The id of the run that an item is of; None where its id does not say."""
    found = ID.fullmatch(item_id)
    return found and found[1]


def place_of(item_id: str) -> int:
    """The number of the message that an item was given to a run with; -1 for other items."""
    found = GIVEN.search(item_id)
    return int(found[1]) if found else -1


def items_of(run: Run, messages: Sequence[ModelMessage], entries: Sequence[Entry]) -> list[Json]:
    """All items of a run, oldest first."""
    items = given(run, messages)
    legs = 1 + sum(isinstance(entry.event, RunPaused) for entry in entries)
    for leg in range(1, legs + 1):
        encoder = ResponseEncoder(run, leg)
        for entry in entries:
            encoder.feed(entry)
        items += [*answers(entries, leg), *encoder.items()]
    return items


def given(run: Run, messages: Sequence[ModelMessage]) -> list[Json]:
    """What the run was asked, behind the history that came along as text."""
    said = Options.model_validate_json(run.options).echo.get("system", [])
    items = [
        _message(f"msg_{run.id}_s_{n}", role, _content(text)) for n, (role, text) in enumerate(said)
    ]
    for n, message in enumerate(takewhile(lambda message: not is_reply(message), messages)):
        for i, part in enumerate(message.parts):
            item_id = f"{run.id}_0_{n}" + (f"_{i}" if i else "")
            match part:
                case UserPromptPart(content=content):
                    items.append(_message(f"msg_{item_id}", "user", _content(content)))
                case SystemPromptPart(content=text):
                    items.append(_message(f"msg_{item_id}", "system", _content(text)))
                case TextPart(content=text):
                    output: Json = {"type": "output_text", "text": text, "annotations": []}
                    items.append(_message(f"msg_{item_id}", "assistant", [output]))
                case ToolReturnPart():
                    items.append(
                        {
                            "id": f"fco_{item_id}",
                            "type": "function_call_output",
                            "status": "completed",
                            "call_id": part.tool_call_id,
                            "output": part.model_response_str(),
                        }
                    )
                case _:
                    pass
    return items


def answers(entries: Sequence[Entry], leg: int) -> list[Json]:
    """What a person answered to the questions before this leg, once it took effect."""
    asked: dict[str, str] = {}
    items: list[Json] = []
    pauses = 1
    for entry in entries:
        event = entry.event
        match event:
            case RunPaused():
                pauses += 1
                calls = [call.tool_call_id for call in event.calls]
                asked = dict(zip(calls, event.keys, strict=True)) if pauses == leg else {}
            case FunctionToolResultEvent(part=part):
                if key := asked.pop(event.tool_call_id, None):
                    items.append(_answer(key, part))
            case _:
                pass
    return items


async def history_of(
    run: Run,
    caller: Caller,
    runs: Runs,
    conversations: Conversations,
    ids: Sequence[str] | None = None,
) -> list[Json]:
    """The items of the run and of all that it goes on from, oldest first; of the runs with these
    ids alone."""
    turns = await runs.turns(caller, run, ids)
    asked = await conversations.questions([each for each, _ in turns])
    items: list[Json] = []
    for each, messages in turns:
        log = await runs.entries(each) if is_open(each) else []
        items += items_of(each, messages, log or replay(each, messages, asked.get(each.id, {})))
    return items


async def history_for_page(
    run: Run,
    caller: Caller,
    runs: Runs,
    conversations: Conversations,
    order: Order,
    limit: int,
    after: str | None,
) -> list[Json]:
    """As much of the history, oldest first, as `page` needs for this page, and to know whether
    there is more."""
    ids = await runs.branch(run)
    if order == "desc":
        ids.reverse()
    begins = run_of(after) if after else None
    if after and begins not in ids:  # not each id says of which run it is
        return await history_of(run, caller, runs, conversations)
    items: list[Json] = []
    step = max(limit, WINDOW)
    for at in range(ids.index(begins) if begins else 0, len(ids), step):
        more = await history_of(run, caller, runs, conversations, ids[at : at + step])
        items = [*items, *more] if order == "asc" else [*more, *items]
        listed = [item["id"] for item in (items if order == "asc" else reversed(items))]
        if len(listed) - (1 + listed.index(after) if after in listed else 0) > limit:
            break
    return items


async def included(
    include: Annotated[list[Include] | None, Query()] = None,
    bracketed: Annotated[list[Include] | None, Query(alias="include[]")] = None,
) -> list[Include]:
    """What a list shows beside the items; OpenAI's SDKs put brackets behind the name."""
    return [*(include or ()), *(bracketed or ())]


IncludeDep = Annotated[list[Include], Depends(included)]
Limit = Annotated[int, Query(ge=1, le=100)]


def page(items: Sequence[Json], order: Order, limit: int, after: str | None) -> Json:
    """One page of a list. Raises Invalid where `after` is no id of it."""
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        raise Invalid(f"No item {after[:80]!r} in this list.", param="after", status=400)
    listed = list(items) if order == "asc" else list(reversed(items))
    if after is not None:
        listed = listed[1 + [item["id"] for item in listed].index(after) :]
    data = listed[:limit]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(listed) > limit,
    }


def shown(items: Sequence[Json], include: Sequence[Include]) -> list[Json]:
    """The items without the images' data, which is large, unless they are asked for."""
    if "message.input_image.image_url" in include:
        return list(items)
    return [
        {**item, "content": [_named(part) for part in item["content"]]}
        if item["type"] == "message"
        else item
        for item in items
    ]


def _named(part: Json) -> Json:
    return {**part, "image_url": None} if part["type"] == "input_image" else part


def _message(item_id: str, role: str, content: list[Json]) -> Json:
    return {
        "id": item_id,
        "type": "message",
        "status": "completed",
        "role": role,
        "content": content,
    }


def _content(content: str | Sequence[UserContent]) -> list[Json]:
    return [_part(part) for part in ([content] if isinstance(content, str) else content)]


def _part(part: UserContent) -> Json:
    match part:
        case str(text):
            return {"type": "input_text", "text": text}
        case BinaryContent() if part.is_image:
            detail = (part.vendor_metadata or {}).get("detail", "auto")
            return {"type": "input_image", "detail": detail, "image_url": part.data_uri}
        case BinaryContent():
            return {"type": "input_file", "filename": part.identifier}
        case _:
            raise TypeError(f"No prompt is stored with {type(part).__name__} in it.")


def _answer(key: str, part: ToolReturnPart | RetryPromptPart) -> Json:
    reason = None
    if isinstance(part, ToolReturnPart) and part.outcome == "denied":
        reason = part.model_response_str(wrap_if_error=False)
    return {
        "id": f"{ANSWER}{key}",
        "type": "mcp_approval_response",
        "approval_request_id": f"{APPROVAL}{key}",
        "approve": reason is None,
        "reason": reason,
    }

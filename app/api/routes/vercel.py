"""Vercel AI SDK UI: what `useChat` speaks with no configuration at all."""

import re
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query
from fastapi.responses import JSONResponse, Response
from pydantic_ai.messages import ModelMessage, ModelRequest, UserContent, UserPromptPart

from app.api.deps import CallerDep, MultitaskDep, RunsDep, SettingsDep, idempotent
from app.api.options import tools_of
from app.api.sse import EventStream
from app.api.ui import late_import, told
from app.core.errors import AppError, Conflict, Invalid, NotFound
from app.core.json import dump_any
from app.core.security import Caller
from app.models import Run
from app.schemas.chat import Id
from app.schemas.run import Options
from app.schemas.vercel import ChatRequest, Message, Part
from app.services.attachments import attachment
from app.services.branches import is_open
from app.services.conversation import is_reply
from app.services.decisions import Decision
from app.services.json_schema import MAX_DEPTH, measure
from app.services.new_run import Idempotency, NewRun
from app.services.run_log import RunPaused
from app.services.runs import Runs

router = APIRouter(prefix="/api/chat", tags=["vercel"])

UNNAMED = re.compile(r"user-([0-9a-f]{32})")
"""How prompts are called here whose own protocol has no ids for them; with the run's id."""

PLACE = re.compile(r"([0-9]{1,9})(?:\.([0-9]{1,9}))?")
"""An id of a frame: of the entry, and of the chunk among those of the entry."""


DECISIONS = 100
"""As many a message may bring at most."""


class ChatNotFound(NotFound):
    """No such chat, or somebody else's: the two look the same."""

    code = "chat_not_found"


@router.post("")
async def ask(
    body: ChatRequest,
    caller: CallerDep,
    runs: RunsDep,
    settings: SettingsDep,
    multitask: MultitaskDep,
    idempotency: Annotated[Idempotency | None, idempotent("vercel")],
    agent: Annotated[Id | None, Query()] = None,
) -> Response:
    """Asks an agent, continues its answer with results of the page's own tools, or decides on
    what it asks. The run goes on without its reader; `/stop` stops it."""
    if known := await runs.repeated(caller, idempotency):
        return await _stream(runs, known)
    asked, before = _asked(body)
    if asked and (decisions := _decisions(asked)):
        run = await _decide(runs, caller, decisions)
        return await _stream(runs, run, after=await _pause(runs, run, decisions))
    named = body.agent or agent
    if asked and asked.role == "user":
        new = _prompted(body, asked, before)
        await _place(runs, caller, new, body.id)
    elif asked is None:
        new = await _once_more(runs, caller, body, await runs.newest(caller, body.id))
    else:
        newest = await runs.newest(caller, body.id)
        new = _continued(body, asked, before, newest)
        named = named or (newest and newest.program)
    new.program = named or settings.default_agent
    new.multitask = multitask
    new.idempotency = idempotency
    return await _stream(runs, await runs.accept(caller, new))


def _asked(body: ChatRequest) -> tuple[Message | None, list[Message] | None]:
    """The message that wants an answer, and those before it, where the page sent them."""
    if body.message:
        return body.message, None
    at = len(body.messages) - 1
    if body.trigger == "submit-message":
        for place, message in enumerate(body.messages):
            if message.role == "assistant" and message.id and message.id == body.message_id:
                at = place
    elif not body.messages:
        return None, None
    if at < 0:
        raise Invalid("Send `messages`, or the last one as `message`.", param="messages")
    return body.messages[at], body.messages[:at]


def _decisions(message: Message) -> list[Decision]:
    """What a person said in an assistant's message of the tools that need approval."""
    if message.role != "assistant":
        return []
    said = [part.approval for part in message.parts if part.state == "approval-responded"]
    decisions = {
        approval.id: Decision(approval.id, approval.approved, approval.reason)
        for approval in said
        if approval and approval.approved is not None
    }
    if len(decisions) > DECISIONS:
        raise Invalid(f"At most {DECISIONS} answers at once.", param="messages")
    return list(decisions.values())


async def _decide(runs: Runs, caller: Caller, decisions: Sequence[Decision]) -> Run:
    """Each by itself: the message may hold older ones, which count no more."""
    run: Run | None = None
    refused: Conflict | None = None
    for decision in decisions:
        try:
            run, refused = await runs.decide(caller, [decision]), None
        except Conflict as error:
            refused = error
    if refused and (run is None or run.status != "waiting"):
        raise refused  # what was taken was only said once more
    assert run
    return run


async def _pause(runs: Runs, run: Run, decisions: Sequence[Decision]) -> int:
    """The entry with which the run asked."""
    keys = {decision.key for decision in decisions}
    return max(
        (
            entry.seq
            for entry in await runs.entries(run)
            if isinstance(entry.event, RunPaused) and keys & set(entry.event.keys)
        ),
        default=0,
    )


def _prompted(body: ChatRequest, asked: Message, before: Sequence[Message] | None) -> NewRun:
    """The run that a user's message asks for. Raises Invalid for one that says nothing."""
    param = "message" if body.message else "messages"
    prompt = [_content(part, param) for part in asked.parts if part.type in ("text", "file")]
    prompt = [content for content in prompt if content != ""]
    if not prompt:
        raise Invalid("The user's message has neither text nor a file.", param=param)
    return NewRun(
        program="",
        prompt=prompt[0] if len(prompt) == 1 and isinstance(prompt[0], str) else prompt,
        chat=body.id,
        message_id=asked.id,
        after=_ids(before),
        options=Options(stream=True, tools=tools_of(body.tools)),
        param=param,
    )


def _content(part: Part, param: str) -> UserContent:
    if part.type == "text":
        return part.text
    is_id = part.url is not None and ":" not in part.url
    return attachment(
        url=None if is_id else part.url,
        file_id=part.url if is_id else None,
        media_type=part.media_type,
        name=part.filename,
        param=param,
    )


def _ids(messages: Sequence[Message] | None) -> list[str] | None:
    """The ids by which the server may know these messages."""
    if messages is None:
        return None
    ids = [message.id for message in messages if message.id and message.role != "system"]
    return [found[1] if (found := UNNAMED.fullmatch(each)) else each for each in ids]


async def _place(runs: Runs, caller: Caller, new: NewRun, chat: str) -> None:
    """A prompt that came over another protocol is known by its run; this one stands beside it."""
    found = UNNAMED.fullmatch(new.message_id or "")
    newest = await runs.newest(caller, chat) if found else None
    if not found or newest is None:
        return
    for run, _ in await runs.turns(caller, newest, [found[1]]):
        _beside(new, run)


def _beside(new: NewRun, run: Run) -> None:
    new.parent = run.parent_id
    new.after = None if run.parent_id else ()


def _continued(
    body: ChatRequest,
    asked: Message,
    before: Sequence[Message] | None,
    newest: Run | None,
) -> NewRun:
    """The run that goes on with results of the page's own tools. Raises Invalid for none.

    A page that goes on by itself may not send its tools again: they are those of before.
    """
    param = "message" if body.message else "messages"
    tools = Options.model_validate_json(newest.options).tools if newest else []
    own = {tool.name for tool in [*tools, *body.tools]}
    last = max((at for at, part in enumerate(asked.parts) if part.type == "step-start"), default=0)
    results = {
        part.tool_call_id: _result(part)
        for part in asked.parts[last:]
        if part.tool in own and part.state in ("output-available", "output-error")
    }
    if asked.role != "assistant" or not results:
        raise Invalid(
            "There is nothing to answer: the last message must be the user's, or the assistant's "
            "with results of tools of your own or with answers to its questions.",
            param=param,
        )
    return NewRun(
        program="",
        results=results,
        chat=body.id,
        after=[*(_ids(before) or ()), *(_ids([asked]) or ())] or None,
        options=Options(stream=True, tools=tools_of(body.tools) or tools),
        param=param,
    )


def _result(part: Part) -> str:
    """What the page's own tool gave, as text. Raises Invalid for what is nested too deep."""
    if measure(part.output)[0] > MAX_DEPTH:
        raise Invalid(f"A tool's output is at most {MAX_DEPTH} levels deep.", param="messages")
    if part.state == "output-error":
        return f"Error: {part.error_text}"
    return part.output if isinstance(part.output, str) else dump_any(part.output)


async def _once_more(runs: Runs, caller: Caller, body: ChatRequest, newest: Run | None) -> NewRun:
    """The run that answers a known prompt again, where the page names it by its id alone."""
    if newest is None:
        raise _unknown(body.id)
    name = body.message_id or newest.turn_id
    found = UNNAMED.fullmatch(name)
    names = {name, found[1]} if found else {name}
    known = [
        (run, messages)
        for run, messages in await runs.turns_named(caller, newest, names)
        if run.id == run.turn_id and names & {run.turn_id, run.message_id}
    ]
    if not known:
        raise Invalid(f"No message {name!r} in this chat.", param="messageId")
    run, messages = known[-1]
    new = NewRun(
        program="",
        prompt=_prompt_in(messages),
        chat=body.id,
        message_id=run.message_id,
        options=Options(stream=True, tools=tools_of(body.tools)),
    )
    _beside(new, run)
    return new


def _prompt_in(messages: Sequence[ModelMessage]) -> str | Sequence[UserContent]:
    prompt: str | Sequence[UserContent] = ""
    for message in messages:
        if isinstance(message, ModelRequest):
            for part in message.parts:
                if isinstance(part, UserPromptPart):
                    prompt = part.content
        elif is_reply(message):
            break
    return prompt


def _unknown(chat: str) -> ChatNotFound:
    return ChatNotFound(f"No chat {chat!r}.")


@router.get("/{chat:path}/stream", response_model=None)
async def resume(
    chat: Id,
    caller: CallerDep,
    runs: RunsDep,
    last_event_id: Annotated[str, Header(max_length=255)] = "",
) -> Response:
    """The message that is being written, from its start, and its rest; 204 where there is none."""
    newest = await runs.newest(caller, chat)
    if newest is None:
        return Response(status_code=204)
    turns = await runs.turns_going_on(caller, newest)
    goes_on = [run for run, _ in turns if is_open(run)]
    place = PLACE.fullmatch(last_event_id)
    if last_event_id and not place:
        raise AppError(f"{last_event_id!r} is no id of an event here.", param="Last-Event-ID")
    if place and int(place[1]):
        run = goes_on[0] if goes_on else newest
        await runs.check_kept(run)
        after, chunk = (int(place[1]) - 1, int(place[2])) if place[2] else (int(place[1]), 0)
        known = await runs.entries(run)
        last = known[-1].seq if known else 0
        if (known or goes_on) and int(place[1]) > last:
            raise AppError(
                f"The stream has come to event {last}; send the id of the last one that was read, "
                "or no header to read the message from its start.",
                param="Last-Event-ID",
            )
        if (run.status == "waiting" or not goes_on) and (not known or known[-1].seq <= after):
            return Response(status_code=204)
        return await _stream(runs, run, after=after, chunk=chunk, begins=False)
    if not goes_on or goes_on[0].status == "waiting":
        return Response(status_code=204)
    vercel = await _vercel()

    async def frames() -> AsyncIterator[bytes]:
        for run in goes_on:
            before = [each for each in turns if each[0].turn_id == run.turn_id]
            place = [each.id for each, _ in before].index(run.id)
            if place:  # the run's own first message answers the calls before it
                before[place] = (run, before[place][1][:1])
            encoder = vercel.VercelEncoder(
                run, before=before[: place + 1] if place else (), ends=run is goes_on[-1]
            )
            async for frame in encoder.frames(told(runs, run, pause=True)):
                yield frame
            if encoder.waits:
                break  # the others wait with it

    return _as_stream(frames())


@router.post("/{chat:path}/stop")
async def stop(chat: Id, caller: CallerDep, runs: RunsDep) -> dict[str, Any]:
    """Stops all that goes on in the chat, and names the messages that are cut short."""
    if await runs.newest(caller, chat) is None:
        raise _unknown(chat)
    stopped = await runs.stop(caller, chat)
    return {"id": chat, "stopped": list(dict.fromkeys(run.turn_id for run in stopped))}


@router.get("/{chat:path}", response_model=None)
async def reload(chat: Id, caller: CallerDep, runs: RunsDep) -> Response:
    """The chat's messages. With them, `resumeStream` brings what is missing."""
    newest = await runs.newest(caller, chat)
    if newest is None:
        raise _unknown(chat)
    turns = await runs.turns(caller, newest)
    keys: dict[str, str] = {}
    for run, _ in turns:
        if run.status == "waiting":
            paused = (entry.event for entry in reversed(await runs.entries(run)))
            event = next((event for event in paused if isinstance(event, RunPaused)), None)
            if event:
                calls = (call.tool_call_id for call in event.calls)
                keys |= zip(calls, event.keys, strict=True)
    vercel = await _vercel()
    return JSONResponse({"id": chat, "messages": vercel.ui_messages(turns, keys)})


async def _stream(runs: Runs, run: Run, **where: Any) -> Response:
    vercel = await _vercel()
    encoder = vercel.VercelEncoder(run, **where)
    return _as_stream(encoder.frames(told(runs, run, pause=True)))


def _as_stream(frames: AsyncIterator[bytes]) -> Response:
    response = EventStream(frames)
    response.headers["x-vercel-ai-ui-message-stream"] = "v1"
    return response


async def _vercel() -> Any:
    return await late_import("app.api.vercel")

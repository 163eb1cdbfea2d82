"""OpenAI Responses: the native API of runs. A response is a run, seen through its log."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import TypeAdapter, ValidationError

from agents import all_agents
from app.api.deps import CallerDep, ConversationsDep, MultitaskDep, RunsDep, idempotent
from app.api.inputs import chat_of, check, input_of, read, split, standing_of
from app.api.items import (
    ANSWER,
    IncludeDep,
    Limit,
    Order,
    answers,
    given,
    history_of,
    page,
    run_of,
    shown,
)
from app.api.responses import APPROVAL, Json, ResponseEncoder, ResponseEvent, frame, parse_id
from app.api.sse import EventStream, unless_gone
from app.core.errors import Invalid
from app.core.security import Caller
from app.models import Run
from app.schemas.response import (
    ApprovalResponse,
    InputItem,
    ItemReference,
    PastItem,
    ResponseRequest,
)
from app.schemas.run import Options
from app.services.branches import is_open
from app.services.conversations import ConversationNotFound, Conversations
from app.services.decisions import Decision
from app.services.new_run import Idempotency, Multitask
from app.services.refusals import RunNotFound, unknown_agent
from app.services.run_log import Entry, RunEnded, RunPaused
from app.services.runs import Runs

router = APIRouter(prefix="/v1/responses", tags=["responses"])

HISTORIES = 20  # at most, that the references of one request may lead to

INPUT: TypeAdapter[InputItem] = TypeAdapter(InputItem)


@router.post("")
async def create_response(
    request: Request,
    body: ResponseRequest,
    caller: CallerDep,
    runs: RunsDep,
    conversations: ConversationsDep,
    multitask: MultitaskDep,
    idempotency: Annotated[Idempotency | None, idempotent("responses")],
) -> Response:
    """Asks an agent. The run goes on without its client; `background` does not wait for it."""
    check(body)
    run, leg = await runs.repeated(caller, idempotency), 1
    if run is None:
        run, leg = await _begin(body, multitask, idempotency, caller, runs, conversations)
    name = chat_of(body) or await conversations.name_of(run)
    forget = None if is_stored(run) else partial(_forget, caller, run, runs)
    # With a key the same request gets the answer, and so does the same decision.
    alone = idempotency is None and leg == 1
    if body.stream:
        return EventStream(
            frames(runs, run, leg, name, forget=forget, alone=bool(forget) and alone),
            leave=None if forget is None else partial(_drop, caller, run, runs),
        )
    if body.background:
        return _whole(run, leg, name, await runs.entries(run))
    if forget is None:
        entries = await runs.wait(run, pause=True, alone=alone)
        return _whole(run, leg, name, entries)
    entries = await unless_gone(request, runs.wait(run, pause=True, alone=alone))
    if entries is None:
        await _drop(caller, run, runs)
        return Response(status_code=499)
    await forget()
    return _whole(run, leg, name, entries)


async def _begin(
    body: ResponseRequest,
    multitask: Multitask,
    idempotency: Idempotency | None,
    caller: Caller,
    runs: Runs,
    conversations: Conversations,
) -> tuple[Run, int]:
    """The run that the request makes or goes on with, and which of its responses is meant."""
    previous, chat = await previous_of(body, caller, runs), chat_of(body)
    if chat:
        await _known(chat, caller, conversations)
    items = await _resolved(input_of(body), caller, runs, conversations)
    decisions, items = split(items, all_new=bool(previous or chat))
    new = None
    if items or not decisions:
        above = previous or (await runs.newest(caller, chat) if chat else None)
        new = read(body, items, parent=previous and previous.id, standing=standing_of(above))
        new.multitask = multitask
        new.idempotency = idempotency
    run, leg = None, 1
    if decisions and items:
        _check_together(body.model, multitask)
    if decisions:
        run = await _decide(decisions, previous, chat, caller, runs, conversations)
        leg = _leg_after(await runs.entries(run), decisions)
    if new:
        run, leg = await runs.accept(caller, new), 1
    assert run
    return run, leg


def _check_together(program: str, multitask: Multitask) -> None:
    """Raises what would stop the message behind decisions, before these are made."""
    if program not in all_agents():
        raise unknown_agent(program)
    if multitask != "enqueue":
        raise Invalid(
            "Decide first, then send the message: with the decision it waits for its turn.",
            param="input",
            status=400,
        )


@router.get("/{response_id}")
async def get_response(
    response_id: str,
    caller: CallerDep,
    runs: RunsDep,
    conversations: ConversationsDep,
    include: IncludeDep,
    stream: bool = False,
    starting_after: Annotated[int | None, Query(ge=0)] = None,
    last_event_id: Annotated[int | None, Header(ge=0)] = None,
) -> Response:
    """The response as it is by now, or with `stream` its events above `starting_after`."""
    run, leg = await find(response_id, caller, runs)
    name = await conversations.name_of(run)
    encoder = ResponseEncoder(run, leg, name)
    for entry in await runs.entries(run):
        encoder.feed(entry)
    if not stream:
        return JSONResponse(encoder.response())
    encoder.opening()  # these events are there before the first entry
    # A browser that comes back sends the header along with the address that it first came with.
    after = last_event_id if last_event_id is not None else starting_after
    if after is not None:
        await runs.check_kept(run)
    if after is not None and after >= encoder.emitted:
        raise Invalid(
            f"The stream has {encoder.emitted} events so far; there is none numbered {after}.",
            param="starting_after",
            status=400,
        )
    return EventStream(frames(runs, run, leg, name, -1 if after is None else after))


@router.get("/{response_id}/input_items")
async def list_input_items(
    response_id: str,
    caller: CallerDep,
    runs: RunsDep,
    include: IncludeDep,
    order: Order = "desc",
    limit: Limit = 20,
    after: Annotated[str | None, Query(max_length=255)] = None,
) -> Json:
    """What was new to the agent, and the history that came along with it as text."""
    run, leg = await find(response_id, caller, runs)
    if leg == 1:
        items = given(run, (await runs.turns(caller, run, [run.id]))[-1][1])
    else:
        items = answers(await runs.entries(run), leg)
    return page(shown(items, include), order, limit, after)


@router.post("/{response_id}/cancel")
async def cancel_response(
    response_id: str, caller: CallerDep, runs: RunsDep, conversations: ConversationsDep
) -> Response:
    """Stops the run, and returns what it came to. An ended run stays as it is."""
    run, leg = await find(response_id, caller, runs)
    run = await runs.cancel(caller, run.id, "agent")
    name = await conversations.name_of(run)
    return _whole(run, leg, name, await runs.wait(run))


@router.delete("/{response_id}")
async def delete_response(response_id: str, caller: CallerDep, runs: RunsDep) -> Json:
    """Forgets the run, whichever of its responses is named."""
    run, _ = await find(response_id, caller, runs)
    await runs.delete(caller, run.id, "agent")
    return {"id": response_id, "object": "response", "deleted": True}


def is_stored(run: Run) -> bool:
    return Options.model_validate_json(run.options).echo.get("store", True)


async def find(response_id: str, caller: Caller, runs: Runs) -> tuple[Run, int]:
    """The caller's run, and which of its responses is meant. Raises RunNotFound."""
    missing = RunNotFound(f"Response with id {response_id[:80]!r} not found.")
    place = parse_id(response_id)
    if place is None:
        raise missing
    try:
        run = await runs.get(caller, place[0], "agent")
    except RunNotFound as error:
        raise missing from error
    if not is_stored(run) or place[1] > await _legs(run, place[1], runs):
        raise missing
    return run, place[1]


async def _legs(run: Run, at_least: int, runs: Runs) -> int:
    if at_least == 1:
        return 1
    return 1 + sum(isinstance(entry.event, RunPaused) for entry in await runs.entries(run))


async def previous_of(body: ResponseRequest, caller: Caller, runs: Runs) -> Run | None:
    if body.previous_response_id is None:
        return None
    try:
        return (await find(body.previous_response_id, caller, runs))[0]
    except RunNotFound as error:
        raise Invalid(
            f"Previous response with id {body.previous_response_id[:80]!r} not found.",
            code="previous_response_not_found",
            param="previous_response_id",
            status=400,
        ) from error


async def _known(chat: str, caller: Caller, conversations: Conversations) -> None:
    try:
        await conversations.get(caller, chat)
    except ConversationNotFound as error:
        error.param = "conversation"
        raise


async def _resolved(
    items: Sequence[InputItem], caller: Caller, runs: Runs, conversations: Conversations
) -> list[InputItem]:
    """The items with what references stand for. Raises RunNotFound for what is not the caller's."""
    resolved: list[InputItem] = []
    known: dict[str, Json] = {}
    loads = 0
    for item in reversed(items):  # the newest first: it brings those before it along
        if isinstance(item, ItemReference) and item.id.startswith((APPROVAL, ANSWER)):
            item = PastItem(type="mcp_approval_request")  # without effect, so never looked for
        elif isinstance(item, ItemReference):
            if item.id not in known:
                loads += 1
                if loads > HISTORIES:
                    raise Invalid("The input refers to too many histories.", param="input")
                known |= await _beside(item.id, caller, runs, conversations)
            if item.id not in known:
                raise RunNotFound(f"Item with id {item.id[:80]!r} not found.", param="input")
            try:
                item = INPUT.validate_python(known[item.id])
            except ValidationError as error:
                raise Invalid(
                    f"The item {item.id!r} cannot be sent again.", param="input"
                ) from error
        resolved.append(item)
    return resolved[::-1]


async def _beside(
    item_id: str, caller: Caller, runs: Runs, conversations: Conversations
) -> dict[str, Json]:
    """The items up to the end of the run that this one is of, by id."""
    try:
        run = await runs.get(caller, run_of(item_id) or "", "agent")
    except RunNotFound:
        return {}
    if not is_stored(run):
        return {}
    return {item["id"]: item for item in await history_of(run, caller, runs, conversations)}


async def _decide(
    decisions: Sequence[ApprovalResponse],
    previous: Run | None,
    chat: str | None,
    caller: Caller,
    runs: Runs,
    conversations: Conversations,
) -> Run:
    """Passes a person's answers on to the run that waits for them, and returns that run."""
    keys = [item.approval_request_id.removeprefix(APPROVAL) for item in decisions]
    if previous:
        asked = {key for key, _ in _questions(await runs.entries(previous))}
        if not asked.issuperset(keys):
            raise Invalid(
                "The previous response did not ask for this approval.",
                param="previous_response_id",
                status=400,
            )
    if chat and not await conversations.has_asked(caller, chat, keys):
        raise Invalid(
            "Nothing in this conversation asked for this approval.",
            param="conversation",
            status=400,
        )
    return await runs.decide(
        caller,
        [
            Decision(key, item.approve, item.reason)
            for key, item in zip(keys, decisions, strict=True)
        ],
    )


def _questions(entries: Sequence[Entry]) -> list[tuple[str, int]]:
    """Each key that was asked about, and the number of the response that asked."""
    pauses = [entry.event for entry in entries if isinstance(entry.event, RunPaused)]
    return [(key, leg) for leg, pause in enumerate(pauses, 1) for key in pause.keys]


def _leg_after(entries: Sequence[Entry], decisions: Sequence[ApprovalResponse]) -> int:
    """The number of the response that goes on with the answers."""
    key = decisions[-1].approval_request_id.removeprefix(APPROVAL)
    return 1 + dict(_questions(entries))[key]


def _whole(run: Run, leg: int, conversation: str | None, entries: Sequence[Entry]) -> JSONResponse:
    encoder = ResponseEncoder(run, leg, conversation)
    for entry in entries:
        encoder.feed(entry)
    last = entries[-1].event if entries else None
    wait = (last.error or {}).get("retry_after") if isinstance(last, RunEnded) else None
    headers = {"Retry-After": str(wait)} if wait else {}
    return JSONResponse(encoder.response(), headers=headers)


async def frames(
    runs: Runs,
    run: Run,
    leg: int = 1,
    conversation: str | None = None,
    after: int = -1,
    *,
    forget: Callable[[], Awaitable[None]] | None = None,
    alone: bool = False,
) -> AsyncIterator[bytes]:
    """The events numbered above `after`, as they come, and in between frames without any; then
    what is not to be stored is gone.
    `alone` is as in `Runs.follow`."""
    encoder = ResponseEncoder(run, leg, conversation)

    def written(events: Iterable[ResponseEvent]) -> bytes:
        return b"".join(frame(event) for event in events if encoder.number(event) > after)

    yield written(encoder.opening())
    async for entry in runs.follow(run, alone=alone):
        yield written(encoder.feed(entry))
        if encoder.ended:
            break
    if forget:
        await forget()


async def _forget(caller: Caller, run: Run, runs: Runs) -> None:
    """Deletes a run that is not to be stored, and those before it, once nothing needs it."""
    with suppress(RunNotFound):  # somebody was faster
        run = await runs.get(caller, run.id)
        if is_open(run) or run.finish_reason == "tool_call":
            return  # it waits for a person, or for its client's results
    await _drop(caller, run, runs)


async def _drop(caller: Caller, run: Run, runs: Runs) -> None:
    above: Run | None = run
    with suppress(RunNotFound):  # somebody was faster
        while above and not is_stored(above):
            parent_id = above.parent_id
            await runs.delete(caller, above.id)
            above = await runs.get(caller, parent_id) if parent_id else None

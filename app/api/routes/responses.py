"""OpenAI Responses: the native API of runs. A response is a run, seen through its log."""

import re
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic_ai.messages import UserContent

from app.api.deps import CallerDep, RunsDep
from app.api.options import (
    OBJECT,
    output_of,
    prompt_of,
    settings_of,
    tool_choice_of,
    tools_of,
)
from app.api.responses import ResponseEncoder, frame
from app.api.sse import EventStream
from app.core.errors import Invalid
from app.models import Run
from app.schemas.response import (
    ApprovalResponse,
    FunctionCallOutput,
    InputImage,
    InputItem,
    InputMessage,
    InputText,
    JsonFormat,
    JsonSchemaFormat,
    ResponseRequest,
    TextFormat,
)
from app.schemas.run import Options
from app.services.agent import BETWEEN
from app.services.conversation import Turn, text_of
from app.services.runs import Decision, Idempotency, NewRun, RunNotFound, Runs

router = APIRouter(prefix="/v1/responses", tags=["responses"])

PREFIX = "resp_"


@router.post("")
async def create_response(
    request: Request,
    body: ResponseRequest,
    caller: CallerDep,
    runs: RunsDep,
    idempotency_key: Annotated[str | None, Header(max_length=255)] = None,
) -> Response:
    """Asks an agent. The run goes on without its client; `background` does not wait for it."""
    if decisions := _decisions(body.input):
        run = await decide(body, decisions, caller, runs)
    else:
        new = read(body)
        if idempotency_key:
            new.idempotency = Idempotency.of("responses", idempotency_key, await request.body())
        run = await runs.accept(caller, new)
    if body.stream:
        return EventStream(frames(runs, run))
    entries = await (runs.entries(run) if body.background else runs.wait(run, pause=True))
    encoder = ResponseEncoder(run)
    for entry in entries:
        encoder.feed(entry)
    return JSONResponse(encoder.response())


@router.get("/{response_id}")
async def get_response(
    response_id: str,
    caller: CallerDep,
    runs: RunsDep,
    stream: bool = False,
    starting_after: Annotated[int | None, Query(ge=0)] = None,
    last_event_id: Annotated[int | None, Header(ge=0)] = None,
) -> Response:
    """The response as it is by now, or with `stream` its events above `starting_after`."""
    run = await runs.get(caller, run_id(response_id), "agent")
    encoder = ResponseEncoder(run)
    for entry in await runs.entries(run):
        encoder.feed(entry)
    if not stream:
        return JSONResponse(encoder.response())
    encoder.opening()  # these events are there before the first entry
    # A browser that comes back sends the header along with the address that it first came with.
    after = last_event_id if last_event_id is not None else starting_after
    if after is not None and after >= encoder.emitted:
        raise Invalid(
            f"The stream has {encoder.emitted} events so far; there is none numbered {after}.",
            param="starting_after",
            status=400,
        )
    return EventStream(frames(runs, run, -1 if after is None else after))


@router.post("/{response_id}/cancel")
async def cancel_response(response_id: str, caller: CallerDep, runs: RunsDep) -> Response:
    """Stops the run, and returns what it came to. An ended run stays as it is."""
    run = await runs.cancel(caller, run_id(response_id), "agent")
    encoder = ResponseEncoder(run)
    for entry in await runs.wait(run):
        encoder.feed(entry)
    return JSONResponse(encoder.response())


@router.delete("/{response_id}")
async def delete_response(response_id: str, caller: CallerDep, runs: RunsDep) -> dict[str, Any]:
    await runs.delete(caller, run_id(response_id), "agent")
    return {"id": response_id, "object": "response", "deleted": True}


def _decisions(items: str | Sequence[InputItem]) -> list[ApprovalResponse]:
    """The answers that the input ends with; those further up were given before."""
    decisions: list[ApprovalResponse] = []
    for item in reversed(items):
        if not isinstance(item, ApprovalResponse):
            break
        decisions.insert(0, item)
    return decisions


def run_id(response_id: str) -> str:
    """Raises RunNotFound for what cannot be one, before a database refuses to look for it."""
    if not re.fullmatch(f"{PREFIX}[0-9a-f]{{32}}", response_id):
        raise RunNotFound(f"No run {response_id.removeprefix(PREFIX)!r}.")
    return response_id.removeprefix(PREFIX)


async def frames(runs: Runs, run: Run, after: int = -1) -> AsyncIterator[bytes]:
    """The events numbered above `after`, as they come."""
    encoder = ResponseEncoder(run)
    opening = b"".join(frame(event) for event in encoder.opening() if encoder.number(event) > after)
    if opening:
        yield opening
    async for entry in runs.follow(run):
        events = encoder.feed(entry)
        chunk = b"".join(frame(event) for event in events if encoder.number(event) > after)
        if chunk:
            yield chunk


async def decide(
    body: ResponseRequest, decisions: list[ApprovalResponse], caller: CallerDep, runs: Runs
) -> Run:
    """Passes a person's answers on to the run that waits for them, and returns that run."""
    if body.previous_response_id is None:
        raise Invalid(
            "An approval needs the previous_response_id that asked.", param="previous_response_id"
        )
    run = await runs.get(caller, run_id(body.previous_response_id), "agent")
    return await runs.decide(
        caller,
        run.id,
        [
            Decision(item.approval_request_id.removeprefix("mcpr_"), item.approve, item.reason)
            for item in decisions
        ],
    )


def read(body: ResponseRequest) -> NewRun:
    """The run that a request asks for. Raises Invalid with the parameter at fault."""
    items = (
        [InputMessage(role="user", content=body.input)]
        if isinstance(body.input, str)
        else body.input
    )
    before, results = list(items), dict[str, str]()
    while before and isinstance(last := before[-1], FunctionCallOutput):
        results[last.call_id] = _text(last.output)
        before.pop()
    instructions = [body.instructions] if body.instructions else []
    instructions += [
        _text(item.content)
        for item in before
        if isinstance(item, InputMessage) and item.role in ("system", "developer")
    ]
    prompt: str | list[UserContent] = ""
    if not results:
        if not isinstance(last := before.pop(), InputMessage) or last.role != "user":
            raise Invalid("The input must end with a user's message.", param="input")
        prompt = prompt_of(last.content, "input")
    earlier, parent = _turns(before), body.previous_response_id
    if parent and earlier:
        raise Invalid(
            "With previous_response_id the server has the history; send what is new alone.",
            param="input",
        )
    # Looked at before they are echoed: they may be too deep for that.
    tools, output = tools_of(body.tools), _output(body.text and body.text.format)
    return NewRun(
        program=body.model,
        prompt=prompt,
        results=dict(reversed(results.items())),
        parent=run_id(parent) if parent else None,
        earlier=earlier,
        queue=body.background,
        options=Options(
            stream=body.stream or body.background,
            settings=settings_of(body),
            instructions="\n\n".join(instructions) or None,
            tools=tools,
            tool_choice=tool_choice_of(body.tool_choice, tools),
            echo=body.model_dump(
                mode="json", by_alias=True, exclude={"input", "model", "stream"}, exclude_unset=True
            ),
            **output,
        ),
    )


def _text(content: str | Sequence[InputText | InputImage]) -> str:
    return text_of(prompt_of(content, "input"))


def _turns(items: Sequence[InputItem]) -> list[Turn]:
    """The visible turns. All that one response gave out is one turn of the assistant, and the
    results of the caller's functions that stand together are one too."""
    turns: list[Turn] = []
    for item in items:
        match item:
            case InputMessage(role="user"):
                turn: Turn = ("user", _text(item.content))
            case InputMessage(role="assistant"):
                turn = ("assistant", _text(item.content))
            case InputMessage() | ApprovalResponse():
                continue
            case FunctionCallOutput():
                turn = ("tool", _text(item.output))
            case _:
                turn = ("assistant", "")
        role, text = turn
        if turns and role != "user" and turns[-1][0] == role:
            between = "\n" if role == "tool" else BETWEEN
            turns[-1] = (role, between.join(filter(None, (turns[-1][1], text))))
        else:
            turns.append(turn)
    return turns


def _output(form: TextFormat | JsonFormat | JsonSchemaFormat | None) -> dict[str, Any]:
    match form:
        case JsonSchemaFormat():
            return output_of(form.json_schema, form.name, "text.format")
        case JsonFormat():
            return {"output": OBJECT}
        case _:
            return {}

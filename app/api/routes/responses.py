"""OpenAI Responses: the native API of runs. A response is a run, seen through its log."""

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic_ai import BinaryContent
from pydantic_ai.messages import UserContent

from app.api.deps import CallerDep, RunsDep
from app.api.responses import ResponseEncoder, frame
from app.api.sse import EventStream
from app.core.errors import Invalid
from app.models import Run
from app.schemas.response import (
    ApprovalResponse,
    FunctionCallOutput,
    InputImage,
    InputMessage,
    JsonSchemaFormat,
    NamedFunction,
    ResponseRequest,
    TextFormat,
)
from app.schemas.run import ClientTool, Options
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
    if decisions := [item for item in body.input if isinstance(item, ApprovalResponse)]:
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
    after = starting_after if starting_after is not None else last_event_id
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


def run_id(response_id: str) -> str:
    if not response_id.startswith(PREFIX):
        raise RunNotFound(f"No response {response_id!r}.")
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
    results: dict[str, str] = {}
    instructions = [body.instructions] if body.instructions else []
    turns: list[tuple[Turn, str | list[UserContent]]] = []
    for item in items:
        match item:
            case FunctionCallOutput():
                results[item.call_id] = item.output
            case InputMessage(role="user" | "assistant" as role):
                prompt = _prompt(item)
                turns.append(((role, text_of(prompt)), prompt))
            case InputMessage():
                instructions.append(text_of(_prompt(item)))
            case _:
                pass
    prompt: str | list[UserContent] = ""
    if not results:
        if not turns or turns[-1][0][0] != "user":
            raise Invalid("The input must end with a user's message.", param="input")
        prompt = turns.pop()[1]
    elif turns:
        raise Invalid("Send function outputs without messages beside them.", param="input")
    parent = body.previous_response_id
    if parent and turns:
        raise Invalid(
            "With previous_response_id the server has the history; send the new message alone.",
            param="input",
        )
    return NewRun(
        program=body.model,
        prompt=prompt,
        results=results,
        parent=run_id(parent) if parent else None,
        earlier=[turn for turn, _ in turns],
        queue=body.background,
        options=Options(
            stream=body.stream or body.background,
            settings=_settings(body),
            instructions="\n\n".join(instructions) or None,
            tools=[ClientTool(**tool.model_dump(exclude={"type"})) for tool in body.tools],
            tool_choice=_tool_choice(body),
            echo=body.model_dump(
                mode="json", by_alias=True, exclude={"input", "model", "stream"}, exclude_unset=True
            ),
            **_output(body),
        ),
    )


def _prompt(message: InputMessage) -> str | list[UserContent]:
    if isinstance(message.content, str):
        return message.content
    parts: list[UserContent] = []
    for part in message.content:
        if not isinstance(part, InputImage):
            parts.append(part.text)
        elif part.image_url.startswith("data:"):
            try:
                parts.append(BinaryContent.from_data_uri(part.image_url))
            except ValueError as error:
                raise Invalid("That is no data URL of an image.", param="input") from error
        else:
            raise Invalid("Images are taken as data URLs; this server fetches none.", param="input")
    return parts


def _settings(body: ResponseRequest) -> dict[str, Any]:
    settings = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "max_tokens": body.max_output_tokens,
        "parallel_tool_calls": body.parallel_tool_calls,
    }
    return {name: value for name, value in settings.items() if value is not None}


def _tool_choice(body: ResponseRequest) -> str | list[str] | None:
    choice = body.tool_choice
    if isinstance(choice, NamedFunction):
        if choice.name not in [tool.name for tool in body.tools]:
            raise Invalid(
                f"tool_choice names {choice.name!r}, which is not in tools.", param="tool_choice"
            )
        return [choice.name]
    return None if choice == "auto" else choice


def _output(body: ResponseRequest) -> dict[str, Any]:
    form = body.text.format if body.text else None
    if form is None or isinstance(form, TextFormat):
        return {}
    if isinstance(form, JsonSchemaFormat):
        return {"output": form.json_schema, "output_name": form.name}
    return {"output": {"type": "object", "additionalProperties": True}}

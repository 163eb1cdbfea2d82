"""A Responses request in the words of a run."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic_ai.messages import UserContent

from app.api.options import (
    OBJECT,
    only,
    output_of,
    prompt_of,
    settings_of,
    tool_choice_of,
    tools_of,
)
from app.core.errors import Invalid
from app.models import Run
from app.schemas.response import (
    AllowedFunctions,
    ApprovalResponse,
    ConversationParam,
    FunctionCallOutput,
    InputContent,
    InputItem,
    InputMessage,
    InputText,
    ItemReference,
    JsonFormat,
    JsonSchemaFormat,
    PastItem,
    ResponseRequest,
    TextFormat,
)
from app.schemas.run import Options
from app.services.agent import BETWEEN
from app.services.conversation import Turn
from app.services.new_run import NewRun

Role = Literal["user", "assistant", "tool"]

ECHOED = {"input", "model", "stream"}  # all but these


def check(body: ResponseRequest) -> None:
    """Raises Invalid for what cannot go together."""
    if body.background and not body.store:
        raise Invalid("A background response is stored; leave store out.", param="store")
    if body.conversation and not body.store:
        raise Invalid("What belongs to a conversation is stored.", param="store")
    if body.conversation and body.previous_response_id:
        raise Invalid(
            "Send previous_response_id or conversation, not both.", param="previous_response_id"
        )


def chat_of(body: ResponseRequest) -> str | None:
    match body.conversation:
        case ConversationParam(id=name):
            return name
        case name:
            return name


def input_of(body: ResponseRequest) -> list[InputItem]:
    if isinstance(body.input, str):
        return [InputMessage(role="user", content=body.input)]
    return body.input


def split(
    items: Sequence[InputItem], *, all_new: bool
) -> tuple[list[ApprovalResponse], list[InputItem]]:
    """The answers to questions, and what else is new.

    Where the server has the history, all items are new. Else the answers count that the input
    ends with, and nothing beside them; those further up are history.
    """
    decisions: list[ApprovalResponse] = []
    if all_new:
        decisions += [item for item in items if isinstance(item, ApprovalResponse)]
        return decisions, [
            item for item in items if not isinstance(item, (ApprovalResponse, PastItem))
        ]
    for item in reversed(items):
        if not isinstance(item, ApprovalResponse):
            break
        decisions.append(item)
    return decisions[::-1], [] if decisions else list(items)


def standing_of(run: Run | None) -> list[str]:
    """The system messages in the run's history: unlike its instructions, they stay."""
    return Options.model_validate_json(run.options).echo.get("standing", []) if run else []


def read(
    body: ResponseRequest,
    items: Sequence[InputItem],
    *,
    parent: str | None = None,
    standing: Sequence[str] = (),
) -> NewRun:
    """The run that a request asks for. Raises Invalid with the parameter at fault."""
    heard = [
        (item.role, text_alone(item.content, "input"))
        for item in items
        if isinstance(item, InputMessage) and _instructs(item)
    ]
    before = [item for item in items if not _instructs(item)]
    results = dict[str, str]()
    while before and isinstance(last := before[-1], FunctionCallOutput):
        results[last.call_id] = text_alone(last.output, "input")
        before.pop()
    prompt: str | list[UserContent] = ""
    if not results:
        asked: list[InputMessage] = []
        while before and isinstance(last := before[-1], InputMessage) and last.role == "user":
            asked.append(last)
            before.pop()
        if not asked:
            raise Invalid("The input must end with a user's message.", param="input")
        prompt = _prompt(asked[::-1])
    earlier, chat = _turns(before), chat_of(body)
    if earlier and (parent or chat):
        raise Invalid(
            "The server has the history: send the user's new message alone, or the results of "
            "all functions that were called.",
            param="input",
        )
    # Looked at before they are echoed: they may be too deep for that.
    tools, output = tools_of(body.tools), _output(body.text and body.text.format)
    choice = body.tool_choice
    if isinstance(choice, AllowedFunctions):
        tools = only([tool.name for tool in choice.tools], tools)
        choice = [tool.name for tool in tools] if choice.mode == "required" else None
    else:
        choice = tool_choice_of(choice, tools)
    standing = [*standing, *(text for _, text in heard)]
    echo = body.model_dump(mode="json", by_alias=True, exclude=ECHOED, exclude_unset=True)
    if chat:
        echo["conversation"] = {"id": chat}
    if heard:
        echo["system"] = heard
    if standing:
        echo["standing"] = standing
    return NewRun(
        program=body.model,
        prompt=prompt,
        results=dict(reversed(results.items())),
        parent=parent,
        earlier=earlier,
        chat=chat,
        queue=body.background,
        options=Options(
            stream=body.stream or body.background,
            settings=_settings(body),
            instructions="\n\n".join(filter(None, [body.instructions, *standing])) or None,
            tools=tools,
            tool_choice=choice,
            max_tool_calls=body.max_tool_calls,
            echo=echo,
            **output,
        ),
        param="input",
    )


def _prompt(messages: Sequence[InputMessage]) -> str | list[UserContent]:
    contents = [prompt_of(message.content, "input") for message in messages]
    if len(contents) == 1:
        return contents[0]
    return [
        part
        for content in contents
        for part in ([content] if isinstance(content, str) else content)
    ]


def _instructs(item: InputItem) -> bool:
    return isinstance(item, InputMessage) and item.role in ("system", "developer")


def text_alone(content: str | Sequence[InputContent], param: str) -> str:
    """Raises Invalid for what is not text."""
    if not isinstance(content, str) and any(not isinstance(part, InputText) for part in content):
        raise Invalid(
            "Images and files go with a user's new message; this has to be text.",
            param=param,
            status=400,
        )
    return _readable(content)


def _readable(content: str | Sequence[InputContent]) -> str:
    """What a person would read of it."""
    if isinstance(content, str):
        return content
    return "\n".join(part.text for part in content if isinstance(part, InputText))


def _turns(items: Sequence[InputItem]) -> list[Turn]:
    """The visible turns. What stands together of one side is one turn: all that a response gave
    out, messages that were asked as one, results of the caller's functions."""
    turns: list[tuple[Role, list[str]]] = []
    for item in items:
        match item:
            case InputMessage(role="user"):
                role, text = "user", _readable(item.content)
            case InputMessage(role="assistant"):
                role, text = "assistant", _readable(item.content)
            case InputMessage() | ApprovalResponse() | ItemReference():
                continue
            case FunctionCallOutput():
                role, text = "tool", _readable(item.output)
            case _:
                role, text = "assistant", ""
        if not turns or turns[-1][0] != role:
            turns.append((role, []))
        turns[-1][1].append(text)
    return [
        (role, (BETWEEN if role == "assistant" else "\n").join(filter(None, texts)))
        for role, texts in turns
    ]


def _settings(body: ResponseRequest) -> dict[str, Any]:
    settings = settings_of(body)
    if body.reasoning and body.reasoning.effort:
        settings["openai_reasoning_effort"] = body.reasoning.effort
    if body.text and body.text.verbosity:
        settings["openai_text_verbosity"] = body.text.verbosity
    return settings


def _output(form: TextFormat | JsonFormat | JsonSchemaFormat | None) -> dict[str, Any]:
    match form:
        case JsonSchemaFormat():
            return output_of(form.json_schema, form.name, "text.format")
        case JsonFormat():
            return {"output": OBJECT}
        case _:
            return {}

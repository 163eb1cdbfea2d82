"""What the demo model answers to a chat: calls of tools, JSON of a schema, or words."""

import re
from dataclasses import dataclass, field
from json import JSONDecoder

from pydantic import BaseModel, Field, JsonValue
from pydantic_core import from_json, to_json

from app.services.demo_choosing import Call, Function, guesses, plan
from app.services.demo_filling import fill
from app.services.demo_reading import Reading, Table, read_json, read_result, read_text
from app.services.demo_schemas import Schema, member

RESULT = 1_500  # characters of a tool's result that are told


class Tool(BaseModel):
    """An entry of `tools`; kinds other than functions have none."""

    function: Function | None = None


class Called(BaseModel):
    """The function of an earlier call, its arguments as JSON text."""

    name: str = ""
    arguments: str = ""


class EarlierCall(BaseModel):
    """A call that an assistant message made."""

    id: str = ""
    function: Called = Called()


class Message(BaseModel):
    """One message; `content` is a text, a list of parts, or missing."""

    role: str
    content: JsonValue = None
    tool_calls: list[EarlierCall] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """The text, that of several parts joined by lines; images and the like left out."""
        if isinstance(self.content, list):
            parts = [part.get("text") for part in self.content if isinstance(part, dict)]
            return "\n".join(part for part in parts if isinstance(part, str))
        return self.content if isinstance(self.content, str) else ""


class Chat(BaseModel):
    """What a request asks of a model."""

    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] | None = None
    tool_choice: JsonValue = None
    response_format: dict[str, JsonValue] | None = None

    @property
    def functions(self) -> list[Function]:
        """The functions on offer."""
        return [tool.function for tool in self.tools or [] if tool.function]

    @property
    def wanted(self) -> str | None:
        """The name of the one function that must be called, if one must."""
        choice = self.tool_choice if isinstance(self.tool_choice, dict) else {}
        name = member(choice, "function").get("name")
        return str(name) if choice.get("type") == "function" else None


@dataclass(frozen=True, slots=True)
class Answer:
    """Either calls or a text, never both."""

    text: str = ""
    calls: list[Call] = field(default_factory=list[Call])


@dataclass(slots=True)
class Turn:
    """The last prompt and what was called and said since."""

    prompt: str
    calls: list[Called]
    results: list[tuple[str, str]]
    """Name of the tool and what it said."""
    before: str
    """The tool last called before the prompt, or ""."""


def answer(chat: Chat) -> Answer:
    """The same answer to the same chat; every text says that it is from the demo model."""
    turn = _turn(chat.messages)
    schema, fenced = _schema(chat)
    outputs = [each for each in chat.functions if _is_output(each)]
    others = [each for each in chat.functions if not _is_output(each)]
    if chat.wanted:
        chosen = [each for each in chat.functions if each.name == chat.wanted]
        return Answer(calls=[_forced(chosen, turn)])
    needs: list[str] = []
    if chat.functions and chat.tool_choice != "none":
        made = [call.name for call in turn.calls]
        calls, needs = plan(others, turn.prompt, made, turn.before)
        if calls:
            return Answer(calls=calls)
        must = chat.tool_choice == "required"
        if outputs and (must or turn.results):
            return Answer(calls=[_forced(outputs, turn)])
        if must:
            return Answer(calls=[_forced(others, turn)])
    if schema is not None:
        filled = _spoken(fill(schema, _evidence(turn)).value, turn)
        content = to_json(filled, inf_nan_mode="null").decode()
        return Answer(f"```json\n{content}\n```" if fenced else content)
    return Answer(_prose(turn, needs, others))


def _turn(messages: list[Message]) -> Turn:
    asked = {
        index
        for index, message in enumerate(messages)
        if message.role == "user" and not _is_feedback(message.text)
    }
    last = max(asked, default=-1)
    first = last
    while first - 1 in asked:
        first -= 1
    block = messages[first : last + 1] if asked else messages
    turn = Turn("\n".join(message.text for message in block), [], [], "")
    called: dict[str, str] = {}
    for index, message in enumerate(messages):
        for call in message.tool_calls or []:
            called[call.id] = call.function.name
            if index > last:
                turn.calls.append(call.function)
            else:
                turn.before = call.function.name
        if message.role == "tool" and index > last:
            turn.results.append((called.get(message.tool_call_id or "", "tool"), message.text))
    return turn


_VALIDATION = re.compile(
    r"\s*(?:validation (?:errors?|feedback)\b|\d+ validation error)", re.IGNORECASE
)
_AGAIN = re.compile(
    r"fix the errors and try again|function correctly, fix the errors|correct your json only",
    re.IGNORECASE,
)


def _is_feedback(text: str) -> bool:
    """Whether a message only tells that the last answer did not fit a schema."""
    return bool(_VALIDATION.match(text) or _AGAIN.search(text[:200] + text[-200:]))


def _is_output(function: Function) -> bool:
    """Whether calling this ends the conversation, as with PydanticAI's output tools."""
    said = (function.description or "").lower()
    return function.name.startswith("final_result") or "final response which ends" in said


def _evidence(turn: Turn) -> Reading:
    """What the results say, then the arguments that led to them, then the prompt."""
    told = [read_result(said) for _, said in turn.results if _error(said) is None]
    reading = Reading()
    for each in told:
        reading = reading.then(each)
    if rows := [each.facts for each in told if each.facts]:
        reading.tables.append(Table(frozenset(), rows))
    for call in turn.calls if told else []:
        reading = reading.then(Reading(read_json(_json(call.arguments)).facts))
    return reading.then(read_text(turn.prompt))


def _json(text: str) -> JsonValue:
    try:
        return from_json(text, allow_inf_nan=False)
    except ValueError:
        return None


def _schema(chat: Chat) -> tuple[Schema | None, bool]:
    """The schema to answer in, if any, and whether in a fenced block, as no format was set."""
    form = chat.response_format or {}
    if form.get("type") == "json_schema":
        return member(member(form, "json_schema"), "schema"), False
    described = _described(chat.messages)
    if form.get("type") == "json_object":
        return described or {"properties": {"answer": {}}, "required": ["answer"]}, False
    return described, described is not None


def _described(messages: list[Message]) -> Schema | None:
    """The first JSON Schema of an object that the instructions quote."""
    for message in messages:
        if message.role not in {"system", "developer"}:
            continue
        text, start = message.text[:100_000], 0
        for _ in range(20):
            start = text.find("{", start)
            if start < 0:
                break
            try:
                _, end = JSONDecoder().raw_decode(text, start)
                schema = _json(text[start:end])
                start = end
            except (ValueError, RecursionError):
                start += 1
                continue
            if isinstance(schema, dict) and ("properties" in schema or "$defs" in schema):
                return schema
    return None


def _forced(functions: list[Function], turn: Turn) -> Call:
    """A call of the one of `functions` that most is found for."""
    evidence = _evidence(turn)
    plain = all(fact.weak for fact in evidence.facts)
    filled = [
        (fill(each.parameters or {}, evidence, guesses(each, turn.prompt) if plain else None), each)
        for each in functions
    ]
    best, function = max(filled, key=lambda pair: pair[0].found - len(pair[0].missing))
    return Call(function.name, _spoken(best.value, turn))


def _spoken(value: JsonValue, turn: Turn) -> JsonValue:
    """`value` with prose in what should be the model's own words and, after a failure, in all
    strings that were left empty.
    """
    if not isinstance(value, dict):
        return value
    failed = any(_error(said) and not _VALIDATION.match(said) for _, said in turn.results)
    own = {"response", "answer", "reply"}
    return {
        key: _prose(turn, [], []) if each == "" and (failed or key in own) else each
        for key, each in value.items()
    }


def _prose(turn: Turn, needs: list[str], functions: list[Function]) -> str:
    told = [_told(name, said) for name, said in turn.results]
    told += [f"I need more: {need}." for need in needs]
    if told:
        return "Demo model: " + "\n".join(told)
    offer = ", ".join(each.name for each in functions[:50])
    return (
        f"Demo model: you said “{_short(turn.prompt, 120)}”. I only choose tools and copy values"
        " by fixed rules; set MODEL and OPENAI_API_KEY for a real model."
    ) + (f" Tools on offer: {offer}." if offer else "")


_FAILED = re.compile(
    r"\b(?:could not|couldn't|cannot|can't|unable to|failed|failure|errors?|denied|refused"
    r"|not found|timed? ?out|unavailable|unreachable|not available|try again|rejected"
    r"|no \w+ named|unknown)\b",
    re.IGNORECASE,
)


def _told(name: str, said: str) -> str:
    """A tool's result as a sentence; one that reports a failure is quoted."""
    error = _error(said)
    if error is not None:
        return f"{name} did not succeed; it said: “{_short(error, RESULT)}”"
    value = _json(said)
    told = _short(_plain(value) if isinstance(value, dict | list) else said, RESULT)
    return f"{name} says {told}." if told else f"{name} is done and says nothing more."


def _error(said: str) -> str | None:
    """The failure that a tool's result reports, or None."""
    value = _json(said)
    if isinstance(value, dict) and value.get("error"):
        return _plain(value["error"])
    if value is None and _FAILED.search(said[:200]):
        return said.strip().removesuffix("Fix the errors and try again.")
    return None


def _short(text: str, most: int) -> str:
    text = " ".join(text[: 2 * most].split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _plain(value: JsonValue, depth: int = 0) -> str:
    """A JSON value as "key: value" text."""
    if depth > 8:
        return "…"
    if isinstance(value, dict):
        parts = [(key.replace("_", " "), _plain(each, depth + 1)) for key, each in value.items()]
        text = ", ".join(f"{key}: {each}" for key, each in parts)
        return f"({text})" if depth else text
    if isinstance(value, list):
        return ", ".join(_plain(each, depth + 1) for each in value[:50]) or "nothing"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return str(value)

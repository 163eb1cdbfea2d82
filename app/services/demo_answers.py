"""What the demo model answers to a chat: calls of tools, JSON of a schema, or words."""

import json
import re
from textwrap import shorten

from pydantic import BaseModel, Field, JsonValue
from pydantic_core import from_json, to_json

from app.services.demo_filling import (
    Schema,
    elements,
    fill,
    guess,
    member,
    quotes,
    read,
    words,
)

PROMPT = 4_000  # characters of a prompt in which tools are looked for
RESULT = 1_500  # characters of a tool's result that are told

Call = tuple[str, str]  # a function's name and its arguments as JSON

_JOINT = re.compile(r"(?=\band\b|\bthen\b)|(?<=[.?!]\s)")
_ASIDE = re.compile(r"\b(?:tell|give|show|get|let|help) me\b|\bmy \w{1,30} is\b", re.IGNORECASE)
_WHO = re.compile(r"\bwho (?:am i|i am)\b", re.IGNORECASE)
_MINE = re.compile(r"(?<![^\W_])(?:me|my|mine|myself)(?![^\W_])", re.IGNORECASE)
_TOLD = re.compile(r"\bmy (\w{1,30}) is\b[^.?!\n]*", re.IGNORECASE)
_ASKED = re.compile(r"\b(?:what|which|who) is my (\w{1,30})\b", re.IGNORECASE)
_FAILED = re.compile(r"could not|cannot|failed|denied|not found|unknown|try again", re.IGNORECASE)


class Chat(BaseModel):
    """Body of `POST chat/completions`; what the demo model does not read is ignored."""

    messages: list[Schema] = Field(min_length=1)
    tools: list[Schema] | None = None
    tool_choice: JsonValue = None
    response_format: Schema | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stream: bool | None = None
    stream_options: Schema | None = None

    @property
    def must_call(self) -> bool:
        """Whether only a call will do."""
        return self.tool_choice not in (None, "auto", "none")

    @property
    def offered(self) -> list[Schema]:
        """The functions that may be called."""
        name = member(self.tool_choice, "function").get("name")
        tools = [member(tool, "function") for tool in self.tools or []]
        may = [tool for tool in tools if tool.get("name") and name in (None, tool["name"])]
        return [] if self.tool_choice == "none" else may


def answer(chat: Chat) -> str | list[Call]:
    """The same answer to the same chat: calls or text. Prose says that it is the demo model's."""
    asked = [at for at, message in enumerate(chat.messages) if message.get("role") == "user"]
    last = max(asked, default=0)
    prompt, since = _text(chat.messages[last]), chat.messages[last + 1 :]
    earlier = [call for message in since for call in elements(message, "tool_calls")]
    names = {str(member(call).get("id")): member(call, "function").get("name") for call in earlier}
    answers = [message for message in since if message.get("role") == "tool"]
    results = [_json(_text(message)) for message in answers]
    tellers = [str(names.get(str(message.get("tool_call_id")), "It")) for message in answers]
    # PydanticAI's output tools end the conversation.
    outputs = [tool for tool in chat.offered if str(tool["name"]).startswith("final_result")]
    others = [tool for tool in chat.offered if tool not in outputs]
    recalled = _recalled(prompt[:PROMPT], [_text(chat.messages[at]) for at in asked[:-1]])
    free = not results and not recalled and not isinstance(chat.tool_choice, dict)
    if free and (calls := _plan(others, prompt[:PROMPT])):
        return calls
    told = [f"{name} {_says(value)}" for name, value in zip(tellers, results, strict=True)]
    prose = "Demo model: " + ("\n".join(told) or recalled or _introduction(prompt, others))
    if chat.must_call or (outputs and results):
        tool = [*outputs, *others][0]
        schema = member(tool, "parameters")
        value = _filled(schema, prompt, results, prose if outputs else "")
        return [(str(tool["name"]), _dump(value))]
    form = chat.response_format or {}
    if form.get("type") not in ("json_object", "json_schema"):
        return prose
    schema = member(form, "json_schema", "schema")
    value = _filled(schema, prompt, results, prose if results else "")
    return _dump(value if schema else {"answer": prose})


def _text(message: Schema) -> str:
    """The text of a message, that of several parts joined by lines; images left out."""
    parts = elements(message, "content") or [{"text": message.get("content")}]
    texts = [member(part).get("text") for part in parts]
    return "\n".join(text for text in texts if isinstance(text, str))


def _json(text: str) -> JsonValue:
    """The value that a text is the JSON of, else the text."""
    try:
        return from_json(text, allow_inf_nan=False)
    except ValueError:
        return text


def _dump(value: Schema) -> str:
    return to_json(value, inf_nan_mode="null").decode()


def _plan(tools: list[Schema], prompt: str) -> list[Call]:
    """The calls that a prompt asks for: for each of its parts the tool that it names best."""
    parts: list[tuple[Schema, str]] = []
    for piece in _JOINT.split(prompt)[:30] if tools else ():
        best = max(tools, key=lambda tool: _likeness(tool, piece))
        if _likeness(best, piece)[0] >= 3:
            parts.append((best, piece))
        elif parts:
            parts[-1] = parts[-1][0], parts[-1][1] + piece
    calls: list[Call] = []
    for tool, part in parts:
        calls += [call for call in _calls(tool, part) or _calls(tool, prompt) if call not in calls]
    return calls


def _likeness(tool: Schema, text: str) -> tuple[int, int]:
    """How much of a tool's name and description a text names; from 3 on it is meant."""
    text = _ASIDE.sub(" ", _WHO.sub("my account", text))
    name, about = str(tool["name"]), str(tool.get("description"))[:500]
    own, said = words(name), words(text)
    mine = bool(_MINE.search(text) and _MINE.search(name))
    score = 3 * len(own & said) + 2 * len((words(about) - own) & said) + mine
    return score, -len(elements(member(tool, "parameters"), "required"))


def _calls(tool: Schema, text: str) -> list[Call]:
    """Calls with the arguments that `text` names; none if it lacks what the tool requires."""
    schema, verb = member(tool, "parameters"), str(tool.get("description")).partition(" ")[0]
    required = [str(name) for name in elements(schema, "required")]
    guesses = guess(text, words(f"{tool['name']} {verb}"))
    names = [each for _, each in guesses if isinstance(each, str)]
    labelled = [fact for fact in read(text) if fact[1] not in names]
    value, whole = fill(schema, [*labelled, *guesses], text)
    joined = len(required) == 1 and value.get(required[0]) in names[:1] and " and " in text
    several = [value | {required[0]: name} for name in names] if joined else [value]
    return [(str(tool["name"]), _dump(each)) for each in several] if whole else []


def _filled(schema: Schema, prompt: str, results: list[JsonValue], told: str) -> Schema:
    """An object from what tools said, then from the prompt, with `told` in its empty texts."""
    said = [value for value in results if not _error(value)]
    facts = [fact for value in said for fact in read(value)]
    facts += [(frozenset(), said)] if len(said) > 1 else []
    facts += read(prompt) or ([] if results else guess(prompt[:PROMPT], frozenset()))
    properties = member(schema, "properties")
    if properties.keys() == {"data", "evidence"}:
        bare: Schema = {**schema, "properties": {"data": properties["data"]}, "required": ["data"]}
        value, _ = fill(bare, facts, prompt)
        return {**value, "evidence": [*quotes(value["data"], prompt)]}
    value, _ = fill(schema, facts, prompt)
    return {key: told if each == "" else each for key, each in value.items()}


def _recalled(prompt: str, earlier: list[str]) -> str:
    """What the user said of themselves before and asks for now."""
    asked = {subject.lower() for subject in _ASKED.findall(prompt)}
    for text in reversed(earlier):
        for told in _TOLD.finditer(text[:PROMPT]):
            if told[1].lower() in asked:
                return f"you said “{shorten(told[0], 120, placeholder='…')}”."
    return ""


def _introduction(prompt: str, tools: list[Schema]) -> str:
    said, offer = shorten(prompt[:500], 120, placeholder="…"), [tool["name"] for tool in tools[:50]]
    return (
        f"you said “{said}”. I only choose tools and copy values by fixed rules; set MODEL and"
        f" OPENAI_API_KEY for a real model. Tools on offer: {', '.join(map(str, offer)) or 'none'}."
    )


def _error(value: JsonValue) -> JsonValue:
    """What a tool's result reports as its failure, or None."""
    if isinstance(value, str) and _FAILED.search(value[:200] + value[-200:]):
        return value.strip().removesuffix("Fix the errors and try again.").strip()
    return member(value).get("error")


def _says(value: JsonValue) -> str:
    """A tool's result as a predicate, one that is a failure quoted."""
    shown = _error(value) or value
    text = shown if isinstance(shown, str) else json.dumps(shown, ensure_ascii=False)
    text = re.sub(r"[][{}\"]", "", text)[:RESULT]
    return f"did not succeed; it said: “{text}”" if _error(value) else f"says {text}."

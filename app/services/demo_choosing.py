"""Which tools a prompt asks for, and with which arguments."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from pydantic import BaseModel, JsonValue

from app.services.demo_filling import Filled, Guesses, fill
from app.services.demo_reading import (
    QUOTED,
    Words,
    groups,
    is_stop,
    names,
    numbers,
    read_text,
    stem,
    tokens,
    words,
)
from app.services.demo_schemas import Schema, branches, elements, member

PROMPT = 4_000  # characters of a prompt in which tools are looked for


class Function(BaseModel):
    """A tool on offer."""

    name: str
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """A tool to call and its arguments."""

    name: str
    arguments: JsonValue


_ALIKE = groups(
    "me my mine myself caller account profile own self whoami",
    "change update set rename edit modify correct",
    "remove delete erase drop",
    "create add make register",
    "send post",
    "cancel revoke",
    "buy purchase",
    "find search lookup",
    "weather forecast rain sunny snow hot cold warm wind temperature",
    "email mail",
    "location city place town",
)
_ME = stem("me")
_ACTIONS = frozenset(map(stem, ("change", "remove", "create", "send", "cancel", "buy")))
_PERSONAL = frozenset(map(stem, ("name", "email", "age", "address", "phone", "username", "role")))
_ASIDE = re.compile(
    r"\b(?:tell|give|show|send|get|let|help|find|remind|bring|for|to|with) me\b"
    r"|^\W*(?:(?:hi|hello|hey)\W+)?my (?:\w+ ){1,2}is\b",
    re.IGNORECASE,
)
_WHO = re.compile(
    r"\bwho (?:am i|i am)\b|\b(?:about me|my (?:own )?(?:account|profile))\b", re.IGNORECASE
)
_JOINT = re.compile(r"([.?!;](?=\s|$)|\n)|,|&|\b(?:and|then|also|plus)\b", re.IGNORECASE)
_FOLLOWS = re.compile(r"^\W*(?:and|or|what about|how about|now|same for)\b", re.IGNORECASE)
_LISTING = re.compile(r" ?(?:,|&|,? ?\b(?:and|or|vs|versus|with)\b)(?: (?:in|for|of|to|the))* ?")
_OBJECT = re.compile(
    r"\b(?:in|for|of|to|about|near|named|called) (?:the )?([^?.!;\n]{1,80})", re.IGNORECASE
)


def _about(text: str) -> Words:
    return frozenset(word for word in words(text, _ALIKE, frozenset()) if not is_stop(word))


def _verb(function: Function) -> Words:
    return _about(" ".join(tokens(function.name)[:1]))


def _likeness(function: Function, segment: str) -> float:
    """How much of a tool's name and description a segment names; 3 is enough to call it."""
    if len(function.name) > 3 and re.search(rf"\b{re.escape(function.name)}\b", segment):
        return 100
    said = _about(_ASIDE.sub(" ", segment))
    own, told = _about(function.name), _about((function.description or "")[:1_000])
    if (_verb(function) & _ACTIONS) - said:
        return 0
    literal = set(map(stem, tokens(function.name))) & set(map(stem, tokens(segment)))
    score = 3.0 * len((own & said) - {_ME}) + 0.5 * len(literal)
    score += min(3, len((told & said) - own - {_ME}))
    score += min(1, len(_about(" ".join(member(function.parameters or {}, "properties"))) & said))
    mine = _ME in said or _WHO.search(segment) is not None
    if mine and _ME in own | told and said & _ACTIONS <= _verb(function):
        score += 3 if _WHO.search(segment) or said & _PERSONAL else 2
    return score


def plan(
    functions: list[Function], prompt: str, made: list[str], before: str
) -> tuple[list[Call], list[str]]:
    """The calls that a prompt asks for, and what others would still need.

    Leaves out as many calls of a tool as its name comes in `made`. `before` is the tool that was
    called before the prompt: "And in Paris?" is for that one.
    """
    prompt = prompt[:PROMPT]
    calls: list[Call] = []
    needs: list[str] = []
    for function, segment in _segments(functions, prompt, before):
        found, missing = _calls(function, segment, prompt)
        calls += [call for call in found if call not in calls]
        needs += missing
    left: list[Call] = []
    done = Counter(made)
    for call in calls:
        done[call.name] -= 1
        if done[call.name] < 0:
            left.append(call)
    return left, needs


def _segments(
    functions: list[Function], prompt: str, before: str
) -> Iterable[tuple[Function, str]]:
    """Each tool that a part of the prompt is about, with that part."""
    found: list[tuple[Function, int, int]] = []
    start, ended = 0, True
    for joint in [*islice(_JOINT.finditer(prompt), 50), None]:
        end = joint.start() if joint else len(prompt)
        segment = prompt[start:end]
        scored = [(_likeness(each, segment), -index) for index, each in enumerate(functions)]
        best, place = max(scored, default=(0, 0))
        if best >= 3:
            found.append((functions[-place], start, end))
        elif found and not ended:
            found[-1] = (found[-1][0], found[-1][1], end)
        start, ended = (joint.end(), joint[1] is not None) if joint else (end, True)
    if not found and _FOLLOWS.match(prompt):
        found = [(each, 0, len(prompt)) for each in functions if each.name == before]
    return [(function, prompt[start:end]) for function, start, end in found]


def _calls(function: Function, segment: str, prompt: str) -> tuple[list[Call], list[str]]:
    """Calls with arguments from the segment, else from the prompt; or what is missing."""
    schema = function.parameters or {}
    filled = Filled({})
    for text in (segment, prompt):
        offer = guesses(function, text)
        subjects = list(offer.subjects)
        filled = fill(schema, read_text(text), offer)
        idle = not filled.found and _verb(function) & _ACTIONS and member(schema, "properties")
        if not filled.missing and not idle:
            lone = _lone(schema)
            value = filled.value
            if not lone or not isinstance(value, dict):
                return [Call(function.name, value)], []
            several = _listed(text, subjects, str(value[lone]))
            return [Call(function.name, {**value, lone: each}) for each in several], []
    missing = filled.missing or list(member(schema, "properties"))
    return [], [f"{function.name} needs {_needed(schema, name)}" for name in missing]


def guesses(function: Function, text: str) -> Guesses:
    """What `text` offers as arguments, apart from the words that name the tool itself."""
    text = text[:PROMPT]
    own = frozenset(map(stem, tokens(function.name)))
    subjects = names(text, own)
    if not subjects and (match := list(_OBJECT.finditer(text))):
        rest = [_bare(part, own) for part in re.split(r",| and ", match[-1][1])]
        subjects = [part for part in rest if part]
    return Guesses(subjects, numbers(text), _phrase(text, own | _about(function.name)))


def _listed(text: str, subjects: list[str], first: str) -> list[str]:
    """`first` and the subjects that "and" joins to it; "Tokyo, Japan" stays one."""
    listed, end = [first], text.find(first) + len(first)
    for subject in subjects[subjects.index(first) + 1 :] if first in subjects else []:
        start = text.find(subject, end)
        if not _LISTING.fullmatch(text[end:start]):
            break
        listed.append(subject)
        end = start + len(subject)
    pair = ", ".join(listed)
    return [pair] if len(listed) == 2 and pair in text else listed


def _bare(text: str, besides: Words) -> str:
    """`text` without grammar at its ends; "" if it is about the speaker or the tool."""
    parts = text.split()
    while parts and is_stop(parts[-1]):
        parts.pop()
    while parts and is_stop(parts[0]):
        parts.pop(0)
    own = not parts or parts[0].lower() in {"my", "me", "your"}
    return "" if own or {stem(part) for part in parts} <= besides else " ".join(parts)


def _phrase(text: str, besides: Words) -> str:
    """The part of a sentence that a search or a message would be made of."""
    if quoted := QUOTED.search(text):
        return quoted.group()[1:-1]
    if match := re.search(
        r"(?:\b(?:for|about|that|saying|named|called)|:)\s+(.+)", text, re.DOTALL
    ):
        return match[1].strip(" ?.!\n")
    parts = text.split()
    while parts and _about(parts[0]) <= besides:
        parts.pop(0)
    return " ".join(parts).strip(" ?.!")


def _lone(schema: Schema) -> str | None:
    """The only required argument, if any plain string will do for it."""
    required = elements(schema, "required")
    if len(required) != 1:
        return None
    options, _ = branches(member(schema, "properties").get(str(required[0])), schema)
    plain = options[0].get("type") == "string" and not {"enum", "format", "pattern"} & set(
        options[0]
    )
    return str(required[0]) if plain else None


def _needed(schema: Schema, name: str) -> str:
    said = member(member(schema, "properties"), name).get("description")
    return f"{name} ({said})" if isinstance(said, str) else name

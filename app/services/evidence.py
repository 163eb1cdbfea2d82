"""Which words of the text each value comes from: quotes are found in it, never believed."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from app.schemas.extraction import Evidence
from app.services.json_schema import Fault, Json, moved, pointer
from app.services.places import Place
from app.services.source import Source, Span

Status = Literal["grounded", "ungrounded"]

CLAIMS = 8  # of one value that are looked at, the first ones
SHOWN = 100  # characters of a quote or a value in a message


def asked(schema: Json) -> Json:
    """The schema shown to the model: the document in `data`, and in `evidence` its quotes."""
    bare = {name: value for name, value in schema.items() if name not in ("$schema", "$id")}
    claim = {
        "type": "object",
        "properties": {
            "path": {
                "type": "string",
                "description": "JSON Pointer of one value inside data, from data's own root, "
                "such as /lines/0/price; empty if data itself is the value.",
            },
            "quote": {
                "type": "string",
                "description": "The words of the text that state the value, copied character by "
                "character: nothing translated, corrected or left out.",
            },
        },
        "required": ["path", "quote"],
        "additionalProperties": False,
    }
    quotes = {
        "type": "array",
        "description": "One quote for every value in data that is not null or empty.",
        "items": claim,
    }
    return {
        "type": "object",
        "properties": {"data": moved(bare, "#/properties/data"), "evidence": quotes},
        "required": ["data", "evidence"],
        "additionalProperties": False,
    }


@dataclass(frozen=True, slots=True)
class Grounding:
    """What the text says of a document: `status` has every value but null and "".

    faults: what the model can mend, at the pointer of the value.
    """

    evidence: list[Evidence]
    status: dict[str, Status]
    faults: list[Fault]


def ground(
    data: Any,
    claims: Sequence[Mapping[str, Any]],
    text: str,
    schema: Json | None,
    *,
    required: bool,
) -> Grounding:
    """Finds each claim's quote in the text, and its value in the quote.

    The words of an enum or a const, and true and false, are the schema's own: they need a true
    quote, but need not be in it. A text is in it as a text, a date by its day, and a number by its
    value; so is a text that is a number where the schema takes either, as for a Decimal. With
    `required` every value needs a claim, but for null and "", which no text can say. A quote of
    these, of an array or of an object grounds nothing; if it is true it is kept.

    Of each path the first CLAIMS claims are looked at. What all of them may take is bounded
    (source.EFFORT); those behind are the fault too_much_evidence.
    """
    parts = {part.path: part for part in _walk(data, Place(schema or {}))}
    source = Source(text)
    wanted, faults = _sorted(claims, parts)
    found, unknown = _located(wanted, parts, source), list[Fault]()
    evidence: list[Evidence] = []
    status: dict[str, Status] = {
        path: "ungrounded" for path, part in parts.items() if part.is_value
    }
    wrong: dict[str, list[Fault]] = {}
    for path, quote in wanted:
        part, span = parts.get(path), found.get((path, quote))
        if span is None:
            fault = _too_much(path) if source.is_spent else _not_in_source(path, quote)
            wrong.setdefault(path, []).append(fault)
        elif part is None:
            message = f"data has no value here; it was given the quote {_shown(quote)}"
            unknown.append(Fault(path, "path_unknown", message))
        elif (
            not part.is_value
            or part.is_own
            or source.says(span, part.value, by_value=part.place.is_number)
        ):
            evidence.append(_evidence(path, quote, span, text))
            if part.is_value:
                status[path] = "grounded"
        else:
            fault = _too_much(path) if source.is_spent else _not_in_quote(part, quote)
            wrong.setdefault(path, []).append(fault)
    for path, each in wrong.items():
        faults += each if status.get(path) != "grounded" else []
    missing = [path for path in status if status[path] == "ungrounded" and path not in wrong]
    if required and missing:
        faults += unknown
        faults += [
            Fault(path, "quote_missing", "evidence has no quote for this") for path in missing
        ]
    return Grounding(evidence, status, faults)


def nulled(data: Any, pointers: Iterable[str]) -> Any:
    """A copy with null at these places; pointers that name nothing are passed over."""
    gone = frozenset(pointers)

    def kept(value: Any, path: str) -> Any:
        if path in gone:
            return None
        if isinstance(value, dict):
            return {
                key: kept(item, path + pointer([key])) for key, item in cast(Json, value).items()
            }
        if isinstance(value, list):
            items = cast(list[Any], value)
            return [kept(item, f"{path}/{index}") for index, item in enumerate(items)]
        return value

    return kept(data, "")


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of the document. `item`: the innermost object in a list that it belongs to."""

    path: str
    value: Any
    item: str
    place: Place

    @property
    def is_value(self) -> bool:
        """Whether it is something that a text can say."""
        return self.value not in (None, "") and not isinstance(self.value, (dict, list))

    @property
    def is_own(self) -> bool:
        """Whether the words are the schema's."""
        return isinstance(self.value, bool) or self.place.spells_out(self.value)


def _walk(data: Any, root: Place) -> Iterator[_Part]:
    """Every part of the document, in its order."""

    def below(value: Any, path: str, item: str, place: Place) -> Iterator[_Part]:
        yield _Part(path, value, item, place)
        if isinstance(value, dict):
            for key, child in cast(Json, value).items():
                yield from below(child, path + pointer([key]), item, place.member(key))
        elif isinstance(value, list):
            for index, child in enumerate(cast(list[Any], value)):
                here = f"{path}/{index}"
                its = here if isinstance(child, dict) else item
                yield from below(child, here, its, place.element(index))

    return below(data, "", "", root)


def _sorted(claims: Any, places: Mapping[str, _Part]) -> tuple[list[tuple[str, str]], list[Fault]]:
    """The claims as (path, quote), each once, in the order of the document."""
    faults: list[Fault] = []
    found: dict[tuple[str, str], None] = {}
    counts = Counter[str]()
    if not isinstance(claims, Sequence) or isinstance(claims, str):
        return [], [Fault("", "invalid_evidence", "evidence must be a list of path and quote")]
    for index, claim in enumerate(cast(Sequence[Any], claims)):
        each = cast(Json, claim if isinstance(claim, Mapping) else {})
        path, quote = each.get("path"), each.get("quote")
        if isinstance(path, str) and isinstance(quote, str):
            wanted = _path(path, places), quote
            if wanted not in found and counts[wanted[0]] < CLAIMS:
                counts[wanted[0]] += 1
                found[wanted] = None
        else:
            message = f"evidence[{index}] must be an object with the texts path and quote"
            faults.append(Fault("", "invalid_evidence", message))
    order = {path: index for index, path in enumerate(places)}
    return sorted(found, key=lambda each: order.get(each[0], len(order))), faults


def _path(path: str, places: Mapping[str, _Part]) -> str:
    """As the document has it; from the root of the whole answer, and as a fragment, it is clear."""
    forms = (path, path.removeprefix("#"), path.removeprefix("#").removeprefix("/data"))
    return next((form for form in forms if form in places), "" if path == "/" else path)


def _located(
    wanted: list[tuple[str, str]], places: Mapping[str, _Part], source: Source
) -> dict[tuple[str, str], Span]:
    """(path, quote) -> where it stands. What is quoted again is looked for behind that.

    Different values of one list item share a quote, as they do a row; else each path has its own.
    """
    by_quote: dict[str, list[str]] = {}
    for path, quote in wanted:
        by_quote.setdefault(quote, []).append(path)
    found: dict[tuple[str, str], Span] = {}
    for quote, paths in by_quote.items():
        users = _users([places[path] for path in paths if path in places])
        turns = {user: turn for turn, user in enumerate(dict.fromkeys(users.values()))}
        spans = source.spans(quote, max(1, len(turns)))
        for path in paths if spans else []:
            turn = turns[users[path]] if path in users else 0
            found[path, quote] = spans[min(turn, len(spans) - 1)]
    return found


def _users(places: list[_Part]) -> dict[str, str]:
    """Path -> by whom the same quote is used: the path itself, or the item that shares it."""
    values: dict[str, list[Any]] = {}
    for place in places:
        values.setdefault(place.item, []).append(place.value)
    shared = {item for item, each in values.items() if any(value != each[0] for value in each)}
    return {
        place.path: f"of {place.item}" if place.item in shared else place.path for place in places
    }


def _evidence(path: str, quote: str, span: Span, text: str) -> Evidence:
    true = text[slice(*span)]
    match = "exact" if quote == true else "normalized"
    return Evidence(path=path, start=span[0], end=span[1], quote=true, match=match)


def _too_much(path: str) -> Fault:
    message = "evidence quotes too much to look for all of it; quote fewer words for each value"
    return Fault(path, "too_much_evidence", message)


def _not_in_source(path: str, quote: str) -> Fault:
    message = f"{_shown(quote)} is not in the text; copy the text's own words"
    return Fault(path, "quote_not_in_source", message)


def _not_in_quote(part: _Part, quote: str) -> Fault:
    message = f"{_shown(part.value)} is no whole word or number in its quote {_shown(quote)}"
    return Fault(part.path, "value_not_in_quote", message)


def _shown(value: Any) -> str:
    text = str(value)
    return repr(text) if len(text) <= SHOWN else f"{text[:SHOWN]!r}..."

"""Which words of the text each value comes from: quotes are found in it, never believed."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, cast
from urllib.parse import unquote

from app.schemas.extraction import Evidence
from app.services.json_schema import Fault, Json, moved, pointer
from app.services.source import Source, Span

Status = Literal["grounded", "ungrounded"]

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
        "description": "One quote for every value in data that is not null.",
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
    """What the text says of a document: `status` has every value that is not null.

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
    quote, but need not be in it. With `required` every value needs a claim. A quote of an array or
    an object grounds nothing; if it is true it is kept.
    """
    places = {place.path: place for place in _walk(data, _Schemas(schema))}
    source = Source(text)
    wanted, faults = _sorted(claims, places)
    found, unknown = _located(wanted, places, source), list[Fault]()
    evidence: list[Evidence] = []
    status: dict[str, Status] = {
        path: "ungrounded" for path, place in places.items() if place.is_value
    }
    wrong: dict[str, list[Fault]] = {}
    for path, quote in wanted:
        place, span = places.get(path), found.get((path, quote))
        if span is None:
            wrong.setdefault(path, []).append(_not_in_source(path, quote))
        elif place is None:
            message = f"data has no value here; it was given the quote {_shown(quote)}"
            unknown.append(Fault(path, "path_unknown", message))
        elif not place.is_value or place.is_own or source.says(span, place.value):
            evidence.append(_evidence(path, quote, span, text))
            if place.is_value:
                status[path] = "grounded"
        else:
            wrong.setdefault(path, []).append(_not_in_quote(place, quote))
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
class _Place:
    """A part of the document. `item`: the innermost object in a list that it belongs to.

    `is_own`: the words are the schema's.
    """

    path: str
    value: Any
    item: str
    is_own: bool

    @property
    def is_value(self) -> bool:
        return self.value is not None and not isinstance(self.value, (dict, list))


def _walk(data: Any, schemas: "_Schemas") -> Iterator[_Place]:
    """Every part of the document, in its order."""

    def below(value: Any, path: str, item: str, judges: list[Json]) -> Iterator[_Place]:
        yield _Place(path, value, item, isinstance(value, bool) or _is_own(value, judges))
        if isinstance(value, dict):
            for key, child in cast(Json, value).items():
                judging = schemas.of_property(judges, key)
                yield from below(child, path + pointer([key]), item, judging)
        elif isinstance(value, list):
            for index, child in enumerate(cast(list[Any], value)):
                here = f"{path}/{index}"
                judging = schemas.of_item(judges, index)
                yield from below(child, here, here if isinstance(child, dict) else item, judging)

    return below(data, "", "", schemas.root())


def _is_own(value: Any, judges: list[Json]) -> bool:
    for judge in judges:
        words: Any = judge.get("enum", [])
        words = [*cast(list[Any], words if isinstance(words, list) else []), judge.get("const")]
        if value is not None and any(_is_same(word, value) for word in words):
            return True
    return False


def _is_same(word: Any, value: Any) -> bool:
    if isinstance(word, bool) or isinstance(value, bool):
        return word is value
    if isinstance(value, (int, float, Decimal)) and isinstance(word, (int, float, Decimal)):
        return Decimal(str(word)) == Decimal(str(value))
    return word == value


class _Schemas:
    """The schemas that speak of a place of the document, each with those that it refers to."""

    def __init__(self, root: Json | None) -> None:
        self._root = root
        self._known: dict[int, list[Json]] = {}

    def root(self) -> list[Json]:
        return self._all([self._root])

    def of_property(self, judges: list[Json], key: str) -> list[Json]:
        found: list[Any] = []
        for judge in judges:
            named: Any = judge.get("properties")
            if isinstance(named, dict) and key in named:
                found.append(cast(Json, named)[key])
            else:
                patterns: Any = judge.get("patternProperties")
                found += cast(Json, patterns).values() if isinstance(patterns, dict) else []
                found.append(judge.get("additionalProperties"))
        return self._all(found)

    def of_item(self, judges: list[Json], index: int) -> list[Json]:
        found: list[Any] = []
        for judge in judges:
            items: Any = judge.get("items")
            first: Any = judge.get("prefixItems", items)
            rest: Any = judge.get("additionalItems") if isinstance(items, list) else items
            if isinstance(first, list) and index < len(cast(list[Any], first)):
                found.append(cast(list[Any], first)[index])
            else:
                found.append(rest)
        return self._all(found)

    def _all(self, schemas: Iterable[Any]) -> list[Json]:
        found = (cast(Json, schema) for schema in schemas if isinstance(schema, dict))
        return [each for schema in found for each in self._with(schema)]

    def _with(self, schema: Json) -> list[Json]:
        """The schema and all that apply where it does, each once."""
        if (known := self._known.get(id(schema))) is not None:
            return known
        found, seen = [schema], {id(schema)}
        for each in found:
            for other in self._beside(each):
                if isinstance(other, dict) and id(cast(Json, other)) not in seen:
                    seen.add(id(cast(Json, other)))
                    found.append(cast(Json, other))
        self._known[id(schema)] = found
        return found

    def _beside(self, schema: Json) -> Iterator[Any]:
        for key in ("allOf", "anyOf", "oneOf"):
            branches: Any = schema.get(key)
            yield from cast(list[Any], branches) if isinstance(branches, list) else []
        yield from (schema.get(key) for key in ("if", "then", "else"))
        ref: Any = schema.get("$ref")
        if isinstance(ref, str) and (ref == "#" or ref.startswith("#/")):
            yield self._target(ref)

    def _target(self, ref: str) -> Any:
        found: Any = self._root
        for part in unquote(ref).split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list):
                items = cast(list[Any], found)
                found = items[int(name)] if name in map(str, range(len(items))) else None
            else:
                found = cast(Json, found).get(name) if isinstance(found, dict) else None
        return found


def _sorted(claims: Any, places: Mapping[str, _Place]) -> tuple[list[tuple[str, str]], list[Fault]]:
    """The claims as (path, quote), each once, in the order of the document."""
    faults: list[Fault] = []
    found: dict[tuple[str, str], None] = {}
    if not isinstance(claims, Sequence) or isinstance(claims, str):
        return [], [Fault("", "invalid_evidence", "evidence must be a list of path and quote")]
    for index, claim in enumerate(cast(Sequence[Any], claims)):
        each = cast(Json, claim if isinstance(claim, Mapping) else {})
        path, quote = each.get("path"), each.get("quote")
        if isinstance(path, str) and isinstance(quote, str):
            found[_path(path, places), quote] = None
        else:
            message = f"evidence[{index}] must be an object with the texts path and quote"
            faults.append(Fault("", "invalid_evidence", message))
    order = {path: index for index, path in enumerate(places)}
    return sorted(found, key=lambda each: order.get(each[0], len(order))), faults


def _path(path: str, places: Mapping[str, _Place]) -> str:
    """As the document has it; from the root of the whole answer, and as a fragment, it is clear."""
    forms = (path, path.removeprefix("#"), path.removeprefix("#").removeprefix("/data"))
    return next((form for form in forms if form in places), "" if path == "/" else path)


def _located(
    wanted: list[tuple[str, str]], places: Mapping[str, _Place], source: Source
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


def _users(places: list[_Place]) -> dict[str, str]:
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


def _not_in_source(path: str, quote: str) -> Fault:
    message = f"{_shown(quote)} is not in the text; copy the text's own words"
    return Fault(path, "quote_not_in_source", message)


def _not_in_quote(place: _Place, quote: str) -> Fault:
    message = f"{_shown(place.value)} is no whole word or number in its quote {_shown(quote)}"
    return Fault(place.path, "value_not_in_quote", message)


def _shown(value: Any) -> str:
    text = str(value)
    return repr(text) if len(text) <= SHOWN else f"{text[:SHOWN]!r}..."

"""A long text in pieces, and one document out of what each piece gave."""

import re
import unicodedata
from bisect import bisect_left
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache
from itertools import pairwise
from typing import Any, Literal, cast

from app.core.errors import Invalid
from app.schemas.extraction import Evidence
from app.services.json_schema import ANCHORS, IDS, Json, pointer
from app.services.places import Place, Schema, keys, target

Dedupe = Literal["by_span", "by_value", "none"]
Status = Literal["grounded", "ungrounded"]

# Where a text may be cut, best first: behind a paragraph, a line, a sentence, white space.
BORDERS = (
    re.compile(r"(?:\r\n?+|\n)(?:[ \t]*+(?:\r\n?+|\n))+"),
    re.compile(r"\r\n?|[\n\v\f\x85\u2028\u2029]"),
    re.compile(r"[.!?…][\"'”’»)\]]*\s+|[。！？]"),
    re.compile(r"[^\S\u00a0\u2007\u2009\u202f]+"),
)

# What only holds for the whole document, or for the whole list.
WHOLE = (
    *("required", "minProperties", "dependentRequired", "dependentSchemas", "dependencies"),
    *("if", "then", "else", "not", "unevaluatedProperties", "unevaluatedItems"),
    *("minItems", "maxItems", "uniqueItems", "contains", "minContains", "maxContains"),
)

ELSEWHERE = (0, 0)  # a span that overlaps none

EMPTY: tuple[Any, ...] = (None, "", [], {})


@dataclass(frozen=True, slots=True)
class Chunk:
    """`text[start:end]`, in code points of the whole text; `index` counts from 0."""

    index: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Part:
    """What one chunk gave. The evidence counts in the whole text."""

    chunk: Chunk
    data: Any
    evidence: Sequence[Evidence] = ()
    status: Mapping[str, Status] = field(default_factory=dict[str, Status])


@dataclass(frozen=True, slots=True)
class Merged:
    data: Any
    evidence: list[Evidence]
    status: dict[str, Status]


def cut(text: str, max_chars: int, overlap_chars: int) -> list[Chunk]:
    """The whole text in chunks of at most `max_chars` that share at most `overlap_chars`.

    No border stands within a word or a number, unless that alone is longer than a chunk.
    """
    tokens = _Tokens(text)
    chunks = list[Chunk]()
    start = done = 0
    while len(text) - start > max_chars:
        end = tokens.last(start, done, start + max_chars)
        if end is None and start < done:  # a long word fits in alone
            start = done
            continue
        end = end or tokens.within(done, start + max_chars)
        chunks.append(Chunk(len(chunks), start, end))
        start = tokens.first(max(end - overlap_chars, start + 1), end)
        done = end
    return [*chunks, Chunk(len(chunks), start, len(text))]


class _Tokens:
    """Where a text may be cut without harm to what it says."""

    def __init__(self, text: str) -> None:
        self._text = text
        spans = [found.span() for found in _token().finditer(text)]
        self._starts = [start for start, _ in spans]
        self._ends = [end for _, end in spans]

    def last(self, start: int, low: int, high: int) -> int | None:
        """The best border in (low, high], the last of its kind; of a chunk's second half before
        any other. None where there is none."""
        for floor in (max(low, (start + high) // 2), low):
            for kind in BORDERS:
                if found := list(self._matches(kind, floor, high)):
                    return found[-1]
        token = self._around(high)
        border = high if token is None else self._starts[token]
        return border if border > low else None

    def first(self, low: int, high: int) -> int:
        """The best border in [low, high], the first of its kind; in the first half rather."""
        for ceiling in ((low + high) // 2, high):
            for kind in BORDERS:
                # A border may stand right at `low`, behind what it is known by.
                if found := next(self._matches(kind, low - 1, ceiling), None):
                    return found
        token = self._around(low)
        border = low if token is None else self._ends[token]
        return min(border, high)

    def within(self, low: int, high: int) -> int:
        """A border in (low, high] where all is one token: in its white space, behind its
        punctuation, else anywhere but before a combining mark."""
        for harmless in (str.isspace, _is_punctuation):
            for border in range(high, low, -1):
                if harmless(self._text[border - 1]) and not self._is_joined(border):
                    return border
        borders = (border for border in range(high, low, -1) if not self._is_joined(border))
        return next(borders, high)

    def _matches(self, kind: re.Pattern[str], low: int, high: int) -> Iterator[int]:
        for found in kind.finditer(self._text, max(low, 0), high):
            if self._around(found.end()) is None:
                yield found.end()

    def _around(self, border: int) -> int | None:
        """The token that the border would cut."""
        token = bisect_left(self._starts, border) - 1
        return token if token >= 0 and self._ends[token] > border else None

    def _is_joined(self, border: int) -> bool:
        after = self._text[border : border + 1]
        pair = self._text[border - 1 : border + 1]
        return bool(after and _is_mark(after)) or pair == "\r\n" or pair[:1] == "\u200d"


@cache
def _token() -> re.Pattern[str]:
    """Words, numbers with their signs and separators, line breaks, and what is drawn as one."""
    marks = "".join(char for char in map(chr, range(0x300, 0x10000)) if _is_mark(char))
    mark = f"{marks}\u200d\U0001f3fb-\U0001f3ff"
    between_digits = r"(?<=\d)(?:[-.,:/'’٫٬\u00a0\u2007\u2009\u202f](?=\d)|[ ](?=\d{3}(?!\d)))"
    between_letters = r"(?<=\w)['’](?=\w)"
    return re.compile(
        r"\r\n|(?:(?<!\w)[-+−](?=\d))?"
        rf"\w[\w{mark}]*(?:(?:{between_digits}|{between_letters})[\w{mark}]+)*"
        rf"|[\U0001f1e6-\U0001f1ff]{{2}}|[^\w\r\n](?:[{mark}]|(?<=\u200d)\S)+"
    )


def _is_punctuation(char: str) -> bool:
    return not (char.isalnum() or _is_mark(char))


def _is_mark(char: str) -> bool:
    return unicodedata.category(char)[0] == "M" or char == "\u200d" or "🏻" <= char <= "🏿"


def find_list(schema: Json, wanted: str | None) -> str:
    """The JSON Pointer of the list to gather: the one wanted, or else `/lines`, the document
    itself, or its only list. Raises Invalid."""
    root = Place(schema)
    lists = [pointer([name]) for name in root.names if root.member(name).is_list]
    if wanted is not None:
        if not _is_list(root, wanted):
            raise _no_list(f"The schema has no list at {wanted!r}; {_choice(lists)}")
        return wanted
    if "/lines" in lists:
        return "/lines"
    if root.is_list:
        return ""
    if len(lists) != 1:
        raise _no_list(f"Say which list to gather from the chunks; {_choice(lists)}")
    return lists[0]


def _is_list(place: Place, path: str) -> bool:
    if path and not path.startswith("/"):
        return False
    for key in keys(path):
        if key not in place.names:
            return False
        place = place.member(key)
    return place.is_list


def _choice(lists: list[str]) -> str:
    return f"at the top it has {', '.join(lists) or 'none'}."


def _no_list(message: str) -> Invalid:
    return Invalid(message, code="bad_request", param="options.chunking.list_path")


def relaxed(schema: Json, list_path: str) -> Json:
    """What the answer for one chunk must fulfil: the same, but nothing has to be there beside the
    list, which may have any length. Its elements are judged as in the whole document."""
    return cast(Json, _relaxed(schema, schema, keys(list_path)))


def _relaxed(root: Json, schema: Schema, path: Sequence[str]) -> Schema:
    if not isinstance(schema, dict):
        return schema
    below = {name: value for name, value in schema.items() if name not in WHOLE}
    parts: list[Schema] = below.pop("allOf", [])
    if "$ref" in below:
        parts = [_inlined(target(root, below.pop("$ref"))), *parts]
    parts = [_relaxed(root, part, path) for part in parts]
    if "oneOf" in below:  # several may fit now
        parts.append({"anyOf": [_relaxed(root, part, path) for part in below.pop("oneOf")]})
    if "anyOf" in below:
        below["anyOf"] = [_relaxed(root, part, path) for part in below["anyOf"]]
    if parts:
        below["allOf"] = parts
    if path and "properties" in below:
        properties = cast(Json, below["properties"])
        demanded = cast(list[str], schema.get("required", []))
        below["properties"] = {
            name: _nullable(part) if name in demanded else part for name, part in properties.items()
        }
        if path[0] in properties:
            below["properties"][path[0]] = _relaxed(root, properties[path[0]], path[1:])
            below["required"] = [path[0]]
    return below


def _inlined(schema: Schema) -> Schema:
    """To stand in a second place: without the name that only one may have."""
    if not isinstance(schema, dict):
        return schema
    return {name: value for name, value in schema.items() if name not in (*ANCHORS, *IDS)}


def _nullable(schema: Schema) -> Schema:
    """Null may stand here too. All else keeps its place, for there may be references to it."""
    if not isinstance(schema, dict):
        return schema
    null: Json = {"type": "null"}
    if "$ref" in schema:
        return {"anyOf": [schema, null]}
    found = dict(schema)
    if "const" in found:
        found["enum"] = [found.pop("const")]
    if "enum" in found:
        found["enum"] = [*found["enum"], *([] if None in found["enum"] else [None])]
    if isinstance(kinds := found.get("type"), (str, list)):
        kinds = [kinds] if isinstance(kinds, str) else cast(list[str], kinds)
        found["type"] = [*kinds, *([] if "null" in kinds else ["null"])]
    for choice in ("anyOf", "oneOf"):
        if choice in found and null not in found[choice]:
            found[choice] = [*found[choice], null]
    return found


def merge(parts: Sequence[Part], list_path: str, dedupe: Dedupe, text: str = "") -> Merged:
    """One document: the list's elements of all parts, and else the first value that says something.

    by_span: what two neighbours say of the text that they share is said once; where the evidence
    does not tell, the end of the one list that is the start of the next, as far as the shared part
    of `text` says all of it. by_value: equal elements are one.
    """
    parts = sorted(parts, key=lambda part: part.chunk.index)
    return _Merging(parts, list_path, _repeats(parts, list_path, dedupe, text)).merged()


Span = tuple[int, int]  # of the text
Element = tuple[int, int]  # the number of a part, and the place in that part's list


class _Merging:
    """Follows each value from the part that it is taken from to its place in the whole."""

    def __init__(self, parts: Sequence[Part], list_path: str, repeats: set[Element]) -> None:
        self._parts = parts
        self._list = list_path
        self._repeats = repeats
        self._from: dict[str, int] = {}  # the part that gave the value of a pointer
        self._places: dict[Element, int] = {}

    def merged(self) -> Merged:
        data = self._value([(number, part.data) for number, part in enumerate(self._parts)], "")
        evidence = [
            each.model_copy(update={"path": moved})
            for number, part in enumerate(self._parts)
            for each in part.evidence
            if (moved := self._moved(number, each.path)) is not None
        ]
        status: dict[str, Status] = {
            moved: state
            for number, part in enumerate(self._parts)
            for path, state in part.status.items()
            if (moved := self._moved(number, path)) is not None
        }
        return Merged(data, evidence, status)

    def _value(self, given: list[tuple[int, Any]], path: str) -> Any:
        said = [(number, value) for number, value in given if value not in EMPTY] or given
        number, value = said[0] if said else (0, None)
        self._from[path] = number
        if path == self._list:
            lists = [
                (number, cast(list[Any], each)) for number, each in given if isinstance(each, list)
            ]
            return self._elements(lists) if lists else value
        if not isinstance(value, dict):
            return value
        objects = [(number, cast(Json, each)) for number, each in given if isinstance(each, dict)]
        return {
            key: self._value(
                [(number, each[key]) for number, each in objects if key in each],
                path + pointer([key]),
            )
            for key in dict.fromkeys(key for _, each in objects for key in each)
        }

    def _elements(self, given: list[tuple[int, list[Any]]]) -> list[Any]:
        found: list[Any] = []
        for number, elements in given:
            for index, element in enumerate(elements):
                if (number, index) not in self._repeats:
                    self._places[number, index] = len(found)
                    found.append(element)
        return found

    def _moved(self, number: int, path: str) -> str | None:
        """Where in the whole this part's value stands, if that is the one that was taken."""
        if split := _in_list(path, self._list):
            index, rest = split
            place = self._places.get((number, index))
            return None if place is None else f"{self._list}/{place}{rest}"
        near = path
        while near not in self._from and near:
            near = near.rpartition("/")[0]
        return path if self._from.get(near) == number else None


def _in_list(path: str, list_path: str) -> tuple[int, str] | None:
    """Which of the list's elements it is in, and where there."""
    if not path.startswith(f"{list_path}/"):
        return None
    index, slash, rest = path[len(list_path) + 1 :].partition("/")
    return (int(index), slash + rest) if index.isdecimal() else None


def _repeats(parts: Sequence[Part], list_path: str, dedupe: Dedupe, text: str) -> set[Element]:
    """The elements that were found before."""
    lists = [_Elements(part, list_path) for part in parts]
    if dedupe == "by_value":
        seen = set[Hashable]()
        return {
            (number, index)
            for number, elements in enumerate(lists)
            for index, value in enumerate(elements.values)
            if value in seen or seen.add(value)
        }
    if dedupe == "none":
        return set()
    found = set[Element]()
    for number, (ours, theirs) in enumerate(pairwise(lists), 1):
        if theirs.chunk.index == ours.chunk.index + 1:
            shared = range(theirs.chunk.start, ours.chunk.end)
            same = {*_by_span(ours, theirs, shared), *_by_order(ours, theirs, shared, text)}
            found |= {(number, index) for index in same}
    return found


class _Elements:
    """One part's elements, comparable, and where the text says each."""

    def __init__(self, part: Part, list_path: str) -> None:
        self.chunk = part.chunk
        data = part.data
        for key in keys(list_path):
            data = cast(Json, data).get(key) if isinstance(data, dict) else None
        self.raw = cast(list[Any], data) if isinstance(data, list) else []
        self.values = [_canonical(value) for value in self.raw]
        self.spans: dict[int, list[Evidence]] = {}
        for each in part.evidence:
            if split := _in_list(each.path, list_path):
                self.spans.setdefault(split[0], []).append(each)

    def where(self, index: int, shared: range) -> Span | None:
        """From where to where the shared text says it; ELSEWHERE where only other text does;
        None where nobody knows."""
        if index not in self.spans:
            return None
        spans = [
            (each.start, each.end)
            for each in self.spans[index]
            if shared.start <= each.start and each.end <= shared.stop
        ]
        return (min(spans)[0], max(end for _, end in spans)) if spans else ELSEWHERE


def _by_span(ours: _Elements, theirs: _Elements, shared: range) -> Iterator[int]:
    """Each of their elements that is one of ours: equal, and said by the same shared text."""
    places = {index: ours.where(index, shared) for index in range(len(ours.values))}
    left = {index: place for index, place in places.items() if place}
    for index, value in enumerate(theirs.values):
        if (span := theirs.where(index, shared)) is None:
            continue
        for other, place in left.items():
            if ours.values[other] == value and _may_be_one(place, span):
                del left[other]
                yield index
                break


def _by_order(ours: _Elements, theirs: _Elements, shared: range, text: str) -> Iterable[int]:
    """The longest start of their list that is the end of ours and finds room in what is shared."""
    longest = min(len(ours.values), _room(theirs, shared, text))
    for count in range(longest, 0, -1):
        first = len(ours.values) - count
        if ours.values[first:] == theirs.values[:count] and all(
            _may_be_one(ours.where(first + index, shared), theirs.where(index, shared))
            for index in range(count)
        ):
            return range(count)
    return ()


def _may_be_one(one: Span | None, two: Span | None) -> bool:
    if one is None or two is None:
        return ELSEWHERE not in (one, two)
    return one[0] < two[1] and two[0] < one[1]


def _room(elements: _Elements, shared: range, text: str) -> int:
    """How many elements, from the first, the shared text can hold at most.

    Going by the longest text in each, of those that stand in the whole text: how often the shared
    text says it. An element of which nothing stands there may be anywhere. Where the text is not
    given, its length has to do.
    """
    said = text[shared.start : shared.stop]
    left = len(shared)
    times = Counter[str]()
    for count, value in enumerate(elements.raw):
        longest = max(
            (each for each in _texts(value) if each in text or not text), key=len, default=""
        )
        times[longest] += 1
        left -= len(longest)
        enough = said.count(longest) >= times[longest] if text else left >= 0
        if not longest or not enough:
            return count
    return len(elements.raw) if shared else 0


def _texts(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            for each in cast(Json, value).values():
                yield from _texts(each)
        case list():
            for each in cast(list[Any], value):
                yield from _texts(each)
        case int() | float() | Decimal():
            yield str(value)
        case _:
            pass


def _canonical(value: Any) -> Hashable:
    """Equal for equal JSON values, and for no others."""
    match value:
        case dict():
            return frozenset((key, _canonical(each)) for key, each in cast(Json, value).items())
        case list():
            return tuple(_canonical(each) for each in cast(list[Any], value))
        case bool():
            return bool, value  # which Python takes for a number
        case _:
            return value

"""A model's JSON answer while it grows."""

import json
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

from app.services.answers import Unfit, parse
from app.services.json_schema import MAX_DEPTH, Json, pointer
from app.services.places import Place

# JSON's grammar (RFC 8259). A scalar is closed by what comes behind it.
SPACE = r"[ \t\r\n]*"
NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"
SCALAR = rf"(?:{NUMBER}|true|false|null)(?=[ \t\r\n,\]}}])"
# As much of a string as can be read: no half escape, and no half of a surrogate pair.
READABLE = (
    r"(?:[^\"\\\x00-\x1f\ud800-\udfff]++|\\(?:[\"\\/bfnrt]"
    r"|u(?![dD][89a-fA-F])[0-9a-fA-F]{4}"
    r"|u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}))*+"
)
KEY = rf'(?P<key>"{READABLE}"){SPACE}:'
VALUE = re.compile(rf'{SPACE}(?:(?P<opens>[{{\["])|(?P<scalar>{SCALAR}))')
MEMBER = re.compile(rf"{SPACE}{KEY}")
FIRST_MEMBER = re.compile(rf"{SPACE}(?:}}|{KEY})")
NEXT_MEMBER = re.compile(rf"{SPACE}(?:}}|(?P<more>,))")
FIRST_ELEMENT = re.compile(rf"{SPACE}(?:\]|(?P<more>(?=[^ \t\r\n])))")
NEXT_ELEMENT = re.compile(rf"{SPACE}(?:\]|(?P<more>,))")
TEXT = re.compile(READABLE)

ASIDE = ("", "")  # in place of a path: so deep that a list there is not the document's own


class _Missing(Enum):
    MISSING = "missing"


MISSING = _Missing.MISSING

Path = tuple[Any, ...]
Put = Callable[[Any], None]
Reading = Generator[None, None, Any]  # waits at each yield for more text; returns the value


@dataclass(frozen=True, slots=True)
class Item:
    """An element of a list that is the document, or a property of it. `path` is the list's."""

    path: str
    index: int
    item: Any


class Partial:
    """One answer as it grows, under a schema that is known to be valid.

    `value` is as much of the document as may be shown: texts grow; numbers, booleans, null and
    values that the schema spells out are there once they are closed and fit. It is MISSING before
    there is anything, and where the text is no JSON it stays as it was. It is changed in place.
    Numbers with a point or an exponent are `Decimal`.
    """

    def __init__(self, schema: Json, envelope: Sequence[str] = ()) -> None:
        """`envelope`: the keys under which the document stands in what the model writes."""
        self.value: Any = MISSING
        self.closed = False
        self._text = ""
        self._at = 0
        self._hidden = 0  # values that have not been shown because they do not fit
        self._items: list[Item] = []
        self._reading = self._document(Place(schema), envelope)

    def add(self, text: str) -> None:
        self._text = self._text[self._at :] + text
        self._at = 0
        next(self._reading)

    def items(self) -> list[Item]:
        """The elements that were closed since the last call, without those that do not fit."""
        items, self._items = self._items, []
        return items

    def _show(self, value: Any) -> None:
        self.value = value

    def _document(self, place: Place, envelope: Sequence[str]) -> Reading:
        yield from self._wrapped(place, envelope)
        self.closed = True
        yield from _never()

    def _wrapped(self, place: Place, envelope: Sequence[str]) -> Reading:
        if not envelope:
            return (yield from self._value(place, self._show, ()))
        if (yield from self._take(VALUE))["opens"] != "{":
            yield from _never()
        found = yield from self._take(FIRST_MEMBER)
        while not found["key"] or json.loads(found["key"]) != envelope[0]:
            yield from self._value(Place({}), _nowhere, ASIDE)
            yield from self._take(NEXT_MEMBER)
            found = yield from self._take(MEMBER)
        return (yield from self._wrapped(place, envelope[1:]))

    def _value(self, place: Place, put: Put, path: Path) -> Reading:
        found = yield from self._take(VALUE)
        if len(path) > MAX_DEPTH:
            yield from _never()
        opens, put_growing = found["opens"], put
        if place.is_chosen or (opens == '"' and not place.takes_text):
            put_growing, path = _nowhere, (*ASIDE, *path)
        if opens == "{":
            value = yield from self._object(place, put_growing, path)
        elif opens == "[":
            value = yield from self._array(place, put_growing, path)
        elif opens == '"':
            value = yield from self._string(put_growing)
        else:
            value = yield from self._scalar(found["scalar"])
        if place.fits(value):
            put(value)
        else:
            self._hidden += 1
        return value

    def _object(self, place: Place, put: Put, path: Path) -> Reading:
        shown: Json = {}
        put(shown)
        found = yield from self._take(FIRST_MEMBER)
        while found["key"]:
            key = json.loads(found["key"])
            yield from self._value(place.member(key), partial(shown.__setitem__, key), (*path, key))
            if not (yield from self._take(NEXT_MEMBER))["more"]:
                break
            found = yield from self._take(MEMBER)
        return shown

    def _array(self, place: Place, put: Put, path: Path) -> Reading:
        shown: list[Any] = []
        put(shown)
        index = 0
        found = yield from self._take(FIRST_ELEMENT)
        while found["more"] is not None:
            hidden = self._hidden
            slot = partial(_set, shown, index)
            value = yield from self._value(place.element(index), slot, (*path, index))
            if len(path) < 2 and hidden == self._hidden:
                self._items.append(Item(pointer(path), index, value))
            index += 1
            found = yield from self._take(NEXT_ELEMENT)
        return shown

    def _string(self, put: Put) -> Reading:
        value = ""
        while True:
            found = TEXT.match(self._text, self._at)
            assert found
            self._at = found.end()
            value += json.loads(f'"{found[0]}"')
            put(value)
            if self._text.startswith('"', self._at):
                self._at += 1
                return value
            yield

    def _scalar(self, text: str) -> Reading:
        try:
            return parse(text)
        except Unfit:  # a number that is too large
            yield from _never()

    def _take(self, pattern: re.Pattern[str]) -> Generator[None, None, re.Match[str]]:
        while not (found := pattern.match(self._text, self._at)):
            yield
        self._at = found.end()
        return found


def _set(shown: list[Any], index: int, value: Any) -> None:
    """Nothing behind an element that is not shown: it would stand in that one's place."""
    if index <= len(shown):
        shown[index:] = [value]


def _nowhere(value: Any) -> None: ...


def _never() -> Reading:
    while True:
        yield

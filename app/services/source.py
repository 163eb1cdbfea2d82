"""A text as evidence is checked against it: where quotes stand in it, and what they say."""

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date, time
from decimal import Decimal
from functools import cached_property
from typing import Any

from app.services import locales

Span = tuple[int, int]  # from and to, in code points

CLUSTER = 64  # code points composed at once; composing takes the square of a run of marks
TRIES = 1000  # places looked at for one quote, beyond those wanted, that cut a word or a number

# What may be done for all quotes of one text, in characters searched: a second or two.
EFFORT = 1_000_000_000
TRY = 5000  # for one place looked at
READ = 100  # for one character of a quote
READ_NUMBERS = 5000  # for one that is read for numbers, or for dates

# What may change: white space that is no single space; what is not ASCII, with its first letter.
SUSPECT = re.compile(r"(?P<space>[^\S ]\s*| \s+)|[^\s\x80-\U0010ffff]?[^\s\x00-\x7f]+")
# Scripts that set no space between words, or none between a word and what is put to it.
UNSPACED = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
    r"\U00020000-\U0003ffff]"
)
PLAIN_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,4000})(?:\.[0-9]{1,4000})?(?:[eE][-+]?[0-9]{1,3})?")
ISO = re.compile(
    r"(?P<date>\d{4}-\d\d-\d\d)?(?:(?(date)[Tt ]|)(?P<time>\d\d:\d\d(?::\d\d)?)(?:\.\d+)?"
    r"(?:[Zz]|[-+]\d\d:?\d\d)?)?",
    re.ASCII,
)


@dataclass
class _Effort:
    left: int = EFFORT

    def spend(self, characters: int) -> bool:
        """Whether there was any left."""
        self.left -= characters
        return self.left + characters > 0


@dataclass
class Source:
    """A text in which quotes are found, and values in its parts. After EFFORT nothing more is."""

    text: str
    _effort: _Effort = field(default_factory=_Effort)
    _parts: "dict[Span, _Part]" = field(default_factory=dict[Span, "_Part"])

    @cached_property
    def _normal(self) -> "_Normal":
        return _Normal(self.text)

    @property
    def is_spent(self) -> bool:
        return self._effort.left <= 0

    def spans(self, quote: str, count: int) -> list[Span]:
        """The first places of the quote, up to `count`, none over another.

        Normalized ones too if there are not enough exact ones. One that cuts a word or a number
        counts only where there is no other.
        """
        if not quote.strip() or not self._effort.spend(len(quote) * READ):
            return []
        exact = _places(self.text, quote, count, self._effort)
        if len(exact) == count and not _cuts(self.text, *exact[0]):
            return exact
        places = _places(self._normal.text, _normalized(quote), count, self._effort)
        normal = [span for place in places if (span := self._normal.original(*place))]
        return max(exact, normal, key=self._worth)

    def _worth(self, spans: list[Span]) -> tuple[bool, int]:
        return bool(spans) and not _cuts(self.text, *spans[0]), len(spans)

    def says(self, span: Span, value: Any, *, by_value: bool = False) -> bool:
        """Whether the value stands in that part of the text: a number, and an ISO date or time, in
        whatever notation; any other text as a text. by_value: also a text that is a number."""
        if span not in self._parts:
            self._parts[span] = _Part(self.text, span, self._effort)
        if by_value and isinstance(value, str) and PLAIN_NUMBER.fullmatch(value):
            value = Decimal(value)
        return self._parts[span].says(value)


@dataclass
class _Part:
    """A part of a text, and what can be read in it.

    Numbers and dates are those of the part that the text around it leaves as they are.
    """

    text: str
    span: Span
    effort: _Effort

    @cached_property
    def _quote(self) -> str:
        return self.text[slice(*self.span)]

    @cached_property
    def _normal(self) -> str:
        return _normalized(self._quote) if self._affords(READ) else ""

    def _affords(self, each: int) -> bool:
        return self.effort.spend((self.span[1] - self.span[0]) * each)

    @cached_property
    def _numbers(self) -> set[Decimal]:
        if not self._affords(READ_NUMBERS):
            return set()
        return locales.numbers(self._quote) & locales.numbers(self.text, *self.span)

    @cached_property
    def _dates(self) -> set[date]:
        if not self._affords(READ_NUMBERS):
            return set()
        return locales.dates(self._quote) & locales.dates(self.text, *self.span)

    @cached_property
    def _times(self) -> set[time]:
        if not self._affords(READ_NUMBERS):
            return set()
        return locales.times(self._quote) & locales.times(self.text, *self.span)

    def says(self, value: Any) -> bool:
        if isinstance(value, str):
            return self._says_text(value)
        if isinstance(value, float) and len(repr(value)) > 16:  # it may have lost digits
            return any(float(each) == value for each in self._numbers)
        return Decimal(value if isinstance(value, int) else str(value)) in self._numbers

    def _says_text(self, value: str) -> bool:
        sought = _normalized(value)
        found = _places(self._normal, sought, 1, self.effort) if sought else []
        if any(not _cuts(self._normal, *place) for place in found):
            return True
        parts = ISO.fullmatch(value)
        return parts is not None and self._says_moment(parts)

    def _says_moment(self, parts: re.Match[str]) -> bool:
        try:
            day = date.fromisoformat(parts["date"]) if parts["date"] else None
            hour = time.fromisoformat(parts["time"]) if parts["time"] else None
        except ValueError:
            return False
        if day and day not in self._dates:
            return False
        if hour is None or (day and hour == time()):  # a day without an hour is its midnight
            return day is not None
        return hour in self._times


def _places(text: str, sought: str, count: int, effort: _Effort) -> list[Span]:
    whole: list[Span] = []
    cut: list[Span] = []
    start = 0
    while len(whole) < count and len(cut) < count + TRIES and effort.left > 0:
        begun, start = start, text.find(sought, start)
        effort.spend(TRY + len(sought) + (len(text) if start < 0 else start) - begun)
        if start < 0:
            break
        end = start + len(sought)
        if _cuts(text, start, end):
            cut.append((start, end))
            start += 1
        else:
            whole.append((start, end))
            start = end
    return whole or _apart(cut)[:count]


def _apart(spans: list[Span]) -> list[Span]:
    found: list[Span] = []
    for start, end in spans:
        if not found or start >= found[-1][1]:
            found.append((start, end))
    return found


def _cuts(text: str, start: int, end: int) -> bool:
    """Whether a word or a number goes on over an end of the span."""
    return _is_inside(text, start) or _is_inside(text, end)


def _is_inside(text: str, place: int) -> bool:
    """Whether what stands on both sides of the place is one word or one number."""
    if not 0 < place < len(text):
        return False
    left, right = text[place - 1], text[place]
    if _is_mark(right):
        return True
    if left.isdecimal() or right.isdecimal():
        if left in ".,'’" and text[place - 2 : place - 1].isdecimal():  # 5.|50
            return True
        if right in ".,'’" and text[place + 1 : place + 2].isdecimal():  # 5|.50
            return True
        return left.isdecimal() and right.isdecimal()
    letters = right.isalpha() and (left.isalpha() or _is_mark(left))
    return letters and not UNSPACED.match(left) and not UNSPACED.match(right)


def _is_mark(char: str) -> bool:
    """Whether it may compose with what stands before it: a mark, or a later part of a syllable."""
    return unicodedata.category(char).startswith("M") or "\u1160" <= char <= "\u11ff"


def _normalized(text: str) -> str:
    return _Normal(text).text.strip()


class _Normal:
    """A text composed (NFC) and with one space for any white space; knows where all of it was."""

    def __init__(self, text: str) -> None:
        parts: list[str] = []
        # Where each part begins, here and in the original; within a changed one nothing is known.
        self._parts: list[tuple[int, bool]] = []
        self._starts: list[int] = []
        length = done = 0
        for start, end, form in _changes(text):
            for piece, origin, changed in ((text[done:start], done, False), (form, start, True)):
                if piece:
                    parts.append(piece)
                    self._starts.append(length)
                    self._parts.append((origin, changed))
                    length += len(piece)
            done = end
        self._starts.append(length)
        self._parts.append((done, False))
        self.text = "".join([*parts, text[done:]])

    def original(self, start: int, end: int) -> Span | None:
        """Where in the original it stands; None if an end is within what was composed."""
        left, right = self._at(start), self._at(end)
        return None if left is None or right is None else (left, right)

    def _at(self, place: int) -> int | None:
        index = bisect_right(self._starts, place) - 1
        behind = place - self._starts[index]
        origin, changed = self._parts[index]
        return None if changed and behind else origin + behind


def _changes(text: str) -> Iterator[tuple[int, int, str]]:
    """What normalizing changes: from, to, and what becomes of it."""
    for match in SUSPECT.finditer(text):
        if match["space"]:
            yield match.start(), match.end(), " "
        elif not _is_composed(match[0]):
            for start, end in _clusters(match[0]):
                form = unicodedata.normalize("NFC", match[0][start:end])
                if form != match[0][start:end]:
                    yield match.start() + start, match.start() + end, form


def _is_composed(text: str) -> bool:
    windows = range(0, len(text), CLUSTER)
    return all(
        unicodedata.is_normalized("NFC", text[start : start + 2 * CLUSTER]) for start in windows
    )


def _clusters(text: str) -> Iterator[Span]:
    """Each character with its marks, of at most CLUSTER code points."""
    start = 0
    for place in range(1, len(text)):
        if place - start == CLUSTER or not _is_mark(text[place]):
            yield start, place
            start = place
    yield start, len(text)

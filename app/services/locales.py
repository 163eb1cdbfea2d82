"""Numbers, dates and times as people write them, in any locale, read by value.

Where a notation is ambiguous (1.234, 05/03/2026) all of its readings are given. Digits are those
of any script. What stands in a part of a text is read whole: 15 is never read as 5, though a span
may end between its digits.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from functools import cache
from typing import Any, TypeGuard

AROUND = 64  # characters beside a span in which what the span cuts may begin or end
LONGEST = 4300  # digits; Python reads no longer integer

# One character for each of a kind, so that places in a text stay the same.
SAME = str.maketrans(
    "\u2212\ufe63\uff0d\u2010\u2011" + "\u2012\u2014\u2015" + "\u2019\u02bc\u2032\u066c\uff07"
    "\u202f\u2009\u2007\u2008" + "\u066b\uff0e" + "\u066a\ufe6a\uff05" + "\uff0c\uff0f\uff1a\uff0b"
    "\uff08\uff09",
    "-----" + "\u2013\u2013\u2013" + "'''''\xa0\xa0\xa0\xa0" + ".." + "%%%" + ",/:+()",
)
OTHER_DIGIT = re.compile(r"(?![0-9])\d")

NUMBER = re.compile(
    r"(?:(?<![\w.,'])\.\d+|\d+(?:[.,'_\xa0]\d+)*)(?P<exponent>[eE][-+]?\d{1,3}(?!\w))?"
)
PADDED = re.compile(r"0\d")  # 00123 is a text, and no number
SEPARATOR = re.compile(r"[.,'_\xa0]")
GROUPED = re.compile(
    r"[1-9]\d{0,2}([.,'_\xa0])\d{3}(?:\1\d{3})*"  # 1,234,567
    r"|[1-9]\d?([.,'\xa0])\d\d(?:\2\d\d)*\2\d{3}"  # 12,34,567
)
FIRST_GROUP = re.compile(r"[1-9]\d{0,2}")
NEXT_GROUP = re.compile(r"\d{3}(?:[.,]\d+)?")
CURRENCY = (
    r"(?:[$\xa2-\xa5\u058f\u060b\u09f2\u09f3\u0af1\u0bf9\u0e3f\u17db\u20a0-\u20cf\ufdfc\ufe69"
    r"\uff04\uffe0\uffe1\uffe5\uffe6%]|[A-Z]{2,3})"
)
SIGN = re.compile(
    rf"(?P<before>(?:\d[ \xa0$€£¥]|.)?)(?P<sign>[-\u2013+])(?P<gap>[\s\u200e\u200f\u061c]*)"
    rf"{CURRENCY}?\s?\Z"
)
PARENTHESIS = re.compile(rf"\(\s?{CURRENCY}?\s?\Z")
PERCENT_BEFORE = re.compile(r"%\s?\Z")
PERCENT = re.compile(r"\s?%")
MINUS_AFTER = re.compile(r"-(?![\w$\u20ac\xa3])")

LANGUAGES = """
    en es fr de pt it nl sv da no nn fi is et lv lt pl cs sk sl hr sr sr_Latn bs mk bg ru uk be ro
    hu el tr az kk uz ky tg ka hy he ar fa ur ps hi bn pa gu mr ta te kn ml si ne th lo km my vi id
    ms fil sw zu af ca eu gl ga cy mt sq mn am so ha yo zh ja ko
"""
# Words that stand between the parts of a date, or at the end of its day, as in 5th or 5-a.
WORDS = """
    年 月 日 년 월 일 de del di do da of the le den der d m r г р ж gada dienos dnia roku год года
    року a e o ko al el ta th st nd rd er re ère ème ste º ª го й ngày tháng thg năm พ.ศ ค.ศ in day
"""
FILLERS = frozenset(WORDS.split())
ERAS = {"令和": 2018, "平成": 1988, "昭和": 1925, "民國": 1911, "民国": 1911}
ATOM = re.compile(r"\d+|[^\s\d!-\-/:-@\[-`{-~،。，、「」（）·\u2010-\u201f\xa0]+")
SPACES = re.compile(r"\s+")
GAP = 24  # characters between the parts of a date

TIME = re.compile(
    r"(?<!\d)(?P<hour>\d{1,2})"
    r"(?:\s?(?:[:.hH時点시]|Uhr)\s?(?P<minute>\d\d)(?:[:.分]\s?(?P<second>\d\d))?"
    r"|\s?(?:Uhr|[h時시])|(?=\s?[aApP]\.?\s?[mM]\b))"
    r"(?!\d)(?:\s?(?P<half>[aApP])\.?\s?[mM]\b)?"
)


def numbers(text: str, start: int = 0, end: int | None = None) -> set[Decimal]:
    """The values of the numbers that stand in `text[start:end]`, exactly.

    12% is 12 and 0.12; (5) and 5- are 5 and -5; a dash between two things is no sign.
    """
    window, start, end = _window(text, start, end)
    found: set[Decimal] = set()
    matches = list(NUMBER.finditer(window))
    for index, match in enumerate(matches):
        if match.start() >= end:
            break
        chain = _chain(window, matches, index)
        after_group = index > 0 and len(_chain(window, matches, index - 1)) > 1
        split = any(each[0].startswith("0") for each in chain[1:2])
        if match.end() > start and not split and not (after_group and match[0][0] == "0"):
            found |= _signed(window, match.start(), match.end(), _readings(window, match))
        for last in range(1, len(chain)):
            if chain[last].end() > start:
                joined = "".join(each[0] for each in chain[: last + 1]).replace(",", ".")
                found |= _signed(window, match.start(), chain[last].end(), [joined])
    return found


def dates(text: str, start: int = 0, end: int | None = None) -> set[date]:
    """The days that are named in `text[start:end]`, with their year, in any order of the parts."""
    window, start, end = _window(text, start, end)
    atoms = list(_atoms(window))
    found: set[date] = set()
    for index, atom in enumerate(atoms):
        if atom.start >= end:
            break
        if len(atom.text) == 8 and atom.is_number and atom.end > start:
            found |= _days([(atom.text[:4], atom.text[4:6], atom.text[6:])])
        parts = atoms[index : index + 3]
        if len(parts) < 3 or atom.end <= start or parts[2].start >= end:
            continue
        before = atoms[index - 1] if index else None
        found |= _days(_orders(window, parts, before))
    return found


def times(text: str, start: int = 0, end: int | None = None) -> set[time]:
    """The times of day in `text[start:end]`: 14:30, 14h30, 2.30 pm, 2 pm."""
    window, start, end = _window(text, start, end)
    found: set[time] = set()
    for match in TIME.finditer(window):
        hour, minute, second = (int(match[name] or 0) for name in ("hour", "minute", "second"))
        if match["half"] and 1 <= hour <= 12:
            hour = hour % 12 + (12 if match["half"] in "pP" else 0)
        if match.end() > start and match.start() < end and max(minute, second) < 60 and hour < 24:
            found.add(time(hour, minute, second))
    return found


def _window(text: str, start: int, end: int | None) -> tuple[str, int, int]:
    """The span with what is around it, in ASCII's digits and signs; and where the span is there."""
    end = len(text) if end is None else end
    left = max(0, start - AROUND)
    window = text[left : end + AROUND].translate(SAME)
    window = OTHER_DIGIT.sub(lambda match: str(unicodedata.decimal(match[0])), window)
    return window, start - left, end - left


def _chain(window: str, matches: list[re.Match[str]], index: int) -> list[re.Match[str]]:
    """The match and those behind it that may be groups of the same number: 1 234 567,89."""
    chain = [matches[index]]
    if not FIRST_GROUP.fullmatch(chain[0][0]):
        return chain
    for match in matches[index + 1 : index + 9]:
        gap = window[chain[-1].end() : match.start()]
        if gap != " " or not NEXT_GROUP.fullmatch(match[0]):
            break
        chain.append(match)
        if len(match[0]) > 3:
            break
    return chain


def _readings(window: str, match: re.Match[str]) -> list[str]:
    """The number without its sign, as Decimal takes it."""
    exponent = match["exponent"] or ""
    body = match[0].removesuffix(exponent)
    if len(body) > LONGEST:
        return []
    found = [each + exponent for each in _whole(body)]
    in_row = window[match.start() - 1 : match.start()] in {",", "["} or re.match(
        r",\S|\]", window[match.end() : match.end() + 2]
    )
    if found and not ("," in body and in_row):
        return [each for each in found if not PADDED.match(each)]
    # No one number: a date, a version, or the cells of a row.
    for kind in set(SEPARATOR.findall(body)) if not found else {","}:
        for piece in body.split(kind):
            found += _whole(piece) or [part for part in SEPARATOR.split(piece) if part]
    return [each for each in found if not PADDED.match(each)]


def _whole(body: str) -> list[str]:
    separators = SEPARATOR.findall(body)
    if not separators:
        return [body] if body else []
    found: list[str] = []
    whole, last, fraction = body.rpartition(separators[-1])
    if last in ".," and last not in whole and (not whole or whole.isdigit() or _grouped(whole)):
        found.append(f"{SEPARATOR.sub('', whole)}.{fraction}")
    if _grouped(body):
        found.append(SEPARATOR.sub("", body))
    return found


def _grouped(body: str) -> bool:
    return GROUPED.fullmatch(body) is not None


def _signed(window: str, start: int, end: int, readings: Iterable[str]) -> set[Decimal]:
    before, after = window[max(0, start - 12) : start], window[end : end + 2]
    percent = PERCENT.match(after) or PERCENT_BEFORE.search(before)
    found = [*readings]
    if percent:
        found += [f"{each}e-2" for each in found if "e" not in each.lower()]
    values, signs = map(Decimal, found), _signs(before, after)
    return {value if sign > 0 else value.copy_negate() for value in values for sign in signs}


def _signs(before: str, after: str) -> tuple[int, ...]:
    """1, -1, or both where it cannot be told."""
    closing = after.lstrip()[:1] == ")"
    if MINUS_AFTER.match(after) or (closing and PARENTHESIS.search(before)):
        return (1, -1)
    match = SIGN.search(before)
    if match is None or match["sign"] == "+":
        return (1,)
    previous = match["before"]
    if previous and (previous[-1].isalnum() or previous[-1] in "%)°'\""):
        return (1,)  # 2020-5, A-5, 5%-10%
    apart = match["gap"].isspace() or previous[:1].isdigit()  # 5 -10, 5€-10€
    return (1, -1) if apart or match["sign"] != "-" or previous[-1:] in {"-", "–"} else (-1,)


@dataclass(frozen=True, slots=True)
class _Atom:
    """A number, or a word that no date has between its parts."""

    text: str
    start: int
    end: int

    @property
    def is_number(self) -> bool:
        return self.text.isdecimal()

    @property
    def months(self) -> frozenset[int]:
        return _months().get(_plain(self.text), frozenset())


def _atoms(window: str) -> Iterator[_Atom]:
    for match in ATOM.finditer(window):
        if match[0].isdecimal() or _plain(match[0]) not in FILLERS | {""}:
            yield _Atom(match[0], match.start(), match.end())


def _plain(word: str) -> str:
    return unicodedata.normalize("NFC", word.strip(".")[:40]).casefold()


@cache
def _months() -> dict[str, frozenset[int]]:
    """The names of months -> which they are; the same word may be two in two languages."""
    import pickle

    from babel import localedata

    found: dict[str, set[int]] = {}
    for language in LANGUAGES.split():
        # Not by Babel, which keeps all of what it has read of a language, not its months alone.
        with open(localedata.resolve_locale_filename(language), "rb") as file:
            contexts: dict[str, dict[str, Any]] = pickle.load(file).get("months", {})
        for widths in contexts.values():
            tables = [widths[width] for width in ("wide", "abbreviated") if width in widths]
            for names in filter(_is_table, tables):
                for number, name in names.items():
                    for form in _forms(language, name):
                        found.setdefault(form, set()).add(number)
    return {name: frozenset(months) for name, months in found.items()}


def _is_table(names: Any) -> TypeGuard[dict[int, str]]:
    return isinstance(names, dict)  # else Babel's pointer to another table


def _forms(language: str, name: str) -> Iterator[str]:
    words = [_plain(word) for word in re.split(r"[\s’']+", name)]
    words = [word for word in words if word not in FILLERS]
    if len(words) != 1 or len(words[0]) < 2 or any(char.isdecimal() for char in words[0]):
        return
    yield words[0]
    if language == "he":
        yield "ב" + words[0]
    if language == "eu":
        yield words[0] + "ren"


def _orders(
    window: str, parts: list[_Atom], before: _Atom | None
) -> Iterator[tuple[str, str | int, str]]:
    """The three parts as (year, month, day), in each order that they may stand in."""
    first, second, third = parts
    gaps = [window[a.end : b.start] for a, b in ((first, second), (second, third))]
    if any(len(gap) > GAP or re.search(r"[;:!?|]", gap) for gap in gaps):
        return
    kinds = [part.is_number for part in parts]
    if kinds == [True, True, True]:
        if not _is_run(window, parts, gaps, before):
            return
        era = next((e for e in ERAS if before and before.text.endswith(e)), None)
        if era and before and before.end == first.start:
            yield str(ERAS[era] + int(first.text[:4])), second.text, third.text
        yield first.text, second.text, third.text
        yield third.text, second.text, first.text
        yield third.text, first.text, second.text
    elif kinds == [True, False, True]:
        for month in second.months:
            yield third.text, month, first.text
            if len(first.text) == 4:
                yield first.text, month, third.text
    elif kinds == [False, True, True]:
        for month in first.months:
            yield third.text, month, second.text
    elif kinds == [True, True, False] and len(first.text) == 4:
        for month in third.months:
            yield first.text, month, second.text


def _is_run(window: str, parts: list[_Atom], gaps: list[str], before: _Atom | None) -> bool:
    """Whether the numbers are set apart as those of one date are, and of no longer row."""
    marks = [SPACES.sub("", gap) for gap in gaps]
    if all(any(char.isalpha() for char in mark) for mark in marks):
        return True  # 2026年3月5日
    mark = marks[0]
    if mark != marks[1] or mark not in {"", ".", "/", "-", "–", "·"}:
        return False
    if mark and before and before.is_number:
        return SPACES.sub("", window[before.end : parts[0].start]) != mark
    return True


def _days(orders: Iterable[tuple[str, str | int, str]]) -> set[date]:
    found: set[date] = set()
    for year, month, day in orders:
        if len(year) not in (2, 4) or len(str(month)) > 2 or len(day) > 2:
            continue
        number = int(year)
        years = (1900 + number, 2000 + number) if len(year) == 2 else (number,)
        for each in (*years, number - 543) if number > 2400 else years:  # Thai
            try:
                found.add(date(each, int(month), int(day)))
            except ValueError:
                continue
    return found

"""How well documents agree with what was expected of them, leaf by leaf.

A leaf is a string, a number or a boolean, under its JSON Pointer with `*` for each place in a list
("/lines/*/sku"; "" for a root that is a leaf itself). Leaves agree as JSON says: 1 is 1.0, but not
true; numbers with a point are compared as doubles. What is null, absent or empty is no leaf: it
need not be found. A wrong value is one that was found and not expected (fp), and one that was
expected and not found (fn).
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from math import ceil, inf
from typing import Any, Final, cast

MISSING: Final[Any] = object()  # in the place of a document that was not made
STRETCH = 64  # elements of two lists that are compared all with all

Leaves = Counter[tuple[str, str, Any]]  # path, kind, value


@dataclass(slots=True)
class Counts:
    """Leaves found as expected (tp), found alone (fp), expected alone (fn)."""

    tp: int = 0
    fp: int = 0
    fn: int = 0

    @property
    def support(self) -> int:
        return self.tp + self.fn

    @property
    def precision(self) -> float:
        """Of what was found, the share that was expected; 0 where nothing was, but should be."""
        return self._share(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        """Of what was expected, the share that was found; 0 where only others were."""
        return self._share(self.tp, self.tp + self.fn)

    @property
    def f1(self) -> float:
        return self._share(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    def _share(self, part: int, whole: int) -> float:
        if not (self.tp or self.fp or self.fn):
            return 1.0
        return part / whole if whole else 0.0


@dataclass(slots=True)
class Report:
    """total: micro-averaged, over all leaves. exact: documents that are equal, the order of lists
    included. failed: documents that were not made; all that was expected of them counts as fn."""

    total: Counts = field(default_factory=Counts)
    fields: dict[str, Counts] = field(default_factory=lambda: defaultdict[str, Counts](Counts))
    documents: int = 0
    exact: int = 0
    failed: int = 0


def score(pairs: Iterable[tuple[Any, Any]]) -> Report:
    """Of pairs of what was expected, and what was found or MISSING.

    Elements of lists are paired so that most of their leaves agree (see `align`).
    """
    report = Report()
    for expected, actual in pairs:
        report.documents += 1
        if actual is MISSING:
            report.failed += 1
            _count(report, _leaves(expected), Leaves())
            continue
        report.exact += _canonical(expected) == _canonical(actual)
        for before, after in _pairs(expected, actual, ""):
            _count(report, before, after)
    report.fields = dict(sorted(report.fields.items()))
    return report


def _count(report: Report, expected: Leaves, actual: Leaves) -> None:
    both, extra, lost = expected & actual, actual - expected, expected - actual
    for name, leaves in (("tp", both), ("fp", extra), ("fn", lost)):
        for (path, _, _), times in leaves.items():
            for counts in (report.fields[path], report.total):
                setattr(counts, name, getattr(counts, name) + times)


def _pairs(expected: Any, actual: Any, path: str) -> Iterator[tuple[Leaves, Leaves]]:
    """The leaves that stand, or should, in the same place."""
    match expected, actual:
        case dict(), dict():
            mine, other = cast(dict[str, Any], expected), cast(dict[str, Any], actual)
            for key in dict.fromkeys((*mine, *other)):
                yield from _pairs(mine.get(key), other.get(key), _under(path, key))
        case list(), list():
            for before, after in align(cast(list[Any], expected), cast(list[Any], actual)):
                yield from _pairs(before, after, f"{path}/*")
        case _:
            yield _leaves(expected, path), _leaves(actual, path)


def _under(path: str, key: str) -> str:
    return f"{path}/{key.replace('~', '~0').replace('/', '~1')}"


def _leaves(value: Any, path: str = "") -> Leaves:
    found = Leaves()
    parts = [(path, value)]
    for place, part in parts:
        match part:
            case dict():
                named = cast(dict[str, Any], part)
                parts += [(_under(place, key), each) for key, each in named.items()]
            case list():
                parts += [(f"{place}/*", each) for each in cast(list[Any], part)]
            case None:
                pass
            case _:
                found[(place, *_leaf(part))] += 1
    return found


def _leaf(value: Any) -> tuple[str, Any]:
    match value:
        case bool():
            return "boolean", value
        case Decimal():
            return "number", float(value)
        case int() | float():
            return "number", value
        case _:
            return type(value).__name__, value


def _canonical(value: Any) -> Any:
    """The document without what is null or empty; equal for documents that are equal."""
    match value:
        case dict():
            named = cast(dict[str, Any], value)
            inner = {key: _canonical(each) for key, each in named.items()}
            return {key: each for key, each in inner.items() if each is not None} or None
        case list():
            return [_canonical(each) for each in cast(list[Any], value)] or None
        case None:
            return None
        case _:
            return _leaf(value)


def align(expected: Sequence[Any], actual: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Pairs of elements, None beside an element without a partner, wherever in the lists.

    Equal elements are partners. The rest is paired so that the most leaves are shared; where both
    have more than STRETCH elements left, one stretch of so many after another is.
    """
    mine, others = [_leaves(each) for each in expected], [_leaves(each) for each in actual]
    waiting = defaultdict[frozenset[Any], list[int]](list)
    for at, leaves in reversed(list(enumerate(others))):
        waiting[frozenset(leaves.items())].append(at)
    partner = {
        at: same.pop()
        for at, leaves in enumerate(mine)
        if (same := waiting.get(frozenset(leaves.items())))
    }
    taken = set(partner.values())
    rows = [at for at in range(len(mine)) if at not in partner]
    columns = [at for at in range(len(others)) if at not in taken]
    fewer, more = sorted((len(rows), len(columns)))
    stretches = ceil(max(fewer / STRETCH, more / STRETCH / 16)) if fewer else 0
    for place in range(stretches):
        some, against = (_stretch(each, place, stretches) for each in (rows, columns))
        shared = [[(mine[row] & others[column]).total() for column in against] for row in some]
        partner |= {some[row]: against[column] for row, column in assign(shared)}
    taken = set(partner.values())
    return [
        *(
            (each, actual[partner[at]] if at in partner else None)
            for at, each in enumerate(expected)
        ),
        *((None, each) for at, each in enumerate(actual) if at not in taken),
    ]


def _stretch(places: list[int], part: int, parts: int) -> list[int]:
    return places[len(places) * part // parts : len(places) * (part + 1) // parts]


def assign(weights: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Rows with columns, each at most once, so that the sum of their weights is the greatest.

    The Hungarian method with potentials, in O(n²m): Kuhn, Naval Research Logistics, 1955, in the
    form of Jonker and Volgenant, Computing, 1987.
    """
    if not weights or not weights[0]:
        return []
    if len(weights) > len(weights[0]):
        return [(row, column) for column, row in assign(list(zip(*weights, strict=True)))]
    n, m = len(weights), len(weights[0])
    of_row, of_column = [0.0] * (n + 1), [0.0] * (m + 1)  # the potentials; 0 is nobody
    owner = [0] * (m + 1)  # of each column
    for new in range(1, n + 1):
        owner[0], column = new, 0
        least, way, seen = [inf] * (m + 1), [0] * (m + 1), {0}
        while owner[column]:
            row, seen = owner[column], seen | {column}
            free = [at for at in range(1, m + 1) if at not in seen]
            for at in free:
                cost = -weights[row - 1][at - 1] - of_row[row] - of_column[at]
                if cost < least[at]:
                    least[at], way[at] = cost, column
            column = min(free, key=least.__getitem__)
            step = least[column]
            for at in seen:
                of_row[owner[at]] += step
                of_column[at] -= step
            for at in free:
                least[at] -= step
        while column:
            owner[column], column = owner[way[column]], way[column]
    return [(owner[at] - 1, at - 1) for at in range(1, m + 1) if owner[at]]

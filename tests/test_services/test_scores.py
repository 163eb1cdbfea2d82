"""Documents against what was expected of them, leaf by leaf."""

import random
from datetime import date
from decimal import Decimal
from itertools import permutations
from typing import Any

import pytest

from app.services.scores import MISSING, STRETCH, Counts, align, assign, score


def total(expected: Any, actual: Any) -> tuple[int, int, int]:
    """True positives, false positives, false negatives."""
    counts = score([(expected, actual)]).total
    return counts.tp, counts.fp, counts.fn


def test_each_leaf_counts_under_its_path() -> None:
    expected = {"name": "Ada", "born": {"year": 1815, "in/out": "in"}}
    actual = {"name": "Ada", "born": {"year": 1816, "in/out": "in"}, "died": 1852}

    fields = score([(expected, actual)]).fields

    assert list(fields) == ["/born/in~1out", "/born/year", "/died", "/name"]
    assert fields["/name"] == Counts(tp=1)
    assert fields["/born/year"] == Counts(fp=1, fn=1)
    assert fields["/died"] == Counts(fp=1)


@pytest.mark.parametrize(
    ("expected", "actual", "counts"),
    [
        (1, 1.0, (1, 0, 0)),
        (1, True, (0, 1, 1)),
        (0, False, (0, 1, 1)),
        ("1", 1, (0, 1, 1)),
        (0.1, Decimal("0.10"), (1, 0, 0)),
        (2**53, 2**53 + 1, (0, 1, 1)),
        (date(1815, 12, 10), date(1815, 12, 10), (1, 0, 0)),
        ("Ada", "ada", (0, 1, 1)),
        (None, None, (0, 0, 0)),
        ({"a": None}, {}, (0, 0, 0)),
        ({}, {"a": []}, (0, 0, 0)),
        ({"a": 1}, {"a": {"b": 1}}, (0, 1, 1)),
        ({"a": [1, 2]}, {"a": 1}, (0, 1, 2)),
        ([1, 1, 2], [2, 1], (2, 0, 1)),
    ],
)
def test_values_agree_as_json_says(
    expected: Any, actual: Any, counts: tuple[int, int, int]
) -> None:
    assert total(expected, actual) == counts


def test_elements_are_paired_wherever_they_stand() -> None:
    expected = {"lines": [{"sku": "A", "n": 1}, {"sku": "B", "n": 2}, {"sku": "C", "n": 3}]}
    actual = {"lines": [{"sku": "C", "n": 3}, {"sku": "A", "n": 1}, {"sku": "B", "n": 9}]}

    report = score([(expected, actual)])

    assert report.fields["/lines/*/sku"] == Counts(tp=3)
    assert report.fields["/lines/*/n"] == Counts(tp=2, fp=1, fn=1)


def test_a_missing_or_additional_element_costs_its_leaves_alone() -> None:
    lines = [{"sku": str(number), "n": number} for number in range(5)]

    assert total(lines, lines[1:]) == (8, 0, 2)
    assert total(lines[1:], lines) == (8, 2, 0)


def test_pairs_are_those_that_agree_the_most_and_not_the_first_that_agree() -> None:
    expected = [{"x": 1, "y": 1, "z": 1}, {"x": 1, "y": 5, "z": 2}]
    actual = [{"x": 1, "y": 5, "z": 1}, {"x": 1, "y": 1, "z": 3}]

    assert align(expected, actual) == [(expected[0], actual[1]), (expected[1], actual[0])]


def test_lists_in_lists_are_paired_within_their_own_element() -> None:
    expected = [{"id": 1, "tags": ["a", "b"]}, {"id": 2, "tags": ["c"]}]
    actual = [{"id": 2, "tags": ["a", "c"]}, {"id": 1, "tags": ["b"]}]

    fields = score([(expected, actual)]).fields

    assert fields["/*/tags/*"] == Counts(tp=2, fp=1, fn=1)


def test_the_pairing_is_the_best_there_is() -> None:
    draw = random.Random(7)
    for _ in range(300):
        rows, columns = draw.randint(1, 5), draw.randint(1, 5)
        weights = [[draw.randint(0, 4) for _ in range(columns)] for _ in range(rows)]

        pairs = assign(weights)

        assert len({row for row, _ in pairs}) == len({column for _, column in pairs}) == len(pairs)
        few = weights if rows <= columns else list(zip(*weights, strict=True))
        best = max(
            sum(few[row][column] for row, column in enumerate(places))
            for places in permutations(range(len(few[0])), len(few))
        )
        assert sum(weights[row][column] for row, column in pairs) == best


def test_long_lists_are_paired_without_comparing_all_with_all() -> None:
    expected = [{"n": number, "was": "this"} for number in range(40 * STRETCH)]
    actual = [{"n": number, "was": "that"} for number in range(40 * STRETCH)]

    assert total(expected, actual) == (40 * STRETCH, 40 * STRETCH, 40 * STRETCH)


def test_all_of_a_missing_document_was_not_found() -> None:
    report = score([({"a": 1, "b": [1, 2]}, MISSING), ({"a": 1}, {"a": 1})])

    assert (report.documents, report.failed, report.exact) == (2, 1, 1)
    assert report.total == Counts(tp=1, fn=3)
    assert report.fields["/b/*"].recall == 0


def test_a_document_is_exact_in_the_order_of_its_lists_and_without_what_is_empty() -> None:
    pairs = [
        ({"a": [1, 2]}, {"a": [2, 1]}),
        ({"a": [1, 2], "b": None}, {"a": [1.0, 2], "c": {"d": []}}),
        ({"a": True}, {"a": 1}),
    ]

    assert [score([pair]).exact for pair in pairs] == [0, 1, 0]


def test_shares_are_of_what_there_is() -> None:
    half = Counts(tp=1, fp=1, fn=3)

    assert (half.precision, half.recall, half.support) == (0.5, 0.25, 4)
    assert half.f1 == pytest.approx(1 / 3)
    assert (Counts().precision, Counts().recall, Counts().f1) == (1, 1, 1)
    assert (Counts(fn=1).precision, Counts(fp=1).recall, Counts(fn=1).f1) == (0, 0, 0)

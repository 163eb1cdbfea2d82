"""What is shown of an answer while it grows: never less than before, never what may yet change."""

import json
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

from app.services.partials import MISSING, Item, Partial

INVOICE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "supplier": {"type": "string", "pattern": "^[A-Z]"},
        "tier": {"enum": ["go", "gold"]},
        "total": {"type": "number", "minimum": 10},
        "paid": {"type": ["boolean", "null"]},
        "lines": {"type": "array", "items": {"$ref": "#/$defs/line"}},
    },
    "$defs": {
        "line": {
            "type": "object",
            "properties": {
                "text": {"type": "string"},
                "unit": {"$ref": "#/$defs/unit"},
                "amount": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            },
        },
        "unit": {"const": "piece"},
    },
}
ANSWER = (
    '{"supplier": "Köln \\ud83d\\ude00 \\"A\\"\\n", "tier":"gold", "total" : 1234.50, "paid": null,'
    ' "lines": [{"text": "Pen", "unit": "piece", "amount": 12}, {"text": "", "amount": -3}]}'
)


def grown(schema: dict[str, Any], text: str, *, by: int = 1, under: str = "") -> Iterator[Any]:
    """What is shown after each piece, as a copy."""
    partial = Partial(schema, [under] if under else [])
    for start in range(0, len(text), by):
        partial.add(text[start : start + by])
        if partial.value is not MISSING:
            yield json.loads(json.dumps(partial.value, default=float))


def is_start(less: Any, more: Any) -> bool:
    """Whether the one may become the other by growing alone."""
    match less, more:
        case dict(), dict():
            return all(key in more and is_start(less[key], more[key]) for key in less)
        case list(), list():
            return len(less) <= len(more) and all(map(is_start, less, more))
        case str(), str():
            return more.startswith(less)
        case _:
            return type(less) is type(more) and less == more


def some_json(dice: random.Random, depth: int = 0) -> Any:
    kind = dice.randrange(6 if depth > 3 else 9)
    match kind:
        case 0 | 1 | 2:
            return "".join(dice.choices('ab "\\/\n\u00e9\u2028😀{}[],:', k=dice.randrange(9)))
        case 3:
            return dice.choice([0, -1, 10**30, 123, 1.5, -2e-7, 1e20])
        case 4:
            return dice.choice([True, False])
        case 5:
            return None
        case 6:
            return [some_json(dice, depth + 1) for _ in range(dice.randrange(5))]
        case _:
            keys = ["", "a", "b~/", 'q"', "é", "\\"]
            return {key: some_json(dice, depth + 1) for key in keys[: dice.randrange(7)]}


@pytest.mark.parametrize("by", [1, 2, 3, 7, 1000])
def test_an_answer_grows_into_what_was_said(by: int) -> None:
    shown = list(grown(INVOICE, ANSWER, by=by))

    assert all(map(is_start, shown, shown[1:]))
    assert shown[-1] == json.loads(ANSWER)


@pytest.mark.parametrize("seed", range(300))
def test_any_document_cut_anywhere_grows_into_itself(seed: int) -> None:
    dice = random.Random(seed)
    document = {"value": some_json(dice), "more": some_json(dice)}
    text = json.dumps(document, ensure_ascii=dice.random() < 0.5, indent=dice.choice([None, 1]))

    partial = Partial({})
    last: Any = {}
    while text:
        size = dice.randint(1, 12)
        partial.add(text[:size])
        text = text[size:]
        if partial.value is not MISSING:
            shown = json.loads(json.dumps(partial.value, default=float))
            assert is_start(last, shown)
            last = shown

    assert partial.closed
    assert last == document


def test_of_what_is_chosen_or_counted_only_the_whole_is_shown() -> None:
    shown = list(grown(INVOICE, ANSWER))

    assert {each.get("tier", "gold") for each in shown} == {"gold"}
    assert {each.get("total", 1234.5) for each in shown} == {1234.5}
    assert {line.get("unit", "piece") for each in shown for line in each.get("lines", [])} == {
        "piece"
    }
    assert {"supplier": "Köln "} in shown
    assert not any("\ud83d" in str(each) for each in shown)


@pytest.mark.parametrize(
    ("schema", "written", "shown"),
    [
        ({"enum": [1, 2]}, "true", None),
        ({"enum": [1, 2]}, "1.0", 1),
        ({"const": False}, "0", None),
        ({"type": "integer"}, "1.5", None),
        ({"type": "integer", "minimum": 3}, "2", None),
        ({"type": "number"}, '"two"', None),
        ({"type": "string"}, "null", None),
        ({"allOf": [{"type": "string"}, {"enum": ["a", "b"]}]}, '"b"', "b"),
        ({"oneOf": [{"const": "a"}, {"type": "integer"}]}, "7", 7),
        ({"if": {"type": "string"}, "then": {"enum": ["a"]}}, '"ab"', "ab"),
        ({"enum": [{"a": 1}, [2]]}, "[2]", [2]),
        ({"enum": [{"a": 1}, [2]]}, "[3]", None),
        (False, "1", None),
        ({}, "1e999", None),
        ({}, "9" * 5000, None),
    ],
)
def test_a_value_is_shown_where_it_fits(schema: Any, written: str, shown: Any) -> None:
    partial = Partial({"properties": {"it": schema}})

    partial.add(f'{{"it": {written}')
    before = partial.value
    waited = "it" not in before or written[-1] in '"]'
    partial.add("}")

    assert waited
    assert partial.value.get("it") == shown
    assert type(partial.value.get("it")) is not bool


@pytest.mark.parametrize(
    ("schema", "document"),
    [
        ({"additionalProperties": {"enum": ["gold"]}}, {"x": "gold"}),
        ({"patternProperties": {"^x": {"enum": ["gold"]}}}, {"xy": "gold"}),
        ({"items": {"enum": ["gold"]}}, ["gold"]),
        ({"prefixItems": [True, {"enum": ["gold"]}]}, [1, "gold"]),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "items": [{"const": "x"}]}, ["x"]),
        ({"anyOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"items": {"const": "x"}}}}, ["x"]),
        ({"$ref": "#a", "$defs": {"a": {"$anchor": "a", "items": {"const": "x"}}}}, ["x"]),
        (
            {"dependentSchemas": {"a": {"properties": {"b": {"const": "xy"}}}}},
            {"a": 1, "b": "xy"},
        ),
    ],
)
def test_a_choice_is_found_wherever_the_schema_states_it(schema: Any, document: Any) -> None:
    text = json.dumps(document)
    chosen = text.rindex('"')

    partial = Partial(schema)
    partial.add(text[:chosen])
    before = json.dumps(partial.value)
    partial.add(text[chosen:])

    assert "x" not in before.replace('"x"', "") and "gol" not in before
    assert partial.value == document


@pytest.mark.parametrize(
    "rest", ["oops", '"a": }', '"a": 1,}', '"a": NaN}', '"a" 1', '"a": "\\x"', '"\\ud800": 1', "]"]
)
def test_what_is_no_json_leaves_what_was_there(rest: str) -> None:
    partial = Partial({})
    partial.add('{"good": "yes", ')

    for char in rest + ' "later": 1}':
        partial.add(char)

    partial.value.pop("a", None)
    assert partial.value == {"good": "yes"}
    assert not partial.closed


def test_an_endless_nesting_is_no_crash() -> None:
    partial = Partial({})

    partial.add("[" * 100_000)

    assert not partial.closed


def test_the_document_is_found_in_its_envelope() -> None:
    quotes = '"evidence": [{"path": "", "quote": "data"}]'
    document = {"rows": ["a", "b"]}
    text = f'{{{quotes}, "data": {json.dumps(document)}, {quotes}}}'

    partial = Partial({"properties": {"rows": {"items": {"type": "string"}}}}, ["data"])
    items: list[Item] = []
    for char in text:
        partial.add(char)
        items += partial.items()

    assert partial.value == document
    assert items == [Item("/rows", 0, "a"), Item("/rows", 1, "b")]


def test_an_item_is_told_once_when_it_is_closed() -> None:
    partial = Partial(INVOICE)
    told: list[tuple[int, Item]] = []
    for at, char in enumerate(ANSWER):
        partial.add(char)
        told += [(at, item) for item in partial.items()]

    lines = json.loads(ANSWER)["lines"]
    assert [item for _, item in told] == [Item("/lines", 0, lines[0]), Item("/lines", 1, lines[1])]
    assert [ANSWER[at] for at, _ in told] == ["}", "}"]


def test_a_root_list_has_items_and_a_list_further_down_has_none() -> None:
    partial = Partial({"items": {"properties": {"tags": {"type": "array"}}}})

    partial.add('[{"tags": ["a", "b"]}, {"tags": []}, ')

    assert partial.items() == [Item("", 0, {"tags": ["a", "b"]}), Item("", 1, {"tags": []})]


def test_no_item_is_told_that_does_not_fit_and_none_takes_its_place() -> None:
    partial = Partial({"items": {"enum": ["go", "gold"]}})

    partial.add('["gold", "golden", "go"]')

    assert partial.value == ["gold"]
    assert partial.items() == [Item("", 0, "gold"), Item("", 2, "go")]


def test_numbers_keep_their_digits() -> None:
    partial = Partial({})

    partial.add("[9007199254740993, 1.50, 0.10000000000000000001 ]")

    assert list(map(str, partial.value)) == ["9007199254740993", "1.50", "0.10000000000000000001"]


def test_a_long_answer_costs_what_its_length_costs() -> None:
    def seconds(lines: int) -> float:
        line = '{"text": "A pen with a rather long name", "unit": "piece", "amount": 12}'
        text = '{"lines": [' + ", ".join([line] * lines) + "]}"
        partial = Partial(INVOICE)
        start = time.process_time()
        for at in range(0, len(text), 50):
            partial.add(text[at : at + 50])
        assert len(partial.items()) == lines
        return time.process_time() - start

    assert seconds(8000) < 20 * max(seconds(1000), 0.01)

"""Strict mode's copy of any schema, and the way back."""

import json
import random
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest

from app.core.errors import AppError
from app.schemas.extractions import all_schemas
from app.services.answers import Unfit
from app.services.json_schema import JsonSchema, bounded
from app.services.strict import report, strictly
from tests.test_services.test_json_schema import groups

Json = dict[str, Any]

TEXT = {"type": "string"}
WHOLE = {"type": "integer"}


def closed(**properties: Any) -> Json:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def pair(value: Json) -> Json:
    return {"type": "array", "items": closed(key=TEXT, value=value)}


def test_a_strict_schema_is_shown_as_it_is() -> None:
    schema = closed(
        name=TEXT,
        at={"type": "string", "format": "date"},
        sizes={"type": "array", "items": {"type": "number", "minimum": 0}, "maxItems": 3},
        kind={"type": "string", "enum": ["a", "b"]},
        more={"anyOf": [closed(x=WHOLE), {"type": "null"}]},
    )

    assert report(schema) == []
    assert strictly(schema).shown == schema
    assert strictly(schema).fold({"name": "x"}) == {"name": "x"}


def test_the_report_says_what_is_not_strict_and_where() -> None:
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "string", "minLength": 1, "format": "uri", "pattern": "^(?!x)"},
            "b/c": {"type": "array", "items": {"type": "object", "additionalProperties": TEXT}},
            "d": {"type": "array"},
            "e": {},
            "f": True,
            "g": {"allOf": [{"$ref": "https://example.com/x"}]},
        },
        "required": ["a", "b/c", "d", "e", "f"],
        "additionalProperties": False,
    }

    assert [(fault["pointer"], fault["keyword"]) for fault in report(schema)] == [
        ("", "required"),
        ("/properties/a", "minLength"),
        ("/properties/a", "format"),
        ("/properties/a", "pattern"),
        ("/properties/b~1c/items", "additionalProperties"),
        ("/properties/d", "items"),
        ("/properties/e", "type"),
        ("/properties/f", "type"),
        ("/properties/g", "allOf"),
        ("/properties/g", "type"),
        ("/properties/g/allOf/0", "$ref"),
    ]
    for root in (True, {}, {"type": "string"}, {"anyOf": [closed(), closed(a=TEXT)]}):
        assert report(root)[0]["keyword"] == "type"


SHOWN: dict[str, tuple[Any, Json]] = {
    "a text": (TEXT, TEXT),
    "anything": (True, {"type": "string", "description": "Any JSON value, written as JSON."}),
    "a constant": ({"const": 3}, {"type": "integer", "enum": [3]}),
    "constants of several types": (
        {"enum": ["a", 1]},
        {"type": ["string", "integer"], "enum": ["a", 1]},
    ),
    "one of": ({"oneOf": [TEXT, WHOLE]}, {"anyOf": [TEXT, WHOLE]}),
    "all of": (
        {"allOf": [{"type": "string"}, {"format": "date"}]},
        {"type": "string", "format": "date"},
    ),
    "what strict mode does not know": ({"type": "string", "minLength": 3, "format": "uri"}, TEXT),
    "a map": ({"type": "object", "additionalProperties": WHOLE}, pair(WHOLE)),
    "patterns for names": (
        {"patternProperties": {"^x": WHOLE}, "additionalProperties": False},
        pair(WHOLE),
    ),
    "several types": ({"type": ["string", "null"]}, {"type": ["string", "null"]}),
    "a list or a text": (
        {"type": ["array", "string"], "items": WHOLE},
        {"anyOf": [{"type": "array", "items": WHOLE}, TEXT]},
    ),
    "a tuple": (
        {"prefixItems": [TEXT, WHOLE], "items": False},
        {"type": "array", "items": {"anyOf": [TEXT, WHOLE]}},
    ),
    "lists that nobody could tell apart": (
        {
            "anyOf": [
                {"type": "object", "additionalProperties": WHOLE},
                {"type": "array", "items": TEXT},
            ]
        },
        {"type": "string", "description": "Any JSON value, written as JSON."},
    ),
}


@pytest.mark.parametrize("name", SHOWN)
def test_any_other_root_stands_under_value(name: str) -> None:
    schema, shown = SHOWN[name]

    assert strictly(schema).shown == closed(value=shown)


def test_what_may_be_missing_is_null_and_dropped_again() -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": TEXT,
            "kind": {"enum": ["a"]},
            "nick": {"type": ["string", "null"]},
            "at": {"type": "object", "properties": {"x": WHOLE}},
        },
        "required": ["name"],
    }
    strict = strictly(schema)

    assert strict.shown == closed(
        name=TEXT,
        kind={"type": ["string", "null"], "enum": ["a", None]},
        nick={"type": ["string", "null"]},
        at={"anyOf": [closed(x={"type": ["integer", "null"]}), {"type": "null"}]},
    )
    answer = {"name": "Ada", "kind": None, "nick": None, "at": {"x": None}}
    assert strict.fold(answer) == {"name": "Ada", "nick": None, "at": {}}
    assert strict.fold({**answer, "name": None, "at": None}) == {"name": None, "nick": None}


def test_a_schema_may_refer_to_itself() -> None:
    tree = {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"name": TEXT, "next": {"$ref": "#/$defs/node"}},
                "required": ["name"],
            }
        },
        "$ref": "#/$defs/node",
    }
    strict = strictly(tree)

    assert report(strict.shown) == []
    answer = {"name": "a", "next": {"name": "b", "next": None}}
    assert JsonSchema(strict.shown).faults(answer) == []
    assert strict.fold(answer) == {"name": "a", "next": {"name": "b"}}


def test_the_branch_that_was_meant_is_folded() -> None:
    a = {"properties": {"kind": {"const": "a"}, "x": TEXT}, "required": ["kind"]}
    b = {
        "properties": {"kind": {"const": "b"}, "x": {"type": ["string", "null"]}},
        "required": ["kind"],
    }
    strict = strictly({"anyOf": [{"type": "object", **a}, {"type": "object", **b}]})

    assert strict.fold({"value": {"kind": "a", "x": None}}) == {"kind": "a"}
    assert strict.fold({"value": {"kind": "b", "x": None}}) == {"kind": "b", "x": None}


def test_json_in_a_text_keeps_its_digits() -> None:
    fold = strictly(True).fold

    assert fold({"value": '{"a": [1, 0.10, 90071992547409930]}'}) == {
        "a": [1, Decimal("0.10"), 90071992547409930]
    }


@pytest.mark.parametrize(
    ("schema", "answer", "code"),
    [
        (True, {"value": "Ada"}, "invalid_json"),
        (True, {"value": '{"a": 1, "a": 2}'}, "duplicate_key"),
        (TEXT, {}, "required"),
        (TEXT, ["x"], "required"),
        (
            {"additionalProperties": WHOLE},
            {"value": [{"key": "a", "value": 1}, {"key": "a", "value": 2}]},
            "duplicate_key",
        ),
    ],
)
def test_what_cannot_be_folded_is_told(schema: Any, answer: Any, code: str) -> None:
    with pytest.raises(Unfit) as unfit:
        strictly(schema).fold(answer)

    assert unfit.value.faults[0].keyword == code


@pytest.mark.parametrize(
    "answer",
    [None, 1, "x", [], [1], {}, {"a": 1}, {"value": 1}, {"value": [{"key": {}, "value": 1}]}],
)
def test_an_answer_of_another_form_is_left_to_the_judge(answer: Any) -> None:
    for schema in (
        {"type": "object", "properties": {"a": {"additionalProperties": WHOLE}}},
        {"type": "array", "items": {"additionalProperties": WHOLE}},
        {"properties": {"a": TEXT}, "additionalProperties": WHOLE},
    ):
        try:
            strictly(schema).fold(answer)
        except Unfit as unfit:
            assert unfit.faults[0].keyword == "required"


def test_a_property_may_be_described_in_many_places() -> None:
    part = {"properties": {"a": {"items": TEXT, "type": "array"}}}

    assert strictly({"allOf": [part] * 1500, "required": ["a"]}).shown == closed(
        a={"type": "array", "items": TEXT}
    )


def test_every_copy_is_strict() -> None:
    schemas = [model.model_json_schema() for model in all_schemas().values()]
    for _, group in groups():
        try:
            bounded(group["schema"])
            JsonSchema(group["schema"])
        except AppError:
            continue
        schemas.append(group["schema"])

    for schema in schemas:
        shown = strictly(schema).shown
        assert report(shown) == [], schema
        JsonSchema(shown)
    assert len(schemas) > 300


# What a schema allows, and each value as strict mode's copy has it said: (value, said).
Made = tuple[Any, Any]
Maker = Callable[[random.Random], Made]


def a_text(rng: random.Random) -> Made:
    text = rng.choice(["", "Ada", "null", "1", '{"a": 1}', "ä\u0000", "[]"])
    return text, text


def a_number(rng: random.Random) -> Made:
    number = rng.choice([0, -1, 2**60, 0.5, True, None])
    return number, number


def anything(rng: random.Random) -> Made:
    value = rng.choice([None, 1, "x", [1, {"a": None}], {"key": "k", "value": []}, {}, True])
    return value, json.dumps(value)


def construct(rng: random.Random, depth: int = 0) -> tuple[Any, Maker]:
    """A random schema, and what makes values of it."""
    kinds = ["text", "number", "anything"]
    if depth < 3:
        kinds += ["object", "map", "list", "tuple", "mixed", "nullable", "all", "union"] * 2
    kind = rng.choice(kinds)
    if kind == "text":
        return {"type": "string", "maxLength": 100}, a_text
    if kind == "number":
        return {"type": ["number", "boolean", "null"]}, a_number
    if kind == "anything":
        return rng.choice([True, {}, {"description": "Whatever."}]), anything
    if kind in ("object", "all", "mixed"):
        return an_object(rng, depth, kind)
    schema, make = construct(rng, depth + 1)
    if kind == "map":

        def a_map(rng: random.Random) -> Made:
            made = {f"k{n}": make(rng) for n in range(rng.randrange(3))}
            pairs = [{"key": name, "value": said} for name, (_, said) in made.items()]
            return {name: value for name, (value, _) in made.items()}, pairs

        return {"type": "object", "additionalProperties": schema}, a_map
    if kind == "list":

        def a_list(rng: random.Random) -> Made:
            made = [make(rng) for _ in range(rng.randrange(3))]
            return [value for value, _ in made], [said for _, said in made]

        return {"type": "array", "items": schema}, a_list
    if kind == "tuple":
        other, make_other = construct(rng, depth + 1)

        def a_tuple(rng: random.Random) -> Made:
            made = [make(rng), make_other(rng)]
            return [value for value, _ in made], [said for _, said in made]

        return {"type": "array", "prefixItems": [schema, other], "items": False}, a_tuple

    body, make_body = an_object(rng, depth, "object")
    body["properties"]["kind"] = {"const": kind}
    body["required"].append("kind")
    second, make_second = an_object(rng, depth, "object")
    second["properties"]["kind"] = {"const": "second"}
    second["required"].append("kind")
    is_union = kind == "union"

    def a_branch(rng: random.Random) -> Made:
        if not is_union and rng.random() < 0.5:
            return None, None
        if is_union and rng.random() < 0.5:
            value, said = make_second(rng)
            return {**value, "kind": "second"}, {**said, "kind": "second"}
        value, said = make_body(rng)
        return {**value, "kind": kind}, {**said, "kind": kind}

    return {"oneOf": [body, second if is_union else {"type": "null"}]}, a_branch


def an_object(rng: random.Random, depth: int, kind: str) -> tuple[Any, Maker]:
    parts = {f"p{n}": construct(rng, depth + 1) for n in range(rng.randrange(1, 4))}
    properties = {name: schema for name, (schema, _) in parts.items()}
    takes_null = {
        name for name, schema in properties.items() if JsonSchema(schema).faults(None) == []
    }
    required = [name for name in parts if name in takes_null or rng.random() < 0.5]
    schema: Json = {"type": "object", "properties": properties, "required": required}
    if kind == "all":
        schema = {"allOf": [{"type": "object", "properties": properties}, {"required": required}]}
    if kind == "mixed":
        schema["additionalProperties"] = WHOLE

    def make(rng: random.Random) -> Made:
        value: Json = {}
        said: Json = {}
        for name, (_, make_part) in parts.items():
            if name in required or rng.random() < 0.5:
                value[name], said[name] = make_part(rng)
            else:
                said[name] = None
        if kind == "mixed":
            more = {f"m{n}": n for n in range(rng.randrange(3))}
            value |= more
            said["additional_properties"] = [{"key": k, "value": v} for k, v in more.items()]
        return value, said

    return schema, make


@pytest.mark.parametrize("seed", range(200))
def test_what_is_said_in_the_copy_is_folded_into_what_was_meant(seed: int) -> None:
    rng = random.Random(seed)
    schema, make = construct(rng)
    strict = strictly(schema)
    is_wrapped = strict.shown.get("properties", {}).keys() == {"value"}

    assert report(strict.shown) == []
    for _ in range(10):
        value, said = make(rng)
        said = {"value": said} if is_wrapped else said
        assert JsonSchema(schema).faults(value) == []
        assert JsonSchema(strict.shown).faults(said) == [], (schema, strict.shown)
        folded = strict.fold(said)
        assert json.dumps(folded, sort_keys=True) == json.dumps(value, sort_keys=True), schema

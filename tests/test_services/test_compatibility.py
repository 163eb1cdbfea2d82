"""What a new version of a schema may change for those who read results."""

import time
from typing import Any

import pytest

from app.services.compatibility import compare
from app.services.json_schema import bounded

Json = dict[str, Any]

PERSON: Json = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
}
STRICTER: Json = {**PERSON, "required": ["name", "age"]}
LOOSER: Json = {**PERSON, "required": []}

CHANGES: dict[str, tuple[Any, Any, str]] = {
    "a property added": (PERSON, {**PERSON, "properties": {**PERSON["properties"], "x": {}}}, "+"),
    "a property added to a closed object": (
        {**PERSON, "additionalProperties": False},
        {**PERSON, "additionalProperties": False, "properties": {**PERSON["properties"], "x": {}}},
        "-",
    ),
    "a property gone": (
        PERSON,
        {**PERSON, "properties": {"name": {"type": "string"}}},
        "-",
    ),
    "one required more": (PERSON, STRICTER, "+"),
    "one required less": (PERSON, LOOSER, "-"),
    "another description": (PERSON, {**PERSON, "description": "A person."}, "+"),
    "an enumeration narrowed": ({"enum": ["a", "b"]}, {"enum": ["a"]}, "+"),
    "an enumeration widened": ({"enum": ["a"]}, {"enum": ["a", "b"]}, "-"),
    "a range narrowed": ({"type": "number"}, {"type": "integer", "minimum": 3}, "+"),
    "a range loosened": ({"type": "integer", "maximum": 3}, {"type": "integer"}, "-"),
    "a null allowed": ({"type": "string"}, {"type": ["string", "null"]}, "-"),
    "another pattern": (
        {"type": "string", "pattern": "^a"},
        {"type": "string", "pattern": "^b"},
        "-",
    ),
    "another draft": (
        {"$schema": "http://json-schema.org/draft-07/schema#", "type": "string"},
        {"type": "string"},
        "-",
    ),
    "a reference for what it says": (
        {"items": {"type": "string"}, "type": "array"},
        {
            "type": "array",
            "items": {"$ref": "#/$defs/text"},
            "$defs": {"text": {"type": "string"}},
        },
        "+",
    ),
    "anything before": (True, PERSON, "+"),
    "anything now": (PERSON, True, "-"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_who_could_read_the_old_results_can_read_compatible_ones(change: str) -> None:
    old, new, sign = CHANGES[change]

    assert compare(old, new) == {"+": "compatible", "-": "breaking"}[sign]


def test_the_same_schema_is_identical() -> None:
    assert compare(PERSON, dict(reversed(PERSON.items()))) == "identical"
    assert compare(True, True) == "identical"
    assert compare({"const": 1}, {"const": True}) == "breaking"


def hostile(least: int) -> Json:
    unions = [
        {
            "anyOf": [
                {"type": "object", "properties": {f"a{i}{k}": {"type": "string"}}} for k in range(9)
            ]
        }
        for i in range(9)
    ]
    return {"allOf": unions, "minProperties": least}


def wide(least: int) -> Json:
    return {"minProperties": least, "properties": {f"p{n}": hostile(n) for n in range(10)}}


def multiples(least: int) -> Json:
    return {
        "type": "integer",
        "allOf": [{"multipleOf": 10**n + 1} for n in range(60)],
        "minimum": least,
    }


@pytest.mark.parametrize("schema", [hostile, wide, multiples])
def test_no_comparison_takes_long(schema: Any) -> None:
    old, new = schema(1), schema(2)
    bounded(new)
    begun = time.perf_counter()

    assert compare(old, new) == "breaking"
    assert time.perf_counter() - begun < 1

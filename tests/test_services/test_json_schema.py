"""The judge of answers, against the JSON Schema organisation's public cases and hostile schemas.

tests/data/json-schema-test-suite: the required cases of draft 2020-12 from
github.com/json-schema-org/JSON-Schema-Test-Suite at commit 44401e0c (MIT, its LICENSE beside them).
"""

import contextlib
import copy
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.core.errors import AppError, Invalid
from app.services.chunks import find_list
from app.services.evidence import ground
from app.services.json_schema import JsonSchema, SchemaRejected, bounded
from app.services.places import Place
from app.services.strict import report, strictly

Json = dict[str, Any]

SUITE = Path(__file__).parents[1] / "data/json-schema-test-suite/draft2020-12"
DRAFTS = [
    "http://json-schema.org/draft-07/schema#",
    "https://json-schema.org/draft/2019-09/schema",
    "https://json-schema.org/draft/2020-12/schema",
]


def groups() -> Iterator[tuple[str, Json]]:
    for path in sorted(SUITE.glob("*.json")):
        yield from ((path.stem, group) for group in json.loads(path.read_text()))


def test_the_public_cases_are_judged_as_they_say() -> None:
    seen, remote = Counter[str](), 0
    wrong: list[str] = []
    for file, group in groups():
        try:
            judge = JsonSchema(group["schema"])
        except SchemaRejected as refused:
            assert refused.details["reason"] == "remote_ref", (file, group["description"])
            remote += len(group["tests"])
            continue
        for case in group["tests"]:
            seen[file] += 1
            if (judge.faults(case["data"]) == []) != case["valid"]:
                wrong.append(f"{file}: {case['description']}")

    # The suite's other documents are never fetched; and by itself a format only annotates, which
    # this judge makes an assertion of.
    formats = [case for case in wrong if case.endswith("is only an annotation by default")]
    print(f"\n{seen.total()} cases, {len(wrong)} differ (formats: {len(formats)}), {remote} remote")
    assert wrong == formats
    assert (seen.total(), len(formats), remote) == (1250, 19, 49)


def test_what_of_the_public_schemas_is_not_taken_from_a_caller() -> None:
    reasons: Counter[str] = Counter()
    for _, group in groups():
        try:
            bounded(group["schema"])
            JsonSchema(group["schema"])
        except SchemaRejected as refused:
            reasons[refused.details["reason"]] += 1
        else:
            reasons["taken"] += 1

    print(f"\n{dict(reasons)}")
    assert reasons == {"taken": 325, "remote_ref": 52, "unsupported": 4, "recursive_ref": 2}


def told(schema: Any, value: Any) -> list[tuple[str, str]]:
    return [(fault.pointer, fault.keyword) for fault in JsonSchema(schema).faults(value)]


def said(schema: Any, value: Any) -> str:
    return " | ".join(str(fault) for fault in JsonSchema(schema).faults(value))


CIRCLE = {
    "type": "object",
    "properties": {"kind": {"const": "circle"}, "radius": {"type": "number"}},
    "required": ["kind", "radius"],
}
SQUARE = {
    "type": "object",
    "properties": {"kind": {"const": "square"}, "side": {"type": "number"}},
    "required": ["kind", "side"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("union", ["anyOf", "oneOf"])
def test_the_branch_that_was_meant_says_what_is_wrong(union: str) -> None:
    shape = {union: [CIRCLE, SQUARE, {"type": "null"}, {"type": "string"}]}

    assert told(shape, {"kind": "circle", "radius": "3"}) == [("/radius", "type")]
    assert told(shape, {"kind": "square", "side": 2, "x": 1}) == [("", "additionalProperties")]
    assert told(shape, {"kind": "square"}) == [("", "required")]


def test_a_union_of_unions_is_looked_through() -> None:
    schema = {
        "$defs": {"shape": {"oneOf": [CIRCLE, SQUARE]}},
        "properties": {
            "shapes": {
                "type": "array",
                "items": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/shape"}]},
            }
        },
    }

    assert told(schema, {"shapes": [None, {"kind": "circle"}]}) == [("/shapes/1", "required")]


def test_a_value_of_no_branch_is_told_them_all() -> None:
    schema = {"anyOf": [{"anyOf": [{"type": "integer"}, {"type": "null"}]}, {"enum": ["n/a"]}]}

    text = said(schema, "x")

    assert all(part in text for part in ("integer", "null", "n/a")), text
    assert len(JsonSchema(schema).faults("x")) == 1


def test_more_than_one_branch_of_oneof_says_so() -> None:
    assert "more than one" in said({"oneOf": [{"type": "integer"}, {"minimum": 1}]}, 3)


def test_what_is_missing_or_too_much_is_told_of_its_object() -> None:
    schema = {
        "properties": {"a/b": {"type": "object", "required": ["~x"]}, "n": {}},
        "additionalProperties": False,
    }

    assert told(schema, {"a/b": {}, "y": 1}) == [
        ("/a~1b", "required"),
        ("", "additionalProperties"),
    ]
    assert "'y' was unexpected" in said(schema, {"y": 1})


def test_faults_are_few_and_short() -> None:
    faults = JsonSchema({"items": {"maxLength": 1}}).faults(["x" * 10_000] * 100)

    assert len(faults) == 20
    assert max(len(fault.message) for fault in faults) < 400


@pytest.mark.parametrize("draft", DRAFTS)
def test_formats_are_asserted_and_unknown_ones_are_not(draft: str) -> None:
    schema = {"$schema": draft, "items": {"format": "date"}}

    assert told(schema, ["2024-02-29", "2023-02-29"]) == [("/1", "format")]
    assert told({"$schema": draft, "format": "phone number"}, "x") == []


WIDE = {"type": "array", "items": {"anyOf": [{"required": [f"k{n}"]} for n in range(2000)]}}
SHAPES = {"type": "array", "items": {"oneOf": [CIRCLE, SQUARE]}}
LONG = [{"kind": "circle", "radius": n} for n in range(5000)]


@pytest.mark.parametrize(
    ("schema", "value", "faults"),
    [
        (WIDE, [{"a": n} for n in range(300)], [("/0", "required")]),
        ({"anyOf": [WIDE]}, [{"a": n} for n in range(300)], [("", "anyOf")]),
        ({"oneOf": [WIDE, {"type": "null"}]}, [{"a": n} for n in range(300)], [("", "oneOf")]),
        (
            {"anyOf": [SHAPES, {"type": "null"}]},
            [*LONG, {"kind": "circle", "radius": "3"}],
            [("/5000/radius", "type")],
        ),
        (
            {"items": {"required": [f"k{n}" for n in range(4000)]}},
            [{"a": n} for n in range(300)],
            [("/0", "required")],
        ),
        ({"anyOf": [{"maxLength": n} for n in range(2000)]}, "x" * 500_000, [("", "anyOf")]),
    ],
)
def test_of_what_takes_long_to_tell_the_first_fault_is_told(
    schema: Any, value: Any, faults: Any
) -> None:
    bounded(schema)
    begun = time.perf_counter()

    assert told(schema, value) == faults
    assert time.perf_counter() - begun < 2


@pytest.mark.parametrize(
    "pattern",
    [
        r"^[\p{L}\p{M} .'-]+$",
        r"^[A-Z]{2}\d{2}[A-Z0-9]{11,30}$",
        r"^[A-Za-z0-9._%+-]{1,255}@[A-Za-z0-9.-]{1,255}\.[A-Za-z]{2,63}$",
        r"^(?=.*[a-z])(?=.*[A-Z])(?=.*\d)(?=.*[^A-Za-z0-9]).{8,64}$",
        r"^\w{1,255}$",
        r"^.{1,100}$",
    ],
)
def test_the_usual_patterns_are_taken(pattern: str) -> None:
    bounded({"pattern": pattern})
    JsonSchema({"pattern": pattern})


def test_a_schema_is_judged_by_its_own_draft() -> None:
    seventh = {"$schema": DRAFTS[0], "items": [{"type": "string"}]}

    assert told(seventh, [1]) == [("/0", "type")]
    assert told({"prefixItems": [{"type": "string"}]}, [1]) == [("/0", "type")]


def test_whole_numbers_of_any_size_are_told_apart() -> None:
    assert told({"const": 2**53 + 1}, 2**53) == [("", "const")]
    assert told({"const": 10**40}, 10**40) == []
    assert told({"type": "integer"}, 1.0) == []
    assert told({"type": "integer"}, True) == [("", "type")]


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "^(?:(?=a)a+)+(?=x)$", r"(a*)*\1b", "(a|aa)+(?<!b)$", "^(a|a?)+$"]
)
def test_no_pattern_takes_long(pattern: str) -> None:
    judge = JsonSchema({"items": {"pattern": pattern}, "propertyNames": {"pattern": pattern}})
    begun = time.perf_counter()

    judge.faults(["a" * 30 + "!", "a" * 30_000 + "!"])
    judge.faults({"a" * 30 + "!": 1})

    assert time.perf_counter() - begun < 1


def deep(levels: int) -> Json:
    schema: Json = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


def doubling(levels: int) -> Json:
    both = {
        f"d{level}": {"allOf": [{"$ref": f"#/$defs/d{level + 1}"}] * 2} for level in range(levels)
    }
    return {"$defs": {**both, f"d{levels}": {}}, "$ref": "#/$defs/d0"}


REFUSED: dict[str, tuple[Any, str]] = {
    "a list": ([], "invalid"),
    "a text": ("string", "invalid"),
    "no type of that name": ({"type": "text"}, "invalid"),
    "no such definition": ({"$ref": "#/$defs/x"}, "invalid"),
    "no such anchor": ({"$ref": "#x"}, "invalid"),
    "NaN": ({"const": float("nan")}, "invalid"),
    "infinity": ({"maximum": float("inf")}, "invalid"),
    "half a surrogate": ({"const": "\ud800"}, "invalid"),
    "another server's": ({"$ref": "https://example.com/x.json"}, "remote_ref"),
    "a file's": ({"properties": {"a": {"$ref": "file:///etc/passwd"}}}, "remote_ref"),
    "a dialect of another server": ({"$schema": "http://localhost:9/x"}, "remote_ref"),
    "itself": ({"properties": {"next": {"$ref": "#"}}}, "recursive_ref"),
    "itself, dynamically": (
        {"$dynamicAnchor": "n", "items": {"$dynamicRef": "#n"}},
        "recursive_ref",
    ),
    "each other": (
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        "recursive_ref",
    ),
    "deep": (deep(70), "too_deep"),
    "deep beyond any stack": (deep(5000), "too_deep"),
    "deep once written out": (
        {
            "$defs": {f"d{n}": {"items": {"$ref": f"#/$defs/d{n + 1}"}} for n in range(80)}
            | {"d80": {}},
            "$ref": "#/$defs/d0",
        },
        "too_deep",
    ),
    "many once written out": (doubling(20), "too_large"),
    "ten thousand fields": ({"properties": {f"p{n}": {} for n in range(10_001)}}, "too_large"),
    "many patterns": ({"anyOf": [{"pattern": f"^{n}"} for n in range(101)]}, "too_large"),
    "a pattern of many parts": (
        {"pattern": "(?=(" + r"\p{L}{3}(?=z)|" * 50 + "x))"},
        "too_large",
    ),
    "large patterns": (
        {"allOf": [{"pattern": r"^(?:\p{L}|\p{N}){20}" + f"x{n}$"} for n in range(60)]},
        "unsupported_pattern",
    ),
    "an old draft": (
        {
            "$schema": "http://json-schema.org/draft-04/schema#",
            "minimum": 1,
            "exclusiveMinimum": True,
        },
        "unsupported",
    ),
    "an id below": ({"properties": {"a": {"$id": "https://example.com/a"}}}, "unsupported"),
    "no pattern": ({"pattern": "["}, "unsupported_pattern"),
    "no pattern as a name": ({"patternProperties": {"(": {}}}, "unsupported_pattern"),
    "a pattern that explodes": ({"pattern": "((a{1,99}){1,99}){1,99}"}, "unsupported_pattern"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_schema_is_refused_with_its_reason(name: str) -> None:
    schema, reason = REFUSED[name]

    with pytest.raises(SchemaRejected) as refused:
        bounded(schema)
        JsonSchema(schema)

    assert (refused.value.status, refused.value.error_code) == (422, "schema_rejected")
    assert refused.value.details == {"reason": reason}
    assert len(refused.value.message) < 500


def test_a_mebibyte_is_the_largest_schema() -> None:
    room = 1024 * 1024 - len('{"description":""}')
    bounded({"description": "x" * room})

    with pytest.raises(AppError) as refused:
        bounded({"description": "x" * (room + 1)})

    assert (refused.value.status, refused.value.error_code) == (413, "too_large")


@pytest.mark.parametrize("schema", [True, False, {}, {"type": "string"}, deep(60)])
def test_any_other_schema_is_taken(schema: Any) -> None:
    bounded(schema)
    JsonSchema(schema)


WORDS = [
    *("type", "properties", "required", "items", "prefixItems", "anyOf", "allOf", "$ref", "$defs"),
    *("dependentSchemas", "enum", "const", "pattern", "additionalProperties", "x-meta", "then"),
    *("patternProperties", "exclusiveMinimum", "$dynamicRef", "$anchor", "minItems", "not"),
]
VALUES: list[Any] = [
    *(None, 5, "x", "object", "array", True, False, [], {}, ["a"], [{}], {"a": 5}, {"a": {}}),
    *({"properties": 5}, {"properties": {"a": {}}, "required": 5}, {"type": 5}, {"anyOf": 5}),
    *("#", "#/$defs/a", "#/x-meta", "#/properties/a", "#a", {"required": [{}]}),
]


def parts(value: Any) -> Iterator[Any]:
    if isinstance(value, (dict, list)):
        yield value
        for each in value.values() if isinstance(value, dict) else value:  # pyright: ignore
            yield from parts(each)


def mutated(rng: random.Random, schema: Any) -> Json:
    found: Json = copy.deepcopy(schema) if isinstance(schema, dict) else {"allOf": [schema]}
    if rng.random() < 0.5:
        found["$schema"] = rng.choice(DRAFTS)
    for _ in range(rng.randrange(1, 4)):
        part = rng.choice(list(parts(found)))
        if isinstance(part, dict):
            part[rng.choice(WORDS)] = copy.deepcopy(rng.choice(VALUES))
        elif part:
            part[rng.randrange(len(part))] = copy.deepcopy(rng.choice(VALUES))
    return found


@pytest.mark.parametrize("seed", range(10))
def test_whatever_schema_is_taken_can_be_used_everywhere(seed: int) -> None:
    rng = random.Random(seed)
    cases = [group for _, group in groups()]
    taken = 0
    for _ in range(100):
        group = rng.choice(cases)
        schema = mutated(rng, group["schema"])
        try:
            bounded(schema)
            JsonSchema(schema)
        except SchemaRejected:
            continue
        taken += 1
        report(schema)
        strict = strictly(schema)
        JsonSchema(strict.shown)
        with contextlib.suppress(Invalid):
            find_list(schema, None)
        for case in group["tests"]:
            JsonSchema(schema).faults(case["data"])
            ground(case["data"], [{"path": "", "quote": "x"}], "x", schema, required=True)
            place = Place(schema)
            for each in (place, place.member("a"), place.element(0)):
                each.fits(case["data"])
                assert each.takes_text in (True, False)
    assert taken > 5

"""Whatever schema an extraction is asked for: judged by, shown to the model, or refused at once."""

import asyncio
from typing import Any

from httpx2 import AsyncClient

from tests.extracting import (
    ADA,
    PERSON,
    Json,
    document,
    extract,
    fills,
    refusal,
    shown,
    told,
)
from tests.toolserver import ToolServer
from tests.upstream import Upstream

ROOTS: list[tuple[Any, Any]] = [
    (True, {"any": ["thing", None, 1.5]}),
    (True, None),
    ({}, "text"),
    ({"type": "array", "items": {"type": "integer"}}, [1, 2]),
    ({"type": "integer"}, 7),
    ({"type": ["object", "null"]}, None),
    ({"enum": ["red", "green"]}, "red"),
    ({"$ref": "#/$defs/age", "$defs": {"age": {"type": "integer"}}}, 36),
    ({"anyOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"$anchor": "x"}}}, "text"),
    ({"const": {"$ref": "#/x"}}, {"$ref": "#/x"}),
    ({"type": "integer"}, 2**70),
    ({"type": "array"}, [10**400, -(10**400), 1e300]),
    ({"type": "string"}, "NUL \0 and \U0001f600"),
]


async def test_any_root_can_be_asked_for(alice: AsyncClient, upstream: Upstream) -> None:
    for schema, value in ROOTS:
        upstream.when("Ada", fills({"value": value}))

        assert await document(alice, schema=schema) == value
        parameters = shown(upstream)["parameters"]
        assert (parameters["type"], parameters["required"]) == ("object", ["value"])


async def test_nothing_fulfils_false(alice: AsyncClient, upstream: Upstream) -> None:
    upstream.when("Ada", fills({"value": 1}))

    error = await refusal(alice, 422, schema=False)

    assert error["code"] == "extraction_invalid"
    assert len(error["attempts"]) == 3


async def test_a_wrapped_root_is_pointed_to_as_each_side_sees_it(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", fills({"value": [1, "two"]}), fills({"value": [1, 2]}))

    answer = await extract(alice, schema={"type": "array", "items": {"type": "integer"}})

    [error] = answer.json()["attempts"][0]["errors"]
    assert error["pointer"] == "/1"
    assert '/value/1: "two" is not of type "integer"' in told(upstream)


async def test_references_of_a_wrapped_root_lead_where_it_now_stands(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", fills({"value": [36]}))
    schema = {
        "type": "array",
        "items": {"$ref": "#/$defs/age"},
        "$defs": {"age": {"type": "integer"}},
    }

    await document(alice, schema=schema)

    value = shown(upstream)["parameters"]["properties"]["value"]
    assert value["items"] == {"$ref": "#/properties/value/$defs/age"}
    assert value["$defs"] == schema["$defs"]


async def test_pointers_escape_what_keys_may_hold(alice: AsyncClient, upstream: Upstream) -> None:
    upstream.when("Ada", fills({"a/b~c": 1}))
    schema = {"type": "object", "properties": {"a/b~c": {"type": "string"}}}

    error = await refusal(alice, 422, schema=schema, options={"max_attempts": 1})

    assert error["attempts"][0]["errors"][0]["pointer"] == "/a~1b~0c"


async def test_a_title_of_any_kind_becomes_a_function_name(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", fills(ADA))

    await document(alice, schema=PERSON | {"title": "A person's data: naïve?" + "x" * 100})

    assert shown(upstream)["name"].isascii()
    assert shown(upstream)["name"].replace("_", "").isalnum()
    assert len(shown(upstream)["name"]) <= 64


async def test_a_registered_schema_is_found_by_its_name(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", fills({"name": "Ada Lovelace", "email": "ada@example.com"}))

    answer = (await extract(alice, schema_ref="contact")).json()

    assert answer["data"]["name"] == "Ada Lovelace"
    assert answer["schema"]["name"] == "contact"
    assert shown(upstream)["name"] == "Contact"


async def test_a_registered_class_judges_and_explains(
    alice: AsyncClient, upstream: Upstream
) -> None:
    good = {"supplier": "ACME", "total": "12.50", "currency": "EUR"}
    bad = good | {"currency": "Euro", "lines": [{"description": "x", "amount": "much"}]}
    upstream.when("ACME", fills(bad), fills(good))

    answer = (await extract(alice, text="ACME 12.50 EUR", schema_ref="invoice")).json()

    errors = answer["attempts"][0]["errors"]
    assert {error["pointer"] for error in errors} == {"/currency", "/lines/0/amount"}
    assert "/lines/0/amount: Input should be a valid decimal" in told(upstream)
    assert "Read one supplier invoice" in upstream.requests[0].body["messages"][0]["content"]


async def test_amounts_keep_their_digits(alice: AsyncClient, upstream: Upstream) -> None:
    long = "1234567890123456789.1234567890"
    for written, total in (("12.50", "12.50"), ('"12.50"', "12.50"), (long, long), ("9", "9")):
        answer = f'{{"supplier": "ACME", "total": {written}, "currency": "EUR"}}'
        upstream.when("ACME", fills(answer))

        found = await document(alice, text="ACME", schema_ref="invoice")

        assert found["total"] == total


async def test_dates_come_as_iso_8601(alice: AsyncClient, upstream: Upstream) -> None:
    invoice = {"supplier": "ACME", "total": 1, "currency": "EUR", "issued": "2026-01-31"}
    upstream.when("ACME", fills(invoice))

    assert (await document(alice, text="ACME", schema_ref="invoice"))["issued"] == "2026-01-31"


async def test_an_unknown_name_is_not_found_and_the_known_are_named(alice: AsyncClient) -> None:
    error = await refusal(alice, 404, schema_ref="nope")

    assert error["code"] == "schema_not_found"
    assert "contact, invoice" in error["message"]


async def test_exactly_one_schema_is_given(alice: AsyncClient) -> None:
    for body in ({"schema": PERSON, "schema_ref": "contact"}, {"schema": None}):
        error = await refusal(alice, 422, **body)

        assert "exactly one of schema and schema_ref" in error["message"]


async def test_a_remote_reference_is_refused_without_a_connection(
    alice: AsyncClient, tools: ToolServer
) -> None:
    for schema in (
        {"$ref": f"{tools.url}/schema.json"},
        {"properties": {"a": {"$ref": f"{tools.url}/schema.json#/$defs/a"}}},
        {"$id": f"{tools.url}/", "items": {"$ref": "schema.json"}},
        {"$schema": f"{tools.url}/schema.json"},
        {"$dynamicRef": f"{tools.url}/schema.json#a"},
        {"$ref": "file:///etc/passwd"},
    ):
        error = await refusal(alice, 422, schema=schema)

        assert error["code"] == "schema_rejected"
        assert error["reason"] in ("remote_ref", "invalid")
    assert tools.calls == []


def doubling(levels: int) -> Json:
    """A schema whose references, written out, double with each level."""
    below = {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(levels)}
    return {"$ref": "#/$defs/a0", "$defs": below | {f"a{levels}": {"type": "integer"}}}


def nested(levels: int) -> Json:
    schema: Json = {}
    for _ in range(levels):
        schema = {"not": schema}
    return schema


def chained(length: int) -> Json:
    links: Json = {f"a{n}": {"$ref": f"#/$defs/a{n + 1}"} for n in range(length)}
    return {"$ref": "#/$defs/a0", "$defs": links | {f"a{length}": {"type": "integer"}}}


UNUSABLE: list[tuple[Json, str]] = [
    ({"type": "nope"}, "invalid"),
    ({"$ref": "#/$defs/missing"}, "invalid"),
    ({"pattern": "("}, "unsupported_pattern"),
    ({"pattern": "(a{1000}){1000}"}, "unsupported_pattern"),
    ({"$ref": "#"}, "recursive_ref"),
    ({"type": "object", "properties": {"below": {"$ref": "#"}}}, "recursive_ref"),
    ({"$anchor": "top", "items": {"$ref": "#top"}}, "recursive_ref"),
    (nested(100), "too_deep"),
    (chained(3000), "too_deep"),
    ({"properties": {f"f{n}": {} for n in range(10_000)}}, "too_large"),
    (doubling(20), "too_large"),
]


async def test_a_schema_that_cannot_be_used_is_refused_at_once(
    alice: AsyncClient, upstream: Upstream
) -> None:
    for schema, reason in UNUSABLE:
        async with asyncio.timeout(5):
            error = await refusal(alice, 422, schema=schema)

        assert (error["code"], error["reason"]) == ("schema_rejected", reason)
        assert len(error["message"]) < 500
    assert upstream.requests == []


async def test_a_pattern_that_backtracks_is_judged_in_no_time(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", fills({"value": "a" * 60 + "!"}))

    for pattern in (r"^(a+)+$", r"^(?=(a+)+$)", r"^(a|a)*\1$", r"(?<=x)(a*)*b"):
        async with asyncio.timeout(5):
            error = await refusal(alice, 422, schema={"pattern": pattern})
        assert error["attempts"][0]["errors"][0]["keyword"] == "pattern"


async def test_an_error_message_does_not_repeat_a_whole_answer(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", fills({"value": "x" * 100_000}))

    error = await refusal(alice, 422, schema={"type": "integer"}, options={"max_attempts": 1})

    assert len(error["attempts"][0]["errors"][0]["message"]) < 500

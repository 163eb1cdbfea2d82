"""Text and a schema in; a valid document out, or an error that carries every attempt."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from httpx2 import AsyncClient

from tests.conftest import client_of, settings_of
from tests.extracting import (
    ADA,
    PERSON,
    Json,
    document,
    extract,
    fills,
    quotes,
    refusal,
    shown,
    told,
)
from tests.server import ThreadedServer
from tests.test_services.test_documents import line, pdf
from tests.toolserver import ToolServer
from tests.upstream import Reply, Upstream

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII="
)


async def test_text_becomes_a_valid_document(alice: AsyncClient, upstream: Upstream) -> None:
    upstream.when("Ada", fills(ADA))

    answer = (await extract(alice)).json()

    assert answer["status"] == "completed"
    assert answer["data"] == ADA
    assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    assert answer["model"] == "scripted"
    assert answer["schema"]["name"] == "inline"
    [attempt] = answer["attempts"]
    assert (attempt["ok"], attempt["errors"]) == (True, [])
    assert json.loads(attempt["raw"]) == ADA
    assert (await alice.get(f"/v1/extractions/{answer['id']}")).json() == answer


async def test_nobody_extracts_without_a_credential(anonymous: AsyncClient) -> None:
    assert (await extract(anonymous)).status_code == 401


async def test_another_user_cannot_read_mine(
    alice: AsyncClient, bob: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", fills(ADA))
    mine = (await extract(alice)).json()["id"]

    bob.headers["X-Request-Id"] = "the-same"
    refused = await bob.get(f"/v1/extractions/{mine}")
    missing = await bob.get(f"/v1/extractions/{'0' * 32}")

    assert refused.status_code == missing.status_code == 404
    assert refused.text.replace(mine, "0" * 32) == missing.text


async def test_a_chat_run_is_no_extraction(alice: AsyncClient) -> None:
    run = await alice.post("/v1/responses", json={"model": "assistant", "input": "Hello"})

    assert (await alice.get(f"/v1/extractions/{run.json()['id']}")).status_code == 404


async def test_no_id_breaks_the_reading(alice: AsyncClient) -> None:
    for path in ("x" * 3000, "..%2f..%2fetc", "%ff", "'%20OR%201=1--", "%00"):
        assert (await alice.get(f"/v1/extractions/{path}")).status_code in (404, 422), path


async def test_the_model_is_asked_again_with_places_and_reasons(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when(
        "Ada", fills({"name": "Ada", "age": -1}), fills({"name": 1, "age": 36}), fills(ADA)
    )

    answer = (await extract(alice)).json()

    assert answer["data"] == ADA
    assert [attempt["ok"] for attempt in answer["attempts"]] == [False, False, True]
    [error] = answer["attempts"][0]["errors"]
    assert (error["pointer"], error["keyword"], error["code"]) == ("/age", "minimum", "minimum")
    assert error["message"] == "-1 is less than the minimum of 0"
    assert answer["usage"]["total_tokens"] == 30
    second, third = (seen.body["messages"][-1] for seen in upstream.requests[1:])
    assert second["role"] == third["role"] == "tool"
    assert "/age: -1 is less than the minimum of 0" in second["content"]
    assert '/name: 1 is not of type "string"' in third["content"]


async def test_after_the_last_attempt_the_error_carries_them_all(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", fills({"name": "Ada"}))

    error = await refusal(alice, 422, options={"max_attempts": 2})

    assert error["code"] == "extraction_invalid"
    assert [attempt["ok"] for attempt in error["attempts"]] == [False, False]
    assert [attempt["errors"][0]["keyword"] for attempt in error["attempts"]] == ["required"] * 2
    assert json.loads(error["attempts"][0]["raw"]) == {"name": "Ada"}
    assert error["usage"]["total_tokens"] == 20
    assert len(upstream.requests) == 2


async def test_a_failed_extraction_is_read_again_as_it_was(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", fills({}))
    headers = {"Idempotency-Key": "once"}
    body = {"input": {"text": "Ada"}, "schema": PERSON, "options": {"max_attempts": 1}}

    first = await alice.post("/v1/extractions", json=body, headers=headers)
    again = await alice.post("/v1/extractions", json=body, headers=headers)

    assert first.status_code == 422
    errors = [answer.json()["error"] | {"request_id": ""} for answer in (first, again)]
    assert (again.status_code, errors[1]) == (422, errors[0])
    assert len(upstream.requests) == 1


async def test_an_answer_without_the_structure_is_asked_again(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", Reply("Ada is 36."))
    upstream.when("Recall the function", fills(ADA))

    answer = (await extract(alice)).json()

    assert answer["data"] == ADA
    assert answer["attempts"][0]["raw"] == "Ada is 36."
    assert answer["attempts"][0]["errors"][0]["code"] == "invalid_json"


NO_JSON = [
    ('{"name": "Ada", "age": 36', "invalid_json"),
    ("", "invalid_json"),
    ("[" * 5000 + "]" * 5000, "invalid_json"),
    ('{"name": "Ada", "age": ' + "9" * 5000 + "}", "invalid_json"),
    ('{"name": "Ada", "name": "Bob", "age": 36}', "duplicate_key"),
    ('{"name": "Ada", "age": NaN}', "non_finite_number"),
    ('{"name": "Ada", "age": -Infinity}', "non_finite_number"),
    ('{"name": "Ada", "age": 1e999}', "non_finite_number"),
    ('{"name": "\\ud800", "age": 36}', "invalid_text"),
    ('{"name": "Ada", "age": ' + "[" * 100 + "]" * 100 + "}", "too_deep"),
]


async def test_what_json_does_not_know_is_never_a_result(
    alice: AsyncClient, upstream: Upstream
) -> None:
    for raw, code in NO_JSON:
        upstream.when("Ada", fills(raw))

        error = await refusal(alice, 422, options={"max_attempts": 1})

        assert error["attempts"][0]["errors"][0]["code"] == code, raw[:50]


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


async def test_descriptions_and_instructions_reach_the_model(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", fills(ADA))

    await document(
        alice, schema=PERSON | {"description": "One person."}, instructions="Ages in years."
    )

    system = upstream.requests[0].body["messages"][0]
    assert system["role"] == "system"
    assert "One person." in system["content"] and "Ages in years." in system["content"]
    assert upstream.requests[0].body["temperature"] == 0


TEXTS = [
    "Ada {{ 7*7 }} {% for x in y %}{{ x }}{% endfor %}",
    "Ada ${jndi:ldap://x} #{7*7} <%= 7*7 %> {0.__class__}",
    "  Ada\r\n\tkeeps her margins\n  ",
    "Ada'; DROP TABLE runs; --",
    "Ada data:image/png;base64,iVBORw0KGgo= https://example.com/a.png",
    "Ada \u0000 \u202e \U0001f600",
]


async def test_the_text_reaches_the_model_as_it_is(alice: AsyncClient, upstream: Upstream) -> None:
    upstream.when("", fills({}), fills(ADA))

    for text in TEXTS:
        await document(alice, text=text, instructions="{{ 7*7 }}")

        for seen in upstream.requests[-2:]:
            messages = seen.body["messages"]
            assert [item["content"] for item in messages if item["role"] == "user"] == [text]
            assert "{{ 7*7 }}" in messages[0]["content"]


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


async def test_only_models_on_the_list_may_be_named(
    alice: AsyncClient, environ: dict[str, str], upstream: Upstream, bearer: Callable[..., Any]
) -> None:
    upstream.when("Ada", fills(ADA))
    error = await refusal(alice, 422, model="gpt-9")
    assert error["code"] == "model_not_allowed"

    with ThreadedServer(settings_of(environ, extraction_models="small, large")) as server:
        async with client_of(server.url, await bearer("Carol")) as carol:
            answer = await extract(carol, model="large")

    assert answer.json()["model"] == "large"
    assert upstream.requests[-1].body["model"] == "large"


@pytest.mark.parametrize(
    ("reply", "status", "code"),
    [
        (Reply(status=401, error={"message": "bad key sk-canary"}), 502, "upstream_auth"),
        (Reply(status=403, error={"message": "sk-canary"}), 502, "upstream_auth"),
        (Reply(status=429, error={"message": "sk-canary"}), 502, "upstream_unavailable"),
        (Reply(status=400, error={"message": "sk-canary"}), 502, "upstream_unavailable"),
        (Reply(status=500, error={"message": "sk-canary"}), 502, "upstream_unavailable"),
        (Reply("sk-canary", drop_after=1), 502, "upstream_unavailable"),
    ],
)
async def test_a_failing_model_is_told_without_its_providers_words(
    alice: AsyncClient, upstream: Upstream, reply: Reply, status: int, code: str
) -> None:
    upstream.when("Ada", reply)

    error = await refusal(alice, status, options={"max_attempts": 1})

    assert (error["code"], error["attempts"]) == (code, [])
    assert "canary" not in str(error)


@pytest.fixture
async def impatient(environ: dict[str, str], bearer: Callable[..., Any]) -> AsyncIterator[Any]:
    """Alice, at a server that waits half a second for its model."""
    with ThreadedServer(settings_of(environ, model_timeout="0.5")) as server:
        async with client_of(server.url, await bearer("Alice")) as client:
            yield client


@pytest.mark.parametrize(
    "reply",
    [
        Reply("never", delay=60),
        Reply("never", hang=True),
        Reply("never", chunks=1, pace=60),
    ],
)
async def test_a_model_that_does_not_answer_is_not_waited_for(
    impatient: AsyncClient, upstream: Upstream, reply: Reply
) -> None:
    upstream.when("Ada", reply)

    async with asyncio.timeout(10):
        error = await refusal(impatient, 502)

    assert (error["code"], error["attempts"]) == ("upstream_unavailable", [])


async def test_what_was_spent_before_the_model_failed_is_told(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", fills({}), Reply(status=401))

    error = await refusal(alice, 502)

    assert [attempt["ok"] for attempt in error["attempts"]] == [False]
    assert error["usage"]["total_tokens"] == 10


async def test_an_answer_that_is_cut_off_is_no_result(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", fills(ADA, finish="length"))

    error = await refusal(alice, 422)

    assert error["code"] == "output_truncated"
    [attempt] = error["attempts"]
    assert (attempt["ok"], attempt["errors"][0]["keyword"]) == (False, "output_truncated")
    assert len(upstream.requests) == 1


async def test_a_refusal_is_told_as_one(alice: AsyncClient, upstream: Upstream) -> None:
    upstream.when("Ada", Reply(refusal="I would rather not."))

    error = await refusal(alice, 422)

    assert error["code"] == "model_refused"
    [attempt] = error["attempts"]
    assert (attempt["ok"], attempt["raw"]) == (False, "I would rather not.")


async def test_the_same_key_is_the_same_extraction(
    alice: AsyncClient, bob: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", fills(ADA))
    headers = {"Idempotency-Key": "k"}
    body = {"input": {"text": "Ada"}, "schema": PERSON}

    answers = await asyncio.gather(
        *(alice.post("/v1/extractions", json=body, headers=headers) for _ in range(10))
    )
    others = await bob.post("/v1/extractions", json=body, headers=headers)
    another = await alice.post(
        "/v1/extractions", json=body | {"instructions": "Other."}, headers=headers
    )

    assert {answer.json()["id"] for answer in answers} == {answers[0].json()["id"]}
    assert others.status_code == 200
    assert others.json()["id"] != answers[0].json()["id"]
    assert (another.status_code, another.json()["error"]["code"]) == (409, "idempotency_conflict")
    assert len(upstream.requests) == 2


TEXT = b'{"input": {"text": "Ada"}, '
IS_JSON = {"Content-Type": "application/json"}


GARBAGE = [
    b"",
    b"null",
    b"[]",
    b"{",
    b"\xff\xfe",
    b'"text"',
    b"[" * 300 + b"]" * 300,
    b"[" * 100_000 + b"]" * 100_000,
    b'{"input": {"text": ' + b"[" * 300 + b"]" * 300 + b"}}",
    TEXT + b'"schema": ' + b'{"not": ' * 300 + b"{}" + b"}" * 300 + b"}",
    TEXT + b'"schema": ' + b'{"not": ' * 50_000 + b"{}" + b"}" * 50_000 + b"}",
    TEXT + b'"schema": {"const": ' + b"9" * 5000 + b"}}",
    TEXT + b'"schema": {"minimum": NaN}}',
    TEXT + b'"schema": {"minimum": 1e999}}',
    TEXT + b'"schema": {"const": "\\ud800"}}',
    TEXT + b'"schema": {"\\udc00": 1}}',
    TEXT + b'"schema": [{}]}',
    TEXT + b'"schema": "true"}',
    TEXT + b'"schema_ref": "../../etc/passwd"}',
    TEXT + b'"schema_ref": "\\u0000"}',
    TEXT + b'"schema_ref": ["contact"]}',
    TEXT + b'"schema": {}, "options": {"max_attempts": 0}}',
    TEXT + b'"schema": {}, "options": {"max_attempts": 1e400}}',
    TEXT + b'"schema": {}, "options": {"max_attempts": ' + b"9" * 4000 + b"}}",
    TEXT + b'"schema": {}, "options": {"temperature": NaN}}',
    TEXT + b'"schema": {}, "owner_id": 1}',
    TEXT + b'"schema": {}, "instructions": "\\ud800"}',
    TEXT + b'"schema": {}, "model": "\\u0000"}',
    b'{"input": {"text": ""}, "schema": {}}',
    b'{"input": {"text": "\\ud800"}, "schema": {}}',
    b'{"input": "text", "schema": {}}',
    b'{"input": {"url": "http://127.0.0.1/"}, "schema": {}}',
    b'{"schema": {}}',
]


async def test_garbage_is_refused_by_design(alice: AsyncClient, upstream: Upstream) -> None:
    for body in GARBAGE:
        answer = await alice.post("/v1/extractions", content=body, headers=IS_JSON)

        assert 400 <= answer.status_code < 500, (body[:100], answer.text)
        assert answer.json()["error"]["code"]
    assert upstream.requests == []


ODD = [
    TEXT + b'"schema": {"title": "NUL \\u0000", "$comment": "\\u0000"}}',
    b'{"input": {"text": "Ada \\u0000"}, "schema": {"enum": [1, "\\u0000"]}}',
    TEXT + b'"schema": {}, "instructions": "\\u0000"}',
    TEXT + b'"schema": {"maximum": ' + b"9" * 4000 + b"}}",
]


async def test_what_is_odd_but_valid_is_taken(alice: AsyncClient, upstream: Upstream) -> None:
    upstream.when("Ada", fills({"value": 1}))

    for body in ODD:
        answer = await alice.post("/v1/extractions", content=body, headers=IS_JSON)

        assert answer.status_code == 200, answer.text
        assert answer.json()["data"] == 1


async def test_a_text_file_is_read_and_its_text_told(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", quotes(ADA, ("/name", "Ada"), ("/age", "is 36")))
    data = "data:text/plain;base64," + base64.b64encode(b"\xef\xbb\xbfAda is 36.").decode()
    body = {"input": {"data": data}, "schema": PERSON, "options": {"evidence": "required"}}

    answer = (await alice.post("/v1/extractions", json=body)).json()

    assert (answer["data"], answer["text"]) == (ADA, "Ada is 36.")
    assert answer["evidence"][0] == {
        "path": "/name",
        "start": 0,
        "end": 3,
        "quote": "Ada",
        "match": "exact",
    }


async def test_an_uploaded_pdf_is_read(
    alice: AsyncClient, bob: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", fills(ADA))
    upload = {"file": ("a.pdf", pdf([line("Ada is 36.")])), "purpose": (None, "user_data")}
    file_id = (await alice.post("/v1/files", files=upload)).json()["id"]
    body = {"input": {"file_id": file_id}, "schema": PERSON}

    answer = await alice.post("/v1/extractions", json=body)

    assert answer.json()["data"] == ADA
    assert "Ada is 36." in answer.json()["text"]
    assert (await bob.post("/v1/extractions", json=body)).status_code == 404


async def test_a_picture_goes_to_the_model(alice: AsyncClient, upstream: Upstream) -> None:
    upstream.when("", fills(ADA))
    data = "data:image/png;base64," + base64.b64encode(PIXEL).decode()
    body: Json = {"input": {"data": data}, "schema": PERSON}

    answer = await alice.post("/v1/extractions", json=body)
    quoted = await alice.post("/v1/extractions", json=body | {"options": {"evidence": "optional"}})

    assert answer.json()["data"] == ADA
    [part] = upstream.requests[0].body["messages"][1]["content"]
    assert part == {"type": "image_url", "image_url": {"url": data}}
    assert (quoted.status_code, quoted.json()["error"]["param"]) == (422, "options.evidence")


async def test_a_schema_over_a_mebibyte_is_too_large(alice: AsyncClient) -> None:
    error = await refusal(alice, 413, schema={"description": "x" * 1_100_000})

    assert error["code"] == "too_large"


async def test_the_demo_model_reads_labelled_text(
    environ: dict[str, str], bearer: Callable[..., Any]
) -> None:
    text = "Name: Ada Lovelace\nEmail: ada@example.com\nCompany: Analytical Engines"
    demo = {"model": None, "openai_api_key": None}

    with ThreadedServer(settings_of(environ, **demo)) as server:
        async with client_of(server.url, await bearer("Alice")) as client:
            answer = (await extract(client, text=text, schema_ref="contact")).json()

    assert answer["model"] == "demo"
    assert answer["data"]["name"] == "Ada Lovelace"
    assert answer["data"]["email"] == "ada@example.com"

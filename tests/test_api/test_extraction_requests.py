"""What an extraction may be asked with: garbage, odd texts, files; and the same request again."""

import asyncio
import base64
from collections.abc import Callable
from typing import Any

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
)
from tests.server import ThreadedServer
from tests.test_services.test_documents import line, pdf
from tests.upstream import Upstream

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII="
)


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

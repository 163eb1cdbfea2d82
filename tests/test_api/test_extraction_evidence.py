"""Where the text says it: true quotes or none, whole texts and long ones in parts."""

import asyncio
import json
from typing import Any

import pytest
from httpx2 import AsyncClient

from tests.extracting import Json, extract, fills, quotes, refusal, told
from tests.upstream import Reply, Upstream

TEXT = "Invoice 2026-17 of ACME Ltd.\nTotal: 1.234,50 EUR, due on 5 March 2026."
BILL: Json = {
    "type": "object",
    "properties": {
        "supplier": {"type": "string"},
        "total": {"type": "number"},
        "due": {"type": ["string", "null"], "format": "date"},
    },
    "required": ["supplier", "total"],
    "additionalProperties": False,
}
DATA = {"supplier": "ACME Ltd.", "total": 1234.5, "due": "2026-03-05"}
TRUE = (
    ("/supplier", "ACME Ltd."),
    ("/total", "Total: 1.234,50 EUR"),
    ("/due", "due on 5 March 2026"),
)


async def quoted(client: AsyncClient, text: str = TEXT, **options: Any) -> Any:
    options = {"evidence": "required", **options}
    return await extract(client, text=text, schema=BILL, options=options)


async def test_each_value_comes_with_the_words_that_say_it(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("ACME", quotes(DATA, *TRUE))

    answer = (await quoted(alice)).json()

    assert answer["data"] == DATA
    assert {item["path"]: item["quote"] for item in answer["evidence"]} == dict(TRUE)
    assert all(TEXT[item["start"] : item["end"]] == item["quote"] for item in answer["evidence"])
    assert set(answer["field_status"].values()) == {"grounded"}
    shown = upstream.requests[0].body["tools"][0]["function"]["parameters"]
    assert set(shown["required"]) == {"data", "evidence"}


async def test_offsets_count_code_points(alice: AsyncClient, upstream: Upstream) -> None:
    text = "\U0001f600\U0001f600 " + TEXT
    upstream.when("ACME", quotes(DATA, *TRUE))

    answer = (await quoted(alice, text=text)).json()

    [place] = [item for item in answer["evidence"] if item["path"] == "/supplier"]
    assert place["start"] == text.index("ACME")


@pytest.mark.parametrize(
    ("claims", "code", "pointer"),
    [
        ((("/supplier", "ACME Limited"), *TRUE[1:]), "quote_not_in_source", "/supplier"),
        ((("/supplier", "Invoice 2026-17"), *TRUE[1:]), "value_not_in_quote", "/supplier"),
        (TRUE[1:], "quote_missing", "/supplier"),
    ],
)
async def test_a_value_that_the_text_does_not_say_is_asked_again(
    alice: AsyncClient, upstream: Upstream, claims: Any, code: str, pointer: str
) -> None:
    upstream.when("ACME", quotes(DATA, *claims), quotes(DATA, *TRUE))

    answer = (await quoted(alice)).json()

    [error] = answer["attempts"][0]["errors"]
    assert (error["code"], error["pointer"]) == (code, pointer)
    assert pointer in told(upstream)
    assert answer["attempts"][1]["ok"] is True


async def test_what_stays_ungrounded_fails_or_goes_or_is_flagged(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("ACME", quotes(DATA, *TRUE[:2], ("/due", "on 6 March 2026")))

    error = (await quoted(alice, max_attempts=2)).json()["error"]
    nulled = (await quoted(alice, max_attempts=2, on_ungrounded="null")).json()
    flagged = (await quoted(alice, max_attempts=1, on_ungrounded="flag")).json()

    assert (error["code"], error["pointer"], len(error["attempts"])) == ("ungrounded", "/due", 2)
    assert nulled["data"] == DATA | {"due": None}
    assert flagged["data"] == DATA
    assert flagged["field_status"]["/due"] == "ungrounded"
    assert "/due" not in {item["path"] for item in flagged["evidence"]}


async def test_a_valid_answer_is_better_than_what_came_after_it(
    alice: AsyncClient, upstream: Upstream
) -> None:
    false = quotes(DATA, *TRUE[:2], ("/due", "on 6 March 2026"))
    for after, code in (
        (fills({}), "extraction_invalid"),
        (fills({}, finish="length"), "output_truncated"),
        (Reply(refusal="No."), "model_refused"),
    ):
        upstream.when("ACME", false, after)
        error = (await quoted(alice, max_attempts=2)).json()["error"]
        flagged = (await quoted(alice, max_attempts=2, on_ungrounded="flag")).json()

        assert error["code"] == code
        assert flagged["data"] == DATA
        assert flagged["field_status"]["/due"] == "ungrounded"
    upstream.when("ACME", false)
    spent = (await quoted(alice, token_budget=5, on_ungrounded="flag")).json()
    assert spent["data"] == DATA and len(spent["attempts"]) == 1


async def test_null_is_no_way_out_where_the_schema_forbids_it(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("ACME", quotes(DATA, *TRUE[1:], ("/supplier", "EMCA")))

    answer = await quoted(alice, max_attempts=1, on_ungrounded="null")

    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "ungrounded")


async def test_optional_evidence_may_be_missing_but_not_false(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("ACME", quotes(DATA, *TRUE[:1]))
    missing = (await quoted(alice, evidence="optional")).json()
    upstream.when("ACME", quotes(DATA, ("/supplier", "EMCA")))
    false = await quoted(alice, evidence="optional", max_attempts=1)

    assert missing["field_status"] == {
        "/supplier": "grounded",
        "/total": "ungrounded",
        "/due": "ungrounded",
    }
    assert len(missing["attempts"]) == 1
    assert false.json()["error"]["code"] == "ungrounded"


async def test_an_answer_without_the_envelope_is_asked_again(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("ACME", fills(DATA), quotes(DATA, *TRUE))

    answer = (await quoted(alice)).json()

    assert [attempt["ok"] for attempt in answer["attempts"]] == [False, True]


LINES: Json = {
    "type": "object",
    "properties": {
        "number": {"type": "string"},
        "lines": {
            "type": "array",
            "minItems": 2,
            "items": {
                "type": "object",
                "properties": {"sku": {"type": "string"}},
                "required": ["sku"],
            },
        },
    },
    "required": ["number", "lines"],
}
LONG = "Order 77\n" + "\n".join(f"Position SKU-{n:04} of this order" for n in range(100))
CHUNKING = {"max_chars": 400, "overlap_chars": 80, "list_path": "/lines"}


def reads_lines(body: Json) -> Reply:
    """A model that finds every SKU of what it is shown, with a quote."""
    text = next(m["content"] for m in body["messages"] if m["role"] == "user")
    words = text.replace("\n", " ").split()
    skus = [word for word in words if word.startswith("SKU-")]
    data: Json = {"lines": [{"sku": sku} for sku in skus]}
    if "Order 77" in text:
        data["number"] = "77"
    claims = [(f"/lines/{n}/sku", f"Position {sku}") for n, sku in enumerate(skus)]
    if "number" in data:
        claims.append(("/number", "Order 77"))
    has_evidence = "evidence" in body["tools"][0]["function"]["parameters"]["properties"]
    return (quotes(data, *claims) if has_evidence else fills(data))(body)


@pytest.mark.parametrize("evidence", ["none", "required"])
async def test_a_long_text_is_read_in_parts_and_put_together(
    alice: AsyncClient, upstream: Upstream, evidence: str
) -> None:
    upstream.when("SKU", reads_lines)
    options = {"chunking": CHUNKING, "evidence": evidence}

    answer = (await extract(alice, text=LONG, schema=LINES, options=options)).json()

    assert answer["data"]["number"] == "77"
    assert [line["sku"] for line in answer["data"]["lines"]] == [f"SKU-{n:04}" for n in range(100)]
    assert answer["chunks"]["total"] == len(upstream.requests) > 5
    assert (answer["status"], answer["failed_ranges"]) == ("completed", [])
    if evidence == "required":
        assert len(answer["evidence"]) == 101
        for item in answer["evidence"]:
            assert LONG[item["start"] : item["end"]] == item["quote"]


async def test_a_part_that_fails_costs_its_range_and_no_more(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("SKU", reads_lines)
    upstream.when("SKU-0050", fills({"lines": 1}))
    options = {"chunking": CHUNKING, "max_attempts": 1}

    answer = (await extract(alice, text=LONG, schema=LINES, options=options)).json()
    failing = options | {"on_chunk_failure": "fail"}
    error = await refusal(alice, 422, text=LONG, schema=LINES, options=failing)

    assert answer["status"] == "partial"
    lost = [LONG[place["start"] : place["end"]] for place in answer["failed_ranges"]]
    assert lost and all("SKU-0050" in text for text in lost)  # two, if they overlap there
    assert answer["chunks"]["failed"] == len(lost) < answer["chunks"]["total"]
    gone = {f"SKU-{n:04}" for n in range(100)} - {line["sku"] for line in answer["data"]["lines"]}
    assert gone and all(any(sku in text for text in lost) for sku in gone)
    assert [each["code"] for each in answer["chunk_errors"]] == ["extraction_invalid"] * len(lost)
    assert error["code"] == "extraction_invalid"


async def test_a_lost_part_is_why_the_rest_is_not_enough(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("SKU", reads_lines)
    upstream.when("Order 77", Reply(status=500))
    options = {"chunking": CHUNKING, "max_transport_retries": 0}

    error = await refusal(alice, 502, text=LONG, schema=LINES, options=options)

    assert (error["code"], error["retryable"]) == ("upstream_unavailable", True)


async def test_parts_that_do_not_fit_together_are_no_result(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("SKU", fills({"lines": []}))
    options = {"chunking": CHUNKING}

    error = await refusal(alice, 422, text=LONG, schema=LINES, options=options)

    assert error["code"] == "extraction_invalid"
    assert "does not fit together" in error["message"]


async def test_the_list_must_be_one_of_the_schemas(alice: AsyncClient) -> None:
    for path in ("/number", "/nothing", "lines"):
        options = {"chunking": CHUNKING | {"list_path": path}}

        error = await refusal(alice, 422, text=LONG, schema=LINES, options=options)

        assert error["param"] == "options.chunking.list_path", path


async def test_a_page_shows_where_each_value_stands(
    alice: AsyncClient, bob: AsyncClient, upstream: Upstream
) -> None:
    text = TEXT + "<script>alert(1)</script>"
    upstream.when("ACME", quotes(DATA, *TRUE))
    made = (await quoted(alice, text=text)).json()["id"]

    page = await alice.get(f"/v1/extractions/{made}/view")

    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "<mark" in page.text and "<script" not in page.text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page.text
    assert (await bob.get(f"/v1/extractions/{made}/view")).status_code == 404


async def test_a_failed_extraction_has_no_page(alice: AsyncClient, upstream: Upstream) -> None:
    upstream.when("ACME", fills({}))
    headers = {"Prefer": "respond-async"}
    body = {"input": {"text": TEXT}, "schema": BILL, "options": {"max_attempts": 1}}
    made = (await alice.post("/v1/extractions", json=body, headers=headers)).json()["id"]
    async with asyncio.timeout(10):
        while "status" in (answer := (await alice.get(f"/v1/extractions/{made}")).json()):
            await upstream.wait_for_async(1)
    page = await alice.get(f"/v1/extractions/{made}/view")

    assert answer["error"]["code"] == "extraction_invalid"
    assert page.status_code == 422
    assert json.loads(page.text)["error"]["code"] == "extraction_invalid"

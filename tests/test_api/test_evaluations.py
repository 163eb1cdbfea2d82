"""Golden documents in; precision, recall and F1 of each path out."""

import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from httpx2 import AsyncClient, Response

from tests.conftest import client_of
from tests.extracting import ADA, PERSON, fills
from tests.server import ServerProcess
from tests.upstream import Upstream

Json = dict[str, Any]

BOB = {"name": "Bob", "age": 4}
GOLDEN: list[Json] = [
    {"text": "Ada is 36.", "expected": ADA, "name": "ada"},
    {"text": "Bob is 4.", "expected": BOB},
]
ALL = {"precision": 1, "recall": 1, "f1": 1, "support": 2}


async def evaluate(client: AsyncClient, *items: Json, **body: Any) -> Response:
    if not body.keys() & {"schema", "schema_ref"}:
        body["schema"] = PERSON
    return await client.post("/v1/evaluations", json={"items": items or GOLDEN, **body})


async def report(client: AsyncClient, *items: Json, **body: Any) -> Json:
    answer = await evaluate(client, *items, **body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_a_model_is_measured_path_by_path(alice: AsyncClient, upstream: Upstream) -> None:
    upstream.when("Ada", fills(ADA))
    upstream.when("Bob", fills({"name": "Bob", "age": 40}))

    found = await report(alice)

    assert found["status"] == "completed"
    assert (found["model"], found["schema"]["name"]) == ("scripted", "inline")
    assert (found["items"], found["failed"], found["invalid_expected"]) == (2, 0, 0)
    assert found["exact"] == 0.5
    assert (found["precision"], found["recall"], found["f1"]) == (0.75, 0.75, 0.75)
    assert found["fields"]["/name"] == ALL
    assert found["fields"]["/age"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    assert found["cases"] == [
        {"name": "ada", "f1": 1, "exact": True, "error": None},
        {"name": "2", "f1": 0.5, "exact": False, "error": None},
    ]
    assert found["usage"] == {"prompt_tokens": 14, "completion_tokens": 6, "total_tokens": 20}
    assert found["cost"] is None
    assert (await alice.get(f"/v1/evaluations/{found['id']}")).json() == found


async def test_golden_lines_can_be_uploaded(alice: AsyncClient, upstream: Upstream) -> None:
    upstream.when("Ada", fills(ADA))
    upstream.when("Bob", fills(BOB))
    lines = "\n\n".join(json.dumps(item) for item in GOLDEN)

    answer = await alice.post(
        "/v1/evaluations",
        files={"file": ("golden.jsonl", lines.encode())},
        data={"request": json.dumps({"schema": PERSON, "options": {"max_attempts": 1}})},
    )

    assert answer.status_code == 200, answer.text
    assert answer.json()["fields"] == {"/age": ALL, "/name": ALL}


async def test_a_failed_item_counts_as_not_found_at_all(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", fills(ADA))
    upstream.when("Bob", fills({"name": "Bob"}))

    found = await report(alice, options={"max_attempts": 2})

    assert (found["failed"], found["exact"]) == (1, 0.5)
    assert (found["precision"], found["recall"]) == (1, 0.5)
    assert found["cases"][1]["error"]["code"] == "extraction_invalid"
    assert found["cases"][1]["f1"] == 0
    assert found["usage"]["total_tokens"] == 30


async def test_a_class_of_ours_compares_values_and_not_how_they_are_written(
    alice: AsyncClient, upstream: Upstream
) -> None:
    invoice: Json = {"supplier": "Acme", "total": 12.5, "currency": "EUR", "issued": "2026-11-22"}
    upstream.when(
        "Acme",
        fills(
            '{"supplier":"Acme","total":12.50,"currency":"EUR","lines":[],'
            '"issued":"2026-11-22","number":null}'
        ),
    )

    found = await report(alice, {"text": "Acme", "expected": invoice}, schema_ref="invoice")

    assert (found["f1"], found["exact"], found["invalid_expected"]) == (1, 1, 0)
    assert found["schema"]["name"] == "invoice"


async def test_an_expected_document_that_no_answer_can_be_is_told(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", fills(ADA))

    found = await report(alice, {"text": "Ada", "expected": {"name": "Ada", "age": "36"}})

    assert found["invalid_expected"] == 1
    assert found["fields"]["/age"]["f1"] == 0


async def test_who_does_not_want_to_wait_is_given_an_id(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", fills(ADA, hang=True))
    upstream.when("Bob", fills(BOB))

    begun = await alice.post(
        "/v1/evaluations",
        json={"items": GOLDEN, "schema": PERSON},
        headers={"Prefer": "respond-async"},
    )
    place = begun.headers["location"]

    assert (begun.status_code, begun.json()["status"]) == (202, "running")
    assert place == f"/v1/evaluations/{begun.json()['id']}"
    assert (await alice.get(place)).json() == begun.json()
    stopped = await alice.post(f"{place}/cancel")
    assert stopped.json() == {"id": begun.json()["id"], "status": "cancelled"}
    again = await alice.get(place)
    assert (again.status_code, again.json()["error"]["code"]) == (409, "run_cancelled")


async def test_an_evaluation_is_its_owners_alone(
    alice: AsyncClient, bob: AsyncClient, anonymous: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("", fills(ADA))
    mine = (await report(alice))["id"]

    assert (await evaluate(anonymous)).status_code == 401
    for act in (bob.get, lambda path: bob.post(f"{path}/cancel")):
        refused, missing = await act(f"/v1/evaluations/{mine}"), await act("/v1/evaluations/none")
        assert refused.status_code == missing.status_code == 404
    assert (await alice.get(f"/v1/extractions/{mine}")).status_code == 404


async def test_the_same_key_evaluates_once(alice: AsyncClient, upstream: Upstream) -> None:
    upstream.when("Ada", fills(ADA))
    upstream.when("Bob", fills(BOB))
    headers = {"Idempotency-Key": "once"}
    body = {"items": GOLDEN, "schema": PERSON}

    first = await alice.post("/v1/evaluations", json=body, headers=headers)
    again = await alice.post("/v1/evaluations", json=body, headers=headers)
    other = await alice.post(
        "/v1/evaluations", json=body | {"instructions": "Look again."}, headers=headers
    )

    assert again.json() == first.json()
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")
    assert len(upstream.requests) == 2


def deep(levels: int) -> str:
    return "[" * levels + "]" * levels


WRONG: list[tuple[str, int]] = [
    ("{", 422),
    ("[]", 422),
    ("null", 422),
    ('{"schema": true}', 422),
    ('{"schema": true, "items": []}', 422),
    ('{"schema": true, "items": [{"text": "Ada"}]}', 422),
    ('{"schema": true, "items": [{"text": "", "expected": 1}]}', 422),
    ('{"schema": true, "items": [{"text": "Ada", "expected": 1, "more": 1}]}', 422),
    ('{"schema": true, "items": [{"text": "Ada", "expected": NaN}]}', 422),
    ('{"schema": true, "items": [{"text": "Ada", "expected": 1e999}]}', 422),
    ('{"schema": true, "items": [{"text": "Ada", "expected": "\\ud800"}]}', 422),
    ('{"schema": true, "items": [{"text": "Ada", "expected": ' + deep(100) + "}]}", 422),
    ('{"schema": true, "items": [{"text": "Ada", "expected": ' + deep(5000) + "}]}", 422),
    ('{"schema_ref": "nope", "items": [{"text": "Ada", "expected": 1}]}', 404),
    ('{"schema": {"type": "nope"}, "items": [{"text": "Ada", "expected": 1}]}', 422),
    ('{"schema": true, "model": "gpt-99", "items": [{"text": "Ada", "expected": 1}]}', 422),
    ('{"schema": true, "items": [' + "[]," * 300_000 + "1]}", 413),
]


@pytest.mark.parametrize(("body", "status"), WRONG, ids=range(len(WRONG)))
async def test_what_cannot_be_evaluated_is_refused(
    alice: AsyncClient, body: str, status: int
) -> None:
    headers = {"Content-Type": "application/json"}

    answer = await alice.post("/v1/evaluations", content=body, headers=headers)

    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


async def test_a_thousand_items_are_the_most(alice: AsyncClient) -> None:
    answer = await evaluate(alice, *[GOLDEN[0]] * 1001)

    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "items")


async def test_a_form_lacks_nothing(alice: AsyncClient) -> None:
    file = {"file": ("golden.jsonl", b'{"text": "Ada", "expected": 1}\nAda')}
    for files, request, explanation in (
        ({"other": ("a", b"")}, "{}", "no part 'file'"),
        (file, None, "no part 'request'"),
        (file, "[]", "one JSON object"),
        (file, '{"schema": true, "items": []}', "its items are in `file`"),
        (file, '{"schema": true}', "line 2 of file is not valid JSON"),
        ({"file": ("a", b"\xff")}, '{"schema": true}', "line 1 of file is not valid JSON"),
    ):
        data = {"request": request} if request else {}

        answer = await alice.post("/v1/evaluations", files=files, data=data)

        assert answer.status_code == 422, answer.text
        assert explanation in answer.json()["error"]["message"]


@pytest.fixture
def process(environ: dict[str, str]) -> Iterator[ServerProcess]:
    with ServerProcess(**environ) as running:
        yield running


@pytest.fixture
async def owner(process: ServerProcess, bearer: Callable[..., Any]) -> AsyncIterator[AsyncClient]:
    async with client_of(process.url, await bearer("Owner")) as client:
        yield client


async def test_after_a_kill_it_goes_on_with_what_was_not_tried_yet(
    process: ServerProcess, owner: AsyncClient, upstream: Upstream
) -> None:
    items = [{"text": f"Ada {number}.", "expected": ADA} for number in range(30)]
    upstream.when("Ada", fills(ADA))
    slow = [fills(ADA, delay=0.2)]
    for number in range(16, 30):
        upstream.when(f"Ada {number}.", lambda body: slow[-1](body))
    body = {"items": items, "schema": PERSON}
    begun = await owner.post("/v1/evaluations", json=body, headers={"Prefer": "respond-async"})
    place = begun.headers["location"]
    await upstream.wait_for_async(22)

    process.kill()
    asked = len(upstream.requests)
    slow.append(fills(ADA))
    process.start()
    while (found := (await owner.get(place)).json())["status"] != "completed":
        pass

    assert (found["f1"], found["items"]) == (1, 30)
    assert found["usage"]["total_tokens"] == 300
    # At most those that were under way are asked once more.
    assert asked < 30 <= len(upstream.requests) <= 30 + 8

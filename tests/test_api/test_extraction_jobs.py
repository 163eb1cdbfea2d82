"""Jobs: many texts, one schema, and nothing lost on the way."""

import asyncio
import csv
import io
import json
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import pyarrow.parquet
import pytest
from httpx2 import AsyncClient

from tests.conftest import client_of, settings_of
from tests.server import ThreadedServer
from tests.upstream import Call, Json, Reply, Upstream

JOBS = "/v1/extraction-jobs"
SCHEMA = {
    "title": "Amount",
    "type": "object",
    "properties": {"n": {"type": "integer"}, "note": {"type": "string"}},
    "required": ["n"],
}


def items(count: int) -> list[Json]:
    return [{"custom_id": f"c{n}", "text": f"number {n};"} for n in range(count)]


def text_of(body: Json) -> str:
    return str(body["messages"][-1]["content"])


def says(data: Any, **more: Any) -> Reply:
    arguments = data if isinstance(data, str) else json.dumps(data)
    return Reply(calls=(Call("Amount", arguments),), **more)


def number(body: Json) -> Reply:
    """The number that the text says."""
    return says({"n": int(text_of(body).split()[1].partition(";")[0])})


@pytest.fixture(autouse=True)
def answers(upstream: Upstream) -> None:
    upstream.when("number", number)


async def ended(client: AsyncClient, job: Json) -> Json:
    """The job, once it is over, from its own events."""
    events = await events_of(client, job["id"])
    assert events[-1]["type"] in ("job.completed", "job.cancelled", "job.failed")
    return (await client.get(f"{JOBS}/{job['id']}")).json()


async def events_of(client: AsyncClient, job_id: str, after: int = 0) -> list[Json]:
    headers = {"Last-Event-ID": str(after)}
    async with client.stream("GET", f"{JOBS}/{job_id}/events", headers=headers) as reply:
        assert reply.status_code == 200, await reply.aread()
        return [
            json.loads(line.removeprefix("data: "))
            async for line in reply.aiter_lines()
            if line.startswith("data: ")
        ]


async def lines_of(client: AsyncClient, job_id: str, **query: str) -> list[Json]:
    reply = await client.get(f"{JOBS}/{job_id}/results", params=query)
    assert reply.status_code == 200, reply.text
    return [json.loads(line) for line in reply.text.splitlines()]


async def made(client: AsyncClient, count: int = 3, **more: Any) -> Json:
    body = {"schema": SCHEMA, "items": items(count), **more}
    reply = await client.post(JOBS, json=body)
    assert reply.status_code == 202, reply.text
    return reply.json()


async def test_a_job_answers_each_item_in_the_order_of_the_items(alice: AsyncClient) -> None:
    job = await made(alice, 30)

    done = await ended(alice, job)

    assert job["status"] in ("queued", "running") and job["counts"]["total"] == 30
    assert done["status"] == "completed"
    assert done["counts"] == {
        "total": 30,
        "queued": 0,
        "running": 0,
        "succeeded": 30,
        "failed": 0,
        "cancelled": 0,
    }
    assert done["usage"] == {"prompt_tokens": 300, "completion_tokens": 150, "total_tokens": 450}
    assert done["schema"]["name"] == "inline" and done["finished_at"]
    assert await lines_of(alice, job["id"]) == [
        {
            "custom_id": f"c{n}",
            "status": "succeeded",
            "data": {"n": n},
            "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
        }
        for n in range(30)
    ]


async def test_a_job_takes_json_lines_beside_its_request(alice: AsyncClient) -> None:
    lines = "\ufeff" + "\r\n".join(json.dumps(item) for item in items(1200)) + "\n\n"

    reply = await alice.post(
        JOBS,
        data={"request": json.dumps({"schema": SCHEMA, "options": {"concurrency": 64}})},
        files={"file": ("items.jsonl", lines.encode(), "application/jsonl")},
    )
    done = await ended(alice, reply.json())

    assert reply.status_code == 202, reply.text
    assert done["counts"]["succeeded"] == 1200
    assert [line["data"]["n"] for line in await lines_of(alice, done["id"])] == list(range(1200))


async def test_a_job_takes_a_stored_file(alice: AsyncClient, bob: AsyncClient) -> None:
    lines = "\n".join(json.dumps(item) for item in items(3))
    file = {"file": ("items.jsonl", lines.encode(), "text/plain")}
    stored = (await alice.post("/v1/files", files=file, data={"purpose": "user_data"})).json()
    body = {"schema": SCHEMA, "items": {"file_id": stored["id"]}}

    reply = await alice.post(JOBS, json=body)

    assert (await bob.post(JOBS, json=body)).status_code == 404
    assert (await ended(alice, reply.json()))["counts"]["succeeded"] == 3


async def test_identical_items_are_asked_once(alice: AsyncClient, upstream: Upstream) -> None:
    texts = ["number 1;", "number 2;", "number 1;", "bad", "bad", "number 1;"]
    upstream.when("bad", says({"n": "no"}))
    same = [{"custom_id": f"c{n}", "text": text} for n, text in enumerate(texts)]

    job = await made(alice, items=same, options={"max_attempts": 1})
    done = await ended(alice, job)

    assert len(upstream.requests) == 3
    assert done["counts"]["succeeded"] == 4 and done["counts"]["failed"] == 2
    assert done["usage"]["total_tokens"] == 45
    lines = await lines_of(alice, job["id"])
    assert [line.get("data") for line in lines] == [
        *({"n": 1}, {"n": 2}, {"n": 1}, None, None, {"n": 1})
    ]
    assert [line["usage"]["total_tokens"] for line in lines] == [15, 15, 0, 15, 0, 0]
    assert [line["error"]["code"] for line in lines[3:5]] == ["extraction_invalid"] * 2


async def test_what_fails_is_told_and_asked_again_alone(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("number 1;", says({"n": "no"}))
    job = await made(alice, 3, options={"max_attempts": 2})
    failed = await ended(alice, job)
    [line] = await lines_of(alice, job["id"], status="failed")

    assert failed["status"] == "completed_with_errors"
    assert failed["counts"]["succeeded"] == 2 and failed["counts"]["failed"] == 1
    assert line["custom_id"] == "c1" and line["error"]["code"] == "extraction_invalid"
    assert len(line["error"]["attempts"]) == 2 and "data" not in line

    upstream.when("number 1;", number)
    asked = len(upstream.requests)
    reply = await alice.post(f"{JOBS}/{job['id']}/retry", json={"only": "failed"})
    again = await ended(alice, job)

    assert reply.status_code == 202 and reply.json()["id"] == job["id"]
    assert len(upstream.requests) == asked + 1
    assert again["status"] == "completed" and again["counts"]["succeeded"] == 3
    assert again["usage"]["total_tokens"] == 15 * 5
    assert [line["data"]["n"] for line in await lines_of(alice, job["id"])] == [0, 1, 2]
    assert (await alice.post(f"{JOBS}/{job['id']}/retry")).json()["error"]["code"] == (
        "nothing_to_retry"
    )


async def test_a_job_that_goes_on_is_not_retried(alice: AsyncClient, upstream: Upstream) -> None:
    upstream.when("number", Reply(text="x", hang=True))
    job = await made(alice)

    reply = await alice.post(f"{JOBS}/{job['id']}/retry")

    assert (reply.status_code, reply.json()["error"]["code"]) == (409, "job_running")
    assert (await alice.delete(f"{JOBS}/{job['id']}")).status_code == 204


async def test_a_cancelled_job_keeps_what_it_has(alice: AsyncClient, upstream: Upstream) -> None:
    upstream.when("number 1;", Reply(text="x", hang=True))
    job = await made(alice, 5, options={"concurrency": 1})
    await upstream.wait_for_async(2)

    cancelled = await alice.post(f"{JOBS}/{job['id']}/cancel")
    await upstream.wait_until_async(lambda: upstream.requests[1].aborted, 3)
    events = await events_of(alice, job["id"])

    assert cancelled.status_code == 200 and cancelled.json()["status"] == "cancelled"
    assert [event["type"] for event in events][-1] == "job.cancelled"
    lines = await all_ended(alice, job["id"], 5)
    assert [line["status"] for line in lines] == ["succeeded", *["cancelled"] * 4]
    assert {line["error"]["code"] for line in lines[1:]} == {"run_cancelled"}
    assert len(upstream.requests) == 2
    again = (await alice.post(f"{JOBS}/{job['id']}/cancel")).json()
    assert again["status"] == "cancelled" and again["counts"]["cancelled"] == 4


async def all_ended(client: AsyncClient, job_id: str, count: int) -> list[Json]:
    async with asyncio.timeout(5):
        while len(lines := await lines_of(client, job_id)) < count:
            await asyncio.sleep(0.02)
    return lines


async def test_a_deleted_job_is_gone_with_its_items(alice: AsyncClient) -> None:
    job = await made(alice)
    await ended(alice, job)

    assert (await alice.delete(f"{JOBS}/{job['id']}")).status_code == 204

    assert (await alice.get(f"{JOBS}/{job['id']}")).status_code == 404
    assert (await alice.get(JOBS)).json()["data"] == []


async def test_events_are_replayed_and_end_with_the_job(alice: AsyncClient) -> None:
    job = await made(alice)
    await ended(alice, job)

    events = await events_of(alice, job["id"])

    assert {event["type"] for event in events[:-1]} <= {"job.progress"}
    assert events[-1]["type"] == "job.completed" and events[-1]["job"]["id"] == job["id"]
    assert await events_of(alice, job["id"], len(events) - 1) == events[-1:]
    assert await events_of(alice, job["id"], 999) == events
    over = await alice.get(
        f"{JOBS}/{job['id']}/events", headers={"Last-Event-ID": str(len(events))}
    )
    assert over.status_code == 204


async def test_jobs_are_listed_the_newest_first(alice: AsyncClient, bob: AsyncClient) -> None:
    ids = [(await made(alice, 1))["id"] for _ in range(3)]
    await made(bob, 1)

    first = (await alice.get(JOBS, params={"limit": 2})).json()
    rest = (await alice.get(JOBS, params={"limit": 2, "after": ids[1]})).json()

    assert [job["id"] for job in first["data"]] == [ids[2], ids[1]] and first["has_more"]
    assert [job["id"] for job in rest["data"]] == [ids[0]] and not rest["has_more"]


async def test_a_stranger_sees_no_job_of_mine(
    alice: AsyncClient, bob: AsyncClient, anonymous: AsyncClient
) -> None:
    place = f"{JOBS}/{(await made(alice))['id']}"

    def asked(client: AsyncClient) -> Iterable[Any]:
        yield client.get(place)
        yield client.get(f"{place}/events")
        yield client.get(f"{place}/results")
        yield client.post(f"{place}/cancel")
        yield client.post(f"{place}/retry")
        yield client.delete(place)

    assert [(await reply).status_code for reply in asked(bob)] == [404] * 6
    assert [(await reply).status_code for reply in asked(anonymous)] == [401] * 6
    assert (await anonymous.post(JOBS, json={})).status_code == 401


async def test_the_same_key_makes_one_job(alice: AsyncClient, upstream: Upstream) -> None:
    body, headers = {"schema": SCHEMA, "items": items(600)}, {"Idempotency-Key": "once"}

    replies = await asyncio.gather(
        *(alice.post(JOBS, json=body, headers=headers) for _ in range(3))
    )
    await ended(alice, replies[0].json())
    later = await alice.post(JOBS, json=body, headers=headers)
    other = await alice.post(JOBS, json={**body, "items": items(2)}, headers=headers)

    assert {reply.status_code for reply in [*replies, later]} == {202}
    assert len({reply.json()["id"] for reply in [*replies, later]}) == 1
    assert len((await alice.get(JOBS)).json()["data"]) == 1
    assert len(upstream.requests) == 600
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")


BAD_ITEMS: dict[str, tuple[list[Any], str]] = {
    "none": ([], "items"),
    "no text": ([*items(2), {"custom_id": "x"}], "items/2/text"),
    "empty text": ([{"custom_id": "x", "text": ""}], "items/0/text"),
    "no id": ([{"text": "x"}], "items/0/custom_id"),
    "an id twice": ([*items(2), {"custom_id": "c1", "text": "other"}], "items/2"),
    "a long id": ([{"custom_id": "x" * 256, "text": "x"}], "items/0/custom_id"),
    "NUL in an id": ([{"custom_id": "a\0", "text": "x"}], "items/0/custom_id"),
    "half a pair": ([{"custom_id": "a", "text": "\ud800"}], "items/0"),
    "no object": ([*items(1), 7], "items/1"),
    "more fields": ([{"custom_id": "a", "text": "x", "y": 1}], "items/0/y"),
}


@pytest.mark.parametrize("name", BAD_ITEMS)
async def test_a_bad_item_is_named_and_no_job_is_made(alice: AsyncClient, name: str) -> None:
    given, place = BAD_ITEMS[name]

    body = json.dumps({"schema": SCHEMA, "items": given})
    reply = await alice.post(JOBS, content=body, headers={"Content-Type": "application/json"})
    lines = "".join(f"{json.dumps(item)}\n" for item in given)
    by_line = await alice.post(
        JOBS,
        data={"request": json.dumps({"schema": SCHEMA})},
        files={"file": ("items.jsonl", lines.encode(), "application/jsonl")},
    )

    assert reply.status_code == by_line.status_code == 422, reply.text
    assert reply.json()["error"]["param"].startswith(place)
    if given:
        assert by_line.json()["error"]["pointer"].startswith("/items/")
        assert by_line.json()["error"]["param"] == reply.json()["error"]["param"]
        number = int(place.split("/")[1]) + 1
        assert f"line {number}" in by_line.json()["error"]["message"]
    assert (await alice.get(JOBS)).json()["data"] == []


BAD_BODIES = {
    "no JSON": b"{",
    "no object": b"[]",
    "no schema": json.dumps({"items": items(1)}).encode(),
    "a bad schema": json.dumps({"items": items(1), "schema": {"type": "nothing"}}).encode(),
    "unknown schema": json.dumps({"items": items(1), "schema_ref": "nope"}).encode(),
    "unknown model": json.dumps({"items": items(1), "schema": True, "model": "gpt-99"}).encode(),
    "too concurrent": json.dumps(
        {"items": items(1), "schema": True, "options": {"concurrency": 257}}
    ).encode(),
    "cut off": json.dumps({"schema": True, "items": items(3)}).encode()[:-2],
    "items twice": b'{"schema":true,"items":[{"custom_id":"a","text":"x"}],'
    b'"items":[{"custom_id":"b","text":"x"}]}',
    "a stray bracket": b'{"schema":true,"items":[{"custom_id":"a","text":"x"}]]}',
    "a stray comma": b'{"schema":true,"items":[{"custom_id":"a","text":"x"},,]}',
    "a comma at the end": b'{"schema":true,"items":[{"custom_id":"a","text":"x"}, ]}',
    "a comma alone": b'{"schema":true,"items":[,]}',
    "no UTF-8": b'{"schema":true,"items":[{"custom_id":"a","text":"\xff"}]}',
}


@pytest.mark.parametrize("name", BAD_BODIES)
async def test_a_bad_body_is_refused(alice: AsyncClient, name: str) -> None:
    reply = await alice.post(
        JOBS, content=BAD_BODIES[name], headers={"Content-Type": "application/json"}
    )

    assert reply.status_code in (404, 422), reply.text
    assert reply.json()["error"]["message"]
    assert (await alice.get(JOBS)).json()["data"] == []


async def test_text_of_any_kind_comes_through(alice: AsyncClient, upstream: Upstream) -> None:
    texts = [
        'say "number 1;" \\',
        "number 2;\0",
        "number 3; [{]},\\u0041 \U0001f600 é",
        "number 4;\n",
    ]
    upstream.when("say", says({"n": 1}))
    given = [{"custom_id": f"é{n}", "text": text} for n, text in enumerate(texts)]
    body = json.dumps({"items": given, "schema": SCHEMA}, ensure_ascii=False).encode()

    async def dripping() -> AsyncIterator[bytes]:
        for at in range(len(body)):
            yield body[at : at + 1]

    reply = await alice.post(JOBS, content=dripping(), headers={"Content-Type": "application/json"})
    done = await ended(alice, reply.json())

    assert done["counts"]["succeeded"] == 4
    assert sorted(text_of(request.body) for request in upstream.requests) == sorted(texts)
    assert [line["custom_id"] for line in await lines_of(alice, done["id"])] == [
        *("é0", "é1", "é2", "é3")
    ]


WIDE: Json = {
    "type": "object",
    "title": "Amount",
    "properties": {
        "id": {"type": "integer"},
        "price": {"type": "number"},
        "exact": {"type": "number"},
        "big": {"type": "integer"},
        "name": {"type": ["string", "null"]},
        "ok": {"type": "boolean"},
        "tags": {"type": "array"},
        "status": {"type": "string"},
    },
}
FIRST = (
    '{"id":1,"price":1.5,"exact":0.1234567890123456789,"big":9007199254740993,'
    '"name":"=1+1, \\"x\\"\\né","ok":true,"tags":[1,{"a":1.10}],"status":"new","more":"x"}'
)
SECOND = '{"id":2,"price":2,"big":123456789012345678901234567890,"name":null}'


async def wide(alice: AsyncClient, upstream: Upstream) -> str:
    upstream.when("first", says(FIRST))
    upstream.when("second", says(SECOND))
    upstream.when("third", says("{"))
    given = [{"custom_id": name, "text": name} for name in ("first", "second", "third")]
    job = await made(alice, items=given, schema=WIDE, options={"max_attempts": 1})
    await ended(alice, job)
    return str(job["id"])


async def test_results_keep_every_digit(alice: AsyncClient, upstream: Upstream) -> None:
    job_id = await wide(alice, upstream)

    reply = await alice.get(f"{JOBS}/{job_id}/results")
    table = await alice.get(f"{JOBS}/{job_id}/results?format=csv")

    assert '"exact": 0.1234567890123456789' in reply.text and "1.10" in reply.text
    assert "123456789012345678901234567890" in reply.text
    rows = list(csv.reader(io.StringIO(table.text)))
    assert table.headers["content-type"].startswith("text/csv")
    assert rows[0] == [
        *("custom_id", "status", "id", "price", "exact", "big", "name", "ok", "tags"),
        *("data.status", "more"),
    ]
    assert rows[1] == [
        *("first", "succeeded", "1", "1.5", "0.1234567890123456789", "9007199254740993"),
        *('=1+1, "x"\né', "true", '[1, {"a": 1.10}]', "new", "x"),
    ]
    assert rows[2][:6] == [*("second", "succeeded", "2", "2", "", "123456789012345678901234567890")]
    assert rows[3] == ["third", "failed", *[""] * 9]


async def test_parquet_has_types(alice: AsyncClient, upstream: Upstream) -> None:
    job_id = await wide(alice, upstream)

    reply = await alice.get(f"{JOBS}/{job_id}/results?format=parquet")
    table: Any = pyarrow.parquet.read_table(io.BytesIO(reply.content))

    assert {field.name: str(field.type) for field in table.schema} == {
        "custom_id": "string",
        "status": "string",
        "error_code": "string",
        "id": "int64",
        "price": "double",
        "exact": "string",
        "big": "string",
        "name": "string",
        "ok": "bool",
        "tags": "string",
        "data.status": "string",
        "more": "string",
    }
    rows = table.to_pylist()
    assert [row["error_code"] for row in rows] == [None, None, "extraction_invalid"]
    assert [row["price"] for row in rows] == [1.5, 2.0, None]
    assert rows[0]["big"] == "9007199254740993" and rows[0]["exact"] == "0.1234567890123456789"
    assert rows[1]["name"] is None and rows[2]["id"] is None


async def test_a_partial_answer_is_called_so(alice: AsyncClient, upstream: Upstream) -> None:
    upstream.when("AAA", Reply(status=400, error={"message": "no"}))
    upstream.when("BBB", says({"lines": ["b"]}))
    schema = {"title": "Amount", "properties": {"lines": {"type": "array"}}, "type": "object"}
    texts = {"half": "AAA " * 50 + "\n\n" + "BBB " * 50, "whole": "BBB", "none": "AAA"}
    job = await made(
        alice,
        items=[{"custom_id": name, "text": text} for name, text in texts.items()],
        schema=schema,
        options={"chunking": {"max_chars": 220, "overlap_chars": 0}},
    )
    await ended(alice, job)

    lines = await lines_of(alice, job["id"])
    table = await alice.get(f"{JOBS}/{job['id']}/results?format=csv")
    parquet = await alice.get(f"{JOBS}/{job['id']}/results?format=parquet")

    statuses = {"half": "partial", "whole": "succeeded", "none": "failed"}
    assert {line["custom_id"]: line["status"] for line in lines} == statuses
    assert lines[0]["failed_ranges"] and "evidence" not in lines[0] and "id" not in lines[0]
    assert {row[0]: row[1] for row in list(csv.reader(io.StringIO(table.text)))[1:]} == statuses
    rows: Any = pyarrow.parquet.read_table(io.BytesIO(parquet.content))
    assert {row["custom_id"]: row["status"] for row in rows.to_pylist()} == statuses
    for status, names in {"succeeded": ["half", "whole"], "partial": ["half"]}.items():
        found = await lines_of(alice, job["id"], status=status)
        assert [line["custom_id"] for line in found] == names


async def test_evidence_stands_in_the_results_where_it_was_asked_for(
    alice: AsyncClient, upstream: Upstream
) -> None:
    quoted = {"data": {"n": 7}, "evidence": [{"path": "/n", "quote": "number 7"}]}
    upstream.when("number 7", says(quoted))
    upstream.when("nothing", says("{"))
    given = [{"custom_id": text, "text": text} for text in ("the number 7", "nothing")]
    options = {"evidence": "required", "max_attempts": 1}
    job = await made(alice, items=given, options=options)
    await ended(alice, job)

    found, failed = await lines_of(alice, job["id"])

    assert found["evidence"] == [
        {"path": "/n", "start": 4, "end": 12, "quote": "number 7", "match": "exact"}
    ]
    assert found["field_status"] == {"/n": "grounded"}
    shown = (await alice.get(f"/v1/extractions/{found['id']}")).json()
    assert shown["evidence"] == found["evidence"]
    assert failed["status"] == "failed" and failed["id"] and "evidence" not in failed


async def test_documents_with_many_names_of_their_own_have_one_column(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("few", says({"a": 1} | {f"few{n}": n for n in range(200)}))
    upstream.when("many", says({"a": 1, "b": 2}))
    widths = list[int]()
    for names in (["few"], ["few", "many"]):
        given = [{"custom_id": name, "text": name} for name in names]
        schema = {"title": "Amount", "type": "object", "properties": {"a": {}}}
        job = await made(alice, items=given, schema=schema)
        await ended(alice, job)
        table = await alice.get(f"{JOBS}/{job['id']}/results?format=csv")
        rows = list(csv.reader(io.StringIO(table.text)))
        widths.append(len(rows[0]))

    assert widths == [2 + 1 + 200, 3]
    assert rows[0] == ["custom_id", "status", "data"]
    assert json.loads(rows[2][2]) == {"a": 1, "b": 2}


async def test_documents_that_are_no_objects_have_one_column(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("number", says({"value": [1, 2]}))
    job = await made(alice, 2, schema={"type": "array"})
    await ended(alice, job)

    table = await alice.get(f"{JOBS}/{job['id']}/results?format=csv")
    parquet = await alice.get(f"{JOBS}/{job['id']}/results?format=parquet")

    assert table.text.splitlines()[:2] == ["custom_id,status,data", 'c0,succeeded,"[1, 2]"']
    rows: Any = pyarrow.parquet.read_table(io.BytesIO(parquet.content))
    assert [row["data"] for row in rows.to_pylist()] == ["[1, 2]"] * 2


async def test_a_provider_that_wants_less_gets_less(alice: AsyncClient, upstream: Upstream) -> None:
    tries: dict[str, int] = {}

    def sometimes(body: Json) -> Reply:
        text = text_of(body)
        tries[text] = tries.get(text, 0) + 1
        if tries[text] == 1 and len(tries) % 3 == 0:
            return Reply(status=429, headers={"retry-after": "0"})
        return number(body)

    upstream.when("number", sometimes)

    done = await ended(alice, await made(alice, 60, options={"concurrency": 8}))

    assert done["counts"]["succeeded"] == 60
    assert len(upstream.requests) == 80


async def test_a_job_larger_than_a_request_may_be_is_taken(
    environ: dict[str, str], bearer: Callable[..., Any]
) -> None:
    settings = settings_of(environ, max_body_bytes=20_000, max_job_items=2000)
    with ThreadedServer(settings) as server:
        async with client_of(server.url, await bearer("Alice")) as alice:
            taken = await alice.post(JOBS, json={"schema": SCHEMA, "items": items(2000)})
            many = await alice.post(JOBS, json={"schema": SCHEMA, "items": items(2001)})
            long = [{"custom_id": "a", "text": "x" * 20_001}]
            large = await alice.post(JOBS, json={"schema": SCHEMA, "items": long})
            other = await alice.post(f"{JOBS}/x/retry", json={"only": "x" * 70_000})
            await alice.delete(f"{JOBS}/{taken.json()['id']}")

    assert taken.status_code == 202, taken.text
    assert (many.status_code, many.json()["error"]["code"]) == (422, "too_many_items")
    assert large.status_code == other.status_code == 413

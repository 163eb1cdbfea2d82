"""An account's owner takes all of it along, and leaves nothing behind."""

import asyncio
import base64
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from httpx2 import AsyncClient
from sqlalchemy import ForeignKey, delete, select, update

from app.core.security import EVERYTHING, Caller
from app.db.base import Base
from app.db.session import make_engine, make_sessions
from app.models import Run, User
from tests.conftest import PASSWORD, client_of, settings_of
from tests.keeping import connected, counts, everything, users_of
from tests.server import ThreadedServer
from tests.toolserver import ToolServer
from tests.upstream import Call, Reply, Upstream

CANARY = "canary-4711"
RESPONSES = "/v1/responses"
Json = dict[str, Any]


def asking(text: str, **more: Any) -> Json:
    return {"model": "assistant", "input": text, **more}


async def posted(client: AsyncClient, path: str, **body: Any) -> Json:
    reply = await client.post(path, json=body)
    assert reply.status_code < 300, reply.text
    return reply.json()


async def live(client: AsyncClient, upstream: Upstream) -> int:
    """The id of a user who has left their words everywhere."""
    upstream.when(
        CANARY,
        Reply(reasoning=CANARY, calls=(Call("get_weather", {"location": CANARY}),)),
        Reply(text=f"I say {CANARY}."),
    )
    upstream.when(f"slow {CANARY}", Reply(text=f"one {CANARY} two three", pace=2.0))
    name = (await posted(client, "/v1/conversations", metadata={"m": CANARY}))["id"]
    headers = {"Idempotency-Key": CANARY}
    body = asking(CANARY, conversation=name, metadata={"m": CANARY})
    first = await client.post(RESPONSES, json=body, headers=headers)
    await posted(client, RESPONSES, **asking(CANARY, previous_response_id=first.json()["id"]))
    file = {"file": (f"{CANARY}.txt", (CANARY * 10_000).encode())}
    await client.post("/v1/files", files=file, data={"purpose": "user_data"})
    schema = {"type": "object", "properties": {CANARY: {"type": "string"}}}
    await posted(client, f"/v1/schemas/{CANARY}/versions", **schema)
    await posted(client, "/users/me/keys", name=CANARY, scopes=["*"])
    webhook = {"url": f"http://webhooks.invalid/{CANARY}"}
    extraction = {"schema": schema, "input": {"text": CANARY}, "webhook": webhook}
    await client.post("/v1/extractions", json=extraction)
    items = [{"custom_id": f"{CANARY}-{n}", "text": f"slow {CANARY}"} for n in range(40)]
    await posted(client, "/v1/extraction-jobs", schema=schema, items=items, webhook=webhook)
    await posted(client, "/v1/schedules", response=asking(CANARY), at="2100-01-01T00:00:00Z")
    me: Json = (await client.get("/users/me")).json()
    return me["id"]


async def in_flight(client: AsyncClient) -> Json:
    return await posted(client, RESPONSES, **asking(f"slow {CANARY}", background=True))


async def test_an_erased_account_is_nowhere_in_the_database(
    alice: AsyncClient,
    bob: AsyncClient,
    environ: dict[str, str],
    upstream: Upstream,
    tools: ToolServer,
) -> None:
    await bob.patch("/users/me", json={"name": "Bob"})
    before = await counts(environ)
    await alice.patch("/users/me", json={"name": CANARY})
    user_id = await live(alice, upstream)
    await in_flight(alice)
    bobs = await posted(bob, RESPONSES, **asking("Hello"))
    alone = {name: count for name, count in (await counts(environ)).items() if count}
    assert set(alone) == {table.name for table in Base.metadata.sorted_tables}

    erased = await alice.delete("/users/me")

    assert erased.status_code == 204, erased.text
    stored = await everything(environ)
    assert CANARY not in stored and base64.b64encode(CANARY.encode()).decode() not in stored
    after = await counts(environ)
    assert after["users"] == before["users"] - 1
    for table in Base.metadata.sorted_tables:
        for column in owners(table.c):
            async with connected(environ) as connection:
                left = table.select().where(column == user_id)
                assert (await connection.execute(left)).all() == [], table.name
    assert (await bob.get(f"{RESPONSES}/{bobs['id']}")).json() == bobs
    assert (await alice.get("/users/me")).status_code == 401
    asked = len(upstream.requests)
    await upstream.wait_until_async(
        lambda: all(each.finished or each.aborted for each in upstream.requests)
    )
    assert len(upstream.requests) == asked, "nothing of theirs goes on"


def owners(columns: Any) -> list[Any]:
    """The columns that say whose a row is."""
    is_owner = ForeignKey("users.id").target_fullname
    return [
        column
        for column in columns
        if any(key.target_fullname == is_owner for key in column.foreign_keys)
    ]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_nothing_of_an_erased_account_is_left_in_the_file(
    alice: AsyncClient,
    environ: dict[str, str],
    upstream: Upstream,
    tools: ToolServer,
    tmp_path: Path,
) -> None:
    await live(alice, upstream)
    await in_flight(alice)
    assert CANARY.encode() in read(tmp_path)

    assert (await alice.delete("/users/me")).status_code == 204

    assert CANARY.encode() not in read(tmp_path)


def read(folder: Path) -> bytes:
    """The database with its log, as a thief of the disk would."""
    return b"".join(file.read_bytes() for file in folder.glob("test.db*"))


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
@pytest.mark.parametrize("what", ["going on", "over", "items"])
async def test_nobody_who_locks_runs_in_the_order_of_their_ids_waits_for_ever_for_an_erasure(
    alice: AsyncClient, environ: dict[str, str], upstream: Upstream, what: str
) -> None:
    upstream.when("hang", Reply(hang=True))
    if what == "items":
        items = [{"custom_id": f"{n}", "text": "Ada"} for n in range(5)]
        job = await posted(alice, "/v1/extraction-jobs", schema={"type": "object"}, items=items)
        await alice.get(f"/v1/extraction-jobs/{job['id']}/events")
    for _ in range(0 if what == "items" else 5):
        text, background = ("hang", True) if what == "going on" else ("Hello", False)
        await posted(alice, RESPONSES, **asking(text, background=background))
    ids = select(Run.id).where((Run.batch_id if what == "items" else Run.id).is_not(None))
    async with connected(environ) as connection:
        first = await connection.scalar(ids.order_by(Run.id).limit(1))
        newest = update(Run).where(Run.id == first).values(created_at=datetime.now(UTC))
        await connection.execute(newest)  # else it might be locked first by chance

    async with connected(environ) as connection:
        await connection.execute(select(Run.id).where(Run.id == first).with_for_update())
        erasing = asyncio.create_task(alice.delete("/users/me"))
        await asyncio.sleep(0.5)  # it waits for that one by then
        await connection.execute(ids.order_by(Run.id).with_for_update())

    assert (await erasing).status_code == 204


async def test_what_a_dead_process_left_of_an_account_is_erased_by_the_next(
    environ: dict[str, str],
    bearer: Callable[..., Any],
    upstream: Upstream,
    tools: ToolServer,
) -> None:
    settings = settings_of(environ)
    with ThreadedServer(settings) as server:
        token = await bearer("Alice")
        async with client_of(server.url, token) as alice:
            user_id = await live(alice, upstream)
            key = (await posted(alice, "/users/me/keys", name="key", scopes=["*"]))["key"]
    engine = make_engine(settings)
    async with users_of(make_sessions(engine)) as users:
        await users.close(Caller.of(user_id, EVERYTHING), user_id)
    await engine.dispose()

    with ThreadedServer(settings) as server:
        for credential in (token, key):
            async with client_of(server.url, credential) as client:
                assert (await client.get("/users/me")).status_code == 401
                login = {"username": "alice@example.com", "password": PASSWORD}
                assert (await client.post("/auth/token", data=login)).status_code == 401
        async with asyncio.timeout(60):
            while (await counts(environ))["users"]:
                await asyncio.sleep(0.1)

    assert {name for name, count in (await counts(environ)).items() if count} == set()


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
async def test_what_another_process_executes_stops_too(
    environ: dict[str, str], bearer: Callable[..., Any], upstream: Upstream
) -> None:
    upstream.when("slow", Reply(text="one two three four", pace=5.0))
    settings = settings_of(environ)
    with ThreadedServer(settings) as first, ThreadedServer(settings) as second:
        token = await bearer("Alice")
        async with client_of(first.url, token) as here, client_of(second.url, token) as there:
            await posted(here, RESPONSES, **asking("slow", background=True))
            await upstream.wait_for_async(1)

            assert (await there.delete("/users/me")).status_code == 204

            await upstream.wait_until_async(lambda: upstream.requests[0].aborted)
    rows = await counts(environ)
    assert {name for name, count in rows.items() if count} == set()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (RESPONSES, asking("Hello")),
        (RESPONSES, asking("Hello", conversation="chat")),
        ("/v1/conversations", {}),
        ("/v1/schemas/person/versions", {"type": "object"}),
        ("/v1/extractions", {"schema_ref": "contact", "input": {"text": "Ada"}}),
        (
            "/v1/extraction-jobs",
            {"schema_ref": "contact", "items": [{"custom_id": "1", "text": "Ada"}]},
        ),
        ("/v1/schedules", {"response": asking("Hello"), "at": "2100-01-01T00:00:00Z"}),
        ("/users/me/keys", {"name": "key", "scopes": ["*"]}),
    ],
)
async def test_whose_account_goes_in_the_very_moment_is_told_so(
    alice: AsyncClient, environ: dict[str, str], upstream: Upstream, path: str, body: Json
) -> None:
    if "conversation" in body:
        body = {**body, "conversation": (await posted(alice, "/v1/conversations"))["id"]}
    async with connected(environ) as connection:
        await connection.execute(delete(User))
        posting = asyncio.create_task(alice.post(path, json=body))
        await asyncio.sleep(0.5)  # it has been let in by then, and waits for its turn to write

    reply = await posting
    assert 400 <= reply.status_code < 500, reply.text
    assert {name for name, count in (await counts(environ)).items() if count} == set()


async def test_an_export_has_all_that_is_stored_and_no_secret(
    alice: AsyncClient,
    bob: AsyncClient,
    environ: dict[str, str],
    upstream: Upstream,
    tools: ToolServer,
) -> None:
    await live(alice, upstream)
    await posted(bob, RESPONSES, **asking("What Bob says"))
    secret = (await posted(alice, "/users/me/keys", name="second", scopes=["*"]))["key"]

    at_least = (await counts(environ))["runs"] - 1  # Bob's
    reply = await alice.get("/users/me/export")

    assert reply.status_code == 200
    assert "attachment" in reply.headers["content-disposition"]
    lines = [json.loads(line) for line in reply.text.splitlines()]
    types = {line["type"] for line in lines}
    assert types == {
        *("account", "api_key", "allowance", "usage", "schema", "schedule", "file"),
        *("conversation", "run", "message", "tool_call"),
    }
    assert {table.name for table in Base.metadata.sorted_tables} == {
        *("users", "api_keys", "allowances", "usage", "schema_versions", "schedules", "files"),
        *("conversations", "runs", "messages", "tool_calls", "events"),
    }, "a new table belongs into the export"

    def of(kind: str) -> list[Json]:
        return [line for line in lines if line["type"] == kind]

    assert [each["email"] for each in of("account")] == ["alice@example.com"]
    assert [base64.b64decode(each["data"]) for each in of("file")] == [(CANARY * 10_000).encode()]
    runs = {run["id"]: run for run in of("run")}
    assert at_least <= len(runs) < (await counts(environ))["runs"]  # webhooks come by themselves
    assert {each["run_id"] for each in of("message")} <= set(runs)
    assert [run["output"] for run in runs.values() if run["kind"] == "agent"] == [
        f"I say {CANARY}."
    ] * 2
    assert "What Bob says" not in reply.text and secret not in reply.text
    for name in ("hashed_password", "digest", "$argon2"):
        assert name not in reply.text


async def test_only_administrators_export_and_erase_others(
    alice: AsyncClient, bob: AsyncClient, admin: AsyncClient, anonymous: AsyncClient
) -> None:
    user_id = (await alice.get("/users/me")).json()["id"]
    path = f"/users/{user_id}"

    assert (await anonymous.get(f"{path}/export")).status_code == 401
    assert (await anonymous.get("/users/me/export")).status_code == 401
    for request in (bob.get(f"{path}/export"), bob.delete(path), bob.get("/users/99/export")):
        refused = await request
        assert refused.status_code == 404
        assert refused.json()["error"]["code"] == "user_not_found"

    exported = await admin.get(f"{path}/export")
    assert json.loads(exported.text.splitlines()[0])["email"] == "alice@example.com"
    assert (await admin.delete(path)).status_code == 204
    assert (await alice.get("/users/me")).status_code == 401


async def test_a_large_account_is_exported_in_little_memory_and_erased_a_little_at_a_time(
    alice: AsyncClient, bob: AsyncClient, environ: dict[str, str], upstream: Upstream
) -> None:
    name = (await posted(alice, "/v1/conversations"))["id"]
    item = {"type": "message", "role": "user", "content": "Hello"}
    for _ in range(150):
        await posted(alice, f"/v1/conversations/{name}/items", items=[item] * 20)

    lines = 0
    async with alice.stream("GET", "/users/me/export") as reply:
        async for line in reply.aiter_lines():
            lines += 1
            assert json.loads(line)
    assert lines == 1 + 1 + 150 + 150 * 20

    erasing = asyncio.create_task(alice.delete("/users/me"))
    while not erasing.done():
        await posted(bob, RESPONSES, **asking("Hello"))
    assert erasing.result().status_code == 204
    rows = await counts(environ)
    assert rows["users"] == 1 and rows["conversations"] == 0

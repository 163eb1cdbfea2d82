"""What is gone after its time, and what stays."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

from httpx2 import AsyncClient
from sqlalchemy import update

from app.models import File, Run
from app.services.jobs import DISCARDED
from tests.conftest import client_of, settings_of
from tests.extracting import fills
from tests.keeping import AT_ONCE, age, connected, counts, get, in_chat, sweep
from tests.responding import URL as RESPONSES
from tests.responding import asking, id_of, respond, weather_in
from tests.server import ThreadedServer
from tests.toolserver import ToolServer
from tests.upstream import Reply, Upstream

JOBS = "/v1/extraction-jobs"
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}}


# Events


async def test_only_logs_of_runs_that_ended_long_ago_go(
    alice: AsyncClient, environ: dict[str, str], upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when("slow", Reply(text="one two three", pace=1.0))
    old, young = await respond(alice), await respond(alice)
    slow = await alice.post(RESPONSES, json=asking("slow", background=True))
    await age(environ, id_of(old), days=2)

    await asyncio.gather(*(sweep(environ) for _ in range(3)))

    stream = f"{RESPONSES}/{{}}?stream=true&starting_after=0"
    statuses = [
        (await alice.get(stream.format(each["id"]))).status_code
        for each in (old, young, slow.json())
    ]
    assert statuses == [410, 200, 200]


async def test_the_log_of_a_run_that_is_tried_again_during_a_sweep_stays(
    alice: AsyncClient, environ: dict[str, str], upstream: Upstream
) -> None:
    run_id = id_of(await respond(alice))
    await age(environ, run_id)
    before = (await counts(environ))["events"]
    again = update(Run).where(Run.id == run_id).values(status="waiting", finished_at=None)

    async with connected(environ) as connection:
        await connection.execute(again)
        sweeping = asyncio.create_task(sweep(environ))
        await asyncio.sleep(0.5)  # it has found the run by then, and waits for it
    await sweeping

    assert (await counts(environ))["events"] == before


async def test_a_job_that_is_deleted_is_not_tried_again(
    alice: AsyncClient, environ: dict[str, str], upstream: Upstream
) -> None:
    upstream.when("Ada", Reply(status=400))
    body = {"schema": SCHEMA, "items": [{"custom_id": "1", "text": "Ada is 36."}]}
    job = (await alice.post(JOBS, json=body)).json()["id"]
    await get(alice, f"{JOBS}/{job}/events")
    hidden = {"status": DISCARDED, "deleted_at": datetime.now(UTC)}

    async with connected(environ) as connection:
        await connection.execute(update(Run).where(Run.id == job).values(hidden))
        retrying = asyncio.create_task(alice.post(f"{JOBS}/{job}/retry"))
        await asyncio.sleep(0.5)  # it has found the job by then, and waits for it

    assert (await retrying).status_code == 404
    assert (await counts(environ))["runs"] == 2, "there is no further driver"


async def test_a_server_sweeps_by_itself(
    environ: dict[str, str], bearer: Any, upstream: Upstream
) -> None:
    with ThreadedServer(settings_of(environ)) as first:
        token = await bearer("Owner")
        async with client_of(first.url, token) as client:
            old = await respond(client)
    await age(environ, id_of(old), days=2)

    with ThreadedServer(settings_of(environ)):
        async with asyncio.timeout(30):
            while (await counts(environ))["events"]:
                await asyncio.sleep(0.1)


# Runs, conversations and files


async def test_runs_go_with_all_that_belongs_to_them_unless_something_newer_goes_on_from_them(
    alice: AsyncClient, environ: dict[str, str], upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when("weather", *weather_in("Tokyo"))
    first = await respond(alice, "weather")
    second = await respond(alice, "weather", previous_response_id=first["id"])
    third = await respond(alice, "weather", previous_response_id=second["id"])
    lone = await respond(alice, "weather")
    await age(environ, *map(id_of, (first, second, lone)))

    await sweep(environ, keep_runs=timedelta(days=90))

    async def statuses() -> list[int]:
        all_four = (first, second, third, lone)
        return [(await alice.get(f"{RESPONSES}/{each['id']}")).status_code for each in all_four]

    assert await statuses() == [200, 200, 200, 404]
    await age(environ, id_of(third))
    await sweep(environ)
    assert await statuses() == [200, 200, 200, 404], "by default they are kept for ever"

    await sweep(environ, keep_runs=timedelta(days=90))
    assert await statuses() == [404] * 4
    rows = await counts(environ)
    assert [rows[name] for name in ("runs", "messages", "tool_calls", "events")] == [0] * 4


async def test_a_conversation_stays_or_goes_as_a_whole(
    alice: AsyncClient, environ: dict[str, str], upstream: Upstream
) -> None:
    made = [(await alice.post("/v1/conversations", json={})).json()["id"] for _ in range(3)]
    busy, done, _empty = made
    said = [await respond(alice, conversation=name) for name in (busy, done)]
    await respond(alice, conversation=busy)
    root = await in_chat(alice, "used", "A question")
    await age(environ, *map(id_of, said), root)
    await in_chat(alice, "outside", "A question", "ok", "Another")

    await sweep(environ, keep_runs=timedelta(days=90))

    names = [*made, "used", "outside"]
    statuses = [(await alice.get(f"/v1/conversations/{name}")).status_code for name in names]
    assert statuses == [200, 404, 404, 200, 200]
    items = (await get(alice, f"/v1/conversations/{busy}/items")).json()["data"]
    assert len(items) == 4


async def test_a_long_chain_goes_at_once(
    alice: AsyncClient, environ: dict[str, str], upstream: Upstream
) -> None:
    name = (await alice.post("/v1/conversations", json={})).json()["id"]
    message = {"role": "user", "content": "Hello"}
    body = {"items": [message | {"type": "message"}]}
    lone: list[str] = []
    for _ in range(30):
        reply = await alice.post(f"/v1/conversations/{name}/items", json=body)
        assert reply.status_code == 200, reply.text
        before = {"previous_response_id": f"resp_{lone[-1]}"} if lone else {}
        lone.append(id_of(await respond(alice, **before)))
    async with connected(environ) as connection:
        rows = await connection.exec_driver_sql("SELECT id FROM runs")
        ids = [row.id for row in rows]
    await age(environ, *ids)

    await sweep(environ, keep_runs=timedelta(days=90))

    assert (await counts(environ))["runs"] == 0


async def test_jobs_go_with_their_items(
    alice: AsyncClient, environ: dict[str, str], upstream: Upstream
) -> None:
    upstream.when("Ada", fills({"name": "Ada", "age": 36}))
    texts = ["Ada is 36.", "Ada is 36.", "Ada was 36."]
    items = [{"custom_id": str(n), "text": text} for n, text in enumerate(texts)]
    body = {"schema": {"type": "object"}, "items": items}
    old, young = [(await alice.post(JOBS, json=body)).json()["id"] for _ in range(2)]
    for job in (old, young):
        await get(alice, f"{JOBS}/{job}/events")
    await age(environ, old)

    await sweep(environ, keep_runs=timedelta(days=90))

    statuses = [(await alice.get(f"{JOBS}/{job}")).status_code for job in (old, young)]
    assert statuses == [404, 200]
    assert (await counts(environ))["runs"] == 4
    assert len((await get(alice, f"{JOBS}/{young}/results")).text.splitlines()) == 3


async def test_files_go_when_they_expire_or_are_too_old(
    alice: AsyncClient, environ: dict[str, str]
) -> None:
    async def upload(**form: Any) -> str:
        file = {"file": ("a.txt", b"hello")}
        reply = await alice.post("/v1/files", files=file, data={"purpose": "user_data", **form})
        return reply.json()["id"].removeprefix("file-")

    expiring = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    first, second = await upload(**expiring), await upload()
    async with connected(environ) as connection:
        due = update(File).where(File.id == first).values(expires_at=File.created_at)
        await connection.execute(due)

    await sweep(environ)
    assert (await counts(environ))["files"] == 1
    assert (await get(alice, f"/v1/files/file-{second}")).status_code == 200

    await sweep(environ, keep_files=AT_ONCE)
    assert (await counts(environ))["files"] == 0

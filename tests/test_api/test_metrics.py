"""What Prometheus is told, and who may ask."""

import asyncio
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from httpx2 import AsyncClient, ReadTimeout
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy.ext.asyncio import create_async_engine

from app.services.operations import Operations
from tests.conftest import client_of, settings_of
from tests.server import ROOT, ServerProcess, ThreadedServer
from tests.toolserver import ToolServer
from tests.upstream import Call, Reply, Upstream

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


async def scrape(client: AsyncClient) -> Samples:
    answer = await client.get("/metrics")
    assert answer.status_code == 200, answer.text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


class Meter:
    """How much was counted since `begin`: this process may have counted before."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._before: Samples = {}
        self.now: Samples = {}

    async def read(self) -> None:
        self._before, self.now = self.now, await scrape(self._client)

    async def look(self) -> None:
        """Once more, and counts from where it did."""
        self.now = await scrape(self._client)

    def added(self, name: str, **labels: str) -> float:
        key = (name, frozenset(labels.items()))
        return self.now.get(key, 0) - self._before.get(key, 0)


@pytest.fixture
async def meter(admin: AsyncClient) -> Meter:
    meter = Meter(admin)
    await meter.read()
    return meter


def asking(said: str, **more: Any) -> dict[str, Any]:
    return {"model": "assistant", "messages": [{"role": "user", "content": said}], **more}


CHAT = "/v1/chat/completions"


async def test_a_run_counts_where_it_passes(
    alice: AsyncClient, meter: Meter, upstream: Upstream, tools: ToolServer
) -> None:
    weather = Reply(calls=(Call("get_weather", {"location": "Tokyo"}),))
    upstream.when("weather", weather, Reply(text="Fine."))
    await alice.post(CHAT, json=asking("weather"))
    await alice.get("/v1/responses/resp_nothing")
    await alice.get("/nowhere")
    await meter.read()

    ended = {"kind": "agent", "status": "completed", "reason": "stop"}
    assert meter.added("agent_runs_ended_total", **ended) == 1
    assert meter.added("agent_run_seconds_count", kind="agent") == 1
    assert meter.added("agent_tool_calls_total", tool="get_weather", outcome="done") == 1
    assert meter.added("agent_model_requests_total", outcome="200") == 2
    assert meter.added("agent_tokens_total", model="scripted", direction="input") == 20
    assert meter.added("agent_tokens_total", model="scripted", direction="output") == 10
    assert meter.added("agent_commit_seconds_count") >= 3
    assert meter.added("agent_log_entries_total") >= 4
    chat = {"method": "POST", "route": CHAT, "status": "200"}
    assert meter.added("agent_http_requests_total", **chat) == 1
    assert meter.added("agent_http_request_seconds_count", route=CHAT) == 1
    lost = {"method": "GET", "route": "/v1/responses/{response_id}", "status": "404"}
    assert meter.added("agent_http_requests_total", **lost) == 1
    nowhere = {"method": "GET", "route": "unknown", "status": "404"}
    assert meter.added("agent_http_requests_total", **nowhere) == 1
    assert meter.now["agent_database_up", frozenset()] == 1


async def test_failures_count_by_what_they_are(
    alice: AsyncClient, meter: Meter, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when("away", Reply(status=400))
    lost = Reply(calls=(Call("get_weather", {"location": "Nowhere"}),))
    upstream.when("lost", lost, Reply(text="So."))
    down = Reply(calls=(Call("get_weather", {"location": "Tokyo"}),))
    upstream.when("down", down, Reply(text="So."))
    await alice.post(CHAT, json=asking("away"))
    await alice.post(CHAT, json=asking("lost"))
    tools.behave("/v1/search", status=500)
    await alice.post(CHAT, json=asking("down"))
    await meter.read()

    failed = {"kind": "agent", "status": "failed", "reason": "upstream_error"}
    assert meter.added("agent_runs_ended_total", **failed) == 1
    assert meter.added("agent_model_requests_total", outcome="400") == 1
    assert meter.added("agent_tool_calls_total", tool="get_weather", outcome="retry") == 1
    assert meter.added("agent_tool_calls_total", tool="get_weather", outcome="failed") == 1


async def test_a_model_that_is_left_alone_is_seen(
    environ: dict[str, str], bearer: Callable[..., Any], upstream: Upstream
) -> None:
    upstream.when("down", Reply(status=500))
    settings = settings_of(environ, model_retries=0, breaker_failures=1, breaker_pause=0.1)
    key = ("agent_model_breaker_open", frozenset({("model", "scripted")}))
    with ThreadedServer(settings) as running:
        async with client_of(running.url, await bearer("Root", is_admin=True)) as client:
            await client.post(CHAT, json=asking("down"))
            was = (await scrape(client))[key]
            await asyncio.sleep(0.2)
            await client.post(CHAT, json=asking("hello"))
            assert (was, (await scrape(client))[key]) == (1, 0)


async def test_who_leaves_before_an_answer_is_no_error_of_ours(
    alice: AsyncClient, meter: Meter, upstream: Upstream
) -> None:
    upstream.when("slow", Reply(text="so", delay=5))
    with pytest.raises(ReadTimeout):
        await alice.post(CHAT, json=asking("slow", stream=True), timeout=1)

    left = {"method": "POST", "route": CHAT, "status": "499"}
    async with asyncio.timeout(5):
        while not meter.added("agent_http_requests_total", **left):
            await meter.look()


async def test_open_streams_and_open_runs_are_seen_while_they_last(
    alice: AsyncClient, admin: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("slow", Reply(text="one two three", pace=0.5))

    async def streams() -> float:
        return (await scrape(admin))["agent_open_streams", frozenset()]

    before = (await scrape(admin)).get(("agent_open_streams", frozenset()), 0)
    await asyncio.sleep(0)
    async with alice.stream("POST", CHAT, json=asking("slow", stream=True)) as reply:
        assert reply.status_code == 200
        assert await streams() == before + 1
        async for _ in reply.aiter_lines():
            pass
    async with asyncio.timeout(5):
        while await streams() != before:
            await asyncio.sleep(0.05)


async def test_what_is_open_is_counted_by_the_database(
    server: ThreadedServer, alice: AsyncClient, admin: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("slow", Reply(text="one two three", pace=1.0))
    body = {"model": "assistant", "input": "slow", "background": True, "conversation": None}
    first = (await alice.post("/v1/responses", json=body)).json()["id"]
    await alice.post("/v1/responses", json={**body, "previous_response_id": first})
    seen = await scrape(admin)

    assert seen["agent_runs", frozenset({("status", "running")})] == 1
    assert seen["agent_runs", frozenset({("status", "queued")})] == 1
    assert seen["agent_oldest_queued_seconds", frozenset()] == 0  # it waits for its turn alone


async def test_where_no_connection_is_free_the_database_counts_as_away(
    environ: dict[str, str],
) -> None:
    url = environ["DATABASE_URL"]
    engine = create_async_engine(url, pool_size=1, max_overflow=0, pool_timeout=0.1)
    async with engine.connect():
        [up] = await Operations(engine).gauges()
    await engine.dispose()

    assert [(sample.name, sample.value) for sample in up.samples] == [("agent_database_up", 0)]


async def test_what_a_model_costs_follows_from_its_tokens(
    environ: dict[str, str], bearer: Callable[..., Any]
) -> None:
    with ThreadedServer(settings_of(environ, model="openai-chat:gpt-4o")) as running:
        async with client_of(running.url, await bearer("Root", is_admin=True)) as client:
            await client.post(CHAT, json=asking("hello"))
            seen = await scrape(client)

    model = ("model", "gpt-4o")
    sent, received = (
        seen["agent_tokens_total", frozenset({model, ("direction", direction)})]
        for direction in ("input", "output")
    )
    dollars = seen["agent_cost_dollars_total", frozenset({model})]
    assert dollars == pytest.approx(sent * 2.5e-6 + received * 1e-5)


async def test_only_administrators_and_keys_that_they_made_for_it_may_ask(
    anonymous: AsyncClient, alice: AsyncClient, admin: AsyncClient
) -> None:
    async def key(client: AsyncClient, *scopes: str) -> Any:
        body = {"name": "scraper", "scopes": list(scopes)}
        return await client.post("/users/me/keys", json=body)

    async def status(client: AsyncClient, made: Any) -> int:
        headers = {"Authorization": f"Bearer {made.json()['key']}"}
        return (await client.get("/metrics", headers=headers)).status_code

    assert (await anonymous.get("/metrics")).status_code == 401
    assert (await alice.get("/metrics")).status_code == 403
    assert (await key(alice, "metrics")).status_code == 403
    assert await status(anonymous, await key(alice, "*")) == 403
    assert await status(anonymous, await key(admin, "*")) == 403
    narrow = await key(admin, "metrics")
    assert await status(anonymous, narrow) == 200


async def test_a_key_for_metrics_opens_nothing_else(
    anonymous: AsyncClient, admin: AsyncClient
) -> None:
    made = await admin.post("/users/me/keys", json={"name": "scraper", "scopes": ["metrics"]})
    headers = {"Authorization": f"Bearer {made.json()['key']}"}
    paths: dict[str, Any] = (await anonymous.get("/openapi.json")).json()["paths"]
    asked = [(method, path) for path, item in paths.items() for method in item]

    opened: list[Any] = []
    closed = 0
    for method, path in asked:
        url = re.sub(r"\{\w+\}", "1", path)
        if (await anonymous.request(method, url)).status_code == 401:
            closed += 1
            answer = await anonymous.request(method, url, headers=headers)
            if answer.status_code != 403:
                opened.append((method, path, answer.status_code))

    assert [(method, path) for method, path, _ in opened] == [("get", "/metrics")]
    assert closed > 40


async def test_this_machine_may_ask_where_no_bearer_is_required(local: AsyncClient) -> None:
    assert (await local.get("/metrics")).headers["content-type"].startswith("text/plain")


@pytest.fixture
def two(environ: dict[str, str], tmp_path: Path) -> Iterator[ServerProcess]:
    """A server of two processes under one port, in a directory of its own."""
    running = ServerProcess(**environ)
    running.command += ["--workers", "2", "--app-dir", str(ROOT)]
    running.house = tmp_path
    yield running
    running.stop()


def written(file: Path) -> int:
    """How often a process says that it was asked for agents."""
    counts = json.loads(file.read_text()).get("agent_http_requests", [])
    return sum(int(count) for labels, [count] in counts if "/v1/agents" in labels)


async def test_several_processes_answer_for_each_other(
    two: ServerProcess, bearer: Callable[..., Any], upstream: Upstream
) -> None:
    old = two.house / ".data/metrics/notes"
    old.mkdir(parents=True)
    two.start()
    token = await bearer("Root", is_admin=True)
    assert two.process
    async with asyncio.timeout(30):  # one may be there a second before the other
        while len(files := list(old.parent.glob(f"{two.process.pid}-*/*.json"))) < 2:
            await asyncio.sleep(0.1)

    async def seen() -> float:
        async with client_of(two.url, token) as client:  # a new connection: any of the two
            key = ("agent_http_requests_total", frozenset(wanted.items()))
            return (await scrape(client)).get(key, 0)

    wanted = {"method": "GET", "route": "/v1/agents", "status": "200"}
    for _ in range(20):
        async with client_of(two.url, token) as client:
            assert (await client.get("/v1/agents")).status_code == 200
    async with asyncio.timeout(30):  # each tells the others in its time
        while sum(map(written, files)) < 20 or [await seen() for _ in range(5)] != [20] * 5:
            await asyncio.sleep(0.1)
    os.kill(int(files[0].stem), signal.SIGKILL)
    async with asyncio.timeout(30):
        while len(list(files[0].parent.glob("*.json"))) < 3:
            await asyncio.sleep(0.1)
    assert await seen() == 20
    assert old.is_dir()


async def test_numbers_of_another_shape_and_of_an_earlier_server_are_left_out(
    two: ServerProcess, bearer: Callable[..., Any]
) -> None:
    token = await bearer("Root", is_admin=True)
    counts = {"agent_http_requests": [[["GET", "/v1/agents", "200"], [7]]]}
    two.start()
    assert two.process
    [folder] = (two.house / ".data/metrics").glob(f"{two.process.pid}-*")
    (folder / "notes.json").write_text("none")
    (folder / "1.json").write_text('{"agent_run_seconds": [[["agent"], [1, 2]]], "other": []}')
    earlier = folder.with_name(f"{two.process.pid}-0")
    earlier.mkdir()
    (earlier / "1.json").write_text(json.dumps(counts))

    for _ in range(5):
        async with client_of(two.url, token) as client:  # a new connection: any of the two
            seen = await scrape(client)
            assert {name for name, labels in seen if ("route", "/v1/agents") in labels} == set()

    pids = [int(file.stem) for file in folder.glob("*.json") if file.stem.isdecimal()]
    os.kill(max(pids), signal.SIGKILL)  # the one that follows tidies up
    async with asyncio.timeout(30):
        while earlier.exists():
            await asyncio.sleep(0.1)

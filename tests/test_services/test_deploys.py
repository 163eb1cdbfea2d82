"""Stopping is announced, bounded, and loses nothing: as a deploy does it, with signals."""

import asyncio
import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from httpx2 import AsyncClient, TransportError

from tests.conftest import client_of
from tests.server import ServerProcess
from tests.toolserver import ToolServer
from tests.upstream import Call, Reply, Upstream

URL = "/v1/responses"
TIMEOUT = 6  # seconds, of SHUTDOWN_TIMEOUT


def served(environ: dict[str, str], *options: str) -> ServerProcess:
    """As `just serve` starts it."""
    process = ServerProcess(**environ | {"SHUTDOWN_TIMEOUT": str(TIMEOUT)})
    process.environ["PORT"] = str(process.port)
    process.command = ["app.serve", *options]
    return process


@pytest.fixture
def process(environ: dict[str, str]) -> Iterator[ServerProcess]:
    with served(environ) as running:
        yield running


def send(process: ServerProcess, number: signal.Signals) -> float:
    """When it was sent."""
    assert process.process
    process.process.send_signal(number)
    return time.monotonic()


async def exit_of(process: ServerProcess) -> float:
    """When it was over."""
    assert process.process
    await asyncio.to_thread(process.process.wait, 30)
    return time.monotonic()


async def begin(client: AsyncClient, said: str) -> str:
    body = {"model": "assistant", "input": said, "background": True}
    return (await client.post(URL, json=body)).json()["id"]


async def watch(client: AsyncClient, run_id: str, after: int | None = None) -> list[str]:
    """All lines, to the end of the connection."""
    more = "" if after is None else f"&starting_after={after}"
    async with client.stream("GET", f"{URL}/{run_id}?stream=true{more}") as reply:
        return [line async for line in reply.aiter_lines()]


def events_of(lines: list[str]) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


async def test_a_server_that_is_told_to_stop_says_so_until_its_runs_are_handed_over(
    process: ServerProcess, bearer: Callable[..., Any], upstream: Upstream
) -> None:
    upstream.when("slow", Reply(text="one two three", hang=True))
    token = await bearer("Owner")
    async with client_of(process.url, token) as owner:
        run_id = await begin(owner, "slow")
        await upstream.wait_for_async(1)
        watching = asyncio.create_task(watch(owner, run_id))
        await asyncio.sleep(0.3)
        told = send(process, signal.SIGTERM)
        await asyncio.sleep(0.3)
        alive, ready = await owner.get("/health"), await owner.get("/health/ready")
        refused = await owner.post(URL, json={"model": "assistant", "input": "new"})
        known = await owner.get(f"{URL}/{run_id}")
        lines = await watching
        took = await exit_of(process) - told

    assert alive.status_code == 200
    for reply in (ready, refused):
        assert reply.status_code == 503
        assert reply.json()["error"]["code"] == "stopping"
        assert int(reply.headers["Retry-After"]) >= 1
    assert known.json()["status"] == "in_progress"
    assert lines[-1] == "retry: 1000"
    assert took < TIMEOUT

    upstream.when("slow", Reply(text="one two three"))
    process.start()
    seen = events_of(lines)
    async with client_of(process.url, token) as owner:
        seen += events_of(await watch(owner, run_id, seen[-1]["sequence_number"]))
    assert [event["sequence_number"] for event in seen] == list(range(len(seen)))
    assert seen[-1]["type"] == "response.completed"


async def test_streams_and_hanging_tools_do_not_keep_a_server_from_stopping(
    process: ServerProcess,
    bearer: Callable[..., Any],
    upstream: Upstream,
    tools: ToolServer,
) -> None:
    upstream.when("weather", Reply(calls=(Call("get_weather", {"location": "Oslo"}),)))
    tools.behave("/v1/search", delay=60)
    token = await bearer("Owner")
    async with client_of(process.url, token) as owner:
        runs = await asyncio.gather(*(begin(owner, "weather") for _ in range(20)))
        await tools.wait_for_async("/v1/search", 20)
        async with AsyncExitStack() as stack:
            for number in range(50):
                url = f"{URL}/{runs[number % 20]}?stream=true"
                await stack.enter_async_context(owner.stream("GET", url))
            took = -send(process, signal.SIGTERM) + await exit_of(process)

    assert took < TIMEOUT + 0.5
    upstream.when("weather", Reply(text="unknown"))
    process.start()
    async with client_of(process.url, token) as owner:
        ends = await asyncio.gather(*(watch(owner, run_id) for run_id in runs))
    assert {events_of(lines)[-1]["type"] for lines in ends} == {"response.completed"}


async def test_several_processes_of_one_server_stop_together_and_lose_nothing(
    environ: dict[str, str], bearer: Callable[..., Any], upstream: Upstream
) -> None:
    upstream.when("slow", Reply(text="one two three", hang=True))
    with served(environ, "--workers", "2") as process:
        token = await bearer("Owner")
        async with client_of(process.url, token) as owner:
            runs = await asyncio.gather(*(begin(owner, "slow") for _ in range(6)))
            await upstream.wait_for_async(6)
            took = -send(process, signal.SIGTERM) + await exit_of(process)
            with pytest.raises(TransportError):
                await owner.get("/health")
        upstream.when("slow", Reply(text="one two three"))
        process.start()
        async with client_of(process.url, token) as owner:
            ends = await asyncio.gather(*(watch(owner, run_id) for run_id in runs))

    assert took < TIMEOUT + 1
    assert {events_of(lines)[-1]["type"] for lines in ends} == {"response.completed"}

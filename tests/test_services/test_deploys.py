"""Stopping is announced, bounded, and loses nothing: as a deploy does it, with signals."""

import asyncio
import json
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from httpx2 import AsyncClient, Response, TransportError

from tests.conftest import client_of
from tests.extracting import ADA, PERSON, fills
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


SAID = {"role": "user", "content": "slow"}
NO_STATE = {"state": {}, "tools": [], "context": [], "forwardedProps": {}}
CHAT = "/v1/chat/completions", {"model": "assistant", "messages": [SAID]}
THREAD = "/ag-ui/assistant", {"threadId": "t", "runId": "r", "messages": [{"id": "m", **SAID}]}
DOCUMENT = "/v1/extractions", {"input": {"text": "slow text"}, "schema": PERSON}
STREAM = {"stream": True}

ASKED = {
    "chat": (CHAT[0], CHAT[1] | STREAM),
    "ag-ui": (THREAD[0], THREAD[1] | NO_STATE),
    "extraction": (DOCUMENT[0], DOCUMENT[1] | STREAM),
    "whole chat": CHAT,
    "whole response": (URL, {"model": "assistant", "input": "slow"}),
    "whole extraction": DOCUMENT,
}


def failure(reply: Response) -> dict[str, Any]:
    """What a reply says that is over too early, whole or streamed."""
    if reply.status_code != 200:
        assert reply.status_code == 503
        assert int(reply.headers["Retry-After"]) >= 1
        assert "X-Should-Retry" not in reply.headers
        return reply.json()["error"]
    last = events_of(reply.text.splitlines())[-1]
    return last if last.get("type") == "RUN_ERROR" else last["error"]


async def ask(client: AsyncClient, name: str, key: str | None) -> Response:
    path, body = ASKED[name]
    return await client.post(path, json=body, headers={"Idempotency-Key": key} if key else {})


async def runs_of(client: AsyncClient) -> list[dict[str, Any]]:
    """All of the client's, once they are over."""
    while True:
        lines = (await client.get("/users/me/export")).text.splitlines()
        runs = [each for each in map(json.loads, lines) if each["type"] == "run"]
        if all(run["finished_at"] for run in runs):
            return runs
        await asyncio.sleep(0.05)


async def test_what_a_stop_breaks_off_is_asked_for_again_and_paid_once(
    process: ServerProcess, bearer: Callable[..., Any], upstream: Upstream
) -> None:
    upstream.when("slow", Reply(text="one two three", hang=True))
    token = await bearer("Owner")
    async with client_of(process.url, token) as owner:
        # Of the same question in one chat, the second would wait for the first.
        ways = [(name, None) for name in ASKED] + [
            (name, f"key {name}") for name in ASKED if name != "ag-ui"
        ]
        asking = [asyncio.create_task(ask(owner, *way)) for way in ways]
        await upstream.wait_for_async(len(ways) - 3)  # equal extractions are asked for once
        send(process, signal.SIGTERM)
        replies = await asyncio.gather(*asking)
        await exit_of(process)
    said = dict(zip(ways, map(failure, replies), strict=True))
    assert {error["code"] for error in said.values()} == {"stopping"}
    for (name, _), error in said.items():
        if "extraction" in name:
            assert error["retryable"] is True
            assert error["attempts"] == []
    frames = dict(zip(ways, replies, strict=True))["extraction", None].text.split("\n\n")
    assert frames[-2].startswith("event: extraction.failed\n")

    upstream.when("slow", Reply(text="Ada"))
    upstream.when("slow text", fills(ADA))
    asked = len(upstream.requests)
    process.start()
    async with client_of(process.url, token) as owner:
        again = await asyncio.gather(*(ask(owner, *way) for way in ways if way[1]))
        runs = await runs_of(owner)
    for reply in again:
        assert reply.status_code == 200, reply.text
        assert "Ada" in reply.text
        assert "stopping" not in reply.text
    ends = Counter(run["status"] for run in runs)
    keyed = sum(key is not None for _, key in ways)
    assert ends == {"cancelled": len(ASKED), "completed": keyed}
    assert len(upstream.requests) - asked <= keyed


async def test_a_page_is_told_to_load_again_and_its_answer_goes_on(
    process: ServerProcess, bearer: Callable[..., Any], upstream: Upstream
) -> None:
    upstream.when("slow", Reply(text="one two three", hang=True, hang_after=3))
    said = {"id": "u", "role": "user", "parts": [{"type": "text", "text": "slow"}]}
    body = {"id": "page", "messages": [said], "trigger": "submit-message"}
    token = await bearer("Owner")
    async with client_of(process.url, token) as owner:
        lines: list[str] = []
        async with owner.stream("POST", "/api/chat", json=body) as reply:
            async for line in reply.aiter_lines():
                lines.append(line)
                if "text-start" in line:
                    send(process, signal.SIGTERM)
        await exit_of(process)
    chunks = events_of(lines)
    assert chunks[-1]["type"] == "error"
    assert "reload" in chunks[-1]["errorText"]
    assert "retry: 1000" in lines
    assert not {"finish", "text-end"} & {chunk["type"] for chunk in chunks}

    upstream.when("slow", Reply(text="one two three"))
    process.start()
    async with client_of(process.url, token) as owner:
        reply = await owner.get("/api/chat/page/stream")
        if reply.status_code == 204:  # it was faster
            reply = await owner.get("/api/chat/page")
    assert "three" in reply.text


async def test_a_stop_after_a_tools_call_asks_to_look_before_trying_again(
    process: ServerProcess, bearer: Callable[..., Any], upstream: Upstream, tools: ToolServer
) -> None:
    weather = Reply(calls=(Call("get_weather", {"location": "Oslo"}),))
    upstream.when("slow", weather, Reply(text="one two three", hang=True))
    async with client_of(process.url, await bearer("Owner")) as owner:
        asking = asyncio.create_task(owner.post(CHAT[0], json=CHAT[1]))
        await upstream.wait_for_async(2)
        send(process, signal.SIGTERM)
        reply = await asking
    assert reply.status_code == 503
    assert reply.headers["X-Should-Retry"] == "false"
    assert "tools" in reply.json()["error"]["message"]


async def test_what_a_person_agreed_to_goes_on_after_a_stop(
    environ: dict[str, str], bearer: Callable[..., Any], upstream: Upstream
) -> None:
    erase = Reply(calls=(Call("erase"),))
    upstream.when("Erase.", erase, Reply(text="one two", hang=True))
    question = {"model": "tester", "messages": [{"role": "user", "content": "Erase."}]}
    process = served(environ)
    process.command = ["tests.plugins", "--port", str(process.port)]
    with process:
        token = await bearer("Owner")
        async with client_of(process.url, token) as owner:
            asked = (await owner.post(CHAT[0], json=question)).text
            found = re.search(r"/approve [0-9a-f]+", asked)
            assert found
            yes = question | {"messages": [{"role": "user", "content": found[0]}]}
            agreeing = asyncio.create_task(owner.post(CHAT[0], json=yes))
            await upstream.wait_for_async(2)
            send(process, signal.SIGTERM)
            assert failure(await agreeing)["code"] == "stopping"
            await exit_of(process)
        upstream.when("Erase.", erase, Reply(text="It is gone."))
        process.start()
        async with client_of(process.url, token) as owner:
            again = await owner.post(CHAT[0], json=yes)
    assert again.status_code == 200
    assert "It is gone." in again.text

"""A trace goes from the request through its run to the model and the tools, and says no words."""

import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from httpx2 import AsyncClient, TransportError

from tests.collector import Collector
from tests.conftest import client_of
from tests.server import ROOT, ServerProcess, clean_environ
from tests.toolserver import ToolServer
from tests.upstream import Call, Reply, Upstream

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CANARY = "canary-7f3a9"
WEATHER = Reply(calls=(Call("get_weather", {"location": "Tokyo"}),))
CHAT = "/v1/chat/completions"


def asking(said: str) -> dict[str, Any]:
    return {"model": "assistant", "messages": [{"role": "user", "content": said}]}


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as running:
        yield running


@pytest.fixture
def process(environ: dict[str, str], collector: Collector) -> Iterator[ServerProcess]:
    environ |= {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_EXPORTER_OTLP_HEADERS": f"api-key={CANARY}",
        "OTEL_BSP_SCHEDULE_DELAY": "100",  # milliseconds
    }
    running = ServerProcess(**environ)
    yield running
    running.kill()


@pytest.fixture
async def owner(process: ServerProcess, bearer: Callable[..., Any]) -> AsyncIterator[AsyncClient]:
    process.start()
    async with client_of(process.url, await bearer("Owner")) as client:
        yield client


async def test_one_trace_has_the_request_its_run_and_all_that_the_run_asks(
    owner: AsyncClient, upstream: Upstream, collector: Collector
) -> None:
    upstream.when("weather", WEATHER, Reply(text="Fine."))
    headers = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
    answer = await owner.post(f"{CHAT}?key={CANARY}", json=asking("weather"), headers=headers)

    assert answer.status_code == 200
    [run] = await collector.wait_for("run agent")
    [request] = await collector.wait_for("POST /v1/chat/completions")
    [agent] = await collector.wait_for("invoke_agent")
    assert (request.parent, run.parent, agent.parent) == (CALLER, request.id, run.id)
    steps = collector.named("chat ") + collector.named("execute_tool")
    assert sorted(step.name for step in steps) == [
        "chat scripted",
        "chat scripted",
        "execute_tool get_weather",
    ]
    assert {step.parent for step in steps} == {agent.id}
    spans = [request, run, agent, *steps]
    assert {(span.trace, span.service) for span in spans} == {(TRACE, "agent-backend")}
    said = run.attributes
    assert (said["run.status"], said["run.reason"], said["run.attempt"]) == ("completed", "stop", 1)
    assert (said["run.input_tokens"], said["run.output_tokens"]) == (20, 10)
    assert said["run.program"] == "assistant" and said["run.id"] in answer.json()["id"]
    assert steps[0].attributes["gen_ai.usage.input_tokens"] == 10
    assert collector.headers[0]["api-key"] == CANARY


async def test_words_stay_out_also_where_something_fails(
    owner: AsyncClient, upstream: Upstream, tools: ToolServer, collector: Collector
) -> None:
    upstream.when("weather", Reply(calls=(Call("get_weather", {"location": CANARY}),)), Reply())
    upstream.when("wrong", Reply(calls=(Call("get_weather", {"place": CANARY}),)), Reply())
    upstream.when("away", Reply(status=500, error={"message": CANARY}))
    tools.behave("/v1/search", status=500, body=CANARY.encode())
    for words in ("weather", "wrong", "away"):
        await owner.post(f"{CHAT}?key={CANARY}", json=asking(f"{words} {CANARY}"))
    text = {"schema_ref": "contact", "input": {"text": f"away {CANARY}"}}
    text["options"] = {"max_transport_retries": 0}
    await owner.post("/v1/extractions", json=text)

    runs = await collector.wait_for("run agent", 3)
    [extraction] = await collector.wait_for("run extraction")
    assert len(await collector.wait_for("execute_tool get_weather", 2)) == 2
    assert sorted(run.failed for run in runs) == [False, False, True]
    assert extraction.failed
    assert {span.failed for span in collector.named("chat ") if span.parent == extraction.id} == {
        True
    }
    assert CANARY.encode() not in collector.bytes


async def test_an_extractions_questions_are_below_its_run(
    owner: AsyncClient, upstream: Upstream, collector: Collector
) -> None:
    upstream.when(
        "Ada", lambda body: Reply(calls=(Call(body["tools"][0]["function"]["name"], {}),))
    )
    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
    answer = await owner.post("/v1/extractions", json={"schema": schema, "input": {"text": "Ada"}})

    assert answer.status_code == 200, answer.text
    [run] = await collector.wait_for("run extraction")
    [chat] = await collector.wait_for("chat scripted")
    assert (chat.parent, chat.attributes["gen_ai.usage.output_tokens"]) == (run.id, 5)


async def test_with_content_wanted_prompts_and_results_are_told(
    process: ServerProcess,
    bearer: Callable[..., Any],
    upstream: Upstream,
    collector: Collector,
) -> None:
    process.environ["OTEL_CONTENT"] = "true"
    process.start()
    upstream.when("weather", WEATHER, Reply(text="Fine."))
    async with client_of(process.url, await bearer("Owner")) as owner:
        await owner.post(CHAT, json=asking(f"weather {CANARY}"))

    await collector.wait_for("run agent")
    await collector.wait_for("chat scripted", 2)
    assert CANARY.encode() in collector.bytes


async def test_a_run_that_outlives_its_process_stays_in_its_trace(
    process: ServerProcess, owner: AsyncClient, upstream: Upstream, collector: Collector
) -> None:
    upstream.when("slow", Reply(text="one two three", pace=2.0))
    headers = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
    body = {"model": "assistant", "input": "slow", "background": True}
    begun = await owner.post("/v1/responses", json=body, headers=headers)
    await upstream.wait_for_async(1)
    [request] = await collector.wait_for("POST /v1/responses")
    process.kill()
    upstream.when("slow", Reply(text="one"))
    with pytest.raises(TransportError):
        await owner.get("/health")

    process.start()
    [run] = await collector.wait_for("run agent")
    assert (run.trace, run.parent, run.attributes["run.attempt"]) == (TRACE, request.id, 2)
    assert run.attributes["run.id"] in begun.json()["id"]
    assert {span.trace for span in collector.named("chat ")} == {TRACE}


async def test_a_stopping_server_sends_what_it_has(
    process: ServerProcess, bearer: Callable[..., Any], collector: Collector
) -> None:
    process.environ["OTEL_BSP_SCHEDULE_DELAY"] = "3600000"
    process.start()
    async with client_of(process.url, await bearer("Owner")) as owner:
        await owner.get("/v1/agents")
    process.stop()

    assert collector.named("GET /v1/agents")


def test_without_the_packages_it_is_said_which_bring_them() -> None:
    code = (
        "import sys; sys.modules['opentelemetry.sdk'] = None\n"
        "from app.config import settings; from app.core import traces\n"
        "try: traces.begin(settings)\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=clean_environ() | {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"},
        capture_output=True,
        text=True,
        check=True,
    )

    assert "uv sync --extra otel" in done.stdout

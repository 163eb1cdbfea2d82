"""Nothing is unbounded: what a run may take, and what an owner may do at once and in a day."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from httpx2 import AsyncClient, Response

from app.models import Run
from app.services.allowances import Amount, LimitReached, Limits, Move
from app.services.execution import Job, Outcome
from app.services.journal import Journal
from app.services.new_run import Idempotency
from tests.conftest import client_of, settings_of
from tests.core import DONE, Core, open_core
from tests.server import ThreadedServer
from tests.toolserver import ToolServer
from tests.upstream import Call, Json, Reply, Upstream

HERE, THERE = "host-a:1:aaaa", "host-b:1:bbbb"
MANY = 10**9
FOR_EVER = 2**31 - 1  # a minute that is not over while a test goes on
FIRST = 4096  # tokens that are held for an answer

Serve = Callable[..., Any]


async def never(journal: Journal, job: Job) -> Outcome:
    await asyncio.Event().wait()
    raise AssertionError


async def at_once(journal: Journal, job: Job) -> Outcome:
    return DONE


@asynccontextmanager
async def two(environ: dict[str, str], **changes: Any) -> AsyncIterator[tuple[Core, Core]]:
    """Two processes that accept for one owner, whose runs do not end."""
    settings = settings_of(environ, shutdown_timeout=0.1, **changes)
    async with (
        open_core(settings, never, name=HERE) as here,
        open_core(settings, never, name=THERE) as there,
    ):
        yield here, there


async def tried(*attempts: Any) -> tuple[list[Any], list[LimitReached]]:
    """What was given, and what was refused."""
    outcomes = await asyncio.gather(*attempts, return_exceptions=True)
    refused = [each for each in outcomes if isinstance(each, LimitReached)]
    given = [each for each in outcomes if not isinstance(each, BaseException)]
    assert len(given) + len(refused) == len(outcomes), outcomes
    return given, refused


async def standing(core: Core) -> Any:
    [row] = await core.sql("SELECT * FROM allowances")
    return row


# An owner's limits, on all processes together


@pytest.mark.parametrize("kind", ["held", "dollars"])
async def test_of_200_spends_at_once_on_a_budget_of_50_exactly_50_are_made(
    environ: dict[str, str], kind: str
) -> None:
    day, one = Amount(50, MANY), Amount(1, 0)
    if kind == "dollars":
        day, one = Amount(MANY, 50.0), Amount(0, 1.0)
    limits = Limits(rate=MANY, running=MANY, queued=MANY, day=day)
    async with two(environ) as cores:
        move = Move(owner_id=cores[0].caller.user_id, held=one, limits=limits)

        given, refused = await tried(
            *(cores[at % 2].journal.commit(move=move) for at in range(200))
        )

        assert (len(given), len(refused)) == (50, 150)
        assert {each.error_code for each in refused} == {"insufficient_quota"}
        row = await standing(cores[0])
        assert max(row.held_tokens, row.held_cost) == 50


async def test_no_more_runs_are_accepted_in_a_minute_than_the_limit(
    environ: dict[str, str],
) -> None:
    async with two(environ, owner_rate=21) as (here, there):
        await here.accept()
        await here.sql("UPDATE allowances SET minute = :minute", minute=FOR_EVER)

        given, refused = await tried(*(core.accept() for _ in range(30) for core in (here, there)))

    assert (len(given), len(refused)) == (20, 40)
    assert {each.error_code for each in refused} == {"rate_limit_exceeded"}
    assert all(1 <= int(each.headers["Retry-After"]) <= 60 for each in refused)


async def test_a_new_minute_begins_from_nothing(environ: dict[str, str]) -> None:
    async with open_core(settings_of(environ, owner_rate=1), at_once) as core:
        for _ in range(3):
            await core.accept()
            await core.sql("UPDATE allowances SET minute = minute - 1")


async def test_no_more_runs_go_on_at_once_than_the_limit(environ: dict[str, str]) -> None:
    async with two(environ, owner_runs=5, owner_queued=3) as (here, there):
        given, refused = await tried(*(core.accept() for _ in range(10) for core in (here, there)))

        assert (len(given), len(refused)) == (5, 15)
        assert {each.error_code for each in refused} == {"rate_limit_exceeded"}
        assert {each.headers["Retry-After"] for each in refused} == {"3"}


async def test_no_more_runs_wait_than_the_limit(environ: dict[str, str]) -> None:
    settings = settings_of(environ, owner_runs=1, owner_queued=3, shutdown_timeout=0.1)
    async with open_core(settings, never, beats=False) as core:  # so nothing leaves the queue
        given, refused = await tried(*(core.accept(queue=True) for _ in range(10)))

    assert (len(given), len(refused)) == (3, 7)


async def test_a_repeated_request_is_never_refused(environ: dict[str, str]) -> None:
    async with two(environ, owner_rate=1, owner_runs=1) as (here, there):
        key = Idempotency.of("test", "key", b"body")
        await here.sql("UPDATE allowances SET minute = :minute", minute=FOR_EVER)

        runs, refused = await tried(
            *(core.accept(idempotency=key) for _ in range(10) for core in (here, there))
        )

    assert (len({run.id for run in runs}), refused) == (1, [])


async def test_a_refused_change_leaves_the_others_of_its_commit_alone(
    environ: dict[str, str],
) -> None:
    async with open_core(settings_of(environ, owner_runs=1), never) as core:
        first = core.accept()
        second = core.accept()
        noted = core.journal.commit()

        outcomes = await asyncio.gather(first, second, noted, return_exceptions=True)

        assert [type(each) for each in outcomes] == [Run, LimitReached, type(None)]
        [row] = await core.sql("SELECT count(*) AS runs FROM runs")
        assert row.runs == 1


async def test_yesterdays_spending_does_not_count_and_what_is_held_does(
    environ: dict[str, str],
) -> None:
    settings = settings_of(environ, owner_daily_tokens=10_000)
    async with open_core(settings, at_once) as core:
        await core.runs.wait(await core.accept())
        await core.sql("UPDATE allowances SET tokens = 9000, held_tokens = 5000")
        with pytest.raises(LimitReached):
            await core.accept()

        await core.sql("UPDATE allowances SET day = '2001-01-01'")
        await core.runs.wait(await core.accept())

        row = await standing(core)
        assert (row.tokens, row.held_tokens) == (0, 5000)


async def test_what_a_dead_process_held_counts_as_spent(environ: dict[str, str]) -> None:
    settings = settings_of(environ, lease_seconds=0.001, shutdown_timeout=0.1)
    async with open_core(settings, never, name=THERE, beats=False) as dead:
        run = await dead.accept()
        assert (await standing(dead)).held_tokens == run.held_tokens > FIRST

        async with open_core(settings_of(environ), at_once) as core:
            await asyncio.wait_for(core.runs.wait(run), 10)

            row = await standing(core)
            assert (row.tokens, row.held_tokens) == (run.held_tokens, 0)
            assert (await core.row(run)).held_tokens == 0
            [spent] = await core.sql("SELECT * FROM usage")
            assert (spent.model, spent.requests) == ("unknown", 1)


async def test_a_run_that_is_handed_over_holds_nothing(environ: dict[str, str]) -> None:
    async with open_core(settings_of(environ, shutdown_timeout=0.1), never) as core:
        run = await core.accept()

    async with open_core(settings_of(environ), never, beats=False) as core:
        row = await standing(core)
        assert (row.tokens, row.held_tokens) == (0, 0)
        assert (await core.row(run)).held_tokens == 0


# One run's limits, and what its requests are counted as


@pytest.fixture
async def serve(environ: dict[str, str], bearer: Callable[..., Any]) -> AsyncIterator[Serve]:
    """Starts a server with these settings, and is Alice there."""
    async with AsyncExitStack() as closing:

        async def start(**changes: Any) -> AsyncClient:
            server = closing.enter_context(ThreadedServer(settings_of(environ, **changes)))
            client = client_of(server.url, await bearer("Alice"))
            return await closing.enter_async_context(client)

        yield start


async def ask(client: AsyncClient, text: str, **more: Any) -> Json:
    body = {"model": "assistant", "input": text, **more}
    reply = await client.post("/v1/responses", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def reason(response: Json) -> str:
    assert response["status"] == "incomplete", response
    return response["incomplete_details"]["reason"]


async def spent(client: AsyncClient) -> Json:
    """Of today: tokens, requests, and what is still held."""
    shown = (await client.get("/v1/usage")).json()
    [bucket] = shown["data"] or [{"results": [{"num_model_requests": 0}]}]
    tokens = shown["allowance"]["tokens"]
    requests = bucket["results"][0]["num_model_requests"]
    return {"tokens": tokens["spent"], "requests": requests, "held": tokens["held"]}


WEATHER = Call("get_weather", {"location": "Tokyo"})
LOOP = Reply(calls=(WEATHER,))


async def test_500_calls_in_one_reply_stop_the_run_before_any_is_made(
    serve: Serve, upstream: Upstream, tools: ToolServer
) -> None:
    client = await serve()
    upstream.when("many", Reply(calls=(WEATHER,) * 500))

    assert reason(await ask(client, "many")) == "max_tool_calls"
    assert tools.calls == []
    assert await spent(client) == {"tokens": 15, "requests": 1, "held": 0}


async def test_an_endless_loop_stops_at_the_limit(serve: Serve, upstream: Upstream) -> None:
    client = await serve(run_requests=4)
    upstream.when("loop", LOOP)

    assert reason(await ask(client, "loop")) == "max_requests"
    assert len(upstream.requests) == 4
    assert await spent(client) == {"tokens": 60, "requests": 4, "held": 0}


async def test_a_run_stops_at_its_cost(serve: Serve, upstream: Upstream) -> None:
    client = await serve(model="openai-chat:gpt-4o", run_cost=0.0001)
    upstream.when("loop", LOOP)  # 0.000075 US dollars each

    assert reason(await ask(client, "loop")) == "max_cost"
    assert len(upstream.requests) == 2
    cost = (await client.get("/v1/usage")).json()["allowance"]["cost"]
    assert (cost["spent"], cost["held"]) == (0.00015, 0)


async def test_a_run_stops_when_its_time_is_over_and_keeps_what_it_said(
    serve: Serve, upstream: Upstream
) -> None:
    client = await serve(run_seconds=1)
    upstream.when("slow", Reply(text="I am looking.", calls=(WEATHER,)), Reply(hang=True))

    response = await ask(client, "slow")

    assert reason(response) == "max_time"
    assert "I am looking." in json.dumps(response["output"])
    assert (await spent(client))["held"] == 0


async def test_tools_run_a_few_at_a_time(
    serve: Serve, upstream: Upstream, tools: ToolServer
) -> None:
    client = await serve(run_parallel_tools=2)
    cities = ("Tokyo", "Lisbon", "London", "Paris", "Berlin", "Sydney")
    calls = tuple(Call("get_weather", {"location": city}) for city in cities)
    upstream.when("all", Reply(calls=calls), Reply(text="Done."))
    tools.behave("/v1/search", delay=0.2)

    assert (await ask(client, "all"))["status"] == "completed"

    begun = sorted(call.at for call in tools.calls if call.path == "/v1/search")
    assert len(begun) == 6
    assert all(later - first > 0.15 for first, later in zip(begun, begun[2:], strict=False))


async def test_a_run_without_allowance_for_the_next_request_ends_before_its_tools_are_run(
    serve: Serve, upstream: Upstream, tools: ToolServer
) -> None:
    client = await serve(owner_daily_tokens=FIRST + 12)
    upstream.when("weather", LOOP, Reply(text="Sunny."))

    response = await ask(client, "weather")

    assert reason(response) == "max_budget"
    assert tools.calls == []
    assert [item["type"] for item in response["output"]] == ["mcp_call"]
    assert await spent(client) == {"tokens": 15, "requests": 1, "held": 0}


@pytest.mark.parametrize("stream", [True, False])
async def test_every_protocol_shows_a_run_that_reached_its_limit(
    serve: Serve, upstream: Upstream, stream: bool
) -> None:
    client = await serve(owner_daily_tokens=FIRST + 12)
    upstream.when("weather", LOOP)

    reply = await client.post(
        "/v1/chat/completions",
        json={
            "model": "assistant",
            "stream": stream,
            "messages": [{"role": "user", "content": "weather"}],
        },
    )

    assert reply.status_code == 200, reply.text
    assert '"finish_reason":"length"' in reply.text.replace(": ", ":")


async def test_what_no_day_is_enough_for_is_refused_for_good(
    serve: Serve, upstream: Upstream
) -> None:
    client = await serve(owner_daily_tokens=100)

    for url, body in {
        "/v1/responses": {"model": "assistant", "input": "hi"},
        "/v1/extractions": {"schema_ref": "contact", "input": {"text": "Name: Ada"}},
        "/ag-ui/assistant": {
            "threadId": "t",
            "runId": "r",
            "messages": [{"id": "1", "role": "user", "content": "hi"}],
            "tools": [],
            "context": [],
            "state": {},
            "forwardedProps": {},
        },
    }.items():
        reply = await client.post(url, json=body)

        assert reply.status_code == 422, reply.text
        error = reply.json()["error"]
        assert error["code"] == "insufficient_quota"
        assert "100 tokens" in error["message"] and "OWNER_DAILY_TOKENS" in error["message"]
        assert "No day is enough" in error["message"]
        assert "Retry-After" not in reply.headers
        assert not error.get("retryable")
    assert upstream.requests == []


async def test_what_another_day_is_enough_for_is_to_be_asked_for_then(serve: Serve) -> None:
    client = await serve(owner_daily_tokens=4110)

    assert (await ask(client, "hi"))["status"] == "completed"
    reply = await client.post("/v1/responses", json={"model": "assistant", "input": "hi"})

    assert (reply.status_code, reply.json()["error"]["code"]) == (429, "insufficient_quota")
    assert "midnight UTC" in reply.json()["error"]["message"]
    assert 1 <= int(reply.headers["Retry-After"]) <= 3600
    assert reply.headers["X-Should-Retry"] == "false"


async def test_a_shorter_answer_fits_where_a_long_one_does_not(serve: Serve) -> None:
    client = await serve(owner_daily_tokens=500)

    assert (await ask(client, "hi", max_output_tokens=100))["status"] == "completed"


async def test_a_background_run_holds_once_it_has_begun(serve: Serve, upstream: Upstream) -> None:
    client = await serve()
    upstream.when("slow", Reply(text="Yes.", hang=True))

    response = await ask(client, "slow", background=True)
    await upstream.wait_for_async(1)

    assert (await spent(client))["held"] > FIRST
    await client.post(f"/v1/responses/{response['id']}/cancel")
    now = await spent(client)
    while now["held"]:
        now = await spent(client)
    assert now["requests"] == 1 and now["tokens"] > 0  # an estimate: its provider said nothing


@pytest.mark.parametrize("stream", [True, False])
async def test_a_provider_that_tells_no_usage_is_counted_by_estimate(
    serve: Serve, upstream: Upstream, stream: bool
) -> None:
    client = await serve(run_tokens=200)
    upstream.when("loop", Reply(calls=(WEATHER,), usage=(0, 0)))

    reply = await client.post(
        "/v1/responses", json={"model": "assistant", "input": "loop " * 100, "stream": stream}
    )

    assert "max_tokens" in reply.text
    now = await spent(client)
    assert now["tokens"] > 200 and now["requests"] == len(upstream.requests) < 10


async def test_answers_that_are_asked_for_again_are_charged(
    serve: Serve, upstream: Upstream
) -> None:
    client = await serve()
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    upstream.when("invalid", lambda body: _wrong(body))

    answer = await client.post(
        "/v1/extractions", json={"schema": schema, "input": {"text": "invalid"}}
    )
    shaped = await client.post(
        "/v1/responses",
        json={
            "model": "assistant",
            "input": "invalid",
            "text": {"format": {"type": "json_schema", "name": "n", "schema": schema}},
        },
    )

    assert answer.json()["error"]["code"] == "extraction_invalid"
    assert shaped.json()["status"] == "failed", shaped.text
    count = len(upstream.requests)
    assert count > 4
    page = (await client.get("/v1/usage", params={"group_by": "model"})).json()
    [total] = page["data"][0]["results"]
    assert (total["num_model_requests"], total["input_tokens"]) == (count, 10 * count)
    assert page["allowance"]["tokens"]["held"] == 0


@pytest.mark.parametrize("how", ["cut", "late"])
async def test_an_extraction_pays_for_answers_that_broke_off(
    serve: Serve, upstream: Upstream, how: str
) -> None:
    client = await serve(reply_timeout=1)
    cut = Reply(text='{"n": "' + "none " * 40, pace=0.01, drop_after=30)
    upstream.when("Ada", cut if how == "cut" else Reply(hang=True))
    body = {
        "schema_ref": "contact",
        "input": {"text": "Ada"},
        "stream": how == "cut",
        "options": {"max_transport_retries": 1},
    }

    answer = await client.post("/v1/extractions", json=body)

    assert "upstream_unavailable" in answer.text
    assert len(upstream.requests) == 2
    page = (await client.get("/v1/usage")).json()
    [total] = page["data"][0]["results"]
    assert total["num_model_requests"] == 2 and total["input_tokens"] > 20
    assert (total["output_tokens"] > 40) == (how == "cut")
    assert page["allowance"]["tokens"]["held"] == 0


def _wrong(body: Json) -> Reply:
    name = body["tools"][-1]["function"]["name"] if body.get("tools") else ""
    return Reply(calls=(Call(name, {"n": "none"}),)) if name else Reply(text='{"n": "none"}')


# Jobs


async def job(client: AsyncClient, count: int) -> Json:
    items = [{"custom_id": f"{n}", "text": f"Name: Ada {n}"} for n in range(count)]
    reply = await client.post("/v1/extraction-jobs", json={"schema_ref": "contact", "items": items})
    assert reply.status_code == 202, reply.text
    events: Response = await client.get(f"/v1/extraction-jobs/{reply.json()['id']}/events")
    assert "job.completed" in events.text, events.text
    return (await client.get(f"/v1/extraction-jobs/{reply.json()['id']}")).json()


def contact(body: Json) -> Reply:
    name = body["tools"][0]["function"]["name"]
    return Reply(calls=(Call(name, json.dumps({"name": "Ada"})),))


async def test_a_jobs_items_wait_for_allowance_and_count_as_no_runs(
    serve: Serve, upstream: Upstream
) -> None:
    client = await serve(owner_daily_tokens=2 * FIRST + 500, owner_runs=1, owner_rate=1)
    upstream.when("Ada", contact)

    done = await job(client, 20)

    assert (done["status"], done["counts"]["succeeded"]) == ("completed", 20)
    assert await spent(client) == {"tokens": 300, "requests": 20, "held": 0}
    page = (await client.get("/v1/usage", params={"group_by": "agent"})).json()
    assert [each["agent"] for each in page["data"][0]["results"]] == ["contact"]


async def test_items_that_no_day_is_enough_for_fail_and_say_so(
    serve: Serve, upstream: Upstream
) -> None:
    client = await serve(owner_daily_tokens=100)

    done = await job(client, 2)

    assert (done["status"], done["counts"]["failed"]) == ("completed_with_errors", 2)
    results = await client.get(f"/v1/extraction-jobs/{done['id']}/results")
    assert results.text.count('"insufficient_quota"') == 2
    assert upstream.requests == []


async def test_a_job_that_is_deleted_while_it_runs_holds_nothing(
    serve: Serve, upstream: Upstream
) -> None:
    client = await serve()
    upstream.when("Ada", Reply(hang=True))
    items = [{"custom_id": "1", "text": "Ada"}]
    made = await client.post("/v1/extraction-jobs", json={"schema_ref": "contact", "items": items})
    await upstream.wait_for_async(1)

    await client.delete(f"/v1/extraction-jobs/{made.json()['id']}")

    now = await spent(client)
    assert now["held"] == 0 and now["tokens"] > 0

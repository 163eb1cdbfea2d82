"""The tool that extracts, asked for by a model."""

import json

from httpx2 import AsyncClient

from tests.asking import ask, calls, told
from tests.extracting import fills
from tests.upstream import Reply, Upstream

TEXT = "Name: Ada Lovelace"


async def test_an_agent_reads_a_text_into_a_known_schema(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when(
        "Go.", calls("extract_document", text=TEXT, schema="contact"), Reply("It is Ada.")
    )
    upstream.when(TEXT, fills({"name": "Ada Lovelace"}))

    answer = await ask(alice)

    assert answer.json()["choices"][0]["message"]["content"] == "It is Ada."
    assert json.loads(told(upstream))["name"] == "Ada Lovelace"


async def test_it_reads_by_the_callers_own_schemas(
    alice: AsyncClient, bob: AsyncClient, upstream: Upstream
) -> None:
    schema = {"type": "object", "properties": {"total": {"type": "number"}}}
    await alice.post("/v1/schemas/order/versions", json=schema)
    upstream.when("Go.", calls("extract_document", text=TEXT, schema="order"), Reply("Done."))
    upstream.when(TEXT, fills('{"total": 12.50}'))

    await ask(alice)
    assert json.loads(told(upstream)) == {"total": 12.5}
    await ask(bob)
    assert "No schema 'order'" in told(upstream)


async def test_a_failed_extraction_is_a_result_that_the_model_can_act_on(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Go.", calls("extract_document", text=TEXT, schema="contact"), Reply("Sorry."))
    upstream.when(TEXT, fills({}))

    answer = await ask(alice)

    assert answer.json()["choices"][0]["message"]["content"] == "Sorry."
    assert "No valid answer in 3 attempts" in told(upstream)


async def test_a_stopped_run_stops_what_its_tool_asks(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Go.", calls("extract_document", text=TEXT, schema="contact"), Reply("Done."))
    upstream.when(TEXT, Reply("late", delay=60))
    body = {"model": "assistant", "input": "Go.", "background": True}
    run = (await alice.post("/v1/responses", json=body)).json()["id"]
    await upstream.wait_for_async(2)

    await alice.post(f"/v1/responses/{run}/cancel")

    await upstream.wait_until_async(lambda: upstream.requests[1].aborted, 2)

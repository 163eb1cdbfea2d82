"""What was spent, and what is left of today: each owner's own."""

from datetime import UTC, datetime
from typing import Any

import pytest
from httpx2 import AsyncClient

from tests.upstream import Call, Reply, Upstream

URL = "/v1/usage"


@pytest.fixture(autouse=True)
async def spent(alice: AsyncClient, upstream: Upstream) -> None:
    """Alice has asked two agents, one of them twice."""
    upstream.when(
        "weather", Reply(calls=(Call("get_weather", {"location": "Tokyo"}),)), Reply("Sunny")
    )
    answer = {"location": "Tokyo", "temperature": 21.5, "conditions": "clear"}
    upstream.when("result", Reply(calls=(Call("final_result", answer),)))
    for agent, text in (("assistant", "hi"), ("assistant", "weather"), ("weather", "result")):
        await alice.post(
            "/v1/responses", json={"model": agent, "input": text, "max_output_tokens": 1000}
        )


def today() -> datetime:
    return datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)


async def page(client: AsyncClient, **query: Any) -> dict[str, Any]:
    reply = await client.get(URL, params=query)
    assert reply.status_code == 200, reply.text
    return reply.json()


async def test_usage_is_summed_by_day(alice: AsyncClient) -> None:
    shown = await page(alice)

    assert (shown["object"], shown["has_more"], shown["next_page"]) == ("page", False, None)
    [bucket] = shown["data"]
    start = int(today().timestamp())
    assert (bucket["start_time"], bucket["end_time"]) == (start, start + 86400)
    assert bucket["results"] == [
        {
            "object": "usage.result",
            "agent": None,
            "model": None,
            "num_model_requests": 4,
            "input_tokens": 40,
            "input_cached_tokens": 0,
            "output_tokens": 20,
            "cost": 0.0,
        }
    ]


async def test_usage_is_summed_by_agent_and_model(alice: AsyncClient) -> None:
    shown = await page(alice, group_by=["agent", "model"])

    [bucket] = shown["data"]
    assert bucket["end_time"] - bucket["start_time"] == 30 * 86400
    sums = [
        (each["agent"], each["model"], each["num_model_requests"]) for each in bucket["results"]
    ]
    assert sums == [("assistant", "scripted", 3), ("weather", "scripted", 1)]


async def test_the_days_allowance_is_shown(alice: AsyncClient) -> None:
    allowance = (await page(alice))["allowance"]

    assert allowance["day"] == today().date().isoformat()
    limit = 100_000_000
    assert allowance["tokens"] == {"limit": limit, "spent": 60, "held": 0, "left": limit - 60}
    assert allowance["cost"] == {"limit": 100.0, "spent": 0.0, "held": 0.0, "left": 100.0}


async def test_other_days_have_their_own(alice: AsyncClient) -> None:
    shown = await page(alice, start_date="2020-01-01", end_date="2020-01-31", group_by="model")

    assert [bucket["results"] for bucket in shown["data"]] == [[]]


async def test_nobody_sees_what_others_have_spent_but_an_administrator(
    alice: AsyncClient, bob: AsyncClient, admin: AsyncClient
) -> None:
    owner_id = (await alice.get("/users/me")).json()["id"]

    assert (await page(bob))["data"] == []
    assert (await bob.get(URL, params={"owner_id": owner_id})).status_code == 403
    assert await page(alice, owner_id=owner_id) == await page(alice)
    assert (await page(admin, owner_id=owner_id))["data"] == (await page(alice))["data"]


async def test_a_stranger_sees_nothing(anonymous: AsyncClient) -> None:
    assert (await anonymous.get(URL)).status_code == 401


@pytest.mark.parametrize(
    "query",
    [
        {"start_date": "yesterday"},
        {"start_date": "2020-02-01", "end_date": "2020-01-01"},
        {"start_date": "2001-01-01", "end_date": "2020-01-01"},
        {"start_date": "0001-01-01", "end_date": "0001-01-02"},
        {"end_date": "9999-12-31"},
        {"group_by": "owner"},
        {"owner_id": "x"},
        {"owner_id": 10**30},
    ],
)
async def test_a_question_that_makes_no_sense_is_refused(
    alice: AsyncClient, query: dict[str, Any]
) -> None:
    reply = await alice.get(URL, params=query)

    assert reply.status_code in (403, 422), reply.text
    assert reply.json()["error"]["message"]

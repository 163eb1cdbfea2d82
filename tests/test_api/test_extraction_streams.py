"""An extraction watched as it grows, left, taken up again, or asked for later; and answered once
for all who ask the same."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from httpx2 import AsyncClient

from tests.conftest import client_of, settings_of
from tests.extracting import ADA, PERSON, Json, events_of, extract, fills
from tests.server import ThreadedServer
from tests.upstream import Reply, Upstream

BODY: Json = {"input": {"text": "Ada is 36."}, "schema": PERSON}
LATER = {"Prefer": "respond-async"}


def slowly(answer: Any, pace: float = 0.02) -> Callable[[Json], Reply]:
    return fills(answer, pace=pace)


async def ended(client: AsyncClient, extraction_id: str) -> Json:
    """The answer, once there is one: the events end with it."""
    await client.get(f"/v1/extractions/{extraction_id}/events")
    return (await client.get(f"/v1/extractions/{extraction_id}")).json()


async def streamed(client: AsyncClient, **body: Any) -> list[tuple[str | None, str, Json]]:
    answer = await extract(client, stream=True, **body)
    assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
    return events_of(answer.text)


async def test_a_document_is_seen_as_it_grows(alice: AsyncClient, upstream: Upstream) -> None:
    upstream.when("Ada", slowly(ADA))

    events = await streamed(alice)

    names = [name for _, name, _ in events]
    assert names[0] == "extraction.started" and names[-1] == "extraction.completed"
    assert set(names[1:-1]) == {"extraction.partial"}
    partials = [data["partial"] for _, name, data in events if name == "extraction.partial"]
    assert partials[-1] == ADA
    assert all(partial.get("age", 36) == 36 for partial in partials)
    assert all("Ada".startswith(partial.get("name", "")) for partial in partials)
    assert events[-1][2]["data"] == ADA
    assert events[-1][2]["usage"]["total_tokens"] == 10
    assert upstream.requests[0].body["stream"] is True


async def test_a_failed_attempt_takes_back_what_was_shown(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", slowly({"name": "Ada", "age": -1}), slowly(ADA))

    events = await streamed(alice)

    [at] = [n for n, (_, name, _) in enumerate(events) if name == "extraction.attempt_failed"]
    assert events[at][2]["attempt"] == 1
    assert events[at][2]["errors"][0]["pointer"] == "/age"
    later = [data for _, name, data in events[at:] if name == "extraction.partial"]
    assert {data["attempt"] for data in later} == {2}


async def test_a_stream_ends_with_one_failure(alice: AsyncClient, upstream: Upstream) -> None:
    upstream.when("Ada", slowly({}))

    events = await streamed(alice, options={"max_attempts": 1})

    assert [name for _, name, _ in events][-2:] == [
        "extraction.attempt_failed",
        "extraction.failed",
    ]
    error = events[-1][2]["error"]
    assert (error["code"], error["usage"]["total_tokens"]) == ("extraction_invalid", 10)
    assert "data" not in events[-1][2]


async def test_the_same_events_come_again_from_any_place(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", slowly({"name": "Ada", "age": -1}), slowly(ADA))
    events = await streamed(alice)
    path = f"/v1/extractions/{events[0][2]['id']}/events"

    assert events_of((await alice.get(path)).text) == events
    for at, (seen, _, _) in enumerate(events):
        if seen is not None:
            rest = await alice.get(path, headers={"Last-Event-ID": seen})
            assert events_of(rest.text) == events[at + 1 :]
    for wrong in ("-1", "x", "9999", "1e3"):
        refused = await alice.get(path, headers={"Last-Event-ID": wrong})
        assert 400 <= refused.status_code < 500, wrong


async def test_who_leaves_a_plain_stream_stops_the_model(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", slowly({"name": "Ada" * 200, "age": 36}, pace=5))
    body = BODY | {"stream": True}

    async with alice.stream("POST", "/v1/extractions", json=body) as answer:
        lines = answer.aiter_lines()
        while not (await anext(lines)).startswith("data:"):
            pass
        await upstream.wait_for_async(1)

    await upstream.wait_until_async(lambda: upstream.requests[0].aborted, 2)


async def test_what_was_asked_for_later_goes_on_without_its_client(
    alice: AsyncClient, bob: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", slowly(ADA))

    accepted = await alice.post("/v1/extractions", json=BODY | {"stream": True}, headers=LATER)
    path = accepted.headers["location"]

    assert (accepted.status_code, accepted.json()["status"]) == (202, "running")
    assert (await bob.get(path)).status_code == (await bob.get(f"{path}/events")).status_code == 404
    events = events_of((await alice.get(f"{path}/events")).text)
    assert [name for _, name, _ in events][-1] == "extraction.completed"
    assert (await alice.get(path)).json() == events[-1][2]


async def test_one_can_be_stopped_and_forgotten(
    alice: AsyncClient, bob: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", Reply("late", delay=60))
    made = (await alice.post("/v1/extractions", json=BODY, headers=LATER)).json()["id"]
    path = f"/v1/extractions/{made}"
    assert (await alice.get(path)).json() == {"id": made, "status": "running"}
    assert (await bob.post(f"{path}/cancel")).status_code == 404
    await upstream.wait_for_async(1)

    stopped = await alice.post(f"{path}/cancel")

    assert stopped.json() == {"id": made, "status": "cancelled"}
    assert (await alice.get(path)).json()["error"]["code"] == "run_cancelled"
    assert (await bob.delete(path)).status_code == 404
    assert (await alice.delete(path)).status_code == 204
    assert (await alice.get(path)).status_code == 404


async def test_the_same_question_is_asked_once(alice: AsyncClient, upstream: Upstream) -> None:
    upstream.when("Ada", fills(ADA, delay=0.3))

    answers = [
        answer.json()
        for answer in await asyncio.gather(
            *(alice.post("/v1/extractions", json=BODY) for _ in range(20))
        )
    ]
    later = (await alice.post("/v1/extractions", json=BODY)).json()

    assert len(upstream.requests) == 1
    assert all(answer["data"] == ADA for answer in [*answers, later])
    assert len({answer["id"] for answer in answers}) == 20
    told = [answer["cache"] for answer in answers]
    assert (told.count("miss"), told.count("coalesced")) == (1, 19)
    assert later["cache"] == "hit"
    nothing = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    assert later["usage"] == nothing and later["attempts"] == []
    assert sum(answer["usage"]["total_tokens"] for answer in answers) == 10


async def test_another_owner_is_never_answered_from_mine(
    alice: AsyncClient, bob: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", fills(ADA))

    mine = (await alice.post("/v1/extractions", json=BODY)).json()
    theirs = (await bob.post("/v1/extractions", json=BODY)).json()

    assert (mine["cache"], theirs["cache"]) == ("miss", "miss")
    assert len(upstream.requests) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"instructions": "Other."},
        {"schema": PERSON | {"title": "Other"}},
        {"options": {"temperature": 1}},
        {"options": {"cache": "bypass"}},
        {"input": {"text": "Ada is 36. "}},
    ],
)
async def test_another_question_is_another_answer(
    alice: AsyncClient, upstream: Upstream, change: Json
) -> None:
    upstream.when("Ada", fills(ADA))
    await alice.post("/v1/extractions", json=BODY)

    answer = (await alice.post("/v1/extractions", json=BODY | change)).json()

    assert answer["cache"] == "miss"
    assert len(upstream.requests) == 2


async def test_the_order_of_a_schemas_keys_is_no_difference(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", fills(ADA))
    await alice.post("/v1/extractions", json=BODY)

    turned = dict(reversed(PERSON.items()))
    answer = (await alice.post("/v1/extractions", json=BODY | {"schema": turned})).json()

    assert answer["cache"] == "hit"


async def test_failures_and_what_is_forgotten_are_not_answered_from(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", fills({}))
    options = {"options": {"max_attempts": 1}}
    for _ in range(2):
        assert (await alice.post("/v1/extractions", json=BODY | options)).status_code == 422
    assert len(upstream.requests) == 2

    upstream.when("Ada", fills(ADA))
    first = (await alice.post("/v1/extractions", json=BODY)).json()
    await alice.delete(f"/v1/extractions/{first['id']}")
    again = (await alice.post("/v1/extractions", json=BODY)).json()

    assert again["cache"] == "miss"


async def test_a_copy_of_what_is_forgotten_is_not_answered_from(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", fills(ADA))
    first = (await alice.post("/v1/extractions", json=BODY)).json()
    copy = (await alice.post("/v1/extractions", json=BODY)).json()

    await alice.delete(f"/v1/extractions/{first['id']}")

    assert copy["cache"] == "hit"
    assert (await alice.post("/v1/extractions", json=BODY)).json()["cache"] == "miss"


async def test_another_model_of_the_server_is_another_answer(
    alice: AsyncClient, environ: dict[str, str], upstream: Upstream
) -> None:
    upstream.when("Ada", fills(ADA))
    await alice.post("/v1/extractions", json=BODY)

    with ThreadedServer(settings_of(environ, model="openai-chat:other")) as server:
        token = alice.headers["Authorization"].removeprefix("Bearer ")
        async with client_of(server.url, token) as client:
            answer = (await client.post("/v1/extractions", json=BODY)).json()

    assert (answer["cache"], answer["model"]) == ("miss", "other")


async def test_preferences_may_come_with_others(alice: AsyncClient, upstream: Upstream) -> None:
    upstream.when("Ada", fills(ADA))
    for headers in (
        [("Prefer", "respond-async; wait=10")],
        [("Prefer", "x"), ("Prefer", LATER["Prefer"])],
    ):
        answer = await alice.post("/v1/extractions", json=BODY, headers=headers)

        assert answer.status_code == 202


async def test_a_broken_connection_takes_back_what_was_shown(
    alice: AsyncClient, upstream: Upstream
) -> None:
    broken = slowly({"name": "Ada" * 50, "age": 36})({"tools": [{"function": {"name": "Answer"}}]})
    replies = [replace(broken, drop_after=8), None]
    upstream.when("Ada", lambda body: replies.pop(0) or fills(ADA)(body))

    events = await streamed(alice)

    [at] = [n for n, (_, name, _) in enumerate(events) if name == "extraction.attempt_failed"]
    assert events[at][2]["errors"][0]["code"] == "interrupted"
    assert events[-1][2]["data"] == ADA
    assert events[-1][2]["transport_retries"] == 1


async def test_who_waits_for_another_outlives_their_leaving(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Ada", Reply("late", delay=60))
    first = (await alice.post("/v1/extractions", json=BODY, headers=LATER)).json()["id"]
    await upstream.wait_for_async(1)
    second = (await alice.post("/v1/extractions", json=BODY, headers=LATER)).json()["id"]
    upstream.when("Ada", fills(ADA))

    await alice.post(f"/v1/extractions/{first}/cancel")

    assert (await ended(alice, second))["data"] == ADA
    assert json.loads((await alice.get(f"/v1/extractions/{first}")).text)["error"]

"""Responses that begin at a time or by cron, once each."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from httpx2 import AsyncClient

from app.core.errors import Invalid
from app.services.new_run import NewRun
from app.services.schedules import MOST, Schedules, next_time
from tests.conftest import settings_of
from tests.core import DONE, Core, open_core
from tests.upstream import Reply, Upstream

URL = "/v1/schedules"
ASKED = {"model": "assistant", "input": "good morning"}
DAILY = {"cron": "0 9 * * *", "timezone": "Europe/Berlin", "response": ASKED}


async def until(claim: Callable[[], Awaitable[Any]], timeout: float = 15) -> Any:
    async with asyncio.timeout(timeout):
        while not (found := await claim()):
            await asyncio.sleep(0.05)
        return found


def at(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


async def test_a_response_begins_at_its_time(alice: AsyncClient, upstream: Upstream) -> None:
    upstream.when("good morning", Reply(text="Good morning!"))
    made = (await alice.post(URL, json={"at": at(0.5), "response": ASKED})).json()
    assert (made["cron"], made["last_response_id"]) == (None, None)
    assert upstream.requests == []

    async def begun() -> str | None:
        return (await alice.get(f"{URL}/{made['id']}")).json()["last_response_id"]

    response_id = await until(begun)

    async def ended() -> dict[str, Any] | None:
        response = (await alice.get(f"/v1/responses/{response_id}")).json()
        return response if response["status"] == "completed" else None

    response = await until(ended)
    assert response["output"][0]["content"][0]["text"] == "Good morning!"
    assert response["background"] is True
    assert (await alice.get(f"{URL}/{made['id']}")).json()["next_at"] is None


async def test_a_schedule_says_what_it_will_ask_and_when(alice: AsyncClient) -> None:
    made = await alice.post(URL, json={**DAILY, "response": {**ASKED, "metadata": {"of": "me"}}})

    assert made.status_code == 201
    shown = made.json()
    assert shown["response"] == {**ASKED, "background": True, "metadata": {"of": "me"}}
    next_at = datetime.fromtimestamp(shown["next_at"], UTC)
    assert (next_at.hour, next_at.minute) in ((7, 0), (8, 0))
    assert (await alice.get(URL)).json()["data"] == [shown]


async def test_a_schedule_is_its_owners_alone(alice: AsyncClient, bob: AsyncClient) -> None:
    made = (await alice.post(URL, json=DAILY)).json()
    place = f"{URL}/{made['id']}"

    for answer in (
        await bob.get(place),
        await bob.patch(place, json={"paused": True}),
        await bob.delete(place),
        await bob.get(f"{URL}/sched_{'0' * 32}"),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "schedule_not_found")
    assert (await bob.get(URL)).json()["data"] == []
    assert (await alice.get(place)).status_code == 200


async def test_a_deleted_schedule_is_gone(alice: AsyncClient) -> None:
    made = (await alice.post(URL, json=DAILY)).json()

    assert (await alice.delete(f"{URL}/{made['id']}")).json()["deleted"] is True
    assert (await alice.get(f"{URL}/{made['id']}")).status_code == 404


async def test_the_same_key_is_the_same_schedule(alice: AsyncClient, bob: AsyncClient) -> None:
    key = {"Idempotency-Key": "daily"}

    made = await asyncio.gather(*(alice.post(URL, json=DAILY, headers=key) for _ in range(10)))
    other = await alice.post(URL, json={**DAILY, "cron": "1 1 * * *"}, headers=key)
    hers = await bob.post(URL, json=DAILY, headers=key)

    assert len({each.json()["id"] for each in made}) == 1
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")
    assert hers.json()["id"] != made[0].json()["id"]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"cron": "61 9 * * *"}, "cron"),
        ({"cron": "* * * * * *"}, "cron"),
        ({"cron": "0 9 31 2 *"}, "cron"),
        ({"timezone": "Mars/Olympus"}, "timezone"),
        ({"timezone": "../../etc/passwd"}, "timezone"),
        ({"at": "2020-01-01T00:00:00Z", "cron": None}, "at"),
        ({"at": "2020-01-01T00:00:00", "cron": None}, "at"),
        ({"cron": None}, "at"),
        ({"at": "2999-01-01T00:00:00Z"}, "at"),
        ({"response": {"model": "nobody", "input": "x"}}, "model"),
        ({"response": {**ASKED, "input": "x" * 100_000}}, None),
        ({"response": {**ASKED, "conversation": "conv_none"}}, None),
        (
            {"response": {**ASKED, "previous_response_id": "resp_1"}},
            "response.previous_response_id",
        ),
        ({"response": {**ASKED, "store": False}}, "store"),
        (
            {
                "response": {
                    **ASKED,
                    "input": [{"type": "function_call_output", "call_id": "1", "output": ""}],
                }
            },
            "response.input",
        ),
    ],
)
async def test_what_cannot_be_scheduled_is_refused(
    alice: AsyncClient, changes: dict[str, Any], param: str | None
) -> None:
    answer = await alice.post(URL, json={**DAILY, **changes})

    assert answer.status_code in (400, 404, 422), answer.text
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("zone", "after", "expected"),
    [
        ("UTC", "2026-11-25T08:59:59+00:00", "2026-11-25T09:00:00+00:00"),
        ("Asia/Tokyo", "2026-11-25T08:59:59+00:00", "2026-11-26T00:00:00+00:00"),
        (
            "Europe/Berlin",
            "2026-10-24T08:00:00+00:00",
            "2026-10-25T08:00:00+00:00",
        ),  # clocks change
    ],
)
def test_nine_is_nine_where_it_is_asked_for(zone: str, after: str, expected: str) -> None:
    found = next_time("0 9 * * *", zone, datetime.fromisoformat(after))

    assert datetime.fromtimestamp(found, UTC) == datetime.fromisoformat(expected)


async def done(*_: Any) -> Any:
    return DONE


async def schedule(core: Core, **fields: Any) -> tuple[Schedules, str]:
    """One by cron that was due an hour ago."""
    schedules = Schedules(core.engine, core.runs)
    new = NewRun(**{"program": "assistant", "prompt": "go", **fields})
    made = await schedules.create(core.caller, new, cron="*/5 * * * *")
    await core.sql("UPDATE schedules SET next_at = next_at - 3600 WHERE id = :id", id=made.id)
    return schedules, made.id


async def test_however_many_look_a_due_time_begins_one_run(environ: dict[str, str]) -> None:
    settings = settings_of(environ)
    async with open_core(settings, done) as one, open_core(settings, done) as two:
        first, schedule_id = await schedule(one)
        second = Schedules(two.engine, two.runs)

        await asyncio.gather(*(each.begin_due() for each in (first, second) for _ in range(5)))

        assert len(await one.sql("SELECT id FROM runs")) == 1  # twelve times were missed
        found = await first.get(one.caller, schedule_id)
        assert found.next_at and found.next_at > datetime.now(UTC).timestamp()


async def test_a_process_that_died_after_the_run_was_accepted_leaves_one_run(
    environ: dict[str, str],
) -> None:
    async with open_core(settings_of(environ), done) as core:
        schedules, schedule_id = await schedule(core)
        due = (await schedules.get(core.caller, schedule_id)).next_at
        await schedules.begin_due()
        await core.sql("UPDATE schedules SET next_at = :due", due=due)

        await schedules.begin_due()

        assert len(await core.sql("SELECT id FROM runs")) == 1


async def test_a_paused_schedule_begins_nothing(environ: dict[str, str]) -> None:
    async with open_core(settings_of(environ), done) as core:
        schedules, schedule_id = await schedule(core)
        await schedules.pause(core.caller, schedule_id, True)
        await schedules.begin_due()
        await schedules.pause(core.caller, schedule_id, False)
        await schedules.begin_due()

        assert await core.sql("SELECT id FROM runs") == []


async def test_a_run_that_is_refused_at_its_time_is_there_as_failed(
    environ: dict[str, str],
) -> None:
    async with open_core(settings_of(environ), done) as core:
        schedules, schedule_id = await schedule(core)
        await core.sql("UPDATE schedules SET program = 'gone'")
        await schedules.begin_due()

        found = await schedules.get(core.caller, schedule_id)
        run = await core.runs.get(core.caller, str(found.last_run_id))
        assert run.status == "failed"
        assert run.error and "No agent 'gone'" in run.error


async def test_a_schedule_that_is_broken_is_paused_and_others_begin(
    environ: dict[str, str],
) -> None:
    async with open_core(settings_of(environ), done) as core:
        schedules, broken = await schedule(core)
        await core.sql("UPDATE schedules SET timezone = 'No/Where', next_at = next_at - 60")
        await schedule(core, prompt="me too")

        await schedules.begin_due()

        assert (await schedules.get(core.caller, broken)).paused
        runs = await core.sql("SELECT options FROM runs")
        assert any("me too" in run.options for run in runs)


async def test_a_deleted_conversation_is_not_brought_back(environ: dict[str, str]) -> None:
    async with open_core(settings_of(environ), done) as core:
        schedules, schedule_id = await schedule(core, chat="conv_gone")

        await schedules.begin_due()

        found = await schedules.get(core.caller, schedule_id)
        run = await core.runs.get(core.caller, str(found.last_run_id))
        assert run.status == "failed"
        assert run.error and "conversation_not_found" in run.error
        assert await core.sql("SELECT id FROM conversations") == []


async def test_pausing_brings_nothing_back_that_has_begun(environ: dict[str, str]) -> None:
    async with open_core(settings_of(environ), done) as core:
        schedules = Schedules(core.engine, core.runs)
        new = NewRun(program="assistant", prompt="go")
        made = await schedules.create(core.caller, new, at=datetime.now(UTC) + timedelta(hours=1))
        await core.sql("UPDATE schedules SET next_at = 1")
        await schedules.begin_due()

        for paused in (True, False, False):
            found = await schedules.pause(core.caller, made.id, paused)
            assert (found.next_at, found.paused) == (None, paused)


async def test_an_owner_has_so_many_schedules_at_most(environ: dict[str, str]) -> None:
    async with open_core(settings_of(environ), done) as core:
        schedules = Schedules(core.engine, core.runs)
        new = NewRun(program="assistant", prompt="go")
        for _ in range(MOST - 3):
            await schedules.create(core.caller, new, cron="0 9 * * *")

        made = await asyncio.gather(
            *(schedules.create(core.caller, new, cron="0 9 * * *") for _ in range(10)),
            return_exceptions=True,
        )

        assert sum(isinstance(each, Invalid) for each in made) == 7


async def test_who_is_no_administrator_any_more_schedules_as_none(environ: dict[str, str]) -> None:
    async with open_core(settings_of(environ), done) as core:
        schedules, _ = await schedule(core)
        await core.sql("UPDATE schedules SET scopes = '* admin'")
        await schedules.begin_due()

        [run] = await core.sql("SELECT scopes FROM runs")
        assert run.scopes == "*"

"""The weather tool over real HTTP, asked for by a model: whatever happens, the run goes on."""

import json
from typing import Any

import pytest
from httpx2 import AsyncClient

from tests.asking import ask, calls, told
from tests.toolserver import ToolServer
from tests.upstream import Call, Reply, Upstream


@pytest.fixture
def environ(environ: dict[str, str]) -> dict[str, str]:
    return environ | {"TOOL_TIMEOUT": "0.5", "WEATHER_API_KEY": "wx-canary"}


async def test_the_weather_of_a_city_is_told_with_its_units(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when("Go.", calls("get_weather", location="Tokyo"), Reply("Fine."))

    answer = await ask(alice)

    assert answer.json()["choices"][0]["message"]["content"] == "Fine."
    assert json.loads(told(upstream)) == {
        "location": "Tokyo, Japan",
        "temperature": 21.5,
        "conditions": "clear sky",
        "wind": 3.2,
    }
    [search, forecast] = tools.calls
    assert search.query["name"] == "Tokyo"
    assert search.query["apikey"] == forecast.query["apikey"] == "wx-canary"
    described = upstream.requests[0].body["tools"]
    [function] = [
        item["function"] for item in described if item["function"]["name"] == "get_weather"
    ]
    assert "degrees Celsius" in function["description"]
    assert "Lisbon" in function["parameters"]["properties"]["location"]["description"]


async def test_the_weather_agent_answers_with_its_result(
    alice: AsyncClient, upstream: Upstream
) -> None:
    result = {"location": "Tokyo, Japan", "temperature": 21.5, "conditions": "clear sky"}
    upstream.when("Tokyo", calls("get_weather", location="Tokyo"), calls("final_result", **result))

    answer = await ask(alice, "The weather in Tokyo?", agent="weather")

    assert json.loads(answer.json()["choices"][0]["message"]["content"]) == result


async def test_an_unknown_city_is_told_and_another_tried(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when(
        "Go.",
        calls("get_weather", location="Atlantis"),
        calls("get_weather", location="Lemuria"),
        calls("get_weather", location="Lisbon"),
        Reply("Mild."),
    )

    answer = await ask(alice)

    assert answer.json()["choices"][0]["message"]["content"] == "Mild."
    results = [item for item in upstream.requests[-1].body["messages"] if item["role"] == "tool"]
    assert "No place named 'Atlantis'" in results[0]["content"]
    assert "No place named 'Lemuria'" in results[1]["content"]
    assert "Lisbon, Portugal" in results[2]["content"]


async def test_wrong_arguments_are_told_and_corrected(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    wrong = Reply(calls=(Call("get_weather", '{"city": 7}'),))
    broken = Reply(calls=(Call("get_weather", '{"location": '),))
    upstream.when("Go.", wrong, broken, calls("get_weather", location="Paris"), Reply("Grey."))

    answer = await ask(alice)

    assert answer.json()["choices"][0]["message"]["content"] == "Grey."
    assert tools.count("/v1/search") == 1


async def test_a_model_that_never_learns_ends_its_run(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Go.", calls("get_weather", location="Atlantis"))

    answer = await ask(alice)

    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "model_error")
    assert len(upstream.requests) < 10


FAILURES: list[tuple[dict[str, Any], str]] = [
    ({"status": 500, "body": b"canary"}, "status 500"),
    ({"status": 429, "body": b"canary"}, "status 429"),
    ({"status": 302, "headers": {"location": "http://127.0.0.1:1/canary"}}, "status 302"),
    ({"hang": True}, "did not answer in time"),
    ({"drip": (b"x" * 100, 0.1)}, "did not answer in time"),
    ({"body": b"canary: no JSON"}, "could not be read"),
    ({"body": b""}, "could not be read"),
    ({"body": b'{"current": {"temperature_2m": "canary"}}'}, "could not be read"),
    ({"body": b"[" * 100_000}, "could not be read"),
    ({"body": b"\x1f\x8bcanary", "headers": {"content-encoding": "br"}}, "could not be"),
]


async def test_a_failing_service_is_told_and_the_run_goes_on(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    for number, (behaviour, explanation) in enumerate(FAILURES):
        tools.behave("/v1/forecast", **behaviour)
        upstream.when(
            f"Go {number}.", calls("get_weather", location="Tokyo"), Reply("No weather today.")
        )

        answer = await ask(alice, f"Go {number}.")

        assert answer.status_code == 200, behaviour
        assert answer.json()["choices"][0]["message"]["content"] == "No weather today."
        assert explanation in told(upstream), behaviour
        assert "canary" not in told(upstream) and tools.url not in told(upstream)


async def test_an_unreachable_service_is_told(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when("Go.", calls("get_weather", location="Tokyo"), Reply("No weather today."))
    tools.stop()

    answer = await ask(alice)

    assert answer.json()["choices"][0]["message"]["content"] == "No weather today."
    assert "The service could not be reached." in told(upstream)


async def test_parallel_calls_are_made_side_by_side(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    cities = ("Tokyo", "Paris", "Atlantis", "Berlin")
    upstream.when(
        "Go.",
        Reply(calls=tuple(Call("get_weather", {"location": city}) for city in cities)),
        Reply("Mixed."),
    )

    await ask(alice)

    results = [item for item in upstream.requests[-1].body["messages"] if item["role"] == "tool"]
    assert len(results) == 4
    assert all(city in result["content"] for city, result in zip(cities, results, strict=True))
    assert tools.count("/v1/forecast") == 3

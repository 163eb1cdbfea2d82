"""What is here, for those who build on it."""

import pytest
from httpx2 import AsyncClient

pytestmark = pytest.mark.usefixtures("tester")


async def test_agents_are_listed_with_tools_and_output(alice: AsyncClient) -> None:
    cards = {card["name"]: card for card in (await alice.get("/v1/agents")).json()}

    assert list(cards) == ["assistant", "tester", "weather"]
    assert cards["weather"]["tools"] == ["get_weather"]
    assert cards["weather"]["description"].startswith("Reports the weather in one place")
    properties = cards["weather"]["output_schema"]["properties"]
    assert list(properties) == ["location", "temperature", "conditions"]
    assert cards["assistant"]["output_schema"] is None
    assert set(cards["assistant"]["tools"]) == {
        "extract_document",
        "get_my_account",
        "get_weather",
        "rename_me",
        "search_users",
    }


async def test_tools_are_listed_with_what_they_declare(alice: AsyncClient) -> None:
    cards = {card["name"]: card for card in (await alice.get("/v1/tools")).json()}

    assert cards["get_weather"]["effect"] == "read"
    assert cards["get_weather"]["needs"] == "weather:read"
    assert cards["get_weather"]["parameters"]["required"] == ["location"]
    assert cards["get_weather"]["description"].startswith("Current weather in one place")
    assert cards["search_users"]["needs"] == "admin"
    assert (cards["erase"]["approve"], cards["erase"]["effect"]) == (True, "idempotent")
    assert (cards["shout"]["effect"], cards["shout"]["needs"]) == ("once", None)


async def test_both_lists_are_for_those_who_may_call(anonymous: AsyncClient) -> None:
    for path in ("/v1/agents", "/v1/tools"):
        assert (await anonymous.get(path)).status_code == 401

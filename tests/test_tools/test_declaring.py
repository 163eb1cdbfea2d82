"""What a tool says of itself, and what becomes of it in a run."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from httpx2 import AsyncClient
from pydantic_ai import Tool

from app.deps import Deps
from tests.asking import ask, calls, offered, told
from tests.plugins import plugged_in
from tests.toolserver import ToolServer
from tests.upstream import Call, Reply, Upstream
from tools import Declared, all_tools, declared, tool

pytestmark = pytest.mark.usefixtures("tester")


def says(name: str) -> Declared:
    return declared(all_tools()[name].tool_def)


def test_a_tool_says_what_it_does_and_needs():
    assert says("pay") == Declared("once", needs="orders:write")
    assert says("erase") == Declared("idempotent", approve=True)
    assert all_tools()["erase"].requires_approval
    assert all_tools()["dawdle"].timeout == 0.2


def test_a_plain_function_is_a_tool_that_counts_as_once():
    assert says("shout") == says("whisper") == Declared("once")
    assert all_tools()["shout"].description == "Says it louder."


def test_a_name_with_an_underscore_is_private():
    assert "_helper" not in all_tools()


def test_what_a_file_imports_is_not_its_tool():
    assert "tool" not in all_tools()
    assert {item.function.__module__ for item in all_tools().values()} == {
        "tools.extract",
        "tools.trial",
        "tools.users",
        "tools.weather",
    }


def test_only_the_effect_must_be_said():
    @tool(effect="read")
    async def look() -> str:
        """Looks."""
        return "seen"

    assert isinstance(look, Tool)
    assert declared(look.tool_def) == Declared("read")
    with pytest.raises(TypeError):
        tool()  # pyright: ignore[reportCallIssue]


def test_two_tools_of_one_name_are_refused(tmp_path: Path):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/zebra.py").write_text("def get_weather() -> str:\n    return 'fine'\n")

    with plugged_in(tmp_path), pytest.raises(ValueError, match=r"'get_weather'.*tools/zebra\.py"):
        all_tools()


async def test_plain_functions_are_called(alice: AsyncClient, upstream: Upstream) -> None:
    both = Reply(calls=(Call("shout", {"text": "Hey"}), Call("whisper", {"text": "Hey"})))
    upstream.when("Go.", both, Reply("Said."))

    await ask(alice, agent="tester")

    results = [item["content"] for item in upstream.requests[-1].body["messages"][-2:]]
    assert results == ["HEY!", "(hey)"]


async def test_a_call_has_one_key_that_goes_with_what_changes_something(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    twice = Reply(calls=(Call("pay", {"amount": 3}), Call("pay", {"amount": 3})))
    upstream.when("Go.", twice, Reply("Paid."))

    await ask(alice, agent="tester")

    results = [item["content"] for item in upstream.requests[-1].body["messages"][-2:]]
    sent = [call.headers["idempotency-key"] for call in tools.calls if call.path == "/effects/pay"]
    assert len(set(results)) == 2
    assert sorted(sent) == sorted(results)
    rates = [call for call in tools.calls if call.path == "/effects/rate"]
    assert len(rates) == 2
    assert not any("idempotency-key" in call.headers for call in rates)


def test_there_is_a_key_only_inside_a_call():
    nothing: Any = None
    deps = Deps(
        caller=nothing, users=nothing, http=nothing, settings=nothing, run_id="x", extract=nothing
    )

    with pytest.raises(RuntimeError, match="only inside a tool call"):
        _ = deps.idempotency_key


async def test_a_tool_whose_scope_is_missing_is_not_offered(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    key = await alice.post("/users/me/keys", json={"name": "app", "scopes": ["weather:read"]})
    alice.headers["Authorization"] = f"Bearer {key.json()['key']}"
    upstream.when("Go.", calls("pay", amount=3), Reply("I cannot."))

    answer = await ask(alice, agent="tester")

    assert answer.status_code == 200
    assert "pay" not in offered(upstream) and "shout" in offered(upstream)
    assert tools.calls == []


async def test_a_tool_that_takes_too_long_is_given_up(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Go.", calls("dawdle"), Reply("It takes forever."))

    async with asyncio.timeout(10):
        answer = await ask(alice, agent="tester")

    assert answer.json()["choices"][0]["message"]["content"] == "It takes forever."
    assert "Timed out" in told(upstream)


async def test_what_may_have_happened_is_not_asked_for_again(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when("Go.", calls("order"), Reply("I do not know whether it was ordered."))

    await ask(alice, agent="tester")

    assert tools.count("/effects/order") == 1
    assert "outcome unknown" in told(upstream)


@pytest.mark.parametrize("name", ["stumble", "collide", "hang_up"])
async def test_a_bug_ends_the_run_without_its_internals(
    alice: AsyncClient, upstream: Upstream, name: str
) -> None:
    upstream.when("Go.", calls(name), Reply("never"))

    answer = await ask(alice, agent="tester")

    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal")
    assert "canary" not in answer.text
    assert "tester" in answer.json()["error"]["message"]
    assert len(upstream.requests) == 1


async def test_a_response_that_a_bug_ended_tells_what_it_took(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Go.", calls("stumble"), Reply("never"))

    answer = await alice.post("/v1/responses", json={"model": "tester", "input": "Go."})

    assert answer.json()["status"] == "failed"
    assert answer.json()["usage"]["total_tokens"] == 15


async def test_a_stream_tells_of_a_bug_too(alice: AsyncClient, upstream: Upstream) -> None:
    upstream.when("Go.", calls("stumble"), Reply("never"))
    body = {"model": "tester", "input": "Go.", "stream": True}

    answer = await alice.post("/v1/responses", json=body)

    assert "event: response.failed" in answer.text
    assert "canary" not in answer.text


async def test_a_url_that_the_guard_refuses_is_something_the_model_can_act_on(
    alice: AsyncClient, upstream: Upstream
) -> None:
    for url in (
        "http://169.254.169.254/latest/meta-data/",
        "http://localhost:5432/",
        "http://2130706433/",
        "file:///etc/passwd",
        "nonsense",
        "",
    ):
        upstream.when(f"Go to {url}.", calls("fetch", url=url), Reply("I could not."))

        answer = await ask(alice, f"Go to {url}.", agent="tester")

        assert answer.status_code == 200, (url, answer.text)
        assert "The service could not be reached." in told(upstream)


async def test_a_url_that_is_none_is_something_the_model_can_act_on(
    alice: AsyncClient, upstream: Upstream
) -> None:
    for url in ("http://[::1", "http://0177.0.0.1/", "http://ⓛocalhost/"):
        upstream.when(f"Go to {url}.", calls("fetch", url=url), Reply("I could not."))

        answer = await ask(alice, f"Go to {url}.", agent="tester")

        assert answer.status_code == 200, (url, answer.text)
        assert answer.json()["choices"][0]["message"]["content"] == "I could not."

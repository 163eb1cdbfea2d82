"""Prompts and agents are files; a file that makes no sense is refused by its name."""

from pathlib import Path

import pytest
from httpx2 import AsyncClient

from agents import all_agents, prompt, read_prompt
from tests.asking import ask
from tests.plugins import plugged_in
from tests.upstream import Upstream

AGENT = "from pydantic_ai import Agent\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "prompts").mkdir()
    return tmp_path / "prompts/orders.md"


@pytest.fixture
def house(tmp_path: Path) -> Path:
    (tmp_path / "agents").mkdir()
    return tmp_path


def test_front_matter_is_settings_and_the_rest_is_the_prompt(file: Path):
    front = "temperature: 0.2\nmax_tokens: 500\nstop_sequences: [END]\n"
    file.write_text(f"---\n{front}---\n\nBe brief.\n\n---\nOr not.\n")

    text, settings = read_prompt(file)

    assert text == "Be brief.\n\n---\nOr not."
    assert settings == {"temperature": 0.2, "max_tokens": 500, "stop_sequences": ["END"]}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("Be brief.\n", "Be brief."),
        ("---\n---\nBe brief.", "Be brief."),
        ("---\r\ntop_p: 1\r\n---\r\nBe brief.", "Be brief."),
        ("\ufeff---\ntop_p: 1\n---\nBe brief.", "Be brief."),
        ("---\ntop_p: 1\n---", ""),
        ("Fünf\n\n--- six", "Fünf\n\n--- six"),
        ("", ""),
    ],
)
def test_front_matter_may_be_missing_or_empty(file: Path, content: str, text: str):
    file.write_text(content, encoding="utf-8", newline="")

    assert read_prompt(file)[0] == text


@pytest.mark.parametrize(
    ("front", "reason"),
    [
        ("temprature: 0.2\n---\n", "temprature"),
        ("temperature: warm\n---\n", "temperature"),
        ("- temperature\n---\n", "dictionary"),
        ("temperature: [\n---\n", "while parsing"),
        ("temperature: 0.2\n", "must end the front matter"),
    ],
)
def test_front_matter_that_makes_no_sense_is_refused_by_name(file: Path, front: str, reason: str):
    file.write_text(f"---\n{front}Be brief.")

    with pytest.raises(ValueError, match=r"^prompts/orders\.md: ") as caught:
        read_prompt(file)

    assert reason in str(caught.value)


def test_a_missing_prompt_is_named():
    with pytest.raises(FileNotFoundError, match=r"prompts/nobody\.md"):
        prompt("nobody")


async def test_prompt_and_settings_reach_the_model(alice: AsyncClient, upstream: Upstream):
    await ask(alice, agent="assistant")
    await ask(alice, agent="weather")

    assistant, weather = (seen.body for seen in upstream.requests[:2])
    assert assistant["temperature"] == 0.3
    assert weather["temperature"] == 0
    assert assistant["messages"][0]["content"].startswith("You are a helpful assistant.")
    assert weather["messages"][0]["content"].startswith("You are a weather assistant.")
    assert "temperature" not in assistant["messages"][0]["content"]


async def test_what_the_request_says_goes_above_the_prompts_settings(
    alice: AsyncClient, upstream: Upstream
):
    body = {"model": "assistant", "input": "Go.", "temperature": 1.5}

    await alice.post("/v1/responses", json=body)

    assert upstream.requests[0].body["temperature"] == 1.5


def test_a_files_name_is_its_agents_name_and_its_docstring_the_description(house: Path):
    (house / "agents/orders.py").write_text(f'"""Knows orders."""\n\n{AGENT}whatever = Agent()\n')

    with plugged_in(house):
        orders = all_agents()["orders"]

    assert (orders.name, orders.description, orders.settings) == ("orders", "Knows orders.", {})


@pytest.mark.parametrize(
    ("code", "count"),
    [("", 0), ("_agent = Agent()\n", 0), ("one = Agent()\ntwo = Agent()\n", 2)],
)
def test_a_file_without_its_one_agent_is_refused_by_name(house: Path, code: str, count: int):
    (house / "agents/orders.py").write_text(AGENT + code)

    with (
        plugged_in(house),
        pytest.raises(
            ValueError, match=rf"agents/orders\.py must hold one Agent; it holds {count}"
        ),
    ):
        all_agents()


def test_one_agent_may_have_two_names_and_borrow_another(house: Path):
    (house / "agents/orders.py").write_text(
        f"{AGENT}from agents.weather import weather_agent as _weather\nagent = desk = Agent()\n"
    )

    with plugged_in(house):
        assert "orders" in all_agents()


def test_a_file_with_an_underscore_is_no_agent(house: Path):
    (house / "agents/_shared.py").write_text("HELLO = 'hello'\n")

    with plugged_in(house):
        assert "_shared" not in all_agents()

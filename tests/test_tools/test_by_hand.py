"""`python -m app.try_tool`: one tool, without any model."""

import json
import subprocess
import sys

import pytest

from tests.server import ROOT, clean_environ
from tests.toolserver import ToolServer


@pytest.fixture
def environ(database_url: str, tools: ToolServer) -> dict[str, str]:
    return {
        "DATABASE_URL": database_url,
        "WEATHER_API_URL": tools.url,
        "WEATHER_GEOCODING_URL": tools.url,
    }


def try_tool(environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "app.try_tool", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=clean_environ() | environ, capture_output=True, text=True, timeout=60
    )


def test_a_tool_is_found_by_its_file_and_its_result_is_printed(
    environ: dict[str, str], tools: ToolServer
) -> None:
    done = try_tool(environ, "weather", '{"location": "Tokyo"}')

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["location"] == "Tokyo, Japan"
    assert tools.count("/v1/forecast") == 1


def test_a_tool_is_found_by_its_name_and_asks_as_the_local_administrator(
    environ: dict[str, str],
) -> None:
    done = try_tool(environ, "search_users", '{"text": "local"}')

    assert [user["name"] for user in json.loads(done.stdout)] == ["Local admin"], done.stderr


def test_what_goes_wrong_is_said_in_a_line(environ: dict[str, str], tools: ToolServer) -> None:
    tools.behave("/v1/forecast", status=500)
    for arguments, explanation in (
        (("weather", '{"location": "Atlantis"}'), "No place named 'Atlantis'"),
        (("weather", '{"location": "Tokyo"}'), "The service failed: "),
        (("weather", "Tokyo"), """one JSON object, e.g. '{"location": "..."}'; got: Tokyo"""),
        (("rename_me", '["Ada"]'), """one JSON object, e.g. '{"name": "..."}'"""),
        (("users",), "try one of: get_my_account, rename_me, search_users"),
        (("nope",), "get_weather"),
    ):
        done = try_tool(environ, *arguments)

        assert done.returncode == 1, arguments
        assert explanation in done.stderr and "Traceback" not in done.stderr
        assert done.stdout == ""


def test_wrong_arguments_are_named_one_a_line(environ: dict[str, str]) -> None:
    done = try_tool(environ, "weather", '{"city": "Tokyo"}')

    assert done.returncode == 1
    lines = ["location: Field required", "city: Extra inputs are not permitted"]
    assert done.stderr.splitlines() == lines


def test_without_a_name_it_says_how_it_is_used(environ: dict[str, str]) -> None:
    done = try_tool(environ)

    assert done.returncode == 2
    assert "app.try_tool weather" in done.stderr

"""The README's examples work as they are written; only addresses are those of the test."""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from app.config import Settings
from app.schemas.extraction import ExtractionOptions
from tests.server import ROOT, ServerProcess, clean_environ
from tests.toolserver import ToolServer

README = (ROOT / "README.md").read_text()
HERE = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def block(language: str, containing: str) -> str:
    (found,) = (text for text in blocks(language) if containing in text)
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The server of the first five minutes: embedded database, demo model, no login."""
    data = tmp_path_factory.mktemp("data")
    with ServerProcess(DATABASE_URL=f"sqlite+aiosqlite:///{data}/app.db") as running:
        yield running


def run(command: str, server: ServerProcess) -> str:
    command = command.replace(HERE, server.url).replace("uv run just tool", TRY_TOOL)
    command = command.replace("uv run just create-key", CREATE_KEY)
    command = command.replace("uv run just extract-batch", f"{EXTRACT} batch")
    command = command.replace("uv run just extract", f"{EXTRACT} file")
    command = command.replace("uv run just eval", f"{EXTRACT} eval")
    environ = clean_environ() | {"DATABASE_URL": server.environ["DATABASE_URL"]}
    done = subprocess.run(
        ["sh", "-c", command], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


TRY_TOOL = f"{sys.executable} -m app.try_tool"
EXTRACT = f"{sys.executable} -m app.extract"
CREATE_KEY = f"{sys.executable} -m app.manage create-key"


def test_a_chat_frontends_request_streams_an_answer(server: ServerProcess) -> None:
    answer = run(block("sh", "/v1/chat/completions"), server)

    assert "get_weather" in answer
    assert answer.rstrip().endswith("data: [DONE]")


def test_the_official_client_follows_a_background_run(server: ServerProcess) -> None:
    key = run(block("sh", "create-key") + "echo $AGENT_KEY", server).strip()
    code = block("python", "from openai import OpenAI").replace(HERE, server.url)

    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean_environ() | {"AGENT_KEY": key},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert "Local admin" in done.stdout, done.stderr


def test_an_internal_tools_request_gets_a_valid_document(server: ServerProcess) -> None:
    answer = json.loads(run(block("sh", "/v1/extractions"), server))

    assert answer["data"]["name"] == "Ada Lovelace"
    assert answer["data"]["company"] == "Analytical Engines"
    assert set(answer["field_status"].values()) == {"grounded"}


def test_files_are_extracted_from_without_a_server(server: ServerProcess) -> None:
    said = run(block("sh", "just extract-batch"), server)

    assert '"name": "Ada Lovelace"' in said
    assert said.splitlines()[-2:] == [
        "custom_id,status,name,email,phone,company",
        "1,succeeded,Grace Hopper,,,",
    ]


def test_a_job_takes_its_items_in(server: ServerProcess) -> None:
    job = json.loads(run(block("sh", "/v1/extraction-jobs"), server))

    url = f"{server.url}/v1/extraction-jobs/{job['id']}"
    progress = httpx2.get(f"{url}/events", timeout=30).text
    rows = [json.loads(line) for line in httpx2.get(f"{url}/results").text.splitlines()]
    assert "event: job.completed" in progress
    assert [row["data"]["name"] for row in rows] == ["Ada Lovelace", "Grace Hopper"]


def test_a_schedule_is_made(server: ServerProcess) -> None:
    made = json.loads(run(block("sh", "/v1/schedules"), server))

    assert made["next_at"] > time.time()


def test_a_schema_is_published_and_the_same_again_is_the_same_version(
    server: ServerProcess,
) -> None:
    command = block("sh", "/v1/schemas/order")

    versions = [json.loads(run(command, server))["version"] for _ in range(2)]

    assert versions == [1, 1]


def test_an_evaluation_is_good_enough(server: ServerProcess) -> None:
    assert "/name" in run(block("sh", "just eval"), server)


def test_every_option_of_an_extraction_is_in_the_table() -> None:
    section = README[README.index("## Extract\n") : README.index("## Endpoints\n")]
    documented = set(re.findall(r"^\| `(\w+)`", section, re.M))

    assert set(ExtractionOptions.model_fields) <= documented


def test_a_tool_runs_by_hand(server: ServerProcess) -> None:
    assert "Local admin" in run(block("sh", "get_my_account"), server)


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the tree."""
    house = tmp_path / "house"
    for name in ("app", "agents", "tools", "prompts", "tests"):
        shutil.copytree(ROOT / name, house / name, ignore=shutil.ignore_patterns("node_modules"))
    shutil.copy(ROOT / "pyproject.toml", house)
    return house


def test_a_tool_is_added_in_one_file_and_seen_at_once(house: Path, tmp_path: Path) -> None:
    tool, test = block("python", "# tools/exchange.py"), block("python", "# tests/test_tools/")
    (house / "tests/test_tools/test_exchange.py").write_text(test)
    (house / "tools/exchange.py").write_text(tool)

    tested = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/test_tools/test_exchange.py"],
        cwd=house,
        env=clean_environ(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "1 passed" in tested.stdout, tested.stdout + tested.stderr

    with ToolServer() as bank:
        bank.behave("/v1/latest", status=200, body=b'{"rates": {"EUR": 0.9}}')
        (house / "tools/exchange.py").write_text(
            tool.replace("https://api.frankfurter.dev", bank.url)
        )
        server = ServerProcess(
            DATABASE_URL=f"sqlite+aiosqlite:///{tmp_path}/app.db", OUTBOUND_ALLOW="127.0.0.1"
        )
        server.house = house
        with server:
            tools = httpx2.get(f"{server.url}/v1/tools").json()
            question = {"role": "user", "content": "What is the exchange rate from USD to EUR?"}
            answer = httpx2.post(
                f"{server.url}/v1/chat/completions",
                json={"model": "assistant", "messages": [question]},
                timeout=30,
            ).json()
        called = [call.query for call in bank.calls]

    assert "exchange_rate" in [tool["name"] for tool in tools]
    assert called == [{"base": "USD", "symbols": "EUR"}]
    assert "0.9" in answer["choices"][0]["message"]["content"]


def test_a_running_development_server_sees_a_new_tool(house: Path, tmp_path: Path) -> None:
    server = ServerProcess(DATABASE_URL=f"sqlite+aiosqlite:///{tmp_path}/app.db")
    server.house, server.command = house, ["app.serve", "--reload"]
    server.environ["PORT"] = str(server.port)

    def tools() -> list[str]:
        return [tool["name"] for tool in httpx2.get(f"{server.url}/v1/tools", timeout=20).json()]

    with server:
        try:
            before = tools()
            (house / "tools/exchange.py").write_text(block("python", "# tools/exchange.py"))
            until = time.monotonic() + 20
            while "exchange_rate" not in (after := tools()) and time.monotonic() < until:
                time.sleep(0.1)
        finally:
            server.stop()  # and with it the process that it serves from

    assert set(after) - set(before) == {"exchange_rate"}


def test_every_setting_is_in_the_table_and_every_recipe_is_real() -> None:
    table = README[README.index("## Settings") : README.index("## Inside")]
    documented = set(re.findall(r"`([A-Z][A-Z_]+)`", table))
    recipes = set(re.findall(r"just ([a-z][a-z-]+)", README))
    real = set(re.findall(r"^([a-z][a-z-]*)(?: .*)?:", (ROOT / "justfile").read_text(), re.M))

    assert {name.upper() for name in Settings.model_fields} <= documented
    assert recipes <= real

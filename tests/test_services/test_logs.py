"""The log says what happened to whom, and nothing that anybody said."""

import asyncio
import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from httpx2 import AsyncClient

from app.core.errors import NotFound
from app.core.logs import JsonLines, Lines, about
from tests.conftest import PASSWORD, client_of
from tests.server import ROOT, ServerProcess
from tests.toolserver import ToolServer
from tests.upstream import Call, Reply, Upstream

CANARIES = {
    name: f"canary-{name}-7f3a9"
    for name in ("password", "bearer", "prompt", "result", "provider", "credential", "model")
}
BUG = '''
from tools import tool

@tool(effect="read")
async def break_down(what: str) -> str:
    """Breaks down."""
    try:
        raise KeyError(what)
    except KeyError as error:
        raise RuntimeError(f"Broke on {what}") from error
'''


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """The product with one more tool, which has a bug."""
    house = tmp_path / "house"
    house.mkdir()
    for name in ("app", "agents", "prompts"):
        (house / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "tools", house / "tools")
    (house / "tools/bug.py").write_text(BUG)
    return house


@pytest.fixture
def process(environ: dict[str, str], house: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    """A server that says as much as it can, into the file `output`."""
    secrets = {"OPENAI_API_KEY": CANARIES["credential"], "WEATHER_API_KEY": CANARIES["credential"]}
    talkative = {"DEBUG": "true", "LOG_LEVEL": "debug", "LOG_FORMAT": "json"}
    talkative |= {"BREAKER_FAILURES": "1000", "MODEL_RETRIES": "0"}  # each failure is its own
    running = ServerProcess(**{**environ, **secrets, **talkative})
    running.environ["PORT"] = str(running.port)
    running.command = ["app.serve"]
    running.house = house
    running.output = tmp_path / "output"
    with running:
        yield running


@pytest.fixture
async def owner(process: ServerProcess, bearer: Callable[..., Any]) -> AsyncIterator[AsyncClient]:
    async with client_of(process.url, await bearer("Owner", is_admin=True)) as client:
        yield client


def lines_of(process: ServerProcess) -> list[dict[str, Any]]:
    assert process.output
    text = process.output.read_text()
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


async def until_logged(process: ServerProcess, message: str) -> dict[str, Any]:
    async with asyncio.timeout(10):
        while True:
            found = [line for line in lines_of(process) if line["message"] == message]
            if found:
                return found[-1]
            await asyncio.sleep(0.05)


async def refusals(owner: AsyncClient, url: str, upstream: Upstream) -> list[httpx2.Response]:
    """What is answered on every way in which a request goes wrong."""
    said, model = CANARIES["prompt"], Reply(text=CANARIES["model"])
    upstream.when("fine", model)
    answers: list[httpx2.Response] = []

    async def ask(client: AsyncClient, method: str, path: str, **more: Any) -> None:
        answers.append(await client.request(method, path, **more))

    async with client_of(url) as anyone:
        for given in (CANARIES["bearer"], f"a.{CANARIES['bearer']}.c", "x y"):
            headers = {"Authorization": f"Bearer {given}"}
            await ask(anyone, "GET", "/users/me", headers=headers)
            await ask(anyone, "GET", f"/v1/models?key={CANARIES['bearer']}", headers=headers)
        account = {"email": "eve@example.com", "name": "Eve", "password": CANARIES["password"]}
        await ask(anyone, "POST", "/users/", json=account)
        await ask(anyone, "POST", "/users/", json=account)
        await ask(anyone, "POST", "/users/", json={**account, "email": 7})
        for password in (CANARIES["password"], CANARIES["password"] + "x", ["x"]):
            login = {"username": "eve@example.com", "password": password}
            await ask(anyone, "POST", "/auth/token", data=login)
    chat = {"model": "assistant", "messages": [{"role": "user", "content": f"fine {said}"}]}
    for path, body in (
        ("/v1/chat/completions", {**chat, "model": "nobody"}),
        ("/v1/chat/completions", {**chat, "messages": [{"role": said, "content": said}]}),
        ("/v1/chat/completions", {**chat, "temperature": said}),
        ("/v1/chat/completions", {**chat, "stream": True, "tools": [{"type": said}]}),
        ("/v1/responses", {"model": "assistant", "input": {"a": said}}),
        ("/v1/responses", {"model": "assistant", "input": said, "previous_response_id": "resp_0"}),
        ("/api/chat", {"messages": [{"id": "1", "role": "user", "parts": [{"type": said}]}]}),
        ("/ag-ui/assistant", {"threadId": "1", "messages": said}),
        ("/v1/extractions", {"schema_ref": "nothing", "input": {"text": said}}),
        ("/v1/extractions", {"schema": {"type": "array", "$ref": "#"}, "input": {"text": said}}),
        ("/v1/extraction-jobs", {"schema_ref": "contact", "items": [{"text": said}, {"text": 1}]}),
        ("/v1/files", {"file": said}),
    ):
        await ask(owner, "POST", path, json=body)
    await ask(owner, "POST", "/v1/responses", content=f'{{"model": "assistant", "input": "{said}')
    await ask(owner, "GET", "/v1/responses/resp_x?starting_after=x&stream=true")
    await ask(owner, "DELETE", "/nowhere")
    return answers


async def failures(owner: AsyncClient, upstream: Upstream, tools: ToolServer) -> list[Any]:
    """What is answered where the model, a tool or we fail."""
    said, error = CANARIES["prompt"], {"message": CANARIES["provider"], "code": "x"}
    weather, answers = Reply(calls=(Call("get_weather", {"location": said}),)), list[Any]()
    broken = Reply(calls=(Call("break_down", {"what": said}),))
    for status in (400, 401, 404, 429, 500):
        upstream.when(f"status {status}", Reply(status=status, error=error))
    upstream.when("in mid stream", Reply(text="one two", error=error))
    upstream.when("cut off", Reply(text="one two three", pace=0.1, drop_after=2))
    upstream.when("a bug", broken)
    upstream.when(
        "no such tool", Reply(calls=(Call(CANARIES["model"], {"x": said}),)), Reply(text="so")
    )
    upstream.when("wrong call", Reply(calls=(Call("get_weather", f"{{{said}"),)), Reply(text="so"))
    for words in ("tool down", "tool odd", "tool late"):
        upstream.when(words, weather, Reply(text="so"))
    for words in (
        *("status 400", "status 401", "status 404", "status 429", "status 500"),
        *("in mid stream", "cut off", "a bug", "no such tool", "wrong call"),
        *("tool down", "tool odd", "tool late"),
    ):
        if words == "tool down":
            tools.behave("/v1/search", status=500, body=CANARIES["result"].encode())
        if words == "tool odd":
            tools.behave("/v1/search", body=CANARIES["result"].encode())
        if words == "tool late":
            tools.behave("/v1/search", body=json.dumps({"results": CANARIES["result"]}).encode())
        for stream in (False, True):
            messages = [{"role": "user", "content": f"{words} {said}"}]
            body = {"model": "assistant", "messages": messages, "stream": stream}
            answers.append(await owner.post("/v1/chat/completions", json=body))
        text = {"schema_ref": "contact", "input": {"text": f"{words} {said}"}}
        text["options"] = {"max_attempts": 1, "max_transport_retries": 0}
        answers.append(await owner.post("/v1/extractions", json=text))
    return answers


async def test_whatever_goes_wrong_no_secret_and_no_word_of_anybody_leaves(
    process: ServerProcess,
    owner: AsyncClient,
    upstream: Upstream,
    tools: ToolServer,
    environ: dict[str, str],
) -> None:
    key = (await owner.post("/users/me/keys", json={"name": "k", "scopes": ["*"]})).json()["key"]
    answers = await refusals(owner, process.url, upstream)
    assert [answer.status_code for answer in answers if answer.status_code >= 500] == []
    answers += await failures(owner, upstream, tools)
    async with client_of(process.url, key) as client:
        answers.append(await client.get("/metrics"))  # without the right to
    metrics = (await owner.get("/metrics")).text
    await until_logged(process, "GET /metrics")

    secrets = {**CANARIES, "key": key, "signing": environ["SECRET_KEY"], "known": PASSWORD}
    secrets["token"] = owner.headers["Authorization"].removeprefix("Bearer ")
    assert process.output
    output = process.output.read_text()
    assert [name for name, secret in secrets.items() if secret in output] == []
    assert [name for name, secret in secrets.items() if secret in metrics] == []
    bodies = [answer.text for answer in answers if answer.status_code >= 400]
    said = "".join(bodies) + "".join(a.text for a in answers if '"error"' in a.text)
    mine = ("model", "prompt")  # what an owner sent, and what the model made of it, are the owner's
    assert [name for name, secret in secrets.items() if secret in said and name not in mine] == []
    statuses = {answer.status_code for answer in answers}
    assert {400, 401, 403, 404, 422, 429, 500, 502} <= statuses
    assert "INSERT INTO runs" in output  # it did say all it could
    bug = [line for line in lines_of(process) if line.get("error") == "RuntimeError"]
    assert any("/tools/bug.py:" in place for place in bug[0]["trace"])
    assert "from KeyError" in bug[0]["trace"]


async def test_lines_say_which_request_which_run_and_whose(
    process: ServerProcess, owner: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("fine", Reply(text="so"))
    body = {"model": "assistant", "input": "fine"}
    headers = {"X-Request-Id": "my-request"}
    answer = await owner.post("/v1/responses?a=b", json=body, headers=headers)

    run_id = answer.json()["id"].removeprefix("resp_")
    access = await until_logged(process, "POST /v1/responses")
    ended = await until_logged(process, "run completed")
    me = (await owner.get("/users/me")).json()["id"]
    for line in (access, ended):
        assert (line["request_id"], line["run_id"], line["owner_id"]) == ("my-request", run_id, me)
    assert (access["level"], access["logger"], access["status"]) == ("info", "app.access", 200)
    assert (ended["kind"], ended["reason"], ended["output_tokens"]) == ("agent", "stop", 5)
    assert 0 < ended["seconds"] <= access["seconds"]


async def test_the_servers_own_lines_look_the_same(process: ServerProcess) -> None:
    process.stop()

    assert process.output
    printed = process.output.read_text().splitlines()
    said = [line["message"] for line in lines_of(process) if line["logger"] == "uvicorn.error"]
    assert any(message.startswith("Started server process") for message in said)
    assert any(message.startswith("Finished server process") for message in said)
    assert [line for line in printed if line.startswith(("INFO", "DEBUG", "ERROR"))] == []


def record(message: str, *args: Any, name: str = "app.test", error: Any = None) -> Any:
    info = (type(error), error, error.__traceback__) if error else None
    return logging.LogRecord(name, logging.WARNING, __file__, 7, message, args, info)


def test_a_text_cannot_look_like_a_line_of_its_own() -> None:
    forged = record("found %s", "a\n2026-01-01T00:00:00 info app: all is well\x1b[2J\r\u2028b")

    text = Lines().format(forged)

    assert text.splitlines()[1].startswith("    2026")
    assert "\x1b" not in text and "\r" not in text and len(text.splitlines()) == 2
    assert "\n" not in JsonLines().format(forged)


def test_of_an_error_its_type_and_its_places_are_told() -> None:
    caught: Exception | None = None
    try:
        try:
            int("canary")
        except ValueError as error:
            raise NotFound("No canary.") from error
    except NotFound as error:
        caught = error
    line = json.loads(JsonLines().format(record("failed", error=caught)))

    assert line["error"] == "app.core.errors.NotFound (not_found)"
    assert [re.sub(r"^.*/|\d+", "", place) for place in line["trace"]] == [
        "test_logs.py: test_of_an_error_its_type_and_its_places_are_told",
        "from ValueError",
        "test_logs.py: test_of_an_error_its_type_and_its_places_are_told",
    ]


def test_libraries_are_not_quoted() -> None:
    line = json.loads(JsonLines().format(record("sent %s", "canary", name="httpx2")))

    assert line["message"] == "test_logs.py:7"


async def test_tasks_inherit_what_their_lines_are_about_and_keep_it_to_themselves() -> None:
    async def other() -> dict[str, Any]:
        about(run_id="r")
        return json.loads(JsonLines().format(record("inside")))

    about(request_id="q")
    inside = await asyncio.create_task(other())
    outside = json.loads(JsonLines().format(record("outside")))

    assert (inside["request_id"], inside["run_id"]) == ("q", "r")
    assert "run_id" not in outside


def test_a_warning_is_told_by_its_kind(environ: dict[str, str]) -> None:
    code = (
        "import warnings; from app.config import settings; from app.core import logs;"
        "logs.begin(settings); warnings.warn('canary', UserWarning)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**ServerProcess(**environ).environ, "LOG_FORMAT": "json"},
        capture_output=True,
        text=True,
    )

    [line] = done.stderr.splitlines()
    assert "UserWarning" in json.loads(line)["message"] and "canary" not in line

"""`just runs`: what operators see and do from a shell, beside the servers."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from httpx2 import AsyncClient
from sqlalchemy import update

from app.db.session import make_engine
from app.models import Run
from app.runs import main
from tests.conftest import NewUrl, client_of, settings_of
from tests.plugins import plugged_in
from tests.server import ROOT, ServerProcess, ThreadedServer, clean_environ
from tests.toolserver import ToolServer
from tests.upstream import Call, Reply, Upstream

Tell = Callable[..., Any]


@pytest.fixture
def cashier() -> Iterator[None]:
    """The agent `cashier`, whose tool `pay` needs a person's approval."""
    with plugged_in(ROOT / "tests/test_api"):
        yield


@dataclass(frozen=True)
class Done:
    code: int
    stdout: str
    stderr: str


@pytest.fixture
def command(
    environ: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> Callable[..., Awaitable[Done]]:
    """Runs the command as it is given, beside the server, and returns what it printed."""

    async def run(*arguments: str) -> Done:
        capsys.readouterr()
        code = await asyncio.to_thread(main, arguments, settings_of(environ))
        printed = capsys.readouterr()
        return Done(code, printed.out, printed.err)

    return run


@pytest.fixture
def tell(command: Callable[..., Awaitable[Done]]) -> Callable[..., Any]:
    """What it says to machines. Lists begin with `list`, or with an option."""

    async def run(*arguments: str, fails: bool = False) -> Any:
        done = await command(*arguments, "--json")
        assert done.code == (1 if fails else 0), done.stderr
        return json.loads(done.stdout)

    return run


async def begin(client: AsyncClient, said: str, **more: Any) -> str:
    body = {"model": "assistant", "input": said, "background": True, **more}
    return (await client.post("/v1/responses", json=body)).json()["id"].removeprefix("resp_")


async def ended(client: AsyncClient, run_id: str) -> str:
    async with asyncio.timeout(30):
        while True:
            status = (await client.get(f"/v1/responses/resp_{run_id}")).json()["status"]
            if status not in ("queued", "in_progress"):
                return status
            await asyncio.sleep(0.05)


async def test_the_list_has_everybodys_runs_and_filters_pick_from_it(
    alice: AsyncClient, bob: AsyncClient, upstream: Upstream, tell: Tell, command: Tell
) -> None:
    upstream.when("broken", Reply(status=400))
    upstream.when("fine", Reply(text="So."))
    fine = await begin(alice, "fine")
    broken = await begin(bob, "broken")
    assert (await ended(alice, fine), await ended(bob, broken)) == ("completed", "failed")

    newest = await tell("list")
    assert [run["id"] for run in newest] == [broken, fine]
    assert (newest[0]["status"], newest[0]["reason"]) == ("failed", "upstream_error")
    assert newest[1]["usage"]["output_tokens"] == 5
    for arguments in (
        ("--status", "completed", "cancelled"),
        ("--owner", "Alice@example.com"),
        ("--owner", str(newest[1]["owner"])),
    ):
        assert [run["id"] for run in await tell(*arguments)] == [fine]
    assert [run["id"] for run in await tell("--limit", "1")] == [broken]
    assert [run["id"] for run in await tell("--program", "assistant")] == [broken, fine]
    assert (
        await tell("--program", "other") == await tell("--stuck") == await tell("--unknown") == []
    )
    printed = await command()
    assert broken[:12] in printed.stdout and "failed (upstream_error)" in printed.stdout
    stranger = await command("--owner", "eve@example.com")
    assert (stranger.code, stranger.stderr) == (1, "No user 'eve@example.com'.\n")


async def test_a_run_is_shown_step_by_step_and_what_was_said_only_when_asked(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer, tell: Tell, command: Tell
) -> None:
    weather = Reply(calls=(Call("get_weather", {"location": "Tokyo"}),))
    upstream.when("canary", weather, Reply(text="A canary sang \x1b[2J in [red]Tokyo."))
    run_id = await begin(alice, "a canary?")
    await ended(alice, run_id)

    shown = await tell("show", f"resp_{run_id[:10]}")
    steps = shown["steps"]
    assert [step["what"] for step in steps] == [
        "accepted",
        "reply 1",
        "call get_weather",
        "reply 2",
        "completed",
    ]
    _, first, call, second, end = steps
    assert (first["input_tokens"], first["output_tokens"], first["finish"]) == (10, 5, "tool_call")
    assert (call["effect"], call["status"], second["finish"]) == ("read", "done", "stop")
    assert call["seconds"] >= 0 and len(call["key"]) == 40
    assert (end["reason"], end["requests"], end["tool_calls"]) == ("stop", 2, 1)
    assert "canary" not in json.dumps(shown) and "Tokyo" not in json.dumps(shown)
    said = json.dumps((await tell("show", run_id, "--content"))["steps"])
    assert "a canary?" in said and "A canary sang" in said and '\\"location\\"' in said
    printed = (await command("show", run_id, "--content")).stdout
    assert "\x1b" not in printed and "in [red]Tokyo." in printed


async def test_a_start_that_several_runs_share_is_refused(
    alice: AsyncClient, upstream: Upstream, command: Tell
) -> None:
    found: dict[str, str] = {}
    while True:  # of 17 ids two begin alike
        run_id = await begin(alice, "hello")
        if run_id[0] in found:
            break
        found[run_id[0]] = run_id
    shared = await command("show", run_id[0])
    unknown = await command("show", "zzz")
    strange = await command("show", "%")

    assert (shared.code, unknown.code, strange.code) == (1, 1, 1)
    assert "give more of it" in shared.stderr
    assert (unknown.stderr, strange.stderr) == ("No run 'zzz'.\n", "No run '%'.\n")


async def test_a_cancelled_run_ends_wherever_it_is_executed(
    alice: AsyncClient, upstream: Upstream, tell: Tell
) -> None:
    upstream.when("slow", Reply(text="one two three", pace=20))
    run_id = await begin(alice, "slow")
    await upstream.wait_for_async(1)

    assert await tell("cancel", run_id[:12]) == {"id": run_id, "result": "stopping"}
    assert await ended(alice, run_id) == "cancelled"
    refused = await tell("cancel", run_id, fails=True)
    assert refused["error"] == "conflict" and "has ended (cancelled)" in refused["message"]


async def test_a_run_that_hangs_is_taken_away_and_done_again_by_another(
    alice: AsyncClient, upstream: Upstream, tell: Tell
) -> None:
    upstream.when("slow", Reply(hang=True))
    run_id = await begin(alice, "slow")
    await upstream.wait_for_async(1)
    upstream.when("slow", Reply(text="So."))
    refused = await tell("requeue", run_id, fails=True)
    assert "--force" in refused["message"]

    assert await tell("requeue", run_id, "--force") == {"id": run_id, "result": "queued"}
    assert await ended(alice, run_id) == "completed"
    shown = await tell("show", run_id)
    assert shown["claims"] == 3  # accepted, taken away, claimed again
    refused = await tell("requeue", run_id, "--force", fails=True)
    assert "an end is never taken back" in refused["message"]


@pytest.fixture
async def process(environ: dict[str, str]) -> AsyncIterator[ServerProcess]:
    with ServerProcess(**environ) as running:
        yield running


async def test_what_a_dead_process_left_is_stuck_until_it_is_queued_again(
    process: ServerProcess,
    bearer: Callable[..., Any],
    upstream: Upstream,
    tell: Tell,
    environ: dict[str, str],
) -> None:
    upstream.when("slow", Reply(text="one two", pace=30))
    async with client_of(process.url, await bearer("Owner")) as owner:
        run_id = await begin(owner, "slow")
        await upstream.wait_for_async(1)
        process.kill()
        await _change(environ, run_id, lease_until=0.0)
        [left] = await tell("--stuck")
        assert (left["id"], left["flags"]) == (run_id, ["lease over"])
        assert [step["what"] for step in (await tell("show", run_id))["steps"]][1] == "claimed"

        assert (await tell("requeue", run_id))["result"] == "queued"
        [waiting] = await tell("--status", "queued")
        assert (waiting["worker"], waiting["claims"], await tell("--stuck")) == (None, 2, [])
        await _change(environ, run_id, created_at=datetime.now(UTC) - timedelta(minutes=5))
        assert [run["id"] for run in await tell("--stuck")] == [run_id]
        upstream.when("slow", Reply(text="So."))
        process.start()
        assert await ended(owner, run_id) == "completed"


async def _change(environ: dict[str, str], run_id: str, **values: Any) -> None:
    engine = make_engine(settings_of(environ))
    async with engine.begin() as connection:
        await connection.execute(update(Run).where(Run.id == run_id).values(**values))
    await engine.dispose()


async def test_a_call_of_unknown_outcome_is_flagged(
    cashier: None,
    environ: dict[str, str],
    bearer: Callable[..., Any],
    upstream: Upstream,
    tools: ToolServer,
    tell: Tell,
) -> None:
    upstream.when("pay", Reply(calls=(Call("pay", {"amount": 7}),)), Reply(text="Unsure."))
    tools.behave("/effects/pay-7", hang=True)
    with ThreadedServer(settings_of(environ, tool_timeout="0.5")) as running:
        async with client_of(running.url, await bearer("Owner")) as owner:
            body = {"model": "cashier", "input": "pay"}
            asked = (await owner.post("/v1/responses", json=body)).json()
            run_id = asked["id"].removeprefix("resp_")
            [waits] = await tell("--status", "waiting")
            assert waits["id"] == run_id
            refused = await tell("requeue", run_id, fails=True)
            assert "waits for a decision" in refused["message"]
            [request] = [x for x in asked["output"] if x["type"] == "mcp_approval_request"]
            answer = {
                "type": "mcp_approval_response",
                "approval_request_id": request["id"],
                "approve": True,
            }
            again = {"model": "cashier", "previous_response_id": asked["id"], "input": [answer]}
            await owner.post("/v1/responses", json=again)

    [flagged] = await tell("--unknown")
    assert (flagged["id"], flagged["flags"]) == (run_id, ["unknown outcome"])
    steps = (await tell("show", run_id))["steps"]
    assert "waits" in [step["what"] for step in steps]
    assert "unknown" in [step.get("status") for step in steps]


def test_where_there_is_no_database_yet_it_is_said(
    environ: dict[str, str], new_url: NewUrl
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "app.runs"],
        cwd=ROOT,
        env=clean_environ() | environ | {"DATABASE_URL": new_url()},
        capture_output=True,
        text=True,
    )

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Database error:") and "Traceback" not in done.stderr

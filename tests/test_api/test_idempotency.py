"""A request that is sent again with its Idempotency-Key begins nothing anew, on any route."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from httpx2 import AsyncClient, Response
from sqlalchemy import select

from app.models import Run
from tests.conftest import client_of, settings_of
from tests.extracting import ADA, PERSON, fills
from tests.keeping import age, connected, counts, everything, sweep
from tests.server import ServerProcess, ThreadedServer
from tests.upstream import Call, Reply, Upstream

pytestmark = pytest.mark.usefixtures("tester")

Json = dict[str, Any]


def chat(text: str) -> Json:
    return {"model": "tester", "messages": [{"role": "user", "content": text}]}


def page(text: str) -> Json:
    said = {"id": text, "role": "user", "parts": [{"type": "text", "text": text}]}
    return {"id": "page", "messages": [said], "agent": "tester", "trigger": "submit-message"}


def thread(text: str) -> Json:
    said = {"id": text, "role": "user", "content": text}
    empty = {"state": {}, "tools": [], "context": [], "forwardedProps": {}}
    return {"threadId": "thread", "runId": "run", "messages": [said], **empty}


def response(text: str, **more: Any) -> Json:
    return {"model": "tester", "input": text, **more}


def extraction(text: str, **more: Any) -> Json:
    return {"schema": PERSON, "input": {"text": text}, "options": {"cache": "bypass"}, **more}


ROUTES: dict[str, tuple[str, Callable[[str], Json]]] = {
    "chat": ("/v1/chat/completions", chat),
    "chat stream": ("/v1/chat/completions", lambda text: chat(text) | {"stream": True}),
    "responses": ("/v1/responses", response),
    "responses stream": ("/v1/responses", lambda text: response(text, stream=True)),
    "background": ("/v1/responses", lambda text: response(text, background=True)),
    "vercel": ("/api/chat", page),
    "ag-ui": ("/ag-ui/tester", thread),
    "extraction": ("/v1/extractions", extraction),
    "extraction stream": ("/v1/extractions", lambda text: extraction(text, stream=True)),
    "evaluation": (
        "/v1/evaluations",
        lambda text: {"schema": PERSON, "items": [{"text": text, "expected": ADA}]},
    ),
    "job": (
        "/v1/extraction-jobs",
        lambda text: {"schema": PERSON, "items": [{"custom_id": "1", "text": text}]},
    ),
}
"""Every POST that starts work: where to, and what."""


def what(route: str, answer: Response) -> str:
    """What is the same for the same run: all of it, but for what tells how far it is."""
    assert answer.status_code in (200, 202), answer.text
    return answer.json()["id"] if route in ("background", "job") else answer.text


@pytest.fixture(autouse=True)
def script(upstream: Upstream) -> None:
    upstream.when("One.", Reply(text="Done.", delay=0.3))
    upstream.when("Ada", fills(ADA, delay=0.3))


def says(route: str) -> str:
    return "Ada is 36." if route.split()[0] in ("extraction", "evaluation", "job") else "One."


@pytest.mark.parametrize("route", ROUTES)
async def test_a_request_that_is_repeated_is_the_same_run_also_after_a_restart(
    environ: dict[str, str], bearer: Callable[..., Any], upstream: Upstream, route: str
) -> None:
    url, body = ROUTES[route]
    headers = {"Idempotency-Key": "once"}
    with ThreadedServer(settings_of(environ)) as server:
        token = await bearer("Alice")
        async with client_of(server.url, token) as alice:
            sent = (alice.post(url, json=body(says(route)), headers=headers) for _ in range(10))
            first = {what(route, answer) for answer in await asyncio.gather(*sent)}
            other = await alice.post(url, json=body(f"{says(route)} Or not."), headers=headers)
        async with client_of(server.url, await bearer("Bob")) as bob:
            theirs = what(route, await bob.post(url, json=body(says(route)), headers=headers))
        assert len(first) == 1
        assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")
        assert theirs not in first
        await asyncio.to_thread(upstream.wait_until, lambda: len(upstream.requests) == 2)
    with ThreadedServer(settings_of(environ)) as server:
        async with client_of(server.url, token) as alice:
            again = await alice.post(url, json=body(says(route)), headers=headers)
    assert {what(route, again)} == first
    assert len(upstream.requests) == 2


@pytest.mark.parametrize("route", ROUTES)
async def test_what_no_key_can_be_is_refused(
    alice: AsyncClient, upstream: Upstream, route: str
) -> None:
    url, body = ROUTES[route]
    for key in ("", "x" * 256, "a\x01b", "a\x7fb"):
        headers = [(b"Idempotency-Key", key.encode())]
        refused = await alice.post(url, json=body(says(route)), headers=headers)
        assert refused.status_code in (400, 422), (key, refused.text)
    assert upstream.requests == []


async def test_no_key_holds_nul(alice: AsyncClient) -> None:
    url = alice.base_url
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(b"POST /v1/responses HTTP/1.1\r\nHost: x\r\nIdempotency-Key: a\0b\r\n\r\n")

    assert (await reader.readline()).startswith(b"HTTP/1.1 400 ")
    writer.close()


STRATEGIES = ["enqueue", "reject", "interrupt"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("where", ["chat", "chat of a name", "vercel", "ag-ui"])
async def test_of_fifty_identical_requests_one_begins_and_none_is_refused(
    alice: AsyncClient, upstream: Upstream, where: str, strategy: str
) -> None:
    url, body = ROUTES[where.split()[0]]
    headers = {"Idempotency-Key": "once", "X-Multitask-Strategy": strategy}
    if where == "chat of a name":
        headers["X-Chat-Id"] = "name"

    async with client_of(str(alice.base_url)) as many:
        many.headers["Authorization"] = alice.headers["Authorization"]
        sent = (many.post(url, json=body("One."), headers=headers) for _ in range(50))
        answers = await asyncio.gather(*sent)

    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.text for answer in answers}) == 1
    assert "Done" in answers[0].text
    assert len(upstream.requests) == 1


async def test_a_key_belongs_to_a_chat_and_an_agent(alice: AsyncClient) -> None:
    """They are no part of the body, yet of what is asked."""
    headers = {"Idempotency-Key": "once"}
    await alice.post("/v1/chat/completions", json=chat("One."), headers=headers)
    await alice.post("/api/chat?agent=tester", json=page("One."), headers=headers)
    await alice.post("/ag-ui/tester", json=thread("One."), headers=headers)

    others = [
        await alice.post(
            "/v1/chat/completions", json=chat("One."), headers=headers | {"X-Chat-Id": "other"}
        ),
        await alice.post("/api/chat?agent=assistant", json=page("One."), headers=headers),
        await alice.post("/ag-ui/assistant", json=thread("One."), headers=headers),
    ]

    assert [other.status_code for other in others] == [409] * 3


async def test_a_repeated_request_is_answered_while_its_own_question_waits(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Erase.", Reply(calls=(Call("erase"),)))
    for route in ("chat", "vercel", "ag-ui", "responses"):
        url, body = ROUTES[route]
        headers = {"Idempotency-Key": "once", "X-Chat-Id": "chat", "X-Multitask-Strategy": "reject"}
        first = await alice.post(url, json=body("Erase."), headers=headers)
        again = await alice.post(url, json=body("Erase."), headers=headers)
        assert (again.status_code, again.text) == (200, first.text), route
    assert len(upstream.requests) == 4


async def test_a_job_is_retried_once_for_a_key(alice: AsyncClient, upstream: Upstream) -> None:
    upstream.when("Ada", fills({"name": "Ada"}))
    url = "/v1/extraction-jobs"
    items = [{"custom_id": "1", "text": "Ada is 36."}]
    body = {"schema": PERSON, "items": items, "options": {"max_attempts": 1}}
    job = (await alice.post(url, json=body)).json()["id"]

    async def ended() -> None:
        while (await alice.get(f"{url}/{job}")).json()["status"] in ("queued", "running"):
            await asyncio.sleep(0.05)

    await asyncio.wait_for(ended(), 20)
    headers = {"Idempotency-Key": "again"}
    for _ in range(2):
        sent = (alice.post(f"{url}/{job}/retry", headers=headers) for _ in range(5))
        answers = await asyncio.gather(*sent)
        assert {answer.status_code for answer in answers} == {202}, answers[0].text
        await asyncio.wait_for(ended(), 20)

    assert len(upstream.requests) == 2
    other = await alice.post(f"{url}/{job}/retry", json={"only": "cancelled"}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")


async def test_a_killed_process_keeps_the_keys(
    environ: dict[str, str], bearer: Callable[..., Any], upstream: Upstream
) -> None:
    headers, body = {"Idempotency-Key": "once"}, {"model": "assistant", "input": "One."}
    body |= {"background": True}
    with ServerProcess(**environ) as process:
        async with client_of(process.url, await bearer("Alice")) as alice:
            first = await alice.post("/v1/responses", json=body, headers=headers)
            process.kill()
            process.start()
            again = await alice.post("/v1/responses", json=body, headers=headers)
    assert again.json()["id"] == first.json()["id"]


# What is kept no longer


JOB = ("/v1/extraction-jobs", ROUTES["job"][1]("Ada is 36."))
DELETES = {
    "not stored": ("/v1/responses", response("One.", store=False), None),
    "not stored, as a stream": ("/v1/responses", response("One.", store=False, stream=True), None),
    "response": ("/v1/responses", response("One."), "/v1/responses/{id}"),
    "conversation": ("/api/chat", page("One."), "/v1/conversations/page"),
    "extraction": ("/v1/extractions", extraction("Ada is 36."), "/v1/extractions/{id}"),
    "job": (*JOB, "/v1/extraction-jobs/{id}"),
}


@pytest.mark.parametrize("what", DELETES)
async def test_what_was_deleted_is_not_begun_again_for_a_day_and_only_its_key_is_kept(
    alice: AsyncClient, upstream: Upstream, environ: dict[str, str], what: str
) -> None:
    url, body, delete = DELETES[what]
    headers = {"Idempotency-Key": "once"}
    first = await alice.post(url, json=body, headers=headers)
    assert first.status_code in (200, 202), first.text
    await asyncio.to_thread(upstream.wait_until, lambda: len(upstream.requests) == 1)
    if delete:
        run_id = first.json()["id"] if "{id}" in delete else ""
        deleted = await alice.delete(delete.format(id=run_id))
        assert deleted.is_success, deleted.text

    again = await alice.post(url, json=body, headers=headers)
    other = await alice.post(url, json=body | {"metadata": {"a": "b"}}, headers=headers)

    assert (again.status_code, "another key" in again.text) == (404, True), again.text
    assert other.status_code in (409, 422), other.text
    assert len(upstream.requests) == 1
    stored = await everything(environ)
    assert "Ada" not in stored and "One." not in stored and "Done." not in stored
    async with connected(environ) as connection:
        [run_id] = await connection.scalars(select(Run.id))
    assert run_id not in first.text  # who is to go on from it, and does not know yet, finds it gone
    await age(environ, run_id, days=2)
    await sweep(environ)
    assert (await counts(environ))["runs"] == 0
    assert (await alice.post(url, json=body, headers=headers)).is_success


# Decisions


async def asked(client: AsyncClient, upstream: Upstream) -> tuple[str, Json]:
    """The key of a question, and the page's message that has it."""
    upstream.when("Erase.", Reply(calls=(Call("erase"),)), Reply(text="Erased."))
    await client.post("/api/chat", json=page("Erase."))
    message = (await client.get("/api/chat/page")).json()["messages"][-1]
    [part] = [part for part in message["parts"] if part.get("approval")]
    return part["approval"]["id"], message


def decision(route: str, key: str, message: Json, approve: bool) -> tuple[str, Json]:
    match route:
        case "chat" | "chat stream":
            text = f"/{'approve' if approve else 'deny'} {key}"
            return "/v1/chat/completions", chat(text) | {"stream": route == "chat stream"}
        case "responses":
            answer = {"type": "mcp_approval_response", "approval_request_id": f"mcpr_{key}"}
            return "/v1/responses", response("") | {"input": [answer | {"approve": approve}]}
        case "vercel":
            approval = {"id": key, "approved": approve}
            parts = [
                part | {"state": "approval-responded", "approval": approval}
                if part.get("approval")
                else part
                for part in message["parts"]
            ]
            return "/api/chat", page("") | {"messages": [message | {"parts": parts}]}
        case _:
            resume = {"interruptId": key, "status": "resolved", "payload": {"approved": approve}}
            return "/ag-ui/tester", thread("") | {"messages": [], "resume": [resume]}


@pytest.mark.parametrize("approve", [True, False])
@pytest.mark.parametrize("route", ["chat", "chat stream", "responses", "vercel", "ag-ui"])
async def test_a_decision_that_is_repeated_is_the_same_and_a_contrary_one_is_refused(
    alice: AsyncClient, bob: AsyncClient, upstream: Upstream, route: str, approve: bool
) -> None:
    key, message = await asked(alice, upstream)
    url, body = decision(route, key, message, approve)
    headers = {"Idempotency-Key": "yes"}

    many = await asyncio.gather(*(alice.post(url, json=body, headers=headers) for _ in range(10)))
    later = await alice.post(url, json=body)

    assert {answer.status_code for answer in (*many, later)} == {200}, later.text
    assert {answer.text for answer in many} == {later.text}
    assert "Erased" in later.text
    assert len(upstream.requests) == 2
    url, contrary = decision(route, key, message, not approve)
    refused = await alice.post(url, json=contrary)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "not_awaited")
    stranger = await bob.post(url, json=body)
    assert stranger.status_code in (404, 409)


def test_the_routes_are_all_there_are() -> None:
    """A new POST that takes a key has to be in the table above."""
    from app.main import app

    takes = {
        path
        for path, item in app.openapi()["paths"].items()
        for parameter in item.get("post", {}).get("parameters", ())
        if parameter["name"].lower() == "idempotency-key"
    }
    tried = {url.replace("/ag-ui/tester", "/ag-ui/{agent}") for url, _ in ROUTES.values()}
    assert takes == tried | {"/v1/extraction-jobs/{job_id}/retry", "/v1/schedules"}

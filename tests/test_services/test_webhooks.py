"""Deliveries are signed, retried, never sent inwards, and survive their process."""

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from httpx2 import AsyncClient
from openai import InvalidWebhookSignatureError, OpenAI
from sqlalchemy import Row, text
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.core.errors import AppError
from app.db.session import make_engine
from app.models import Run
from app.schemas.run import Options
from app.services.allowances import Limits
from app.services.execution import Job, Outcome
from app.services.journal import Journal
from app.services.outbound import Allowed, make_http
from app.services.purse import Purse
from app.services.run_log import RunLog, RunPaused, entry
from app.services.webhooks import (
    DELAYS,
    WebhookExecutor,
    announce,
    announcement,
    check_url,
    secret_of,
)
from tests.conftest import SECRET, client_of, settings_of
from tests.core import open_core
from tests.extracting import ADA, PERSON, fills
from tests.server import ThreadedServer
from tests.serving import Delivery, Serving
from tests.upstream import Reply, Upstream

SETTINGS = settings_of(
    {"USER_URLS_ALLOW": "127.0.0.1", "SECRET_KEY": SECRET, "DATABASE_URL": "sqlite://"}
)
EVENT = "extraction.completed"
DATA = {"id": "extr_1", "status": "completed"}


class Receiver(Serving):
    """Writes down what it is sent, and answers with the next status; the last is for good."""

    def __init__(self) -> None:
        super().__init__(Starlette(routes=[Route("/hook", self._take, methods=["GET", "POST"])]))
        self.answers: list[Response] = [Response()]
        self.got: list[tuple[dict[str, str], bytes]] = []

    async def _take(self, request: Request) -> Response:
        self.got.append((dict(request.headers), await request.body()))
        self._notice()
        return self.answers[min(len(self.got), len(self.answers)) - 1]

    @property
    def hook(self) -> str:
        return f"{self.url}/hook"

    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.got]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as running:
        yield running


def job(url: str, owner_id: int = 7) -> Job:
    _, row = announcement(owner_id, "*", url, EVENT, DATA)
    run = Run(**{name: value for name, value in row.items() if name != "lease_seconds"})
    log = RunLog(run.id, 1)
    purse = Purse(run, log, Journal(make_engine(SETTINGS)), Limits.of(SETTINGS))
    return Job(run, Options.model_validate_json(run.options), log, purse, [])


async def deliver(job: Job, delays: Sequence[float] = (), **changes: Any) -> Outcome:
    settings = SETTINGS.model_copy(update=changes)
    async with make_http(settings, Allowed.of_users(settings)) as http:
        deliver = WebhookExecutor(http, settings, delays)
        while (outcome := await deliver(job)).status == "waiting":
            job.log.entries.append(entry(len(job.log.entries) + 1, RunPaused(calls=[])))
        return outcome


async def test_a_delivery_says_what_ended(receiver: Receiver) -> None:
    told = job(receiver.hook)

    outcome = await deliver(told)

    assert (outcome.status, outcome.output) == ("completed", {"tries": 1, "status": 200})
    [(headers, body)] = receiver.got
    event = json.loads(body)
    assert abs(event.pop("created_at") - time.time()) < 60
    assert event == {"id": f"evt_{told.run.id}", "object": "event", "type": EVENT, "data": DATA}
    assert headers["content-type"] == "application/json"
    assert headers["webhook-id"] == event["id"]


async def test_the_official_client_verifies_it_with_its_owners_secret_alone(
    receiver: Receiver,
) -> None:
    await deliver(job(receiver.hook, owner_id=7))
    [(headers, body)] = receiver.got
    webhooks = OpenAI(api_key="none").webhooks

    event = webhooks.unwrap(body, headers, secret=secret_of(SETTINGS, 7))

    assert event.type == EVENT
    for secret, sent in (
        (secret_of(SETTINGS, 8), body),
        (secret_of(SETTINGS, 7), body.replace(b"extr_1", b"extr_2")),
    ):
        with pytest.raises(InvalidWebhookSignatureError):
            webhooks.verify_signature(sent, headers, secret=secret)


async def test_what_is_not_taken_is_sent_again_under_the_same_id(receiver: Receiver) -> None:
    receiver.answers = [Response(status_code=500), Response(status_code=404), Response(b"ok", 202)]

    outcome = await deliver(job(receiver.hook), (0, 0, 0))

    assert (outcome.status, outcome.output) == ("completed", {"tries": 3, "status": 202})
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1
    assert len({body for _, body in receiver.got}) == 1


async def test_a_receiver_that_hangs_up_is_tried_again(receiver: Receiver) -> None:
    receiver.answers = [Delivery([b""], drop_after=0), Response()]

    assert (await deliver(job(receiver.hook), (0,))).output == {"tries": 2, "status": 200}


async def test_it_is_given_up_at_the_end_of_the_schedule(receiver: Receiver) -> None:
    receiver.answers = [Response(b"a secret of theirs", 503)]

    outcome = await deliver(job(receiver.hook), (0, 0))

    assert (outcome.status, len(receiver.got)) == ("failed", 3)
    assert outcome.error == {
        "code": "webhook_undelivered",
        "message": "The webhook was not taken; the last try brought status 503.",
    }


async def test_a_receiver_that_is_gone_is_left_alone(receiver: Receiver) -> None:
    receiver.answers = [Response(status_code=410)]

    assert (await deliver(job(receiver.hook), (0, 0))).status == "failed"
    assert len(receiver.got) == 1


async def test_redirects_are_not_followed(receiver: Receiver) -> None:
    receiver.answers = [Response(status_code=307, headers={"Location": receiver.hook}), Response()]

    outcome = await deliver(job(receiver.hook))

    assert (outcome.status, len(receiver.got)) == ("failed", 1)


async def test_a_private_address_is_refused_at_once(receiver: Receiver) -> None:
    allow: Any = {"user_urls_allow": (), "outbound_allow": ("127.0.0.1",)}  # tools alone
    outcome = await deliver(job(receiver.hook), (3600,), **allow)

    assert outcome.error and outcome.error["code"] == "webhook_undelivered"
    assert "not a public one" in outcome.error["message"]
    assert receiver.got == []


# Acceptance


@pytest.mark.parametrize(
    "url",
    ["https://example.com/hook?a=b", "http://example.com:8080/", "https://[2606:4700::1111]/"],
)
def test_addresses_of_the_web_are_accepted(url: str) -> None:
    check_url(url, SETTINGS)


@pytest.mark.parametrize(
    "url",
    [
        *("", "x", "/hook", "ftp://example.com", "javascript:alert(1)", "https://", "https:///x"),
        *("https://user:pass@example.com", "https://user@example.com", "http://a:99999/"),
        *("https://example.com/\0", "https://example.com/\ud800", "https://ex\ud800ample.com"),
        *("http://10.0.0.1/x", "https://169.254.169.254", "https://[::1]/", "http://[fc00::1]/"),
        *("http://[::ffff:10.0.0.1]/", "https://[64:ff9b::a00:1]/"),
        *("https://[::1", "https://example.com/" + "x" * 2048, "file:///etc/passwd"),
    ],
)
def test_what_cannot_be_called_is_refused(url: str) -> None:
    with pytest.raises(AppError) as caught:
        check_url(url, SETTINGS)

    error = caught.value
    assert (error.status, error.error_code, error.param) == (422, "invalid_webhook", "webhook.url")


def test_a_private_address_is_accepted_where_it_may_be_called() -> None:
    check_url("http://127.0.0.1:8080/hook", SETTINGS)
    named = SETTINGS.model_copy(update={"user_urls_allow": ("10.0.0.1:8080",)})
    check_url("http://10.0.0.1:8080/hook", named)
    with pytest.raises(AppError, match="public address"):
        check_url("http://10.0.0.1/hook", named)


def test_production_sends_over_tls_alone() -> None:
    production = SETTINGS.model_copy(update={"environment": "production"})

    check_url("https://example.com", production)
    with pytest.raises(AppError, match="begins with https://"):
        check_url("http://example.com", production)


# As a run


async def commit(environ: dict[str, str], url: str) -> str:
    """Commits a delivery of the first user's, as the end of a run does. Returns its id."""
    engine = make_engine(settings_of(environ))
    async with engine.execution_options(write=True).begin() as connection:
        owner_id = (await connection.execute(text("SELECT min(id) FROM users"))).scalar_one()
        statement, row = announcement(owner_id, "*", url, EVENT, DATA)
        await connection.execute(statement, [row])
    await engine.dispose()
    return row["id"]


async def sql(environ: dict[str, str], statement: str, **values: Any) -> list[Row[Any]]:
    engine = make_engine(settings_of(environ))
    async with engine.execution_options(write=True).begin() as connection:
        result = await connection.execute(text(statement), values)
        rows = list(result) if result.returns_rows else []
    await engine.dispose()
    return rows


async def until(environ: dict[str, str], run_id: str, status: str) -> str:
    """The run's output once it has this status."""
    async with asyncio.timeout(10):
        while True:
            [row] = await sql(environ, "SELECT status, output FROM runs WHERE id = :id", id=run_id)
            if row.status == status:
                return str(row.output)
            await asyncio.sleep(0.05)


async def test_a_committed_delivery_is_made(
    environ: dict[str, str], receiver: Receiver, bearer: Any
) -> None:
    with ThreadedServer(settings_of(environ, user_urls_allow="127.0.0.1")) as server:
        async with client_of(server.url, await bearer("Alice")) as alice:
            run_id = await commit(environ, receiver.hook)
            output = await until(environ, run_id, "completed")

            reply = await alice.get("/v1/webhooks/secret")

    assert json.loads(output) == {"tries": 1, "status": 200}
    [(headers, body)] = receiver.got
    secret = reply.json()["secret"]
    event = OpenAI(api_key="none").webhooks.unwrap(body, headers, secret=secret)
    assert event.id == f"evt_{run_id}"


async def test_a_delivery_goes_on_in_another_process_at_its_next_try(
    environ: dict[str, str], receiver: Receiver, bearer: Any
) -> None:
    receiver.answers = [Response(status_code=500), Response()]
    settings = settings_of(environ, user_urls_allow="127.0.0.1")
    with ThreadedServer(settings):
        await bearer("Alice")
        run_id = await commit(environ, receiver.hook)
        await until(environ, run_id, "waiting")
    [row] = await sql(environ, "SELECT lease_until FROM runs WHERE id = :id", id=run_id)
    assert 0 < row.lease_until - time.time() <= DELAYS[0]
    await sql(environ, "UPDATE runs SET lease_until = 0 WHERE id = :id", id=run_id)

    with ThreadedServer(settings):
        output = await until(environ, run_id, "completed")

    assert json.loads(output) == {"tries": 2, "status": 200}
    first, second = receiver.bodies()
    assert first == second


async def test_an_end_outside_of_the_executor_is_told_too(environ: dict[str, str]) -> None:
    async def broken(journal: Journal, job: Job) -> Outcome:
        raise RuntimeError

    async with open_core(settings_of(environ), broken, beats=False) as core:
        core.worker._announce = announce  # pyright: ignore[reportPrivateUsage]
        wants = {
            "kind": "extraction",
            "options": Options(webhook="https://example.com"),
            "queue": True,
        }
        internal, poisoned, cancelled = [await core.accept(**wants) for _ in range(3)]
        agent = await core.accept(**{**wants, "kind": "agent"})
        await core.sql("UPDATE runs SET crashes = 99 WHERE id = :id", id=poisoned.id)
        await core.runs.cancel(core.caller, cancelled.id)
        core.worker.begin()
        for run in (internal, poisoned, cancelled, agent):
            await core.runs.wait(run)
        rows = await core.sql("SELECT options FROM runs WHERE kind = 'webhook'")

    told = [json.loads(json.loads(row.options)["text"]) for row in rows]
    assert {event["data"]["id"]: event["type"] for event in told} == {
        internal.id: "extraction.failed",
        poisoned.id: "extraction.failed",
        cancelled.id: "extraction.cancelled",
    }
    assert len(told) == 3


async def test_an_extraction_tells_of_its_end_once(
    environ: dict[str, str], receiver: Receiver, bearer: Any, upstream: Upstream
) -> None:
    upstream.when("Ada", fills(ADA))
    upstream.when("Slow", Reply(text="x", hang=True))
    hook = {"schema": PERSON, "webhook": {"url": receiver.hook}}
    with ThreadedServer(settings_of(environ, user_urls_allow="127.0.0.1")) as server:
        async with client_of(server.url, await bearer("Alice")) as alice:

            async def post(text: str) -> str:
                reply = await alice.post(
                    "/v1/extractions",
                    json={"input": {"text": text}, **hook},
                    headers={"Prefer": "respond-async"},
                )
                return reply.json()["id"]

            ids = [await post(text) for text in ("Ada is 36.", "Slow", "Slow")]
            await upstream.wait_for_async(2)
            await alice.post(f"/v1/extractions/{ids[2]}/cancel")  # which waits for the second
            await receiver.wait_until_async(lambda: len(receiver.got) == 2)
        rows = await sql(environ, "SELECT id FROM runs WHERE kind = 'webhook'")

    assert len(rows) == 2
    assert {body["data"]["id"]: body["type"] for body in receiver.bodies()} == {
        ids[0]: "extraction.completed",
        ids[2]: "extraction.cancelled",
    }


async def test_each_user_has_a_secret_of_their_own(
    anonymous: AsyncClient, alice: AsyncClient, bob: AsyncClient
) -> None:
    assert (await anonymous.get("/v1/webhooks/secret")).status_code == 401

    secrets = [(await each.get("/v1/webhooks/secret")).json() for each in (alice, bob, alice)]

    assert secrets[0] == secrets[2] != secrets[1]
    assert secrets[0]["secret"].startswith("whsec_")

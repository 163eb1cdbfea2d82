"""Tells an address of the caller's that something has ended: signed, retried, and never inwards.

A delivery is a run of its own, committed with the end that it tells of, so neither is without the
other. Signed as Standard Webhooks 1.0.0 has it (standardwebhooks.com); OpenAI's SDKs verify it
with `client.webhooks.unwrap(body, headers, secret=...)`.
"""

import base64
import hashlib
import hmac
import ipaddress
import json
import logging
import random
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import httpx2
from sqlalchemy import Executable

from app.config import Settings
from app.core.errors import Invalid
from app.core.security import Caller
from app.schemas.run import Options
from app.services.changes import Rows
from app.services.execution import Job, Outcome
from app.services.new_run import new_run, run_rows
from app.services.outbound import MAX_PORT, PORTS, Allowed, OutboundRefused, is_public
from app.services.run_log import RunPaused

logger = logging.getLogger(__name__)

MAX_URL = 2048
TIMEOUT = httpx2.Timeout(20, connect=5)
DELAYS = (5, 30, 120, 600, 1800, 3600, 10800)  # seconds before the second try, the third, ...
GONE = 410  # the receiver wants no more

EVENTS = {"extraction": "extraction", "job": "extraction_job"}
"""What the ends of runs of a kind are called: `extraction.failed`. Others are told to nobody."""


def check_url(url: str, settings: Settings) -> None:
    """Raises Invalid for what cannot be called. Names that lead to private addresses are refused
    at delivery, when it is known where they lead."""
    schemes = ("https",) if settings.environment == "production" else ("https", "http")
    try:
        parsed = httpx2.URL(url)
    except (httpx2.InvalidURL, ValueError):  # ValueError: half of a surrogate pair
        raise _invalid("That is no URL.") from None
    if len(url) > MAX_URL:
        raise _invalid(f"A webhook's URL has at most {MAX_URL} characters.")
    if parsed.scheme not in schemes:
        raise _invalid(f"A webhook's URL begins with {' or '.join(f'{s}://' for s in schemes)}.")
    if not parsed.host or not 0 < (parsed.port or 1) <= MAX_PORT:
        raise _invalid("A webhook's URL names a host, and no port but an existing one.")
    if parsed.userinfo:
        raise _invalid("A webhook's URL has no credentials in it; verify the signature instead.")
    if not _is_reachable(parsed, settings):
        raise _invalid("A webhook's URL leads to a public address.")


def _is_reachable(url: httpx2.URL, settings: Settings) -> bool:
    try:
        address = ipaddress.ip_address(url.host)
    except ValueError:
        return True  # a name
    allowed = Allowed.of_users(settings)
    known = allowed.has_host(url.host, url.port or PORTS[url.scheme])
    return known or is_public(address) or allowed.has_address(address)


def _invalid(message: str) -> Invalid:
    return Invalid(message, code="invalid_webhook", param="webhook.url")


def secret_of(settings: Settings, user_id: int) -> str:
    """What the user verifies deliveries with. Derived, so stored nowhere; a new `SECRET_KEY`
    makes new ones."""
    key = hmac.digest(settings.signing_key(), f"webhook:{user_id}".encode(), "sha256")
    return f"whsec_{base64.b64encode(key).decode()}"


def sign(secret: str, event_id: str, body: str, timestamp: int) -> dict[str, str]:
    """The headers of one delivery; `timestamp` in seconds since 1970."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signed = hmac.digest(key, f"{event_id}.{timestamp}.{body}".encode(), hashlib.sha256)
    return {
        "webhook-id": event_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{base64.b64encode(signed).decode()}",
    }


def announcement(
    owner_id: int, scopes: str, url: str, event: str, data: Mapping[str, Any]
) -> tuple[Executable, dict[str, Any]]:
    """A row for the journal, to be committed with what it tells of: the queued delivery.

    event: such as `extraction.completed`. data: what the receiver looks it up by, `{id, status}`.
    """
    run_id = uuid.uuid4().hex
    body = {
        "id": f"evt_{run_id}",
        "object": "event",
        "type": event,
        "created_at": int(time.time()),
        "data": data,
    }
    options = Options(webhook=url, text=json.dumps(body), echo={"type": event})
    run = new_run(
        Caller.of(owner_id, scopes),
        id=run_id,
        turn_id=run_id,
        kind="webhook",
        program=event,
        status="queued",
        options=options.model_dump_json(exclude_defaults=True),
        token=0,
    )
    [row] = run_rows(run, [])
    return row


def announce(job: Job, outcome: Outcome) -> Rows:
    """For the journal, with the run's end, where it was asked for. A job says how far it came."""
    url, name = job.options.webhook, EVENTS.get(job.run.kind)
    if url is None or name is None:
        return ()
    of_job = job.run.kind == "job"  # a retried one has further drivers
    data: dict[str, Any] = {
        "id": (job.run.parent_id if of_job else None) or job.run.id,
        "status": outcome.status,
        **(outcome.output or {} if of_job else {}),
    }
    event = f"{name}.{outcome.status}"
    return [announcement(job.run.owner_id, job.run.scopes, url, event, data)]


class WebhookExecutor:
    """Delivers, at least once. Between two tries the run waits in the database, and any worker
    may go on with it: its log counts the tries.

    http: the guarded client. delays: seconds before each further try, of which up to a half is
    left to chance, so that receivers that were down are not met by all at once.
    """

    def __init__(
        self, http: httpx2.AsyncClient, settings: Settings, delays: Sequence[float] = DELAYS
    ) -> None:
        self._http = http
        self._settings = settings
        self._delays = delays

    async def __call__(self, job: Job) -> Outcome:
        failed = sum(isinstance(entry.event, RunPaused) for entry in job.log.entries)
        try:
            status = await self._post(job)
        except OutboundRefused:
            return _undelivered(job, "The webhook's address is not a public one.")
        except httpx2.HTTPError as error:
            status, said = 0, type(error).__name__
        else:
            said = f"status {status}"
        if 200 <= status < 300:
            return Outcome("completed", output={"tries": failed + 1, "status": status})
        if status == GONE or failed >= len(self._delays):
            return _undelivered(job, f"The webhook was not taken; the last try brought {said}.")
        return Outcome("waiting", wait=self._delays[failed] * random.uniform(0.5, 1))

    async def _post(self, job: Job) -> int:
        """The status of the answer, whose body nobody reads."""
        url = job.options.webhook
        assert url is not None
        body, event_id = job.options.text, f"evt_{job.run.id}"
        secret = secret_of(self._settings, job.run.owner_id)
        headers = {
            "Content-Type": "application/json",
            **sign(secret, event_id, body, int(time.time())),
        }
        async with self._http.stream(
            "POST",
            url,
            content=body.encode(),
            headers=headers,
            timeout=TIMEOUT,
            follow_redirects=False,
        ) as reply:
            return reply.status_code


def _undelivered(job: Job, message: str) -> Outcome:
    logger.warning("webhook %s: %s", job.run.id, message)
    return Outcome("failed", error={"code": "webhook_undelivered", "message": message})

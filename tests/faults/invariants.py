"""What must hold in the run log, whatever has happened to whoever wrote it."""

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

OPEN = ("queued", "running", "waiting")

Row = Any


async def violations(engine: AsyncEngine) -> list[str]:
    """A line for each promise that is broken; none where the log is as it should be."""
    async with engine.connect() as connection:

        async def rows(query: str) -> list[Row]:
            return list(await connection.execute(text(query)))

        runs = {row.id: row for row in await rows("SELECT * FROM runs")}
        events = await rows(NUMBERS.format("events"))
        ends = await rows("SELECT * FROM events WHERE body LIKE '%\"run.ended\"%'")
        found = [
            *_numbers("event", 1, events),
            *_ends(runs, ends, {row.run_id: row.last for row in events}),
            *_numbers("message", 0, await rows(NUMBERS.format("messages"))),
            *_answers(runs, await rows("SELECT * FROM messages ORDER BY run_id, seq")),
            *_held(runs, await rows("SELECT * FROM allowances")),
        ]
        if engine.dialect.name == "sqlite":
            found += [row[0] for row in await rows("PRAGMA integrity_check") if row[0] != "ok"]
            found += [f"foreign key: {row}" for row in await rows("PRAGMA foreign_key_check")]
    return found


NUMBERS = "SELECT run_id, count(*) count, min(seq) first, max(seq) last FROM {} GROUP BY run_id"


def _numbers(what: str, first: int, spans: list[Row]) -> Iterator[str]:
    """They are dense."""
    for span in spans:
        if (span.first, span.last) != (first, first + span.count - 1):
            yield f"{span.run_id}: {span.count} {what}s from {span.first} to {span.last}"


def _ends(runs: dict[str, Row], events: list[Row], last: dict[str, int]) -> Iterator[str]:
    """A run that has ended has one event that says so, as it was and as the last."""
    told = defaultdict[str, list[str]](list)
    for event in events:
        body = json.loads(event.body)
        if body.get("name") == "run.ended":
            told[event.run_id].append(body["status"])
            if event.seq != last[event.run_id]:
                yield f"{event.run_id}: goes on after its end"
    for run_id, run in runs.items():
        if told[run_id] != ([] if run.status in OPEN else [run.status]):
            yield f"{run_id}: is {run.status}, its log says {told[run_id]}"


def _answers(runs: dict[str, Row], messages: list[Row]) -> Iterator[str]:
    """Each call has its result, and a completed run of an agent's one final message."""
    own = defaultdict[str, list[Any]](list)
    for message in messages:
        own[message.run_id].append(json.loads(message.body))
    for run_id, said in own.items():
        run = runs[run_id]
        if run.status in OPEN or run.kind != "agent":
            continue
        parts = [part for message in said for part in message["parts"]]
        called = [part["tool_call_id"] for part in parts if part["part_kind"] == "tool-call"]
        answered = [
            part["tool_call_id"]
            for part in parts
            if part["part_kind"] in ("tool-return", "retry-prompt") and part.get("tool_name")
        ]
        if sorted(called) != sorted(answered) and run.finish_reason != "tool_call":
            yield f"{run_id}: is {run.status}, called {called}, answered {answered}"
        kinds = [message["kind"] for message in said]
        if run.status == "completed" and kinds != ["request", "response"] * (len(kinds) // 2):
            yield f"{run_id}: its messages are {kinds}"


def _held(runs: dict[str, Row], allowances: list[Row]) -> Iterator[str]:
    """Who has nothing going on holds nothing."""
    for run_id, run in runs.items():
        if run.status not in OPEN and (run.held_tokens or run.held_cost):
            yield f"{run_id}: has ended, and holds {run.held_tokens} tokens, {run.held_cost} USD"
    busy = {run.owner_id for run in runs.values() if run.status in OPEN}
    for row in allowances:
        if row.owner_id not in busy and (row.held_tokens or abs(row.held_cost) > 1e-9):
            yield f"owner {row.owner_id}: holds {row.held_tokens} tokens, {row.held_cost} USD"

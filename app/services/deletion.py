"""Deletes runs, so that nothing of them is left but what others go on from."""

import asyncio
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, and_, delete, exists, func, literal, select, true, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.orm import aliased

from app.models import Conversation, Event, Message, Run, ToolCall
from app.services.allowances import NOTHING, Amount, Move, lost, move

STAGE = 500  # items of a job in one transaction
FEW = 50  # other runs, with all that belongs to them
REST = 0.01  # seconds between two transactions, in which others write

KEYS = timedelta(days=1)  # for which a key holds whose run was deleted

FORGOTTEN = Run.deleted_at.is_not(None)

# Of a run that is forgotten, what the runs below it do not need: they are told its messages.
_EMPTY: dict[str, Any] = {
    "position": None,
    "message_id": None,
    "options": "{}",
    "output": None,
    "error": None,
    "cache_key": None,
}
# Nor what is left where nothing is kept of a run but its key. It gives up its id, so that a run
# which is to go on from it, and does not know yet, finds it gone.
_KEY_ALONE: dict[str, Any] = _EMPTY | {
    "id": literal("k") + func.substr(Run.id, 2),
    "conversation_id": None,
    "parent_id": None,
    "scopes": "",
    "usage": None,
    "transcript": None,
}


def keyed() -> ColumnElement[bool]:
    """Runs whose key still holds: sent again, it is to begin nothing anew."""
    young = Run.created_at > datetime.now(UTC) - KEYS
    return and_(Run.idempotency_key.is_not(None), young)


async def forget(connection: AsyncConnection, run_ids: Iterable[str]) -> None:
    """Deletes runs that have ended. Of one that others go on from only its messages stay, unseen,
    and go with the last of these; of one whose key still holds, the key."""
    ids = sorted(run_ids)
    await _lock(connection, ids)
    now = datetime.now(UTC)
    await connection.execute(update(Run).where(Run.id.in_(ids)).values(deleted_at=now, **_EMPTY))
    await connection.execute(delete(Event).where(Event.run_id.in_(ids)))
    await connection.execute(delete(ToolCall).where(ToolCall.run_id.in_(ids)))
    await prune(connection, ids)


async def prune(
    connection: AsyncConnection,
    run_ids: Iterable[str | None],
    which: ColumnElement[bool] = FORGOTTEN,
) -> None:
    """Deletes the runs of a kind (`which`) that no run goes on from, then those that they went on
    from likewise, up to the root. Keys that still hold stay, alone."""
    below = aliased(Run)
    childless = ~exists().where(below.parent_id == Run.id)
    ids = sorted(filter(None, run_ids))
    while ids:
        await _lock(connection, ids)
        rows = await connection.execute(
            select(Run.id, Run.parent_id, keyed().label("keyed"))
            .where(Run.id.in_(ids), which, childless)
            .order_by(Run.id)
        )
        found = rows.all()
        held = [row.id for row in found if row.keyed]
        if held:
            alone = {**_KEY_ALONE, "deleted_at": datetime.now(UTC)}
            for part in (Message, Event, ToolCall):
                await connection.execute(delete(part).where(part.run_id.in_(held)))
            await connection.execute(update(Run).where(Run.id.in_(held)).values(alone))
        others = [row.id for row in found if not row.keyed]
        await connection.execute(delete(Run).where(Run.id.in_(others)))
        ids = sorted({row.parent_id for row in found if row.parent_id})


async def _lock(connection: AsyncConnection, ids: list[str]) -> None:
    """A run that is just accepted below one of these is seen then, or sees that it is gone.

    In the order in which the journal locks them, so that neither waits for the other."""
    rows = select(Run.id).where(Run.id.in_(ids)).order_by(Run.id).with_for_update()
    await connection.execute(rows)


async def forget_conversation(connection: AsyncConnection, conversation_id: str) -> None:
    """Deletes a conversation with its runs, all of which have ended. What a run outside of it
    goes on from stays with that one, unseen."""
    inside = Run.conversation_id == conversation_id
    child = aliased(Run)
    rows = await connection.execute(
        select(Run.id, Run.parent_id).where(inside).order_by(Run.id).with_for_update()
    )
    parents = {row.id: row.parent_id for row in rows}
    used = await connection.scalars(
        select(Run.id)
        .join(child, child.parent_id == Run.id)
        .where(inside, child.conversation_id.is_distinct_from(conversation_id))
    )
    kept: set[str] = set()
    for run_id in used:
        above: str | None = run_id
        while above and above in parents and above not in kept:
            kept.add(above)
            above = parents[above]
    kept |= set(await connection.scalars(select(Run.id).where(inside, keyed())))
    if kept:
        await connection.execute(
            update(Run).where(Run.id.in_(kept)).values(conversation_id=None, position=None)
        )
        await forget(connection, kept)
    # Unlinked first: a database follows a chain of deletions only so far.
    await connection.execute(update(Run).where(inside).values(parent_id=None))
    await connection.execute(delete(Conversation).where(Conversation.id == conversation_id))
    outside = {each for each in parents.values() if each not in parents}
    await prune(connection, kept | outside)


async def discard_job(writes: AsyncEngine, job_id: str) -> None:
    """Deletes a job that nobody sees, a few items at a time: others write in between."""
    # The last first: one that is to end like another comes behind it, and is not deleted with it.
    items = select(Run.id).where(Run.batch_id == job_id).order_by(Run.position.desc()).limit(STAGE)
    columns = (Run.owner_id, Run.program, Run.held_tokens, Run.held_cost)
    while True:
        async with writes.begin() as connection:
            ids = sorted(await connection.scalars(items))
            await _lock(connection, ids)
            deleted = await connection.execute(
                delete(Run).where(Run.id.in_(ids)).returning(*columns)
            )
            rows = deleted.all()
            moves = {
                at: Move(
                    owner_id=row.owner_id,
                    held=NOTHING - Amount(row.held_tokens, row.held_cost),
                    spent=lost(row.program, Amount(row.held_tokens, row.held_cost)),
                )
                for at, row in enumerate(rows)
                if row.held_tokens  # it was being asked just now, and ends nowhere else
            }
            if moves:
                await connection.run_sync(move, moves)
            if not ids:
                await connection.execute(delete(Run).where(Run.parent_id == job_id))
                await prune(connection, [job_id], true())
                return
        await asyncio.sleep(REST)


async def empty(writes: AsyncEngine, owner_id: int) -> None:
    """Deletes all runs of an owner, a few at a time, whether they go on or not: whoever executes
    one learns that it is gone."""
    of_owner = Run.owner_id == owner_id
    async with writes.connect() as connection:
        jobs = select(Run.id).where(of_owner, Run.kind == "job", Run.parent_id.is_(None))
        ids = list(await connection.scalars(jobs))
    for job_id in ids:
        await discard_job(writes, job_id)
    while True:
        async with writes.begin() as connection:
            ids = list(await connection.scalars(select(Run.id).where(of_owner).limit(FEW)))
            if not ids:
                return
            below = Run.parent_id.in_(ids)
            await _lock(connection, [*ids, *await connection.scalars(select(Run.id).where(below))])
            # Unlinked first: a database follows a chain of deletions only so far.
            await connection.execute(update(Run).where(below).values(parent_id=None))
            await connection.execute(delete(Run).where(Run.id.in_(ids)))
        await asyncio.sleep(REST)

"""Which runs are free to be taken, and taking them, each by one process alone.

A job's items are no part of it: their job's driver takes them, for as long as there is one. What
is to be stopped and has none is ended by whoever looks first.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    CTE,
    String,
    and_,
    bindparam,
    case,
    exists,
    func,
    or_,
    select,
    text,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import aliased

from app.db.base import epoch_now
from app.models import Run
from app.models.run import OPEN
from app.services.allowances import LOCK as ALLOWANCES

TURNS = 100  # owners who are looked at in one round
STEPS = 20  # upwards, past runs that ended without their turn
LOCK = 0x7175657565  # who takes queued runs on PostgreSQL holds it: one at a time

# Literals, so that the partial index of what goes on serves.
QUEUED = "batch_id IS NULL AND status = 'queued'"

# From `turn` on, the next owner with queued runs, and after the last the first: each step is one
# look into the index, however many runs lie in between.
_OWNERS = """
WITH RECURSIVE owners(id) AS (
    SELECT coalesce(
        (SELECT min(owner_id) FROM runs {index} WHERE {queued} AND owner_id > :turn),
        (SELECT min(owner_id) FROM runs {index} WHERE {queued})
    )
    UNION
    SELECT coalesce(
        (SELECT min(owner_id) FROM runs {index} WHERE {queued} AND owner_id > owners.id),
        (SELECT min(owner_id) FROM runs {index} WHERE {queued})
    ) FROM owners WHERE owners.id IS NOT NULL
)
SELECT id FROM owners WHERE id IS NOT NULL LIMIT {turns}
"""

# What is to end before a run begins: its parent, or, where that ended without its turn (it was
# stopped, or nobody had decided), what that one waited for.
_BEHIND = """
WITH RECURSIVE above(id, parent_id, status, is_over, steps) AS (
    SELECT parent.id, parent.parent_id, parent.status, parent.usage <> '{{}}', 1
    FROM runs AS parent WHERE parent.id = {parent}
    UNION ALL
    SELECT parent.id, parent.parent_id, parent.status, parent.usage <> '{{}}', steps + 1
    FROM above JOIN runs AS parent ON parent.id = above.parent_id
    WHERE above.status NOT IN ({open}) AND above.is_over IS NOT TRUE AND steps < {steps}
)
SELECT id FROM above WHERE status IN ({statuses})
"""

# Of each of these owners the oldest; everybody's first, counting those that go on, come before
# anybody's second.
_NEXT = """
WITH turns AS (
    SELECT id, (
        SELECT count(*) FROM runs {index}
        WHERE batch_id IS NULL AND status = 'running' AND owner_id = users.id
    ) AS running
    FROM users WHERE id IN :owners
),
ranked AS (
    SELECT first.id, first.token, turns.id AS owner, turns.running,
        row_number() OVER (PARTITION BY turns.id ORDER BY first.created_at) AS place
    FROM turns {join} (
        SELECT {columns} FROM runs AS free {index}
        WHERE {queued} AND owner_id = turns.id
            AND (lease_until IS NULL OR lease_until <= {now})
            AND NOT EXISTS ({behind})
        ORDER BY created_at LIMIT :most
    ) {alias}
),
wanted AS (
    SELECT id, token FROM ranked WHERE running + place <= :owner_runs
    ORDER BY running + place, owner <= :turn, owner LIMIT :most
)
SELECT runs.id FROM runs JOIN wanted ON wanted.id = runs.id AND wanted.token = runs.token
WHERE runs.status = 'queued' {lock}
"""

_WORDS = {
    "sqlite": {
        "index": "INDEXED BY ix_runs_goes_on",
        "join": "JOIN runs AS first ON first.id IN",
        "columns": "id",
        "alias": "",
        "lock": "",
    },
    "postgresql": {
        "index": "",
        "join": "CROSS JOIN LATERAL",
        "columns": "id, token, created_at",
        "alias": "AS first",
        "lock": "FOR UPDATE OF runs SKIP LOCKED",
    },
}

# Its numbers of rows mislead the planner: what is read are a few entries of an index.
_TAKE_LOCK = select(
    func.set_config("enable_bitmapscan", "off", True),
    func.set_config("enable_seqscan", "off", True),
    func.pg_try_advisory_xact_lock(LOCK).label("taken"),
)


# Made once: to put such a statement together takes longer than to execute it. `workers` are dead;
# what nobody prolonged the lease of is left too.
_WORKERS = bindparam("workers", expanding=True, type_=String)
LEFT = and_(Run.status == "running", or_(Run.lease_until < epoch_now(), Run.worker.in_(_WORKERS)))
_job = aliased(Run)
_is_driven = exists().where(
    or_(_job.id == Run.batch_id, _job.parent_id == Run.batch_id),
    _job.kind == "job",
    _job.status.in_(("queued", "running")),
)
_is_single = or_(Run.batch_id.is_(None), and_(Run.cancelling, ~_is_driven))
_has_waited = and_(Run.status == "waiting", Run.lease_until < epoch_now())
_LEFT_OR_WAITED = and_(
    Run.status.in_(("running", "waiting")), or_(and_(LEFT, _is_single), _has_waited)
)
_LOOK = select(
    exists().where(_LEFT_OR_WAITED).label("left"),
    exists().select_from(Run).where(text(QUEUED)).label("queued"),
)


def behind(parent: str, statuses: Sequence[str] = ("queued", "running")) -> str:
    """SQL: the id, if there is one, of what is to end before the run begins whose parent's id is
    this expression. Of those that wait for a person, whoever begins is told."""
    return _BEHIND.format(
        parent=parent, steps=STEPS, open=_listed(OPEN), statuses=_listed(statuses)
    )


def _listed(words: Sequence[str]) -> str:
    return ", ".join(f"'{word}'" for word in words)


async def look(connection: AsyncConnection, workers: list[str]) -> tuple[bool, bool]:
    """Whether there may be something to take: of what was left or has waited, and of the queue."""
    row = (await connection.execute(_LOOK, {"workers": workers})).one()
    return row.left, row.queued


async def take_left(
    connection: AsyncConnection, workers: list[str], most: int, by: str, lease: float
) -> list[Run]:
    """Takes what these dead workers left, and what has waited long enough."""
    free = (
        select(Run.id)
        .where(_LEFT_OR_WAITED)
        .order_by(Run.created_at)
        .limit(most)
        .with_for_update(skip_locked=True)
        .cte("free")
    )
    return await _take(connection, free, by, lease, {"workers": workers})


async def take_queued(
    connection: AsyncConnection, turn: int, most: int, owner_runs: int, by: str, lease: float
) -> tuple[list[Run], int] | None:
    """Takes what is queued, in fair shares of the owners after `turn`: of each at most so many
    that `owner_runs` go on in all processes. With it comes the owner after whom the next look
    begins. None where another process is at it."""
    dialect = connection.dialect.name
    if dialect == "postgresql" and not (await connection.execute(_TAKE_LOCK)).one().taken:
        return None
    now = str(epoch_now().compile(dialect=connection.dialect))
    words = {"queued": QUEUED, "now": now, "turns": TURNS, **_WORDS[dialect]}
    words["behind"] = behind("free.parent_id")
    looked = text(_OWNERS.format(**words)).bindparams(turn=turn)
    owners = list(await connection.scalars(looked))
    if not owners:
        return [], turn
    if dialect == "postgresql":  # nobody accepts a run of theirs before these are counted
        await connection.execute(ALLOWANCES, {"owners": owners})
    which = text(_NEXT.format(**words)).bindparams(
        bindparam("owners", owners, expanding=True), turn=turn, most=most, owner_runs=owner_runs
    )
    taken = await _take(connection, which.columns(Run.id).cte("free"), by, lease)
    # Where there was room for more, nobody who was looked at has anything left to take.
    last = [run.owner_id for run in taken] if len(taken) == most else owners
    return taken, max(last, key=lambda owner: (owner <= turn, owner))


async def _take(
    connection: AsyncConnection,
    free: CTE,
    by: str,
    lease: float,
    given: dict[str, Any] | None = None,
) -> list[Run]:
    taken = await connection.execute(
        update(Run)
        .where(Run.id.in_(select(free.c.id)))
        .values(
            status="running",
            worker=by,
            token=Run.token + 1,
            lease_until=epoch_now() + lease,
            crashes=case((Run.status == "running", Run.crashes + 1), else_=Run.crashes),
        )
        .returning(*Run.__table__.c),
        given,
    )
    return sorted((Run(**row) for row in taken.mappings()), key=lambda run: run.created_at)

"""What owners may spend in a day and do at once: reserved before it is spent, settled after.

A change of the run log may come with a `Move` of its owner's allowance. The journal makes it in the
same transaction; where it goes beyond a limit, that one change is refused.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, Literal, get_args

from sqlalchemy import Connection, bindparam, case, func, select, text
from sqlalchemy.dialects import postgresql, sqlite

from app.config import Settings
from app.core.errors import Invalid, TooMany
from app.models import Allowance, Run, Usage
from app.services import prices

ANSWER = 4096  # tokens that an answer may take, where nobody says how many
SOON = 3  # seconds until a run may have ended
LONGEST_WAIT = 3600  # seconds that anybody is told to wait for the next day

Begins = Literal["running", "queued"]


@dataclass(frozen=True, slots=True)
class Amount:
    """Tokens, and US dollars as far as the model's price is known."""

    tokens: int = 0
    cost: float = 0.0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(self.tokens + other.tokens, self.cost + other.cost)

    def __sub__(self, other: "Amount") -> "Amount":
        return Amount(self.tokens - other.tokens, self.cost - other.cost)

    def exceeds(self, other: "Amount") -> bool:
        """In either of the two."""
        return self.tokens > other.tokens or self.cost > other.cost

    @classmethod
    def of(cls, model: str, input_tokens: int, output_tokens: int) -> "Amount":
        """What a request takes that has so many tokens."""
        cost = prices.cost(model, input_tokens, output_tokens)
        return cls(input_tokens + output_tokens, cost or 0.0)


NOTHING = Amount()


def answer_of(*settings: Mapping[str, Any]) -> int:
    """How many tokens an answer may take under these settings, of which the first count most."""
    return next((most for each in settings if (most := each.get("max_tokens"))), ANSWER)


@dataclass(kw_only=True, slots=True)
class Spent:
    """What requests to one model took."""

    requests: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0

    def add(self, other: "Spent") -> None:
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    @property
    def amount(self) -> Amount:
        return Amount(self.input_tokens + self.output_tokens, self.cost)


def lost(program: str, held: Amount) -> dict[tuple[str, str], Spent]:
    """What counts as spent where a process died at it: nobody knows what its provider counts."""
    if held == NOTHING:
        return {}
    return {(program, "unknown"): Spent(requests=1, input_tokens=held.tokens, cost=held.cost)}


class LimitReached(TooMany):
    """More than an owner may do at once, in a minute or in a day."""


@dataclass(slots=True)
class Standing:
    """How far an owner is today and in this minute."""

    spent: Amount = NOTHING
    held: Amount = NOTHING
    accepted: int = 0
    running: int = 0
    queued: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """What each owner may do."""

    rate: int
    running: int
    queued: int
    day: Amount

    @classmethod
    def of(cls, settings: Settings) -> "Limits":
        day = Amount(settings.owner_daily_tokens, settings.owner_daily_cost)
        return cls(settings.owner_rate, settings.owner_runs, settings.owner_queued, day)

    def refusal(self, now: Standing, begins: Begins | None, after: Amount) -> LimitReached | None:
        """Why the owner may not begin such a run, or be left with `after` spent and held."""
        if begins:
            if now.accepted >= self.rate:
                rest = 60 - int(time.time()) % 60
                return LimitReached(
                    f"At most {self.rate} runs are accepted in a minute; try again in {rest} "
                    "seconds.",
                    retry_after=rest,
                )
            if begins == "running" and now.running >= self.running:
                return LimitReached(
                    f"At most {self.running} runs go on at once; wait until one has ended, or ask "
                    "in the background, where requests wait their turn.",
                    retry_after=SOON,
                )
            if begins == "queued" and now.queued >= self.queued:
                return LimitReached(
                    f"At most {self.queued} runs wait at once; try again when some of them have "
                    "begun.",
                    retry_after=SOON,
                )
        taken = now.spent + now.held
        used_up = begins and (taken.tokens >= self.day.tokens or taken.cost >= self.day.cost)
        if used_up or after.exceeds(self.day):
            return self._used_up(taken, after - taken, accepts=begins is not None)
        return None

    def _used_up(self, taken: Amount, asked: Amount, *, accepts: bool) -> LimitReached:
        left, day = self.day - taken, self.day
        # Later on, `asked` is not one request's alone: what the last one took comes with it.
        never = accepts and asked.exceeds(day)
        if asked.tokens > day.tokens if never else left.tokens < max(asked.tokens, 1):
            setting, what = "OWNER_DAILY_TOKENS", f"{day.tokens} tokens"
            rest = f"{max(left.tokens, 0)} of them are left, and this may take {asked.tokens}"
        else:
            setting, what = "OWNER_DAILY_COST", f"{day.cost:g} US dollars"
            rest = f"{max(left.cost, 0):.4f} of them are left, and this may take {asked.cost:.4f}"
        way_out = "A new day begins at midnight UTC"
        if never:
            way_out = f"No day is enough for this: ask for a shorter answer, or raise {setting}"
        refused = LimitReached(
            f"At most {what} are for one day; {rest}. {way_out}.",
            code="insufficient_quota",
            status=Invalid.status if never else None,
            retry_after=min(_until_midnight(), LONGEST_WAIT),
        )
        if never:
            del refused.headers["Retry-After"]
        refused.headers["X-Should-Retry"] = "false"  # else OpenAI's SDKs would, at once
        return refused


def _until_midnight() -> int:
    now = datetime.now(UTC)
    midnight = (now + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
    return int((midnight - now).total_seconds()) + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """What a change does to its owner's allowance.

    held: what is held from now on, less what was held before.
    spent: by program and model.
    begins: the status of the run that is accepted with it.
    limits: refuse it where it goes beyond them; what was spent already is never refused.
    """

    owner_id: int
    held: Amount = NOTHING
    spent: Mapping[tuple[str, str], Spent] | None = None
    begins: Begins | None = None
    limits: Limits | None = None

    @property
    def took(self) -> Amount:
        return sum((each.amount for each in (self.spent or {}).values()), NOTHING)


LOCK = (
    select(Allowance)
    .where(Allowance.owner_id.in_(bindparam("owners", expanding=True)))
    .order_by(Allowance.owner_id)
    .with_for_update()
)
# After the rows are locked: then nobody else accepts a run of these owners any more. Spelled out,
# since a parameter would keep both databases from the index `ix_runs_goes_on`.
COUNTS: dict[Begins, Any] = {
    status: select(Run.owner_id, func.count().label("runs"))
    .where(
        Run.owner_id.in_(bindparam("owners", expanding=True)),
        text(f"batch_id IS NULL AND status = '{status}'"),
    )
    .group_by(Run.owner_id)
    for status in get_args(Begins)
}


def move(connection: Connection, moves: Mapping[int, Move]) -> dict[int, LimitReached]:
    """Makes the moves, in their order, in this transaction; those that are refused come back.

    Two statements where nothing is asked for, two more where something is, whatever their number.
    """
    today, minute = datetime.now(UTC).date().isoformat(), int(time.time() // 60)
    refused: dict[int, LimitReached] = {}
    if any(each.limits for each in moves.values()):
        owners = sorted({each.owner_id for each in moves.values()})
        refused = _refuse(_standings(connection, owners, moves.values(), today, minute), moves)
    made = [each for at, each in moves.items() if at not in refused]
    if made:
        _write(connection, made, today, minute)
    return refused


def _standings(
    connection: Connection, owners: Sequence[int], moves: Iterable[Move], today: str, minute: int
) -> dict[int, Standing]:
    """How far these owners are; nobody else moves them before this transaction ends."""
    rows = connection.execute(LOCK, {"owners": owners}).mappings().all()
    if len(rows) < len(owners):  # there is nothing to lock yet
        new = [{"owner_id": owner, "day": today, "minute": minute} for owner in owners]
        connection.execute(_statements(connection.dialect.name).create, new)
        rows = connection.execute(LOCK, {"owners": owners}).mappings().all()
    found: dict[int, Standing] = defaultdict(Standing)
    for row in rows:
        standing = found[row["owner_id"]]
        standing.held = Amount(row["held_tokens"], row["held_cost"])
        if row["day"] >= today:  # a clock may be a little behind the others
            standing.spent = Amount(row["tokens"], row["cost"])
        if row["minute"] >= minute:
            standing.accepted = row["accepted"]
    for status, count in COUNTS.items():
        if begin := sorted({each.owner_id for each in moves if each.begins == status}):
            for row in connection.execute(count, {"owners": begin}):
                setattr(found[row.owner_id], status, row.runs)
    return found


def _refuse(
    standings: Mapping[int, Standing], moves: Mapping[int, Move]
) -> dict[int, LimitReached]:
    refused: dict[int, LimitReached] = {}
    for at, each in sorted(moves.items(), key=lambda item: item[1].limits is not None):
        now = standings[each.owner_id]
        after = now.spent + now.held + each.held + each.took
        if each.limits and (refusal := each.limits.refusal(now, each.begins, after)):
            refused[at] = refusal
            continue
        now.spent, now.held = now.spent + each.took, now.held + each.held
        if each.begins:
            now.accepted += 1
            setattr(now, each.begins, getattr(now, each.begins) + 1)
    return refused


def _write(connection: Connection, moves: Iterable[Move], today: str, minute: int) -> None:
    held: dict[int, Amount] = defaultdict(Amount)
    spent: dict[tuple[int, str, str], Spent] = defaultdict(Spent)
    begun = Counter[int]()
    for each in moves:
        held[each.owner_id] += each.held
        begun[each.owner_id] += each.begins is not None
        for (program, model), took in (each.spent or {}).items():
            spent[each.owner_id, program, model].add(took)
    costs: dict[int, Amount] = defaultdict(Amount)
    for (owner_id, _, _), took in spent.items():
        costs[owner_id] += took.amount
    statements = _statements(connection.dialect.name)
    # In one order in all processes: else two could wait for each other.
    rows = [
        {
            "owner_id": owner_id,
            "day": today,
            "tokens": costs[owner_id].tokens,
            "cost": costs[owner_id].cost,
            "held_tokens": held[owner_id].tokens,
            "held_cost": held[owner_id].cost,
            "minute": minute,
            "accepted": begun[owner_id],
        }
        for owner_id in sorted(held)
    ]
    connection.execute(statements.add, rows)
    if spent:
        usage = [
            {"owner_id": owner_id, "day": today, "program": program, "model": model}
            | {each.name: getattr(took, each.name) for each in fields(took)}
            for (owner_id, program, model), took in sorted(spent.items(), key=lambda item: item[0])
        ]
        connection.execute(statements.note, usage)


@dataclass(frozen=True, slots=True)
class _Statements:
    """Those that each database spells in its own way. All of them add to what is there."""

    create: Any
    add: Any
    note: Any


@cache
def _statements(dialect: str) -> _Statements:
    insert: Any = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[dialect]
    add = insert(Allowance)
    had, new = Allowance.__table__.c, add.excluded
    counts = {"day": ("tokens", "cost"), "minute": ("accepted",)}
    changes: dict[str, Any] = {name: had[name] + new[name] for name in ("held_tokens", "held_cost")}
    for period, names in counts.items():
        goes_on = had[period] >= new[period]
        changes[period] = case((goes_on, had[period]), else_=new[period])
        for name in names:
            changes[name] = case((goes_on, had[name]), else_=0) + new[name]
    note = insert(Usage)
    used = Usage.__table__.c
    sums = {each.name: used[each.name] + note.excluded[each.name] for each in fields(Spent)}
    return _Statements(
        create=insert(Allowance).on_conflict_do_nothing(),
        add=add.on_conflict_do_update(index_elements=["owner_id"], set_=changes),
        note=note.on_conflict_do_update(
            index_elements=["owner_id", "day", "program", "model"], set_=sums
        ),
    )

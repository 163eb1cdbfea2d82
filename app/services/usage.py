"""What was spent, and what is left of today."""

from collections.abc import Collection
from dataclasses import fields
from datetime import UTC, date, datetime
from typing import Any

from sqlalchemy import ColumnElement, RowMapping, func, select
from sqlalchemy.ext.asyncio import AsyncEngine

from app.config import Settings
from app.db.session import reading
from app.models import Allowance, Usage
from app.services.allowances import NOTHING, Amount, Limits, Spent, Standing

COLUMNS: dict[str, ColumnElement[Any]] = {
    "day": Usage.__table__.c.day,
    "agent": Usage.__table__.c.program,
    "model": Usage.__table__.c.model,
}


class Usages:
    """Of all owners."""

    def __init__(self, engine: AsyncEngine, settings: Settings) -> None:
        self._reads = reading(engine)
        self.limits = Limits.of(settings)

    async def sums(
        self, owner_id: int, first: date, last: date, group_by: Collection[str]
    ) -> list[RowMapping]:
        """What the owner spent from the first day to the last, by the columns named."""
        groups = [column.label(name) for name, column in COLUMNS.items() if name in group_by]
        table = Usage.__table__.c
        sums = (func.sum(table[each.name]).label(each.name) for each in fields(Spent))
        days = Usage.day.between(first.isoformat(), last.isoformat())
        query = (
            select(*groups, *sums)
            .where(Usage.owner_id == owner_id, days)
            .group_by(*groups)
            .order_by(*groups)
        )
        async with self._reads.connect() as connection:
            rows = (await connection.execute(query)).mappings().all()
        return [row for row in rows if row["requests"] is not None]  # a sum of nothing

    async def today(self, owner_id: int) -> Standing:
        query = select(Allowance.__table__).where(Allowance.owner_id == owner_id)
        async with self._reads.connect() as connection:
            row = (await connection.execute(query)).mappings().one_or_none()
        if row is None:
            return Standing()
        is_today = row["day"] >= datetime.now(UTC).date().isoformat()
        spent = Amount(row["tokens"], row["cost"]) if is_today else NOTHING
        return Standing(spent, Amount(row["held_tokens"], row["held_cost"]))

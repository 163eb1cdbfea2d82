"""What was spent, by day, agent and model, and what is left of today."""

from datetime import UTC, date, datetime, time, timedelta
from itertools import groupby
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from pydantic import Field

from app.api.deps import CallerDep
from app.core.errors import Forbidden, Invalid
from app.schemas.usage import (
    Dollars,
    GroupBy,
    ShownAllowance,
    ShownUsage,
    Tokens,
    UsageBucket,
    UsageResult,
)
from app.services.allowances import Limits, Standing
from app.services.usage import Usages
from app.services.user import MAX_ID

DAYS = 30  # that are shown where nobody says which
MOST_DAYS = 366

router = APIRouter(prefix="/v1/usage", tags=["usage"])


async def get_usages(request: Request) -> Usages:
    return request.app.state.usages


UsagesDep = Annotated[Usages, Depends(get_usages)]
Day = Annotated[date, Field(ge=date(2000, 1, 1), lt=date(3000, 1, 1))]


@router.get("")
async def usage(
    caller: CallerDep,
    usages: UsagesDep,
    start_date: Day | None = None,
    end_date: Day | None = None,
    group_by: Annotated[list[GroupBy] | None, Query()] = None,
    owner_id: Annotated[int | None, Query(ge=1, le=MAX_ID)] = None,
) -> ShownUsage:
    """From `start_date` to `end_date`, both included and in UTC: by default the last 30 days.

    Without `day` in `group_by` there is one bucket for them all. `owner_id` is for administrators.
    """
    last = end_date or max(datetime.now(UTC).date(), start_date or date.min)
    first = start_date or last - timedelta(days=DAYS - 1)
    if not 0 <= (last - first).days < MOST_DAYS:
        raise Invalid(
            f"{first} to {last} is no range of at most {MOST_DAYS} days.", param="start_date"
        )
    if owner_id is not None and owner_id != caller.user_id and not caller.is_admin:
        raise Forbidden("Only an administrator may see what others have spent.")
    owner = caller.user_id if owner_id is None else owner_id
    groups = set(group_by or ("day",))
    rows = await usages.sums(owner, first, last, groups)
    buckets = (
        [
            _bucket(date.fromisoformat(day), date.fromisoformat(day), list(each))
            for day, each in groupby(rows, lambda row: row["day"])
        ]
        if "day" in groups
        else [_bucket(first, last, rows)]
    )
    return ShownUsage(data=buckets, allowance=_allowance(usages.limits, await usages.today(owner)))


def _bucket(first: date, last: date, rows: list[Any]) -> UsageBucket:
    return UsageBucket(
        start_time=_midnight(first),
        end_time=_midnight(last + timedelta(days=1)),
        results=[
            UsageResult(
                agent=row.get("agent"),
                model=row.get("model"),
                num_model_requests=row["requests"],
                input_tokens=row["input_tokens"],
                input_cached_tokens=row["cached_tokens"],
                output_tokens=row["output_tokens"],
                cost=round(row["cost"], 10),
            )
            for row in rows
        ],
    )


def _midnight(day: date) -> int:
    return int(datetime.combine(day, time(), UTC).timestamp())


def _allowance(limits: Limits, now: Standing) -> ShownAllowance:
    left = limits.day - now.spent - now.held
    return ShownAllowance(
        day=datetime.now(UTC).date(),
        tokens=Tokens(
            limit=limits.day.tokens,
            spent=now.spent.tokens,
            held=now.held.tokens,
            left=max(left.tokens, 0),
        ),
        cost=Dollars(
            limit=limits.day.cost,
            spent=round(now.spent.cost, 10),
            held=round(max(now.held.cost, 0), 10),
            left=round(max(left.cost, 0), 10),
        ),
    )

"""What a transaction of the journal can change of runs, and in which order."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    Executable,
    Float,
    String,
    Text,
    bindparam,
    case,
    cast,
    func,
    insert,
    select,
    update,
)

from app.db.base import epoch_now
from app.models import Conversation, Event, Message, Run, ToolCall

INSERT_CONVERSATION = insert(Conversation)
# The lease runs by the database's clock; a queued run has none.
INSERT_RUN = insert(Run).values(lease_until=epoch_now() + bindparam("lease_seconds", type_=Float))
INSERT_MESSAGE = insert(Message)
INSERT_EVENT = insert(Event)
INSERT_CALL = insert(ToolCall)
SETTLE_CALL = (
    update(ToolCall)
    .where(
        ToolCall.run_id == bindparam("of_run"),
        ToolCall.step == bindparam("of_step"),
        ToolCall.call_id == bindparam("of_call"),
    )
    .values(status=bindparam("now"), result=bindparam("outcome"))
    .execution_options(synchronize_session=None)
)
_END: dict[str, Any] = {
    "status": bindparam("now"),
    "output": bindparam("output"),
    "error": bindparam("error"),
    "usage": bindparam("usage"),
    "finish_reason": bindparam("finish_reason"),
    "finished_at": bindparam("at"),
}
_HOLDS_NOTHING: dict[str, Any] = {"held_tokens": 0, "held_cost": 0.0}
END_RUN = (
    update(Run)
    .where(Run.id == bindparam("of_run"))
    .values(
        **_END,
        **_HOLDS_NOTHING,
        transcript=bindparam("transcript"),
        worker=None,
        lease_until=None,
    )
    .execution_options(synchronize_session=None)
)
_IDLE = (Run.status == "queued") | (Run.status == "waiting")
# What nobody executes is left for whoever looks first, to end it.
CANCEL_RUN = (
    update(Run)
    .where(Run.id == bindparam("of_run"), _IDLE | (Run.status == "running"))
    .values(
        cancelling=True,
        status=case((_IDLE, "running"), else_=Run.status),
        lease_until=case((_IDLE, 0.0), else_=Run.lease_until),
    )
    .execution_options(synchronize_session=None)
)
PROGRESS = update(Run).where(Run.id == bindparam("of_run")).values(crashes=0)
HOLD = (
    update(Run)
    .where(Run.id == bindparam("of_run"))
    .values(held_tokens=bindparam("hold_tokens"), held_cost=bindparam("hold_cost"))
    .execution_options(synchronize_session=None)
)
PAUSE_RUN = (
    update(Run)
    .where(Run.id == bindparam("of_run"))
    .values(
        **_HOLDS_NOTHING,
        status="waiting",
        worker=None,
        lease_until=epoch_now() + bindparam("wait_seconds", type_=Float),
    )
    .execution_options(synchronize_session=None)
)
# What is to stop waits for no turn: it is left for whoever looks first, to end it.
REQUEUE_RUN = (
    update(Run)
    .where(Run.id == bindparam("of_run"))
    .values(
        **_HOLDS_NOTHING,
        status=case((Run.cancelling, "running"), else_="queued"),
        worker=None,
        lease_until=case((Run.cancelling, 0.0), else_=None),
    )
    .execution_options(synchronize_session=None)
)
# Of a job. What a driver claims is fenced by the driver's own token, so nobody else does.
OPEN_JOB = (
    update(Run)
    .where(Run.id == bindparam("of_run"), Run.status == "accepting")
    .values(
        status="queued",
        program=bindparam("program"),
        options=bindparam("options"),
        idempotency_key=bindparam("idempotency_key"),
        fingerprint=bindparam("fingerprint"),
    )
    .execution_options(synchronize_session=None)
)
CLAIM_ITEM = (
    update(Run)
    .where(
        Run.id == bindparam("of_run"),
        Run.token == bindparam("old_token"),
        (Run.status == "queued") | (Run.status == "running"),
    )
    .values(
        status="running",
        worker=bindparam("by"),
        token=Run.token + 1,
        lease_until=epoch_now() + bindparam("lease_seconds", type_=Float),
        crashes=case((Run.status == "running", Run.crashes + 1), else_=Run.crashes),
        cache_key=bindparam("key"),
        held_tokens=bindparam("hold_tokens"),
        held_cost=bindparam("hold_cost"),
    )
    .execution_options(synchronize_session=None)
)
NOTE_USAGE = (
    update(Run)
    .where(Run.id == bindparam("of_run"))
    .values(usage=bindparam("usage"), crashes=0)
    .execution_options(synchronize_session=None)
)
NEXT_SEQ = (
    select(func.coalesce(func.max(Event.seq), 0) + 1)
    .where(Event.run_id == Run.id)
    .correlate(Run)
    .scalar_subquery()
)
# The same items as one that has ended: they end with it.
_IS_TWIN = (
    (Run.parent_id == bindparam("of_run", type_=String))
    & (Run.batch_id == bindparam("of_job", type_=String))
    & (Run.status == "queued")
)
LOG_TWINS = insert(Event).from_select(
    ["run_id", "seq", "body"],
    select(Run.id, NEXT_SEQ, cast(bindparam("body"), Text)).where(_IS_TWIN),
)
END_TWINS = update(Run).where(_IS_TWIN).values(**_END).execution_options(synchronize_session=None)
# Parents before children; within one transaction the rows of a statement go out together.
ORDER: tuple[Executable, ...] = (
    INSERT_CONVERSATION,
    INSERT_RUN,
    INSERT_MESSAGE,
    INSERT_CALL,
    SETTLE_CALL,
    INSERT_EVENT,
    PROGRESS,
    HOLD,
    PAUSE_RUN,
    REQUEUE_RUN,
    OPEN_JOB,
    CLAIM_ITEM,
    NOTE_USAGE,
    LOG_TWINS,
    END_TWINS,
    END_RUN,
    CANCEL_RUN,
)

Rows = Sequence[tuple[Executable, dict[str, Any]]]
"""Statements, each with its values: of `ORDER`, or what the journal has of its own."""

from datetime import datetime

from sqlalchemy import BigInteger, ForeignKey, Index, String, Text, false, func, text
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Base, UtcDateTime

OPEN = ("queued", "running", "waiting")  # statuses of a run that has not ended

# Of an owner's runs, those that count against what may go on at once.
_GOES_ON = text("batch_id IS NULL AND (status = 'queued' OR status = 'running')")


class Run(Base):
    """One durable execution: of an agent, of an extraction schema, of a job of extractions, ...

    `status` is `queued`, `running` or `waiting` (for an approval), then exactly one of
    `completed`, `failed`, `cancelled`, `incomplete`. `options`, `output`, `error` and `usage`
    are JSON.
    """

    __tablename__ = "runs"
    __table_args__ = (
        Index("ix_runs_owner", "owner_id", "created_at"),
        Index("ix_runs_conversation", "conversation_id", "position", unique=True),
        Index("ix_runs_parent", "parent_id"),
        Index("ix_runs_open", "status", "created_at"),
        Index("ix_runs_transcript", "owner_id", "transcript"),
        Index("ix_runs_idempotency", "owner_id", "idempotency_key", unique=True),
        Index("ix_runs_batch", "batch_id", "position", unique=True),
        Index("ix_runs_batch_status", "batch_id", "status", "position"),
        Index("ix_runs_cache", "owner_id", "cache_key"),
        Index("ix_runs_finished", "finished_at"),
        Index(
            "ix_runs_goes_on",
            "owner_id",
            "status",
            "created_at",
            sqlite_where=_GOES_ON,
            postgresql_where=_GOES_ON,
        ),
    )

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    owner_id: Mapped[int] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    conversation_id: Mapped[str | None] = mapped_column(
        ForeignKey("conversations.id", ondelete="CASCADE")
    )  # only of runs whose frontend names its chats: `parent_id` is the history
    # The job that the run is an item of; its items are executed on the job's behalf alone.
    batch_id: Mapped[str | None] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"))
    # In its conversation or job, from 1; two at once cannot both have it.
    position: Mapped[int | None]
    parent_id: Mapped[str | None] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"))
    # The run that the user's prompt began; results of the client's own functions go on with it.
    turn_id: Mapped[str] = mapped_column(String(32))
    message_id: Mapped[str | None] = mapped_column(String(255))  # the client's id of the prompt
    # "agent", "extraction", "job", "evaluation" or "webhook": which executor
    kind: Mapped[str] = mapped_column(String(16))
    program: Mapped[str] = mapped_column(String(100))  # the agent's or the schema's name
    scopes: Mapped[str] = mapped_column(String(1000))  # what the caller may do
    status: Mapped[str] = mapped_column(String(16))
    options: Mapped[str] = mapped_column(Text)

    worker: Mapped[str | None] = mapped_column(String(100))
    token: Mapped[int] = mapped_column(
        default=0, server_default="0"
    )  # fences off whoever lost the lease
    # Seconds since 1970, by the database's clock; while the run waits, the end of the wait; while
    # it is queued, the time before which nobody begins it, if there is one.
    lease_until: Mapped[float | None]
    crashes: Mapped[int] = mapped_column(
        default=0, server_default="0"
    )  # lost leases since the last progress
    cancelling: Mapped[bool] = mapped_column(default=False, server_default=false())

    # Of its owner's allowance, for model requests that are being answered: tokens and US dollars.
    held_tokens: Mapped[int] = mapped_column(BigInteger, default=0, server_default=text("0"))
    held_cost: Mapped[float] = mapped_column(default=0.0, server_default=text("0"))

    output: Mapped[str | None] = mapped_column(Text)
    error: Mapped[str | None] = mapped_column(Text)
    usage: Mapped[str | None] = mapped_column(Text)
    finish_reason: Mapped[str | None] = mapped_column(String(32))
    cache_key: Mapped[str | None] = mapped_column(String(64))  # equal for equal extractions
    transcript: Mapped[str | None] = mapped_column(String(64))  # digest of all visible turns
    idempotency_key: Mapped[str | None] = mapped_column(String(64))
    fingerprint: Mapped[str | None] = mapped_column(String(64))

    created_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=func.now())
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    deleted_at: Mapped[datetime | None] = mapped_column(UtcDateTime)

from datetime import datetime

from sqlalchemy import ForeignKey, Index, String, Text, false, func
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Base, UtcDateTime


class Schedule(Base):
    """A request that begins a run at a time, once or again and again.

    `request` is the JSON of what it asks for; `cron` five fields in `timezone`, or None where it
    begins once. `next_at` is in seconds since 1970, None where nothing is to come.
    """

    __tablename__ = "schedules"
    __table_args__ = (
        Index("ix_schedules_next", "next_at"),
        Index("ix_schedules_owner", "owner_id", "created_at"),
    )

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    owner_id: Mapped[int] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    scopes: Mapped[str] = mapped_column(String(1000))  # what its runs may do
    program: Mapped[str] = mapped_column(String(100))
    request: Mapped[str] = mapped_column(Text)
    cron: Mapped[str | None] = mapped_column(String(100))
    timezone: Mapped[str] = mapped_column(String(64))
    next_at: Mapped[float | None]
    paused: Mapped[bool] = mapped_column(default=False, server_default=false())
    last_run_id: Mapped[str | None] = mapped_column(String(32))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=func.now())

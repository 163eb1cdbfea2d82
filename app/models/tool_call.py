from sqlalchemy import ForeignKey, Index, String, Text, false, text
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Base

_UNKNOWN = text("status = 'unknown'")


class ToolCall(Base):
    """What became of one tool call: committed before it is made, and again with its result.

    `status` is `asked`, then `approved` or `denied`, where a person has to agree; `started`; then
    `done`, `retry` (the model was told to call better), `failed` or `unknown` (the process died
    between the call and its result).
    """

    __tablename__ = "tool_calls"
    __table_args__ = (
        Index("ix_tool_calls_key", "key"),
        Index("ix_tool_calls_unknown", "run_id", sqlite_where=_UNKNOWN, postgresql_where=_UNKNOWN),
    )

    run_id: Mapped[str] = mapped_column(
        String(32), ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True
    )
    step: Mapped[int] = mapped_column(primary_key=True)  # number of the message that asked for it
    call_id: Mapped[str] = mapped_column(Text, primary_key=True)
    tool: Mapped[str] = mapped_column(String(100))
    key: Mapped[str] = mapped_column(String(64))  # the idempotency key that the tool sees
    status: Mapped[str] = mapped_column(String(16))
    # Somebody was asked, and has answered.
    decided: Mapped[bool] = mapped_column(default=False, server_default=false())
    result: Mapped[str | None] = mapped_column(Text)

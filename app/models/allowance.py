from sqlalchemy import BigInteger, ForeignKey, String, text
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Base


class Allowance(Base):
    """What one owner has spent today, holds for what goes on, and has asked for this minute.

    One row each, changed by single conditional statements, so that no two processes can both
    take what is left. `tokens` and `cost` (US dollars) count for `day` (ISO, UTC) alone; what is
    held goes over into the next. `accepted` counts for `minute` (since 1970) alone.
    """

    __tablename__ = "allowances"

    owner_id: Mapped[int] = mapped_column(
        ForeignKey("users.id", ondelete="CASCADE"), primary_key=True
    )
    day: Mapped[str] = mapped_column(String(10))
    tokens: Mapped[int] = mapped_column(BigInteger, default=0, server_default=text("0"))
    cost: Mapped[float] = mapped_column(default=0.0, server_default=text("0"))
    held_tokens: Mapped[int] = mapped_column(BigInteger, default=0, server_default=text("0"))
    held_cost: Mapped[float] = mapped_column(default=0.0, server_default=text("0"))
    minute: Mapped[int] = mapped_column(default=0, server_default="0")
    accepted: Mapped[int] = mapped_column(default=0, server_default="0")

from datetime import datetime

from sqlalchemy import ForeignKey, Index, String, Text, func
from sqlalchemy.orm import Mapped, mapped_column

from app.db.base import Base, UtcDateTime


class Conversation(Base):
    """A chat as its frontend knows it: one owner's tree of runs under the frontend's own id.

    `labels` is JSON: what OpenAI's Conversations call metadata.
    """

    __tablename__ = "conversations"
    __table_args__ = (Index("ix_conversations_external", "owner_id", "external_id", unique=True),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    owner_id: Mapped[int] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    external_id: Mapped[str] = mapped_column(String(255))
    labels: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=func.now())

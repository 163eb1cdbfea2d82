"""OpenAI's Conversations: what is sent, and what is shown."""

import json
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from app.models import Conversation
from app.schemas.chat import Asking
from app.schemas.response import InputMessage, Metadata

Items = Annotated[list[InputMessage], Field(max_length=20)]


class ConversationCreate(Asking):
    items: Items = []
    metadata: Metadata = {}


class ConversationUpdate(Asking):
    metadata: Metadata = {}


class ItemsCreate(Asking):
    items: Annotated[Items, Field(min_length=1)]


class ConversationObject(BaseModel):
    """`id` is the name by which its frontend knows the conversation."""

    id: str
    object: Literal["conversation"] = "conversation"
    created_at: int
    metadata: dict[str, str]

    @classmethod
    def of(cls, conversation: Conversation) -> "ConversationObject":
        return cls(
            id=conversation.external_id,
            created_at=int(conversation.created_at.timestamp()),
            metadata=json.loads(conversation.labels or "{}"),
        )


class ConversationDeleted(BaseModel):
    id: str
    object: Literal["conversation.deleted"] = "conversation.deleted"
    deleted: bool = True

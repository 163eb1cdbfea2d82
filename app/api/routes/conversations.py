"""OpenAI Conversations: any chat of the caller's, whichever frontend began it, as items."""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic_ai.messages import (
    ModelMessage,
    ModelRequest,
    ModelResponse,
    SystemPromptPart,
    TextPart,
    UserPromptPart,
)

from app.api.deps import CallerDep, ConversationsDep, RunsDep, SettingsDep
from app.api.inputs import text_alone
from app.api.items import (
    IncludeDep,
    Limit,
    Order,
    given,
    history_for_page,
    history_of,
    page,
    place_of,
    run_of,
    shown,
)
from app.api.responses import Json
from app.core.errors import NotFound
from app.core.security import Caller
from app.schemas.conversation import (
    ConversationCreate,
    ConversationDeleted,
    ConversationObject,
    ConversationUpdate,
    ItemsCreate,
)
from app.schemas.response import InputMessage
from app.services.conversation import ELSEWHERE
from app.services.conversations import Conversations
from app.services.runs import Runs

router = APIRouter(
    prefix="/v1/conversations",
    tags=["conversations"],
    responses={code: {"description": HTTPStatus(code).phrase} for code in (400, 401, 404, 409)},
)


class ItemNotFound(NotFound):
    """No such item in this conversation."""

    code = "item_not_found"


@router.post("")
async def create_conversation(
    body: ConversationCreate,
    caller: CallerDep,
    conversations: ConversationsDep,
    runs: RunsDep,
    settings: SettingsDep,
) -> ConversationObject:
    messages = _messages(body.items)
    made = await conversations.create(caller, body.metadata)
    if messages:
        await runs.note(caller, made.external_id, settings.default_agent, messages)
    return ConversationObject.of(made)


@router.get("/{conversation_id}")
async def get_conversation(
    conversation_id: str, caller: CallerDep, conversations: ConversationsDep
) -> ConversationObject:
    return ConversationObject.of(await conversations.get(caller, conversation_id))


@router.post("/{conversation_id}")
async def update_conversation(
    conversation_id: str,
    body: ConversationUpdate,
    caller: CallerDep,
    conversations: ConversationsDep,
) -> ConversationObject:
    """Replaces the metadata."""
    return ConversationObject.of(await conversations.label(caller, conversation_id, body.metadata))


@router.delete("/{conversation_id}")
async def delete_conversation(
    conversation_id: str, caller: CallerDep, conversations: ConversationsDep
) -> ConversationDeleted:
    """Stops what goes on in the conversation, and forgets it with all its responses."""
    await conversations.delete(caller, conversation_id)
    return ConversationDeleted(id=conversation_id)


@router.post("/{conversation_id}/items")
async def create_items(
    conversation_id: str,
    body: ItemsCreate,
    caller: CallerDep,
    conversations: ConversationsDep,
    runs: RunsDep,
    settings: SettingsDep,
    include: IncludeDep,
) -> Json:
    """Adds messages that nobody answers; an assistant's are text, and nothing in it acts."""
    messages = _messages(body.items)
    await conversations.get(caller, conversation_id)
    run = await runs.note(caller, conversation_id, settings.default_agent, messages)
    return page(given(run, messages), "asc", len(messages), None)


@router.get("/{conversation_id}/items")
async def list_items(
    conversation_id: str,
    caller: CallerDep,
    conversations: ConversationsDep,
    runs: RunsDep,
    include: IncludeDep,
    order: Order = "desc",
    limit: Limit = 20,
    after: Annotated[str | None, Query(max_length=255)] = None,
) -> Json:
    """The items of the newest branch."""
    await conversations.get(caller, conversation_id)
    newest = await runs.newest(caller, conversation_id)
    if newest is None:
        return page([], order, limit, after)
    items = await history_for_page(newest, caller, runs, conversations, order, limit, after)
    return page(shown(items, include), order, limit, after)


@router.get("/{conversation_id}/items/{item_id}")
async def get_item(
    conversation_id: str,
    item_id: str,
    caller: CallerDep,
    conversations: ConversationsDep,
    runs: RunsDep,
    include: IncludeDep,
) -> Json:
    item = await _item(item_id, conversation_id, caller, conversations, runs)
    return shown([item], include)[0]


@router.delete("/{conversation_id}/items/{item_id}")
async def delete_item(
    conversation_id: str,
    item_id: str,
    caller: CallerDep,
    conversations: ConversationsDep,
    runs: RunsDep,
) -> ConversationObject:
    """Takes back a message that was added. What is part of a response goes only with it."""
    conversation = await conversations.get(caller, conversation_id)
    await _item(item_id, conversation_id, caller, conversations, runs)
    run = await runs.get(caller, run_of(item_id) or "")
    await conversations.blank(run, place_of(item_id))
    return ConversationObject.of(conversation)


async def _item(
    item_id: str, name: str, caller: Caller, conversations: Conversations, runs: Runs
) -> Json:
    """Raises ItemNotFound where it is not on the newest branch."""
    await conversations.get(caller, name)
    newest = await runs.newest(caller, name)
    run_id = run_of(item_id)
    ids = [run_id] if run_id else None  # not each id says of which run it is
    found = await history_of(newest, caller, runs, conversations, ids) if newest else []
    for item in found:
        if item["id"] == item_id:
            return item
    raise ItemNotFound(f"No item {item_id[:80]!r} in this conversation.")


def _messages(items: Sequence[InputMessage]) -> list[ModelMessage]:
    """What was said elsewhere: nothing in it can act here."""
    messages: list[ModelMessage] = []
    for item in items:
        text = text_alone(item.content, "items")
        match item.role:
            case "user":
                messages.append(ModelRequest([UserPromptPart(text)]))
            case "assistant":
                messages.append(ModelResponse([TextPart(text)], model_name=ELSEWHERE))
            case "system" | "developer":
                messages.append(ModelRequest([SystemPromptPart(text)]))
    return messages

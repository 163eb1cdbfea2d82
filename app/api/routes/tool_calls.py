"""Tool calls: what became of each, and the owner's word where nobody knows."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request

from app.api.deps import CallerDep
from app.api.responses import response_id
from app.schemas.tool_call import Done, Settlement, ShownToolCall, Status, ToolCallList
from app.services.ledger import load_result
from app.services.tool_calls import Listed, ToolCalls

router = APIRouter(prefix="/v1/tool_calls", tags=["tool calls"])


async def get_tool_calls(request: Request) -> ToolCalls:
    return request.app.state.tool_calls


ToolCallsDep = Annotated[ToolCalls, Depends(get_tool_calls)]


@router.get("")
async def list_tool_calls(
    caller: CallerDep,
    calls: ToolCallsDep,
    status: Status | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(max_length=64, description="The last key seen.")] = None,
) -> ToolCallList:
    """Your agents' calls, those of the newest runs first. Calls that only read are known once they
    are done."""
    found = await calls.list(caller, status=status, after=after, limit=limit + 1)
    return ToolCallList(data=[_shown(each) for each in found[:limit]], has_more=len(found) > limit)


@router.get("/{key}")
async def get_tool_call(key: str, caller: CallerDep, calls: ToolCallsDep) -> ShownToolCall:
    return _shown(await calls.get(caller, key))


@router.post("/{key}/settle")
async def settle_tool_call(
    key: str, body: Settlement, caller: CallerDep, calls: ToolCallsDep
) -> ShownToolCall:
    """Says what became of a call whose outcome is unknown, or makes it again under its
    idempotency key. Later turns of the conversation know it."""
    if isinstance(body, Done):
        return _shown(await calls.settle(caller, key, body.result))
    return _shown(await calls.retry(caller, key))


def _shown(found: Listed) -> ShownToolCall:
    call = found.call
    return ShownToolCall.model_validate(
        {
            "key": call.key,
            "created_at": int(found.asked_at.timestamp()),
            "tool": call.tool,
            "arguments": found.arguments,
            "status": call.status,
            "result": load_result(call),
            "agent": found.agent,
            "run_id": call.run_id,
            "run_status": found.run_status,
            "response_id": response_id(call.run_id),
            "conversation": found.conversation,
        }
    )

"""What is here: agents and tools, as developers and frontends want to see them."""

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel
from pydantic_ai import Tool

from agents import Listed, all_agents
from app.api.deps import CallerDep
from app.deps import Deps
from tools import Effect, all_tools, declared

router = APIRouter(prefix="/v1", tags=["agents"])


class AgentCard(BaseModel):
    """An agent, as it may be named as `model`."""

    name: str
    description: str
    tools: list[str]
    output_schema: dict[str, Any] | None


class ToolCard(BaseModel):
    """A tool, with what a second call would do and what a caller needs."""

    name: str
    description: str
    effect: Effect
    needs: str | None
    approve: bool
    parameters: dict[str, Any]


@router.get("/agents")
async def list_agents(caller: CallerDep) -> list[AgentCard]:
    return [_agent_card(listed) for listed in all_agents().values()]


@router.get("/tools")
async def list_tools(caller: CallerDep) -> list[ToolCard]:
    return [_tool_card(item) for item in all_tools().values()]


def _agent_card(listed: Listed) -> AgentCard:
    agent = listed.agent
    return AgentCard(
        name=listed.name,
        description=listed.description,
        tools=list(listed.tools),
        output_schema=None if agent.output_type is str else agent.output_json_schema(),
    )


def _tool_card(item: Tool[Deps]) -> ToolCard:
    definition = item.tool_def
    says = declared(definition)
    return ToolCard(
        name=item.name,
        description=definition.description or "",
        effect=says.effect,
        needs=says.needs,
        approve=says.approve,
        parameters=definition.parameters_json_schema,
    )

"""Plans on a board that the frontend shows, and pays once you have agreed."""

from pydantic_ai import Agent
from tools.board import pay, plan, replan  # pyright: ignore[reportMissingImports]

from app.deps import Deps
from tools.weather import get_weather

agent = Agent(
    name="planner",
    deps_type=Deps,
    instructions="Plan.",
    tools=[pay, plan, replan, get_weather],
)

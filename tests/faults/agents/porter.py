"""Runs errands with one tool of each effect."""

from pydantic_ai import Agent

from app.deps import Deps
from tools import all_tools

agent = Agent(
    name="porter",
    deps_type=Deps,
    instructions="Run errands.",
    tools=[item for item in all_tools().values() if item.function.__module__ == "tools.errands"],
)

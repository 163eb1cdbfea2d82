"""Has the tools of the tests."""

from pydantic_ai import Agent

from agents.weather import weather_agent as _borrowed
from app.deps import Deps
from tools import all_tools

agent = Agent(
    name="tester",
    deps_type=Deps,
    instructions="Test.",
    tools=[item for item in all_tools().values() if item.function.__module__ == "tools.trial"],
)

assert _borrowed is not agent

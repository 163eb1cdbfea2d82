"""Answers in plain text, with every tool that you may use."""

from pydantic_ai import Agent

from agents import prompt
from app.deps import Deps
from tools import all_tools

agent = Agent(
    name="assistant",
    deps_type=Deps,
    instructions=prompt("assistant"),
    tools=list(all_tools().values()),
)

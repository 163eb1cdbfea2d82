"""Pays what you say, once you have agreed."""

from pydantic_ai import Agent
from tools.payments import pay  # pyright: ignore[reportMissingImports]

from app.deps import Deps
from tools.weather import get_weather

agent = Agent(name="cashier", deps_type=Deps, tools=[pay, get_weather])

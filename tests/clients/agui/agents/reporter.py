"""Answers with a value."""

from pydantic import BaseModel
from pydantic_ai import Agent

from app.deps import Deps
from tools.weather import get_weather


class Report(BaseModel):
    """A city's weather."""

    city: str
    sunny: bool


agent = Agent(name="reporter", deps_type=Deps, output_type=Report, tools=[get_weather])

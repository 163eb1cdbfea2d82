"""Reports the weather in one place as location, temperature and conditions."""

from pydantic import BaseModel, Field
from pydantic_ai import Agent

from agents import prompt
from app.deps import Deps
from tools.weather import get_weather


class WeatherResult(BaseModel):
    """Structured output from weather agent."""

    location: str
    temperature: float = Field(description="Degrees Celsius.")
    conditions: str


weather_agent = Agent(
    name="weather",
    deps_type=Deps,
    output_type=WeatherResult,
    instructions=prompt("weather"),
    tools=[get_weather],
)

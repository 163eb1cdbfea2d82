"""Current weather, from Open-Meteo: no key needed, or `WEATHER_API_URL` and `WEATHER_API_KEY`."""

from pydantic import BaseModel
from pydantic_ai import ModelRetry, RunContext

from app.deps import Deps
from tools import tool

# WMO code table 4677, as far as Open-Meteo uses it.
CONDITIONS = {
    0: "clear sky",
    1: "mainly clear",
    2: "partly cloudy",
    3: "overcast",
    45: "fog",
    48: "rime fog",
    51: "light drizzle",
    53: "drizzle",
    55: "dense drizzle",
    56: "light freezing drizzle",
    57: "freezing drizzle",
    61: "light rain",
    63: "rain",
    65: "heavy rain",
    66: "light freezing rain",
    67: "freezing rain",
    71: "light snow",
    73: "snow",
    75: "heavy snow",
    77: "snow grains",
    80: "light showers",
    81: "showers",
    82: "violent showers",
    85: "light snow showers",
    86: "snow showers",
    95: "thunderstorm",
    96: "thunderstorm with light hail",
    99: "thunderstorm with hail",
}


class Weather(BaseModel):
    """Weather now. Temperature in degrees Celsius, wind in km/h at 10 m."""

    location: str
    temperature: float
    conditions: str
    wind: float


class _Place(BaseModel):
    name: str
    country: str = ""
    latitude: float
    longitude: float


class _Places(BaseModel):
    results: list[_Place] = []


class _Current(BaseModel):
    temperature_2m: float
    weather_code: int
    wind_speed_10m: float


class _Forecast(BaseModel):
    current: _Current


@tool(effect="read", needs="weather:read")
async def get_weather(ctx: RunContext[Deps], location: str) -> Weather:
    """Current weather in one place: degrees Celsius, conditions, wind in km/h.

    Args:
        location: City name in English, e.g. "Lisbon".
    """
    settings = ctx.deps.settings
    key = settings.weather_api_key
    auth = {"apikey": key.get_secret_value()} if key else {}
    found = await ctx.deps.http.get(
        f"{settings.weather_geocoding_url}/v1/search",
        params={"name": location, "count": 1, **auth},
    )
    found.raise_for_status()
    places = _Places.model_validate_json(found.content).results
    if not places:
        raise ModelRetry(f"No place named {location!r}; try the nearest large city.")
    place = places[0]
    reply = await ctx.deps.http.get(
        f"{settings.weather_api_url}/v1/forecast",
        params={
            "latitude": place.latitude,
            "longitude": place.longitude,
            "current": "temperature_2m,weather_code,wind_speed_10m",
            **auth,
        },
    )
    reply.raise_for_status()
    now = _Forecast.model_validate_json(reply.content).current
    return Weather(
        location=", ".join(part for part in (place.name, place.country) if part),
        temperature=now.temperature_2m,
        conditions=CONDITIONS.get(now.weather_code, f"weather code {now.weather_code}"),
        wind=now.wind_speed_10m,
    )

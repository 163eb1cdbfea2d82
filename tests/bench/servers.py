"""Starts the servers that are compared, each in a process and on a processor of its own."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
START = 60.0  # seconds that a server has until its first answer
STOP = 15.0  # seconds that it has to end when asked to


class NotStarted(Exception):
    """The server ended before it answered, or never answered."""


def processors() -> tuple[int, int] | None:
    """A processor for all the rest, and one for the server; None where that is no choice."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    ours = sorted(os.sched_getaffinity(0))
    return (ours[0], ours[1]) if len(ours) > 1 else None


def get(port: int, path: str) -> bytes | None:
    """The body of a 200; None for any other answer, or none."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return body if answer.status == 200 else None


@dataclass(slots=True)
class Server:
    """A running one. `start` is the seconds, and of processor time the milliseconds, that it
    took from the beginning of its process to the first healthy answer."""

    process: subprocess.Popen[bytes]
    port: int
    start: float = 0
    start_cpu: float | None = None

    def cpu(self) -> float | None:
        """Milliseconds of processor time so far, of all threads; None where there is no /proc."""
        try:
            stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        except FileNotFoundError:
            return None
        user, system = stat.rpartition(")")[2].split()[11:13]
        return 1000 * (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float | None:
        """Megabytes that the process has resident; None where there is no /proc."""
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except FileNotFoundError:
            return None
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)


def ours(upstream: Server, model: str, database_url: str) -> dict[str, str]:
    """What our server is told: whom to ask, and where to write."""
    return {
        "AUTH": "local",
        "LOG_LEVEL": "warning",  # the bare agent writes no access log either
        "MODEL": f"openai-chat:{model}",
        "OPENAI_BASE_URL": f"http://127.0.0.1:{upstream.port}/v1",
        "OPENAI_API_KEY": "x",
        "DATABASE_URL": database_url,
    }


@contextmanager
def serve(
    command: Sequence[str],
    place: Path,
    environment: Mapping[str, str] | None = None,
    cpu: int | None = None,
) -> Generator[Server]:
    """Runs `python -m <command> <port>` in the directory `place`. Raises NotStarted."""
    place.mkdir(exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    with (place / "log").open("wb") as log:
        begin = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", *command, str(port)],
            cwd=place,  # where no .env of the developer's lies
            env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
            stdout=log,
            stderr=log,
        )
    server = Server(process, port)
    try:
        if cpu is not None:
            os.sched_setaffinity(process.pid, {cpu})
        while get(port, "/health") is None:
            if process.poll() is not None or time.perf_counter() - begin > START:
                raise NotStarted(f"{' '.join(command)}: {(place / 'log').read_text()[-2000:]}")
            time.sleep(0.005)
        server.start = time.perf_counter() - begin
        server.start_cpu = server.cpu()
        yield server
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(STOP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

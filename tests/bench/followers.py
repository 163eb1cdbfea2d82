"""What others notice of many slow streams: their latency, and the server's memory. And what each
takes who follows one run in which nothing happens.

On both databases; three times as fast, and three times as many:

    python -m tests.bench.followers
    python -m tests.bench.followers --streams 1000 --pause 333
"""

import argparse
import asyncio
import http.client
import json
import statistics
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

from tests.bench.__main__ import TURN, Bench, prepare
from tests.bench.load import Ask, load
from tests.bench.servers import START, Server, ours, serve

SECONDS = 8.0  # of each measurement
IDLE = 500  # followers of one run


def latencies(port: int) -> list[float]:
    """Milliseconds of one request after the other, each with a look into the database."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    found: list[float] = []
    until = time.perf_counter() + SECONDS
    while time.perf_counter() < until:
        begin = time.perf_counter()
        connection.request("GET", f"/v1/responses/resp_{'0' * 32}")
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 404, answer.status
        found.append(1000 * (time.perf_counter() - begin))
        time.sleep(0.005)
    connection.close()
    return found


def line(title: str, found: list[float], server: Server) -> str:
    p99 = statistics.quantiles(found, n=100)[98]
    return f"{title:24}{statistics.median(found):8.1f}{p99:8.1f}{server.memory() or 0:10.0f}"


async def streams(port: int, count: int) -> list[asyncio.StreamWriter]:
    """So many streams of which the first bytes have come; nobody reads on."""
    request = Ask("assistant", stream=True, tokens=200).request()
    writers: list[asyncio.StreamWriter] = []
    for _ in range(count):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
        writer.write(request)
        writers.append(writer)
        if len(writers) % 20 == 0:
            await reader.readuntil(b"\r\n\r\n")
    return writers


async def measure(name: str, server: Server, count: int) -> None:
    print(line(f"{name}, idle", await asyncio.to_thread(latencies, server.port), server))
    writers = await streams(server.port, count)
    found = await asyncio.to_thread(latencies, server.port)
    print(line(f"{name}, {count} streams", found, server))
    for writer in writers:
        writer.close()


async def followers(port: int, response_id: str, count: int) -> list[asyncio.StreamWriter]:
    """So many who read the response as it is written, and have read what there is."""
    request = f"GET /v1/responses/{response_id}?stream=true HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
    writers: list[asyncio.StreamWriter] = []
    for _ in range(count):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request.encode())
        async with asyncio.timeout(START):
            await reader.readuntil(b"response.in_progress")
        writers.append(writer)
    return writers


def post(port: int, path: str, **body: Any) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    answer: dict[str, Any] = json.loads(connection.getresponse().read())
    connection.close()
    return answer


async def idle(server: Server) -> float:
    """Kilobytes of each follower of a run that says nothing."""
    asked = {"model": "assistant", "input": "Hello", "background": True}
    response_id = str(post(server.port, "/v1/responses", **asked)["id"])
    first = await followers(server.port, response_id, IDLE // 10)
    before = server.memory() or 0
    others = await followers(server.port, response_id, IDLE)
    after = server.memory() or 0
    for writer in (*first, *others):
        writer.close()
    post(server.port, f"/v1/responses/{response_id}/cancel")
    return 1024 * (after - before) / IDLE


@contextmanager
def slow(bench: Bench, name: str, pause: int) -> Generator[Server]:
    """A server whose model waits so many milliseconds before each token."""
    environment = ours(bench.upstream, f"mock-s200-i{pause}", bench.databases[name])
    uvicorn = ("uvicorn", "app.main:app", "--no-access-log", "--log-level", "warning", "--port")
    with serve(uvicorn, bench.place / f"slow-{name}", environment, bench.cpu) as server:
        asyncio.run(load(server.port, TURN, connections=1, seconds=0))  # not streamed, no waiting
        yield server


def run(bench: Bench, count: int, pause: int) -> None:
    print(f"{'':24}{'p50 ms':>8}{'p99 ms':>8}{'RSS MB':>10}")
    for name in bench.databases:
        with slow(bench, name, 600_000) as server:
            print(f"{name}, {IDLE} idle followers".ljust(40), end="")
            print(f"{asyncio.run(idle(server)):10.1f} kB each")
        with slow(bench, name, pause) as server:
            asyncio.run(measure(name, server, count))


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.bench.followers")
    parser.add_argument("--streams", type=int, default=300)
    parser.add_argument("--pause", type=int, default=1000, help="ms between a stream's tokens")
    options = parser.parse_args()
    with ExitStack() as stack:
        run(stack.enter_context(prepare(("sqlite", "postgres"))), options.streams, options.pause)


if __name__ == "__main__":
    main()

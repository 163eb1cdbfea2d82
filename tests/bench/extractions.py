"""How fast a job is, against the same questions asked by `AsyncOpenAI` itself.

    python -m tests.bench.extractions --items 10000 --concurrency 16

The provider answers without any delay, from a process of its own. Prints items a second of both,
their ratio, the CPU that each took for an item, and how much memory the server took at most;
`--database-url` measures PostgreSQL.
"""

import argparse
import asyncio
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
from openai import AsyncOpenAI

from tests.bench.servers import Server, serve
from tests.bench.upstream import HEAD, Upstream

SCHEMA: dict[str, Any] = {
    "title": "Amount",
    "type": "object",
    "properties": {"n": {"type": "integer"}, "unit": {"type": "string"}},
    "required": ["n", "unit"],
}
ANSWER = json.dumps({"n": 17, "unit": "kg"})
BATCH = 500  # items of the upload that are made at a time


class Provider(Upstream):
    """Calls the function that it is offered, always with the same arguments."""

    def _answer(self, head: bytes, body: bytes) -> bytes:
        function = {"name": "Amount", "arguments": ANSWER}
        call = {"id": "call_1", "type": "function", "function": function}
        message = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "tool_calls"}
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        answer = {**HEAD, "object": "chat.completion", "model": "mock", "choices": [choice]}
        data = json.dumps({**answer, "usage": usage}).encode()
        length = f"content-length: {len(data)}\r\n\r\n"
        return f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n{length}".encode() + data


async def provide(port: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Provider, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


def text(number: int) -> str:
    return f"Item {number}: a parcel of 17 kg, sent on the 3rd of May to a customer in Lisbon."


async def directly(url: str, items: int, concurrency: int) -> tuple[float, float]:
    """Seconds for all items, and of CPU, of the client alone."""
    numbers = iter(range(0))
    tool: Any = {"type": "function", "function": {"name": "Amount", "parameters": SCHEMA}}

    async with AsyncOpenAI(base_url=url, api_key="key", max_retries=0) as client:

        async def ask() -> None:
            for number in numbers:
                answer = await client.chat.completions.create(
                    model="mock",
                    messages=[
                        {"role": "system", "content": "Extract what the text says."},
                        {"role": "user", "content": text(number)},
                    ],
                    tools=[tool],
                    tool_choice={"type": "function", "function": {"name": "Amount"}},
                    temperature=0,
                )
                called: Any = answer.choices[0].message.tool_calls
                json.loads(called[0].function.arguments)

        numbers = iter(range(50))  # connections and imports are not what is measured
        await asyncio.gather(*(ask() for _ in range(concurrency)))
        numbers = iter(range(items))
        begun, busy = time.perf_counter(), time.process_time()
        await asyncio.gather(*(ask() for _ in range(concurrency)))
        return time.perf_counter() - begun, time.process_time() - busy


async def upload(items: int, concurrency: int) -> AsyncIterator[bytes]:
    options = {"concurrency": concurrency, "cache": "use"}
    head = json.dumps({"schema": SCHEMA, "options": options})
    yield f'{head[:-1]}, "items": ['.encode()
    for first in range(0, items, BATCH):
        numbers = range(first, min(first + BATCH, items))
        lines = [json.dumps({"custom_id": f"c{n}", "text": text(n)}) for n in numbers]
        yield (", " if first else "").encode() + ", ".join(lines).encode()
    yield b"]}"


async def by_job(url: str, items: int, concurrency: int) -> tuple[float, float]:
    """Seconds until it was accepted, and from there to its end."""
    async with httpx2.AsyncClient(base_url=url, timeout=600) as client:
        begun = time.perf_counter()
        headers = {"Content-Type": "application/json"}
        reply = await client.post(
            "/v1/extraction-jobs", content=upload(items, concurrency), headers=headers
        )
        assert reply.status_code == 202, reply.text
        accepted, place = time.perf_counter(), f"/v1/extraction-jobs/{reply.json()['id']}"
        async with client.stream("GET", f"{place}/events") as events:
            async for _ in events.aiter_lines():
                pass
        ended = time.perf_counter()
        job = (await client.get(place)).json()
        assert job["counts"]["succeeded"] == items, job
        return accepted - begun, ended - accepted


def memory(server: Server) -> float:
    """MiB that the process took at most."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+)", status)
    return int(found[1]) / 1024 if found else 0.0


def busy(server: Server) -> float:
    """Seconds of CPU that the process has taken by now."""
    stat = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--database-url")
    options = parser.parse_args()
    items, concurrency = options.items, options.concurrency
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        with serve(["tests.bench.extractions", "--provide"], place / "provider") as provider:
            url = f"http://127.0.0.1:{provider.port}/v1"
            environment = {
                "AUTH": "local",
                "DATABASE_URL": options.database_url or f"sqlite:///{place}/jobs.db",
                "MODEL": "openai-chat:mock",
                "OPENAI_API_KEY": "key",
                "OPENAI_BASE_URL": url,
            }
            command = ["uvicorn", "app.main:app", "--no-access-log", "--port"]
            direct, direct_cpu = asyncio.run(directly(url, items, concurrency))
            with serve(command, place / "server", environment) as server:
                ours = f"http://127.0.0.1:{server.port}"
                asyncio.run(by_job(ours, 50, concurrency))  # imports, connections
                before, idle = memory(server), busy(server)
                accepting, executing = asyncio.run(by_job(ours, items, concurrency))
                after, cpu = memory(server), busy(server) - idle
    print(f"AsyncOpenAI   {items / direct:8.0f} items/s")
    print(f"job           {items / executing:8.0f} items/s, {direct / executing:.2f} of that")
    each = f"{direct_cpu / items * 1e3:8.2f} and {cpu / items * 1e3:.2f} ms/item"
    print(f"CPU           {each}, {direct_cpu / cpu:.2f}")
    print(f"accepted in   {accepting:8.2f} s, {items / accepting:.0f} items/s")
    print(f"memory        {after:8.0f} MiB at most, {before:.0f} before the job")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--provide"]:
        asyncio.run(provide(int(sys.argv[2])))
    else:
        main()

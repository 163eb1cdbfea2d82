"""Extracts from the command line: `python -m app.extract --help`. Needs no server."""

import argparse
import asyncio
import json
import sys
from base64 import b64encode
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import httpx2
from pydantic_core import from_json
from sqlalchemy.exc import SQLAlchemyError

from app.core import logs
from app.core.errors import AppError
from app.core.json import dump_exact, load_exact
from app.main import app
from app.services.files import type_of

if TYPE_CHECKING:
    from rich.table import Table

POLL = 0.2  # seconds between looks at what goes on
JOBS = "/v1/extraction-jobs"
LATER = {"Prefer": "respond-async"}
SHOWN = 20  # failed cases of an evaluation
QUOTE = 80  # characters of a quote
FORMATS = ("jsonl", "csv", "parquet")

Json = dict[str, Any]


class Failed(Exception):
    """What went wrong, in words for the person at the command line."""


@asynccontextmanager
async def connect(args: argparse.Namespace) -> AsyncGenerator[httpx2.AsyncClient]:
    """To the server at `--url`, else to the app in this process, with its settings."""
    if not (args.key or "").isascii():
        raise Failed("An API key has ASCII characters alone.")
    headers = {"Authorization": f"Bearer {args.key}"} if args.key else {}
    timeout = httpx2.Timeout(None, connect=10)
    if args.url:
        async with httpx2.AsyncClient(
            base_url=args.url, headers=headers, timeout=timeout
        ) as client:
            yield client
        return
    logs.begin(app.state.settings, "warning")
    transport = httpx2.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(
            base_url="http://127.0.0.1", headers=headers, timeout=timeout, transport=transport
        ) as client,
    ):
        yield client


async def ask(client: httpx2.AsyncClient, method: str, path: str, **request: Any) -> Json:
    """The JSON that is answered, numbers with all their digits. Raises Failed."""
    try:
        asked = client.build_request(method, path, **request)
    except ValueError as error:
        raise Failed(f"That cannot be sent as JSON: {error}.") from error
    return read(await client.send(asked))


def read(response: httpx2.Response) -> Json:
    try:
        body = load_exact(response.text)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise Failed(f"{response.url} answers {response.status_code}, and no JSON object.")
    if response.is_success:
        return cast(Json, body)
    raise Failed(explain(cast(Json, body).get("error") or {}, response.status_code))


def explain(error: Json, status: int = 200) -> str:
    """The error in a line, then a line for each thing wrong with each answer of the model's."""
    lines = [f"{error.get('code', status)}: {error.get('message', '')}"]
    if status == 401:
        lines.append("Give an API key with --key; `just create-key` makes one.")
    for number, attempt in enumerate(error.get("attempts") or [], 1):
        for fault in attempt["errors"]:
            place = fault["pointer"] or "/"
            lines.append(f"attempt {number} ({attempt['model']}): {place}: {fault['message']}")
    return "\n".join(lines)


async def follow(
    client: httpx2.AsyncClient, path: str, seen: Callable[[Json], None] = lambda state: None
) -> Json:
    """What stands at `path` once it goes on no more; `seen` is shown it on the way."""
    while True:
        state = await ask(client, "GET", path)
        seen(state)
        if state["status"] not in ("queued", "running"):
            return state
        if app.state.stopping:  # an interrupt that a database's driver took for an error of its own
            raise asyncio.CancelledError
        await asyncio.sleep(POLL)


async def finish(client: httpx2.AsyncClient, path: str, **request: Any) -> Json:
    """Posts what takes its time, and waits for it; whoever stops waiting stops it."""
    begun = await ask(client, "POST", path, headers=LATER, **request)
    place = f"{path}/{begun['id']}"
    try:
        return await follow(client, place)
    except asyncio.CancelledError:
        await ask(client, "POST", f"{place}/cancel")
        raise


def read_file(name: str) -> bytes:
    """The bytes of a file, or of standard input for `-`. Raises Failed."""
    try:
        return sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise Failed(f"Cannot read {name}: {error.strerror}.") from error


def input_of(name: str) -> Json:
    """A document as an extraction takes it. Raises Failed."""
    data = read_file(name)
    try:
        media_type = type_of(data, None, name, name)
    except AppError as error:
        raise Failed(f"{name}: {error.message}") from error
    if media_type.startswith(("image/", "application/pdf")):
        return {"data": f"data:{media_type};base64,{b64encode(data).decode()}"}
    return {"text": data.decode("utf-8-sig")}


def settings_of(args: argparse.Namespace) -> Json:
    """The schema, the instructions and the model, as every request says them. Raises Failed."""
    settings: Json = {"instructions": args.instructions, "model": args.model}
    if not args.schema.endswith(".json"):
        return {"schema_ref": args.schema, **settings}
    try:
        return {"schema": from_json(read_file(args.schema)), **settings}
    except ValueError as error:
        raise Failed(f"{args.schema} is no JSON: {error}.") from error


async def extract(args: argparse.Namespace) -> int:
    """Prints the document."""
    body = settings_of(args) | {"input": input_of(args.file)}
    body["options"] = {"evidence": args.evidence}
    async with connect(args) as client:
        answer = await finish(client, "/v1/extractions", json=body)
    print(dump_exact(answer["data"]))
    for line in (*grounds(answer), summary(answer)):
        print(line, file=sys.stderr)
    return 0


def grounds(answer: Json) -> Iterator[str]:
    """Where the text says each value, a line each, and then the values that it does not say."""
    for each in answer["evidence"]:
        quote = each["quote"] if len(each["quote"]) <= QUOTE else each["quote"][: QUOTE - 1] + "…"
        said = json.dumps(quote, ensure_ascii=False)
        yield f"{each['path'] or '/'}  {each['start']}-{each['end']}  {said}"
    for path, status in answer["field_status"].items():
        if status != "grounded":
            yield f"{path or '/'}  {status}"


def summary(answer: Json) -> str:
    """How an extraction came about, in a line."""
    states, lost = list(answer["field_status"].values()), len(answer["failed_ranges"])
    parts = [
        answer["status"],
        answer["model"],
        f"attempts: {len(answer['attempts'])}",
        spending(answer),
        f"{states.count('grounded')} of {len(states)} values grounded" if states else "",
        f"parts of the text lost: {lost}" if lost else "",
        f"cache {answer['cache']}" if answer["cache"] != "miss" else "",
        answer["id"],
    ]
    return " · ".join(part for part in parts if part)


def spending(answer: Json) -> str:
    cost = answer.get("cost")
    price = "" if cost is None else f", ${float(cost):.6f}"
    return f"{answer['usage']['total_tokens']} tokens{price}"


async def extract_batch(args: argparse.Namespace) -> int:
    """Makes a job of a file's lines, or takes up an earlier one, and writes its results."""
    request: Json = {}
    if not args.resume:
        if not args.file or not args.schema:
            raise Failed("Give a FILE and its --schema, or --resume a job.")
        settings = settings_of(args) | {"options": {"concurrency": args.concurrency}}
        request = _form(args.file, settings)
    if args.output:
        _check_writable(args.output)
    async with connect(args) as client:
        job_id = args.resume or (await ask(client, "POST", JOBS, **request))["id"]
        print(f"job {job_id}", file=sys.stderr)
        try:
            with _Bar() as bar:
                job = await follow(client, f"{JOBS}/{job_id}", bar.show)
            await _write_results(args, client, f"{JOBS}/{job_id}/results")
        except (asyncio.CancelledError, httpx2.TransportError, OSError):
            again = f"--resume {job_id}" + (f" --url {args.url}" if args.url else "")
            goes_on = "The job goes on" if args.url else "What is done is kept"
            print(f"{goes_on}; to wait for the rest: just extract-batch {again}", file=sys.stderr)
            raise
    counts = job["counts"]
    said = f"{counts['succeeded']} of {counts['total']} items"
    print(f"{job['status']} · {said} · {spending(job)} · {job_id}", file=sys.stderr)
    if job["error"]:
        print(explain(job["error"]), file=sys.stderr)
    return 0 if job["status"] == "completed" else 1


def _form(name: str, settings: Json) -> Json:
    """A file of lines with what is to be done with them, as a request."""
    return {
        "files": {"file": ("items.jsonl", read_file(name), "application/jsonl")},
        "data": {"request": json.dumps(settings)},
    }


class _Bar:
    """How far a job is, on standard error."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._progress = Progress(console=Console(stderr=True))
        self._task = self._progress.add_task("items", total=None)

    def __enter__(self) -> "_Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, job: Json) -> None:
        counts = job["counts"]
        done = counts["succeeded"] + counts["failed"] + counts.get("cancelled", 0)
        self._progress.update(self._task, completed=done, total=counts["total"])


async def _write_results(args: argparse.Namespace, client: httpx2.AsyncClient, path: str) -> None:
    suffix = Path(args.output or "").suffix.lower().removeprefix(".")
    wanted = args.format or (suffix if suffix in FORMATS else FORMATS[0])
    async with client.stream("GET", path, params={"format": wanted}) as response:
        if not response.is_success:
            await response.aread()
            read(response)
        with _sink(args.output) as file:
            async for part in response.aiter_bytes():
                file.write(part)


def _check_writable(path: str) -> None:
    """Before anything is paid for; what stands there stays. Raises Failed."""
    is_new = not Path(path).exists()
    try:
        with Path(path).open("ab"):
            pass
    except OSError as error:
        raise Failed(f"Cannot write {path}: {error.strerror}.") from error
    if is_new:
        Path(path).unlink()


def _sink(path: str | None) -> AbstractContextManager[IO[bytes]]:
    return nullcontext(sys.stdout.buffer) if path is None else Path(path).open("wb")


async def evaluate(args: argparse.Namespace) -> int:
    """Prints how well a file of texts and their documents is found, path by path."""
    from rich.console import Console

    request = _form(args.file, settings_of(args))
    async with connect(args) as client:
        with Console(stderr=True).status("Asking the model"):
            report = await finish(client, "/v1/evaluations", **request)
    Console().print(_table(report))
    print(f"{report['model']} · {report['items']} items · {spending(report)}", file=sys.stderr)
    if report["invalid_expected"]:
        said = f"{report['invalid_expected']} expected documents do not fit the schema."
        print(said, file=sys.stderr)
    failed = [case for case in report["cases"] if case["error"]]
    for case in failed[:SHOWN]:
        error = case["error"]
        print(f"{case['name']}: {error['code']}: {error['message']}", file=sys.stderr)
    if report["f1"] < args.min_f1:
        print(f"F1 is {report['f1']:.3f}, below {args.min_f1}.", file=sys.stderr)
        return 1
    return 0


def _table(report: Json) -> "Table":
    from rich.markup import escape
    from rich.table import Table

    table = Table("path", *("precision", "recall", "F1", "support"), box=None)
    rows = {**report["fields"], "all": report}
    for path, score in rows.items():
        shares = (f"{float(score[name]):.3f}" for name in ("precision", "recall", "f1"))
        table.add_row(escape(path or "/"), *shares, str(score.get("support", "")))
    table.caption = f"{float(report['exact']):.1%} exact, {report['failed']} failed"
    return table


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m app.extract", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    one = commands.add_parser("file", help="extract one document and print it")
    one.set_defaults(command=extract)
    one.add_argument("file", metavar="FILE", help="a text, PDF or image; - for standard input")
    one.add_argument("--evidence", choices=("none", "optional", "required"), default="none")
    _add_settings(one, required=True)

    batch = commands.add_parser("batch", help="extract each line of a file")
    batch.set_defaults(command=extract_batch)
    batch.add_argument("file", metavar="FILE", nargs="?", help='lines of {"custom_id", "text"}')
    batch.add_argument("--format", choices=FORMATS, help="default: the output's, or jsonl")
    batch.add_argument("-o", "--output", metavar="PATH", help="default: standard output")
    batch.add_argument("--concurrency", type=int, default=16, metavar="N")
    batch.add_argument("--resume", metavar="JOB", help="wait for a job that was begun before")
    _add_settings(batch, required=False)

    judge = commands.add_parser("eval", help="compare answers with what is known to be right")
    judge.set_defaults(command=evaluate)
    judge.add_argument("file", metavar="FILE", help='lines of {"text", "expected"}')
    judge.add_argument("--min-f1", type=float, default=0.0, metavar="F1", help="fail below it")
    _add_settings(judge, required=True)
    return parser.parse_args(argv)


def _add_settings(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--schema", required=required, help="its name, name@version, or a .json file"
    )
    parser.add_argument("--instructions", metavar="TEXT")
    parser.add_argument("--model")
    parser.add_argument("--url", help="of a server; default: no server is needed")
    parser.add_argument("--key", help="an API key, where one is required")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        return asyncio.run(args.command(args))
    except Failed as error:
        return _fail(str(error))
    except (httpx2.TransportError, httpx2.InvalidURL) as error:
        return _fail(f"No server answers at {args.url}: {error}")
    except (SQLAlchemyError, OSError) as error:
        return _fail(f"{getattr(error, 'orig', None) or error}")
    except KeyboardInterrupt:
        return 130


def _fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

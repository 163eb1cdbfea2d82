"""Runs from the command line, beside whatever servers are running: `python -m app.runs --help`."""

import argparse
import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import SQLAlchemyError

from app.config import Settings, settings
from app.core.errors import AppError
from app.core.logs import printable
from app.db.session import make_engine
from app.services.operations import Operations, Seen, Wanted
from app.services.steps import Step

if TYPE_CHECKING:
    from rich.table import Table

SHORT = 12  # characters of an id that tell runs apart
STATUS = ("queued", "running", "waiting", "completed", "failed", "cancelled", "incomplete")
STYLES = {"running": "cyan", "waiting": "yellow", "completed": "green", "failed": "red"}
WIDE = 160  # columns where no terminal says how many

Json = dict[str, Any]


async def show_list(args: argparse.Namespace, operations: Operations) -> int:
    """The newest runs."""
    wanted = Wanted(
        status=args.status,
        owner=args.owner,
        program=args.program,
        stuck=args.stuck,
        unknown=args.unknown,
        items=args.items,
        limit=args.limit,
    )
    found = await operations.find(wanted)
    if args.json:
        print(json.dumps([as_json(seen) for seen in found]))
    else:
        _print(_list(found))
    return 0


async def show(args: argparse.Namespace, operations: Operations) -> int:
    """One run, step by step."""
    seen = await operations.get(args.id)
    steps = await operations.steps(seen.run)
    if args.json:
        shown = [step_as_json(step, content=args.content) for step in steps]
        print(json.dumps({**as_json(seen), "steps": shown}))
        return 0
    _print(_list([seen]), f"run {seen.run.id}", _steps(steps, content=args.content))
    return 0


async def cancel(args: argparse.Namespace, operations: Operations) -> int:
    """Stops runs; the process that executes one sees it within a second."""
    return await _each(args, operations.cancel, "stopping")


async def requeue(args: argparse.Namespace, operations: Operations) -> int:
    """Takes runs from their workers, for any to go on with."""

    async def one(run_id: str) -> Any:
        return await operations.requeue(run_id, force=args.force)

    return await _each(args, one, "queued")


async def _each(
    args: argparse.Namespace, change: Callable[[str], Awaitable[Any]], what: str
) -> int:
    failed = 0
    for run_id in args.id:
        try:
            run = await change(run_id)
            said: Json = {"id": run.id, "result": what}
        except AppError as error:
            failed += 1
            said = {"id": run_id, "error": error.error_code, "message": error.message}
        text = said.get("message") or f"{said['id']} {what}"
        print(json.dumps(said) if args.json else printable(text))
    return 1 if failed else 0


def as_json(seen: Seen) -> Json:
    run, usage = seen.run, seen.usage
    return {
        "id": run.id,
        "owner": run.owner_id,
        "kind": run.kind,
        "program": run.program,
        "status": run.status,
        "reason": seen.error.get("code") or run.finish_reason,
        "created_at": run.created_at.isoformat(),
        "finished_at": run.finished_at and run.finished_at.isoformat(),
        "seconds": round(seen.seconds, 3),
        "usage": usage,
        "worker": run.worker,
        "claims": run.token,
        "crashes": run.crashes,
        "parent": run.parent_id,
        "job": run.batch_id,
        "flags": seen.flags,
    }


def step_as_json(step: Step, *, content: bool) -> Json:
    shown: Json = {"at": step.at and step.at.isoformat(), "what": step.what, **step.facts}
    return shown | ({"content": step.content} if content else {})


def _list(found: Sequence[Seen]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in ("id", "owner", "kind", "program", "status", "age", "took", "tokens", "worker"):
        table.add_column(name, no_wrap=name != "program")
    table.add_column("flags", style="yellow")
    now = datetime.now(UTC)
    for seen in found:
        run, usage = seen.run, seen.usage
        reason = str(seen.error.get("code") or run.finish_reason or "")
        status = run.status if reason in ("", "stop") else f"{run.status} ({reason})"
        tokens = usage.get("input_tokens", 0) + usage.get("output_tokens", 0)
        cells = (
            *(run.id[:SHORT], str(run.owner_id), run.kind, run.program),
            *(status, span((now - run.created_at).total_seconds()), span(seen.seconds)),
            *(f"{tokens:,}" if tokens else "", run.worker or "", ", ".join(seen.flags)),
        )
        styles = {4: STYLES.get(run.status, "")}
        # Not strings, in which square brackets would mean something.
        table.add_row(*(Text(printable(x), styles.get(at, "")) for at, x in enumerate(cells)))
    return table


def _steps(steps: Sequence[Step], *, content: bool) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table("at", "step", "", box=None, pad_edge=False)
    for step in steps:
        facts = [f"{name}={value}" for name, value in step.facts.items() if value is not None]
        said = [f"{name}: {text}" for name, text in step.content.items() if text] if content else []
        lines = "\n".join((" ".join(facts), *said))
        at = step.at.strftime("%H:%M:%S") if step.at else ""
        table.add_row(at, Text(printable(step.what)), Text(printable(lines)))
    return table


def span(seconds: float) -> str:
    """A time span in its largest unit: 0.4s, 12s, 5m, 3h, 2d."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s" if seconds >= 10 else f"{max(seconds, 0):.1f}s"


def _print(*parts: Any) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else WIDE, markup=False, highlight=False)
    for part in parts:
        console.print(part)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    listing = argparse.ArgumentParser(add_help=False)
    listing.add_argument("--status", nargs="+", choices=STATUS, default=(), metavar="STATUS")
    listing.add_argument("--owner", metavar="ID", help="or an e-mail address")
    listing.add_argument("--program", help="an agent's or a schema's name")
    listing.add_argument(
        "--stuck", action="store_true", help="late to begin, without a worker, or silent"
    )
    listing.add_argument(
        "--unknown", action="store_true", help="with a tool call of unknown outcome"
    )
    listing.add_argument("--items", action="store_true", help="also the items of jobs")
    listing.add_argument("--limit", type=int, default=20, metavar="N", help="default: 20")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="for machines")

    parser = argparse.ArgumentParser(prog="python -m app.runs", description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    command = commands.add_parser("list", parents=[listing, common], help="the newest runs")
    command.set_defaults(command=show_list)

    command = commands.add_parser("show", parents=[common], help="one run, step by step")
    command.set_defaults(command=show)
    command.add_argument("id", metavar="ID", help="or how it begins")
    command.add_argument(
        "--content", action="store_true", help="with prompts, answers, arguments and results"
    )

    command = commands.add_parser("cancel", parents=[common], help="stop runs")
    command.set_defaults(command=cancel)
    command.add_argument("id", nargs="+", metavar="ID")

    command = commands.add_parser(
        "requeue", parents=[common], help="take runs from workers that are dead or hang"
    )
    command.set_defaults(command=requeue)
    command.add_argument("id", nargs="+", metavar="ID")
    command.add_argument("--force", action="store_true", help="although the worker is alive")

    given = list(sys.argv[1:] if argv is None else argv)
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
        given.insert(0, "list")
    return parser.parse_args(given)


async def run(args: argparse.Namespace, settings: Settings) -> int:
    engine = make_engine(settings)
    try:
        return await args.command(args, Operations(engine))
    finally:
        await engine.dispose()


def main(argv: Sequence[str] | None = None, settings: Settings = settings) -> int:
    args = parse(argv)
    try:
        return asyncio.run(run(args, settings))
    except AppError as error:
        return _fail(error.message)
    except (SQLAlchemyError, OSError) as error:
        return _fail(f"Database error: {getattr(error, 'orig', None) or error}")


def _fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

"""The log: one line an event, with the ids of what it belongs to.

Nothing that a user, a model or a provider said stands in it. Of an exception it has the type and
the places it went through, never the words, which may quote a prompt, a row or a credential; of
what a library says, the place where it says it.
"""

import json
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from typing_extensions import override

from app.config import Settings
from app.core.errors import AppError

QUOTED = ("app", "agents", "tools", "uvicorn", "sqlalchemy")  # whose words are known
FRAMES = 20  # of each exception, the innermost

_about: ContextVar[Mapping[str, Any]] = ContextVar("about")
_UNPRINTABLE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029]")


def begin(settings: Settings, level: str | None = None) -> None:
    """Sends all that this process logs to standard error. Who says so first decides how."""
    root = logging.getLogger()
    if any(isinstance(handler.formatter, Lines) for handler in root.handlers):
        return
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if settings.logs_json else Lines())
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"  # ours leaves queries out
    for name in ("app", "agents", "tools", "uvicorn"):
        logging.getLogger(name).setLevel((level or settings.log_level).upper())
    if settings.debug:
        logging.getLogger("sqlalchemy.engine").setLevel(logging.INFO)  # below, it logs rows
    warnings.showwarning = _warn
    sys.unraisablehook = _ignored


def about(**ids: Any) -> None:
    """From here on, this task's lines and those of tasks that it begins are about these."""
    _about.set({**_about.get({}), **ids})


def answered_by(run_id: str) -> None:
    """The request that goes on here, if there is one, is about this run."""
    if "request_id" in _about.get({}):
        _about.set({"run_id": run_id, **_about.get({})})  # a run may ask for another


def afresh(**ids: Any) -> None:
    """As `about`, and about nothing else."""
    _about.set(ids)


def printable(text: str) -> str:
    """The text without what moves a cursor or begins a line that looks like another's."""
    return _UNPRINTABLE.sub(lambda found: repr(found[0])[1:-1], text)


class Lines(logging.Formatter):
    """For people."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        line = fields_of(record)
        at, level, logger, message = (
            line.pop(name) for name in ("time", "level", "logger", "message")
        )
        trace = line.pop("trace", ())
        rest = "".join(f" {name}={value}" for name, value in line.items())
        text = f"{at} {level:8}{logger}: {printable(message)}{rest}"
        return text.replace("\n", "\n    ") + "".join(f"\n    {place}" for place in trace)


class JsonLines(Lines):
    """For machines."""

    @override
    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(fields_of(record), default=str)


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    known = record.name.partition(".")[0] in QUOTED
    line = {
        "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
        "level": record.levelname.lower(),
        "logger": record.name,
        "message": record.getMessage() if known else f"{record.filename}:{record.lineno}",
        **_about.get({}),
        **getattr(record, "fields", {}),
    }
    if record.exc_info and record.exc_info[1]:
        line["error"] = _name(record.exc_info[1])
        line["trace"] = list(_places(record.exc_info[1]))
    return line


def _places(error: BaseException) -> Iterator[str]:
    """Where the exception came through, the outermost first; then the one that it came from."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following and id(following) not in seen:
        if seen:
            yield f"from {_name(following)}"
        seen.add(id(following))
        for frame, line in list(traceback.walk_tb(following.__traceback__))[-FRAMES:]:
            code = frame.f_code
            yield f"{_short(code.co_filename)}:{line} {code.co_name}"
        following = following.__cause__ or (
            None if following.__suppress_context__ else following.__context__
        )


def _name(error: BaseException) -> str:
    kind = type(error)
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    return f"{name} ({error.error_code})" if isinstance(error, AppError) else name


def _short(path: str) -> str:
    return path.rpartition("site-packages/")[2]


def _warn(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object
) -> None:
    """Pydantic's warnings quote values."""
    logging.getLogger(__name__).warning(
        "a warning: %s at %s:%d", category.__name__, _short(filename), lineno
    )


def _ignored(what: "sys.UnraisableHookArgs") -> None:
    error = what.exc_value
    info = (type(error), error, what.exc_traceback) if error else None
    logging.getLogger(__name__).error("an exception that nobody could be told of", exc_info=info)

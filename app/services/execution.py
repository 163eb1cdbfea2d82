"""An execution of a run: what a worker gives to an executor, and what it gets back."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic_ai.messages import (
    ModelMessage,
    ToolCallPart,
)

from app.models import Run
from app.schemas.run import Options
from app.services.changes import Rows
from app.services.purse import Purse
from app.services.run_log import RunLog

Status = Literal["completed", "failed", "cancelled", "incomplete", "waiting"]


@dataclass(slots=True)
class Outcome:
    """How an execution ended, with the messages that are not stored yet.

    `text` is what a person sees of the answer; `output` the answer as a value.
    """

    status: Status
    finish_reason: str | None = None
    text: str = ""
    output: Any = None
    error: dict[str, Any] | None = None
    usage: dict[str, int] = field(default_factory=dict[str, int])
    messages: Sequence[ModelMessage] = ()
    rows: Rows = ()  # what else is to be committed with the end
    asks: Sequence[ToolCallPart] = ()  # the calls that a person has to decide on
    keys: Sequence[str] = ()  # what each of them is decided by
    wait: float | None = None  # seconds until it goes on by itself, where no person decides


@dataclass(slots=True)
class Job:
    """A claimed run, as an executor gets it. `messages` are the run's own, stored already."""

    run: Run
    options: Options
    log: RunLog
    purse: Purse
    messages: list[ModelMessage]
    transcript: str = ""  # digest of the visible turns before the prompt
    waits: bool = False  # what the run goes on from asks a person
    usage: dict[str, int] = field(default_factory=dict[str, int])  # by now, should it break


@dataclass(frozen=True, slots=True)
class Fresh:
    """What is known of a run at its acceptance, and need not be read back."""

    options: Options
    messages: list[ModelMessage]
    transcript: str


Executor = Callable[[Job], Awaitable[Outcome]]
"""Executes a job to its end. A cancelled task must return what it has, as `cancelled`."""

Also = Callable[[Run, Outcome], Rows]
"""What else is committed with a run's end, seen from outside of its executor."""

Announce = Callable[[Job, Outcome], Rows]
"""Who is told of a run's end, whoever ended it: committed with it."""


def to_nobody(_job: Job, _outcome: Outcome) -> Rows:
    return ()

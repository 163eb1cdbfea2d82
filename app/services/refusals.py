"""What a client of runs is refused with, and what a failed run answers."""

from collections.abc import Mapping, Sequence
from typing import Any

from agents import all_agents
from app.core.errors import (
    AppError,
    BadGateway,
    Bug,
    Conflict,
    GatewayTimeout,
    Invalid,
    NotFound,
    TooMany,
    Unavailable,
)
from app.models import Run

NOT_DECIDED = (
    "The conversation waits for a decision: approve or deny what was asked, or send "
    "X-Multitask-Strategy: interrupt to give it up."
)


class RunNotFound(NotFound):
    """No such run, or somebody else's: the two look the same."""

    code = "run_not_found"


def deleted(run_id: str) -> RunNotFound:
    return RunNotFound(f"No run {run_id!r}: it was deleted.")


class EventsGone(AppError):
    """The run ended so long ago that there is no place in its stream any more."""

    status = 410
    code = "events_gone"

    def __init__(self) -> None:
        super().__init__(
            "The events of this run are kept no longer; leave out the last event's id to read "
            "what it came to from the start."
        )


class ConversationBusy(Conflict):
    """An earlier message is still being answered."""

    code = "conversation_busy"


class NotDecided(Conflict):
    """The conversation waits for a person's decisions: silence on them is no answer."""

    code = "not_decided"

    def __init__(self, run: Run, keys: Sequence[str]) -> None:
        super().__init__(NOT_DECIDED, keys=keys)
        self.run = run


class UnknownAgent(NotFound):
    code = "model_not_found"


def unknown_agent(name: str) -> UnknownAgent:
    return UnknownAgent(f"No agent {name!r}; available: {', '.join(all_agents())}.", param="model")


STATUS: Mapping[str, type[AppError]] = {
    "rate_limit_exceeded": TooMany,
    "insufficient_quota": TooMany,
    "context_length_exceeded": AppError,
    "extraction_invalid": Invalid,
    "ungrounded": Invalid,
    "budget_exceeded": Invalid,
    "output_truncated": Invalid,
    "model_refused": Invalid,
    "model_unavailable": BadGateway,
    "deadline": GatewayTimeout,
    "not_decided": Conflict,
    "internal": Bug,
    "poisoned": Bug,
}
"""The status of each code that a run fails with; the rest are a bad gateway."""


def run_failed(error: Mapping[str, Any], *, acted: bool = True) -> AppError:
    """What a failed run answers its client, by the code that it ended with.

    OpenAI's SDKs send a failed request once more by themselves, which makes another run: they are
    told not to where this one may have `acted` on the world.
    """
    code = str(error.get("code", "internal"))
    message = str(error.get("message", "The run failed."))
    failed = STATUS.get(code, BadGateway)(message, code=code)
    if "retry_after" in error:
        failed.headers["Retry-After"] = str(error["retry_after"])
    if acted or failed.status == Bug.status:
        failed.headers["X-Should-Retry"] = "false"
    return failed


class Stopping(Unavailable):
    """This process ends; what was accepted goes on elsewhere, or when it is back. To ask again is
    right, but not by itself where what was stopped had `acted` on the world."""

    def __init__(self, *, acted: bool = False) -> None:
        super().__init__("The server is stopping; try again in a moment.", code="stopping")
        if acted:
            self.headers["X-Should-Retry"] = "false"
            self.message = (
                "The server is stopping, and stopped this after it had called tools; see what they "
                "did before you try again."
            )


class RunDeleted(RunNotFound):
    """What an idempotency key began was deleted, and is not begun again."""


class IdempotencyConflict(Conflict):
    """The key was used before, with another body."""

    code = "idempotency_conflict"

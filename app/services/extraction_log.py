"""What the log of an extraction says beside PydanticAI's own events.

An answer as it streams is a `PartStartEvent` and its `PartDeltaEvent`s, whose `index` is the
chunk's number (0 where the text is whole): of a `ToolCallPart` where the model calls a function, of
a `TextPart` where it answers in JSON. Each answer begins with a `PartStartEvent` of its own.
"""

from dataclasses import dataclass, field
from typing import Any

from pydantic_ai import CustomEvent


@dataclass(kw_only=True)
class AttemptFailed(CustomEvent, name="extraction.attempt_failed", ui=False):
    """The answer is void. `attempt` counts from 1 within the chunk; `body` is an `Attempt`."""

    chunk: int
    attempt: int
    body: dict[str, Any]


@dataclass(kw_only=True)
class ChunkExtracted(CustomEvent, name="extraction.chunk_extracted", ui=False):
    """A chunk's answer is valid and kept, also for whoever takes the run over.

    `document` is JSON text, as `app.core.json.dump_exact` writes it.
    """

    chunk: int
    document: str
    evidence: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    attempts: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    field_status: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(kw_only=True)
class ChunkFailed(CustomEvent, name="extraction.chunk_failed", ui=False):
    """A range of the text is lost. `error` has `code` and `message`."""

    chunk: int
    start: int
    end: int
    error: dict[str, Any]


@dataclass(kw_only=True)
class JobProgress(CustomEvent, name="job.progress", ui=False):
    """How many items of a job are in which status."""

    counts: dict[str, int]

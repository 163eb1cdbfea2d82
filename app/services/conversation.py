"""The history of a conversation: a tree of runs, of which each holds only its own messages."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter
from pydantic_ai.messages import (
    ModelMessage,
    ModelRequest,
    ModelResponse,
    TextPart,
    ToolCallPart,
    UserContent,
    UserPromptPart,
)
from sqlalchemy import CTE, ColumnElement, String, bindparam, literal, select
from sqlalchemy.ext.asyncio import AsyncConnection
from typing_extensions import TypeIs

from app.core.json import dump, dump_any
from app.models import Message, Run

Turn = tuple[Literal["user", "assistant", "tool"], str]
"""What one side said, as text. A `tool` turn holds results of the caller's own functions."""

ELSEWHERE = "elsewhere"  # the model of replies that were given to another server

MESSAGE: TypeAdapter[ModelMessage] = TypeAdapter(ModelMessage, config=ConfigDict(defer_build=True))


def dump_message(message: ModelMessage) -> str:
    return dump(MESSAGE, message)


def as_messages(turns: Iterable[Turn]) -> list[ModelMessage]:
    """Turns that were said elsewhere, as text: nothing in them can act here."""
    return [
        ModelRequest([UserPromptPart(text)])
        if role == "user"
        else ModelResponse([TextPart(text)], model_name=ELSEWHERE)
        for role, text in turns
        if role != "tool"
    ]


def is_reply(message: ModelMessage) -> TypeIs[ModelResponse]:
    """Whether a model said this here."""
    return isinstance(message, ModelResponse) and message.model_name != ELSEWHERE


def has_parts(message: ModelMessage) -> bool:
    """Whether this is a reply that left a trace in the log."""
    return is_reply(message) and bool(message.parts)


def text_of(prompt: str | Sequence[UserContent]) -> str:
    """What a person would read of a prompt."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(part for part in prompt if isinstance(part, str))


def arguments_of(call: ToolCallPart) -> str:
    """As the model wrote them, also where that is no JSON."""
    return call.args if isinstance(call.args, str) else call.args_as_json_str()


def text_of_output(output: Any) -> str:
    """What a person would read of an answer: text as it is, anything else as JSON."""
    return output if isinstance(output, str) else dump_any(output)


def digest_turns(before: str, turns: Iterable[Turn]) -> str:
    """A digest of visible turns (role, text) that can be extended turn by turn."""
    for role, text in turns:
        before = hashlib.sha256(f"{before}\n{role}\n{text.strip()}".encode()).hexdigest()
    return before


async def own_messages(connection: AsyncConnection, run_id: str) -> list[ModelMessage]:
    """A run's own messages, oldest first; the prompt is the last of those it was accepted with."""
    rows = await connection.execute(
        select(Message.body).where(Message.run_id == run_id).order_by(Message.seq)
    )
    return [MESSAGE.validate_json(row.body) for row in rows]


async def messages_by_run(
    connection: AsyncConnection, run_id: str, ids: Sequence[str] | None = None
) -> dict[str, list[ModelMessage]]:
    """The messages of each run from the root to and with this one, oldest first; of those with
    these ids alone."""
    query = MESSAGES_ABOVE if ids is None else MESSAGES_ABOVE.where(Message.run_id.in_(ids))
    found: dict[str, list[ModelMessage]] = {}
    for above_id, body in await connection.execute(query, {"run_id": run_id}):
        found.setdefault(above_id, []).append(MESSAGE.validate_json(body))
    return found


async def lineage(
    connection: AsyncConnection, run_id: str, *where: ColumnElement[bool]
) -> list[Run]:
    """The runs from the root to and with this one; those alone of which all this is true."""
    rows = await connection.execute(RUNS_ABOVE.where(*where), {"run_id": run_id})
    return [Run(**row) for row in rows.mappings()]


async def branch(connection: AsyncConnection, run_id: str) -> list[str]:
    """The ids of the runs from the root to and with this one that were not deleted."""
    return list(await connection.scalars(BRANCH, {"run_id": run_id}))


async def waiting(connection: AsyncConnection, run_id: str) -> list[str]:
    """The ids of those from the root to and with this one that wait for a person."""
    return list(await connection.scalars(WAITING_ABOVE, {"run_id": run_id}))


def _path() -> CTE:
    """Step by step by the key of each run: as a join, PostgreSQL would read all runs for each."""
    run_id = bindparam("run_id", type_=String)
    path = select(run_id.label("id"), literal(0).label("depth")).cte("path", recursive=True)
    parent = select(Run.parent_id).where(Run.id == path.c.id).scalar_subquery()
    step: Any = select(parent, path.c.depth + 1).where(path.c.id.is_not(None))
    return path.union_all(step)


# Made once: to put a statement together takes longer than to execute it.
PATH = _path()
RUNS_ABOVE = select(Run).join(PATH, PATH.c.id == Run.id).order_by(PATH.c.depth.desc())
BRANCH = RUNS_ABOVE.where(Run.deleted_at.is_(None)).with_only_columns(Run.id)
WAITING_ABOVE = RUNS_ABOVE.where(Run.status == "waiting").with_only_columns(Run.id)
MESSAGES_ABOVE = (
    select(Message.run_id, Message.body)
    .join(PATH, PATH.c.id == Message.run_id)
    .order_by(PATH.c.depth.desc(), Message.seq)
)

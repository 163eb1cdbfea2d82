"""A run as it is asked for, and as it is first stored."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic_ai.messages import ModelMessage, UserContent
from pydantic_ai.toolsets import FunctionToolset

from agents import all_agents
from app.core.errors import Invalid
from app.core.security import Caller
from app.models import Run
from app.schemas.run import Options
from app.services.changes import INSERT_MESSAGE, INSERT_RUN
from app.services.conversation import Turn, dump_message

MAX_ID = 255  # characters of a client's id


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A key of the client's and what it stands for. Equal requests have equal fingerprints."""

    key: str
    fingerprint: str

    @classmethod
    def of(cls, route: str, key: str, body: bytes, *more: str) -> "Idempotency":
        """`more` is what else the request says, beside its body."""
        said = hashlib.sha256(body)
        said.update("".join(f"\n{each}" for each in more).encode())
        return cls(hashlib.sha256(f"{route}\n{key}".encode()).hexdigest(), said.hexdigest())


Multitask = Literal["enqueue", "reject", "interrupt"]
"""What a message does that comes while its conversation is busy: wait for its turn, be refused,
or stop what goes on. As LangGraph calls them."""


@dataclass(kw_only=True, slots=True)
class NewRun:
    """What a protocol asks for.

    Where it goes on from is, the first of these that leads anywhere:
    `parent`, a run;
    `message_id`, the client's own id of the prompt: a run that had it before gets a sibling;
    `after`, ids of the client's messages before the prompt, oldest first: the last of them that
    the conversation knows, be it a prompt's or a turn's; () is the root;
    `earlier`, the visible turns before the prompt: the caller's run that ended with exactly
    these, and where there is none they are taken as text;
    the newest run of the conversation `chat`.

    `results` answer the calls of the caller's own functions with which the parent ended; they
    stand in the place of a prompt.
    """

    program: str
    prompt: str | Sequence[UserContent] = ""
    kind: Literal["agent", "extraction", "evaluation"] = "agent"
    results: Mapping[str, str] = field(default_factory=dict[str, str])  # call id -> result
    parent: str | None = None
    message_id: str | None = None
    after: Sequence[str] | None = None
    exact: bool = False  # the client keeps the tree: `after` is right, whatever goes on beside it
    earlier: Sequence[Turn] = ()
    chat: str | None = None  # the frontend's own id of the conversation
    multitask: Multitask = "enqueue"
    queue: bool = False  # any worker may take it; else this process begins at once
    idempotency: Idempotency | None = None
    cache_key: str | None = None
    options: Options = field(default_factory=Options)
    param: str = "messages"  # the request's field that holds the prompt, for what is said of it


def check_ids(new: NewRun) -> None:
    """Raises Invalid for ids of the client's that no database would keep."""
    for each in (new.chat, new.message_id, *(new.after or ())):
        if each is not None and (len(each) > MAX_ID or "\0" in each):
            raise Invalid(
                f"Ids have at most {MAX_ID} characters, and none of them is NUL.", param="id"
            )


def check_names(new: NewRun) -> None:
    """Raises Invalid where the model could not tell the caller's functions apart."""
    names = [tool.name for tool in new.options.tools]
    taken = {name for name, times in Counter(names).items() if times > 1}
    # Only the tools that an agent was given one by one can make place for another.
    _, *others = all_agents()[new.program].agent.toolsets
    for toolset in others:
        if isinstance(toolset, FunctionToolset):
            taken |= toolset.tools.keys() & set(names)
    if taken:
        raise Invalid(
            f"The name {sorted(taken)[0]!r} is taken by another tool; call yours differently.",
            param="tools",
            status=400,
        )


def new_run(caller: Caller, **fields: Any) -> Run:
    """A run of the caller's, not stored yet."""
    return Run(
        owner_id=caller.user_id,
        scopes=caller.scope,
        crashes=0,
        cancelling=False,
        held_tokens=0,
        held_cost=0.0,
        created_at=datetime.now(UTC),
        **fields,
    )


def run_rows(
    run: Run, messages: Sequence[ModelMessage], lease_seconds: float | None = None
) -> list[tuple[Any, dict[str, Any]]]:
    """What the journal is to commit for a new run."""
    row = {column.key: getattr(run, column.key) for column in Run.__table__.c}
    row["lease_seconds"] = lease_seconds
    del row["lease_until"]
    return [
        (INSERT_RUN, row),
        *(
            (INSERT_MESSAGE, {"run_id": run.id, "seq": seq, "body": dump_message(message)})
            for seq, message in enumerate(messages)
        ),
    ]

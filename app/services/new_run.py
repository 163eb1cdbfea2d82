"""A run as it is asked for."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic_ai.messages import UserContent
from pydantic_ai.toolsets import FunctionToolset

from agents import all_agents
from app.core.errors import Invalid
from app.schemas.run import Options
from app.services.conversation import Turn

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


@dataclass(frozen=True, slots=True)
class Decision:
    """A person's answer to the question whether a call may be made.

    `key` is the ledger's: it stands for this run, this call and these arguments.
    """

    key: str
    approve: bool
    reason: str | None = None


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

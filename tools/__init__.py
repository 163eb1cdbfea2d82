"""Tools: one file each, found by being here.

A tool is a typed function whose docstring the model reads. `@tool` adds what it declares; a plain
public function works too, and counts as `effect="once"`. Names beginning with an underscore stay
private to their file.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, Literal, cast

from pydantic_ai import RunContext, Tool
from pydantic_ai.tools import ToolDefinition

from app.deps import Deps

Effect = Literal["read", "idempotent", "once"]
"""What a second call does: nothing (`read`), nothing more under the same idempotency key
(`idempotent`), or it happens again (`once`, so it is never repeated after a crash)."""


RETRIES = 3
"""How often in a row the model may call a tool wrongly before the run fails."""


@dataclass(frozen=True, slots=True)
class Declared:
    """What a tool says of itself; travels in its definition's metadata."""

    effect: Effect = "once"
    needs: str | None = None
    approve: bool = False


def declared(definition: ToolDefinition) -> Declared:
    return (definition.metadata or {}).get("declared") or Declared()


async def _only_with_scope(ctx: RunContext[Deps], definition: ToolDefinition) -> Any:
    """Hides a tool from callers without its scope, so that the model cannot ask for it."""
    needs = declared(definition).needs
    return definition if needs is None or ctx.deps.caller.may(needs) else None


def tool(
    *,
    effect: Effect,
    needs: str | None = None,
    approve: bool = False,
    timeout: float | None = None,
) -> Callable[[Callable[..., Any]], Tool[Deps]]:
    """Makes a function a tool.

    Args:
        effect: What a second call would do; see `Effect`.
        needs: The scope that a caller must have to see and use it.
        approve: Whether a person has to agree to each call.
        timeout: Seconds for the call as a whole; `TOOL_TIMEOUT` bounds each of its HTTP requests.
    """

    def decorate(function: Callable[..., Any]) -> Tool[Deps]:
        return Tool(
            function,
            prepare=_only_with_scope,
            max_retries=RETRIES,
            requires_approval=approve,
            timeout=timeout,
            docstring_format="google",
            metadata={"declared": Declared(effect, needs, approve)},
        )

    return decorate


def _tools_of(module: ModuleType) -> list[Tool[Deps]]:
    found: list[Tool[Deps]] = []
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        if isinstance(value, Tool):
            item = cast(Tool[Deps], value)
            if item.function.__module__ == module.__name__:
                found.append(item)
        elif inspect.isfunction(value) and value.__module__ == module.__name__:
            found.append(Tool(value, max_retries=RETRIES, docstring_format="google"))
    return found


@cache
def all_tools() -> Mapping[str, Tool[Deps]]:
    """Every tool by name. Raises ValueError where two files hold the same name."""
    found: dict[str, Tool[Deps]] = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name):
        for item in _tools_of(importlib.import_module(f"{__name__}.{info.name}")):
            if item.name in found:
                raise ValueError(
                    f"Two tools are named {item.name!r}; one is in tools/{info.name}.py."
                )
            found[item.name] = item
    return found

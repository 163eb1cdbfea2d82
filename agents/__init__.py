"""Agents: one file each. The file's name is the public name, its docstring the description, and
its one `Agent`, whatever the variable is called, the agent. Settings choose the model at run time,
so importing one needs no key.

A prompt is `prompts/<agent>.md`: Markdown that may begin with front matter of model settings.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_ai import Agent, Tool
from pydantic_ai.settings import ModelSettings
from pydantic_ai.toolsets import FunctionToolset

from app.deps import Deps

PROMPTS = Path(__file__).parent.parent / "prompts"


class FrontMatter(BaseModel):
    """Model settings that a prompt may begin with."""

    model_config = ConfigDict(extra="forbid")

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop_sequences: list[str] | None = None
    parallel_tool_calls: bool | None = None


@dataclass(frozen=True, slots=True)
class Listed:
    """An agent as it is offered."""

    name: str
    description: str
    agent: Agent[Deps, Any]
    settings: ModelSettings

    @property
    def tools(self) -> dict[str, Tool[Deps]]:
        """Its tools by name. Which of them a run sees, the caller's scopes say."""
        return {
            name: item
            for toolset in self.agent.toolsets
            if isinstance(toolset, FunctionToolset)
            for name, item in toolset.tools.items()
        }


def _read(name: str) -> tuple[str, ModelSettings]:
    path = PROMPTS / f"{name}.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if not text.startswith("---\n"):
        return text.strip(), ModelSettings()
    front, _, body = text.removeprefix("---\n").partition("\n---\n")
    try:
        settings = FrontMatter.model_validate(yaml.safe_load(front) or {})
    except (ValidationError, yaml.YAMLError) as error:
        raise ValueError(f"prompts/{name}.md: {error}") from error
    return body.strip(), ModelSettings(**settings.model_dump(exclude_none=True))


def prompt(name: str) -> str:
    """The text of `prompts/<name>.md` below its front matter. Raises FileNotFoundError."""
    if not (PROMPTS / f"{name}.md").exists():
        raise FileNotFoundError(f"No prompt prompts/{name}.md.")
    return _read(name)[0]


def _listed(name: str) -> Listed:
    module = importlib.import_module(f"{__name__}.{name}")
    values: list[Any] = list(vars(module).values())
    agents: dict[int, Agent[Deps, Any]] = {
        id(value): value for value in values if isinstance(value, Agent)
    }
    if len(agents) != 1:
        raise ValueError(f"agents/{name}.py must hold one Agent; it holds {len(agents)}.")
    description = (module.__doc__ or "").strip()
    return Listed(name, description, agents.popitem()[1], _read(name)[1])


@cache
def all_agents() -> Mapping[str, Listed]:
    """Every agent by its public name."""
    names = sorted(info.name for info in pkgutil.iter_modules(__path__))
    return {name: _listed(name) for name in names if not name.startswith("_")}

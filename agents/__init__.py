"""Agents: one file each. The file's name is the public name, its docstring the description, and
its one `Agent`, whatever the variable is called, the agent. Settings choose the model at run time,
so importing one needs no key.

A prompt is `prompts/<agent>.md`: Markdown that may begin with front matter of model settings.
"""

import importlib
import pkgutil
import re
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
FRONT_MATTER = re.compile(
    r"---\n(?P<front>.*?)^---[ \t]*(\n(?P<body>.*))?", re.DOTALL | re.MULTILINE
)


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


def read_prompt(path: Path) -> tuple[str, ModelSettings]:
    """The prompt's text and its settings. Raises ValueError for front matter that says nonsense."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.startswith("---\n"):
        return text.strip(), ModelSettings()
    place = f"{path.parent.name}/{path.name}"
    parts = FRONT_MATTER.fullmatch(text)
    if parts is None:
        raise ValueError(f"{place}: a line of --- must end the front matter.")
    try:
        settings = FrontMatter.model_validate(yaml.safe_load(parts["front"]) or {})
    except (ValidationError, yaml.YAMLError) as error:
        raise ValueError(f"{place}: {error}") from error
    return (parts["body"] or "").strip(), ModelSettings(**settings.model_dump(exclude_none=True))


def prompt(name: str) -> str:
    """The text of `prompts/<name>.md` below its front matter. Raises FileNotFoundError."""
    return read_prompt(PROMPTS / f"{name}.md")[0]


def is_agent(value: Any) -> bool:
    return isinstance(value, Agent)


def _listed(name: str) -> Listed:
    module = importlib.import_module(f"{__name__}.{name}")
    values: Mapping[str, Any] = vars(module)
    agents = [value for name, value in values.items() if not name.startswith("_")]
    found: dict[int, Any] = {id(value): value for value in agents if is_agent(value)}
    if len(found) != 1:
        raise ValueError(
            f"agents/{name}.py must hold one Agent; it holds {len(found)}. "
            "Names that begin with an underscore do not count."
        )
    path = PROMPTS / f"{name}.md"
    settings = read_prompt(path)[1] if path.exists() else ModelSettings()
    return Listed(name, (module.__doc__ or "").strip(), found.popitem()[1], settings)


@cache
def all_agents() -> Mapping[str, Listed]:
    """Every agent by its public name."""
    names = sorted(info.name for info in pkgutil.iter_modules(__path__))
    return {name: _listed(name) for name in names if not name.startswith("_")}

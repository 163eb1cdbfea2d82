"""An agent and a tool of the tests' own, found as any other: by being in a folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import agents
import tools as all_tools

HERE = Path(__file__).parent


@pytest.fixture
def cashier(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The agent `cashier`, whose tool `pay` needs a person's approval."""
    agents.all_agents()  # those that have all tools must not get this one for ever
    for package in (agents, all_tools):
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(HERE / package.__name__)])
    agents.all_agents.cache_clear()
    all_tools.all_tools.cache_clear()
    yield
    monkeypatch.undo()
    agents.all_agents.cache_clear()
    all_tools.all_tools.cache_clear()

"""Agents and tools of the tests' own, found as all others are: by being in the packages' path."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import agents
import tools

HERE = Path(__file__).parent


@contextmanager
def plugged_in(house: Path = HERE) -> Iterator[None]:
    """The files of `house`/agents and `house`/tools belong to the app, until the end."""
    agents.all_agents()  # first, so that no agent of the app takes the tests' tools for its own
    before = set(sys.modules)
    for package in (agents, tools):
        package.__path__.append(str(house / package.__name__))
    _forget()
    try:
        yield
    finally:
        for package in (agents, tools):
            package.__path__.remove(str(house / package.__name__))
        for name in set(sys.modules) - before:
            if name.startswith(("agents.", "tools.")):
                del sys.modules[name]
        _forget()


def _forget() -> None:
    agents.all_agents.cache_clear()
    tools.all_tools.cache_clear()

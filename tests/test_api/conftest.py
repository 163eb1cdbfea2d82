"""An agent and a tool of the tests' own, found as any other: by being in a folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.plugins import plugged_in

HERE = Path(__file__).parent


@pytest.fixture
def cashier() -> Iterator[None]:
    """The agent `cashier`, whose tool `pay` needs a person's approval."""
    with plugged_in(HERE):
        yield

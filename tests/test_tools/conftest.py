from collections.abc import Iterator

import pytest

from tests.plugins import plugged_in


@pytest.fixture
def trial() -> Iterator[None]:
    """The agent `tester` is there, with tools to try."""
    with plugged_in():
        yield

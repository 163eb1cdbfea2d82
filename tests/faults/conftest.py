from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from tests.faults.harness import Site, open_site
from tests.faults.invariants import violations
from tests.toolserver import ToolServer
from tests.upstream import Upstream


@pytest.fixture
def long(request: pytest.FixtureRequest) -> bool:
    """Whether to take the time that finds what is rare."""
    return bool(request.config.getoption("--long"))


@pytest.fixture
async def site(
    request: pytest.FixtureRequest,
    environ: dict[str, str],
    bearer: Callable[..., Awaitable[str]],
    upstream: Upstream,
    tools: ToolServer,
) -> AsyncIterator[Site]:
    """One process, or as many as the test is parametrized for; the log is in order at the end."""
    count = getattr(request, "param", 1)
    async with open_site(environ, bearer, upstream, tools, count) as opened:
        yield opened
        assert await violations(opened.engine) == []

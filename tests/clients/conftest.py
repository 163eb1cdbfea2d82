"""The official JavaScript clients, as Alice."""

import pytest
from httpx2 import AsyncClient

from tests.clients.node import Node
from tests.test_api.conftest import cashier

__all__ = ["cashier", "node"]


@pytest.fixture
def node(alice: AsyncClient) -> Node:
    """Runs scripts of this folder against the server."""
    return Node(str(alice.base_url), alice.headers["Authorization"].removeprefix("Bearer "))

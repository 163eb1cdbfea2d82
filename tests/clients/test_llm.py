"""The `llm` command as a client of the running server."""

import json
from pathlib import Path

import pytest
from httpx2 import AsyncClient

from tests.clients.scenarios import Script, scripted
from tests.toolserver import ToolServer
from tests.upstream import Upstream


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_llm_is_served(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer, tmp_path: Path
) -> None:
    scripted(upstream)
    token = alice.headers["Authorization"].removeprefix("Bearer ")
    (home := tmp_path / "llm").mkdir()
    environ = {"LLM_USER_PATH": str(home)}

    async with Script.run("llm_client", str(alice.base_url), token, **environ) as script:
        assert await script.says() == [0, "Hello to you."]
        assert await script.says() == [0, "Fine in Paris."]
        told = [message["content"] for message in upstream.requests[-1].body["messages"]]
        assert told[1:4] == ["Hello", "Hello to you.", "What is the weather?"]
        assert tools.count("/v1/search") == 1
        assert await script.says() == [0, "Hello to you."]
        assert await script.says() == [0, "Both are open."]
        results = [message["content"] for message in upstream.requests[-1].body["messages"]]
        assert results[-2:] == ["door 3 is open", "door 4 is open"]
        code, value = await script.says()
        assert (code, json.loads(value)) == (0, {"name": "Paris", "country": "France"})
        assert await script.says() == [0, "I see data:image/png."]

        for words in ("Error code: 401", "broke off"):
            code, complaint = await script.says()
            assert code == 1 and words in complaint

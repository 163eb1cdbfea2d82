"""Open WebUI's headers at Chat Completions."""

import json

from httpx2 import AsyncClient

from tests.chatting import FUNCTION, URL, asking, assistant, texts, told, user
from tests.toolserver import ToolServer
from tests.upstream import Call, Reply, Upstream


def webui(message: str, parent: str = "", chat: str = "chat-1", task: str = "") -> dict[str, str]:
    """As Open WebUI fills them in: ids of its answers, empty where there is none."""
    return {
        "X-OpenWebUI-Chat-Id": chat,
        "X-OpenWebUI-Message-Id": message,
        "X-OpenWebUI-User-Message-Parent-Id": parent,
        "X-OpenWebUI-Task": task,
    }


async def test_an_open_webui_chat_is_a_tree_of_messages(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when(
        "weather", Reply(calls=(Call("get_weather", {"location": "Paris"}),)), Reply(text="Fine.")
    )
    turn = [user("weather?"), assistant("<details>edited by the frontend</details>Fine.")]

    async def say(text: str, message: str, parent: str) -> list[tuple[str, str]]:
        before = turn if parent else []
        body = asking(*before, user(text))
        done = await alice.post(URL, json=body, headers=webui(message, parent))
        assert done.status_code == 200, done.text
        return texts(told(upstream))

    await say("weather?", "answer-1", "")
    went_on = await say("And tomorrow?", "answer-2", "answer-1")
    again = await say("And tomorrow?", "answer-2b", "answer-1")
    edited = await say("And on Sunday?", "answer-3", "answer-1")
    fresh = await say("Hello", "answer-4", "")

    assert [role for role, _ in went_on] == ["user", "assistant", "tool", "assistant", "user"]
    assert went_on == again
    assert edited[:-1] == again[:-1] and edited[-1] == ("user", "And on Sunday?")
    assert fresh == [("user", "Hello")]


async def test_functions_that_open_webui_runs_itself_belong_to_their_turn(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("door", Reply(calls=(Call("open_door"),)), Reply(text="It is open."))
    headers = webui("answer-1")
    messages = [user("open the door")]
    called = await alice.post(URL, json=asking(*messages, tools=[FUNCTION]), headers=headers)
    message = called.json()["choices"][0]["message"]
    [call] = message["tool_calls"]
    messages += [message, {"role": "tool", "tool_call_id": call["id"], "content": "opened"}]

    done = await alice.post(URL, json=asking(*messages, tools=[FUNCTION]), headers=headers)
    messages += [done.json()["choices"][0]["message"], user("Thanks")]
    await alice.post(URL, json=asking(*messages), headers=webui("answer-2", "answer-1"))

    assert done.json()["choices"][0]["message"]["content"] == "It is open."
    roles = ["user", "assistant", "tool", "assistant", "user"]
    assert [message["role"] for message in told(upstream)] == roles


async def test_a_title_of_a_structured_agents_chat_is_written_too(
    alice: AsyncClient, upstream: Upstream
) -> None:
    value = {"location": "Paris", "temperature": 1, "conditions": "fog"}
    upstream.when("title", Reply(calls=(Call("final_result", value),)))
    body = asking(user("Write a title.")) | {"model": "weather"}

    done = await alice.post(URL, json=body, headers=webui("answer-1", task="title_generation"))

    assert done.status_code == 200, done.text
    assert json.loads(done.json()["choices"][0]["message"]["content"])["location"] == "Paris"


async def test_another_owners_open_webui_chat_is_another(
    alice: AsyncClient, bob: AsyncClient, upstream: Upstream
) -> None:
    await alice.post(URL, json=asking(user("one")), headers=webui("answer-1"))

    await bob.post(URL, json=asking(user("two")), headers=webui("answer-2", "answer-1"))

    assert texts(told(upstream)) == [("user", "two")]


async def test_a_title_is_written_outside_of_the_chat_and_without_tools(
    alice: AsyncClient, upstream: Upstream
) -> None:
    await alice.post(URL, json=asking(user("one")), headers=webui("answer-1"))
    task = webui("answer-1", task="title_generation")

    done = await alice.post(
        URL, json=asking(user("Write a title."), tools=[FUNCTION]), headers=task
    )
    asked = upstream.requests[-1].body
    await alice.post(URL, json=asking(user("two")), headers=webui("answer-2", "answer-1"))

    assert done.json()["choices"][0]["message"]["content"] == "ok"
    assert asked["tool_choice"] == "none" if asked.get("tools") else True
    assert [message["content"] for message in asked["messages"][1:]] == ["Write a title."]
    assert [text for _, text in texts(told(upstream))] == ["one", "ok", "two"]


TITLE = "### Task:\nWrite a title.\n### Chat History:\n<chat_history>\nUSER: one\n</chat_history>"


async def test_a_title_that_is_asked_for_without_its_header_is_no_part_of_the_chat_either(
    alice: AsyncClient, upstream: Upstream
) -> None:
    headers = {"X-OpenWebUI-Chat-Id": "chat-1"}
    documents = "### Task:\nRespond with the context.\n<context>\nA\n</context>\none"
    await alice.post(URL, json=asking(user(documents)), headers=headers)

    titled = await alice.post(URL, json=asking(user(TITLE)), headers=headers)
    asked = upstream.requests[-1].body
    await alice.post(URL, json=asking(user("two")), headers=headers)

    assert titled.json()["choices"][0]["message"]["content"] == "ok"
    assert asked["tool_choice"] == "none" if asked.get("tools") else True
    assert [message["content"] for message in asked["messages"][1:]] == [TITLE]
    assert [text for _, text in texts(told(upstream))] == [documents, "ok", "two"]

"""Conversations: any chat of the caller's as items, whichever frontend began it."""

import json
from typing import Any

import pytest
from httpx2 import AsyncClient
from openai.types.conversations import Conversation, ConversationItem
from pydantic import TypeAdapter

from tests.responding import asking, deciding, decision, requests_in, says
from tests.toolserver import ToolServer
from tests.upstream import Call, Reply, Upstream

URL = "/v1/conversations"
RESPONSES = "/v1/responses"
OFFICIAL: TypeAdapter[Any] = TypeAdapter(ConversationItem)
Item = dict[str, Any]


async def begin(client: AsyncClient, *items: Item, **more: Any) -> str:
    made = await client.post(URL, json={"items": list(items), **more})
    assert made.status_code == 200, made.text
    Conversation.model_validate(made.json())
    return made.json()["id"]


async def ask(client: AsyncClient, said: Any, **more: Any) -> dict[str, Any]:
    reply = await client.post(RESPONSES, json=asking(said) | more)
    assert reply.status_code == 200, reply.text
    return reply.json()


async def items(client: AsyncClient, name: str, **params: Any) -> list[Item]:
    """All of them, oldest first, as OpenAI documents them."""
    reply = await client.get(f"{URL}/{name}/items", params={"order": "asc", "limit": 100} | params)
    assert reply.status_code == 200, reply.text
    for item in reply.json()["data"]:
        OFFICIAL.validate_python(item)
    return reply.json()["data"]


def told(listed: list[Item]) -> list[tuple[str, str]]:
    return [(item["role"], item["content"][0]["text"]) for item in listed]


def last_messages(upstream: Upstream) -> list[tuple[str, Any]]:
    """What the model was sent last, without its instructions."""
    messages = upstream.requests[-1].body["messages"]
    return [(message["role"], message.get("content")) for message in messages[1:]]


async def test_a_conversation_has_the_items_of_its_responses_under_the_same_ids(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when(
        "weather",
        Reply(
            text="Let me look.",
            reasoning="Hm.",
            calls=(Call("get_weather", {"location": "Tokyo"}),),
        ),
        Reply(text="Fine."),
    )
    name = await begin(alice)

    for stream in (False, True):
        said = await ask(alice, "weather?", conversation=name, background=stream)
        if stream:
            async with alice.stream("GET", f"{RESPONSES}/{said['id']}?stream=true") as reply:
                await reply.aread()
            said = (await alice.get(f"{RESPONSES}/{said['id']}")).json()
        assert said["conversation"] == {"id": name}
        listed = await items(alice, name)
        assert listed[-4:] == said["output"]
        given = (await alice.get(f"{RESPONSES}/{said['id']}/input_items")).json()["data"]
        assert listed[-5:-4] == given
        assert told(given) == [("user", "weather?")]

    kinds = ["message", "reasoning", "message", "mcp_call", "message"]
    assert [item["type"] for item in await items(alice, name)] == kinds * 2


async def test_what_is_said_in_a_conversation_is_remembered_there(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("name is", Reply(text="Nice to meet you."))
    upstream.when("who", Reply(text="Ada."))
    name = await begin(alice)

    await ask(alice, "My name is Ada", conversation=name)
    await ask(alice, "who am I", conversation={"id": name})

    assert last_messages(upstream) == [
        ("user", "My name is Ada"),
        ("assistant", "Nice to meet you."),
        ("user", "who am I"),
    ]


async def test_items_that_are_added_are_part_of_what_the_model_is_told(
    alice: AsyncClient, upstream: Upstream
) -> None:
    name = await begin(alice, says("Talk like a pirate.", "system"), says("Hello."))
    added = await alice.post(
        f"{URL}/{name}/items", json={"items": [says("Ahoy.", "assistant"), says("I am Ada.")]}
    )

    await ask(alice, "who am I", conversation=name)

    said = [
        ("system", "Talk like a pirate."),
        ("user", "Hello."),
        ("assistant", "Ahoy."),
        ("user", "I am Ada."),
    ]
    assert told(added.json()["data"]) == said[2:]
    assert told(await items(alice, name)) == [*said, ("user", "who am I"), ("assistant", "ok")]
    sent = [(role, text) for role, text in last_messages(upstream) if role != "system"]
    assert sent[0] == ("user", "Hello.")
    assert sent[1] == ("assistant", "Ahoy.")
    assert "I am Ada." in str(sent[2:]) and "who am I" in str(sent[2:])
    assert any(
        "pirate" in str(message["content"])
        for message in upstream.requests[-1].body["messages"]
        if message["role"] == "system"
    )


async def test_an_item_that_was_added_can_be_taken_back(
    alice: AsyncClient, upstream: Upstream
) -> None:
    name = await begin(alice, says("one"), says("two", "assistant"), says("three"))
    first, second, third = await items(alice, name)

    gone = await alice.delete(f"{URL}/{name}/items/{second['id']}")
    again = await alice.delete(f"{URL}/{name}/items/{second['id']}")
    await ask(alice, "four", conversation=name)

    assert (gone.status_code, gone.json()["id"]) == (200, name)
    assert again.status_code == 404
    assert (await items(alice, name))[:2] == [first, third]
    assert "two" not in str(last_messages(upstream))


async def test_an_item_of_a_response_goes_only_with_it(
    alice: AsyncClient, upstream: Upstream
) -> None:
    name = await begin(alice)
    said = await ask(alice, "Hello", conversation=name)
    question, answer = await items(alice, name)

    for item in (question, answer):
        refused = await alice.delete(f"{URL}/{name}/items/{item['id']}")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "item_in_use")
        assert said["id"] in refused.json()["error"]["message"]
    await alice.delete(f"{RESPONSES}/{said['id']}")

    assert await items(alice, name) == []


async def pages(client: AsyncClient, name: str, limit: int, order: str) -> list[Item]:
    """All items, page by page."""
    seen: list[Item] = []
    params: dict[str, Any] = {"limit": limit, "order": order}
    while True:
        page = (await client.get(f"{URL}/{name}/items", params=params)).json()
        assert 0 < len(page["data"]) <= limit
        seen += page["data"]
        assert (page["object"], page["first_id"]) == ("list", page["data"][0]["id"])
        assert page["last_id"] == seen[-1]["id"]
        if not page["has_more"]:
            return seen
        params["after"] = page["last_id"]


async def test_items_come_in_pages(alice: AsyncClient) -> None:
    name = await begin(alice, *(says(str(n)) for n in range(7)))
    all_of_them = await items(alice, name)
    assert [item["content"][0]["text"] for item in all_of_them] == list("0123456")
    assert await pages(alice, name, 3, "asc") == all_of_them
    assert await pages(alice, name, 3, "desc") == all_of_them[::-1]
    for wrong in ({"after": "msg_nothing"}, {"limit": 0}, {"limit": 101}, {"order": "up"}):
        refused = await alice.get(f"{URL}/{name}/items", params=wrong)
        assert refused.status_code == 400, wrong
        assert refused.json()["error"]["param"] in wrong


async def test_pages_hold_what_several_responses_say(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    call = Call("get_weather", {"location": "Paris"})
    upstream.when("weather", Reply(calls=(call,)))
    name = await begin(alice, says("first"), says("taken back"))
    for said in ("hello", "the weather?", "a question", "another", "the last"):
        await ask(alice, said, conversation=name)
    added = await items(alice, name)
    for item in added[:2]:  # a run without items is between the others
        await alice.delete(f"{URL}/{name}/items/{item['id']}")
    all_of_them = await items(alice, name)
    assert all_of_them == added[2:]

    for limit in (1, 2, 7, len(all_of_them)):
        assert await pages(alice, name, limit, "asc") == all_of_them, limit
        assert await pages(alice, name, limit, "desc") == all_of_them[::-1], limit
    for item in all_of_them:
        shown = await alice.get(f"{URL}/{name}/items/{item['id']}")
        assert shown.json() == item
    gone = await alice.get(f"{URL}/{name}/items/{added[0]['id']}")
    assert gone.status_code == 404


async def test_an_empty_conversation_has_an_empty_list(alice: AsyncClient) -> None:
    name = await begin(alice)

    listed = (await alice.get(f"{URL}/{name}/items")).json()

    assert listed == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }


async def test_an_approval_is_an_item_and_so_is_its_answer(
    cashier: None, alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    upstream.when(
        "pay",
        Reply(calls=(Call("get_weather", {"location": "Tokyo"}), Call("pay", {"amount": 5}))),
        Reply(text="Paid."),
    )
    name = await begin(alice)
    asked = await ask(alice, "pay", model="cashier", conversation=name)
    [request] = requests_in(asked)
    assert [item["type"] for item in asked["output"]] == ["mcp_call", "mcp_approval_request"]
    assert asked["output"][0]["status"] == "completed"
    assert (await items(alice, name))[1:] == asked["output"]

    body = deciding(asked, decision(request, True), previous_response_id=None, conversation=name)
    done = (await alice.post(RESPONSES, json=body)).json()

    listed = await items(alice, name)
    answer = listed[1 + len(asked["output"])]
    assert listed[1:] == [*asked["output"], answer, *done["output"]]
    assert {**answer, "id": None, "reason": None} == {
        **decision(request, True),
        "id": None,
        "reason": None,
    }


async def test_a_structured_answer_is_an_item_and_so_is_a_failed_call(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    value = {"location": "Tokyo", "temperature": 21.5, "conditions": "clear sky"}
    upstream.when(
        "weather",
        Reply(calls=(Call("get_weather", {"place": "Tokyo"}),)),
        Reply(calls=(Call("get_weather", {"location": "Tokyo"}),)),
        Reply(calls=(Call("final_result", value),)),
    )
    name = await begin(alice)

    said = await ask(alice, "weather?", model="weather", conversation=name)

    listed = await items(alice, name)
    assert [item["type"] for item in said["output"]] == ["mcp_call", "mcp_call", "message"]
    assert listed[1:] == said["output"]
    assert [item["status"] for item in listed[1:3]] == ["failed", "completed"]
    assert listed[1]["error"]["type"] == "mcp_tool_execution_error"
    assert json.loads(listed[-1]["content"][0]["text"]) == value


async def test_what_still_goes_has_the_items_that_it_has(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("slow", Reply(text="one two three", pace=0.5))
    name = await begin(alice)
    begun = await ask(alice, "slow", conversation=name, background=True)

    async with alice.stream("GET", f"{RESPONSES}/{begun['id']}?stream=true") as reply:
        async for line in reply.aiter_lines():
            if "output_text.delta" in line:
                break
        listed = await items(alice, name)

    assert [item["status"] for item in listed] == ["completed", "in_progress"]
    assert listed[1]["content"][0]["text"].startswith("one")
    await alice.post(f"{RESPONSES}/{begun['id']}/cancel")
    after = await items(alice, name)
    assert (after[1]["id"], after[1]["status"]) == (listed[1]["id"], "incomplete")


async def test_a_functions_call_and_its_output_are_items(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("door", Reply(calls=(Call("open_door", {"n": 3}),)), Reply(text="It is open."))
    name = await begin(alice)
    functions = [{"type": "function", "name": "open_door", "parameters": {"type": "object"}}]
    first = await ask(alice, "open the door", conversation=name, tools=functions)
    [call] = first["output"]
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "opened"}

    second = await ask(alice, [output], conversation=name, tools=functions)

    assert second["output"][0]["content"][0]["text"] == "It is open."
    listed = await items(alice, name)
    assert [item["type"] for item in listed] == [
        "message",
        "function_call",
        "function_call_output",
        "message",
    ]
    assert {**listed[2], **output} == listed[2]


async def test_any_chat_is_a_conversation_by_its_name(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Hello", Reply(text="Hello to you."))
    chat = {"model": "assistant", "messages": [says("Hello")]}
    headers = {"X-OpenWebUI-Chat-Id": "my chat"}
    assert (await alice.post("/v1/chat/completions", json=chat, headers=headers)).status_code == 200

    found = (await alice.get(f"{URL}/my chat")).json()
    said = await ask(alice, "And you?", conversation="my chat")

    assert (found["id"], found["metadata"]) == ("my chat", {})
    assert told(await items(alice, "my chat")) == [
        ("user", "Hello"),
        ("assistant", "Hello to you."),
        ("user", "And you?"),
        ("assistant", "ok"),
    ]
    assert said["conversation"] == {"id": "my chat"}
    before = (await items(alice, "my chat"))[1]["id"].split("_")[1]
    shown = (await alice.get(f"{RESPONSES}/resp_{before}")).json()
    assert shown["conversation"] == {"id": "my chat"}


async def test_labels_are_kept_and_replaced(alice: AsyncClient) -> None:
    name = await begin(alice, metadata={"topic": "birds"})

    changed = await alice.post(f"{URL}/{name}", json={"metadata": {"topic": "fish"}})

    assert changed.json()["metadata"] == {"topic": "fish"}
    assert (await alice.get(f"{URL}/{name}")).json() == changed.json()
    emptied = await alice.post(f"{URL}/{name}", json={"metadata": None})
    assert emptied.json()["metadata"] == {}


async def test_a_conversation_is_deleted_with_all_that_goes_on_in_it(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("slow", Reply(text="one two", hang=True))
    name = await begin(alice, says("one"))
    first = await ask(alice, "two", conversation=name)
    second = await ask(alice, "slow", conversation=name, background=True)
    await upstream.wait_for_async(2)

    gone = await alice.delete(f"{URL}/{name}")

    assert gone.json() == {"id": name, "object": "conversation.deleted", "deleted": True}
    for response in (first, second):
        assert (await alice.get(f"{RESPONSES}/{response['id']}")).status_code == 404
    assert (await alice.get(f"{URL}/{name}")).status_code == 404
    assert (await alice.get(f"{URL}/{name}/items")).status_code == 404
    await upstream.wait_until_async(lambda: upstream.requests[-1].aborted, 2)


async def test_what_another_conversation_goes_on_from_stays_with_that_one_unseen(
    alice: AsyncClient, upstream: Upstream
) -> None:
    name = await begin(alice)
    first = await ask(alice, "one", conversation=name)
    await ask(alice, "one and a half", conversation=name)
    chat = {"model": "assistant", "messages": [says("one"), says("ok", "assistant"), says("two")]}
    headers = {"X-OpenWebUI-Chat-Id": "other"}
    await alice.post("/v1/chat/completions", json=chat, headers=headers)

    assert (await alice.delete(f"{URL}/{name}")).status_code == 200
    await ask(alice, "three", conversation="other")

    assert told(await items(alice, "other"))[-4:] == [
        ("user", "two"),
        ("assistant", "ok"),
        ("user", "three"),
        ("assistant", "ok"),
    ]
    assert [text for _, text in last_messages(upstream)] == ["one", "ok", "two", "ok", "three"]
    assert (await alice.get(f"{RESPONSES}/{first['id']}")).status_code == 404


async def test_a_long_conversation_can_be_deleted(alice: AsyncClient) -> None:
    name = await begin(alice)
    for n in range(40):
        await alice.post(f"{URL}/{name}/items", json={"items": [says(str(n))]})

    assert len(await items(alice, name)) == 40
    assert (await alice.delete(f"{URL}/{name}")).status_code == 200


async def test_an_unknown_conversation_is_told_before_anything_is_asked(
    alice: AsyncClient, upstream: Upstream
) -> None:
    refused = await alice.post(RESPONSES, json=asking("Hi", conversation="conv_" + "0" * 32))

    assert refused.status_code == 404
    assert refused.json()["error"]["param"] == "conversation"
    assert upstream.requests == []


async def test_a_strangers_conversation_looks_like_a_missing_one(
    alice: AsyncClient, bob: AsyncClient, upstream: Upstream
) -> None:
    mine = await begin(alice, says("secret"))
    [item] = await items(alice, mine)
    own = await begin(bob)

    async def all_ways(name: str) -> list[tuple[int, str]]:
        replies = [
            await bob.get(f"{URL}/{name}"),
            await bob.post(f"{URL}/{name}", json={"metadata": {}}),
            await bob.delete(f"{URL}/{name}"),
            await bob.get(f"{URL}/{name}/items"),
            await bob.post(f"{URL}/{name}/items", json={"items": [says("x")]}),
            await bob.get(f"{URL}/{name}/items/{item['id']}"),
            await bob.delete(f"{URL}/{name}/items/{item['id']}"),
            await bob.post(RESPONSES, json=asking("Hi", conversation=name)),
        ]
        return [(reply.status_code, reply.text.replace(name, "...")) for reply in replies]

    refused = await all_ways(mine)

    assert {status for status, _ in refused} == {404}
    assert refused == await all_ways("conv_" + "0" * 32)
    assert (await bob.get(f"{URL}/{own}/items/{item['id']}")).status_code == 404
    assert (await bob.delete(f"{URL}/{own}/items/{item['id']}")).status_code == 404
    for odd in ("%00", "x" * 300, "%ff"):
        assert (await alice.get(f"{URL}/{odd}")).status_code == 404
    assert told(await items(alice, mine)) == [("user", "secret")]


async def test_two_owners_may_call_their_chats_alike(alice: AsyncClient, bob: AsyncClient) -> None:
    headers = {"X-OpenWebUI-Chat-Id": "chat"}
    for client, text in ((alice, "I am Alice"), (bob, "I am Bob")):
        body = {"model": "assistant", "messages": [says(text)]}
        await client.post("/v1/chat/completions", json=body, headers=headers)

    assert told(await items(alice, "chat"))[0] == ("user", "I am Alice")
    assert told(await items(bob, "chat"))[0] == ("user", "I am Bob")
    await alice.delete(f"{URL}/chat")
    assert told(await items(bob, "chat"))[0] == ("user", "I am Bob")


REFUSED = {
    "a label of no text": ("", {"metadata": {"a": 1}}),
    "too many labels": ("", {"metadata": {str(n): "" for n in range(17)}}),
    "a long name of a label": ("", {"metadata": {"x" * 65: ""}}),
    "a long label": ("", {"metadata": {"x": "x" * 513}}),
    "too many items": ("", {"items": [says("x")] * 21}),
    "an item that acts": (
        "",
        {"items": [{"type": "mcp_approval_response", "approval_request_id": "x", "approve": True}]},
    ),
    "a call": ("", {"items": [{"type": "function_call", "call_id": "x", "name": "pay"}]}),
    "an image": (
        "",
        {
            "items": [
                {
                    "role": "user",
                    "content": [{"type": "input_image", "image_url": "http://127.0.0.1/"}],
                }
            ]
        },
    ),
    "NUL": ("", {"metadata": {"x": "\x00"}}),
    "half a character": ("", {"items": [says("\ud800")]}),
    "no items": ("/items", {"items": []}),
    "items that are none": ("/items", {"items": 5}),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_what_has_no_meaning_is_refused(alice: AsyncClient, case: str) -> None:
    path, body = REFUSED[case]
    name = await begin(alice)
    url = f"{URL}/{name}{path}" if path else URL

    reply = await alice.post(
        url, content=json.dumps(body), headers={"Content-Type": "application/json"}
    )

    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert await items(alice, name) == []

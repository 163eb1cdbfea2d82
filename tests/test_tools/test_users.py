"""The user service as tools: a model has its caller's rights, and no more."""

import json
from typing import Any

from httpx2 import AsyncClient

from tests.asking import ask, calls, offered, told
from tests.upstream import Reply, Upstream


async def test_a_model_learns_who_asks(alice: AsyncClient, upstream: Upstream) -> None:
    upstream.when("Go.", calls("get_my_account"), Reply("You are Alice."))

    await ask(alice)

    account = json.loads(told(upstream))
    assert (account["name"], account["email"]) == ("Alice", "alice@example.com")
    assert set(account) == {"id", "name", "email"}


async def test_a_model_cannot_say_who_asks(
    alice: AsyncClient, bob: AsyncClient, upstream: Upstream
) -> None:
    bobs_id = (await bob.get("/users/me")).json()["id"]
    upstream.when(
        "Go.",
        calls("rename_me", name="Mallory", user_id=bobs_id),
        calls("get_my_account", user_id=bobs_id),
        Reply("Done."),
    )

    await ask(alice)

    assert (await bob.get("/users/me")).json()["name"] == "Bob"
    assert "bob" not in str(upstream.requests[-1].body["messages"]).lower()


async def test_a_name_is_changed_for_its_owner(
    alice: AsyncClient, bob: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Go.", calls("rename_me", name="Ada Lovelace"), Reply("Done."))

    await ask(alice)

    assert (await alice.get("/users/me")).json()["name"] == "Ada Lovelace"
    assert (await bob.get("/users/me")).json()["name"] == "Bob"


async def test_an_impossible_name_is_told(alice: AsyncClient, upstream: Upstream) -> None:
    upstream.when("Go.", calls("rename_me", name="x" * 500), Reply("Sorry."))

    answer = await ask(alice)

    assert answer.status_code == 200
    assert "1 to 100 characters" in told(upstream)
    assert (await alice.get("/users/me")).json()["name"] == "Alice"


async def test_an_administrator_finds_users(
    admin: AsyncClient, alice: AsyncClient, bob: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Go.", calls("search_users", text="ALICE"), Reply("Found."))

    await ask(admin)

    assert [user["name"] for user in json.loads(told(upstream))] == ["Alice"]


async def test_the_search_for_users_is_not_offered_to_others(
    alice: AsyncClient, bob: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Go.", calls("search_users", text="bob"), Reply("I cannot."))

    answer = await ask(alice)

    mine = {"get_my_account", "rename_me", "get_weather", "extract_document"}
    assert set(offered(upstream)) == mine
    assert answer.json()["choices"][0]["message"]["content"] == "I cannot."
    assert "bob@example.com" not in str(upstream.requests[-1].body)


async def key_of(client: AsyncClient, *scopes: str) -> dict[str, Any]:
    made = await client.post("/users/me/keys", json={"name": "app", "scopes": list(scopes)})
    return {"Authorization": f"Bearer {made.json()['key']}"}


async def test_a_keys_scopes_hide_what_they_do_not_name(
    alice: AsyncClient, upstream: Upstream
) -> None:
    upstream.when("Go.", calls("rename_me", name="Mallory"), Reply("I cannot."))
    alice.headers.update(await key_of(alice, "weather:read", "users:read"))

    await ask(alice)

    assert set(offered(upstream)) == {"get_my_account", "get_weather", "extract_document"}
    assert (await alice.get("/users/me")).json()["name"] == "Alice"


async def test_an_administrators_key_without_admin_does_not_search(
    admin: AsyncClient, upstream: Upstream
) -> None:
    admin.headers.update(await key_of(admin, "*"))

    await ask(admin)

    mine = {"get_my_account", "rename_me", "get_weather", "extract_document"}
    assert set(offered(upstream)) == mine

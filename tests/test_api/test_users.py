import asyncio
from collections.abc import AsyncGenerator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from httpx2 import ASGITransport, AsyncClient
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from app.api.routes import auth, users
from app.config import Settings
from app.core.errors import register_exception_handlers
from app.db.base import Base
from app.db.session import get_db, make_engine, make_sessions
from app.models import ApiKey
from app.schemas.user import UserCreate
from app.services.user import UserService

PASSWORD = "correct horse battery"

Sessions = async_sessionmaker[AsyncSession]


def carol(**fields: Any) -> dict[str, Any]:
    return {"email": "carol@example.com", "name": "Carol", "password": PASSWORD} | fields


async def id_of(client: AsyncClient) -> int:
    return (await client.get("/users/me")).json()["id"]


async def new_key(client: AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await client.post("/users/me/keys", json={"name": "laptop"} | fields)
    assert answer.status_code == 201
    return answer.json()


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


async def log_in(client: AsyncClient, email: str, password: str = PASSWORD) -> int:
    form = {"username": email, "password": password}
    return (await client.post("/auth/token", data=form)).status_code


@pytest.fixture
async def sessions(tmp_path: Path) -> AsyncGenerator[Sessions]:
    engine = make_engine(Settings.model_validate({"database_url": f"sqlite:///{tmp_path}/test.db"}))
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield make_sessions(engine)
    await engine.dispose()


@pytest.fixture
async def closed(sessions: Sessions) -> AsyncGenerator[AsyncClient]:
    """A server where only administrators make accounts, with one: root@example.com."""

    async def override_get_db() -> AsyncGenerator[AsyncSession]:
        async with sessions() as session:
            yield session

    app = FastAPI()
    app.include_router(users.router)
    app.include_router(auth.router)
    register_exception_handlers(app)
    app.state.settings = Settings.model_validate(
        {"auth": "required", "registration": "closed", "secret_key": "s" * 32}
    )
    app.dependency_overrides[get_db] = override_get_db
    async with sessions() as session:
        root = UserCreate(email="root@example.com", name="Root", password=PASSWORD)
        await UserService(session).create(root, is_admin=True)
    async with AsyncClient(transport=ASGITransport(app), base_url="http://test") as client:
        yield client


async def session_of(client: AsyncClient, email: str) -> dict[str, str]:
    form = {"username": email, "password": PASSWORD}
    return bearer((await client.post("/auth/token", data=form)).json()["access_token"])


# Registration


async def test_where_registration_is_closed_only_an_administrator_makes_accounts(
    closed: AsyncClient,
):
    assert (await closed.post("/users/", json=carol())).status_code == 401

    root = await session_of(closed, "root@example.com")
    assert (await closed.post("/users/", json=carol(), headers=root)).status_code == 201

    user = await session_of(closed, "carol@example.com")
    dave = carol(email="dave@example.com")
    assert (await closed.post("/users/", json=dave, headers=user)).status_code == 403


async def test_where_registration_is_open_anybody_makes_their_account(anonymous: AsyncClient):
    answer = await anonymous.post("/users/", json=carol(email=" Carol@Example.com "))

    assert answer.status_code == 201
    body = answer.json()
    assert set(body) == {"id", "email", "name", "is_admin", "created_at", "updated_at"}
    assert (body["email"], body["is_admin"]) == ("carol@example.com", False)
    assert datetime.fromisoformat(body["created_at"]).utcoffset() == timedelta(0)
    assert await log_in(anonymous, "carol@example.com") == 200


async def test_an_invalid_bearer_is_refused_even_where_registration_is_open(
    anonymous: AsyncClient, local: AsyncClient
):
    for client in (anonymous, local):
        answer = await client.post("/users/", json=carol(), headers=bearer("garbage"))

        assert answer.status_code == 401


async def test_this_machine_needs_no_bearer_in_local_mode(local: AsyncClient):
    assert (await local.post("/users/", json=carol())).status_code == 201
    assert (await local.get("/users/me")).json()["email"] == "local@localhost"


async def test_a_web_page_cannot_act_as_this_machine(local: AsyncClient):
    for headers in ({"Host": "rebound.example.com"}, {"Origin": "https://example.com"}):
        assert (await local.post("/users/", json=carol(), headers=headers)).status_code == 401
        assert (await local.get("/users/me", headers=headers)).status_code == 401


async def test_nobody_sets_what_the_server_decides(anonymous: AsyncClient, alice: AsyncClient):
    for field in ("id", "is_admin", "hashed_password", "created_at", "updated_at", "owner_id"):
        assert (await anonymous.post("/users/", json=carol(**{field: 1}))).status_code == 422
        assert (await alice.patch("/users/me", json={field: 1})).status_code == 422


async def test_what_is_no_email_address_is_refused(anonymous: AsyncClient):
    for email in (
        "carol",
        "@example.com",
        "carol@",
        "carol@localhost",
        "local@localhost",
        "carol@example..com",
        "carol@-example.com",
        "carol@10.0.0.1",
        ".carol@example.com",
        "ca rol@example.com",
        "carol@example.com\nbcc: x@example.com",
        "c\u00e0rol@example.com",
        "x" * 250 + "@example.com",
    ):
        answer = await anonymous.post("/users/", json=carol(email=email))

        assert answer.status_code == 422, email
        assert answer.json()["error"]["param"] == "email"


async def test_lengths_are_bounded(anonymous: AsyncClient):
    for wrong in (
        {"name": ""},
        {"name": "   "},
        {"name": "x" * 101},
        {"password": "short"},
        {"password": "x" * 129},
    ):
        assert (await anonymous.post("/users/", json=carol(**wrong))).status_code == 422, wrong


async def test_text_that_cannot_be_stored_is_refused(alice: AsyncClient):
    headers = {"Content-Type": "application/json"}
    for field in ("email", "name", "password", "current_password", "surplus"):
        for bad in ("\\u0000", "\\ud800", "\\udc00\\ud800"):
            for body in (f'{{"{field}": "carol{bad}carol"}}', f'{{"{field}{bad}": 1}}'):
                answer = await alice.patch("/users/me", content=body, headers=headers)

                assert answer.status_code == 422, body


async def test_malformed_json_is_the_clients_mistake(alice: AsyncClient):
    headers = {"Content-Type": "application/json"}
    for body in (
        b"",
        b"[]",
        b"null",
        b"NaN",
        b"{",
        b"\xff",
        b'{"name": "\xff"}',
        b'{"name": ' + b"9" * 5000 + b"}",
        b'{"name": NaN}',
        b'{"name": ' + b"[" * 100_000,
    ):
        answer = await alice.patch("/users/me", content=body, headers=headers)

        assert answer.status_code in (400, 422), body[:100]


async def test_a_password_is_taken_as_typed(anonymous: AsyncClient):
    password = "  \u00fc\u4f60\U0001f600  spaces  "
    await anonymous.post("/users/", json=carol(password=password))

    assert await log_in(anonymous, "carol@example.com", password) == 200
    assert await log_in(anonymous, "carol@example.com", password.strip()) == 401


async def test_an_email_address_has_one_account(anonymous: AsyncClient, alice: AsyncClient):
    answer = await anonymous.post("/users/", json=carol(email="ALICE@example.com"))

    assert answer.status_code == 409
    assert answer.json()["error"]["code"] == "email_taken"


async def test_of_simultaneous_registrations_one_succeeds(anonymous: AsyncClient):
    answers = await asyncio.gather(*(anonymous.post("/users/", json=carol()) for _ in range(5)))

    assert sorted(answer.status_code for answer in answers) == [201, 409, 409, 409, 409]


# Reading


async def test_without_a_credential_nothing_is_shown_or_changed(
    anonymous: AsyncClient, alice: AsyncClient
):
    for method, path in (
        ("GET", "/users/"),
        ("GET", "/users/1"),
        ("PATCH", "/users/1"),
        ("DELETE", "/users/1"),
        ("GET", "/users/me"),
        ("PATCH", "/users/me"),
        ("DELETE", "/users/me"),
        ("GET", "/users/me/keys"),
        ("POST", "/users/me/keys"),
        ("DELETE", "/users/me/keys/1"),
    ):
        body = {"name": "x"} if method in ("PATCH", "POST") else None

        assert (await anonymous.request(method, path, json=body)).status_code == 401, path


async def test_a_stranger_looks_like_nobody(alice: AsyncClient, bob: AsyncClient):
    for method in ("GET", "PATCH", "DELETE"):
        body = {"name": "Mallory"} if method == "PATCH" else None

        stranger = await bob.request(method, f"/users/{await id_of(alice)}", json=body)
        missing = await bob.request(method, "/users/123456789", json=body)

        assert stranger.status_code == missing.status_code == 404
        assert stranger.json() == missing.json()


async def test_an_impossible_id_is_not_found(alice: AsyncClient, admin: AsyncClient):
    for user_id in (0, -1, 2**31, 2**63, 10**40, "9" * 4000, "9" * 5000, "x", "%00"):
        for client in (alice, admin):
            for method in ("GET", "DELETE"):
                answer = await client.request(method, f"/users/{user_id}")

                assert answer.status_code in (404, 422), user_id
        assert (await alice.delete(f"/users/me/keys/{user_id}")).status_code in (404, 422)
        assert (await admin.get("/users/", params={"after": user_id})).status_code in (200, 422)


async def test_everybody_sees_themselves(alice: AsyncClient):
    me = (await alice.get("/users/me")).json()

    assert me["email"] == "alice@example.com"
    assert (await alice.get(f"/users/{me['id']}")).json() == me


async def test_an_administrator_sees_everybody(alice: AsyncClient, admin: AsyncClient):
    answer = await admin.get(f"/users/{await id_of(alice)}")

    assert answer.json()["email"] == "alice@example.com"


async def test_only_an_administrator_lists_users(
    alice: AsyncClient, bob: AsyncClient, admin: AsyncClient
):
    assert (await alice.get("/users/")).status_code == 403

    everybody = (await admin.get("/users/")).json()
    first = (await admin.get("/users/", params={"limit": 1})).json()
    rest = (await admin.get("/users/", params={"after": first[0]["id"]})).json()

    assert {"alice@example.com", "bob@example.com"} <= {user["email"] for user in everybody}
    assert first + rest == everybody
    assert (await admin.get("/users/", params={"limit": 0})).status_code == 422


# Changing


async def test_everybody_changes_their_own_name_and_email(alice: AsyncClient):
    answer = await alice.patch("/users/me", json={"name": " Al ", "email": "Al@Example.com"})

    assert answer.status_code == 200
    assert (answer.json()["name"], answer.json()["email"]) == ("Al", "al@example.com")
    assert (await alice.get("/users/me")).json() == answer.json()


async def test_anothers_email_cannot_be_taken(alice: AsyncClient, bob: AsyncClient):
    answer = await alice.patch("/users/me", json={"email": "BOB@example.com"})

    assert answer.status_code == 409
    assert (await alice.get("/users/me")).json()["email"] == "alice@example.com"


async def test_a_new_password_needs_the_current_one(alice: AsyncClient):
    new = {"password": "another long password"}

    assert (await alice.patch("/users/me", json=new)).status_code == 422
    wrong = new | {"current_password": "a guess"}
    assert (await alice.patch("/users/me", json=wrong)).status_code == 403
    right = new | {"current_password": PASSWORD}
    assert (await alice.patch(f"/users/{await id_of(alice)}", json=right)).status_code == 200

    assert await log_in(alice, "alice@example.com") == 401
    assert await log_in(alice, "alice@example.com", new["password"]) == 200


async def test_an_administrator_sets_anothers_password_but_not_so_their_own(
    alice: AsyncClient, admin: AsyncClient
):
    new = {"password": "another long password"}

    assert (await admin.patch(f"/users/{await id_of(admin)}", json=new)).status_code == 422
    assert (await admin.patch(f"/users/{await id_of(alice)}", json=new)).status_code == 200
    assert await log_in(alice, "alice@example.com", new["password"]) == 200


async def test_a_deleted_account_is_gone_with_its_keys_and_sessions(
    alice: AsyncClient, anonymous: AsyncClient
):
    key = await new_key(alice)

    assert (await alice.delete("/users/me")).status_code == 204

    assert (await alice.get("/users/me")).status_code == 401
    assert (await anonymous.get("/users/me", headers=bearer(key["key"]))).status_code == 401
    assert await log_in(anonymous, "alice@example.com") == 401


async def test_an_old_session_does_not_open_a_new_account(
    alice: AsyncClient, anonymous: AsyncClient
):
    await alice.delete("/users/me")
    await anonymous.post("/users/", json=carol())

    assert (await alice.get("/users/me")).status_code == 401


async def test_an_administrator_deletes_an_account_once(alice: AsyncClient, admin: AsyncClient):
    path = f"/users/{await id_of(alice)}"

    assert (await admin.delete(path)).status_code == 204
    assert (await admin.delete(path)).status_code == 404


async def test_the_local_administrator_stays(local: AsyncClient):
    assert (await local.delete("/users/me")).status_code == 409
    assert (await local.get("/users/me")).status_code == 200


# Keys


async def test_a_key_is_shown_once_and_works_until_it_is_revoked(
    alice: AsyncClient, anonymous: AsyncClient
):
    answer = await alice.post("/users/me/keys", json={"name": "laptop"})
    key = answer.json()
    headers = bearer(key["key"])

    assert answer.headers["cache-control"] == "no-store"
    assert (await anonymous.get("/users/me", headers=headers)).status_code == 200
    (listed,) = (await alice.get("/users/me/keys")).json()
    assert listed == {name: value for name, value in key.items() if name != "key"}
    assert key["key"].startswith(listed["prefix"])
    assert (listed["scopes"], listed["expires_at"]) == (["*"], None)

    assert (await alice.delete(f"/users/me/keys/{key['id']}")).status_code == 204
    assert (await anonymous.get("/users/me", headers=headers)).status_code == 401
    assert (await alice.delete(f"/users/me/keys/{key['id']}")).status_code == 404


async def test_a_stranger_neither_sees_nor_revokes_my_keys(
    alice: AsyncClient, bob: AsyncClient, admin: AsyncClient
):
    key = await new_key(alice)

    for stranger in (bob, admin):
        assert (await stranger.get("/users/me/keys")).json() == []
        mine = await stranger.delete(f"/users/me/keys/{key['id']}")
        missing = await stranger.delete("/users/me/keys/123456789")
        assert (mine.status_code, mine.json()) == (missing.status_code, missing.json())
        assert mine.status_code == 404
    assert (await alice.get("/users/me", headers=bearer(key["key"]))).status_code == 200


async def test_a_key_expires(closed: AsyncClient, sessions: Sessions):
    closed.headers.update(await session_of(closed, "root@example.com"))
    key = await new_key(closed, expires_in_days=1)
    left = datetime.fromisoformat(key["expires_at"]) - datetime.now(UTC)
    assert timedelta(hours=23) < left <= timedelta(days=1)
    assert (await closed.get("/users/me", headers=bearer(key["key"]))).status_code == 200

    async with sessions.begin() as session:
        await session.execute(update(ApiKey).values(expires_at=datetime.now(UTC)))

    assert (await closed.get("/users/me", headers=bearer(key["key"]))).status_code == 401


async def test_a_key_cannot_make_one_that_may_do_more(alice: AsyncClient):
    scopes = ["users:write", "weather:read"]
    headers = bearer((await new_key(alice, scopes=scopes))["key"])

    async def status(*scopes: str) -> int:
        body = {"name": "child", "scopes": scopes}
        return (await alice.post("/users/me/keys", json=body, headers=headers)).status_code

    assert await status("weather:read") == 201
    assert await status("weather:write") == 403
    assert await status("*") == 403
    assert await status("weather:read", "admin") == 403


async def test_a_key_cannot_make_one_that_lasts_longer(alice: AsyncClient):
    key = await new_key(alice, expires_in_days=2)
    headers = bearer(key["key"])

    async def end_of_child(**fields: Any) -> str:
        body = {"name": "child", **fields}
        return (await alice.post("/users/me/keys", json=body, headers=headers)).json()["expires_at"]

    assert await end_of_child() == key["expires_at"]
    assert await end_of_child(expires_in_days=30) == key["expires_at"]
    assert await end_of_child(expires_in_days=1) < key["expires_at"]


async def test_only_an_administrator_makes_an_administrators_key(
    alice: AsyncClient, admin: AsyncClient, anonymous: AsyncClient
):
    body = {"name": "root", "scopes": ["*", "admin"]}
    assert (await alice.post("/users/me/keys", json=body)).status_code == 403

    full = bearer((await new_key(admin, scopes=["*", "admin"]))["key"])
    plain = bearer((await new_key(admin))["key"])

    assert (await anonymous.get("/users/", headers=full)).status_code == 200
    assert (await anonymous.get("/users/", headers=plain)).status_code == 403
    assert (await anonymous.post("/users/me/keys", json=body, headers=plain)).status_code == 403


async def test_a_key_without_the_scope_cannot_change_the_account(
    alice: AsyncClient, anonymous: AsyncClient
):
    key = await new_key(alice, scopes=["weather:read"])
    anonymous.headers.update(bearer(key["key"]))

    assert (await anonymous.get("/users/me")).status_code == 200
    assert (await anonymous.patch("/users/me", json={"name": "Mallory"})).status_code == 403
    assert (await anonymous.delete("/users/me")).status_code == 403
    assert (await anonymous.delete(f"/users/{await id_of(alice)}")).status_code == 403
    assert (await anonymous.post("/users/me/keys", json={"name": "x"})).status_code == 403
    assert (await anonymous.delete(f"/users/me/keys/{key['id']}")).status_code == 403


async def test_a_malformed_key_request_is_refused(alice: AsyncClient):
    malformed: list[dict[str, Any]] = [
        {"scopes": []},
        {"scopes": ["Weather"]},
        {"scopes": ["two words"]},
        {"scopes": ["a\n"]},
        {"scopes": [""]},
        {"scopes": ["x" * 65]},
        {"scopes": [f"s{number}" for number in range(21)]},
        {"scopes": [letter * 64 for letter in "abcdefghijklmnopqrst"]},
        {"scopes": "*"},
        {"name": ""},
        {"expires_in_days": 0},
        {"expires_in_days": 10**20},
        {"user_id": 1},
        {"key": "ab_mine"},
        {"expires_at": None},
    ]
    for fields in malformed:
        answer = await alice.post("/users/me/keys", json={"name": "laptop"} | fields)

        assert answer.status_code == 422, fields

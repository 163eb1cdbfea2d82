"""AUTH=local answers whoever sits at this machine, and nobody who only comes through it."""

import socket

from httpx2 import ASGITransport, AsyncClient

from app.main import app
from tests.conftest import settings_of
from tests.server import ThreadedServer


async def status(client: AsyncClient, **headers: str) -> int:
    return (await client.get("/users/me", headers=headers)).status_code


async def test_this_machine_is_the_local_administrator(local: AsyncClient):
    me = (await local.get("/users/me")).json()

    assert (me["email"], me["is_admin"]) == ("local@localhost", True)
    assert (await local.get("/users/")).status_code == 200


OUR_NAMES = [
    "localhost",
    "localhost:8000",
    "LOCALHOST",
    "127.0.0.1:80",
    "[::1]:8000",
    "127.0.0.2",
    "laptop",
]


async def test_names_of_this_machine_are_answered(local: AsyncClient):
    for host in OUR_NAMES:
        assert await status(local, Host=host) == 200, host


OTHER_NAMES = [
    "web:8000",
    "example.com",
    "rebound.example.com:8000",
    "localhost.example.com",
    "127.0.0.1.example.com",
    "0.0.0.0",
    "10.0.0.1",
    "169.254.169.254",
    "[fe80::1]",
    "localhost.",
    "user@example.com",
]


async def test_a_name_that_may_have_been_rebound_is_not(local: AsyncClient):
    for host in OTHER_NAMES:
        assert await status(local, Host=host) in (400, 401), host


OUR_PAGES = ["http://localhost:3000", "http://127.0.0.1", "https://localhost", "http://[::1]:80"]


async def test_a_page_of_this_machine_is_answered(local: AsyncClient):
    for origin in OUR_PAGES:
        assert await status(local, Origin=origin) == 200, origin


OTHER_PAGES = [
    "https://example.com",
    "http://localhost.example.com",
    "http://laptop",
    "null",
    "",
    "file://",
    "http://10.0.0.1",
    "localhost",
]


async def test_any_other_page_is_not(local: AsyncClient):
    for origin in OTHER_PAGES:
        assert await status(local, Origin=origin) in (400, 401), origin


async def test_a_malformed_name_is_nobodys(local: AsyncClient):
    for name in ("[::1", "[", "]", "[127.0.0.1]"):
        assert await status(local, Host=name) in (400, 401), name
        assert await status(local, Origin=f"http://{name}") in (400, 401), name


async def test_a_bearer_must_be_valid_also_here(local: AsyncClient):
    for bearer in ("Bearer garbage", "Bearer ab_" + "0" * 48, "Basic eDp5", "Bearer", ""):
        assert await status(local, Authorization=bearer) == 401


async def test_a_valid_bearer_is_who_it_says(local: AsyncClient):
    user = {"email": "ada@example.com", "name": "Ada", "password": "correct horse battery"}
    await local.post("/users/", json=user)
    form = {"username": "ada@example.com", "password": "correct horse battery"}
    token = (await local.post("/auth/token", data=form)).json()["access_token"]

    me = await local.get("/users/me", headers={"Authorization": f"Bearer {token}"})

    assert (me.json()["email"], me.json()["is_admin"]) == ("ada@example.com", False)


async def test_another_machine_is_not_answered():
    for address in ("10.0.0.7", "203.0.113.9", "fe80::1", "::ffff:10.0.0.7"):
        transport = ASGITransport(app, client=(address, 4711))
        async with AsyncClient(transport=transport, base_url="http://localhost") as client:
            answer = await client.get("/users/me")

            assert answer.status_code == 401
            assert "only this machine" in answer.json()["error"]["message"]


async def test_what_came_through_a_proxy_is_not_answered(local: AsyncClient):
    forwarded = {"X-Forwarded-For": "203.0.113.9"}

    assert await status(local, **forwarded) == 401


def test_a_request_without_a_host_does_not_break_the_server(environ: dict[str, str]):
    with ThreadedServer(settings_of(environ, auth="local")) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(b"GET /users/me HTTP/1.0\r\n\r\n")
            first = connection.recv(64)

    assert first.split()[1] in (b"200", b"400", b"401")


async def test_required_asks_this_machine_too(anonymous: AsyncClient):
    for headers in ({}, {"Host": "localhost"}, {"Origin": "http://localhost"}):
        answer = await anonymous.get("/users/me", headers=headers)

        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"


async def test_a_page_of_this_machine_may_read_answers(local: AsyncClient):
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-chat-id"}
    for origin in OUR_PAGES:
        reply = await local.options("/v1/models", headers={"Origin": origin, **asks})
        assert reply.headers.get("access-control-allow-origin") == origin
    for origin in OTHER_PAGES:
        reply = await local.options("/v1/models", headers={"Origin": origin, **asks})
        assert "access-control-allow-origin" not in reply.headers, origin


async def test_in_production_only_named_pages_may(environ: dict[str, str]):
    named = "https://chat.example.com"
    settings = settings_of(environ, auth=None, environment="production", cors_origins=named)
    with ThreadedServer(settings) as running:
        async with AsyncClient(base_url=running.url) as client:
            for origin, allowed in [(named, named), ("http://localhost:3000", None)]:
                reply = await client.get("/v1/models", headers={"Origin": origin})
                assert reply.headers.get("access-control-allow-origin") == allowed
                assert "access-control-allow-credentials" not in reply.headers

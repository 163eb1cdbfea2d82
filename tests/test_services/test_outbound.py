"""What a model, a user or a redirect may make this server connect to, and for how long."""

import asyncio
import gzip
import ipaddress
import socket
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest

from app.deps import call_key
from app.services.outbound import MAX_REPLY, OutboundRefused, ReplyRefused, is_public, make_http
from tests.conftest import settings_of
from tests.toolserver import ToolServer

MINUTE = 60


def client(*allow: str, **changes: Any) -> httpx2.AsyncClient:
    return make_http(settings_of({"OUTBOUND_ALLOW": ",".join(allow)}, **changes))


class Door:
    """Counts who knocks, by the address they knocked at. Answers 200 and closes."""

    def __init__(self) -> None:
        self.knocks: list[str] = []
        self.port = 0

    async def open(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.knocks.append(writer.get_extra_info("sockname")[0])
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()


@asynccontextmanager
async def listening(*addresses: str) -> AsyncIterator[Door]:
    """A door at each of the addresses, all with one port."""
    door = Door()
    servers: list[asyncio.Server] = []
    try:
        for address in addresses:
            servers.append(await asyncio.start_server(door.open, address, door.port))
            door.port = servers[0].sockets[0].getsockname()[1]
        yield door
    finally:
        for server in servers:
            server.close()


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    async with listening("127.0.0.1") as door:
        yield door


@pytest.fixture
def other() -> Iterator[ToolServer]:
    with ToolServer() as server:
        yield server


def resolve(monkeypatch: pytest.MonkeyPatch, name: str, answers: Sequence[str]) -> list[str]:
    """Makes the system's resolver answer `name` so, the last answer for good; returns the log."""
    real, asked = socket.getaddrinfo, list[str]()

    def getaddrinfo(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        if host not in (name, name.encode()):
            return real(host, port, *args, **options)
        asked.append(name)
        found = answers[min(len(asked), len(answers)) - 1]
        return [item for each in found.split() for item in real(each, port, *args, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


INWARD = [
    "127.0.0.1",
    "127.0.0.2",
    "localhost",
    "LocalHost",
    "localhost.",
    "127.0.0.1.",
    "127.1",
    "2130706433",
    "0x7f000001",
    "0",
    "0.0.0.0",
    "user:password@127.0.0.1",
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[::127.0.0.1]",
    "[64:ff9b::7f00:1]",
    "[64:ff9b:1::7f00:1]",
    "[2002:7f00:1::]",
    "[2001:0:4136:e378:8000:63bf:80ff:fffe]",
]

ELSEWHERE = [
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "2852039166",
    "100.64.0.1",
    "192.0.0.170",
    "198.18.0.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "[fd00:ec2::254]",
    "[fe80::1]",
    "[fec0::1]",
    "[ff02::1]",
    "[::ffff:169.254.169.254]",
    "[64:ff9b::a9fe:a9fe]",
]


@pytest.mark.parametrize("host", INWARD + ELSEWHERE)
async def test_no_spelling_of_an_inner_address_is_connected(door: Door, host: str) -> None:
    async with client() as http:
        with pytest.raises(OutboundRefused, match="not public"):
            await http.get(f"http://{host}:{door.port}/")

    assert door.knocks == []


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://127.0.0.1/", "gopher://127.0.0.1/", "ws://127.0.0.1/"]
)
async def test_only_http_goes_out(url: str) -> None:
    async with client("127.0.0.1") as http:
        with pytest.raises(OutboundRefused, match="Only http and https"):
            await http.get(url)


@pytest.mark.parametrize(
    "url",
    [
        "http:///",
        "http://a b/",
        "http://.../",
        "http://" + "a" * 300,
        "http://[::1%25lo]/",
        "http://93.184.216.34:99999/",
    ],
)
async def test_what_is_no_host_is_an_error_that_tools_know(url: str) -> None:
    async with client() as http:
        with pytest.raises(httpx2.TransportError):
            await http.get(url)


@pytest.mark.parametrize("url", ["http://0177.0.0.1/", "http://ⓛocalhost/", "http://[::1/"])
async def test_what_is_no_url_is_refused_before_the_guard(url: str) -> None:
    async with client() as http:
        with pytest.raises(httpx2.InvalidURL):
            await http.get(url)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::5db8:d822", True),
        ("2001:db8::1", False),
        ("5f00::1", False),
    ],
)
def test_public_is_what_the_internet_routes(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) is public


async def test_a_name_is_refused_if_any_of_its_addresses_is_inside(
    door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve(monkeypatch, "mixed.example.com", ["93.184.216.34 127.0.0.1"])

    async with client() as http:
        with pytest.raises(OutboundRefused):
            await http.get(f"http://mixed.example.com:{door.port}/")

    assert door.knocks == []


async def test_the_address_that_was_checked_is_the_one_connected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = resolve(monkeypatch, "rebound.example.com", ["127.0.0.2", "127.0.0.1"])

    async with listening("127.0.0.1", "127.0.0.2") as door, client("127.0.0.2/32") as http:
        url = f"http://rebound.example.com:{door.port}/"
        reply = await http.get(url)
        with pytest.raises(OutboundRefused):
            await http.get(url)

    assert reply.status_code == 200
    assert reply.request.headers["host"] == f"rebound.example.com:{door.port}"
    assert door.knocks == ["127.0.0.2"]
    assert len(asked) == 2


async def test_the_next_address_is_tried_where_one_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resolve(monkeypatch, "two.example.com", ["127.0.0.3 127.0.0.2"])

    async with listening("127.0.0.2") as door, client("127.0.0.0/8") as http:
        reply = await http.get(f"http://two.example.com:{door.port}/")

    assert reply.status_code == 200
    assert door.knocks == ["127.0.0.2"]


async def test_two_names_at_one_address_do_not_share_a_connection(
    tools: ToolServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = tools.url.rsplit(":", 1)[1]
    resolve(monkeypatch, "one.example.com", ["127.0.0.1"])
    resolve(monkeypatch, "two.example.com", ["127.0.0.1"])

    async with client("127.0.0.0/8") as http:
        first = await http.get(f"http://one.example.com:{port}/effects/a")
        second = await http.get(f"http://two.example.com:{port}/effects/a")

    hosts = [call.headers["host"] for call in tools.calls]
    assert hosts == [f"one.example.com:{port}", f"two.example.com:{port}"]
    streams = [reply.extensions["network_stream"] for reply in (first, second)]
    assert streams[0] is not streams[1]


async def test_a_redirect_inward_is_not_followed(tools: ToolServer, door: Door) -> None:
    tools.behave("/away", status=302, headers={"location": f"http://127.0.0.1:{door.port}/secrets"})

    async with client(tools.url.removeprefix("http://")) as http:
        with pytest.raises(OutboundRefused):
            await http.get(f"{tools.url}/away", follow_redirects=True)

    assert tools.count("/away") == 1
    assert door.knocks == []


async def test_credentials_do_not_follow_a_redirect_to_another_origin(
    tools: ToolServer, other: ToolServer
) -> None:
    tools.behave("/away", status=307, headers={"location": f"{other.url}/effects/caught"})
    tools.behave("/near", status=307, headers={"location": "/effects/home"})
    token = call_key.set("key-of-the-call")
    headers = {"Authorization": "Bearer s3cret", "X-Api-Key": "s3cret", "Cookie": "s=s3cret"}

    async with client("127.0.0.1") as http:
        await http.post(f"{tools.url}/near", headers=headers, follow_redirects=True)
        await http.post(f"{tools.url}/away", headers=headers, follow_redirects=True)
    call_key.reset(token)

    [home] = [call for call in tools.calls if call.path == "/effects/home"]
    assert (home.headers["authorization"], home.headers["x-api-key"]) == ("Bearer s3cret", "s3cret")
    assert home.headers["idempotency-key"] == "key-of-the-call"
    [caught] = other.calls
    assert "s3cret" not in str(caught)
    assert "idempotency-key" not in caught.headers


async def test_no_cookie_outlives_its_reply(tools: ToolServer) -> None:
    tools.behave("/effects/login", headers={"set-cookie": "session=alices; Path=/"})

    async with client("127.0.0.1") as http:
        await http.get(f"{tools.url}/effects/login")
        await http.get(f"{tools.url}/effects/account")

    assert "cookie" not in tools.calls[-1].headers


async def test_proxy_variables_are_ignored(
    tools: ToolServer, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{door.port}")

    async with client("127.0.0.1") as http:
        reply = await http.get(f"{tools.url}/effects/a")

    assert reply.status_code == 200
    assert door.knocks == []


@pytest.mark.parametrize(
    ("allow", "host"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.1:PORT", "127.0.0.1"),
        ("127.0.0.0/8", "127.0.0.1"),
        ("127.0.0.9/8", "127.0.0.1"),
        ("localhost", "localhost"),
        ("LOCALHOST:PORT", "localhost"),
    ],
)
async def test_what_is_allowed_is_reached(door: Door, allow: str, host: str) -> None:
    async with client(allow.replace("PORT", str(door.port))) as http:
        reply = await http.get(f"http://{host}:{door.port}/")

    assert reply.status_code == 200


@pytest.mark.parametrize(
    ("allow", "host"),
    [
        ("127.0.0.1:1", "127.0.0.1"),
        ("10.0.0.0/8", "127.0.0.1"),
        ("localhost", "127.0.0.1"),
        ("localhost", "localhost."),
        ("localhost.example.com", "localhost"),
        ("example.com", "localhost"),
    ],
)
async def test_no_more_than_what_is_allowed_is_reached(door: Door, allow: str, host: str) -> None:
    async with client(allow) as http:
        with pytest.raises(OutboundRefused):
            await http.get(f"http://{host}:{door.port}/")

    assert door.knocks == []


async def test_an_ipv6_network_can_be_allowed() -> None:
    async with listening("::1") as door, client("::1/128") as http:
        reply = await http.get(f"http://[::1]:{door.port}/")

    assert reply.status_code == 200


@pytest.mark.parametrize(
    "item",
    [
        *("http://host", "host/path", "a b", "host:port", "host:99999", "user@host", "[::1", ":80"),
        *("*.example.com", "10.0.0.300", "10.0.0.300:80", "10.0.0", ".com", "-"),
    ],
)
def test_a_malformed_item_is_named(item: str) -> None:
    with pytest.raises(ValueError, match=r"OUTBOUND_ALLOW: .* is no host, host:port or network"):
        client(item)


async def test_base_urls_of_settings_are_reached_but_not_the_models(
    tools: ToolServer, door: Door
) -> None:
    urls = {
        "weather_api_url": tools.url,
        "openai_base_url": f"http://127.0.0.1:{door.port}/v1",
    }

    async with client(**urls) as http:
        reply = await http.get(f"{tools.url}/effects/a")
        with pytest.raises(OutboundRefused):
            await http.get(f"http://127.0.0.1:{door.port}/v1/models")

    assert reply.status_code == 200
    assert door.knocks == []


async def test_the_key_of_a_tool_call_goes_with_all_but_get(tools: ToolServer) -> None:
    async with client("127.0.0.1") as http:
        token = call_key.set("key-of-the-call")
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
            await http.request(method, f"{tools.url}/effects/a")
        await http.post(f"{tools.url}/effects/a", headers={"Idempotency-Key": "my own"})
        call_key.reset(token)
        await http.post(f"{tools.url}/effects/a")

    keys = [call.headers.get("idempotency-key") for call in tools.calls]
    assert keys == [None, *["key-of-the-call"] * 4, "my own", None]


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param({"drip": (b"x" * 1000, 0.05)}, id="a byte now and then"),
        pytest.param({"hang": True}, id="silence"),
        pytest.param({"delay": MINUTE}, id="a late first byte"),
    ],
)
async def test_a_slow_reply_ends_in_time(tools: ToolServer, behaviour: dict[str, Any]) -> None:
    tools.behave("/effects/slow", **behaviour)
    started = time.monotonic()

    async with client("127.0.0.1", tool_timeout="0.3") as http:
        with pytest.raises(httpx2.ReadTimeout):
            await http.get(f"{tools.url}/effects/slow")

    assert time.monotonic() - started < 2


async def test_a_tool_may_take_its_time_for_one_request(tools: ToolServer) -> None:
    tools.behave("/effects/slow", drip=(b"x" * 10, 0.05))

    async with client("127.0.0.1", tool_timeout="0.1") as http:
        reply = await http.get(f"{tools.url}/effects/slow", timeout=MINUTE)

    assert reply.content == b"x" * 10


async def test_a_large_reply_is_not_read_to_its_end(tools: ToolServer) -> None:
    tools.behave("/effects/large", body=b"x" * (MAX_REPLY + 1))

    async with client("127.0.0.1") as http:
        with pytest.raises(ReplyRefused):
            await http.get(f"{tools.url}/effects/large")


async def test_a_gzip_bomb_is_defused(tools: ToolServer) -> None:
    bomb = gzip.compress(b"\0" * 20 * MAX_REPLY)
    tools.behave("/effects/bomb", body=bomb, headers={"content-encoding": "gzip"})

    async with client("127.0.0.1") as http:
        tracemalloc.start()
        with pytest.raises(ReplyRefused):
            await http.get(f"{tools.url}/effects/bomb")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()

    assert peak < 3 * MAX_REPLY


async def test_a_compressed_reply_is_read(tools: ToolServer) -> None:
    body = gzip.compress(b'{"sum": 3}')
    tools.behave("/effects/small", body=body, headers={"content-encoding": "gzip"})

    async with client("127.0.0.1") as http:
        reply = await http.get(f"{tools.url}/effects/small")

    assert reply.json() == {"sum": 3}
    assert tools.calls[0].headers["accept-encoding"] == "gzip"


@pytest.mark.parametrize(
    ("coding", "error"), [("gzip", httpx2.DecodingError), ("br", ReplyRefused)]
)
async def test_an_unreadable_reply_is_an_error_that_tools_know(
    tools: ToolServer, coding: str, error: type[httpx2.HTTPError]
) -> None:
    tools.behave("/effects/odd", body=b"plain", headers={"content-encoding": coding})

    async with client("127.0.0.1") as http:
        with pytest.raises(error):
            await http.get(f"{tools.url}/effects/odd")

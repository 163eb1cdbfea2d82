"""Guarded HTTP clients: what tools use to reach the world, and what fetches and calls for users.

Whatever a model, a user or a redirect puts into a URL, the connection goes only to public
addresses and, for tools, to the base URLs that settings name and to `OUTBOUND_ALLOW`; for the URLs
that users give to `USER_URLS_ALLOW`. The address that was checked is the one connected, so a name
that resolves differently a moment later gains nothing.
A reply ends within its time and its size, whatever its server sends.
"""

import asyncio
import ipaddress
import re
import socket
import ssl
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx2
from typing_extensions import override

from app.config import Settings
from app.deps import call_key

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

PORTS = {"http": 80, "https": 443}
MAX_PORT = 2**16 - 1
NAME = re.compile(r"\w([\w.-]*\w)?\.?")
MAX_REPLY = 10 * 1024 * 1024  # bytes of one reply, decompressed

NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
UNICAST = ipaddress.IPv6Network("2000::/3")  # all that IPv6 has given out to the public so far

# What a server on another origin may learn after a redirect: nothing that a tool set as a
# credential, whatever header that is in.
HARMLESS = {
    *("host", "connection", "accept", "accept-encoding", "user-agent"),
    *("content-length", "content-type", "transfer-encoding"),
}


class OutboundRefused(httpx2.TransportError):
    """The guard refused the address. An `httpx2` error, so tools meet it like any other."""


class ReplyRefused(httpx2.TransportError):
    """The reply is too large, or compressed as was not asked for."""


def embedded_ipv4(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that a mapped, 6to4, Teredo or NAT64 address leads to."""
    if address in NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or (address.teredo and address.teredo[1])


def is_public(address: Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        if inner := embedded_ipv4(address):
            return is_public(inner)
        if address not in UNICAST:
            return False
    return address.is_global and not address.is_multicast


def _is_host(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:  # a name then, and not what was to be an address
        last = text.rstrip(".").rpartition(".")[2]
        return bool(NAME.fullmatch(text)) and not last.isdecimal()
    return True


@dataclass(slots=True)
class Allowed:
    """Hosts, `host:port` pairs and networks that may be reached although they are not public."""

    hosts: set[tuple[str, int | None]] = field(default_factory=set[tuple[str, int | None]])
    networks: list[Network] = field(default_factory=list[Network])

    @classmethod
    def of(cls, settings: Settings) -> "Allowed":
        """For tools. Raises ValueError for an item of `OUTBOUND_ALLOW` that is none of these."""
        allowed = cls._listed("OUTBOUND_ALLOW", settings.outbound_allow)
        for name, value in settings:
            # Where the model lives is no business of tools.
            if name.endswith("_url") and name != "openai_base_url" and isinstance(value, str):
                url = httpx2.URL(value)
                if url.scheme in PORTS:
                    allowed.hosts.add((url.host, url.port or PORTS[url.scheme]))
        return allowed

    @classmethod
    def of_users(cls, settings: Settings) -> "Allowed":
        """For the URLs that users give, of webhooks and attachments: what is opened for a tool is
        not for them. Raises ValueError for an odd item of `USER_URLS_ALLOW`."""
        return cls._listed("USER_URLS_ALLOW", settings.user_urls_allow)

    @classmethod
    def _listed(cls, setting: str, items: Iterable[str]) -> "Allowed":
        allowed = cls()
        for item in items:
            allowed._add(setting, item)
        return allowed

    def _add(self, setting: str, item: str) -> None:
        try:
            self.networks.append(ipaddress.ip_network(item, strict=False))
        except ValueError:
            pass
        else:
            return
        try:
            url = httpx2.URL(f"//{item}")
        except httpx2.InvalidURL:
            url = httpx2.URL()
        odd = not _is_host(url.host) or any(char in item for char in "/@?#")
        if odd or not 0 < (url.port or 1) <= MAX_PORT:
            raise ValueError(f"{setting}: {item!r} is no host, host:port or network.")
        self.hosts.add((url.host, url.port))

    def has_host(self, host: str, port: int) -> bool:
        return (host, port) in self.hosts or (host, None) in self.hosts

    def has_address(self, address: Address) -> bool:
        return any(address in network for network in self.networks)


@cache
def tls(*, trust_env: bool) -> ssl.SSLContext:
    """How servers prove who they are. To read the authorities takes 30 ms: once is enough."""
    return httpx2.create_ssl_context(trust_env=trust_env)


class GuardedTransport(httpx2.AsyncBaseTransport):
    """Resolves, checks, and connects to exactly what was checked."""

    def __init__(self, allowed: Allowed) -> None:
        self._allowed = allowed
        verify = tls(trust_env=False)
        self._named = httpx2.AsyncHTTPTransport(verify=verify, trust_env=False, retries=1)
        # Connections are kept by address, and two names can share one: kept open, a connection
        # whose certificate was checked for one name would carry requests for the other.
        self._pinned = httpx2.AsyncHTTPTransport(
            verify=verify, trust_env=False, limits=httpx2.Limits(max_keepalive_connections=0)
        )

    @override
    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        seconds = request.extensions.get("timeout", {}).get("read")
        until = None if seconds is None else asyncio.get_running_loop().time() + seconds
        async with _by(until):
            reply = await self._send(request)
        return await _bounded(reply, until)

    async def _send(self, request: httpx2.Request) -> httpx2.Response:
        url = request.url
        if url.scheme not in PORTS:
            raise OutboundRefused(f"Only http and https go out, not {url.scheme}.")
        port = url.port or PORTS[url.scheme]
        if self._allowed.has_host(url.host, port):
            return await self._named.handle_async_request(request)
        host = url.host.rstrip(".")
        *others, last = await self._addresses(host, port)
        for address in others:
            try:
                return await self._connect(request, host, address)
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                continue  # nothing was sent yet
        return await self._connect(request, host, last)

    async def _connect(
        self, request: httpx2.Request, host: str, address: Address
    ) -> httpx2.Response:
        pinned = httpx2.Request(
            request.method,
            request.url.copy_with(host=str(address)),
            headers=request.headers,  # with the Host of the original URL
            stream=request.stream,
            extensions={**request.extensions, "sni_hostname": host},
        )
        return await self._pinned.handle_async_request(pinned)

    async def _addresses(self, host: str, port: int) -> list[Address]:
        """All addresses of the host, each of which may be reached."""
        if not host or port > MAX_PORT:
            raise httpx2.ConnectError("The URL names no host, or no port.")
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpx2.ConnectError(f"{host} could not be resolved.") from error
        addresses = [ipaddress.ip_address(str(info[4][0]).split("%")[0]) for info in found]
        for address in addresses:
            if not is_public(address) and not self._allowed.has_address(address):
                raise OutboundRefused(f"{host} leads to an address that is not public.")
        return addresses

    @override
    async def aclose(self) -> None:
        await self._named.aclose()
        await self._pinned.aclose()


@asynccontextmanager
async def _by(until: float | None) -> AsyncGenerator[None]:
    """Raises ReadTimeout once the loop's clock says `until`."""
    try:
        async with asyncio.timeout_at(until):
            yield
    except TimeoutError as error:
        raise httpx2.ReadTimeout("The reply took too long.") from error


async def _bounded(reply: httpx2.Response, until: float | None) -> httpx2.Response:
    """The same reply, decompressed, with a body that ends in time and within its size."""
    assert isinstance(reply.stream, httpx2.AsyncByteStream)
    try:
        compressed = is_compressed(reply)
    except ReplyRefused:
        await reply.aclose()
        raise
    body = Body(_Timely(reply.stream, until), compressed=compressed)
    dropped = (b"content-encoding", b"content-length") if compressed else ()
    headers = [(name, value) for name, value in reply.headers.raw if name.lower() not in dropped]
    return httpx2.Response(
        reply.status_code, headers=headers, stream=body, extensions=reply.extensions
    )


def is_compressed(reply: httpx2.Response) -> bool:
    """Whether it is, with gzip. Raises ReplyRefused for any other coding."""
    coding = reply.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("gzip", "identity"):
        raise ReplyRefused(f"The reply is compressed as {coding!r}.")
    return coding == "gzip"


class _Timely(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream, until: float | None) -> None:
        self._stream = stream
        self._until = until

    @override
    async def __aiter__(self) -> AsyncIterator[bytes]:
        parts = aiter(self._stream)
        while True:
            async with _by(self._until):
                part = await anext(parts, None)
            if part is None:
                return
            yield part

    @override
    async def aclose(self) -> None:
        await self._stream.aclose()


class Body(httpx2.AsyncByteStream):
    """A reply's body, decompressed, which is an error beyond its size."""

    def __init__(
        self, stream: httpx2.AsyncByteStream, most: int = MAX_REPLY, *, compressed: bool = False
    ) -> None:
        self._stream = stream
        self._most = most
        self._compressed = compressed

    @override
    async def __aiter__(self) -> AsyncIterator[bytes]:
        unzip = zlib.decompressobj(zlib.MAX_WBITS | 16)  # in gzip's clothes
        left = self._most
        async for part in self._stream:
            if self._compressed:
                try:
                    part = unzip.decompress(part, left + 1)
                except zlib.error as error:
                    raise httpx2.DecodingError("The reply is no gzip.") from error
            left -= len(part)
            if left < 0:
                raise ReplyRefused(f"The reply is over {self._most} bytes.")
            yield part

    @override
    async def aclose(self) -> None:
        await self._stream.aclose()


def _origin(url: httpx2.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port or PORTS.get(url.scheme)


async def _prepare(request: httpx2.Request) -> None:
    """Adds the call's key; a request that was redirected to another origin tells it nothing."""
    home = request.extensions.setdefault("home", _origin(request.url))
    if _origin(request.url) != home:
        for name in set(request.headers) - HARMLESS:
            del request.headers[name]
    elif (key := call_key.get()) and request.method != "GET":
        request.headers.setdefault("Idempotency-Key", key)


def make_http(settings: Settings, allowed: Allowed | None = None) -> httpx2.AsyncClient:
    """The client for tools; for others, what is `allowed` to them. Raises ValueError for a
    malformed `OUTBOUND_ALLOW`.

    The read time-out is the deadline of the whole reply, from the first look at the host's name.
    No cookie is kept: the next request may be another user's.
    """
    return httpx2.AsyncClient(
        transport=GuardedTransport(Allowed.of(settings) if allowed is None else allowed),
        timeout=httpx2.Timeout(settings.tool_timeout.total_seconds(), connect=5),
        headers={"Accept-Encoding": "gzip"},
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
        event_hooks={"request": [_prepare]},
        trust_env=False,
    )

"""The one guarded HTTP client: what tools use to reach the world.

Whatever a model, a user or a redirect puts into a URL, the connection goes only to public
addresses, to the base URLs that settings name, and to `OUTBOUND_ALLOW`. The address that was
checked is the one connected, so a name that resolves differently a moment later gains nothing.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field

import httpx2
from typing_extensions import override

from app.config import Settings
from app.deps import call_key

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

PORTS = {"http": 80, "https": 443}
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class OutboundRefused(httpx2.TransportError):
    """The guard refused the address. An `httpx2` error, so tools meet it like any other."""


def embedded_ipv4(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that a mapped, 6to4, Teredo or NAT64 address leads to."""
    if address in NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or (address.teredo and address.teredo[1])


def is_public(address: Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address) and (inner := embedded_ipv4(address)):
        return is_public(inner)
    return address.is_global and not address.is_multicast


@dataclass(slots=True)
class Allowed:
    """Hosts, `host:port` pairs and networks that may be reached although they are not public."""

    hosts: set[tuple[str, int | None]] = field(default_factory=set[tuple[str, int | None]])
    networks: list[Network] = field(default_factory=list[Network])

    @classmethod
    def of(cls, items: Iterable[str]) -> "Allowed":
        """Raises ValueError for an item that is none of the three."""
        allowed = cls()
        for item in items:
            try:
                allowed.networks.append(ipaddress.ip_network(item))
                continue
            except ValueError:
                pass
            url = httpx2.URL(f"//{item}")
            if not url.host or "/" in item:
                raise ValueError(f"OUTBOUND_ALLOW: {item!r} is no host, host:port or network.")
            allowed.hosts.add((url.host, url.port))
        return allowed

    def base_url(self, text: str) -> None:
        url = httpx2.URL(text)
        self.hosts.add((url.host, url.port or PORTS[url.scheme]))

    def has_host(self, host: str, port: int) -> bool:
        return (host, port) in self.hosts or (host, None) in self.hosts

    def has_address(self, address: Address) -> bool:
        return any(address in network for network in self.networks)


class GuardedTransport(httpx2.AsyncBaseTransport):
    """Resolves, checks, and connects to exactly what was checked."""

    def __init__(self, allowed: Allowed) -> None:
        self._allowed = allowed
        self._inner = httpx2.AsyncHTTPTransport(trust_env=False, retries=1)

    @override
    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        url = request.url
        if url.scheme not in PORTS:
            raise OutboundRefused(f"Only http and https go out, not {url.scheme}.")
        host, port = url.host.rstrip("."), url.port or PORTS[url.scheme]
        if not self._allowed.has_host(host, port):
            address = await self._public_address(host, port)
            extensions = {**request.extensions, "sni_hostname": host}
            request = httpx2.Request(
                request.method,
                url.copy_with(host=str(address)),
                headers=request.headers,  # with the Host of the original URL
                stream=request.stream,
                extensions=extensions,
            )
        return await self._inner.handle_async_request(request)

    async def _public_address(self, host: str, port: int) -> Address:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpx2.ConnectError(f"{host} could not be resolved.") from error
        addresses = [ipaddress.ip_address(str(info[4][0]).split("%")[0]) for info in found]
        for address in addresses:
            if not is_public(address) and not self._allowed.has_address(address):
                raise OutboundRefused(f"{host} leads to an address that is not public.")
        return addresses[0]

    @override
    async def aclose(self) -> None:
        await self._inner.aclose()


async def _send_call_key(request: httpx2.Request) -> None:
    key = call_key.get()
    if key and request.method != "GET":
        request.headers.setdefault("Idempotency-Key", key)


def make_http(settings: Settings) -> httpx2.AsyncClient:
    """The client for tools. Raises ValueError for a malformed `OUTBOUND_ALLOW`."""
    allowed = Allowed.of(settings.outbound_allow)
    for base in (settings.weather_api_url, settings.weather_geocoding_url):
        allowed.base_url(base)
    return httpx2.AsyncClient(
        transport=GuardedTransport(allowed),
        timeout=httpx2.Timeout(settings.tool_timeout.total_seconds(), connect=5),
        event_hooks={"request": [_send_call_key]},
        trust_env=False,
    )

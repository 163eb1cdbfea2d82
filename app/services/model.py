"""Which models answer: openai clients over one HTTP client, for agents and Instructor alike."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import httpx2
from openai import AsyncOpenAI, DefaultAioHttpClient
from pydantic_ai.exceptions import UserError
from pydantic_ai.models import Model, infer_model, parse_model_id
from pydantic_ai.providers import Provider, infer_provider_class
from pydantic_ai.providers.openai import OpenAIProvider
from typing_extensions import override

from app.config import Settings
from app.core import metrics
from app.services.admission import Admission
from app.services.attempts import Breaker, PatientModel
from app.services.outbound import Body, ReplyRefused, is_compressed, tls

if TYPE_CHECKING:
    from openai.resources.chat import AsyncChat

DEFAULT = "openai-chat:gpt-4o"
DEMO = "openai-chat:demo"
OPENAI = ("openai", "openai-chat", "openai-responses")

MAX_STREAM = 32 * 1024 * 1024  # bytes of one streamed reply, nearly all of them around its tokens
MAX_EVENT = 4 * 1024 * 1024  # bytes of one event in it
MAX_LINES = 1000  # of one event: the SDK copies what it has of it at each
LOOK = 64 * 1024  # bytes after which an end of an event should have been seen


class ModelClient(DefaultAioHttpClient):
    """Counts what comes of each request, those that the SDK repeats among them."""

    @override
    async def send(self, request: httpx2.Request, **how: Any) -> httpx2.Response:
        try:
            response = await super().send(request, **how)
        except httpx2.HTTPError as error:
            late = isinstance(error, httpx2.TimeoutException)
            metrics.model_requests.add("timeout" if late else "unreachable")
            raise
        metrics.model_requests.add(str(response.status_code))
        return response


def bare_name(name: str) -> str:
    """The name that the model's server knows it by; some write the provider before it."""
    provider, colon, rest = name.partition(":")
    return rest if colon and provider in OPENAI else name


class Client(AsyncOpenAI):
    """The SDK's, but that chats are sent as they are."""

    @cached_property
    @override
    def chat(self) -> "AsyncChat":  # pyright: ignore[reportIncompatibleMethodOverride]
        from app.services.completions import Chat  # as late as the model itself

        return Chat(self)


@dataclass(frozen=True)
class Served:
    """A model, as a setting names it, and the client of the server that knows it by `name`."""

    id: str
    provider: Provider[Any]
    client: AsyncOpenAI
    name: str

    def model(self, admission: Admission) -> Model:
        if parse_model_id(self.id)[0] == "openai-chat":
            from app.services.streaming import ChatModel

            return ChatModel(self.name, provider=self.provider, admission=admission)
        return infer_model(self.id, lambda _: self.provider)


@dataclass(frozen=True)
class Models:
    """The model, and those that stand in for it. Extractions ask its client for any by name."""

    settings: Settings
    served: tuple[Served, ...]
    http: httpx2.AsyncClient
    admission: Admission = field(default_factory=Admission)
    breakers: dict[str, Breaker] = field(default_factory=dict[str, Breaker])
    """Of all models that were asked: by the name alone on the first one's server, else by id."""

    @property
    def name(self) -> str:
        return self.served[0].name

    @property
    def client(self) -> AsyncOpenAI:
        return self.served[0].client

    @cached_property
    def model(self) -> Model:
        """Made at its first use: what it imports would delay the start by a fifth."""
        return PatientModel(
            [
                (
                    each.model(self.admission),
                    self.breaker(each.name if each.client is self.client else each.id),
                )
                for each in self.served
            ],
            self.settings,
        )

    def breaker(self, name: str) -> Breaker:
        if name not in self.breakers:
            pause = self.settings.breaker_pause.total_seconds()
            self.breakers[name] = Breaker(name, self.settings.breaker_failures, pause)
        return self.breakers[name]

    async def close(self) -> None:
        await self.http.aclose()


def make_models(settings: Settings) -> Models:
    """The models that the settings name, or the demo model where they name none.

    Raises ValueError for a name without a provider, or one whose server does not speak
    OpenAI's API.
    """
    if settings.demo:
        from app.services.demo import DemoTransport

        http = ModelClient(transport=DemoTransport(delay=0.02))
        client = AsyncOpenAI(base_url="http://demo/v1", api_key="demo", http_client=http)
        provider = OpenAIProvider(openai_client=client)
        return Models(settings, (Served(DEMO, provider, client, "demo"),), http)
    http = ModelClient(
        verify=tls(trust_env=True),
        timeout=httpx2.Timeout(settings.model_timeout.total_seconds(), connect=5),
        limits=httpx2.Limits(max_connections=1000, max_keepalive_connections=100),
        headers={"Accept-Encoding": "identity"},
        event_hooks={"response": [_bound]},
        follow_redirects=False,
    )
    key = settings.openai_api_key
    openai = Client(
        base_url=settings.openai_base_url,
        api_key=key.get_secret_value() if key else "none",
        http_client=http,
    )
    served = [_serve("MODEL", settings.model or DEFAULT, openai, http)]
    served += [_serve("FALLBACK_MODELS", name, openai, http) for name in settings.fallback_models]
    for each in served:
        each.client.max_retries = 0  # `attempts` asks again, and nobody else
    return Models(settings, tuple(served), http)


def _serve(setting: str, name: str, openai: AsyncOpenAI, http: httpx2.AsyncClient) -> Served:
    kind, model_name = parse_model_id(name)
    if kind is None:
        raise ValueError(f"{setting}={name!r} names no provider; try {DEFAULT!r}.")
    if kind in OPENAI:
        return Served(name, OpenAIProvider(openai_client=openai), openai, model_name)
    try:
        make: Any = infer_provider_class(kind)
        provider = make(http_client=http)
    except (ValueError, TypeError, ImportError, UserError) as error:
        raise ValueError(f"{setting}={name!r}: {error}") from error
    client = provider.client
    if not isinstance(client, AsyncOpenAI):
        raise ValueError(f"{setting}={name!r}: its server does not speak OpenAI's API.")
    return Served(name, provider, client, model_name)


async def _bound(reply: httpx2.Response) -> None:
    """Bounds what there is to be read of the reply, and says what it is read from."""
    assert isinstance(reply.stream, httpx2.AsyncByteStream)
    body = reply.stream
    below = getattr(getattr(body, "_stream", None), "_aiohttp_response", None)
    reply.extensions["aiohttp_response"] = below  # None where the SDK's transport is another
    if compressed := is_compressed(reply):
        del reply.headers["content-encoding"]
    if reply.headers.get("content-type", "").startswith("text/event-stream"):
        reply.stream = _Events(Body(body, MAX_STREAM, compressed=compressed))
    else:
        reply.stream = Body(body, compressed=compressed)


class _Events(httpx2.AsyncByteStream):
    """A stream of events, none of which goes on for ever."""

    def __init__(self, body: Body) -> None:
        self._body = body

    @override
    async def __aiter__(self) -> AsyncIterator[bytes]:
        unended = lines = 0
        tail = b""
        async for part in self._body:
            unended += len(part)
            if unended > LOOK:  # hardly ever, so that a token's costs are none
                seen = tail + part
                tail = seen[-3:]
                lines += part.count(b"\n")
                if any(end in seen for end in (b"\n\n", b"\r\n\r\n", b"\r\r")):
                    unended, lines, tail = 0, 0, b""
                elif unended > MAX_EVENT or lines > MAX_LINES:
                    raise ReplyRefused("An event of the reply does not end.")
            yield part

    @override
    async def aclose(self) -> None:
        await self._body.aclose()

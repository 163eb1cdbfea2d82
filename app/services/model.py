"""Which model answers: one openai client for agents and Instructor alike."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import httpx2
from openai import AsyncOpenAI
from pydantic_ai.exceptions import UserError
from pydantic_ai.models import Model, infer_model, parse_model_id
from pydantic_ai.providers import Provider, infer_provider_class
from pydantic_ai.providers.openai import OpenAIProvider

from app.config import Settings

DEFAULT = "openai-chat:gpt-4o"
DEMO = "openai-chat:demo"
OPENAI = ("openai", "openai-chat", "openai-responses")


def bare_name(name: str) -> str:
    """The name that the model's server knows it by; some write the provider before it."""
    provider, colon, rest = name.partition(":")
    return rest if colon and provider in OPENAI else name


@dataclass(frozen=True)
class Models:
    """The model, the client behind it, and the name that the client's server knows it by."""

    id: str
    provider: Provider[Any]
    client: AsyncOpenAI
    name: str
    http: httpx2.AsyncClient

    @cached_property
    def model(self) -> Model:
        """Made at its first use: what it imports would delay the start by a fifth."""
        if parse_model_id(self.id)[0] == "openai-chat":
            from app.services.streaming import ChatModel

            return ChatModel(self.name, provider=self.provider)
        return infer_model(self.id, lambda _: self.provider)

    @cached_property
    def once(self) -> AsyncOpenAI:
        """The same client for those who repeat a failed request themselves."""
        return self.client.with_options(max_retries=0)

    async def close(self) -> None:
        await self.http.aclose()


def make_models(settings: Settings) -> Models:
    """The model that the settings name, or the demo model where they name none.

    Raises ValueError for a name without a provider, or one whose server does not speak
    OpenAI's API.
    """
    timeout = httpx2.Timeout(settings.model_timeout.total_seconds(), connect=5)
    limits = httpx2.Limits(max_connections=1000, max_keepalive_connections=100)
    if settings.demo:
        from app.services.demo import DemoTransport

        http = httpx2.AsyncClient(transport=DemoTransport(delay=0.02))
        client = AsyncOpenAI(base_url="http://demo/v1", api_key="demo", http_client=http)
        provider: Provider[Any] = OpenAIProvider(openai_client=client)
        return Models(DEMO, provider, client, "demo", http)
    http = httpx2.AsyncClient(timeout=timeout, limits=limits)
    name = settings.model or DEFAULT
    kind, model_name = parse_model_id(name)
    if kind is None:
        raise ValueError(f"MODEL={name!r} names no provider; try {DEFAULT!r}.")
    if kind in OPENAI:
        key = settings.openai_api_key
        client = AsyncOpenAI(
            base_url=settings.openai_base_url,
            api_key=key.get_secret_value() if key else "none",
            http_client=http,
            max_retries=2,
        )
        provider = OpenAIProvider(openai_client=client)
    else:
        try:
            make: Any = infer_provider_class(kind)
            provider = make(http_client=http)
        except (ValueError, TypeError, UserError) as error:
            raise ValueError(f"MODEL={name!r}: {error}") from error
        client = provider.client
        if not isinstance(client, AsyncOpenAI):
            raise ValueError(f"MODEL={name!r}: its server does not speak OpenAI's API.")
    return Models(name, provider, client, model_name, http)

"""Chats, asked for as the openai SDK does, but that they are sent as they are.

The SDK looks at each part of a request anew for what it could still turn into JSON, against each
kind of message that there is. What PydanticAI asks for is JSON already, and that look costs more
than all the rest of the call: in long conversations, many times as much.
"""

from functools import cached_property
from typing import Any

from openai import AsyncStream, NotGiven, Omit, not_given
from openai.resources.chat import AsyncChat, AsyncCompletions
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from typing_extensions import override


class Completions(AsyncCompletions):
    @override
    async def create(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        *,
        stream: bool | Omit | None = False,
        extra_headers: Any = None,
        extra_query: Any = None,
        extra_body: Any = None,
        timeout: Any = not_given,
        **asked: Any,
    ) -> Any:
        """The SDK's own, for a request that is JSON."""
        body = {name: value for name, value in asked.items() if not isinstance(value, Absent)}
        if not isinstance(stream, Absent):
            body["stream"] = stream
        options: Any = {
            "headers": extra_headers or {},
            "params": extra_query or {},
            "timeout": timeout,
            "security": {"bearer_auth": True},
        }
        if extra_body is not None:
            options["extra_json"] = extra_body
        return await self._post(
            "/chat/completions",
            body=body,
            options=options,
            cast_to=ChatCompletion,
            stream=bool(stream),
            stream_cls=AsyncStream[ChatCompletionChunk],
        )


Absent = (NotGiven, Omit)


class Chat(AsyncChat):
    @cached_property
    @override
    def completions(self) -> Completions:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Completions(self._client)

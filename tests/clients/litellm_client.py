# /// script
# requires-python = ">=3.11"
# dependencies = ["litellm==1.106.2", "mcp==2.3.0"]  # it imports mcp for any tool
# ///
# pyright: reportMissingImports=false
"""LiteLLM, unmodified, at the server at BASE_URL."""

import asyncio
import json
import os
from collections.abc import Callable
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it is fetched

import litellm
from pydantic import BaseModel

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5C"
    "YII="
)
DOOR = {
    "type": "function",
    "function": {
        "name": "open_door",
        "parameters": {"type": "object", "properties": {"number": {"type": "integer"}}},
    },
}


litellm.suppress_debug_info = True  # which goes to stdout


class City(BaseModel):
    name: str
    country: str


def asked(prompt: Any, **more: Any) -> dict[str, Any]:
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    return {
        "model": "openai/assistant",
        "base_url": os.environ["BASE_URL"],
        "api_key": os.environ["API_KEY"],
        "max_retries": 0,
        "messages": messages,
        **more,
    }


def ask(prompt: Any, **more: Any) -> Any:
    return litellm.completion(**asked(prompt, **more))


def say(value: Any) -> None:
    print(json.dumps(value), flush=True)


def error_of(act: Callable[[], Any]) -> list[str]:
    try:
        act()
    except Exception as error:
        return [each.__name__ for each in type(error).__mro__]
    raise AssertionError("nothing was raised")


def called(message: Any) -> list[Any]:
    calls = message.tool_calls or []
    return [[call.function.name, json.loads(call.function.arguments)] for call in calls]


def with_tools(prompt: str) -> list[Any]:
    """A round trip: the calls, and what the model says of their results."""
    messages: list[Any] = [{"role": "user", "content": prompt}]
    message = ask(messages, tools=[DOOR]).choices[0].message
    messages.append(message.model_dump())
    for call in message.tool_calls:
        messages.append({"role": "tool", "tool_call_id": call.id, "content": "open"})
    return [called(message), ask(messages, tools=[DOOR]).choices[0].message.content]


def streamed(prompt: str, **more: Any) -> Any:
    chunks = list(ask(prompt, stream=True, stream_options={"include_usage": True}, **more))
    return litellm.stream_chunk_builder(chunks)


whole = ask("Hello", temperature=0.5, stop=["END"], seed=1)
say([whole.choices[0].message.content, whole.choices[0].finish_reason, whole.usage.total_tokens])
whole = streamed("Hello")
say([whole.choices[0].message.content, whole.choices[0].finish_reason, whole.usage.total_tokens])

for answer in (ask("weather in Paris?"), streamed("weather in Paris?")):
    message = answer.choices[0].message
    say([message.content, message.reasoning_content.splitlines()[0]])
say(with_tools("open the door"))
say(with_tools("open both doors"))
choice = streamed("open both doors", tools=[DOOR]).choices[0]
say([called(choice.message), choice.finish_reason])
say(json.loads(ask("Name a capital.", response_format=City).choices[0].message.content))
image = {"type": "image_url", "image_url": {"url": PIXEL}}
text = {"type": "text", "text": "What is in the picture?"}
say(ask([{"role": "user", "content": [text, image]}]).choices[0].message.content)

say(error_of(lambda: ask("Hello", api_key="sk-wrong")))
say(error_of(lambda: ask("Hello", model="openai/gpt-9")))
say(error_of(lambda: ask("too long")))
say(error_of(lambda: ask("busy")))
say(error_of(lambda: ask("broken")))
say(error_of(lambda: list(ask("cut", stream=True))))
say(error_of(lambda: ask("hang", timeout=1)))
input()


async def leave() -> None:
    async for chunk in await litellm.acompletion(**asked("endless", stream=True)):
        if chunk.choices[0].delta.content:
            break


asyncio.run(leave())
say("left")
input()

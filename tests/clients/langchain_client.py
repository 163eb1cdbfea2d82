# /// script
# requires-python = ">=3.11"
# dependencies = ["langchain-openai==1.7.3", "langchain-core==1.7.2"]
# ///
# pyright: reportMissingImports=false, reportFunctionMemberAccess=false
"""langchain-openai, unmodified, at the server at BASE_URL."""

import json
import os
from collections.abc import Callable
from typing import Any

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5C"
    "YII="
)


class City(BaseModel):
    name: str
    country: str


@tool
def open_door(number: int) -> str:
    """Opens a door."""
    return f"door {number} is open"


def chat(**more: Any) -> ChatOpenAI:
    return ChatOpenAI(
        model="assistant",
        base_url=os.environ["BASE_URL"],
        api_key=more.pop("api_key", os.environ["API_KEY"]),
        max_retries=0,
        **more,
    )


def say(value: Any) -> None:
    print(json.dumps(value), flush=True)


def error_of(act: Callable[[], Any]) -> Any:
    try:
        act()
    except Exception as error:
        return [each.__name__ for each in type(error).__mro__], getattr(error, "code", None)
    raise AssertionError("nothing was raised")


def with_tools(prompt: str) -> list[Any]:
    """A round trip: the calls, and what the model says of their results."""
    model = chat().bind_tools([open_door])
    messages: list[Any] = [HumanMessage(prompt)]
    called = model.invoke(messages)
    messages.append(called)
    for call in called.tool_calls:
        messages.append(ToolMessage(open_door.invoke(call["args"]), tool_call_id=call["id"]))
    answer = model.invoke(messages).content
    return [[[call["name"], call["args"]] for call in called.tool_calls], answer]


def streamed_calls(prompt: str) -> list[Any]:
    whole = None
    for chunk in chat().bind_tools([open_door]).stream(prompt):
        whole = chunk if whole is None else whole + chunk
    assert whole is not None
    return [[[call["name"], call["args"]] for call in whole.tool_calls], finish(whole)]


def finish(message: Any) -> str:
    return message.response_metadata["finish_reason"]


whole = chat(temperature=0.5, stop=["END"], seed=1).invoke("Hello")
say([whole.content, finish(whole), whole.usage_metadata["total_tokens"]])

streamed = None
for chunk in chat(stream_usage=True).stream("Hello"):
    streamed = chunk if streamed is None else streamed + chunk
assert streamed is not None
say([streamed.content, finish(streamed), streamed.usage_metadata["total_tokens"]])

say(chat().invoke("weather in Paris?").content)
say(with_tools("open the door"))
say(with_tools("open both doors"))
say(streamed_calls("open both doors"))
for method in ("json_schema", "function_calling", "json_mode"):
    answer = chat().with_structured_output(City, method=method).invoke("Name a capital as JSON.")
    say(answer.model_dump())
image = {"type": "image_url", "image_url": {"url": PIXEL}}
text = {"type": "text", "text": "What is in the picture?"}
say(chat().invoke([HumanMessage([text, image])]).content)

say(error_of(lambda: chat(api_key="sk-wrong").invoke("Hello")))
say(error_of(lambda: chat().bind(model="gpt-9").invoke("Hello")))
say(error_of(lambda: chat().invoke("too long")))
say(error_of(lambda: chat().invoke("busy")))
say(error_of(lambda: chat().invoke("broken")))
say(error_of(lambda: list(chat().stream("cut"))))
say(error_of(lambda: chat(timeout=1).invoke("hang")))
input()

endless = chat().stream("endless")
for chunk in endless:
    if chunk.content:
        break
endless.close()
say("left")
input()

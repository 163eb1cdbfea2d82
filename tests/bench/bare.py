"""The yardstick: the same agent behind bare FastAPI, without persistence, the ordinary way: whole
answers by `agent.run`, streams by PydanticAI's own adapters, or in the least that can be sent.
Conversations are in memory.

It takes its instructions, settings and tools from a request that our server was seen to send
(`BENCH_SEEN`, a file), so it imports nothing of ours and asks the model for exactly the same.
"""

import json
import os
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import httpx2
from fastapi import FastAPI, Header, Request
from fastapi.responses import Response, StreamingResponse
from openai import AsyncOpenAI
from pydantic import BaseModel
from pydantic_ai import Agent, AgentRunResultEvent, ModelSettings, Tool
from pydantic_ai.messages import (
    ModelMessage,
    PartDeltaEvent,
    PartStartEvent,
    TextPart,
    TextPartDelta,
)
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.ui.ag_ui import AGUIAdapter
from pydantic_ai.ui.vercel_ai import VercelAIAdapter
from pydantic_ai.usage import RunUsage

SEEN: dict[str, Any] = json.loads(Path(os.environ["BENCH_SEEN"]).read_text())


async def account(**_: Any) -> dict[str, Any]:
    return {"id": 1, "name": "Local administrator", "email": "local@localhost"}


http = httpx2.AsyncClient(
    timeout=httpx2.Timeout(120, connect=5),
    limits=httpx2.Limits(max_connections=1000, max_keepalive_connections=100),
)
client = AsyncOpenAI(http_client=http, max_retries=2)
agent = Agent(
    OpenAIChatModel(os.environ["BENCH_MODEL"], provider=OpenAIProvider(openai_client=client)),
    instructions=[item["content"] for item in SEEN["messages"] if item["role"] != "user"],
    model_settings=ModelSettings(temperature=SEEN["temperature"]),
    tools=[
        Tool[None].from_schema(
            account, function["name"], function["description"], function["parameters"]
        )
        for function in (tool["function"] for tool in SEEN["tools"])
    ],
)
app = FastAPI()
conversations: dict[str, list[ModelMessage]] = {}


class Message(BaseModel):
    role: str
    content: str


class StreamOptions(BaseModel):
    include_usage: bool = False


class Chat(BaseModel):
    model: str
    messages: list[Message]
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()


@app.get("/health")
async def health() -> dict[str, str]:
    return {"status": "ok"}


@app.post("/v1/chat/completions", response_model=None)
async def complete(
    chat: Chat, x_chat_id: Annotated[str, Header()] = ""
) -> Response | dict[str, Any]:
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": chat.model}
    prompt = chat.messages[-1].content
    if chat.stream:
        return StreamingResponse(frames(head, chat, prompt), media_type="text/event-stream")
    result = await agent.run(prompt, message_history=conversations.get(x_chat_id))
    if x_chat_id:
        conversations[x_chat_id] = result.all_messages()
    message = {"role": "assistant", "content": result.output, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    return {
        **head,
        "object": "chat.completion",
        "choices": [choice],
        "usage": usage_of(result.usage),
    }


@app.post("/ag-ui/assistant")
async def agui(request: Request) -> Response:
    return await AGUIAdapter.dispatch_request(request, agent=agent)


@app.post("/api/chat")
async def vercel(request: Request) -> Response:
    return await VercelAIAdapter.dispatch_request(request, agent=agent)


async def frames(head: dict[str, Any], chat: Chat, prompt: str) -> AsyncIterator[str]:
    head = {**head, "object": "chat.completion.chunk"}

    def frame(delta: dict[str, Any], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"

    yield frame({"role": "assistant", "content": ""})
    async with agent.run_stream_events(prompt) as events:
        async for event in events:
            match event:
                case PartStartEvent(part=TextPart(content=text)):
                    yield frame({"content": text})
                case PartDeltaEvent(delta=TextPartDelta(content_delta=text)):
                    yield frame({"content": text})
                case AgentRunResultEvent(result=result):
                    yield frame({}, "stop")
                    if chat.stream_options.include_usage:
                        usage = usage_of(result.usage)
                        yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\n"
                case _:
                    pass
    yield "data: [DONE]\n\n"


def usage_of(usage: RunUsage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.total_tokens,
    }

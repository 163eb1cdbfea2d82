"""A chat is sent as PydanticAI's own model and the SDK's own client would send it."""

import json
from dataclasses import replace
from typing import Any

import httpx2
import pytest
from openai import AsyncOpenAI
from pydantic_ai.messages import (
    BinaryContent,
    ModelMessage,
    ModelRequest,
    ModelResponse,
    RetryPromptPart,
    SystemPromptPart,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)
from pydantic_ai.models import ModelRequestParameters
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIChatModelSettings
from pydantic_ai.output import OutputObjectDefinition
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings
from pydantic_ai.tools import ToolDefinition

from app.services.model import Client
from app.services.streaming import ChatModel

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"ort": {"type": "string", "description": "Größe egal"}, "n": {"type": "number"}},
    "required": ["ort"],
}
TOOLS = [
    ToolDefinition(name="look", description="Looks.", parameters_json_schema=SCHEMA),
    ToolDefinition(name="strict", parameters_json_schema=SCHEMA, strict=True),
]
ASKED = [ModelRequest([SystemPromptPart("Be brief."), UserPromptPart("Wie spät ist es? 🐻‍❄️")])]
MESSAGES: dict[str, list[ModelMessage]] = {
    "text": [*ASKED],
    "files": [
        ModelRequest(
            [UserPromptPart(["What is this?", BinaryContent(b"\x89PNG", media_type="image/png")])]
        )
    ],
    "calls": [
        *ASKED,
        ModelResponse(
            [
                ThinkingPart("hm"),
                TextPart("I look."),
                ToolCallPart("look", {"ort": "Köln", "n": 1.5}, tool_call_id="c1"),
                ToolCallPart("look", '{"ort": "Bonn"}', tool_call_id="c2"),
            ]
        ),
        ModelRequest(
            [
                ToolReturnPart("look", {"sees": ["nothing", None, True]}, tool_call_id="c1"),
                RetryPromptPart("Not there.", tool_name="look", tool_call_id="c2"),
            ]
        ),
    ],
}
SETTINGS: dict[str, ModelSettings] = {
    "none": ModelSettings(),
    "all": OpenAIChatModelSettings(
        temperature=0.5,
        top_p=0.9,
        max_tokens=100,
        seed=7,
        stop_sequences=["end"],
        parallel_tool_calls=False,
        presence_penalty=0.1,
        frequency_penalty=-0.1,
        logit_bias={"50": 3},
        tool_choice="none",
        timeout=3.0,
        openai_user="ada",
        openai_store=True,
        openai_logprobs=True,
        openai_top_logprobs=2,
        openai_service_tier="flex",
        openai_prompt_cache_key="k",
        openai_prediction={"type": "content", "content": "so"},
        extra_headers={"x-more": "1"},
        extra_body={"verbosity": "low"},
    ),
}
PARAMETERS = {
    "plain": ModelRequestParameters(),
    "tools": ModelRequestParameters(function_tools=TOOLS),
    "others of these names": ModelRequestParameters(
        function_tools=[replace(tool, parameters_json_schema={}) for tool in TOOLS]
    ),
    "native": ModelRequestParameters(
        output_mode="native", output_object=OutputObjectDefinition(SCHEMA, name="place")
    ),
}


async def sent(
    kind: type[OpenAIChatModel], make: type[AsyncOpenAI], stream: bool, *asked: Any
) -> tuple[Any, dict[str, str]]:
    """The body and the headers that the server gets, both times that it is asked."""
    requests: list[httpx2.Request] = []

    def serve(request: httpx2.Request) -> httpx2.Response:
        requests.append(request)
        return httpx2.Response(400, json={"error": {"message": "no"}})

    transport = httpx2.MockTransport(serve)
    client = make(
        base_url="http://model/v1",
        api_key="key",
        http_client=httpx2.AsyncClient(transport=transport),
        max_retries=0,
    )
    model = kind("gpt-4o", provider=OpenAIProvider(openai_client=client))
    for _ in range(2):
        with pytest.raises(Exception, match="400"):
            if stream:
                async with model.request_stream(*asked):
                    pass
            else:
                await model.request(*asked)
    request, again = requests
    assert again.content == request.content
    headers = dict(request.headers)
    del headers["content-length"]
    return json.loads(request.content), {**headers, **request.extensions["timeout"]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("messages", MESSAGES)
async def test_what_is_sent_is_what_the_sdk_would_send(
    messages: str, settings: str, parameters: str, stream: bool
) -> None:
    asked = MESSAGES[messages], SETTINGS[settings], PARAMETERS[parameters]

    ours = await sent(ChatModel, Client, stream, *asked)

    assert ours == await sent(OpenAIChatModel, AsyncOpenAI, stream, *asked)


async def test_a_tool_of_a_known_name_is_told_as_it_is_now() -> None:
    client = Client(base_url="http://model/v1", api_key="key")
    model = ChatModel("gpt-4o", provider=OpenAIProvider(openai_client=client))
    stock = OpenAIChatModel("gpt-4o", provider=OpenAIProvider(openai_client=client))

    for name in ("tools", "others of these names", "tools"):
        asked = PARAMETERS[name]
        assert model.customize_request_parameters(asked) == stock.customize_request_parameters(
            asked
        )

"""The demo model, as the official clients see it."""

import json
import time
from collections.abc import AsyncIterator
from datetime import date
from decimal import Decimal
from typing import Any, Literal

import httpx2
import instructor
import pytest
from instructor.core import InstructorRetryException
from openai import AsyncOpenAI, BadRequestError, NotFoundError
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionFunctionToolParam,
    ChatCompletionToolUnionParam,
)
from openai.types.shared_params import FunctionDefinition
from pydantic import BaseModel, Field
from pydantic_ai import Agent, ModelRetry, NativeOutput, ToolFailed
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from app.services.demo import DemoTransport


@pytest.fixture
async def http() -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(transport=DemoTransport(), base_url="http://demo/v1") as client:
        yield client


@pytest.fixture
def client(http: httpx2.AsyncClient) -> AsyncOpenAI:
    return AsyncOpenAI(base_url="http://demo/v1", api_key="demo", http_client=http, max_retries=0)


@pytest.fixture
def model(client: AsyncOpenAI) -> OpenAIChatModel:
    return OpenAIChatModel("demo", provider=OpenAIProvider(openai_client=client))


def function(name: str, about: str, /, **arguments: str) -> ChatCompletionToolUnionParam:
    properties = {key: {"type": kind} for key, kind in arguments.items()}
    parameters: dict[str, object] = {
        "type": "object",
        "properties": properties,
        "required": list(arguments),
    }
    return ChatCompletionFunctionToolParam(
        type="function",
        function=FunctionDefinition(
            name=name, description=about, parameters=parameters, strict=True
        ),
    )


TOOLS: list[ChatCompletionToolUnionParam] = [
    function("get_weather", "Current weather in one city.", location="string"),
    function("get_my_account", "The account of the caller: name and e-mail."),
    function("rename_me", "Changes the name of the caller.", name="string"),
    function("cancel_order", "Cancels an order.", order_id="integer"),
    function("search_docs", "Searches the documentation.", query="string"),
]

Calls = list[tuple[str, dict[str, Any]]]


async def ask(client: AsyncOpenAI, prompt: Any, **options: Any) -> ChatCompletion:
    create: Any = client.chat.completions.create
    completion = await create(
        model="demo", messages=[{"role": "user", "content": prompt}], **options
    )
    assert isinstance(completion, ChatCompletion)
    return completion


def called(completion: ChatCompletion) -> Calls:
    return [
        (call.function.name, json.loads(call.function.arguments))
        for call in completion.choices[0].message.tool_calls or []
        if call.type == "function"
    ]


def said(completion: ChatCompletion) -> str:
    return completion.choices[0].message.content or ""


# The wire


async def test_an_answer_says_that_it_is_a_demo_and_how_to_get_a_real_model(client: AsyncOpenAI):
    completion = await ask(client, "Tell me a joke", tools=TOOLS)

    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage and completion.usage.total_tokens > completion.usage.prompt_tokens > 0
    for part in ("Demo model", "Tell me a joke", "MODEL", "OPENAI_API_KEY", "get_weather"):
        assert part in said(completion)


async def test_the_same_request_gets_the_same_answer(client: AsyncOpenAI):
    first, second = await ask(client, "Hello"), await ask(client, "Hello")
    other = await ask(client, "Goodbye")

    assert first.model_dump() == second.model_dump()
    assert first.id != other.id


async def test_a_stream_says_the_same_in_several_chunks(client: AsyncOpenAI):
    whole = await ask(client, "Hello")
    stream = await client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "Hello"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]

    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(deltas) == said(whole) and len(deltas) > 5
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage


async def test_a_call_streams_its_arguments(client: AsyncOpenAI):
    async with client.chat.completions.stream(
        model="demo",
        messages=[{"role": "user", "content": "Weather in Tokyo and Paris?"}],
        tools=TOOLS,
    ) as stream:
        completion = await stream.get_final_completion()

    assert completion.choices[0].finish_reason == "tool_calls"
    assert called(completion) == [
        ("get_weather", {"location": "Tokyo"}),
        ("get_weather", {"location": "Paris"}),
    ]


async def test_a_stream_ends_with_done(http: httpx2.AsyncClient):
    body = {"messages": [{"role": "user", "content": "Hello"}], "stream": True}
    reply = await http.post("/chat/completions", json=body)

    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.text.endswith("data: [DONE]\n\n")


async def test_a_delay_lies_between_chunks():
    async with httpx2.AsyncClient(transport=DemoTransport(delay=0.01)) as http:
        client = AsyncOpenAI(base_url="http://demo/v1", api_key="demo", http_client=http)
        started = time.monotonic()
        stream = await client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "Hello"}], stream=True
        )
        chunks = [chunk async for chunk in stream]

    assert time.monotonic() - started >= 0.01 * len(chunks)


async def test_a_token_limit_cuts_the_answer(client: AsyncOpenAI):
    completion = await ask(client, "Hello", max_completion_tokens=5)

    assert completion.choices[0].finish_reason == "length"
    assert completion.usage and completion.usage.completion_tokens == 5
    assert said(completion).startswith("Demo model")


async def test_the_model_is_listed_as_a_demo(client: AsyncOpenAI):
    [model] = [model async for model in client.models.list()]

    assert (model.id, model.owned_by) == ("demo", "built-in demo")


async def test_what_it_has_not_is_not_found(client: AsyncOpenAI):
    with pytest.raises(NotFoundError):
        await client.embeddings.create(model="demo", input="x")


NO_SUCH_TOOL = {"type": "function", "function": {"name": "no_such_tool"}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"n": 2}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"tools": TOOLS, "tool_choice": NO_SUCH_TOOL}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
]


@pytest.mark.parametrize(("options", "param"), REFUSED)
async def test_what_it_cannot_do_is_refused(
    client: AsyncOpenAI, options: dict[str, Any], param: str
):
    with pytest.raises(BadRequestError) as refused:
        await ask(client, "Hello", **options)

    assert refused.value.param == param


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"[" * 9_999, b'{"messages": []}', b"\xff"])
async def test_a_broken_body_is_refused_in_openai_s_form(http: httpx2.AsyncClient, body: bytes):
    reply = await http.post("/chat/completions", content=body)

    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"


# Tools


CHOICES: list[tuple[str, Calls]] = [
    ("What is the weather in Tokyo?", [("get_weather", {"location": "Tokyo"})]),
    ("how's the weather in new york?", [("get_weather", {"location": "new york"})]),
    ("Is it raining in San Francisco?", [("get_weather", {"location": "San Francisco"})]),
    ("Weather in Tokyo, Japan", [("get_weather", {"location": "Tokyo, Japan"})]),
    ("What is my name?", [("get_my_account", {})]),
    ("Who am I?", [("get_my_account", {})]),
    ("Change my name to Ada Lovelace", [("rename_me", {"name": "Ada Lovelace"})]),
    ("Cancel order 17", [("cancel_order", {"order_id": 17})]),
    ("Search the docs for durable runs", [("search_docs", {"query": "durable runs"})]),
    (
        "Tell me the weather in Paris and who I am",
        [("get_weather", {"location": "Paris"}), ("get_my_account", {})],
    ),
    ("Hello", []),
    ("Hi, my name is Ada", []),
    ("What can you do?", []),
]


@pytest.mark.parametrize(("prompt", "calls"), CHOICES)
async def test_a_prompt_chooses_its_tools(client: AsyncOpenAI, prompt: str, calls: Calls):
    assert called(await ask(client, prompt, tools=TOOLS)) == calls


async def test_what_a_tool_needs_and_nobody_said_is_asked_for(client: AsyncOpenAI):
    completion = await ask(client, "What's the weather?", tools=TOOLS)

    assert called(completion) == []
    assert "get_weather needs location" in said(completion)


async def test_no_tool_is_called_when_none_may_be(client: AsyncOpenAI):
    completion = await ask(client, "Weather in Tokyo?", tools=TOOLS, tool_choice="none")

    assert called(completion) == [] and "Demo model" in said(completion)


async def test_a_tool_is_called_when_one_must_be(client: AsyncOpenAI):
    any_tool = await ask(client, "Hello", tools=TOOLS, tool_choice="required")
    choice = {"type": "function", "function": {"name": "cancel_order"}}
    this_tool = await ask(client, "Hello 5", tools=TOOLS, tool_choice=choice)

    assert len(called(any_tool)) == 1
    assert called(this_tool) == [("cancel_order", {"order_id": 5})]


async def test_the_texts_of_parts_are_read_and_their_images_left_out(client: AsyncOpenAI):
    parts = [
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
        {"type": "text", "text": "Weather in Oslo?"},
    ]
    completion = await ask(client, parts, tools=TOOLS)

    assert called(completion) == [("get_weather", {"location": "Oslo"})]


class Weather(BaseModel):
    location: str
    temperature: float
    conditions: str


async def get_weather(location: str) -> Weather:
    """Current weather in one city.

    Args:
        location: City name in English.
    """
    if location == "Atlantis":
        raise ModelRetry("No city named 'Atlantis'; try the nearest large one.")
    if location == "Mars":
        raise ToolFailed("The weather service could not be reached.")
    return Weather(location=location, temperature=21.5, conditions="clear sky")


async def test_an_agent_tells_what_its_tool_returned(model: OpenAIChatModel):
    result = await Agent(model, tools=[get_weather]).run("What is the weather in Tokyo?")

    assert result.output.startswith("Demo model: ")
    assert "location: Tokyo, temperature: 21.5, conditions: clear sky" in result.output
    assert result.usage.requests == 2


@pytest.mark.parametrize(
    ("place", "reason"), [("Mars", "could not be reached"), ("Atlantis", "nearest large one")]
)
async def test_an_agent_tells_honestly_that_a_tool_failed(
    model: OpenAIChatModel, place: str, reason: str
):
    result = await Agent(model, tools=[get_weather]).run(f"Weather in {place}?")

    assert "did not succeed" in result.output and reason in result.output


async def test_an_agent_streams_after_its_tool(model: OpenAIChatModel):
    agent = Agent(model, tools=[get_weather])
    async with agent.run_stream("Weather in Tokyo?") as stream:
        deltas = [text async for text in stream.stream_text(delta=True, debounce_by=None)]

    assert len(deltas) > 3 and "temperature: 21.5" in "".join(deltas)


async def test_a_follow_up_is_for_the_tool_of_the_last_turn(model: OpenAIChatModel):
    agent = Agent(model, tools=[get_weather])
    first = await agent.run("Weather in Tokyo?")
    second = await agent.run("And in Paris?", message_history=first.all_messages())

    assert "Paris" in second.output and "Tokyo" not in second.output


async def test_an_agent_calls_its_tool_before_its_typed_output(model: OpenAIChatModel):
    for output in (Weather, NativeOutput(Weather)):
        agent = Agent(model, tools=[get_weather], output_type=output)
        result = await agent.run("What's the weather in Tokyo?")

        assert result.output == await get_weather("Tokyo")
        assert result.usage.tool_calls == 1


async def test_a_typed_output_says_that_a_tool_failed(model: OpenAIChatModel):
    result = await Agent(model, tools=[get_weather], output_type=Weather).run("Weather in Mars?")

    assert "could not be reached" in result.output.conditions


async def test_several_results_become_a_list(model: OpenAIChatModel):
    agent = Agent(model, tools=[get_weather], output_type=list[Weather])
    result = await agent.run("Weather in Tokyo and Paris?")

    assert [each.location for each in result.output] == ["Tokyo", "Paris"]


async def test_a_typed_output_is_read_from_the_prompt(model: OpenAIChatModel):
    text = "location: Oslo, temperature: -3.5, conditions: snow"
    result = await Agent(model, output_type=Weather).run(text)

    assert result.output == Weather(location="Oslo", temperature=-3.5, conditions="snow")


# Extraction


class Line(BaseModel):
    description: str
    quantity: int
    unit_price: Decimal


class Party(BaseModel):
    name: str
    vat_id: str | None = None


class Invoice(BaseModel):
    """Read one supplier invoice; copy amounts as printed."""

    invoice_number: str
    supplier: str
    customer: Party
    issued: date
    due_date: date | None = None
    total: Decimal = Field(description="Grand total with tax, in `currency`.")
    currency: str = Field(pattern="^[A-Z]{3}$", description="ISO 4217, e.g. EUR.")
    kind: Literal["invoice", "credit note"] = "invoice"
    note: str | None = None
    lines: list[Line]


class Contact(BaseModel):
    name: str
    email: str | None = Field(default=None, description="E-mail address.")
    phone: str | None = None
    company: str | None = None


PLAIN = """\
Invoice No: INV-2026-001
Supplier: ACME Corp.
Date: 2026-11-01
Due: 15 November 2026

Customer:
Name: Globex
VAT ID: DE123

2 x Widget 3.50
1 x Shipping 5.00
Subtotal: 12.00
Total = EUR 12.00
"""

MARKDOWN = """\
# Invoice INV-2026-001

**Supplier:** ACME Corp.
- Issued: Nov 1, 2026
- Due date: 15.11.2026
- Customer name: Globex
- Customer VAT ID: DE123

| Item | Qty | Unit price |
|------|----:|-----------:|
| Widget | 2 | 3.50 |
| Shipping | 1 | 5.00 |

Grand total: 12.00 EUR
"""

INVOICE = Invoice(
    invoice_number="INV-2026-001",
    supplier="ACME Corp.",
    customer=Party(name="Globex", vat_id="DE123"),
    issued=date(2026, 11, 1),
    due_date=date(2026, 11, 15),
    total=Decimal(12),
    currency="EUR",
    lines=[
        Line(description="Widget", quantity=2, unit_price=Decimal("3.5")),
        Line(description="Shipping", quantity=1, unit_price=Decimal(5)),
    ],
)
ADA = Contact(
    name="Ada Lovelace",
    email="ada@example.com",
    phone="+44 20 7946 0958",
    company="Analytical Engines",
)
SIGNATURE = """\
Name: Ada Lovelace
E-Mail: ada@example.com
Tel.: +44 20 7946 0958
Company: Analytical Engines
"""
MODES = [instructor.Mode.TOOLS, instructor.Mode.JSON, instructor.Mode.JSON_SCHEMA]


@pytest.mark.parametrize("mode", [*MODES, instructor.Mode.MD_JSON])
@pytest.mark.parametrize("text", [PLAIN, MARKDOWN])
async def test_instructor_reads_an_invoice(client: AsyncOpenAI, mode: instructor.Mode, text: str):
    reader = instructor.from_openai(client, mode=mode)
    invoice = await reader.chat.completions.create(
        model="demo",
        response_model=Invoice,
        messages=[{"role": "user", "content": text}],
        max_retries=0,
    )

    assert invoice.model_dump() == INVOICE.model_dump()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "text",
    [
        SIGNATURE,
        "Name is Ada Lovelace, company = Analytical Engines, ada@example.com, +44 20 7946 0958",
        "Hi, I'm Ada Lovelace from Analytical Engines. Write to ada@example.com"
        " or call +44 20 7946 0958.",
    ],
)
async def test_instructor_reads_a_contact(client: AsyncOpenAI, mode: instructor.Mode, text: str):
    reader = instructor.from_openai(client, mode=mode)
    contact = await reader.chat.completions.create(
        model="demo",
        response_model=Contact,
        messages=[
            {"role": "system", "content": "Extract the contact."},
            {"role": "user", "content": text},
        ],
        max_retries=0,
    )

    assert contact.model_dump() == ADA.model_dump()


async def test_instructor_streams_a_contact_part_by_part(client: AsyncOpenAI):
    reader = instructor.from_openai(client, mode=instructor.Mode.TOOLS)
    stream = reader.chat.completions.create_partial(
        model="demo", response_model=Contact, messages=[{"role": "user", "content": SIGNATURE}]
    )
    partials = [partial async for partial in stream]

    assert (partials[0].name, partials[-1].name) == (None, ADA.name)
    assert [each.name for each in partials].index(ADA.name) < len(partials) - 1


async def test_a_retry_is_answered_from_the_text_and_not_from_the_complaint(client: AsyncOpenAI):
    class Dated(Contact):
        born: date

    reader = instructor.from_openai(client, mode=instructor.Mode.TOOLS)
    with pytest.raises(InstructorRetryException) as failed:
        await reader.chat.completions.create(
            model="demo",
            response_model=Dated,
            messages=[{"role": "user", "content": "Name: Ada Lovelace"}],
            max_retries=1,
        )

    completion = failed.value.last_completion
    assert isinstance(completion, ChatCompletion)
    [(_, arguments)] = called(completion)
    assert arguments == {"name": "Ada Lovelace", "born": ""}


def schema_of(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(properties), **more}
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


async def test_what_is_required_and_not_said_is_as_empty_as_allowed(client: AsyncOpenAI):
    properties = {
        "text": {"type": "string"},
        "code": {"type": "string", "pattern": "^[A-Z]{3}$"},
        "count": {"type": "integer", "minimum": 1},
        "share": {"type": "number"},
        "open": {"type": "boolean"},
        "kind": {"enum": ["a", "b"]},
        "version": {"const": 2},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "items": {"type": "array", "items": {"type": "string"}},
        "inner": {"$ref": "#/$defs/Inner"},
    }
    inner = {"type": "object", "properties": {"id": {"type": "string"}}, "required": ["id"]}
    completion = await ask(
        client, "?", response_format=schema_of(properties, **{"$defs": {"Inner": inner}})
    )

    assert json.loads(said(completion)) == {
        "text": "",
        "code": "XXX",
        "count": 1,
        "share": 0,
        "open": False,
        "kind": "a",
        "version": 2,
        "maybe": None,
        "items": [],
        "inner": {"id": ""},
    }


# Arbitrary input


NODE = {
    "type": "object",
    "properties": {key: {"$ref": "#/$defs/Node"} for key in "abcde"},
    "required": list("abcde"),
}


def lists(depth: int) -> dict[str, Any]:
    if not depth:
        return {"type": "string"}
    return {"type": "array", "items": lists(depth - 1), "minItems": 1_000_000}


@pytest.mark.parametrize(
    "form",
    [
        schema_of({"a": {"$ref": "#/$defs/Node"}}, **{"$defs": {"Node": NODE}}),
        schema_of({"a": {"$ref": "#/$defs/A"}}, **{"$defs": {"A": {"$ref": "#/$defs/A"}}}),
        schema_of({"a": lists(30)}),
        schema_of({"a": {"type": "string", "pattern": "(a+)+$"}}),
        schema_of({"a": {"type": [], "enum": [], "anyOf": []}, "b": True, "c": None}),
    ],
)
async def test_an_endless_schema_is_filled_as_far_as_sense_goes(
    client: AsyncOpenAI, form: dict[str, Any]
):
    started = time.monotonic()
    completion = await ask(client, "a: " + "a" * 5_000 + "!", response_format=form)

    assert isinstance(json.loads(said(completion)), dict)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "piece", ["a", " ", "\n", "a: ", "Ab ", "1 ", "{", '"a" ', "|a", "a@", "2 x Widget 3.50\n", "'"]
)
async def test_a_megabyte_of_anything_is_answered(client: AsyncOpenAI, piece: str):
    prompt = "weather in Tokyo " + piece * (1_000_000 // len(piece))
    form = schema_of({"name": {"type": "string"}, "total": {"type": "number"}})
    started = time.monotonic()

    assert (await ask(client, prompt, tools=TOOLS)).choices
    assert (await ask(client, prompt, response_format=form)).choices
    assert time.monotonic() - started < 10

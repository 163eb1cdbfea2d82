"""The demo model, as the official clients see it."""

import json
import time
from typing import Any

import httpx2
import instructor
import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError
from openai.types.chat import ChatCompletion
from pydantic import BaseModel
from pydantic_ai import Agent, ModelRetry, ToolFailed
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from app.schemas.extractions import all_schemas
from app.services.demo import DemoTransport

http = httpx2.AsyncClient(transport=DemoTransport(), base_url="http://demo/v1")
client = AsyncOpenAI(base_url="http://demo/v1", api_key="demo", http_client=http, max_retries=0)
model = OpenAIChatModel("demo", provider=OpenAIProvider(openai_client=client))


def function(name: str, about: str, /, **arguments: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": arguments, "required": list(arguments)}
    shown = {"name": name, "description": about, "parameters": parameters, "strict": True}
    return {"type": "function", "function": shown}


def schema_of(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(properties), **more}
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


TEXT, NUMBER = {"type": "string"}, {"type": "number"}
TOOLS = [
    function("get_weather", "Current weather in one place.", location=TEXT),
    function("get_my_account", "The account of the person who asks: name and e-mail address."),
    function("rename_me", "Changes the name of the person who asks.", name=TEXT),
    function("convert", "Convert an amount to another currency.", amount=NUMBER, currency=TEXT),
    function("send_email", "Sends an e-mail.", to=TEXT, body=TEXT),
    function("set_unit", "Sets the unit of temperatures.", unit={"enum": ["celsius", "kelvin"]}),
]


async def ask(prompt: str, **options: Any) -> Any:
    create: Any = client.chat.completions.create
    return await create(model="demo", messages=[{"role": "user", "content": prompt}], **options)


def called(completion: ChatCompletion) -> list[tuple[str, dict[str, Any]]]:
    calls: list[Any] = [*(completion.choices[0].message.tool_calls or [])]
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls]


def said(completion: ChatCompletion) -> str:
    return completion.choices[0].message.content or ""


async def test_a_stream_says_the_same_in_several_chunks():
    whole = await ask("Hello")
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = [chunk async for chunk in await ask("Hello", **options)]
    choices = [chunk.choices[0] for chunk in chunks[:-1]]

    assert said(whole).startswith("Demo model: ") and "OPENAI_API_KEY" in said(whole)
    assert whole == await ask("Hello")
    assert choices[0].delta.role == "assistant" and len(choices) > 5
    assert "".join(choice.delta.content or "" for choice in choices) == said(whole)
    assert choices[-1].finish_reason == whole.choices[0].finish_reason == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage


async def test_calls_stream_their_arguments():
    messages: Any = [{"role": "user", "content": "weather in Tokyo and Paris"}]
    tools: Any = TOOLS
    stream = client.chat.completions.stream(model="demo", messages=messages, tools=tools)
    async with stream as events:
        completion = await events.get_final_completion()

    assert completion.choices[0].finish_reason == "tool_calls"
    assert [arguments["location"] for _, arguments in called(completion)] == ["Tokyo", "Paris"]


async def test_a_stream_pauses_between_chunks_and_ends_with_done():
    body = {"messages": [{"role": "user", "content": "Hello"}], "stream": True}
    started = time.monotonic()
    async with httpx2.AsyncClient(transport=DemoTransport(delay=0.01)) as slow:
        reply = await slow.post("http://demo/v1/chat/completions", json=body)

    assert reply.text.endswith("data: [DONE]\n\n")
    assert time.monotonic() - started >= 0.01 * (reply.text.count("data:") - 1)


async def test_a_token_limit_cuts_the_answer():
    completion = await ask("Hello", max_completion_tokens=5)

    assert completion.choices[0].finish_reason == "length"
    assert completion.usage.completion_tokens == 5


async def test_the_model_is_listed_as_a_demo_and_can_do_nothing_else():
    assert [model.owned_by async for model in client.models.list()] == ["built-in demo"]
    with pytest.raises(NotFoundError):
        await client.embeddings.create(model="demo", input="x")
    with pytest.raises(BadRequestError):
        await ask("Hello", tool_choice="required")


PROMPTS: list[tuple[str, list[tuple[str, dict[str, Any]]]]] = [
    ("What is the weather in Tokyo?", [("get_weather", {"location": "Tokyo"})]),
    ("how's the weather in new york?", [("get_weather", {"location": "new york"})]),
    ("what is my name", [("get_my_account", {})]),
    ("Who am I?", [("get_my_account", {})]),
    ("Change my name to Ada Lovelace", [("rename_me", {"name": "Ada Lovelace"})]),
    ("Convert 1,250.50 to EUR", [("convert", {"amount": 1250.5, "currency": "EUR"})]),
    ("Send an e-mail to a@b.org: 'Hi you'", [("send_email", {"to": "a@b.org", "body": "Hi you"})]),
    ("Set the unit to kelvin", [("set_unit", {"unit": "kelvin"})]),
    (
        "Tell me the weather in Paris and who I am",
        [("get_weather", {"location": "Paris"}), ("get_my_account", {})],
    ),
    *((prompt, []) for prompt in ("Hello", "Hi, my name is Ada", "Tell me a joke", "Weather?")),
]


@pytest.mark.parametrize(("prompt", "calls"), PROMPTS)
async def test_a_prompt_chooses_its_tools(prompt: str, calls: Any):
    assert called(await ask(prompt, tools=TOOLS)) == calls


async def test_the_choice_of_tools_is_respected():
    named = {"type": "function", "function": {"name": "rename_me"}}

    assert not called(await ask("Weather in Oslo?", tools=TOOLS, tool_choice="none"))
    assert len(called(await ask("Hello", tools=TOOLS, tool_choice="required"))) == 1
    [(name, _)] = called(await ask("Weather in Oslo?", tools=TOOLS, tool_choice=named))
    assert name == "rename_me"


class Weather(BaseModel):
    location: str
    temperature: float
    conditions: str


async def get_weather(location: str) -> Weather:
    """Current weather in one city."""
    if location == "Atlantis":
        raise ModelRetry("No city named 'Atlantis'; try the nearest large one.")
    if location == "Mars":
        raise ToolFailed("The weather service could not be reached.")
    return Weather(location=location, temperature=21.5, conditions="clear sky")


@pytest.mark.parametrize(
    ("place", "told"),
    [("Tokyo", "21.5"), ("Mars", "“The weather service could"), ("Atlantis", "“No city named")],
)
async def test_an_agent_tells_what_its_tool_said(place: str, told: str):
    result = await Agent(model, tools=[get_weather]).run(f"Weather in {place}?")

    assert result.output.startswith("Demo model: ") and told in result.output
    assert ("did not succeed" in result.output) == (place != "Tokyo")


async def test_an_agent_calls_its_tool_before_its_typed_output():
    one = Agent(model, tools=[get_weather], output_type=Weather)
    several = Agent(model, tools=[get_weather], output_type=list[Weather])

    assert (await one.run("Weather in Tokyo?")).output == await get_weather("Tokyo")
    assert "could not be reached" in (await one.run("Weather in Mars?")).output.conditions
    both = (await several.run("Weather in Tokyo and Paris")).output
    assert [each.location for each in both] == ["Tokyo", "Paris"]


INVOICE = (
    "Invoice\nSupplier: ACME Ltd\nNumber: 2026-17\nIssued: 2026-03-01\nTotal: EUR 12.50\n"
    "2 x Widget 3.50\n1 x Gadget 5.50"
)
INVOICED = (
    '{"supplier":"ACME Ltd","number":"2026-17","issued":"2026-03-01","lines":['
    '{"description":"Widget","quantity":"2","amount":"3.5"},'
    '{"description":"Gadget","quantity":"1","amount":"5.5"}],"total":"12.5","currency":"EUR"}'
)
CONTACT = "Name: Ada Lovelace\n- Email = a@b.org\n- Phone: +44 20\nCompany is Engines"
ADA = '{"name":"Ada Lovelace","email":"a@b.org","phone":"+44 20","company":"Engines"}'


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA])
async def test_instructor_reads_the_registered_schemas(mode: instructor.Mode):
    create = instructor.from_openai(client, mode=mode).create
    for name, text, expected in (("invoice", INVOICE, INVOICED), ("contact", CONTACT, ADA)):
        messages: list[Any] = [{"role": "user", "content": text}]
        read = await create(all_schemas()[name], messages, max_retries=0, model="demo")

        assert read.model_dump_json() == expected


PARTY = {"type": "object", "properties": {"name": TEXT, "id": TEXT}, "required": ["name"]}
ORDER = schema_of(
    {
        "customer": {"$ref": "#/$defs/Party"},
        "supplier": {"anyOf": [{"$ref": "#/$defs/Party"}, {"type": "null"}]},
        "tags": {"type": "array", "items": TEXT},
        "paid": {"type": "boolean"},
        "kind": {"enum": ["order", "credit note"]},
        "version": {"const": 2},
        "note": {"type": ["string", "null"]},
        "count": {"type": "integer", "minimum": 1},
        "code": {"type": "string", "pattern": "(a+)+$"},
    },
    **{"$defs": {"Party": PARTY}},
)


async def test_a_schema_is_filled_and_what_is_not_said_is_left_empty():
    text = "Supplier name: ACME\nSupplier ID: DE1\nCustomer: Ada\nTags: a, b and c\nPaid: yes"
    rest = {"kind": "order", "version": 2, "note": None, "count": 1, "code": ""}

    assert json.loads(said(await ask(text, response_format=ORDER))) == rest | {
        "customer": {"name": "Ada"},
        "supplier": {"name": "ACME", "id": "DE1"},
        "tags": ["a", "b", "c"],
        "paid": True,
    }
    empty = {"customer": {"name": ""}, "supplier": None, "tags": [], "paid": False}
    assert json.loads(said(await ask("?", response_format=ORDER))) == rest | empty


NODE = {"properties": {key: {"$ref": "#/$defs/Node"} for key in "abcde"}, "type": "object"}
TREE = {"Node": NODE | {"required": [*"abcde"]}, "Loop": {"$ref": "#/$defs/Loop"}}
HOSTILE = [
    schema_of({"a": {"$ref": "#/$defs/Node"}, "b": {"$ref": "#/$defs/Loop"}}, **{"$defs": TREE}),
    schema_of({"a": {"type": "array", "items": {"$ref": "#/properties/a"}}, "b": True, "c": None}),
    schema_of({"a": {"type": [], "enum": [], "anyOf": [], "minLength": 10**12, "title": [{}]}}),
    schema_of({f"p{index}": TEXT for index in range(20_000)}),
]


@pytest.mark.parametrize("form", HOSTILE)
async def test_any_input_is_answered_at_once(form: Any):
    for piece in ("a", "\n", "a: ", "Ab ", "1 ", '"a" ', "a@", "2 x B 3.50\n", "in ", "'"):
        prompt = "weather in Tokyo " + piece * (1_000_000 // len(piece))
        started = time.monotonic()

        assert (await ask(prompt, tools=TOOLS)).choices
        assert isinstance(json.loads(said(await ask(prompt, response_format=form))), dict)
        assert time.monotonic() - started < 5


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"[" * 9_999, b'{"messages": []}', b"\xff"])
async def test_a_broken_body_is_refused_in_openai_s_form(body: bytes):
    reply = await http.post("/chat/completions", content=body)

    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"

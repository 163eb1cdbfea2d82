"""Instructor, unmodified, as a client of the running server."""

from typing import Any

import instructor
import pytest
from instructor import Mode
from openai import AsyncOpenAI
from pydantic import BaseModel, Field

from tests.upstream import Call, Json, Reply, Upstream

MODES = [Mode.TOOLS, Mode.JSON, Mode.JSON_SCHEMA]


class City(BaseModel):
    name: str
    inhabitants: int = Field(ge=0)


def saying(mode: Mode, **city: Any) -> Reply:
    """The city in the way that the mode asks for it."""
    return (
        Reply(calls=(Call("City", city),))
        if mode == Mode.TOOLS
        else Reply(text=City.model_construct(**city).model_dump_json())
    )


async def ask(client: AsyncOpenAI, mode: Mode, **more: Any) -> City:
    return await instructor.from_openai(client, mode=mode).create(
        model="assistant",
        response_model=City,
        messages=[{"role": "user", "content": "Which is the capital of France?"}],
        **more,
    )


@pytest.mark.parametrize("mode", MODES)
async def test_instructor_gets_an_object(
    openai_client: AsyncOpenAI, upstream: Upstream, mode: Mode
) -> None:
    upstream.when("", saying(mode, name="Paris", inhabitants=2_000_000))

    city = await ask(openai_client, mode)

    assert (city.name, city.inhabitants) == ("Paris", 2_000_000)


@pytest.mark.parametrize("mode", MODES)
async def test_a_model_that_answers_wrongly_is_told_what_is_wrong(
    openai_client: AsyncOpenAI, upstream: Upstream, mode: Mode
) -> None:
    def answer(body: Json) -> Reply:
        again = len([message for message in body["messages"] if message["role"] != "system"]) > 1
        return saying(mode, name="Paris", inhabitants=2_000_000 if again else -1)

    upstream.when("", answer)

    assert (await ask(openai_client, mode, max_retries=2)).inhabitants == 2_000_000
    assert len(upstream.requests) == 2
    told = upstream.requests[-1].body["messages"][-1]
    assert "inhabitants" in told["content"] and "-1" in str(told["content"])

"""A long history is the same whether this process has it or reads it."""

import asyncio
from collections.abc import Sequence
from typing import Any

from httpx2 import AsyncClient
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart
from sqlalchemy import text

from app.models import Run
from app.services.changes import INSERT_CALL
from app.services.conversation import dump_message
from app.services.execution import Job, Outcome
from app.services.histories import LONG, Histories
from app.services.journal import Journal
from tests.asking import calls
from tests.chatting import URL, asking, content_of, texts, told, user
from tests.conftest import client_of, settings_of
from tests.core import Core, open_core
from tests.keeping import connected
from tests.server import ThreadedServer
from tests.toolserver import ToolServer
from tests.upstream import Reply, Upstream

EARLIER = [("user", "What is one?"), ("assistant", "One is one.")] * (LONG // 2)
TURNS = LONG // 2 + 4


async def answering(journal: Journal, job: Job) -> Outcome:
    reply = ModelResponse([TextPart(f"re: {job.options.text}")])
    return Outcome("completed", finish_reason="stop", text="done", messages=[reply])


async def unsure(journal: Journal, job: Job) -> Outcome:
    """Leaves a call of which nobody knows what became of it."""
    outcome = await answering(journal, job)
    row = {
        "run_id": job.run.id,
        "step": 1,
        "call_id": "call_1",
        "tool": "pay",
        "key": f"{job.run.id}0",
        "status": "unknown",
        "decided": False,
        "result": None,
    }
    outcome.rows = [(INSERT_CALL, row)]
    return outcome


async def ended(core: Core, prompt: str, *, chat: str = "c", **new: Any) -> Run:
    run = await core.accept(chat=chat, prompt=prompt, **new)
    await core.runs.wait(run)
    return run


async def long(core: Core, *prompts: str, chat: str = "c") -> list[Run]:
    """The runs of a conversation, of which all but the first go on from a long history."""
    first = await ended(core, prompts[0], chat=chat, earlier=EARLIER)
    return [first, *[await ended(core, prompt, chat=chat) for prompt in prompts[1:]]]


async def before(core: Core, histories: Histories, run: Run) -> list[str]:
    async with core.engine.connect() as connection:
        return said(await histories.before(connection, run))


def said(messages: Sequence[ModelMessage]) -> list[str]:
    return [str(part.content) for each in messages for part in each.parts]  # pyright: ignore


async def rewrite(core: Core, run: Run, said: str) -> None:
    """Changes what the run's model said, behind everybody's back."""
    body = dump_message(ModelResponse([TextPart(said)]))
    last = "(SELECT max(seq) FROM messages WHERE run_id = :id)"
    await core.sql(
        f"UPDATE messages SET body = :body WHERE run_id = :id AND seq = {last}",
        id=run.id,
        body=body,
    )


async def test_what_was_read_once_is_not_read_again(environ: dict[str, str]) -> None:
    async with open_core(settings_of(environ), answering) as core:
        one, two, three = await long(core, "one", "two", "three")
        histories = Histories()
        first = await before(core, histories, two)
        await rewrite(core, one, "something else")

        second = await before(core, histories, three)

        assert first == [words for _, words in EARLIER] + ["one", "re: one"]
        assert second == [*first, "two", "re: two"]
        read = await before(core, Histories(), three)
        assert read == [*first[:-1], "something else", "two", "re: two"]


async def test_another_branch_is_read(environ: dict[str, str]) -> None:
    async with open_core(settings_of(environ), answering) as core:
        one, two, three = await long(core, "one", "two", "three")
        other = await ended(core, "other", after=[one.id])
        histories = Histories()
        for run in (two, three):
            await before(core, histories, run)

        found = await before(core, histories, other)

        assert found[-2:] == ["one", "re: one"]
        assert found == await before(core, Histories(), other)


async def test_a_short_history_is_read_each_time(environ: dict[str, str]) -> None:
    async with open_core(settings_of(environ), answering) as core:
        one, two, three = [await ended(core, prompt) for prompt in ("one", "two", "three")]
        histories = Histories()
        await before(core, histories, two)
        await rewrite(core, one, "something else")

        assert await before(core, histories, three) == ["one", "something else", "two", "re: two"]
        assert await before(core, histories, one) == []


async def test_a_run_that_goes_on_after_a_pause_reads_nothing_again(
    environ: dict[str, str],
) -> None:
    async with open_core(settings_of(environ), answering) as core:
        one, two = await long(core, "one", "two")
        histories = Histories()
        first = await before(core, histories, two)
        await rewrite(core, one, "something else")

        assert await before(core, histories, two) == first


async def test_what_was_only_noted_is_read_each_time(environ: dict[str, str]) -> None:
    async with open_core(settings_of(environ), answering) as core:
        await ended(core, "one", earlier=EARLIER)
        noted = await core.runs.note(
            core.caller, "c", "assistant", [ModelResponse([TextPart("noted")])]
        )
        two, three = [await ended(core, prompt) for prompt in ("two", "three")]
        histories = Histories()
        assert (await before(core, histories, two))[-1] == "noted"
        await rewrite(core, noted, "")

        assert (await before(core, histories, three))[-3:] == ["", "two", "re: two"]


async def test_what_still_goes_on_is_read_each_time(environ: dict[str, str]) -> None:
    async with open_core(settings_of(environ), answering) as core:
        one, two, three = await long(core, "one", "two", "three")
        await core.sql("UPDATE runs SET status = 'running' WHERE id = :id", id=one.id)
        histories = Histories()
        await before(core, histories, two)
        await core.sql("UPDATE runs SET status = 'completed' WHERE id = :id", id=one.id)
        await rewrite(core, one, "something else")

        assert (await before(core, histories, three))[-3:] == ["something else", "two", "re: two"]


async def test_what_may_still_change_is_read_each_time(environ: dict[str, str]) -> None:
    async with open_core(settings_of(environ), unsure) as core:
        one, two, three, four = await long(core, "one", "two", "three", "four")
        await core.sql("UPDATE tool_calls SET status = 'done' WHERE run_id <> :id", id=one.id)
        histories = Histories()
        await before(core, histories, two)
        await core.sql("UPDATE tool_calls SET status = 'done'")
        await rewrite(core, one, "it was paid")

        found = await before(core, histories, three)
        await rewrite(core, one, "something else")

        assert found[-4:] == ["one", "it was paid", "two", "re: two"]
        assert await before(core, histories, four) == [*found, "three", "re: three"]


async def test_a_call_that_may_still_be_settled_ends_the_keeping(environ: dict[str, str]) -> None:
    async with open_core(settings_of(environ), unsure) as core:
        _, two, three, four = await long(core, "one", "two", "three", "four")
        await core.sql("UPDATE tool_calls SET status = 'done' WHERE run_id <> :id", id=two.id)
        histories = Histories()
        await before(core, histories, two)
        await before(core, histories, three)
        await rewrite(core, two, "it was paid")

        assert (await before(core, histories, four))[-3] == "it was paid"


async def test_only_so_much_is_kept_for_so_long(environ: dict[str, str]) -> None:
    async with open_core(settings_of(environ), answering) as core:
        one, two, three = await long(core, "one", "two", "three")
        small, brief = Histories(most=LONG), Histories(seconds=0.01)
        for histories in (small, brief):
            await before(core, histories, two)
        await asyncio.sleep(0.02)
        await rewrite(core, one, "something else")

        for histories in (small, brief):
            assert (await before(core, histories, three))[-3] == "something else"


async def test_what_was_gone_on_from_first_makes_room(environ: dict[str, str]) -> None:
    async with open_core(settings_of(environ), answering) as core:
        chats = [await long(core, "one", "two", "three", chat=chat) for chat in "abcdef"]
        async with core.engine.connect() as connection:
            stored = await Histories().before(connection, chats[0][1])
        size = sum(len(dump_message(each)) for each in stored)
        histories = Histories(most=5 * size + size // 2)
        for one, two, _ in chats:
            await before(core, histories, two)
            await rewrite(core, one, "something else")

        found = [(await before(core, histories, three))[-3] for _, _, three in reversed(chats)]

        assert found == [*["re: one"] * 5, "something else"]


async def test_the_model_is_told_the_same_from_memory(
    environ: dict[str, str], upstream: Upstream, tools: ToolServer
) -> None:
    settings, expected = settings_of(environ, auth="local"), list[tuple[str, str]]()
    looks = calls("get_weather", location="Tokyo")
    upstream.when("Question 9", looks, Reply(text="Fine."))

    async def turn(client: AsyncClient, text: str) -> list[tuple[str, str]]:
        expected.append(("user", text))
        answer = await client.post(URL, json=asking(user(text)), headers={"X-Chat-Id": "c"})
        expected.append(("assistant", content_of(answer)))
        return texts(told(upstream))

    with ThreadedServer(settings) as one, ThreadedServer(settings) as other:
        async with client_of(one.url) as here, client_of(other.url) as there:
            for number in range(TURNS):
                said = await turn(here, f"Question {number}")
                called = [each for each in said if each[0] == "tool" or each == ("assistant", "")]
                assert len(called) == (2 if number >= 9 else 0)
                assert [each for each in said if each not in called] == expected[:-1]
            async with connected(environ) as connection:
                first = "UPDATE messages SET body = replace(body, 'Question 1\"', 'Question -1\"')"
                await connection.execute(text(first))

            from_memory = await turn(here, "And now?")
            read = await turn(there, "And then?")

    assert ("user", "Question 1") in from_memory
    assert ("user", "Question -1") in read
    assert [each for each in read[: len(from_memory)] if each != ("user", "Question -1")] == [
        each for each in from_memory if each != ("user", "Question 1")
    ]

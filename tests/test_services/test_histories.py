"""A long history is the same whether this process has it or reads it."""

import asyncio
from collections.abc import Sequence
from typing import Any

from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart

from app.models import Run
from app.services.changes import INSERT_CALL
from app.services.conversation import dump_message
from app.services.histories import LONG, Histories
from app.services.journal import Journal
from app.services.worker import Job, Outcome
from tests.conftest import client_of, settings_of
from tests.core import Core, open_core
from tests.server import ThreadedServer
from tests.upstream import Upstream

EARLIER = [("user", "What is one?"), ("assistant", "One is one.")] * (LONG // 2)
TURNS = LONG // 2 + 3


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


async def rewrite(core: Core, run: Run, text: str) -> None:
    """Changes what the run's model said, behind everybody's back."""
    body = dump_message(ModelResponse([TextPart(text)]))
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

        assert first == [text for _, text in EARLIER] + ["one", "re: one"]
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


async def test_the_model_is_told_the_same_by_all_processes(
    environ: dict[str, str], upstream: Upstream
) -> None:
    settings = settings_of(environ, auth="local")
    expected: list[str] = []
    with ThreadedServer(settings) as one, ThreadedServer(settings) as other:
        async with client_of(one.url) as here, client_of(other.url) as there:
            for turn in range(TURNS):
                client = there if turn in (TURNS - 3, TURNS - 1) else here
                answer = await client.post(
                    "/v1/chat/completions",
                    json={
                        "model": "assistant",
                        "messages": [{"role": "user", "content": f"Question {turn}"}],
                    },
                    headers={"X-Chat-Id": "c"},
                )
                expected.append(f"Question {turn}")
                told = [
                    message["content"]
                    for message in upstream.requests[-1].body["messages"]
                    if message["role"] != "system"
                ]
                assert told == expected
                expected.append(answer.json()["choices"][0]["message"]["content"])

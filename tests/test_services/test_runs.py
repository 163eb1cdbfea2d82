"""A conversation is a tree: messages find their place in it, also two at once."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from pydantic_ai.messages import (
    ModelRequest,
    ModelResponse,
    TextPart,
    ToolCallPart,
    UserPromptPart,
)

from agents import all_agents
from app.core.errors import Conflict, Forbidden, Invalid
from app.core.security import EVERYTHING, Caller
from app.models import Run
from app.schemas.run import Options
from app.services.changes import INSERT_CALL
from app.services.decisions import Decision
from app.services.execution import Job, Outcome
from app.services.journal import Journal
from app.services.refusals import ConversationBusy, NotDecided, RunNotFound
from app.services.run_log import RunEnded, RunPaused
from tests.conftest import settings_of
from tests.core import DONE, Core, open_core
from tests.plugins import plugged_in
from tools import Declared

KEY = "a" * 40


async def at_once(journal: Journal, job: Job) -> Outcome:
    reply = ModelResponse([TextPart(f"re: {job.options.text}")])
    return Outcome("completed", finish_reason="stop", text="done", messages=[reply])


class Gate:
    """Runs begin, and end when they are let."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self._open = asyncio.Event()

    async def __call__(self, journal: Journal, job: Job) -> Outcome:
        self.begun.append(job.options.text)
        try:
            await self._open.wait()
        except asyncio.CancelledError:
            return Outcome("cancelled", text="half")
        return DONE

    def open(self) -> None:
        self._open.set()


async def asking(journal: Journal, job: Job) -> Outcome:
    """Asks for one call, and says at the end what was decided."""
    if job.run.token > 1:
        return DONE
    call = ToolCallPart("erase", {}, tool_call_id="call_1")
    row = {
        "run_id": job.run.id,
        "step": 1,
        "call_id": "call_1",
        "tool": "erase",
        "key": KEY,
        "status": "asked",
        "decided": False,
        "result": None,
    }
    return Outcome("waiting", asks=[call], keys=[KEY], rows=[(INSERT_CALL, row)])


async def said(core: Core, run: Run) -> list[str]:
    """The prompts from the root to this run."""
    return [
        str(part.content)
        for _, messages in await core.runs.turns(core.caller, run)
        for message in messages
        if isinstance(message, ModelRequest)
        for part in message.parts
        if isinstance(part, UserPromptPart)
    ]


async def ended(core: Core, **new: Any) -> Run:
    run = await core.accept(**new)
    await core.runs.wait(run)
    return run


async def test_a_chat_goes_on_from_its_newest_run(environ: dict[str, str]) -> None:
    async with open_core(settings_of(environ), at_once) as core:
        await ended(core, chat="c", prompt="one")
        second = await ended(core, chat="c", prompt="two")
        newest = await core.runs.newest(core.caller, "c")

        assert newest is not None and newest.id == second.id
        assert await said(core, second) == ["one", "two"]
        assert [second.position, second.turn_id] == [2, second.id]


async def test_a_message_goes_on_from_the_last_that_its_client_names(
    environ: dict[str, str],
) -> None:
    async with open_core(settings_of(environ), at_once) as core:
        first = await ended(core, chat="c", prompt="one", message_id="m1")
        await ended(core, chat="c", prompt="two", message_id="m2", after=["m1", first.turn_id])
        by_turn = await ended(core, chat="c", prompt="three", after=["x", first.turn_id])
        by_prompt = await ended(core, chat="c", prompt="four", after=["m1", "m2", "unknown"])
        by_nothing = await ended(core, chat="c", prompt="five", after=["unknown"])
        root = await ended(core, chat="c", prompt="six", after=())

        assert await said(core, by_turn) == ["one", "three"]
        assert await said(core, by_prompt) == ["one", "two", "four"]
        assert await said(core, by_nothing) == ["one", "two", "four", "five"]
        assert await said(core, root) == ["six"]


async def test_a_prompt_that_is_sent_again_stands_beside_its_first_answer(
    environ: dict[str, str],
) -> None:
    async with open_core(settings_of(environ), at_once) as core:
        first = await ended(core, chat="c", prompt="one", message_id="m1")
        await ended(core, chat="c", prompt="two", message_id="m2")
        again = await ended(core, chat="c", prompt="two!", message_id="m2", after=["m1"])
        root = await ended(core, chat="c", prompt="one!", message_id="m1")

        assert again.parent_id == first.id
        assert await said(core, again) == ["one", "two!"]
        assert await said(core, root) == ["one!"]


async def test_two_messages_at_once_take_their_turns(environ: dict[str, str]) -> None:
    gate = Gate()
    async with open_core(settings_of(environ), gate) as core:
        runs = await asyncio.gather(*(core.accept(chat="c", prompt=str(n)) for n in range(8)))
        by_position = sorted(runs, key=lambda run: run.position or 0)
        gate.open()
        for run in runs:
            await core.runs.wait(run)

        assert [run.position for run in by_position] == list(range(1, 9))
        parents = [run.parent_id for run in by_position]
        assert parents == [None, *(run.id for run in by_position[:-1])]
        assert len(await said(core, by_position[-1])) == 8
        assert gate.begun == [_text(run) for run in by_position]


async def _looked(core: Core, gate: Gate) -> None:
    """Returns when the queue was looked at twice since."""
    for name in ("a look", "another"):
        await core.accept(prompt=name, queue=True)
        while gate.begun[-1] != name:
            await asyncio.sleep(0.01)


async def test_what_goes_on_from_a_stopped_message_waits_for_what_that_waited_for(
    environ: dict[str, str],
) -> None:
    gate = Gate()
    async with open_core(settings_of(environ), gate) as core:
        first = await core.accept(chat="c", prompt="one")
        stopped = [await core.accept(chat="c", prompt=prompt) for prompt in ("two", "three")]
        for run in stopped:
            await core.runs.cancel(core.caller, run.id)
            await core.runs.wait(run)
        by_chat = await core.accept(chat="c", prompt="four")
        by_parent = await core.accept(parent=stopped[0].id, prompt="five")
        with pytest.raises(ConversationBusy):
            await core.accept(parent=stopped[1].id, prompt="six", multitask="reject")
        await _looked(core, gate)

        begun = list(gate.begun)
        gate.open()
        for run in (first, by_chat, by_parent):
            await core.runs.wait(run)

        assert begun == ["one", "a look", "another"]
        assert sorted(gate.begun[3:]) == ["five", "four"]
        assert (by_chat.parent_id, by_parent.parent_id) == (stopped[1].id, stopped[0].id)


async def test_without_a_chat_too_it_waits_or_goes_first(environ: dict[str, str]) -> None:
    gate = Gate()
    async with open_core(settings_of(environ), gate) as core:
        first = await core.accept(prompt="one")
        stopped = await core.accept(parent=first.id, prompt="two")
        await core.runs.cancel(core.caller, stopped.id)
        await core.runs.wait(stopped)
        behind = await core.accept(parent=stopped.id, prompt="three")
        await _looked(core, gate)
        assert gate.begun == ["one", "a look", "another"]
        with pytest.raises(ConversationBusy):
            await core.accept(parent=stopped.id, prompt="four", multitask="reject")

        at_once = await core.accept(parent=stopped.id, prompt="five", multitask="interrupt")
        entries = await core.runs.wait(first)

        assert entries[-1].event.status == "cancelled"  # pyright: ignore
        gate.open()
        for run in (behind, at_once):
            await core.runs.wait(run)
        assert sorted(gate.begun[3:]) == ["five", "three"]


async def test_what_goes_on_from_a_message_that_had_to_be_decided_on_first_waits(
    environ: dict[str, str],
) -> None:
    gate = Gate()
    goes_on = asyncio.Event()

    async def cashier(journal: Journal, job: Job) -> Outcome:
        if job.options.text == "pay" and job.run.token == 1:
            await goes_on.wait()
            return await asking(journal, job)
        return await gate(journal, job)

    async with open_core(settings_of(environ), cashier) as core:
        first = await core.accept(chat="c", prompt="pay")
        second = await core.accept(chat="c", prompt="two")  # queued, before anything was asked
        goes_on.set()
        await core.runs.wait(second)
        await core.runs.decide(core.caller, [Decision(KEY, approve=False)])
        while "pay" not in gate.begun:
            await asyncio.sleep(0.01)
        third = await core.accept(chat="c", prompt="three")
        await _looked(core, gate)

        begun = list(gate.begun)
        gate.open()
        for run in (first, third):
            await core.runs.wait(run)

        assert (await core.row(second)).status == "failed"
        assert third.parent_id == second.id
        assert begun == ["pay", "a look", "another"]
        assert gate.begun[3:] == ["three"]


def _text(run: Run) -> str:
    return Options.model_validate_json(run.options).text


async def test_a_client_that_missed_a_message_is_put_behind_it(environ: dict[str, str]) -> None:
    gate = Gate()
    async with open_core(settings_of(environ), gate) as core:
        gate.open()
        first = await ended(core, chat="c", prompt="one")
        gate._open.clear()
        second = await core.accept(chat="c", prompt="two", after=[first.turn_id])
        third = await core.accept(chat="c", prompt="three", after=[first.turn_id])
        gate.open()
        await core.runs.wait(third)

        assert (second.parent_id, third.parent_id) == (first.id, second.id)


async def test_a_busy_conversation_can_refuse(environ: dict[str, str]) -> None:
    gate = Gate()
    async with open_core(settings_of(environ), gate) as core:
        first = await core.accept(chat="c", prompt="one")
        with pytest.raises(ConversationBusy):
            await core.accept(chat="c", prompt="two", multitask="reject")
        with pytest.raises(ConversationBusy):
            await core.accept(parent=first.id, prompt="two", multitask="reject")
        gate.open()
        await core.runs.wait(first)
        after = await ended(core, chat="c", prompt="three", multitask="reject")

        assert await said(core, after) == ["one", "three"]


async def test_of_many_that_want_no_company_one_begins(environ: dict[str, str]) -> None:
    gate = Gate()
    async with open_core(settings_of(environ), gate) as core:
        results = await asyncio.gather(
            *(core.accept(chat="c", prompt=str(n), multitask="reject") for n in range(8)),
            return_exceptions=True,
        )
        gate.open()

        assert sum(isinstance(result, ConversationBusy) for result in results) == 7


async def test_a_message_can_interrupt(environ: dict[str, str]) -> None:
    gate = Gate()
    async with open_core(settings_of(environ), gate) as core:
        first = await core.accept(chat="c", prompt="one")
        second = await core.accept(chat="c", prompt="two")
        third = await core.accept(chat="c", prompt="stop, three", multitask="interrupt")
        gate.open()
        await asyncio.wait_for(core.runs.wait(third), 5)

        assert [(await core.row(run)).status for run in (first, second, third)] == [
            "cancelled",
            "cancelled",
            "completed",
        ]
        assert gate.begun == ["one", "stop, three"]


async def test_a_chat_is_stopped_as_a_whole(environ: dict[str, str]) -> None:
    async with open_core(settings_of(environ), Gate()) as core:
        runs = [await core.accept(chat="c", prompt=str(n)) for n in range(3)]
        stopped = await core.runs.stop(core.caller, "c")
        for run in runs:
            await asyncio.wait_for(core.runs.wait(run), 5)

        assert {run.id for run in stopped} == {run.id for run in runs}
        assert {(await core.row(run)).status for run in runs} == {"cancelled"}
        alone = await core.accept(prompt="in no chat")
        assert await core.runs.stop(core.caller, "unknown") == []
        assert (await core.row(alone)).cancelling in (0, False)


async def test_names_of_chats_are_their_owners_own(environ: dict[str, str]) -> None:
    async with open_core(settings_of(environ), at_once) as core:
        mine = await ended(core, chat="c", prompt="one", message_id="m1")
        stranger = Caller.of(core.caller.user_id + 1, EVERYTHING)

        assert await core.runs.newest(stranger, "c") is None
        with pytest.raises(RunNotFound):
            await core.runs.get(stranger, mine.id)


@pytest.mark.parametrize("new", [{"chat": "c" * 256}, {"message_id": "\0"}, {"after": ["a\0"]}])
async def test_ids_that_no_database_takes_are_refused(
    environ: dict[str, str], new: dict[str, Any]
) -> None:
    async with open_core(settings_of(environ), at_once) as core:
        with pytest.raises(Invalid):
            await core.accept(**new)


async def test_messages_that_nobody_answers_are_part_of_the_history(
    environ: dict[str, str],
) -> None:
    noted: Sequence[ModelRequest] = [ModelRequest([UserPromptPart("by the way")])]
    async with open_core(settings_of(environ), at_once) as core:
        await ended(core, chat="c", prompt="one")
        note = await core.runs.note(core.caller, "c", "assistant", noted)
        after = await ended(core, chat="c", prompt="two")

        assert [entry.is_last for entry in await core.runs.wait(note)] == [True]
        assert await said(core, after) == ["one", "by the way", "two"]
        with pytest.raises(RunNotFound):
            await core.runs.note(core.caller, "unknown", "assistant", noted)


async def test_a_decision_is_made_once_by_its_owner_and_in_time(environ: dict[str, str]) -> None:
    async with open_core(settings_of(environ), asking) as core:
        run = await core.accept(chat="c")
        entries = await core.runs.wait(run, pause=True)
        [paused] = [entry.event for entry in entries if isinstance(entry.event, RunPaused)]
        assert paused.keys == [KEY]

        stranger = Caller.of(core.caller.user_id + 1, EVERYTHING)
        for caller, key in [(stranger, KEY), (core.caller, "b" * 40), (core.caller, "\0")]:
            with pytest.raises(Conflict):
                await core.runs.decide(caller, [Decision(key, True)])
        decided = await core.runs.decide(core.caller, [Decision(KEY, True)])
        await asyncio.wait_for(core.runs.wait(decided), 5)

        assert (decided.id, (await core.row(run)).status) == (run.id, "completed")
        again = await core.runs.decide(core.caller, [Decision(KEY, True)])
        assert (again.id, again.status) == (run.id, "completed")
        with pytest.raises(Conflict):
            await core.runs.decide(core.caller, [Decision(KEY, False)])


async def test_a_message_is_no_answer_to_a_question(environ: dict[str, str]) -> None:
    async with open_core(settings_of(environ), asking) as core:
        first = await core.accept(chat="c")
        await core.runs.wait(first, pause=True)
        with pytest.raises(NotDecided) as refused:
            await core.accept(chat="c", prompt="well?")
        assert (refused.value.run.id, refused.value.details["keys"]) == (first.id, [KEY])
        with pytest.raises(NotDecided):
            await core.accept(parent=first.id, prompt="well?")
        with pytest.raises(ConversationBusy):
            await core.accept(chat="c", prompt="well?", multitask="reject")
        await core.accept(chat="c", prompt="something else", multitask="interrupt")
        await asyncio.wait_for(core.runs.wait(first), 5)

        assert (await core.row(first)).status == "cancelled"
        with pytest.raises(Conflict):
            await core.runs.decide(core.caller, [Decision(KEY, True)])


async def test_a_client_that_keeps_the_tree_may_grow_two_branches_at_once(
    environ: dict[str, str],
) -> None:
    gate = Gate()
    async with open_core(settings_of(environ), gate) as core:
        gate.open()
        first = await ended(core, chat="c", prompt="one", message_id="m1")
        gate._open.clear()
        second, third = [
            await core.accept(chat="c", prompt=name, message_id=name, after=["m1"], exact=True)
            for name in ("two", "three")
        ]
        gate.open()

        assert second.parent_id == third.parent_id == first.id
        assert (second.status, third.status) == ("running", "running")


async def test_a_turn_is_known_by_its_prompt_also_in_another_branch(
    environ: dict[str, str],
) -> None:
    async with open_core(settings_of(environ), at_once) as core:
        first = await ended(core, chat="c", prompt="one", message_id="m1")
        await core.sql(
            "UPDATE runs SET turn_id = :turn WHERE id = :id",
            turn=first.id,
            id=(goes_on := await ended(core, chat="c", prompt="result")).id,
        )
        await ended(core, chat="c", prompt="elsewhere", after=())
        third = await ended(core, chat="c", prompt="two", after=["m1"])

        assert third.parent_id == goes_on.id


async def test_the_same_message_again_is_the_same_run_while_it_is_answered(
    environ: dict[str, str],
) -> None:
    gate = Gate()
    async with open_core(settings_of(environ), gate) as core:
        first, again = [
            await core.accept(chat="c", prompt="one", message_id="m1") for _ in range(2)
        ]
        with pytest.raises(ConversationBusy):
            await core.accept(chat="c", prompt="one, edited", message_id="m1")
        gate.open()
        await core.runs.wait(first)
        regenerated = await ended(core, chat="c", prompt="one", message_id="m1")

        assert (again.id, len(gate.begun)) == (first.id, 2)
        assert regenerated.id != first.id


async def test_what_is_queued_behind_a_question_is_refused(environ: dict[str, str]) -> None:
    go = asyncio.Event()

    async def slowly(journal: Journal, job: Job) -> Outcome:
        await go.wait()
        return await asking(journal, job)

    async with open_core(settings_of(environ), slowly) as core:
        first, second, third = [
            await core.accept(chat="c", prompt=name) for name in ("one", "two", "three")
        ]
        go.set()
        for run in (second, third):
            [*_, last] = await asyncio.wait_for(core.runs.wait(run), 10)
            assert isinstance(last.event, RunEnded)
            assert (last.event.error or {})["code"] == "not_decided"
        with pytest.raises(NotDecided):
            await core.accept(chat="c", prompt="four")
        await core.runs.decide(core.caller, [Decision(KEY, True)])
        await asyncio.wait_for(core.runs.wait(first), 5)

        assert (await core.row(first)).status == "completed"


async def test_nobody_approves_what_they_may_not_do(environ: dict[str, str]) -> None:
    with plugged_in():
        async with open_core(settings_of(environ), asking) as core:
            listed = all_agents()["tester"]
            run = await core.accept(program="tester")
            await asyncio.wait_for(core.runs.wait(run, pause=True), 5)
            tool = listed.tools["erase"]
            assert tool.metadata is not None
            tool.metadata["declared"] = Declared("once", "danger")
            weak = Caller.of(core.caller.user_id, ("weather:read",))
            with pytest.raises(Forbidden):
                await core.runs.decide(weak, [Decision(KEY, True)])
            await core.runs.decide(weak, [Decision(KEY, False)])


async def test_what_nobody_decides_in_time_goes_on_without(environ: dict[str, str]) -> None:
    settings = settings_of(environ, approval_timeout=0.2)
    async with open_core(settings, asking) as core:
        run = await core.accept()
        await core.runs.wait(run, pause=True)
        await asyncio.wait_for(core.runs.wait(run), 10)

        assert (await core.row(run)).status == "completed"
        with pytest.raises(Conflict):
            await core.runs.decide(core.caller, [Decision(KEY, True)])


async def test_a_follower_learns_that_its_run_was_deleted(environ: dict[str, str]) -> None:
    async with open_core(settings_of(environ), asking) as core:
        run = await core.accept()
        await core.runs.wait(run, pause=True)
        following = asyncio.create_task(core.runs.wait(run))
        await core.sql("DELETE FROM runs WHERE id = :id", id=run.id)

        with pytest.raises(RunNotFound):
            await asyncio.wait_for(following, 5)


async def test_what_was_accepted_outlives_the_deletion_of_what_it_goes_on_from(
    environ: dict[str, str],
) -> None:
    async with open_core(settings_of(environ), at_once) as core:
        for _ in range(20):
            parent = await ended(core)
            child, _gone = await asyncio.gather(
                core.accept(parent=parent.id, prompt="more"),
                core.runs.delete(core.caller, parent.id),
                return_exceptions=True,
            )
            if isinstance(child, RunNotFound):
                continue
            assert isinstance(child, Run)
            await asyncio.wait_for(core.runs.wait(child), 5)
            assert (await core.row(child)).status == "completed"

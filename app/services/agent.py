"""Executes a run's agent, step by step: what a step brought is committed before the next begins."""

import asyncio
import logging
import math
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import partial
from typing import Any, cast

import httpx2
from openai import OpenAIError
from pydantic_ai import (
    Agent,
    CallDeferred,
    DeferredToolRequests,
    ModelRetry,
    ModelSettings,
    NativeOutput,
    RunContext,
    StructuredDict,
    ToolOutput,
)
from pydantic_ai.exceptions import (
    AgentRunError,
    ContentFilterError,
    IncompleteToolCall,
    ModelHTTPError,
    UnexpectedModelBehavior,
    UsageLimitExceeded,
)
from pydantic_ai.messages import (
    ModelMessage,
    ModelRequest,
    ModelResponse,
    PartEndEvent,
    PartStartEvent,
    TextPart,
)
from pydantic_ai.models import Model
from pydantic_ai.run import AgentRun
from pydantic_ai.settings import ToolChoice, merge_model_settings
from pydantic_ai.tools import ToolDefinition
from pydantic_ai.toolsets import AbstractToolset, ExternalToolset
from pydantic_ai.toolsets.abstract import ToolsetTool
from pydantic_ai.usage import RequestUsage, RunUsage, UsageLimits
from pydantic_core import to_jsonable_python
from pydantic_graph import End
from sqlalchemy.ext.asyncio import AsyncEngine
from typing_extensions import override

from agents import Listed, all_agents
from app.config import Settings
from app.core import metrics
from app.core.json import dump_any
from app.core.security import Caller
from app.core.tasks import unbroken
from app.db.session import reading
from app.deps import Deps
from app.models import Run
from app.schemas.run import ClientTool, Options
from app.services import prices
from app.services.allowances import Amount, LimitReached, Spent, answer_of
from app.services.attempts import ReplyVoid, named, retry_after
from app.services.call_ids import CallIds
from app.services.changes import INSERT_MESSAGE, PROGRESS
from app.services.compaction import Compacted, estimate
from app.services.conversation import dump_message, has_parts, is_reply
from app.services.execution import Job, Outcome, Status
from app.services.histories import Histories
from app.services.journal import Journal
from app.services.json_schema import JsonSchema
from app.services.ledger import Ledger, audit, recorded
from app.services.model import Models
from app.services.run_log import RunRestarted
from app.services.user import UserService
from app.services.watch import instruments
from tools import Declared, all_tools

logger = logging.getLogger(__name__)

ASKS_AGAIN = 3  # times, for an answer that does not fulfil the caller's schema

TOO_LONG = (  # LangChain and LiteLLM know such a failure by these words alone
    "Input tokens exceed the configured limit: the conversation exceeds the context window of the "
    "model; begin another, or leave something out."
)

BETWEEN = "\n\n"  # stands between the texts of an answer that tool calls interrupted


@dataclass(slots=True)
class AgentExecutor:
    """Executes runs of agents. One for the process; each run has a `_Steps` of its own."""

    settings: Settings
    engine: AsyncEngine
    journal: Journal
    models: Models
    http: httpx2.AsyncClient
    users: Callable[[], AbstractAsyncContextManager[UserService]]
    extract: Callable[[Caller, str, str], Awaitable[Any]]
    histories: Histories = field(default_factory=Histories)

    async def __call__(self, job: Job) -> Outcome:
        listed = all_agents()[job.run.program]
        past: Sequence[ModelMessage] = ()
        turn = asyncio.Semaphore(self.settings.run_parallel_tools)
        ledger = Ledger(journal=self.journal, log=job.log, turn=turn)
        if job.run.parent_id or job.run.token > 1:
            async with reading(self.engine).connect() as connection:
                past = await self.histories.before(connection, job.run)
                ledger.known = await recorded(connection, job.run.id)
            await ledger.expire()
        ledger.ids = CallIds.after([*past, *job.messages])
        deps = self.deps(Caller.of(job.run.owner_id, job.run.scopes), job.run.id)
        steps = _Steps(job, listed, ledger, self.journal, self.models.name, job.options.stream)
        return await steps.run(past, deps, self.models, self.settings)

    def deps(self, caller: Caller, run_id: str) -> Deps:
        """What the run's tools may touch on the caller's behalf."""
        return Deps(
            caller=caller,
            users=self.users,
            http=self.http,
            settings=self.settings,
            run_id=run_id,
            extract=partial(self.extract, caller),
        )


@dataclass(slots=True)
class _Steps:
    """One run's steps: asks the model, makes its calls, and commits in between."""

    job: Job
    listed: Listed
    ledger: Ledger
    journal: Journal
    model: str  # the name of the one that is asked
    stream: bool
    unstored: list[ModelMessage] = field(default_factory=list[ModelMessage])
    stored: int = 0  # how many of the run's own messages are committed
    seen: int = sys.maxsize  # how many of the agent's messages are looked at; all before it begins
    usage: RunUsage = field(default_factory=RunUsage)
    noted: RunUsage = field(default_factory=RunUsage)  # what of it the purse knows
    asking: bool = False  # a model request is being answered

    async def run(
        self, past: Sequence[ModelMessage], deps: Deps, models: Models, settings: Settings
    ) -> Outcome:
        job, options, model = self.job, self.job.options, models.model
        self.stored = len(job.messages)
        for at, message in enumerate(job.messages):
            if is_reply(message):
                self.ledger.step = at
                self.usage.incr(message.usage)
                self.usage.requests += 1
        self.noted = copy(self.usage)
        toolsets, output_type = _asked(self.listed, options, model)
        agent = self.listed.agent
        running: AgentRun[Deps, Any] | None = None
        try:
            async with (
                models.admission.turn() as end_turn,
                _shadowed(self.listed, options.tools),
                self.ledger.recording(
                    agent.iter(
                        message_history=[*past, *job.messages],
                        deferred_tool_results=self.ledger.decisions(self._calls_of_client()),
                        model=Compacted(model, settings.context_tokens, end_turn),
                        deps=deps,
                        instructions=options.instructions,
                        model_settings=_settings(self.listed, options, fresh=job.run.token == 1),
                        usage=self.usage,
                        usage_limits=UsageLimits(
                            request_limit=settings.run_requests,
                            tool_calls_limit=min(
                                settings.run_tool_calls,
                                options.max_tool_calls or settings.run_tool_calls,
                            ),
                            total_tokens_limit=settings.run_tokens,
                            cost_limit=self._cost_limit(settings),
                        ),
                        output_type=output_type,
                        retries={"output": ASKS_AGAIN} if options.output is not None else None,
                        toolsets=toolsets,
                        capabilities=instruments(settings),
                        infer_name=False,
                    )
                ) as running,
            ):
                await self._drive(running)
            return self._outcome(running)
        except asyncio.CancelledError:
            return self._stopped(running, "cancelled")
        except UsageLimitExceeded as error:
            return self._stopped(running, "incomplete", finish_reason=_limit(error))
        except LimitReached:  # of the owner's day
            return self._stopped(running, "incomplete", finish_reason="max_budget")
        except IncompleteToolCall:
            return self._stopped(running, "incomplete", finish_reason="length")
        except ContentFilterError:
            return self._stopped(running, "incomplete", finish_reason="content_filter")
        except (AgentRunError, OpenAIError, httpx2.HTTPError) as error:
            logger.warning("run %s: the model failed: %s", job.run.id, named(error))
            return self._stopped(running, "failed", error=_explain(error))
        finally:
            job.usage = self._used()

    def _calls_of_client(self) -> list[str]:
        """The ids of the last reply's calls that the client runs."""
        own = {tool.name for tool in self.job.options.tools}
        replies = [message for message in self.job.messages if is_reply(message)]
        last = replies[-1].tool_calls if replies else ()
        return [call.tool_call_id for call in last if call.tool_name in own]

    async def _drive(self, running: AgentRun[Deps, Any]) -> None:
        node = running.next_node
        while not isinstance(node, End):
            if Agent.is_model_request_node(node):
                if not self.job.purse.ready:
                    history = running.ctx.state.message_history
                    await self.job.purse.hold(self._next([*history, node.request]))
                self.asking = True
                if self.stream:
                    async with node.stream(running.ctx) as events:
                        async for event in events:
                            if isinstance(event, ReplyVoid):
                                event = self._void(running, event.reply)
                            self.journal.append(self.job.log, self.ledger.ids.event(event))
                node = await running.next(node)
                self.asking = False
                self._collect(running)
                if Agent.is_call_tools_node(node):
                    usage = node.model_response.usage
                    name = running.ctx.deps.model.model_name
                    metrics.answered(name, usage.input_tokens, usage.output_tokens)
                    await self._answered(running, node.model_response)
            elif Agent.is_call_tools_node(node):
                async with node.stream(running.ctx) as events:
                    async for event in events:
                        self.journal.append(self.job.log, event)
                node = await running.next(node)
            else:
                node = await running.next(node)
                self.seen = len(running.ctx.state.message_history)
                if Agent.is_model_request_node(node):
                    self.seen += 1  # the prompt, which was stored when the run was accepted

    def _void(self, running: AgentRun[Deps, Any], cut: ModelResponse) -> RunRestarted:
        """What the log says of a reply that broke off, and is made anew. It was not for nothing."""
        self.usage.incr(cut.usage)
        self._count(running.ctx.state.message_history, cut)
        return RunRestarted(replies=sum(map(has_parts, [*self.job.messages, *self.unstored])))

    def _collect(self, running: AgentRun[Deps, Any]) -> None:
        messages = running.ctx.state.message_history
        for message in messages[self.seen :]:
            if isinstance(message, ModelResponse):
                self.ledger.ids.name(message)
            self.unstored.append(message)
        self.seen = len(messages)

    async def _answered(self, running: AgentRun[Deps, Any], response: ModelResponse) -> None:
        """Commits the reply before its calls are made, and with it what the next one may take. One
        without calls is the last, and is committed with the run's end: it has no effect to
        protect.

        Raises LimitReached where the calls would lead to a request that the owner has no allowance
        for: the reply is committed all the same.
        """
        self._count(running.ctx.state.message_history[:-1], response)
        self._spend(response.model_name)
        for call in response.tool_calls:
            if running.ctx.deps.tool_manager.get_tool_def(call.tool_name) is None:
                known = call.tool_name in all_tools()
                audit(self.job.run.id, call.tool_name if known else None, "it was not offered")
        if not self.stream:
            for index, part in enumerate(response.parts):
                self.journal.append(self.job.log, PartStartEvent(index=index, part=part))
                self.journal.append(self.job.log, PartEndEvent(index=index, part=part))
        if not response.tool_calls:
            return
        await unbroken(self._store(running, response))

    async def _store(self, running: AgentRun[Deps, Any], response: ModelResponse) -> None:
        run_id = self.job.run.id
        rows = [
            (PROGRESS, {"of_run": run_id}),
            *(
                (INSERT_MESSAGE, {"run_id": run_id, "seq": seq, "body": dump_message(message)})
                for seq, message in enumerate(self.unstored, self.stored)
            ),
        ]
        refused: LimitReached | None = None
        try:
            if self._goes_on(running, response):
                await self.job.purse.hold(self._next([response]), rows)
            else:
                await self.journal.commit(rows, self.job.log)
        except LimitReached as error:
            await self.journal.commit(rows, self.job.log)
            refused = error
        self.job.messages += self.unstored
        self.stored += len(self.unstored)
        self.unstored = []
        self.ledger.step = self.stored - 1
        self.ledger.ids.done()
        if refused:
            raise refused

    def _goes_on(self, running: AgentRun[Deps, Any], response: ModelResponse) -> bool:
        """Whether the model is told what the calls bring: not of an answer in a call's form, of
        functions of the client's, and of what a person has to agree to."""
        find = running.ctx.deps.tool_manager.get_tool_def
        others = {tool.name for tool in self.job.options.tools}
        names = [call.tool_name for call in response.tool_calls if call.tool_name not in others]
        return any((tool := find(name)) is None or tool.kind == "function" for name in names)

    def _next(self, messages: Sequence[ModelMessage]) -> Amount:
        """What a request with these messages may take; the last reply says what those before it
        did."""
        size = 0
        for message in reversed(messages):
            if isinstance(message, ModelResponse) and message.usage.total_tokens:
                size += message.usage.total_tokens
                break
            size += estimate(message)
        answer = answer_of(self.job.options.settings, self.listed.settings)
        return Amount.of(self.model, size, answer)

    def _cost_limit(self, settings: Settings) -> Decimal | None:
        """None where no cost is known: PydanticAI would warn that it cannot be limited."""
        known = prices.cost(self.model, 0, 0) is not None
        return Decimal(str(settings.run_cost)) if known else None

    def _spend(self, model: str | None = None) -> None:
        """Tells the purse what has been used since it was told last."""
        used = self.usage - self.noted
        if not used.requests and not used.total_tokens:
            return
        spent = Spent(
            requests=used.requests,
            input_tokens=used.input_tokens,
            cached_tokens=used.cache_read_tokens,
            output_tokens=used.output_tokens,
            cost=float(used.cost or 0),
        )
        self.noted = copy(self.usage)
        self.job.purse.spend(model or self.model, spent)

    def _outcome(self, running: AgentRun[Deps, Any]) -> Outcome:
        assert running.result is not None
        self._collect(running)
        output = running.result.output
        last = self._responses()[-1]
        if isinstance(output, DeferredToolRequests):
            if calls := output.approvals:
                rows = self.ledger.asked(calls)
                keys = [row["key"] for _, row in rows]
                return self._end("waiting", rows=rows, asks=calls, keys=keys)
            return self._end("completed", finish_reason="tool_call")
        if isinstance(output, str):
            reason = last.finish_reason or "stop"
            if reason in ("length", "content_filter"):
                return self._end("incomplete", finish_reason=reason)
            return self._end("completed", finish_reason="stop")
        value = to_jsonable_python(output)
        return self._end("completed", finish_reason="stop", output=value)

    def _stopped(
        self,
        running: AgentRun[Deps, Any] | None,
        status: Status,
        *,
        finish_reason: str | None = None,
        error: dict[str, Any] | None = None,
    ) -> Outcome:
        """The end of a run that did not come to its own: what was said up to there is kept."""
        if running:
            self._collect(running)
            self._estimate(running.ctx.state.message_history, status == "cancelled")
        return self._end(status, finish_reason=finish_reason, error=error)

    def _estimate(self, messages: Sequence[ModelMessage], is_cancelled: bool) -> None:
        """Counts a reply that was cut off before its provider told what it had cost, and a request
        that nobody waits for any more."""
        match messages:
            case [*before, ModelResponse(state="interrupted") as cut] if not cut.usage.total_tokens:
                self._count(before, cut)
            case [*_, ModelRequest()] if self.asking and is_cancelled:
                self._count(messages, ModelResponse([]))
            case _:
                pass

    def _count(self, before: Sequence[ModelMessage], reply: ModelResponse) -> None:
        """Adds what a reply does not say: its tokens, by estimate, and what they cost."""
        said, more = reply.usage, RequestUsage()
        if not said.total_tokens:
            more.input_tokens = sum(map(estimate, before))
            more.output_tokens = estimate(reply)
        if not said.cost:
            sent = said.input_tokens + more.input_tokens
            received = said.output_tokens + more.output_tokens
            cost = prices.cost(reply.model_name or self.model, sent, received)
            more.cost = None if cost is None else Decimal(str(cost))
        said.incr(more)
        self.usage.incr(more)

    def _end(self, status: Status, **more: Any) -> Outcome:
        output = more.get("output")
        if output is None:
            texts = [
                part.content
                for response in self._responses()
                for part in response.parts
                if isinstance(part, TextPart) and part.content
            ]
            text = BETWEEN.join(texts)
        else:
            text = dump_any(output)
        self._spend()
        return Outcome(status, text=text, usage=self._used(), messages=self.unstored, **more)

    def _used(self) -> dict[str, int]:
        return {
            "requests": self.usage.requests,
            "input_tokens": self.usage.input_tokens,
            "cached_tokens": self.usage.cache_read_tokens,
            "output_tokens": self.usage.output_tokens,
            "tool_calls": self.usage.tool_calls,
        }

    def _responses(self) -> list[ModelResponse]:
        messages = [*self.job.messages, *self.unstored]
        first = next(  # what was taken as text from elsewhere is not this run's answer
            (at for at, message in enumerate(messages) if is_reply(message)), len(messages)
        )
        return [message for message in messages[first:] if isinstance(message, ModelResponse)]


def answers_in_text(run: Run) -> bool:
    """Whether the run's text is its answer; else the answer is a value, known at the end."""
    options = Options.model_validate_json(run.options)
    listed = all_agents().get(run.program)  # None: its file is gone, the run is still there
    return options.output is None and (listed is None or listed.agent.output_type is str)


def _settings(listed: Listed, options: Options, *, fresh: bool) -> Any:
    """The agent's settings below the run's. A tool is forced at most for the first request:
    a model that must call one each time would never answer."""
    settings = merge_model_settings(listed.settings, cast(ModelSettings, options.settings))
    choice = cast(ToolChoice, options.tool_choice)
    if choice is None:
        return settings
    forced = merge_model_settings(settings, ModelSettings(tool_choice=choice))
    if choice == "none":
        return forced

    def first(ctx: RunContext[Deps]) -> ModelSettings | None:
        return forced if fresh and ctx.run_step == 1 else settings

    return first


def _asked(
    listed: Listed, options: Options, model: Model
) -> tuple[list[AbstractToolset[Deps]] | None, Any]:
    """The toolsets and the output type that the run asks for beyond the agent's own."""
    agent = listed.agent
    output = _answer(options, model) if options.output is not None else None
    asks = any(item.requires_approval for item in listed.tools.values())
    if options.tools or asks:
        output = [agent.output_type if output is None else output, DeferredToolRequests]
    if not options.tools:
        return None, output
    definitions = [
        ToolDefinition(
            name=item.name,
            description=item.description,
            parameters_json_schema=item.parameters or {"type": "object", "properties": {}},
            strict=item.strict,
            metadata={"declared": Declared("read")},  # whatever it does, it does not do it here
        )
        for item in options.tools
    ]
    return [ClientTools(definitions)], output


class ClientTools(ExternalToolset[Deps]):
    """The client's own functions: a call of one ends the run, once all else is done.

    PydanticAI knows such tools as `external`, but wants their results with the first decision on
    another call of the same reply. As functions that defer their calls they wait for theirs.
    """

    @override
    async def get_tools(self, ctx: RunContext[Deps]) -> dict[str, ToolsetTool[Deps]]:
        return {
            name: replace(tool, tool_def=replace(tool.tool_def, kind="function"))
            for name, tool in (await super().get_tools(ctx)).items()
        }

    @override
    async def call_tool(
        self, name: str, tool_args: dict[str, Any], ctx: RunContext[Deps], tool: ToolsetTool[Deps]
    ) -> Any:
        raise CallDeferred


@asynccontextmanager
async def _shadowed(listed: Listed, tools: Sequence[ClientTool]) -> AsyncGenerator[None]:
    """Where a function of the caller's has the name of a tool of the agent's, it takes its place:
    nothing is run here that the caller means to run."""
    own = {tool.name for tool in tools}
    if own.isdisjoint(listed.tools):
        yield
        return
    with listed.agent.override(
        tools=[tool for name, tool in listed.tools.items() if name not in own]
    ):
        yield


def _answer(options: Options, model: Model) -> Any:
    """An output type for the caller's schema: the model is held to it, and asked again."""
    assert options.output is not None
    schema = JsonSchema(options.output)
    shape = StructuredDict(options.output, name=options.output_name)

    def answer(value: Any) -> Any:
        if faults := schema.faults(value):
            raise ModelRetry("\n".join(str(fault) for fault in faults))
        return value

    answer.__annotations__ = {"value": shape, "return": dict[str, Any]}
    answer.__name__ = options.output_name
    if model.profile.get("supports_json_schema_output"):
        return NativeOutput(answer, name=options.output_name)
    return ToolOutput(answer, name=options.output_name)


def _limit(error: UsageLimitExceeded) -> str:
    """Which of the run's limits was reached, in one word."""
    text = str(error)
    if "tool_calls_limit" in text:
        return "max_tool_calls"
    if "cost_limit" in text:
        return "max_cost"
    return "max_requests" if "request_limit" in text else "max_tokens"


def _explain(error: Exception) -> dict[str, Any]:
    """What a client may know of a model's failure: never the provider's words."""
    if isinstance(error, ModelHTTPError):
        status = error.status_code
        if status == 429:
            busy = _error("rate_limit_exceeded", "The model is overloaded; try again later.")
            return busy | _told(error)
        if status in (401, 403):
            return _error("upstream_auth", "The model refused this server's credential.")
        if status == 400 and "context_length" in str(error.body):
            return _error("context_length_exceeded", TOO_LONG)
        if status < 500:
            return _error("upstream_error", "The model refused the request.")
    if isinstance(error, UnexpectedModelBehavior):
        return _error("model_error", "The model's answers could not be used; try again.")
    away = _error("model_unavailable", "The model did not answer; try again.")
    return away | _told(error)


def _told(error: Exception) -> dict[str, int]:
    """In how many seconds to try again, where that is known; at most a minute."""
    seconds = min(math.ceil(retry_after(error) or 0), 60)
    return {"retry_after": seconds} if seconds else {}


def _error(code: str, message: str) -> dict[str, Any]:
    return {"code": code, "message": message}

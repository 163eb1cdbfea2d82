"""One question, asked until its answer is valid: Instructor asks again, the target judges.

Instructor is given our own way to call the model, so that what it leaves open is decided here:
transport faults are repeated with the same messages, a cut or refused answer goes to the next
model, limits hold before each call, and an answer can be watched while it grows.
"""

import asyncio
import json
import logging
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, Literal

from openai import APIConnectionError, APITimeoutError, AsyncStream
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic_ai.exceptions import UnexpectedModelBehavior
from pydantic_ai.messages import (
    AgentStreamEvent,
    ModelResponsePart,
    PartDeltaEvent,
    PartStartEvent,
    TextPart,
    TextPartDelta,
    ToolCallPart,
    ToolCallPartDelta,
)

from app.core import metrics
from app.core.errors import TooMany
from app.core.json import whole
from app.schemas.extraction import Attempt, AttemptError, ExtractionOptions, Usage
from app.services import prices
from app.services.allowances import ANSWER, Amount, LimitReached, Spent
from app.services.answers import Answer, Target, Unfit
from app.services.attempts import FAILURES, ModelResting, named, passes, retry_after, status_of
from app.services.compaction import BYTES, IMAGE
from app.services.extraction_log import AttemptFailed
from app.services.json_schema import Fault, Json
from app.services.watch import asking

if TYPE_CHECKING:
    from tenacity import RetryCallState

    from app.services.model import Models
    from app.services.purse import Purse

logger = logging.getLogger(__name__)

PATH = "/chat/completions"
# A model that is cut off so was at work, and is paid for it.
CUT = (asyncio.CancelledError, TimeoutError, APITimeoutError, UnexpectedModelBehavior)
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between transport retries, doubled each time
PATIENT = 1000  # transport retries while a model says "later" to a job, within its deadline

Mode = Literal["tools", "json", "json_schema", "strict"]
"""How the model is asked for JSON: by calling a function, by a schema in the prompt, by its
server's structured outputs, or by these in OpenAI's strict subset."""
MODES = {"tools": "TOOLS", "json": "JSON", "json_schema": "JSON_SCHEMA", "strict": "JSON_SCHEMA"}
Hear = Callable[[AgentStreamEvent], None]
"""Is told what happens, to write it into the run's log."""


class ExtractionFailed(Exception):
    """The end of an extraction, in words for its caller; never the provider's.

    `attempts` and `transport_retries` are of the whole extraction. `pointer` is where it failed.
    """

    def __init__(
        self, code: str, message: str, *, retryable: bool = False, pointer: str | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retryable = retryable
        self.pointer = pointer
        self.attempts: Sequence[Attempt] = ()
        self.transport_retries = 0


class NextModel(ExtractionFailed):
    """Another model may do better."""


@dataclass(slots=True)
class Spending:
    """What an extraction has cost by now, over all that is asked in its name.

    purse: of the run in whose name that is.
    """

    budget: int  # tokens
    max_cost: float  # US dollars, as far as prices are known
    until: float = math.inf  # by the event loop's clock
    purse: "Purse | None" = None
    attempts: list[Attempt] = field(default_factory=list[Attempt])
    transport_retries: int = 0

    @property
    def usage(self) -> Usage:
        return usage_of(self.attempts)

    @property
    def cost(self) -> float:
        return sum(_spent(attempt.model, attempt.usage).cost for attempt in self.attempts)


def usage_of(attempts: Sequence[Attempt]) -> Usage:
    sent = sum(attempt.usage.prompt_tokens for attempt in attempts)
    received = sum(attempt.usage.completion_tokens for attempt in attempts)
    return Usage(prompt_tokens=sent, completion_tokens=received, total_tokens=sent + received)


@dataclass(slots=True)
class Asking:
    """One question: what is asked, and each answer with what it lacked.

    check: looks at a valid answer more closely, and raises Unfit where it is to be asked again.
    chunk: which part of a longer text this is; None for the whole.
    throttled: is told of each 429, with the seconds to wait that came with it.
    """

    models: "Models"
    mode: Mode
    target: Target
    options: ExtractionOptions
    spending: Spending
    check: Callable[[Answer], None]
    hear: Hear
    chunk: int | None = None
    stream: bool = False
    throttled: Callable[[float | None], None] | None = None
    asked: int = 0  # answers to this question, among them those of a process that died
    _place: int = 0  # of the newest answer among all attempts
    _answered: bool = False  # whether there is one
    _said: dict[str, str] = field(default_factory=dict[str, str])  # of the one that is streamed

    async def ask(self, names: Sequence[str], messages: list[Any]) -> Answer:
        """The first answer that passes, from the first model that gives one.

        Raises ExtractionFailed.
        """
        failure = ExtractionFailed("extraction_invalid", "No attempt was left.")
        for name in names:
            try:
                return await self._ask(name, messages)
            except NextModel as error:
                failure = error
                if self.asked >= self.options.max_attempts:
                    break
        raise failure

    async def _ask(self, name: str, messages: list[Any]) -> Answer:
        from instructor.core.exceptions import InstructorRetryException

        _asking.set(self)
        try:
            answer: Any = await _instructor(self.mode)(
                model=name,
                response_model=_answer_model(self.target),
                messages=messages,
                max_retries=max(self.options.max_attempts - self.asked - 1, 0),
                temperature=self.options.temperature,
            )
        except InstructorRetryException as error:
            raise self._failure(error.__cause__ or error) from error
        self.accept()
        return answer.value

    @property
    def newest(self) -> Attempt:
        return self.spending.attempts[self._place]

    def accept(self) -> None:
        """The newest answer is good enough."""
        self.newest.ok = True

    def read(self, text: str) -> Answer:
        """The answer in the model's JSON. Raises Unfit."""
        answer = self.target.read(text)
        self.check(answer)
        return answer

    def _silent(self) -> None:
        """Instructor asks again for what it could not even read, and says nothing of it."""
        if not self.newest.errors:
            words = "there is no answer in the structure that was asked for"
            self.refuse(Fault("", "invalid_json", words))

    def refuse(self, *faults: Fault) -> None:
        """Notes what is wrong with the newest answer."""
        attempt = self.newest
        attempt.errors = [
            AttemptError(
                pointer=fault.pointer,
                keyword=fault.keyword,
                code=fault.keyword,
                message=fault.message,
            )
            for fault in faults
        ]
        self.hear(
            AttemptFailed(
                chunk=self.chunk or 0, attempt=self.asked, body=attempt.model_dump(mode="json")
            )
        )

    def _failure(self, cause: BaseException) -> Exception:
        """What ended the asking: a limit, the answers, or a bug of ours."""
        from instructor.core.exceptions import ResponseParsingError

        if isinstance(cause, ExtractionFailed):
            return cause
        if isinstance(cause, ResponseParsingError):
            self._silent()
            return ExtractionFailed(
                "extraction_invalid",
                f"No valid answer in {self.asked} attempts; their errors say why.",
                pointer=self.newest.errors[0].pointer,
            )
        return cause if isinstance(cause, Exception) else RuntimeError(type(cause).__name__)

    async def complete(self, **request: Any) -> ChatCompletion:
        """One answer of the model's, as Instructor takes it."""
        if self._answered:
            self._silent()
        if self.asked >= self.options.max_attempts:
            raise ExtractionFailed("extraction_invalid", "No attempt was left.")
        if self.spending.usage.total_tokens >= self.spending.budget:
            raise ExtractionFailed(
                "budget_exceeded",
                f"The token budget of {self.spending.budget} was spent before there was a valid "
                "answer; raise options.token_budget, or shorten the text.",
            )
        if self.spending.cost >= self.spending.max_cost:
            raise ExtractionFailed(
                "budget_exceeded",
                f"The {self.spending.max_cost:g} US dollars that one extraction may take here "
                "(RUN_COST) were spent before there was a valid answer; shorten the text.",
            )
        completion = await self._paid(request)
        choice = completion.choices[0]
        if choice.finish_reason == "length":
            fault = Fault("", "output_truncated", "the answer was cut off at the model's limit")
            self.refuse(fault)
            raise NextModel("output_truncated", "The model's answer was cut off at its limit.")
        if choice.message.refusal or choice.finish_reason == "content_filter":
            self.refuse(Fault("", "model_refused", "the model refused to answer"))
            raise NextModel("model_refused", "The model refused to answer.")
        return completion

    async def _paid(self, request: Json) -> ChatCompletion:
        """The model's answer, noted, and taken out of the purse. Raises ExtractionFailed."""
        purse, name = self.spending.purse, str(request["model"])
        if purse is None:
            completion = await self._transport(request)
            self._note(completion, request)
            return completion
        try:
            async with purse.request(lambda: Amount.of(name, _size(request), ANSWER)):
                completion = await self._transport(request)
                purse.spend(name, _spent(name, self._note(completion, request)))
                return completion
        except LimitReached as error:
            retryable = error.status == TooMany.status
            raise ExtractionFailed(error.error_code, error.message, retryable=retryable) from error

    def _note(self, completion: ChatCompletion, request: Json) -> Usage:
        """What the answer took; an estimate where the model's server does not say."""
        self.asked += 1
        usage = completion.usage  # read now: Instructor adds up in its place
        sent = int((usage and usage.prompt_tokens) or 0)
        received = int((usage and usage.completion_tokens) or 0)
        if not sent and not received:
            sent, received = _size(request), len((_said(completion) or "").encode()) // BYTES
        took = Usage(prompt_tokens=sent, completion_tokens=received, total_tokens=sent + received)
        metrics.answered(str(request["model"]), sent, received)
        self.spending.attempts.append(
            Attempt(
                model=str(request["model"]),
                ok=False,
                usage=took,
                raw=_said(completion),
                chunk=self.chunk,
            )
        )
        self._place, self._answered = len(self.spending.attempts) - 1, True
        return took

    async def _transport(self, request: Json) -> ChatCompletion:
        """The model's answer, faults of the way to it mended. Raises ExtractionFailed."""
        from tenacity import AsyncRetrying, retry_if_exception

        def stop(state: "RetryCallState") -> bool:
            error = state.outcome and state.outcome.exception()
            now = asyncio.get_running_loop().time()
            if now + (retry_after(error) or 0) > self.spending.until:
                return True  # another model may be faster
            later = self.throttled is not None and _is_busy(error)
            return state.attempt_number > (PATIENT if later else self.options.max_transport_retries)

        def note(state: "RetryCallState") -> None:
            self.spending.transport_retries += 1

        retrying = AsyncRetrying(
            stop=stop,
            wait=_pause,
            retry=retry_if_exception(self._passes),
            before_sleep=note,
            reraise=True,
        )
        try:
            return await retrying(asking(self._call), request)
        except FAILURES as error:
            logger.warning("an extraction's model failed: %s", named(error))
            failure = _explain(error)
            wait = retry_after(error) or 0
            if asyncio.get_running_loop().time() + wait > self.spending.until:
                failure = NextModel(
                    "deadline",
                    f"The model wants to be left alone for {wait:g} seconds, beyond the deadline.",
                    retryable=True,
                )
            raise failure from error

    def _passes(self, error: BaseException) -> bool:
        """Whether the same request may fare better in a moment. Who can wait, waits for a model
        that is left alone; another model is faster for others."""
        if self.throttled and _is_busy(error):
            self.throttled(retry_after(error))
            return True
        return passes(error) and not isinstance(error, ModelResting)

    async def _call(self, request: Json) -> ChatCompletion:
        name = str(request["model"])
        self._said = dict.fromkeys(("content", "arguments", "refusal"), "")
        try:
            with self.models.breaker(name).watching():
                async with asyncio.timeout(self.models.settings.reply_timeout.total_seconds()):
                    return await self._answer(request)
        except BaseException as error:
            said = "".join(self._said.values())
            if self.spending.purse and (said or isinstance(error, CUT)):
                took = Usage(
                    prompt_tokens=_size(request), completion_tokens=len(said.encode()) // BYTES
                )
                self.spending.purse.spend(name, _spent(name, took))
            raise

    async def _answer(self, request: Json) -> ChatCompletion:
        if self.mode == "strict":
            request["response_format"]["json_schema"]["strict"] = True
        # As `chat.completions.create` does, without turning over each part of a request that is
        # JSON already, which costs as much as the rest of the call.
        post: Any = self.models.client.post
        if self.stream:
            body = {**request, "stream": True, "stream_options": {"include_usage": True}}
            chunks = await post(
                PATH,
                cast_to=ChatCompletion,
                body=body,
                stream=True,
                stream_cls=AsyncStream[ChatCompletionChunk],
            )
            async with aclosing(aiter(chunks)) as following:
                return await self._gather(following)
        completion: ChatCompletion = await post(PATH, cast_to=ChatCompletion, body=request)
        choices = getattr(completion, "choices", None)
        message = choices and getattr(choices[0], "message", None)
        calls = getattr(message, "tool_calls", None) or ()
        if not message or not all(getattr(call, "function", None) for call in calls):
            raise UnexpectedModelBehavior("There is no message.")
        return completion

    async def _gather(self, chunks: AsyncIterator[Any]) -> ChatCompletion:
        """A streamed answer, told as it comes."""
        said = self._said
        call: dict[str, str] = {}
        usage: Any = None
        finish: str | None = None
        async for chunk in chunks:
            usage = getattr(chunk, "usage", None) or usage
            choices: Any = getattr(chunk, "choices", None) or ()
            for choice in choices[:1]:  # servers leave out what they have nothing to say of
                finish = choice.finish_reason or finish
                delta: Any = choice.delta
                if delta is None:
                    continue
                said["refusal"] += delta.refusal or ""
                if delta.content:
                    self._tell("content", delta.content)
                parts: Any = delta.tool_calls or ()
                for part in parts[:1]:
                    call.setdefault("id", part.id or "call")
                    if not part.index and part.function:
                        call.setdefault("name", part.function.name or "")
                        self._tell("arguments", part.function.arguments or "")
        if finish is None:
            raise UnexpectedModelBehavior("The stream was cut.")
        message: Json = {"role": "assistant", "content": said["content"] or None}
        message["refusal"] = said["refusal"] or None
        if call:
            function = {"name": call.get("name", ""), "arguments": said["arguments"]}
            message["tool_calls"] = [{"id": call["id"], "type": "function", "function": function}]
        choice_: Json = {"index": 0, "finish_reason": finish, "message": message}
        whole_: Json = {"id": "streamed", "object": "chat.completion", "created": 0, "model": ""}
        whole_ |= {"choices": [choice_], "usage": usage and usage.model_dump(warnings=False)}
        return ChatCompletion.construct(**whole_)

    def _tell(self, kind: str, text: str) -> None:
        index, begun = self.chunk or 0, bool(self._said[kind])
        self._said[kind] += text
        if kind == "arguments":
            part: ModelResponsePart = ToolCallPart("answer", text, tool_call_id="answer")
            delta: Any = ToolCallPartDelta(args_delta=text, tool_call_id="answer")
        else:
            part, delta = TextPart(text), TextPartDelta(text)
        if begun:
            self.hear(PartDeltaEvent(index=index, delta=delta))
        elif text:
            self.hear(PartStartEvent(index=index, part=part))


_asking: ContextVar[Asking] = ContextVar("asking")


@cache
def _instructor(mode: Mode) -> Callable[..., Awaitable[Any]]:
    """Instructor, asking through whoever asks just now."""
    import instructor

    for name in ("instructor", "instructor.v2.retry"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # they log what the model said

    async def complete(**request: Any) -> ChatCompletion:
        return await _asking.get().complete(**request)

    create: Any = instructor.patch(create=complete, mode=instructor.Mode[MODES[mode]])
    return create


def _is_busy(error: BaseException | None) -> bool:
    return status_of(error) == 429 or isinstance(error, ModelResting)


def _size(request: Json) -> int:
    """About how many tokens are sent: of each picture a flat number."""
    texts: list[str] = [json.dumps(request.get("tools", ""))]
    images = 0
    for message in request["messages"]:
        content = message.get("content") or ""
        if isinstance(content, str):
            texts.append(content)
        else:
            images += len(content)
    return images * IMAGE + sum(len(text.encode()) for text in texts) // BYTES


def _spent(model: str, usage: Usage) -> Spent:
    sent, received = usage.prompt_tokens, usage.completion_tokens
    cost = prices.cost(model, sent, received) or 0.0
    return Spent(requests=1, input_tokens=sent, output_tokens=received, cost=cost)


def _said(completion: ChatCompletion) -> str | None:
    """The answer's text as it came, wherever the model put it."""
    message = completion.choices[0].message
    calls = message.tool_calls or []
    called: Any = getattr(calls[0], "function", None) if calls else None
    arguments = called and called.arguments
    said = arguments or message.content or message.refusal
    return None if said is None else whole(str(said))


@lru_cache(32)  # Instructor keeps what it makes of a class, and making one takes a millisecond
def _answer_model(target: Target) -> type[Any]:
    """What Instructor takes for a Pydantic model: it is shown as the target, and judged by it."""
    from instructor import OpenAISchema
    from instructor.core.exceptions import ResponseParsingError

    class Given(OpenAISchema):
        value: Any

        @classmethod
        def model_json_schema(cls, *args: Any, **kwargs: Any) -> Json:
            return target.shown

        @classmethod
        def model_validate_json(cls, json_data: str | bytes | bytearray, **kwargs: Any) -> "Given":
            asking = _asking.get()
            try:
                return cls.model_construct(value=asking.read(str(json_data)))
            except Unfit as unfit:
                asking.refuse(*unfit.faults)
                raise ResponseParsingError(str(unfit)) from unfit

    return Given


def _pause(state: "RetryCallState") -> float:
    """Seconds before the next try: doubled each time, with jitter, and never less than told."""
    told = retry_after(state.outcome.exception() if state.outcome else None)
    longest = min(FIRST_PAUSE * 2 ** min(state.attempt_number - 1, 10), LONGEST_PAUSE)
    return max(told or 0, longest * random.uniform(0.5, 1))


def _explain(error: Exception) -> ExtractionFailed:
    """A failed model request in words of ours."""
    status = status_of(error)
    if status in (401, 403):
        return NextModel("upstream_auth", "The model refused this server's credential.")
    if status is not None and status < 500 and status not in (408, 409, 429):
        return NextModel(
            "upstream_unavailable", f"The model's server refused the request (status {status})."
        )
    message = "The model did not answer; try again."
    if status == 429:
        message = "The model is overloaded; try again later."
    elif isinstance(error, APIConnectionError):
        message = "The model could not be reached; try again."
    return NextModel("upstream_unavailable", message, retryable=True)

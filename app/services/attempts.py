"""How often and how long a model is asked: the one place that asks again.

The SDK repeats nothing. What failed for the moment is asked again after a pause, then of the next
model; a model that fails again and again is left alone for a while. A reply that broke off is
asked for anew, and what was told of it is void once there is another.
"""

import asyncio
import json
import logging
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    aclosing,
    asynccontextmanager,
    closing,
    contextmanager,
)
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from types import TracebackType
from typing import Any, Literal, NoReturn, cast

import httpx2
from openai import APIError, APIStatusError, OpenAIError
from pydantic_ai import CustomEvent
from pydantic_ai.exceptions import (
    AgentRunError,
    ModelAPIError,
    ModelHTTPError,
    UnexpectedModelBehavior,
)
from pydantic_ai.messages import ModelMessage, ModelResponse, ModelResponseStreamEvent
from pydantic_ai.models import Model, ModelRequestParameters, StreamedResponse
from pydantic_ai.models.wrapper import WrapperModel
from pydantic_ai.profiles import ModelProfile
from pydantic_ai.settings import ModelSettings
from pydantic_ai.tools import RunContext
from pydantic_ai.usage import RequestUsage
from typing_extensions import override

from app.config import Settings
from app.core import metrics

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds before another attempt, doubled each time
PATIENCE = 60.0  # seconds that a model's server may ask to wait, and be asked again
TRIAL = 1.0  # seconds until one asks again whether a model that is being tried is back

FAULTY = (400, 413, 422)  # a request that no other model would take either
BUSY = (409, 429)  # answers of a server that is well

FAILURES = (
    *(AgentRunError, OpenAIError, httpx2.HTTPError, TimeoutError),
    *(json.JSONDecodeError, UnicodeDecodeError),
)
"""All that a request to a model may fail with."""


class ModelResting(ModelAPIError):
    """The model failed so often that it is left alone, for so many seconds more."""

    def __init__(self, name: str, seconds: float) -> None:
        super().__init__(name, f"{name} is not asked for {seconds:.1f} seconds.")
        self.seconds = seconds


class TooSlow(ModelAPIError):
    """Nothing, or nothing more, was heard of a reply in the time that it had."""


@dataclass(slots=True)
class Breaker:
    """Leaves a model alone once it failed `most` times in a row, for `pause` seconds; then one
    request tries it."""

    name: str
    most: int
    pause: float
    failures: int = 0  # in a row
    opened: int = 0  # times, since this process began
    _until: float = 0.0
    _trying: bool = False

    @property
    def state(self) -> Literal["closed", "open", "half-open"]:
        if self.failures < self.most:
            return "closed"
        return "open" if time.monotonic() < self._until else "half-open"

    @contextmanager
    def watching(self) -> Generator[None]:
        """One request, whose end counts unless somebody stopped it.

        Raises ModelResting where there is to be none now.
        """
        tries = self.state != "closed"
        if tries:
            left = self._until - time.monotonic()
            if left > 0 or self._trying:
                raise ModelResting(self.name, max(left, TRIAL))
            self._trying = True
        try:
            yield
            self._failed(0)
        except Exception as error:
            self._count(error, tries=tries)
            raise
        finally:
            if tries:
                self._trying = False

    def _count(self, error: Exception, *, tries: bool) -> None:
        if not passes(error) or status_of(error) in BUSY:
            self._failed(0)
            return
        self._failed(self.failures + 1)
        if self.failures == self.most or (tries and self.failures > self.most):
            self.opened += 1
            self._until = time.monotonic() + self.pause
            logger.warning("%s failed %d times in a row", self.name, self.failures)

    def spoke(self) -> None:
        """There is a first token: whoever waits for a trial need not wait for its end."""
        if self._trying:
            self._failed(0)
            self._trying = False

    def _failed(self, times: int) -> None:
        changes = (times >= self.most) - (self.failures >= self.most)
        self.failures = times
        if changes:
            metrics.breakers.add(self.name, by=changes)


def status_of(error: BaseException | None) -> int | None:
    return error.status_code if isinstance(error, (APIStatusError, ModelHTTPError)) else None


def named(error: BaseException) -> str:
    """What the log says of it: never the provider's words."""
    status = status_of(error)
    return type(error).__name__ + (f" ({status})" if status else "")


def passes(error: BaseException) -> bool:
    """Whether the same request may fare better in a moment."""
    if (status := status_of(error)) is not None:
        told = _headers(error).get("x-should-retry")
        return told == "true" or (told != "false" and (status in (408, *BUSY) or status >= 500))
    if isinstance(error, APIError):  # among them one that ends a stream
        return error.type != "invalid_request_error"
    if isinstance(error, AgentRunError):
        return isinstance(error, ModelAPIError) or type(error) is UnexpectedModelBehavior
    return isinstance(error, FAILURES)


def _headers(error: BaseException | None) -> Mapping[str, str]:
    if isinstance(error, ModelHTTPError):
        return error.headers or {}
    return error.response.headers if isinstance(error, APIStatusError) else {}


def retry_after(error: BaseException | None) -> float | None:
    """Seconds to wait, where the model's server named them or a date."""
    if isinstance(error, ModelResting):
        return error.seconds
    said = _headers(error).get("retry-after", "")
    try:
        seconds = float(said)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return None
    return min(seconds, 3600) if seconds > 0 else None


def _wait(error: Exception) -> float | None:
    """Seconds to wait here and now: some servers name them more exactly beside."""
    exact = _headers(error).get("retry-after-ms", "")
    return int(exact) / 1000 if exact.isdecimal() else retry_after(error)


class Watch:
    """Ends the wait for a reply of which nothing was heard in time.

    `with watch:` stands around each wait. There is one timer for all of them, and hearing
    something only moves a number.
    """

    def __init__(self, name: str, first: float, silence: float, until: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._name = name
        self._silence = silence
        self._until = until
        self._due = min(self._loop.time() + first, until)
        self._timer = self._loop.call_at(self._due, self._look)
        self._task: asyncio.Task[Any] | None = None
        self._before = 0  # how often somebody else has cancelled the task
        self._late = False

    def heard(self) -> None:
        self._due = min(self._loop.time() + self._silence, self._until)
        if self._due < self._timer.when():  # once: from then on the timer comes first
            self._arm(self._due)

    def _arm(self, at: float) -> None:
        self._timer.cancel()
        self._timer = self._loop.call_at(at, self._look)

    def close(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        if self._task is None or now < self._due:
            # Who does not wait for the reply just now is not kept waiting by it.
            self._arm(max(self._due, now + 0.1))
        else:
            self._late = True
            self._task.cancel()

    def __enter__(self) -> None:
        self._task = asyncio.current_task()
        assert self._task
        self._before = self._task.cancelling()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        task, self._task = self._task, None
        ours = self._late and task and task.uncancel() <= self._before
        if ours and (kind is None or issubclass(kind, asyncio.CancelledError)):
            raise TooSlow(self._name, "The model was silent for too long.") from error


@dataclass(slots=True)
class Attempts:
    """Whom to ask for one reply: each model in turn, several times, until the time is over."""

    models: Sequence[tuple[Model, Breaker]]
    settings: Settings
    until: float  # by the event loop's clock
    at: int = 0
    made: int = 0  # with this model
    first: Exception | None = None  # the failure that is told: whoever stood in came later

    @property
    def model(self) -> Model:
        return self.models[self.at][0]

    @property
    def breaker(self) -> Breaker:
        return self.models[self.at][1]

    async def after(self, error: Exception) -> None:
        """Returns when it is time for another attempt, or raises what there is to be told."""
        logger.warning("%s failed: %s", self.breaker.name, named(error))
        status, told = status_of(error), _wait(error)
        may_pass = passes(error)
        if self.first is None:
            self.first = error
            if status is None and not may_pass:
                raise error
        self.made += 1
        last = self.at == len(self.models) - 1
        if (
            may_pass
            and not isinstance(error, ModelResting)
            and self.made <= self.settings.model_retries
            and (told or 0) <= (PATIENCE if last else LONGEST_PAUSE)
        ):
            longest = min(FIRST_PAUSE * 2 ** (self.made - 1), LONGEST_PAUSE)
            pause = max(told or 0, random.uniform(0, longest))
        elif last or status in FAULTY:
            self._give_up()
        else:
            self.at, self.made, pause = self.at + 1, 0, 0.0
        if asyncio.get_running_loop().time() + pause >= self.until:
            self._give_up()
        await asyncio.sleep(pause)

    def _give_up(self) -> NoReturn:
        assert self.first
        if isinstance(self.first, AgentRunError):
            raise self.first
        raise ModelAPIError(self.models[0][1].name, "The model failed.") from self.first


@dataclass(kw_only=True)
class ReplyVoid(CustomEvent, name="reply.void", ui=False):
    """The reply broke off after this much of it; what follows is another one. Never stored."""

    reply: ModelResponse


class PatientModel(WrapperModel):
    """The models that may be asked, in order, as one: the first unless it fails."""

    def __init__(self, models: Sequence[tuple[Model, Breaker]], settings: Settings) -> None:
        super().__init__(models[0][0])
        self._models = models
        self._given = settings

    @property
    @override
    def profile(self) -> ModelProfile:
        """The first model's, without what another could not do."""
        profile, native = self.wrapped.profile, "supports_json_schema_output"
        if all(model.profile.get(native) for model, _ in self._models):
            return profile
        return cast(ModelProfile, {**profile, native: False})

    def _attempts(self) -> Attempts:
        whole = self._given.reply_timeout.total_seconds()
        return Attempts(self._models, self._given, asyncio.get_running_loop().time() + whole)

    @override
    async def request(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
    ) -> ModelResponse:
        attempts = self._attempts()
        while True:
            model = attempts.model
            prepared = model.prepare_messages(messages, model_request_parameters)
            settings = _spelled(model_settings, model)
            try:
                with attempts.breaker.watching():
                    async with asyncio.timeout_at(attempts.until):
                        return await model.request(prepared, settings, model_request_parameters)
            except Exception as error:
                await attempts.after(error)

    @override
    @asynccontextmanager
    async def request_stream(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
        run_context: RunContext[Any] | None = None,
    ) -> AsyncGenerator[StreamedResponse]:
        def ask(model: Model) -> AbstractAsyncContextManager[StreamedResponse]:
            prepared = model.prepare_messages(messages, model_request_parameters)
            settings = _spelled(model_settings, model)
            return model.request_stream(prepared, settings, model_request_parameters, run_context)

        reply = Reply(model_request_parameters, self._attempts(), ask)
        async with aclosing(reply.events):
            yield reply


def _spelled(settings: ModelSettings | None, model: Model) -> ModelSettings | None:
    """Settings as the model takes them: PydanticAI knows `verbosity` of Responses alone."""
    wish = (settings or {}).get("openai_text_verbosity")
    if wish is not None:
        from pydantic_ai.models.openai import OpenAIResponsesModel  # as late as the model itself

        if not isinstance(model, OpenAIResponsesModel):
            return cast(ModelSettings, {**(settings or {}), "extra_body": {"verbosity": wish}})
    return settings


@dataclass
class Reply(StreamedResponse):
    """A streamed reply that is begun again where it breaks off. It is opened when it is read."""

    attempts: Attempts
    ask: Callable[[Model], AbstractAsyncContextManager[StreamedResponse]]
    _heard: StreamedResponse | None = field(default=None, init=False)  # the last that spoke

    @cached_property
    def events(self) -> AsyncGenerator[ModelResponseStreamEvent]:
        return self._get_event_iterator()

    @override
    def __aiter__(self) -> AsyncIterator[ModelResponseStreamEvent]:
        return self.events  # as the replies tell them: with ends, and with what is final

    @override
    async def _get_event_iterator(self) -> AsyncGenerator[ModelResponseStreamEvent]:
        attempts, settings = self.attempts, self.attempts.settings
        first = settings.first_token_timeout.total_seconds()
        silence = settings.model_timeout.total_seconds()
        while True:
            breaker = attempts.breaker
            try:
                with (
                    breaker.watching(),
                    closing(Watch(breaker.name, first, silence, attempts.until)) as watch,
                ):
                    async with AsyncExitStack() as stack:
                        with watch:
                            reply = await stack.enter_async_context(self.ask(attempts.model))
                        events = aiter(reply)
                        while True:
                            with watch:
                                event = await anext(events, None)
                            if self._heard is not reply:
                                breaker.spoke()
                                if cut := self._heard:
                                    yield cast(Any, ReplyVoid(reply=cut.get()))
                                self._heard = reply
                            if event is None:
                                return
                            watch.heard()
                            yield event
            except Exception as error:
                await attempts.after(error)

    @override
    def get(self) -> ModelResponse:
        if self._heard:
            return self._heard.get()
        return ModelResponse(parts=[], model_name=self.model_name, state="incomplete")

    @property
    @override
    def usage(self) -> RequestUsage:
        return self.get().usage

    @property
    @override
    def model_name(self) -> str:
        return self._heard.model_name if self._heard else self.attempts.model.model_name

    @property
    @override
    def provider_name(self) -> str | None:
        return self._heard and self._heard.provider_name

    @property
    @override
    def provider_url(self) -> str | None:
        return self._heard and self._heard.provider_url

    @property
    @override
    def timestamp(self) -> datetime:
        return self._heard.timestamp if self._heard else datetime.now(UTC)

    @override
    async def close_stream(self) -> None:
        if self._heard:
            await self._heard.close_stream()

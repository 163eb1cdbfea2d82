"""What operators see of a run: log lines about it, numbers of its end, and its spans."""

import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Any

from app.core import metrics, traces
from app.core.logs import about
from app.models import Run
from app.schemas.run import Options

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletion
    from opentelemetry.trace import Span
    from pydantic_ai.capabilities import AbstractCapability

    from app.config import Settings
    from app.services.execution import Outcome

logger = logging.getLogger(__name__)


async def watched(run: Run, execution: "Awaitable[Outcome | None]") -> "Outcome | None":
    """What the execution brings, seen by operators."""
    about(run_id=run.id, owner_id=run.owner_id)
    if run.crashes:
        metrics.takeovers.add()
    with _span(run) as span:
        outcome = await execution
        if outcome is None or outcome.status == "waiting":
            _log(run, "goes on elsewhere" if outcome is None else "waits", {})
        else:
            _ended(run, outcome)
        if span:
            _describe(span, outcome)
    return outcome


def _ended(run: Run, outcome: "Outcome") -> None:
    reason = reason_of(outcome)
    took = (datetime.now(UTC) - run.created_at).total_seconds()
    metrics.runs_ended.add(run.kind, outcome.status, reason)
    metrics.run_seconds.add(took, run.kind)
    _log(run, outcome.status, {"reason": reason, "seconds": round(took, 3), **outcome.usage})


def _log(run: Run, what: str, fields: dict[str, Any]) -> None:
    level = logging.WARNING if what == "failed" else logging.INFO
    if run.batch_id:  # a job has a hundred thousand
        level = logging.DEBUG
    if logger.isEnabledFor(level):
        logger.log(level, "run %s", what, extra={"fields": {"kind": run.kind, **fields}})


def reason_of(outcome: "Outcome") -> str:
    """Why the run ended so, in a word of ours."""
    error = outcome.error or {}
    return str(error.get("code") or outcome.finish_reason or "")


def _span(run: Run) -> Any:
    """The run's span: below the request that asked for it, whichever process executes it."""
    if traces.tracer is None:
        return nullcontext()
    attributes = {
        "run.id": run.id,
        "run.kind": run.kind,
        "run.program": run.program,
        "run.attempt": run.token,
        "enduser.id": str(run.owner_id),
    }
    parent = traces.at(Options.model_validate_json(run.options).trace)
    return traces.tracer.start_as_current_span(
        f"run {run.kind}", parent, attributes=attributes, record_exception=False
    )


def _describe(span: "Span", outcome: "Outcome | None") -> None:
    from opentelemetry.trace import StatusCode

    if outcome is None:
        span.set_attribute("run.status", "elsewhere")
        return
    span.set_attribute("run.status", outcome.status)
    span.set_attribute("run.reason", reason_of(outcome))
    span.set_attributes({f"run.{name}": count for name, count in outcome.usage.items()})
    if outcome.status == "failed":
        span.set_status(StatusCode.ERROR)


def instruments(settings: "Settings") -> "Sequence[AbstractCapability[Any]]":
    """What gives an agent's model requests and tool calls their spans."""
    return () if traces.tracer is None else _instruments(settings.otel_content)


@cache
def _instruments(content: bool) -> "Sequence[AbstractCapability[Any]]":
    from pydantic_ai.capabilities import Instrumentation
    from pydantic_ai.models.instrumented import InstrumentationSettings

    settings = InstrumentationSettings(
        include_content=content, include_model_request_parameters=content
    )
    return (Instrumentation(settings),)


Ask = Callable[[dict[str, Any]], "Awaitable[ChatCompletion]"]


def asking(ask: Ask) -> Ask:
    """The same way to ask a model, each request with a span."""
    tracer = traces.tracer
    if tracer is None:
        return ask

    async def traced(request: dict[str, Any]) -> "ChatCompletion":
        model = str(request["model"])
        attributes = {"gen_ai.operation.name": "chat", "gen_ai.request.model": model}
        with tracer.start_as_current_span(f"chat {model}", attributes=attributes) as span:
            completion = await ask(request)
            if usage := completion.usage:
                span.set_attribute("gen_ai.usage.input_tokens", usage.prompt_tokens or 0)
                span.set_attribute("gen_ai.usage.output_tokens", usage.completion_tokens or 0)
            return completion

    return traced

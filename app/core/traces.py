"""OpenTelemetry traces, where a collector is named; else nothing of them is loaded or done.

A span says what happened, how long it took and what it used. What was said stays out of it unless
the operator wants it: of what libraries put into their spans, only the attributes that are listed
here are sent.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from app.config import Settings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider

KNOWN = {
    *("http.request.method", "http.response.status_code", "http.route", "error.type"),
    *("run.id", "run.kind", "run.program", "run.status", "run.reason", "run.attempt", "enduser.id"),
    *("run.requests", "run.tool_calls", "run.input_tokens", "run.output_tokens"),
    *("gen_ai.operation.name", "gen_ai.agent.name", "gen_ai.tool.name", "gen_ai.tool.call.id"),
    *("gen_ai.provider.name", "gen_ai.system", "gen_ai.request.model", "gen_ai.response.model"),
    *("gen_ai.response.finish_reasons", "gen_ai.response.time_to_first_chunk"),
    *("gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens", "operation.cost"),
    *("gen_ai.usage.cache_read.input_tokens", "pydantic_ai.tool.failure_stage"),
    *("pydantic_ai.tool.deferral.name", "exception.type", "exception.escaped"),
}
"""The attributes that are sent without `OTEL_CONTENT`."""

MISSING = "OTEL_EXPORTER_OTLP_ENDPOINT needs further packages: `uv sync --extra otel` brings them."

_context = TraceContextTextMapPropagator()

tracer: trace.Tracer | None = None
"""Of our own spans; None where nobody asked for traces."""

_provider: "TracerProvider | None" = None


def begin(settings: Settings) -> None:
    """Sends what this process traces to the collector. Raises ValueError where that cannot be."""
    global tracer, _provider
    endpoint = settings.otel_exporter_otlp_endpoint
    if endpoint is None or tracer:
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ValueError(MISSING) from error

    class Discreet(BatchSpanProcessor):
        def on_end(self, span: "ReadableSpan") -> None:
            super().on_end(span if settings.otel_content else _discreet(span))

    exporter = OTLPSpanExporter(
        f"{endpoint.rstrip('/')}/v1/traces", headers=_headers(settings), timeout=5
    )
    resource = Resource.create({"service.name": settings.otel_service_name})
    _provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    _provider.add_span_processor(Discreet(exporter))
    trace.set_tracer_provider(_provider)
    tracer = _provider.get_tracer("agent-backend")


def end() -> None:
    """Sends what is left. Takes seconds where the collector is away: call it in a thread."""
    if _provider:
        _provider.shutdown()


def here() -> str:
    """The current span, as W3C's `traceparent`; "" where nothing is traced."""
    carrier: dict[str, str] = {}
    if tracer:
        _context.inject(carrier)
    return carrier.get("traceparent", "")


def at(traceparent: str) -> Context | None:
    """The context in which that span goes on."""
    return _context.extract({"traceparent": traceparent}) if traceparent else None


def _headers(settings: Settings) -> Mapping[str, str]:
    from opentelemetry.util.re import parse_env_headers

    given = settings.otel_exporter_otlp_headers
    return parse_env_headers(given.get_secret_value(), liberal=True) if given else {}


def _discreet(span: "ReadableSpan") -> "ReadableSpan":
    """The span without what was said in it."""
    from opentelemetry.sdk.trace import Event, ReadableSpan
    from opentelemetry.trace import Status

    return ReadableSpan(
        span.name,
        span.context,
        span.parent,
        span.resource,
        _known(span.attributes),
        [Event(each.name, _known(each.attributes), each.timestamp) for each in span.events],
        span.links,
        span.kind,
        status=Status(span.status.status_code),
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )


def _known(attributes: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (attributes or {}).items() if name in KNOWN}

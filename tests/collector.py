"""An OpenTelemetry collector: takes traces over OTLP/HTTP, and keeps them."""

from dataclasses import dataclass
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tests.serving import Delivery, Serving


@dataclass(frozen=True)
class Span:
    name: str
    trace: str
    id: str
    parent: str
    attributes: dict[str, Any]
    failed: bool
    service: str


class Collector(Serving):
    """`with Collector() as collector:` takes traces at `collector.url`."""

    def __init__(self) -> None:
        super().__init__(Starlette(routes=[Route("/v1/traces", self._take, methods=["POST"])]))
        self.spans: list[Span] = []
        self.bytes = b""  # all that came
        self.headers: list[dict[str, str]] = []

    async def _take(self, request: Request) -> Response:
        body = await request.body()
        self.bytes += body
        self.headers.append(dict(request.headers))
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = _dict(group.resource.attributes)["service.name"]
            for scope in group.scope_spans:
                for span in scope.spans:
                    self.spans.append(
                        Span(
                            name=span.name,
                            trace=span.trace_id.hex(),
                            id=span.span_id.hex(),
                            parent=span.parent_span_id.hex(),
                            attributes=_dict(span.attributes),
                            failed=span.status.code == 2,
                            service=service,
                        )
                    )
        self._notice()
        return Delivery([b""], media_type="application/x-protobuf")

    def named(self, start: str) -> list[Span]:
        return [span for span in list(self.spans) if span.name.startswith(start)]

    async def wait_for(self, start: str, n: int = 1) -> list[Span]:
        """The spans of that name, once there are so many."""
        await self.wait_until_async(lambda: len(self.named(start)) >= n, timeout=30)
        return self.named(start)


def _dict(attributes: Any) -> dict[str, Any]:
    return {each.key: _value(each.value) for each in attributes}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind) if kind else None

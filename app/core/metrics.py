"""What this process has counted. Plain numbers, until somebody asks for them.

Labels are words of ours: a name that a user, a model or a provider chose is never one, since each
new one would be kept for good.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prometheus_client import Metric

Labels = tuple[str, ...]
Numbers = Mapping[Labels, Sequence[float]]

COMMIT_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Count:
    """A sum for each combination of labels. A `level` goes down too, and ends with its process."""

    def __init__(self, name: str, text: str, *labels: str, level: bool = False) -> None:
        self.name, self.text, self.labels, self.level = name, text, labels, level
        self.numbers: dict[Labels, list[float]] = {}
        self.width = 1
        ALL.append(self)

    def add(self, *labels: str, by: float = 1) -> None:
        if numbers := self.numbers.get(labels):
            numbers[0] += by
        else:
            self.numbers[labels] = [by]

    def metric(self, numbers: Numbers) -> "Metric":
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        kind: Any = GaugeMetricFamily if self.level else CounterMetricFamily
        family = kind(self.name, self.text, labels=self.labels)
        for labels, (value,) in numbers.items():
            family.add_metric(labels, value)
        return family


class Timing:
    """How long things took, in seconds, sorted into buckets for each combination of labels."""

    level = False

    def __init__(
        self, name: str, text: str, *labels: str, bounds: Sequence[float] = BOUNDS
    ) -> None:
        self.name, self.text, self.labels, self.bounds = name, text, labels, bounds
        self.numbers: dict[Labels, list[float]] = {}  # each bucket's count, then the sum
        self.width = len(bounds) + 2
        ALL.append(self)

    def add(self, seconds: float, *labels: str) -> None:
        numbers = self.numbers.get(labels)
        if numbers is None:
            numbers = self.numbers[labels] = [0] * self.width
        numbers[bisect_left(self.bounds, seconds)] += 1
        numbers[-1] += seconds

    def metric(self, numbers: Numbers) -> "Metric":
        from prometheus_client.core import HistogramMetricFamily

        family = HistogramMetricFamily(self.name, self.text, labels=self.labels)
        for labels, (*counts, total) in numbers.items():
            buckets: list[tuple[str, float]] = []
            below = 0.0
            for bound, count in zip((*self.bounds, "+Inf"), counts, strict=True):
                below += count
                buckets.append((str(bound), below))
            family.add_metric(labels, buckets, total)
        return family


ALL: list[Count | Timing] = []

requests = Count("agent_http_requests", "Requests that were answered.", "method", "route", "status")
request_seconds = Timing(
    "agent_http_request_seconds", "From a request to the end of its answer.", "route"
)
streams = Count("agent_open_streams", "Event streams that are being read.", level=True)
runs_ended = Count("agent_runs_ended", "Runs that ended.", "kind", "status", "reason")
run_seconds = Timing("agent_run_seconds", "From a run's acceptance to its end.", "kind")
takeovers = Count("agent_lease_takeovers", "Runs taken over from a process that died.")
commits = Timing("agent_commit_seconds", "Transactions of the journal.", bounds=COMMIT_BOUNDS)
commit_failures = Count("agent_commit_failures", "Transactions of the journal that failed.")
entries = Count("agent_log_entries", "Entries of run logs that were committed.")
model_requests = Count(
    "agent_model_requests", "Requests to models' servers, by what came of them.", "outcome"
)
tokens = Count("agent_tokens", "Tokens of models' answers and of what asked.", "model", "direction")
breakers = Count(
    "agent_model_breaker_open", "Processes that leave a model alone.", "model", level=True
)
tool_calls = Count("agent_tool_calls", "Calls of tools, by what came of them.", "tool", "outcome")

Price = Callable[[str, float, float], float | None]
"""US dollars for so many tokens sent to a model and received; None without a known price."""

SENT, RECEIVED = "input", "output"


def answered(model: str, sent: int, received: int) -> None:
    """A model has answered."""
    tokens.add(model, SENT, by=sent)
    tokens.add(model, RECEIVED, by=received)


def snapshot() -> dict[str, list[tuple[Labels, list[float]]]]:
    """All that was counted here, as JSON takes it."""
    return {each.name: list(each.numbers.items()) for each in ALL}


def render(others: Iterable[Mapping[str, Any]], more: Iterable["Metric"], price: Price) -> bytes:
    """What was counted here and in the snapshots of others, in Prometheus's text format. What
    another version of us counted otherwise is left out."""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.registry import Collector

    merged = {each.name: {k: list(v) for k, v in each.numbers.items()} for each in ALL}
    for other in others:
        for each in ALL:
            for labels, numbers in other.get(each.name, ()):
                if len(numbers) == each.width and len(labels) == len(each.labels):
                    mine = merged[each.name].setdefault(tuple(labels), [0.0] * each.width)
                    mine[:] = map(sum, zip(mine, numbers, strict=True))

    class Counted(Collector):
        def collect(self) -> Iterator["Metric"]:
            yield from (each.metric(merged[each.name]) for each in ALL)
            yield _cost(merged[tokens.name], price)
            yield from more

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Counted())
    return generate_latest(registry)


def _cost(counted: Numbers, price: Price) -> "Metric":
    from prometheus_client.core import CounterMetricFamily

    family = CounterMetricFamily(
        "agent_cost_dollars", "What the tokens cost at list prices.", labels=("model",)
    )
    for model in {model for model, _ in counted}:
        sent, received = (counted.get((model, kind), (0,))[0] for kind in (SENT, RECEIVED))
        if (dollars := price(model, sent, received)) is not None:
            family.add_metric((model,), dollars)
    return family

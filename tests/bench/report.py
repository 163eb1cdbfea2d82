"""Figures, and the table that is made of them."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

TITLES = {
    "turn": "One turn, 20 tokens, 32 at a time",
    "single": "The same, one at a time",
    "tool": "A turn with a tool's call, 16 at a time",
    "stream": "Streams of 200 tokens at once, 16 at a time",
    "paced200": "200 streams of 200 tokens, 5 ms apart",
    "paced1000": "1000 streams of 200 tokens, 5 ms apart",
    "conversation": "Turn 500 of a conversation, and turn 5",
    "start": "From the start of the process to the first healthy answer",
}
YARDSTICK = ("bare", "ag-ui")  # of streams, whatever protocol they are told in


@dataclass(frozen=True, slots=True)
class Figure:
    """One measurement. With errors it stays in the file, and out of the table.

    `value` is requests or, of streams, tokens a second, for a start seconds, for a turn of a
    conversation milliseconds; `cpu_ms` the server's own processor time for each request, or for
    the start, None where the machine does not tell. `p50_ms` is the time of an answer, `first_ms`
    that to its first token, `rss_mb` the memory before and `grown_mb` by how much it was larger at
    most; `cut` streams were not waited for.
    """

    system: str
    scenario: str
    protocol: str
    round: int
    value: float
    cpu_ms: float | None
    p50_ms: float | None = None
    first_ms: float | None = None
    rss_mb: float | None = None
    grown_mb: float | None = None
    cut: int = 0
    errors: dict[str, int] = field(default_factory=dict[str, int])
    at: float = field(default_factory=time.time)
    load_average: float = field(default_factory=lambda: os.getloadavg()[0])


Read = Callable[[Figure], float | None]
COLUMNS: dict[str, str] = {
    "CPU ms": "cpu_ms",
    "p50 ms": "p50_ms",
    "first ms": "first_ms",
    "RSS MB": "rss_mb",
    "grown MB": "grown_mb",
}
UNITS = {"start": "seconds", "conversation": "ms"}


def table(figures: Sequence[Figure], scenario: str) -> str:
    """Medians of the rounds without errors, and in brackets their ratios to the bare agent's."""
    chosen = [figure for figure in figures if figure.scenario == scenario]
    good = [figure for figure in chosen if not figure.errors]
    unit = "tokens/s" if any(figure.first_ms is not None for figure in good) else "requests/s"
    reads: dict[str, Read] = {UNITS.get(scenario, unit): _reader("value")}
    for title, name in COLUMNS.items():
        if any(getattr(figure, name) is not None for figure in good):
            reads[title] = _reader(name)
    lines = [TITLES[scenario], f"{'':22}" + "".join(f"{title:>18}" for title in reads)]
    for system, protocol in dict.fromkeys((each.system, each.protocol) for each in chosen):
        ours = [each for each in good if (each.system, each.protocol) == (system, protocol)]
        base = _base(good, ours)
        line = f"{system} {protocol}".ljust(22)
        for read in reads.values():
            value = _median([read(figure) for figure in ours])
            ratio = _median([_ratio(figure, base, read) for figure in ours])
            line += f"{value} ({ratio})".rjust(18)
        cut = sum(figure.cut for figure in ours)
        lines.append(line + (f"  {cut} cut" if cut else ""))
    return "\n".join(lines)


def _reader(name: str) -> Read:
    def read(figure: Figure) -> Any:
        return getattr(figure, name)

    return read


def _base(good: Sequence[Figure], ours: Sequence[Figure]) -> dict[int, Figure]:
    """The bare agent's figures by round: of its AG-UI adapter, where there are any."""
    bare = [figure for figure in good if figure.system == "bare"]
    told = [figure for figure in bare if (figure.system, figure.protocol) == YARDSTICK]
    return {figure.round: figure for figure in told or bare}


def _median(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.2f}" if known else "-"


def _ratio(figure: Figure, base: dict[int, Figure], read: Read) -> float | None:
    """To the bare agent in the same round: what the machine did to it, it did to both."""
    value = read(figure)
    bare = read(base[figure.round]) if figure.round in base else None
    return value / bare if value is not None and bare else None

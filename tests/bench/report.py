"""Figures, and the table that is made of them."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

TITLES = {
    "turn": "One turn, 20 tokens",
    "stream": "A stream of 200 tokens",
    "start": "From the start of the process to the first healthy answer",
}


@dataclass(frozen=True, slots=True)
class Figure:
    """One measurement. With errors it stays in the file, and out of the table.

    `value` is requests a second, for a start seconds; `cpu_ms` the server's own processor time
    for each of them, None where the machine does not tell.
    """

    system: str
    scenario: str
    round: int
    value: float
    cpu_ms: float | None
    errors: dict[str, int] = field(default_factory=dict[str, int])
    at: float = field(default_factory=time.time)
    load_average: float = field(default_factory=lambda: os.getloadavg()[0])


Read = Callable[[Figure], float | None]


def table(figures: Sequence[Figure], scenario: str) -> str:
    """Medians of the rounds without errors, and their ratios to the bare agent's."""
    unit = "seconds" if scenario == "start" else "requests/s"
    lines = [TITLES[scenario], f"{'':10}{unit:>12}{'of bare':>10}{'CPU ms':>10}{'of bare':>10}"]
    chosen = [figure for figure in figures if figure.scenario == scenario]
    good = [figure for figure in chosen if not figure.errors]
    bare = {figure.round: figure for figure in good if figure.system == "bare"}
    reads: tuple[Read, Read] = (lambda figure: figure.value, lambda figure: figure.cpu_ms)
    for system in dict.fromkeys(figure.system for figure in chosen):
        ours = [figure for figure in good if figure.system == system]
        line = f"{system:10}"
        for read, width in zip(reads, (12, 10), strict=True):
            line += f"{_median([read(figure) for figure in ours]):>{width}}"
            line += f"{_median([_ratio(figure, bare, read) for figure in ours]):>10}"
        lines.append(line)
    return "\n".join(lines)


def _median(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.2f}" if known else "-"


def _ratio(figure: Figure, bare: dict[int, Figure], read: Read) -> float | None:
    """To the bare agent in the same round: what the machine did to it, it did to both."""
    value = read(figure)
    base = read(bare[figure.round]) if figure.round in bare else None
    return value / base if value is not None and base else None

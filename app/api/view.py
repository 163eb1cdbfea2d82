"""A page that shows an extraction's text, with what each value was read from.

No script, no address but its own anchors; all that comes from the text, the model or the caller is
escaped.
"""

import base64
import hashlib
from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise
from typing import Any, cast

from app.core.json import dump_exact
from app.schemas.extraction import Evidence, Extracted, Range
from app.services.json_schema import pointer

MAX_VALUE = 500  # characters of a value in the table; the text beside it shows it whole

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #60646c; --line: #e0e1e6;
  --page: #fcfcfd; --card: #fff; --mark: #fff1a8; --deep: #ffd84d; --on: #1c2024;
  --good: #18794e; --bad: #b42318; --lost: #fdecea; }
@media (prefers-color-scheme: dark) { :root { --ink: #edeef0; --soft: #a1a7b0; --line: #363a3f;
  --page: #111113; --card: #18191b; --mark: #5c4a07; --deep: #94770b; --on: #fff7d6;
  --good: #5bd69a; --bad: #ff9d91; --lost: #3b1814; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 2rem clamp(1rem, 4vw, 3rem); background: var(--page);
  color: var(--ink); font: 15px/1.6 system-ui, sans-serif; }
h1 { font-size: 1.25rem; margin: 0 0 .75rem; overflow-wrap: anywhere; }
h2 { font-size: .8rem; margin: 0 0 .5rem; color: var(--soft); text-transform: uppercase;
  letter-spacing: .06em; }
dl { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 0 0 2rem; }
dt { color: var(--soft); font-size: .8rem; }
dd { margin: 0; overflow-wrap: anywhere; }
main { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 4fr); gap: 2rem; }
@media (max-width: 60rem) { main { grid-template-columns: minmax(0, 1fr); } }
#text, table { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
#text { margin: 0; padding: 1.25rem; font: 14px/1.8 ui-monospace, monospace; tab-size: 4;
  white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; }
mark { background: var(--mark); color: var(--on); border-radius: .2rem; scroll-margin: 30vh; }
mark.many { background: var(--deep); }
mark a { color: inherit; text-decoration: none; }
mark:hover, span:target + mark, span:target + span + mark { outline: 2px solid var(--deep); }
del { background: var(--lost); text-decoration: line-through var(--bad); }
table { width: 100%; border-spacing: 0; font-size: .875rem; }
th, td { padding: .5rem .75rem; text-align: start; vertical-align: top;
  border-top: 1px solid var(--line); overflow-wrap: anywhere; unicode-bidi: plaintext; }
thead th:first-child { width: 30%; }
thead th { border-top: 0; color: var(--soft); font-weight: 500; overflow-wrap: normal; }
tbody th { font: 13px/1.7 ui-monospace, monospace; }
tr { scroll-margin: 30vh; }
tr:target td, tr:target th { background: var(--mark); color: var(--on); }
.value { font-family: ui-monospace, monospace; white-space: pre-wrap; }
td a { color: inherit; white-space: nowrap; }
.grounded, .completed { color: var(--good); }
.ungrounded, .partial { color: var(--bad); }
"""

_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()

HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_HASH}'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "private, no-store",
}
"""What the page is to be sent with."""


def render(run_id: str, text: str, extracted: Extracted) -> str:
    """The whole page, in HTML. `text` is what the evidence counts its characters in."""
    places = dict[str, list[int]]()  # of evidence, by path
    for index, each in enumerate(extracted.evidence):
        places.setdefault(each.path, []).append(index)
    paths = dict.fromkeys([*_leaves(extracted.data), *extracted.field_status, *places])
    row_of = {path: row for row, path in enumerate(paths)}
    rows = "".join(_row(path, row, extracted, places.get(path, ())) for path, row in row_of.items())
    shown = _marked(text, extracted.evidence, extracted.failed_ranges, row_of)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Extraction {escape(run_id)}</title><style>{STYLE}</style></head><body>"
        f"<h1>Extraction {escape(run_id)}</h1><dl>{_facts(extracted)}</dl><main>"
        # A parser drops a line feed that a `pre` begins with: this one, and none of the text's.
        f'<section><h2>Text</h2><pre id="text" dir="auto">\n{shown}</pre></section>'
        "<section><h2>Values</h2><table><thead><tr><th>Path</th><th>Value</th><th>Evidence</th>"
        f"</tr></thead><tbody>{rows}</tbody></table></section></main></body></html>"
    )


def _facts(extracted: Extracted) -> str:
    schema, usage, chunks = extracted.schema_, extracted.usage, extracted.chunks
    facts = {
        "Status": extracted.status,
        "Schema": schema.name if schema.version is None else f"{schema.name}@{schema.version}",
        "Model": extracted.model,
        "Attempts": str(len(extracted.attempts)),
        "Tokens": f"{usage.prompt_tokens:,} in, {usage.completion_tokens:,} out",
        "Cost": "unknown" if extracted.cost is None else f"${extracted.cost:.6f}",
        "Cache": extracted.cache,
    }
    if chunks.total > 1 or chunks.failed:
        facts["Chunks"] = f"{chunks.total}, {chunks.failed} of them failed"
    return "".join(
        f'<div><dt>{name}</dt><dd class="{_status(fact)}">{escape(fact)}</dd></div>'
        for name, fact in facts.items()
    )


def _status(word: str) -> str:
    return word if word in ("completed", "partial", "grounded", "ungrounded") else ""


def _row(path: str, row: int, extracted: Extracted, places: Sequence[int]) -> str:
    """One value, with the way to each place in the text that says it."""
    status = extracted.field_status.get(path, "")
    spans = [(index, extracted.evidence[index]) for index in places]
    links = " ".join(
        f'<a href="#e{index}">{span.match} {span.start}&ndash;{span.end}</a>'
        for index, span in spans
    )
    return (
        f'<tr id="v{row}"><th>{escape(path) or "(root)"}</th>'
        f'<td class="value">{_value(_at(extracted.data, path))}</td>'
        f'<td><span class="{_status(status)}">{escape(status)}</span> {links}</td></tr>'
    )


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else dump_exact(value)
    return escape(text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}…")


def _leaves(data: Any, path: tuple[str | int, ...] = ()) -> Iterator[str]:
    """The JSON Pointer of each value that holds no other."""
    below: list[tuple[str | int, Any]] = []
    if isinstance(data, dict):
        below = list(cast(dict[str | int, Any], data).items())
    elif isinstance(data, list):
        below = list(enumerate(cast(list[Any], data)))
    for name, item in below:
        yield from _leaves(item, (*path, name))
    if not below:
        yield pointer(path)


def _at(data: Any, path: str) -> Any:
    """The value at the JSON Pointer; None where there is none."""
    for part in path.split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        try:
            data = data[int(part)] if isinstance(data, list) else data[part]  # pyright: ignore[reportUnknownVariableType]
        except (LookupError, TypeError, ValueError):
            return None
    return cast(Any, data)


def _marked(
    text: str, evidence: Sequence[Evidence], lost: Sequence[Range], row_of: dict[str, int]
) -> str:
    """The text, cut wherever a span begins or ends, each piece marked with what covers it."""
    size = len(text)
    starts, ends = dict[int, list[int]](), dict[int, list[int]]()
    spans = [(each.start, each.end) for each in evidence] + [(e.start, e.end) for e in lost]
    for index, (start, end) in enumerate(spans):
        if 0 <= start < end <= size:
            starts.setdefault(start, []).append(index)
            ends.setdefault(end, []).append(index)
    pieces: list[str] = []
    cover: set[int] = set()
    seen: set[int] = set()
    cuts = sorted({0, size, *starts, *ends})
    for here, there in pairwise(cuts):
        cover.difference_update(ends.get(here, ()))
        cover.update(starts.get(here, ()))
        piece = _literal(text[here:there])
        if covering := sorted(index for index in cover if index < len(evidence)):
            piece = _mark(piece, covering, evidence, row_of, seen)
        if any(index >= len(evidence) for index in cover):
            piece = f'<del title="not read">{piece}</del>'
        pieces.append(piece)
    return "".join(pieces)


def _mark(
    piece: str,
    covering: Sequence[int],
    evidence: Sequence[Evidence],
    row_of: dict[str, int],
    seen: set[int],
) -> str:
    """Leads to the row of the shortest span, the innermost; the title names all."""
    inner = min(covering, key=lambda index: evidence[index].end - evidence[index].start)
    title = escape(", ".join(evidence[index].path or "(root)" for index in covering))
    anchors = "".join(f'<span id="e{index}"></span>' for index in covering if index not in seen)
    seen.update(covering)
    many = ' class="many"' if len(covering) > 1 else ""
    link = f'<a href="#v{row_of[evidence[inner].path]}">{piece}</a>'
    return f'{anchors}<mark{many} title="{title}">{link}</mark>'


def _literal(text: str) -> str:
    """As a browser will read it, character by character: a bare CR would become a line feed, and
    NUL would be dropped."""
    return escape(text, quote=False).replace("\r", "&#13;").replace("\0", "\ufffd")

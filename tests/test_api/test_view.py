"""The page shows the text as it is, marks what was read from it, and runs nothing."""

import base64
import hashlib
import re
import time
from html.parser import HTMLParser
from typing import Any

import pytest

from app.api.view import HEADERS, render
from app.schemas.extraction import Chunks, Evidence, Extracted, ExtractionSchema, Range

HOSTILE = (
    '<script>alert(1)</script>\r\n<a href="javascript:alert(2)">x</a> &amp; &#60; \'"`\r\n'
    "</pre></body><!-- \u202eevil\u202c مرحبا \U0001f469\u200d\U0001f680 cafe\u0301\t]]>\n\r"
)
VOID = {"meta"}


class Page(HTMLParser):
    """What a browser sees: the text of the `pre`, and which span each mark covers."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.table = ""
        self.style = ""
        self.marks: list[tuple[int, int, str]] = []  # start, end, href
        self.lost: list[tuple[int, int]] = []
        self._starts: list[int] = []
        self._href = ""
        self.feed(page)
        self.close()
        assert self.open == []
        assert self.text.startswith("\n")  # which a browser drops
        self.text = self.text[1:]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("mark", "del"):
            self._starts.append(len(self.text) - 1)
        if tag == "a":
            self._href = dict(attrs)["href"] or ""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        end = len(self.text) - 1
        if tag == "mark":
            self.marks.append((self._starts.pop(), end, self._href))
        elif tag == "del":
            self.lost.append((self._starts.pop(), end))

    def handle_data(self, data: str) -> None:
        if "pre" in self.open:
            self.text += data
        elif "tbody" in self.open:
            self.table += data
        elif "style" in self.open:
            self.style += data

    def ids(self) -> list[str]:
        return [str(attrs["id"]) for _, attrs in self.tags if "id" in attrs]

    def row(self, row: int) -> int:
        """The place among all tags of a row's first."""
        return next(at for at, (_, attrs) in enumerate(self.tags) if attrs.get("id") == f"v{row}")


def evidence(path: str, start: int, end: int, text: str) -> Evidence:
    return Evidence(path=path, start=start, end=end, quote=text[start:end], match="exact")


def extracted(data: Any, **fields: Any) -> Extracted:
    schema = ExtractionSchema(name="invoice", version=3, sha256="0")
    return Extracted(**{"data": data, "model": "gpt-4o", "schema": schema, **fields})


@pytest.mark.parametrize(
    "text",
    [HOSTILE, "\n\n two", "\r", "x", " ", "a\r\n\nb", "&lt;b&gt;", "\x0b\x0c\x1b\x7f\x85\ufeff"],
)
def test_the_text_stands_there_character_by_character(text: str) -> None:
    spans = [evidence("/a", at, len(text), text) for at in range(0, len(text), 7)]

    assert Page(render("1", text, extracted({"a": text}))).text == text
    assert Page(render("1", text, extracted({"a": text}, evidence=spans))).text == text


def test_marks_cover_exactly_what_was_quoted_and_lead_to_their_values() -> None:
    text = "ab\U0001f680def cde"
    spans = [evidence("/x", 0, 3, text), evidence("/y", 7, 10, text)]

    page = Page(render("1", text, extracted({"x": 1, "y": 2}, evidence=spans)))

    assert page.marks == [(0, 3, "#v0"), (7, 10, "#v1")]
    assert {"e0", "e1"} <= set(page.ids())


def test_spans_that_overlap_are_cut_and_each_piece_leads_to_the_innermost() -> None:
    text = "0123456789"
    spans = [
        evidence("/outer", 0, 8, text),
        evidence("/inner", 2, 4, text),
        evidence("/late", 6, 10, text),
    ]
    data = {"outer": 1, "inner": 2, "late": 3}

    page = Page(render("1", text, extracted(data, evidence=spans)))

    assert page.marks == [
        (0, 2, "#v0"),
        (2, 4, "#v1"),
        (4, 6, "#v0"),
        (6, 8, "#v2"),
        (8, 10, "#v2"),
    ]
    assert page.text == text
    titles = [attrs["title"] for tag, attrs in page.tags if tag == "mark"]
    assert titles == ["/outer", "/outer, /inner", "/outer", "/outer, /late", "/late"]
    assert sorted(page.ids()) == sorted(set(page.ids()))


def test_ranges_that_nobody_read_are_struck() -> None:
    text = "read lost read"

    page = Page(
        render(
            "1",
            text,
            extracted(
                {},
                status="partial",
                failed_ranges=[Range(start=5, end=9)],
                chunks=Chunks(total=3, failed=1),
                evidence=[evidence("/a", 3, 6, text)],
            ),
        )
    )

    assert page.lost == [(5, 6), (6, 9)]
    assert page.text == text


def test_spans_outside_the_text_are_not_marked() -> None:
    spans = [
        Evidence(path="/a", start=s, end=e, quote="", match="exact")
        for s, e in [(-1, 2), (2, 2), (3, 2), (0, 99)]
    ]

    page = Page(render("1", "abc", extracted({"a": 1}, evidence=spans)))

    assert (page.text, page.marks) == ("abc", [])


def test_every_value_has_a_row_with_its_status_and_the_way_to_its_evidence() -> None:
    text = "Ada, 36"
    data = {"name": "Ada", "tags": [], "a/b~": [{"age": 36}], "missing": None}
    spans = [evidence("/name", 0, 3, text), evidence("/a~1b~0/0/age", 5, 7, text)]
    status = {"/name": "grounded", "/a~1b~0/0/age": "grounded", "/missing": "ungrounded"}

    page = Page(render("1", text, extracted(data, evidence=spans, field_status=status)))

    assert page.table == (
        "/nameAdagrounded exact 0–3/tags[] /a~1b~0/0/age36grounded exact 5–7/missingnullungrounded "
    )
    links = {attrs["href"] for tag, attrs in page.tags if tag == "a"}
    assert links == {"#e0", "#e1", "#v0", "#v2"}
    assert {str(link)[1:] for link in links} <= set(page.ids())


@pytest.mark.parametrize("data", [None, 1, "x", [], [[[]]], {"": {"": 1}}, True])
def test_data_of_any_form_is_shown(data: Any) -> None:
    Page(render("1", "x", extracted(data, evidence=[evidence("", 0, 1, "x")])))


def test_nothing_of_the_page_runs_loads_or_leads_away() -> None:
    bad = "\"><script>alert(1)</script><img src=x onerror=alert(1)>'javascript:alert(1)"
    page = Page(
        render(
            bad,
            HOSTILE,
            Extracted(
                data={bad: bad, "list": [bad]},
                evidence=[evidence(f"/{bad}", 0, 9, HOSTILE)],
                field_status={bad: "grounded"},
                model=bad,
                schema=ExtractionSchema(name=bad, sha256=bad),
            ),
        )
    )

    assert {tag for tag, _ in page.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "dl", "div", "dt", "dd"),
        *("main", "section", "pre", "table", "thead", "tbody", "tr", "th", "td"),
        *("span", "mark", "a", "del"),
    }
    names = {name for _, attrs in page.tags for name in attrs}
    assert names <= {"lang", "charset", "name", "content", "id", "dir", "class", "title", "href"}
    hrefs = [str(attrs["href"]) for _, attrs in page.tags if "href" in attrs]
    assert hrefs and all(re.fullmatch(r"#[ev]\d+", href) for href in hrefs)
    assert not re.search(r"url\(|@import", page.style)


def test_the_policy_lets_the_pages_style_in_and_nothing_else() -> None:
    style = Page(render("1", "x", extracted({}))).style
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()

    policy = dict(
        part.strip().split(" ", 1) for part in HEADERS["Content-Security-Policy"].split(";")
    )

    assert policy == {
        "default-src": "'none'",
        "style-src": f"'sha256-{digest}'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert HEADERS["X-Content-Type-Options"] == "nosniff"
    assert HEADERS["Referrer-Policy"] == "no-referrer"


def test_a_long_text_with_many_values_takes_no_time() -> None:
    text = "0123456789" * 100_000
    spans = [evidence(f"/{at}", at * 100, at * 100 + 50, text) for at in range(10_000)]
    begun = time.process_time()

    page = render("1", text, extracted(list(range(10_000)), evidence=spans))

    assert time.process_time() - begun < 3
    assert page.count("<mark") == 10_000

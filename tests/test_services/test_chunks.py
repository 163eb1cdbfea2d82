"""Long texts: cut where nothing is harmed, and one document out of the pieces."""

import random
import re
import time
from itertools import pairwise
from typing import Any

import pytest

from app.core.errors import Invalid
from app.schemas.extraction import Evidence
from app.services.chunks import Chunk, Part, cut, find_list, merge, relaxed
from app.services.json_schema import JsonSchema

LINE = {
    "type": "object",
    "properties": {"text": {"type": "string"}, "amount": {"type": "integer"}},
    "required": ["text", "amount"],
    "additionalProperties": False,
}
INVOICE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "number": {"type": "string"},
        "kind": {"enum": ["invoice", "credit"]},
        "seller": {"$ref": "#/$defs/party"},
        "lines": {"type": "array", "items": LINE, "minItems": 3, "uniqueItems": True},
    },
    "required": ["number", "kind", "seller", "lines"],
    "minProperties": 3,
    "$defs": {
        "party": {
            "type": "object",
            "properties": {"name": {"type": "string"}},
            "required": ["name"],
        }
    },
}


def at(text: str, quote: str, path: str, nth: int = 0) -> Evidence:
    start = [found.start() for found in re.finditer(re.escape(quote), text)][nth]
    return Evidence(path=path, start=start, end=start + len(quote), quote=quote, match="exact")


def pieces(text: str, max_chars: int, overlap: int) -> list[str]:
    return [text[chunk.start : chunk.end] for chunk in cut(text, max_chars, overlap)]


class TestCutting:
    def test_a_short_text_is_one_chunk(self) -> None:
        assert cut("a b", 3, 1) == [Chunk(0, 0, 3)]
        assert cut("", 10, 0) == [Chunk(0, 0, 0)]

    @pytest.mark.parametrize("seed", range(200))
    def test_all_of_a_text_is_there_in_whole_words_and_numbers(self, seed: int) -> None:
        dice = random.Random(seed)
        words = [
            "word",
            "1,234.56",
            "1.234.567",
            "1\u202f234,5",
            "12 500",
            "don’t",
            "-3",
            "e\u0301t",
        ]
        words += ["2024-01-15", "हिन्दी", "👩\u200d👧", "🇩🇪", "end.", "日本。", "long" * 5]
        spaces = [" ", "  ", "\n", "\r\n", "\n\n", "\r\n\r\n", "\t"]
        text = "".join(f"{dice.choice(words)}{dice.choice(spaces)}" for _ in range(200))
        size = dice.randint(30, 300)
        overlap = dice.randint(0, size // 2)

        chunks = cut(text, size, overlap)

        assert (chunks[0].start, chunks[-1].end) == (0, len(text))
        assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
        assert all(0 < chunk.end - chunk.start <= size for chunk in chunks)
        for one, two in pairwise(chunks):
            assert one.start < two.start <= one.end < two.end
            assert one.end - two.start <= overlap
        harmed = {
            inside
            for word in [*words, "\r\n"]
            for found in re.finditer(re.escape(word), text)
            for inside in range(found.start() + 1, found.end())
        }
        harmed -= {found.end() for found in re.finditer("日本。|end.|-3", text)}
        assert not harmed & {border for chunk in chunks for border in (chunk.start, chunk.end)}

    def test_the_best_border_is_taken(self) -> None:
        assert pieces("One two.\n\nThree. Four\nfive", 18, 0)[0] == "One two.\n\n"
        assert pieces("One two three\nfour. Five six seven", 24, 0)[0] == "One two three\n"
        assert pieces("One two three. Four five six seven", 24, 0)[0] == "One two three. "
        assert pieces("One two three four five six", 20, 0)[0] == "One two three four "
        assert pieces("One,two,three,four,five,six", 20, 0)[0] == "One,two,three,four,"

    def test_windows_line_ends_are_no_paragraphs(self) -> None:
        assert (
            pieces("One two\r\n\r\nthree\r\nfour\r\nfive", 22, 0)[0] == "One two\r\n\r\nthree\r\n"
        )

    def test_lines_overlap_by_whole_lines(self) -> None:
        text = "".join(f"line {number:03}\n" for number in range(100))

        one, two, *_ = pieces(text, 200, 50)

        assert one.endswith(two[:45]) and two.startswith("line ")

    def test_a_long_word_is_kept_whole_where_it_fits_a_chunk(self) -> None:
        word = "x" * 95

        assert any(word in piece for piece in pieces(f"{'a ' * 40}{word} {'b ' * 40}", 100, 50))

    def test_only_what_is_longer_than_a_chunk_is_cut_and_not_before_a_mark(self) -> None:
        chunks = pieces("e\u0301" * 500, 101, 20)

        assert len(chunks) > 5
        assert all(chunk.startswith("e") for chunk in chunks)
        assert pieces("1,2," * 50, 99, 0)[0].endswith(",")

    @pytest.mark.parametrize(
        "piece", ["a", " ", ".", "\n", "\r\n", "1,", "\u0301", "100 ", ".'", "ab-", "\u200d", "\n "]
    )
    def test_any_text_is_cut_in_time_that_grows_with_its_length(self, piece: str) -> None:
        start = time.process_time()

        chunks = cut(piece * (200_000 // len(piece)), 200, 100)

        assert len(chunks) < 5000
        assert time.process_time() - start < 5


class TestTheList:
    @pytest.mark.parametrize(
        ("schema", "wanted", "found"),
        [
            (INVOICE, None, "/lines"),
            (INVOICE, "/lines", "/lines"),
            ({"type": "array"}, None, ""),
            ({"type": ["array", "null"]}, "", ""),
            ({"properties": {"a/b": {"type": "array"}, "c": {}}}, None, "/a~1b"),
            ({"$ref": "#/$defs/x", "$defs": {"x": INVOICE["properties"]["lines"]}}, None, ""),
            ({"allOf": [{"properties": {"rows": {"items": {}}}}]}, None, "/rows"),
            (
                {"properties": {"a": {"anyOf": [{"type": "array"}, {"type": "null"}]}}},
                None,
                "/a",
            ),
            ({"properties": {"doc": {"properties": {"a": {"type": "array"}}}}}, "/doc/a", "/doc/a"),
        ],
    )
    def test_is_found(self, schema: Any, wanted: str | None, found: str) -> None:
        assert find_list(schema, wanted) == found

    @pytest.mark.parametrize(
        "wanted", ["/number", "/none", "lines", "/lines/0", "", "/\ud800", "/\0"]
    )
    def test_has_to_be_one(self, wanted: str) -> None:
        with pytest.raises(Invalid, match="at the top it has /lines") as refused:
            find_list(INVOICE, wanted)

        assert refused.value.error_code == "bad_request"
        assert refused.value.param == "options.chunking.list_path"

    def test_has_to_be_named_where_there_are_several(self) -> None:
        two = {"properties": {"a": {"type": "array"}, "b": {"type": "array"}}}

        with pytest.raises(Invalid, match="/a, /b"):
            find_list(two, None)
        with pytest.raises(Invalid, match="none"):
            find_list({"type": "object"}, None)


class TestOneChunk:
    def test_need_not_say_all_that_the_document_has_to(self) -> None:
        judge = JsonSchema(relaxed(INVOICE, "/lines"))

        assert not judge.faults({"lines": []})
        assert not judge.faults({"number": None, "kind": None, "seller": None, "lines": []})
        line = {"text": "a", "amount": 1}
        assert not judge.faults({"seller": {"name": "A"}, "lines": [line, line]})

    def test_is_judged_by_the_same_rules_in_what_it_says(self) -> None:
        judge = JsonSchema(relaxed(INVOICE, "/lines"))

        assert [fault.keyword for fault in judge.faults({"lines": [{"text": "a"}]})] == ["required"]
        assert judge.faults({"lines": [], "kind": "letter"})
        assert judge.faults({"lines": [], "seller": {}})
        assert judge.faults({})

    def test_has_the_parents_of_its_list(self) -> None:
        inner = {**INVOICE, "$defs": {}, "properties": {"lines": INVOICE["properties"]["lines"]}}
        schema = {
            "$ref": "#/$defs/root",
            "$defs": {
                "root": {
                    "type": "object",
                    "properties": {
                        "id": {"type": "integer"},
                        "doc": {"oneOf": [inner, {"type": "null"}]},
                    },
                    "required": ["id"],
                    "if": {"required": ["id"]},
                    "then": {"required": ["more"]},
                }
            },
        }

        judge = JsonSchema(relaxed(schema, "/doc/lines"))

        assert not judge.faults({"doc": {"lines": []}})
        assert not judge.faults({"doc": None})
        assert judge.faults({"id": 1})
        assert judge.faults({"doc": {}})
        assert judge.faults({"doc": {"lines": [1]}})

    def test_leaves_the_callers_schema_as_it_was(self) -> None:
        before = repr(INVOICE)

        relaxed(INVOICE, "/lines")

        assert repr(INVOICE) == before

    def test_references_into_what_was_relaxed_still_hold(self) -> None:
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {
                "buyer": {"type": "object", "properties": {"name": {"type": "string"}}},
                "rows": {"type": "array", "items": {"$ref": "#/properties/buyer/properties/name"}},
            },
            "required": ["buyer"],
        }

        judge = JsonSchema(relaxed(schema, "/rows"))

        assert not judge.faults({"rows": ["a"]})
        assert judge.faults({"rows": [None]})

    def test_of_a_document_that_is_a_list_is_a_list_of_any_length(self) -> None:
        judge = JsonSchema(relaxed({"type": "array", "items": LINE, "minItems": 2}, ""))

        assert not judge.faults([])
        assert judge.faults([{}])


ONE, TWO, THREE = Chunk(0, 0, 100), Chunk(1, 80, 180), Chunk(2, 160, 260)


def part(
    chunk: Chunk, *lines: Any, spans: list[tuple[int, int]] | None = None, **more: Any
) -> Part:
    """`spans`: where the text says each line."""
    evidence = [
        Evidence(path=f"/lines/{index}/text", start=start, end=end, quote="", match="exact")
        for index, (start, end) in enumerate(spans or [])
    ]
    status: Any = {each.path: "grounded" for each in evidence}
    return Part(chunk, {"lines": [{"text": each} for each in lines]}, evidence, status)


def texts(merged: Any) -> list[Any]:
    return [line["text"] for line in merged.data["lines"]]


class TestMerging:
    def test_keeps_the_order_of_the_text(self) -> None:
        merged = merge([part(TWO, "c"), part(ONE, "a", "b")], "/lines", "none")

        assert texts(merged) == ["a", "b", "c"]

    def test_what_two_chunks_say_of_the_text_that_they_share_is_said_once(self) -> None:
        one = part(ONE, "a", "b", spans=[(10, 12), (85, 90)])
        two = part(TWO, "b", "c", spans=[(85, 90), (150, 155)])

        merged = merge([one, two], "/lines", "by_span")

        assert texts(merged) == ["a", "b", "c"]
        assert [(each.path, each.start) for each in merged.evidence] == [
            ("/lines/0/text", 10),
            ("/lines/1/text", 85),
            ("/lines/2/text", 150),
        ]
        assert list(merged.status) == ["/lines/0/text", "/lines/1/text", "/lines/2/text"]

    def test_the_same_words_elsewhere_are_another_element(self) -> None:
        one = part(ONE, "b", "b", spans=[(10, 12), (85, 87)])
        two = part(TWO, "b", "b", "b", spans=[(85, 87), (90, 92), (150, 152)])

        assert texts(merge([one, two], "/lines", "by_span")) == ["b"] * 4

    def test_a_heading_that_both_quote_makes_no_repeat(self) -> None:
        one = part(ONE, "b", spans=[(82, 84)])
        two = part(TWO, "b", spans=[(120, 122)])

        assert texts(merge([one, two], "/lines", "by_span")) == ["b", "b"]

    def test_without_evidence_the_end_of_one_is_the_start_of_the_next(self) -> None:
        one, two, three = part(ONE, "a", "b", "c"), part(TWO, "b", "c", "d"), part(THREE, "d", "a")

        merged = merge([one, two, three], "/lines", "by_span")

        assert texts(merged) == ["a", "b", "c", "d", "a"]

    def test_without_evidence_no_more_is_shared_than_finds_room(self) -> None:
        long = "x" * 15  # of which 20 characters hold one

        merged = merge([part(ONE, long, long), part(TWO, long, long)], "/lines", "by_span")

        assert len(texts(merged)) == 3

    def test_without_evidence_the_text_knows_how_often_it_is_said(self) -> None:
        text = "Tea\n" * 65  # twenty-five lines a chunk, five of them shared
        one, two, three = (part(chunk, *["Tea"] * 25) for chunk in (ONE, TWO, THREE))

        merged = merge([one, two, three], "/lines", "by_span", text)

        assert len(texts(merged)) == 65

    def test_without_evidence_what_the_shared_text_does_not_say_is_no_repeat(self) -> None:
        before, shared, behind = "Water Tea".ljust(80), "Milk".ljust(20), "Tea Coffee".ljust(80)
        text = before + shared + behind

        def lines(*given: tuple[Any, Any]) -> list[Any]:
            one, two = (part(chunk, *each) for chunk, each in zip((ONE, TWO), given, strict=True))
            return texts(merge([one, two], "/lines", "by_span", text))

        assert lines(("Water", "Tea"), ("Tea", "Coffee")) == ["Water", "Tea", "Tea", "Coffee"]
        assert lines(("Tea", "Milk"), ("Milk", "Tea")) == ["Tea", "Milk", "Tea"]
        assert lines(("Tea", "milk"), ("milk", "Tea")) == ["Tea", "milk", "milk", "Tea"]
        assert lines(("Tea", None), (None, "Tea")) == ["Tea", None, None, "Tea"]

    def test_without_evidence_a_value_in_other_words_hides_no_repeat(self) -> None:
        text = "Water".ljust(80) + "5 July 2024: Milk".ljust(20) + "Tea".ljust(80)
        milk = {"date": "2024-07-05", "name": "Milk"}
        one, two = Part(ONE, [milk]), Part(TWO, [milk, {"name": "Tea"}])

        assert len(merge([one, two], "", "by_span", text).data) == 2

    def test_evidence_on_one_side_alone_is_heard(self) -> None:
        without = part(TWO, "b", "c")
        shared, before = (part(ONE, "a", "b", spans=[(10, 12), b]) for b in [(85, 87), (20, 22)])

        assert texts(merge([shared, without], "/lines", "by_span")) == ["a", "b", "c"]
        assert texts(merge([before, without], "/lines", "by_span")) == ["a", "b", "b", "c"]

    def test_chunks_that_share_no_text_share_no_elements(self) -> None:
        lost_between = [part(ONE, "a"), part(THREE, "a")]
        without_overlap = [part(ONE, "a"), part(Chunk(1, 100, 200), "a")]

        assert texts(merge(lost_between, "/lines", "by_span")) == ["a", "a"]
        assert texts(merge(without_overlap, "/lines", "by_span")) == ["a", "a"]

    def test_by_value_equal_elements_are_one_wherever_they_stand(self) -> None:
        values = [1, True, "1", {"a": 1.0, "b": [2]}, {"b": [2.0], "a": 1}, 1.0]
        parts = [Part(ONE, values), Part(THREE, ["1", False])]

        assert merge(parts, "", "by_value").data == [1, True, "1", {"a": 1.0, "b": [2]}, False]

    def test_else_the_first_value_that_says_something_is_taken_with_its_evidence(self) -> None:
        text = "No 7 of A, B and C"
        one = Part(
            ONE,
            {"number": None, "seller": {"name": "A"}, "tags": [], "lines": []},
            [at(text, "A", "/seller/name")],
            {"/seller/name": "grounded"},
        )
        two = Part(
            TWO,
            {"number": "7", "seller": {"name": "B", "city": "C"}, "tags": ["x"], "paid": False},
            [
                at(text, "7", "/number"),
                at(text, "B", "/seller/name"),
                at(text, "C", "/seller/city"),
                at(text, "N", "/tags/0"),
            ],
            {"/seller/name": "ungrounded", "/seller/city": "grounded"},
        )
        three = Part(THREE, {"tags": ["y"], "lines": None}, [at(text, "o", "/tags/0")])

        merged = merge([one, two, three], "/lines", "by_span")

        assert merged.data == {
            "number": "7",
            "seller": {"name": "A", "city": "C"},
            "tags": ["x"],
            "lines": [],
            "paid": False,
        }
        assert [(each.path, each.quote) for each in merged.evidence] == [
            ("/seller/name", "A"),
            ("/number", "7"),
            ("/seller/city", "C"),
            ("/tags/0", "N"),
        ]
        assert merged.status == {"/seller/name": "grounded", "/seller/city": "grounded"}

    def test_evidence_follows_the_elements_of_a_root_list(self) -> None:
        text = "a b"
        one = Part(ONE, ["a"], [at(text, "a", "/0")])
        two = Part(TWO, ["b"], [at(text, "b", "/0")])

        assert [each.path for each in merge([one, two], "", "none").evidence] == ["/0", "/1"]

    @pytest.mark.parametrize("seed", range(100))
    def test_a_cut_text_gives_the_lines_that_it_has(self, seed: int) -> None:
        dice = random.Random(seed)
        said = [
            f"{dice.choice(['Tea', 'Coffee', 'Water'])} {dice.randint(1, 2)}" for _ in range(200)
        ]
        text = "".join(f"{line} EUR\n" for line in said)

        def read(chunk: Chunk, quoting: bool) -> Part:
            inside = text[chunk.start : chunk.end]
            found = list(re.finditer(r"^(.+) EUR$", inside, re.MULTILINE))
            spans = [(chunk.start + each.start(1), chunk.start + each.end(1)) for each in found]
            return part(chunk, *(each[1] for each in found), spans=spans if quoting else None)

        chunks = cut(text, 300, dice.choice([0, 60, 150]))

        for quoting in (True, False):
            merged = merge([read(chunk, quoting) for chunk in chunks], "/lines", "by_span", text)
            assert texts(merged) == said
            assert all(
                text[each.start : each.end] == texts(merged)[int(each.path.split("/")[2])]
                for each in merged.evidence
            )

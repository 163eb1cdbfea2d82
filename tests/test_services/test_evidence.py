"""Every span is true, every grounded value is in its quote, and nothing similar will do."""

import random
import time
import unicodedata
from decimal import Decimal
from typing import Any

import pytest

from app.services.evidence import Grounding, asked, ground, nulled
from app.services.json_schema import JsonSchema

TEXT = (
    "Invoice 0012 of 5 March 2026 — Café Zürich 🧾\r\n"
    "Widget   blue  3 pcs  1.234,50 EUR\r\n"
    "Widget red  1 pc  -5,00 EUR\r\n"
    "Big 9007199254740993, discount 12 %, paid by Anna"
)
NFC, NFD = unicodedata.normalize("NFC", "Café Zürich"), unicodedata.normalize("NFD", "Café Zürich")


def claim(path: str, quote: str) -> dict[str, str]:
    return {"path": path, "quote": quote}


def judge(value: Any, quote: str, text: str = TEXT, schema: Any = None) -> Grounding:
    """A document that is one value, with one quote."""
    return ground(value, [claim("", quote)], text, schema, required=True)


def codes(grounding: Grounding) -> list[tuple[str, str]]:
    return [(fault.pointer, fault.keyword) for fault in grounding.faults]


@pytest.mark.parametrize(
    ("value", "quote"),
    [
        ("0012", "Invoice 0012"),
        ("Café Zürich", "Café Zürich"),
        ("Café Zürich 🧾", "Café Zürich 🧾\r\nWidget"),
        ("Widget blue", "Widget   blue"),
        ("2026-03-05", "5 March 2026"),
        ("2026-03-05T00:00:00Z", "5 March 2026"),
        (Decimal("1234.50"), "1.234,50"),
        (1234.5, "1.234,50"),
        (3, "3 pcs"),
        (-5, "-5,00 EUR"),
        (9007199254740993, "Big 9007199254740993"),
        (12, "discount 12 %"),
        (0.12, "discount 12 %"),
        (Decimal("0.12"), "12 %"),
        ("Anna", "paid by Anna"),
        ("EUR", "1.234,50 EUR"),
    ],
)
def test_a_value_that_its_quote_states_is_grounded(value: Any, quote: str) -> None:
    grounding = judge(value, quote)

    assert grounding.status == {"": "grounded"} and grounding.faults == []
    [evidence] = grounding.evidence
    assert TEXT[evidence.start : evidence.end] == evidence.quote == quote
    assert evidence.match == "exact"


@pytest.mark.parametrize(
    ("value", "quote"),
    [
        ("12", "Invoice 00"),
        ("Ann", "paid by Anna"),
        ("anna", "paid by Anna"),
        ("Cafe", "Café Zürich"),
        ("2026-03-06", "5 March 2026"),
        ("2026-03-05T14:30:00Z", "5 March 2026"),
        ("2026-13-45", "5 March 2026"),
        ("1234.51", "1.234,50 EUR"),
        (234, "1.234,50 EUR"),
        (1, "1.234,50 EUR"),
        (5, "-5,00 EUR"),
        (9007199254740992, "Big 9007199254740993"),
        (9007199254740993.0, "Big 900719925474099"),
        (1234, "1.234"),  # the text says 1.234,50
        (150, "Invoice 00"),
        (-5, "5,00 EUR"),
        (" ", "Anna"),
        ("1234.50", "1.234,50 EUR"),
    ],
)
def test_a_value_that_its_quote_does_not_state_is_not(value: Any, quote: str) -> None:
    grounding = judge(value, quote)

    assert grounding.status == {"": "ungrounded"} and grounding.evidence == []
    assert codes(grounding) == [("", "value_not_in_quote")]


@pytest.mark.parametrize(
    ("value", "quote"),
    [
        ("123", "Customer 00123"),
        ("1.10", "version 1.1"),
        ("-12", "note (12)"),
        ("0.05", "5%"),
        (123, "Customer 00123"),
        (Decimal("7.5"), "Customer 007.5"),
    ],
)
def test_texts_are_compared_as_texts_and_padded_digits_are_no_number(
    value: Any, quote: str
) -> None:
    kind = {"type": "string" if isinstance(value, str) else "number"}

    assert codes(judge(value, quote, quote, kind)) == [("", "value_not_in_quote")]
    assert codes(judge(value, quote, quote)) == [("", "value_not_in_quote")]


@pytest.mark.parametrize("value", ["1234.50", "1234.5"])
def test_a_text_that_is_a_number_is_compared_by_value_where_a_number_may_stand(value: str) -> None:
    amount = {"anyOf": [{"type": "number"}, {"type": "string", "pattern": "^[0-9.]+$"}]}

    assert judge(value, "1.234,50 EUR", schema=amount).status == {"": "grounded"}
    assert judge(value, "1.234,50 EUR", schema={"type": "string"}).status == {"": "ungrounded"}


def test_an_empty_text_needs_no_quote() -> None:
    grounding = ground({"note": "", "name": None}, [], TEXT, None, required=True)

    assert (grounding.status, grounding.faults) == ({}, [])


@pytest.mark.parametrize(
    "quote", ["Cafe Zürich", "cafÉ zürich", "Café  Zurich", "paid by Ann ", "Widget green", "", " "]
)
def test_a_quote_that_is_not_in_the_text_is_never_moved_to_something_similar(quote: str) -> None:
    grounding = judge("Anna", quote)

    expected = "value_not_in_quote" if quote == "paid by Ann " else "quote_not_in_source"
    assert codes(grounding) == [("", expected)]
    assert grounding.evidence == []


@pytest.mark.parametrize(
    ("text", "quote", "found"),
    [
        ("one\r\n  two three", "one two", "one\r\n  two"),
        ("one two", " one\ntwo ", "one two"),
        ("one\xa0two", "one two", "one\xa0two"),
        (f"x {NFD} y", NFC, NFD),
        (f"x {NFC} y", NFD, NFC),
        (f"🧾🧾 {NFD}\n\n🧾 end", f"{NFC} 🧾", f"{NFD}\n\n🧾"),
        (
            unicodedata.normalize("NFD", "앞 한국어 뒤"),
            "한국어",
            unicodedata.normalize("NFD", "한국어"),
        ),
        ("5 \u212b wide", "5 \u00c5", "5 \u212b"),
    ],
)
def test_white_space_and_composition_may_differ(text: str, quote: str, found: str) -> None:
    grounding = judge(found, quote, text)

    [evidence] = grounding.evidence
    assert evidence.quote == found == text[evidence.start : evidence.end]
    assert evidence.match == "normalized"


def test_a_normalized_quote_cuts_no_composed_character() -> None:
    assert codes(judge("x", "\u1eb9", "e\u0323\u0301")) == [("", "quote_not_in_source")]


def test_a_quote_that_cuts_a_number_of_the_text_does_not_make_it_another_number() -> None:
    assert codes(judge(15, "Total 15", "Total 150")) == [("", "value_not_in_quote")]
    assert codes(judge("2026-03-05", "5 March 2026", "15 March 2026")) == [
        ("", "value_not_in_quote")
    ]
    assert codes(judge(5, "5", "-5")) == [("", "value_not_in_quote")]


def test_a_quote_is_found_where_it_stands_whole() -> None:
    [evidence] = judge(5, "5", "15, 51, 5").evidence

    assert evidence.start == 8


@pytest.mark.parametrize(
    ("text", "value"),
    [("田中様は東京都", "東京"), ("ฉันอยู่กรุงเทพมหานคร", "กรุงเทพ"), ("서울에서", "서울")],
)
def test_scripts_without_spaces_have_no_words_to_cut(text: str, value: str) -> None:
    assert judge(value, text, text).status == {"": "grounded"}


def test_repeated_quotes_are_located_in_the_order_of_the_document() -> None:
    text = "a; 🧾 Widget; Widget; Widget"
    data = {"lines": [{"name": "Widget"}, {"name": "Widget"}, {"name": "Widget"}]}
    claims = [claim(f"/lines/{index}/name", "Widget") for index in (2, 0, 1)]

    evidence = ground(data, claims, text, None, required=True).evidence

    assert [(each.path, each.start) for each in evidence] == [
        ("/lines/0/name", 5),
        ("/lines/1/name", 13),
        ("/lines/2/name", 21),
    ]


def test_when_there_are_fewer_places_than_paths_the_last_is_used_again() -> None:
    claims = [claim(f"/{index}", "aa") for index in range(3)]

    evidence = ground(["aa"] * 3, claims, "aaaa aa", None, required=True).evidence
    overlapping = ground(["aa"] * 3, claims, "aaaa", None, required=True).evidence

    assert [each.start for each in evidence] == [5, 5, 5]
    assert [each.start for each in overlapping] == [0, 2, 2]


def test_repeats_that_differ_in_white_space_alone_are_repeats() -> None:
    claims = [claim(f"/{index}", "blue box") for index in range(2)]

    evidence = ground(["blue box"] * 2, claims, "blue\nbox, blue box", None, required=True).evidence

    assert [(each.start, each.match) for each in evidence] == [(0, "normalized"), (10, "exact")]


def test_the_values_of_one_item_share_their_row() -> None:
    data = [{"name": "Nut", "qty": 2}, {"name": "Nut", "qty": 2}]
    claims = [claim(f"/{index}/{key}", "Nut x 2") for index in range(2) for key in ("name", "qty")]

    evidence = ground(data, claims, "Nut x 2\nNut x 2", None, required=True).evidence

    assert [each.start for each in evidence] == [0, 0, 8, 8]


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"enum": ["unpaid", "paid"]}, "unpaid"),
        ({"const": 7}, 7),
        ({"const": 0.1}, Decimal("0.1")),
        ({"type": "boolean"}, False),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"enum": ["unpaid"]}]}}}, "unpaid"),
        ({"anyOf": [{"type": "null"}, {"oneOf": [{"const": "unpaid"}]}]}, "unpaid"),
        (True, True),
        ({"$ref": "#a", "$defs": {"a": {"$anchor": "a", "enum": ["unpaid"]}}}, "unpaid"),
        ({"$dynamicRef": "#a", "$defs": {"a": {"$dynamicAnchor": "a", "const": 7}}}, 7),
    ],
)
def test_the_words_of_the_schema_need_a_true_quote_alone(schema: Any, value: Any) -> None:
    held = {"type": "array", "items": {"properties": {"a/b": schema}}}
    if isinstance(schema, dict) and "$defs" in schema:
        held["$defs"] = schema["$defs"]
    path = "/0/a~1b"

    told = ground([{"a/b": value}], [claim(path, "paid by Anna")], TEXT, held, required=True)
    untold = ground([{"a/b": value}], [claim(path, "paid by Bob")], TEXT, held, required=True)

    assert told.status == {path: "grounded"} and not told.faults
    assert codes(untold) == [(path, "quote_not_in_source")]


@pytest.mark.parametrize(
    "schema",
    [
        None,
        {"type": "string"},
        {"enum": ["other"]},
        {"enum": [True]},
        {"$ref": "#/x/9"},
    ],
)
def test_any_other_value_has_to_be_in_its_quote(schema: Any) -> None:
    assert codes(judge("unpaid", "paid by Anna", schema=schema)) == [("", "value_not_in_quote")]


@pytest.mark.parametrize(
    ("schema", "is_own"),
    [
        ({"prefixItems": [{}, {"const": "x"}]}, True),
        ({"prefixItems": [{"const": "x"}], "items": {"const": "x"}}, True),
        ({"items": [{}, {"const": "x"}]}, True),
        ({"items": [{}], "additionalItems": {"const": "x"}}, True),
        ({"prefixItems": [{"const": "x"}]}, False),
    ],
)
def test_items_are_judged_by_their_own_schema(schema: Any, is_own: bool) -> None:
    grounding = ground(["Anna", "x"], [claim("/1", "Anna")], TEXT, schema, required=False)

    assert (grounding.status["/1"] == "grounded") is is_own


def test_every_value_but_null_has_a_status_and_required_ones_need_a_quote() -> None:
    data = {"name": "Anna", "none": None, "list": [], "deep": [{"n": 3}, True]}
    claims = [claim("/name", "by Anna")]

    required = ground(data, claims, TEXT, None, required=True)
    optional = ground(data, claims, TEXT, None, required=False)

    assert required.status == optional.status
    assert required.status == {
        "/name": "grounded",
        "/deep/0/n": "ungrounded",
        "/deep/1": "ungrounded",
    }
    assert codes(required) == [("/deep/0/n", "quote_missing"), ("/deep/1", "quote_missing")]
    assert optional.faults == []


def test_one_true_claim_is_enough() -> None:
    claims = [claim("/n", "Bob"), claim("/n", "Widget"), claim("/n", "by Anna")]

    grounding = ground({"n": "Anna"}, claims, TEXT, None, required=True)

    assert grounding.status == {"/n": "grounded"} and grounding.faults == []
    assert [each.quote for each in grounding.evidence] == ["by Anna"]


def test_a_true_quote_of_an_object_is_kept_and_grounds_nothing() -> None:
    data = {"who": {"name": "Anna"}}

    grounding = ground(data, [claim("/who", "paid by Anna")], TEXT, None, required=True)

    assert [each.path for each in grounding.evidence] == ["/who"]
    assert codes(grounding) == [("/who/name", "quote_missing")]


@pytest.mark.parametrize("path", ["/who/name", "/data/who/name", "#/who/name", "#/data/who/name"])
def test_paths_may_start_at_the_whole_answer(path: str) -> None:
    grounding = ground({"who": {"name": "Anna"}}, [claim(path, "Anna")], TEXT, None, required=True)

    assert grounding.status == {"/who/name": "grounded"}


def test_a_path_that_names_nothing_is_told_where_it_leaves_a_value_without_a_quote() -> None:
    data = {"name": "Anna"}
    named, unnamed = claim("/name", "by Anna"), claim("/nome", "by Anna")

    assert codes(ground(data, [unnamed], TEXT, None, required=True)) == [
        ("/nome", "path_unknown"),
        ("/name", "quote_missing"),
    ]
    assert ground(data, [named, unnamed], TEXT, None, required=True).faults == []
    assert ground(data, [unnamed], TEXT, None, required=False).faults == []
    assert codes(ground(data, [named, claim("/nome", "Bob")], TEXT, None, required=True)) == [
        ("/nome", "quote_not_in_source")
    ]


@pytest.mark.parametrize(
    "claims",
    [None, "quote", {}, 5, [None], ["Anna"], [{}], [{"path": 0, "quote": "Anna"}], [{"path": ""}]],
)
def test_claims_of_another_shape_are_a_fault_of_the_answer(claims: Any) -> None:
    assert ("", "invalid_evidence") in codes(ground("x", claims, TEXT, None, required=False))


def test_messages_are_short() -> None:
    [fault] = judge("v" * 10_000, "q" * 10_000).faults

    assert fault.keyword == "quote_not_in_source" and len(fault.message) < 300


ALPHABET = [
    "a",
    "b",
    "ß",
    "é",
    "e\u0301",
    "🧾",
    "👩🏽‍🚀",
    "\U0001d7d8",
    "한",
    "日",
    " ",
    "\r\n",
    "1",
    "٣",
    ".",
]


FORMS = [str, lambda text: unicodedata.normalize("NFC", text)]


@pytest.mark.parametrize("seed", range(50))
def test_any_span_of_any_text_is_found_and_every_span_is_true(seed: int) -> None:
    chance = random.Random(seed)
    text = "".join(chance.choices(ALPHABET, k=200))
    quotes = [text[start : start + 12] for start in chance.choices(range(180), k=20)]
    said = [chance.choice(FORMS)(quote) for quote in quotes]
    claims = [claim(f"/{index}", quote) for index, quote in enumerate(said)]

    grounding = ground(quotes, claims, text, None, required=True)

    for evidence in grounding.evidence:
        assert text[evidence.start : evidence.end] == evidence.quote
        said_here = said[int(evidence.path[1:])]
        assert (evidence.match == "exact") == (said_here == evidence.quote)
    exact = {f"/{i}" for i, quote in enumerate(quotes) if quote == said[i] and quote.strip()}
    assert exact <= {each.path for each in grounding.evidence}


@pytest.mark.parametrize("seed", range(50))
def test_a_quote_with_one_letter_altered_is_never_grounded(seed: int) -> None:
    chance = random.Random(seed)
    text = "".join(chance.choices(ALPHABET, k=300))
    start = chance.randrange(250)
    quote = text[start : start + 20]
    place = chance.randrange(len(quote))
    altered = quote[:place] + "Q" + quote[place + 1 :]

    grounding = judge(quote, altered, text)

    assert grounding.status == {"": "ungrounded"}
    assert codes(grounding) == [("", "quote_not_in_source")]


def test_a_thousand_quotes_in_a_megabyte_take_less_than_some_seconds() -> None:
    chance = random.Random(1)
    text = " ".join(f"{chance.getrandbits(40):010x}" for _ in range(95_000))
    starts = [chance.randrange(90_000) * 11 for _ in range(1000)]
    words = [text[start : start + 10] for start in starts]
    claims = [claim(f"/{i}", text[start : start + 43]) for i, start in enumerate(starts)]
    begun = time.perf_counter()

    grounding = ground([f"w{word}" for word in words], claims, text, None, required=True)

    assert time.perf_counter() - begun < 5
    assert {fault.keyword for fault in grounding.faults} == {"value_not_in_quote"}


@pytest.mark.parametrize(
    "schema",
    [
        {"patternProperties": {"^s": {"enum": ["unpaid"]}}},
        {"dependentSchemas": {"x": {"properties": {"state": {"const": "unpaid"}}}}},
    ],
)
def test_the_words_of_a_property_may_be_said_elsewhere(schema: Any) -> None:
    grounding = ground({"state": "unpaid"}, [claim("/state", "Anna")], TEXT, schema, required=True)

    assert grounding.status == {"/state": "grounded"}


def test_quotes_without_end_are_not_all_looked_for() -> None:
    text = "1 3 " * 100_000
    data = {f"k{n}": 5 for n in range(300)}
    claims = [claim(f"/k{n}", "1 3 " * (5000 + n)) for n in range(300)]
    begun = time.perf_counter()

    grounding = ground(data, claims, text, None, required=True)
    again = ground(
        {"k": 5}, [claim("/k", "1 3 " * n) for n in range(1, 3000)], text, None, required=True
    )

    assert time.perf_counter() - begun < 10
    assert {each.keyword for each in grounding.faults} == {
        "value_not_in_quote",
        "too_much_evidence",
    }
    assert len(again.faults) == 8


def test_a_run_of_marks_takes_no_longer_than_its_length() -> None:
    text = "a" + "\u0301\u0316" * 200_000
    begun = time.perf_counter()

    judge("x", "not there", text)

    assert time.perf_counter() - begun < 5


def test_what_the_model_is_shown_is_a_schema_of_document_and_quotes() -> None:
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://example.com/a",
        "$defs": {"n": {"type": "integer"}},
        "type": "object",
        "properties": {"n": {"$ref": "#/$defs/n"}},
    }

    shown = JsonSchema(asked(schema))

    assert shown.faults({"data": {"n": 1}, "evidence": [claim("/n", "1")]}) == []
    assert [each.pointer for each in shown.faults({"data": {"n": "1"}, "evidence": []})] == [
        "/data/n"
    ]
    assert shown.faults({"data": {"n": 1}}) != []
    assert shown.faults({"data": {"n": 1}, "evidence": [{"path": "/n"}]}) != []


def test_null_is_put_in_a_copy() -> None:
    data = {"a": [1, {"b/c": "x"}], "d": "y"}

    assert nulled(data, ["/a/1/b~1c", "/d", "/nowhere"]) == {"a": [1, {"b/c": None}], "d": None}
    assert nulled(data, [""]) is None
    assert data == {"a": [1, {"b/c": "x"}], "d": "y"}

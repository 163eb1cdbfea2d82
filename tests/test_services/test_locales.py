"""Numbers, dates and times are read by value, whatever the locale they are written in."""

import time as clock
from datetime import date, time
from decimal import Decimal

import pytest

from app.services.locales import dates, numbers, times

FIFTH_OF_MARCH = date(2026, 3, 5)


@pytest.mark.parametrize(
    "text",
    [
        "1234.56",
        "1,234.56",
        "1.234,56",
        "1 234,56",
        "1\xa0234,56",
        "1\u202f234,56",
        "1'234.56",
        "1’234.56",
        "١٬٢٣٤٫٥٦",
        "१,२३४.५६",
        "１，２３４．５６",
        "€1,234.56",
        "1.234,56€",
        "EUR1.234,56",
        "1.23456e3",
        "+1,234.56",
        "a total of 1,234.56.",
    ],
)
def test_a_number_is_read_in_any_locale(text: str) -> None:
    assert Decimal("1234.56") in numbers(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12,34,567", "1234567"),
        ("1.234.567", "1234567"),
        ("12 345 678", "12345678"),
        ("0,5", "0.5"),
        (".5", "0.5"),
        ("-5", "-5"),
        ("−5", "-5"),
        ("- 5", "-5"),
        ("-$5.00", "-5"),
        ("$-5.00", "-5"),
        ("-EUR 5", "-5"),
        ("(1,234.50)", "-1234.5"),
        ("($5)", "-5"),
        ("1.234,50-", "-1234.5"),
        ("five (5) days", "5"),
        ("2020-5", "5"),
        ("5-10 EUR", "10"),
        ("A-5", "5"),
        ("12%", "12"),
        ("12 %", "0.12"),
        ("%12", "0.12"),
        ("12,5%", "0.125"),
        ("5,-", "5"),
        ("5.", "5"),
        ("5kg", "5"),
        ("12.05.2026", "2026"),
        ("10:30", "30"),
        ("1.2.3", "2"),
        ("Anna,5,10", "5"),
        ("[5,10]", "10"),
        ("Widget 3 450 EUR", "450"),
        ("900719925474099312345", "900719925474099312345"),
        ("0.1000000000000000055511151231257827", "0.1000000000000000055511151231257827"),
    ],
)
def test_a_number_is_read_where_it_stands(text: str, value: str) -> None:
    assert Decimal(value) in numbers(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("15", "5"),
        ("51", "5"),
        ("5.5", "5"),
        ("5,5", "5"),
        (".5", "5"),
        ("-5", "5"),
        ("−5", "5"),
        ("-$5", "5"),
        ("2020-5", "-5"),
        ("5%-10%", "-10"),
        ("1 005", "5"),
        ("1 000", "1"),
        ("1'234", "234"),
        ("1.234,56", "56"),
        ("1e3", "1"),
        ("9007199254740993", "9007199254740992"),
        ("0.1", "0.10000000000000001"),
        ("no number", "0"),
        ("", "0"),
    ],
)
def test_a_part_of_a_number_is_none(text: str, value: str) -> None:
    assert Decimal(value) not in numbers(text)


def test_a_number_that_a_span_cuts_is_read_whole() -> None:
    text = "From -15 to 1.250,00 EUR"

    assert numbers(text, 6, 7) == {Decimal(-15)}
    assert Decimal(250) not in numbers(text, text.index("250"), text.index("250") + 3)
    assert numbers(text, 0, 5) == set()


@pytest.mark.parametrize(
    "text",
    [
        "2026-03-05",
        "2026/3/5",
        "2026.03.05",
        "20260305",
        "5.3.2026",
        "05. 03. 2026",
        "03/05/2026",
        "05-03-26",
        "05 03 2026",
        "5 March 2026",
        "March 5, 2026",
        "Thursday, March 5th, 2026",
        "5th of March, 2026",
        "5 Mar '26",
        "05-MAR-2026",
        "1.3. to 5. März 2026",
        "5 mars 2026",
        "5 de marzo de 2026",
        "5 de març del 2026",
        "5 de março de 2026",
        "5 maart 2026",
        "5. maaliskuuta 2026",
        "5 marca 2026 r.",
        "5. března 2026",
        "5 ožujka 2026.",
        "5. mart 2026.",
        "5 марта 2026 г.",
        "5 березня 2026 р.",
        "5 Μαρτίου 2026",
        "2026. március 5.",
        "2026 m. kovo 5 d.",
        "2026. gada 5. marts",
        "5 Mart 2026",
        "ngày 5 tháng 3 năm 2026",
        "5 במרץ 2026",
        "٥ مارس ٢٠٢٦",
        "५ मार्च २०२६",
        "5 มีนาคม 2569",
        "2026年3月5日",
        "２０２６年３月５日（木）",
        "契約日は令和8年3月5日",
        "2026년 3월 5일",
        "2026-03-05T14:30:00Z",
        "from 01.03.2026-05.03.2026",
    ],
)
def test_a_date_is_read_in_any_locale(text: str) -> None:
    assert FIFTH_OF_MARCH in dates(text)


@pytest.mark.parametrize(
    "text",
    [
        "15 March 2026",
        "5 March",
        "March 2026",
        "5 people in March 2026",
        "2026-03-15",
        "2025-03-05",
        "5 March 2016",
        "3, 5, 2026",
        "05:03:2026",
        "1.05.03.2026",
        "99.99.2026",
        "0000-00-00",
        "",
    ],
)
def test_another_day_is_not_that_day(text: str) -> None:
    assert FIFTH_OF_MARCH not in dates(text)


def test_an_ambiguous_date_is_every_day_it_may_be() -> None:
    assert {date(2026, 3, 5), date(2026, 5, 3)} <= dates("03/05/2026")


def test_a_date_that_a_span_cuts_is_read_whole() -> None:
    assert dates("15 March 2026", 1) == {date(2026, 3, 15)}
    assert dates("5 March 2026", 2) == set()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("at 14:30", time(14, 30)),
        ("14h30", time(14, 30)),
        ("14.30 Uhr", time(14, 30)),
        ("14 Uhr", time(14)),
        ("2:30 pm", time(14, 30)),
        ("2 p.m.", time(14)),
        ("12 am", time(0)),
        ("14時30分", time(14, 30)),
        ("2026-03-05T09:05:07Z", time(9, 5, 7)),
    ],
)
def test_a_time_of_day_is_read_in_many_notations(text: str, expected: time) -> None:
    assert expected in times(text)


def test_what_is_no_time_is_none() -> None:
    assert times("2 apples, 25:00, 14:75") == set()


@pytest.mark.parametrize(
    "part", ["1 234 ", "1.2,3'4_", "9", "1,", "- ", "5 March 2026 ", "(", "$ 5"]
)
def test_a_long_text_takes_no_longer_than_its_length(part: str) -> None:
    text = part * (100_000 // len(part))
    dates("March")  # the names of months are read once
    begun = clock.perf_counter()

    for read in (numbers, dates, times):
        read(text)

    assert clock.perf_counter() - begun < 5


def test_digits_behind_a_zero_are_no_number() -> None:
    assert numbers("Customer 00123, room 07.5") == set()
    assert numbers("0.5 and 0,25") == {Decimal("0.5"), Decimal("0.25")}

"""Reads a text, or the JSON of a tool, as facts: "Total: 12.50 EUR", "2 x Widget 3.50"."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date

from pydantic import JsonValue
from pydantic_core import from_json

LONGEST = 100_000  # characters read of one text
MOST_FACTS = 1_000
DEEPEST = 8  # levels read of one JSON value

Words = frozenset[str]

_GRAMMAR = """
a an the this that these those it its i you he she we they is are was were be am do does did
have has had can could will would should may might must of in on at by for from to with into
about and or but not if then so as what which who whom whose when where why how there here
please hello hi hey thanks thank ok okay yes no just also now today tomorrow get got fetch read
show list give tell let want need like use using s t m re ll ve d
"""
_ARTICLES = "a an the of my your his her their our its s for and in is"
_STOP = frozenset(_GRAMMAR.split())
_FILLER = frozenset(_ARTICLES.split())

# Repetitions below are anchored or bounded, so that any text is read in linear time.
_WORD = re.compile(r"[^\W_]+")
_CAMEL = re.compile(r"(?<=[a-z\d])(?=[A-Z])")

_UPPER = "A-ZÀ-ÖØ-Þ"
_RUN = (
    rf"[{_UPPER}][\w'’&-]{{0,40}}"
    rf"(?: (?:(?:de|da|do|la|le|of|del|am|van|von|der) )?[{_UPPER}][\w'’&-]{{0,40}}){{0,4}}"
)
_QUOTED = r"[\"“„][^\"“”„\n]{1,300}[\"”“]|(?<!\w)['‘][^'‘’\n]{1,300}['’](?!\w)"
_NUMBER = r"(?<![\w.,/-])[-+]?\d{1,15}(?:[.,'’]\d{1,15}){0,5}"
_CODE = (
    "EUR|USD|GBP|JPY|CHF|CAD|AUD|NZD|CNY|INR|SEK|NOK|DKK|PLN|CZK|HUF|RON|BGN|TRY|BRL|MXN|ZAR"
    "|SGD|HKD|KRW|ILS|AED|UAH|THB"
)
_SIGNS: Mapping[str, str] = {"€": "EUR", "$": "USD", "£": "GBP", "¥": "JPY", "₹": "INR"}
_FIGURE = r"[-+]?\d{1,15}(?:[.,'’]\d{1,15}){0,5}"
_AMOUNT = rf"(?:\b(?:{_CODE})|[€$£¥₹]) ?{_FIGURE}|(?<![\w.,/-]){_FIGURE} ?(?:(?:{_CODE})\b|[€$£¥₹])"

QUOTED = re.compile(_QUOTED)
RUN = re.compile(rf"\b{_RUN}")
_RUNS = re.compile(rf"((?:^|[.?!\n])[ \n]{{0,3}})?\b({_RUN})( (?!and\b|or\b)[a-z])?")
NUMBER = re.compile(_NUMBER)
AMOUNT = re.compile(_AMOUNT)
CURRENCY = re.compile(rf"\b(?:{_CODE})\b|[€$£¥₹]")
EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}")
URL = re.compile(r"https?://[^\s<>\"')\]]{1,2000}")
PHONE = re.compile(r"(?<![\w.-])(?:\+|\(?0)\(?\d[\d ()./-]{5,22}\d(?![\w-])")
UUID = re.compile(r"\b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b")

_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_ISO = r"(?<!\d)(?P<y1>\d{4})-(?P<m1>\d{1,2})-(?P<d1>\d{1,2})(?!\d)"
_DATE = re.compile(
    rf"{_ISO}|\b(?P<d2>\d{{1,2}})(?:st|nd|rd|th)?\.? (?P<m2>[A-Za-z]{{3,9}})\.?,? (?P<y2>\d{{4}})\b"
    r"|\b(?P<m3>[A-Za-z]{3,9})\.? (?P<d3>\d{1,2})(?:st|nd|rd|th)?,? (?P<y3>\d{4})\b"
    r"|(?<!\d)(?P<d4>\d{1,2})\.(?P<m4>\d{1,2})\.(?P<y4>\d{4})(?!\d)"
    r"|(?<!\d)(?P<a5>\d{1,2})/(?P<b5>\d{1,2})/(?P<y5>\d{4})(?!\d)"
)
DATETIME = re.compile(
    r"(?<!\d)\d{4}-\d\d-\d\d[T ]\d\d:\d\d(?::\d\d(?:\.\d{1,9})?)?(?:Z|[+-]\d\d:?\d\d)?"
)
TIME = re.compile(r"(?<![\d:])(?:[01]?\d|2[0-3]):[0-5]\d(?::[0-5]\d)?(?![\d:])")

_CLAUSE = re.compile(
    r", {1,3}(?=[\w.+-]{1,64}@|\+\d)"
    r"|;|\||\t|,? and (?=(?:my|his|her|their|the|its) )"
    r"|,\s{1,3}(?=(?:and )?[^\W\d_][\w -]{0,30}(?:[:=]| is ))"
    r"|(?<=[\w)])[.!] (?=[A-Z][\w -]{0,30}(?:[:=]| is ))"
)
_BULLET = re.compile(r"^\s*(?:[-•–+]|\d{1,3}[.)])\s+")
_LABEL = re.compile(r"^\s*([^\W\d_][\w .,'’/()&#-]{0,40}?)\s{0,5}(?::(?!//)|：|=|\s[-–]\s)\s*(.*)$")
_IS = re.compile(
    r"^\s*(?:and |the |my |his |her |its |their )*([^\W\d_][\w-]{0,30}(?: [\w-]{1,30}){0,2}?)"
    r" (?:is|was|are) (.+)$",
    re.IGNORECASE,
)
_MONEY = re.compile(rf"\d ?[x×@]|[x×@] ?\d|[€$£¥₹]|\d[.,]\d|\b(?:{_CODE})\b", re.IGNORECASE)
_PRICE_PIECE = re.compile(rf"[€$£¥₹]?{_FIGURE}[€$£¥₹]?|{_CODE}|[€$£¥₹]|each|at|à|@|[,=-]")
_TIMES = re.compile(r"^(\d{1,6}(?:[.,]\d{1,3})?)\s?(?:[x×@]|pcs?\.?|pieces? of)\s+", re.IGNORECASE)
_LEADING = re.compile(r"^(\d{1,6}(?:[.,]\d{1,3})?)\s+")
_TRAILING = re.compile(r"[\s,]+(?:[x×]\s?(\d{1,6})|(\d{1,6})\s?[x×]|[x×])$", re.IGNORECASE)
_BEFORE = re.compile(
    rf"\b([A-Za-z][\w-]{{0,30}})(?:[ ,:=]{{1,2}}(is|to|of|as|be|from|by|for|in|at|near|with))?"
    rf"[ :=]{{1,2}}({_QUOTED}|{_RUN}|{EMAIL.pattern})"
)
_COUNTED = re.compile(r"\b([A-Za-z][\w-]{1,30}) (?:is |of |to |= ?)?(\d{1,12}(?:\.\d{1,9})?)\b")
_UNITS = re.compile(r"(?<![\w.,-])(\d{1,12}(?:\.\d{1,9})?) ([A-Za-z]{2,30})\b")
_CODED = re.compile(
    r"\b([A-Za-z]{3,20})(?: no\.?| number| nr\.?| is| to| of)? #?"
    r"((?<=#)\d{1,12}|(?=[A-Za-z-]{1,20}\d)[\w-]{2,40})"
)
_PRICED = re.compile(
    rf"\b([^\W\d_][\w-]{{0,30}}(?: [^\W\d_][\w-]{{0,30}}){{0,2}}) (?:of |is |was )?({_AMOUNT})"
)


def stem(word: str) -> str:
    """`word` in lower case without its ending: "cities" -> "city", "named" -> "nam"."""
    word = word.lower()
    if word.endswith("ss"):
        return word
    for ending in ("ies", "ing", "ed", "es", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)] + ("y" if ending == "ies" else "")
    return word


def groups(*lines: str) -> Mapping[str, str]:
    """From each word's stem to the first stem of its line: words that mean the same."""
    return {stem(word): stem(line.split()[0]) for line in lines for word in line.split()}


_SAME = groups(
    "supplier vendor seller merchant issuer",
    "customer client buyer recipient payer",
    "company organization organisation employer firm",
    "total amount sum",
    "quantity qty count units pieces",
    "item product article",
    "price rate cost",
    "location city place town",
    "conditions summary sky outlook",
    "temperature temp",
    "phone telephone mobile tel cell",
    "email mail",
    "date dated issued",
    "number no nr id code reference ref",
    "tax vat",
)


def tokens(text: str) -> list[str]:
    """The words of a text or an identifier, in lower case; "e-mail" is "email"."""
    text = text.replace("e-mail", "email").replace("E-mail", "email").replace("E-Mail", "email")
    return [word.lower() for word in _WORD.findall(_CAMEL.sub(" ", text))]


def words(text: str, same: Mapping[str, str] = _SAME, without: Words = _FILLER) -> Words:
    """What `text` is about: the stems of its words, those that mean the same made one."""
    stems = (stem(word) for word in tokens(text[:LONGEST]) if word not in without)
    return frozenset(same.get(each, each) for each in stems)


def is_stop(word: str) -> bool:
    """Whether `word` says nothing about the subject of a sentence."""
    return re.split("['’]", word.lower())[0] in _STOP


_PLACES: Mapping[str, tuple[Words, ...]] = {
    word: tuple(words(label) for label in labels.split())
    for word, labels in {
        "from": "supplier company origin sender",
        "by": "supplier author",
        "to": "recipient destination receiver",
        "for": "customer location recipient",
        "in": "location",
        "at": "location company",
        "near": "location",
        "about": "subject topic",
        "called": "name",
        "named": "name",
        "with": "participant",
        "am": "name",
    }.items()
}
_QUANTITY, _UNIT, _SUM = words("quantity"), words("unit price"), words("total")
_THING = tuple(words(label) for label in ("description", "item", "name", "title"))
_NOT_A_THING = words("total subtotal tax discount balance due paid")


@dataclass(frozen=True, slots=True)
class Fact:
    """A value, the words it goes by, and those of the section it stands in."""

    labels: tuple[Words, ...]
    value: JsonValue
    section: Words = frozenset()
    weak: bool = False
    """Guessed from a sentence rather than written with a label."""


@dataclass(slots=True)
class Table:
    """Rows of facts under the words of their heading."""

    label: Words
    rows: list[list[Fact]]


@dataclass(slots=True)
class Reading:
    """All that was read: the facts, the tables, and the text itself."""

    facts: list[Fact] = field(default_factory=list[Fact])
    tables: list[Table] = field(default_factory=list[Table])
    text: str = ""

    def then(self, other: "Reading") -> "Reading":
        """Both, this one first."""
        return Reading(
            self.facts + other.facts,
            self.tables + other.tables,
            f"{self.text}\n{other.text}".strip(),
        )


def number(text: str) -> int | float | None:
    """The first number of a text that is not part of a date: "1.234,50 EUR" -> 1234.5."""
    plain = _DATE.sub(" ", text[:1_000])
    match = AMOUNT.search(plain) or NUMBER.search(plain)
    return _figure(match.group()) if match else None


def numbers(text: str) -> list[int | float]:
    """All numbers of a text outside dates and codes, in order."""
    return [_figure(match.group()) for match in NUMBER.finditer(_DATE.sub(" ", text))]


def _figure(text: str) -> int | float:
    digits = re.sub(r"[^\d.,+-]", "", text).strip(".,")
    last = max(digits.rfind(","), digits.rfind("."))
    if last < 0:
        return int(digits)
    mark, tail = digits[last], len(digits) - last - 1
    both = "," in digits and "." in digits
    if both or (digits.count(mark) == 1 and (mark == "." or tail != 3)):
        return float(re.sub("[.,]", "", digits[:last]) + "." + digits[last + 1 :])
    return int(re.sub("[.,]", "", digits))


def dates(text: str) -> Iterator[str]:
    """The dates of a text as YYYY-MM-DD; 3/4/2026, which may be either day, is none."""
    for match in _DATE.finditer(text[:LONGEST]):
        part = {name[0]: value for name, value in match.groupdict().items() if value}
        month = part.get("m", "")
        if "a" in part:
            first, second = int(part["a"]), int(part["b"])
            if first <= 12 and second <= 12:
                continue
            part["d"], month = (part["a"], part["b"]) if first > 12 else (part["b"], part["a"])
        if month.isalpha():
            if month[:3].lower() not in _MONTHS:
                continue
            month = str(_MONTHS.index(month[:3].lower()) + 1)
        try:
            yield date(int(part["y"]), int(month), int(part["d"])).isoformat()
        except ValueError:
            continue


def currency(text: str) -> str | None:
    """ISO code of the first currency named or signed in a text."""
    match = CURRENCY.search(text)
    return _SIGNS.get(match.group(), match.group()) if match else None


def names(text: str, besides: Words = frozenset()) -> list[str]:
    """Quoted texts, else runs of capitalised words, without those that are only grammar."""
    quoted = [match.group()[1:-1].strip() for match in QUOTED.finditer(text)]
    if quoted:
        return quoted
    found: list[str] = []
    verbs: set[str] = set()
    for match in _RUNS.finditer(text):
        run = match[2].split(" ")
        while run and (is_stop(run[0]) or stem(run[0]) in besides):
            run.pop(0)
        name = " ".join(run)
        if name and name not in found:
            found.append(name)
        if match[1] is not None and name == match[2] and " " not in name and match[3]:
            verbs.add(name)
    return [name for name in found if name not in verbs] or found


def read_json(value: JsonValue, section: Words = frozenset(), depth: int = 0) -> Reading:
    """The members of a JSON value as facts, its lists of objects also as tables."""
    reading = Reading()
    if depth > DEEPEST:
        return reading
    if isinstance(value, list):
        rows = [read_json(item, depth=depth + 1).facts for item in value if isinstance(item, dict)]
        reading.tables = [Table(section, rows[:MOST_FACTS])] if rows else []
    if isinstance(value, dict):
        for key, member in value.items():
            label = words(key)
            reading.facts.append(Fact((label,), member, section))
            inner = read_json(member, label, depth + 1)
            reading.facts += inner.facts
            reading.tables += inner.tables
    reading.facts = reading.facts[:MOST_FACTS]
    return reading


def read_result(content: str) -> Reading:
    """What a tool said, as JSON if it is JSON and as text if not."""
    try:
        value: JsonValue = from_json(content, allow_inf_nan=False)
    except ValueError:
        return read_text(content)
    reading = read_json(value)
    if not isinstance(value, dict | list):
        reading.facts.append(Fact((words("response"), words("answer")), value))
    reading.text = content
    return reading


def read_text(text: str) -> Reading:
    """Labelled lines, tables and, weaker, what sentences say by their prepositions."""
    text = text[:LONGEST].replace("\u00a0", " ").replace("−", "-")
    reading = Reading(text=text)
    lines = [re.sub(r"\*\*|__|`|^\s*#+\s", "", line) for line in text.splitlines()]
    for table in _delimited(lines):
        reading.tables.append(table)
    _read_lines(lines, reading)
    blocks = _blocks([fact for fact in reading.facts if not fact.weak])
    if blocks:
        reading.tables.append(Table(frozenset(), blocks))
    reading.facts += _sentences(text[:20_000])
    reading.facts = reading.facts[:MOST_FACTS]
    return reading


def _read_lines(lines: Iterable[str], reading: Reading) -> None:
    section: Words = frozenset()
    bullets: list[JsonValue] = []
    rows: dict[Words, list[list[Fact]]] = {}
    for line in lines:
        if not line.strip():
            section, bullets = frozenset(), []
            continue
        if row := _row(line[:300]):
            rows.setdefault(section, []).append(row)
            continue
        item = _BULLET.sub("", line.strip().strip("|").strip()).replace("*", "")
        clauses = [item.replace(" | ", ": ", 1)] if " | " in item else _CLAUSE.split(item)
        said = [fact for clause in clauses for fact in _said(clause, section)]
        reading.facts += said
        if said and said[-1].value == "":
            section, bullets = said[-1].labels[0], []
            reading.facts[-1] = Fact((section,), bullets)
        elif not said and _BULLET.match(line):
            bullets.append(_clean(item))
        if len(reading.facts) > MOST_FACTS:
            break
    reading.facts = [fact for fact in reading.facts if fact.value != []]
    reading.tables += [Table(label, found) for label, found in rows.items()]


def _said(clause: str, section: Words, depth: int = 0) -> Iterator[Fact]:
    """What "Supplier: ACME" or "the name is Ada" says; of "Invoice: Supplier: ACME", both."""
    if match := _LABEL.match(clause):
        inner = list(_said(match[2], section, depth + 1)) if depth < 3 else []
        nested = any(not fact.weak for fact in inner)
        yield Fact((words(match[1]),), _clean(match[2]), section, weak=nested)
        yield from inner
    elif match := _IS.match(clause):
        yield Fact((words(match[1]),), _clean(match[2]), section, weak=True)


def _clean(value: str) -> str:
    value = value.strip().rstrip(",;|").strip()
    if len(value) > 1 and value[0] in "\"'“‘" and value[-1] in "\"'”’":
        return value[1:-1].strip()
    if value.endswith((".", "!", "?")) and not re.search(r"\b[A-Z][a-z]{0,3}\.$", value):
        value = value.rstrip(".!?")
    return value


def _row(line: str) -> list[Fact]:
    """The facts of a line such as "2 x Widget 3.50" or "- Widget, 2, 3.50"; else none."""
    bullet = _BULLET.match(line)
    rest = line[bullet.end() :] if bullet else line.strip()
    if not _MONEY.search(rest) or "|" in rest or "\t" in rest:
        return []
    rest = re.sub(r"^(\D{2,80}): (?=\d{1,6} ?[x×@])", r"\1 ", rest)
    pieces = re.sub(r" [@=/] |[()]", " ", rest).replace(", ", " , ").split()
    figures: list[int | float] = []
    while pieces and _PRICE_PIECE.fullmatch(pieces[-1]):
        value = number(pieces.pop())
        figures += [] if value is None else [value]
    figures.reverse()
    thing = " ".join(pieces).replace(" ,", ",").strip(" ,:")
    times, first, last = _TIMES.match(thing), _LEADING.match(thing), _TRAILING.search(thing)
    count: int | float | None = None
    if head := times or first:
        count, thing = number(head[1]), thing[head.end() :]
    elif last:
        count, thing = number(last[1] or last[2] or ""), thing[: last.start()]
    if count is None and len(figures) > 1 and isinstance(figures[0], int):
        count = figures.pop(0)
    listed = count is not None or (bullet and ":" not in rest)
    total_line = not times and words(thing) & _NOT_A_THING
    if not figures or not listed or total_line or not re.search(r"[^\W\d_]{2}", thing):
        return []
    count = 1 if count is None else count
    price = figures[0]
    total = figures[-1] if len(figures) > 1 else round(price * count, 2)
    row = [
        Fact(_THING, thing),
        Fact((_QUANTITY,), count),
        Fact((_UNIT,), price),
        Fact((_SUM,), total),
    ]
    code = currency(line)
    return [*row, Fact((words("currency"),), code)] if code else row


def _delimited(lines: list[str]) -> Iterator[Table]:
    """Tables in Markdown or CSV: a heading without digits, then lines with as many cells."""
    heading: list[str] = []
    rows: list[list[Fact]] = []
    for line in [*lines, ""]:
        cells = _cells(line)
        if heading and len(cells) == len(heading):
            if not all(re.fullmatch(r":?-*:?", cell) for cell in cells):
                pairs = zip(heading, cells, strict=True)
                rows.append([Fact(_column(name), _clean(cell)) for name, cell in pairs if cell])
            continue
        if rows:
            yield Table(frozenset(), rows)
        rows = []
        fits = all(cell and len(cell) <= 40 and not re.search(r"[\d:]", cell) for cell in cells)
        heading = cells if fits else []


def _column(heading: str) -> tuple[Words, ...]:
    label = words(heading)
    return _THING[:2] if label in _THING[:2] else (label,)


def _cells(line: str) -> list[str]:
    for mark, least in (("|", 2), ("\t", 2), (";", 3), (",", 3)):
        bare = line.strip().strip("|") if mark == "|" else line
        cells = [cell.strip() for cell in bare.split(mark)]
        if len(cells) >= least:
            return cells
    return []


def _blocks(facts: list[Fact]) -> list[list[Fact]]:
    """Labelled facts cut where a label comes again: one block per thing described."""
    blocks: list[list[Fact]] = []
    seen: set[tuple[Words, ...]] = set()
    for fact in facts:
        if not blocks or fact.labels in seen:
            blocks.append([])
            seen = set()
        seen.add(fact.labels)
        blocks[-1].append(fact)
    return blocks


def _sentences(text: str) -> Iterator[Fact]:
    for match in _PRICED.finditer(text):
        yield Fact((words(match[1]),), match[2], weak=True)
    for match in _BEFORE.finditer(text):
        first, link, value = match[1], match[2] or "", match[3].strip("\"“”„'‘’")
        kept = names(value) if RUN.fullmatch(value) else [value]
        if kept:
            linked = () if is_stop(first) else (words(first),)
            labels = (*linked, *_PLACES.get(first.lower(), ()), *_PLACES.get(link, ()))
            yield Fact(labels, kept[0], weak=True)
    for match in _CODED.finditer(text):
        yield Fact((words(match[1]), words(match[1] + " number")), match[2], weak=True)
    for match in _COUNTED.finditer(text):
        yield Fact((words(match[1]),), match[2], weak=True)
    for match in _UNITS.finditer(text):
        yield Fact((words(match[2]),), match[1], weak=True)

"""Fills a JSON Schema with what was read from a text or from the results of tools."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from pydantic import JsonValue

from app.services.demo_reading import (
    AMOUNT,
    DATETIME,
    EMAIL,
    PHONE,
    TIME,
    URL,
    UUID,
    Fact,
    Reading,
    Table,
    Words,
    currency,
    dates,
    is_stop,
    names,
    number,
    read_json,
    tokens,
    words,
)
from app.services.demo_schemas import (
    MOST_ROWS,
    Schema,
    blank,
    branches,
    elements,
    least,
    limit,
    matches,
    member,
    resolve,
)

DEEPEST = 8  # levels of nested objects filled
EFFORT = 200_000  # labels compared and values made, before the rest is left empty

_NOTHING = {"", "-", "n/a", "none", "null", "nil", "unknown"}
_YES = {"yes", "true", "on", "y", "paid", "active", "enabled"}
_NO = {"no", "false", "off", "n", "unpaid", "inactive", "disabled"}
_PATTERNS: Mapping[str, re.Pattern[str]] = {
    "email": EMAIL,
    "uri": URL,
    "url": URL,
    "uuid": UUID,
    "phone": PHONE,
}
_KINDS: Mapping[str, Words] = {
    "email": words("email"),
    "url": words("url website link homepage"),
    "phone": words("phone"),
    "date": words("date"),
}
_FREE = words("query question text message content prompt input q topic expression body note")
_MEASURE = words("total price paid")


@dataclass(slots=True)
class Filled:
    """A value for a schema, how many of its leaves were read, and the required ones not found."""

    value: JsonValue
    found: int = 0
    missing: list[str] = field(default_factory=list[str])


@dataclass(slots=True)
class Guesses:
    """What a sentence offers for arguments without a label, each used once, in this order."""

    subjects: list[str]
    numbers: list[int | float]
    phrase: str


def fill(schema: Schema, reading: Reading, guesses: Guesses | None = None) -> Filled:
    """A value of `schema` from `reading`; what is required and not found is left empty.

    With `guesses`, required strings and numbers that have no label take those in order.
    """
    return _Filler(schema, reading, guesses).fill()


class _Filler:
    def __init__(self, root: Schema, reading: Reading, guesses: Guesses | None) -> None:
        self._root = root
        self._reading = reading
        self._guesses = guesses
        self._effort = EFFORT
        self._open: list[int] = []
        self._taken: set[str] = set()

    def fill(self) -> Filled:
        return self._read(self._root, self._reading, frozenset(), 0) or Filled(
            self._empty(self._root, 0), missing=["value"]
        )

    def _read(self, schema: JsonValue, reading: Reading, about: Words, depth: int) -> Filled | None:
        """The alternative that most is found for; None if this is a leaf that nothing fits."""
        best: list[Filled] = []
        for option in branches(schema, self._root)[0]:
            if option.get("type") == "object":
                best.append(self._object(option, reading, about, depth))
            elif option.get("type") == "array" and (
                rows := self._rows(option, reading, about, depth)
            ):
                best.append(rows)
            elif depth == 0 and (value := _scalar(reading.text, option)) is not None:
                best.append(Filled(value, 1))
        return max(best, key=_worth, default=None)

    def _object(self, schema: Schema, reading: Reading, about: Words, depth: int) -> Filled:
        """An object with what is found for each property, required ones last resort empty."""
        properties = member(schema, "properties")
        result = Filled({})
        if depth > DEEPEST or self._effort < 0:
            return result
        self._open.append(id(properties))
        required = set(map(str, elements(schema, "required")))
        claimed = self._claims(properties, reading, about, depth)
        value: Schema = {}
        for name, inner in properties.items():
            must = name in required
            found = (
                _constant(resolve(inner, self._root))
                or claimed.get(name)
                or self._inner(name, inner, reading, about, depth)
                or self._typed(name, inner, reading, must)
            )
            if found and (found.found or must):
                value[name] = found.value
                result.found += found.found
                result.missing += [f"{name}.{path}" for path in found.missing]
            elif must:
                value[name] = self._empty(inner, depth + 1)
                if "default" not in resolve(inner, self._root):
                    result.missing.append(name)
        self._open.pop()
        result.value = value
        return result

    def _claims(
        self, properties: Schema, reading: Reading, about: Words, depth: int
    ) -> dict[str, Filled]:
        """Property by property the fact with the likest label, each fact used once."""
        scored: list[tuple[float, int, str]] = []
        self._effort -= 1 + len(properties) * len(reading.facts)
        if self._effort < 0:
            return {}
        for name, inner in properties.items():
            wanted = _wanted(name, resolve(inner, self._root), about)
            for index, fact in enumerate(reading.facts):
                if (likeness := wanted.likeness(fact)) > 1:
                    scored.append((-likeness, index, name))
        claimed: dict[str, Filled] = {}
        used: set[int] = set()
        for _, index, name in sorted(scored):
            if name in claimed or index in used:
                continue
            value = reading.facts[index].value
            if isinstance(value, str) and words(name) & _KINDS["email"]:
                value = (EMAIL.findall(value) or [value])[0]
            if found := self._coerce(value, properties[name], depth + 1):
                claimed[name] = found
                used.add(index)
                self._take(found.value)
        return claimed

    def _take(self, value: JsonValue) -> None:
        """Keep a value that was found from being found or guessed again."""
        self._taken.add(str(value))
        if self._guesses:
            self._guesses.subjects = [each for each in self._guesses.subjects if each != value]
            self._guesses.numbers = [each for each in self._guesses.numbers if each != value]

    def _coerce(self, value: JsonValue, schema: JsonValue, depth: int) -> Filled | None:
        """`value` as `schema` wants it, or None if it cannot be that."""
        found = [self._as(value, option, depth) for option in branches(schema, self._root)[0]]
        return max((each for each in found if each), key=_worth, default=None)

    def _as(self, value: JsonValue, option: Schema, depth: int) -> Filled | None:
        if option.get("type") == "array":
            return self._list(value, option, depth)
        if option.get("type") != "object":
            scalar = _scalar(value, option)
            return None if scalar is None else Filled(scalar, 1)
        if not isinstance(value, dict) or "properties" not in option:
            return Filled(value, 1) if isinstance(value, dict) else None
        found = self._object(option, read_json(value), frozenset(), depth)
        return found if found.found else None

    def _list(self, value: JsonValue, schema: Schema, depth: int) -> Filled | None:
        if isinstance(value, str):
            value = [part for part in re.split(r"[,;\n]\s*(?:and )?| and ", value) if part.strip()]
        if not isinstance(value, list) or depth > DEEPEST:
            return None
        items = [self._coerce(item, schema.get("items", {}), depth + 1) for item in value]
        kept = [item.value for item in items if item][: limit(schema, "maxItems", MOST_ROWS)]
        return Filled(kept, len(kept)) if kept else None

    def _inner(
        self, name: str, schema: JsonValue, reading: Reading, about: Words, depth: int
    ) -> Filled | None:
        """A nested object from the facts about it, an array of objects from a table."""
        whole, _ = branches(schema, self._root)
        if not any(option.get("type") in {"object", "array"} for option in whole):
            return None
        if any(id(option.get("properties")) in self._open for option in whole):
            return None
        label = words(name)
        found = self._read(schema, reading, label or about, depth + 1)
        return found if found and found.found else None

    def _rows(self, schema: Schema, reading: Reading, about: Words, depth: int) -> Filled | None:
        """An array of objects from the table whose columns are likest to their properties."""
        best: tuple[float, Schema, Table] | None = None
        for item in branches(schema.get("items", {}), self._root)[0]:
            properties = member(item, "properties")
            for table in reading.tables if properties else []:
                columns = len(self._claims(properties, Reading(table.rows[0]), frozenset(), depth))
                named = bool(table.label & about)
                score = columns + 2 * named
                if columns and (named or columns * 2 >= min(len(properties), len(table.rows[0]))):
                    best = best if best and best[0] >= score else (score, item, table)
        if not best:
            return None
        rows = [
            self._object(best[1], Reading(row), frozenset(), depth + 1)
            for row in best[2].rows[: limit(schema, "maxItems", MOST_ROWS)]
        ]
        kept = [row for row in rows if row.found]
        return Filled([row.value for row in kept], sum(row.found for row in kept))

    def _typed(self, name: str, schema: JsonValue, reading: Reading, must: bool) -> Filled | None:
        """What the text holds of this kind: an e-mail for an e-mail; then, if allowed, a guess."""
        for option in branches(schema, self._root)[0]:
            value = self._spotted(words(name), option, reading)
            if value is None and must:
                value = self._guess(words(name), option, reading)
            if value is not None:
                return Filled(value, 1)
        return None

    def _spotted(self, label: Words, schema: Schema, reading: Reading) -> JsonValue:
        text = reading.text[:20_000]
        kind = schema.get("type")
        if elements(schema, "enum"):
            return _mentioned(elements(schema, "enum"), text)
        if kind == "boolean":
            return _stated(label, text)
        if kind in {"number", "integer"} and label & _MEASURE:
            amounts = AMOUNT.findall(text)
            return _scalar(amounts[-1], schema) if amounts else None
        if kind != "string" or not text:
            return None
        form = schema.get("format")
        for key, pattern in _PATTERNS.items():
            if form == key or (form is None and label & _KINDS.get(key, frozenset())):
                match = pattern.search(text)
                return _scalar(match.group(), schema) if match else None
        if form in {"date", "date-time"} or (form is None and label & _KINDS["date"]):
            for day in dates(text):
                if day not in self._taken:
                    self._taken.add(day)
                    return _scalar(day, schema)
            return None
        if form is None and label & words("currency"):
            return _scalar(currency(text) or "", schema)
        if isinstance(pattern := schema.get("pattern"), str) and not matches(pattern, "a, b"):
            fitting = (word for word in text.split()[:500] if matches(pattern, word.strip(",.;:")))
            return next((word.strip(",.;:") for word in fitting), None)
        return None

    def _guess(self, label: Words, schema: Schema, reading: Reading) -> JsonValue:
        kind, choices = schema.get("type"), elements(schema, "enum")
        plain = all(fact.weak for fact in reading.facts)
        if not self._guesses:
            person = kind == "string" and label and label <= words("full name person")
            found = names(reading.text[:2_000]) if person and plain else []
            return found[0] if found else None
        if choices:
            return choices[0]
        if kind in {"number", "integer"}:
            numbers = self._guesses.numbers
            return _scalar(numbers.pop(0), schema) if numbers else None
        if kind == "array":
            items: list[JsonValue] = [*self._guesses.subjects] or [*self._guesses.numbers]
            found = self._list(items, schema, 0)
            return found.value if found else None
        if kind != "string":
            return None
        if label & _FREE:
            return _scalar(self._guesses.phrase, schema)
        for index, subject in enumerate(self._guesses.subjects):
            if (value := _scalar(subject, schema)) is not None:
                self._guesses.subjects.pop(index)
                return value
        return None

    def _empty(self, schema: JsonValue, depth: int) -> JsonValue:
        """The emptiest value that `schema` allows, as far as that is simple to see."""
        self._effort -= 20
        whole = resolve(schema, self._root)
        options, nullable = branches(whole, self._root)
        if "default" in whole:
            return whole["default"]
        if nullable:
            return None
        option = options[0]
        if constant := _constant(option):
            return constant.value
        if choices := elements(option, "enum"):
            return choices[0]
        kind, over = option.get("type"), depth > DEEPEST or self._effort < 0
        if kind == "object":
            properties = member(option, "properties")
            required = [] if over else [str(name) for name in elements(option, "required")]
            return {name: self._empty(properties.get(name), depth + 1) for name in required}
        if kind == "array":
            count = 0 if over else limit(option, "minItems", 0)
            return [self._empty(option.get("items"), depth + 1) for _ in range(count)]
        if kind in {"number", "integer"}:
            return least(option)
        return False if kind == "boolean" else blank(option)


def _worth(filled: Filled) -> int:
    return 2 * filled.found - len(filled.missing)


def _constant(schema: Schema) -> Filled | None:
    choices = elements(schema, "enum")
    if "const" in schema:
        return Filled(schema["const"])
    return Filled(choices[0]) if len(choices) == 1 else None


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The words under which a property may be found."""

    names: tuple[Words, ...]
    description: Words
    about: Words
    text: bool

    def likeness(self, fact: Fact) -> float:
        """How well a fact's label fits; 10 is the property's own name, 1 or less is no."""
        labels = {*fact.labels, *(label | fact.section for label in fact.labels)}
        best = max((self._label(label) for label in labels if label), default=0.0)
        if fact.section:
            best += -1 if not self.about else 1 if fact.section & self.about else -6
        return best - 1.5 * fact.weak

    def _label(self, label: Words) -> float:
        for name in self.names:
            if label == name:
                return 10
            if self.about and label == name | self.about:
                return 11
        for name in self.names:
            wider = name < label and (not self.about or label - name <= self.about)
            if label < name or wider:
                return 4 + 3 * len(label & name) / len(label | name)
        if self.about and label == self.about and self.text:
            return 3
        if label and label <= self.description:
            return 2 + min(len(label), 3) / 4
        return 0


def _wanted(name: str, schema: Schema, about: Words) -> _Wanted:
    title, description = str(schema.get("title", "")), str(schema.get("description", ""))
    own = [words(each) for each in (name, title) if words(each)]
    text = schema.get("type") == "string" and "format" not in schema and "pattern" not in schema
    return _Wanted(tuple(own), words(description), about, text)


def _scalar(value: JsonValue, schema: Schema) -> JsonValue:
    """`value` as the string, number or boolean that `schema` wants, or None."""
    kind = schema.get("type")
    if isinstance(value, dict) or value is None:
        return None
    if isinstance(value, list):
        value = ", ".join(str(item) for item in value if isinstance(item, str | int | float))
    if choices := elements(schema, "enum"):
        exact = [each for each in choices if str(each).casefold() == str(value).casefold()]
        return exact[0] if exact else _mentioned(choices, str(value))
    if "const" in schema:
        return schema["const"] if str(schema["const"]) == str(value) else None
    if kind == "boolean":
        word = (tokens(str(value)) or [""])[0]
        return True if word in _YES else False if word in _NO else None
    if kind in {"number", "integer"}:
        figure = number(value) if isinstance(value, str) else value
        if isinstance(figure, bool) or figure is None:
            return None
        if kind == "integer":
            return int(figure) if float(figure).is_integer() else None
        return figure
    return _string(str(value), schema) if kind in {"string", "any"} else None


def _string(text: str, schema: Schema) -> str | None:
    text = text.strip()
    if text.casefold() in _NOTHING:
        return None
    form = str(schema.get("format", ""))
    if form in _PATTERNS:
        match = _PATTERNS[form].search(text)
        text = match.group() if match else ""
    elif form == "date":
        text = next(dates(text), "")
    elif form == "date-time":
        if match := DATETIME.search(text):
            text = match.group().replace(" ", "T")
            text += "" if re.search(r"(?:Z|[+-]\d\d:?\d\d)$", text) else "Z"
        else:
            text = "".join(f"{day}T00:00:00Z" for day in list(dates(text))[:1])
    elif form == "time":
        match = TIME.search(text)
        text = match.group() if match else ""
    if isinstance(pattern := schema.get("pattern"), str) and not matches(pattern, text):
        parts = [*text.split()[:50], currency(text) or ""]
        text = next((part for part in parts if part and matches(pattern, part)), "")
    if not text or len(text) < limit(schema, "minLength", 0):
        return None
    return text[: limit(schema, "maxLength", len(text))]


def _mentioned(choices: list[JsonValue], text: str) -> JsonValue:
    """The one of `choices` that a text names first, or None."""
    said = " " + " ".join(tokens(text[:20_000])) + " "
    places: Iterator[tuple[int, int]] = (
        (said.find(f" {' '.join(tokens(str(each)))} "), index)
        for index, each in enumerate(choices[:200])
        if each is not None and tokens(str(each))
    )
    first = min((place for place in places if place[0] >= 0), default=None)
    return choices[first[1]] if first else None


def _stated(label: Words, text: str) -> bool | None:
    """True where a sentence says this word, False where it says "not" before it."""
    wanted = {word for word in label if not is_stop(word)}
    for sentence in re.split(r"[.!?\n]", text[:5_000]):
        if wanted and wanted <= words(sentence):
            return not set(tokens(sentence)) & {"no", "not", "never", "without", "t"}
    return None

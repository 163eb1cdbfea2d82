"""Fills a JSON Schema with facts: values with the words of their labels, if they have any."""

import re
from collections.abc import Iterator

from pydantic import JsonValue

Schema = dict[str, JsonValue]
Words = frozenset[str]
Fact = tuple[Words, JsonValue]

LONGEST = 20_000  # characters read of a text
MOST = 200  # facts of one source, elements of one array
DEEPEST = 8  # levels of nested values
EFFORT = 50_000  # comparisons of a property with a fact, before the rest is left empty

# Repetitions are bounded or anchored, so that any text is read in linear time.
_NUMBER = re.compile(r"(?<![\w.,/-])[-+]?\d{1,15}(?:,\d{3}){0,4}(?:\.\d{1,15})?(?![\w/-]|[.,]\d)")
_CURRENCY = re.compile(r"[€$£]|\b[A-Z]{3}(?= ?\d)|(?<=\d )[A-Z]{3}\b")
_SIGNS = {"€": "EUR", "$": "USD", "£": "GBP"}
_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}")
_DATE = re.compile(r"(?<!\d)\d{4}-\d\d-\d\d(?!\d)")
_LABEL = re.compile(r"([^\W\d_][^:=]{0,40}?)\s{0,5}(?::(?!//)|=|\bis\b)\s{0,5}(.+)")
_ROW = re.compile(r"(\d[\d.,]{0,15}) {0,3}(?:[x×] (.*)|([^\W\d_].*\d[.,]\d.*))")
_QUOTED = re.compile(r"[\"“]([^\"“”\n]{1,300})[\"”]|(?<!\w)'([^'\n]{1,300})'(?!\w)")
_NAME = re.compile(r"\b[A-ZÀ-ÖØ-Þ][\w'’-]{0,40}(?: [A-ZÀ-ÖØ-Þ][\w'’-]{0,40}){0,4}")
_OBJECT = re.compile(r"\A.*\b(?:in|for|of|to|about|named|called) (.+)", re.DOTALL)
_NUMERIC = {"number", "integer"}
_TRUTH = {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}
_EMPTY: Schema = {"number": 0, "integer": 0, "boolean": False, "array": [], "string": ""}
_GRAMMAR = """
a an the this that these it its is are was do does did can could will would should please i you he
she we they my me your of in on at by for from to with into about and or but not no as what which
who when where why how there here hello hi hey thanks now today get list show give tell let like s
"""
_STOP = frozenset(_GRAMMAR.split())


def words(text: str) -> Words:
    """The stems of what `text` is about; if that is nothing, all its words."""
    found = frozenset(_tokens(re.sub(r"(?<=[a-z\d])(?=[A-Z])", " ", text)).split())
    stems = (re.sub(r"(?<=\w{3})(?:ies|ing|es|ed|s|e|y)$", "", word) for word in found - _STOP)
    return frozenset(stems) or found


def _tokens(text: str) -> str:
    """A text in lower case with one space around each word."""
    found = re.findall(r"[^\W_]+", text[:LONGEST].lower().replace("e-mail", "email"))
    return f" {' '.join(found)} "


_ADDRESS = words("email mail recipient") | {"to"}
_COUNT, _ROWS = words("quantity qty count units"), words("lines items positions products entries")


def member(value: JsonValue, *path: str) -> Schema:
    """The object under the keys of `path`, or {}."""
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def elements(schema: Schema, key: str) -> list[JsonValue]:
    """The first elements of the array under `key`, or []."""
    value = schema.get(key)
    return value[:MOST] if isinstance(value, list) else []


def read(value: JsonValue) -> list[Fact]:
    """The members of an object, else the labelled lines, e-mails, currency and rows of a text."""
    if not isinstance(value, str):
        return [(words(key), each) for key, each in member(value).items()] or [(Words(), value)]
    facts: list[Fact] = []
    rows: list[JsonValue] = []
    for clause in re.split(r"\n|[,;] (?=[\w ]{1,30}[:=] )", value[:LONGEST])[: 5 * MOST]:
        line = clause.strip(" \t\r-*•")
        if _ROW.match(line):
            rows.append(line)
        elif (match := _LABEL.match(line)) and not words(match[1]) <= _STOP:
            facts.append((words(match[1]), match[2].strip(" \"'“”")))
    facts = [*facts[:MOST], *((_ADDRESS, each) for each in _EMAIL.findall(value[:LONGEST]))]
    codes = _CURRENCY.findall(value[:LONGEST])[:1]
    facts += [(words("currency"), _SIGNS.get(code, code)) for code in codes]
    return [*facts, (_ROWS, rows)] if rows else facts


def _read_row(text: str) -> list[Fact]:
    """The count, the words, and the other numbers of one row in order."""
    row = _ROW.match(text)
    rest = (row[2] or row[3]) if row else text
    said = " ".join(_NUMBER.sub(" ", _CURRENCY.sub(" ", rest)).split()).strip(" ,:@-")
    parts = [said, *_numbers(rest)]
    return [(_COUNT, row and row[1]), *((Words(), part) for part in parts)]


def guess(text: str, besides: Words) -> list[Fact]:
    """What a request is about, unlabelled: quotes, else names, else an object; then numbers."""

    def bare(said: str) -> str:
        ignored = besides | _STOP
        return re.sub(r"[\w'’-]+", lambda word: "" if words(word[0]) <= ignored else word[0], said)

    quoted = [each or other for each, other in _QUOTED.findall(text)]
    rest = re.split(r"\s{2,}|[^\w\s'’-]+", bare("".join(_OBJECT.findall(text))))
    names = quoted or _NAME.findall(bare(text)) or [each.strip() for each in rest if each.strip()]
    return [(Words(), each) for each in [*names, *_numbers(text)]]


def _numbers(text: str) -> list[JsonValue]:
    """The numbers that are no part of a date or code: "EUR 1,234.50" -> 1234.5."""
    found = (each.replace(",", "") for each in _NUMBER.findall(text[:LONGEST])[:MOST])
    return [float(each) if "." in each else int(each) for each in found]


def fill(schema: Schema, facts: list[Fact], text: str) -> tuple[Schema, bool]:
    """An object of `schema`, empty where nothing was found, and whether all required was found.

    A fact without a label goes to the first property that requires one like it.
    """
    filler = _Filler(schema, text)
    return filler.make(schema, facts[:MOST], 0, must=True) or {}, not filler.missing


def quotes(value: JsonValue, text: str, path: str = "") -> Iterator[Schema]:
    """The line of the text that says each value, by the value's JSON Pointer."""
    if isinstance(value, dict | list):
        keys = value.items() if isinstance(value, dict) else enumerate(value)
        for key, each in keys:
            part = str(key).replace("~", "~0").replace("/", "~1")
            yield from quotes(each, text, f"{path}/{part}")
        return
    lines = (line.strip() for line in text[:LONGEST].splitlines())
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    for line in lines:
        if value in _numbers(line) if is_number else str(value) in line:
            yield {"path": path, "quote": line}
            return


class _Filler:
    def __init__(self, root: Schema, text: str) -> None:
        self._root, self._text, self._effort, self.missing = root, text, EFFORT, False

    def _options(self, schema: JsonValue) -> list[Schema]:
        """The alternatives of a schema, references followed, each with one type and its choices."""
        found: list[Schema] = []
        pending = [schema]
        for _ in range(30):  # a schema may refer to itself
            one = member(pending.pop(0) if pending else None)
            if isinstance(pointer := one.get("$ref"), str):
                pending.append(member(self._root, *pointer.split("/")[1:]))
            elif several := elements(one, "anyOf") or elements(one, "oneOf"):
                pending += several
            elif one:
                choices = [one["const"]] if "const" in one else elements(one, "enum")
                for kind in elements(one, "type") or [one.get("type", "any")]:
                    found.append({**one, "enum": choices, "type": str(kind)})
        return found or [{"type": "any"}]

    def make(self, schema: JsonValue, facts: list[Fact], depth: int, must: bool) -> Schema | None:
        """An object of what it takes out of `facts`; None for nothing, unless it `must` be."""
        option = self._options(schema)[0]
        properties, required = member(option, "properties"), elements(option, "required")
        self._effort -= (1 + len(properties)) * (20 + len(facts))
        if depth > DEEPEST or self._effort < 0:
            return {} if must else None
        value: Schema = {}
        for name, inner in properties.items():
            found = self._find(name, inner, facts, depth + 1, name in required)
            value |= {} if found is None else {name: found}
        if not value and not must:
            return None
        empty = [name for name in properties if name in required and name not in value]
        return value | {name: self._empty(properties[name], depth + 1) for name in empty}

    def _find(
        self, name: str, schema: JsonValue, facts: list[Fact], depth: int, must: bool
    ) -> JsonValue:
        """What `schema` can be made of, taken out of the facts, or None."""
        shown, options = member(schema), self._options(schema)
        own, title = words(name), words(str(shown.get("title", name)))
        hint = words(" ".join(str(shown.get("description"))[:99].split()[:4]))
        kinds = {str(option["type"]) for option in options}

        def rank(label: Words) -> int:
            if not label:
                return 4 if must or kinds & _NUMERIC else 0
            if label in (own, title) or "object" in kinds:
                return label in (own, title)
            return 2 if label < own or own < label else 3 if label <= hint else 0

        for place, at in sorted((rank(label), at) for at, (label, _) in enumerate(facts)):
            found = self._cast(facts[at][1], schema, depth) if place else None
            if found is not None:
                del facts[at]
                return found
        for option in options:
            if elements(option, "enum"):
                return self._as(self._text, option, depth)
            inside: list[Fact] = [(label - own, each) for label, each in facts if own < label]
            needed = must and "null" not in kinds
            if option["type"] == "object" and (inside or needed):
                return self.make(option, inside or facts, depth, needed)
        return None

    def _cast(self, value: JsonValue, schema: JsonValue, depth: int) -> JsonValue:
        """`value` as the first alternative that it can be, or None."""
        options = self._options(schema) if depth <= DEEPEST else []
        made = (self._as(value, option, depth + 1) for option in options)
        return next((each for each in made if each is not None), None)

    def _as(self, value: JsonValue, option: Schema, depth: int) -> JsonValue:
        kind, text = option["type"], value if isinstance(value, str) else ""
        if choices := elements(option, "enum"):
            said = _tokens(str(value))
            return next((each for each in choices if _tokens(str(each)) in said), None)
        if kind == "object":
            facts = read(value) if isinstance(value, dict) else _read_row(text)
            return self.make(option, facts[:MOST], depth, must=False)
        if kind == "array":
            items = re.split(r"[,;] ?(?:and )?| and ", text) if text else value
            listed = items[:MOST] if isinstance(items, list) else []
            made = [self._cast(item, option.get("items", {}), depth) for item in listed]
            return [item for item in made if item is not None] or None
        if kind == "boolean":
            return value if isinstance(value, bool) else _TRUTH.get(text.lower())
        if kind == "any" or value is None or isinstance(value, bool | dict | list):
            return value if kind == "any" else None
        if kind in _NUMERIC:
            figure = next(iter(_numbers(text)), None) if isinstance(value, str) else value
            whole = isinstance(figure, int | float) and figure % 1 == 0
            return figure if whole or kind == "number" else None
        if option.get("format") == "date":
            return match.group() if (match := _DATE.search(text)) else None
        return (str(value) or None) if kind == "string" else None

    def _empty(self, schema: JsonValue, depth: int) -> JsonValue:
        """The emptiest value that `schema` allows, as far as that is simple to see."""
        options = self._options(schema)
        first, kind = options[0], str(options[0]["type"])
        if "default" in member(schema):
            return member(schema)["default"]
        if any(option["type"] == "null" for option in options):
            return None
        if choices := elements(first, "enum"):
            return choices[0]
        self.missing |= kind != "any"
        if kind == "object":
            return self.make(first, [], depth, must=True)
        low, least = first.get("minimum"), first.get("minLength")
        if kind == "string" and isinstance(least, int):
            return "-" * min(least, 100)
        return low if isinstance(low, int | float) and low > 0 else _EMPTY.get(kind)

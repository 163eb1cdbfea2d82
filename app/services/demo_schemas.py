"""Reads JSON Schemas: what is inside one, which values fit, which are the emptiest."""

import math
import re
from functools import lru_cache

import jsonschema_rs
from pydantic import JsonValue

Schema = dict[str, JsonValue]

MOST_ROWS = 500


def member(schema: Schema, key: str) -> Schema:
    """The object under `key`, or {}."""
    value = schema.get(key)
    return value if isinstance(value, dict) else {}


def elements(schema: Schema, key: str) -> list[JsonValue]:
    """The array under `key`, or []."""
    value = schema.get(key)
    return value if isinstance(value, list) else []


def resolve(schema: JsonValue, root: Schema) -> Schema:
    """`schema` with its local `$ref` put in place; {} for what cannot be found."""
    whole: Schema = dict(schema) if isinstance(schema, dict) else {}
    for _ in range(20):
        pointer = whole.pop("$ref", None)
        if not isinstance(pointer, str):
            break
        found: JsonValue = root if pointer.startswith("#") else {}
        for key in pointer.removeprefix("#").split("/")[1:]:
            found = found.get(key) if isinstance(found, dict) else None
        whole = {**(found if isinstance(found, dict) else {}), **whole}
    return whole


def branches(schema: JsonValue, root: Schema) -> tuple[list[Schema], bool]:
    """The alternatives of a schema other than null, each with one type; whether null is one."""
    whole = resolve(schema, root)
    options = (elements(whole, "anyOf") or elements(whole, "oneOf"))[:20]
    several = [resolve(option, root) for option in options] or [whole]
    found: list[Schema] = []
    nullable = whole.get("nullable") is True
    for option in several:
        for kind in map(str, elements(option, "type")[:7] or [_kind(option)]):
            if kind == "null" or ("const" in option and option["const"] is None):
                nullable = True
            else:
                found.append({**option, "type": kind})
    nullable = nullable or any(None in elements(option, "enum") for option in found)
    return found or [{}], nullable


def _kind(schema: Schema) -> str:
    kind = schema.get("type")
    if isinstance(kind, str):
        return kind
    return "object" if "properties" in schema else "array" if "items" in schema else "any"


def limit(schema: Schema, key: str, otherwise: int) -> int:
    """The count under `key`, at most `MOST_ROWS`, or `otherwise`."""
    value = schema.get(key)
    return max(0, min(value, MOST_ROWS)) if isinstance(value, int) else otherwise


@lru_cache(maxsize=256)
def _pattern(pattern: str) -> jsonschema_rs.Validator | None:
    try:
        return jsonschema_rs.validator_for(
            {"pattern": pattern}, pattern_options=jsonschema_rs.RegexOptions(size_limit=1_000_000)
        )
    except ValueError:
        return None


def matches(pattern: str, text: str) -> bool:
    """Whether `text` fits, in linear time; True where the pattern cannot be judged so."""
    judge = _pattern(pattern)
    return judge is None or judge.is_valid(text)


def least(schema: Schema) -> int | float:
    """The number nearest to 0 within the bounds of `schema`."""
    value: int | float = 0
    for key, step in (("minimum", 0), ("exclusiveMinimum", 1)):
        bound = schema.get(key)
        if isinstance(bound, int | float) and value < bound + step:
            value = bound + step
    for key, step in (("maximum", 0), ("exclusiveMaximum", 1)):
        bound = schema.get(key)
        if isinstance(bound, int | float) and value > bound - step:
            value = bound - step
    return math.ceil(value) if schema.get("type") == "integer" else value


def blank(schema: Schema) -> str:
    """ "", or the shortest placeholder that a simple pattern or a least length asks for."""
    pattern = schema.get("pattern")
    length = limit(schema, "minLength", 0)
    if not isinstance(pattern, str):
        return "unknown" if 0 < length <= len("unknown") else "-" * length
    text = ""
    for chosen, escaped, plain, times, sign in re.findall(
        r"(?:\[([^\]]{1,60})\]|\\([dws])|([\w /-]))(?:\{(\d{1,3})(?:,\d{0,3})?\}|([*?]))?", pattern
    ):
        one = plain or {"d": "0", "w": "x", "s": " "}.get(escaped) or _letter(chosen)
        text += "" if sign else one * int(times or 1)
    return text if matches(pattern, text) else ""


def _letter(chosen: str) -> str:
    return "X" if "A-Z" in chosen else "x" if "a-z" in chosen else chosen[:1]

"""JSON that every database stores and every reader reads."""

import json
import re
import secrets
from decimal import Decimal
from typing import Any

from pydantic import TypeAdapter
from pydantic_core import PydanticSerializationError, to_json, to_jsonable_python


def dump(adapter: TypeAdapter[Any], value: Any) -> str:
    """The value as JSON. Half surrogate pairs, which a model's JSON may hold, are replaced."""
    try:
        return adapter.dump_json(value).decode()
    except (PydanticSerializationError, UnicodeEncodeError):
        return json.dumps(whole(adapter.dump_python(value, mode="json")))


def dump_any(value: Any) -> str:
    """The same for a value of any type that Pydantic knows."""
    try:
        return to_json(value).decode()
    except (PydanticSerializationError, UnicodeEncodeError):
        return json.dumps(whole(to_jsonable_python(value)))


def whole(value: Any) -> Any:
    """The value with every half of a surrogate pair joined to its other half, or replaced."""
    match value:
        case str():
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        case dict():
            return {whole(key): whole(item) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType]
        case list():
            return [whole(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
        case _:
            return value


PLAIN = 25  # digits before or behind the point that are written out

_MARK = secrets.token_hex(16)  # nobody can write into a document what they cannot guess
_MARKED = re.compile(f'"{_MARK}([^"]+)"')


def dump_exact(value: Any) -> str:
    """The value as JSON, each `Decimal` in it as a number with all its digits, and as a person
    would write it: without an exponent, unless that is a large one."""
    return _MARKED.sub(r"\1", json.dumps(value, default=_marked, ensure_ascii=False))


def load_exact(text: str) -> Any:
    """What `dump_exact` wrote: numbers with a point or an exponent are `Decimal`."""
    return json.loads(text, parse_float=Decimal)


def _marked(value: Any) -> str:
    if isinstance(value, Decimal):
        return f"{_MARK}{value:f}" if abs(value.adjusted()) < PLAIN else f"{_MARK}{value}"
    raise TypeError(f"{type(value).__name__} is no JSON.")

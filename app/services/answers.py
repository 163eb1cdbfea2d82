"""What an extraction's answer must be: what the model is shown, and the judge of what it says."""

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from app.core.json import whole
from app.services.json_schema import MAX_DEPTH, Fault, Json, JsonSchema, measure, moved, pointer

WRAPPED = "value"  # models answer with an object; a schema of any other root goes in here


class Unfit(Exception):
    """The answer is not what was asked for. Reads as the model is to be told."""

    def __init__(self, *faults: Fault, under: str = "") -> None:
        super().__init__("\n".join(f"{under}{fault}" for fault in faults))
        self.faults = faults


@dataclass(frozen=True, slots=True)
class Target:
    """A schema as the model is shown it, and `read`, which takes the model's JSON apart.

    `read` returns the document or raises Unfit. `guide` tells the model what the schema cannot.
    """

    shown: Json
    read: Callable[[str], Any]
    sha256: str
    guide: str = ""


def inline(schema: Json) -> Target:
    """For a caller's JSON Schema. Raises SchemaRejected."""
    judge = JsonSchema(schema)
    shown = {name: value for name, value in schema.items() if name not in ("$schema", "$id")}
    is_object = schema.get("type") == "object"
    if not is_object:
        inner = moved(shown, f"#/properties/{WRAPPED}")
        shown = {"type": "object", "properties": {WRAPPED: inner}, "required": [WRAPPED]}

    def read(text: str) -> Any:
        value = parse(text)
        if not is_object:
            if not isinstance(value, dict) or WRAPPED not in value:
                raise Unfit(Fault("", "required", f'"{WRAPPED}" is a required property'))
            value = cast(Json, value)[WRAPPED]
        if faults := judge.faults(value):
            raise Unfit(*faults, under="" if is_object else f"/{WRAPPED}")
        return value

    title, guide = str(schema.get("title", "")), str(schema.get("description", ""))
    return Target(_named(shown, title), read, digest(schema), guide)


def registered(model: type[BaseModel]) -> Target:
    """For a class of ours. Numbers become `Decimal` with the digits that the model wrote."""
    schema = model.model_json_schema()

    def read(text: str) -> Any:
        value = parse(text, _Printed)
        try:
            # Not strict: what JSON has no type for, such as a date, comes as text.
            return model.model_validate(value, strict=False).model_dump(mode="json")
        except ValidationError as error:
            raise Unfit(*_faults(error)) from error

    guide = (model.__doc__ or "").strip()
    return Target(_named(schema, model.__name__), read, digest(schema), guide)


def digest(schema: Json) -> str:
    canonical = json.dumps(schema, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _named(shown: Json, title: str) -> Json:
    """With the name and the description of the function that the model is to call."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", title)[:64].strip("_") or "Answer"
    return {**shown, "title": name, "description": "What the text says."}


def _faults(error: ValidationError) -> list[Fault]:
    return [
        Fault(pointer(item["loc"]), item["type"], item["msg"])
        for item in error.errors(include_url=False, include_input=False, include_context=False)
    ]


class _Printed(float):
    """A number that remembers its digits: Pydantic makes a `Decimal` of a float's text."""

    text: str

    def __new__(cls, text: str) -> "_Printed":
        self = super().__new__(cls, text)
        self.text = text
        return self

    def __repr__(self) -> str:
        return self.text

    __str__ = __repr__


def parse(text: str, number: Callable[[str], float] = float) -> Any:
    """One JSON value that can be stored and sent on; Python's parser alone takes more than that.

    Raises Unfit.
    """

    def pairs(items: list[tuple[str, Any]]) -> Json:
        found = dict(items)
        if len(found) != len(items):
            raise Unfit(Fault("", "duplicate_key", "a key stands twice in one object"))
        return found

    def finite(digits: str) -> float:
        if math.isinf(value := number(digits)):
            raise Unfit(Fault("", "non_finite_number", f"{digits[:30]} is too large for a number"))
        return value

    def constant(name: str) -> Any:
        raise Unfit(Fault("", "non_finite_number", f"{name} is no JSON number"))

    try:
        value = json.loads(
            text, object_pairs_hook=pairs, parse_float=finite, parse_constant=constant
        )
    except (ValueError, RecursionError) as error:  # ValueError also for an endless integer
        raise Unfit(Fault("", "invalid_json", "that is no JSON document")) from error
    if measure(value)[0] > MAX_DEPTH:
        raise Unfit(Fault("", "too_deep", f"that is over {MAX_DEPTH} levels deep"))
    if whole(value) != value:
        raise Unfit(Fault("", "invalid_text", "a text holds half of a surrogate pair"))
    return value

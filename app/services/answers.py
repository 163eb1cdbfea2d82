"""What an extraction's answer must be: what the model is shown, and the judge of what it says."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from app.core.json import whole
from app.services import evidence
from app.services.json_schema import MAX_DEPTH, Fault, Json, JsonSchema, measure, moved, pointer

WRAPPED = "value"  # models answer with an object; a schema of any other root goes in here
DATA, EVIDENCE = "data", "evidence"  # the document and its quotes, where those are asked for
MAX_NUMBER = 1000  # characters
MAX_EXPONENT = 400


class Unfit(Exception):
    """The answer is not what was asked for. Reads as the model is to be told."""

    def __init__(self, *faults: Fault, under: str = "") -> None:
        super().__init__("\n".join(f"{under}{fault}" for fault in faults))
        self.faults = faults


@dataclass(frozen=True, slots=True)
class Answer:
    """A valid document, and the model's own words on where the text says it."""

    data: Any
    claims: list[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A schema as the model is shown it, and as what it says is judged.

    envelope: the keys under which the document stands in the model's answer.
    judge: takes a document and returns it as it is to be kept, or raises Unfit.
    fold: makes the answer that was shown of what a model said in another form.
    guide: tells the model what the schema cannot.
    """

    schema: Json
    shown: Json
    envelope: tuple[str, ...]
    judge: Callable[[Any], Any]
    guide: str = ""
    fold: Callable[[Any], Any] = lambda value: value

    def read(self, text: str) -> Answer:
        """Takes the model's JSON apart. Raises Unfit."""
        value = self.fold(parse(text))
        claims: Any = []
        if self.envelope == (DATA,):
            claims = _under(value, EVIDENCE)
        for key in self.envelope:
            value = _under(value, key)
        if not isinstance(claims, list):
            raise Unfit(Fault(f"/{EVIDENCE}", "type", "must be an array"))
        try:
            return Answer(self.judge(value), cast(list[Mapping[str, Any]], claims))
        except Unfit as unfit:
            raise Unfit(*unfit.faults, under=pointer(self.envelope)) from unfit


def _under(value: Any, key: str) -> Any:
    if not isinstance(value, dict) or key not in value:
        raise Unfit(Fault("", "required", f'"{key}" is a required property'))
    return cast(Json, value)[key]


def inline(schema: Json, *, quoting: bool = False) -> Target:
    """For a caller's JSON Schema, with `quoting` where evidence is asked for."""
    judging = JsonSchema(schema)
    bare = {name: value for name, value in schema.items() if name not in ("$schema", "$id")}

    def judge(value: Any) -> Any:
        if faults := judging.faults(value):
            raise Unfit(*faults)
        return value

    title, guide = str(schema.get("title", "")), str(schema.get("description", ""))
    return _target(bare, title, judge, guide, quoting)


def registered(model: type[BaseModel], *, quoting: bool = False) -> Target:
    """For a class of ours. Numbers become `Decimal` with the digits that the model wrote."""

    def judge(value: Any) -> Any:
        try:
            # As JSON nothing is coerced; as Python no digit is lost.
            model.model_validate_json(_plain(value), strict=True)
            return model.model_validate(value, strict=False).model_dump(mode="json")
        except ValidationError as error:
            raise Unfit(*_faults(error)) from error

    guide = (model.__doc__ or "").strip()
    return _target(model.model_json_schema(), model.__name__, judge, guide, quoting)


def _target(
    schema: Json, title: str, judge: Callable[[Any], Any], guide: str, quoting: bool
) -> Target:
    if quoting:
        shown, envelope = evidence.asked(schema), (DATA,)
    elif schema.get("type") == "object":
        shown, envelope = schema, ()
    else:
        inner = moved(schema, f"#/properties/{WRAPPED}")
        shown = {"type": "object", "properties": {WRAPPED: inner}, "required": [WRAPPED]}
        envelope = (WRAPPED,)
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", title)[:64].strip("_") or "Answer"
    # The name and the description of the function that the model is to call.
    shown = {**shown, "title": name, "description": "What the text says."}
    return Target(schema, shown, envelope, judge, guide)


def digest(schema: Json | bool) -> str:
    canonical = json.dumps(schema, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _plain(value: Any) -> str:
    return json.dumps(value, default=float)


def _faults(error: ValidationError) -> list[Fault]:
    return [
        Fault(pointer(item["loc"]), item["type"], item["msg"])
        for item in error.errors(include_url=False, include_input=False, include_context=False)
    ]


def parse(text: str) -> Any:
    """One JSON value that can be stored and sent on; Python's parser alone takes more than that.

    Numbers with a point or an exponent are `Decimal`, with every digit. Raises Unfit.
    """
    try:
        value = json.loads(
            text, object_pairs_hook=_pairs, parse_float=_finite, parse_constant=_constant
        )
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            more = Fault("", "not_single_json_value", "there must be one JSON value and no more")
            raise Unfit(more) from error
        raise Unfit(Fault("", "invalid_json", "that is no JSON document")) from error
    except (ValueError, RecursionError) as error:  # ValueError: of an endless integer
        raise Unfit(Fault("", "invalid_json", "that is no JSON document")) from error
    if measure(value)[0] > MAX_DEPTH:
        raise Unfit(Fault("", "too_deep", f"that is over {MAX_DEPTH} levels deep"))
    if whole(value) != value:
        raise Unfit(Fault("", "invalid_text", "a text holds half of a surrogate pair"))
    return value


def _pairs(items: list[tuple[str, Any]]) -> Json:
    found = dict(items)
    if len(found) != len(items):
        raise Unfit(Fault("", "duplicate_key", "a key stands twice in one object"))
    return found


def _finite(digits: str) -> Decimal:
    if len(digits) > MAX_NUMBER or math.isinf(float(digits)):
        raise Unfit(Fault("", "non_finite_number", f"{digits[:30]} is too large for a number"))
    value = Decimal(digits)
    if abs(value.adjusted()) > MAX_EXPONENT:
        raise Unfit(
            Fault("", "non_finite_number", f"{digits[:30]} has an exponent beyond any number's")
        )
    return value


def _constant(name: str) -> Any:
    raise Unfit(Fault("", "non_finite_number", f"{name} is no JSON number"))

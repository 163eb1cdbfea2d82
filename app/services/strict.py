"""OpenAI's strict mode: which schemas it takes, and a copy that it takes of any other.

"Structured model outputs", section "Supported schemas", developers.openai.com. The copy is looser
or tighter than the caller's schema, which stays the judge of what is folded back.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from typing import Any, cast
from urllib.parse import unquote

from app.services.answers import Unfit, parse
from app.services.json_schema import (
    NAMED,
    Fault,
    Json,
    JsonSchema,
    SchemaRejected,
    moved,
    pointer,
)

WRAPPED = "value"
KEY, VALUE = "key", "value"  # of an open map's pairs
MORE = "additional_properties"

FORMATS = (*("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"),)
NUMERIC = ("multipleOf", "maximum", "exclusiveMaximum", "minimum", "exclusiveMinimum")
KEPT = {
    "string": ("pattern", "format"),
    "number": NUMERIC,
    "integer": NUMERIC,
    "array": ("minItems", "maxItems"),
}
IMPLIED = {
    "object": ("properties", "required", "additionalProperties", "patternProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems", "contains"),
    "string": ("pattern", "format", "minLength", "maxLength"),
    "number": NUMERIC,
}
SUPPORTED = {
    *("type", "enum", "const", "anyOf", "$ref", "$defs", "definitions", "properties", "required"),
    *("additionalProperties", "items", "title", "description", "$schema", "$id", "$comment"),
    *(keyword for keywords in KEPT.values() for keyword in keywords),
}
ANNOTATIONS = {
    *("title", "description", "$schema", "$id", "$comment", "default", "examples", "deprecated"),
    *("readOnly", "writeOnly", "$defs", "definitions", "$anchor", "$dynamicAnchor"),
}
TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
BELOW = (
    *("items", "additionalItems", "prefixItems", "contains", "additionalProperties", "not", "if"),
    *("propertyNames", "unevaluatedItems", "unevaluatedProperties", "contentSchema", "then"),
    *("else", "allOf", "anyOf", "oneOf"),
)
# Of what a draft does not know, the validator has checked nothing.
KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(NUMERIC, (int, float, Decimal)),
    **dict.fromkeys(("minItems", "maxItems"), int),
    **dict.fromkeys(("$ref", "pattern", "format", "title", "description"), str),
    **dict.fromkeys(("enum", "required", "allOf", "anyOf", "oneOf", "prefixItems"), list),
    **dict.fromkeys(NAMED, dict),
    "type": (str, list),
}
UNSAFE_PATTERN = re.compile(r"\(\?(?!:)|\\[1-9k]")  # look-arounds, back references, flags

Fold = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Strict:
    """A schema as strict mode takes it, and how what is answered becomes a value for the original.

    `fold` raises Unfit where JSON that was asked for as text is none.
    """

    shown: Json
    fold: Fold


def strictly(schema: Json | bool) -> Strict:
    """A copy for strict mode: its root is an object (any other stands under "value"), every
    property required, what may be missing null, open maps lists of `{"key", "value"}`, and what
    has no type of its own JSON in a string. What strict mode does not know is left out."""
    copying = _Copying(schema if isinstance(schema, dict) else {})
    part = copying.part(schema)
    shown, fold = part.shown, part.fold
    if name := shown.get("$ref"):
        shown = copying.parts[name.rpartition("/")[2]].shown
    if shown.get("type") != "object":
        inner = fold

        def unwrapped(value: Any) -> Any:
            if not isinstance(value, dict) or WRAPPED not in value:
                raise Unfit(Fault("", "required", f'"{WRAPPED}" is a required property'))
            return inner(cast(Json, value)[WRAPPED])

        shown, fold = _closed({WRAPPED: part.shown}), unwrapped
    if copying.parts:
        shown = {**shown, "$defs": copying.defs}
    return Strict(shown, fold)


def report(schema: Json | bool) -> list[dict[str, str]]:
    """What keeps the schema from strict mode as it is: `{pointer, keyword, message}`, the pointer
    that of the schema with the keyword. Empty: it can be sent as it is."""
    found: list[dict[str, str]] = []

    def tell(path: Sequence[str], keyword: str, message: str) -> None:
        found.append({"pointer": pointer(path), "keyword": keyword, "message": message})

    if not isinstance(schema, dict) or schema.get("type") != "object":
        tell((), "type", "the root must be an object")
    if isinstance(schema, dict) and "anyOf" in schema:
        tell((), "anyOf", "is not supported at the root")
    for path, part in _walk(schema, ()):
        if isinstance(part, bool):
            tell(path, "type", "must say what type it is")
        else:
            for keyword, message in _lacks(part):
                tell(path, keyword, message)
    return found


def _lacks(part: Json) -> Iterator[tuple[str, str]]:
    for keyword in part:
        if keyword not in SUPPORTED:
            yield keyword, "is not supported"
    part = _sound(part)
    if not part.keys() & {"type", "enum", "const", "anyOf", "$ref"}:
        yield "type", "must say what type it is"
    if str(part.get("$ref", "#"))[:1] != "#":
        yield "$ref", "must refer to something inside of the schema"
    if part.get("format", FORMATS[0]) not in FORMATS:
        yield "format", f"must be one of {', '.join(FORMATS)}"
    if UNSAFE_PATTERN.search(str(part.get("pattern", ""))):
        yield "pattern", "must do without look-arounds, back references and flags"
    if "object" in _types(part) or "properties" in part:
        if part.get("additionalProperties") is not False:
            yield "additionalProperties", "must be false"
        for name in part.get("properties", {}):
            if name not in part.get("required", ()):
                yield "required", f"must name every property, also {json.dumps(name)}"
    if "array" in _types(part) and "items" not in part:
        yield "items", "must say what the items are"


def _walk(schema: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Json | bool]]:
    """Each schema with its path; what is no schema is passed over."""
    if isinstance(schema, bool):
        yield path, schema
    if not isinstance(schema, dict):
        return
    part = cast(Json, schema)
    yield path, part
    for key, value in part.items():
        if key in NAMED and isinstance(value, dict):
            for name, item in cast(Json, value).items():
                yield from _walk(item, (*path, key, name))
        elif key in BELOW and isinstance(value, list):
            for index, item in enumerate(cast(list[Any], value)):
                yield from _walk(item, (*path, key, str(index)))
        elif key in BELOW and isinstance(value, dict):
            yield from _walk(value, (*path, key))


def _sound(schema: Json) -> Json:
    """Without what has a value of another type than its keyword's."""

    def is_sound(key: str, value: Any) -> bool:
        if key in KINDS and (not isinstance(value, KINDS[key]) or isinstance(value, bool)):
            return False
        if key == "type":
            return all(each in TYPES for each in ([value] if isinstance(value, str) else value))
        return key != "required" or all(isinstance(each, str) for each in value)

    return {key: value for key, value in schema.items() if is_sound(key, value)}


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True, slots=True)
class _Part:
    shown: Json
    fold: Fold = _same


NULL: Json = {"type": "null"}


def _of_text(value: Any) -> Any:
    return parse(value) if isinstance(value, str) else value


JSON_TEXT = _Part({"type": "string", "description": "Any JSON value, written as JSON."}, _of_text)


@dataclass
class _Branch:
    """One of a union's: `original` may refer to what stands in `root`."""

    part: _Part
    original: Json | bool
    root: Json
    defs: dict[str, _Part]

    @cached_property
    def _shown(self) -> JsonSchema:
        defs = {name: part.shown for name, part in self.defs.items()}
        return JsonSchema({**self.part.shown, "$defs": defs})

    @cached_property
    def _original(self) -> JsonSchema | None:
        place = "#/$defs/root"
        if isinstance(self.original, bool):
            return JsonSchema(self.original)
        defs = {"root": moved(self.root, place), "branch": moved(self.original, place)}
        defs["root"].pop("$id", None)
        try:
            return JsonSchema({"$ref": "#/$defs/branch", "$defs": defs})
        except SchemaRejected:
            return None  # anchors that it shares with its root: taken as it is shown

    def fits(self, value: Any) -> bool:
        return not self._shown.faults(value, 1)

    def takes(self, value: Any) -> bool:
        return self._original is None or not self._original.faults(value, 1)


@dataclass
class _Copying:
    """One schema's copy as it grows; `parts` become its `$defs`."""

    root: Json
    parts: dict[str, _Part] = field(default_factory=dict[str, _Part])
    names: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def defs(self) -> Json:
        return {name: part.shown for name, part in self.parts.items()}

    def part(self, schema: Any) -> _Part:
        if not isinstance(schema, dict):
            return JSON_TEXT
        schema = _sound(cast(Json, schema))
        bare = _unsaid(schema)
        if list(bare) == ["$ref"]:
            return self._ref(bare["$ref"])
        if bare.keys() & {"$ref", "allOf"}:
            merged = self._merged(bare, ())
            return self.part({**merged, **_said(schema)}) if merged else JSON_TEXT
        part = self._bare(bare)
        if part is JSON_TEXT or "$ref" in part.shown:
            return part
        return _Part({**part.shown, **_said(schema)}, part.fold)

    def _bare(self, schema: Json) -> _Part:
        for key in ("anyOf", "oneOf"):
            if key in schema:
                rest = {name: item for name, item in schema.items() if name != key}
                branches = [_joined(rest, each) for each in schema[key]]
                return self._union(branches)
        if "const" in schema or "enum" in schema:
            return _enum([schema["const"]] if "const" in schema else schema["enum"])
        types = _types(schema)
        if not types:
            return JSON_TEXT
        if len(types) == 1:
            return self._typed(types[0], schema)
        if {"object", "array"} & set(types):
            return self._union([{**schema, "type": each} for each in types])
        kept = {key: item for each in types for key, item in _kept(each, schema).items()}
        return _Part({"type": types, **kept})

    def _typed(self, type_: str, schema: Json) -> _Part:
        if type_ == "object":
            return self._object(schema)
        if type_ == "array":
            return self._array(schema)
        return _Part({"type": type_, **_kept(type_, schema)})

    def _object(self, schema: Json) -> _Part:
        properties: Json = dict(schema.get("properties") or {})
        required = cast(list[str], schema.get("required") or [])
        open_ = schema.get("additionalProperties", not properties)
        for name in required:
            properties.setdefault(name, open_ if isinstance(open_, dict) else True)
        patterns = list(cast(Json, schema.get("patternProperties") or {}).values())
        more: list[Any] = [*patterns, *([open_] if open_ is not False else [])]
        rest = self._pairs(more) if more else None
        if rest is not None and not properties:
            return rest
        parts = {name: self.part(item) for name, item in properties.items()}
        droppable = {
            name
            for name, item in properties.items()
            if name not in required and not self._takes_null(item, ())
        }
        shown = {
            name: part.shown if name in required else _nullable(part.shown)
            for name, part in parts.items()
        }
        extra = MORE
        while extra in shown:
            extra += "_"
        if rest is not None:
            shown[extra] = rest.shown

        def fold(value: Any) -> Any:
            if not isinstance(value, dict):
                return value
            given = cast(Json, value)
            folded: Any = rest.fold(given[extra]) if rest and extra in given else {}
            known = {
                name: parts[name].fold(item) if name in parts and item is not None else item
                for name, item in given.items()
                if not (item is None and name in droppable) and (rest is None or name != extra)
            }
            return {**known, **cast(Json, folded)} if isinstance(folded, dict) else known

        plain = rest is None and not droppable and all(p.fold is _same for p in parts.values())
        return _Part(_closed(shown), _same if plain else fold)

    def _pairs(self, schemas: list[Any]) -> _Part:
        value = self.part(schemas[0]) if len(schemas) == 1 else self._union(schemas)
        pair = _closed({KEY: {"type": "string"}, VALUE: value.shown})

        def fold(pairs: Any) -> Any:
            try:
                items = [(pair[KEY], value.fold(pair[VALUE])) for pair in pairs]
                found = dict(items)
            except (KeyError, TypeError):
                return pairs  # not what was asked for: the schema's judge will say so
            if len(found) != len(items):
                raise Unfit(Fault("", "duplicate_key", "a key stands twice in one map"))
            return found

        return _Part({"type": "array", "items": pair}, fold)

    def _array(self, schema: Json) -> _Part:
        items = schema.get("items", True)
        first = cast(list[Any], items if isinstance(items, list) else schema.get("prefixItems", []))
        rest: Any = schema.get("additionalItems", True) if isinstance(items, list) else items
        places = [self.part(each) for each in first]
        after = self.part(rest)
        shown: list[Json] = []
        for part in (*places, *([after] if rest is not False or not places else [])):
            if part.shown not in shown:
                shown.append(part.shown)
        item = shown[0] if len(shown) == 1 else {"anyOf": shown}

        def fold(value: Any) -> Any:
            if not isinstance(value, list):
                return value
            return [
                (places[index] if index < len(places) else after).fold(each)
                for index, each in enumerate(cast(list[Any], value))
            ]

        plain = all(part.fold is _same for part in (*places, after))
        return _Part(
            {"type": "array", "items": item, **_kept("array", schema)}, _same if plain else fold
        )

    def _union(self, schemas: Sequence[Any]) -> _Part:
        parts = [self.part(each) for each in schemas]
        changed = [part for part in parts if part.fold is not _same]
        if len(parts) == 1:
            return parts[0]
        kinds = [kind for part in parts for kind in self._kinds(part.shown)]
        if not parts or any(
            kinds.count(kind) > 1
            for part in changed
            for kind in self._kinds(part.shown)
            if kind != "object"
        ):
            return JSON_TEXT  # nobody could tell a list from a map's pairs, or a text from JSON
        shown: list[Json] = []
        for part in parts:
            if part.shown not in shown:
                shown.append(part.shown)
        if not changed:
            return _Part({"anyOf": shown})
        branches = [
            _Branch(part, original, self.root, self.parts)
            for part, original in zip(parts, schemas, strict=True)
        ]

        def fold(value: Any) -> Any:
            fitting = [branch for branch in branches if branch.fits(value)]
            folded = [branch.part.fold(value) for branch in fitting]
            for branch, each in zip(fitting, folded, strict=True):
                if branch.takes(each):
                    return each
            return folded[0] if folded else value

        return _Part({"anyOf": shown}, fold)

    def _kinds(self, shown: Json, seen: tuple[str, ...] = ()) -> set[str]:
        """The types that a copy may have."""
        if ref := shown.get("$ref"):
            name = ref.rpartition("/")[2]
            known = name in self.parts and name not in seen
            return self._kinds(self.parts[name].shown, (*seen, name)) if known else {"object"}
        if "anyOf" in shown:
            return {kind for each in shown["anyOf"] for kind in self._kinds(each, seen)}
        return set(_types(shown))

    def _ref(self, ref: str) -> _Part:
        target = self._target(ref)
        if target is None:
            return JSON_TEXT
        if ref not in self.names:
            word = re.sub(r"[^A-Za-z0-9_-]+", "_", ref.rpartition("/")[2]).strip("_") or "root"
            name = word
            while name in self.names.values():
                name += "_"
            self.names[ref] = name
            self.parts[name] = self.part(target)
        name = self.names[ref]
        return _Part({"$ref": f"#/$defs/{name}"}, lambda value: self.parts[name].fold(value))

    def _target(self, ref: str) -> Any:
        if not ref.startswith("#"):
            return None
        path = unquote(ref[1:])
        if path and not path.startswith("/"):
            return next((part for _, part in _walk(self.root, ()) if _anchored(part, path)), None)
        found: Any = self.root
        for step in path.split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and step.isdigit():
                items = cast(list[Any], found)
                found = items[int(step)] if int(step) < len(items) else None
            else:
                found = cast(Json, found).get(step) if isinstance(found, dict) else None
        return found

    def _merged(self, schema: Json, seen: tuple[str, ...]) -> Json:
        """One schema of all that must hold at once; what cannot be joined is left out."""
        rest = {key: item for key, item in schema.items() if key not in ("$ref", "allOf")}
        parts: list[Any] = [*schema.get("allOf", [])]
        ref = schema.get("$ref")
        if isinstance(ref, str) and ref not in seen:
            parts.append(self._target(ref))
            seen = (*seen, ref)
        for part in parts:
            if isinstance(part, dict):
                rest = _joined(rest, self._merged(_unsaid(_sound(cast(Json, part))), seen))
        return rest

    def _takes_null(self, schema: Any, seen: tuple[str, ...]) -> bool:
        if not isinstance(schema, dict):
            return schema is not False
        part = _sound(cast(Json, schema))
        ref = part.get("$ref")
        if isinstance(ref, str):
            if ref in seen:
                return True
            if not self._takes_null(self._target(ref), (*seen, ref)):
                return False
        types = part.get("type", "null")
        return (
            "null" in ([types] if isinstance(types, str) else types)
            and None in part.get("enum", [None])
            and part.get("const") is None
            and all(self._takes_null(each, seen) for each in part.get("allOf", []))
            and all(
                any(self._takes_null(each, seen) for each in part[key])
                for key in ("anyOf", "oneOf")
                if key in part
            )
        )


def _anchored(part: Json | bool, name: str) -> bool:
    return isinstance(part, dict) and name in (part.get("$anchor"), part.get("$dynamicAnchor"))


def _said(schema: Json) -> Json:
    return {key: schema[key] for key in ("title", "description") if key in schema}


def _unsaid(schema: Json) -> Json:
    return {key: item for key, item in schema.items() if key not in ANNOTATIONS}


def _closed(properties: Json) -> Json:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _types(schema: Json) -> list[str]:
    """As it says, or as its keywords imply."""
    types = schema.get("type")
    if isinstance(types, str):
        return [types]
    if isinstance(types, list):
        return cast(list[str], types)
    return [each for each, keywords in IMPLIED.items() if schema.keys() & set(keywords)][:1]


def _kept(type_: str, schema: Json) -> Json:
    kept = {key: schema[key] for key in KEPT.get(type_, ()) if key in schema}
    if UNSAFE_PATTERN.search(str(kept.get("pattern", ""))):
        del kept["pattern"]
    if kept.get("format", FORMATS[0]) not in FORMATS:
        del kept["format"]
    return kept


def _enum(values: list[Any]) -> _Part:
    if not values or any(isinstance(value, (dict, list)) for value in values):
        return JSON_TEXT
    names = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
    types = list(dict.fromkeys(names.get(cast(Any, type(value)), "number") for value in values))
    return _Part({"type": types[0] if len(types) == 1 else types, "enum": values})


def _nullable(shown: Json) -> Json:
    said = _said(shown)
    if "$ref" in shown or "anyOf" in shown:
        options = shown.get("anyOf", [{key: shown[key] for key in ("$ref",) if key in shown}])
        return shown if NULL in options else {"anyOf": [*options, NULL], **said}
    types = _types(shown)
    if "null" in types:
        return shown
    if types in (["object"], ["array"]):
        return {"anyOf": [shown, NULL]}
    nullable = {**shown, "type": [*types, "null"]}
    return {**nullable, "enum": [*shown["enum"], None]} if "enum" in shown else nullable


def _joined(one: Json, other: Any) -> Any:
    """A schema of both, as far as one schema without `allOf` can say it."""
    if not isinstance(other, dict):
        return one if other else other
    other = _sound(cast(Json, other))
    joined = dict(one)
    for key, item in other.items():
        if key not in joined:
            joined[key] = item
        elif key == "properties":
            both = {
                name: _both(joined[key][name], each) if name in joined[key] else each
                for name, each in item.items()
            }
            joined[key] = {**joined[key], **both}
        elif key == "required":
            joined[key] = list(dict.fromkeys([*joined[key], *item]))
        elif key == "type":
            shared = [each for each in _types(joined) if each in _types(other)]
            joined[key] = shared or item
        elif key == "enum":
            joined[key] = [each for each in joined[key] if each in item] or item
        elif key == "items" and isinstance(item, dict):
            joined[key] = _both(joined[key], item)
        elif key == "additionalProperties" and item is False:
            joined[key] = False
    return joined


def _both(one: Any, other: Any) -> Json:
    is_list = isinstance(one, dict) and list(cast(Json, one)) == ["allOf"]
    return {"allOf": [*(one["allOf"] if is_list else [one]), other]}

"""What a schema says of each place of a document."""

from collections.abc import Iterator, Sequence
from decimal import Decimal
from functools import cached_property, lru_cache
from typing import Any, cast
from urllib.parse import unquote

from app.services.json_schema import (
    ANCHORS,
    MAX_PATTERNS,
    REFS,
    Json,
    JsonSchema,
    SchemaRejected,
    subschemas,
)

Schema = Json | bool

SCALAR = (
    *("type", "enum", "const", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    *("multipleOf", "pattern", "format", "minLength", "maxLength"),
)
NEWER = ("$dynamicRef", "$recursiveRef", "prefixItems", "dependentSchemas")  # than draft 7


class Place:
    """One place, by all subschemas that speak of it: through references, unions and conditions.

    Words that the schema's draft does not know may have values of any type: they say nothing.
    """

    def __init__(
        self, root: Json, schema: Schema | None = None, known: "dict[int, Place] | None" = None
    ) -> None:
        """`root` is known to be a valid schema; `schema`, which may refer to it, is by default it.

        known: the places of all that was met of this root, by the identity of their schemas.
        """
        self._root = root
        self._schema = root if schema is None else schema
        self._known: dict[int, Place] = {} if known is None else known
        self._below: dict[str | int, Place] = {}

    def member(self, key: str) -> "Place":
        """The place of this key's value in an object that stands here."""
        return self._step(key)

    def element(self, index: int) -> "Place":
        """The place of this element in a list that stands here."""
        return self._step(min(index, self._prefix))

    def _step(self, key: str | int) -> "Place":
        if key not in self._below:
            schema = self._child(self._schema, key)
            place = self._known.get(id(schema)) or Place(self._root, schema, self._known)
            self._known[id(schema)] = self._below[key] = place
        return self._below[key]

    @cached_property
    def names(self) -> list[str]:
        """The properties that are spoken of, in order."""
        return list(dict.fromkeys(name for part in self._parts for name in _properties(part)))

    @cached_property
    def is_list(self) -> bool:
        return any("array" in _types(part) for part in self._parts)

    @cached_property
    def is_chosen(self) -> bool:
        """Whether the value is one of those that the schema spells out."""
        return any("enum" in part or "const" in part for part in self._parts)

    @cached_property
    def is_number(self) -> bool:
        """Whether a number may stand here, as the schema says."""
        return any({"number", "integer"} & {*_types(part)} for part in self._parts)

    @cached_property
    def takes_text(self) -> bool:
        """Whether some text may stand here, going by the types alone."""
        return not _judge(self._scalar(self._schema, ("type",))).faults("")

    def fits(self, value: Any) -> bool:
        """Whether a scalar may stand here."""
        return not self._judge.faults(value, 1)

    def spells_out(self, value: Any) -> bool:
        """Whether this very value is one of an enum or a const."""
        return any(_is_same(word, value) for word in self._words)

    @cached_property
    def _words(self) -> list[Any]:
        enums = [word for part in self._parts for word in _list(part, "enum")]
        return [*enums, *(part["const"] for part in self._parts if "const" in part)]

    @cached_property
    def _judge(self) -> JsonSchema:
        return _judge(self._scalar(self._schema))

    @cached_property
    def _parts(self) -> list[Json]:
        return list(self._applying(self._schema))

    def _read(self, schema: Json) -> Json:
        """As its draft reads it: of draft 7 nothing beside a $ref."""
        if "draft-07" not in str(self._root.get("$schema")):
            return schema
        if "$ref" in schema:
            return {"$ref": schema["$ref"]}
        return {name: value for name, value in schema.items() if name not in NEWER}

    @cached_property
    def _prefix(self) -> int:
        """How many first elements of a list here have a schema of their own."""
        return max((len(_prefix(part)) for part in self._parts), default=0)

    def _applying(self, schema: Schema) -> Iterator[Json]:
        if isinstance(schema, dict):
            schema = self._read(schema)
            yield schema
            for part in (*self._all(schema), *_any(schema), *_maybe(schema)):
                yield from self._applying(part)

    def _all(self, schema: Json) -> list[Schema]:
        refs = (schema[name] for name in REFS if isinstance(schema.get(name), str))
        return [*(target(self._root, ref) for ref in refs), *_list(schema, "allOf")]

    def _child(self, schema: Schema, key: str | int) -> Schema:
        if not isinstance(schema, dict):
            return True
        schema = self._read(schema)
        found = [*_own(schema, key), *(self._child(part, key) for part in self._all(schema))]
        if choices := _any(schema):
            found.append({"anyOf": [self._child(part, key) for part in choices]})
        if choices := _maybe(schema):
            found.append({"anyOf": [True, *(self._child(part, key) for part in choices)]})
        found = [part for part in found if part is not True]
        return found[0] if len(found) == 1 else {"allOf": found} if found else True

    def _scalar(self, schema: Schema, keywords: Sequence[str] = SCALAR) -> Schema:
        """The schema without references, as far as its own keywords are these."""
        if not isinstance(schema, dict):
            return schema
        schema = self._read(schema)
        found = {name: schema[name] for name in keywords if name in schema}
        if parts := self._all(schema):
            found["allOf"] = [self._scalar(part, keywords) for part in parts]
        if choices := _any(schema):
            found["anyOf"] = [self._scalar(part, keywords) for part in choices]
        return found


def target(root: Json, ref: str) -> Schema:
    """What a local reference (`#`, `#/...`, `#anchor`) refers to; True where there is no such."""
    path = unquote(ref[1:])
    found: Any = root
    if path and not path.startswith("/"):
        parts = [root]
        for part in parts:
            parts += subschemas(part)
        named = (part for part in parts if any(part.get(name) == path for name in ANCHORS))
        return next(named, True)
    for step in keys(path):
        if isinstance(found, list):
            items = cast(list[Any], found)
            found = items[int(step)] if step.isdecimal() and int(step) < len(items) else None
        else:
            found = cast(Json, found).get(step) if isinstance(found, dict) else None
    return cast(Schema, found) if isinstance(found, (dict, bool)) else True


def keys(pointer: str) -> list[str]:
    """The steps of a JSON Pointer (RFC 6901)."""
    return [step.replace("~1", "/").replace("~0", "~") for step in pointer.split("/")[1:]]


def _judge(schema: Schema) -> JsonSchema:
    """Of what cannot be used by itself, anything."""
    try:
        return JsonSchema(schema)
    except SchemaRejected:
        return JsonSchema(True)


def _list(schema: Json, name: str) -> list[Any]:
    value: Any = schema.get(name)
    return cast(list[Any], value) if isinstance(value, list) else []


def _object(schema: Json, name: str) -> Json:
    value: Any = schema.get(name)
    return cast(Json, value) if isinstance(value, dict) else {}


def _any(schema: Json) -> list[Schema]:
    return [*_list(schema, "anyOf"), *_list(schema, "oneOf")]


def _maybe(schema: Json) -> list[Schema]:
    conditional = [schema[name] for name in ("then", "else") if name in schema]
    return [*conditional, *_object(schema, "dependentSchemas").values()]


def _types(schema: Json) -> Sequence[str]:
    if "type" not in schema:
        return ["array"] if "items" in schema or "prefixItems" in schema else []
    kinds: Any = schema["type"]
    return [kind for kind in (_list(schema, "type") or [kinds]) if isinstance(kind, str)]


def _properties(schema: Json) -> Json:
    return _object(schema, "properties")


def _prefix(schema: Json) -> Sequence[Schema]:
    return _list(schema, "items") or _list(schema, "prefixItems")


def _own(schema: Json, key: str | int) -> list[Schema]:
    """What this schema alone says of a place right below."""
    if isinstance(key, int):
        prefix = _prefix(schema)
        if key < len(prefix):
            return [prefix[key]]
        rest = "additionalItems" if isinstance(schema.get("items"), list) else "items"
        return [schema.get(rest, True)]
    properties = _properties(schema)
    patterns = _object(schema, "patternProperties")
    found = [properties[key]] if key in properties else []
    found += [part for pattern, part in patterns.items() if _matches(pattern, key)]
    return found or [schema.get("additionalProperties", True)]


def _matches(pattern: str, key: str) -> bool:
    return not _pattern(pattern).faults(key, 1)


@lru_cache(MAX_PATTERNS)
def _pattern(pattern: str) -> JsonSchema:
    return _judge({"pattern": pattern})


def _is_same(word: Any, value: Any) -> bool:
    if isinstance(word, bool) or isinstance(value, bool):
        return word is value
    if isinstance(value, (int, float, Decimal)) and isinstance(word, (int, float, Decimal)):
        return Decimal(str(word)) == Decimal(str(value))
    return word == value

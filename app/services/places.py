"""What a schema says of each place of a document."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, cast
from urllib.parse import unquote

from app.services.json_schema import ANCHORS, REFS, Json, JsonSchema, subschemas

Schema = Json | bool

SCALAR = (
    *("type", "enum", "const", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    *("multipleOf", "pattern", "format", "minLength", "maxLength"),
)


class Place:
    """One place, by all subschemas that speak of it: through references, unions and conditions."""

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
    def takes_text(self) -> bool:
        """Whether some text may stand here, going by the types alone."""
        return not JsonSchema(self._scalar(self._schema, ("type",))).faults("")

    def fits(self, value: Any) -> bool:
        """Whether a scalar may stand here."""
        return not self._judge.faults(value, 1)

    @cached_property
    def _judge(self) -> JsonSchema:
        return JsonSchema(self._scalar(self._schema))

    @cached_property
    def _parts(self) -> list[Json]:
        return list(self._applying(self._schema))

    @cached_property
    def _prefix(self) -> int:
        """How many first elements of a list here have a schema of their own."""
        return max((len(_prefix(part)) for part in self._parts), default=0)

    def _applying(self, schema: Schema) -> Iterator[Json]:
        if isinstance(schema, dict):
            yield schema
            for part in (*self._all(schema), *_any(schema), *_maybe(schema)):
                yield from self._applying(part)

    def _all(self, schema: Json) -> list[Schema]:
        refs = [target(self._root, schema[name]) for name in REFS if name in schema]
        return [*refs, *schema.get("allOf", ())]

    def _child(self, schema: Schema, key: str | int) -> Schema:
        if not isinstance(schema, dict):
            return True
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


def _any(schema: Json) -> list[Schema]:
    return [*schema.get("anyOf", ()), *schema.get("oneOf", ())]


def _maybe(schema: Json) -> list[Schema]:
    conditional = [schema[name] for name in ("then", "else") if name in schema]
    return [*conditional, *schema.get("dependentSchemas", {}).values()]


def _types(schema: Json) -> Sequence[str]:
    kinds = schema.get("type", "array" if "items" in schema or "prefixItems" in schema else ())
    return [kinds] if isinstance(kinds, str) else kinds


def _properties(schema: Json) -> Json:
    return schema.get("properties", {})


def _prefix(schema: Json) -> Sequence[Schema]:
    items = schema.get("items")
    return cast(list[Schema], items) if isinstance(items, list) else schema.get("prefixItems", ())


def _own(schema: Json, key: str | int) -> list[Schema]:
    """What this schema alone says of a place right below."""
    if isinstance(key, int):
        prefix = _prefix(schema)
        if key < len(prefix):
            return [prefix[key]]
        rest = "additionalItems" if isinstance(schema.get("items"), list) else "items"
        return [schema.get(rest, True)]
    properties = _properties(schema)
    patterns = cast(Json, schema.get("patternProperties", {}))
    found = [properties[key]] if key in properties else []
    found += [part for pattern, part in patterns.items() if _matches(pattern, key)]
    return found or [schema.get("additionalProperties", True)]


def _matches(pattern: str, key: str) -> bool:
    return not JsonSchema({"pattern": pattern}).faults(key, 1)

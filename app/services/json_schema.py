"""JSON Schemas sent by callers: `bounded` as they come, then `JsonSchema` judges every answer."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote

from app.core.errors import AppError, Invalid
from app.core.json import whole

if TYPE_CHECKING:
    from jsonschema_rs import ValidationError

MAX_DEPTH = 64
MAX_NODES = 10_000  # with every reference written out
MAX_BYTES = 1024 * 1024
MAX_PATTERNS = 64  # different ones, or parts of such as are compiled by their parts
PATTERNS_SIZE = 8 * 1024 * 1024  # bytes of all of them compiled, which takes some 80 ms
BACKTRACKS = 100_000  # steps of one match, some 2 ms: only look-arounds and \1 take any
MAX_JUDGED = 20_000  # parts of the schema times parts of the value; all faults of so much: 0.2 s
PART = 1000  # characters of a text that count as one part
MESSAGE = 300  # characters of what the validator says, which may quote the whole answer

Json = dict[str, Any]

NAMED = (
    *("properties", "patternProperties", "dependentSchemas", "dependencies"),
    *("$defs", "definitions"),
)
DATA = ("const", "enum", "default", "examples")
REFS = ("$ref", "$dynamicRef", "$recursiveRef")
ANCHORS = ("$anchor", "$dynamicAnchor")
IDS = ("$id", "id")

DRAFTS = "7, 2019-09 and 2020-12"
OLD_DRAFT = re.compile(r"https?://json-schema\.org/draft-0[0-6]/")
# Compiled part by part: look-arounds, atomic groups, back references, possessive repetition.
FANCY = re.compile(r"\(\?(?!:)|\\[1-9kKgG]|[*+?}]\+")
PIECE = re.compile(r"[()|]|\\[1-9kKgG]|[*+?}]\+")


class SchemaRejected(Invalid):
    """The schema itself cannot be used; `reason` says why in one word.

    invalid: no JSON Schema, or it refers to what it does not hold. remote_ref: refers to
    something outside itself, by `$ref` or `$schema`. recursive_ref: refers to itself. too_deep,
    too_large: beyond MAX_DEPTH levels, or MAX_NODES parts or MAX_PATTERNS patterns, with every
    reference written out. unsupported: an `$id` below the root, or a draft before 7.
    unsupported_pattern: a regular expression that does not compile, or only to more than
    its share of PATTERNS_SIZE.
    """

    code = "schema_rejected"

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message, param="schema", reason=reason)


class SchemaTooLarge(AppError):
    """Over MAX_BYTES as JSON."""

    status = 413
    code = "too_large"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong with a document: where (a JSON Pointer), by which keyword, in words."""

    pointer: str
    keyword: str
    message: str

    def __str__(self) -> str:
        return f"{self.pointer or '/'}: {self.message}"


def _refuse(uri: str) -> Any:
    raise LookupError(f"remote reference {uri}")


class JsonSchema:
    """A compiled schema, of any draft from 7 to 2020-12. Never fetches a reference.

    Formats are asserted; unknown ones are ignored. Patterns run in linear time but for those
    with look-arounds or back references, which fail after BACKTRACKS steps.
    """

    def __init__(self, schema: Json | bool) -> None:
        """Raises SchemaRejected. A stranger's schema has to be `bounded` first."""
        import jsonschema_rs  # lazily: most runs carry no schema

        self.schema = schema
        share = PATTERNS_SIZE // max(1, sum(map(_pieces, _patterns(schema))))
        try:
            self._validator = jsonschema_rs.validator_for(
                schema,
                validate_formats=True,
                retriever=_refuse,
                pattern_options=jsonschema_rs.FancyRegexOptions(
                    backtrack_limit=BACKTRACKS, size_limit=share
                ),
            )
        except jsonschema_rs.ValidationError as error:
            raise _unusable(error) from error
        except (jsonschema_rs.ReferencingError, ValueError) as error:
            raise SchemaRejected(f"This is no JSON Schema: {_line(error)}", "invalid") from error

    def faults(self, value: Any, limit: int = 20) -> list[Fault]:
        """What is wrong with the value, at most `limit` faults; empty where it is valid.

        Where no branch of a union fits, what is wrong by the nearest. Of what would take over
        MAX_JUDGED to tell, the first fault alone.
        """
        if self._validator.is_valid(value):
            return []
        if self._size * _size(value) > MAX_JUDGED:
            return self._brief.faults(value)[:limit]
        return self.told(value, limit)

    def told(self, value: Any, limit: int) -> list[Fault]:
        found: list[Fault] = []
        for error in self._validator.iter_errors(value):
            found += _faults(error)
            if len(found) >= limit:
                break
        return found[:limit]

    def first(self, value: Any) -> "ValidationError | None":
        import jsonschema_rs

        try:
            self._validator.validate(value)
        except jsonschema_rs.ValidationError as error:
            return error
        return None

    @cached_property
    def _size(self) -> int:
        return _written_size(self.schema, self.schema)

    @cached_property
    def _brief(self) -> "_Brief":
        return _Brief(self.schema)


class _Brief:
    """Tells what is wrong first, and of a union only where that is not too much to tell.

    The validator tells all by all branches of a union before it tells anything. So it is given a
    copy: of each union only whether it holds, but of what may be null what is wrong otherwise.
    """

    def __init__(self, schema: Json | bool) -> None:
        self._root = schema
        self._unions: list[Json] = []
        try:
            self._judge = JsonSchema(self._copied(schema))
        except SchemaRejected:  # it refers into a union
            self._judge = None

    def faults(self, value: Any) -> list[Fault]:
        error = self._judge.first(value) if self._judge else None
        if error is None:
            return [Fault("", "schema", "does not fit the schema")]
        expected = getattr(error.kind, "expected_value", None)
        number = cast(Json, expected).get(UNION) if isinstance(expected, dict) else None
        if not isinstance(number, int):
            return _faults(error)
        for step in error.instance_path:
            value = value[step]
        return self._of_union(self._unions[number], value, pointer(error.instance_path))

    def _of_union(self, union: Json, value: Any, path: str) -> list[Fault]:
        [name] = union
        brief = Fault(path, name, f"does not fit the alternatives of {name}")
        if _written_size(self._root, union) * _size(value) > MAX_JUDGED:
            return [brief]
        try:
            judge = within(self._root, union)
        except SchemaRejected:  # anchors that it shares with its root
            return [brief]
        found = judge.told(value, 20)
        return [Fault(path + each.pointer, each.keyword, each.message) for each in found] or [brief]

    def _copied(self, schema: Any) -> Any:
        if not isinstance(schema, dict):
            return schema
        copy: Json = {}
        unions: list[Json] = []
        for key, item in cast(Json, schema).items():
            if key in UNIONS and isinstance(item, list):
                unions.append(self._condition(key, cast(list[Any], item)))
            elif key in NAMED and isinstance(item, dict):
                copy[key] = {name: self._copied(each) for name, each in cast(Json, item).items()}
            elif isinstance(item, list) and key not in DATA:
                copy[key] = [self._copied(each) for each in cast(list[Any], item)]
            else:
                copy[key] = item if key in DATA else self._copied(item)
        return {**copy, "allOf": [*copy.get("allOf", []), *unions]} if unions else copy

    def _condition(self, name: str, branches: list[Any]) -> Json:
        """The union as a condition, which says only that it does not hold."""
        others = [each for each in branches if each != NULL]
        if name == "anyOf" and len(others) == 1 < len(branches):
            return {"if": NULL, "else": self._copied(others[0])}
        self._unions.append({name: branches})
        return {"if": {name: branches}, "else": {"const": {UNION: len(self._unions) - 1}}}


UNIONS = ("anyOf", "oneOf")
UNION = "\0union"  # marks the condition that stands for a union
NULL: Json = {"type": "null"}


def within(root: Json | bool, part: Json | bool) -> JsonSchema:
    """The judge by a part of the schema, which may refer to all of it. Raises SchemaRejected."""
    if isinstance(root, bool) or isinstance(part, bool):
        return JsonSchema(part)
    place = "#/$defs/root"
    draft = {key: root[key] for key in ("$schema",) if key in root}
    bare = {key: item for key, item in root.items() if key not in ("$schema", *IDS)}
    defs = {"root": moved(bare, place), "part": moved(part, place)}
    below = {"allOf": [{"$ref": "#/$defs/part"}]}  # draft 7 reads nothing beside a $ref
    return JsonSchema({**draft, "$defs": defs, **below})


def bounded(schema: Json | bool) -> None:
    """Refuses a schema that cannot be kept, sent on, or judged by within bounds.

    How long an answer takes to judge is bounded too: no reference leads back to where it came
    from, and all of them written out are not too many. Raises SchemaRejected, SchemaTooLarge.
    """
    _check(schema)
    if isinstance(schema, dict):
        if OLD_DRAFT.match(str(schema.get("$schema", ""))):
            raise SchemaRejected(
                f"The schema's draft is too old; those of {DRAFTS} are read.", "unsupported"
            )
        _Written(schema).out(schema)


def as_object(schema: Json | bool) -> Json:
    """The same schema in JSON Schema's longer words for `true` and `false`."""
    if isinstance(schema, bool):
        return {} if schema else {"not": {}}
    return schema


def _unusable(error: "ValidationError") -> SchemaRejected:
    kind, said = error.kind.name, _cut(error.message)
    if kind == "format" and str(getattr(error.kind, "format", "")) == "regex":
        return SchemaRejected(
            f"The pattern {_cut(str(error.instance))!r} does not compile, or is too large.",
            "unsupported_pattern",
        )
    if type(error.kind).__name__ == "Referencing" and "does not exist" not in said:
        return _remote()
    return SchemaRejected(f"This is no JSON Schema: {said}", "invalid")


def _faults(error: "ValidationError") -> list[Fault]:
    """As the validator tells it, and of a union what is wrong by the nearest branch."""
    kind = error.kind
    if (branches := getattr(kind, "context", None)) and all(branches):
        return _nearest(cast("list[list[ValidationError]]", branches), len(error.instance_path))
    if type(kind).__name__ == "FalseSchema":
        keyword = str(error.schema_path[-1]) if error.schema_path else "schema"
        return [Fault(pointer(error.instance_path), keyword, "nothing is allowed here")]
    return [Fault(pointer(error.instance_path), kind.name, _cut(error.message))]


def _nearest(branches: "list[list[ValidationError]]", depth: int) -> list[Fault]:
    """The faults by the branch that was meant. Where none takes a value of this kind at all, one
    fault that says what each would take."""
    ranked = sorted(branches, key=lambda errors: _distance(errors, depth))
    if not _distance(ranked[0], depth)[0]:
        return [fault for error in ranked[0] for fault in _faults(error)]
    faults = [fault for errors in ranked for error in errors for fault in _faults(error)]
    here = [fault for fault in faults if fault.pointer == faults[0].pointer]
    words = dict.fromkeys(fault.message for fault in here)
    return [Fault(here[0].pointer, here[0].keyword, _cut("; or ".join(words)))]


def _distance(errors: "list[ValidationError]", depth: int) -> tuple[bool, int, int]:
    """How far a branch is from the value: of another type or constant altogether; how many of its
    constants differ, such as a discriminator; how many errors."""
    constants = [error for error in errors if error.kind.name in ("const", "enum")]
    return (
        any(_is_alien(error, depth) for error in errors),
        sum(len(error.instance_path) == depth + 1 for error in constants),
        len(errors),
    )


def _is_alien(error: "ValidationError", depth: int) -> bool:
    """Whether the value at this depth, not a part of it, is of the wrong type or constant."""
    if len(error.instance_path) != depth:
        return False
    branches = cast("list[list[ValidationError]]", getattr(error.kind, "context", None) or [])
    if branches:
        return all(any(_is_alien(each, depth) for each in errors) for errors in branches)
    return error.kind.name in ("type", "const", "enum", "falseSchema")


def pointer(path: Iterable[Any]) -> str:
    """A path as a JSON Pointer (RFC 6901)."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)


def subschemas(schema: Json) -> Iterator[Json]:
    """The schemas right below this one; data that only looks like one is none."""
    for key, value in schema.items():
        if key in DATA:
            continue
        many = key in NAMED or isinstance(value, list)
        items: Iterable[Any] = _children(value) if many else [value]
        yield from (cast(Json, item) for item in items if isinstance(item, dict))


def moved(schema: Json, root: str) -> Json:
    """The schema with its local references pointing to where its root now stands."""

    def follow(key: str, value: Any) -> Any:
        if key in DATA:
            return value
        if key in REFS and isinstance(value, str):
            return root + value[1:] if value == "#" or value.startswith("#/") else value
        if key in NAMED and isinstance(value, dict):
            return {name: below(item) for name, item in cast(Json, value).items()}
        return below(value)

    def below(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: follow(key, item) for key, item in cast(Json, value).items()}
        if isinstance(value, list):
            return [below(item) for item in cast(list[Any], value)]
        return value

    return below(schema)


def _line(error: Exception) -> str:
    return _cut(str(error).splitlines()[0])


def _cut(text: str) -> str:
    return text if len(text) <= MESSAGE else f"{text[:MESSAGE]}..."


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from cast(Json, value).values()
    elif isinstance(value, list):
        yield from cast(list[Any], value)


def _names(value: Any) -> Iterable[str]:
    return cast(Json, value) if isinstance(value, dict) else ()


def measure(value: Any) -> tuple[int, int]:
    """How many levels of arrays and objects, and how many parts; stops counting when too deep."""
    level, levels, parts = [value], 0, 0
    while levels <= MAX_DEPTH and (level := [part for item in level for part in _children(item)]):
        levels += 1
        parts += len(level)
    return levels, parts


def check_value(value: Any, param: str) -> None:
    """Raises Invalid for what no answer could be, and no database keeps."""
    if measure(value)[0] > MAX_DEPTH:
        raise Invalid(f"A document is at most {MAX_DEPTH} levels deep.", param=param)
    try:
        json.dumps(value, allow_nan=False)
    except ValueError as error:
        raise Invalid("A number is too large, or none at all.", param=param) from error
    if whole(value) != value:
        raise Invalid("A text holds half of a surrogate pair.", param=param)


def _check(schema: Any) -> None:
    """Refuses what is too large to be looked at more closely, or is no JSON at all."""
    if not isinstance(schema, (dict, bool)):
        raise SchemaRejected("A JSON Schema is an object, true or false.", "invalid")
    levels, parts = measure(schema)
    if levels > MAX_DEPTH:
        raise _too_deep()
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        size = len(text.encode())
    except ValueError as error:  # also of half a surrogate pair, which is no Unicode
        raise SchemaRejected(
            "This is no JSON Schema: it holds a number or a text that JSON does not know.",
            "invalid",
        ) from error
    if size > MAX_BYTES:
        raise SchemaTooLarge(f"The schema has over {MAX_BYTES} bytes.", param="schema")
    if parts > MAX_NODES:
        raise _too_large()


def _too_large() -> SchemaRejected:
    return SchemaRejected(
        f"The schema has over {MAX_NODES} parts, counting each as often as it is referred to.",
        "too_large",
    )


def _too_deep() -> SchemaRejected:
    return SchemaRejected(f"The schema is over {MAX_DEPTH} levels deep.", "too_deep")


def _remote() -> SchemaRejected:
    return SchemaRejected(
        "The schema refers to something outside itself; only references like '#/$defs/item' work.",
        "remote_ref",
    )


@dataclass(slots=True)
class _Written:
    """A schema written out: with a copy of what is referred to in the place of each reference."""

    root: Json
    known: dict[int, tuple[int, int]] = field(default_factory=dict[int, tuple[int, int]])
    open: set[int] = field(default_factory=set[int])
    anchors: dict[str, Json] = field(default_factory=dict[str, Json])

    def __post_init__(self) -> None:
        parts = [self.root]
        for part in parts:
            parts += subschemas(part)
            self.anchors |= {str(part[name]): part for name in ANCHORS if name in part}
        if sum(map(_pieces, _patterns(self.root))) > MAX_PATTERNS:
            raise SchemaRejected(
                f"The schema has over {MAX_PATTERNS} different patterns, counting each group and "
                "alternative of those with look-arounds or back references.",
                "too_large",
            )

    def out(self, schema: Any, depth: int = 0) -> tuple[int, int]:
        """How many parts and how many levels. Raises SchemaRejected."""
        if not isinstance(schema, dict):
            return 1, 0
        part, place = cast(Json, schema), id(cast(Json, schema))
        if place in self.open:
            raise SchemaRejected(
                "The schema refers to itself; write out as many levels as you need.",
                "recursive_ref",
            )
        if place in self.known:
            return self.known[place]
        if depth > MAX_DEPTH:
            raise _too_deep()
        if part is not self.root and any(isinstance(part.get(name), str) for name in IDS):
            raise SchemaRejected("Only the root of a schema may have an `$id`.", "unsupported")
        self.open.add(place)
        targets = [self._target(part[name]) for name in REFS if isinstance(part.get(name), str)]
        below = [self.out(item, depth + 1) for item in (*subschemas(part), *targets)]
        self.open.discard(place)
        size = 1 + _words(part) + sum(parts for parts, _ in below)
        height = 1 + max((levels for _, levels in below), default=0)
        if size > MAX_NODES:
            raise _too_large()
        if height > MAX_DEPTH:
            raise _too_deep()
        self.known[place] = size, height
        return size, height

    def _target(self, ref: str) -> Any:
        if not ref.startswith("#"):
            raise _remote()
        path = unquote(ref[1:])
        found: Any = self.anchors.get(path) if path[:1] not in ("", "/") else self.root
        for part in path.split("/")[1:]:
            found = _step(found, part.replace("~1", "/").replace("~0", "~"))
        if found is None:
            raise SchemaRejected(
                f"The schema refers to {_cut(ref)!r}, which it does not hold.", "invalid"
            )
        return found


def _words(schema: Json) -> int:
    """How many names and values it lists, each of which takes as long to judge as a schema."""
    lists = [cast(list[Any], item) for item in schema.values() if isinstance(item, list)]
    return sum(not isinstance(each, dict) for items in lists for each in items)


def _patterns(schema: Json | bool) -> set[str]:
    """All different ones."""
    parts, patterns = [schema] if isinstance(schema, dict) else [], set[str]()
    for part in parts:
        parts += subschemas(part)
        patterns |= {str(part.get("pattern", "")), *_names(part.get("patternProperties"))}
    return patterns


def _pieces(pattern: str) -> int:
    """Of how many parts it may be compiled."""
    return 1 + len(PIECE.findall(pattern)) if FANCY.search(pattern) else bool(pattern)


def _written_size(root: Any, schema: Any) -> int:
    """In parts with every reference written out; as it stands if it refers to itself."""
    if not isinstance(root, dict):
        return 1
    try:
        return _Written(cast(Json, root)).out(schema)[0]
    except SchemaRejected:
        return 1 + measure(root)[1]


def _size(value: Any) -> int:
    """In parts, a long text counting as many."""
    level, size = [value], 0
    while level:
        size += len(level) + sum(len(each) // PART for each in level if isinstance(each, str))
        level = [part for item in level for part in _children(item)]
    return size


def _step(value: Any, part: str) -> Any:
    if isinstance(value, dict):
        return cast(Json, value).get(part)
    if isinstance(value, list) and part.isdigit() and len(part) < 6:
        items = cast(list[Any], value)
        return items[int(part)] if int(part) < len(items) else None
    return None

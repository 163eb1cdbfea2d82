"""Whether readers of documents under one schema can read those under the next."""

import math
from typing import Any, cast

from app.schemas.schema import Compat
from app.services.answers import digest
from app.services.json_schema import Json, measure, subschemas

MAX_EFFORT = 70_000  # in squared cases: some 0.3 s


def compare(old: Json | bool, new: Json | bool) -> Compat:
    """`compatible` where every document that is valid under the new schema is under the old one.

    That is for those who read results: required properties stay, others may be added where the
    old schema allows them; no type, enumeration or range becomes wider. Schemas which say the
    same in other words are compatible. What cannot be proved counts as breaking: patterns that
    differ, drafts that differ, unions of very many cases. Both schemas have to be `bounded`.
    """
    if digest(old) == digest(new):
        return "identical"
    import jsonschema_rs  # lazily: most processes compare nothing

    if max(_effort(old), _effort(new)) > MAX_EFFORT:
        return "breaking"
    try:
        before, after = (
            jsonschema_rs.canonicalize(schema, validate_formats=True, offline=True)
            for schema in (old, new)
        )
        proved = before.covers(after) == jsonschema_rs.canonical.Containment.YES
    except ValueError:  # words that it cannot compare
        return "breaking"
    return "compatible" if proved else "breaking"


def _effort(schema: Json | bool) -> int:
    """How long the comparison can take: quadratic in the cases of each part."""
    import jsonschema_rs

    if isinstance(schema, bool):
        return 1
    whole: Any = jsonschema_rs.dereference(schema, offline=True)
    parts, effort = [cast(Json, whole)] if isinstance(whole, dict) else [], 0
    for part in parts:
        parts += subschemas(part)
        cases = _cases(part)
        effort += cases * cases if cases > 1 else 0
        if effort > MAX_EFFORT:
            break
    return effort


def _cases(schema: Any) -> int:
    """Into how many alternatives a schema falls apart where it stands."""
    if not isinstance(schema, dict):
        return 1
    part = cast(Json, schema)
    unions = [
        sum(map(_cases, cast(list[Any], part[key])))
        for key in ("anyOf", "oneOf")
        if isinstance(part.get(key), list)
    ]
    joined = [_cases(each) for each in cast(list[Any], part.get("allOf") or [])]
    opposed = [1 + measure(part[key])[1] for key in ("not", "if") if key in part]
    implied = [2 ** min(20, len(part[key])) for key in part if key.startswith("depend")]
    multiple = 4 if "multipleOf" in part else 1  # many of them at once have a large one in common
    return min(math.prod([*unions, *joined, *opposed, *implied, multiple]), MAX_EFFORT)

"""JSON Schemas sent by callers: checked once, then the judge of every answer."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from app.core.errors import Invalid

MAX_DEPTH = 64
MAX_NODES = 20_000


class SchemaRejected(Invalid):
    """The schema itself cannot be used; `reason` says why in one word."""

    code = "schema_rejected"


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
    """A compiled schema, of any draft from 7 to 2020-12. Never fetches a reference."""

    def __init__(self, schema: dict[str, Any] | bool) -> None:
        """Raises SchemaRejected."""
        import jsonschema_rs  # lazily: most runs carry no schema

        _measure(schema)
        self.schema = schema
        try:
            self._validator = jsonschema_rs.validator_for(
                schema, validate_formats=True, retriever=_refuse
            )
        except jsonschema_rs.ReferencingError as error:
            raise SchemaRejected(
                "The schema refers to something outside itself; only local references work.",
                reason="remote_ref",
            ) from error
        except (jsonschema_rs.ValidationError, ValueError) as error:
            message = str(error).splitlines()[0]
            raise SchemaRejected(f"This is no JSON Schema: {message}", reason="invalid") from error

    def faults(self, value: Any, limit: int = 20) -> list[Fault]:
        """What is wrong with the value, at most `limit` faults; empty where it is valid."""
        found: list[Fault] = []
        for error in self._validator.iter_errors(value):
            keyword = str(error.schema_path[-1]) if error.schema_path else "schema"
            pointer = "".join(f"/{escape(str(part))}" for part in error.instance_path)
            found.append(Fault(pointer, keyword, error.message))
            if len(found) == limit:
                break
        return found


def escape(part: str) -> str:
    """A key as it stands in a JSON Pointer (RFC 6901)."""
    return part.replace("~", "~0").replace("/", "~1")


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def _measure(schema: Any) -> None:
    level, nodes = [schema], 0
    for _ in range(MAX_DEPTH):
        level = [child for value in level for child in _children(value)]
        nodes += len(level)
        if nodes > MAX_NODES:
            raise SchemaRejected(f"The schema has over {MAX_NODES} parts.", reason="too_large")
        if not level:
            return
    raise SchemaRejected(f"The schema is over {MAX_DEPTH} levels deep.", reason="too_deep")

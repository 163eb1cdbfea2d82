"""The wire shapes of stored schemas."""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Compat = Literal["identical", "compatible", "breaking"]


class StrictFault(BaseModel):
    """What keeps a schema from OpenAI's strict mode as it is; models are shown a relaxed copy."""

    pointer: str
    keyword: str
    message: str


class SchemaSummary(BaseModel):
    """A schema by its latest version. `registered`: a class of the server's own, with one version
    that changes with the server."""

    name: str
    version: int
    sha256: str
    registered: bool = False
    created_at: datetime | None = None


class SchemaVersionSummary(SchemaSummary):
    """compat: with the version before it; None for the first."""

    compat: Compat | None = None


class PublishedVersion(SchemaVersionSummary):
    strict_report: list[StrictFault]


class StoredVersion(PublishedVersion):
    schema_: dict[str, Any] | bool = Field(alias="schema")

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)


class SchemaList(BaseModel):
    data: list[SchemaSummary]


class SchemaVersions(BaseModel):
    """Oldest first."""

    name: str
    registered: bool
    versions: list[SchemaVersionSummary]


class CheckedSchema(BaseModel):
    ok: Literal[True] = True
    sha256: str
    strict_report: list[StrictFault]

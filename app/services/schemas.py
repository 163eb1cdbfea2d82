"""Schemas under names: the server's own classes, and what users keep in immutable versions."""

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, func, insert, select
from sqlalchemy.ext.asyncio import AsyncEngine

from app.core.errors import Conflict, Invalid, NotFound
from app.core.security import Caller
from app.db.session import reading, writing
from app.models import SchemaVersion, User
from app.schemas.extraction import SCHEMA_NAME
from app.schemas.extractions import all_schemas
from app.schemas.schema import (
    CheckedSchema,
    PublishedVersion,
    SchemaSummary,
    SchemaVersions,
    SchemaVersionSummary,
    StoredVersion,
    StrictFault,
)
from app.services.answers import digest
from app.services.compatibility import compare
from app.services.json_schema import Json, JsonSchema, as_object, bounded
from app.services.strict import report

MAX_VERSIONS = 1000  # of one name
NAMED = 20  # in the message about a schema that is not there
LATEST = "latest"
VERSION = f"{LATEST}|[1-9][0-9]{{0,8}}"
RESERVED = ("inline", "check", LATEST)  # what these say elsewhere


class SchemaNotFound(NotFound):
    """No such schema or version, or somebody else's: the two look the same."""

    code = "schema_not_found"


class NameTaken(Conflict):
    """The name is a class of the server's own, or has a meaning of its own."""

    code = "name_taken"


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a `schema_ref` names. `body` and `version` are None for a registered class."""

    name: str
    version: int | None
    body: Json | None
    sha256: str


class Schemas:
    """All schemas of all owners, each seen by its owner alone; registered classes by everyone."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._reads = reading(engine)
        self._writes = writing(engine)

    async def publish(
        self, caller: Caller, name: str, schema: Json | bool
    ) -> tuple[PublishedVersion, bool]:
        """The version with this content, and whether it is new.

        Its `compat` compares with the version that was the latest until now. Raises Invalid for
        the name, NameTaken, SchemaRejected, SchemaTooLarge, and Conflict after MAX_VERSIONS.
        """
        if not re.fullmatch(SCHEMA_NAME, name):
            raise Invalid(
                f"A schema's name is a letter, then letters, digits, '-' and '_', at most 64; "
                f"{name[:64]!r} is not.",
                param="name",
            )
        if name in RESERVED or name in all_schemas():
            raise NameTaken(f"The name {name!r} is taken by the server; choose another.")
        checked = check(schema)
        mine = _of(caller, name)
        async with self._writes.begin() as connection:
            # Of two at once, the second sees what the first has stored.
            await connection.execute(
                select(User.id).where(User.id == caller.user_id).with_for_update(key_share=True)
            )
            latest = (
                await connection.execute(
                    select(SchemaVersion.__table__)
                    .where(mine)
                    .order_by(SchemaVersion.version.desc())
                    .limit(1)
                )
            ).one_or_none()
            same = (
                await connection.execute(
                    select(*SUMMARY).where(mine, SchemaVersion.sha256 == checked.sha256)
                )
            ).one_or_none()
            compat = compare(json.loads(latest.body), schema) if latest else None
            if same is not None:
                version, created_at = same.version, same.created_at
            else:
                version = latest.version + 1 if latest else 1
                created_at = datetime.now(UTC)
                if version > MAX_VERSIONS:
                    raise Conflict(
                        f"{name!r} has {MAX_VERSIONS} versions, which is the most; go on under "
                        "another name.",
                        code="too_many_versions",
                    )
                await connection.execute(
                    insert(SchemaVersion).values(
                        owner_id=caller.user_id,
                        name=name,
                        version=version,
                        sha256=checked.sha256,
                        compat=compat,
                        body=json.dumps(schema),
                        created_at=created_at,
                    )
                )
        published = PublishedVersion(
            name=name,
            version=version,
            sha256=checked.sha256,
            compat=compat,
            created_at=created_at,
            strict_report=checked.strict_report,
        )
        return published, same is None

    async def list(self, caller: Caller) -> list[SchemaSummary]:
        """The latest version of each: registered classes, then the caller's own, by name."""
        newest = (
            select(SchemaVersion.name, func.max(SchemaVersion.version).label("version"))
            .where(SchemaVersion.owner_id == caller.user_id)
            .group_by(SchemaVersion.name)
            .subquery()
        )
        query = (
            select(*SUMMARY)
            .join(
                newest,
                (SchemaVersion.name == newest.c.name) & (SchemaVersion.version == newest.c.version),
            )
            .where(SchemaVersion.owner_id == caller.user_id)
            .order_by(SchemaVersion.name)
        )
        async with self._reads.connect() as connection:
            rows = (await connection.execute(query)).mappings()
            own = [SchemaSummary(**row) for row in rows if row["name"] not in all_schemas()]
        return [*(_registered(name) for name in all_schemas()), *own]

    async def versions(self, caller: Caller, name: str) -> SchemaVersions:
        """Raises SchemaNotFound."""
        if name in all_schemas():
            return SchemaVersions(name=name, registered=True, versions=[_registered(name)])
        found: list[SchemaVersionSummary] = []
        if re.fullmatch(SCHEMA_NAME, name):
            query = select(*SUMMARY).where(_of(caller, name)).order_by(SchemaVersion.version)
            async with self._reads.connect() as connection:
                rows = (await connection.execute(query)).mappings()
                found = [SchemaVersionSummary(**row) for row in rows]
        if not found:
            raise await self._unknown(caller, name, "name")
        return SchemaVersions(name=name, registered=False, versions=found)

    async def version(self, caller: Caller, name: str, version: str) -> StoredVersion:
        """By number or as `latest`. Raises SchemaNotFound."""
        row = await self._find(caller, f"{name}@{version}", "name")
        if row is None:
            schema = _schema_of(name)
            return StoredVersion(
                **_registered(name).model_dump(), strict_report=_strict(schema), schema=schema
            )
        schema = json.loads(row["body"])
        return StoredVersion(
            **{key: row[key] for key in row if key not in ("body", "owner_id")},
            strict_report=_strict(schema),
            schema=schema,
        )

    async def resolve(self, caller: Caller, ref: str) -> Resolved:
        """What `name`, `name@latest` or `name@3` means to the caller. Raises SchemaNotFound."""
        row = await self._find(caller, ref, "schema_ref")
        if row is None:
            name = ref.partition("@")[0]
            return Resolved(name, None, None, digest(_schema_of(name)))
        body = as_object(json.loads(row["body"]))
        return Resolved(row["name"], row["version"], body, row["sha256"])

    async def _find(self, caller: Caller, ref: str, param: str) -> dict[str, Any] | None:
        """The row; None for a registered class. Raises SchemaNotFound."""
        name, _, wanted = ref.partition("@")
        wanted = wanted if "@" in ref else LATEST
        row = None
        if name in all_schemas():
            if wanted in (LATEST, "1"):
                return None
        elif re.fullmatch(SCHEMA_NAME, name) and re.fullmatch(VERSION, wanted):
            query = select(SchemaVersion.__table__).where(_of(caller, name))
            if wanted != LATEST:
                query = query.where(SchemaVersion.version == int(wanted))
            query = query.order_by(SchemaVersion.version.desc()).limit(1)
            async with self._reads.connect() as connection:
                row = (await connection.execute(query)).mappings().one_or_none()
        if row is None:
            raise await self._unknown(caller, ref, param)
        return dict(row)

    async def _unknown(self, caller: Caller, ref: str, param: str) -> SchemaNotFound:
        names = [schema.name for schema in await self.list(caller)]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        return SchemaNotFound(
            f"No schema {ref[:100]!r}; available: {', '.join(names[:NAMED])}{more}.", param=param
        )


TABLE = SchemaVersion.__table__.c
SUMMARY = (TABLE.name, TABLE.version, TABLE.sha256, TABLE.compat, TABLE.created_at)


def check(schema: Json | bool) -> CheckedSchema:
    """Raises SchemaRejected, SchemaTooLarge."""
    bounded(schema)
    JsonSchema(schema)
    return CheckedSchema(sha256=digest(schema), strict_report=_strict(schema))


def _strict(schema: Json | bool) -> list[StrictFault]:
    return [StrictFault(**fault) for fault in report(schema)]


def _of(caller: Caller, name: str) -> ColumnElement[bool]:
    return (SchemaVersion.owner_id == caller.user_id) & (SchemaVersion.name == name)


def _schema_of(name: str) -> Json:
    return all_schemas()[name].model_json_schema()


def _registered(name: str) -> SchemaVersionSummary:
    return SchemaVersionSummary(
        name=name, version=1, sha256=digest(_schema_of(name)), registered=True
    )

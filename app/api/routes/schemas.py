"""Schemas under names, in immutable versions. The body that is sent is the schema itself."""

from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Body, Response

from app.api.deps import CallerDep, SchemasDep
from app.schemas.schema import (
    CheckedSchema,
    PublishedVersion,
    SchemaList,
    SchemaVersions,
    StoredVersion,
)
from app.services.schemas import check

router = APIRouter(
    prefix="/v1/schemas",
    tags=["schemas"],
    responses={code: {"description": HTTPStatus(code).phrase} for code in (401, 404, 413, 422)},
)

# Any JSON, so that what is no schema is refused in the same words as an unusable one.
Schema = Annotated[Any, Body(examples=[{"type": "object"}])]


@router.get("")
async def list_schemas(caller: CallerDep, schemas: SchemasDep) -> SchemaList:
    """The server's own classes and your schemas, each by its latest version."""
    return SchemaList(data=await schemas.list(caller))


@router.post("/check")
async def check_schema(schema: Schema, caller: CallerDep) -> CheckedSchema:
    """Whether the schema could be used; nothing is kept."""
    return check(schema)


@router.post("/{name}/versions", status_code=201)
async def publish_schema(
    name: str, schema: Schema, caller: CallerDep, schemas: SchemasDep, response: Response
) -> PublishedVersion:
    """Keeps the schema as the next version; the same content again is the same version (200)."""
    published, is_new = await schemas.publish(caller, name, schema)
    if not is_new:
        response.status_code = 200
    return published


@router.get("/{name}")
async def list_versions(name: str, caller: CallerDep, schemas: SchemasDep) -> SchemaVersions:
    return await schemas.versions(caller, name)


@router.get("/{name}/versions/{version}")
async def get_version(
    name: str, version: str, caller: CallerDep, schemas: SchemasDep
) -> StoredVersion:
    """By number, or `latest`."""
    return await schemas.version(caller, name, version)

"""OpenAI Files: what a user uploads once and names in prompts."""

from datetime import timedelta
from http import HTTPStatus
from typing import Annotated, Literal
from urllib.parse import quote

from fastapi import APIRouter, Depends, Form, Query, Request, Response, UploadFile

from app.api.deps import CallerDep, SettingsDep
from app.schemas.file import FileDeleted, FileList, FileObject, Purpose
from app.schemas.user import Storable
from app.services.files import Files, check_size

router = APIRouter(
    prefix="/v1/files",
    tags=["files"],
    responses={code: {"description": HTTPStatus(code).phrase} for code in (400, 401, 404, 413)},
)

HOUR, MONTH = 3600, 30 * 24 * 3600  # the shortest and the longest time for which OpenAI keeps one


async def get_files(request: Request) -> Files:
    return request.app.state.files


FilesDep = Annotated[Files, Depends(get_files)]


@router.post("")
async def create_file(
    caller: CallerDep,
    files: FilesDep,
    settings: SettingsDep,
    file: UploadFile,
    purpose: Annotated[Purpose, Form()],
    anchor: Annotated[Literal["created_at"], Form(alias="expires_after[anchor]")] = "created_at",
    seconds: Annotated[int | None, Form(alias="expires_after[seconds]", ge=HOUR, le=MONTH)] = None,
) -> FileObject:
    """Keeps a PNG, JPEG, GIF or WebP image, a PDF, or a text in UTF-8."""
    check_size(file.size or 0, settings)  # before it is in memory
    made = await files.create(
        caller,
        await file.read(),
        name=file.filename,
        media_type=file.content_type,
        purpose=purpose,
        expires_after=timedelta(seconds=seconds) if seconds else None,
    )
    return FileObject.of(made)


@router.get("")
async def list_files(
    caller: CallerDep,
    files: FilesDep,
    purpose: Annotated[str | None, Query(max_length=64), Storable] = None,
    after: Annotated[str | None, Query(description="The last id seen.")] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> FileList:
    """Your files by age, the newest first."""
    found = await files.list(caller, purpose=purpose, after=after, limit=limit + 1, order=order)
    data = [FileObject.of(file) for file in found[:limit]]
    return FileList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=len(found) > limit,
    )


@router.get("/{file_id}")
async def get_file(file_id: str, caller: CallerDep, files: FilesDep) -> FileObject:
    return FileObject.of(await files.get(caller, file_id))


@router.get("/{file_id}/content", response_class=Response)
async def get_content(file_id: str, caller: CallerDep, files: FilesDep) -> Response:
    """The file as it was uploaded; no browser shows it, whatever is in it."""
    file = await files.get(caller, file_id, whole=True)
    return Response(
        file.data,
        media_type=file.media_type,
        headers={
            "Content-Disposition": f"attachment; filename*=UTF-8''{quote(file.name, safe='')}",
            "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": "sandbox; default-src 'none'",
            "Cache-Control": "private, no-cache",
            "ETag": f'"{file.sha256}"',
        },
    )


@router.delete("/{file_id}")
async def delete_file(file_id: str, caller: CallerDep, files: FilesDep) -> FileDeleted:
    """Forgets the upload. Conversations that it was part of keep their copy."""
    await files.delete(caller, file_id)
    return FileDeleted(id=file_id)

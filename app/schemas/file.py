"""OpenAI's Files, as far as an upload can go with a prompt."""

from typing import Literal, Self

from pydantic import BaseModel

from app.models import File

PREFIX = "file-"  # stands before the table's key in every id that a client sees

Purpose = Literal["assistants", "user_data", "vision"]


class FileObject(BaseModel):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"

    @classmethod
    def of(cls, file: File) -> Self:
        return cls(
            id=f"{PREFIX}{file.id}",
            bytes=file.size,
            created_at=int(file.created_at.timestamp()),
            expires_at=int(file.expires_at.timestamp()) if file.expires_at else None,
            filename=file.name,
            purpose=file.purpose,
        )


class FileList(BaseModel):
    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True

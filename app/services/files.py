"""What users upload, kept in the database, each file seen by its owner alone."""

import hashlib
import mimetypes
import re
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Literal

from sqlalchemy import ColumnElement, delete, func, insert, or_, select, tuple_
from sqlalchemy.ext.asyncio import AsyncEngine

from app.config import Settings
from app.core.errors import Invalid, NotFound
from app.core.security import Caller
from app.db.session import reading, writing
from app.models import File, User
from app.schemas.file import PREFIX

NAME_LENGTH = 255
JSON = "application/json"

SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"%PDF-", "application/pdf"),
)

ALL_BUT_DATA = [column for column in File.__table__.columns if column.name != "data"]


class FileRefused(Invalid):
    """Not something that a model can be shown here, or not to be had."""

    status = 400
    code = "invalid_file"


class FileTooLarge(Invalid):
    """One file, or all of a message or a user together."""

    status = 413
    code = "too_large"


class FileNotFound(NotFound):
    """No such file, or somebody else's: the two look the same."""

    code = "file_not_found"


def type_of(data: bytes, said: str | None, name: str | None, param: str) -> str:
    """The media type that the bytes themselves show; `said` and `name` tell kinds of text apart.

    Raises FileRefused for what is empty, of no allowed type, or no image although `said` to be.
    """
    if not data:
        raise FileRefused("The file is empty.", param=param)
    said = (said or "").partition(";")[0].strip().lower()
    found = next((type_ for start, type_ in SIGNATURES if data.startswith(start)), None)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        found = "image/webp"
    if said.startswith("image/") and not (found and found.startswith("image/")):
        raise FileRefused("That is no image; PNG, JPEG, GIF and WebP are taken.", param=param)
    return found or _type_of_text(data, said, name, param)


def _type_of_text(data: bytes, said: str, name: str | None, param: str) -> str:
    try:
        data.decode()
    except UnicodeDecodeError:
        data = b"\0"
    if b"\0" in data:
        raise FileRefused(
            "The file is of no type that is taken: PNG, JPEG, GIF, WebP, PDF, or text in UTF-8.",
            param=param,
        )
    for guess in (said, mimetypes.guess_type(name or "")[0] or ""):
        if guess == JSON or re.fullmatch(r"text/[a-z0-9.+-]{1,80}", guess):
            return guess
    return "text/plain"


def name_of(name: str | None) -> str | None:
    """A file's name as it may stand in a header, in a prompt and in any database."""
    kept = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\"\\]", "", name or "")
    return kept.rsplit("/", 1)[-1].strip()[-NAME_LENGTH:] or None


def check_size(size: int, settings: Settings) -> None:
    """Raises FileTooLarge."""
    if size > settings.max_file_bytes:
        raise FileTooLarge(f"A file has at most {settings.max_file_bytes} bytes.", param="file")


class Files:
    """All files of all owners, each seen by its owner alone."""

    def __init__(self, engine: AsyncEngine, settings: Settings) -> None:
        self._reads = reading(engine)
        self._writes = writing(engine)
        self._settings = settings

    async def create(
        self,
        caller: Caller,
        data: bytes,
        *,
        name: str | None,
        media_type: str | None,
        purpose: str,
        expires_after: timedelta | None = None,
    ) -> File:
        """Keeps the file. Raises FileRefused, and FileTooLarge where it alone or all of the
        caller's files together are larger than the settings allow."""
        check_size(len(data), self._settings)
        name, now = name_of(name), datetime.now(UTC)
        file = File(
            id=uuid.uuid4().hex,
            owner_id=caller.user_id,
            name=name or "file",
            purpose=purpose,
            media_type=type_of(data, media_type, name, "file"),
            size=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            created_at=now,
            expires_at=now + expires_after if expires_after else None,
        )
        row = {column.name: getattr(file, column.name) for column in ALL_BUT_DATA}
        async with self._writes.begin() as connection:
            # Of two uploads at once, the second sees the first: together they keep the limit.
            await connection.execute(
                select(User.id).where(User.id == caller.user_id).with_for_update(key_share=True)
            )
            await connection.execute(
                delete(File).where(File.owner_id == caller.user_id, File.expires_at <= now)
            )
            stored = await connection.scalar(
                select(func.sum(File.size)).where(File.owner_id == caller.user_id)
            )
            if (stored or 0) + len(data) > self._settings.max_stored_bytes:
                most = self._settings.max_stored_bytes
                raise FileTooLarge(
                    f"Your files together have at most {most} bytes; delete some first.",
                    param="file",
                )
            await connection.execute(insert(File).values(**row, data=data))
        return file

    async def get(
        self, caller: Caller, file_id: str, *, param: str | None = None, whole: bool = False
    ) -> File:
        """The caller's file, `whole` with its data. Raises FileNotFound."""
        columns = [*ALL_BUT_DATA, File.__table__.c.data] if whole else ALL_BUT_DATA
        async with self._reads.connect() as connection:
            rows = await connection.execute(
                select(*columns).where(_usable(caller), File.id == _bare(file_id, param))
            )
            row = rows.mappings().one_or_none()
        if row is None:
            raise _unknown(file_id, param)
        return File(**row)

    async def list(
        self,
        caller: Caller,
        *,
        purpose: str | None = None,
        after: str | None = None,
        limit: int = 100,
        order: Literal["asc", "desc"] = "desc",
    ) -> Sequence[File]:
        """The caller's files by age, those behind `after`. Raises FileNotFound for that one."""
        place = tuple_(File.created_at, File.id)
        query = select(*ALL_BUT_DATA).where(_usable(caller)).limit(limit)
        if purpose:
            query = query.where(File.purpose == purpose)
        if after:
            last = await self.get(caller, after, param="after")
            there = tuple_(last.created_at, last.id)
            query = query.where(place > there if order == "asc" else place < there)
        if order == "asc":
            query = query.order_by(File.created_at, File.id)
        else:
            query = query.order_by(File.created_at.desc(), File.id.desc())
        async with self._reads.connect() as connection:
            return [File(**row) for row in (await connection.execute(query)).mappings()]

    async def delete(self, caller: Caller, file_id: str) -> None:
        """Raises FileNotFound. Conversations that it was part of keep their copy."""
        async with self._writes.begin() as connection:
            deleted = await connection.execute(
                delete(File).where(_usable(caller), File.id == _bare(file_id))
            )
        if deleted.rowcount == 0:
            raise _unknown(file_id)


def _usable(caller: Caller) -> ColumnElement[bool]:
    lasting = or_(File.expires_at.is_(None), File.expires_at > datetime.now(UTC))
    return (File.owner_id == caller.user_id) & lasting


def _bare(file_id: str, param: str | None = None) -> str:
    """The key in the table. Raises FileNotFound for what cannot be one."""
    if not re.fullmatch(f"{PREFIX}[0-9a-f]{{32}}", file_id):
        raise _unknown(file_id, param)
    return file_id.removeprefix(PREFIX)


def _unknown(file_id: str, param: str | None = None) -> FileNotFound:
    return FileNotFound(f"No file {file_id[:64]!r}.", param=param)

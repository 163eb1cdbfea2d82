"""Jobs as they arrive, an item at a time: in a JSON body, or with a file of JSON lines."""

import codecs
import hashlib
import re
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from app.api.bodies import MAX_VALUES, Splitter
from app.config import Settings
from app.core.errors import Invalid, explain
from app.core.security import Caller
from app.schemas.job import ItemsFile, JobItem, JobRequest, JobSettings
from app.services.files import Files
from app.services.jobs import InvalidItem, Place

CHUNK = 256 * 1024
LONG = 64 * 1024  # bytes of an item that is looked at more closely before it is parsed
MAX_MARKS = 1000  # of JSON around the texts of one item
STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)


class TooLarge(Invalid):
    status = 413
    code = "too_large"


class JsonUpload:
    """A body `{"items": [...], ...}`, taken apart as it comes."""

    def __init__(self, request: Request, caller: Caller, files: Files, settings: Settings) -> None:
        self._request = request
        self._file = partial(_stored, files, caller)
        self._most = settings.max_body_bytes
        self._hash = hashlib.sha256()
        self._settings: JobSettings | None = None

    async def items(self) -> AsyncIterator[tuple[Place, JobItem]]:
        split, number = Splitter("items", self._most), 0
        async for chunk in self._request.stream():
            self._hash.update(chunk)
            for element in split.feed(chunk):
                yield (place := _place(number)), _item(element, place, self._most)
                number += 1
        rest = split.rest()
        if rest.count(b",") + rest.count(b"[") + rest.count(b"{") > MAX_VALUES:
            raise TooLarge(f"The body has more than {MAX_VALUES} values beside its items.")
        request = _read(JobRequest, rest)
        self._settings = request
        if not isinstance(request.items, ItemsFile):
            if number and request.items:
                raise Invalid("The body has `items` twice.", param="items")
            for number, item in enumerate(request.items):  # in a form that was not split
                yield _place(number), item
        else:
            async for place, item in _lines(await self._file(request.items.file_id), self._most):
                yield place, item

    @property
    def settings(self) -> JobSettings:
        assert self._settings
        return self._settings

    @property
    def digest(self) -> bytes:
        return self._hash.digest()


class FormUpload:
    """`multipart/form-data`: `request`, the JSON without its items, and `file`, with one item a
    line."""

    def __init__(self, request: bytes, file: UploadFile, settings: Settings) -> None:
        self._file = file
        self._most = settings.max_body_bytes
        self._hash = hashlib.sha256(request + b"\n")
        self.settings = _read(JobSettings, request)

    @classmethod
    async def of(cls, request: Request, settings: Settings) -> "FormUpload":
        """Raises Invalid."""
        most = settings.max_body_bytes
        form = await request.form(max_files=2, max_fields=2, max_part_size=most)
        file, said = form.get("file"), form.get("request")
        if not isinstance(file, UploadFile) or said is None:
            raise Invalid("Send the parts `request` (JSON) and `file` (JSONL).", param="file")
        if isinstance(said, UploadFile):
            if (said.size or 0) > most:
                raise TooLarge(f"The part `request` has at most {most} bytes.", param="request")
            said = await said.read()
        return cls(said if isinstance(said, bytes) else said.encode(), file, settings)

    async def items(self) -> AsyncIterator[tuple[Place, JobItem]]:
        async for place, item in _lines(self._chunks(), self._most):
            yield place, item

    async def _chunks(self) -> AsyncIterator[bytes]:
        await self._file.seek(0)
        while chunk := await self._file.read(CHUNK):
            self._hash.update(chunk)
            yield chunk

    @property
    def digest(self) -> bytes:
        return self._hash.digest()


async def _stored(files: Files, caller: Caller, file_id: str) -> AsyncIterator[bytes]:
    file = await files.get(caller, file_id, param="items.file_id", whole=True)

    async def once() -> AsyncIterator[bytes]:
        yield file.data

    return once()


def _place(number: int, name: str | None = None) -> Place:
    """`number` counts from 0."""
    param = f"items/{number}"
    return Place(param, name or param)


async def _lines(chunks: AsyncIterator[bytes], most: int) -> AsyncIterator[tuple[Place, JobItem]]:
    """The items of JSONL; empty lines and a byte order mark are nothing."""
    number = items = 0
    begun = b""
    async for chunk in chunks:
        if not number:
            chunk = chunk.removeprefix(codecs.BOM_UTF8)
        *lines, rest = chunk.split(b"\n")
        if lines:
            lines[0] = begun + lines[0]
            begun = b""
        begun += rest
        for line in lines:
            number += 1
            if line.strip():
                yield (place := _place(items, f"line {number}")), _item(line, place, most)
                items += 1
        if len(begun) > most:
            raise TooLarge(f"line {number + 1}: an item has at most {most} bytes.")
    if begun.strip():
        yield (place := _place(items, f"line {number + 1}")), _item(begun, place, most)


def _item(body: bytes, place: Place, most: int) -> JobItem:
    if len(body) > most:
        raise TooLarge(f"{place.name}: an item has at most {most} bytes.")
    if len(body) > LONG and len(STRING.sub(b"", body)) > MAX_MARKS:
        raise InvalidItem(place, "An item is an object with custom_id and text.")
    try:
        return JobItem.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = "/".join(str(part) for part in first["loc"])
        raise InvalidItem(place, first["msg"], field) from None


def _read(model: Any, body: bytes) -> Any:
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        if errors[0]["type"] == "json_invalid":
            raise Invalid("The body is not valid JSON.") from None
        message, param = explain([{**each, "loc": ("body", *each["loc"])} for each in errors])
        raise Invalid(message, param=param) from None

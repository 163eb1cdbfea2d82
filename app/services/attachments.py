"""What comes with a prompt: images, PDFs and texts, by value, by address or by a file's id.

Routes decode with `attachment`; `Attachments.load` fetches what is only named, once, before the
run is accepted. So the stored history is whole, and nothing in it is ever fetched again.
"""

import asyncio
import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote, unquote_to_bytes

import httpx2
from pydantic_ai.messages import (
    BinaryContent,
    DocumentUrl,
    ImageUrl,
    TextContent,
    UploadedFile,
    UserContent,
)
from sqlalchemy.ext.asyncio import AsyncEngine

from app.config import Settings
from app.core.security import Caller
from app.services.files import FileRefused, Files, FileTooLarge, name_of, type_of
from app.services.outbound import PORTS, OutboundRefused, ReplyRefused

MAX_URL = 8192
MAX_HEAD = 1000  # characters of a data URL before its data


def attachment(
    *,
    param: str,
    url: str | None = None,
    file_id: str | None = None,
    data: str | None = None,
    media_type: str | None = None,
    name: str | None = None,
    detail: str | None = None,
) -> UserContent:
    """One attachment, as far as the request itself holds it; the first that is given counts.

    url: a data URL, or the http(s) address of what `Attachments.load` will fetch.
    file_id: of an upload to `/v1/files`.
    data: base64, or a data URL.
    media_type: what the client says it is. Bytes speak for themselves, so it only tells kinds of
    text apart; where it begins with `image/`, it has to be an image.
    detail: OpenAI's wish for how closely an image is looked at.

    Raises FileRefused.
    """
    extra = {"detail": detail} if detail else None
    name = name_of(name)
    if url is not None and not _is_data(url):
        parsed = _address(url, param)
        name = name or name_of(unquote(parsed.path.rsplit("/", 1)[-1]))
        kind = ImageUrl if _is_image(media_type) else DocumentUrl
        return kind(url, identifier=name, vendor_metadata=extra)
    if url is None and file_id is not None:
        return UploadedFile(file_id, "openai", media_type=media_type, vendor_metadata=extra)
    inline = data if url is None else url
    if inline is None:
        raise FileRefused("A file needs its data, a URL or a file id.", param=param)
    if not _is_data(inline):
        return _binary(_decoded(inline, param), media_type, name, extra, param)
    said, content = _split(inline, param)
    if said is None or _is_image(media_type):
        said = media_type
    return _binary(content, said, name, extra, param)


@dataclass(slots=True)
class Attachments:
    """Loads what prompts name, within the server's limits."""

    engine: AsyncEngine
    http: httpx2.AsyncClient
    settings: Settings

    async def load(
        self, caller: Caller, prompt: str | Sequence[UserContent], param: str
    ) -> str | list[UserContent]:
        """The prompt with all that it names in it: texts, and bytes of the types allowed.

        Raises FileRefused, FileTooLarge, and FileNotFound for an id that is not the caller's.
        """
        if isinstance(prompt, str):
            return prompt
        most = self.settings.max_attachments
        if sum(not isinstance(part, (str, TextContent)) for part in prompt) > most:
            raise FileRefused(f"At most {most} files go with a message.", param=param)
        until = asyncio.get_running_loop().time() + self.settings.tool_timeout.total_seconds()
        left = self.settings.max_body_bytes
        loaded: list[UserContent] = []
        for part in prompt:
            if isinstance(part, str):
                loaded.append(part)
            elif isinstance(part, TextContent):
                loaded.append(part.content)
            else:
                content = await self._load(caller, part, left, until, param)
                left -= len(content.data)
                loaded.append(content)
        return loaded

    async def _load(
        self, caller: Caller, part: UserContent, left: int, until: float, param: str
    ) -> BinaryContent:
        """One attachment of at most `left` bytes; none is fetched after `until`, in loop time."""
        most = min(left, self.settings.max_file_bytes)
        match part:
            case BinaryContent():
                _check_size(len(part.data), most, param)
                said, name = part.media_type, part.identifier
                return _binary(part.data, said, name, part.vendor_metadata, param)
            case ImageUrl() | DocumentUrl():
                content, said = await self._fetch(part.url, most, until, param)
                if isinstance(part, ImageUrl):
                    said = "image/*"
                return _binary(content, said, part.identifier, part.vendor_metadata, param)
            case UploadedFile():
                files = Files(self.engine, self.settings)
                file = await files.get(caller, part.file_id, param=param, whole=True)
                _check_size(file.size, most, param)
                said = part.media_type if _is_image(part.media_type) else file.media_type
                return _binary(file.data, said, file.name, part.vendor_metadata, param)
            case _:
                raise FileRefused("Audio and video are not taken.", param=param)

    async def _fetch(
        self, url: str, most: int, until: float, param: str
    ) -> tuple[bytes, str | None]:
        """What is at the address, and what its server says it is."""
        host = httpx2.URL(url).host
        content = bytearray()
        try:
            async with (
                asyncio.timeout_at(until),
                self.http.stream("GET", url, follow_redirects=True) as reply,
            ):
                if reply.status_code != 200:
                    raise FileRefused(
                        f"{host} answered with status {reply.status_code} instead of the file.",
                        param=param,
                    )
                async for piece in reply.aiter_bytes():
                    content += piece
                    _check_size(len(content), most, param)
                return bytes(content), reply.headers.get("content-type")
        except OutboundRefused as error:
            raise FileRefused(
                f"{host} is not a public address, or leads to none; send the file itself.",
                param=param,
            ) from error
        except ReplyRefused as error:
            raise FileTooLarge(
                f"What {host} answered is too large, or compressed in an unknown way.", param=param
            ) from error
        except (httpx2.TimeoutException, TimeoutError) as error:
            raise FileRefused(f"{host} did not answer in time.", param=param) from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise FileRefused(f"The file could not be fetched from {host}.", param=param) from error


def _is_data(url: str) -> bool:
    return url[:5].lower() == "data:"


def _is_image(media_type: str | None) -> bool:
    return media_type is not None and media_type.lower().startswith("image/")


def _check_size(size: int, most: int, param: str) -> None:
    if size > most:
        raise FileTooLarge(
            f"The files of a message are too large: {most} bytes are left for this one.",
            param=param,
        )


def _binary(
    data: bytes,
    said: str | None,
    name: str | None,
    extra: dict[str, str] | None,
    param: str,
) -> BinaryContent:
    media_type = type_of(data, said, name, param)
    return BinaryContent(data, media_type=media_type, identifier=name, vendor_metadata=extra)


def _decoded(text: str, param: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error) as error:
        raise FileRefused("The file's data is not valid base64.", param=param) from error


def _split(url: str, param: str) -> tuple[str | None, bytes]:
    """A data URL's media type, if it names one, and its content (RFC 2397)."""
    head, comma, body = url[5:].partition(",")
    if not comma:
        raise FileRefused("The data URL has no comma, so no data.", param=param)
    if len(head) > MAX_HEAD:
        raise FileRefused("That is no data URL of a file.", param=param)
    media_type, *attributes = (part.strip() for part in head.split(";"))
    if "base64" in attributes:
        return media_type or None, _decoded(body, param)
    return media_type or None, unquote_to_bytes(body)


def _address(url: str, param: str) -> httpx2.URL:
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise FileRefused("That is no URL of a file.", param=param) from error
    if parsed.scheme not in PORTS or not parsed.host or len(url) > MAX_URL:
        raise FileRefused("Files are taken from data URLs and from http(s).", param=param)
    return parsed

"""What an extraction reads: a text as it was sent, or what a file holds."""

import asyncio
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

from pydantic_ai.messages import BinaryContent

from app.config import Settings
from app.core.errors import Invalid
from app.core.json import whole
from app.core.security import Caller
from app.schemas.extraction import ExtractionInput
from app.services.attachments import attachment
from app.services.files import FileRefused, Files, FileTooLarge
from app.services.pdf import BROKEN, ENCRYPTED, TOO_LONG

PDF = "application/pdf"
PROGRAM = Path(__file__).with_name("pdf.py")
AT_ONCE = 2  # PDFs that are read at a time

_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Document:
    """`text` is what evidence counts its characters in; images go to the model as they are.

    of_file: the caller sent a file, and has not seen its text yet.
    """

    text: str = ""
    images: Sequence[BinaryContent] = ()
    of_file: bool = False


async def read_document(
    caller: Caller, input: ExtractionInput, files: Files, settings: Settings
) -> Document:
    """The document, read whole. A sent text stays as it is, code point by code point.

    Of a text file the byte order mark is dropped. A PDF gives the text that it holds, with a form
    feed between pages and U+FFFD for what is no Unicode character.

    Raises FileRefused, FileTooLarge, FileNotFound for an id that is not the caller's, and Invalid
    (`no_text`) for a file without text.
    """
    if input.text is not None:
        return Document(input.text)
    if input.file_id is not None:
        param = "input.file_id"
        file = await files.get(caller, input.file_id, param=param, whole=True)
        content = BinaryContent(file.data, media_type=file.media_type)
    else:
        param = "input.data"
        content = _inline(input.data or "", param)
    if len(content.data) > settings.max_file_bytes:
        raise FileTooLarge(f"A file has at most {settings.max_file_bytes} bytes.", param=param)
    if content.is_image:
        return Document(images=(content,), of_file=True)
    if content.media_type == PDF:
        text = await _text_of_pdf(content.data, settings, param)
    else:
        text = content.data.decode("utf-8-sig")  # `type_of` has seen that it is UTF-8
    if not text.strip():
        way_out = "; send its pages as images" if content.media_type == PDF else ""
        raise Invalid(f"The file holds no text{way_out}.", code="no_text", param=param)
    return Document(text, of_file=True)


def _inline(data: str, param: str) -> BinaryContent:
    if data[:5].lower() != "data:" or not data.isascii():
        raise FileRefused("That is no data URL: `data:<type>;base64,<data>`.", param=param)
    content = attachment(data=data, param=param)
    assert isinstance(content, BinaryContent)
    return content


async def _text_of_pdf(data: bytes, settings: Settings, param: str) -> str:
    """Read by a process of its own, which ends with its time or with the caller."""
    turns = _turns.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(AT_ONCE))
    async with turns:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-I", "-B", PROGRAM, str(settings.max_body_bytes)),
            stdin=PIPE,
            stdout=PIPE,
            stderr=DEVNULL,
            env={} if os.name == "posix" else None,  # it has no use for our secrets
        )
        try:
            async with asyncio.timeout(settings.tool_timeout.total_seconds()):
                out, _ = await process.communicate(data)
        except TimeoutError as error:
            raise FileRefused("The PDF takes too long to read.", param=param) from error
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    if process.returncode == ENCRYPTED:
        raise FileRefused("The PDF is encrypted; send it without its password.", param=param)
    if process.returncode == TOO_LONG:
        most = settings.max_body_bytes
        raise FileTooLarge(f"The PDF holds more than {most} bytes of text.", param=param)
    if process.returncode == BROKEN:
        raise FileRefused("The PDF is damaged and cannot be read.", param=param)
    if process.returncode != 0:
        raise FileRefused("The PDF takes too much memory or time to read.", param=param)
    return whole(out.decode("utf-8", "surrogatepass")).replace("\0", "\ufffd")

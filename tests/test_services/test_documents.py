"""What an extraction reads of a text, a file or a data URL, and what it refuses."""

import asyncio
import base64
import io
import os
import time
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from app.core.errors import AppError
from app.core.security import Caller
from app.db.migrate import migrate
from app.db.session import make_engine, make_sessions
from app.models import User
from app.schemas.extraction import ExtractionInput
from app.schemas.file import PREFIX
from app.services.documents import Document, read_document
from app.services.files import Files
from tests.conftest import settings_of

PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 8

Read = Callable[..., Coroutine[Any, Any, Document]]


def data_url(data: bytes, media_type: str = "application/octet-stream") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def pdf(pages: Sequence[bytes], *, to_unicode: bytes = b"") -> bytes:
    """A PDF whose pages run these content streams; `/F` is a font."""
    kids = " ".join(f"{5 + 2 * at} 0 R" for at in range(len(pages)))
    font = b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica"
    font += b"/ToUnicode 4 0 R>>" if to_unicode else b">>"
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Kids[{kids}]/Count {len(pages)}>>".encode(),
        font,
        b"<</Length %d>>stream\n%s\nendstream" % (len(to_unicode), to_unicode),
    ]
    for at, page in enumerate(pages):
        packed = zlib.compress(page)
        objects += [
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 600 800]"
            b"/Resources<</Font<</F 3 0 R>>>>/Contents %d 0 R>>" % (6 + 2 * at),
            b"<</Length %d/Filter/FlateDecode>>stream\n%s\nendstream" % (len(packed), packed),
        ]
    out, places = io.BytesIO(b""), list[int]()
    out.write(b"%PDF-1.4\n")
    for number, body in enumerate(objects, 1):
        places.append(out.tell())
        out.write(b"%d 0 obj\n%s\nendobj\n" % (number, body))
    start = out.tell()
    out.write(b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1))
    out.writelines(b"%010d 00000 n \n" % place for place in places)
    size = len(objects) + 1
    out.write(b"trailer<</Size %d/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % (size, start))
    return out.getvalue()


def line(text: str) -> bytes:
    return f"BT /F 12 Tf 50 700 Td ({text}) Tj ET".encode("latin-1")


SLOW = b"BT /F 12 Tf " + b"1 0 0 1 0 0 Tm (x) Tj " * 2_000_000 + b"ET"  # minutes, but 130 kB


def encrypted(password: str) -> bytes:
    from pypdf import PdfReader, PdfWriter

    writer = PdfWriter(clone_from=PdfReader(io.BytesIO(pdf([line("A secret.")]))))
    writer.encrypt(user_password=password, owner_password="owner", algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


@pytest.fixture
async def read() -> AsyncIterator[Read]:
    async def run(**changes: Any) -> Document:
        given = {name: changes.pop(name) for name in ("text", "file_id", "data") if name in changes}
        settings = settings_of({"DATABASE_URL": "sqlite://"}, **changes)
        engine = make_engine(settings)  # none of these gets as far as the database
        files = Files(engine, settings)
        try:
            return await read_document(
                Caller.of(1, ()), ExtractionInput.model_validate(given), files, settings
            )
        finally:
            await engine.dispose()

    yield run


async def refused(read: Read, data: str, **changes: Any) -> tuple[int, str, str]:
    with pytest.raises(AppError) as caught:
        await read(data=data, **changes)
    assert caught.value.param == "input.data"
    return caught.value.status, caught.value.error_code, caught.value.message


def children() -> set[str]:
    """The processes that this one has begun and that still run."""
    tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return {pid for task in tasks for pid in task.read_text().split()}


# Texts


async def test_a_sent_text_stays_as_it_is(read: Read) -> None:
    text = "\ufeffZoë\r\ncafe\u0301 \U0001f469\u200d\U0001f680\0\t "

    assert await read(text=text) == Document(text)


async def test_a_text_file_loses_its_byte_order_mark_and_nothing_else(read: Read) -> None:
    text = "Zoë\r\n\U0001f680 \n"

    found = await read(data=data_url(b"\xef\xbb\xbf" + text.encode(), "text/plain"))

    assert found == Document(text, of_file=True)


async def test_an_image_goes_to_the_model(read: Read) -> None:
    found = await read(data=data_url(PNG, "image/jpeg"))

    assert (found.text, found.of_file) == ("", True)
    assert [(image.data, image.media_type) for image in found.images] == [(PNG, "image/png")]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        ("hello", "invalid_file"),
        ("aGVsbG8=", "invalid_file"),
        ("https://example.com/a.pdf", "invalid_file"),
        ("data:text/plain;base64,%%%", "invalid_file"),
        ("data:text/plain", "invalid_file"),
        ("data:,", "invalid_file"),
        ("data:,caf\u00e9", "invalid_file"),
        (data_url(b"\xff\xfe\x00a"), "invalid_file"),
        (data_url(b"PK\3\4\0\0\0"), "invalid_file"),
        (data_url(b"GIF", "image/gif"), "invalid_file"),
        (data_url(b"\xef\xbb\xbf \n"), "no_text"),
    ],
)
async def test_what_is_no_document_is_refused(read: Read, data: str, code: str) -> None:
    status, found, _ = await refused(read, data)

    assert (status, found) == (422 if code == "no_text" else 400, code)


async def test_a_file_that_is_too_large_is_refused(read: Read) -> None:
    status, code, _ = await refused(read, data_url(b"x" * 11), max_file_bytes=10)

    assert (status, code) == (413, "too_large")


async def test_a_file_is_its_owners_alone(environ: dict[str, str]) -> None:
    settings = settings_of(environ)
    engine = make_engine(settings)
    await migrate(engine)
    async with make_sessions(engine)() as db:
        user = User(email="a@example.com", name="A", hashed_password="!")
        db.add(user)
        await db.commit()
    files, owner = Files(engine, settings), Caller.of(user.id, ())
    file = await files.create(owner, b"Hi.", name="a.txt", media_type=None, purpose="user_data")
    given = ExtractionInput.model_validate({"file_id": PREFIX + file.id})

    assert await read_document(owner, given, files, settings) == Document("Hi.", of_file=True)
    for caller, asked in (
        (Caller.of(user.id + 1, ()), given),
        (owner, ExtractionInput.model_validate({"file_id": "file-nonsense\0"})),
    ):
        with pytest.raises(AppError) as caught:
            await read_document(caller, asked, files, settings)
        assert (caught.value.status, caught.value.param) == (404, "input.file_id")
    await engine.dispose()


# PDFs


async def test_a_pdfs_pages_are_read_in_order(read: Read) -> None:
    found = await read(data=data_url(pdf([line("Total: 1.250,00"), line("Page two")])))

    assert found == Document("Total: 1.250,00\fPage two", of_file=True)


async def test_what_is_no_character_in_a_pdf_is_replaced(read: Read) -> None:
    cmap = (
        b"/CIDInit /ProcSet findresource begin begincmap\n"
        b"1 begincodespacerange <00> <FF> endcodespacerange\n"
        b"2 beginbfchar <41> <0000> <42> <D800> endbfchar\nendcmap end"
    )

    found = await read(data=data_url(pdf([line("xABx")], to_unicode=cmap)))

    assert "\0" not in found.text
    assert found.text.encode("utf-8")
    assert found.text.startswith("x") and found.text.endswith("x")


async def test_a_scan_without_text_says_what_to_send_instead(read: Read) -> None:
    status, code, message = await refused(read, data_url(pdf([b"0 0 100 100 re f"])))

    assert (status, code) == (422, "no_text")
    assert "send its pages as images" in message


@pytest.mark.parametrize("data", [b"%PDF-1.7\n", b"%PDF-1.7\n" + os.urandom(5000)])
async def test_a_broken_pdf_is_refused(read: Read, data: bytes) -> None:
    status, code, message = await refused(read, data_url(data))

    assert (status, code) == (400, "invalid_file")
    assert "damaged" in message


async def test_an_encrypted_pdf_is_read_only_where_it_needs_no_password(read: Read) -> None:
    assert (await read(data=data_url(encrypted("")))).text == "A secret."
    assert "encrypted" in (await refused(read, data_url(encrypted("pass"))))[2]


async def test_a_pdfs_text_has_a_limit(read: Read) -> None:
    status, code, _ = await refused(read, data_url(pdf([line("x" * 100)])), max_body_bytes=50)

    assert (status, code) == (413, "too_large")


async def test_a_pdf_that_takes_too_long_is_given_up_and_its_process_ended(read: Read) -> None:
    before, begun = children(), time.monotonic()

    _, code, message = await refused(read, data_url(pdf([SLOW])), tool_timeout=timedelta(seconds=1))

    assert (code, message) == ("invalid_file", "The PDF takes too long to read.")
    assert time.monotonic() - begun < 10
    assert children() == before


async def test_who_leaves_ends_the_reading(read: Read) -> None:
    before = children()
    reading = asyncio.create_task(read(data=data_url(pdf([SLOW]))))
    async with asyncio.timeout(10):
        while children() == before:
            await asyncio.sleep(0.01)

    reading.cancel()

    with pytest.raises(asyncio.CancelledError):
        await reading
    assert children() == before


async def test_at_most_two_pdfs_are_read_at_a_time(read: Read) -> None:
    before = children()
    reading = [asyncio.create_task(read(data=data_url(pdf([line(str(n))])))) for n in range(5)]
    most = 0
    while not all(task.done() for task in reading):
        most = max(most, len(children() - before))
        await asyncio.sleep(0.005)

    assert [task.result().text for task in reading] == ["0", "1", "2", "3", "4"]
    assert most == 2

"""What may come with a prompt, where it may be fetched from, and what it is taken for."""

import asyncio
import base64
import gzip
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pytest
from pydantic_ai.messages import AudioUrl, BinaryContent, TextContent, UserContent, VideoUrl

from app.config import Settings
from app.core.errors import AppError
from app.core.security import Caller
from app.db.session import make_engine
from app.services.attachments import Attachments, attachment
from app.services.files import name_of
from app.services.outbound import MAX_REPLY, Allowed, make_http
from tests.conftest import settings_of
from tests.toolserver import ToolServer

PNG = b"\x89PNG\r\n\x1a\n" + b"\0" * 8
JPEG = b"\xff\xd8\xff\xe0" + b"\0" * 8
WEBP = b"RIFF\x10\0\0\0WEBPVP8 "
PDF = b"%PDF-1.7\n%\xe2\xe3\xcf\xd3"
CSV = "name,größe\nAda,1\n".encode()
CALLER = Caller.of(1, ())

Load = Callable[..., Awaitable[list[UserContent]]]


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def data_url(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{encoded(data)}"


def settings(**changes: Any) -> Settings:
    # None of these tests gets as far as the database.
    given = {"USER_URLS_ALLOW": "127.0.0.1", "DATABASE_URL": "sqlite://", **changes}
    return settings_of(given, tool_timeout=changes.get("TOOL_TIMEOUT", "5"))


def serve(tools: ToolServer, path: str, body: bytes, **behaviour: Any) -> str:
    """The address of a file."""
    tools.behave(path, **{"status": 200, "body": body, **behaviour})
    return tools.url + path


@pytest.fixture
async def load() -> AsyncIterator[Load]:
    async def run(*parts: UserContent, **changes: Any) -> list[UserContent]:
        given = settings(**changes)
        engine = make_engine(given)
        async with make_http(given, Allowed.of_users(given)) as http:
            loaded = await Attachments(engine, http, given).load(CALLER, parts, "input")
        await engine.dispose()
        assert isinstance(loaded, list)
        return loaded

    yield run


async def refused(load: Load, *parts: UserContent, status: int = 400, **changes: Any) -> str:
    """The message of the refusal."""
    with pytest.raises(AppError) as caught:
        await load(*parts, **changes)
    assert (caught.value.status, caught.value.param) == (status, "input")
    return caught.value.message


def binary(parts: Sequence[UserContent]) -> list[tuple[bytes, str]]:
    return [(part.data, part.media_type) for part in parts if isinstance(part, BinaryContent)]


# By value


@pytest.mark.parametrize(
    ("data", "said", "name", "taken_for"),
    [
        (PNG, "image/png", None, "image/png"),
        (PNG, "image/jpeg", None, "image/png"),
        (PNG, "application/octet-stream", None, "image/png"),
        (JPEG, "image/jpg", None, "image/jpeg"),
        (b"GIF89a..", "image/gif", None, "image/gif"),
        (WEBP, "image/*", None, "image/webp"),
        (PDF, "application/pdf", None, "application/pdf"),
        (PDF, "text/html", None, "application/pdf"),
        (CSV, "text/csv; charset=utf-8", None, "text/csv"),
        (CSV, "application/octet-stream", "people.csv", "text/csv"),
        (CSV, "application/vnd.ms-excel", "people.csv", "text/csv"),
        (b"# Hi", None, "README.md", "text/markdown"),
        (b"{}", "application/json", "x.txt", "application/json"),
        (b"{}", None, None, "text/plain"),
        (b"a: 1", "application/x-yaml", "a.bin", "text/plain"),
        (b"x", "text/evil\r\n-----END", None, "text/plain"),
    ],
)
def test_bytes_say_what_they_are_and_words_only_which_text(
    data: bytes, said: str | None, name: str | None, taken_for: str
) -> None:
    part = attachment(data=encoded(data), media_type=said, name=name, param="input")

    assert binary([part]) == [(data, taken_for)]


@pytest.mark.parametrize(
    "url",
    [
        data_url(CSV, "text/csv"),
        data_url(CSV, "text/csv;charset=utf-8"),
        "DATA:text/csv;base64," + encoded(CSV),
        "data:text/csv,name%2Cgr%C3%B6%C3%9Fe%0AAda%2C1%0A",
    ],
)
def test_data_urls_in_all_their_forms(url: str) -> None:
    assert binary([attachment(url=url, param="input")]) == [(CSV, "text/csv")]
    assert binary([attachment(data=url, param="input")]) == [(CSV, "text/csv")]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"data": ""},
        {"data": "@@@"},
        {"data": "größe"},
        {"data": encoded(b"MZ\x90\0\x03")},
        {"data": encoded(b"caf\xe9")},
        {"data": encoded(b"PK\x03\x04\0\0"), "media_type": "text/plain", "name": "a.txt"},
        {"data": encoded(CSV), "media_type": "image/png"},
        {"data": encoded(b"<svg/>"), "media_type": "image/svg+xml"},
        {"url": ""},
        {"url": "data:"},
        {"url": "data:,"},
        {"url": "data:image/png;base64"},
        {"url": data_url(b"<b>", "text/html"), "media_type": "image/*"},
        {"url": "ftp://example.com/a.png"},
        {"url": "file:///etc/passwd"},
        {"url": "//example.com/a.png"},
        {"url": "http://"},
        {"url": "http://[::1"},
        {"url": "http://\ud800/"},
        {"url": "http://example.com/" + "a" * 9000},
    ],
)
def test_what_can_be_no_attachment_is_refused_at_once(given: dict[str, str]) -> None:
    with pytest.raises(AppError) as caught:
        attachment(**given, param="input")

    assert (caught.value.status, caught.value.param) == (400, "input")


def test_names_can_stand_anywhere() -> None:
    assert name_of("../../etc/passwd") == "passwd"
    assert name_of('a".csv\r\nX: y\0\ud800') == "a.csvX: y"
    assert name_of("größe.md") == "größe.md"
    assert name_of(" / ") is None
    assert name_of(None) is None
    assert len(name_of("x" * 999 + ".txt") or "") == 255


async def test_texts_and_bytes_pass_unchanged(load: Load) -> None:
    image = attachment(data=encoded(PNG), name="a.png", detail="low", param="input")

    loaded = await load("Look:", TextContent("here"), image)

    assert loaded == ["Look:", "here", image]
    assert isinstance(loaded[2], BinaryContent)
    assert loaded[2].vendor_metadata == {"detail": "low"}
    assert loaded[2].identifier == "a.png"


async def test_bytes_are_checked_wherever_they_come_from(load: Load) -> None:
    sneaked = BinaryContent(b"MZ\x90\0", media_type="image/png")

    assert "no image" in await refused(load, sneaked)


async def test_sizes_and_numbers_are_limited(load: Load) -> None:
    image = attachment(data=encoded(PNG), param="input")
    size = len(PNG)

    limits: Any = {
        "MAX_FILE_BYTES": str(size),
        "MAX_BODY_BYTES": str(2 * size),
        "MAX_ATTACHMENTS": "3",
    }

    assert len(await load(image, "and", image, **limits)) == 3
    assert "too large" in await refused(load, image, image, image, status=413, **limits)
    assert "At most 3 files" in await refused(load, *[image] * 4, **limits)
    small: Any = {"MAX_FILE_BYTES": str(size - 1)}
    assert "too large" in await refused(load, image, status=413, **small)


async def test_sounds_and_films_are_refused(load: Load) -> None:
    for part in (AudioUrl("https://example.com/a.mp3"), VideoUrl("https://example.com/a.mp4")):
        assert "Audio and video" in await refused(load, part)


# By address


def named(url: str, media_type: str | None = None) -> UserContent:
    return attachment(url=url, media_type=media_type, param="input")


async def test_an_address_is_fetched_once_and_its_bytes_are_kept(
    load: Load, tools: ToolServer
) -> None:
    cat = serve(tools, "/cat.png", PNG, headers={"content-type": "text/html"})
    people = serve(tools, "/people", CSV, headers={"content-type": "text/csv; charset=utf-8"})

    loaded = await load(named(cat, "image/*"), named(people))

    assert binary(loaded) == [(PNG, "image/png"), (CSV, "text/csv")]
    assert [getattr(part, "identifier", None) for part in loaded] == ["cat.png", "people"]
    assert (tools.count("/cat.png"), tools.count("/people")) == (1, 1)


async def test_a_redirect_is_followed_where_it_may_lead(load: Load, tools: ToolServer) -> None:
    tools.behave("/moved", status=302, headers={"location": "/cat.png"})
    serve(tools, "/cat.png", PNG)

    assert binary(await load(named(f"{tools.url}/moved"))) == [(PNG, "image/png")]


async def test_addresses_inside_are_not_fetched(load: Load, tools: ToolServer) -> None:
    nobody: Any = {"USER_URLS_ALLOW": "192.0.2.1"}

    for url in (tools.url, "http://169.254.169.254/latest", "http://[::ffff:127.0.0.1]/"):
        assert "not a public address" in await refused(load, named(f"{url}/cat.png"), **nobody)

    assert tools.calls == []


async def test_what_is_open_to_tools_is_not_to_users(load: Load, tools: ToolServer) -> None:
    for_tools: Any = {
        "USER_URLS_ALLOW": "",
        "OUTBOUND_ALLOW": "127.0.0.1",
        "WEATHER_API_URL": tools.url,
    }

    assert "not a public address" in await refused(load, named(f"{tools.url}/x.png"), **for_tools)

    assert tools.calls == []


async def test_a_redirect_inward_is_not_followed(load: Load, tools: ToolServer) -> None:
    with ToolServer() as inside:
        tools.behave("/away", status=302, headers={"location": f"{inside.url}/effects/secret"})
        only: Any = {"USER_URLS_ALLOW": tools.url.removeprefix("http://")}

        assert "not a public address" in await refused(load, named(f"{tools.url}/away"), **only)

        assert inside.calls == []
        assert tools.count("/away") == 1


async def test_redirects_end(load: Load, tools: ToolServer) -> None:
    tools.behave("/around", status=302, headers={"location": "/around"})

    assert "could not be fetched" in await refused(load, named(f"{tools.url}/around"))


@pytest.mark.parametrize(
    ("media_type", "behaviour", "said"),
    [
        (None, {"status": 404, "body": b"Not Found"}, "status 404"),
        (None, {"status": 500, "body": b"Oops"}, "status 500"),
        (None, {"status": 204, "body": b""}, "status 204"),
        (None, {"body": b""}, "empty"),
        (None, {"body": b"\x7fELF\x01\0"}, "no type that is taken"),
        ("image/*", {"body": b"<html>", "headers": {"content-type": "image/png"}}, "no image"),
        (None, {"body": PNG, "headers": {"content-encoding": "gzip"}}, "could not be fetched"),
        (None, {"hang": True}, "in time"),
        (None, {"drip": (PNG * 100, 0.05)}, "in time"),
    ],
)
async def test_what_is_not_to_be_had_is_a_clear_refusal(
    load: Load, tools: ToolServer, media_type: str | None, behaviour: dict[str, Any], said: str
) -> None:
    url = serve(tools, "/it", **{"body": b"", **behaviour})

    assert said in await refused(load, named(url, media_type), TOOL_TIMEOUT="0.3")


async def test_nobody_there_is_a_clear_refusal(load: Load) -> None:
    for host in ("127.0.0.1:9", "nowhere.invalid"):
        said = await refused(load, named(f"http://{host}/a.png"))
        assert "could not be fetched" in said
        assert host.split(":")[0] in said


async def test_many_slow_addresses_share_one_deadline(load: Load, tools: ToolServer) -> None:
    url = serve(tools, "/slow", PNG, delay=0.2)
    started = asyncio.get_running_loop().time()

    assert "in time" in await refused(load, *[named(url)] * 20, TOOL_TIMEOUT="0.5")
    assert asyncio.get_running_loop().time() - started < 2


async def test_what_is_too_large_is_not_read_to_its_end(load: Load, tools: ToolServer) -> None:
    bomb = gzip.compress(b"a" * 20 * MAX_REPLY)
    large = named(serve(tools, "/large", PNG + b"\0" * 100_000))
    exploding = named(serve(tools, "/bomb", bomb, headers={"content-encoding": "gzip"}))

    assert "too large" in await refused(load, large, status=413, MAX_FILE_BYTES="1000")
    assert "too large" in await refused(load, exploding, status=413)
    assert "too large" in await refused(load, exploding, status=413, MAX_FILE_BYTES=str(2**30))


async def test_a_name_without_a_query_is_told(load: Load, tools: ToolServer) -> None:
    serve(tools, "/my notes.md", b"# Hi", headers={"content-type": "application/octet-stream"})

    [part] = await load(named(f"{tools.url}/my%20notes.md?token=secret"))

    assert isinstance(part, BinaryContent)
    assert (part.identifier, part.media_type) == ("my notes.md", "text/markdown")

"""Uploads: whose they are, how they come to the model, and what is refused."""

import asyncio
import base64
import hashlib
import uuid
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import openai
import pytest
from httpx2 import AsyncClient
from openai import AsyncOpenAI
from sqlalchemy import update

from app.db.session import make_engine
from app.models import File
from tests.conftest import client_of, settings_of
from tests.server import ThreadedServer
from tests.toolserver import ToolServer
from tests.upstream import Upstream

URL = "/v1/files"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
PDF = b"%PDF-1.7\n" + bytes(range(256))
CSV = "name,größe\nAda,1\n".encode()


def data_url(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def parts(upstream: Upstream) -> list[dict[str, Any]]:
    """The parts of the last message that the model was sent."""
    return upstream.requests[-1].body["messages"][-1]["content"]


async def upload(
    client: AsyncClient, data: bytes = CSV, name: str = "people.csv", **form: Any
) -> Any:
    return await client.post(
        URL, files={"file": (name, data)}, data={"purpose": "user_data", **form}
    )


async def uploaded(client: AsyncClient, data: bytes = CSV, name: str = "people.csv") -> str:
    reply = await upload(client, data, name)
    assert reply.status_code == 200, reply.text
    return reply.json()["id"]


# The official client


async def test_the_official_client_uploads_lists_reads_and_deletes(
    openai_client: AsyncOpenAI,
) -> None:
    made = await openai_client.files.create(
        file=("größe.csv", CSV),
        purpose="user_data",
        expires_after={"anchor": "created_at", "seconds": 7200},
    )

    assert made.id.startswith("file-") and len(made.id) == 37
    assert (made.filename, made.bytes, made.purpose) == ("größe.csv", len(CSV), "user_data")
    assert (made.object, made.status) == ("file", "processed")
    assert made.expires_at == made.created_at + 7200
    assert await openai_client.files.retrieve(made.id) == made
    assert [file async for file in openai_client.files.list()] == [made]
    content = await openai_client.files.content(made.id)
    assert content.content == CSV
    deleted = await openai_client.files.delete(made.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (made.id, "file", True)
    with pytest.raises(openai.NotFoundError):
        await openai_client.files.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        await openai_client.files.delete(made.id)


async def test_the_official_client_pages_through_them(openai_client: AsyncOpenAI) -> None:
    ids = [
        (await openai_client.files.create(file=(f"{n}.txt", b"x"), purpose=purpose)).id
        for n, purpose in enumerate(("vision", "user_data", "vision", "assistants", "vision"))
    ]

    async def listed(**query: Any) -> list[str]:
        return [file.id async for file in openai_client.files.list(**query)]

    assert await listed() == ids[::-1]
    assert await listed(limit=2) == ids[::-1]
    assert await listed(limit=2, order="asc") == ids
    assert await listed(limit=1, order="asc", purpose="vision") == [ids[0], ids[2], ids[4]]
    assert await listed(after=ids[3]) == [ids[2], ids[1], ids[0]]
    page = await openai_client.files.list(limit=2)
    assert (page.has_more, page.first_id, page.last_id) == (True, ids[4], ids[3])  # pyright: ignore[reportAttributeAccessIssue]


async def test_an_uploaded_image_reaches_the_model_in_both_protocols(
    openai_client: AsyncOpenAI, upstream: Upstream
) -> None:
    file = await openai_client.files.create(file=("cat.png", PNG), purpose="vision")
    seen = {"type": "image_url", "image_url": {"url": data_url(PNG, "image/png"), "detail": "low"}}

    await openai_client.responses.create(
        model="assistant",
        input=[
            {
                "role": "user",
                "content": [
                    {"type": "input_text", "text": "What is it?"},
                    {"type": "input_image", "file_id": file.id, "detail": "low"},
                ],
            }
        ],
    )
    assert parts(upstream) == [{"type": "text", "text": "What is it?"}, seen]

    await openai_client.chat.completions.create(
        model="assistant",
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is it?"},
                    {"type": "file", "file": {"file_id": file.id}},
                    {
                        "type": "image_url",
                        "image_url": {"url": data_url(PNG, "image/png"), "detail": "low"},
                    },
                ],
            }
        ],
    )
    plain = {"type": "image_url", "image_url": {"url": data_url(PNG, "image/png")}}
    assert parts(upstream) == [{"type": "text", "text": "What is it?"}, plain, seen]


async def test_documents_go_as_files_and_texts_as_text(
    openai_client: AsyncOpenAI, upstream: Upstream, tools: ToolServer
) -> None:
    pdf = await openai_client.files.create(file=("a.pdf", PDF), purpose="user_data")
    csv = await openai_client.files.create(file=("people.csv", CSV), purpose="user_data")

    await openai_client.responses.create(
        model="assistant",
        input=[
            {
                "role": "user",
                "content": [
                    {"type": "input_file", "file_id": pdf.id},
                    {"type": "input_file", "file_id": csv.id},
                    {
                        "type": "input_file",
                        "filename": "notes.md",
                        "file_data": data_url(b"# Notes", "text/markdown"),
                    },
                ],
            }
        ],
    )

    document, table, notes = parts(upstream)
    assert document["file"]["file_data"] == data_url(PDF, "application/pdf")
    assert CSV.decode() in table["text"]
    assert 'id="people.csv" type="text/csv"' in table["text"]
    assert 'id="notes.md" type="text/markdown"' in notes["text"]

    await openai_client.chat.completions.create(
        model="assistant",
        messages=[
            {
                "role": "user",
                "content": [
                    {
                        "type": "file",
                        "file": {
                            "filename": "a.pdf",
                            "file_data": base64.b64encode(PDF).decode(),
                        },
                    }
                ],
            }
        ],
    )
    assert parts(upstream)[0]["file"]["file_data"] == data_url(PDF, "application/pdf")


# By address


@pytest.fixture
def environ(environ: dict[str, str], tools: ToolServer) -> dict[str, str]:
    """The tool server may be reached, nothing else of this machine."""
    return {**environ, "USER_URLS_ALLOW": tools.url.removeprefix("http://")}


async def test_an_address_is_fetched_by_the_server_once(
    openai_client: AsyncOpenAI, upstream: Upstream, tools: ToolServer
) -> None:
    tools.behave("/cat.png", status=200, body=PNG)
    tools.behave("/a.pdf", status=200, body=PDF)

    first = await openai_client.responses.create(
        model="assistant",
        input=[
            {
                "role": "user",
                "content": [
                    {
                        "type": "input_image",
                        "image_url": f"{tools.url}/cat.png",
                        "detail": "auto",
                    },
                    {"type": "input_file", "file_url": f"{tools.url}/a.pdf"},
                ],
            }
        ],
    )
    await openai_client.responses.create(
        model="assistant", input="And now?", previous_response_id=first.id
    )

    sent = str(upstream.requests[-1].body)
    assert data_url(PNG, "image/png") in sent
    assert data_url(PDF, "application/pdf") in sent
    assert tools.url not in sent
    assert [call.path for call in tools.calls] == ["/cat.png", "/a.pdf"]


async def test_an_address_that_gives_no_image_is_a_clear_error(
    alice: AsyncClient, upstream: Upstream, tools: ToolServer
) -> None:
    with ToolServer() as inside:
        tools.behave("/away", status=302, headers={"location": f"{inside.url}/effects/x"})
        tools.behave("/page", status=200, body=b"<html>")
        urls = [f"{inside.url}/x", *(f"{tools.url}/{path}" for path in ("away", "page", "missing"))]

        for url in urls:
            image = {"type": "image_url", "image_url": {"url": url}}
            messages = [{"role": "user", "content": [image]}]
            reply = await alice.post(
                "/v1/chat/completions", json={"model": "assistant", "messages": messages}
            )
            assert reply.status_code == 400, reply.text
            assert reply.json()["error"]["code"] == "invalid_file"
            assert reply.json()["error"]["param"] == "messages"

        assert (inside.calls, upstream.requests) == ([], [])


async def test_what_was_said_before_is_not_fetched_again(
    openai_client: AsyncOpenAI, upstream: Upstream, tools: ToolServer
) -> None:
    """Clients without a chat id send the whole history each time."""
    tools.behave("/cat.png", status=200, body=PNG)
    question: Any = {
        "role": "user",
        "content": [
            {"type": "text", "text": "What is it?"},
            {"type": "image_url", "image_url": {"url": f"{tools.url}/cat.png"}},
        ],
    }
    done = await openai_client.chat.completions.create(model="assistant", messages=[question])
    answer: Any = {"role": "assistant", "content": done.choices[0].message.content}

    await openai_client.chat.completions.create(
        model="assistant", messages=[question, answer, {"role": "user", "content": "Sure?"}]
    )

    assert tools.count("/cat.png") == 1
    assert data_url(PNG, "image/png") in str(upstream.requests[-1].body)


# Whose they are


async def test_anothers_file_looks_as_if_it_were_not_there(
    alice: AsyncClient, bob: AsyncClient, upstream: Upstream
) -> None:
    theirs, nobodys = await uploaded(alice), f"file-{uuid.uuid4().hex}"

    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        replies = [
            await bob.request(method, f"{URL}/{file_id}{path}") for file_id in (theirs, nobodys)
        ]
        assert [reply.status_code for reply in replies] == [404, 404]
        assert replies[0].text.replace(theirs, nobodys) == replies[1].text
    for file_id in (theirs, nobodys):
        prompt = [{"role": "user", "content": [{"type": "input_file", "file_id": file_id}]}]
        reply = await bob.post("/v1/responses", json={"model": "assistant", "input": prompt})
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "file_not_found")
        assert reply.json()["error"]["param"] == "input"
        after = await bob.get(URL, params={"after": file_id})
        assert (after.status_code, after.json()["error"]["param"]) == (404, "after")
    assert (await bob.get(URL)).json()["data"] == []
    assert upstream.requests == []
    assert (await alice.get(f"{URL}/{theirs}/content")).content == CSV


async def test_strangers_upload_and_see_nothing(anonymous: AsyncClient) -> None:
    replies = [
        await upload(anonymous),
        await anonymous.get(URL),
        await anonymous.get(f"{URL}/file-{'0' * 32}"),
        await anonymous.get(f"{URL}/file-{'0' * 32}/content"),
        await anonymous.delete(f"{URL}/file-{'0' * 32}"),
    ]

    assert [reply.status_code for reply in replies] == [401] * 5


async def test_a_conversation_keeps_what_is_deleted(alice: AsyncClient, upstream: Upstream) -> None:
    file_id = await uploaded(alice, PNG, "cat.png")
    prompt = [{"role": "user", "content": [{"type": "input_image", "file_id": file_id}]}]
    first = await alice.post("/v1/responses", json={"model": "assistant", "input": prompt})

    assert (await alice.delete(f"{URL}/{file_id}")).status_code == 200
    more = {"previous_response_id": first.json()["id"], "input": "Sure?", "model": "assistant"}
    second = await alice.post("/v1/responses", json=more)
    again = await alice.post("/v1/responses", json={"model": "assistant", "input": prompt})

    assert second.json()["status"] == "completed"
    assert data_url(PNG, "image/png") in str(upstream.requests[-1].body)
    assert again.status_code == 404


async def test_a_file_is_gone_when_its_time_is_over(
    alice: AsyncClient, environ: dict[str, str]
) -> None:
    file_id = (await upload(alice, CSV, "a.csv", **{"expires_after[seconds]": "3600"})).json()["id"]
    engine = make_engine(settings_of(environ))
    async with engine.execution_options(write=True).begin() as connection:
        await connection.execute(update(File).values(expires_at=datetime.now(UTC) - timedelta(1)))

    assert (await alice.get(f"{URL}/{file_id}")).status_code == 404
    assert (await alice.get(URL)).json()["data"] == []
    assert (await alice.delete(f"{URL}/{file_id}")).status_code == 404
    await uploaded(alice)
    async with engine.connect() as connection:
        rows = await connection.exec_driver_sql("SELECT count(*) FROM files")
        assert rows.scalar() == 1
    await engine.dispose()


# What is served


async def test_no_browser_runs_what_is_served(alice: AsyncClient) -> None:
    for data, name, media_type in (
        (b"<script>alert(1)</script>", "x.html", "text/html; charset=utf-8"),
        (PNG, "x.html", "image/png"),
        (CSV, 'a";\n/x.csv', "text/csv; charset=utf-8"),
    ):
        reply = await alice.get(f"{URL}/{await uploaded(alice, data, name)}/content")

        assert reply.content == data
        assert reply.headers["content-type"] == media_type
        assert reply.headers["content-disposition"].startswith("attachment; filename*=UTF-8''")
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert "sandbox" in reply.headers["content-security-policy"]
        assert reply.headers["etag"] == f'"{hashlib.sha256(data).hexdigest()}"'


async def test_names_from_everywhere_are_kept_harmless(alice: AsyncClient) -> None:
    for name, kept in {
        "größe.csv": "größe.csv",
        "../../etc/passwd": "passwd",
        "a" * 300 + ".csv": "a" * 251 + ".csv",
        "/": "file",
    }.items():
        assert (await upload(alice, name=name)).json()["filename"] == kept


# What is refused


async def test_what_is_no_file_for_a_prompt_is_refused(alice: AsyncClient) -> None:
    cases: list[tuple[bytes, dict[str, str], str]] = [
        (b"", {}, "file"),
        (b"MZ\x90\0", {}, "file"),
        (b"caf\xe9", {}, "file"),
        (CSV, {"purpose": "fine-tune"}, "purpose"),
        (CSV, {"expires_after[seconds]": "60"}, "expires_after[seconds]"),
        (CSV, {"expires_after[seconds]": "9" * 5000}, "expires_after[seconds]"),
        (CSV, {"expires_after[anchor]": "never"}, "expires_after[anchor]"),
    ]
    for data, form, param in cases:
        reply = await upload(alice, data, "a.bin", **form)
        assert reply.status_code == 400, reply.text
        assert reply.json()["error"]["param"] == param
    assert (await alice.get(URL)).json()["data"] == []


async def test_odd_forms_are_refused(alice: AsyncClient) -> None:
    multipart = "multipart/form-data"
    requests: list[dict[str, Any]] = [
        {"data": {"purpose": "vision"}},
        {"data": {"purpose": "vision", "file": "text"}},
        {"json": {"purpose": "vision", "file": "text"}},
        {"content": b"--x\r\n", "headers": {"Content-Type": f"{multipart}; boundary=x"}},
        {"content": b"--x\r\n", "headers": {"Content-Type": multipart}},
        {"files": [("file", (f"{n}", b"x")) for n in range(1100)]},
        {"files": {"file": ("x", b"x")}, "data": {f"f{n}": "x" for n in range(1100)}},
        {"files": {"file": ("x", b"x"), "purpose": ("vision", b"x")}},
    ]
    for request in requests:
        reply = await alice.post(URL, **request)
        assert 400 <= reply.status_code < 500, reply.text
    assert (await alice.get(URL)).json()["data"] == []


async def test_strange_ids_are_not_found_and_strange_pages_refused(alice: AsyncClient) -> None:
    for file_id in ("x", "file-", "file-%00", f"file-{'g' * 32}", f"file-{'A' * 32}", "%ED%A0%80"):
        assert (await alice.get(f"{URL}/{file_id}")).status_code == 404
        assert (await alice.get(f"{URL}/{file_id}/content")).status_code == 404
        assert (await alice.delete(f"{URL}/{file_id}")).status_code == 404
        assert (await alice.get(f"{URL}?after={file_id}")).status_code == 404
    for query in ("limit=0", "limit=99999", "limit=x", "order=up", "purpose=" + "x" * 65):
        assert (await alice.get(f"{URL}?{query}")).status_code == 400
    assert (await alice.get(f"{URL}?purpose=%00")).status_code == 400


async def test_ten_megabytes_fit_and_more_do_not(alice: AsyncClient, upstream: Upstream) -> None:
    largest = PNG.ljust(10 * 1024 * 1024, b"\0")
    image = {"type": "input_image", "image_url": data_url(largest, "image/png")}
    prompt = {"model": "assistant", "input": [{"role": "user", "content": [image]}]}

    assert (await upload(alice, largest)).status_code == 200
    assert (await upload(alice, largest + b"\0")).status_code == 413
    assert (await alice.post("/v1/responses", json=prompt)).status_code == 200
    assert len(parts(upstream)[0]["image_url"]["url"]) > 13_000_000
    image["image_url"] = data_url(largest + b"\0", "image/png")
    assert (await alice.post("/v1/responses", json=prompt)).status_code == 413


async def test_fifty_megabytes_are_refused_before_they_are_read(alice: AsyncClient) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        while sent < 50 * 1024 * 1024:
            sent += 65536
            yield b"a" * 65536

    headers = {"Content-Type": "multipart/form-data; boundary=x"}

    assert (await upload(alice, b"a" * 50 * 1024 * 1024)).status_code == 413
    assert (await alice.post(URL, content=endless(), headers=headers)).status_code == 413


async def test_what_one_user_stores_is_limited_also_at_once(
    environ: dict[str, str], bearer: Callable[..., Any]
) -> None:
    limits = {"max_stored_bytes": 5 * len(CSV)}
    with ThreadedServer(settings_of(environ, **limits)) as server:
        async with (
            client_of(server.url, await bearer("Alice")) as alice,
            client_of(server.url, await bearer("Bob")) as bob,
        ):
            replies = await asyncio.gather(*[upload(alice) for _ in range(20)])

            assert sorted(reply.status_code for reply in replies) == [200] * 5 + [413] * 15
            assert (await upload(bob)).status_code == 200
            [first, *_] = (await alice.get(URL)).json()["data"]
            await alice.delete(f"{URL}/{first['id']}")
            assert (await upload(alice)).status_code == 200


async def test_sounds_are_refused_by_name(alice: AsyncClient, upstream: Upstream) -> None:
    part = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
    chat = {"model": "assistant", "messages": [{"role": "user", "content": [part]}]}
    responses = {"model": "assistant", "input": [{"role": "user", "content": [part]}]}

    for url, body, param in (
        ("/v1/chat/completions", chat, "messages.0"),
        ("/v1/responses", responses, "input"),
    ):
        reply = await alice.post(url, json=body)
        assert reply.status_code == 400
        assert "input_audio" in reply.json()["error"]["message"]
        assert reply.json()["error"]["param"].startswith(param)
    assert upstream.requests == []

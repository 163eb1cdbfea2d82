"""`python -m app.extract`: documents, batches and evaluations without a server."""

import asyncio
import json
import signal
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.extract import grounds, main
from tests.extracting import ADA, PERSON, fills
from tests.server import ROOT, ThreadedServer, clean_environ
from tests.upstream import Upstream

Done = subprocess.CompletedProcess[str]

CONTACTS = "tests/data/contacts.jsonl"
CARD = "Name: Ada Lovelace\nEmail: ada@example.com\n"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(16)


@pytest.fixture
def demo(tmp_path: Path) -> dict[str, str]:
    """The environment of who has set nothing but a database."""
    return {"DATABASE_URL": f"sqlite:///{tmp_path}/app.db"}


@pytest.fixture
def scripted(demo: dict[str, str], upstream: Upstream) -> dict[str, str]:
    return demo | {
        "MODEL": "openai-chat:scripted",
        "OPENAI_API_KEY": "test-key",
        "OPENAI_BASE_URL": upstream.url,
        "SHUTDOWN_TIMEOUT": "1",
    }


@pytest.fixture
def person(tmp_path: Path) -> str:
    return written(tmp_path / "person.json", json.dumps(PERSON))


def written(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def command(environ: dict[str, str], *arguments: str) -> dict[str, Any]:
    return {
        "args": [sys.executable, "-m", "app.extract", *arguments],
        "cwd": ROOT,
        "env": clean_environ() | environ,
        "text": True,
    }


def run(environ: dict[str, str], *arguments: str, stdin: str = "") -> Done:
    done = subprocess.run(
        **command(environ, *arguments), input=stdin, capture_output=True, timeout=60
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def lines(*texts: str) -> str:
    items = [{"custom_id": text, "text": text} for text in texts]
    return "\n".join(json.dumps(item) for item in items)


def test_the_document_is_printed_and_what_it_took_is_said_beside_it(demo: dict[str, str]) -> None:
    done = run(demo, "file", "-", "--schema", "contact", "--evidence", "optional", stdin=CARD)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["name"] == "Ada Lovelace"
    for part in ("completed", "demo", "tokens", "2 of 2 values grounded", '/name  0-18  "Name: '):
        assert part in done.stderr


def test_a_schema_comes_from_a_file_and_numbers_keep_their_digits(
    scripted: dict[str, str], upstream: Upstream, tmp_path: Path
) -> None:
    number = written(tmp_path / "number.json", '{"type": "number"}')
    upstream.when("Ada", fills('{"value": 1.10}'))

    done = run(
        scripted, "file", written(tmp_path / "ada.txt", "Ada"), "--schema", number,
        "--instructions", "Look twice.",
    )  # fmt: skip

    assert done.stdout == "1.10\n", done.stderr
    assert "Look twice." in json.dumps(upstream.requests[0].body["messages"])


def test_a_failure_names_what_was_wrong_with_each_answer(
    scripted: dict[str, str], upstream: Upstream, person: str
) -> None:
    upstream.when("Ada", fills({"name": "Ada", "age": -1}))

    done = run(scripted, "file", "-", "--schema", person, stdin="Ada")

    assert (done.returncode, done.stdout) == (1, "")
    assert "extraction_invalid: " in done.stderr
    for number in (1, 2, 3):
        assert f"attempt {number} (scripted): /age: -1 is less than" in done.stderr


WRONG: list[tuple[list[str], str]] = [
    (["file", "nope.txt", "--schema", "contact"], "Cannot read nope.txt: No such file"),
    (["file", sys.executable, "--schema", "contact"], "The file is of no type that is taken"),
    (["file", "justfile", "--schema", "nope.json"], "Cannot read nope.json: No such file"),
    (["file", "justfile", "--schema", "contact", "--key", "ключ"], "ASCII"),
    (["file", "justfile", "--schema", "contact", "--model", "\udcff"], "cannot be sent as JSON"),
    (["file", "justfile", "--schema", "contakt"], "No schema 'contakt'; available: contact"),
    (["file", "justfile", "--schema", "contact", "--model", "gpt-99"], "'gpt-99' is not allowed"),
    (["file", "justfile", "--schema", "contact", "--key", "wrong"], "Give an API key with --key"),
    (["file", "justfile", "--schema", "contact", "--url", "http://127.0.0.1:1"], "No server"),
    (["file", "justfile", "--schema", "contact", "--url", "nope"], "No server answers at nope"),
    (["batch", "--schema", "contact"], "Give a FILE and its --schema, or --resume a job."),
    (["batch", "--resume", "nope"], "not_found: "),
    (["eval", "justfile", "--schema", "contact"], "line 1 of file is not valid JSON"),
]


async def test_what_goes_wrong_is_said_in_a_line(
    server: ThreadedServer, bearer: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    token: str = await bearer("Alice")
    for (name, *arguments), explanation in WRONG:
        there = [name, "--url", server.url, "--key", token, *arguments]

        code = await asyncio.to_thread(main, there)

        out, said = capsys.readouterr()
        assert (code, out) == (1, ""), arguments
        assert explanation in said and "Traceback" not in said, said


async def test_a_server_does_the_work_for_who_has_a_key(
    server: ThreadedServer,
    bearer: Callable[..., Any],
    upstream: Upstream,
    tmp_path: Path,
    person: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    upstream.when("", fills(ADA))
    picture = written(tmp_path / "ada.png", PNG)
    token: str = await bearer("Alice")

    code = await asyncio.to_thread(
        main, ["file", picture, "--schema", person, "--url", server.url, "--key", token]
    )

    assert (code, json.loads(capsys.readouterr().out)) == (0, ADA)
    sent = json.dumps(upstream.requests[0].body["messages"])
    assert f"data:image/png;base64,{b64encode(PNG).decode()}" in sent


def test_an_evaluation_passes_above_its_threshold_alone(
    demo: dict[str, str], tmp_path: Path
) -> None:
    golden = (ROOT / CONTACTS).read_text()
    worse = written(tmp_path / "worse.jsonl", golden.replace('"Ada Lovelace",', '"Ada Byron",'))

    good = run(demo, "eval", CONTACTS, "--schema", "contact", "--min-f1", "1")
    bad = run(demo, "eval", worse, "--schema", "contact", "--min-f1", "0.95")

    assert good.returncode == 0, good.stderr
    assert "100.0% exact, 0 failed" in good.stdout
    assert bad.returncode == 1
    assert "F1 is 0.875, below 0.95." in bad.stderr
    assert [row.split() for row in bad.stdout.splitlines() if "/name" in row] == [
        ["/name", "0.667", "0.667", "0.667", "3"]
    ]


def test_a_batch_writes_its_results_in_the_order_of_its_lines(
    scripted: dict[str, str], upstream: Upstream, tmp_path: Path, person: str
) -> None:
    names = [f"Ada {number}" for number in range(20)]
    upstream.when("Ada", fills(ADA))
    upstream.when("Ada 7", fills({}))
    file = written(tmp_path / "items.jsonl", lines(*names))
    out = tmp_path / "out.csv"

    done = run(
        scripted, "batch", file, "--schema", person, "-o", str(out)
    )  # fmt: skip

    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("job ")
    assert "completed_with_errors · 19 of 20 items" in done.stderr
    head, *rows = out.read_text().splitlines()
    assert head == "custom_id,status,name,age"
    assert [row.split(",")[0] for row in rows] == names
    assert rows[0] == "Ada 0,succeeded,Ada,36"
    assert rows[7].startswith("Ada 7,failed")


def test_an_output_that_cannot_be_written_costs_nothing(
    scripted: dict[str, str], upstream: Upstream, tmp_path: Path, person: str
) -> None:
    file = written(tmp_path / "items.jsonl", lines("Ada"))

    done = run(scripted, "batch", file, "--schema", person, "-o", str(tmp_path / "no" / "x.csv"))

    assert (done.returncode, done.stdout) == (1, "")
    assert "Cannot write" in done.stderr and "No such file" in done.stderr
    assert upstream.requests == []


def test_an_output_that_fails_at_the_end_is_fetched_by_resuming(
    scripted: dict[str, str], upstream: Upstream, tmp_path: Path, person: str
) -> None:
    upstream.when("Ada", fills(ADA))
    file = written(tmp_path / "items.jsonl", lines("Ada"))

    done = run(scripted, "batch", file, "--schema", person, "-o", "/dev/full")

    job_id = done.stderr.partition("job ")[2].split()[0]
    assert done.returncode == 1
    assert f"just extract-batch --resume {job_id}" in done.stderr


def test_values_that_the_text_does_not_say_are_marked() -> None:
    quote = {"path": "/a~1b", "start": 5, "end": 205, "quote": "x" * 200, "match": "exact"}
    status = {"/a~1b": "grounded", "/age": "ungrounded"}

    said = list(grounds({"evidence": [quote], "field_status": status}))

    assert said == [f'/a~1b  5-205  "{"x" * 79}…"', "/age  ungrounded"]


def test_an_interrupted_batch_goes_on_where_it_was(
    scripted: dict[str, str], upstream: Upstream, tmp_path: Path, person: str
) -> None:
    upstream.when("Ada", fills(ADA))
    upstream.when("Bob", fills(ADA, hang=True))
    file = written(tmp_path / "items.jsonl", lines("Ada", "Bob"))
    begin = command(scripted, "batch", file, "--schema", person)
    begun = subprocess.Popen(**begin, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    upstream.wait_for(2, timeout=30)

    begun.send_signal(signal.SIGINT)
    out, said = begun.communicate(timeout=30)
    upstream.when("Bob", fills(ADA))
    job_id = said.partition("--resume ")[2].split()[0]
    done = run(scripted, "batch", "--resume", job_id)

    assert (begun.returncode, out) == (130, ""), said
    assert "Traceback" not in said
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["custom_id"] for line in done.stdout.splitlines()] == ["Ada", "Bob"]

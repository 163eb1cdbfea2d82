"""What the environment may say, and what it may not."""

import stat
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from app.config import Settings
from app.main import create_app
from tests.conftest import settings_of
from tests.server import ROOT, clean_environ

SECRET = "x" * 32
SAFE = {"ENVIRONMENT": "production", "SECRET_KEY": SECRET}


def refused(environ: dict[str, str], **changes: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        settings_of(environ, **changes)
    return str(caught.value)


def test_nothing_set_is_a_safe_server_on_this_machine():
    settings = settings_of({})

    assert (settings.host, settings.debug, settings.environment) == (
        "127.0.0.1",
        False,
        "development",
    )
    assert (settings.auth_required, settings.registration_open, settings.demo) == (
        False,
        True,
        True,
    )
    assert settings.is_sqlite and not settings.in_memory


def test_production_requires_a_bearer_and_closes_registration():
    settings = settings_of(SAFE)

    assert (settings.auth_required, settings.registration_open) == (True, False)
    assert settings_of(SAFE, registration="open").registration_open


@pytest.mark.parametrize(
    "url",
    [
        "sqlite+aiosqlite:///:memory:",
        "sqlite:///:memory:",
        "sqlite://",
        "sqlite:///",
        "sqlite+aiosqlite:///file::memory:?uri=true",
        "sqlite+aiosqlite:///file:shared?mode=memory&cache=shared&uri=true",
    ],
)
def test_production_does_not_start_on_a_database_in_memory(url: str):
    assert "cannot keep its database in memory" in refused(SAFE, database_url=url)
    assert settings_of({}, database_url=url).in_memory


def test_production_does_not_start_without_a_secret():
    assert "needs SECRET_KEY" in refused({"ENVIRONMENT": "production"})


@pytest.mark.parametrize("environment", ["production", "development"])
def test_a_short_secret_is_refused_everywhere_and_not_repeated(environment: str):
    message = refused({"ENVIRONMENT": environment, "SECRET_KEY": "too-short-canary"})

    assert "at least 32 bytes" in message
    assert "canary" not in message


def test_production_does_not_answer_without_a_bearer():
    assert "production requires a bearer" in refused(SAFE, auth="local")


def test_a_mistake_does_not_print_the_other_secrets():
    message = refused({"PORT": "many", "OPENAI_API_KEY": "sk-canary", "SECRET_KEY": "canary" * 6})

    assert "port" in message
    assert "canary" not in message


def test_lists_are_separated_by_commas():
    settings = settings_of({"OUTBOUND_ALLOW": " a.example.com, 10.0.0.0/8 ,,", "MODEL": "x:y"})

    assert settings.outbound_allow == ("a.example.com", "10.0.0.0/8")
    assert settings_of({"EXTRACTION_MODELS": ""}).extraction_models == ()


def test_lists_come_from_the_environment_as_they_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("EXTRACTION_MODELS", "small,large")
    monkeypatch.setenv("TOOL_TIMEOUT", "")

    settings = Settings(_env_file=None)  # pyright: ignore[reportCallIssue]

    assert settings.extraction_models == ("small", "large")
    assert settings.tool_timeout == timedelta(seconds=20)


@pytest.mark.parametrize("text", ["https://a.example.com/", "a.example.com", "https://a b"])
def test_what_is_no_origin_is_refused(text: str):
    assert "is no origin" in refused({"CORS_ORIGINS": f"https://b.example.com:8443, {text}"})
    assert settings_of({"CORS_ORIGINS": "https://b.example.com:8443,*,null"}).cors_origins


def test_models_that_stand_in_need_one_to_stand_in_for():
    assert "set MODEL too" in refused({"FALLBACK_MODELS": "openai-chat:small"})


async def test_an_agent_that_is_not_here_is_named_at_the_start(tmp_path: Path):
    settings = settings_of({"DATABASE_URL": f"sqlite:///{tmp_path / 'a.db'}"}, default_agent="me")
    app = create_app(settings)

    with pytest.raises(ValueError, match="DEFAULT_AGENT: no agent 'me'; assistant"):
        async with app.router.lifespan_context(app):
            pass


def test_a_server_with_wrong_settings_says_so_in_a_line_for_each(tmp_path: Path):
    wrong = {"PORT": "many", "KEEP_RUNS": "soon", "ENVIRONMENT": "production"}
    done = subprocess.run(
        [sys.executable, "-m", "app.serve"],
        cwd=tmp_path,
        env=clean_environ() | {"PYTHONPATH": str(ROOT)} | wrong,
        capture_output=True,
        text=True,
        timeout=60,
    )

    title, *lines = done.stderr.splitlines()
    assert done.returncode == 1
    assert title == "The settings cannot be used."
    assert sorted(line.split()[0] for line in lines) == ["KEEP_RUNS", "PORT"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("20", 20), ("0.5", 0.5), ("1e2", 100), ("00:01:30", 90), ("PT5M", 300), ("P1D", 86400)],
)
def test_a_duration_is_seconds_or_iso_8601(text: str, seconds: float):
    assert settings_of({"TOOL_TIMEOUT": text}).tool_timeout == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["soon", "nan", "inf", "1e400", "-1", "0", "-PT5S"])
def test_a_duration_that_is_none_is_refused(text: str):
    assert "tool_timeout" in refused({"TOOL_TIMEOUT": text})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("PORT", "70000"),
        ("RUN_REQUESTS", "0"),
        ("RUN_TOKENS", "-5"),
        ("LEASE_SECONDS", "0"),
        ("LEASE_SECONDS", "nan"),
        ("MAX_BODY_BYTES", "0"),
        ("AUTH", "none"),
        ("ENVIRONMENT", "prod"),
    ],
)
def test_a_value_that_cannot_work_is_named(name: str, text: str):
    assert name.lower() in refused({name: text})


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("postgres://u:p%40@h/d", "postgresql+asyncpg://u:p%40@h/d"),
        ("postgresql://u@h:5433/d", "postgresql+asyncpg://u@h:5433/d"),
        ("postgresql+asyncpg://u@h/d", "postgresql+asyncpg://u@h/d"),
        (
            "postgres://u@h/d?sslmode=require&channel_binding=require",
            "postgresql+asyncpg://u@h/d?ssl=require",
        ),
        ("sqlite:///a.db", "sqlite+aiosqlite:///a.db"),
        ("sqlite:////var/lib/a.db", "sqlite+aiosqlite:////var/lib/a.db"),
    ],
)
def test_a_plain_database_url_gets_the_driver_used_here(given: str, used: str):
    assert settings_of({"DATABASE_URL": given}).database_url == used


@pytest.mark.parametrize("url", ["nonsense", "mysql://u:canary@h/d", "postgresql+psycopg://h/d"])
def test_another_database_is_refused_without_repeating_its_password(url: str):
    message = refused({"DATABASE_URL": url})

    assert "database_url" in message
    assert "canary" not in message


def test_a_secret_is_made_once_and_is_the_owners_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)

    key = settings_of({}).signing_key()

    [path] = (tmp_path / ".data").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(key) >= 32
    assert settings_of({}).signing_key() == key == path.read_bytes()


def test_simultaneous_starts_make_one_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    ready, keys = threading.Barrier(8), set[bytes]()

    def start() -> None:
        ready.wait()
        keys.add(settings_of({}).signing_key())

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(keys) == 1
    assert [path.name for path in (tmp_path / ".data").iterdir()] == ["secret"]


def test_a_given_secret_is_used_and_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    settings = settings_of({"SECRET_KEY": SECRET, "OPENAI_API_KEY": "sk-canary"})

    assert settings.signing_key() == SECRET.encode()
    assert not (tmp_path / ".data").exists()
    assert SECRET not in repr(settings) and "canary" not in repr(settings)

"""Settings: all that the environment or `.env` may change."""

import os
import re
import secrets
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

DATA = Path(".data")
SECRET_BYTES = 32
ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#\s]+")
LOOPBACK_ORIGIN = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"

CommaSeparated = Annotated[tuple[str, ...], NoDecode]


def _seconds(value: object) -> object:
    try:
        return timedelta(seconds=float(str(value)))
    except (ValueError, OverflowError):
        return value  # ISO 8601, or 1:30:00


Duration = Annotated[timedelta, Field(gt=timedelta(0)), BeforeValidator(_seconds)]
"""A plain number is seconds."""

Count = Annotated[int, Field(ge=1)]

Money = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""US dollars."""


class Settings(BaseSettings):
    """All that the environment may change. Units are in the type or the name."""

    model_config = SettingsConfigDict(
        env_file=".env",
        extra="ignore",
        env_ignore_empty=True,
        hide_input_in_errors=True,  # an error at start goes to the log, secrets must not
    )

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    workers: Count = 1  # processes of one server
    environment: Literal["development", "production"] = "development"
    debug: bool = False
    log_format: Literal["text", "json"] | None = None  # see `logs_json`
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    otel_exporter_otlp_endpoint: str | None = None  # where traces are sent; None: there are none
    otel_exporter_otlp_headers: SecretStr | None = None
    otel_service_name: str = "agent-backend"
    otel_content: bool = False
    auth: Literal["local", "required"] | None = None  # see `auth_required`
    registration: Literal["open", "closed"] | None = None  # see `registration_open`
    cors_origins: CommaSeparated = ()  # web pages that may call; see `cors`
    secret_key: SecretStr | None = None
    session_lifetime: Duration = timedelta(hours=12)

    database_url: str = f"sqlite+aiosqlite:///{DATA}/app.db"
    database_timeout: Duration = timedelta(seconds=10)  # for one statement, or a lock of SQLite's
    migrate_on_start: bool = True

    model: str | None = None
    openai_api_key: SecretStr | None = None
    openai_base_url: str | None = None
    fallback_models: CommaSeparated = ()  # asked in turn where the model fails
    first_token_timeout: Duration = timedelta(seconds=60)  # of a streamed reply
    model_timeout: Duration = timedelta(seconds=120)  # of silence, once it has begun
    reply_timeout: Duration = timedelta(minutes=10)  # of one reply, further attempts included
    model_retries: int = Field(default=2, ge=0)  # of each model, for one reply
    breaker_failures: Count = 5  # in a row, after which a model is left alone
    breaker_pause: Duration = timedelta(seconds=30)
    context_tokens: Count = 128_000  # the model's window; longer histories are compacted for it
    extraction_models: CommaSeparated = ()
    extraction_mode: Literal["tools", "json", "json_schema", "strict"] = "tools"

    run_requests: Count = 25  # model requests in one run
    run_tool_calls: Count = 50
    run_tokens: Count = 500_000  # input + output of one run
    run_cost: Money = 5.0
    run_seconds: Duration = timedelta(hours=1)  # without waiting for people
    run_parallel_tools: Count = 8
    owner_rate: Count = 20_000  # runs accepted in a minute
    owner_runs: Count = 2000  # going on at once
    owner_queued: Count = 20_000
    owner_daily_tokens: Count = 100_000_000  # input + output
    owner_daily_cost: Money = 100.0
    tool_timeout: Duration = timedelta(seconds=20)
    approval_timeout: Duration = timedelta(days=7)  # then an unanswered question counts as a no
    default_agent: str = "assistant"  # where a frontend names none
    max_body_bytes: Count = 16 * 1024 * 1024  # and of all that comes with one prompt
    max_file_bytes: Count = 10 * 1024 * 1024  # of one attachment or upload
    max_attachments: Count = 20  # in one prompt
    max_stored_bytes: Count = 1024 * 1024 * 1024  # of one user's uploads
    max_job_items: Count = 100_000
    max_job_bytes: Count = 1024 * 1024 * 1024  # of one upload of items

    worker_runs: Count = 100  # queued runs that one process executes at once

    keep_events: Annotated[Duration, Field(ge=timedelta(hours=1))] = timedelta(hours=24)
    keep_runs: Annotated[Duration, Field(ge=timedelta(days=1))] | None = None  # for ever
    keep_files: Annotated[Duration, Field(ge=timedelta(hours=1))] | None = None  # of uploads

    lease_seconds: float = Field(default=15, gt=0, allow_inf_nan=False)
    poison_attempts: Count = 3
    shutdown_timeout: Duration = timedelta(seconds=10)
    keep_alive: Duration = timedelta(seconds=15)  # of silence on a stream, then a comment is sent

    outbound_allow: CommaSeparated = ()  # for tools
    user_urls_allow: CommaSeparated = ()  # for webhooks and attachments
    weather_api_url: str = "https://api.open-meteo.com"
    weather_geocoding_url: str = "https://geocoding-api.open-meteo.com"
    weather_api_key: SecretStr | None = None

    @field_validator(
        *("extraction_models", "fallback_models", "cors_origins"),
        *("outbound_allow", "user_urls_allow"),
        mode="before",
    )
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(item.strip() for item in value.split(",") if item.strip())
        return value

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if not ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin!r} is no origin; one is `*` or like https://chat.example.com, "
                    "without a path"
                )
        return origins

    @field_validator("database_url")
    @classmethod
    def _async_driver(cls, text: str) -> str:
        """Plain URLs, as hosting services hand them out, get the async driver used here."""
        try:
            url = make_url(text)
        except ArgumentError as error:
            raise ValueError("is no URL of a database") from error
        if url.drivername in ("postgres", "postgresql", "postgresql+asyncpg"):
            url = url.set(drivername="postgresql+asyncpg")
            if "sslmode" in url.query:  # what PostgreSQL's own library calls it
                url = url.update_query_dict({"ssl": url.query["sslmode"]})
            url = url.difference_update_query(("sslmode", "channel_binding"))
        elif url.drivername in ("sqlite", "sqlite+aiosqlite"):
            url = url.set(drivername="sqlite+aiosqlite")
        else:
            raise ValueError("must begin with sqlite:// or postgresql://")
        return url.render_as_string(hide_password=False)

    @model_validator(mode="after")
    def _safe(self) -> Self:
        given = self.secret_key.get_secret_value().encode() if self.secret_key else b""
        if given and len(given) < SECRET_BYTES:
            raise ValueError(f"SECRET_KEY must have at least {SECRET_BYTES} bytes.")
        if self.fallback_models and self.demo:
            raise ValueError("FALLBACK_MODELS stand in for a model; set MODEL too.")
        if self.environment == "production":
            if not given:
                raise ValueError(
                    "ENVIRONMENT=production needs SECRET_KEY; "
                    "`python -c 'import secrets; print(secrets.token_hex(32))'` makes one."
                )
            if self.auth == "local":
                raise ValueError("AUTH=local is for development; production requires a bearer.")
            if self.in_memory:
                raise ValueError("ENVIRONMENT=production cannot keep its database in memory.")
        return self

    @property
    def auth_required(self) -> bool:
        """Whether a request without a bearer is refused, even from this machine."""
        return self.environment == "production" or self.auth == "required"

    @property
    def logs_json(self) -> bool:
        """Whether log lines are for machines."""
        return (self.log_format or ("json" if self.environment == "production" else "text")) == (
            "json"
        )

    @property
    def registration_open(self) -> bool:
        """Whether anybody may make an account for themselves."""
        if self.registration is None:
            return self.environment == "development"
        return self.registration == "open"

    @property
    def cors(self) -> str | None:
        """A pattern of further origins that may call: in development, pages of this machine."""
        return LOOPBACK_ORIGIN if self.environment == "development" else None

    @property
    def is_sqlite(self) -> bool:
        return self.database_url.startswith("sqlite")

    @property
    def in_memory(self) -> bool:
        url = make_url(self.database_url)
        name = url.database or ":memory:"
        return self.is_sqlite and (":memory:" in name or url.query.get("mode") == "memory")

    @property
    def demo(self) -> bool:
        """Whether the built-in demo model answers, for want of a real one."""
        return self.model is None and self.openai_api_key is None

    def signing_key(self) -> bytes:
        """The secret behind session tokens; made once and kept in `.data/` when none is set."""
        if self.secret_key:
            return self.secret_key.get_secret_value().encode()
        path = DATA / "secret"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            draft = path.with_name(f"secret.{secrets.token_hex(8)}")
            draft.touch(mode=0o600, exist_ok=False)
            draft.write_text(secrets.token_hex(SECRET_BYTES))
            # Whole or not at all, and never over another process's: that one may have signed.
            with suppress(FileExistsError):
                os.link(draft, path)
            draft.unlink()
        return path.read_bytes()


def _read() -> Settings:
    try:
        return Settings()
    except ValidationError as error:  # whoever set them wants no traceback
        lines = ["The settings cannot be used."]
        for each in error.errors():
            name = "".join(map(str, each["loc"][:1])).upper()
            lines.append(f"{name} {each['msg'].removeprefix('Value error, ')}".strip())
        raise SystemExit("\n".join(lines)) from None


settings = _read()

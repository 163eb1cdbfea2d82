set positional-arguments

# What there is
default:
    @just --list

# Start the development server
dev:
    @exec uv run python -m app.serve --reload

# Start the server as it runs in production: just serve --workers 4
serve *options:
    @exec uv run --no-dev python -m app.serve "$@"

# Open a Python shell with the settings, the database and the models at hand
shell:
    uv run python -i -c "import asyncio; from app.config import settings; from app.db.session import async_session, engine; from app.models import *; from sqlalchemy import select"

# Apply pending migrations
db-migrate:
    uv run python -m app.db.migrate apply

# Generate a migration from the models, for both databases, and apply it: just db-upgrade add_tags
db-upgrade name:
    uv run python -m app.db.migrate upgrade "$1"

# Roll back the last migration, after showing its SQL (--yes: without asking)
db-downgrade *options:
    uv run python -m app.db.migrate downgrade "$@"

# Back the database up into a new file, also while servers run: just backup monday.dump
backup file:
    uv run python -m app.db.backup save "$1"

# Make the database what a backup says (--yes: also where there is something in it)
restore file *options:
    uv run python -m app.db.backup restore "$@"

# Make an account (asks for the password): just create-user ada@example.com --admin
create-user *options:
    @uv run python -m app.manage create-user "$@"

# Make an API key and print it, this once: just create-key ada@example.com
create-key *options:
    @uv run python -m app.manage create-key "$@"

# List the newest runs, or show, cancel, requeue some: just runs --stuck; just runs show 3f2a
runs *options:
    @uv run python -m app.runs "$@"

# Run one tool by hand: just tool weather '{"location": "Tokyo"}'
tool name args="{}":
    @uv run python -m app.try_tool "$1" "$2"

# Extract one document, a text, PDF or image: just extract invoice.pdf --schema invoice
extract *options:
    @uv run python -m app.extract file "$@"

# Extract each line of a file: just extract-batch texts.jsonl --schema contact -o contacts.csv
extract-batch *options:
    @uv run python -m app.extract batch "$@"

# Compare a model's answers with known ones: just eval tests/data/contacts.jsonl --schema contact --min-f1 0.9
eval *options:
    @uv run python -m app.extract eval "$@"

# Everything CI runs
check: lint types test

# Format and mend what can be mended
fmt:
    uv run ruff check --fix .
    uv run ruff format .

# Look for what the formatter or the linter would change
lint:
    uv run ruff format --check .
    uv run ruff check .

# Check types strictly
types:
    uv run pyright

# Run tests, on SQLite and PostgreSQL: all, on all processors, or some: just test -k stream
test *options:
    uv run pytest {{ if options == "" { "-n auto --dist loadgroup" } else { "" } }} "$@"

# Inject faults for real, and print what came of it: just faults -k kill --out figures.jsonl
faults *options:
    uv run pytest tests/faults --long "$@"

# Measure requests and streams against the same agent without persistence
bench *options:
    uv run python -m tests.bench "$@"

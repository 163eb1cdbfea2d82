"""Runs one tool by hand: `python -m app.try_tool weather '{"location": "Tokyo"}'`."""

import asyncio
import json
import secrets
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, cast

import httpx2
from pydantic import ValidationError
from pydantic_ai import ModelRetry, RunContext, Tool, ToolFailed
from pydantic_ai.models.test import TestModel
from pydantic_ai.usage import RunUsage
from pydantic_core import to_json

from app.config import settings
from app.core.json import dump_exact
from app.core.security import ADMIN, EVERYTHING, Caller
from app.db.migrate import migrate
from app.db.session import async_session, engine
from app.deps import Deps, call_key
from app.schemas.extraction import ExtractionSpec
from app.services.asking import ExtractionFailed
from app.services.documents import Document
from app.services.extractor import Extractor
from app.services.model import make_models
from app.services.outbound import make_http
from app.services.schemas import Schemas
from app.services.user import UserService
from tools import all_tools

SAMPLES: dict[str, Any] = {"integer": 1, "number": 1.5, "boolean": True, "array": [], "object": {}}


def find(name: str) -> Tool[Deps]:
    """The tool of that name, or the one tool of that file. Raises LookupError."""
    known = all_tools()
    if name in known:
        return known[name]
    in_file = [item for item in known.values() if item.function.__module__ == f"tools.{name}"]
    if len(in_file) == 1:
        return in_file[0]
    choices = ", ".join(item.name for item in in_file) or ", ".join(known)
    raise LookupError(f"No one tool is {name!r}; try one of: {choices}.")


@asynccontextmanager
async def users() -> AsyncGenerator[UserService]:
    async with async_session() as db:
        yield UserService(db)


def arguments(item: Tool[Deps], text: str) -> dict[str, Any]:
    """The arguments in that text. Raises ValueError that shows how they are written."""
    try:
        given = json.loads(text)
    except json.JSONDecodeError:
        given = None
    if not isinstance(given, dict):
        raise ValueError(f"Arguments are one JSON object, e.g. '{example(item)}'; got: {text}")
    return cast(dict[str, Any], given)


def example(item: Tool[Deps]) -> str:
    """Arguments for that tool, as far as it needs any, with values to fill in."""
    schema = item.function_schema.json_schema
    known: dict[str, Any] = schema.get("properties", {})
    values = {name: SAMPLES.get(known[name].get("type"), "...") for name in known}
    needed: list[str] = schema.get("required", [])
    return json.dumps({name: values[name] for name in needed})


def faults(error: ValidationError) -> str:
    """What is wrong, a line for each field."""
    lines = ((".".join(map(str, each["loc"])), each["msg"]) for each in error.errors())
    return "\n".join(f"{place}: {what}" if place else what for place, what in lines)


async def extract(caller: Caller, text: str, schema: str) -> Any:
    """The document that the text is of that schema; no run of it is kept."""
    found = await Schemas(engine).resolve(caller, schema)
    spec = ExtractionSpec(
        name=found.name, version=found.version, body=found.body, sha256=found.sha256
    )
    models = make_models(settings)
    try:
        document = await Extractor(models, settings.run_cost).extract(spec, Document(text))
    except ExtractionFailed as failure:
        raise ToolFailed(failure.message) from failure
    finally:
        await models.close()
    return json.loads(dump_exact(document.data))


async def call(item: Tool[Deps], args: dict[str, Any]) -> Any:
    """The tool's result, asked for by the local administrator."""
    try:
        await migrate(engine)
        async with users() as service:
            admin = await service.ensure_local_admin()
        async with make_http(settings) as http:
            caller = Caller.of(admin, (EVERYTHING, ADMIN))
            deps = Deps(
                caller=caller,
                users=users,
                http=http,
                settings=settings,
                run_id="by hand",
                extract=partial(extract, caller),
            )
            context = RunContext(deps=deps, model=TestModel(), usage=RunUsage())
            call_key.set(secrets.token_hex(20))
            valid = item.function_schema.validator.validate_python(args)
            return await item.function_schema.call(valid, context)
    finally:
        await engine.dispose()  # an open connection's thread would keep the process alive


def main() -> int:
    if not 2 <= len(sys.argv) <= 3:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        item = find(sys.argv[1])
        args = arguments(item, sys.argv[2] if len(sys.argv) == 3 else "{}")
        result = asyncio.run(call(item, args))
    except ValidationError as error:
        print(faults(error), file=sys.stderr)
        return 1
    except (LookupError, ModelRetry, ToolFailed, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        print(f"The service failed: {error}", file=sys.stderr)
        return 1
    print(to_json(result, indent=2).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Arrows are imports, and never turn back."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.server import ROOT, clean_environ

# From the top; each may import what stands below it, and its own.
LAYERS = [
    ("app.main", "app.serve", "app.manage", "app.runs", "app.try_tool", "app.extract"),
    ("app.api",),
    ("app.services",),
    ("agents",),
    ("tools",),
    ("app.deps",),
    ("app.services.user",),
    ("app.db", "app.models", "app.schemas"),
    ("app.core",),
    ("app.config",),
]

KNOW_HTTP = ("app.main", "app.api", "app.core.errors")
KNOW_TABLES = ("app.services", "app.db", "app.models")
KNOW_MODELS = ("app.services",)

LAZY = {
    *("instructor", "jsonschema_rs", "mcp", "ag_ui", "pwdlib", "argon2", "jwt", "pypdf", "pyarrow"),
    *("babel", "cronsim", "genai_prices.data", "pydantic_evals", "tenacity"),
    *("prometheus_client", "opentelemetry.sdk"),
}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for house in ("app", "agents", "tools"):
        for path in sorted((ROOT / house).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            yield name, ast.parse(path.read_text())


def imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Each imported module, and the name that was taken from it, wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


def is_in(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def layer(name: str) -> int | None:
    """That of the longest name in LAYERS which the module is in; None for others' modules."""
    found = [
        (len(package), place)
        for place, packages in enumerate(LAYERS)
        for package in packages
        if is_in(name, (package,))
    ]
    return max(found)[1] if found else None


def test_every_module_has_its_layer():
    assert [name for name, _ in modules() if name != "app" and layer(name) is None] == []


def test_imports_never_turn_back():
    back: list[str] = []
    for name, tree in modules():
        here = layer(name)
        for module, taken in imports(tree):
            there = layer(f"{module}.{taken}")
            if here is not None and there is not None and there < here:
                back.append(f"{name} -> {module}.{taken}")

    assert back == []


def test_only_routes_and_the_error_handler_speak_http():
    outside = [
        name
        for name, tree in modules()
        for module, _ in imports(tree)
        if module.split(".")[0] in ("fastapi", "starlette") and not is_in(name, KNOW_HTTP)
    ]

    assert outside == []


def test_only_services_know_tables():
    outside = {
        name
        for name, tree in modules()
        for module, taken in imports(tree)
        if module == "sqlalchemy" and taken in ("select", "insert", "update", "delete", "text")
        if not is_in(name, KNOW_TABLES)
    }

    # Who is calling is looked up before there is a service to ask.
    assert outside <= {"app.api.deps"}


def test_only_services_call_models():
    outside = {
        name
        for name, tree in modules()
        for module, _ in imports(tree)
        if module.split(".")[0] in ("openai", "instructor") and not is_in(name, KNOW_MODELS)
    }

    assert outside == set()


def test_only_settings_read_the_environment():
    outside = {
        name
        for name, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    }

    # Atlas and PostgreSQL's are programs, and are found and started as such.
    assert outside == {"app.db.atlas", "app.db.backup"}


def test_what_routes_depend_on_are_coroutines():
    """FastAPI runs plain functions in threads."""
    plain: set[str] = set()
    for name, tree in modules():
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        plain |= {
            f"{name}.{argument.id}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Depends"
            for argument in node.args
            if isinstance(argument, ast.Name) and argument.id in functions
        }

    assert plain == set()


def test_the_package_of_services_is_empty():
    assert (ROOT / "app/services/__init__.py").read_text() == ""


def test_what_most_requests_do_not_need_is_loaded_when_it_is_needed(tmp_path: Path):
    code = "import sys, app.main; print(*sys.modules)"

    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=clean_environ() | {"DATABASE_URL": f"sqlite:///{tmp_path}/app.db"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    assert LAZY & set(done.stdout.split()) == set()

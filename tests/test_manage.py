"""Accounts and keys from the command line."""

import subprocess
import sys
from pathlib import Path

from tests.server import ROOT, clean_environ


def manage(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    database = {"DATABASE_URL": f"sqlite:///{place / 'a.db'}", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "app.manage", *arguments],
        cwd=place,
        env=clean_environ() | database,
        input="correct horse battery",
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_scope_that_nothing_needs_is_told_beside_the_key(tmp_path: Path) -> None:
    made = manage(tmp_path, "create-user", "ada@example.com", "--password-stdin")
    assert made.returncode == 0, made.stderr

    usual = manage(tmp_path, "create-key", "ada@example.com")
    odd = manage(tmp_path, "create-key", "ada@example.com", "--scopes", "*", "order:write")
    beyond = manage(tmp_path, "create-key", "ada@example.com", "--scopes", "admin")

    assert usual.stdout.startswith("ab_") and not usual.stderr
    assert odd.stdout.startswith("ab_")
    assert odd.stderr == "No tool needs the scope 'order:write' so far.\n"
    assert (beyond.returncode, beyond.stdout) == (1, "")
    assert "You cannot give what you may not do: admin." in beyond.stderr

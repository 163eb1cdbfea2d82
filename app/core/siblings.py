"""What the other processes under this port have counted.

Where a server has several processes, a question reaches any one of them. So each leaves its
numbers in a file every second, and whoever is asked adds them up. Those of a process that ended
stay, because a sum that falls is taken for a new beginning.
"""

import asyncio
import hashlib
import json
import logging
import multiprocessing
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from app.config import DATA
from app.core import metrics

logger = logging.getLogger(__name__)

FOLDER = re.compile(r"(\d+)(-[0-9a-f]+)?")
EVERY = 1.0  # seconds between two looks at what was counted


def folder() -> Path | None:
    """Where this process and its siblings leave their numbers; None for an only child.

    The parent's number comes again, in each container even; the key that it drew does not.
    """
    parent = multiprocessing.parent_process()
    if parent is None or os.name != "posix":
        return None
    drawn = hashlib.sha256(multiprocessing.current_process().authkey).hexdigest()[:16]
    return DATA / "metrics" / f"{parent.pid}-{drawn}"


async def share() -> None:
    """Leaves this process's numbers for the others, for as long as it lives."""
    here = folder()
    if here is None:
        return
    try:
        here.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logger.warning("/metrics tells of one process alone: %s", type(error).__name__)
        return
    for earlier in here.parent.iterdir():
        found = FOLDER.fullmatch(earlier.name)
        if not found or earlier == here:
            continue
        if here.name.startswith(f"{found[1]}-") or not _is_alive(found[1]):
            shutil.rmtree(earlier, ignore_errors=True)
    while True:
        draft = here / f"{os.getpid()}.new"
        with suppress(OSError):  # a full disk: the next second may be better
            draft.write_text(json.dumps(metrics.snapshot()))
            draft.rename(here / f"{os.getpid()}.json")  # whole or not at all
        await asyncio.sleep(EVERY)


def counted() -> Iterator[dict[str, Any]]:
    """What each of the others has counted, at most a second ago."""
    here = folder()
    levels = {each.name for each in metrics.ALL if each.level}
    for file in here.glob("*.json") if here else ():
        if file.stem == str(os.getpid()) or not file.stem.isdecimal():
            continue
        numbers = json.loads(file.read_text())
        yield (
            numbers
            if _is_alive(file.stem)
            else {name: rows for name, rows in numbers.items() if name not in levels}
        )


def _is_alive(pid: str) -> bool:
    with suppress(PermissionError):
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return False
    return True

"""Which process this is, among all that share a database, and whether another is gone."""

import contextlib
import hashlib
import os
import secrets
import socket
from pathlib import Path

BOOT = secrets.token_hex(4)


def process_name() -> str:
    """Who holds a lease: no two processes share it, also one after the other."""
    return f"{MACHINE}:{os.getpid()}:{BOOT}"


def is_gone(worker: str) -> bool:
    """Whether this was a process of this machine that runs no more."""
    machine, pid, boot = worker.rsplit(":", 2)
    if machine != MACHINE or boot == BOOT:
        return False
    if int(pid) == os.getpid():
        return True
    if os.name != "posix":
        return False  # there is no harmless way to ask
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # it runs, as somebody else
    return False


def _machine() -> str:
    """The same for all processes here that see each other, and for no others: neither a machine's
    name nor the numbers of processes are unique where machines are copied, or containers share
    one."""
    name = socket.gethostname()
    with contextlib.suppress(OSError):  # not on Linux
        name += Path("/proc/sys/kernel/random/boot_id").read_text()
        name += os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()[:40]}.{hashlib.sha256(name.encode()).hexdigest()[:12]}"


MACHINE = _machine()

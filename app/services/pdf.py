"""Reads a PDF's text: a program of its own, as PDFs are hostile and their parser is slow.

`python -I pdf.py LIMIT` takes the file on stdin and writes its text to stdout, in UTF-8 that may
hold halves of surrogate pairs; a form feed stands between pages. Exit codes below say what else
happened. It knows nothing of the rest of the app, and may not use more than its limits.
"""

import contextlib
import io
import sys

BROKEN, ENCRYPTED, TOO_LONG = 3, 4, 5

MEMORY = 1024**3  # bytes of address space
CPU = 30  # seconds


def limit() -> None:
    """Where the system knows no such limit, the parent's clock is the only one."""
    try:
        import resource
    except ImportError:
        return
    for what, most in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CPU, CPU),
        (resource.RLIMIT_FSIZE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(what, (most, most))


def read(data: bytes, most: int) -> bytes:
    """The text, at most so many bytes. Exits with a code where there is none to be had."""
    from pypdf import PdfReader
    from pypdf.errors import DependencyError, FileNotDecryptedError

    pages: list[bytes] = []
    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            sys.exit(ENCRYPTED)
        for page in reader.pages:
            pages.append(page.extract_text().encode("utf-8", "surrogatepass"))
            most -= len(pages[-1]) + 1
            if most < 0:
                sys.exit(TOO_LONG)
    except (DependencyError, FileNotDecryptedError):  # a cipher that pypdf does not know by itself
        sys.exit(ENCRYPTED)
    except Exception:  # whatever a parser dies of, half a text would look like the whole
        sys.exit(BROKEN)
    return b"\f".join(pages)


if __name__ == "__main__":
    limit()
    sys.stdout.buffer.write(read(sys.stdin.buffer.read(), int(sys.argv[1])))

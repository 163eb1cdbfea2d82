"""The app with the errands of this suite: `uvicorn tests.faults.app:app`."""

from pathlib import Path

from tests.plugins import plugged_in

plugged = plugged_in(Path(__file__).parent)
plugged.__enter__()  # to the end of the process

from app.main import app  # noqa: E402

__all__ = ["app"]

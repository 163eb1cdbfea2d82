"""The server with the tests' own agents and tools: `python -m tests.plugins --port 8000`."""

import sys

import uvicorn

from tests.plugins import plugged_in

with plugged_in():
    uvicorn.main(["app.main:app", *sys.argv[1:]])

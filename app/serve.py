"""`python -m app.serve`: the server with the settings' host and port, and where to go."""

import argparse

import uvicorn

from app.config import settings
from app.core import logs
from app.core.http import Protocol

START = 60  # seconds in which one of several processes answers its parent, on a busy machine too

HELLO = """
  Server   {url}
  Docs     {url}/docs
  Model    {model}

  Ask the assistant (another terminal):

  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d \\
    '{{"model": "assistant", "messages": [{{"role": "user", "content": "Weather in Tokyo?"}}]}}'
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m app.serve", description=__doc__)
    parser.add_argument("--reload", action="store_true", help="start anew when a file changes")
    parser.add_argument("--workers", type=int, default=settings.workers, help="processes")
    options = parser.parse_args()
    if options.workers < 1:
        parser.error("--workers: at least 1")
    workers = 1 if options.reload else options.workers
    if workers > 1 and settings.in_memory:
        parser.error("a database in memory cannot be shared; set DATABASE_URL, or --workers 1")
    host = "127.0.0.1" if settings.host == "0.0.0.0" else settings.host
    demo = "the built-in demo model; set MODEL and OPENAI_API_KEY for a real one"
    model = demo if settings.demo else settings.model or "OpenAI's default"
    logs.begin(settings)
    print(HELLO.format(url=f"http://{host}:{settings.port}", model=model), flush=True)
    uvicorn.run(
        "app.main:app",
        http=Protocol,
        host=settings.host,
        port=settings.port,
        workers=workers,
        timeout_worker_healthcheck=START,
        reload=options.reload,
        reload_dirs=["app", "agents", "tools", "prompts"] if options.reload else None,
        reload_includes=["*.py", "*.md"] if options.reload else None,
        # Runs were handed over before; what is left are clients that do not read.
        timeout_graceful_shutdown=max(1, int(settings.shutdown_timeout.total_seconds() / 8)),
        log_config=None,  # ours, from the first line on
    )


if __name__ == "__main__":
    main()

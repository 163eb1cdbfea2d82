"""`python -m app.serve`: the server with the settings' host and port, and where to go."""

import sys

import uvicorn

from app.config import settings

HELLO = """
  Server   {url}
  Docs     {url}/docs
  Model    {model}

  Ask the assistant (another terminal):

  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d \\
    '{{"model": "assistant", "messages": [{{"role": "user", "content": "Weather in Tokyo?"}}]}}'
"""


def main() -> None:
    host = "127.0.0.1" if settings.host == "0.0.0.0" else settings.host
    demo = "the built-in demo model; set MODEL and OPENAI_API_KEY for a real one"
    model = demo if settings.demo else settings.model or "OpenAI's default"
    is_reloading = "--reload" in sys.argv
    print(HELLO.format(url=f"http://{host}:{settings.port}", model=model), flush=True)
    uvicorn.run(
        "app.main:app",
        host=settings.host,
        port=settings.port,
        reload=is_reloading,
        reload_dirs=["app", "agents", "tools", "prompts"] if is_reloading else None,
        reload_includes=["*.py", "*.md"] if is_reloading else None,
        timeout_graceful_shutdown=int(settings.shutdown_timeout.total_seconds()),
    )


if __name__ == "__main__":
    main()

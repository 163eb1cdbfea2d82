# /// script
# requires-python = ">=3.11"
# dependencies = ["llm==0.36"]
# ///
"""The `llm` command, unmodified, at the server at BASE_URL: as its manual says, by a YAML file."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
)
HOME = Path(os.environ["LLM_USER_PATH"])
MODEL = f"""
- model_id: agents
  model_name: assistant
  api_base: {os.environ["BASE_URL"]}
  api_key_name: agents
  supports_tools: true
  supports_schema: true
  vision: true
"""
DOOR = """
def open_door(number: int) -> str:
    "Opens a door."
    return f"door {number} is open"
"""


def llm(*arguments: str) -> None:
    """Says what the command prints, or the last line of its complaint."""
    done = subprocess.run(
        [sys.executable, "-m", "llm", *arguments],
        stdin=subprocess.DEVNULL,  # which it adds to the prompt
        capture_output=True,
        text=True,
        timeout=60,
    )
    text = done.stdout if done.returncode == 0 else done.stderr
    print(json.dumps([done.returncode, text.strip().splitlines()[-1]]), flush=True)


(HOME / "extra-openai-models.yaml").write_text(MODEL)
(HOME / "keys.json").write_text(json.dumps({"agents": os.environ["API_KEY"]}))
(HOME / "pixel.png").write_bytes(PIXEL)

llm("-m", "agents", "Hello")
llm("-c", "What is the weather?")
llm("-m", "agents", "--no-stream", "Hello")
llm("-m", "agents", "--functions", DOOR, "open both doors")
llm("-m", "agents", "--schema", "name, country", "Name a capital.")
llm("-m", "agents", "-a", str(HOME / "pixel.png"), "What is in the picture?")
llm("-m", "agents", "--key", "sk-wrong", "Hello")
llm("-m", "agents", "cut")

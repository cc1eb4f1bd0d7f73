"""The program ``llm``, as it is used from a shell: python llm_program.py URL FEATURE."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

URL, FEATURE = sys.argv[1:]
MODELS = f"""
- model_id: concierge
  model_name: concierge
  api_base: {URL}
  api_key_name: cluster
  supports_tools: true
  supports_schema: true
"""
FUNCTION = '''
def temperature(city: str) -> str:
    """Return the temperature in a city."""
    return f"21 degrees in {city}"
'''


def run(*arguments: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "extra-openai-models.yaml").write_text(MODELS)
        environment = os.environ | {"LLM_USER_PATH": folder}
        command = [sys.executable, "-m", "llm", "-m", "concierge", "--key", "a-key", *arguments]
        completed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert completed.returncode == 0, completed.stderr
        return completed.stdout.strip()


def chat() -> Any:
    return run("--no-stream", "Hello?")


def stream() -> Any:
    # A shell sees no pieces; the server has seen that a stream was asked for.
    return [run("Hello?")]


def tools() -> Any:
    return run("--functions", FUNCTION, "What is it like in Kyoto?")


def structured() -> Any:
    return json.loads(run("--schema", "city, degrees int", "What is it like in Kyoto?"))


print(json.dumps(globals()[FEATURE]()))

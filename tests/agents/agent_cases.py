"""The agents: how each is configured and started, and with which of its tools a file is edited."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Final

from scripted_coder import ToolUse

__all__ = ["AGENTS", "AGENTS_FOLDER", "Agent"]

#: The environment variable that names the folder in which ``nox -s agents`` has installed them.
AGENTS_FOLDER: Final = "AGENTS_FOLDER"

#: What is edited, by what, and how.
FILE: Final = "greeting.py"
BEFORE: Final = 'def greeting():\n    return "hello"\n'
OLD: Final = 'return "hello"'
NEW: Final = 'return "hello, world"'
CHECK: Final = (
    'from greeting import greeting\n\nassert greeting() == "hello, world", "not yet"\nprint("all is well")\n'
)

#: How a program is run whose output must not be lost.
RUN_AND_WAIT: Final = f"{sys.executable} {Path(__file__).with_name('run_and_wait.py')}"

#: The MCP server's name, and its command.
NUMBERS: Final = [sys.executable, str(Path(__file__).with_name("mcp_numbers.py"))]


PAGE: Final = Path(__file__).parent.parent.parent / "docs" / "clients.md"


def to_paste(title: str, language: str, url: str, model: str) -> str:
    """Return what the page says to paste for an agent, with another server and another model.

    Args:
        title: the agent's heading.
        language: that of the piece of code; the first is taken.
        url: the server's, without ``/v1``.
        model: the model's name.
    """
    section = PAGE.read_text("utf-8").partition(f"\n### {title}\n")[2].partition("\n### ")[0]
    found = re.search(rf"^```{language}\n(.*?)^```", section, re.M | re.S)
    assert found is not None, f"nothing to paste for {title}"
    assert "http://master.lan:8080" in section
    return re.sub(r"\bqwen\b", model, found[1].replace("http://master.lan:8080", url))


def exported(text: str) -> dict[str, str]:
    """Return the variables that lines of a shell export."""
    return dict(line.removeprefix("export ").split("=", 1) for line in text.splitlines())


class Agent(ABC):
    """An agent as it comes from its registry."""

    #: What it is called in the tests, and in the table.
    name: ClassVar[str]
    title: ClassVar[str]
    #: Its program, and where on the server it asks.
    binary: ClassVar[str]
    route: ClassVar[str]
    #: Whether it can use MCP servers, and whether its model uses tools.
    mcp: ClassVar[bool] = True
    uses_tools: ClassVar[bool] = True
    #: How long one of its runs may take, in seconds.
    patience: ClassVar[float] = 240

    def executable(self) -> str | None:
        """Return the path of its program, or ``None`` if it is not installed."""
        folder = os.environ.get(AGENTS_FOLDER)
        if folder is None:
            return None
        for place in (Path(folder) / "node_modules" / ".bin", Path(folder) / "aider" / "bin"):
            if (place / self.binary).is_file():
                return str(place / self.binary)
        return shutil.which(self.binary)

    @abstractmethod
    def configure(self, home: Path, url: str, model: str, *, mcp: bool) -> dict[str, str]:
        """Write the configuration, and return what is in the environment.

        Args:
            home: the folder that is its home.
            url: the server's, without ``/v1``.
            model: the model's name.
            mcp: whether the MCP server is to be used.
        """

    @abstractmethod
    def command(self, prompt: str, home: Path) -> list[str]:
        """Return the arguments of a run that asks the user nothing."""

    @abstractmethod
    def turns(self, folder: Path) -> list[list[ToolUse]] | list[str]:
        """Return what the model does: look at both files at once, edit the one, and run the other."""

    def mcp_turns(self) -> list[list[ToolUse]]:
        """Return what the model does to use the MCP server's tool."""
        return [[("mcp__numbers__lucky_number", {"person": "Ada"})]]


class Codex(Agent):
    name = "codex"
    title = "Codex CLI"
    binary = "codex"
    route = "/v1/responses"

    def configure(self, home: Path, url: str, model: str, *, mcp: bool) -> dict[str, str]:
        (home / ".codex").mkdir()
        text = to_paste(self.title, "toml", url, model) + "\n[analytics]\nenabled = false\n"
        if mcp:
            text += f"""
[mcp_servers.numbers]
command = {json.dumps(NUMBERS[0])}
args = {json.dumps(NUMBERS[1:])}
"""
        (home / ".codex" / "config.toml").write_text(text)
        return {"CODEX_HOME": str(home / ".codex"), "CLUSTER_KEY": "sk-for-clients"}

    def command(self, prompt: str, home: Path) -> list[str]:
        return ["exec", "--dangerously-bypass-approvals-and-sandbox", prompt]

    def turns(self, folder: Path) -> list[list[ToolUse]] | list[str]:
        patch = f"*** Begin Patch\n*** Update File: {FILE}\n@@\n-    {OLD}\n+    {NEW}\n*** End Patch"
        return [
            [("exec_command", {"cmd": f"cat {FILE}"}), ("exec_command", {"cmd": "cat check.py"})],
            [("exec_command", {"cmd": f"apply_patch <<'EOF'\n{patch}\nEOF\n"})],
            [("exec_command", {"cmd": f"{sys.executable} check.py"})],
        ]


class ClaudeCode(Agent):
    name = "claude"
    title = "Claude Code"
    binary = "claude"
    route = "/v1/messages"

    def configure(self, home: Path, url: str, model: str, *, mcp: bool) -> dict[str, str]:
        servers = {"numbers": {"command": NUMBERS[0], "args": NUMBERS[1:]}} if mcp else {}
        (home / "mcp.json").write_text(json.dumps({"mcpServers": servers}))
        return exported(to_paste(self.title, "text", url, model))

    def command(self, prompt: str, home: Path) -> list[str]:
        return [
            "-p",
            prompt,
            "--output-format",
            "json",
            "--permission-mode",
            "acceptEdits",
            "--allowedTools",
            "Read,Edit,Bash,mcp__numbers__lucky_number",
            "--mcp-config",
            str(home / "mcp.json"),
            "--strict-mcp-config",
        ]

    def turns(self, folder: Path) -> list[list[ToolUse]] | list[str]:
        file, check = str(folder / FILE), str(folder / "check.py")
        return [
            [("Read", {"file_path": file}), ("Read", {"file_path": check})],
            [("Edit", {"file_path": file, "old_string": OLD, "new_string": NEW})],
            [("Bash", {"command": f"{sys.executable} check.py"})],
        ]


class OpenCode(Agent):
    name = "opencode"
    title = "opencode"
    binary = "opencode"
    route = "/v1/chat/completions"

    def configure(self, home: Path, url: str, model: str, *, mcp: bool) -> dict[str, str]:
        config: dict[str, Any] = json.loads(to_paste(self.title, "json", url, model))
        if mcp:
            config["mcp"] = {"numbers": {"type": "local", "command": NUMBERS, "enabled": True}}
        (home / ".config" / "opencode").mkdir(parents=True)
        (home / ".config" / "opencode" / "opencode.json").write_text(json.dumps(config))
        return {
            "OPENCODE_DISABLE_MODELS_FETCH": "1",
            "OPENCODE_DISABLE_AUTOUPDATE": "1",
            "OPENCODE_DISABLE_LSP_DOWNLOAD": "1",
            "OPENCODE_DISABLE_DEFAULT_PLUGINS": "1",
        }

    def command(self, prompt: str, home: Path) -> list[str]:
        return ["run", prompt]

    def turns(self, folder: Path) -> list[list[ToolUse]] | list[str]:
        file, check = str(folder / FILE), str(folder / "check.py")
        return [
            [("read", {"filePath": file}), ("read", {"filePath": check})],
            [("edit", {"filePath": file, "oldString": OLD, "newString": NEW})],
            [("bash", {"command": f"{sys.executable} check.py", "description": "Check it"})],
        ]

    def mcp_turns(self) -> list[list[ToolUse]]:
        return [[("numbers_lucky_number", {"person": "Ada"})]]


class QwenCode(Agent):
    name = "qwen"
    title = "Qwen Code"
    binary = "qwen"
    route = "/v1/chat/completions"

    def configure(self, home: Path, url: str, model: str, *, mcp: bool) -> dict[str, str]:
        settings: dict[str, Any] = json.loads(to_paste(self.title, "json", url, model))
        if mcp:
            settings["mcpServers"] = {"numbers": {"command": NUMBERS[0], "args": NUMBERS[1:]}}
        (home / ".qwen").mkdir()
        (home / ".qwen" / "settings.json").write_text(json.dumps(settings))
        return exported(to_paste(self.title, "text", url, model))

    def command(self, prompt: str, home: Path) -> list[str]:
        return ["--approval-mode", "yolo", "-p", prompt]

    def turns(self, folder: Path) -> list[list[ToolUse]] | list[str]:
        file, check = str(folder / FILE), str(folder / "check.py")
        return [
            [("read_file", {"file_path": file}), ("read_file", {"file_path": check})],
            [("edit", {"file_path": file, "old_string": OLD, "new_string": NEW})],
            [("run_shell_command", {"command": f"{RUN_AND_WAIT} check.py", "is_background": False})],
        ]

    def mcp_turns(self) -> list[list[ToolUse]]:
        # Its tools are not declared; the model looks for them, and calls them by way of another.
        name = "mcp__numbers__lucky_number"
        return [
            [("tool_search", {"query": f"select:{name}"})],
            [("tool_call", {"name": name, "arguments": {"person": "Ada"}})],
        ]


class Aider(Agent):
    name = "aider"
    title = "aider"
    binary = "aider"
    route = "/v1/chat/completions"
    mcp = False
    uses_tools = False

    def configure(self, home: Path, url: str, model: str, *, mcp: bool) -> dict[str, str]:
        (home / ".aider.conf.yml").write_text(to_paste(self.title, "yaml", url, model))
        return {}

    def command(self, prompt: str, home: Path) -> list[str]:
        check = f"{sys.executable} check.py"
        return ["--yes-always", "--auto-test", "--test-cmd", check, "--message", prompt, FILE]

    def turns(self, folder: Path) -> list[list[ToolUse]] | list[str]:
        def block(old: str, new: str) -> str:
            return f"{FILE}\n```python\n<<<<<<< SEARCH\n    {old}\n=======\n    {new}\n>>>>>>> REPLACE\n```\n"

        # The first edit is wrong. The test fails, and aider says so to the model.
        wrong = NEW.replace("world", "word")
        return ["Here you are.\n\n" + block(OLD, wrong), "Once more.\n\n" + block(wrong, NEW)]


AGENTS: Final = (Codex(), ClaudeCode(), OpenCode(), QwenCode(), Aider())

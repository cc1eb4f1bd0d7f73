"""The examples, run as what they are: programs of their own, asked over HTTP, stopped with a signal."""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fork_server
import pytest

pytestmark = pytest.mark.processes

EXAMPLES = Path(__file__).parent.parent / "examples"

#: Seconds that anything may take; what is to be seen of it takes a fraction of one.
TIMEOUT = 20.0


class Program:
    """An example that runs. What it prints is read line by line, with a deadline."""

    def __init__(self, errors: Path, name: str, *arguments: object) -> None:
        self.name = name
        self._errors = errors
        self._rest = b""
        # Unset: a proxy, or options of trio_cluster, that the shell may have.
        environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith("TRIO_CLUSTER_") and not key.lower().endswith("_proxy")
        }
        self._output, written = os.pipe()
        try:
            with errors.open("wb") as file:
                self._process = fork_server.start_blocking(
                    [str(EXAMPLES / name), *map(str, arguments)],
                    cwd=errors.parent,
                    env=environment,
                    stdout=written,
                    stderr=file.fileno(),
                )
        finally:
            os.close(written)

    def next_line(self) -> str:
        """Return the next line that the program prints."""
        deadline = time.monotonic() + TIMEOUT
        with selectors.DefaultSelector() as selector:
            selector.register(self._output, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    pytest.fail(f"{self.name} printed nothing; on standard error: {self.complaints}")
                piece = os.read(self._output, 65536)
                if not piece:
                    pytest.fail(f"{self.name} ended; on standard error: {self.complaints}")
                self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    @property
    def complaints(self) -> str:
        """What the program has written to standard error so far."""
        return self._errors.read_text(encoding="utf-8")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send a signal; the program must end well, and in time."""
        self._process.send_signal(number)
        code = self._process.wait(timeout=TIMEOUT)
        assert code == 0, self.complaints
        assert "Traceback" not in self.complaints

    def close(self) -> None:
        """Make sure that nothing is left of it."""
        self._process.kill()
        self._process.wait()
        os.close(self._output)


Starter = Callable[..., Program]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starter]:
    """Start an example: ``start("master.py", 0)``."""
    programs: list[Program] = []

    def start(name: str, *arguments: object) -> Program:
        programs.append(Program(tmp_path / f"{len(programs)}.err", name, *arguments))
        return programs[-1]

    yield start
    for program in programs:
        program.close()


def url_in(line: str) -> str:
    """Return the URL that a program prints that it serves."""
    found = re.search(r"http://\S+/v1", line)
    assert found, line
    return found[0]


_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(url: str) -> Any:
    with _opener.open(url, timeout=TIMEOUT) as response:
        return json.load(response)


def chat(base_url: str, model: str, text: str) -> str:
    """Ask a chat model, and return what it says."""
    body = {"model": model, "messages": [{"role": "user", "content": text}]}
    request = urllib.request.Request(
        f"{base_url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with _opener.open(request, timeout=TIMEOUT) as response:
        answer = json.load(response)
    content = answer["choices"][0]["message"]["content"]
    assert isinstance(content, str)
    return content


def wait_for_model(base_url: str, model: str) -> None:
    """Ask for the list of models until there is one of this name."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        if model in [entry["id"] for entry in get(f"{base_url}/models")["data"]]:
            return
        time.sleep(0.02)
    pytest.fail(f"the model {model} did not appear")


def test_there_is_a_test_for_every_example() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in text] == []


def test_a_worker_brings_its_model_to_a_master_and_takes_it_away_again(start: Starter) -> None:
    master = start("master.py", 0)
    line = master.next_line()
    url = url_in(line)
    internal_port = int(line.rpartition(" ")[2])
    worker = start("worker.py", "127.0.0.1", internal_port)
    wait_for_model(url, "worker-upper")
    assert chat(url, "worker-upper", "hello there") == "HELLO THERE "
    assert chat(url, "master-echo", "hello there") == "hello there "
    worker.stop()
    assert [entry["id"] for entry in get(f"{url}/models")["data"]] == ["master-echo"]
    master.stop()


def test_a_worker_may_be_stopped_while_it_has_no_master(start: Starter, unused_port: int) -> None:
    worker = start("worker.py", "127.0.0.1", unused_port)
    deadline = time.monotonic() + TIMEOUT
    while "no link to the master" not in worker.complaints:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    worker.stop(signal.SIGINT)


def test_auto_mode_makes_the_second_process_a_worker_of_the_first(start: Starter) -> None:
    first = start("auto_mode.py", 0, "one")
    line = first.next_line()
    assert line.startswith("one runs as master")
    url = url_in(line)
    second = start("auto_mode.py", url.removesuffix("/v1").rpartition(":")[2], "two")
    assert second.next_line() == "two runs as worker"
    assert chat(url, "one", "hi") == "one heard: hi"
    assert chat(url, "two", "hi") == "two heard: hi"
    second.stop()
    first.stop(signal.SIGINT)


def test_all_six_handler_shapes_answer(start: Starter) -> None:
    program = start("handler_shapes.py", 0)
    url = url_in(program.next_line())
    answers = {entry["id"]: chat(url, entry["id"], "a b c") for entry in get(f"{url}/models")["data"]}
    assert answers == {
        "async-push": "1 2 3 ",
        "async-return": "3 words",
        "async-yield": "1 2 3 ",
        "plain-push": "1 2 3 ",
        "plain-return": "3 words",
        "plain-yield": "1 2 3 ",
    }
    program.stop()


def test_the_client_gets_an_answer_from_a_model_of_every_kind(start: Starter) -> None:
    program = start("all_kinds.py", 0)
    client = start("client.py", url_in(program.next_line()))
    answers = dict(client.next_line().split(": ", 1) for _ in range(7))
    assert answers["reverser"] == "three two one "
    assert answers["stopwatch"] == "A sound of 0.30 seconds."
    assert answers["letters"].startswith("26 numbers each")
    assert answers["beeper"] == "9644 bytes of sound"
    assert re.fullmatch(r"\d+ characters of base64", answers["stripes"])
    assert answers["overlap"] == "text 1 is the best, with a score of 1.00"
    assert answers["shouting"] == "flagged"
    program.stop()


def test_the_server_shares_a_process_with_a_larger_program(start: Starter) -> None:
    program = start("embedding_in_trio.py", 0)
    url = url_in(program.next_line())
    assert re.fullmatch(r"(\d\d\.\d\d °C\n){3}", chat(url, "thermometer", "3"))
    program.stop()


def test_an_asyncio_program_has_a_server_in_it(start: Starter) -> None:
    program = start("inside_asyncio.py", 0)
    url = url_in(program.next_line())
    assert chat(url, "lines", "3") == "line 0\nline 1\nline 2\n"
    program.stop()


def test_the_tests_of_a_model_pass(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(tmp_path)]
    result = subprocess.run(
        [*command, "-p", "no:cacheprovider", str(EXAMPLES / "test_my_model.py")],
        capture_output=True,
        text=True,
        timeout=3 * TIMEOUT,
    )
    assert result.returncode == 0, result.stdout
    assert "4 passed" in result.stdout


@pytest.fixture
def unused_port() -> int:
    """A port on which no program listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port

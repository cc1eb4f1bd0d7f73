"""A master on sockets that were opened before it started, as systemd does it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from nodes import Nodes, free_pair
from served import chat

from trio_cluster.errors import OptionsError
from trio_cluster.net.activation import ActivatedNetwork, activated_sockets

#: Opens the sockets, and becomes the command: a new program if ``EXEC`` is set, which takes half a second of computing.
#: ``SOCKETS`` says for which ports.
PROGRAM = """\
import os
import runpy
import socket
import sys

for number, port in enumerate(os.environ["SOCKETS"].split(), 3):
    sock = socket.create_server(("127.0.0.1", int(port)))
    os.dup2(sock.fileno(), number + 20)
    sock.close()
for number in range(3, 3 + len(os.environ["SOCKETS"].split())):
    os.dup2(number + 20, number)
    os.close(number + 20)
os.environ["LISTEN_PID"] = str(os.getpid())
os.environ["LISTEN_FDS"] = str(len(os.environ["SOCKETS"].split()))
if os.environ.get("EXEC"):
    os.execv(sys.executable, [sys.executable, "-W", "error", "-m", "trio_cluster", *sys.argv[1:]])
runpy.run_module("trio_cluster", run_name="__main__", alter_sys=True)
"""


@pytest.mark.processes
@pytest.mark.parametrize("which", ["both", "api"])
async def test_a_master_serves_on_the_sockets_that_it_was_given(
    nodes: Nodes, tmp_path: Path, which: str
) -> None:
    (tmp_path / "activated.py").write_text(PROGRAM)
    port = free_pair()
    variables = (
        {"SOCKETS": f"{port} {port + 1000}", "EXEC": "1"} if which == "both" else {"SOCKETS": str(port)}
    )
    master = await nodes.start("activated.py", "master", port, variables=variables)
    await nodes.worker(master, "w", models="m")
    async with httpx.AsyncClient(base_url=master.url, trust_env=False) as client:
        assert (await client.post("/v1/chat/completions", json=chat("m"))).status_code == 200


@pytest.mark.processes
async def test_sockets_for_other_ports_are_an_error(nodes: Nodes, tmp_path: Path) -> None:
    (tmp_path / "activated.py").write_text(PROGRAM)
    port = free_pair()
    node = await nodes.start(
        "activated.py", "master", port, ready=False, variables={"SOCKETS": str(free_pair())}
    )
    assert await node.exit_code() == 2
    assert f"the ports of this node are {port} and {port + 1000}" in node.noise[0]


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"LISTEN_FDS": "1"},
        {"LISTEN_FDS": "1", "LISTEN_PID": "1"},
        {"LISTEN_FDS": "x", "LISTEN_PID": str(os.getpid())},
        {"LISTEN_FDS": "0", "LISTEN_PID": str(os.getpid())},
    ],
)
def test_variables_for_another_process_do_not_count(environ: dict[str, str]) -> None:
    assert activated_sockets(environ, os.getpid()) == []


async def test_a_port_without_a_socket_is_opened_as_usual(listening: socket.socket) -> None:
    port = listening.getsockname()[1]
    network = ActivatedNetwork([listening], (port, 0))
    (given,) = await network.listen("0.0.0.0", port)
    assert given.local_address == ("127.0.0.1", port)
    (opened,) = await network.listen("127.0.0.1", 0)
    assert opened.local_address[1] != port
    given.close()
    opened.close()


def test_a_socket_for_another_port_is_refused(listening: socket.socket) -> None:
    with pytest.raises(OptionsError, match="the ports of this node are 1 and 2"):
        ActivatedNetwork([listening], (1, 2))

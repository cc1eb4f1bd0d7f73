"""The suite of the official clients: what each of them has to get from this server, over every route."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import AsyncIterator, Iterator
from importlib import metadata
from pathlib import Path

import pytest

# Their assertions are told about like those of the tests; this has to be said before they are imported.
pytest.register_assert_rewrite("client_case", "client_drivers")

from client_drivers import CLIENTS, NODE_FOLDER, Client, Driver, command_of  # noqa: E402
from client_table import ClientTable  # noqa: E402
from served import PLACEMENTS, Placement, Served, open_served  # noqa: E402

TABLE = ClientTable("clients", "running_driver", {"python": "openai (Python)", "node": "openai (Node)"})


def pytest_configure(config: pytest.Config) -> None:
    """Have the table of docs/clients.md written."""
    config.pluginmanager.register(TABLE)


def version_of(client: str) -> str:
    """Return the version of a client that is installed."""
    if client == "python":
        return metadata.version("openai")
    manifest = Path(os.environ[NODE_FOLDER]) / "node_modules" / "openai" / "package.json"
    version: str = json.loads(manifest.read_text("utf-8"))["version"]
    return version


@pytest.fixture(params=CLIENTS, scope="session")
def running_driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    """The process in which one of the clients lives, for all tests."""
    command = command_of(request.param)
    if isinstance(command, str):
        pytest.skip(command)
    TABLE.versions[request.param] = version_of(request.param)
    running = Driver(request.param, command)
    yield running
    running.close()


@pytest.fixture
async def driver(running_driver: Driver) -> AsyncIterator[Driver]:
    """One of the clients, for one test."""
    yield running_driver
    await running_driver.forget()


@pytest.fixture(params=PLACEMENTS)
def placement(request: pytest.FixtureRequest) -> Placement:
    """Where the models run."""
    value: Placement = request.param
    return value


@pytest.fixture
async def served(placement: Placement) -> AsyncIterator[Served]:
    """A server with default options, its models at home or behind it."""
    async with open_served(placement) as running:
        yield running


@pytest.fixture
def client(served: Served, driver: Driver) -> Client:
    """A client of that server, which does not try again unless it is told to."""
    return driver.client_of(served.url)


@pytest.fixture
def unused_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port

"""Fixtures and options that several folders of tests share, and the order in which tests are run."""

from __future__ import annotations

import gc
import inspect
import logging
import uuid
from collections.abc import AsyncIterator, Iterator

import pytest
from http_node import HttpNode, open_http_node
from hypothesis import settings
from private_postgres import PrivatePostgres, open_postgres

# How long an example takes says how busy the machine is.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-ways",
        action="store_true",
        help="play the whole law of lifetimes in every way that a token can go, and not just a sample; and outages of "
        "minutes",
    )
    parser.addoption(
        "--brief",
        action="store_true",
        help="play only a sample of the law of lifetimes; for a second Python, on which the rest is no other",
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests with real processes first.

    pytest-xdist (worksteal) gives each of its workers a run of neighbouring tests. So one worker gets all of these, and
    never runs two of them at a time; it waits for processes while the other workers compute.
    """
    items.sort(key=lambda item: item.get_closest_marker("processes") is None)


def pytest_collection_finish() -> None:
    """Keep the garbage collector from going through thousands of tests again and again: a tenth of the time."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Refuse a test that would wait in real seconds where virtual ones are meant.

    pytest-trio runs a test by a virtual clock if the test itself is given it. One that has it only through a fixture
    passes as well, in its own time.
    """
    if not isinstance(item, pytest.Function) or "autojump_clock" not in item.fixturenames:
        return
    if "autojump_clock" not in inspect.signature(item.obj).parameters:
        pytest.fail("its fixtures ask for autojump_clock, and the test itself does not", pytrace=False)


@pytest.fixture
def restored_logging() -> Iterator[None]:
    """Undo what a test does to the configuration of logging."""
    root, package = logging.getLogger(), logging.getLogger("trio_cluster")
    handlers, root_level, package_level = root.handlers[:], root.level, package.level
    yield
    root.handlers[:] = handlers
    root.setLevel(root_level)
    package.setLevel(package_level)


@pytest.fixture(autouse=True)
def _state_home(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep masters that tests start away from the state of those of other tests, and from that of the user."""
    home = tmp_path_factory.getbasetemp() / "state" / uuid.uuid4().hex
    monkeypatch.setenv("XDG_STATE_HOME", str(home))


@pytest.fixture(scope="session")
def postgres() -> Iterator[PrivatePostgres]:
    """A PostgreSQL server for all tests that want one; they are skipped where it is not installed."""
    with open_postgres() as server:
        yield server


@pytest.fixture
async def node() -> AsyncIterator[HttpNode]:
    """A node over real sockets: much of what the gateway is about happens between it and the server."""
    async with open_http_node() as opened:
        yield opened
    assert not opened.router.live, "a call has outlived its request"

"""Fixtures that more than one room's tests need."""

from __future__ import annotations

import gc
import inspect
import logging
from collections.abc import Iterator

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-ways",
        action="store_true",
        help="play the whole law of lifetimes in every way that a token can go, and not just a sample",
    )
    parser.addoption(
        "--brief",
        action="store_true",
        help="play only a sample of the law of lifetimes; for a second Python, on which the rest is no other",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put first what waits most, and refuse what would wait by mistake."""
    # Whoever shares the tests out (pytest-xdist, worksteal) gives each worker a run of neighbours. So one of them gets
    # all the real processes, which never have more than one such test beside them, and waits for them while the others
    # compute; and nothing that takes long is begun when there is nothing else left to do.
    items.sort(key=lambda item: item.get_closest_marker("processes") is None)
    for item in items:
        # pytest-trio runs a test by a virtual clock only if the test itself is given it. One that has it through a
        # fixture passes as well, in real seconds.
        if "autojump_clock" in getattr(item, "fixturenames", ()):
            assert isinstance(item, pytest.Function)
            if "autojump_clock" not in inspect.signature(item.obj).parameters:
                raise pytest.UsageError(
                    f"{item.nodeid}: its fixtures have virtual time, but not the test itself"
                )


def pytest_collection_finish() -> None:
    """Keep the garbage collector from going through thousands of tests again and again: a tenth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def restored_logging() -> Iterator[None]:
    """Undo what a test does to the configuration of logging."""
    root, package = logging.getLogger(), logging.getLogger("trio_cluster")
    handlers, root_level, package_level = root.handlers[:], root.level, package.level
    yield
    root.handlers[:] = handlers
    root.setLevel(root_level)
    package.setLevel(package_level)

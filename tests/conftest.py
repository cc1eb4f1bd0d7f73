"""Fixtures that more than one room's tests need."""

from __future__ import annotations

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


@pytest.fixture
def restored_logging() -> Iterator[None]:
    """Undo what a test does to the configuration of logging."""
    root, package = logging.getLogger(), logging.getLogger("trio_cluster")
    handlers, root_level, package_level = root.handlers[:], root.level, package.level
    yield
    root.handlers[:] = handlers
    root.setLevel(root_level)
    package.setLevel(package_level)

"""A process that can start no further thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from trio._core._thread_cache import THREAD_CACHE

__all__ = ["no_threads"]

#: Bytes of a stack that no machine has room for: the system refuses, as it does at a limit.
_TOO_LARGE: Final = 1 << 44


@contextmanager
def no_threads() -> Iterator[None]:
    """Have the system refuse every new thread inside the block, and let none be idle that trio would use again."""
    idle = THREAD_CACHE._idle_workers
    before = threading.stack_size(_TOO_LARGE)
    THREAD_CACHE._idle_workers = {}
    try:
        yield
    finally:
        THREAD_CACHE._idle_workers = idle
        threading.stack_size(before)

"""Shared by all tests of lifetimes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from werkzeug.routing import Rule


@pytest.fixture(autouse=True, scope="module")
def _no_urls_are_built() -> Iterator[None]:
    """Do not compile what builds URLs from routes: it takes half of the time of opening a cluster, and is not used."""

    def compile_builder(self: Rule, append_unknown: bool = True) -> Any:
        def build(*args: Any) -> Any:
            raise NotImplementedError

        return build

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rule, "_compile_builder", compile_builder)
        yield

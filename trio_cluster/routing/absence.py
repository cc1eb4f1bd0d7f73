"""Models that were served a short while ago, and are not now.

A model is away for a moment when its worker reconnects, when the master was restarted, or when the server behind it
does not answer. For clients that is no reason to give a name up: they repeat a request that got 503 and not one that
got 404. So a name stays known for :data:`REMEMBERED` seconds after its last replica has left, and requests for it get
503 and ``Retry-After``. Only names that are not known are 404.

Time is trio's. Outside of a trio run nothing is recorded: a model that is taken back before the server runs was never
served.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import trio

from ..core.model import ModelInfo

__all__ = ["REMEMBERED", "AbsentModels"]

#: Seconds for which a model that is not served any more stays known.
REMEMBERED: Final = 120.0
#: Names that are remembered at most; the oldest are dropped first. Peers choose the names.
_MAX_NAMES: Final = 10_000


class AbsentModels:
    """The models that were served within the last :data:`REMEMBERED` seconds, and are not served now."""

    def __init__(self) -> None:
        # By name, with the time at which the model left; the one that left first is first.
        self._models: dict[str, tuple[ModelInfo, float]] = {}

    def __bool__(self) -> bool:
        """Tell whether there may be any; a quick check that may be true for too long, and is never false too soon."""
        return bool(self._models)

    def add(self, info: ModelInfo, *, age: float = 0.0) -> None:
        """Remember a model that is not served any more.

        Args:
            info: the model.
            age: seconds since it left.
        """
        now = _now()
        if now is None:
            return
        self._models.pop(info.name, None)
        self._models[info.name] = (info, now - age)
        self._drop_old()

    def discard(self, name: str) -> None:
        """Forget a model: it is served again. Idempotent."""
        self._models.pop(name, None)

    def clear(self) -> None:
        """Forget all."""
        self._models.clear()

    def find(self, name: str) -> ModelInfo | None:
        """Return what is known of a model; ``None`` if it is not one of these."""
        if not self._models:
            return None
        self._drop_old()
        found = self._models.get(name)
        return None if found is None else found[0]

    def __iter__(self) -> Iterator[tuple[ModelInfo, float]]:
        """Yield each model, with the seconds since it left."""
        self._drop_old()
        now = _now()
        if now is not None:
            for info, left in list(self._models.values()):
                yield info, now - left

    def _drop_old(self) -> None:
        now = _now()
        while self._models:
            oldest, (_, left) = next(iter(self._models.items()))
            if now is not None and len(self._models) <= _MAX_NAMES and now - left < REMEMBERED:
                break
            del self._models[oldest]


def _now() -> float | None:
    try:
        return trio.current_time()
    except RuntimeError:
        return None

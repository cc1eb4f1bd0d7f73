"""Models that were served a short while ago, and are not now.

A model is away for a moment when its worker reconnects, when the master was restarted, or when the server behind it
does not answer. For clients that is no reason to give a name up: they repeat a request that got 503 and not one that
got 404. So a name stays known for :data:`REMEMBERED` seconds after its last replica has left, and requests for it get
503 and ``Retry-After``. Only names that are not known are 404.

Replicas of one model may answer different endpoints. So a part of a model can be away: the replicas that answer one
endpoint have left, and others stay. That is remembered in the same way, until the endpoint is answered again. Each part
has a time of its own. Otherwise a replica that leaves again and again would keep alive what another one answered.

Time is trio's. Outside of a trio run nothing is recorded: a model that is taken back before the server runs was never
served.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, TypeAlias

import trio

from ..core.model import ModelInfo

__all__ = ["REMEMBERED", "AbsentModels"]

#: Seconds for which a model that is not served any more stays known.
REMEMBERED: Final = 120.0
#: Models, and parts of models, that are remembered at most; the oldest are dropped first. Peers choose the names.
_MAX_NAMES: Final = 10_000

#: A model's name, its kind, and its extra endpoints.
_Key: TypeAlias = tuple[str, str, tuple[str, ...]]


class AbsentModels:
    """The models, and parts of models, that were served within the last :data:`REMEMBERED` seconds, and are not now."""

    def __init__(self) -> None:
        # With the time at which it left; the one that left first is first.
        self._entries: dict[_Key, tuple[ModelInfo, float]] = {}
        self._by_name: dict[str, dict[_Key, None]] = {}

    def __bool__(self) -> bool:
        """Tell whether there may be any; a quick check that may be true for too long, and is never false too soon."""
        return bool(self._entries)

    def add(self, info: ModelInfo, *, age: float = 0.0) -> None:
        """Remember a model that is not served any more, or what replicas answered that have left a model.

        Args:
            info: the model; its kind and its extra endpoints are what was answered.
            age: seconds since it left.
        """
        now = _now()
        if now is None:
            return
        key = (info.name, info.kind, info.extra_endpoints)
        self._drop(key)
        self._entries[key] = (info, now - age)
        self._by_name.setdefault(info.name, {})[key] = None
        self._drop_old()

    def discard_answered(self, name: str, answers: Callable[[ModelInfo], bool]) -> None:
        """Forget what is answered again of a model. Idempotent.

        Args:
            name: the model.
            answers: tells whether everything is answered now that a replica answered.
        """
        for key in list(self._by_name.get(name, ())):
            if answers(self._entries[key][0]):
                self._drop(key)

    def clear(self) -> None:
        """Forget all."""
        self._entries.clear()
        self._by_name.clear()

    def find(self, name: str) -> ModelInfo | None:
        """Return what is known of a model: of several parts the one that left last; ``None`` if nothing is."""
        if not self._entries:
            return None
        self._drop_old()
        keys = self._by_name.get(name)
        return None if keys is None else self._entries[next(reversed(keys))][0]

    def answered(self, name: str, kind: str, endpoint: str) -> bool:
        """Return whether a model answered an endpoint; see :meth:`ModelInfo.answers` for the arguments."""
        if not self._entries:
            return False
        self._drop_old()
        return any(self._entries[key][0].answers(kind, endpoint) for key in self._by_name.get(name, ()))

    def __iter__(self) -> Iterator[tuple[ModelInfo, float]]:
        """Yield each model, or part of a model, with the seconds since it left."""
        self._drop_old()
        now = _now()
        if now is not None:
            for info, left in list(self._entries.values()):
                yield info, now - left

    def _drop(self, key: _Key) -> None:
        if self._entries.pop(key, None) is not None:
            keys = self._by_name[key[0]]
            del keys[key]
            if not keys:
                del self._by_name[key[0]]

    def _drop_old(self) -> None:
        now = _now()
        while self._entries:
            oldest, (_, left) = next(iter(self._entries.items()))
            if now is not None and len(self._entries) <= _MAX_NAMES and now - left < REMEMBERED:
                break
            self._drop(oldest)


def _now() -> float | None:
    try:
        return trio.current_time()
    except RuntimeError:
        return None

"""The catalogue: which models there are, and which backends serve them.

A model may have several replicas: backends that serve the same name. What each of them says of the model may differ in
the routes that it answers besides those of its kind; the catalogue lists what any of them answers.
"""

from __future__ import annotations

import attrs

from ..core.model import Kind, ModelInfo
from ..core.request import Request
from ..errors import ModelNotFound, WrongKind
from .backend import Backend

__all__ = ["Catalog", "NameTaken"]


class NameTaken(ValueError):
    """A model of this name is already served, and may not be served a second time."""


class _Model:
    """A model and its replicas, the one used longest ago first, each with what it says the model is."""

    def __init__(self, info: ModelInfo) -> None:
        self.replicas: dict[Backend, ModelInfo] = {}
        self.info = info
        """What its first replica said, and all that any replica answers."""

    def put(self, info: ModelInfo, backend: Backend) -> None:
        self.replicas[backend] = info
        self._merge()

    def discard(self, backend: Backend) -> None:
        del self.replicas[backend]
        self._merge()

    def _merge(self) -> None:
        extra = dict.fromkeys(each for info in self.replicas.values() for each in info.extra_endpoints)
        if tuple(extra) != self.info.extra_endpoints:
            self.info = attrs.evolve(self.info, extra_endpoints=tuple(extra))


class Catalog:
    """The models of a node: its own and, on a master, those of its workers.

    Attributes:
        passthrough: the names of the models of kind ``"any"``, which are to get requests as clients send them.
    """

    def __init__(self) -> None:
        self._models: dict[str, _Model] = {}
        self.passthrough: set[str] = set()

    def add(self, info: ModelInfo, backend: Backend, *, replicate: bool = False) -> None:
        """Serve a model from now on.

        Args:
            info: what the model is.
            backend: who answers for it.
            replicate: another model of the same name and kind is not a conflict, but a replica of this one.

        Raises:
            NameTaken: the name is taken.
        """
        model = self._models.get(info.name)
        if model is None:
            model = self._models[info.name] = _Model(info)
            model.put(info, backend)
            self._note_kind(info)
            return
        who = ", ".join(replica.name for replica in model.replicas)
        if not replicate:
            raise NameTaken(f"a model named '{info.name}' is already served by {who}")
        kind = model.info.kind
        if kind != info.kind:
            raise NameTaken(
                f"a model named '{info.name}' is already served by {who}, as {kind}, not {info.kind}"
            )
        if any(replica.name == backend.name for replica in model.replicas):
            raise NameTaken(f"'{backend.name}' already serves a model named '{info.name}'")
        model.put(info, backend)

    def update(self, info: ModelInfo, backend: Backend) -> None:
        """Take note that a model which ``backend`` serves is something else from now on.

        Raises:
            NameTaken: it would be of another kind than its replicas are.
        """
        model = self._models[info.name]
        others = [other for replica, other in model.replicas.items() if replica is not backend]
        if any(other.kind != info.kind for other in others):
            raise NameTaken(
                f"a model named '{info.name}' is already served as {others[0].kind}, not {info.kind}"
            )
        if not others:
            model.info = info
        model.put(info, backend)
        self._note_kind(info)

    def remove(self, name: str, backend: Backend) -> bool:
        """Take a model of ``backend`` out; calls that run go on. Return whether the backend served it."""
        model = self._models.get(name)
        if model is None or backend not in model.replicas:
            return False
        model.discard(backend)
        if not model.replicas:
            del self._models[name]
            self.passthrough.discard(name)
        return True

    def used(self, name: str, backend: Backend) -> None:
        """Take note that ``backend`` was just chosen: of equals, the others come first next time."""
        replicas = self._models[name].replicas
        replicas[backend] = replicas.pop(backend)

    def info(self, name: str) -> ModelInfo | None:
        """Return what is known of a model, or ``None`` if no backend serves it."""
        model = self._models.get(name)
        return None if model is None else model.info

    def infos(self) -> list[ModelInfo]:
        """Return all models, sorted by name."""
        return [self._models[name].info for name in sorted(self._models)]

    def names(self) -> list[str]:
        """Return the names of all models, sorted."""
        return sorted(self._models)

    def served_by(self, name: str) -> list[str]:
        """Return the names of the nodes that serve a model, sorted."""
        model = self._models.get(name)
        return [] if model is None else sorted(replica.name for replica in model.replicas)

    def replicas(self, name: str) -> list[Backend]:
        """Return the backends that serve a model, the one used longest ago first."""
        model = self._models.get(name)
        return [] if model is None else list(model.replicas)

    def candidates(self, request: Request, *, avoid: str = "") -> list[Backend]:
        """Return the backends that may be given ``request``, the one used longest ago first.

        Args:
            request: its model, kind and endpoint count.
            avoid: the name of a backend that may not.
        """
        found: list[Backend] = []
        model = self._models.get(request.model)
        if model is None:
            return found
        # There may be hundreds of replicas, and this runs for each request: no call is made for each of them.
        for replica, info in model.replicas.items():
            if (
                replica.health.available
                and (info.kind == request.kind != "custom" or info.answers(request.kind, request.endpoint))
                and replica.name != avoid
            ):
                found.append(replica)
        return found

    def check(self, name: str, kind: Kind, endpoint: str = "") -> ModelInfo:
        """Return what is known of a model that an endpoint for ``kind`` wants.

        Raises:
            ModelNotFound: no backend serves it.
            WrongKind: it does not answer that endpoint.
        """
        model = self._models.get(name)
        if model is None:
            raise ModelNotFound(name, list(self._models))
        if not model.info.answers(kind, endpoint):
            raise WrongKind(name, model.info.kind, endpoint if kind == "custom" else kind)
        return model.info

    def answers(self, endpoint: str) -> bool:
        """Tell whether any model answers an endpoint that is not one of the OpenAI API."""
        return any(model.info.answers("custom", endpoint) for model in self._models.values())

    def _note_kind(self, info: ModelInfo) -> None:
        if info.kind == "any":
            self.passthrough.add(info.name)
        else:
            self.passthrough.discard(info.name)

"""The catalogue: which models there are, and which backends serve them.

A model may have several replicas: backends that serve the same name. They may differ in the endpoints that they answer
besides those of the model's kind; the catalogue lists every endpoint that at least one of them answers.
"""

from __future__ import annotations

import attrs

from ..core.model import Kind, ModelInfo
from ..core.request import Request
from ..errors import ModelNotFound, WrongKind
from .backend import Backend

__all__ = ["Catalog", "NameTaken"]


class NameTaken(ValueError):
    """A model cannot be added or changed, because of another one that has the same name."""


class _Model:
    """A model and its replicas, least recently used first, each with its own description of the model."""

    def __init__(self, info: ModelInfo) -> None:
        self.replicas: dict[Backend, ModelInfo] = {}
        self.info = info
        """The first replica's description, with the extra endpoints of all replicas."""

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
        passthrough: the names of the passthrough models (kind ``"any"``), whose requests must not be parsed.
    """

    def __init__(self) -> None:
        self._models: dict[str, _Model] = {}
        self.passthrough: set[str] = set()

    def add(self, info: ModelInfo, backend: Backend, *, replicate: bool = False) -> None:
        """Add a model of a backend.

        Args:
            info: the description of the model.
            backend: the backend that serves it.
            replicate: if a model of this name and kind exists, add the backend as a further replica of it.

        Raises:
            NameTaken: a model of this name exists, and this one cannot be a replica of it.
        """
        model = self._models.get(info.name)
        if model is None:
            model = self._models[info.name] = _Model(info)
            model.put(info, backend)
            self._note_kind(info)
            return
        servers = ", ".join(replica.name for replica in model.replicas)
        if not replicate:
            raise NameTaken(f"a model named '{info.name}' is already served by {servers}")
        kind = model.info.kind
        if kind != info.kind:
            raise NameTaken(
                f"a model named '{info.name}' is already served by {servers}, as {kind}, not {info.kind}"
            )
        if any(replica.name == backend.name for replica in model.replicas):
            raise NameTaken(f"'{backend.name}' already serves a model named '{info.name}'")
        model.put(info, backend)

    def update(self, info: ModelInfo, backend: Backend) -> None:
        """Replace a backend's description of a model that it serves.

        Raises:
            NameTaken: the kind would differ from that of the other replicas.
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
        """Remove a model of a backend; its running calls go on.

        Returns:
            Whether the backend served the model.
        """
        model = self._models.get(name)
        if model is None or backend not in model.replicas:
            return False
        model.discard(backend)
        if not model.replicas:
            del self._models[name]
            self.passthrough.discard(name)
        return True

    def used(self, name: str, backend: Backend) -> None:
        """Record that a backend was chosen: it is now the most recently used replica of the model."""
        replicas = self._models[name].replicas
        replicas[backend] = replicas.pop(backend)

    def info(self, name: str) -> ModelInfo | None:
        """Return the description of a model, or ``None`` if no backend serves it."""
        model = self._models.get(name)
        return None if model is None else model.info

    def infos(self) -> list[ModelInfo]:
        """Return the descriptions of all models, sorted by name."""
        return [self._models[name].info for name in sorted(self._models)]

    def names(self) -> list[str]:
        """Return the names of all models, sorted."""
        return sorted(self._models)

    def served_by(self, name: str) -> list[str]:
        """Return the names of the nodes that serve a model, sorted."""
        model = self._models.get(name)
        return [] if model is None else sorted(replica.name for replica in model.replicas)

    def replicas(self, name: str) -> list[Backend]:
        """Return the backends that serve a model, least recently used first."""
        model = self._models.get(name)
        return [] if model is None else list(model.replicas)

    def candidates(self, request: Request, *, avoid: str = "") -> list[Backend]:
        """Return the backends that can be given a request now, least recently used first.

        Args:
            request: its model, kind and endpoint are looked at.
            avoid: the name of a backend to leave out.
        """
        found: list[Backend] = []
        model = self._models.get(request.model)
        if model is None:
            return found
        # There may be hundreds of replicas, and this runs for each request. So the usual case of ModelInfo.answers() is
        # written out here: no function is called for each replica.
        for replica, info in model.replicas.items():
            if (
                replica.health.available
                and (info.kind == request.kind != "custom" or info.answers(request.kind, request.endpoint))
                and replica.name != avoid
            ):
                found.append(replica)
        return found

    def check(self, name: str, kind: Kind, endpoint: str = "") -> ModelInfo:
        """Return the description of a model that a client asks for at an endpoint.

        Args:
            name: the model.
            kind: the kind of models that the endpoint is for.
            endpoint: the name of the endpoint, or the path of a custom route.

        Raises:
            ModelNotFound: no backend serves the model.
            WrongKind: the model does not answer the endpoint.
        """
        model = self._models.get(name)
        if model is None:
            raise ModelNotFound(name, list(self._models))
        if not model.info.answers(kind, endpoint):
            raise WrongKind(name, model.info.kind, endpoint if kind == "custom" else kind)
        return model.info

    def answers(self, endpoint: str) -> bool:
        """Return whether any model answers a custom route."""
        return any(model.info.answers("custom", endpoint) for model in self._models.values())

    def _note_kind(self, info: ModelInfo) -> None:
        if info.kind == "any":
            self.passthrough.add(info.name)
        else:
            self.passthrough.discard(info.name)

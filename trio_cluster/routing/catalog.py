"""The catalogue: which models there are, and which backends serve them.

A model may have several replicas: backends that serve the same name. They may differ in the endpoints that they answer
besides those of the model's kind; the catalogue lists every endpoint that at least one of them answers. A replica of
kind ``any``, which answers every endpoint, may stand beside replicas of one other kind. A request goes to the replicas
that answer its endpoint.

A model that came through this cluster, from another one that serves its models, is refused: requests would go in a
circle. A model whose last replica has left stays known for a while, and so does an endpoint of a model that has lost
the last replica that answers it; see ``absence.py``. A model that was refused because of others can be tried again when
they change; see :meth:`Catalog.retry_when_changed`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

import attrs

from ..core import randomness
from ..core.aliases import reachable, shown_target
from ..core.model import Kind, ModelInfo
from ..core.model_state import MODEL_STATES, ShownState
from ..core.provenance import VIA_FIELD, VIA_HEADER, parse_via
from ..core.request import Request
from ..errors import ApiError, InvalidRequest, ModelNotFound, ModelUnavailable, WrongKind
from .absence import AbsentModels
from .aliases import Aliases
from .backend import Backend

__all__ = ["Catalog", "ModelLoop", "NameTaken", "StandIn"]


class StandIn(Backend, Protocol):
    """A backend that is asked for a model only as long as no other one serves it."""

    def replaced(self, name: str) -> None:
        """Another backend serves the model now. Synchronous; called when that can be given requests."""


class NameTaken(ValueError):
    """A model cannot be added or changed, because of another one that has the same name."""


class ModelLoop(ValueError):
    """A model came through this cluster: it would be served in a circle."""


class _Model:
    """A model and its replicas, least recently used first, each with its own description of the model."""

    def __init__(self, info: ModelInfo) -> None:
        self.replicas: dict[Backend, ModelInfo] = {}
        self.info = info
        """The description by the first replica whose kind is not ``any``, or else by the first; with the extra
        endpoints of all replicas."""
        self.passthrough = False
        """Whether a replica is of kind ``any``."""

    def put(self, info: ModelInfo, backend: Backend) -> None:
        self.replicas[backend] = info
        self._merge()

    def discard(self, backend: Backend) -> None:
        del self.replicas[backend]
        self._merge()

    def conflict(self, info: ModelInfo, backend: Backend) -> ModelInfo | None:
        """Return what a replica other than ``backend`` says that ``info`` is no replica of."""
        for replica, other in self.replicas.items():
            if replica is not backend and other.kind != info.kind and "any" not in (other.kind, info.kind):
                return other
        return None

    def answers(self, kind: str, endpoint: str) -> bool:
        """Tell whether any replica answers an endpoint."""
        return self.info.answers(kind, endpoint) or self.passthrough

    def replaces(self, info: ModelInfo) -> bool:
        """Tell whether the replicas answer everything that another one answered."""
        if self.passthrough or info.kind == "any":
            return self.passthrough
        answered = {info.kind, *info.extra_endpoints} - {"custom"}
        return answered <= {self.info.kind, *self.info.extra_endpoints}

    @property
    def answered(self) -> tuple[str, tuple[str, ...], bool]:
        """Changes when the replicas together answer other endpoints than before."""
        return self.info.kind, self.info.extra_endpoints, self.passthrough

    def _merge(self) -> None:
        infos = self.replicas.values()
        if not infos:
            return
        kinds = {info.kind for info in infos}
        self.passthrough = "any" in kinds
        if self.info.kind not in kinds or (self.info.kind == "any" and len(kinds) > 1):
            self.info = next((info for info in infos if info.kind != "any"), next(iter(infos)))
        extra = dict.fromkeys(each for info in infos for each in info.extra_endpoints)
        if tuple(extra) != self.info.extra_endpoints:
            self.info = attrs.evolve(self.info, extra_endpoints=tuple(extra))


def _do_nothing() -> None:
    return None


class Catalog:
    """The models of a node: its own and, on a master, those of its workers.

    Attributes:
        passthrough: the names of the models of which a replica is a passthrough model (kind ``"any"``).
        absent: the models, and the parts of models, that were served a short while ago, and are not now.
        aliases: other names for models. They are for the clients: a request that is routed has the name of a model.
        on_names_changed: called when a name begins or ceases to be served, or an endpoint of it. Synchronous.
    """

    def __init__(self) -> None:
        self._models: dict[str, _Model] = {}
        # By name: what to call when a replica of the model leaves or changes, in the order of asking.
        self._retries: dict[str, dict[Backend, Callable[[], None]]] = {}
        # By name: those that stand in for the model when no backend serves it, the one that is asked first.
        self._stand_ins: dict[str, dict[StandIn, ModelInfo]] = {}
        self.passthrough: set[str] = set()
        self.absent = AbsentModels()
        self.aliases = Aliases()
        self.on_names_changed: Callable[[], None] = _do_nothing

    @cached_property
    def cluster_id(self) -> str:
        """Tells this cluster from every other one; drawn when it is needed first, and anew by each process."""
        return randomness.token(8)

    def add(self, info: ModelInfo, backend: Backend, *, replicate: bool = False) -> None:
        """Add a model of a backend.

        Args:
            info: the description of the model.
            backend: the backend that serves it.
            replicate: if a model of this name exists, add the backend as a further replica of it, if both are of the
                same kind or one of them is of kind ``"any"``.

        Raises:
            NameTaken: a model of this name exists, and this one cannot be a replica of it.
            ModelLoop: the model came through this cluster.
        """
        self._refuse_loop(info)
        if self._stand_ins and (replaced := self._stand_in_of(info.name)) is not None:
            del self._models[info.name]
            self._add_first(info, backend)
            replaced.replaced(info.name)
            return
        model = self._models.get(info.name)
        if model is None:
            self._add_first(info, backend)
            return
        servers = ", ".join(replica.name for replica in model.replicas)
        if not replicate:
            raise NameTaken(f"a model named '{info.name}' is already served by {servers}")
        other = model.conflict(info, backend)
        if other is not None:
            raise NameTaken(
                f"a model named '{info.name}' is already served by {servers}, as {other.kind}, not {info.kind}"
            )
        if any(replica.name == backend.name for replica in model.replicas):
            raise NameTaken(f"'{backend.name}' already serves a model named '{info.name}'")
        self._put(model, info, backend, before=model.answered)

    def update(self, info: ModelInfo, backend: Backend) -> None:
        """Replace a backend's description of a model that it serves.

        Raises:
            NameTaken: the kind would differ from that of the other replicas.
            ModelLoop: the model came through this cluster.
        """
        self._refuse_loop(info)
        model = self._models[info.name]
        other = model.conflict(info, backend)
        if other is not None:
            raise NameTaken(f"a model named '{info.name}' is already served as {other.kind}, not {info.kind}")
        before, was = model.answered, model.replicas[backend]
        if len(model.replicas) == 1:
            model.info = info
        self._put(model, info, backend, before=before)
        self._remember(model, was)
        if was.kind != info.kind:
            self._retry(info.name)

    def remove(self, name: str, backend: Backend) -> bool:
        """Remove a model of a backend; its running calls go on.

        Returns:
            Whether the backend served the model.
        """
        model = self._models.get(name)
        if model is None or backend not in model.replicas:
            return False
        was = model.replicas[backend]
        model.discard(backend)
        if model.replicas:
            self._remember(model, was)
        else:
            del self._models[name]
            self.absent.add(model.info)
            self.on_names_changed()
        if not model.replicas or not model.passthrough:
            self.passthrough.discard(name)
        self._retry(name)
        self._stand_in(name)
        return True

    def add_stand_in(self, info: ModelInfo, backend: StandIn) -> None:
        """Let a backend answer for a model as long as no other one serves it. Synchronous.

        Args:
            info: the description of the model.
            backend: of several for one model, the one that was added first is asked.
        """
        self._stand_ins.setdefault(info.name, {})[backend] = info
        self._stand_in(info.name)

    def remove_stand_in(self, name: str, backend: StandIn) -> None:
        """Undo :meth:`add_stand_in`. Synchronous, idempotent."""
        stand_ins = self._stand_ins.get(name, {})
        if stand_ins.pop(backend, None) is None:
            return
        if not stand_ins:
            del self._stand_ins[name]
        self.remove(name, backend)

    def _stand_in(self, name: str) -> None:
        """Let the first of those that stand in for a model do so, if no backend serves it."""
        if name in self._stand_ins and name not in self._models:
            backend, info = next(iter(self._stand_ins[name].items()))
            self._add_first(info, backend)

    def _stand_in_of(self, name: str) -> StandIn | None:
        """Return what stands in for a model now."""
        model = self._models.get(name)
        if model is None:
            return None
        return next((each for each in self._stand_ins.get(name, ()) if each in model.replicas), None)

    def _add_first(self, info: ModelInfo, backend: Backend) -> None:
        model = self._models[info.name] = _Model(info)
        self._put(model, info, backend, before=None)

    def remember(self, info: ModelInfo, *, age: float = 0.0) -> None:
        """Take a model for one that has left, unless all that it answered is answered.

        Args:
            info: the model; its kind and its extra endpoints are what it answered.
            age: seconds since it left.
        """
        model = self._models.get(info.name)
        if model is None or not model.replaces(info):
            self.absent.add(info, age=age)

    def retry_when_changed(self, name: str, backend: Backend, retry: Callable[[], None]) -> None:
        """Call ``retry`` each time a replica of a model leaves or becomes another kind of model.

        That is when a model that could not be added or updated may no longer be in conflict.

        Args:
            name: the model.
            backend: whose model it is; there is one such function for each model and backend.
            retry: synchronous; called inside :meth:`remove` and :meth:`update`. It may add and update models, and ask
                for another call or for none.
        """
        self._retries.setdefault(name, {})[backend] = retry

    def retry_no_more(self, name: str, backend: Backend) -> None:
        """Forget what :meth:`retry_when_changed` was asked to do. Idempotent."""
        waiting = self._retries.get(name)
        if waiting is not None:
            waiting.pop(backend, None)
            if not waiting:
                del self._retries[name]

    def _retry(self, name: str) -> None:
        for retry in list(self._retries.get(name, {}).values()):
            retry()

    def used(self, name: str, backend: Backend) -> None:
        """Record that a backend was chosen: it is now the most recently used replica of the model."""
        replicas = self._models[name].replicas
        replicas[backend] = replicas.pop(backend)

    def info(self, name: str) -> ModelInfo | None:
        """Return the description of a model, or ``None`` if no backend serves it."""
        model = self._models.get(name)
        return None if model is None else model.info

    def entry(self, info: ModelInfo) -> dict[str, Any]:
        """Return the entry in ``/v1/models`` of a model or an alias, with the clusters that a reader gets it through.

        Of several replicas the nearest counts. A request that would be sent in a circle does not go to the others.
        """
        name, more = info.name, {}
        target = self.aliases.table.get(name)
        if target is not None:
            name = next((each for each in self._models_of(name)), name)
            more["alias_of"] = shown_target(target)
        model = self._models.get(name)
        ways = [] if model is None else [replica.via for replica in model.replicas.values()]
        more["state"] = self.state(name)
        return info.entry() | {VIA_FIELD: [*min(ways, key=len, default=info.via), self.cluster_id]} | more

    def state(self, name: str) -> ShownState:
        """Return the state of a model: that of the replica that can answer first. Those not on demand are ready."""
        model = self._models.get(name)
        found: list[ShownState] = []
        for replica in () if model is None else model.replicas:
            state = replica.health.model_states.get(name)
            found.append("ready" if state is None else state.state)
        return min(found, key=MODEL_STATES.index, default="ready")

    def listed(self, name: str) -> ModelInfo | None:
        """Return what clients are told of a name; ``None`` if no backend serves a model of it.

        An alias is what the first model is that it may stand for and that is served, and answers what any of them
        does.
        """
        if name not in self.aliases.table:
            return self.info(name)
        infos = [self._models[each].info for each in self._models_of(name)]
        if not infos:
            return None
        first = infos[0]
        extra = {*first.extra_endpoints}
        for other in infos[1:]:
            extra.update((other.kind, *other.extra_endpoints))
        extra -= {first.kind, "custom"}
        return attrs.evolve(first, name=name, extra_endpoints=tuple(sorted(extra)))

    def listed_names(self) -> list[str]:
        """Return the names of all models and all aliases, sorted. No backend need serve a model of an alias."""
        return sorted({*self._models, *self.aliases.table})

    def _models_of(self, alias: str) -> list[str]:
        """Return the names of the models that an alias may stand for and that are served."""
        return [name for name in reachable(self.aliases.table, alias) if name in self._models]

    def infos(self) -> list[ModelInfo]:
        """Return the descriptions of all models, sorted by name."""
        return [self._models[name].info for name in sorted(self._models)]

    def names(self) -> list[str]:
        """Return the names of all models, sorted."""
        return sorted(self._models)

    def cache_tokens(self, name: str, backend: Backend) -> int | None:
        """Return how many tokens a backend's prompt cache for a model holds, as the backend says."""
        model = self._models.get(name)
        info = None if model is None else model.replicas.get(backend)
        return None if info is None else info.options.cache_tokens

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
        if VIA_HEADER in request.headers:
            passed = set(parse_via(request.headers[VIA_HEADER]))
            found = [replica for replica in found if passed.isdisjoint(model.replicas[replica].via)]
        return found

    def leads_back(self, request: Request) -> bool:
        """Tell whether all replicas of a request's model come through a cluster that the request has passed."""
        model = self._models.get(request.model)
        passed = set(parse_via(request.headers.get(VIA_HEADER, "")))
        return model is not None and not any(passed.isdisjoint(info.via) for info in model.replicas.values())

    def check(self, name: str, kind: Kind, endpoint: str = "") -> ModelInfo:
        """Return the description of a model that a client asks for at an endpoint.

        Args:
            name: the model.
            kind: the kind of models that the endpoint is for.
            endpoint: the name of the endpoint, or the path of a custom route.

        Raises:
            ModelUnavailable: no backend answers the endpoint with the model now, and one did a short while ago.
            ModelNotFound: no backend serves the model.
            WrongKind: the model does not answer the endpoint.
            InvalidRequest: 404: only passthrough models answer the custom route, and this is none.
        """
        model = self._models.get(name)
        if model is not None and model.answers(kind, endpoint):
            return model.info
        if self.absent.answered(name, kind, endpoint):
            raise ModelUnavailable(name)
        info = self.absent.find(name) if model is None else model.info
        if info is None:
            raise ModelNotFound(name, self.listed_names())
        if model is not None and kind == "custom" and self.passthrough and not self.declares(endpoint):
            # The path is only possible because of passthrough models, of which this is none: a typing error.
            raise InvalidRequest(f"Unknown URL: POST {endpoint}", status=404)
        raise WrongKind(name, info.kind, endpoint if kind == "custom" else kind)

    def is_away(self, name: str, kind: Kind, endpoint: str = "") -> bool:
        """Tell whether no replica of a model answers an endpoint now, and one did a short while ago.

        Args:
            name, kind, endpoint: see :meth:`check`.
        """
        if not self.absent.answered(name, kind, endpoint):
            return False
        model = self._models.get(name)
        return model is None or not model.answers(kind, endpoint)

    def answers(self, endpoint: str) -> bool:
        """Return whether any model answers a custom route, or did so a short while ago."""
        return any(model.answers("custom", endpoint) for model in self._models.values()) or any(
            info.answers("custom", endpoint) for info, _ in self.absent
        )

    def declares(self, endpoint: str) -> bool:
        """Return whether a model was registered for a custom route by name; passthrough models answer all of them."""
        return any(endpoint in model.info.extra_endpoints for model in self._models.values())

    def why_missing(self, name: str) -> ApiError:
        """Return the error for a model that no backend serves, or an alias of such models."""
        aliases = self.aliases.table
        for model in reachable(aliases, name) if name in aliases else (name,):
            if self.absent.find(model) is not None:
                return ModelUnavailable(name)
        return ModelNotFound(name, self.listed_names(), alias=name in aliases)

    def ready(self, name: str | None = None) -> bool:
        """Tell whether any backend could be given a request now: for one model, one alias, or for any model."""
        if name is None:
            models = list(self._models.values())
        elif name in self.aliases.table:
            models = [self._models[each] for each in self._models_of(name)]
        else:
            models = [self._models[name]] if name in self._models else []
        return any(replica.health.available for model in models for replica in model.replicas)

    def takes_untouched(self, name: str, kind: Kind, endpoint: str = "") -> ModelInfo | None:
        """Return what is known of a model if all its replicas that answer an endpoint are of kind ``"any"``.

        These are to get requests as clients send them. Otherwise, or if there is no such model, return ``None``.
        """
        model = self._models.get(name)
        if model is None or not model.passthrough:
            return None
        return None if model.info.kind != "any" and model.info.answers(kind, endpoint) else model.info

    def _refuse_loop(self, info: ModelInfo) -> None:
        if info.via and self.cluster_id in info.via:
            raise ModelLoop(
                f"the model '{info.name}' came through this cluster, and would be served in a circle"
            )

    def _put(
        self, model: _Model, info: ModelInfo, backend: Backend, *, before: tuple[object, ...] | None
    ) -> None:
        model.put(info, backend)
        if model.passthrough:
            self.passthrough.add(info.name)
        else:
            self.passthrough.discard(info.name)
        if model.answered != before:
            self.absent.discard_answered(info.name, model.replaces)
            self.on_names_changed()

    def _remember(self, model: _Model, was: ModelInfo) -> None:
        """Remember what a replica answered that has left or changed, if no other one of the model answers it."""
        if not model.replaces(was):
            self.absent.add(was)
            self.on_names_changed()

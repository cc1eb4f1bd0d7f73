"""The models of this process: registers functions under names, and removes them again.

A model that is registered while the server runs is served at once; a worker announces it to its master.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import attrs

from ..core.model import ChatModelOptions, Kind, ModelInfo
from ..core.provenance import Via
from ..openai import COUNT_TOKENS, custom_path
from ..options import ClusterServerOptions
from ..routing.router import Router
from .adapters import Handler
from .asyncio_handler import AsyncioHandler
from .asyncio_raw import raw_from_asyncio
from .handler import HandlerBackend
from .passthrough import RawBackend, RawHandler
from .pool import HandlerPool

__all__ = ["LocalModels"]

#: The kinds that one model may be at the same time, each with a handler of its own.
_IMAGE_KINDS: Final = {"image_generation", "image_edit"}


class LocalModels:
    """The models of this process.

    Args:
        options: read at the time of use.
        router: its catalogue gets the models.
        pool: where their handlers run.
        on_changed: called with the description of a model that is new or was changed. Synchronous.
        on_removed: called with the name of a model that was removed. Synchronous.
    """

    def __init__(
        self,
        options: ClusterServerOptions,
        router: Router,
        pool: HandlerPool,
        *,
        on_changed: Callable[[ModelInfo], None],
        on_removed: Callable[[str], None],
    ) -> None:
        self._options = options
        self._router = router
        self._pool = pool
        self._on_changed = on_changed
        self._on_removed = on_removed
        self._backends: dict[str, HandlerBackend | RawBackend] = {}

    def replace_options(self, options: ClusterServerOptions) -> None:
        """Use other options from now on. The owner that the models show is updated with them."""
        self._options = options
        for backend in self._backends.values():
            backend.info = attrs.evolve(backend.info, owner=options.server.owner)
            self._router.catalog.update(backend.info, backend)

    def suspend(self) -> None:
        """Give no requests to the models that are registered now, until :meth:`resume`. Synchronous.

        Models that are registered meanwhile get requests at once.
        """
        for backend in self._backends.values():
            backend.health.stall("the node is starting")

    def resume(self) -> None:
        """Give requests to all models again. Synchronous, idempotent."""
        for backend in self._backends.values():
            backend.health.stall("")

    def register(
        self,
        kind: Kind,
        name: str,
        handler: Handler,
        options: ChatModelOptions | None,
        count_tokens: Handler | None = None,
        *,
        max_concurrency: int | None = None,
        validate: bool = False,
        hedge: bool = False,
    ) -> None:
        """Serve a model of one of the OpenAI API's kinds; see ``ClusterServer.register_chat``.

        If an image model of this name exists, and ``kind`` is the other image kind, the model answers both from now on,
        with the options and the ``max_concurrency`` of the first.
        """
        backend = self._backends.get(name)
        if backend is not None and {backend.info.kind, kind} == _IMAGE_KINDS:
            self._add_endpoint(backend, kind, handler)
        else:
            info = attrs.evolve(self._info(kind, name, options), hedge=hedge)
            backend = HandlerBackend(
                info, handler, self._pool, max_concurrency=max_concurrency, validate=validate
            )
            if count_tokens is not None:
                backend.add_endpoint(COUNT_TOKENS, count_tokens)
            self._add(backend)

    def register_raw(
        self,
        name: str,
        handler: RawHandler | AsyncioHandler,
        options: ChatModelOptions | None,
        max_concurrency: int | None,
        via: Via = (),
    ) -> None:
        """Serve a passthrough model; see ``ClusterServer.register_raw``."""
        if isinstance(handler, AsyncioHandler):
            loop, handler = handler.loop, raw_from_asyncio(handler)
            self._pool.loops.add(loop)
        info = attrs.evolve(self._info("any", name, options), via=via)
        self._add(RawBackend(info, handler, self._pool, max_concurrency))

    def register_route(self, path: str, model: str, handler: Handler) -> None:
        """Let a model, which may be a new one, answer one more route; see ``ClusterServer.route``."""
        path = custom_path(path)
        backend = self._backends.get(model)
        if backend is None:
            info = attrs.evolve(self._info("custom", model, None), extra_endpoints=(path,))
            self._add(HandlerBackend(info, handler, self._pool, path))
        else:
            self._add_endpoint(backend, path, handler)

    def unregister(self, name: str) -> bool:
        """Stop serving a model; its running calls go on.

        Returns:
            Whether this process served a model of this name.
        """
        backend = self._backends.pop(name, None)
        if backend is None:
            return False
        self._router.catalog.remove(name, backend)
        self._on_removed(name)
        return True

    def _info(self, kind: Kind, name: str, options: ChatModelOptions | None) -> ModelInfo:
        owner = self._options.server.owner
        return ModelInfo(name=name, kind=kind, owner=owner, options=options or ChatModelOptions())

    def _add(self, backend: HandlerBackend | RawBackend) -> None:
        info = backend.info
        self._router.catalog.add(info, backend, replicate=self._options.on_conflict == "replicate")
        self._backends[info.name] = backend
        backend.health.model_states = self._pool.on_demand.live_states
        self._on_changed(info)

    def _add_endpoint(self, backend: HandlerBackend | RawBackend, capability: str, handler: Handler) -> None:
        backend.add_endpoint(capability, handler)
        self._router.catalog.update(backend.info, backend)
        self._on_changed(backend.info)

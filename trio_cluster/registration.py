"""The models of this process: registering functions under names, and taking them back.

What a user of :class:`~trio_cluster.ClusterServer` does most is here, apart from running it. A model that is
registered while the server runs is served at once, and on a worker announced to its master.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from functools import partial
from typing import Any, Final, TypeVar

import attrs

from .core.model import ChatModelOptions, Kind, ModelInfo
from .local.adapters import Handler
from .local.handler import HandlerBackend
from .local.passthrough import RawBackend, RawHandler
from .local.pool import HandlerPool
from .openai import custom_path
from .options import ClusterServerOptions
from .routing.router import Router

__all__ = ["ModelCatalog"]

H = TypeVar("H", bound=Handler)

#: The kinds that one model may be at the same time, each with a handler of its own.
_IMAGE_KINDS: Final = {"image_generation", "image_edit"}


class ModelCatalog(abc.ABC):
    """The part of :class:`~trio_cluster.ClusterServer` that deals with models."""

    def __init__(self, options: ClusterServerOptions) -> None:
        self._options = options
        self._registry = Router()
        self._pool = HandlerPool(options)
        self._local: dict[str, HandlerBackend | RawBackend] = {}

    def _replace_options(self, options: ClusterServerOptions) -> None:
        self._options = options
        self._pool.options = options
        self._pool.resize()
        # Models say whose they are from the moment they are registered, and here that has changed.
        for backend in self._local.values():
            backend.info = attrs.evolve(backend.info, owner=options.server.owner)
            self._registry.catalog.update(backend.info, backend)

    def register_chat(self, name: str, handler: Handler, options: ChatModelOptions | None = None) -> None:
        """Serve a chat model from now on; it answers ``/v1/chat/completions``, ``/v1/completions``, ``/v1/responses``.

        Args:
            name: what clients call it.
            handler: a function of one of the documented shapes, which gets a :class:`ChatRequest`.
            options: what ``/v1/models`` tells about it.

        Raises:
            ValueError: the name is taken, or is not a name.
            TypeError: the handler has none of the shapes.
        """
        self._register("chat", name, handler, options)

    def register_embedding(
        self, name: str, handler: Handler, options: ChatModelOptions | None = None
    ) -> None:
        """Serve an embedding model, see :meth:`register_chat`; the handler gets an :class:`EmbeddingRequest`."""
        self._register("embedding", name, handler, options)

    def register_asr(self, name: str, handler: Handler, options: ChatModelOptions | None = None) -> None:
        """Serve a speech-to-text model, see :meth:`register_chat`; the handler gets an :class:`ASRRequest`."""
        self._register("asr", name, handler, options)

    def register_tts(self, name: str, handler: Handler, options: ChatModelOptions | None = None) -> None:
        """Serve a text-to-speech model, see :meth:`register_chat`; the handler gets a :class:`TTSRequest`."""
        self._register("tts", name, handler, options)

    def register_image_generation(
        self, name: str, handler: Handler, options: ChatModelOptions | None = None
    ) -> None:
        """Serve an image model, see :meth:`register_chat`; the handler gets an :class:`ImageGenRequest`."""
        self._register("image_generation", name, handler, options)

    def register_image_edit(
        self, name: str, handler: Handler, options: ChatModelOptions | None = None
    ) -> None:
        """Serve a model that changes images, see :meth:`register_chat`; the handler gets an :class:`ImageEditRequest`.

        One model may both make and change images: an image model of this process that has the name answers this, too,
        and the other way round. What is told about it then stays as it is.
        """
        self._register("image_edit", name, handler, options)

    def register_rerank(self, name: str, handler: Handler, options: ChatModelOptions | None = None) -> None:
        """Serve a model that ranks documents, see :meth:`register_chat`; the handler gets a :class:`RerankRequest`."""
        self._register("rerank", name, handler, options)

    def register_moderation(
        self, name: str, handler: Handler, options: ChatModelOptions | None = None
    ) -> None:
        """Serve a moderation model, see :meth:`register_chat`; the handler gets a :class:`ModerationRequest`.

        It is asked about images only if its options say that it supports vision.
        """
        self._register("moderation", name, handler, options)

    def chat(self, name: str, **options: Any) -> Callable[[H], H]:
        """Decorate a chat handler: :meth:`register_chat` with the fields of :class:`ChatModelOptions`."""
        return self._decorator("chat", name, options)

    def embedding(self, name: str, **options: Any) -> Callable[[H], H]:
        """Decorate an embedding handler; see :meth:`register_embedding`."""
        return self._decorator("embedding", name, options)

    def asr(self, name: str, **options: Any) -> Callable[[H], H]:
        """Decorate a speech-to-text handler; see :meth:`register_asr`."""
        return self._decorator("asr", name, options)

    def tts(self, name: str, **options: Any) -> Callable[[H], H]:
        """Decorate a text-to-speech handler; see :meth:`register_tts`."""
        return self._decorator("tts", name, options)

    def image_generation(self, name: str, **options: Any) -> Callable[[H], H]:
        """Decorate an image handler; see :meth:`register_image_generation`."""
        return self._decorator("image_generation", name, options)

    def image_edit(self, name: str, **options: Any) -> Callable[[H], H]:
        """Decorate a handler that changes images; see :meth:`register_image_edit`."""
        return self._decorator("image_edit", name, options)

    def rerank(self, name: str, **options: Any) -> Callable[[H], H]:
        """Decorate a handler that ranks documents; see :meth:`register_rerank`."""
        return self._decorator("rerank", name, options)

    def moderation(self, name: str, **options: Any) -> Callable[[H], H]:
        """Decorate a moderation handler; see :meth:`register_moderation`."""
        return self._decorator("moderation", name, options)

    def register_raw(
        self,
        name: str,
        handler: RawHandler,
        options: ChatModelOptions | None = None,
        *,
        max_concurrency: int | None = None,
    ) -> None:
        """Serve a model that answers every route itself, bytes in and bytes out; for what relays to another server.

        Args:
            name: what clients call it.
            handler: a coroutine function that gets a :class:`~trio_cluster.RawCall` for each request. What the client
                sent has not been looked at, except for the name of the model.
            options: what ``/v1/models`` tells about it.
            max_concurrency: how many calls run at once; the slots of this process are not used. ``None``: any number.

        Raises:
            ValueError: the name is taken, or is not a name.
            TypeError: the handler is no coroutine function.
        """
        info = self._info("any", name, options)
        self._add(RawBackend(info, handler, self._pool, max_concurrency))

    def route(self, path: str, model: str, handler: H | None = None) -> Any:
        """Let a model answer a route that the OpenAI API does not have; a decorator if ``handler`` is left out.

        Args:
            path: begins with ``/v1/``. Requests to it are POST, and have a field ``model``.
            model: a model that this process serves, or a new one.
            handler: a function of one of the documented shapes, which gets a :class:`CustomRequest`.

        Raises:
            ValueError: the path is not one, belongs to the API, or is answered by this model already.
            TypeError: the handler has none of the shapes.
        """
        if handler is None:
            return partial(self._route, path, model)
        return self._route(path, model, handler)

    def _route(self, path: str, model: str, handler: H) -> H:
        path = custom_path(path)
        backend = self._local.get(model)
        if backend is None:
            info = attrs.evolve(self._info("custom", model, None), extra_endpoints=(path,))
            self._add(HandlerBackend(info, handler, self._pool, path))
        else:
            self._add_endpoint(backend, path, handler)
        return handler

    def unregister_model(self, name: str) -> bool:
        """Stop serving a model of this process; requests that run go on. Return whether there was one."""
        backend = self._local.pop(name, None)
        if backend is None:
            return False
        self._registry.catalog.remove(name, backend)
        self._withdraw(name)
        return True

    def list_models(self) -> list[str]:
        """Return the names of all models, sorted: a master's own and its workers' together, a worker's own."""
        return self._registry.catalog.names()

    def has_model(self, name: str) -> bool:
        """Tell whether a model of this name can be asked here."""
        return self._registry.catalog.info(name) is not None

    def _decorator(self, kind: Kind, name: str, options: dict[str, Any]) -> Callable[[H], H]:
        model_options = ChatModelOptions(**options)

        def register(handler: H) -> H:
            self._register(kind, name, handler, model_options)
            return handler

        return register

    def _register(self, kind: Kind, name: str, handler: Handler, options: ChatModelOptions | None) -> None:
        backend = self._local.get(name)
        if backend is not None and {backend.info.kind, kind} == _IMAGE_KINDS:
            self._add_endpoint(backend, kind, handler)
        else:
            self._add(HandlerBackend(self._info(kind, name, options), handler, self._pool))

    def _info(self, kind: Kind, name: str, options: ChatModelOptions | None) -> ModelInfo:
        owner = self._options.server.owner
        return ModelInfo(name=name, kind=kind, owner=owner, options=options or ChatModelOptions())

    def _add(self, backend: HandlerBackend | RawBackend) -> None:
        info = backend.info
        self._registry.catalog.add(info, backend, replicate=self._options.on_conflict == "replicate")
        self._local[info.name] = backend
        self._announce(info)

    def _add_endpoint(self, backend: HandlerBackend | RawBackend, capability: str, handler: Handler) -> None:
        """Let a model of this process answer more: another kind's routes, or a route of its own."""
        backend.add_endpoint(capability, handler)
        self._registry.catalog.update(backend.info, backend)
        self._announce(backend.info)

    @abc.abstractmethod
    def _announce(self, info: ModelInfo) -> None:
        """Tell the master, if there is one, what a model is from now on."""

    @abc.abstractmethod
    def _withdraw(self, name: str) -> None:
        """Tell the master, if there is one, that a model is gone."""

"""The server: one object for every part that a process may play.

``ClusterServer`` is what users hold. It keeps what outlives a run (the options, this process's models, the pool in
which their handlers run) and makes a :class:`~trio_cluster.node.Node` for each run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import trio

from .cluster.master import WorkerManager
from .cluster.probe import is_master
from .cluster.worker import WorkerClient
from .core.model import ChatModelOptions, Kind, ModelInfo
from .errors import ClusterPortError
from .local.adapters import Handler
from .local.models import LocalModels
from .local.passthrough import RawHandler
from .local.pool import HandlerPool
from .net.sockets import INTERNAL_OFFSET, Listeners, Network, Sockets, close_all, local_address, open_pair
from .node import Node
from .options import ClusterMode, ClusterServerOptions, ServerOptions
from .routing.router import Router

if TYPE_CHECKING:
    from quart_trio import QuartTrio

__all__ = ["ClusterServer"]

Started = trio.TaskStatus[ClusterMode]

H = TypeVar("H", bound=Handler)

#: A process that has just taken the port may not have its second one yet: ask again a few times.
_PROBE_TRIES: Final = 5
_PROBE_PAUSE: Final = 0.1
_PROBE_TIMEOUT: Final = 2.0


class ClusterServer:
    """A master, a worker or a standalone server, and the models that this process serves.

    Args:
        options: all of them, or only the port of the API. They are the server's from now on.
        network: where it listens and connects; sockets if ``None``. Tests give it a simulated one.

    Raises:
        TypeError: ``options`` is neither.
        OptionsError: the port is no port.

    Models may be registered before the server runs and while it runs. Apart from that, and from configuring it
    before, everything here is to be called from inside the trio run in which the server runs. Cancelling the task
    that runs it is always a valid way to stop it; afterwards it can run again, but not twice at a time.
    """

    def __init__(
        self, options: int | ClusterServerOptions | None = None, *, network: Network | None = None
    ) -> None:
        if options is None:
            options = ClusterServerOptions()
        elif isinstance(options, int) and not isinstance(options, bool):
            options = ClusterServerOptions(server=ServerOptions(port=options))
        elif not isinstance(options, ClusterServerOptions):
            raise TypeError(f"expected a port or ClusterServerOptions, got {options!r}")
        self._options = options
        self._router = Router()
        self._pool = HandlerPool(options)
        self._models = LocalModels(
            options, self._router, self._pool, on_changed=self._announce, on_removed=self._withdraw
        )
        self._listen_address: tuple[str, int] | None = None
        self.network: Network = Sockets() if network is None else network
        self._node: Node | None = None

    # Configuration

    @property
    def options(self) -> ClusterServerOptions:
        """All options. Most of their fields may be assigned to while the server runs, and act at once."""
        return self._options

    @options.setter
    def options(self, options: ClusterServerOptions) -> None:
        if self._node is not None:
            raise RuntimeError("the options as a whole cannot be replaced while the server runs")
        self._options = options
        self._pool.options = options
        self._pool.resize()
        self._models.replace_options(options)

    def set_max_concurrency(self, n: int) -> None:
        """Let this process's handlers run ``n`` requests at once, from now on."""
        self._options.server.max_concurrency = n
        self._pool.resize()

    def set_timeout(self, seconds: float) -> None:
        """Let handlers be silent for this long, in requests that come from now on."""
        self._options.server.default_timeout = seconds

    def set_api_key(self, key: str | None) -> None:
        """Require this API key from now on; ``None``: require none."""
        self._options.server.api_key = key

    def set_worker_listen_address(self, host: str | None, port: int = 0) -> None:
        """Serve a worker's own models on an address of its own too, for debugging on one machine.

        Args:
            host: where to listen; ``None``: nowhere.
            port: 0 picks a free one; ``url`` tells which.
        """
        self._listen_address = None if host is None else (host, port)
        if self._node is not None:
            self._node.listen_on(self._listen_address)

    # Models

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
        self._models.register("chat", name, handler, options)

    def register_embedding(
        self, name: str, handler: Handler, options: ChatModelOptions | None = None
    ) -> None:
        """Serve an embedding model, see :meth:`register_chat`; the handler gets an :class:`EmbeddingRequest`."""
        self._models.register("embedding", name, handler, options)

    def register_asr(self, name: str, handler: Handler, options: ChatModelOptions | None = None) -> None:
        """Serve a speech-to-text model, see :meth:`register_chat`; the handler gets an :class:`ASRRequest`."""
        self._models.register("asr", name, handler, options)

    def register_tts(self, name: str, handler: Handler, options: ChatModelOptions | None = None) -> None:
        """Serve a text-to-speech model, see :meth:`register_chat`; the handler gets a :class:`TTSRequest`."""
        self._models.register("tts", name, handler, options)

    def register_image_generation(
        self, name: str, handler: Handler, options: ChatModelOptions | None = None
    ) -> None:
        """Serve an image model, see :meth:`register_chat`; the handler gets an :class:`ImageGenRequest`."""
        self._models.register("image_generation", name, handler, options)

    def register_image_edit(
        self, name: str, handler: Handler, options: ChatModelOptions | None = None
    ) -> None:
        """Serve a model that changes images, see :meth:`register_chat`; the handler gets an :class:`ImageEditRequest`.

        One model may both make and change images: an image model of this process that has the name answers this, too,
        and the other way round. What is told about it then stays as it is.
        """
        self._models.register("image_edit", name, handler, options)

    def register_rerank(self, name: str, handler: Handler, options: ChatModelOptions | None = None) -> None:
        """Serve a model that ranks documents, see :meth:`register_chat`; the handler gets a :class:`RerankRequest`."""
        self._models.register("rerank", name, handler, options)

    def register_moderation(
        self, name: str, handler: Handler, options: ChatModelOptions | None = None
    ) -> None:
        """Serve a moderation model, see :meth:`register_chat`; the handler gets a :class:`ModerationRequest`.

        It is asked about images only if its options say that it supports vision.
        """
        self._models.register("moderation", name, handler, options)

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
        via: Sequence[str] = (),
    ) -> None:
        """Serve a model that answers every route itself, bytes in and bytes out; for what relays to another server.

        Args:
            name: what clients call it.
            handler: a coroutine function that gets a :class:`~trio_cluster.RawCall` for each request. What the client
                sent has not been looked at, except for the name of the model.
            options: what ``/v1/models`` tells about it.
            max_concurrency: how many calls run at once; the slots of this process are not used. ``None``: any number.
            via: the ids of the clusters through which the model comes, if the other server is a cluster: what it says
                as ``trio_cluster_via`` in ``/v1/models``.

        Raises:
            ValueError: the name is taken, or is not a name; or the model came through this cluster.
            TypeError: the handler is no coroutine function.
        """
        self._models.register_raw(name, handler, options, max_concurrency, tuple(via))

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
            return partial(self.route, path, model)
        self._models.register_route(path, model, handler)
        return handler

    def unregister_model(self, name: str) -> bool:
        """Stop serving a model of this process; requests that run go on. Return whether there was one."""
        return self._models.unregister(name)

    def list_models(self) -> list[str]:
        """Return the names of all models, sorted: a master's own and its workers' together, a worker's own."""
        return self._router.catalog.names()

    def has_model(self, name: str) -> bool:
        """Tell whether a model of this name can be asked here."""
        return self._router.catalog.info(name) is not None

    def _decorator(self, kind: Kind, name: str, options: dict[str, Any]) -> Callable[[H], H]:
        model_options = ChatModelOptions(**options)

        def register(handler: H) -> H:
            self._models.register(kind, name, handler, model_options)
            return handler

        return register

    # State

    @property
    def is_running(self) -> bool:
        """Whether one of the ``run*`` methods is running."""
        return self._node is not None

    @property
    def mode(self) -> ClusterMode | None:
        """The part this server plays; ``None`` while it does not run."""
        return None if self._node is None else self._node.mode

    @property
    def url(self) -> str | None:
        """Where this process's API is reached from this machine; ``None`` while it serves none."""
        return None if self._node is None else self._node.url

    @property
    def port(self) -> int | None:
        """The port of this process's API; ``None`` while it serves none."""
        return None if self._node is None else self._node.port

    @property
    def internal_port(self) -> int | None:
        """The port on which a master takes workers; ``None`` in the other modes."""
        return None if self._node is None else self._node.internal_port

    @property
    def app(self) -> QuartTrio | None:
        """The Quart-trio application of a master or standalone server, to which routes can be added."""
        return None if self._node is None else self._node.app

    @property
    def router(self) -> Router:
        """The models that can be asked here, the calls that are live, and the counters of those that are over."""
        return self._router

    @property
    def registry(self) -> Router:
        """The former name of :attr:`router`; deprecated."""
        warnings.warn("ClusterServer.registry is called router", DeprecationWarning, stacklevel=2)
        return self._router

    @property
    def pool(self) -> HandlerPool:
        """The slots of this process and the tasks of its handlers."""
        return self._pool

    @property
    def worker_manager(self) -> WorkerManager | None:
        """A master's workers; ``None`` in the other modes."""
        return None if self._node is None else self._node.worker_manager

    @property
    def worker_client(self) -> WorkerClient | None:
        """A worker's link to its master; ``None`` in the other modes."""
        return None if self._node is None else self._node.worker_client

    def _announce(self, info: ModelInfo) -> None:
        if self.worker_client is not None:
            self.worker_client.announce(info)

    def _withdraw(self, name: str) -> None:
        if self.worker_client is not None:
            self.worker_client.withdraw(name)

    # Running

    def stop(self) -> None:
        """Ask for a graceful stop; the ``run*`` call returns when it is done.

        New requests are refused, running ones get ``drain_timeout`` seconds to finish, then they are cancelled.
        Does nothing while the server does not run.
        """
        if self._node is not None:
            self._node.stop()

    async def run(
        self, port: int | None = None, *, task_status: Started = trio.TASK_STATUS_IGNORED
    ) -> ClusterMode:
        """Be the master if ``port`` is free, and a worker of the master that holds it if it is not.

        Args:
            port: the port of the API; without it, the one in the options, which is 8080 if nobody chose another.
            task_status: started with the mode once the server serves, or is registered.

        Returns:
            The mode in which it ran, after it was stopped.

        Raises:
            ClusterPortError: the port is held by something else than a trio_cluster master.
            HandshakeRefused: the master that holds it does not take this worker.
            RuntimeError: the server runs already.
        """
        if not self._options.enable_cluster:
            return await self.run_as_standalone(port, task_status=task_status)
        port = self._options.server.port if port is None else port
        for tries_left in reversed(range(_PROBE_TRIES)):
            try:
                external, internal = await self._open_pair(port)
            except ClusterPortError as error:
                # Any other port than the first one being taken is for a person to mend.
                if error.port != port or not error.taken:
                    raise
                refusal = error
            else:
                return await self._run_as_master(external, internal, port, task_status)
            host = local_address(self._options.internal_host or self._options.server.host)
            internal_port = self._options.internal_port or port + INTERNAL_OFFSET
            if await is_master(self.network, host, internal_port, _PROBE_TIMEOUT):
                return await self.run_as_worker(host, internal_port, task_status=task_status)
            if tries_left:
                await trio.sleep(_PROBE_PAUSE)
        raise ClusterPortError(
            port,
            f"held by something that is not a trio_cluster master (nothing answers as one on {internal_port})",
        ) from refusal

    async def run_as_master(
        self, port: int | None = None, *, task_status: Started = trio.TASK_STATUS_IGNORED
    ) -> ClusterMode:
        """Serve the API on ``port`` and take workers on ``port + 1000``.

        Args:
            port: 0 picks a free pair of ports, still 1000 apart.
            task_status: started with the mode once it serves.

        Returns:
            ``ClusterMode.MASTER``, after it was stopped.

        Raises:
            ClusterPortError: a port cannot be had.
            RuntimeError: the server runs already.
        """
        port = self._options.server.port if port is None else port
        external, internal = await self._open_pair(port)
        return await self._run_as_master(external, internal, port, task_status)

    async def run_as_worker(
        self, master_host: str, master_port: int, *, task_status: Started = trio.TASK_STATUS_IGNORED
    ) -> ClusterMode:
        """Serve this process's models to a master, and come back to it for as long as this runs.

        Args:
            master_host: a name or an address.
            master_port: the master's internal port.
            task_status: started with the mode once the models are registered for the first time.

        Returns:
            ``ClusterMode.WORKER``, after it was stopped.

        Raises:
            HandshakeRefused: the master does not take this worker (wrong token, another protocol), or what is there
                is not a master. Everything that a retry may mend is retried instead.
            ClusterPortError: the worker's own listen address cannot be had.
            RuntimeError: the server runs already.
        """
        with self._node_for(ClusterMode.WORKER) as node:
            await node.serve_as_worker(master_host, master_port, lambda: task_status.started(node.mode))
        return ClusterMode.WORKER

    async def run_as_standalone(
        self, port: int | None = None, *, task_status: Started = trio.TASK_STATUS_IGNORED
    ) -> ClusterMode:
        """Serve the API on ``port`` with this process's models only.

        Args:
            port: 0 picks a free one.
            task_status: started with the mode once it serves.

        Returns:
            ``ClusterMode.STANDALONE``, after it was stopped.

        Raises:
            ClusterPortError: the port cannot be had.
            RuntimeError: the server runs already.
        """
        with self._node_for(ClusterMode.STANDALONE) as node:
            host = self._options.server.host
            listeners = await self.network.listen(host, self._options.server.port if port is None else port)
            try:
                await node.serve_as_standalone(listeners, lambda: task_status.started(node.mode))
            finally:
                close_all(listeners)
        return ClusterMode.STANDALONE

    async def _run_as_master(
        self, external: Listeners, internal: Listeners, port: int, task_status: Started
    ) -> ClusterMode:
        # On a port that is another one each time, or in a simulation, there is nothing to come back to.
        name = f"master-{port}" if port and isinstance(self.network, Sockets) else None
        try:
            with self._node_for(ClusterMode.MASTER) as node:
                await node.serve_as_master(
                    external, internal, lambda: task_status.started(node.mode), state_name=name
                )
        finally:
            close_all([*external, *internal])
        return ClusterMode.MASTER

    async def _open_pair(self, port: int) -> tuple[Listeners, Listeners]:
        options = self._options
        internal_host = options.internal_host or options.server.host
        return await open_pair(self.network, options.server.host, port, internal_host, options.internal_port)

    @contextmanager
    def _node_for(self, mode: ClusterMode) -> Iterator[Node]:
        if self._node is not None:
            raise RuntimeError(f"the server runs already, as {self._node.mode}")
        self._node = Node(mode, self._options, self._router, self._pool, self.network)
        self._node.listen_on(self._listen_address)
        try:
            yield self._node
        finally:
            self._node = None

"""The server: the object with which users register models and run a node in any role.

``ClusterServer`` has what outlives a run (the options, the models of this process, the pool in which their handlers
run), and makes a :class:`~trio_cluster.node.Node` for each run.
"""

from __future__ import annotations

import datetime
import importlib
import logging
import os
import socket
import ssl
import warnings
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import attrs
import trio

from .cluster.dialer import Dialer, MemberDialer, NeighbourDialer, TlsNetwork
from .cluster.master import WorkerManager
from .cluster.masters import ListedMasters, Masters, ResolvedMasters
from .cluster.probe import is_master
from .cluster.promotion import Contender, Ports
from .cluster.replacement import SOCKET_NAME, Succession, SuccessorStarter
from .cluster.worker import WorkerClient
from .core import randomness
from .core.addresses import split_address
from .core.aliases import AliasTargets
from .core.model import ChatModelOptions, Kind, ModelInfo
from .core.state_dir import StateDir, default_state_dir, path_of
from .core.threads import start_in_thread
from .errors import ClusterError, ClusterPortError, HandshakeRefused, OptionsError
from .gateway.auth import Authenticator
from .gateway.stories import Stories
from .group.member import Member
from .limits.limiter import Limiter
from .local.adapters import Handler
from .local.asyncio_handler import AsyncioHandler
from .local.hooks import Hook, Hooks
from .local.models import LocalModels
from .local.passthrough import RawHandler
from .local.pool import HandlerPool
from .net.sockets import (
    INTERNAL_OFFSET,
    HandsOver,
    Listeners,
    Network,
    Sockets,
    check_addresses,
    close_all,
    local_address,
    open_pair,
    port_of,
    shown_address,
)
from .node import Node
from .on_demand.residents import OnDemand
from .options import (
    ClusterMode,
    ClusterServerOptions,
    OptionChange,
    Reloaded,
    ServerOptions,
    assign_option,
)
from .routing.cost import LeastCost
from .routing.policy import LeastBusy, RoutingPolicy
from .routing.router import Router
from .security.contexts import client_context, unverified_context

if TYPE_CHECKING:
    from quart_trio import QuartTrio

__all__ = ["ClusterServer"]

logger = logging.getLogger("trio_cluster.tls")

node_logger = logging.getLogger("trio_cluster.node")

Started = trio.TaskStatus[ClusterMode]

H = TypeVar("H", bound=Handler)
F = TypeVar("F", bound=Hook)

#: How often :meth:`ClusterServer.run` looks for a master if the port is taken, the seconds between two attempts, and
#: those that an attempt may take. A master that is just starting may have the first port already and the second one not
#: yet.
_PROBE_TRIES: Final = 5
_PROBE_PAUSE: Final = 0.1
_PROBE_TIMEOUT: Final = 2.0
#: Seconds between two such looks of a server that has run already.
_ROLE_PAUSE: Final = 1.0
#: Heartbeat intervals without a sign of life after which a master is silent.
_SILENT_HEARTBEATS: Final = 2.5


@attrs.frozen(kw_only=True)
class _Role:
    """What a process of auto mode is: the master if it has ports, otherwise a worker."""

    ports: Ports | None = None
    dialer: Dialer | None = None
    name: str | None = None
    """The name of the node, if it must have a certain one."""

    @property
    def mode(self) -> ClusterMode:
        return ClusterMode.WORKER if self.ports is None else ClusterMode.MASTER


class ClusterServer:
    """A master, a worker or a standalone server, and the models that this process serves.

    Models may be registered before the server runs and while it runs. While it runs, everything here must be called
    from inside the trio run in which it runs. Cancelling the task that runs it is always a valid way to stop it;
    afterwards it can be run again, but not twice at the same time.

    Args:
        options: all options, or only the port of the API. The server uses this object and does not copy it.
        network: opens listeners and connections; ``None``: real sockets. Tests pass a simulated network.

    Raises:
        TypeError: ``options`` is neither a port nor ``ClusterServerOptions``.
        OptionsError: the port is out of range.

    Attributes:
        network: as given.
        authenticator: determines who sends a request, from the next run on; ``None``: the API key of the options is
            required. Its principals may have limits.
        reloader: reads the configuration again and applies it, for ``POST /cluster/reload`` and SIGHUP, from the next
            run on; ``None``: there is none to read. The command line sets it if there is a file of options.
        successor_starter: starts a process that takes the place of a master, from the next run on; ``None``: none does.
            The command line sets it under a service manager.
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
        self._router = Router(options=options)
        # The policy that was made for the option, and its value.
        self._routing: tuple[str, RoutingPolicy] = ("", self._router.policy)
        self._apply_routing()
        self._apply_aliases(options)
        self._pool = HandlerPool(options)
        self._models = LocalModels(
            options, self._router, self._pool, on_changed=self._announce, on_removed=self._withdraw
        )
        self._hooks = Hooks()
        # The start-up hooks run.
        self._starting = False
        self._listen_address: tuple[str, int] | None = None
        self.network: Network = Sockets() if network is None else network
        self.authenticator: Authenticator | None = None
        self.reloader: Callable[[], Awaitable[Reloaded]] | None = None
        self.successor_starter: SuccessorStarter | None = None
        self._node: Node | None = None

    # Configuration

    @property
    def options(self) -> ClusterServerOptions:
        """All options. Most fields may be assigned to while the server runs, and apply at once.

        Assigning another object while the server runs raises ``RuntimeError``.
        """
        return self._options

    @options.setter
    def options(self, options: ClusterServerOptions) -> None:
        if self._node is not None:
            raise RuntimeError(
                "the options object cannot be replaced while the server runs; assign to its fields instead"
            )
        self._apply_aliases(options)
        self._options = options
        self._pool.options = options
        self._pool.resize()
        self._router.ejections.table.options = options
        self._models.replace_options(options)
        self._apply_routing()

    async def apply_changes(self, changes: Sequence[OptionChange]) -> bool:
        """Apply new values of options, all of them or none, without touching running requests. A checkpoint.

        The files of ``tls_cert`` and ``tls_key`` are read again, too. Works while the server runs, and while not.

        Args:
            changes: what to change. Those that need a restart are left out.

        Returns:
            Whether the files of the certificate had changed.

        Raises:
            TypeError, OptionsError: a value cannot be used.
            ClusterError: the certificate cannot be used.
        """
        live = [change for change in changes if change.applies == "at once"]
        wanted = attrs.evolve(self._options, server=attrs.evolve(self._options.server))
        for change in live:
            assign_option(wanted, change.option, change.after)
        show_certificates: Callable[[], bool] = lambda: False  # noqa: E731
        if self._node is not None:
            show_certificates = await self._node.read_certificates()
        else:
            await trio.lowlevel.checkpoint()
        # The only step that may fail. From here on nothing waits, so that no request sees a part of the changes.
        self._apply_aliases(wanted)
        for change in live:
            assign_option(self._options, change.option, change.after)
        self._pool.resize()
        self._apply_routing()
        return show_certificates()

    def set_max_concurrency(self, n: int) -> None:
        """Set the number of requests that the handlers of this process run at once.

        Args:
            n: at least 1. If it is smaller than before, running requests go on.

        Raises:
            TypeError, OptionsError: ``n`` is not a number of at least 1.
        """
        self._options.server.max_concurrency = n
        self._pool.resize()

    def set_timeout(self, seconds: float) -> None:
        """Set the idle timeout of requests that arrive from now on.

        Args:
            seconds: how long a handler may take to its first output, and between outputs; ``math.inf``: no limit.

        Raises:
            TypeError, OptionsError: it is not a number of more than 0.
        """
        self._options.server.default_timeout = seconds

    def set_api_key(self, key: str | None) -> None:
        """Require this API key from now on.

        Args:
            key: visible ASCII characters without spaces; ``None``: require no key.

        Raises:
            TypeError, OptionsError: it is not such a key.
        """
        self._options.server.api_key = key

    def set_worker_listen_address(self, host: str | None, port: int = 0) -> None:
        """Let a worker also serve its own models on an address of its own, for debugging.

        Without effect in the other modes. While the worker runs, its API moves to the new address.

        Args:
            host: the address to listen on; ``None``: do not listen.
            port: 0 picks a free port; see :attr:`url`.
        """
        self._listen_address = None if host is None else (host, port)
        if self._node is not None:
            self._node.listen_on(self._listen_address)

    # Models

    def register_chat(
        self,
        name: str,
        handler: Handler,
        options: ChatModelOptions | None = None,
        *,
        count_tokens: Handler | None = None,
        max_concurrency: int | None = None,
        validate: bool = False,
    ) -> None:
        """Serve a chat model: ``/v1/chat/completions``, ``/v1/completions``, ``/v1/responses`` and ``/v1/messages``.

        Args:
            name: the name of the model.
            handler: a function of one of the documented shapes; it gets a :class:`ChatRequest`.
            options: what ``/v1/models`` shows about the model.
            count_tokens: a function of one of the documented shapes that returns how many tokens the prompt of a
                :class:`ChatRequest` has, an ``int``. With it, the model answers ``/v1/messages/count_tokens``. Its
                calls take none of the slots of this process, so it should take a short time. ``None``: that route is
                501 ``not_supported`` for this model.
            max_concurrency: how many of its requests run at once in this process; ``None``: as many as the process has
                slots. Further ones wait without taking a slot of the process, fairly, for up to ``queue_timeout``.
            validate: check answers to requests for structured output: if the client has asked for ``json_schema`` or
                ``json_object``, an answer that does not fit is a 500 ``invalid_structured_output``, at the end of a
                stream its error. Needs the extra ``validate``.

        Raises:
            ClusterError: ``validate`` is set, and the package that it needs is not installed.
            ValueError: the name is taken or not valid, or ``max_concurrency`` is less than 1.
            TypeError: the handler has none of the shapes.
        """
        self._models.register(
            "chat",
            name,
            handler,
            options,
            count_tokens,
            max_concurrency=max_concurrency,
            validate=validate,
        )

    def register_embedding(
        self,
        name: str,
        handler: Handler,
        options: ChatModelOptions | None = None,
        *,
        max_concurrency: int | None = None,
        hedge: bool = False,
    ) -> None:
        """Serve an embedding model, see :meth:`register_chat`; the handler gets an :class:`EmbeddingRequest`.

        With ``hedge``, a request whose answer is late is sent to another replica as well, if there is one: a second
        attempt where the first is later than 95 of 100 answers, for at most 5 % of the requests. The first answer is
        given to the client, and the other attempt is cancelled. The handler must be such that this does no harm.
        """
        self._models.register(
            "embedding", name, handler, options, max_concurrency=max_concurrency, hedge=hedge
        )

    def register_asr(
        self,
        name: str,
        handler: Handler,
        options: ChatModelOptions | None = None,
        *,
        max_concurrency: int | None = None,
        hedge: bool = False,
    ) -> None:
        """Serve a speech-to-text model, see :meth:`register_chat`; the handler gets an :class:`ASRRequest`.

        ``hedge`` as in :meth:`register_embedding`; streams are not hedged, nor are files of more than 1 MiB.
        """
        self._models.register("asr", name, handler, options, max_concurrency=max_concurrency, hedge=hedge)

    def register_tts(
        self,
        name: str,
        handler: Handler,
        options: ChatModelOptions | None = None,
        *,
        max_concurrency: int | None = None,
    ) -> None:
        """Serve a text-to-speech model, see :meth:`register_chat`; the handler gets a :class:`TTSRequest`."""
        self._models.register("tts", name, handler, options, max_concurrency=max_concurrency)

    def register_image_generation(
        self,
        name: str,
        handler: Handler,
        options: ChatModelOptions | None = None,
        *,
        max_concurrency: int | None = None,
    ) -> None:
        """Serve an image generation model, see :meth:`register_chat`; the handler gets an :class:`ImageGenRequest`."""
        self._models.register("image_generation", name, handler, options, max_concurrency=max_concurrency)

    def register_image_edit(
        self,
        name: str,
        handler: Handler,
        options: ChatModelOptions | None = None,
        *,
        max_concurrency: int | None = None,
    ) -> None:
        """Serve a model that edits images, see :meth:`register_chat`; the handler gets an :class:`ImageEditRequest`.

        One model may both generate and edit images: if an image generation model of this process has the name, it
        answers both from now on, and the other way round. Its options are then those of the first registration.
        """
        self._models.register("image_edit", name, handler, options, max_concurrency=max_concurrency)

    def register_rerank(
        self,
        name: str,
        handler: Handler,
        options: ChatModelOptions | None = None,
        *,
        max_concurrency: int | None = None,
        hedge: bool = False,
    ) -> None:
        """Serve a model that ranks documents, see :meth:`register_chat`; the handler gets a :class:`RerankRequest`.

        ``hedge`` as in :meth:`register_embedding`.
        """
        self._models.register("rerank", name, handler, options, max_concurrency=max_concurrency, hedge=hedge)

    def register_moderation(
        self,
        name: str,
        handler: Handler,
        options: ChatModelOptions | None = None,
        *,
        max_concurrency: int | None = None,
        hedge: bool = False,
    ) -> None:
        """Serve a moderation model, see :meth:`register_chat`; the handler gets a :class:`ModerationRequest`.

        Requests with images are refused unless ``options`` has ``supports_vision``. ``hedge`` as in
        :meth:`register_embedding`.
        """
        self._models.register(
            "moderation", name, handler, options, max_concurrency=max_concurrency, hedge=hedge
        )

    def chat(
        self,
        name: str,
        *,
        count_tokens: Handler | None = None,
        max_concurrency: int | None = None,
        validate: bool = False,
        **options: Any,
    ) -> Callable[[H], H]:
        """Decorate a chat handler: :meth:`register_chat` with the fields of :class:`ChatModelOptions`.

        Args:
            name: the name of the model.
            count_tokens, max_concurrency, validate: see :meth:`register_chat`.
            options: fields of :class:`ChatModelOptions`.

        Raises:
            TypeError: there is no name, as in ``@server.chat`` without parentheses.
        """
        return self._decorator(
            "chat", name, options, max_concurrency, count_tokens=count_tokens, validate=validate
        )

    def embedding(
        self, name: str, *, max_concurrency: int | None = None, hedge: bool = False, **options: Any
    ) -> Callable[[H], H]:
        """Decorate an embedding handler; see :meth:`register_embedding`."""
        return self._decorator("embedding", name, options, max_concurrency, hedge=hedge)

    def asr(
        self, name: str, *, max_concurrency: int | None = None, hedge: bool = False, **options: Any
    ) -> Callable[[H], H]:
        """Decorate a speech-to-text handler; see :meth:`register_asr`."""
        return self._decorator("asr", name, options, max_concurrency, hedge=hedge)

    def tts(self, name: str, *, max_concurrency: int | None = None, **options: Any) -> Callable[[H], H]:
        """Decorate a text-to-speech handler; see :meth:`register_tts`."""
        return self._decorator("tts", name, options, max_concurrency)

    def image_generation(
        self, name: str, *, max_concurrency: int | None = None, **options: Any
    ) -> Callable[[H], H]:
        """Decorate an image generation handler; see :meth:`register_image_generation`."""
        return self._decorator("image_generation", name, options, max_concurrency)

    def image_edit(
        self, name: str, *, max_concurrency: int | None = None, **options: Any
    ) -> Callable[[H], H]:
        """Decorate a handler that edits images; see :meth:`register_image_edit`."""
        return self._decorator("image_edit", name, options, max_concurrency)

    def rerank(
        self, name: str, *, max_concurrency: int | None = None, hedge: bool = False, **options: Any
    ) -> Callable[[H], H]:
        """Decorate a handler that ranks documents; see :meth:`register_rerank`."""
        return self._decorator("rerank", name, options, max_concurrency, hedge=hedge)

    def moderation(
        self, name: str, *, max_concurrency: int | None = None, hedge: bool = False, **options: Any
    ) -> Callable[[H], H]:
        """Decorate a moderation handler; see :meth:`register_moderation`."""
        return self._decorator("moderation", name, options, max_concurrency, hedge=hedge)

    def register_raw(
        self,
        name: str,
        handler: RawHandler | AsyncioHandler,
        options: ChatModelOptions | None = None,
        *,
        max_concurrency: int | None = None,
        via: Sequence[str] = (),
    ) -> None:
        """Serve a passthrough model: it answers every route, with bytes in and bytes out. For relays to other servers.

        Args:
            name: the name of the model.
            handler: a coroutine function that gets a :class:`~trio_cluster.RawCall` for each request. The body of the
                request has not been parsed, except to find the name of the model. One that was written for asyncio is
                wrapped in :func:`from_asyncio`, and gets an :class:`~trio_cluster.AsyncioRawCall`.
            options: what ``/v1/models`` shows about the model.
            max_concurrency: how many calls run at once; ``None``: any number. They do not take slots of this process.
            via: the ids of the clusters through which the model comes, if the other server is a cluster: its
                ``trio_cluster_via`` in ``/v1/models``.

        Raises:
            ValueError: the name is taken or not valid, the model came through this cluster, or
                ``max_concurrency`` is less than 1.
            TypeError: the handler is not a coroutine function.
        """
        self._models.register_raw(name, handler, options, max_concurrency, tuple(via))

    def route(self, path: str, model: str, handler: H | None = None) -> Any:
        """Let a model answer a route that is not part of the OpenAI API (a custom route).

        Args:
            path: begins with ``/v1/``. Requests to it use POST, and have a field ``model``.
            model: a model that this process serves, or the name of a new one.
            handler: a function of one of the documented shapes; it gets a :class:`CustomRequest`. Left out: the method
                returns a decorator.

        Returns:
            The handler, or the decorator.

        Raises:
            ValueError: the path is not valid, belongs to the OpenAI API, or is answered by this model already.
            TypeError: the handler has none of the shapes, or the path or the name of the model is no text.
        """
        if not isinstance(path, str) or not isinstance(model, str):
            raise TypeError(
                "a route needs a path and the name of a model: write @server.route('/v1/...', 'model')"
            )
        if handler is None:
            return partial(self.route, path, model)
        self._models.register_route(path, model, handler)
        return handler

    def alias(self, name: str, target: str | Sequence[str] | Mapping[str, float]) -> None:
        """Let clients ask for a model by another name; replaces an alias of this name that was added before.

        The name comes before a model that has it, too, and is subject to the ``models`` of keys; the names behind it
        are not. An alias in the options comes before one that is added here.

        Args:
            name: the alias.
            target: the name of a model or of another alias; or several of them, which are tried in this order; or a
                table of them with their weights, by which one is chosen, always the same for a conversation. An alias
                may name itself, which is the model of the same name. None of the models need be served.

        Raises:
            ValueError: a name or a weight is not valid, or aliases stand for each other in a circle.
            TypeError: the target is none of these.
        """
        self._router.catalog.aliases.add(name, target)

    def remove_alias(self, name: str) -> bool:
        """Forget an alias that :meth:`alias` has added; running requests go on.

        Returns:
            Whether there was one.
        """
        return self._router.catalog.aliases.remove(name)

    def set_aliases(self, aliases: AliasTargets | None) -> None:
        """Replace all aliases of the options, at once, also while the server runs; those of :meth:`alias` stay.

        Args:
            aliases: as in ``ClusterServerOptions.aliases``.

        Raises:
            ValueError, TypeError: see :meth:`alias`; nothing has changed then.
        """
        self._router.catalog.aliases.configure(aliases)
        self._options.aliases = aliases

    def _apply_aliases(self, options: ClusterServerOptions) -> None:
        try:
            self._router.catalog.aliases.configure(options.aliases)
        except ValueError as error:
            raise OptionsError(f"aliases: {error}") from None

    def unregister_model(self, name: str) -> bool:
        """Stop serving a model of this process; running requests go on.

        Returns:
            Whether this process served a model of this name.
        """
        return self._models.unregister(name)

    def list_models(self) -> list[str]:
        """Return the names of all models, sorted. On a master, those of its workers are included."""
        return self._router.catalog.names()

    def has_model(self, name: str) -> bool:
        """Return whether this node can answer requests for a model. On a master, those of its workers are included."""
        return self._router.catalog.info(name) is not None

    def _decorator(
        self,
        kind: Kind,
        name: str,
        options: dict[str, Any],
        max_concurrency: int | None,
        *,
        count_tokens: Handler | None = None,
        validate: bool = False,
        hedge: bool = False,
    ) -> Callable[[H], H]:
        if not isinstance(cast("object", name), str):
            function = getattr(name, "__name__", repr(name))
            raise TypeError(
                f"the decorator needs the name of the model: write @server.{kind}({function!r}) above {function}"
            )
        model_options = ChatModelOptions(**options)

        def register(handler: H) -> H:
            self._models.register(
                kind,
                name,
                handler,
                model_options,
                count_tokens,
                max_concurrency=max_concurrency,
                validate=validate,
                hedge=hedge,
            )
            return handler

        return register

    # Hooks

    def on_start(self, hook: F) -> F:
        """Run a function whenever the server starts, before it serves the models that are registered by then.

        Hooks run one after the other, in the order in which they were registered. Meanwhile ``/ready`` is 503, a worker
        does not register with its master, and a master serves the models of its workers. A hook may register models,
        which are served at once. The server has started when all hooks are done.

        To be used as a decorator.

        Args:
            hook: a function without arguments. An ``async def`` may have one ``yield``: what follows it runs when the
                server has ended, like a shut-down hook. A ``def`` is called in a thread, which is waited for even if
                the server is stopped meanwhile; it may return an async context manager.

        Returns:
            The hook.

        Raises:
            TypeError: it is not such a function.
            RuntimeError: the server runs already.

        The ``run*`` method raises a ``ClusterError`` if the hook fails.
        """
        self._add_hook(hook, stops=False)
        return hook

    def on_stop(self, hook: F) -> F:
        """Run a function whenever the server has ended, after the last request; to be used as a decorator.

        Hooks run in the reverse order, those of :meth:`on_start` with a ``yield`` among them. If a start-up hook has
        failed, only those run that were registered before it. If the server is cancelled, or stopped while it starts,
        an ``async def`` runs cancelled, and must shield what it awaits.

        Args:
            hook: an ``async def`` or a ``def``, without arguments. A ``def`` is called in a thread.

        Returns:
            The hook.

        Raises:
            TypeError: it is not such a function.
            RuntimeError: the server runs already.

        The ``run*`` method raises a ``ClusterError`` if the hook fails, after the others have run.
        """
        self._add_hook(hook, stops=True)
        return hook

    def _add_hook(self, hook: Hook, *, stops: bool) -> None:
        if self._node is not None:
            raise RuntimeError("hooks must be registered before the server runs")
        self._hooks.add(hook, stops=stops)

    async def _serve(self, serve: Callable[[], Awaitable[None]]) -> None:
        """Serve one node, or several one after the other, with the hooks before and after."""
        if not self._hooks:
            await serve()
            return

        def started() -> None:
            self._models.resume()
            self._starting = False
            if self._node is not None:
                self._node.finish_start()

        self._starting = True
        if self._node is not None:
            self._node.begin_start()
        self._models.suspend()
        try:
            await self._hooks.run(serve, started)
        finally:
            self._starting = False
            self._models.resume()

    # State

    @property
    def is_running(self) -> bool:
        """Whether one of the ``run*`` methods is running."""
        return self._node is not None

    @property
    def mode(self) -> ClusterMode | None:
        """The role of this server; ``None`` while it does not run."""
        return None if self._node is None else self._node.mode

    @property
    def url(self) -> str | None:
        """The URL of this process's API, as seen from this machine; ``None`` while it serves none."""
        return None if self._node is None else self._node.url

    @property
    def port(self) -> int | None:
        """The port of this process's API; ``None`` while it serves none."""
        return None if self._node is None else self._node.port

    @property
    def internal_port(self) -> int | None:
        """The port on which a master listens for workers; ``None`` in the other modes."""
        return None if self._node is None else self._node.internal_port

    @property
    def requires_key(self) -> bool:
        """Whether clients must send an API key: there is the option ``api_key``, or a key was made."""
        return self._options.server.api_key is not None or (
            self._node is not None and self._node.requires_key
        )

    @property
    def app(self) -> QuartTrio | None:
        """The Quart-Trio application, to which routes can be added; ``None`` on a worker, and while it does not run."""
        return None if self._node is None else self._node.app

    @property
    def router(self) -> Router:
        """The models that this node can answer for, its live calls, and the counters of all calls."""
        return self._router

    @property
    def registry(self) -> Router:
        """The former name of :attr:`router`; deprecated."""
        warnings.warn("ClusterServer.registry was renamed to router", DeprecationWarning, stacklevel=2)
        return self._router

    @property
    def pool(self) -> HandlerPool:
        """The slots of this process, and the tasks of its handlers."""
        return self._pool

    @property
    def on_demand(self) -> OnDemand:
        """What runs only while it is asked for, and the memory for that; see :doc:`models-on-demand`."""
        return self._pool.on_demand

    @property
    def limiter(self) -> Limiter | None:
        """Counts the requests of keys that have limits; ``None`` while the server does not run."""
        return None if self._node is None else self._node.limiter

    @property
    def stories(self) -> Stories | None:
        """What has become of requests; ``None`` while the server does not run."""
        return None if self._node is None else self._node.stories

    @property
    def worker_manager(self) -> WorkerManager | None:
        """The workers of a master; ``None`` in the other modes."""
        return None if self._node is None else self._node.worker_manager

    @property
    def worker_client(self) -> WorkerClient | None:
        """A worker's connections to its masters; ``None`` in the other modes."""
        return None if self._node is None else self._node.worker_client

    def _announce(self, info: ModelInfo) -> None:
        if self.worker_client is not None:
            self.worker_client.announce(info)

    def _withdraw(self, name: str) -> None:
        if self.worker_client is not None:
            self.worker_client.withdraw(name)

    # Running

    def main(self, argv: Sequence[str] | None = None) -> None:
        """Run this server as the command line would, as the whole program: the last line of a script. Blocks.

        ``python models.py`` is ``trio-cluster run --app models:server``, and takes its flags; ``python models.py
        master`` and ``python models.py worker HOST PORT`` are the other commands. Options come from this server, a
        file, the environment and flags, later ones winning. The log goes to standard error. SIGTERM and Ctrl-C drain
        and stop, a second one stops at once.

        Args:
            argv: the arguments; ``sys.argv[1:]`` if ``None``.

        Raises:
            SystemExit: it has failed, or help was asked for; errors have been printed, in one line. After a stop that
                was asked for, this returns.
        """
        # The command line stands above this module, and is not loaded where it is not used.
        program = importlib.import_module(".cli", __package__)
        if code := program.run_application(self, argv):
            raise SystemExit(code)

    def stop(self) -> None:
        """Request a graceful shutdown. Synchronous, idempotent; the ``run*`` method returns when it is done.

        New requests are refused, running ones have ``drain_timeout`` seconds to finish, and are then cancelled. Without
        effect while the server does not run.
        """
        if self._node is not None:
            self._node.stop()

    async def run(
        self, port: int | None = None, *, task_status: Started = trio.TASK_STATUS_IGNORED
    ) -> ClusterMode:
        """Run as the master if ``port`` is free, and as a worker if a master has it.

        With ``enable_cluster=False``, run as a standalone server.

        If the master has gone, one of its workers that were run in this way on the same machine gets its ports, and is
        the master from then on; the others join it. The handlers that run for clients of the old master are cancelled.
        Hooks run once, whatever the roles.

        Args:
            port: the port of the API; ``None``: the one in the options.
            task_status: started with the mode, when requests are accepted or the worker's models are registered for the
                first time.

        Returns:
            The mode in which it ran last, after it was stopped.

        Raises:
            ClusterPortError: another program than a trio_cluster master has the port, or another port is not available.
            HandshakeRefused: the master refused this worker.
            RuntimeError: the server runs already.
        """
        if not self._options.enable_cluster:
            return await self.run_as_standalone(port, task_status=task_status)
        port = self._options.server.port if port is None else port
        if self._node is not None:
            raise RuntimeError(f"the server runs already, as {self._node.mode}")
        first = await self._find_role(port)
        role, mode = cast("_Role | None", first), first.mode
        has_started = False

        def started() -> None:
            nonlocal has_started
            if not has_started:
                has_started = True
                task_status.started(mode)

        async def serve() -> None:
            nonlocal role, mode
            failure: Exception | None = None
            # The handlers of this process are those of one node after the other.
            async with self._pool.loops.opened(), trio.open_nursery() as nursery:
                await nursery.start(self._pool.serve)
                nursery.start_soon(self._pool.loops.watch, self._options.heartbeat_interval)
                try:
                    while role is not None:
                        mode = role.mode
                        role = await self._play(role, port, started)
                except Exception as error:
                    # Raised below, outside the nursery, which would wrap it in an exception group.
                    failure = error
                nursery.cancel_scope.cancel(reason="the server was stopped")
            if failure is not None:
                raise failure

        try:
            await self._serve(serve)
        finally:
            if role is not None and role.ports is not None:
                close_all([*role.ports[0], *role.ports[1]])
        return mode

    async def _find_role(self, port: int) -> _Role:
        """Find out whether this process is the master of a port, or a worker of the one that is.

        Raises:
            ClusterPortError: as for :meth:`run`.
        """
        for tries_left in reversed(range(_PROBE_TRIES)):
            try:
                return _Role(ports=await self._open_pair(port))
            except ClusterPortError as error:
                # If another port than the API's is taken, no master has the pair; only the user can resolve that.
                if error.port != port or not error.taken:
                    raise
                refusal = error
            host = local_address(self._options.internal_host or self._options.server.host)
            internal_port = self._options.internal_port or port + INTERNAL_OFFSET
            encrypted = self._options.server.has_tls
            network = TlsNetwork(self.network, unverified_context()) if encrypted else self.network
            if await is_master(network, host, internal_port, _PROBE_TIMEOUT):
                if self._options.server.tls != "off" and await self._is_neighbour(port):
                    return await self._neighbour_role(host, port, internal_port)
                return _Role(dialer=await self._dialer_to(host, internal_port, tls=encrypted))
            if tries_left:
                await trio.sleep(_PROBE_PAUSE)
        raise ClusterPortError(
            port,
            "taken by a program that is not a trio_cluster master (none answers on port "
            f"{internal_port}); stop that program, or choose another port",
        ) from refusal

    async def _play(self, role: _Role, port: int, started: Callable[[], None]) -> _Role | None:
        """Serve in one role until it is over, and return the next one; ``None``: the server was stopped.

        A worker is the master next if that has gone and this process has got its ports.
        """
        if role.ports is not None:
            await self._serve_as_master(*role.ports, port, started, name=role.name, auto=True)
            return None
        assert role.dialer is not None
        with self._node_for(ClusterMode.WORKER, role.name, serves_pool=False) as node:

            def answers() -> bool:
                client = node.worker_client
                session = None if client is None else client.session
                patience = _SILENT_HEARTBEATS * self._options.heartbeat_interval
                # The handshake is the first answer. A master that is frozen is dialled again and again, and the silence
                # on each connection is a short one.
                return (
                    session is not None
                    and session.peer is not None
                    and session.silence(trio.current_time()) < patience
                )

            serving = trio.CancelScope()
            contender = Contender(
                role.dialer,
                lambda: self._open_pair(port),
                answers,
                lambda: serving.cancel(reason="this process is the master from now on"),
            )
            has_joined = False

            def joined() -> None:
                nonlocal has_joined
                has_joined = True
                started()

            next_role: _Role | None = None
            try:
                with serving:
                    try:
                        await node.serve_as_worker(ListedMasters([contender]), joined)
                    except HandshakeRefused as error:
                        # At first only the user can resolve that. Later, another program may have the port for a while.
                        if not has_joined:
                            raise
                        next_role = await self._find_role_again(node, port, error)
                if contender.ports is not None and not node.stop_requested:
                    fields = {"port": port, "workers_join_at": port_of(contender.ports[1])}
                    text = "the master has gone: this process has its ports, and is the master now"
                    node_logger.warning(text, extra={"fields": fields})
                    next_role = _Role(ports=contender.ports, name=node.name)
            finally:
                if next_role is None and contender.ports is not None:
                    close_all([*contender.ports[0], *contender.ports[1]])
            return next_role

    async def _find_role_again(self, node: Node, port: int, error: ClusterError) -> _Role | None:
        """Look for a role until there is one, or the server is stopped. A checkpoint."""
        while True:
            node_logger.error("no master, and no ports for this process to be one: %s; trying again", error)
            if await node.wait_stop(_ROLE_PAUSE):
                return None
            try:
                role = await self._find_role(port)
            except ClusterError as again:
                error = again
                continue
            if node.stop_requested:
                if role.ports is not None:
                    close_all([*role.ports[0], *role.ports[1]])
                return None
            return attrs.evolve(role, name=role.name or node.name)

    async def run_as_master(
        self,
        port: int | None = None,
        *,
        take_over: bool = False,
        task_status: Started = trio.TASK_STATUS_IGNORED,
    ) -> ClusterMode:
        """Run as a master: serve the API on ``port``, and listen for workers on ``port + 1000``.

        Args:
            port: the port of the API; 0 picks a free pair of ports that are 1000 apart; ``None``: the one in the
                options.
            take_over: if a master of this user serves on ``port``, with the same state directory, take its place. It
                finishes its answers and ends; no request is refused meanwhile, and none is cut. If this process cannot
                serve, the other one goes on. If there is none, this process opens the ports itself.
            task_status: started with the mode when requests and workers are accepted.

        Returns:
            ``ClusterMode.MASTER``, after it was stopped.

        Raises:
            ClusterPortError: it cannot listen on a port.
            ClusterError: the running master cannot be taken over, and goes on; the message says why.
            OptionsError: the option ``processes`` asks for several.
            RuntimeError: the server runs already.
        """
        port = self._options.server.port if port is None else port
        if self._options.processes > 1:
            raise OptionsError("processes: only the command line (trio-cluster master) starts several")
        if take_over:
            succession = await self._ask_for_sockets(port)
            if succession is not None:
                return await self._run_as_successor(succession, port, task_status)
            logging.getLogger("trio_cluster.node").info(
                "there is no master to take over; this process starts as one"
            )
        external, internal = await self._open_pair(port)
        await self._serve_as_master(external, internal, port, lambda: task_status.started(ClusterMode.MASTER))
        return ClusterMode.MASTER

    async def run_in_group(self, member: Member, *, started: Callable[[ClusterMode], None]) -> ClusterMode:
        """Run as one of the processes of a master, which its supervisor has started. For the command line.

        Args:
            member: this process in its group, with the sockets to serve.
            started: called with the mode when requests and workers are accepted. Synchronous.

        Returns:
            ``ClusterMode.MASTER``, after it was stopped.

        Raises:
            ClusterError, RuntimeError: as :meth:`run_as_master`.
        """
        self._options.server.worker_id = f"{member.name}-{member.process}"
        try:
            await self._serve_as_master(
                member.clients,
                member.workers,
                self._options.server.port,
                lambda: started(ClusterMode.MASTER),
                member=member,
            )
        finally:
            member.close()
        return ClusterMode.MASTER

    async def _ask_for_sockets(self, port: int) -> Succession | None:
        """Ask the master that serves on this port for its sockets; ``None`` if there is none.

        Raises:
            ClusterError: it refuses, or has sockets for other addresses than the options name.
        """
        if port == 0:
            raise ClusterError("cannot take over: the port of the running master is needed")
        has_addresses = isinstance(self.network, Sockets)
        if not isinstance(self.network, HandsOver):
            raise ClusterError("cannot take over: listeners of this network cannot be handed over")
        handovers = self.network.handovers
        directory = None if self._options.state_dir is not None else handovers.directory
        succession = await Succession.ask(handovers, (directory or self._state_path(port)) / SOCKET_NAME)
        if succession is None or not has_addresses:
            return succession
        options = self._options
        internal_host = options.internal_host or options.server.host
        internal_port = options.internal_port or port + INTERNAL_OFFSET
        try:
            for sockets, host, number in (
                (succession.clients, options.server.host, port),
                (succession.workers, internal_host, internal_port),
            ):
                await check_addresses(
                    [sock for sock in sockets if isinstance(sock, socket.socket)], host, number
                )
        except BaseException:
            for sock in (*succession.clients, *succession.workers):
                sock.close()
            succession.close()
            raise
        return succession

    async def _run_as_successor(self, succession: Succession, port: int, task_status: Started) -> ClusterMode:
        assert isinstance(self.network, HandsOver)
        external = self.network.handovers.listeners_of(succession.clients)
        internal = self.network.handovers.listeners_of(succession.workers)
        try:
            await self._serve_as_master(
                external,
                internal,
                port,
                lambda: task_status.started(ClusterMode.MASTER),
                succession=succession,
            )
        finally:
            succession.close()
        return ClusterMode.MASTER

    async def run_as_worker(
        self,
        master_host: str | None = None,
        master_port: int | None = None,
        *,
        masters: Sequence[tuple[str, int]] = (),
        masters_from: tuple[str, int] | None = None,
        tls: bool = False,
        task_status: Started = trio.TASK_STATUS_IGNORED,
    ) -> ClusterMode:
        """Run as a worker: serve the models of this process to masters, and reconnect whenever a link is lost.

        The masters are given in one of three ways: one by ``master_host`` and ``master_port``, several by ``masters``,
        or those at all addresses of a DNS name by ``masters_from``. Each has a link of its own, and all models. The
        slots (``max_concurrency``) are those of this process, whichever master a request comes from. What happens at
        one master does not concern the others; a master that is away is dialled again and again.

        Args:
            master_host: the master's host name or address.
            master_port: the master's internal port.
            masters: the host and the internal port of each master.
            masters_from: a DNS name, and the internal port of all masters. The name is resolved every five seconds. New
                addresses are dialled. The link to an address that the name does not have any more is drained: its
                requests are finished, and it is closed. A resolution that fails changes nothing.
            tls: whether to connect with TLS. A master's certificate must be for its host (for the name, with
                ``masters_from``), by an authority that the system or the option ``ca_file`` trusts.
            task_status: started with the mode when the models are registered for the first time, at any master.

        Returns:
            ``ClusterMode.WORKER``, after it was stopped.

        Raises:
            HandshakeRefused: all masters refused this worker (wrong token, incompatible protocol), or what listens
                there is not a master. If only some did, that is logged, and they are tried again every minute. Failures
                that may pass, such as a master that cannot be reached, are retried instead.
            TypeError: the masters are not given in exactly one of the ways.
            ValueError: ``masters`` has no master.
            ClusterPortError: it cannot listen on the address of :meth:`set_worker_listen_address`.
            ClusterError: ``ca_file`` cannot be used.
            RuntimeError: the server runs already.
        """
        if master_host is not None and master_port is not None and masters == () and masters_from is None:
            masters = [(master_host, master_port)]
        elif (
            master_host is not None
            or master_port is not None
            or (masters != ()) == (masters_from is not None)
        ):
            raise TypeError("give master_host and master_port, or masters, or masters_from")
        context: ssl.SSLContext | None = None
        if tls:
            ca_file = path_of(self._options.ca_file)
            context = await start_in_thread(lambda: client_context(ca_file=ca_file))
        network = self.network if context is None else TlsNetwork(self.network, context)
        if masters_from is not None and context is not None:
            # What is connected to is an address, and the certificate is for the name.
            network = TlsNetwork(self.network, context, masters_from[0])
        return await self._run_as_worker(_masters(network, masters, masters_from), None, task_status)

    async def _dialer_to(self, host: str, port: int, *, tls: bool) -> Dialer:
        network = self.network
        if tls:
            ca_file = path_of(self._options.ca_file)
            context = await start_in_thread(lambda: client_context(ca_file=ca_file))
            network = TlsNetwork(network, context)
        return Dialer(network, host, port)

    async def run_as_member(
        self,
        token: str | None = None,
        *,
        masters: Sequence[tuple[str, int]] = (),
        masters_from: tuple[str, int] | None = None,
        task_status: Started = trio.TASK_STATUS_IGNORED,
    ) -> ClusterMode:
        """Run as a worker of a cluster that it was invited to, or has joined before; see :meth:`run_as_worker`.

        Joining makes a private key and gets a certificate for it, which are kept in ``state_dir``, and are shown to the
        master from then on.

        Args:
            token: what ``trio-cluster invite`` has printed; ``None``: the worker has joined before.
            masters, masters_from: as for :meth:`run_as_worker`, if the cluster has several masters, which must have one
                authority. Without them, the worker has a link to one master, at one of the addresses of the invitation.
            task_status: as for :meth:`run_as_worker`.

        Returns:
            ``ClusterMode.WORKER``, after it was stopped.

        Raises:
            ClusterError: the token is not valid, or was refused; no master could be reached; or what is kept cannot be
                used. The message says which.
            HandshakeRefused, ClusterPortError, RuntimeError, TypeError, ValueError: as :meth:`run_as_worker`.
        """
        if masters != () and masters_from is not None:
            raise TypeError("give masters or masters_from, and not both")
        # The package that makes certificates is an extra.
        try:
            security = importlib.import_module(".security.joining", __package__)
            membership = importlib.import_module(".security.membership", __package__)
        except ImportError as error:
            raise ClusterError(
                "to join a cluster, the package cryptography is needed: pip install cryptography"
            ) from error
        directory = path_of(self._options.state_dir) or default_state_dir(os.environ, "worker")

        def open_membership() -> Any:
            state = StateDir(directory)
            before = membership.load_membership(state)
            if token is not None and before is not None and before[0].token != membership.token_digest(token):
                logger.warning(
                    "this worker joins anew: its membership as '%s' in %s is replaced; two workers of one machine need "
                    "a --state-dir each",
                    before[0].name,
                    directory,
                )
            if token is not None:
                name = self._options.server.worker_id or f"{socket.gethostname()[:40]}-{randomness.token(3)}"
                return state, security.join(state, token, name)
            return state, membership.load_membership(state)

        state, found = await start_in_thread(open_membership, abandon_on_cancel=True)
        if found is None:
            raise ClusterError(
                f"this worker has not joined a cluster (there is nothing in {state.path}); "
                "give the master's HOST PORT, or join with --join TOKEN"
            )
        member, certificate = found
        if self._options.server.worker_id not in (None, member.name):
            raise ClusterError(
                f"this worker has joined as '{member.name}'; leave --name out, or join again with a new invitation"
            )
        addresses = [split_address(address) for address in member.addresses]
        internal_port = self._options.internal_port
        dialer = MemberDialer(self.network, state, member, certificate, addresses, internal_port)
        source: Masters = ListedMasters([dialer])
        if masters != () or masters_from is not None:
            # The dialer of the invitation renews the certificate, and connects to nothing.
            source = _masters(dialer.network, masters, masters_from, dialer)
        return await self._run_as_worker(source, member.name, task_status)

    async def _is_neighbour(self, port: int) -> bool:
        """Tell whether this process joins a master with TLS on this machine by the authority, which it may read.

        With a token it may as well be that of another user, whose authority it has to trust otherwise.
        """
        options = self._options
        if options.cluster_token is None:
            return True
        if options.ca_file is not None:
            return False
        directory = trio.Path(self._state_path(port))
        return await (directory / "ca.pem").exists()

    def _state_path(self, port: int) -> Path:
        return path_of(self._options.state_dir) or default_state_dir(os.environ, f"master-{port}")

    async def _neighbour_role(self, host: str, port: int, internal_port: int) -> _Role:
        """Return the role of a worker of the master on this machine, whose state is also this process's own."""
        path = self._state_path(port)
        membership = importlib.import_module(".security.membership", __package__)

        def open_membership() -> Any:
            state = StateDir(path)
            return state, *membership.neighbour(state, datetime.datetime.now(datetime.UTC))

        state, member, certificate = await start_in_thread(open_membership)
        try:
            dialer = NeighbourDialer(self.network, state, member, certificate, (host, port), internal_port)
        finally:
            certificate.unlink(missing_ok=True)
        return _Role(dialer=dialer, name=member.name)

    async def _run_as_worker(self, masters: Masters, name: str | None, task_status: Started) -> ClusterMode:
        with self._node_for(ClusterMode.WORKER, name) as node:
            await self._serve(lambda: node.serve_as_worker(masters, lambda: task_status.started(node.mode)))
        return ClusterMode.WORKER

    async def run_as_standalone(
        self, port: int | None = None, *, task_status: Started = trio.TASK_STATUS_IGNORED
    ) -> ClusterMode:
        """Run as a standalone server: serve the API on ``port``, with the models of this process only.

        Args:
            port: the port of the API; 0 picks a free one; ``None``: the one in the options.
            task_status: started with the mode when requests are accepted.

        Returns:
            ``ClusterMode.STANDALONE``, after it was stopped.

        Raises:
            ClusterPortError: it cannot listen on the port.
            RuntimeError: the server runs already.
        """
        with self._node_for(ClusterMode.STANDALONE) as node:
            host = self._options.server.host
            port = self._options.server.port if port is None else port
            listeners = await self.network.listen(host, port)
            try:
                serve = partial(
                    node.serve_as_standalone,
                    listeners,
                    lambda: task_status.started(node.mode),
                    state_name=f"standalone-{port}",
                    keeps_state=self._keeps_state(port),
                )
                await self._serve(serve)
            finally:
                close_all(listeners)
        return ClusterMode.STANDALONE

    async def _serve_as_master(
        self,
        external: Listeners,
        internal: Listeners,
        port: int,
        started: Callable[[], None],
        *,
        name: str | None = None,
        auto: bool = False,
        succession: Succession | None = None,
        member: Member | None = None,
    ) -> None:
        """Serve on the ports of a master until stopped. In auto mode, the caller runs the hooks and the pool."""
        try:
            with self._node_for(ClusterMode.MASTER, name, serves_pool=not auto) as node:
                serve = partial(
                    node.serve_as_master,
                    external,
                    internal,
                    started,
                    state_name=f"master-{port}" if self._keeps_state(port) else None,
                    succession=succession,
                    member=member,
                )
                await (serve() if auto else self._serve(serve))
        finally:
            close_all([*external, *internal])

    def _apply_routing(self) -> None:
        """Use the policy that the options name, unless the router was given another one."""
        router, (named, policy) = self._router, self._routing
        if router.policy is policy and named != self._options.routing:
            named = self._options.routing
            router.policy = LeastCost(router.catalog.cache_tokens) if named == "cost" else LeastBusy()
            self._routing = named, router.policy

    def _keeps_state(self, port: int) -> bool:
        """Tell whether a node on this port has a state directory, if the options have none."""
        # On a port that is another one each time, or in a simulation, there is nothing to come back to.
        return port != 0 and isinstance(self.network, Sockets)

    async def _open_pair(self, port: int) -> tuple[Listeners, Listeners]:
        options = self._options
        internal_host = options.internal_host or options.server.host
        return await open_pair(self.network, options.server.host, port, internal_host, options.internal_port)

    @contextmanager
    def _node_for(
        self, mode: ClusterMode, name: str | None = None, *, serves_pool: bool = True
    ) -> Iterator[Node]:
        if self._node is not None:
            raise RuntimeError(f"the server runs already, as {self._node.mode}")
        self._apply_routing()
        self._apply_aliases(self._options)
        self._node = Node(
            mode,
            self._options,
            self._router,
            self._pool,
            self.network,
            self.authenticator,
            name=name,
            serves_pool=serves_pool,
            reload=self.reloader,
            starter=self.successor_starter,
        )
        if self._starting:
            self._node.begin_start()
        self._node.listen_on(self._listen_address)
        try:
            yield self._node
        finally:
            self._node = None


def _masters(
    network: Network,
    listed: Sequence[tuple[str, int]],
    named: tuple[str, int] | None,
    helper: Dialer | None = None,
) -> Masters:
    """Return the masters of a list, or those that a name has.

    Args:
        network: opens connections to them.
        listed: their hosts and ports.
        named: the name, and the port of all.
        helper: is run meanwhile.

    Raises:
        ValueError: there is none.
    """
    if named is not None:
        port = named[1]
        return ResolvedMasters(
            named[0], lambda address: Dialer(network, address, port, shown_address(address, port)), helper
        )
    if not listed:
        raise ValueError("masters: at least one is needed")
    only = len(listed) == 1
    return ListedMasters(
        [
            Dialer(network, host, port, None if only else shown_address(host, port))
            for host, port in dict.fromkeys((host, port) for host, port in listed)
        ],
        helper,
    )

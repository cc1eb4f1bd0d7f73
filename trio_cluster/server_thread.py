"""A server in a thread of its own, inside a program that does not run on trio: FastAPI, asyncio, or none of these.

The thread runs trio, and in it the server, as it would run anywhere else. The program that embeds it gets a
:class:`ServerThread`, whose methods may be called from every other thread, and block. What the server raises before it
serves is raised by :func:`serve_in_thread`; what ends it later is logged at once, and raised by
:meth:`ServerThread.wait` and :meth:`ServerThread.stop`. Nothing is lost, and nothing is raised in a place that did not
ask.

The thread ends when the server has ended, and the server when its work has. A program that ends without stopping the
server cancels it at its exit, and gives it a moment for the cleanup of its handlers.
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, TypeVar, TypeVarTuple

import trio

from .core.threads import NoThread, start_thread
from .errors import ClusterError
from .options import ClusterMode
from .server import ClusterServer

__all__ = ["ServerThread", "serve_in_thread"]

logger = logging.getLogger("trio_cluster.node")

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

#: Seconds for which a program that ends waits for a server that it has not stopped.
_EXIT_TIMEOUT: Final = 10.0


def serve_in_thread(
    server: ClusterServer,
    run: Callable[..., Awaitable[ClusterMode]] | None = None,
    *args: Any,
    **kwargs: Any,
) -> ServerThread:
    """Run a server in a thread, and return when it serves. For programs that do not run on trio. Blocks.

    ``serve_in_thread(server, port=8080)`` is ``server.run(port=8080)`` in a thread, and
    ``serve_in_thread(server, server.run_as_worker, "10.0.0.1", 9080)`` is a worker. From an asyncio program, call it as
    ``await asyncio.to_thread(serve_in_thread, server)``.

    Args:
        server: must not be running. Its models may be registered before; afterwards, by
            :meth:`ServerThread.run_sync`.
        run: one of the server's ``run*`` methods; ``None``: its method ``run``.
        args, kwargs: the arguments of that method.

    Returns:
        The server that runs. It accepts requests; the models of a worker are registered.

    Raises:
        ClusterError: the system starts no further thread; or the server could not be started, see its method.
        BaseException: anything else that its method raises.
    """
    thread = ServerThread(server, run or server.run, args, kwargs)
    thread.start()
    return thread


class ServerThread:
    """A server that runs in a thread; :func:`serve_in_thread` makes it.

    As a context manager, it stops the server at the end of the block. All methods may be called from every thread but
    the server's own, and block, except for :meth:`cancel`.
    """

    def __init__(
        self,
        server: ClusterServer,
        run: Callable[..., Awaitable[ClusterMode]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self._server = server
        self._run = run
        self._args = args
        self._kwargs = kwargs
        self._scope = trio.CancelScope()
        self._token: trio.lowlevel.TrioToken | None = None
        self._thread: threading.Thread | None = None
        # Set when the server serves, and when it has ended without.
        self._settled = threading.Event()
        self._serves = False
        self._ended = threading.Event()
        self._error: BaseException | None = None

    @property
    def is_running(self) -> bool:
        """Whether the server has not ended."""
        return not self._ended.is_set()

    @property
    def mode(self) -> ClusterMode | None:
        """The role of the server; ``None`` when it has ended."""
        return self._server.mode

    @property
    def url(self) -> str | None:
        """The URL of the server's API, as seen from this machine; ``None`` while it serves none."""
        return self._server.url

    @property
    def port(self) -> int | None:
        """The port of the server's API; ``None`` while it serves none."""
        return self._server.port

    def start(self) -> None:
        """Start the thread, and wait until the server serves; see :func:`serve_in_thread`, which has called this."""
        try:
            self._thread = start_thread(self._main, name="trio_cluster server")
        except NoThread as error:
            self._ended.set()
            raise ClusterError(error.message) from error
        try:
            self._settled.wait()
        except BaseException:
            # Ctrl-C, for instance.
            self.cancel()
            self._ended.wait()
            raise
        if not self._serves:
            self.wait()

    def run_sync(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Call a synchronous function in the server's thread, to change the server while it runs.

        For instance ``thread.run_sync(server.register_chat, "name", handler)``. The function must not block.

        Args:
            function: called with ``args``.

        Returns:
            What it returns.

        Raises:
            RuntimeError: the server has ended; or this is its own thread.
            BaseException: what the function raised.
        """
        if self._token is None or not self.is_running:
            raise RuntimeError("the server has ended")
        try:
            return trio.from_thread.run_sync(function, *args, trio_token=self._token)
        except trio.RunFinishedError:
            raise RuntimeError("the server has ended") from None

    def stop(self, timeout: float | None = None) -> None:
        """Stop the server gracefully, and wait until it has ended. Idempotent.

        New requests are refused, running ones have ``drain_timeout`` seconds to finish, and are then cancelled.

        Args:
            timeout: seconds to wait; ``None``: as long as it takes.

        Raises:
            TimeoutError: it has not ended within that time. It goes on stopping.
            RuntimeError: this is the server's own thread.
            BaseException: what has ended the server.
        """
        self._soon(self._server.stop)
        self.wait(timeout)

    def cancel(self) -> None:
        """Cancel the server and everything that it does, at once. Does not wait. Idempotent."""
        self._soon(self._scope.cancel)

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the server has ended.

        Args:
            timeout: seconds to wait; ``None``: as long as it takes.

        Raises:
            TimeoutError: it has not ended within that time.
            RuntimeError: this is the server's own thread.
            BaseException: what has ended the server.
        """
        if self._thread is threading.current_thread():
            raise RuntimeError("the server's own thread cannot wait for its end; call server.stop() there")
        if not self._ended.wait(timeout):
            raise TimeoutError(f"the server has not ended within {timeout:g} s")
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def __enter__(self) -> ServerThread:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.stop()
        except BaseException:  # noqa: ASYNC103
            # The block's own error is the one to raise; the server's has been logged.
            if error is None:
                raise

    def _soon(self, function: Callable[[], object]) -> None:
        if self._token is not None:
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(function)

    # In the thread

    def _main(self) -> None:
        atexit.register(self._at_exit)
        try:
            trio.run(self._serve)
        except BaseException as error:  # noqa: ASYNC103  (the loop has ended; whoever waits for it is told)
            self._error = error
            if self._serves:
                logger.error("the server has failed in its thread", exc_info=error)
        finally:
            atexit.unregister(self._at_exit)
            self._ended.set()
            self._settled.set()

    async def _serve(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with self._scope:
            await self._run(*self._args, **self._kwargs, task_status=_Status(self._on_started))

    def _on_started(self) -> None:
        self._serves = True
        self._settled.set()

    def _at_exit(self) -> None:
        self.cancel()
        self._ended.wait(_EXIT_TIMEOUT)


class _Status:
    """What a server reports its start to, as to ``trio.Nursery.start``."""

    def __init__(self, on_started: Callable[[], None]) -> None:
        self._on_started = on_started

    def started(self, value: object = None) -> None:
        """Take note that the server serves."""
        self._on_started()

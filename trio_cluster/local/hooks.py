"""Start-up and shut-down hooks: what a user's program does before the first request, and after the last one.

Theory of operation
===================

The hooks have one task of their own. It runs the start-up hooks one after the other, in the order in which they were
registered, waits until the server has ended, and then leaves what they have opened in the reverse order, together with
the shut-down hooks. Since one task enters and leaves them, a hook may keep a nursery or a cancel scope open around its
``yield``, as in any async context manager.

The server runs meanwhile in another task, so that ``/health`` answers, and a master forwards requests to its workers,
while a model is loaded. It ends before the first hook is left, with every request.

Whatever ends the one ends the other: the server ends if a hook fails, also later, in a task that the hook has started;
start-up hooks are cancelled if the server is stopped before they are done, and those that are done already are then
left inside the cancelled scope. A function in a thread cannot be interrupted, and is waited for.
"""

from __future__ import annotations

import inspect
import logging
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

import attrs
import trio

from ..core.threads import start_in_thread
from ..errors import ClusterError

__all__ = ["Hook", "Hooks"]

logger = logging.getLogger("trio_cluster.node")

Hook: TypeAlias = Callable[[], Any]


@attrs.frozen
class _Entry:
    """A hook: a start-up hook, unless it ``stops``."""

    hook: Hook
    stops: bool

    def __str__(self) -> str:
        name = getattr(self.hook, "__qualname__", None) or type(self.hook).__qualname__
        return f"the {'shut-down' if self.stops else 'start-up'} hook '{name.rpartition('<locals>.')[2]}'"


class Hooks:
    """The hooks of a server. See the top of this module."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    def __bool__(self) -> bool:
        return bool(self._entries)

    def add(self, hook: Hook, *, stops: bool) -> None:
        """Add a hook. Synchronous.

        Args:
            hook: a function without arguments: ``async def``, with at most one ``yield`` in a start-up hook; or
                ``def``, which is called in a thread, and may return an async context manager.
            stops: it is a shut-down hook.

        Raises:
            TypeError: it is not such a function.
        """
        entry = _Entry(hook, stops)
        if not callable(hook):
            raise TypeError(f"a hook must be a function, not {hook!r}")
        if inspect.isgeneratorfunction(hook):
            raise TypeError(f"{entry} yields; write it as an async def")
        if stops and inspect.isasyncgenfunction(hook):
            raise TypeError(f"{entry} yields; only a start-up hook may")
        try:
            inspect.signature(hook).bind()
        except TypeError:
            raise TypeError(f"{entry} must be callable without arguments") from None
        except ValueError:
            # Some functions in C show no signature.
            pass
        self._entries.append(entry)

    async def run(self, serve: Callable[[], Awaitable[None]], on_started: Callable[[], None]) -> None:
        """Run the start-up hooks, the server meanwhile, and the shut-down hooks after both. A checkpoint.

        When cancelled, the server is cancelled first. The hooks are left then, inside the cancelled scope.

        Args:
            serve: serves until it is stopped.
            on_started: called when all start-up hooks are done. Synchronous.

        Raises:
            ClusterError: a hook has failed; the message says which, and why.
            Exception: what ``serve`` has raised.
        """
        served = trio.Event()
        serving, starting = trio.CancelScope(), trio.CancelScope()
        is_starting = True
        errors: list[Exception] = []

        async def run_hooks() -> None:
            nonlocal is_starting
            try:
                # The scope is around everything, since a hook may leave a nursery of its own open.
                with starting:
                    async with AsyncExitStack() as stack:
                        try:
                            for entry in self._entries:
                                await stack.enter_async_context(_opened(entry, errors))
                            is_starting = False
                            on_started()
                            await served.wait()
                        finally:
                            # Requests may use what the hooks have opened, until the last one has ended.
                            serving.cancel(reason="the hooks have ended")
                            with trio.CancelScope(shield=True):
                                await served.wait()
            except Exception as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_hooks)
            try:
                with serving:
                    await serve()
            except Exception as error:
                errors.insert(0, error)
            finally:
                if is_starting:
                    starting.cancel(reason="the server has ended")
                served.set()
        # Raised here, outside the nursery, which would wrap it in an exception group.
        if errors:
            raise errors[0]


@asynccontextmanager
async def _opened(entry: _Entry, failures: list[Exception]) -> AsyncIterator[None]:
    """Run a start-up hook now, and leave it at the end of the block; or run a shut-down hook at the end.

    Args:
        entry: the hook.
        failures: gets the failure of a hook that has started. It keeps no other hook from ending as it should.

    Raises:
        ClusterError: the hook could not start.
    """
    has_started = False
    try:
        if entry.stops:
            has_started = True
            try:
                yield
            finally:
                await _call(entry.hook, always=True)  # noqa: ASYNC102  (what it awaits may be cancelled)
            return
        began = trio.current_time()
        async with AsyncExitStack() as stack:
            if inspect.isasyncgenfunction(entry.hook):
                result: Any = asynccontextmanager(entry.hook)()
            else:
                result = await _call(entry.hook)
            if hasattr(result, "__aenter__") and hasattr(result, "__aexit__"):
                await stack.enter_async_context(result)
            has_started = True
            took = round(trio.current_time() - began, 3)
            logger.info("%s is done", entry, extra={"fields": {"seconds": took}})
            yield
    except Exception as error:
        cause = _innermost(error)
        if isinstance(cause, ClusterError):
            # That of a later hook, on its way out of this one.
            raise cause  # noqa: B904
        failure = ClusterError(f"{entry} failed: {_describe(cause)}")
        if not has_started:
            raise failure from error
        failure.__cause__ = error
        failures.append(failure)


async def _call(hook: Hook, *, always: bool = False) -> Any:
    """Call a hook, and return what it returns.

    Args:
        hook: the function.
        always: call it also if the current task is cancelled; what it awaits is cancelled then.
    """
    if inspect.iscoroutinefunction(hook):
        return await hook()
    with trio.CancelScope(shield=always):
        result = await start_in_thread(hook)
    return await result if inspect.isawaitable(result) else result


def _innermost(error: BaseException) -> BaseException:
    """Return the exception in a group that holds a single one, however deep."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _describe(error: BaseException) -> str:
    """Return an error in one line, with the place in the user's code."""
    text = " ".join(f"{type(error).__name__}: {error}".removesuffix(": ").split())
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    return f"{text} ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else text

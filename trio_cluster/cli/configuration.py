"""The configuration of a running node: what it was read from, and how it is read again.

Theory of operation
===================

Reading again does what a start does: the file, the environment and the flags over the application's own options, with
the same checks and the same errors. The result is compared with what was read last, and what has changed is handed to
the server, which applies what can be applied while it runs, all or nothing (``ClusterServer.apply_changes``).

It is compared with what was *read* and not with what the server has now: what a program has changed in its own server
stays, unless the configuration has changed at this place. What needs a restart is compared with the start, and is
reported each time until there is one.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import attrs
import trio

from ..core.threads import start_in_thread
from ..errors import ClusterError
from ..options import ClusterServerOptions, OptionChange, Reloaded, assign_option, changed_options
from . import logs
from .schema import shown_value
from .settings import load_node_settings

if TYPE_CHECKING:
    # For the type: a command that only asks a node does not import a server.
    from ..server import ClusterServer

__all__ = ["Configuration", "reload_on_signal"]

logger = logging.getLogger(__name__)

_LOG: Final = ("log_level", "log_format")
_SERVE: Final = "serve"
_NODE: Final = ("app", "worker.masters")


class Configuration:
    """What a server was started with, and can be read again.

    Args:
        server: gets what has changed.
        file: the file of options.
        options: as they were read at the start.
        log: the level and the format of the log, as they were read at the start.
        read_options: reads the options again; raises :class:`~trio_cluster.errors.OptionsError`. Blocks.
        read_log: the same for level and format of the log.
        read_engines: the same for the engines that the file names. Blocks; is called at once, too.
    """

    def __init__(
        self,
        server: ClusterServer,
        file: Path,
        options: ClusterServerOptions,
        log: tuple[str, str],
        read_options: Callable[[], ClusterServerOptions],
        read_log: Callable[[], tuple[str, str]],
        read_engines: Callable[[], list[tuple[str, dict[str, object]]]],
    ) -> None:
        self._server = server
        self._file = file
        self._options = attrs.evolve(options, server=attrs.evolve(options.server))
        self._log = log
        self._read_options = read_options
        self._read_log = read_log
        self._read_engines = read_engines
        self._engines = read_engines()
        self._node = load_node_settings(file)
        self._one_at_a_time = trio.Lock()

    async def reload(self) -> Reloaded:
        """Read the configuration again and apply it, all or nothing; log what has come of it. A checkpoint.

        If this is cancelled, nothing has changed.

        Raises:
            OptionsError: it is wrong, as at a start.
            ClusterError: a certificate cannot be used.
        """
        async with self._one_at_a_time:
            try:
                options, log, engines, node = await start_in_thread(
                    lambda: (
                        self._read_options(),
                        self._read_log(),
                        self._read_engines(),
                        load_node_settings(self._file),
                    )
                )
                changes = [
                    *(
                        OptionChange(name, before, after, "at once")
                        for name, before, after in zip(_LOG, self._log, log, strict=True)
                        if before != after
                    ),
                    *changed_options(self._options, options),
                ]
                if engines != self._engines:
                    # Among the options of engines there may be keys.
                    changes.append(
                        OptionChange(_SERVE, self._engines, engines, "after a restart", is_secret=True)
                    )
                changes += [
                    OptionChange(name, before, after, "after a restart")
                    for name, before, after in zip(
                        _NODE, attrs.astuple(self._node), attrs.astuple(node), strict=True
                    )
                    if before != after
                ]
                certificates = await self._server.apply_changes(
                    [change for change in changes if change.option not in (*_LOG, _SERVE, *_NODE)]
                )
            except ClusterError as error:
                logger.error("the new configuration is not used, and nothing has changed: %s", error)
                raise
            reloaded = Reloaded(str(self._file), changes, certificates)
            for change in reloaded.applied:
                if change.option not in _LOG:
                    assign_option(self._options, change.option, change.after)
            if log != self._log:
                logs.configure(*log)
                self._log = log
        fields: dict[str, object] = {"file": reloaded.source}
        fields["applied"] = [_describe(change) for change in reloaded.applied]
        if reloaded.needs_restart:
            fields["needs_restart"] = [_describe(change) for change in reloaded.needs_restart]
        logger.info("the configuration was read again", extra={"fields": fields})
        return reloaded


async def reload_on_signal(reload: Callable[[], Awaitable[object]]) -> None:
    """Read the configuration again, and leave errors to the log: the server goes on with what it has. A checkpoint."""
    try:
        await reload()
    except ClusterError:
        pass  # It was logged.
    except Exception:
        logger.exception("the configuration could not be read again")


def _describe(change: OptionChange) -> str:
    """Return a change in words, without the values of secrets."""
    if change.is_secret:
        return change.option
    return f"{change.option}: {shown_value(change.before)} -> {shown_value(change.after)}"

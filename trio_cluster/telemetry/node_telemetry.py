"""The telemetry of one node, from its start to its end. Loads the SDK only if something is exported."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final

import trio

from .._version import __version__
from ..core.threads import NoThread, run_in_thread, start_in_thread
from ..errors import ClusterError
from ..gateway.stories import Stories
from ..options import ClusterMode, ClusterServerOptions
from ..routing.router import Router
from .variables import EXTRA, Signals, read_signals

if TYPE_CHECKING:
    from .assembly import Telemetry

__all__ = ["FLUSH_TIME", "open_telemetry"]

logger = logging.getLogger("trio_cluster.telemetry")

#: Seconds for which a node that ends waits until its last spans and metrics are exported.
FLUSH_TIME: Final = 2.0


@asynccontextmanager
async def open_telemetry(
    options: ClusterServerOptions, mode: ClusterMode, node: str, router: Router, stories: Stories
) -> AsyncIterator[None]:
    """Export the traces and metrics of a node for the length of a block, if the environment says so. Checkpoints.

    What cannot be exported is a warning, and the node serves without, unless ``otel = "on"``.

    Args:
        options: of the node.
        mode: its role.
        node: its name.
        router: gets a tracer.
        stories: get one, too, on a node that answers clients.

    Raises:
        ClusterError: with ``otel = "on"``: the packages are missing, or a variable has a value that makes no sense.
    """
    telemetry = await _open(options, mode, node)
    if telemetry is None:
        yield
        return
    telemetry.attach(router, stories)
    logger.info("exporting by OpenTelemetry", extra={"fields": telemetry.fields})
    try:
        yield
    finally:
        telemetry.detach(router, stories)
        flushed = False
        # Without a thread, what was not exported is lost, and nothing else.
        with trio.move_on_after(FLUSH_TIME, shield=True), suppress(NoThread):
            await run_in_thread(telemetry.flush, abandon_on_cancel=True)
            flushed = True
        if not flushed:
            telemetry.abort()
            logger.warning("the last traces or metrics of this node could not be exported in time")


async def _open(options: ClusterServerOptions, mode: ClusterMode, node: str) -> Telemetry | None:
    try:
        signals = read_signals(os.environ, options.otel)
        return await start_in_thread(_load, signals, options, mode, node) if signals else None
    except ClusterError as error:
        if options.otel == "on":
            raise
        logger.warning("serving without OpenTelemetry: %s", error)
        return None


def _load(signals: Signals, options: ClusterServerOptions, mode: ClusterMode, node: str) -> Telemetry:
    """Load the SDK and make the exporters. Blocks."""
    try:
        assembly = importlib.import_module(".assembly", __package__)
    except ImportError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        raise ClusterError(f"OTEL_... variables are set, and its packages are missing: {EXTRA}") from None
    attributes = {
        "service.name": "trio-cluster",
        "service.version": __version__,
        # Several processes may have one name: those of one master, and two while one takes the place of the other.
        "service.instance.id": node if str(os.getpid()) in node else f"{node}-{os.getpid()}",
        "trio_cluster.node": node,
        "trio_cluster.mode": str(mode),
    }
    scheme = "https" if options.server.has_tls else "http"
    try:
        telemetry: Telemetry = assembly.Telemetry(signals, attributes, mode, node, scheme)
    except (ValueError, OSError) as error:
        raise ClusterError(f"OpenTelemetry cannot be used as its variables say: {error}") from error
    return telemetry

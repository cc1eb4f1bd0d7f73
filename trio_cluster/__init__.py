"""Several machines, one OpenAI API.

A master serves the HTTP API. Workers on other machines each keep one websocket to the master, register their models
there, and answer the requests that it forwards to them. A model is a function that you write. No work outlives the
request that asked for it, and no stream looks finished when it is not.

Its names are imported when they are first used (PEP 562): the commands that only ask a node, such as ``trio-cluster
status``, need no server, whose imports take most of a second.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .cluster.probe import check_is_cluster_server
    from .core.model import ChatModelOptions
    from .errors import ApiError, ClusterError, ClusterPortError, HandshakeRefused, OptionsError
    from .local.adapters import Provider
    from .local.asyncio_handler import from_asyncio
    from .local.asyncio_loop import AsyncioLoop
    from .local.asyncio_raw import AsyncioRawCall
    from .local.passthrough import RawCall
    from .openai import (
        ASRRequest,
        ChatRequest,
        CustomRequest,
        EmbeddingRequest,
        ImageEditRequest,
        ImageGenRequest,
        ModerationRequest,
        OutputChunk,
        RerankRequest,
        TTSRequest,
    )
    from .options import ClusterMode, ClusterServerOptions, ServerOptions
    from .server import ClusterServer
    from .server_thread import ServerThread, serve_in_thread

__all__ = [
    "ASRRequest",
    "ApiError",
    "AsyncioLoop",
    "AsyncioRawCall",
    "ChatModelOptions",
    "ChatRequest",
    "ClusterError",
    "ClusterMode",
    "ClusterPortError",
    "ClusterServer",
    "ClusterServerOptions",
    "CustomRequest",
    "EmbeddingRequest",
    "HandshakeRefused",
    "ImageEditRequest",
    "ImageGenRequest",
    "ModerationRequest",
    "OptionsError",
    "OutputChunk",
    "Provider",
    "RawCall",
    "RerankRequest",
    "ServerOptions",
    "ServerThread",
    "TTSRequest",
    "__version__",
    "check_is_cluster_server",
    "from_asyncio",
    "serve_in_thread",
]

#: Where each name is imported from.
_MODULES = {
    "ASRRequest": ".openai",
    "ApiError": ".errors",
    "AsyncioLoop": ".local.asyncio_loop",
    "AsyncioRawCall": ".local.asyncio_raw",
    "ChatModelOptions": ".core.model",
    "ChatRequest": ".openai",
    "ClusterError": ".errors",
    "ClusterMode": ".options",
    "ClusterPortError": ".errors",
    "ClusterServer": ".server",
    "ClusterServerOptions": ".options",
    "CustomRequest": ".openai",
    "EmbeddingRequest": ".openai",
    "HandshakeRefused": ".errors",
    "ImageEditRequest": ".openai",
    "ImageGenRequest": ".openai",
    "ModerationRequest": ".openai",
    "OptionsError": ".errors",
    "OutputChunk": ".openai",
    "Provider": ".local.adapters",
    "RawCall": ".local.passthrough",
    "RerankRequest": ".openai",
    "ServerOptions": ".options",
    "ServerThread": ".server_thread",
    "TTSRequest": ".openai",
    "check_is_cluster_server": ".cluster.probe",
    "from_asyncio": ".local.asyncio_handler",
    "serve_in_thread": ".server_thread",
}


def __getattr__(name: str) -> Any:
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(module, __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

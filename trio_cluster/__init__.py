"""Several machines, one OpenAI API.

A master serves the HTTP API. Workers on other machines each keep one websocket to the master, register their models
there, and answer the requests that it forwards to them. A model is a function that you write. No work outlives the
request that asked for it, and no stream looks finished when it is not.
"""

from ._version import __version__
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

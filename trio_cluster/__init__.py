"""Several machines, one OpenAI API.

A master serves the HTTP API; workers anywhere keep one websocket to it, register their models and answer what is
forwarded to them. A model is a function you write. No work outlives the request that asked for it, and no stream
looks finished when it is not.
"""

from ._cluster import ClusterServer
from ._errors import ApiError, ClusterError, ClusterPortError, HandshakeRefused, OptionsError
from ._models import ChatModelOptions
from ._options import ClusterMode, ClusterServerOptions, ServerOptions
from ._probe import check_is_cluster_server
from ._raw import RawCall
from ._shapes import Provider
from ._version import __version__
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

__all__ = [
    "ASRRequest",
    "ApiError",
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
    "TTSRequest",
    "__version__",
    "check_is_cluster_server",
]

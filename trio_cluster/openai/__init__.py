"""The OpenAI vocabulary: what clients send, what handlers give, and how answers are written.

This floor knows neither sockets nor tasks nor any web framework. Reading a request and writing an answer are
functions of bytes to values and of values to bytes; everything that waits is built on top of them.
"""

from ._chunks import FinishReason, OutputChunk, to_chunk
from ._encoding import Encoder
from ._endpoints import ENDPOINTS, Endpoint
from ._json import read_object
from ._requests import (
    ASRRequest,
    ChatRequest,
    EmbeddingRequest,
    ImageGenRequest,
    ModelRequest,
    TTSRequest,
)
from ._sse import DONE, PING, error_body, error_event, event

__all__ = [
    "DONE",
    "ENDPOINTS",
    "PING",
    "ASRRequest",
    "ChatRequest",
    "EmbeddingRequest",
    "Encoder",
    "Endpoint",
    "FinishReason",
    "ImageGenRequest",
    "ModelRequest",
    "OutputChunk",
    "TTSRequest",
    "error_body",
    "error_event",
    "event",
    "read_object",
    "to_chunk",
]

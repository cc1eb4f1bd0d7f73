"""The OpenAI API without IO: reading and checking requests, and encoding answers.

This package knows neither sockets nor tasks nor any web framework, and no clock. Reading a request is a function from
bytes to values, and encoding an answer one from values to bytes; what waits is built on top of them.

``requests/`` has what clients send, and ``responses/`` what handlers give and what clients get. Reading requests does
not depend on responses, and an encoder knows of requests only their types. ``endpoints.py``, the table of routes, puts
the two together.
"""

from .endpoints import COUNT_TOKENS, ENDPOINTS, KNOWN_STREAMS, Endpoint, custom_path, endpoint_named
from .error_families import MESSAGE_ERRORS, OPENAI_ERRORS, ErrorFamily
from .failures import UNKNOWN_RESPONSE, EndDetector, FailureGrammar, read_error
from .json_values import read_object
from .openapi import (
    ERROR,
    ERRORS,
    MESSAGE_ERROR_SCHEMA,
    MESSAGE_PREFIX,
    describe_endpoints,
    error_responses,
)
from .requests.forms import FormReader, is_form, media_type
from .requests.model_field import FormRewriter, JsonRewriter, rewrite_form, rewrite_json
from .requests.peek import FormPeek, asks_for_events, peek_model, require_one_model
from .requests.responses_api_input import ItemReferenced, check_items, is_reference
from .requests.tables import METADATA
from .requests.types import (
    ASRRequest,
    ChatRequest,
    CustomRequest,
    EmbeddingRequest,
    ImageEditRequest,
    ImageGenRequest,
    ModelRequest,
    ModerationRequest,
    RerankRequest,
    TTSRequest,
)
from .responses.chunks import FinishReason, OutputChunk, to_chunk
from .responses.encoder import Encoder
from .responses.structured import OutputCheck, require_jsonschema
from .responses.usage import read_usage
from .sse import DONE, KEEPALIVE, NO_PROXY_BUFFERING, comment_with, error_body, error_event, event

__all__ = [
    "COUNT_TOKENS",
    "DONE",
    "ENDPOINTS",
    "ERROR",
    "ERRORS",
    "KEEPALIVE",
    "KNOWN_STREAMS",
    "MESSAGE_ERRORS",
    "MESSAGE_ERROR_SCHEMA",
    "MESSAGE_PREFIX",
    "METADATA",
    "NO_PROXY_BUFFERING",
    "OPENAI_ERRORS",
    "UNKNOWN_RESPONSE",
    "ASRRequest",
    "ChatRequest",
    "CustomRequest",
    "EmbeddingRequest",
    "Encoder",
    "EndDetector",
    "Endpoint",
    "ErrorFamily",
    "FailureGrammar",
    "FinishReason",
    "FormPeek",
    "FormReader",
    "FormRewriter",
    "ImageEditRequest",
    "ImageGenRequest",
    "ItemReferenced",
    "JsonRewriter",
    "ModelRequest",
    "ModerationRequest",
    "OutputCheck",
    "OutputChunk",
    "RerankRequest",
    "TTSRequest",
    "asks_for_events",
    "check_items",
    "comment_with",
    "custom_path",
    "describe_endpoints",
    "endpoint_named",
    "error_body",
    "error_event",
    "error_responses",
    "event",
    "is_form",
    "is_reference",
    "media_type",
    "peek_model",
    "read_error",
    "read_object",
    "read_usage",
    "require_jsonschema",
    "require_one_model",
    "rewrite_form",
    "rewrite_json",
    "to_chunk",
]

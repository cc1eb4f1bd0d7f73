"""The names of all spans, attributes and metrics that are exported, in one table.

They are a contract: dashboards and alerts depend on them. ``docs/tracing.md`` has the same table, and a test compares
both with what is exported.

Names of the semantic conventions are those of :data:`SEMCONV_VERSION`; the names below ``gen_ai.`` are in development
there, and move. What the conventions have no name for begins with ``trio_cluster.``.
"""

from __future__ import annotations

from typing import Final

__all__ = ["METRICS", "OPERATIONS", "PROVIDER", "SCHEMA_URL", "SCOPE", "SEMCONV_VERSION", "SPANS"]

#: The version of the semantic conventions.
SEMCONV_VERSION: Final = "1.44.0"
SCHEMA_URL: Final = f"https://opentelemetry.io/schemas/{SEMCONV_VERSION}"
#: The instrumentation scope of all spans and metrics.
SCOPE: Final = "trio_cluster"

#: The value of ``gen_ai.provider.name``.
PROVIDER: Final = "trio_cluster"

#: The values of ``gen_ai.operation.name`` by endpoint. The conventions name ``chat``, ``text_completion`` and
#: ``embeddings``; a route of a model's own has the last part of its path.
OPERATIONS: Final = {
    "chat.completions": "chat",
    "responses": "chat",
    "messages": "chat",
    "completions": "text_completion",
    "embeddings": "embeddings",
    "audio.transcriptions": "transcription",
    "audio.translations": "translation",
    "audio.speech": "speech",
    "images.generations": "image_generation",
    "images.edits": "image_edit",
    "rerank": "rerank",
    "moderations": "moderation",
    "messages.count_tokens": "count_tokens",
}

# Attributes

HTTP_METHOD: Final = "http.request.method"
HTTP_ROUTE: Final = "http.route"
HTTP_STATUS: Final = "http.response.status_code"
HTTP_REQUEST_ID: Final = "http.request.header.x-request-id"
URL_PATH: Final = "url.path"
URL_SCHEME: Final = "url.scheme"
SERVER_ADDRESS: Final = "server.address"
SERVER_PORT: Final = "server.port"
CLIENT_ADDRESS: Final = "client.address"
CLIENT_PORT: Final = "client.port"
USER_AGENT: Final = "user_agent.original"
ERROR_TYPE: Final = "error.type"

OPERATION: Final = "gen_ai.operation.name"
PROVIDER_NAME: Final = "gen_ai.provider.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
REQUEST_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
REQUEST_TEMPERATURE: Final = "gen_ai.request.temperature"
REQUEST_TOP_P: Final = "gen_ai.request.top_p"
REQUEST_SEED: Final = "gen_ai.request.seed"
REQUEST_STREAM: Final = "gen_ai.request.stream"
REQUEST_CHOICES: Final = "gen_ai.request.choice.count"
RESPONSE_MODEL: Final = "gen_ai.response.model"
FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
TIME_TO_FIRST_CHUNK: Final = "gen_ai.response.time_to_first_chunk"
INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
CACHED_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
REASONING_TOKENS: Final = "gen_ai.usage.reasoning.output_tokens"

REQUEST_ID: Final = "trio_cluster.request.id"
KEY: Final = "trio_cluster.key"
OUTCOME: Final = "trio_cluster.outcome"
ENDED_BY: Final = "trio_cluster.ended_by"
ATTEMPTS: Final = "trio_cluster.attempts"
ATTEMPT_NUMBER: Final = "trio_cluster.attempt.number"
NODE: Final = "trio_cluster.node"
MODEL: Final = "trio_cluster.model"
ENDPOINT: Final = "trio_cluster.endpoint"
WHY: Final = "trio_cluster.attempt.why"
CANDIDATES: Final = "trio_cluster.attempt.candidates"
EXPECTED_CACHED_BYTES: Final = "trio_cluster.attempt.expected_cached_bytes"
CANCELLED_BY: Final = "trio_cluster.cancelled.by"
CANCELLED_REASON: Final = "trio_cluster.cancelled.reason"
QUEUE: Final = "trio_cluster.queue"
DELIVERED_BYTES: Final = "trio_cluster.delivered_bytes"
HELD_BACK: Final = "trio_cluster.held_back"

# Spans. The name of the first two begins with what stands in braces.

SERVER_SPAN: Final = "{method} {route}"
INFERENCE_SPAN: Final = "{operation} {model}"
ATTEMPT_SPAN: Final = "attempt"
LINK_SPAN: Final = "link"
QUEUE_SPAN: Final = "queue"
MODEL_START_SPAN: Final = "model start"
HANDLER_SPAN: Final = "handler"

# Events of spans

FIRST_OUTPUT: Final = "first output"
NOTE: Final = "note"
NOTE_TEXT: Final = "trio_cluster.note"

_CANCELLED: Final = (OUTCOME, ERROR_TYPE, CANCELLED_BY, CANCELLED_REASON)

#: The attributes that each span may have.
SPANS: Final[dict[str, tuple[str, ...]]] = {
    SERVER_SPAN: (
        HTTP_METHOD,
        HTTP_ROUTE,
        HTTP_STATUS,
        HTTP_REQUEST_ID,
        URL_PATH,
        URL_SCHEME,
        SERVER_ADDRESS,
        SERVER_PORT,
        CLIENT_ADDRESS,
        CLIENT_PORT,
        USER_AGENT,
        ERROR_TYPE,
        REQUEST_ID,
        KEY,
        OUTCOME,
        ENDED_BY,
    ),
    INFERENCE_SPAN: (
        OPERATION,
        PROVIDER_NAME,
        REQUEST_MODEL,
        REQUEST_MAX_TOKENS,
        REQUEST_TEMPERATURE,
        REQUEST_TOP_P,
        REQUEST_SEED,
        REQUEST_STREAM,
        REQUEST_CHOICES,
        RESPONSE_MODEL,
        FINISH_REASONS,
        TIME_TO_FIRST_CHUNK,
        INPUT_TOKENS,
        OUTPUT_TOKENS,
        CACHED_TOKENS,
        REASONING_TOKENS,
        ERROR_TYPE,
        REQUEST_ID,
        OUTCOME,
        ENDED_BY,
        ATTEMPTS,
    ),
    ATTEMPT_SPAN: (
        ATTEMPT_NUMBER,
        NODE,
        MODEL,
        WHY,
        CANDIDATES,
        EXPECTED_CACHED_BYTES,
        DELIVERED_BYTES,
        *_CANCELLED,
    ),
    LINK_SPAN: (NODE,),
    QUEUE_SPAN: (QUEUE,),
    MODEL_START_SPAN: (MODEL,),
    HANDLER_SPAN: (NODE, MODEL, ENDPOINT, REQUEST_ID, HELD_BACK, *_CANCELLED),
}

# Metrics

REQUEST_DURATION: Final = "gen_ai.server.request.duration"
TIME_TO_FIRST_TOKEN: Final = "gen_ai.server.time_to_first_token"
TIME_PER_OUTPUT_TOKEN: Final = "gen_ai.server.time_per_output_token"
INPUT_TOKENS_COUNTER: Final = "gen_ai.client.inference.usage.input_tokens"
OUTPUT_TOKENS_COUNTER: Final = "gen_ai.client.inference.usage.output_tokens"
CACHED_TOKENS_COUNTER: Final = "gen_ai.client.inference.usage.cache_read.input_tokens"
REASONING_TOKENS_COUNTER: Final = "gen_ai.client.inference.usage.reasoning.output_tokens"

#: The metrics, each with its unit, what it measures, and the bounds of the buckets if it is a histogram.
METRICS: Final[dict[str, tuple[str, str, tuple[float, ...]]]] = {
    REQUEST_DURATION: (
        "s",
        "From the arrival of a request to the end of its answer.",
        (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92),
    ),
    TIME_TO_FIRST_TOKEN: (
        "s",
        "From the arrival of a request to the first output of its answer, if that is streamed.",
        (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    ),
    TIME_PER_OUTPUT_TOKEN: (
        "s",
        "The time between two tokens of an answer that is streamed, after the first output.",
        (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
    ),
    INPUT_TOKENS_COUNTER: ("{token}", "Tokens of prompts.", ()),
    OUTPUT_TOKENS_COUNTER: ("{token}", "Tokens of answers.", ()),
    CACHED_TOKENS_COUNTER: ("{token}", "Tokens of prompts that were read from a cache.", ()),
    REASONING_TOKENS_COUNTER: ("{token}", "Tokens of answers that were spent on reasoning.", ()),
}
#: The attributes that metrics may have.
METRIC_ATTRIBUTES: Final = (OPERATION, PROVIDER_NAME, REQUEST_MODEL, ERROR_TYPE)

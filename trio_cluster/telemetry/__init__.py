"""OpenTelemetry: spans and metrics of requests, with the extra ``otel``. See ``docs/tracing.md``."""

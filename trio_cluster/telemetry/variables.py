"""Whether traces and metrics are exported, as the ``OTEL_...`` variables say it. Does not load the SDK."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

import attrs

from ..errors import ClusterError
from ..options import Otel

__all__ = ["EXTRA", "Exporter", "Signals", "read_signals"]

#: What to do where the packages are missing.
EXTRA: Final = "pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"

#: Where spans or metrics go: over OTLP, to the standard output, or nowhere.
Exporter: TypeAlias = Literal["otlp", "console", "none"]

_EXPORTERS: Final[dict[str, Exporter]] = {"otlp": "otlp", "console": "console", "none": "none"}
_ENDPOINT: Final = "OTEL_EXPORTER_OTLP_ENDPOINT"
_PROTOCOL: Final = "OTEL_EXPORTER_OTLP_PROTOCOL"
_SUPPORTED_PROTOCOL: Final = "http/protobuf"


@attrs.frozen
class Signals:
    """What is exported."""

    traces: Exporter = "none"
    metrics: Exporter = "none"

    def __bool__(self) -> bool:
        return self.traces != "none" or self.metrics != "none"


def read_signals(environ: Mapping[str, str], otel: Otel) -> Signals:
    """Return what is to be exported.

    Args:
        environ: the environment variables.
        otel: the option. ``"auto"``: each of traces and metrics is exported if a variable names its endpoint or its
            exporter. ``"on"``: both are, unless a variable says ``none``. ``"off"``: nothing is.

    Raises:
        ClusterError: a variable asks for something that is not supported.
    """
    if otel == "off" or environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return Signals()
    return Signals(_exporter(environ, otel, "TRACES"), _exporter(environ, otel, "METRICS"))


def _exporter(environ: Mapping[str, str], otel: Otel, signal: str) -> Exporter:
    variable = f"OTEL_{signal}_EXPORTER"
    name = environ.get(variable, "").strip().lower()
    if not name:
        named = environ.get(f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT") or environ.get(_ENDPOINT)
        if not named and otel != "on":
            return "none"
        name = "otlp"
    exporter = _EXPORTERS.get(name)
    if exporter is None:
        raise ClusterError(f"{variable}: expected otlp, console or none, got '{name}'")
    if exporter == "otlp":
        specific = f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL"
        variable = specific if environ.get(specific) else _PROTOCOL
        protocol = environ.get(variable, "").strip() or _SUPPORTED_PROTOCOL
        if protocol != _SUPPORTED_PROTOCOL:
            raise ClusterError(f"{variable}: only {_SUPPORTED_PROTOCOL} is supported, got '{protocol}'")
    return exporter

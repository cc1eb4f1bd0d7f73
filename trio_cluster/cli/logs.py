"""The log of a node's process: lines of text for a person at a terminal, or JSON objects for a machine.

Theory of operation
===================

As a library, the package configures no logging. :func:`configure` is for the program that owns the process, which is
the command line. It puts one handler on the root logger, so that the application's own records and the warnings of the
libraries underneath have the same format, and it sets the requested level for this package's loggers only.

Every record that is made while a request is being worked on gets the request's id and the name of its principal as
fields, from the context variables of ``core/log_context.py``. That includes the records of a user's own handler, also
from a thread, and those of the libraries below it.

Much of what is logged comes from outside: the name of a model, the id of a worker. Neither format lets such text start
a line of its own or reach the terminal as a control sequence. Neither shows an API key, wherever it comes from.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from typing import Any, Final, TextIO

from ..core.log_context import current_principal, current_request
from ..core.redaction import without_keys

__all__ = ["FORMATS", "LEVELS", "configure"]

LEVELS: Final = ("debug", "info", "warning", "error")

FORMATS: Final = ("text", "json")

_PACKAGE: Final = "trio_cluster"

_RESET: Final = "\x1b[0m"
_DIM: Final = "\x1b[2m"
_COLOURS: Final = {"debug": _DIM, "warning": "\x1b[33m", "error": "\x1b[31m", "critical": "\x1b[1;31m"}


class _Handler(logging.StreamHandler[TextIO]):
    """A type of its own, by which :func:`configure` recognizes the handler that an earlier call has installed."""


def configure(level: str = "info", format: str = "text", stream: TextIO | None = None) -> None:
    """Send the log of this process to ``stream``, in place of whatever an earlier call has configured.

    Args:
        level: the lowest level that this package's loggers emit, one of :data:`LEVELS`. All other loggers emit warnings
            and errors, unless they have a level of their own.
        format: ``"text"`` for a person, with colours if ``stream`` is a terminal and neither ``NO_COLOR`` nor
            ``TERM=dumb`` is set; ``"json"`` for one object per line, with ``ts`` (UTC), ``level``, ``logger``,
            ``message``, the record's fields, and ``traceback`` where there is one.
        stream: standard error if ``None``.

    Raises:
        ValueError: there is no such level or format.
    """
    if level not in LEVELS:
        raise ValueError(f"log level: must be one of {', '.join(LEVELS)}, got {level!r}")
    stream = sys.stderr if stream is None else stream
    formatter: logging.Formatter
    if format == "json":
        formatter = _JsonFormatter()
    elif format == "text":
        formatter = _TextFormatter(colours=_wants_colours(stream))
    else:
        raise ValueError(f"log format: must be text or json, got {format!r}")

    handler = _Handler(stream)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    for old in root.handlers[:]:
        if isinstance(old, _Handler):
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger(_PACKAGE).setLevel(level.upper())


def _wants_colours(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    given = getattr(record, "fields", None)
    fields = dict(given) if isinstance(given, Mapping) else {}
    # The handler formats a record in the task or thread that makes it, so the context is the one of its request.
    if request_id := current_request.get():
        fields.setdefault("request_id", request_id)
    if principal := current_principal.get():
        fields.setdefault("principal", principal)
    return fields


def _escape(text: str, newline: str = "\\n") -> str:
    """Escape control characters, newlines too: a record is one line, whatever text from outside is in it."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else newline if character == "\n" else repr(character)[1:-1]
        for character in text
    )


def _indent(text: str) -> str:
    """Return a traceback, which follows its record, so that none of its lines can pass for a record."""
    return _escape("\n" + text, newline="\n    ")


def _quote(value: object) -> str:
    """Return a field's value as text, quoted where its end would not be clear otherwise."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        text = value
    elif isinstance(value, (list, tuple, set, frozenset)):
        text = ",".join(str(item) for item in value) or "[]"
    else:
        text = str(value)
    if text and text.isprintable() and not any(character in ' "=' for character in text):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())


class _TextFormatter(logging.Formatter):
    """``12:30:01 info     worker joined worker=w1``, in local time."""

    def __init__(self, *, colours: bool) -> None:
        super().__init__()
        self._colours = colours

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = record.levelname.lower()
        message = _escape(record.getMessage())
        fields = "".join(f" {name}={_quote(value)}" for name, value in _fields(record).items())
        if self._colours:
            colour = _COLOURS.get(level, "")
            clock, fields = f"{_DIM}{clock}{_RESET}", f"{_DIM}{fields}{_RESET}" if fields else ""
            line = f"{clock} {colour}{level:<8}{_RESET if colour else ''} {message}{fields}"
        else:
            line = f"{clock} {level:<8} {message}{fields}"
        if record.exc_info:
            line += _indent(self.formatException(record.exc_info))
        if record.stack_info:
            line += _indent(self.formatStack(record.stack_info))
        return without_keys(line)


class _JsonFormatter(logging.Formatter):
    """One JSON object per line. A field cannot replace one of the keys that every line has."""

    def format(self, record: logging.LogRecord) -> str:
        created = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, Any] = {
            "ts": f"{created}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in _fields(record).items():
            entry.setdefault(name, _plain(value))
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        if record.stack_info:
            entry["stack"] = self.formatStack(record.stack_info)
        return without_keys(json.dumps(entry))


def _plain(value: object) -> object:
    """Return ``value`` in types that JSON has; values of all other types as text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    return str(value)

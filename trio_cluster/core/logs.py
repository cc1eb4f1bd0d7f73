"""What a node tells about itself: lines for a person at a terminal, or JSON objects for a machine.

Theory
======

Rooms log to ``logging.getLogger(__name__)`` and know nothing about formats. What happened is the message, a
constant sentence; whom it happened to goes into structured fields::

    logger.info("worker joined", extra={"fields": {"worker": worker_id, "models": names}})

As a library the package configures nothing. :func:`configure` is for the program that owns the process, which
is the command line: it puts one handler on the root logger, so that the application's own log and the
warnings of the libraries underneath come out in the same format, and lets only this package's loggers speak
at the level asked for.

Whatever is logged while a request is being worked on has its id, too: :data:`current_request` goes with tasks and
into their threads. So the lines of a user's own handler have it, and those of libraries underneath.

Much of what is logged was first said by somebody else: the name of a model, the id of a worker. Neither
format lets such text begin a line of its own or reach the terminal as a control sequence.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Final, TextIO

__all__ = ["FORMATS", "LEVELS", "MOST_IDS", "configure", "current_request"]

LEVELS: Final = ("debug", "info", "warning", "error")

FORMATS: Final = ("text", "json")

#: Ids of requests that one line names, if it is about many.
MOST_IDS: Final = 20

#: The id of the request that the current task works for; empty if it works for none.
current_request: Final[ContextVar[str]] = ContextVar("current_request", default="")

_PACKAGE: Final = "trio_cluster"

_RESET: Final = "\x1b[0m"
_DIM: Final = "\x1b[2m"
_COLOURS: Final = {"debug": _DIM, "warning": "\x1b[33m", "error": "\x1b[31m", "critical": "\x1b[1;31m"}


class _Handler(logging.StreamHandler[TextIO]):
    """A type of our own, so that configuring again finds and replaces what the last time put in place."""


def configure(level: str = "info", format: str = "text", stream: TextIO | None = None) -> None:
    """Send the log of this process to ``stream``. Calling it again replaces what the last call did.

    Args:
        level: how much this package tells: one of :data:`LEVELS`. Other loggers tell their warnings and
            errors, unless they have been given a level of their own.
        format: ``"text"`` for a person, in colours if ``stream`` is a terminal that wants them; ``"json"``
            for one object a line, with ``ts`` (UTC), ``level``, ``logger``, ``message``, the record's fields,
            and ``traceback`` where there is one.
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
    # A record is formatted where it is made.
    if request_id := current_request.get():
        fields.setdefault("request_id", request_id)
    return fields


def _harmless(text: str) -> str:
    """Escape what would move a terminal's cursor; what follows a line break is indented."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else "\n    " if character == "\n" else repr(character)[1:-1]
        for character in text
    )


def _quoted(value: object) -> str:
    """Write a field's value so that one can see where it ends."""
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
    """``12:30:01 info     worker joined worker=w1``, in the time of the place where it is read."""

    def __init__(self, *, colours: bool) -> None:
        super().__init__()
        self._colours = colours

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = record.levelname.lower()
        message = _harmless(record.getMessage())
        fields = "".join(f" {name}={_quoted(value)}" for name, value in _fields(record).items())
        if self._colours:
            colour = _COLOURS.get(level, "")
            clock, fields = f"{_DIM}{clock}{_RESET}", f"{_DIM}{fields}{_RESET}" if fields else ""
            line = f"{clock} {colour}{level:<8}{_RESET if colour else ''} {message}{fields}"
        else:
            line = f"{clock} {level:<8} {message}{fields}"
        if record.exc_info:
            line += _harmless("\n" + self.formatException(record.exc_info))
        if record.stack_info:
            line += _harmless("\n" + self.formatStack(record.stack_info))
        return line


class _JsonFormatter(logging.Formatter):
    """One object a line. A field cannot replace what every line has."""

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
        return json.dumps(entry)


def _plain(value: object) -> object:
    """Return what JSON has a notation for; the rest as text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    return str(value)

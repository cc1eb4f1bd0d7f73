"""Structured outputs: whether an answer fits the ``response_format`` that its client has asked for.

A model that was registered with ``validate=True`` has its answers checked: with ``json_schema``, they must be JSON that
fits the schema; with ``json_object``, a JSON object. What the model itself has not finished is not checked: answers
that end with another reason than ``stop`` (``length``, ``tool_calls``), and refusals.

The schema comes from the client, and must not be able to block the node, or to make it connect anywhere. So the work is
done in a thread and bounded, references to other documents are errors, and regular expressions are not evaluated: a
single one can take years. ``pattern``, ``patternProperties``, ``unevaluatedProperties`` and ``format`` are left out,
and so is ``additionalProperties`` beside ``patternProperties``.

The library ``jsonschema`` is an extra, and is imported when such a model is registered.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Final

import msgspec

from trio_cluster.errors import ApiError, ClusterError, InvalidRequest

from ..requests.types import ChatRequest
from .choices import Choice, read_output
from .chunks import to_chunk

__all__ = ["OutputCheck", "require_jsonschema"]

#: The largest schema, in bytes of JSON.
_MAX_SCHEMA: Final = 256 << 10
#: How many references are followed for one answer. A few lines of schema could ask for billions.
_MAX_REFERENCES: Final = 100_000
#: The longest part of a message that comes from the library, which shows the values that do not fit.
_MAX_SHOWN: Final = 300

#: How many references may still be followed for the answer that is checked.
_left: Final[ContextVar[int]] = ContextVar("_left")


class _TooManyReferences(Exception):
    """The schema leads through too many references."""


def require_jsonschema() -> None:
    """Import the library. Synchronous.

    Raises:
        ClusterError: it is not installed; the message says how to install it.
    """
    try:
        _validator_class()
    except ImportError as error:
        raise ClusterError("validate=True needs the package jsonschema: pip install jsonschema") from error


@lru_cache(maxsize=1)
def _validator_class() -> Any:
    jsonschema = importlib.import_module("jsonschema")
    base = jsonschema.Draft202012Validator

    def ignored(validator: Any, value: Any, instance: Any, schema: Any) -> tuple[Any, ...]:
        return ()

    def additional_properties(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
        if "patternProperties" in schema:
            return ()
        return base.VALIDATORS["additionalProperties"](validator, value, instance, schema)

    def reference(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
        _left.set(_left.get() - 1)
        if _left.get() < 0:
            raise _TooManyReferences
        yield from base.VALIDATORS["$ref"](validator, value, instance, schema) or ()

    skipped = ("pattern", "patternProperties", "unevaluatedProperties", "$dynamicRef")
    return jsonschema.validators.extend(
        base,
        dict.fromkeys(skipped, ignored) | {"additionalProperties": additional_properties, "$ref": reference},
    )


def _unusable(why: str) -> InvalidRequest:
    return InvalidRequest(
        f"response_format: the schema cannot be used: {why[:_MAX_SHOWN]}",
        param="response_format",
        code="invalid_json_schema",
    )


def _misfit(index: int, why: str) -> ApiError:
    which = f"Choice {index}" if index else "The answer of the model"
    return ApiError(
        500,
        f"{which} does not fit its response_format: {why[:_MAX_SHOWN]}",
        code="invalid_structured_output",
    )


class OutputCheck:
    """Collects the output of one chat, and checks it at the end.

    Args:
        response_format: of type ``json_schema`` or ``json_object``.
    """

    def __init__(self, response_format: dict[str, Any]) -> None:
        self._is_schema = response_format["type"] == "json_schema"
        self._schema = (response_format.get("json_schema") or {}).get("schema") if self._is_schema else None
        self._choices: dict[int, Choice] = {}

    @classmethod
    def of(cls, request: ChatRequest) -> OutputCheck | None:
        """Return the check of a request; ``None`` if the client has not asked for structured output."""
        wanted = request.response_format
        if wanted is None or wanted.get("type") not in ("json_schema", "json_object") or request.prompts:
            return None
        return cls(wanted)

    def check_schema(self) -> None:
        """Check the schema itself. Blocks; to be called in a thread.

        Raises:
            InvalidRequest: it is not valid, or too large.
        """
        if self._schema is None:
            return
        if len(msgspec.json.encode(self._schema)) > _MAX_SCHEMA:
            raise _unusable(f"it has more than {_MAX_SCHEMA} bytes")
        validator = _validator_class()
        try:
            validator.check_schema(self._schema)
        except importlib.import_module("jsonschema").SchemaError as error:
            raise _unusable(f"{error.json_path}: {error.message}") from None
        except Exception as error:
            raise _unusable(type(error).__name__) from error

    def take(self, value: Any) -> None:
        """Take note of a value that the handler gave, and the encoder has accepted. Synchronous."""
        chunk = to_chunk("chat", value)
        if chunk.kind == "json":
            for delta in read_output(chunk.value).deltas:
                self._choice(delta.index).add(delta)
            return
        choice = self._choice(chunk.index or 0)
        if chunk.kind == "text_delta":
            choice.add_text(chunk.value)
        elif chunk.kind == "final_text":
            choice.take_final(chunk.value)
        elif chunk.kind == "tool_call":
            choice.add_call(chunk.value)
        elif chunk.kind == "finish":
            choice.reason = chunk.value

    def _choice(self, index: int) -> Choice:
        if index not in self._choices:
            self._choices[index] = Choice(index, "")
        return self._choices[index]

    def verify(self) -> None:
        """Check the whole answer. Blocks; to be called in a thread.

        Raises:
            ApiError: 500 ``invalid_structured_output``, it does not fit; 400 ``invalid_json_schema``, the schema
                refers to what is not in it, or leads through too many references.
        """
        # A handler that gave nothing has answered with an empty text.
        self._choice(min(self._choices, default=0))
        for index, choice in sorted(self._choices.items()):
            if choice.finish_reason == "stop" and not choice.members.get("refusal"):
                self._verify(index, choice.text)

    def _verify(self, index: int, text: str) -> None:
        try:
            value = msgspec.json.decode(text)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise _misfit(index, f"it is not JSON: {error}") from None
        if not self._is_schema and not isinstance(value, dict):
            raise _misfit(index, "it is not a JSON object")
        if self._schema is None:
            return
        referencing = importlib.import_module("referencing")
        _left.set(_MAX_REFERENCES)
        try:
            # A registry of its own, since the default one fetches what a reference names.
            validator = _validator_class()(self._schema, registry=referencing.Registry())
            misfit = next(validator.iter_errors(value), None)
        except _TooManyReferences:
            raise _unusable("its references lead too far") from None
        except Exception as failure:
            raise _unusable(f"{type(failure).__name__}: {failure}") from failure
        if misfit is not None:
            raise _misfit(index, f"{misfit.json_path}: {misfit.message}")

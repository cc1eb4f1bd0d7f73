"""The tokens of an answer, as its handler reports them: read from two forms, written in several.

A handler reports them with ``OutputChunk.usage``, as two counts, or in a dict, as a usage object in the API's form
(``prompt_tokens`` or ``input_tokens``, ``completion_tokens`` or ``output_tokens``, and details). The report has two
readers. The client gets it in the form of its route, with the details as they came. The node gets a
:class:`~trio_cluster.core.answer.Usage`, for metering: four numbers, and nothing else.

Usage objects that another server has written are read here too (:func:`read_usage`), with more patience: what cannot be
read is no error, because the client gets the object in any case.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from trio_cluster.core.answer import Usage

from .chunks import OutputChunk

__all__ = ["UsageReport", "read_usage"]

_READ: Final = ("prompt_tokens", "input_tokens")
_WRITTEN: Final = ("completion_tokens", "output_tokens")

#: The largest count that is reported to the node. It travels to the master, which takes no larger one, as an integer
#: that every JSON implementation can represent.
_COUNT_MAX: Final = 2**53 - 1


class UsageReport:
    """The tokens of one answer, as far as they have been reported; the last report counts.

    Attributes:
        prompt_tokens: tokens read; 0 without a report.
        completion_tokens: tokens written; 0 without a report.
        details: the members of the last usage object beside its counts. Two counts that are reported later do not
            remove them.
    """

    __slots__ = ("_before", "_has_counts", "completion_tokens", "details", "prompt_tokens")

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.details: dict[str, Any] = {}
        self._has_counts = False
        # The counts of the parts of the answer that are complete.
        self._before = (0, 0)

    def begin_part(self) -> None:
        """Add what is reported from now on to what has been reported, instead of replacing it."""
        self._before = (self.prompt_tokens, self.completion_tokens)

    @property
    def total_tokens(self) -> int:
        """Tokens read and tokens written."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def usage(self) -> Usage | None:
        """The numbers for the node; ``None`` if no counts were reported.

        Details that are no counts are taken for 0: they only pass through here, and go to the client as they are.
        """
        if not self._has_counts:
            return None
        return _usage(self.prompt_tokens, self.completion_tokens, self.details)

    def take_counts(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Take a report of two counts."""
        read, written = self._before
        self.prompt_tokens, self.completion_tokens = read + prompt_tokens, written + completion_tokens
        self._has_counts = True

    def take_object(self, usage: Any) -> None:
        """Take a report in the API's form; ``None`` is no report.

        Raises:
            TypeError: it is not an object, or a count is not an integer.
            ValueError: a count is negative.
        """
        if usage is None:
            return
        if not isinstance(usage, dict):
            raise TypeError("'usage' must be an object with numbers of tokens")
        details = dict(usage)
        read = [details.pop(name) for name in _READ if name in details]
        written = [details.pop(name) for name in _WRITTEN if name in details]
        details.pop("total_tokens", None)
        # The constructor refuses what is no count.
        counts = OutputChunk.usage(read[-1] if read else 0, written[-1] if written else 0).value
        self.take_counts(*counts)
        self._has_counts = bool(read or written)
        self.details = details

    def for_chat(self) -> dict[str, Any]:
        """Return the usage object of the older routes, details included."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.total_tokens,
        } | self.details

    def counts(self) -> dict[str, Any]:
        """Return the counts under the names of the newer routes, without details."""
        return {
            "input_tokens": self.prompt_tokens,
            "output_tokens": self.completion_tokens,
            "total_tokens": self.total_tokens,
        }


def read_usage(usage: Mapping[str, Any], *, prompt_only: bool = False, apart: bool = False) -> Usage | None:
    """Return the tokens in a usage object that another server has written. Never fails.

    Args:
        usage: the object.
        prompt_only: the answer has no tokens of its own (embeddings, ranks), so that a total alone is that of the
            prompt.
        apart: the prompt's count is without the tokens that were read from a cache or written to one, as on the
            Anthropic API's routes.

    Returns:
        ``None`` if the object has no counts, for instance because the server counts seconds.
    """
    counts = {name: _count(usage.get(name)) for name in (*_READ, *_WRITTEN, "total_tokens")}
    read = [count for name in _READ if (count := counts[name]) is not None]
    written = [count for name in _WRITTEN if (count := counts[name]) is not None]
    total = counts["total_tokens"]
    if prompt_only and not read and total is not None:
        read = [total]
    if not read and not written:
        return None
    prompt = read[-1] if read else 0
    if apart:
        prompt += _bounded(usage.get("cache_read_input_tokens"))
        prompt += _bounded(usage.get("cache_creation_input_tokens"))
    return _usage(prompt, written[-1] if written else 0, usage)


def _usage(prompt_tokens: int, completion_tokens: int, details: Mapping[str, Any]) -> Usage:
    cached = _detail(details, ("prompt_tokens_details", "input_tokens_details"), "cached_tokens")
    return Usage(
        prompt_tokens=_bounded(prompt_tokens),
        completion_tokens=_bounded(completion_tokens),
        # The second name is Anthropic's, which some servers use beside the OpenAI API's counts.
        cached_tokens=cached or _bounded(details.get("cache_read_input_tokens")),
        reasoning_tokens=_detail(
            details, ("completion_tokens_details", "output_tokens_details"), "reasoning_tokens"
        ),
    )


def _detail(details: Mapping[str, Any], objects: tuple[str, ...], member: str) -> int:
    """Return a count out of the first of these objects that has it; 0 if none has."""
    for name in objects:
        each = details.get(name)
        if isinstance(each, dict) and (count := _bounded(each.get(member))):
            return count
    return 0


def _count(value: Any) -> int | None:
    """Return a count as it is; ``None`` for what is no count."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _bounded(value: Any) -> int:
    """Return a count that can travel; 0 for what is no count."""
    if not isinstance(value, int) or isinstance(value, bool):
        return 0
    # A plain integer, even if the handler gave one of a subclass.
    return int(max(0, min(value, _COUNT_MAX)))

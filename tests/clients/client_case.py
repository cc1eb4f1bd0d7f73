"""The form of a case: what is asked, and the whole of what has to come of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs
from client_drivers import Answer

__all__ = ["USER", "Beginning", "Case", "text_of"]

USER: Final[dict[str, Any]] = {"role": "user", "content": "a fine  day"}


class Beginning(str):
    """Equal to every text that begins with it."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and other.startswith(str(self))

    __hash__ = str.__hash__


def _is_equal(answer: Any, expected: Any) -> None:
    assert answer == expected


@attrs.frozen(kw_only=True)
class Case:
    """One question, and what has to come of it."""

    method: str
    positional: tuple[Any, ...] = ()
    body: Mapping[str, Any] = attrs.field(factory=dict)
    as_pieces: bool = False
    events: list[Any] = attrs.field(factory=list)
    value: Any = None
    data: bytes | None = None
    """The value if it is sound."""
    content_type: str | None = None
    asked: Mapping[str, Any] = attrs.field(factory=dict)
    """Attributes of the request that the handler gets."""
    see: Callable[[Any, Any], None] = _is_equal
    """How the value is compared."""
    untyped: str | None = None
    """A field about which the client's types say less than the API has always done."""

    def check(self, answer: Answer) -> None:
        """Fail if that is not the answer, or does not look like one to the client's own types."""
        assert answer.failure is None
        assert {each.partition(":")[0] for each in answer.complaints} <= {self.untyped}
        if not self.as_pieces:
            assert answer.events == self.events
        if self.data is None:
            self.see(answer.value, self.value)
        else:
            assert answer.data == self.data
            assert answer.content_type == self.content_type


def text_of(events: list[Any], index: int = 0) -> str:
    """Return the text of one choice of a streamed chat."""
    return "".join(
        choice["delta"].get("content") or ""
        for event in events
        for choice in event["choices"]
        if choice["index"] == index
    )

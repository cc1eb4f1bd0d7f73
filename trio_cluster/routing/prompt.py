"""What routing has to know of a prompt: its length, the blocks by which a cache would find it, and its conversation.

A model server keeps what it has read. The next prompt that begins with the same text is read from there on only. To
find out which server that is, the text is cut into blocks, in the order in which a model reads it (tools, system,
messages), and each block gets a hash of itself and of all before it. So two prompts have the hashes of their common
beginning in common, and no others.

There is no tokenizer here, and the text is JSON as the client has sent it: clients repeat what they have sent before
byte for byte. Lengths are bytes of that text; a token has about four.
"""

from __future__ import annotations

from bisect import bisect_right
from contextlib import suppress
from typing import Any, Final

import attrs
import msgspec

from ..core.request import Request

__all__ = ["CONVERSATION_HEADERS", "ENDS", "HASHED_MAX", "Prompt", "read_prompt"]

#: Headers that name a conversation; the first one that is there counts. Coding agents send them: opencode the first,
#: Codex the two that follow, Claude Code the last.
CONVERSATION_HEADERS: Final = (
    "x-session-affinity",
    "session-id",
    "session_id",
    "x-claude-code-session-id",
)
#: Bytes of a prompt that are hashed. The rest counts as new text.
HASHED_MAX: Final = 512 * 1024
#: A larger body is mostly images, or a document. It is not searched for its fields; its own beginning is hashed.
_SEARCHED_MAX: Final = 1024 * 1024
#: Characters of a conversation's name that count.
_NAME_MAX: Final = 256
#: Blocks are short where prompts differ most: in the first 4 KiB.
_FINE, _FINE_BLOCKS, _COARSE = 256, 16, 1024
#: Where the blocks end, in bytes from the beginning of the prompt.
ENDS: Final = (
    *range(_FINE, _FINE * _FINE_BLOCKS + 1, _FINE),
    *range(_FINE * _FINE_BLOCKS + _COARSE, HASHED_MAX + 1, _COARSE),
)
_READ_AS_TEXT: Final = frozenset({"chat", "any", "custom"})
_NOTHING: Final = msgspec.Raw(b"")


@attrs.frozen
class Prompt:
    """A prompt, as routing sees it.

    Attributes:
        size: its bytes.
        blocks: the hash of each block; block ``i`` ends at ``ENDS[i]``. What is behind the last whole block has none.
        conversation: the key of the conversation, as the client names it; empty if it does not.
    """

    size: int
    blocks: tuple[int, ...] = ()
    conversation: str = ""


class _Fields(msgspec.Struct):
    """The fields of a body from which a prompt is made, in the order in which models read them."""

    tools: msgspec.Raw = _NOTHING
    system: msgspec.Raw = _NOTHING
    instructions: msgspec.Raw = _NOTHING
    prompt: msgspec.Raw = _NOTHING
    messages: msgspec.Raw = _NOTHING
    input: msgspec.Raw = _NOTHING
    prompt_cache_key: Any = None
    conversation: Any = None


_decode: Final = msgspec.json.Decoder(_Fields).decode


def read_prompt(request: Request) -> Prompt:
    """Return what is known of the prompt of a request. Synchronous; it never raises.

    Requests whose body is still arriving, and those of kinds without a prompt cache, have no blocks.
    """
    body = request.body
    if request.kind not in _READ_AS_TEXT or not body or "json" not in request.content_type:
        return Prompt(max(0, request.size))
    fields = None
    if len(body) <= _SEARCHED_MAX:
        with suppress(msgspec.MsgspecError, ValueError, RecursionError):
            fields = _decode(body)
    conversation = _conversation(request, fields)
    if fields is None:
        return Prompt(len(body), _hashes(body), conversation)
    said = bytes(fields.messages or fields.input or fields.prompt)
    # A list that grows has its bracket at its end, which is not repeated.
    text = b"".join(
        (bytes(fields.tools), bytes(fields.system), bytes(fields.instructions), said.removesuffix(b"]"))
    )
    return Prompt(len(text), _hashes(text), conversation)


def _hashes(text: bytes) -> tuple[int, ...]:
    # `hash` of bytes is keyed with a secret of the process, and a fraction of the cost of any digest.
    hashes = []
    last = start = 0
    for end in ENDS[: bisect_right(ENDS, len(text))]:
        last = hash((last, text[start:end]))
        hashes.append(last)
        start = end
    return tuple(hashes)


def _conversation(request: Request, fields: _Fields | None) -> str:
    headers = request.headers
    for name in CONVERSATION_HEADERS:
        if value := headers.get(name):
            return value[:_NAME_MAX]
    if fields is None:
        return ""
    if isinstance(fields.prompt_cache_key, str) and fields.prompt_cache_key:
        return fields.prompt_cache_key[:_NAME_MAX]
    named = fields.conversation
    if isinstance(named, dict):
        named = named.get("id")
    return named[:_NAME_MAX] if isinstance(named, str) else ""

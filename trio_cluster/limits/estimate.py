"""The estimate of the tokens that a request may use, before it is answered.

*The prompt.* A token of text has two bytes or more in the encodings of today's models, in every language; in English
about four. So the estimate is a token for every :data:`BYTES_PER_TOKEN` bytes of the body, and when answers have
reported how many tokens their prompts really had, the largest share of the recent ones, with a margin. Images and audio
inside of a JSON body are not text: each counts as :data:`MEDIA_TOKENS`.

*The answer.* ``max_tokens``, ``max_completion_tokens`` or ``max_output_tokens``, for each of ``n`` answers and of
several prompts. Without them, what 95 of 100 recent answers of this key and model stayed below; before there are any,
:data:`UNKNOWN_ANSWER`.

Embeddings, rankings and moderations have no tokens of an answer. For speech, transcriptions and images nothing is
reserved; what their answers report counts when they have ended.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Any, Final

import attrs
import msgspec

from ..core.answer import Usage
from ..core.limits import PARSE_IN_THREAD
from ..core.request import Request
from ..core.threads import run_in_thread
from .account import MOST_TOKENS, Demand

__all__ = ["BYTES_PER_TOKEN", "MEDIA_TOKENS", "UNKNOWN_ANSWER", "Estimator"]

#: Bytes of a body for which one token is estimated, with a margin.
BYTES_PER_TOKEN: Final = 2
#: Bytes of a body that surely have a token: with fewer tokens than that, a text would be of one repeated word.
_SURE_BYTES_PER_TOKEN: Final = 8
#: Tokens that are estimated for one image, or one piece of audio, in a JSON body.
MEDIA_TOKENS: Final = 1500
#: Tokens that are estimated for an answer of which nothing is known.
UNKNOWN_ANSWER: Final = 1024
#: Tokens that are estimated at most for an answer whose request names no length.
_LONGEST_GUESS: Final = 32_768
#: Tokens that a chat template adds to a prompt, however short it is.
_TEMPLATE_TOKENS: Final = 16

#: Pairs of a key and a model that are remembered, and recent answers of each.
_REMEMBERED: Final = 4096
_RECENT: Final = 64
#: Answers after which the recent ones are judged by anew, and without which they are not judged by.
_ENOUGH: Final = 8
_MARGIN: Final = 1.25

#: A body of more bytes is searched for images and audio.
_SEARCHED: Final = 16 * 1024
#: Values in a body that are looked at for that, so that a large one does not hold up other requests; the rest counts as
#: text.
_LOOKED_AT: Final = 10_000

#: Routes of servers behind a model on which tokens are only counted.
_COUNTING: Final = ("/count_tokens", "/tokenize", "/detokenize")
_WITH_ANSWER: Final = frozenset({"chat", "custom", "any"})
_WITH_PROMPT: Final = _WITH_ANSWER | {"embedding", "rerank", "moderation"}


class _Fields(msgspec.Struct):
    """The fields of a body that was not parsed here, because only its backend knows it."""

    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    n: Any = None


@attrs.define
class _Recent:
    """What recent answers have used."""

    answers: deque[int] = attrs.field(factory=lambda: deque(maxlen=_RECENT))
    shares: deque[float] = attrs.field(factory=lambda: deque(maxlen=_RECENT))
    """Tokens of a prompt for each byte of its text."""
    answer: int = 0
    """What 95 of 100 answers stayed below; 0: not known yet."""
    share: float = 0.0
    """The largest share, with a margin; 0: not known yet."""
    learnt: int = 0
    """Answers so far."""


class Estimator:
    """Estimates what requests may use, and learns from what they have used."""

    def __init__(self) -> None:
        self._recent: OrderedDict[tuple[str, str], _Recent] = OrderedDict()

    async def estimate_request(self, request: Request) -> Demand:
        """Return the tokens that a request may use. A checkpoint only if its body is large: then a thread reads it.

        Raises:
            NoThread: no thread can be started for that.
        """
        if len(request.body) < PARSE_IN_THREAD:
            return self.estimate(request)
        return await run_in_thread(self.estimate, request, abandon_on_cancel=True)

    def estimate(self, request: Request) -> Demand:
        """Return the tokens that a request may use. Synchronous."""
        if request.kind not in _WITH_PROMPT or request.endpoint.endswith(_COUNTING):
            return Demand()
        recent = self._recent.get((request.principal.name, request.alias or request.model))
        size, media = _text_size(request)
        share = recent.share if recent is not None and recent.share else 1 / BYTES_PER_TOKEN
        prompt = _TEMPLATE_TOKENS + int(size * share) + media * MEDIA_TOKENS
        least = min(prompt, size // _SURE_BYTES_PER_TOKEN)
        answer = 0
        if request.kind in _WITH_ANSWER:
            named, count = _named_length(request)
            if named is not None:
                answer = named * count
                least += answer
            else:
                known = recent.answer if recent is not None else 0
                answer = (known or UNKNOWN_ANSWER) * count
        return Demand(min(prompt + answer, MOST_TOKENS), min(least, MOST_TOKENS), prompt)

    def learn(self, request: Request, usage: Usage) -> None:
        """Take note of what a request has used, of whose answer that is known. Synchronous."""
        key = (request.principal.name, request.alias or request.model)
        recent = self._recent.get(key)
        if recent is None:
            recent = self._recent[key] = _Recent()
            if len(self._recent) > _REMEMBERED:
                self._recent.popitem(last=False)
        self._recent.move_to_end(key)
        recent.learnt += 1
        if usage.completion_tokens:
            recent.answers.append(usage.completion_tokens)
            if recent.learnt % _ENOUGH == 0 and len(recent.answers) >= _ENOUGH:
                ordered = sorted(recent.answers)
                recent.answer = min(_LONGEST_GUESS, ordered[(len(ordered) - 1) * 95 // 100])
        size, media = _text_size(request)
        if usage.prompt_tokens and size and not media:
            text_tokens = max(1, usage.prompt_tokens - _TEMPLATE_TOKENS)
            recent.shares.append(min(1.0, text_tokens / size))
            if recent.learnt % _ENOUGH == 0 and len(recent.shares) >= _ENOUGH:
                recent.share = min(1.0, _MARGIN * max(recent.shares))


def _text_size(request: Request) -> tuple[int, int]:
    """Return the bytes of text of a request, and how many images and pieces of audio it has."""
    size = len(request.body) if request.upload is None else 0
    if size <= _SEARCHED:
        return size, 0
    raw = getattr(request.parsed, "raw", None)
    if not isinstance(raw, dict):
        return size, 0
    media, media_bytes, looked_at = 0, 0, 0
    waiting: list[Any] = [raw]
    while waiting and looked_at < _LOOKED_AT:
        value = waiting.pop()
        looked_at += 1
        if isinstance(value, dict):
            audio = value.get("input_audio")
            if isinstance(audio, dict) and isinstance(audio.get("data"), str):
                media += 1
                media_bytes += len(audio["data"])
            elif len(value) < _LOOKED_AT:
                waiting.extend(value.values())
        elif isinstance(value, list):
            if len(value) < _LOOKED_AT:
                waiting.extend(value)
        elif isinstance(value, str) and value.startswith("data:"):
            media += 1
            media_bytes += len(value)
    return max(0, size - media_bytes), media


def _named_length(request: Request) -> tuple[int | None, int]:
    """Return how long one answer may be, if the request says so, and how many answers it asks for."""
    raw = getattr(request.parsed, "raw", None)
    prompts = 1
    if isinstance(raw, dict):
        names = (raw.get("max_tokens"), raw.get("max_completion_tokens"), raw.get("max_output_tokens"))
        n = raw.get("n")
        prompt = raw.get("prompt")
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            prompts = len(prompt)
    else:
        try:
            fields = msgspec.json.decode(request.body, type=_Fields)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            # ValueError: text that is not UTF-8.
            return None, 1
        names = (fields.max_tokens, fields.max_completion_tokens, fields.max_output_tokens)
        n = fields.n
    lengths = [each for each in names if isinstance(each, int) and not isinstance(each, bool) and each > 0]
    count = n if isinstance(n, int) and not isinstance(n, bool) and n > 0 else 1
    return (max(lengths) if lengths else None), count * prompts

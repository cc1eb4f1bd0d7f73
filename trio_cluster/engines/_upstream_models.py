"""The models of another server, kept registered here for as long as that server has them.

The server is asked for its list again and again; what is registered follows it. A server that cannot be asked has no
models: they are taken back at once when it refuses connections or says that it fails, and after the second time in a
row when it merely does not answer in time. A server that is too busy to answer this, but goes on answering calls, is
not taken for dead. A call that finds the server gone has it asked at once.

What the log says changes only when the situation does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Final

import attrs
import msgspec
import trio

from trio_cluster.core.model import ChatModelOptions

from ._engine import ModelServer
from ._http_client import HttpClient, Question
from ._http_response import HttpError
from ._upstream_calls import UpstreamCalls, authorization

__all__ = ["Naming", "UpstreamModels", "read_list"]

logger = logging.getLogger("trio_cluster.engines")

#: Seconds for one answer to the question for the models.
PATIENCE: Final = 5.0
#: Seconds between questions to a server that does not want to answer them.
LONGEST_PAUSE: Final = 60.0

_LIST_LIMIT: Final = 4 << 20
#: More than any server has. One that lists what it learns from here would otherwise go on growing.
_MOST_MODELS: Final = 1000

# Where servers say how many tokens fit, the best source first: what the server allows counts, not what the model could.
_CONTEXT: Final = ("context_window", "max_model_len", "context_length", "max_context_length")
# Said by every entry of a list here, or nobody's business.
_NOT_KEPT: Final = frozenset(
    {"id", "object", "created", "owned_by", "kind", "capabilities", "permission", "root", *_CONTEXT[:1]}
)
_EXTRA_ROOM: Final = 4096
_EXTRA_DEPTH: Final = 4

_WANTS_KEY: Final = "it wants a key: give key=... or key_env=NAME"
_REFUSES_KEY: Final = "it does not accept the key that is given"
_WRONG_PLACE: Final = "it has no list of models there: most servers' URL ends in /v1"


@attrs.frozen
class Naming:
    """What the models of a server are called here.

    Attributes:
        prefix: stands before each name, except for those that are given one.
        only: patterns as in file names; a model of whose name none matches is left out. Empty: all are taken.
        renamed: the names that are given to some.
    """

    prefix: str = ""
    only: tuple[str, ...] = ()
    renamed: Mapping[str, str] = attrs.field(factory=dict)

    def name(self, model: str) -> str | None:
        """Return the name here of what the server calls ``model``; ``None`` if it is left out."""
        if self.only and not any(fnmatchcase(model, pattern) for pattern in self.only):
            return None
        return self.renamed.get(model) or self.prefix + model


def read_list(body: bytes) -> dict[str, ChatModelOptions]:
    """Read the answer to ``GET /models``: the server's names, and what it tells about each.

    Raises:
        ValueError: it is not such an answer.
    """
    try:
        answer = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError("its list of models is not JSON") from None
    entries = answer.get("data") if isinstance(answer, dict) else answer
    if not isinstance(entries, list):
        raise ValueError("its list of models has no 'data'")
    models: dict[str, ChatModelOptions] = {}
    for entry in entries[:_MOST_MODELS]:
        if isinstance(entry, dict) and isinstance(name := entry.get("id"), str) and name:
            models.setdefault(name, _options(entry))
    return models


def _options(entry: dict[str, Any]) -> ChatModelOptions:
    meta = entry.get("meta")
    contexts = [entry.get(name) for name in _CONTEXT] + [
        meta.get("n_ctx") if isinstance(meta, dict) else None
    ]
    context = next((size for size in contexts if type(size) is int and 0 < size < 1 << 53), None)
    extra: dict[str, Any] = {}
    room = _EXTRA_ROOM
    for name, value in entry.items():
        if name not in _NOT_KEPT and _is_small(value, _EXTRA_DEPTH):
            room -= len(msgspec.json.encode({name: value}))
            if room < 0:
                break
            extra[name] = value
    return ChatModelOptions(supports_vision=_vision(entry), context_window=context, extra_fields=extra)


def _vision(entry: dict[str, Any]) -> bool:
    """Return what the server says; it decides about images itself in any case."""
    capabilities = entry.get("capabilities")
    if isinstance(capabilities, dict):
        return capabilities.get("vision") is True
    return isinstance(capabilities, list) and ("vision" in capabilities or "multimodal" in capabilities)


def _is_small(value: Any, depth: int) -> bool:
    """Tell whether a value fits into the messages in which models are announced."""
    if isinstance(value, dict):
        return depth > 0 and all(_is_small(each, depth - 1) for each in value.values())
    if isinstance(value, list):
        return depth > 0 and all(_is_small(each, depth - 1) for each in value)
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return -(1 << 63) <= value < 1 << 63
    return True


class UpstreamModels:
    """Keeps the models of one server registered.

    Args:
        client: asks the server.
        key: what the server wants for one; ``None``: nothing.
        server: where the models are registered.
        naming: under which names.
        pause: seconds between two questions.
        max_concurrency: calls to one model at once; ``None``: any number.
    """

    def __init__(
        self,
        client: HttpClient,
        key: str | None,
        server: ModelServer,
        naming: Naming,
        *,
        pause: float = 5.0,
        max_concurrency: int | None = None,
    ) -> None:
        self._client = client
        self._key = key
        self._server = server
        self._naming = naming
        self._usual_pause = self._pause = pause
        self._max_concurrency = max_concurrency
        self._calls = UpstreamCalls(client, key, self.ask_soon)
        self._registered: dict[str, tuple[str, ChatModelOptions]] = {}
        self._refused: dict[str, str] = {}
        self._trouble = ""
        self._late = 0
        self._wanted = trio.Event()

    def ask_soon(self) -> None:
        """Have the server asked without waiting for the end of the pause."""
        self._wanted.set()

    async def follow(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep what is registered up to date until cancelled, and take it back then.

        Started when the server has been asked once, whatever came of it.
        """
        try:
            await self._ask()
            task_status.started()
            while True:
                with trio.move_on_after(self._pause):
                    await self._wanted.wait()
                self._wanted = trio.Event()
                await self._ask()
        finally:
            for name in self._registered:
                self._server.unregister_model(name)

    async def _ask(self) -> None:
        headers = [("accept", "application/json"), *(authorization(self._key) if self._key else ())]
        heard = self._calls.heard
        status, body = 0, b""
        self._pause = self._usual_pause
        with trio.move_on_after(PATIENCE) as patience:
            try:
                status, body = await self._client.fetch(Question("GET", "/models", headers), _LIST_LIMIT)
            except HttpError as error:
                self._lose(f"it cannot be asked: {error}")
                return
        if patience.cancelled_caught:
            self._late += 1
            if self._late > 1 and self._calls.heard == heard:
                self._lose(f"it does not answer within {PATIENCE:g} s")
            return
        self._late = 0
        if status == 429:
            # It is there, and wants to be asked less.
            self._back_off()
        elif status == 200:
            try:
                models = read_list(body)
            except ValueError as error:
                self._lose(str(error))
                return
            self._update(models)
        elif status in (401, 403, 404):
            # Somebody has to set this right first.
            self._back_off()
            self._lose(_WRONG_PLACE if status == 404 else _REFUSES_KEY if self._key else _WANTS_KEY)
        else:
            self._lose(f"it answers the question for its models with {status}")

    def _back_off(self) -> None:
        self._pause = max(self._usual_pause, min(LONGEST_PAUSE, 6 * self._usual_pause))

    def _lose(self, why: str) -> None:
        names = list(self._registered)
        for name in names:
            self._withdraw(name)
        self._refused.clear()
        if why != self._trouble:
            self._trouble = why
            logger.warning(
                "no models from %s: %s",
                self._client.base,
                why,
                extra={"fields": {"models_lost": sorted(names)}},
            )

    def _update(self, models: Mapping[str, ChatModelOptions]) -> None:
        wanted: dict[str, tuple[str, ChatModelOptions]] = {}
        for model, options in models.items():
            name = self._naming.name(model)
            if name is not None:
                wanted.setdefault(name, (model, options))
        gone = [name for name, known in self._registered.items() if wanted.get(name) != known]
        for name in gone:
            self._withdraw(name)
        self._refused = {name: why for name, why in self._refused.items() if name in wanted}
        new = [
            name
            for name, (model, options) in wanted.items()
            if name not in self._registered and self._register(name, model, options)
        ]
        if self._trouble or new or gone:
            self._trouble = ""
            fields = {
                "models": len(self._registered),
                "models_gained": sorted(new),
                "models_lost": sorted(set(gone) - set(new)),
            }
            logger.info("the models of %s are served", self._client.base, extra={"fields": fields})

    def _register(self, name: str, model: str, options: ChatModelOptions) -> bool:
        try:
            self._server.register_raw(
                name, partial(self._calls.answer, model), options, max_concurrency=self._max_concurrency
            )
        except ValueError as error:
            # Tried again each time, for the name may be given up; told once.
            if self._refused.get(name) != str(error):
                self._refused[name] = str(error)
                logger.warning(
                    "the model '%s' of %s is left out: %s", model, self._client.base, error,
                    extra={"fields": {"model": name}},
                )  # fmt: skip
            return False
        self._registered[name] = (model, options)
        return True

    def _withdraw(self, name: str) -> None:
        del self._registered[name]
        self._server.unregister_model(name)

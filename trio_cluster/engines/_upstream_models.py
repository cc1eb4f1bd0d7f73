"""The models of an upstream server, kept registered here for as long as that server lists them.

Theory of operation
===================

The server's list of models is polled, and the registered models follow it. A server whose list cannot be read has no
models: they are unregistered at once if it refuses connections or answers with an error, and after the second timeout
in a row if it merely does not answer in time. A server that is too busy to answer the poll, but still answers calls,
counts as alive. A call that finds the server unreachable triggers the next poll at once.

Changes are logged, not polls: a situation that lasts is logged once.
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
from trio_cluster.core.provenance import VIA_FIELD, Via, read_via

from ._engine import ModelServer
from ._http_client import HttpClient, HttpRequest
from ._http_response import HttpError
from ._upstream_calls import UpstreamCalls, authorization

__all__ = ["Naming", "UpstreamModels", "parse_model_list"]

logger = logging.getLogger("trio_cluster.engines")

#: Seconds that one poll may take.
POLL_TIMEOUT: Final = 5.0
#: The longest interval, in seconds, between polls of a server that does not let itself be polled (a 401, 404 or 429).
MAX_BACKOFF: Final = 60.0

#: The largest list of models that is accepted, in bytes.
_MAX_LIST_SIZE: Final = 4 << 20
#: Models that are taken from one list: more than any server has. Two clusters that list each other's models with a
#: prefix would otherwise add to them without end.
_MAX_MODELS: Final = 1000

# Where servers say how many tokens fit, the best source first: the limit that the server sets counts, not the model's.
_CONTEXT_FIELDS: Final = ("context_window", "max_model_len", "context_length", "max_context_length")
#: Fields of an entry that are not copied: this cluster sets them itself, or they are about the server's inside.
_DROPPED_FIELDS: Final = frozenset(
    {
        "id",
        "object",
        "created",
        "owned_by",
        "kind",
        "capabilities",
        "permission",
        "root",
        *_CONTEXT_FIELDS[:1],
        VIA_FIELD,
    }
)
#: Bytes of JSON that are copied of one entry, and levels of nesting in a field.
_MAX_EXTRA_SIZE: Final = 4096
_MAX_EXTRA_DEPTH: Final = 4

_KEY_MISSING: Final = "it requires an API key: set key=... or key_env=NAME"
_KEY_REFUSED: Final = "it does not accept the API key: check key or key_env"
_NO_LIST: Final = "it has no list of models at this URL: most servers' URL ends in /v1"


@attrs.frozen
class Naming:
    """The names that the models of a server have in the cluster.

    Attributes:
        prefix: put before every name, except those in ``renamed``.
        only: shell-style patterns (``fnmatch``) for the server's names; a model that matches none is left out. Empty:
            all models are taken.
        renamed: the cluster's name for some of the server's names.
    """

    prefix: str = ""
    only: tuple[str, ...] = ()
    renamed: Mapping[str, str] = attrs.field(factory=dict)

    def name(self, model: str) -> str | None:
        """Return the cluster's name for the server's ``model``; ``None`` if the model is left out."""
        if self.only and not any(fnmatchcase(model, pattern) for pattern in self.only):
            return None
        return self.renamed.get(model) or self.prefix + model


def parse_model_list(body: bytes) -> dict[str, ChatModelOptions]:
    """Parse the response to ``GET /models``.

    Returns:
        The server's name of each model, with what the list says about it.

    Raises:
        ValueError: it is not a list of models; the message says why.
    """
    try:
        content = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError("its list of models is not JSON") from None
    # Some servers leave out the object around the list.
    entries = content.get("data") if isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise ValueError("its list of models has no 'data'")
    models: dict[str, ChatModelOptions] = {}
    for entry in entries[:_MAX_MODELS]:
        if isinstance(entry, dict) and isinstance(name := entry.get("id"), str) and name:
            models.setdefault(name, _options(entry))
    return models


def _options(entry: dict[str, Any]) -> ChatModelOptions:
    meta = entry.get("meta")
    contexts = [entry.get(name) for name in _CONTEXT_FIELDS] + [
        meta.get("n_ctx") if isinstance(meta, dict) else None
    ]
    context = next((size for size in contexts if type(size) is int and 0 < size < 1 << 53), None)
    extra: dict[str, Any] = {}
    room = _MAX_EXTRA_SIZE
    for name, value in entry.items():
        if name not in _DROPPED_FIELDS and _is_small(value, _MAX_EXTRA_DEPTH):
            room -= len(msgspec.json.encode({name: value}))
            if room < 0:
                break
            extra[name] = value
    return ChatModelOptions(supports_vision=_vision(entry), context_window=context, extra_fields=extra)


def _vision(entry: dict[str, Any]) -> bool:
    """Tell whether the server says that the model takes images. Only shown in ``/v1/models``: the server decides."""
    capabilities = entry.get("capabilities")
    if isinstance(capabilities, dict):
        return capabilities.get("vision") is True
    return isinstance(capabilities, list) and ("vision" in capabilities or "multimodal" in capabilities)


def _is_small(value: Any, depth: int) -> bool:
    """Tell whether a value fits into the messages that announce models: nesting, finite numbers, 64-bit integers."""
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
    """Keeps the models of one upstream server registered.

    Args:
        client: sends the requests to the upstream server.
        key: the API key to send; ``None`` if the server requires none.
        server: where the models are registered.
        naming: the models' names there.
        poll_interval: seconds between two polls.
        max_concurrency: concurrent calls to one model; ``None`` sets no limit.
    """

    def __init__(
        self,
        client: HttpClient,
        key: str | None,
        server: ModelServer,
        naming: Naming,
        *,
        poll_interval: float = 5.0,
        max_concurrency: int | None = None,
    ) -> None:
        self._client = client
        self._key = key
        self._server = server
        self._naming = naming
        self._poll_interval = self._next_interval = poll_interval
        self._max_concurrency = max_concurrency
        self._calls = UpstreamCalls(client, key, self.poll_soon)
        # By the cluster's name: the server's name, and what its list says about the model.
        self._registered: dict[str, tuple[str, ChatModelOptions]] = {}
        # By the cluster's name: why the model could not be registered, as it was logged.
        self._conflicts: dict[str, str] = {}
        # Why there are no models, as it was logged; empty if there are.
        self._problem = ""
        self._timeouts = 0
        self._poll_requested = trio.Event()

    def poll_soon(self) -> None:
        """Poll the server without waiting for the end of the interval. Synchronous."""
        self._poll_requested.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the registered models up to date until cancelled, and unregister them then.

        ``task_status.started()`` is called after the first poll, whatever its outcome.
        """
        try:
            await self._poll()
            task_status.started()
            while True:
                with trio.move_on_after(self._next_interval):
                    await self._poll_requested.wait()
                self._poll_requested = trio.Event()
                await self._poll()
        finally:
            for name in self._registered:
                self._server.unregister_model(name)

    async def _poll(self) -> None:
        headers = [("accept", "application/json"), *(authorization(self._key) if self._key else ())]
        activity = self._calls.activity
        status, body = 0, b""
        self._next_interval = self._poll_interval
        with trio.move_on_after(POLL_TIMEOUT) as timeout:
            try:
                status, body = await self._client.fetch(
                    HttpRequest("GET", "/models", headers), _MAX_LIST_SIZE
                )
            except HttpError as error:
                self._unregister_all(f"its models cannot be listed: {error}")
                return
        if timeout.cancelled_caught:
            self._timeouts += 1
            if self._timeouts > 1 and self._calls.activity == activity:
                self._unregister_all(f"it does not answer within {POLL_TIMEOUT:g} s")
            return
        self._timeouts = 0
        if status == 429:
            # It is alive, and asks to be polled less often.
            self._back_off()
        elif status == 200:
            try:
                models = parse_model_list(body)
            except ValueError as error:
                self._unregister_all(str(error))
                return
            self._update(models)
        elif status in (401, 403, 404):
            # The configuration has to be corrected first; polling often does not help.
            self._back_off()
            self._unregister_all(_NO_LIST if status == 404 else _KEY_REFUSED if self._key else _KEY_MISSING)
        else:
            self._unregister_all(f"it answers the request for its models with the status {status}")

    def _back_off(self) -> None:
        self._next_interval = max(self._poll_interval, min(MAX_BACKOFF, 6 * self._poll_interval))

    def _unregister_all(self, problem: str) -> None:
        names = list(self._registered)
        for name in names:
            self._unregister(name)
        self._conflicts.clear()
        if problem != self._problem:
            self._problem = problem
            logger.warning(
                "no models from %s: %s",
                self._client.base,
                problem,
                extra={"fields": {"models_lost": sorted(names)}},
            )

    def _update(self, models: Mapping[str, ChatModelOptions]) -> None:
        """Register, unregister and replace models until they are those of ``models``."""
        wanted: dict[str, tuple[str, ChatModelOptions]] = {}
        for model, options in models.items():
            name = self._naming.name(model)
            if name is not None:
                wanted.setdefault(name, (model, options))
        gone = [name for name, known in self._registered.items() if wanted.get(name) != known]
        for name in gone:
            self._unregister(name)
        self._conflicts = {name: why for name, why in self._conflicts.items() if name in wanted}
        new = [
            name
            for name, (model, options) in wanted.items()
            if name not in self._registered and self._register(name, model, options)
        ]
        if self._problem or new or gone:
            self._problem = ""
            fields = {
                "models": len(self._registered),
                "models_gained": sorted(new),
                "models_lost": sorted(set(gone) - set(new)),
            }
            logger.info("the models of %s are served", self._client.base, extra={"fields": fields})

    def _register(self, name: str, model: str, options: ChatModelOptions) -> bool:
        try:
            self._server.register_raw(
                name, partial(self._calls.forward, model), options, max_concurrency=self._max_concurrency
            )
        except ValueError as error:
            # Tried again at every poll, because the name may become free; logged once.
            if self._conflicts.get(name) != str(error):
                self._conflicts[name] = str(error)
                logger.warning(
                    "the model '%s' of %s is left out: %s", model, self._client.base, error,
                    extra={"fields": {"model": name}},
                )  # fmt: skip
            return False
        self._registered[name] = (model, options)
        return True

    def _unregister(self, name: str) -> None:
        del self._registered[name]
        self._server.unregister_model(name)

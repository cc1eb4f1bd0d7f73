"""The models of an upstream server, kept registered here for as long as that server lists them.

Theory of operation
===================

The server's list of models is polled, and the registered models follow it. One failed poll is not a loss: the next one
follows soon, and the models are unregistered when that fails too. A call that finds the server unreachable triggers the
next poll at once, and counts as a failed one.

A server that is too busy for the poll, but still works on calls, counts as alive: a timeout or a lost connection does
not count while something is received for calls, or while a call is under way on a connection that is open. What is
definite (a refused connection, an answer that is an error) counts in any case.

A model is registered anew when its name, its context size or its vision changes. What else its entry says is shown as
it was when the model was registered: servers have counters and times there, which change with every poll.

The models may be named by hand, for servers without a list. They are polled as well, but any answer shows that the
server is there.

Changes are logged, not polls: a situation that lasts is logged once, and of many names only some.
"""

from __future__ import annotations

import codecs
import json
import logging
import math
from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase
from functools import partial
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import attrs
import msgspec
import trio

from trio_cluster.core.model import ChatModelOptions
from trio_cluster.core.provenance import VIA_FIELD, Via, read_via

from ._engine import ModelServer
from ._http_client import ConnectTimeout, HttpClient, HttpRequest, LocalExhaustion
from ._http_response import HttpError, IncompleteResponse
from ._upstream_calls import UpstreamCalls, authorization

__all__ = ["Naming", "UpstreamModels", "parse_model_list"]

logger = logging.getLogger("trio_cluster.engines")

#: Seconds that one poll may take.
POLL_TIMEOUT: Final = 5.0
#: The longest interval, in seconds, between polls of a server that does not let itself be polled (a 401, 404 or 429).
MAX_BACKOFF: Final = 60.0
#: The longest interval, in seconds, between a poll that has failed and the next one, while there are models to lose.
RETRY_INTERVAL: Final = 1.0
#: Names in one log line.
_MAX_LOGGED: Final = 10

#: The largest list of models that is accepted, in bytes.
_MAX_LIST_SIZE: Final = 4 << 20
#: Models that are taken from one list. Two clusters that list each other's models with a
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
        "max_output_tokens",
        "state",
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

    def takes(self, model: str) -> bool:
        """Tell whether the server's ``model`` is not left out."""
        return bool(model) and (not self.only or any(fnmatchcase(model, pattern) for pattern in self.only))

    def name(self, model: str) -> str | None:
        """Return the cluster's name for the server's ``model``; ``None`` if the model is left out."""
        if not self.takes(model):
            return None
        return self.renamed.get(model) or self.prefix + model


#: The server's name of a model, what its list says about the model, and the clusters through which it comes.
_Listed: TypeAlias = tuple[str, ChatModelOptions, Via]


class ModelList(dict[str, ChatModelOptions]):
    """The server's name of each model, with what the list says about it.

    Attributes:
        via: the clusters through which a model comes, if the server is a cluster that says so.
        left_out: models that are wanted, and are not here because there are too many.
    """

    left_out = 0

    def __init__(self, models: Mapping[str, ChatModelOptions] = MappingProxyType({})) -> None:
        super().__init__(models)
        self.via: dict[str, Via] = {}


def parse_model_list(body: bytes, wanted: Callable[[str], bool] = bool) -> ModelList:
    """Parse the response to ``GET /models``.

    An entry that cannot be used costs that entry only, and a value in it that cannot be passed on costs that value.

    Args:
        body: the JSON; may begin with a byte order mark.
        wanted: tells for the server's name of a model whether to take it.

    Returns:
        The first 1000 models that are wanted.

    Raises:
        ValueError: it is not a list of models; the message says why.
    """
    content = _decode(body.removeprefix(codecs.BOM_UTF8))
    # Some servers leave out the object around the list.
    entries = content.get("data") if isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise ValueError("its list of models has no 'data'")
    models = ModelList()
    for entry in entries:
        if not isinstance(entry, dict):
            continue
        name = entry.get("id")
        if not isinstance(name, str) or name in models or not _is_text(name) or not wanted(name):
            continue
        if len(models) == _MAX_MODELS:
            models.left_out += 1
        else:
            models[name] = _options(entry)
            if via := read_via(entry.get(VIA_FIELD)):
                models.via[name] = via
    return models


def _decode(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    # What one bad value makes the strict decoder refuse (NaN, 1e400, half a surrogate pair) is taken here, and sorted
    # out entry by entry.
    try:
        return json.loads(body.decode("utf-8", "replace"), parse_int=_parse_int)
    except (ValueError, RecursionError):
        raise ValueError("its list of models is not JSON") from None


def _parse_int(digits: str) -> int | None:
    # Python refuses to convert very long ones; no such number can be passed on.
    return int(digits) if len(digits) <= 20 else None


def _listed_via(body: bytes) -> dict[str, Via]:
    """Return the clusters through which models come, as far as a list says so; any body is fine."""
    try:
        return parse_model_list(body).via
    except ValueError:
        return {}


def _options(entry: dict[str, Any]) -> ChatModelOptions:
    meta = entry.get("meta")
    contexts = [entry.get(name) for name in _CONTEXT_FIELDS] + [
        meta.get("n_ctx") if isinstance(meta, dict) else None
    ]
    context = next((size for size in contexts if type(size) is int and 0 < size < 1 << 53), None)
    longest = entry.get("max_output_tokens")
    extra: dict[str, Any] = {}
    room = _MAX_EXTRA_SIZE
    for name, value in entry.items():
        if name == "modalities" and not _is_modalities(value):
            continue
        if name not in _DROPPED_FIELDS and _is_text(name) and _is_small(value, _MAX_EXTRA_DEPTH):
            room -= len(msgspec.json.encode({name: value}))
            if room < 0:
                break
            extra[name] = value
    return ChatModelOptions(
        supports_vision=_vision(entry),
        context_window=context,
        extra_fields=extra,
        max_output_tokens=longest if type(longest) is int and 0 < longest < 1 << 53 else None,
    )


def _is_modalities(value: Any) -> bool:
    """Tell whether a value has the form of this cluster's own ``modalities``; other servers use the name for others."""
    return isinstance(value, dict) and all(
        isinstance(value.get(side), list) and all(isinstance(each, str) for each in value[side])
        for side in ("input", "output")
    )


def _vision(entry: dict[str, Any]) -> bool:
    """Tell whether the server says that the model takes images. Only shown in ``/v1/models``: the server decides."""
    capabilities = entry.get("capabilities")
    if isinstance(capabilities, dict):
        return capabilities.get("vision") is True
    return isinstance(capabilities, list) and ("vision" in capabilities or "multimodal" in capabilities)


def _is_small(value: Any, depth: int) -> bool:
    """Tell whether a value fits into the messages that announce models: nesting, finite numbers, 64 bits, text."""
    if isinstance(value, dict):
        return depth > 0 and all(
            _is_text(name) and _is_small(each, depth - 1) for name, each in value.items()
        )
    if isinstance(value, list):
        return depth > 0 and all(_is_small(each, depth - 1) for each in value)
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return -(1 << 63) <= value < 1 << 63
    return not isinstance(value, str) or _is_text(value)


def _is_text(value: str) -> bool:
    """Tell whether a text can be encoded: it has no half of a surrogate pair, and was valid UTF-8."""
    return value.isascii() or not ("\ufffd" in value or any("\ud800" <= each <= "\udfff" for each in value))


class UpstreamModels:
    """Keeps the models of one upstream server registered.

    Args:
        client: sends the requests to the upstream server.
        key: the API key to send; ``None`` if the server requires none.
        server: where the models are registered.
        naming: the models' names there.
        poll_interval: seconds between two polls.
        max_concurrency: concurrent calls to one model; ``None`` sets no limit.
        named: the server's names of its models, if its list is not to be used; empty: its list is used.
        asks_for_usage: see ``UpstreamCalls``.
        cache_tokens: how many tokens the server's prompt cache holds; ``None``: unknown.
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
        named: Collection[str] = (),
        asks_for_usage: bool = True,
        cache_tokens: int | None = None,
    ) -> None:
        self._client = client
        self._key = key
        self._server = server
        self._naming = naming
        self._poll_interval = self._next_interval = poll_interval
        self._max_concurrency = max_concurrency
        self._named = named
        self._cache_tokens = cache_tokens
        self._calls = UpstreamCalls(client, key, self._on_lost, asks_for_usage=asks_for_usage)
        # By the cluster's name.
        self._registered: dict[str, _Listed] = {}
        # By the cluster's name: why the model could not be registered, as it was logged.
        self._conflicts: dict[str, str] = {}
        # Why there are no models, as it was logged; empty if there are.
        self._problem = ""
        # Failed polls in a row, and calls since the last good one that could not reach the server.
        self._failures = 0
        # How many models were left out because there are too many, as it was logged.
        self._left_out = 0
        self._poll_requested = trio.Event()

    def _on_lost(self, unreachable: bool) -> None:
        self._failures += unreachable
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
            except LocalExhaustion:
                # Nothing was learned about the server.
                return
            except HttpError as error:
                self._failed(
                    f"its models cannot be listed: {error}",
                    may_be_busy=isinstance(error, ConnectTimeout | IncompleteResponse),
                    activity=activity,
                )
                return
        if timeout.cancelled_caught:
            self._failed(f"it does not answer within {POLL_TIMEOUT:g} s", may_be_busy=True, activity=activity)
        elif self._named:
            models = ModelList({name: ChatModelOptions() for name in self._named})
            models.via = _listed_via(body) if status == 200 else {}
            self._update(models)
        elif status == 429:
            # It is alive, and asks to be polled less often.
            self._failures = 0
            self._back_off()
        elif status == 200:
            try:
                models = parse_model_list(body, self._naming.takes)
            except ValueError as error:
                self._failed(str(error))
                return
            self._note_left_out(models.left_out)
            self._update(models)
        elif status in (401, 403, 404):
            self._failed(
                _NO_LIST if status == 404 else _KEY_REFUSED if self._key else _KEY_MISSING, back_off=True
            )
        else:
            self._failed(f"it answers the request for its models with the status {status}")

    def _failed(
        self, problem: str, *, may_be_busy: bool = False, activity: int = 0, back_off: bool = False
    ) -> None:
        """Take note of a failed poll, and unregister the models if it is not the first one.

        Args:
            problem: what is wrong.
            may_be_busy: a server that works on calls may fail like this.
            activity: what the calls' counter was before the poll.
            back_off: the configuration has to be corrected first; polling often does not help.
        """
        if may_be_busy and (self._calls.activity != activity or self._client.in_use):
            return
        self._failures += 1
        if self._registered and self._failures < 2:
            self._next_interval = min(self._poll_interval, RETRY_INTERVAL)
            return
        if back_off:
            self._back_off()
        self._unregister_all(problem)

    def _note_left_out(self, left_out: int) -> None:
        if left_out and not self._left_out:
            logger.warning(
                "the list of %s has too many models: %d are served, %d are left out; choose with only=",
                self._client.base,
                _MAX_MODELS,
                left_out,
            )
        self._left_out = left_out

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
                extra={"fields": {"models_lost": _some(names)}},
            )

    def _update(self, models: ModelList) -> None:
        """Register, unregister and replace models until they are those of ``models``."""
        wanted: dict[str, _Listed] = {}
        for model, options in models.items():
            name = self._naming.name(model)
            if name is not None:
                wanted.setdefault(name, (model, options, models.via.get(model, ())))
        self._failures = 0
        gone = [
            name
            for name, known in self._registered.items()
            if name not in wanted or not _same(wanted[name], known)
        ]
        for name in gone:
            self._unregister(name)
        self._conflicts = {name: why for name, why in self._conflicts.items() if name in wanted}
        new = [
            name
            for name, listed in wanted.items()
            if name not in self._registered and self._register(name, listed)
        ]
        if self._problem or new or gone:
            self._problem = ""
            fields = {
                "models": len(self._registered),
                "models_gained": _some(new),
                "models_lost": _some(set(gone) - set(new)),
            }
            logger.info("the models of %s are served", self._client.base, extra={"fields": fields})

    def _register(self, name: str, listed: _Listed) -> bool:
        model, options, via = listed
        try:
            self._server.register_raw(
                name,
                partial(self._calls.forward, model),
                attrs.evolve(options, cache_tokens=self._cache_tokens),
                max_concurrency=self._max_concurrency,
                via=via,
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
        self._registered[name] = listed
        return True

    def _unregister(self, name: str) -> None:
        del self._registered[name]
        self._server.unregister_model(name)


def _same(one: _Listed, other: _Listed) -> bool:
    """Tell whether two entries are the same, apart from the fields that are only shown."""
    (model, options, via), (other_model, others, other_via) = one, other
    return (model, via, options.context_window, options.supports_vision) == (
        other_model,
        other_via,
        others.context_window,
        others.supports_vision,
    )


def _some(names: Collection[str]) -> list[str]:
    """Return names for a log line, sorted; of many only the first, and how many more there are."""
    some = sorted(names)
    if len(some) > _MAX_LOGGED:
        some[_MAX_LOGGED:] = [f"and {len(some) - _MAX_LOGGED} more"]
    return some

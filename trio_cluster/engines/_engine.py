"""What an engine is, and how one is found by its name.

An *engine* turns a model on this machine into handlers on a :class:`~trio_cluster.ClusterServer`. It is found
through the entry-point group ``trio_cluster.engines``, so that any installed package can bring more of them;
an entry point is an object with the attributes of :class:`Engine`, most easily an instance of a subclass.

``--serve`` names an engine in one word of text: ``ENGINE[:ARGUMENT][,KEY=VALUE]...``. :func:`parse_serve`
reads it and checks everything that can be checked without loading a model, so that a typing error is not
found out minutes later. :func:`serve_engine` then runs the engine as a task next to the server; the engine
registers its models on the server, may add and remove some while it runs, and takes them back when it is
cancelled.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Final, Protocol

import attrs
import trio

from trio_cluster.core.model import ChatModelOptions, Kind
from trio_cluster.errors import ClusterError, OptionsError

__all__ = [
    "GROUP",
    "Engine",
    "LoadingEngine",
    "ModelServer",
    "Option",
    "ServeSpec",
    "ServedModel",
    "boolean",
    "fraction",
    "parse_serve",
    "serve_engine",
    "text",
    "whole_number",
]

#: The entry-point group in which engines are looked up.
GROUP: Final = "trio_cluster.engines"

# Our own, so that they are there in a source tree that was never installed, and nobody else's package can
# take their names.
_OWN: Final = {
    name: EntryPoint(name, f"trio_cluster.{folder}.{name}:engine", GROUP)
    for folder, names in (
        ("engines", ("hibari", "llama", "minilm", "openai", "whisper")),
        ("demo", ("digits",)),
    )
    for name in names
}

# A comma separates options only if a key and an equals sign follow, so that paths and values may have commas
# in them.
_SEPARATOR: Final = re.compile(r",(?=\s*[A-Za-z_][\w-]*\s*=)")


class ModelServer(Protocol):
    """The part of :class:`~trio_cluster.ClusterServer` that engines use."""

    def register_chat(self, name: str, handler: Any, options: ChatModelOptions | None = None) -> Any:
        """Serve a chat model."""
        ...

    def register_embedding(self, name: str, handler: Any) -> Any:
        """Serve an embedding model."""
        ...

    def register_asr(self, name: str, handler: Any) -> Any:
        """Serve a speech-recognition model."""
        ...

    def register_tts(self, name: str, handler: Any) -> Any:
        """Serve a text-to-speech model."""
        ...

    def register_image_generation(self, name: str, handler: Any) -> Any:
        """Serve an image model."""
        ...

    def register_raw(
        self,
        name: str,
        handler: Any,
        options: ChatModelOptions | None = None,
        *,
        max_concurrency: int | None = None,
    ) -> Any:
        """Serve a model that answers every route itself."""
        ...

    def unregister_model(self, name: str) -> Any:
        """Stop serving a model."""
        ...


@attrs.frozen
class Option:
    """One ``KEY=VALUE`` that an engine understands.

    ``read`` turns the text into the value and raises ``ValueError`` with a message that says what was
    expected.
    """

    read: Callable[[str], Any]
    default: Any
    help: str


@attrs.frozen
class ServeSpec:
    """One ``--serve``, read and checked."""

    engine: str
    argument: str = ""
    options: Mapping[str, Any] = attrs.field(factory=dict)
    """A value for every option of the engine, given or default."""


class Engine:
    """The contract of an engine. Importing one must be cheap: its libraries are imported when it serves.

    Attributes:
        summary: one line for a list of engines.
        argument: what stands after the colon, for messages and help; empty if nothing may stand there.
        requires: the importable modules that the engine needs.
        extra: which extra of which distribution brings them, as pip would be told.
        options: what may follow, by key.
    """

    summary: ClassVar[str] = ""
    argument: ClassVar[str] = ""
    requires: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    options: ClassVar[Mapping[str, Option]] = {}

    def check(self, argument: str, options: Mapping[str, Any]) -> None:
        """Look at what was asked for without loading anything.

        Raises:
            ValueError: it cannot be right; the message says why.
        """

    async def serve(
        self,
        argument: str,
        options: Mapping[str, Any],
        server: ModelServer,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve models on ``server`` until cancelled; ``task_status.started()`` says they are registered.

        Cancellation takes the models back from the server. What they hold is freed when the last request that
        uses it has ended.

        Raises:
            ClusterError: it cannot be done; the message is one clear line.
        """
        raise NotImplementedError


@attrs.frozen
class ServedModel:
    """A model that an engine has loaded. ``options`` is for chat models only."""

    name: str
    kind: Kind
    handler: Callable[..., Any]
    options: ChatModelOptions | None = None

    def register(self, server: ModelServer) -> None:
        """Register the model on ``server``; a name that is taken raises ``ValueError``."""
        register = getattr(server, f"register_{self.kind}")
        if self.kind == "chat":
            register(self.name, self.handler, self.options)
        else:
            register(self.name, self.handler)


class LoadingEngine(Engine):
    """An engine that loads one model once and serves it for as long as it runs.

    Subclasses write :meth:`open`; :meth:`prepare` is for what has to be fetched first.
    """

    async def prepare(self, argument: str, options: Mapping[str, Any]) -> str:
        """Return the argument to load from, with a name such as that of the demo weights made a path."""
        await trio.lowlevel.checkpoint()
        return argument

    def open(self, argument: str, options: Mapping[str, Any]) -> AbstractContextManager[ServedModel]:
        """Load the model; leaving the context frees it. Entered and left in a worker thread.

        Raises:
            ClusterError: it cannot be loaded; the message is one clear line.
        """
        raise NotImplementedError

    async def serve(
        self,
        argument: str,
        options: Mapping[str, Any],
        server: ModelServer,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """See :meth:`Engine.serve`."""
        opened = self.open(await self.prepare(argument, options), options)
        # Loading cannot be interrupted; a cancellation meanwhile is seen when it is done, with nothing left
        # behind.
        with trio.CancelScope(shield=True):
            model = await trio.to_thread.run_sync(opened.__enter__)
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            with _registered(model, server):
                task_status.started()
                await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(partial(opened.__exit__, None, None, None))


@contextmanager
def _registered(model: ServedModel, server: ModelServer) -> Iterator[None]:
    try:
        model.register(server)
    except ValueError as error:
        raise ClusterError(str(error)) from error
    try:
        yield
    finally:
        server.unregister_model(model.name)


def parse_serve(spec: str) -> ServeSpec:
    """Read ``ENGINE[:ARGUMENT][,KEY=VALUE]...`` and check it.

    A comma begins an option only where ``KEY=`` follows it; all others belong to the argument or the value.

    Raises:
        OptionsError: there is no such engine, or it does not understand an option or value; the message lists
            what there is.
        ClusterError: the engine's libraries are not installed; the message says what to install.
    """
    head, *pairs = _SEPARATOR.split(spec)
    name, _, argument = head.partition(":")
    name, argument = name.strip(), argument.strip()
    engine = _find(name, spec)
    if argument and not engine.argument:
        raise OptionsError(f"{spec}: the engine '{name}' takes no argument, but got '{argument}'")
    options = {key: option.default for key, option in engine.options.items()}
    given: set[str] = set()
    for pair in pairs:
        key, _, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if key not in engine.options:
            known = ", ".join(engine.options) or "none"
            raise OptionsError(f"{spec}: the engine '{name}' has no option '{key}'; it has: {known}")
        if key in given:
            raise OptionsError(f"{spec}: '{key}' is given twice")
        given.add(key)
        try:
            options[key] = engine.options[key].read(value.strip())
        except ValueError as error:
            raise OptionsError(f"{spec}: {key}: {error}") from error
    missing = [module for module in engine.requires if importlib.util.find_spec(module) is None]
    if missing:
        raise ClusterError(
            f"the engine '{name}' needs {' and '.join(missing)}, not installed here;"
            f" try: pip install '{engine.extra}'"
        )
    try:
        engine.check(argument, options)
    except ValueError as error:
        raise OptionsError(f"{spec}: {error}") from error
    return ServeSpec(name, argument, options)


async def serve_engine(
    spec: ServeSpec,
    server: ModelServer,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run the engine that ``spec`` names until cancelled.

    ``task_status.started()`` comes when its models are loaded and registered on ``server``, which may be
    running or not. Cancellation takes them back.

    Raises:
        ClusterError: the engine cannot serve; the message is one clear line.
    """
    await _find(spec.engine, spec.engine).serve(spec.argument, spec.options, server, task_status=task_status)


def _find(name: str, spec: str) -> Engine:
    installed = {point.name: point for point in entry_points(group=GROUP)} | _OWN
    if name not in installed:
        known = ", ".join(sorted(installed)) or "none"
        raise OptionsError(f"{spec}: there is no engine '{name}'; there are: {known}")
    try:
        engine: Engine = installed[name].load()
    except Exception as error:
        # Someone else's package, so anything can go wrong in it; whoever starts the node has to know which.
        raise ClusterError(
            f"the engine '{name}' ({installed[name].value}) cannot be imported: {error}"
        ) from error
    return engine


# Readers for options


def text(value: str) -> str:
    """Read a text that is not empty."""
    if not value:
        raise ValueError("expected some text, got nothing")
    return value


def boolean(value: str) -> bool:
    """Read yes or no."""
    words = {
        "yes": True,
        "true": True,
        "on": True,
        "1": True,
        "no": False,
        "false": False,
        "off": False,
        "0": False,
    }
    if value.lower() not in words:
        raise ValueError(f"expected yes or no, got '{value}'")
    return words[value.lower()]


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Return a reader for whole numbers from ``low`` to ``high``."""

    def read(value: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,12}", value) or not low <= int(value) <= high:
            raise ValueError(f"expected a whole number from {low} to {high}, got '{value}'")
        return int(value)

    return read


def fraction(low: float, high: float) -> Callable[[str], float]:
    """Return a reader for numbers from ``low`` to ``high``."""

    def read(value: str) -> float:
        try:
            number = float(value)
        except ValueError:
            number = low - 1.0
        if not low <= number <= high:
            raise ValueError(f"expected a number from {low:g} to {high:g}, got '{value}'")
        return number

    return read

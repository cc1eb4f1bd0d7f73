"""The contract of engines, how an engine is found by its name, and how ``--serve`` is parsed.

Theory of operation
===================

An *engine* turns a model on this machine into handlers on a :class:`~trio_cluster.ClusterServer`. It is looked up in
the entry-point group ``trio_cluster.engines``, so that any installed package can bring more of them. An entry point is
an object with the attributes of :class:`Engine`, most easily an instance of a subclass.

``--serve`` describes an engine with its argument and options: ``ENGINE[:ARGUMENT][,KEY=VALUE]...``. :func:`parse_serve`
parses that and checks everything that can be checked without loading a model, so that a typing error is reported before
minutes of loading. :func:`serve_engine` then runs the engine as a task beside the server. The engine registers its
models on the server, may add and remove some while it runs, and unregisters them when it is cancelled.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from functools import partial
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, requires
from typing import Any, ClassVar, Final, Protocol

import attrs
import trio

from trio_cluster.core.model import ChatModelOptions, Kind
from trio_cluster.core.sizes import parse_size
from trio_cluster.core.threads import NoThread, run_in_thread, start_in_thread
from trio_cluster.errors import ClusterError, OptionsError, UpstreamLost
from trio_cluster.local.adapters import Adapter, Provider, adapt
from trio_cluster.on_demand.memory import own_memory
from trio_cluster.on_demand.residents import START_TIMEOUT, OnDemand, Open, Run
from trio_cluster.options import parse_boolean

__all__ = [
    "GROUP",
    "RESIDENT_OPTIONS",
    "Engine",
    "LoadingEngine",
    "ModelServer",
    "Option",
    "ServeSpec",
    "ServedModel",
    "boolean",
    "fraction",
    "install_command",
    "loaded",
    "not_loaded",
    "parse_serve",
    "read_serve",
    "serve_engine",
    "serve_on_demand",
    "size",
    "text",
    "whole_number",
]

#: The entry-point group in which engines are looked up.
GROUP: Final = "trio_cluster.engines"

# The engines of this package. Listed here, they are also found in a source tree that is not installed, and no other
# package can take their names.
BUILT_IN: Final = {
    name: EntryPoint(name, f"trio_cluster.{folder}.{name}:engine", GROUP)
    for folder, names in (
        ("engines", ("command", "hibari", "llama", "minilm", "openai", "whisper")),
        ("demo", ("digits",)),
    )
    for name in names
}

# A comma separates options only if a key and an equals sign follow, so that paths and values may contain commas.
_SEPARATOR: Final = re.compile(r",(?=\s*[A-Za-z_][\w-]*\s*=)")
_EXTRA: Final = re.compile(r"(?P<package>[\w.-]+)\[(?P<extras>[\w., -]+)\]")
_OWN_PACKAGE: Final = "trio-cluster"


class ModelServer(Protocol):
    """The part of :class:`~trio_cluster.ClusterServer` that engines use.

    The ``register_...`` methods raise ``ValueError`` if the name is taken. All methods are synchronous.
    """

    @property
    def on_demand(self) -> OnDemand:
        """What runs only while it is asked for."""
        ...

    def register_chat(
        self,
        name: str,
        handler: Any,
        options: ChatModelOptions | None = None,
        *,
        count_tokens: Any = None,
    ) -> Any:
        """Register a chat model."""
        ...

    def register_embedding(self, name: str, handler: Any) -> Any:
        """Register an embedding model."""
        ...

    def register_asr(self, name: str, handler: Any) -> Any:
        """Register a speech-to-text model."""
        ...

    def register_tts(self, name: str, handler: Any) -> Any:
        """Register a text-to-speech model."""
        ...

    def register_image_generation(self, name: str, handler: Any) -> Any:
        """Register an image model."""
        ...

    def register_raw(
        self,
        name: str,
        handler: Any,
        options: ChatModelOptions | None = None,
        *,
        max_concurrency: int | None = None,
        via: Sequence[str] = (),
    ) -> Any:
        """Register a passthrough model, whose handler answers every route itself."""
        ...

    def unregister_model(self, name: str) -> Any:
        """Stop serving a model."""
        ...


@attrs.frozen
class Option:
    """One ``KEY=VALUE`` that an engine understands.

    Attributes:
        read: converts the text of the value, without spaces around it. Raises ``ValueError`` with a message that says
            what was expected.
        default: the value if the option is not given; not converted.
        help: one line about what it does.
        read_list: converts a list of the configuration file; ``None``: it cannot be a list. Raises like ``read``.
    """

    read: Callable[[str], Any]
    default: Any
    help: str
    read_list: Callable[[Sequence[Any]], Any] | None = None

    def read_value(self, value: object) -> Any:
        """Convert a value of the configuration file. Synchronous.

        Raises:
            ValueError: it is not what was expected.
        """
        if isinstance(value, list) and self.read_list is not None:
            return self.read_list(value)
        if isinstance(value, bool):
            return self.read("yes" if value else "no")
        if isinstance(value, str | int | float):
            return self.read(str(value).strip())
        raise ValueError(f"expected one value, got {value!r}")


@attrs.frozen
class ServeSpec:
    """One ``--serve``, parsed and checked.

    Attributes:
        engine: the engine's name.
        argument: what was given after the colon; may be empty.
        options: a value for every option of the engine, given or default.
    """

    engine: str
    argument: str = ""
    options: Mapping[str, Any] = attrs.field(factory=dict)


class Engine:
    """The contract of an engine. Importing one must be cheap: its libraries are imported when it serves.

    Attributes:
        summary: one line for a list of engines.
        argument: what the text after the colon means, for messages and help; empty if there must not be any.
        requires: the importable modules that the engine needs.
        extra: the requirement that installs them, as ``pip install`` takes it: ``my-package[my-extra]``.
        options: the engine's options by key.
    """

    summary: ClassVar[str] = ""
    argument: ClassVar[str] = ""
    requires: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    options: ClassVar[Mapping[str, Option]] = {}

    @property
    def all_options(self) -> Mapping[str, Option]:
        """The engine's options, and those that it shares with others, by key."""
        return self.options

    def check(self, argument: str, options: Mapping[str, Any]) -> None:
        """Check what can be checked without loading anything. Synchronous; does nothing by default.

        Args:
            argument: the text after the colon; may be empty.
            options: a value for every option.

        Raises:
            ValueError: the engine cannot serve this; the message says why, and what would be right.
        """

    async def serve(
        self,
        argument: str,
        options: Mapping[str, Any],
        server: ModelServer,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve models on ``server`` until cancelled.

        Cancellation unregisters the models. The memory that they use is freed when the last request that uses it has
        ended.

        Args:
            argument: the text after the colon; may be empty.
            options: a value for every option.
            server: where the models are registered; it may be running or not.
            task_status: ``started()`` is called when the models are registered.

        Raises:
            ClusterError: the engine cannot serve; the message is one line.
        """
        raise NotImplementedError


@attrs.frozen
class ServedModel:
    """A model that an engine has loaded.

    Attributes:
        name: the model's name in the cluster.
        kind: what it answers; a kind for which :class:`ModelServer` has a ``register_...`` method.
        handler: a handler in any of the documented shapes.
        options: for chat models only.
        count_tokens: for chat models only: a handler that returns how many tokens a prompt has.
    """

    name: str
    kind: Kind
    handler: Callable[..., Any]
    options: ChatModelOptions | None = None
    count_tokens: Callable[..., Any] | None = None

    def register(self, server: ModelServer) -> None:
        """Register the model on ``server``. Synchronous.

        Raises:
            ValueError: the name is taken.
        """
        register = getattr(server, f"register_{self.kind}")
        if self.kind == "chat":
            counts = {} if self.count_tokens is None else {"count_tokens": self.count_tokens}
            register(self.name, self.handler, self.options, **counts)
        else:
            register(self.name, self.handler)


class LoadingEngine(Engine):
    """An engine that loads one model and serves it for as long as it runs, or loads it when it is asked for.

    Subclasses implement :meth:`open`, and :meth:`prepare` if something has to be downloaded first. Those that implement
    ``describe`` have the options ``memory``, ``idle`` and ``start_timeout`` too: with ``memory`` or ``idle``, the model
    is loaded when it is first asked for, and unloaded when it is idle or when another one needs its memory.
    """

    async def prepare(self, argument: str, options: Mapping[str, Any]) -> str:
        """Return the argument for :meth:`open`, for instance a path in the place of a name. A checkpoint.

        Args:
            argument: the text after the colon; may be empty.
            options: a value for every option.

        Raises:
            ClusterError: what the engine needs cannot be had; the message is one line.
        """
        await trio.lowlevel.checkpoint()
        return argument

    def open(self, argument: str, options: Mapping[str, Any]) -> AbstractContextManager[ServedModel]:
        """Load the model; leaving the context frees it. The context is entered and left in a worker thread.

        Args:
            argument: what :meth:`prepare` has returned.
            options: a value for every option.

        Raises:
            ClusterError: the model cannot be loaded; the message is one line.
        """
        raise NotImplementedError

    def describe(self, argument: str, options: Mapping[str, Any]) -> ServedModel:
        """Return what :meth:`open` will give, as far as that is known without loading it. Synchronous.

        The handler is not used. ``count_tokens`` is not used either, apart from whether there is one.

        Args:
            argument: what :meth:`prepare` has returned.
            options: a value for every option.

        Raises:
            ClusterError: the engine cannot load models on demand.
        """
        raise ClusterError("this engine cannot load its model on demand")

    @property
    def all_options(self) -> Mapping[str, Option]:
        """See :attr:`Engine.all_options`."""
        return {**self.options, **RESIDENT_OPTIONS} if self._can_describe else self.options

    @property
    def _can_describe(self) -> bool:
        return type(self).describe is not LoadingEngine.describe

    async def serve(
        self,
        argument: str,
        options: Mapping[str, Any],
        server: ModelServer,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """See :meth:`Engine.serve`."""
        argument = await self.prepare(argument, options)
        if self._can_describe and (options["memory"] is not None or options["idle"] is not None):
            await serve_on_demand(
                server,
                self.describe(argument, options),
                partial(loaded, partial(self.open, argument, options)),
                memory=options["memory"],
                idle=options["idle"] or 0.0,
                start_timeout=options["start_timeout"],
                task_status=task_status,
            )
            return
        opened = self.open(argument, options)
        # Loading cannot be interrupted. A cancellation that arrives meanwhile takes effect after it, and the model is
        # freed.
        with trio.CancelScope(shield=True):
            model = await start_in_thread(opened.__enter__)
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            with _registered(model, server):
                task_status.started()
                await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await _leave_in_thread(opened)


@asynccontextmanager
async def loaded(
    open_: Callable[[], AbstractContextManager[ServedModel]], run: Run
) -> AsyncIterator[ServedModel]:
    """Load a model in a thread when the context is entered, and free it when it is left.

    Loading cannot be interrupted: a cancellation that arrives meanwhile takes effect after it.

    Args:
        open_: see :meth:`LoadingEngine.open`.
        run: is told how much memory the model takes in this process.
    """
    opened, before = open_(), own_memory()
    with trio.CancelScope(shield=True):
        model = await start_in_thread(opened.__enter__)
    try:
        await trio.lowlevel.checkpoint_if_cancelled()
        if (taken := own_memory() - before) > 0:
            run.takes(taken)
        yield model
    finally:
        with trio.CancelScope(shield=True):
            await _leave_in_thread(opened)


async def serve_on_demand(
    server: ModelServer,
    model: ServedModel,
    open_: Open,
    *,
    memory: int | None = None,
    idle: float = 0.0,
    start_timeout: float = START_TIMEOUT,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve a model that is loaded when it is first asked for, until cancelled; then free it, and unregister it.

    Args:
        server: where the model is registered; it may be running or not.
        model: describes it; see ``LoadingEngine.describe``.
        open_: entering the context that it returns loads the model and gives it, a :class:`ServedModel` with its
            handlers; leaving the context frees it. Inside, no request uses it any more. See :func:`loaded`.
        memory: the bytes that it needs; ``None``: it is measured when it is loaded, alone.
        idle: seconds without a request after which it is unloaded; 0: only if its memory is needed.
        start_timeout: seconds that it may take to load.
        task_status: ``started()`` is called when the model is registered.

    Raises:
        ClusterError: its name is taken, or it needs more memory than there is.
    """

    @asynccontextmanager
    async def adapted(run: Run) -> AsyncIterator[tuple[Adapter, Adapter | None]]:
        async with open_(run) as found:
            count = None if found.count_tokens is None else adapt(found.count_tokens)
            yield adapt(found.handler), count

    # The pool lets no call in while the model is not loaded. But it may be lost while a call waits for a slot.
    def current() -> tuple[Adapter, Any]:
        if tenancy.value is None:
            raise UpstreamLost(model.name, tenancy.resident.why or "it has ended")
        found: tuple[Adapter, Any] = tenancy.value
        return found

    async def answer(request: Any, provider: Provider) -> None:
        handler, _ = current()
        await handler(request, provider)

    async def count_tokens(request: Any, provider: Provider) -> None:
        _, count = current()
        await count(request, provider)

    counts = count_tokens if model.count_tokens is not None else None
    tenancy = server.on_demand.add(
        model.name, [model.name], adapted, memory=memory, idle=idle, start_timeout=start_timeout
    )
    try:
        with _registered(attrs.evolve(model, handler=answer, count_tokens=counts), server):
            task_status.started()
            await server.on_demand.run(tenancy)
    finally:
        server.on_demand.remove(tenancy)


async def _leave_in_thread(opened: AbstractContextManager[ServedModel]) -> None:
    """Free a model in a thread, or here if there can be none."""
    free = partial(opened.__exit__, None, None, None)
    try:
        await run_in_thread(free)
    except NoThread:
        free()


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
    """Parse ``ENGINE[:ARGUMENT][,KEY=VALUE]...`` and check it. Synchronous.

    A comma begins an option only where ``KEY=`` follows it; every other comma belongs to the argument or the value.
    Spaces around the parts are removed, and ``-`` in a key means ``_``.

    Args:
        spec: the text of one ``--serve``.

    Raises:
        OptionsError: there is no such engine, or it does not accept the argument, an option or a value. The message
            lists what there is.
        ClusterError: the engine cannot be imported, or its libraries are not installed; the message says what to
            install.
    """
    head, *pairs = _SEPARATOR.split(spec)
    name, _, argument = head.partition(":")
    given: list[tuple[str, object]] = []
    for pair in pairs:
        key, _, value = pair.partition("=")
        given.append((key.strip().replace("-", "_"), value.strip()))
    return _checked(spec, name.strip(), argument.strip(), given)


def read_serve(table: Mapping[str, object], where: str) -> ServeSpec:
    """Read one ``[[serve]]`` of the configuration file, and check it. Synchronous.

    Args:
        table: ``engine``, ``argument`` and the options of the engine.
        where: the place, for messages.

    Raises:
        OptionsError, ClusterError: see :func:`parse_serve`.
    """
    options = dict(table)
    name, argument = options.pop("engine", None), options.pop("argument", "")
    if not isinstance(name, str) or not name:
        raise OptionsError(f'{where}: give the engine, such as engine = "llama"')
    if not isinstance(argument, str):
        raise OptionsError(f"{where}: argument: expected text, got {argument!r}")
    return _checked(where, name, argument.strip(), options.items())


def _checked(where: str, name: str, argument: str, given: Iterable[tuple[str, object]]) -> ServeSpec:
    engine = _find(name, where)
    if argument and not engine.argument:
        raise OptionsError(f"{where}: the engine '{name}' takes no argument; leave out ':{argument}'")
    known = engine.all_options
    options = {key: option.default for key, option in known.items()}
    seen: set[str] = set()
    for key, value in given:
        if key not in known:
            names = ", ".join(known) or "none"
            raise OptionsError(f"{where}: the engine '{name}' has no option '{key}'; it has: {names}")
        if key in seen:
            raise OptionsError(f"{where}: '{key}' is given twice; give it once")
        seen.add(key)
        try:
            options[key] = known[key].read_value(value)
        except ValueError as error:
            raise OptionsError(f"{where}: {key}: {error}") from error
    missing = [module for module in engine.requires if importlib.util.find_spec(module) is None]
    if missing:
        raise ClusterError(
            f"the engine '{name}' needs {' and '.join(missing)}, not installed here;"
            f" install them with: {install_command(engine.extra)}"
        )
    try:
        engine.check(argument, options)
    except ValueError as error:
        raise OptionsError(f"{where}: {error}") from error
    return ServeSpec(name, argument, options)


def install_command(extra: str) -> str:
    """Return the command that installs an extra, for messages.

    This package may not be on the index that pip uses. For its own extras, the command names what they consist of,
    which works wherever this package came from.

    Args:
        extra: a requirement such as ``my-package[my-extra]``.
    """
    parts = _EXTRA.fullmatch(extra)
    if parts is None or parts["package"] != _OWN_PACKAGE:
        return f"pip install '{extra}'"
    try:
        declared = requires(_OWN_PACKAGE) or []
    except PackageNotFoundError:
        declared = []
    wanted = _members(parts["extras"], declared)
    in_checkout = f"pip install '.[{parts['extras']}]'"
    if not wanted:
        return f"{in_checkout} (in a checkout)"
    return f"pip install {' '.join(map(repr, wanted))}; or, in a checkout, {in_checkout}"


def _members(extras: str, declared: list[str]) -> list[str]:
    """Return the requirements that extras of this package consist of, those of nested ones included."""
    found: dict[str, None] = {}
    for extra in map(str.strip, extras.split(",")):
        for line in declared:
            requirement, _, marker = map(str.strip, line.partition(";"))
            if marker.replace('"', "'") != f"extra == '{extra}'":
                continue
            nested = _EXTRA.fullmatch(requirement)
            if nested is not None and nested["package"] == _OWN_PACKAGE:
                found |= dict.fromkeys(_members(nested["extras"], declared))
            else:
                found[requirement] = None
    return list(found)


async def serve_engine(
    spec: ServeSpec,
    server: ModelServer,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run the engine that ``spec`` names until cancelled. Cancellation unregisters its models.

    Args:
        spec: the engine with its argument and options, from :func:`parse_serve`.
        server: where the models are registered; it may be running or not.
        task_status: ``started()`` is called when the models are loaded and registered.

    Raises:
        ClusterError: the engine cannot serve; the message is one line.
    """
    await _find(spec.engine, spec.engine).serve(spec.argument, spec.options, server, task_status=task_status)


def _find(name: str, spec: str) -> Engine:
    installed = {point.name: point for point in entry_points(group=GROUP)} | BUILT_IN
    if name not in installed:
        known = ", ".join(sorted(installed)) or "none"
        raise OptionsError(f"{spec}: there is no engine '{name}'; there are: {known}")
    try:
        engine: Engine = installed[name].load()
    except Exception as error:
        # The code of another package, which may raise anything; the message names it.
        raise ClusterError(
            f"the engine '{name}' ({installed[name].value}) cannot be imported: {error}"
        ) from error
    return engine


# Converters for options


def text(value: str) -> str:
    """Return a text that must not be empty.

    Raises:
        ValueError: it is empty.
    """
    if not value:
        raise ValueError("expected some text, got nothing")
    return value


def boolean(value: str) -> bool:
    """Convert ``yes``, ``true``, ``on``, ``1``, or ``no``, ``false``, ``off``, ``0``, in any case.

    Raises:
        ValueError: it is none of these.
    """
    return parse_boolean(value)


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Return a converter for whole numbers.

    Args:
        low: the smallest that is accepted.
        high: the largest that is accepted.

    Returns:
        A function that raises ``ValueError`` for everything else.
    """

    def read(value: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,12}", value) or not low <= int(value) <= high:
            raise ValueError(f"expected a whole number from {low} to {high}, got '{value}'")
        return int(value)

    return read


def fraction(low: float, high: float) -> Callable[[str], float]:
    """Return a converter for numbers that need not be whole.

    Args:
        low: the smallest that is accepted.
        high: the largest that is accepted.

    Returns:
        A function that raises ``ValueError`` for everything else.
    """

    def read(value: str) -> float:
        try:
            number = float(value)
        except ValueError:
            number = low - 1.0
        if not low <= number <= high:
            raise ValueError(f"expected a number from {low:g} to {high:g}, got '{value}'")
        return number

    return read


def size(value: str) -> int:
    """Convert an amount of memory, such as ``20GiB``, to bytes.

    Raises:
        ValueError: it is none.
    """
    return parse_size(int(value) if value.isdecimal() else value)


async def not_loaded(request: object) -> None:
    """Stand for a handler in the description of a model that is not loaded."""
    raise RuntimeError("the model is not loaded")


#: The options of everything that runs on demand.
RESIDENT_OPTIONS: Final[Mapping[str, Option]] = {
    "memory": Option(size, None, "the memory that it needs, such as 20GiB; measured if it is not given"),
    "idle": Option(
        fraction(0, 1e9), None, "seconds without a request after which it is stopped; 0: never for that"
    ),
    "start_timeout": Option(fraction(0.1, 1e6), START_TIMEOUT, "seconds that its start may take"),
}

"""The pytest plugin of trio_cluster: a whole cluster as a fixture, and a seed for every test that uses it.

pytest loads its plugins at every start, in every project of an environment. So this is a separate module that imports
nothing but pytest; the package is imported when the first test uses the fixture.
"""

from __future__ import annotations

import functools
import inspect
import secrets
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from trio_cluster.testing import SimulatedCluster

#: The seed of a test that uses the fixtures; ``None`` if its run cannot be reproduced.
_SEED = pytest.StashKey[int | None]()
_FAILED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--cluster-seed``."""
    parser.getgroup("trio_cluster").addoption(
        "--cluster-seed",
        type=int,
        metavar="SEED",
        help="the seed of simulated clusters; by default a new one for each test, which is reported if the test fails",
    )


@pytest.fixture
def cluster_seed(request: pytest.FixtureRequest) -> int:
    """The seed of this test: the value of ``--cluster-seed``, or a new random number."""
    if not _has_pytest_trio(request.config):
        pytest.fail("the fixture 'cluster' needs pytest-trio: pip install pytest-trio", pytrace=False)
    if not _is_async(request.node):
        pytest.fail("the fixture 'cluster' is for async tests", pytrace=False)
    seed: int | None = request.config.getoption("--cluster-seed")
    if seed is None:
        seed = secrets.randbelow(2**32)
    request.node.stash[_SEED] = seed
    return seed


@pytest.fixture
async def cluster(cluster_seed: int, request: pytest.FixtureRequest) -> AsyncIterator[SimulatedCluster]:
    """An open simulated cluster, on a virtual clock, which must become quiescent when the test is over.

    It has a master without models, and no workers. A test that has passed so far fails if anything is left of any
    request after it, or if any stream that a client of the cluster received breaks the grammar of streams.
    """
    from trio_cluster.testing import check_streams, open_cluster, seeded, settle
    from trio_cluster.testing._seed import can_be_seeded

    seed: int | None = cluster_seed
    if request.config.getoption("--cluster-seed") is None and not can_be_seeded():
        # A version of trio whose scheduler cannot be seeded. Tests work with it, but failures cannot be reproduced.
        seed = request.node.stash[_SEED] = None
    async with open_cluster(seed=seed) as opened:
        # Fixtures are set up concurrently. Seeded again here, what the test draws does not depend on the others.
        with nullcontext() if seed is None else seeded(seed):
            yield opened
            if not request.node.stash.get(_FAILED, False):
                await settle(opened)
                check_streams(opened.responses)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run tests that use the fixture by trio, in virtual time."""
    for number, item in enumerate(items) if _has_pytest_trio(config) else ():
        if "cluster" in getattr(item, "fixturenames", ()) and _uses_ours(item) and _is_async(item):
            marker = item.get_closest_marker("trio")
            run = None if marker is None else marker.kwargs.get("run")
            items[number] = item = _taken_from_asyncio(item)
            item.add_marker(pytest.mark.trio(run=functools.partial(_run_virtually, run)), append=False)


def pytest_configure(config: pytest.Config) -> None:
    """Register the other half of :func:`pytest_fixture_setup`."""
    config.pluginmanager.register(_FixtureFunctions(), "trio_cluster_fixture_functions")


class _Hidden:
    """A fixture's function, which does not look like one that pytest-asyncio would run."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__module__ = function.__module__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, object, object]:
    """Keep async fixtures of tests that use the fixture away from pytest-asyncio.

    In its mode ``auto`` it runs every async fixture in an asyncio loop, in whatever test. It decides that in a wrapper
    of this hook, by the fixture's function, so that is hidden until all wrappers have run.
    """
    function = fixturedef.func
    if request.scope != "function" or not _is_run_virtually(request.node) or not _is_async_function(function):
        return (yield)
    fixturedef.func = _Hidden(function)  # type: ignore[misc]
    try:
        return (yield)
    finally:
        fixturedef.func = function  # type: ignore[misc]


class _FixtureFunctions:
    """Shows the function of a fixture again, before pytest-trio sets the fixture up."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> None:
        if isinstance(fixturedef.func, _Hidden):
            fixturedef.func = fixturedef.func.function  # type: ignore[misc]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Record whether the test itself has failed: then the state of its cluster is not checked."""
    if _SEED in item.stash and isinstance(item, pytest.Function):
        test = item.obj

        @functools.wraps(test)
        async def recorded(**arguments: Any) -> None:
            __tracebackhide__ = True
            try:
                await test(**arguments)
            except BaseException:
                item.stash[_FAILED] = True
                raise

        item.obj = recorded
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the seed to the report of a test that has failed."""
    report = yield
    seed = item.stash.get(_SEED, None)
    if report.failed and seed is not None:
        report.sections.append(("trio_cluster", f"to reproduce: --cluster-seed={seed}"))
    return report


def _has_pytest_trio(config: pytest.Config) -> bool:
    return bool(config.pluginmanager.hasplugin("trio"))


def _uses_ours(item: pytest.Item) -> bool:
    """Return whether the test uses the fixture of this plugin, and not another one with the same name."""
    # Not part of pytest's documented interface, and so looked up with care: without it, every one counts as this one.
    info = getattr(item, "_fixtureinfo", None)
    definitions = getattr(info, "name2fixturedefs", {}).get("cluster", ())
    return info is None or (bool(definitions) and definitions[-1].func.__module__ == __name__)


def _taken_from_asyncio(item: pytest.Item) -> pytest.Item:
    """Return the test as a plain one, if pytest-asyncio has made it one that runs in an asyncio loop."""
    if type(item) is pytest.Function or not isinstance(item, pytest.Function):
        return item
    if not any(marker.name == "asyncio" for marker in item.own_markers):
        return item
    plain: pytest.Function = pytest.Function.from_parent(
        item.parent,
        name=item.name,
        callspec=getattr(item, "callspec", None),
        callobj=item.obj,
        fixtureinfo=getattr(item, "_fixtureinfo", None),
        originalname=item.originalname,
    )
    plain.own_markers[:] = [marker for marker in item.own_markers if marker.name != "asyncio"]
    return plain


def _is_run_virtually(node: Any) -> bool:
    marker = node.get_closest_marker("trio") if isinstance(node, pytest.Function) else None
    run = None if marker is None else marker.kwargs.get("run")
    return isinstance(run, functools.partial) and run.func is _run_virtually


def _is_async_function(function: object) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


def _is_async(item: pytest.Item) -> bool:
    return inspect.iscoroutinefunction(inspect.unwrap(getattr(item, "obj", None) or (lambda: None)))


def _run_virtually(run: Callable[..., Any] | None, *args: Any, clock: Any = None, **options: Any) -> Any:
    """Call ``trio.run``, with an autojumping mock clock unless the test has a clock of its own."""
    import trio
    from trio.testing import MockClock

    return (run or trio.run)(*args, clock=clock or MockClock(autojump_threshold=0), **options)

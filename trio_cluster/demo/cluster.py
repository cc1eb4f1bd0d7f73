"""The demo's cluster: it starts, waits until it serves, shows how to use it, and stops.

Master and workers are separate processes, started with the command line that a user would type, so that the demo shows
what users get. Each is in a process group of its own: Ctrl-C reaches the demo only, which then stops all of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Final, TextIO, TypeVar

import trio

from trio_cluster.engines import parse_serve
from trio_cluster.engines._engine import install_command
from trio_cluster.engines._pinned_weights import WEIGHTS
from trio_cluster.engines._weights import ensure_weights
from trio_cluster.errors import ClusterError
from trio_cluster.net.sockets import Sockets, close_all, local_address, open_pair, port_of

from .questions import QUESTIONS, Api, ApiFailed
from .snippets import how_to_try

__all__ = ["run_demo"]

T = TypeVar("T")

#: What each worker serves. The names of the models are those in ``questions.py``.
_WORKERS: Final = {
    "worker-1": ("llama:smollm2,ctx=2048,parallel=2", "minilm"),
    "worker-2": ("whisper", "hibari", "digits"),
}

#: Seconds in which all models have to be registered.
_START_TIMEOUT: Final = 120.0

#: Seconds between two polls of the list of models.
_POLL_INTERVAL: Final = 0.2

#: Seconds that a node has to stop before it is killed.
_GRACE: Final = 5.0

#: Lines of a node's log that are shown if it ends too early.
_LOG_TAIL: Final = 30


async def run_demo(port: int, *, check: bool, host: str = "127.0.0.1", out: TextIO | None = None) -> int:
    """Run the demo until cancelled, or with ``check`` until each of its models has answered one question.

    Cancellation waits until all processes of the demo have been stopped.

    Args:
        port: the port of the API; 0 picks a free one. Workers connect to the port 1000 above it.
        check: ask every model one question, print questions and answers, and return.
        host: the address that the master listens on.
        out: where to print, standard output by default.

    Returns:
        0, or 1 if a model has not answered its question as expected.

    Raises:
        ClusterError: the demo cannot run: libraries, weights or ports are missing, or a node has ended too early.
    """
    show = partial(print, file=sys.stdout if out is None else out, flush=True)
    try:
        for specs in _WORKERS.values():
            for spec in specs:
                parse_serve(spec)
    except ClusterError as error:
        raise ClusterError(
            f"the demo needs more libraries; install them with: {install_command('trio-cluster[demo]')} ({error})"
        ) from error
    external, internal = await open_pair(Sockets(), host, port, host, None)
    # Only to find out early, with a clear error, whether both ports are free; the master opens them again.
    port = port_of(external)
    close_all([*external, *internal])
    for weights in WEIGHTS.values():
        await ensure_weights(weights)
    address = local_address(host)
    api = Api(address, port)
    began = time.monotonic()
    commands = {"master": ["master", str(port), "--host", host]}
    for name, specs in _WORKERS.items():
        serve = [word for spec in specs for word in ("--serve", spec)]
        commands[name] = ["worker", address, str(port), "--name", name, *serve]
    show(f"starting a master and {len(_WORKERS)} workers ...")
    code = 0
    failure: ClusterError | None = None
    async with trio.open_nursery() as nursery:

        def fail(reason: str) -> None:
            nonlocal failure
            failure = failure or ClusterError(reason)
            nursery.cancel_scope.cancel(reason=reason)

        for name, command in commands.items():
            await nursery.start(_run_node, name, command, fail, show)
        models = await _wait_for_models(api)
        if models is None:
            fail(
                f"not all models of the demo were registered within {_START_TIMEOUT:g} s;"
                " try again when this machine is less busy"
            )
        else:
            show(f"ready after {time.monotonic() - began:.1f} s: {', '.join(models)}")
            if check:
                code = await _ask_all(api, show)
            else:
                show(how_to_try(api.url))
                await trio.sleep_forever()
        nursery.cancel_scope.cancel(reason="the demo has ended")
    if failure is not None:
        raise failure
    return code


async def _run_node(
    name: str,
    arguments: Sequence[str],
    fail: Callable[[str], None],
    show: Callable[[str], None],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run one node until cancelled; call ``fail`` if its process ends before that.

    Args:
        name: for messages.
        arguments: the node's command line.
        fail: called with the reason.
        show: prints a message.
        task_status: ``started()`` is called when the process runs.
    """
    # Without the variables that configure real nodes on this machine, so that the demo is the same everywhere.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRIO_CLUSTER_")}
    if "TRIO_CLUSTER_CACHE" in os.environ:
        environment["TRIO_CLUSTER_CACHE"] = os.environ["TRIO_CLUSTER_CACHE"]
    # Two workers share the cores; threads that spin while they wait would slow each other down.
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    environment.setdefault("OPENBLAS_NUM_THREADS", "1")
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "trio_cluster.demo.node", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        process_group=0,
    )
    log_tail: deque[str] = deque(maxlen=_LOG_TAIL)
    try:
        task_status.started()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_read_log, process, log_tail)
            code = await process.wait()
            # Its last lines are in the pipe. A child of it may still hold the pipe open, so the wait has a limit.
            nursery.cancel_scope.deadline = trio.current_time() + 1.0
        show("\n".join([f"{name} has ended with exit code {code}; the end of its log:", *log_tail]))
        fail(f"the demo's {name} has ended with exit code {code}")
    finally:
        with trio.CancelScope(shield=True):
            await _stop(process)


async def _read_log(process: trio.Process, lines: deque[str]) -> None:
    assert process.stderr is not None
    rest = b""
    async for data in process.stderr:
        *complete, rest = (rest + data).split(b"\n")
        lines.extend(line.decode(errors="replace") for line in complete)
        # A line without an end is truncated, so that memory is bounded.
        rest = rest[-65536:]
    if rest:
        lines.append(rest.decode(errors="replace"))


async def _stop(process: trio.Process) -> None:
    """Stop a node and wait until it has ended, for little more than 5 seconds at most. Called shielded."""
    assert process.stdin is not None
    assert process.stderr is not None
    if process.returncode is None:
        process.terminate()
        with trio.move_on_after(_GRACE):
            # The log is not read any more; with the pipe closed, a write to it cannot block the node.
            await process.stderr.aclose()
            await process.wait()
    if process.returncode is None:
        process.kill()
        await process.wait()
    await process.stdin.aclose()
    with suppress(trio.ClosedResourceError):
        await process.stderr.aclose()


async def _wait_for_models(api: Api) -> list[str] | None:
    """Return the served models when all that the questions need are there; ``None`` after the timeout."""
    wanted = {question.model for question in QUESTIONS}
    with trio.move_on_after(_START_TIMEOUT):
        while True:
            with suppress(ApiFailed):
                there = await _in_thread(api.models)
                if wanted <= set(there):
                    return there
            await trio.sleep(_POLL_INTERVAL)
    return None


async def _ask_all(api: Api, show: Callable[[str], None]) -> int:
    code = 0
    shared: dict[str, bytes] = {}
    for question in QUESTIONS:
        show(f"\n{question.kind}: {question.model}\n  asked:    {question.text}")
        began = time.monotonic()
        try:
            answer = await _in_thread(partial(question.ask, api, shared))
        except ApiFailed as error:
            answer, code = f"FAILED: {error}", 1
        indented = answer.replace("\n", "\n            ")
        show(f"  answered: {indented}   ({time.monotonic() - began:.2f} s)")
    show("\nall models answered" if code == 0 else "\nnot all models answered as expected")
    return code


async def _in_thread(function: Callable[[], T]) -> T:
    # An abandoned thread only waits for a response, and has a timeout.
    return await trio.to_thread.run_sync(function, abandon_on_cancel=True)

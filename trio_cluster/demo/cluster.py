"""Start the demo's cluster, wait until it serves, show how to use it, and take it down again.

Master and workers are processes of their own, started with the command line that a user would type, so that
what the demo shows is what there is. They are in process groups of their own: Ctrl-C reaches the demo only,
which then stops them one by one and leaves none behind.
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
from trio_cluster.engines._weights import WEIGHTS, ensure_weights
from trio_cluster.errors import ClusterError
from trio_cluster.net.sockets import Sockets, close_all, local_address, open_pair, port_of

from .questions import QUESTIONS, Api, ApiFailed
from .snippets import how_to_try

__all__ = ["run_demo"]

T = TypeVar("T")

#: What each worker serves; the models' names are those of `_questions`.
_WORKERS: Final = {
    "worker-1": ("llama:smollm2,ctx=2048,parallel=2", "minilm"),
    "worker-2": ("whisper", "hibari", "digits"),
}

#: Seconds until every model has to be registered.
_START: Final = 120.0

#: Seconds between two looks at which models there are.
_LOOK: Final = 0.2

#: Seconds that a node has for stopping before it is killed.
_GRACE: Final = 5.0

#: Lines of a node's log that are shown if it dies.
_LAST_WORDS: Final = 30


async def run_demo(port: int, *, check: bool, host: str = "127.0.0.1", out: TextIO | None = None) -> int:
    """Run the demo until cancelled, or with ``check`` until its models have been asked one question each.

    Args:
        port: the master's port; 0 picks a free one. The workers use the port 1000 above it.
        check: ask, print questions and answers, and end.
        host: where the master listens.
        out: where to print, standard output by default.

    Cancellation stops all processes of the demo before it goes on.

    Returns:
        0, or 1 if a model gave a wrong answer to its question.

    Raises:
        ClusterError: it cannot run: libraries, weights or ports are missing, or a node has died.
    """
    say = partial(print, file=sys.stdout if out is None else out, flush=True)
    try:
        for specs in _WORKERS.values():
            for spec in specs:
                parse_serve(spec)
    except ClusterError as error:
        raise ClusterError(
            f"the demo needs more than is installed; try: pip install 'trio-cluster[demo]' ({error})"
        ) from error
    external, internal = await open_pair(Sockets(), host, port, host, None)
    # Only to know early, and by a clear message, that they can be had; the master opens them again.
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
    say(f"starting a master and {len(_WORKERS)} workers ...")
    code = 0
    failure: ClusterError | None = None
    async with trio.open_nursery() as nursery:

        def fail(reason: str) -> None:
            nonlocal failure
            failure = failure or ClusterError(reason)
            nursery.cancel_scope.cancel(reason=reason)

        for name, command in commands.items():
            await nursery.start(_run_node, name, command, fail, say)
        models = await _wait_for_models(api)
        if models is None:
            fail(f"the demo's models were not there after {_START:g} s")
        else:
            say(f"ready after {time.monotonic() - began:.1f} s: {', '.join(models)}")
            if check:
                code = await _ask_all(api, say)
            else:
                say(how_to_try(api.url))
                await trio.sleep_forever()
        nursery.cancel_scope.cancel(reason="the demo has ended")
    if failure is not None:
        raise failure
    return code


async def _run_node(
    name: str,
    arguments: Sequence[str],
    fail: Callable[[str], None],
    say: Callable[[str], None],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run one node for as long as this task is not cancelled."""
    # The demo is to be the same whatever is configured for real nodes on this machine.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRIO_CLUSTER_")}
    if "TRIO_CLUSTER_CACHE" in os.environ:
        environment["TRIO_CLUSTER_CACHE"] = os.environ["TRIO_CLUSTER_CACHE"]
    # Two workers share the cores; threads that spin while they wait would starve each other.
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
    last_words: deque[str] = deque(maxlen=_LAST_WORDS)
    try:
        task_status.started()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_listen, process, last_words)
            code = await process.wait()
            # Its last lines are in the pipe already, unless somebody else still holds it open.
            nursery.cancel_scope.deadline = trio.current_time() + 1.0
        say("\n".join([f"{name} has ended with exit code {code}; its last words:", *last_words]))
        fail(f"the demo's {name} has ended with exit code {code}")
    finally:
        with trio.CancelScope(shield=True):
            await _stop(process)


async def _listen(process: trio.Process, lines: deque[str]) -> None:
    assert process.stderr is not None
    rest = b""
    async for data in process.stderr:
        *complete, rest = (rest + data).split(b"\n")
        lines.extend(line.decode(errors="replace") for line in complete)
        # A line without an end is cut, so that nothing grows without bounds.
        rest = rest[-65536:]
    if rest:
        lines.append(rest.decode(errors="replace"))


async def _stop(process: trio.Process) -> None:
    """End a node and wait until it is gone. Called shielded; takes at most a little longer than the grace."""
    assert process.stdin is not None
    assert process.stderr is not None
    if process.returncode is None:
        process.terminate()
        with trio.move_on_after(_GRACE):
            # Nobody listens to it any more, and a full pipe must not keep it from stopping.
            await process.stderr.aclose()
            await process.wait()
    if process.returncode is None:
        process.kill()
        await process.wait()
    await process.stdin.aclose()
    with suppress(trio.ClosedResourceError):
        await process.stderr.aclose()


async def _wait_for_models(api: Api) -> list[str] | None:
    """Return the models once those that are asked for are all there; ``None`` if that takes too long."""
    wanted = {question.model for question in QUESTIONS}
    with trio.move_on_after(_START):
        while True:
            with suppress(ApiFailed):
                there = await _in_thread(api.models)
                if wanted <= set(there):
                    return there
            await trio.sleep(_LOOK)
    return None


async def _ask_all(api: Api, say: Callable[[str], None]) -> int:
    code = 0
    heard: dict[str, bytes] = {}
    for question in QUESTIONS:
        say(f"\n{question.kind}: {question.model}\n  asked:    {question.text}")
        began = time.monotonic()
        try:
            answer = await _in_thread(partial(question.ask, api, heard))
        except ApiFailed as error:
            answer, code = f"FAILED: {error}", 1
        indented = answer.replace("\n", "\n            ")
        say(f"  answered: {indented}   ({time.monotonic() - began:.2f} s)")
    say("\nall models answered" if code == 0 else "\nnot all models answered as they should")
    return code


async def _in_thread(function: Callable[[], T]) -> T:
    # Waits for an answer and nothing else, with a timeout of its own: harmless to leave behind.
    return await trio.to_thread.run_sync(function, abandon_on_cancel=True)

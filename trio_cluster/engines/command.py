"""``command``: any program that serves the OpenAI API, started when one of its models is asked for.

The program is a model server such as llama.cpp's, vLLM or Ollama. It is told a free port of this machine, and is ready
when it answers a request for ``ready`` with a success. Requests are forwarded to it as those to any other server are
(``openai.py``). What is started and stopped, and when, is decided for all residents of a node together
(``on_demand/schedule.py``).
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from typing import Any, ClassVar, Final

import trio

from trio_cluster.core.model import ChatModelOptions, ModelInfo
from trio_cluster.core.threads import NoThread, run_in_thread
from trio_cluster.errors import ClusterError, UpstreamLost
from trio_cluster.local.passthrough import RawCall
from trio_cluster.on_demand.memory import group_memory
from trio_cluster.on_demand.residents import Run

from ._base_url import BaseURL
from ._child_process import ChildProcess, open_child
from ._engine import RESIDENT_OPTIONS, Engine, ModelServer, Option, fraction, text, whole_number
from ._http_client import HttpClient, HttpRequest
from ._http_response import HttpError
from ._upstream_calls import UpstreamCalls

__all__ = ["engine"]

logger = logging.getLogger("trio_cluster.engines.command")

_PORT: Final = "{port}"
_EXAMPLE: Final = "llama-server -m model.gguf --port {port}"
_HOST: Final = "127.0.0.1"
#: Asked for readiness unless the options say something else. A server that does not know this route is ready too.
_DEFAULT_READY: Final = "/health"
_UNKNOWN_ROUTE: Final = frozenset({404, 405, 501})
#: Seconds between two requests for readiness, and for one of them; and the bytes of its response that are read.
_POLL: Final = 0.1
_POLL_TIMEOUT: Final = 5.0
_POLL_LIMIT: Final = 1 << 20
#: Seconds after the program is ready at which its memory is measured; the last one is the time between the rest.
_MEASURED_AFTER: Final = (0.0, 2.0, 10.0, 60.0)


def _command(value: str) -> tuple[str, ...]:
    return _words(shlex.split(value))


def _words(values: Sequence[Any]) -> tuple[str, ...]:
    if not values or not all(isinstance(each, str) and "\0" not in each for each in values) or not values[0]:
        raise ValueError(f"expected a program and its arguments, such as {_EXAMPLE}, got {list(values)!r}")
    return tuple(values)


def _models(value: str) -> tuple[str, ...]:
    return _names(value.split(";"))


def _names(values: Sequence[Any]) -> tuple[str, ...]:
    names = tuple(each.strip() if isinstance(each, str) else each for each in values)
    for name in names:
        try:
            ModelInfo(name=name, kind="any")
        except TypeError as error:
            raise ValueError(str(error)) from error
    if not names or len(set(names)) < len(names):
        raise ValueError(f"expected names of models, each once, got {list(values)!r}")
    return names


def _route(value: str) -> str:
    if not value.startswith("/") or not value.isascii() or not value.isprintable() or " " in value:
        raise ValueError(f"expected a path such as /health, got '{value}'")
    return value


def _assignments(values: Sequence[Any]) -> tuple[tuple[str, str], ...]:
    pairs = [each.partition("=") if isinstance(each, str) else ("", "", "") for each in values]
    if not all(name and sign and "\0" not in name + value for name, sign, value in pairs):
        raise ValueError(f"expected NAME=VALUE for each, got {list(values)!r}")
    return tuple((name, value) for name, _, value in pairs)


class _Command(Engine):
    summary = "any kind: a program that serves the OpenAI API, run when it is asked for"
    argument = f"the program with its arguments, such as {_EXAMPLE}"
    options: ClassVar[Mapping[str, Option]] = {
        "command": Option(
            _command, (), "the program with its arguments, in place of ARGUMENT", read_list=_words
        ),
        "models": Option(_models, (), "the names of the models that it serves, a;b", read_list=_names),
        **RESIDENT_OPTIONS,
        "ready": Option(_route, None, "the path that it answers with a success when it is ready; /health"),
        "grace": Option(fraction(0, 3600), 10.0, "seconds that it has to end after SIGTERM"),
        "environment": Option(
            lambda value: _assignments(value.split(";")), (), "NAME=VALUE;... for it", read_list=_assignments
        ),
        "max_concurrency": Option(whole_number(1, 100_000), None, "concurrent requests to one model"),
        "name": Option(text, None, "its name in the log and in errors; its first model's by default"),
    }

    def check(self, argument: str, options: Mapping[str, Any]) -> None:
        """See :meth:`Engine.check`."""
        command = _command_of(argument, options)
        if not any(_PORT in word for word in command) and not any(
            _PORT in value for _, value in options["environment"]
        ):
            raise ValueError(f"the command must have {_PORT} in it, for the port to listen on: {_EXAMPLE}")
        if not options["models"]:
            raise ValueError("give the names of its models: models=a;b")
        if shutil.which(command[0]) is None:
            raise ValueError(f"there is no program '{command[0]}'")

    async def serve(
        self,
        argument: str,
        options: Mapping[str, Any],
        server: ModelServer,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """See :meth:`Engine.serve`. The models are registered at once; the program does not run before it is wanted."""
        command, models = _command_of(argument, options), options["models"]
        name = options["name"] or models[0]
        tenancy = server.on_demand.add(
            name,
            models,
            partial(_running, command, name, options),
            memory=options["memory"],
            idle=options["idle"] or 0.0,
            start_timeout=options["start_timeout"],
        )

        async def forward(model: str, call: RawCall) -> None:
            calls: UpstreamCalls | None = tenancy.value
            if calls is None:
                raise UpstreamLost(call.request.model, tenancy.resident.why or "it has ended")
            await calls.forward(model, call)

        with ExitStack() as registered:
            registered.callback(server.on_demand.remove, tenancy)
            for model in models:
                try:
                    server.register_raw(
                        model,
                        partial(forward, model),
                        ChatModelOptions(),
                        max_concurrency=options["max_concurrency"],
                    )
                except ValueError as error:
                    raise ClusterError(str(error)) from error
                registered.callback(server.unregister_model, model)
            task_status.started()
            await server.on_demand.run(tenancy)


def _command_of(argument: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the program and its arguments.

    Raises:
        ValueError: there is none, or there are two.
    """
    if argument and options["command"]:
        raise ValueError("give the program once, as the argument or as command")
    command: tuple[str, ...] = options["command"]
    if argument:
        command = _command(argument)
    if not command:
        raise ValueError(f"give the program and its arguments: command:{_EXAMPLE},models=NAME")
    return command


@asynccontextmanager
async def _running(
    command: Sequence[str], name: str, options: Mapping[str, Any], run: Run
) -> AsyncIterator[UpstreamCalls]:
    """Run the program, wait until it is ready, and give what forwards calls to it."""
    port = str(_free_port())
    # The keys of this node are not for it.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRIO_CLUSTER_")}
    environment |= {key: value.replace(_PORT, port) for key, value in options["environment"]}
    async with open_child(
        [word.replace(_PORT, port) for word in command],
        name,
        environment=environment,
        grace=options["grace"],
        logger=logger,
    ) as child:
        run.output = child.last_lines
        root = HttpClient(BaseURL.parse(f"http://{_HOST}:{port}"), connect_timeout=_POLL_TIMEOUT)
        client = HttpClient(BaseURL.parse(f"http://{_HOST}:{port}/v1"))
        try:
            await _wait_ready(child, root, options["ready"])
            root.close()
            child.on_end = run.lost
            async with trio.open_nursery() as nursery:
                if options["memory"] is None:
                    nursery.start_soon(_measure, child.pid, run)
                yield UpstreamCalls(client, None, lambda unreachable: None)
                nursery.cancel_scope.cancel(reason="the program is stopped")
        finally:
            root.close()
            client.close()


def _free_port() -> int:
    """Return a port of this machine on which nothing listens. Synchronous."""
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port


async def _wait_ready(child: ChildProcess, client: HttpClient, path: str | None) -> None:
    """Wait until the program is ready: it has answered, and still runs.

    Raises:
        ClusterError: it has ended.
    """
    while not child.ended.is_set():
        with trio.move_on_after(_POLL_TIMEOUT):
            try:
                status, _ = await client.fetch(HttpRequest("GET", path or _DEFAULT_READY), _POLL_LIMIT)
            except HttpError:
                status = 0
            is_ready = 200 <= status < 300 or (path is None and status in _UNKNOWN_ROUTE)
            # It may have ended before this task runs again. Its end is not reported a second time.
            if is_ready and not child.ended.is_set():
                return
        with trio.move_on_after(_POLL):
            await child.ended.wait()
    # What it has said last may be on its way.
    with trio.move_on_after(_POLL):
        await child.output_ended.wait()
    raise ClusterError(child.how)


async def _measure(group: int, run: Run) -> None:
    """Measure the memory of the program now and then: with the requests, it grows."""
    for seconds in _MEASURED_AFTER:
        await trio.sleep(seconds)
        await _measure_once(group, run)
    while True:
        await trio.sleep(_MEASURED_AFTER[-1])
        await _measure_once(group, run)


async def _measure_once(group: int, run: Run) -> None:
    try:
        size = await run_in_thread(group_memory, group)
    except NoThread:
        return
    if size:
        run.takes(size)


engine: Final = _Command()

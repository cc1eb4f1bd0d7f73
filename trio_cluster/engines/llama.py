"""``llama``: any GGUF model as a chat model, through xllamacpp (llama.cpp in this process).

Theory of operation
===================

*Cancellation.* Each request is one blocking call in a thread. llama.cpp passes its output to a callback in that thread,
whose return value can end the request. The callback is called for every token and, with ``return_progress``, after
every batch of the prompt. So a cancelled request stops within one step, whose length while the prompt is read is
bounded by ``batch``.

*Slots.* As many requests run at once as the model has slots; they share the model's steps (continuous batching). Other
requests wait in this process, not in llama.cpp, which does not call the callback of a waiting request, so that such a
request could not be cancelled. For the same reason, and for fairness, the ``n`` choices of one request are generated
one after the other in one slot. The prompt is processed once for all of them.

*Memory.* llama.cpp has no backpressure: the output that a slow client has not read yet is kept, at most a full context
of text.
"""

from __future__ import annotations

import json
import secrets
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final

import attrs
import trio

from trio_cluster.core.model import ChatModelOptions
from trio_cluster.core.threads import run_in_thread
from trio_cluster.errors import ApiError, ClusterError, HandlerFailed, InvalidRequest
from trio_cluster.local.adapters import Provider
from trio_cluster.local.slots import Slots
from trio_cluster.openai import ChatRequest, OutputChunk

from ._base_url import BaseURL
from ._engine import (
    LoadingEngine,
    ModelServer,
    Option,
    ServedModel,
    loaded,
    not_loaded,
    serve_on_demand,
    text,
    whole_number,
)
from ._gguf_files import find_parts, model_name
from ._gguf_folder import FolderModel, follow_folder
from ._gguf_header import read_header
from ._http_client import HttpClient, HttpRequest, HttpResponse
from ._http_response import HttpError
from ._hub import HubReference, download
from ._pinned_weights import WEIGHTS
from ._threads import Outlet, ThreadStream
from ._upstream_calls import authorization
from ._weights import ensure_weights

__all__ = ["Llama", "engine", "request_body"]

_DEMO: Final = "smollm2"

#: What llama.cpp needs for computing, beside weights and context.
_MEMORY_MARGIN: Final = 1.1

# Sent only if the client sets them: with the documented default, the model's own default is used. Small models do
# better at a lower temperature than the API's default.
_SAMPLING: Final = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
_PASSED_ON: Final = ("logit_bias", "response_format", "reasoning_effort")

# Fields of llama.cpp's own API that are passed on. Its other fields are not, because some of them select slots or
# files.
_LLAMA_FIELDS: Final = (
    "chat_template_kwargs",
    "dry_base",
    "dry_multiplier",
    "grammar",
    "ignore_eos",
    "min_p",
    "mirostat",
    "mirostat_eta",
    "mirostat_tau",
    "reasoning_format",
    "repeat_last_n",
    "repeat_penalty",
    "top_k",
    "typical_p",
    "xtc_probability",
    "xtc_threshold",
)


class _Llama(LoadingEngine):
    summary = "chat: any GGUF model, through llama.cpp"
    argument = f"path of a .gguf file or of a folder with some, hf:REPO[:FILE], or {_DEMO}"
    requires = ("xllamacpp",)
    extra = "trio-cluster[llama]"
    options: ClassVar[Mapping[str, Option]] = {
        "name": Option(text, None, "the model's name; the file's name without .gguf by default"),
        "ctx": Option(whole_number(64, 10_000_000), 4096, "tokens of context for each request"),
        "parallel": Option(whole_number(1, 256), 4, "requests that are worked on at once"),
        "threads": Option(whole_number(1, 1024), 1, "threads of llama.cpp; more than free cores is slower"),
        "batch": Option(
            whole_number(1, 65536), 64, "tokens of a prompt that are read in one uninterruptible step"
        ),
        "gpu_layers": Option(
            whole_number(0, 10_000), 0, "layers to keep on a GPU, if this build can use one"
        ),
    }

    def check(self, argument: str, options: Mapping[str, Any]) -> None:
        """See :meth:`Engine.check`."""
        if not argument:
            raise ValueError(f"give the {self.argument}")
        if (reference := HubReference.parse(argument)) is not None:
            reference.check()
        elif argument != _DEMO and not Path(argument).exists():
            raise ValueError(f"there is no file '{argument}'; give the {self.argument}")
        elif Path(argument).is_dir() and options["name"] is not None:
            raise ValueError("name: the models of a folder have the names of their files; leave it out")

    async def prepare(self, argument: str, options: Mapping[str, Any]) -> str:
        """See :meth:`LoadingEngine.prepare`."""
        if (reference := HubReference.parse(argument)) is not None:
            return str(await download(reference))
        if argument != _DEMO:
            return argument
        weights = WEIGHTS[_DEMO]
        return str(await ensure_weights(weights) / weights.files[0].name)

    @contextmanager
    def open(self, argument: str, options: Mapping[str, Any]) -> Iterator[ServedModel]:
        """See :meth:`LoadingEngine.open`."""
        model = Llama.load(argument, options)
        try:
            yield _served(argument, options, model.context, model.chat, model.count_tokens)
        finally:
            model.close()

    def describe(self, argument: str, options: Mapping[str, Any]) -> ServedModel:
        """See :meth:`LoadingEngine.describe`."""
        context = options["ctx"]
        # What is wrong with the file is reported when it is loaded.
        with suppress(OSError, ValueError):
            context = min(context, read_header(Path(argument)).context or context)
        return _served(argument, options, context, not_loaded, not_loaded)

    async def serve(
        self,
        argument: str,
        options: Mapping[str, Any],
        server: ModelServer,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """See :meth:`Engine.serve`. The models of a folder are loaded when they are asked for."""
        serve = partial(self._serve_on_demand, options, server)
        if await trio.Path(argument).is_dir():
            await follow_folder(Path(argument), serve, task_status=task_status)
            return
        if options["memory"] is None and options["idle"] is None:
            await super().serve(argument, options, server, task_status=task_status)
            return
        path = Path(await self.prepare(argument, options))
        files = await run_in_thread(find_parts, path)
        size = sum([(await trio.Path(file).stat()).st_size for file in files])
        await serve(FolderModel(path.stem, path, size, 0), task_status=task_status)

    async def _serve_on_demand(
        self,
        options: Mapping[str, Any],
        server: ModelServer,
        model: FolderModel,
        *,
        task_status: trio.TaskStatus[None],
    ) -> None:
        argument, memory = str(model.path), options["memory"]
        described = await run_in_thread(self.describe, argument, options)
        await serve_on_demand(
            server,
            described,
            partial(loaded, partial(self.open, argument, options)),
            memory=await run_in_thread(_memory_of, model, options) if memory is None else memory,
            idle=options["idle"] or 0.0,
            start_timeout=options["start_timeout"],
            task_status=task_status,
        )


def _served(
    argument: str, options: Mapping[str, Any], context: int, handler: Any, count_tokens: Any
) -> ServedModel:
    """Return the description of a model, with its handlers."""
    is_demo = argument.endswith(WEIGHTS[_DEMO].files[0].name)
    return ServedModel(
        options["name"] or (_DEMO if is_demo else model_name(argument)),
        "chat",
        handler,
        ChatModelOptions(
            context_window=context,
            accepts_token_ids=True,
            # What has been read stays in the slot in which it was.
            cache_tokens=context * options["parallel"],
        ),
        count_tokens,
    )


def _memory_of(model: FolderModel, options: Mapping[str, Any]) -> int | None:
    """Return how many bytes a model will need: its weights and its context. Blocks; ``None`` if that is not known.

    What the process takes when a model was just loaded says little: the weights are mapped, and are read when they are
    used.
    """
    try:
        header = read_header(model.path)
    except (OSError, ValueError):
        return None
    context: int = min(options["ctx"], header.context or options["ctx"]) * options["parallel"]
    return round(_MEMORY_MARGIN * (model.size + context * header.bytes_per_token))


engine = _Llama()


@attrs.define(eq=False)
class Llama:
    """A loaded model.

    Attributes:
        context: the context size: the tokens that the prompt and the output of one request may have together.
        client: sends requests to the port of the model; ``None``: it has none, and cannot count.
        key: what the port requires.
        takes_tools: its chat template has a place for tools. Otherwise llama.cpp would leave them out of the prompt,
            and the model would answer as if there were none.
    """

    context: int
    _server: Any
    _slots: Slots
    takes_tools: bool = True
    client: HttpClient | None = None
    key: str = ""

    @classmethod
    def load(cls, path: str, options: Mapping[str, Any]) -> Llama:
        """Load a GGUF file. Blocks.

        Args:
            path: the file.
            options: a value for every option of the engine.

        Raises:
            ClusterError: llama.cpp cannot load it.
        """
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = path
        parameters.n_parallel = options["parallel"]
        # llama.cpp divides the context among the slots.
        parameters.n_ctx = options["ctx"] * options["parallel"]
        parameters.n_batch = parameters.n_ubatch = options["batch"]
        parameters.n_gpu_layers = options["gpu_layers"]
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = options["threads"]
        parameters.warmup = False
        parameters.verbosity = 0
        # A loaded model always listens on a port of the loopback interface. The random key keeps other processes out.
        key = secrets.token_hex(16)
        parameters.api_keys = [key]
        parameters.n_threads_http = 1
        parameters.ui = False
        parameters.endpoint_slots = False
        try:
            server = xllamacpp.Server(parameters)
        except RuntimeError as error:
            raise ClusterError(f"llama.cpp cannot load '{path}': {error}") from error
        request = urllib.request.Request(
            f"{server.listening_address}/props", headers={"Authorization": f"Bearer {key}"}
        )
        # The context size, which the model may limit, and its template can only be read from that port.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            request, timeout=30
        ) as response:
            properties = json.load(response)
        context = int(properties["default_generation_settings"]["n_ctx"])
        takes_tools = _takes_tools(properties)
        client = HttpClient(BaseURL.parse(server.listening_address))
        return cls(context, server, Slots(options["parallel"]), takes_tools, client, key)

    def close(self) -> None:
        """Drop the model. It is freed when the last request that uses it has ended. Synchronous."""
        self._server = None
        if self.client is not None:
            self.client.close()

    async def count_tokens(self, request: ChatRequest) -> int:
        """Return how many tokens the prompt of a request has: those that its answer would report.

        Counting needs no slot: llama.cpp applies the chat template and the vocabulary, and does not run the model.

        Raises:
            InvalidRequest: llama.cpp refuses the request.
            HandlerFailed: llama.cpp has failed.
            ApiError: the model is being unloaded.
        """
        self._require_server()
        body = request_body(request, 0)
        prompt = (await self._ask("/apply-template", body))["prompt"]
        counted = {"content": prompt, "add_special": True, "parse_special": True}
        return len((await self._ask("/tokenize", counted))["tokens"])

    async def _ask(self, path: str, body: dict[str, Any]) -> Any:
        """Send a request to the port of the model, and return the decoded answer."""
        client, answer, status = self.client, bytearray(), 0
        assert client is not None

        async def read(response: HttpResponse) -> None:
            nonlocal status
            status = response.status
            while piece := await response.receive():
                answer.extend(piece)

        headers = [*authorization(self.key), ("content-type", "application/json")]
        try:
            await client.send(HttpRequest("POST", path, headers, json.dumps(body).encode()), read)
            value = json.loads(answer)
        except (HttpError, ValueError) as error:
            self._require_server()
            raise HandlerFailed from error
        if status == 400:
            raise InvalidRequest(str(value.get("error", {}).get("message")))
        if status != 200:
            raise HandlerFailed
        return value

    def _require_server(self) -> Any:
        server = self._server
        if server is None:
            raise ApiError(503, "The model is being unloaded; try again shortly", code="shutting_down")
        return server

    async def chat(self, request: ChatRequest, provider: Provider) -> None:
        """Handle a request; the handler that is registered. Cancellation waits for the current step of llama.cpp.

        Raises:
            InvalidRequest: llama.cpp refuses the request, the prompt does not fit into the context, or the model cannot
                use tools.
            HandlerFailed: llama.cpp has failed.
            ApiError: the model is being unloaded.
        """
        server = self._require_server()
        if not self.takes_tools and _tools(request):
            raise InvalidRequest(
                f"The model '{request.model}' cannot use tools: its chat template has no place for them",
                param="tools",
                code="tools_not_supported",
            )
        prompt_tokens, completion_tokens = 0, 0
        details: dict[str, Any] = {}
        for index in range(request.n):
            body = request_body(request, index)
            generate = server.handle_chat_completions if request.prompt is None else server.handle_completions
            work = _generation(generate, body)
            async with ThreadStream(work, self._slots, name=f"llama {request.model}") as chunks:
                async for chunk in chunks:
                    _raise_error(chunk)
                    if usage := chunk.get("usage"):
                        # Every choice reports the prompt again, which counts once.
                        prompt_tokens = usage["prompt_tokens"]
                        if not index and (of_prompt := usage.get("prompt_tokens_details")):
                            # The other choices find the prompt of the first one in the cache.
                            details = {"prompt_tokens_details": of_prompt}
                        completion_tokens += usage["completion_tokens"]
                    for choice in chunk.get("choices", ()):
                        for piece in _pieces(choice, index):
                            await provider.push(piece)
        counts = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
        await provider.push({"usage": counts | details} if details else OutputChunk.usage(**counts))


def request_body(request: ChatRequest, index: int) -> dict[str, Any]:
    """Return the body of llama.cpp's request for choice ``index`` of ``request``."""
    body: dict[str, Any] = {
        name: request.raw[name] for name in _LLAMA_FIELDS if request.raw.get(name) is not None
    }
    for name in _SAMPLING:
        value = getattr(request, name)
        if request.raw.get(name) is not None or value != getattr(attrs.fields(ChatRequest), name).default:
            body[name] = value
    for name in _PASSED_ON:
        if (value := getattr(request, name)) is not None:
            body[name] = value
    if tools := _tools(request):
        body |= tools
        body["parallel_tool_calls"] = request.parallel_tool_calls
    if request.token_limit is not None:
        body["max_tokens"] = request.token_limit
    if request.stop_sequences:
        body["stop"] = request.stop_sequences
    if request.seed is not None:
        # The choices of one request differ from each other, and each is repeatable.
        body["seed"] = (request.seed + index) % 2**32
    if request.logprobs:
        body["logprobs"] = True
        body["top_logprobs"] = request.top_logprobs or 0
    if request.prompt is None:
        body["messages"] = request.messages
    else:
        # llama.cpp takes token ids as they are, and refuses those that its vocabulary does not have.
        body["prompt"] = request.prompt if request.prompt_tokens is None else request.prompt_tokens
    body["stream"] = True
    body["stream_options"] = {"include_usage": True}
    body["return_progress"] = True
    return body


def _takes_tools(properties: dict[str, Any]) -> bool:
    """Return whether a model's chat template has a place for tools, given what llama.cpp tells of the model."""
    supported = (properties.get("chat_template_caps") or {}).get("supports_tools")
    if isinstance(supported, bool):
        return supported
    # Older versions do not tell.
    template = properties.get("chat_template")
    return not isinstance(template, str) or "tools" in template or "chat_template_tool_use" in properties


def _tools(request: ChatRequest) -> dict[str, Any]:
    """Return the fields of llama.cpp's request that are about tools; empty if the model may use none.

    llama.cpp knows only the words of ``tool_choice``, and ignores an object. So of a choice among some tools only these
    are offered.

    Raises:
        InvalidRequest: the chosen tool is not among the tools.
    """
    tools, choice = request.tools, request.tool_choice
    if not tools or choice == "none":
        return {}
    if not isinstance(choice, dict):
        return {"tools": tools} if choice is None else {"tools": tools, "tool_choice": choice}
    allowed = choice.get("allowed_tools") or {"mode": "required", "tools": [choice]}
    names = {_tool_name(tool) for tool in allowed["tools"]}
    offered = [tool for tool in tools if _tool_name(tool) in names]
    if not offered:
        raise InvalidRequest("'tool_choice' names a tool that is not among 'tools'", param="tool_choice")
    return {"tools": offered, "tool_choice": allowed["mode"]}


def _tool_name(tool: dict[str, Any]) -> Any:
    return (tool.get(tool.get("type", "function")) or {}).get("name")


def _generation(
    generate: Callable[[dict[str, Any], Callable[[Any], bool]], object], body: dict[str, Any]
) -> Callable[[Outlet[dict[str, Any]]], None]:
    """Return the work of one request: it puts every chunk of llama.cpp's output except progress reports.

    Args:
        generate: blocks until the request has ended; calls its second argument with a chunk or a list of them, and ends
            the request if that returns true.
        body: its first argument.
    """

    def work(outlet: Outlet[dict[str, Any]]) -> None:
        started = False

        # Must not raise: llama.cpp would swallow the exception, and end the request as if it were complete.
        def on_output(output: Any) -> bool:
            nonlocal started
            started = True
            for chunk in output if isinstance(output, list) else [output]:
                is_progress = "prompt_progress" in chunk
                if outlet.closed() if is_progress else not outlet.put(chunk):
                    return True
            return False

        try:
            generate(body, on_output)
        except (ValueError, RuntimeError) as error:
            # llama.cpp refuses a wrong request with an exception of either kind, before its first output.
            if started:
                raise
            raise InvalidRequest(str(error)) from error

    return work


def _raise_error(chunk: dict[str, Any]) -> None:
    error = chunk.get("error")
    if error is None:
        return
    if error.get("type") == "exceed_context_size_error":
        raise InvalidRequest(
            f"This model's context has {error.get('n_ctx')} tokens, and the prompt alone has"
            f" {error.get('n_prompt_tokens')}; shorten it",
            param="messages",
            code="context_length_exceeded",
        )
    if error.get("code") == 400:
        raise InvalidRequest(str(error.get("message")))
    raise HandlerFailed(f"The model failed to answer: {error.get('message')}")


def _pieces(choice: dict[str, Any], index: int) -> Iterator[Any]:
    """Convert one choice of a chunk to output. Plain text, which is nearly all of it, becomes a text delta."""
    delta = choice.get("delta", choice)
    content = delta.get("content") or choice.get("text")
    if choice.get("logprobs") or delta.get("tool_calls") or delta.get("reasoning_content"):
        yield {"choices": [choice | {"index": index, "finish_reason": None}]}
    elif content:
        yield OutputChunk.text_delta(content, index)
    if choice.get("finish_reason"):
        yield OutputChunk.finish(choice["finish_reason"], index)

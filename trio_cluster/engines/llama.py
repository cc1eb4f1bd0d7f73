"""``llama``: any GGUF model as a chat model, through xllamacpp (llama.cpp in this process).

Each request is one blocking call in a thread, and llama.cpp answers it through a callback in that thread;
requests that run at the same time share the model's steps (continuous batching). The callback's return value
ends a request. It is called for every token and, with ``return_progress``, after every batch of the prompt; a
request that is given up therefore stops within one step, which ``batch`` bounds while the prompt is read.

As many requests run at once as the model has slots, and others wait here, not inside: llama.cpp calls back
nobody who is still waiting, so such a request could not be cancelled. For the same reason, and for fairness,
the ``n`` choices of one request are made one after the other in one slot. The prompt is read once for all of
them.

llama.cpp does not slow down for a reader: what a slow client has not taken yet waits, at most a context full
of text.
"""

from __future__ import annotations

import json
import secrets
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Final

import attrs
import trio

from trio_cluster.core.model import ChatModelOptions
from trio_cluster.errors import ApiError, ClusterError, HandlerFailed, InvalidRequest
from trio_cluster.local.adapters import Provider
from trio_cluster.openai import ChatRequest, OutputChunk

from ._engine import LoadingEngine, Option, ServedModel, text, whole_number
from ._threads import Outlet, ThreadStream
from ._weights import WEIGHTS, ensure_weights

__all__ = ["Llama", "engine", "request_body"]

_DEMO: Final = "smollm2"

# Where the documented default is left as it is, the model's own is used: small models do better with less
# heat.
_SAMPLING: Final = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
_PASSED_ON: Final = ("logit_bias", "tools", "tool_choice", "response_format", "reasoning_effort")

# Fields that are no part of the OpenAI API, but that users of llama.cpp know. Others do not reach it: some of
# them choose slots or files.
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
    argument = f"path of a .gguf file, or {_DEMO}"
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
            raise ValueError(f"say which model: a {self.argument}")
        if argument != _DEMO and not Path(argument).is_file():
            raise ValueError(f"there is no file '{argument}'")

    async def prepare(self, argument: str, options: Mapping[str, Any]) -> str:
        """See :meth:`LoadingEngine.prepare`."""
        if argument != _DEMO:
            return argument
        weights = WEIGHTS[_DEMO]
        return str(await ensure_weights(weights) / weights.files[0].name)

    @contextmanager
    def open(self, argument: str, options: Mapping[str, Any]) -> Iterator[ServedModel]:
        """See :meth:`LoadingEngine.open`."""
        model = Llama.load(argument, options)
        name = options["name"] or (
            _DEMO if argument.endswith(WEIGHTS[_DEMO].files[0].name) else Path(argument).stem
        )
        try:
            yield ServedModel(name, "chat", model.chat, ChatModelOptions(context_window=model.context))
        finally:
            model.close()


engine = _Llama()


@attrs.define(eq=False)
class Llama:
    """A loaded model.

    Attributes:
        context: how many tokens a request and its answer may have together.
    """

    context: int
    _server: Any
    _slots: trio.CapacityLimiter

    @classmethod
    def load(cls, path: str, options: Mapping[str, Any]) -> Llama:
        """Load a GGUF file. Blocks.

        Raises:
            ClusterError: llama.cpp cannot load it.
        """
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = path
        parameters.n_parallel = options["parallel"]
        # llama.cpp counts the context over all slots.
        parameters.n_ctx = options["ctx"] * options["parallel"]
        parameters.n_batch = parameters.n_ubatch = options["batch"]
        parameters.n_gpu_layers = options["gpu_layers"]
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = options["threads"]
        parameters.warmup = False
        parameters.verbosity = 0
        # A loaded model always listens on a port of the loopback interface. Nobody but us shall be able to
        # use it.
        key = secrets.token_hex(16)
        parameters.api_keys = [key]
        parameters.n_threads_http = 1
        parameters.ui = False
        parameters.endpoint_slots = False
        try:
            server = xllamacpp.Server(parameters)
        except RuntimeError as error:
            raise ClusterError(f"llama.cpp cannot load '{path}': {error}") from error
        question = urllib.request.Request(
            f"{server.listening_address}/props", headers={"Authorization": f"Bearer {key}"}
        )
        # The one thing that only this port tells: how much context there really is, which the model may
        # limit.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            question, timeout=30
        ) as answer:
            properties = json.load(answer)
        context = int(properties["default_generation_settings"]["n_ctx"])
        return cls(context, server, trio.CapacityLimiter(options["parallel"]))

    def close(self) -> None:
        """Let go of the model. It is freed when the last request that uses it has ended."""
        self._server = None

    async def chat(self, request: ChatRequest, provider: Provider) -> None:
        """Answer a request; the handler that is registered."""
        server = self._server
        if server is None:
            raise ApiError(503, "the model is being unloaded", code="shutting_down")
        read, written = 0, 0
        for index in range(request.n):
            body = request_body(request, index)
            ask = server.handle_chat_completions if request.prompt is None else server.handle_completions
            async with ThreadStream(_asking(ask, body), self._slots, name=f"llama {request.model}") as answer:
                async for chunk in answer:
                    _raise_error(chunk)
                    if usage := chunk.get("usage"):
                        # Every choice reports the prompt again; it was read once.
                        read, written = usage["prompt_tokens"], written + usage["completion_tokens"]
                    for choice in chunk.get("choices", ()):
                        for piece in _pieces(choice, index):
                            await provider.push(piece)
        await provider.push(OutputChunk.usage(read, written))


def request_body(request: ChatRequest, index: int) -> dict[str, Any]:
    """Return what llama.cpp is asked for choice ``index`` of ``request``."""
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
    if request.tools is not None:
        body["parallel_tool_calls"] = request.parallel_tool_calls
    if request.token_limit is not None:
        body["max_tokens"] = request.token_limit
    if request.stop_sequences:
        body["stop"] = request.stop_sequences
    if request.seed is not None:
        # The choices of one request are to differ, and each to be the same next time.
        body["seed"] = (request.seed + index) % 2**32
    if request.logprobs:
        body["logprobs"] = True
        body["top_logprobs"] = request.top_logprobs or 0
    if request.prompt is None:
        body["messages"] = request.messages
    else:
        body["prompt"] = request.prompt
    body["stream"] = True
    body["stream_options"] = {"include_usage": True}
    body["return_progress"] = True
    return body


def _asking(
    ask: Callable[[dict[str, Any], Callable[[Any], bool]], object], body: dict[str, Any]
) -> Callable[[Outlet[dict[str, Any]]], None]:
    """Return the work of one request: everything that llama.cpp says about it."""

    def work(outlet: Outlet[dict[str, Any]]) -> None:
        heard = False

        # An exception in here would be swallowed, and end the request as if it were complete.
        def hear(said: Any) -> bool:
            nonlocal heard
            heard = True
            for chunk in said if isinstance(said, list) else [said]:
                progress = "prompt_progress" in chunk
                if outlet.closed() if progress else not outlet.put(chunk):
                    return True
            return False

        try:
            ask(body, hear)
        except (ValueError, RuntimeError) as error:
            # It refuses what it cannot make sense of before it says anything, with an exception of either
            # kind.
            if heard:
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
            f" {error.get('n_prompt_tokens')}",
            param="messages",
            code="context_length_exceeded",
        )
    if error.get("code") == 400:
        raise InvalidRequest(str(error.get("message")))
    raise HandlerFailed(f"The model failed to answer: {error.get('message')}")


def _pieces(choice: dict[str, Any], index: int) -> Iterator[Any]:
    """Turn one choice of a chunk into output. Plain text, nearly all there is, goes the short way."""
    delta = choice.get("delta", choice)
    content = delta.get("content") or choice.get("text")
    if choice.get("logprobs") or delta.get("tool_calls") or delta.get("reasoning_content"):
        yield {"choices": [choice | {"index": index, "finish_reason": None}]}
    elif content:
        yield OutputChunk.text_delta(content, index)
    if choice.get("finish_reason"):
        yield OutputChunk.finish(choice["finish_reason"], index)

"""The llama engine, with a fake xllamacpp, and with llama.cpp itself and a model of random weights."""

from __future__ import annotations

import gc
import importlib.util
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing
from recording_provider import RecordingProvider

from trio_cluster.engines import llama, parse_serve, serve_engine
from trio_cluster.errors import ApiError, ClusterError, InvalidRequest
from trio_cluster.local.slots import Slots
from trio_cluster.openai import ChatRequest
from trio_cluster.server import ClusterServer

OnOutput = Callable[[Any], bool]


def chat(text: str = "hi", **fields: Any) -> ChatRequest:
    return ChatRequest(model="m", **({"messages": [{"role": "user", "content": text}]} | fields))


def delta(content: str | None = None, reason: str | None = None, **members: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": content} | members, "finish_reason": reason}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}


class FakeServer:
    """A server with scripted output. Records its requests, and where its output was stopped."""

    def __init__(self, *script: Any) -> None:
        self.script = script
        self.requests: list[dict[str, Any]] = []
        self.stopped_at: list[int] = []
        self.ended = threading.Event()

    def handle_chat_completions(self, body: dict[str, Any], on_output: OnOutput) -> None:
        self.requests.append(body)
        try:
            for position, output in enumerate(self.script):
                if isinstance(output, Exception):
                    raise output
                if on_output(output):
                    self.stopped_at.append(position)
                    return
        finally:
            self.ended.set()

    def handle_completions(self, body: dict[str, Any], on_output: OnOutput) -> None:
        self.handle_chat_completions(body, on_output)


def model_of(server: Any, slots: int = 1) -> llama.Llama:
    return llama.Llama(context=100, server=server, slots=Slots(slots))


async def answer(model: llama.Llama, request: ChatRequest) -> list[tuple[str, Any, int | None]]:
    output = RecordingProvider()
    await model.chat(request, output)
    return [
        ("json", piece, None) if isinstance(piece, dict) else (piece.kind, piece.value, piece.index)
        for piece in output.pieces
    ]


def text_of(pieces: list[tuple[str, Any, int | None]], index: int = 0) -> str:
    return "".join(value for kind, value, of in pieces if kind == "text_delta" and of == index)


async def test_text_finish_reason_and_usage_are_passed_on() -> None:
    server = FakeServer(
        delta(None, role="assistant"), [delta("Hel"), delta("lo")], delta(None, "length"), USAGE
    )
    assert await answer(model_of(server), chat()) == [
        ("text_delta", "Hel", 0),
        ("text_delta", "lo", 0),
        ("finish", "length", 0),
        ("usage", (5, 2), None),
    ]


async def test_choices_are_generated_one_after_the_other_and_the_prompt_counts_once() -> None:
    server = FakeServer(delta("x"), delta(None, "stop"), USAGE)
    pieces = await answer(model_of(server), chat(n=3, seed=40))
    assert [text_of(pieces, index) for index in range(3)] == ["x", "x", "x"]
    assert pieces[-1] == ("usage", (5, 6), None)
    assert [body["seed"] for body in server.requests] == [40, 41, 42]


async def test_tokens_of_the_prompt_that_were_in_the_cache_are_those_of_the_first_choice() -> None:
    server = FakeServer(delta("x"), delta(None, "stop"))
    counts = {"prompt_tokens": 5, "completion_tokens": 2}

    class Cached(FakeServer):
        def handle_chat_completions(self, body: dict[str, Any], on_output: OnOutput) -> None:
            details = {"cached_tokens": 3 + len(server.requests)}
            server.handle_chat_completions(body, on_output)
            on_output({"choices": [], "usage": counts | {"prompt_tokens_details": details}})

    pieces = await answer(model_of(Cached()), chat(n=2))
    usage = counts | {"completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 3}}
    assert pieces[-1] == ("json", {"usage": usage}, None)


async def test_tool_calls_and_logprobs_are_passed_on_as_they_are() -> None:
    call = [{"index": 0, "id": "a", "function": {"name": "f", "arguments": "{}"}}]
    server = FakeServer(delta(None, tool_calls=call), delta(None, "tool_calls"), USAGE)
    pieces = await answer(model_of(server), chat())
    assert pieces[0][1]["choices"][0]["delta"]["tool_calls"] == call
    assert pieces[1] == ("finish", "tool_calls", 0)


async def test_a_completion_sends_its_prompt_without_a_chat_template() -> None:
    output = {
        "choices": [{"index": 0, "text": " upon", "logprobs": None, "finish_reason": "length"}],
        **USAGE,
    }
    output["choices"] = [{"index": 0, "text": " upon", "logprobs": None, "finish_reason": "length"}]
    server = FakeServer(output)
    pieces = await answer(model_of(server), chat(prompt="Once", messages=[]))
    assert pieces == [("text_delta", " upon", 0), ("finish", "length", 0), ("usage", (5, 2), None)]
    assert server.requests[0]["prompt"] == "Once"
    assert "messages" not in server.requests[0]


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    ("choice", "offered", "word"),
    [
        (None, ["f", "g"], None),
        ("auto", ["f", "g"], "auto"),
        ("required", ["f", "g"], "required"),
        ("none", None, None),
        (tool("g"), ["g"], "required"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [tool("f")]}}, ["f"], "auto"),
    ],
)
async def test_the_choice_of_a_tool_is_not_left_out(choice: Any, offered: Any, word: Any) -> None:
    server = FakeServer(delta("x"), delta(None, "stop"), USAGE)
    await answer(model_of(server), chat(tools=[tool("f"), tool("g")], tool_choice=choice))
    (body,) = server.requests
    assert body.get("tools") == (None if offered is None else [tool(name) for name in offered])
    assert body.get("tool_choice") == word


async def test_the_choice_of_a_tool_that_is_not_there_is_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        await answer(model_of(FakeServer()), chat(tools=[tool("f")], tool_choice=tool("g")))
    assert caught.value.param == "tool_choice"


async def test_tools_are_refused_if_the_model_would_not_see_them() -> None:
    server = FakeServer(delta("x"), delta(None, "stop"), USAGE)
    model = llama.Llama(100, server, Slots(1), takes_tools=False)
    with pytest.raises(InvalidRequest, match="cannot use tools") as caught:
        await answer(model, chat(tools=[tool("f")]))
    assert (caught.value.status, caught.value.param) == (400, "tools")
    assert text_of(await answer(model, chat(tools=[tool("f")], tool_choice="none"))) == "x"
    assert text_of(await answer(model, chat(tools=[]))) == "x"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"temperature": 0.0, "top_p": 0.5}, {"temperature": 0.0, "top_p": 0.5}),
        # A default value is sent if the client has set it; otherwise the model uses its own default.
        ({"temperature": 1.0, "raw": {"temperature": 1}}, {"temperature": 1.0}),
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_tokens": 5, "max_completion_tokens": 7}, {"max_tokens": 7}),
        ({"stop": "x"}, {"stop": ["x"]}),
        ({"logprobs": True, "top_logprobs": 2}, {"logprobs": True, "top_logprobs": 2}),
        ({"top_logprobs": 2}, {}),
        ({"tools": [{"type": "function"}]}, {"tools": [{"type": "function"}], "parallel_tool_calls": True}),
        ({"response_format": {"type": "json_object"}}, {"response_format": {"type": "json_object"}}),
        ({"raw": {"top_k": 3, "id_slot": 0, "n_predict": 9, "stream": False}}, {"top_k": 3}),
    ],
)
def test_only_fields_that_the_client_set_are_sent_to_the_model(
    fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    body = llama.request_body(chat(**fields), 0)
    fixed = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "return_progress": True}
    assert body == fixed | {"stream_options": {"include_usage": True}} | expected


@pytest.mark.parametrize(
    ("output", "status", "code"),
    [
        (
            {"error": {"code": 400, "type": "exceed_context_size_error", "n_ctx": 9, "n_prompt_tokens": 99}},
            400,
            "context_length_exceeded",
        ),
        ({"error": {"code": 400, "message": "bad grammar"}}, 400, None),
        ({"error": {"code": 500, "message": "out of memory"}}, 500, "handler_failed"),
        (ValueError("All messages must contain 'content'"), 400, None),
        (RuntimeError("Failed to parse tools"), 400, None),
    ],
)
async def test_each_refusal_of_the_model_becomes_the_right_error(
    output: Any, status: int, code: str | None
) -> None:
    with pytest.raises(ApiError) as caught:
        await answer(model_of(FakeServer(output)), chat())
    assert (caught.value.status, caught.value.code) == (status, code)


async def test_an_exception_after_the_first_output_is_not_the_client_s_fault() -> None:
    with pytest.raises(RuntimeError, match="broken"):
        await answer(model_of(FakeServer(delta("x"), RuntimeError("broken"))), chat())


async def test_a_cancelled_request_stops_at_the_next_token() -> None:
    tokens = [delta("x")] * 10_000
    server = FakeServer(*tokens)
    output = RecordingProvider()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(model_of(server).chat, chat(), output)
        await output.first.wait()
        nursery.cancel_scope.cancel()
    assert server.ended.is_set()
    assert len(server.stopped_at) == 1


async def test_a_request_cancelled_while_its_prompt_is_read_stops_at_the_next_batch() -> None:
    reading = trio.Event()
    token = trio.lowlevel.current_trio_token()

    class Reader(FakeServer):
        def handle_chat_completions(self, body: dict[str, Any], on_output: OnOutput) -> None:
            while not on_output({"choices": [], "prompt_progress": {"processed": 1}}):
                token.run_sync_soon(reading.set)
                time.sleep(0.001)
            self.ended.set()

    server = Reader()
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer, model_of(server), chat())
            await reading.wait()
            nursery.cancel_scope.cancel()
    assert server.ended.is_set()


async def test_requests_over_the_number_of_slots_wait_outside_of_llama_cpp() -> None:
    inside, most = 0, 0
    lock = threading.Lock()
    let_go = threading.Event()

    class Crowd(FakeServer):
        def handle_chat_completions(self, body: dict[str, Any], on_output: OnOutput) -> None:
            nonlocal inside, most
            with lock:
                inside += 1
                most = max(most, inside)
            let_go.wait(5)
            with lock:
                inside -= 1
            on_output(delta("x"))

    model = model_of(Crowd(), slots=2)
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(answer, model, chat())
        with trio.fail_after(5):
            while inside < 2:
                await trio.testing.wait_all_tasks_blocked(0.01)
        let_go.set()
    assert most == 2


async def test_a_closed_model_is_freed_with_the_last_request_that_uses_it() -> None:
    server = FakeServer(*[delta("x")] * 100)
    freed = weakref.ref(server)
    model = model_of(server)
    gc.disable()
    try:
        await answer(model, chat())
        async with trio.open_nursery() as nursery:
            output = RecordingProvider()
            nursery.start_soon(model.chat, chat(), output)
            await output.first.wait()
            model.close()
            del server
            assert freed() is not None
            nursery.cancel_scope.cancel()
        del nursery
        assert freed() is None
    finally:
        gc.enable()


async def test_a_model_that_is_being_unloaded_refuses_requests() -> None:
    model = model_of(FakeServer())
    model.close()
    with pytest.raises(ApiError) as caught:
        await answer(model, chat())
    assert caught.value.status == 503


# From here on with llama.cpp itself. The tests make the model: two layers of random weights, with single bytes as
# tokens. Its output is noise; everything around it is real.

real = [
    pytest.mark.engines,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("xllamacpp", "gguf")),
        reason="needs xllamacpp and gguf",
    ),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import gguf
    import numpy as np

    width, layers, heads, feed = 64, 2, 4, 128
    alphabet = [chr(c) if 33 <= c <= 126 or 161 <= c <= 172 or 174 <= c <= 255 else None for c in range(256)]
    # The byte-level alphabet: bytes that are not printable are represented by the code points from 256 on.
    unseen = iter(range(256, 512))
    tokens = [each or chr(next(unseen)) for each in alphabet] + ["<|end|>"]
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(feed)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL])
    writer.add_token_merges([f"{tokens[97]} {tokens[98]}"])
    writer.add_eos_token_id(256)
    writer.add_bos_token_id(256)
    writer.add_chat_template(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    )
    random = np.random.default_rng(0)

    def tensor(name: str, *shape: int) -> None:
        writer.add_tensor(name, (random.standard_normal(shape) * 0.3).astype(np.float32))

    tensor("token_embd.weight", len(tokens), width)
    tensor("output_norm.weight", width)
    tensor("output.weight", len(tokens), width)
    for layer in range(layers):
        for name, shape in {
            "attn_norm": (width,),
            "attn_q": (width, width),
            "attn_k": (width, width),
            "attn_v": (width, width),
            "attn_output": (width, width),
            "ffn_norm": (width,),
            "ffn_gate": (feed, width),
            "ffn_up": (feed, width),
            "ffn_down": (width, feed),
        }.items():
            tensor(f"blk.{layer}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@contextmanager
def loaded(path: Path, options: str = "") -> Iterator[llama.Llama]:
    spec = parse_serve(f"llama:{path},ctx=1024,parallel=2{options}")
    model = llama.Llama.load(spec.argument, spec.options)
    try:
        yield model
    finally:
        model.close()


@pytest.fixture(scope="module")
def model(tiny: Path) -> Iterator[llama.Llama]:
    with loaded(tiny) as model:
        yield model


class TestWithLlamaCpp:
    pytestmark = real

    async def test_it_answers_and_counts(self, model: llama.Llama) -> None:
        pieces = await answer(model, chat(max_tokens=12, raw={"ignore_eos": True}))
        usage = {
            "prompt_tokens": 19,
            "completion_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        assert pieces[-2:] == [("finish", "length", 0), ("json", {"usage": usage}, None)]
        assert len(text_of(pieces)) >= 1

    async def test_it_counts_a_prompt_as_its_answer_reports_it(self, model: llama.Llama) -> None:
        for request in (chat(), chat("a longer text, and <|end|> é"), chat(tools=[tool("f")])):
            pieces = await answer(model, attrs.evolve(request, max_tokens=1, tools=None))
            (usage,) = [value["usage"] for kind, value, _ in pieces if kind == "json"]
            assert await model.count_tokens(request) == usage["prompt_tokens"]

    async def test_what_cannot_be_counted_is_the_client_s_error(self, model: llama.Llama) -> None:
        with pytest.raises(InvalidRequest):
            await model.count_tokens(ChatRequest(model="m", messages=[{"role": "nobody"}]))

    async def test_a_seed_makes_it_repeatable(self, model: llama.Llama) -> None:
        request = chat(max_tokens=20, seed=3, temperature=1.0, raw={"temperature": 1.0, "ignore_eos": True})
        first, second = [await answer(model, request) for _ in range(2)]
        assert text_of(first) == text_of(second)

    async def test_a_prompt_may_be_token_ids_and_those_that_do_not_exist_are_refused(
        self, model: llama.Llama
    ) -> None:
        def of_ids(*ids: int) -> ChatRequest:
            asked: Any = {"temperature": 0.0, "ignore_eos": True}
            return chat(prompt="", prompt_tokens=list(ids), max_tokens=5, temperature=0.0, raw=asked)

        pieces = await answer(model, of_ids(5, 6, 7))
        usage = pieces[-1][1]["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 5)
        for wrong in (-1, 10**9):
            with pytest.raises(ApiError) as caught:
                await answer(model, of_ids(5, wrong))
            assert caught.value.status == 400
        # It goes on.
        assert text_of(await answer(model, of_ids(5, 6, 7))) == text_of(pieces)

    async def test_its_context_is_the_configured_one_and_its_limit_an_error(self, model: llama.Llama) -> None:
        assert model.context == 1024
        with pytest.raises(ApiError, match="1024 tokens") as caught:
            await answer(model, chat("x" * 3000))
        assert caught.value.code == "context_length_exceeded"

    async def test_a_json_schema_is_enforced(self, model: llama.Llama) -> None:
        schema = {"type": "object", "properties": {"city": {"const": "Oslo"}}, "required": ["city"]}
        wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        pieces = await answer(model, chat(max_tokens=200, response_format=wanted))
        assert '"Oslo"' in text_of(pieces)

    async def test_requests_run_at_the_same_time(self, model: llama.Llama) -> None:
        pieces: list[int] = []

        async def one(number: int) -> None:
            class Counting(RecordingProvider):
                async def push(self, chunk: object) -> None:
                    pieces.append(number)
                    await super().push(chunk)

            await model.chat(chat(max_tokens=300, raw={"ignore_eos": True}), Counting())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, 1)
            nursery.start_soon(one, 2)
        changes = sum(a != b for a, b in pairwise(pieces))
        assert changes > 20

    @pytest.mark.parametrize("when", ["reading", "writing"])
    async def test_its_slot_is_free_soon_after_a_request_is_cancelled(
        self, model: llama.Llama, when: str
    ) -> None:
        text = "x" * 900 if when == "reading" else "x"
        with trio.move_on_after(0.05):
            await answer(model, chat(text, max_tokens=100_000, raw={"ignore_eos": True}))
        began = trio.current_time()
        assert model._slots.running == 0
        await answer(model, chat(max_tokens=1))
        assert trio.current_time() - began < 2.0

    async def test_as_an_engine_it_shows_its_context_and_its_name(self, tiny: Path) -> None:
        server = ClusterServer()
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_engine, parse_serve(f"llama:{tiny},ctx=512,parallel=1"), server)
            assert server.list_models() == ["tiny"]
            info = server.router.catalog.info("tiny")
            assert info is not None
            assert info.entry()["context_window"] == 512
            nursery.cancel_scope.cancel()
        assert server.list_models() == []

    def test_its_threads_end_when_it_is_closed(self, tiny: Path) -> None:
        before = threading_count()
        with loaded(tiny):
            assert threading_count() > before
        deadline = time.monotonic() + 10
        while threading_count() > before and time.monotonic() < deadline:
            threading.Event().wait(0.01)
        # Idle threads of earlier tests may have ended meanwhile.
        assert threading_count() <= before

    def test_a_file_that_is_not_a_model_is_an_error_of_one_line(self, tmp_path: Path) -> None:
        path = tmp_path / "x.gguf"
        path.write_bytes(b"GGUF" + bytes(100))
        with pytest.raises(ClusterError, match=f"llama.cpp cannot load '{path}'"), loaded(path):
            pass


def threading_count() -> int:
    """Return the number of threads in this process, including those of llama.cpp."""
    return len(list(Path("/proc/self/task").iterdir()))

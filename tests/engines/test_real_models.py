"""The demo's models, asked for real. Libraries and weights have to be there; nothing is downloaded here."""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Iterator
from typing import Any

import pytest
import trio
import trio.testing
from heard import Heard

from trio_cluster.engines import llama, parse_serve, serve_engine
from trio_cluster.engines._weights import WEIGHTS, cache_folder, find_damage
from trio_cluster.errors import ApiError
from trio_cluster.openai import ASRRequest, ChatRequest, EmbeddingRequest, TTSRequest
from trio_cluster.server import ClusterServer

pytestmark = pytest.mark.engines

SENTENCES = "The quick brown fox jumps over the lazy dog. Batching requests makes the server faster."


def needs(*modules: str, weights: str | None = None) -> pytest.MarkDecorator:
    """Skip a test, and say why, where something is missing that it needs."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    reason = f"needs {', '.join(missing)}; the demo extra brings it"
    if weights is not None and not missing:
        if not (cache_folder() / WEIGHTS[weights].folder_name).is_dir():
            missing = [weights]
        reason = f"the weights of {weights} are not in the cache; `trio-cluster demo --check` fetches them"
    return pytest.mark.skipif(bool(missing), reason=reason)


async def serving(spec: str, nursery: trio.Nursery) -> Any:
    """Start an engine; return its handler."""
    server = ClusterServer()
    await nursery.start(serve_engine, parse_serve(spec), server)
    (backend,) = server._local.values()
    (drive,) = backend._drivers.values()
    return drive


@pytest.fixture
def smollm2() -> Iterator[llama.Llama]:
    weights = WEIGHTS["smollm2"]
    path = cache_folder() / weights.folder_name / weights.files[0].name
    spec = parse_serve(f"llama:{path},ctx=1024,parallel=2")
    model = llama.Llama.load(spec.argument, spec.options)
    yield model
    model.close()


@needs(weights="smollm2")
async def test_the_weights_are_the_ones_that_were_pinned() -> None:
    weights = WEIGHTS["smollm2"]
    assert await trio.to_thread.run_sync(find_damage, weights, cache_folder() / weights.folder_name) is None


@needs("xllamacpp", weights="smollm2")
async def test_smollm2_knows_the_capital_of_france(smollm2: llama.Llama) -> None:
    heard = Heard()
    question = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
    request = ChatRequest(model="m", messages=question, temperature=0.0, max_tokens=40)
    await smollm2.chat(request, heard)
    assert "Paris" in "".join(heard.values("text_delta"))
    assert heard.values("finish") == ["stop"]
    assert heard.values("usage") == [(43, 8)]


@needs("xllamacpp", weights="smollm2")
@pytest.mark.parametrize("when", ["reading", "writing"])
async def test_smollm2_stops_at_once_when_it_is_given_up(smollm2: llama.Llama, when: str) -> None:
    text = "word " * 900 if when == "reading" else "Count to a thousand."
    request = ChatRequest(model="m", messages=[{"role": "user", "content": text}], raw={"ignore_eos": True})
    heard = Heard()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(smollm2.chat, request, heard)
        if when == "reading":
            # It blocks once its thread reads, which takes many seconds.
            await trio.testing.wait_all_tasks_blocked(0.1)
            assert smollm2._slots.borrowed_tokens == 1
            assert heard.pieces == []
        else:
            await heard.first.wait()
        began = trio.current_time()
        nursery.cancel_scope.cancel()
    # Tens of milliseconds on an idle machine; the rest of the work would take ten seconds.
    assert trio.current_time() - began < 1.5


@needs("hibari", "ctranslate2", "tokenizers", weights="whisper-tiny.en")
async def test_what_hibari_says_whisper_understands(nursery: trio.Nursery) -> None:
    speak, listen = await serving("hibari", nursery), await serving("whisper", nursery)
    said = Heard()
    await speak(TTSRequest(model="h", input=SENTENCES, voice="alloy"), said)
    audio = b"".join(said.values("audio"))
    assert struct.unpack_from("<I", audio, 24) == (24_000,)
    heard = Heard()
    await listen(ASRRequest(model="w", audio=audio), heard)
    pieces = heard.values("json")
    assert "".join(piece.get("text", "") for piece in pieces).strip() == SENTENCES
    segments = [segment for piece in pieces for segment in piece.get("segments", ())]
    assert [segment["text"].strip() for segment in segments] == SENTENCES.replace(". ", ".|").split("|")
    assert 0 <= segments[0]["start"] < segments[0]["end"] <= segments[1]["start"] < segments[1]["end"] <= 6.5


@needs("onnxruntime", "tokenizers", weights="minilm")
async def test_minilm_finds_like_texts_alike(nursery: trio.Nursery) -> None:
    embed = await serving("minilm,batch=2", nursery)
    texts = ["how do I reset my password", "recover access to my account", "the cat sat on the mat"]
    heard = Heard()
    await embed(EmbeddingRequest(model="e", inputs=texts), heard)
    a, b, c = (vector for batch in heard.values("embeddings") for vector in batch)
    assert a @ a == pytest.approx(1.0, abs=1e-5)
    assert a @ b > a @ c + 0.3
    assert heard.values("usage")[0][0] > 20
    alone = Heard()
    await embed(EmbeddingRequest(model="e", inputs=texts[:1]), alone)
    assert alone.values("embeddings")[0][0] == pytest.approx(a, abs=1e-4)


@needs("onnxruntime", "tokenizers", weights="minilm")
async def test_minilm_refuses_what_it_cannot_take_in(nursery: trio.Nursery) -> None:
    embed = await serving("minilm", nursery)
    with pytest.raises(ApiError, match=r"Input 1 has .* tokens; this model takes up to 256"):
        await embed(EmbeddingRequest(model="e", inputs=["short", "word " * 400]), Heard())
    with pytest.raises(ApiError, match="takes no token ids; send the text") as caught:
        await embed(EmbeddingRequest(model="e", inputs=[[1, 2, 3]]), Heard())
    assert caught.value.param == "input"
    cutting = await serving("minilm,truncate=yes,name=cutting", nursery)
    heard = Heard()
    await cutting(EmbeddingRequest(model="e", inputs=["word " * 400]), heard)
    assert heard.values("usage") == [(256, 0)]


@needs("onnxruntime", "tokenizers", weights="minilm")
async def test_minilm_is_interrupted_in_the_middle_of_a_batch(nursery: trio.Nursery) -> None:
    embed = await serving("minilm,batch=256", nursery)
    texts = ["word " * 250] * 256
    began = trio.current_time()
    with trio.move_on_after(0.5) as scope:
        await embed(EmbeddingRequest(model="e", inputs=texts), Heard())
    assert scope.cancelled_caught
    # The whole batch takes more than ten seconds.
    assert trio.current_time() - began < 3

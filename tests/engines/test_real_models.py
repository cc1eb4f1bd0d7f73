"""The demo's models themselves. The libraries and weights have to be there; the tests download nothing."""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Iterator
from typing import Any

import pytest
import trio
import trio.testing
from recording_provider import RecordingProvider

from trio_cluster.engines import llama, parse_serve, serve_engine
from trio_cluster.engines._pinned_weights import WEIGHTS
from trio_cluster.engines._weights import cache_folder, find_damage
from trio_cluster.errors import ApiError
from trio_cluster.openai import ASRRequest, ChatRequest, EmbeddingRequest, TTSRequest

pytestmark = pytest.mark.engines

SENTENCES = "The quick brown fox jumps over the lazy dog. Batching requests makes the server faster."


def needs(*modules: str, weights: str | None = None) -> pytest.MarkDecorator:
    """Skip a test, with the reason, where a library or the weights are missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    reason = f"needs {', '.join(missing)}; the demo extra brings it"
    if weights is not None and not missing:
        if not (cache_folder() / WEIGHTS[weights].folder_name).is_dir():
            missing = [weights]
        reason = f"the weights of {weights} are not in the cache; `trio-cluster demo --check` fetches them"
    return pytest.mark.skipif(bool(missing), reason=reason)


class HandlerRecorder:
    """The part of a server that the engines here use. Records the handlers that are registered."""

    def __init__(self) -> None:
        self.handlers: list[Any] = []

    def register_embedding(self, name: str, handler: Any) -> None:
        self.handlers.append(handler)

    register_asr = register_tts = register_embedding

    def unregister_model(self, name: str) -> None:
        pass


async def serving(spec: str, nursery: trio.Nursery) -> Any:
    """Start an engine; return its handler."""
    server = HandlerRecorder()
    await nursery.start(serve_engine, parse_serve(spec), server)
    (handler,) = server.handlers
    return handler


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
    output = RecordingProvider()
    question = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
    request = ChatRequest(model="m", messages=question, temperature=0.0, max_tokens=40)
    await smollm2.chat(request, output)
    assert "Paris" in "".join(output.values("text_delta"))
    assert output.values("finish") == ["stop"]
    assert output.values("usage") == [(43, 8)]


@needs("xllamacpp", weights="smollm2")
@pytest.mark.parametrize("when", ["reading", "writing"])
async def test_smollm2_stops_soon_after_a_cancellation(smollm2: llama.Llama, when: str) -> None:
    text = "word " * 900 if when == "reading" else "Count to a thousand."
    request = ChatRequest(model="m", messages=[{"role": "user", "content": text}], raw={"ignore_eos": True})
    output = RecordingProvider()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(smollm2.chat, request, output)
        if when == "reading":
            # All tasks are blocked when the thread reads the prompt, which takes many seconds.
            await trio.testing.wait_all_tasks_blocked(0.1)
            assert smollm2._slots.running == 1
            assert output.pieces == []
        else:
            await output.first.wait()
        began = trio.current_time()
        nursery.cancel_scope.cancel()
    # Tens of milliseconds on an idle machine; the rest of the work would take ten seconds.
    assert trio.current_time() - began < 1.5


@needs("hibari", "ctranslate2", "tokenizers", weights="whisper-tiny.en")
async def test_whisper_understands_the_speech_of_hibari(nursery: trio.Nursery) -> None:
    speak, listen = await serving("hibari", nursery), await serving("whisper", nursery)
    speech = RecordingProvider()
    await speak(TTSRequest(model="h", input=SENTENCES, voice="alloy"), speech)
    audio = b"".join(speech.values("audio"))
    assert struct.unpack_from("<I", audio, 24) == (24_000,)
    output = RecordingProvider()
    await listen(ASRRequest(model="w", audio=audio), output)
    pieces = output.values("json")
    assert "".join(piece.get("text", "") for piece in pieces).strip() == SENTENCES
    segments = [segment for piece in pieces for segment in piece.get("segments", ())]
    assert [segment["text"].strip() for segment in segments] == SENTENCES.replace(". ", ".|").split("|")
    assert 0 <= segments[0]["start"] < segments[0]["end"] <= segments[1]["start"] < segments[1]["end"] <= 6.5


@needs("av", "hibari", "ctranslate2", "tokenizers", weights="whisper-tiny.en")
@pytest.mark.parametrize("response_format", ["mp3", "opus", "aac", "flac"])
async def test_whisper_understands_the_speech_of_hibari_in_every_format(
    response_format: str, nursery: trio.Nursery
) -> None:
    speak, listen = await serving("hibari", nursery), await serving("whisper", nursery)
    speech, output = RecordingProvider(), RecordingProvider()
    fields = {"response_format": response_format}
    await speak(TTSRequest(model="h", input=SENTENCES, voice="alloy", raw=fields, **fields), speech)
    await listen(ASRRequest(model="w", audio=b"".join(speech.values("audio"))), output)
    assert "".join(piece.get("text", "") for piece in output.values("json")).strip() == SENTENCES


@needs("onnxruntime", "tokenizers", weights="minilm")
async def test_minilm_gives_similar_texts_similar_vectors(nursery: trio.Nursery) -> None:
    embed = await serving("minilm,batch=2", nursery)
    texts = ["how do I reset my password", "recover access to my account", "the cat sat on the mat"]
    output = RecordingProvider()
    await embed(EmbeddingRequest(model="e", inputs=texts), output)
    a, b, c = (vector for batch in output.values("embeddings") for vector in batch)
    assert a @ a == pytest.approx(1.0, abs=1e-5)
    assert a @ b > a @ c + 0.3
    assert output.values("usage")[0][0] > 20
    alone = RecordingProvider()
    await embed(EmbeddingRequest(model="e", inputs=texts[:1]), alone)
    assert alone.values("embeddings")[0][0] == pytest.approx(a, abs=1e-4)


@needs("onnxruntime", "tokenizers", weights="minilm")
async def test_minilm_refuses_long_texts_and_token_ids(nursery: trio.Nursery) -> None:
    embed = await serving("minilm", nursery)
    with pytest.raises(ApiError, match=r"Input 1 has .* tokens; this model takes up to 256"):
        await embed(EmbeddingRequest(model="e", inputs=["short", "word " * 400]), RecordingProvider())
    with pytest.raises(ApiError, match="takes no token ids; send the text") as caught:
        await embed(EmbeddingRequest(model="e", inputs=[[1, 2, 3]]), RecordingProvider())
    assert caught.value.param == "input"
    cutting = await serving("minilm,truncate=yes,name=cutting", nursery)
    output = RecordingProvider()
    await cutting(EmbeddingRequest(model="e", inputs=["word " * 400]), output)
    assert output.values("usage") == [(256, 0)]


@needs("onnxruntime", "tokenizers", weights="minilm")
async def test_minilm_averages_a_long_text(nursery: trio.Nursery) -> None:
    passwords, cats = "how do I reset my password? " * 60, "the cat sat on the mat. " * 60

    async def vectors(spec: str, *texts: str) -> tuple[list[Any], int]:
        embed = await serving(f"minilm,{spec}", nursery)
        output = RecordingProvider()
        await embed(EmbeddingRequest(model="e", inputs=list(texts)), output)
        ((tokens, _),) = output.values("usage")
        return [vector for batch in output.values("embeddings") for vector in batch], tokens

    (cut,), cut_tokens = await vectors("long_texts=cut,name=cut", passwords + cats)
    (average, password, cat), tokens = await vectors(
        "long_texts=average,name=average,batch=2",
        passwords + cats,
        "how do I reset my password?",
        "the cat sat",
    )
    assert cut_tokens == 256
    # 120 sentences of 7 tokens in 4 windows, and the other two texts; two more tokens in each window.
    assert tokens == 120 * 7 + 4 * 2 + 9 + 5
    assert average @ average == pytest.approx(1.0, abs=1e-5)
    # The beginning is about passwords only, and the whole text about both.
    assert cut @ cat < 0.2 < average @ cat
    assert average @ password > 0.3


@needs("onnxruntime", "tokenizers", weights="minilm")
async def test_minilm_is_interrupted_in_the_middle_of_a_batch(nursery: trio.Nursery) -> None:
    embed = await serving("minilm,batch=256", nursery)
    texts = ["word " * 250] * 256
    began = trio.current_time()
    with trio.move_on_after(0.5) as scope:
        await embed(EmbeddingRequest(model="e", inputs=texts), RecordingProvider())
    assert scope.cancelled_caught
    # The whole batch takes more than ten seconds.
    assert trio.current_time() - began < 3

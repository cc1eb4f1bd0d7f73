"""The minilm engine: batches, and texts that are longer than the model takes, with a fake model."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from recording_provider import RecordingProvider

np = pytest.importorskip("numpy")

from trio_cluster.engines import parse_serve  # noqa: E402
from trio_cluster.engines.minilm import MiniLM  # noqa: E402
from trio_cluster.errors import ApiError, OptionsError  # noqa: E402
from trio_cluster.local.slots import Slots  # noqa: E402
from trio_cluster.openai import EmbeddingRequest  # noqa: E402

#: Words of a window, which has two more tokens: one that begins it and one that ends it.
WORDS = 4
MAX_TOKENS = WORDS + 2


class FakeTokenizer:
    """Tokens are words, which are numbers; truncates like the real one, which has the rest in ``overflowing``."""

    def __init__(self, *, truncates: bool) -> None:
        self.truncates = truncates

    def encode_batch(self, texts: list[str]) -> list[Any]:
        return [self.encode([int(word) for word in text.split()]) for text in texts]

    def encode(self, words: list[int]) -> Any:
        size = WORDS if self.truncates else max(len(words), 1)
        windows = [[0, *words[i : i + size], 0] for i in range(0, max(len(words), 1), size)]
        first, *rest = [SimpleNamespace(ids=ids, overflowing=[]) for ids in windows]
        first.overflowing = rest
        return first


class FakeSession:
    """The vector of a token has a 1 at its number, so that the vector of a text counts its words."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name=name) for name in ("input_ids", "attention_mask")]

    def run(self, outputs: None, feed: dict[str, Any], options: Any) -> list[Any]:
        assert set(feed) == {"input_ids", "attention_mask"}
        self.batches.append(len(feed["input_ids"]))
        return [np.eye(8, dtype=np.float32)[feed["input_ids"]]]


@pytest.fixture(autouse=True)
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for onnxruntime, of which only the options of a run are used."""
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(RunOptions=SimpleNamespace))


def model(long_texts: str = "refuse", batch: int = 3) -> MiniLM:
    tokenizer = FakeTokenizer(truncates=long_texts != "refuse")
    return MiniLM(FakeSession(), tokenizer, Slots(1), batch, MAX_TOKENS, long_texts == "average")


async def embed(which: MiniLM, *inputs: Any) -> tuple[list[Any], int]:
    """Return the vectors, and the tokens that are counted."""
    output = RecordingProvider()
    await which.embed(EmbeddingRequest(model="e", inputs=list(inputs)), output)
    vectors = [vector for batch in output.values("embeddings") for vector in batch]
    assert all(vector.dtype == np.float32 for vector in vectors)
    ((tokens, _),) = output.values("usage")
    return vectors, tokens


def unit(values: Any) -> Any:
    return np.array(values) / np.linalg.norm(values)


async def test_a_vector_is_the_mean_of_its_tokens_whatever_is_in_the_batch_beside_it() -> None:
    fake = model()
    vectors, tokens = await embed(fake, "1 2 2", "3", "1 2 3 4", "5")
    assert vectors[0] == pytest.approx(unit([2, 1, 2, 0, 0, 0, 0, 0]))
    assert vectors[1] == pytest.approx(unit([2, 0, 0, 1, 0, 0, 0, 0]))
    assert vectors[3] == pytest.approx(unit([2, 0, 0, 0, 0, 1, 0, 0]))
    assert fake._session.batches == [3, 1]
    assert tokens == 5 + 3 + 6 + 3


async def test_a_text_that_is_too_long_is_refused_before_anything_is_computed() -> None:
    fake = model()
    with pytest.raises(ApiError, match="Input 4 has 7 tokens; this model takes up to 6") as caught:
        await embed(fake, "1", "1", "1", "1", "1 2 3 4 5")
    assert (caught.value.param, caught.value.code) == ("input", "context_length_exceeded")
    assert fake._session.batches == []


async def test_a_cut_text_has_the_vector_and_the_tokens_of_its_beginning() -> None:
    cut, tokens = await embed(model("cut"), "1 2 3 4 5 5 5 5 5", "6")
    beginning, _ = await embed(model(), "1 2 3 4", "6")
    assert np.array_equal(cut, beginning)
    assert tokens == 6 + 3


async def test_an_averaged_text_has_the_weighted_mean_of_its_windows() -> None:
    fake = model("average")
    (vector, other), tokens = await embed(fake, "1 1 1 1 2 2 2 2 3", "4 4")
    first, second = unit([2, 4, 0, 0, 0, 0, 0, 0]), unit([2, 0, 4, 0, 0, 0, 0, 0])
    third = unit([2, 0, 0, 1, 0, 0, 0, 0])
    assert vector == pytest.approx(unit(6 * first + 6 * second + 3 * third))
    assert vector @ vector == pytest.approx(1.0)
    assert other == pytest.approx(unit([2, 0, 0, 0, 2, 0, 0, 0]))
    assert tokens == 6 + 6 + 3 + 4
    assert fake._session.batches == [3, 1]


@pytest.mark.parametrize("batch", [1, 2, 5, 16])
async def test_windows_of_one_text_may_be_in_several_batches(batch: int) -> None:
    texts = ["1 2 3 4 5", "6", "1 2 3 4 5 6 7 1 2 3 4 5 6 7 1 2 3 4 5 6 7", "2", "3 3 3 3 4"]
    fake = model("average", batch)
    vectors, tokens = await embed(fake, *texts)
    alone = [await embed(model("average"), text) for text in texts]
    assert np.allclose(vectors, [vector for (vector,), _ in alone], atol=1e-6)
    assert tokens == sum(count for _, count in alone)
    assert sum(fake._session.batches) == 2 + 1 + 6 + 1 + 2


async def test_a_short_text_has_the_same_vector_with_every_option() -> None:
    refusing, _ = await embed(model(), "1 2 3")
    for long_texts in ("cut", "average"):
        vectors, _ = await embed(model(long_texts), "1 2 3")
        assert np.array_equal(vectors, refusing)


async def test_token_ids_are_refused_with_what_langchain_has_to_be_told() -> None:
    with pytest.raises(ApiError, match=r"OpenAIEmbeddings\(check_embedding_ctx_length=False\)") as caught:
        await embed(model(), [1, 2, 3])
    assert (caught.value.status, caught.value.param) == (400, "input")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("long_texts=shorten", "long_texts: expected refuse, cut or average, got 'shorten'"),
        ("truncate=yes,long_texts=average", "truncate=yes means long_texts=cut"),
    ],
)
def test_options_that_cannot_be_are_refused(
    monkeypatch: pytest.MonkeyPatch, options: str, message: str
) -> None:
    monkeypatch.setattr("trio_cluster.engines.minilm.engine.requires", (), raising=False)
    with pytest.raises(OptionsError, match=message):
        parse_serve(f"minilm,{options}")

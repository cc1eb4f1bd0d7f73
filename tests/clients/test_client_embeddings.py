"""LangChain's embeddings: as it sends them, they are token ids, and the refusal says what to set.

It is tested where it is installed; ``nox -s clients`` installs it.
"""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
import trio
from served import Served, until

from trio_cluster import EmbeddingRequest
from trio_cluster.engines.minilm import MiniLM
from trio_cluster.local.slots import Slots

langchain = pytest.importorskip(
    "langchain_openai", reason="needs langchain-openai; `nox -s clients` installs it"
)
tiktoken = pytest.importorskip("tiktoken", reason="needs tiktoken; `nox -s clients` installs it")


@pytest.fixture
def vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for OpenAI's vocabulary, which LangChain would download: a token for each byte."""
    encoding = tiktoken.Encoding(
        "bytes", pat_str=".", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={}
    )
    for function in ("encoding_for_model", "get_encoding"):
        monkeypatch.setattr(tiktoken, function, lambda name: encoding)


@pytest.fixture
async def embedder(served: Served) -> str:
    """The engine's own handler for token ids, in front of a model that knows how long a text is; its name."""
    engine = MiniLM(None, None, Slots(1), 16, 256, False)

    async def embed(request: EmbeddingRequest, provider: Any) -> None:
        if not isinstance(request.inputs[0], str):
            await engine.embed(request, provider)
        for text in request.inputs:
            await provider.push([float(len(text)), 1.0])

    served.back.register_embedding("embedder", embed)
    await until(lambda: served.front.has_model("embedder"))
    return "embedder"


def client(served: Served, model: str, **settings: Any) -> Any:
    return langchain.OpenAIEmbeddings(
        model=model, base_url=f"{served.url}/v1", api_key="a-key", max_retries=0, **settings
    )


@pytest.mark.usefixtures("vocabulary")
async def test_langchain_sends_token_ids_and_is_told_what_to_set(served: Served, embedder: str) -> None:
    with pytest.raises(openai.BadRequestError, match=r"check_embedding_ctx_length=False") as caught:
        await trio.to_thread.run_sync(client(served, embedder).embed_query, "some words")
    assert (caught.value.code, caught.value.param) == ("unsupported_value", "input")
    assert "OpenAIEmbeddings" in json.dumps(caught.value.body)


@pytest.mark.usefixtures("vocabulary")
async def test_langchain_works_with_that_setting(served: Served, embedder: str) -> None:
    told = client(served, embedder, check_embedding_ctx_length=False)
    texts = ["one", "three"]
    assert await trio.to_thread.run_sync(told.embed_documents, texts) == [[3.0, 1.0], [5.0, 1.0]]

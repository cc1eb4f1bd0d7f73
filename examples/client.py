"""Send a request to every model of a cluster, with the official ``openai`` package.

    python client.py [BASE_URL] [API_KEY]

Nothing in this client is specific to trio_cluster, apart from the field ``kind`` of the models in ``/v1/models``.
"""

from __future__ import annotations

import argparse
from typing import Any

import openai


def ask_chat(client: openai.OpenAI, model: str) -> str:
    """Stream an answer, and return it as one text."""
    with client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "one two three"}], stream=True
    ) as stream:
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def ask_embedding(client: openai.OpenAI, model: str) -> str:
    """Embed two texts, and return how similar they are."""
    first, second = client.embeddings.create(model=model, input=["a cat sat", "the cat sat"]).data
    similarity = sum(x * y for x, y in zip(first.embedding, second.embedding, strict=True))
    return f"{len(first.embedding)} numbers each, similarity {similarity:.2f}"


def ask_tts(client: openai.OpenAI, model: str) -> bytes:
    """Return a sentence as speech."""
    return client.audio.speech.create(
        model=model, voice="any", input="hello to everybody", response_format="wav"
    ).content


def ask_asr(client: openai.OpenAI, model: str, audio: bytes) -> str:
    """Return the transcript of a recording."""
    return client.audio.transcriptions.create(model=model, file=("speech.wav", audio)).text


def ask_image(client: openai.OpenAI, model: str) -> str:
    """Generate a picture, and return its size."""
    images = client.images.generate(model=model, prompt="a 7, please").data or []
    return f"{len(images[0].b64_json or '')} characters of base64"


def ask_rerank(client: openai.OpenAI, model: str) -> str:
    """Rerank two texts. The official client has no method for it, but can POST to any route."""
    body = {"model": model, "query": "the cat", "documents": ["a dog barked", "the cat sat"]}
    results = client.post("/rerank", cast_to=dict[str, Any], body=body)["results"]
    return f"text {results[0]['index']} is the best, with a score of {results[0]['relevance_score']:.2f}"


def ask_moderation(client: openai.OpenAI, model: str) -> str:
    """Return the verdict on a text."""
    verdict = client.moderations.create(model=model, input="GO AWAY").results[0]
    return "flagged" if verdict.flagged else "harmless"


def main(base_url: str, api_key: str) -> None:
    """Send one request to every model."""
    client = openai.OpenAI(base_url=base_url, api_key=api_key)
    models = {model.id: model.model_dump().get("kind") for model in client.models.list()}
    audio = b""
    for model in (name for name, kind in models.items() if kind == "tts"):
        audio = ask_tts(client, model)
        print(f"{model}: {len(audio)} bytes of sound")
    for model, kind in models.items():
        if kind == "chat":
            print(f"{model}: {ask_chat(client, model)}")
        elif kind == "embedding":
            print(f"{model}: {ask_embedding(client, model)}")
        elif kind == "asr" and audio:
            print(f"{model}: {ask_asr(client, model, audio)}")
        elif kind == "image_generation":
            print(f"{model}: {ask_image(client, model)}")
        elif kind == "rerank":
            print(f"{model}: {ask_rerank(client, model)}")
        elif kind == "moderation":
            print(f"{model}: {ask_moderation(client, model)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Send a request to every model of a cluster.")
    parser.add_argument("base_url", nargs="?", default="http://127.0.0.1:8080/v1", metavar="BASE_URL")
    parser.add_argument("api_key", nargs="?", default="not-needed", metavar="API_KEY")
    arguments = parser.parse_args()
    main(arguments.base_url, arguments.api_key)

"""What the demo prints for users who want to try it: a shell command and some Python for each model."""

from __future__ import annotations

from typing import Final

__all__ = ["how_to_try"]

_TEXT: Final = """
The OpenAI API is at {url} and needs no key. In a browser, open {page}
Try it from another terminal:

# chat
curl {url}/chat/completions -H 'Content-Type: application/json' \\
  -d '{{"model": "smollm2", "stream": true, "messages": [{{"role": "user", "content": "Tell me about Paris."}}]}}'

# embeddings
curl {url}/embeddings -H 'Content-Type: application/json' \\
  -d '{{"model": "all-MiniLM-L6-v2", "input": ["one text", "another text"]}}'

# text to speech
curl {url}/audio/speech -H 'Content-Type: application/json' -o speech.wav \\
  -d '{{"model": "hibari", "voice": "alloy", "input": "Several machines can answer as one."}}'

# speech to text
curl {url}/audio/transcriptions -F model=whisper-tiny.en -F file=@speech.wav

# images
curl {url}/images/generations -H 'Content-Type: application/json' \\
  -d '{{"model": "digits", "prompt": "a handwritten seven"}}'

# Python (pip install openai)
import base64, pathlib, openai
client = openai.OpenAI(base_url="{url}", api_key="none")
question = [{{"role": "user", "content": "Tell me about Paris."}}]
for chunk in client.chat.completions.create(model="smollm2", messages=question, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)

vector = client.embeddings.create(model="all-MiniLM-L6-v2", input="one text").data[0].embedding
speech = client.audio.speech.create(model="hibari", voice="alloy", input="Several machines can answer as one.")
print(client.audio.transcriptions.create(model="whisper-tiny.en", file=("speech.wav", speech.content)).text)
image = client.images.generate(model="digits", prompt="a handwritten seven").data[0].b64_json
pathlib.Path("seven.png").write_bytes(base64.b64decode(image))

Ctrl-C ends the demo."""


def how_to_try(url: str) -> str:
    """Return the text for a cluster whose API is at ``url``."""
    page = f"{url.removesuffix('/v1')}/ui/"
    return _TEXT.format(url=url, page=page)

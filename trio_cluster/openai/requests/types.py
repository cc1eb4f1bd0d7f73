"""The requests that handlers get: one class for each kind of model, with the documented fields as attributes.

The classes are frozen values with keyword arguments. They check nothing, so tests and engines can build them with only
the fields that they need; the body that a client sends is checked before it becomes a request (see ``readers.py``).
Defaults are those of the OpenAI reference. ``raw`` tells a field that was left out from one that was sent with its
default value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

__all__ = [
    "ASRRequest",
    "ChatRequest",
    "CustomRequest",
    "EmbeddingRequest",
    "ImageEditRequest",
    "ImageGenRequest",
    "ModelRequest",
    "ModerationRequest",
    "RerankRequest",
    "TTSRequest",
]

_TEXT_PARTS = frozenset({"text", "input_text"})
_IMAGE_PARTS = frozenset({"image_url", "input_image"})


@attrs.frozen(kw_only=True, eq=False)
class ModelRequest:
    """The attributes that every request has.

    A request is frozen, and two requests are equal only if they are the same object. The lists and dicts in it may be
    shared with ``raw``: a handler that changes one should copy it first.
    """

    model: str
    """The name of the model, as the client sent it; never empty."""
    raw: Mapping[str, Any] = attrs.field(factory=dict, repr=False)
    """The fields as they were sent, undocumented ones included. In a form, a field is text, a list of texts if its name
    came more than once, or a list of ``bytes`` for files. The documented files of a route are not repeated here."""
    headers: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    """The client's headers that may matter to a model; names in lower case."""
    worker: str = ""
    """The name of the node on which the handler runs: a worker, or a server that serves the model itself."""
    key_name: str = ""
    """The name of the API key that the request has; empty where no key is required. Not the key itself."""


def _text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    # A line break keeps the words of neighbouring parts apart.
    texts = (part.get("text") for part in content if part.get("type") in _TEXT_PARTS)
    return "\n".join(text for text in texts if isinstance(text, str))


def _has_image(parts: list[dict[str, Any]]) -> bool:
    return any(part.get("type") in _IMAGE_PARTS for part in parts)


def prompt_fields(prompt: str | list[int]) -> dict[str, Any]:
    """Return the attributes of a :class:`ChatRequest` with one prompt, as text or as token ids."""
    if isinstance(prompt, str):
        return {"prompt": prompt, "messages": [{"role": "user", "content": prompt}]}
    return {"prompt": "", "prompt_tokens": prompt, "messages": [{"role": "user", "content": ""}]}


@attrs.frozen(kw_only=True, eq=False)
class ChatRequest(ModelRequest):
    """A request for text: to ``/v1/chat/completions``, ``/v1/completions`` or ``/v1/responses``.

    A request to ``/v1/completions`` becomes a single user message. One to ``/v1/responses`` is translated into a chat;
    only ``raw`` has it as it was sent.
    """

    messages: list[dict[str, Any]]
    """The conversation, in the form of ``/v1/chat/completions``: dicts with ``role`` and, mostly, ``content``, which is
    text or a list of parts. Never empty."""
    prompt: str | None = None
    """The bare prompt of a request to ``/v1/completions``, for models that need no chat template. Empty if the prompt
    is one of token ids."""
    prompt_tokens: list[int] | None = None
    """The prompt of a request to ``/v1/completions`` that has token ids instead of text. Only models with
    ``accepts_token_ids`` get such requests; the text of the only message is empty then."""
    prompts: list[str] | list[list[int]] | None = None
    """All prompts of a request to ``/v1/completions`` that has several. A handler is called for each of them, one after
    the other in one slot, and need not care: in what it is given, this is ``None``."""
    stream: bool = False
    """The client wants the answer as a stream. A handler need not care: its output is encoded either way."""
    stream_options: dict[str, Any] | None = None
    temperature: float = 1.0
    """0 to 2."""
    top_p: float = 1.0
    """0 to 1."""
    n: int = 1
    """The number of choices, 1 to 128. The ``index`` of an :class:`OutputChunk` is that of its choice, from 0."""
    stop: str | list[str] | None = None
    """As it was sent: one sequence, or a list. The OpenAI API allows four; a handler that can take no more should
    refuse the rest. :attr:`stop_sequences` is always a list."""
    max_tokens: int | None = None
    """1 or more; see :attr:`token_limit`. For ``/v1/completions``, 16 if the client does not send it, and it may be 0:
    the prompt is to be read, and nothing to be generated."""
    max_completion_tokens: int | None = None
    """1 or more; see :attr:`token_limit`."""
    presence_penalty: float = 0.0
    """-2 to 2."""
    frequency_penalty: float = 0.0
    """-2 to 2."""
    logit_bias: dict[str, float] | None = None
    """For token ids, as text, a bias of -100 to 100."""
    logprobs: bool = False
    """The client wants the log probabilities of the tokens."""
    top_logprobs: int | None = None
    """0 to 20: how many alternatives of each token the client wants with ``logprobs``."""
    seed: int | None = None
    """A 64-bit signed integer."""
    tools: list[dict[str, Any]] | None = None
    """Up to 128 tools: ``{"type": "function", "function": {"name", "description", "parameters"}}``, and tools of other
    types as they were sent."""
    tool_choice: str | dict[str, Any] | None = None
    """``none``, ``auto``, ``required``, or an object."""
    parallel_tool_calls: bool = True
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    """``{"type": "text" | "json_object" | "json_schema", ...}``; ``None``: text."""
    reasoning_effort: str | None = None
    verbosity: str | None = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    """Up to 16 pairs of text."""
    store: bool = False
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None

    def parts(self) -> list[ChatRequest]:
        """Return the requests that a handler answers one after the other: one for each of ``prompts``."""
        if self.prompts is None:
            return [self]
        return [attrs.evolve(self, prompts=None, **prompt_fields(prompt)) for prompt in self.prompts]

    @property
    def last_text(self) -> str:
        """The text of the last message of role ``user``; of a message with parts, the text parts, one per line.

        Empty if there is no such message, or no text in it.
        """
        for message in reversed(self.messages):
            if message.get("role") == "user":
                return _text_of(message.get("content"))
        return ""

    @property
    def has_image_inputs(self) -> bool:
        """Whether a message has an image among its parts."""
        for message in self.messages:
            content = message.get("content")
            if isinstance(content, list) and _has_image(content):
                return True
        return False

    @property
    def stop_sequences(self) -> list[str]:
        """``stop`` as a new list; empty if there is none."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)

    @property
    def token_limit(self) -> int | None:
        """How many tokens may be generated: ``max_completion_tokens``, or else the older ``max_tokens``.

        ``None``: the client has set no limit.
        """
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


@attrs.frozen(kw_only=True, eq=False)
class EmbeddingRequest(ModelRequest):
    """A request for one vector for each of ``inputs``."""

    inputs: list[str] | list[list[int]]
    """1 to 2048 texts, none of them empty, or as many lists of token ids. A single input is a list of one."""
    dimensions: int | None = None
    """The length of the vectors that the client wants. A handler may give longer ones: they are cut, and normalised."""
    encoding_format: str = "float"
    """``float`` or ``base64``: how the answer is encoded. A handler need not care."""
    user: str | None = None


@attrs.frozen(kw_only=True, eq=False)
class ASRRequest(ModelRequest):
    """A request to transcribe speech, or to translate it into English."""

    audio: bytes = attrs.field(repr=lambda audio: f"<{len(audio)} bytes>")
    """The file as it was uploaded, in any format; never empty."""
    filename: str = ""
    """The name of the file, as the client sent it."""
    mime_type: str = ""
    """The type of the file, as the client sent it; may be empty or wrong."""
    language: str | None = None
    """ISO 639-1 code of the spoken language, as the client sent it; unchecked."""
    prompt: str | None = None
    """Text that the audio continues, or that shows the wanted style."""
    response_format: str = "json"
    """How the answer is encoded: ``json``, ``text``, ``srt``, ``verbose_json``, ``vtt`` or ``diarized_json``; the last
    four are made of the segments that a handler gives."""
    temperature: float = 0.0
    """0 to 1."""
    timestamp_granularities: list[str] = attrs.field(factory=lambda: ["segment"])
    """``word``, ``segment``, or both."""
    stream: bool = False
    """The client wants the answer as a stream. A handler need not care: its output is encoded either way."""
    include: list[str] = attrs.field(factory=list)
    """Contains ``logprobs`` if the client wants the log probabilities that a handler may give."""
    chunking_strategy: str | dict[str, Any] | None = None
    """``auto``, or an object."""
    known_speaker_names: list[str] = attrs.field(factory=list)
    known_speaker_references: list[str] = attrs.field(factory=list)
    """Data URLs of samples, one for each name."""
    keywords: list[str] = attrs.field(factory=list)
    languages: list[str] = attrs.field(factory=list)
    translate: bool = False
    """The text is wanted in English (``/v1/audio/translations``)."""


@attrs.frozen(kw_only=True, eq=False)
class TTSRequest(ModelRequest):
    """A request to turn a text into speech."""

    input: str
    """1 to 4096 characters."""
    voice: str
    """The name of a voice, or the id of a custom one."""
    response_format: str = "mp3"
    """``mp3``, ``opus``, ``aac``, ``flac``, ``wav`` or ``pcm``: the format that the handler should give."""
    speed: float = 1.0
    """0.25 to 4, where 1 is the normal speed."""
    instructions: str | None = None
    """How the voice should sound."""
    stream_format: str = "audio"
    """``audio`` or ``sse``: how the audio is encoded. A handler need not care."""


@attrs.frozen(kw_only=True, eq=False)
class _ImageRequest(ModelRequest):
    """The attributes that requests for images have."""

    prompt: str
    """1 to 32000 characters."""
    n: int = 1
    """The number of images, 1 to 10; in a stream, 1."""
    size: str = "auto"
    """``auto`` or ``WIDTHxHEIGHT`` in pixels; :attr:`width` and :attr:`height` have the numbers."""
    quality: str = "auto"
    """``auto``, ``low``, ``medium``, ``high``, ``xhigh``, ``max``, ``standard`` or ``hd``."""
    response_format: str = "b64_json"
    """Always ``b64_json``, since images are not stored."""
    background: str = "auto"
    """``transparent``, ``opaque`` or ``auto``."""
    output_format: str = "png"
    """``png``, ``webp``, ``jpeg``, ``gif`` or ``svg``: the format that the handler should give."""
    output_compression: int = 100
    """0 to 100, for formats with variable compression."""
    stream: bool = False
    """The client wants the image as an event. A handler need not care: its output is encoded either way."""
    partial_images: int = 0
    """How many partial images the client of a stream wants to see before the final one, 0 to 3; see
    :meth:`OutputChunk.partial_image`."""
    user: str | None = None

    @property
    def width(self) -> int | None:
        """The requested width in pixels; ``None`` if the model may choose."""
        return None if self.size == "auto" else int(self.size.partition("x")[0])

    @property
    def height(self) -> int | None:
        """The requested height in pixels; ``None`` if the model may choose."""
        return None if self.size == "auto" else int(self.size.partition("x")[2])


@attrs.frozen(kw_only=True, eq=False)
class ImageGenRequest(_ImageRequest):
    """A request for ``n`` images."""

    style: str = "vivid"
    """``vivid`` or ``natural``."""
    moderation: str = "auto"
    """``low`` or ``auto``."""


@attrs.frozen(kw_only=True, eq=False)
class ImageEditRequest(_ImageRequest):
    """A request for ``n`` images made from other images."""

    images: list[bytes] = attrs.field(repr=lambda images: f"<{len(images)} images>")
    """1 to 16 files as they were uploaded, none of them empty."""
    image_types: list[str] = attrs.field(factory=list)
    """The type of each file, as the client sent it; may be empty or wrong."""
    mask: bytes | None = attrs.field(default=None, repr=False)
    """An image whose transparent areas are those where the first image is to be changed."""
    input_fidelity: str = "low"
    """``high`` or ``low``."""


@attrs.frozen(kw_only=True, eq=False)
class RerankRequest(ModelRequest):
    """A request for scores: how well each of ``documents`` answers a query."""

    query: str
    """Never empty."""
    documents: list[str]
    """The texts of the documents; at least one. ``raw`` has them as they were sent."""
    top_n: int | None = None
    """How many of the best results the client wants, 1 or more. A handler need not care: the list is cut for it."""
    return_documents: bool = False
    """The client wants the documents in the results. A handler need not care."""


@attrs.frozen(kw_only=True, eq=False)
class ModerationRequest(ModelRequest):
    """A request to judge each of ``inputs``."""

    inputs: list[str] | list[list[dict[str, Any]]]
    """1 to 2048 texts; or a single list of parts, which are to be judged together: ``{"type": "text", "text"}`` and
    ``{"type": "image_url", "image_url": {"url"}}``."""

    @property
    def texts(self) -> list[str]:
        """The text of each input; of an input of parts, the text parts, one per line."""
        return [_text_of(each) for each in self.inputs]

    @property
    def has_image_inputs(self) -> bool:
        """Whether there is an image among the parts."""
        return any(isinstance(each, list) and _has_image(each) for each in self.inputs)


@attrs.frozen(kw_only=True, eq=False)
class CustomRequest(ModelRequest):
    """A request to a custom route, which the OpenAI API does not have."""

    path: str
    """The path of the route, as it was registered."""
    query: str = ""
    """The query of the URL, without the question mark, percent-encoded as the client sent it; empty if there is none.
    ``urllib.parse.parse_qs`` takes it apart. Keys, and a ``model`` that repeats the one of the body, are left out."""
    stream: bool = False
    """The client wants each piece of the answer as a separate event."""
    body: bytes = attrs.field(default=b"", repr=False)
    """The body as it was sent, byte for byte."""
    content_type: str = ""
    """The ``Content-Type`` of the body, with parameters; empty if there was none."""
    files: Mapping[str, list[bytes]] = attrs.field(factory=dict, repr=False)
    """The uploaded files of a form, by field. ``raw`` has its other fields."""

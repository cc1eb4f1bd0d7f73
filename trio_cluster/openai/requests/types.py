"""What a handler is given: one class per kind of model, the documented fields as attributes.

The classes are plain frozen values. They do not check anything, so that tests and engines can build them with
whatever they need; what a client sends is checked before it becomes one (see ``readers.py``). Defaults are
those of the OpenAI reference. Where a handler must tell "left out" from "sent with the default value",
``raw`` knows.
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
    """What all requests have."""

    model: str
    raw: Mapping[str, Any] = attrs.field(factory=dict, repr=False)
    """The fields as they were sent, those that nobody documented included. Form fields are text, lists of
    text where a name came more than once, and lists of bytes for files; the audio file itself is not repeated
    here."""
    headers: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    """The client's headers that may matter to a model, names in lower case."""


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


@attrs.frozen(kw_only=True, eq=False)
class ChatRequest(ModelRequest):
    """A request for text: ``/v1/chat/completions``, and whatever else can be said as one.

    ``/v1/completions`` is a single user message. ``/v1/responses`` is translated; only ``raw`` has it as it was sent.
    """

    messages: list[dict[str, Any]]
    """In the form of ``/v1/chat/completions``."""
    prompt: str | None = None
    """The bare prompt of a request to ``/v1/completions``, for models that need no chat template."""
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    temperature: float = 1.0
    """0 to 2."""
    top_p: float = 1.0
    """0 to 1."""
    n: int = 1
    """How many choices are wanted, 1 to 128; pieces of output say by their index which one they belong to."""
    stop: str | list[str] | None = None
    """As it was sent; :attr:`stop_sequences` is easier to use."""
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    presence_penalty: float = 0.0
    """-2 to 2."""
    frequency_penalty: float = 0.0
    """-2 to 2."""
    logit_bias: dict[str, float] | None = None
    """Token ids, as text, to a bias of -100 to 100."""
    logprobs: bool = False
    top_logprobs: int | None = None
    """0 to 20."""
    seed: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    """``{"type": "text" | "json_object" | "json_schema", ...}``; ``None`` means text."""
    reasoning_effort: str | None = None
    verbosity: str | None = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None
    store: bool = False
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None

    @property
    def last_text(self) -> str:
        """The text of the last message of role ``user``; its text parts, one per line, where it has parts.

        Empty if there is no such message, or no text in it.
        """
        for message in reversed(self.messages):
            if message.get("role") == "user":
                return _text_of(message.get("content"))
        return ""

    @property
    def has_image_inputs(self) -> bool:
        """Whether any message has an image among its parts."""
        for message in self.messages:
            content = message.get("content")
            if isinstance(content, list) and _has_image(content):
                return True
        return False

    @property
    def stop_sequences(self) -> list[str]:
        """``stop`` as a list, empty if there is none."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)

    @property
    def token_limit(self) -> int | None:
        """How many tokens may be generated: ``max_completion_tokens``, or else the older ``max_tokens``."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


@attrs.frozen(kw_only=True, eq=False)
class EmbeddingRequest(ModelRequest):
    """A request for vectors, one for each of ``inputs``."""

    inputs: list[str] | list[list[int]]
    """Texts or lists of token ids; a list in any case, never empty."""
    dimensions: int | None = None
    """The length that the client wants its vectors to have. A handler may give longer ones: they are cut."""
    encoding_format: str = "float"
    """``float`` or ``base64``; how the answer is written, nothing that a handler needs to care about."""
    user: str | None = None


@attrs.frozen(kw_only=True, eq=False)
class ASRRequest(ModelRequest):
    """A request to write down speech, or to translate it into English."""

    audio: bytes = attrs.field(repr=lambda audio: f"<{len(audio)} bytes>")
    """The file as it was uploaded, in whatever format it is."""
    filename: str = ""
    mime_type: str = ""
    """What the client says the file is; may be empty or wrong."""
    language: str | None = None
    """ISO 639-1 code of the language spoken, if the client knows."""
    prompt: str | None = None
    response_format: str = "json"
    """How the answer is written: ``json``, ``text``, ``srt``, ``verbose_json``, ``vtt`` or ``diarized_json``; the last
    four are made of the segments that a handler gives."""
    temperature: float = 0.0
    """0 to 1."""
    timestamp_granularities: list[str] = attrs.field(factory=lambda: ["segment"])
    """``word``, ``segment``, or both."""
    stream: bool = False
    include: list[str] = attrs.field(factory=list)
    """``logprobs``, if the client wants those that the handler may give."""
    chunking_strategy: str | dict[str, Any] | None = None
    known_speaker_names: list[str] = attrs.field(factory=list)
    known_speaker_references: list[str] = attrs.field(factory=list)
    """Data URLs, one for each name."""
    keywords: list[str] = attrs.field(factory=list)
    languages: list[str] = attrs.field(factory=list)
    translate: bool = False
    """Whether the text is wanted in English (``/v1/audio/translations``)."""


@attrs.frozen(kw_only=True, eq=False)
class TTSRequest(ModelRequest):
    """A request to speak a text."""

    input: str
    """1 to 4096 characters."""
    voice: str
    """The name of a voice, or the id of a custom one."""
    response_format: str = "mp3"
    """``mp3``, ``opus``, ``aac``, ``flac``, ``wav`` or ``pcm``."""
    speed: float = 1.0
    """0.25 to 4."""
    instructions: str | None = None
    stream_format: str = "audio"
    """How the audio is sent, ``audio`` or ``sse``; nothing that a handler needs to care about."""


@attrs.frozen(kw_only=True, eq=False)
class _ImageRequest(ModelRequest):
    """What requests for images have in common."""

    prompt: str
    n: int = 1
    """1 to 10; a stream has only one."""
    size: str = "auto"
    """``auto`` or ``WIDTHxHEIGHT`` in pixels; :attr:`width` and :attr:`height` have the numbers."""
    quality: str = "auto"
    response_format: str = "b64_json"
    background: str = "auto"
    output_format: str = "png"
    output_compression: int = 100
    """0 to 100, for formats that can be compressed more or less."""
    stream: bool = False
    partial_images: int = 0
    """How many images on the way to the final one the client of a stream wants to see, 0 to 3; see
    :meth:`OutputChunk.partial_image`."""
    user: str | None = None

    @property
    def width(self) -> int | None:
        """The width asked for in pixels; ``None`` if the model may choose."""
        return None if self.size == "auto" else int(self.size.partition("x")[0])

    @property
    def height(self) -> int | None:
        """The height asked for in pixels; ``None`` if the model may choose."""
        return None if self.size == "auto" else int(self.size.partition("x")[2])


@attrs.frozen(kw_only=True, eq=False)
class ImageGenRequest(_ImageRequest):
    """A request for ``n`` images."""

    style: str = "vivid"
    """``vivid`` or ``natural``."""
    moderation: str = "auto"


@attrs.frozen(kw_only=True, eq=False)
class ImageEditRequest(_ImageRequest):
    """A request for ``n`` images made from others."""

    images: list[bytes] = attrs.field(repr=lambda images: f"<{len(images)} images>")
    """The files as they were uploaded, 1 to 16 of them."""
    image_types: list[str] = attrs.field(factory=list)
    """What the client says each of them is; may be empty or wrong."""
    mask: bytes | None = attrs.field(default=None, repr=False)
    """An image whose transparent parts tell where the first image is to be changed."""
    input_fidelity: str = "low"
    """``high`` or ``low``."""


@attrs.frozen(kw_only=True, eq=False)
class RerankRequest(ModelRequest):
    """A request to say how well each of ``documents`` answers a query."""

    query: str
    documents: list[str]
    """Their texts, never none of them."""
    top_n: int | None = None
    """How many results the client wants, the best ones; nothing that a handler needs to care about."""
    return_documents: bool = False
    """Whether results carry their documents; nothing that a handler needs to care about."""


@attrs.frozen(kw_only=True, eq=False)
class ModerationRequest(ModelRequest):
    """A request to judge each of ``inputs``."""

    inputs: list[str] | list[list[dict[str, Any]]]
    """Texts; or one list of parts, which are to be judged together: ``{"type": "text", "text"}`` and
    ``{"type": "image_url", "image_url": {"url"}}``."""

    @property
    def texts(self) -> list[str]:
        """The text of each input; that of parts, one per line."""
        return [_text_of(each) for each in self.inputs]

    @property
    def has_image_inputs(self) -> bool:
        """Whether there is any image among the parts."""
        return any(isinstance(each, list) and _has_image(each) for each in self.inputs)


@attrs.frozen(kw_only=True, eq=False)
class CustomRequest(ModelRequest):
    """A request to a route that the OpenAI API does not have."""

    path: str
    """The route, as it was registered."""
    stream: bool = False
    """The client wants each piece of the answer as an event of its own."""
    body: bytes = attrs.field(default=b"", repr=False)
    """What was sent, byte for byte."""
    content_type: str = ""
    files: Mapping[str, list[bytes]] = attrs.field(factory=dict, repr=False)
    """The uploaded files of a form, by field; its other fields are ``raw``."""

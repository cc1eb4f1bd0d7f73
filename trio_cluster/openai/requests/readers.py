"""The readers: for each route, the function that makes a request of a body.

A reader takes the body as it came, its content type and the headers worth keeping, and returns a request, or raises
:class:`InvalidRequest` with ``param`` naming the field that is wrong. A request that cannot be served is refused here,
before it takes a slot. The route's table defines what may be in a request.

With ``checked``, a reader trusts that the same body has passed it before: on the master that forwarded it. It decodes
the body and makes the same request of it, and skips every check that could only end in an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from trio_cluster.errors import InvalidRequest

from ..json_values import read_object
from .fields import Table
from .forms import Form, media_type, read_form
from .tables import (
    CHAT,
    COMPLETION,
    EMBEDDING,
    IMAGE_EDIT,
    IMAGE_GENERATION,
    SPEECH,
    TRANSCRIPTION,
    TRANSLATION,
)
from .types import (
    ASRRequest,
    ChatRequest,
    EmbeddingRequest,
    ImageEditRequest,
    ImageGenRequest,
    TTSRequest,
    prompt_fields,
)

__all__ = [
    "image_edit_of",
    "read_chat",
    "read_completion",
    "read_embedding",
    "read_image_edit",
    "read_image_generation",
    "read_json",
    "read_speech",
    "read_transcription",
    "read_translation",
    "transcription_of",
    "translation_of",
]

#: ``max_tokens`` of a completion if the client does not send it; the default of the OpenAI reference.
_COMPLETION_TOKENS: Final = 16


def read_json(body: bytes, content_type: str, *, checked: bool = False) -> dict[str, Any]:
    """Return the JSON object in ``body``; a missing content type is forgiven, a wrong one is not.

    Args:
        body: the body as it came.
        content_type: its content type; empty if there is none.
        checked: the content type has been checked before.

    Raises:
        InvalidRequest: it is not JSON, not an object, or of another content type (415).
    """
    if checked:
        return read_object(body)
    kind = media_type(content_type)
    if kind not in ("application/json", "") and not kind.endswith("+json"):
        raise InvalidRequest(
            f"Unsupported content type '{kind}': expected application/json",
            status=415,
            code="unsupported_media_type",
        )
    return read_object(body)


def _raw(form: Form) -> dict[str, Any]:
    """Return the fields of a form, and those of its files that are not documented."""
    return form.fields | {name: [file.data for file in files] for name, files in form.files.items()}


def read_chat(
    body: bytes, content_type: str, headers: Mapping[str, str], *, checked: bool = False
) -> ChatRequest:
    """Read a request to ``/v1/chat/completions``."""
    raw = read_json(body, content_type, checked=checked)
    return ChatRequest(raw=raw, headers=headers, **CHAT.read(raw, checked=checked))


def read_completion(
    body: bytes, content_type: str, headers: Mapping[str, str], *, checked: bool = False
) -> ChatRequest:
    """Read a request to ``/v1/completions``: a chat of one message, for any chat model to answer.

    ``echo``, ``suffix`` and ``best_of`` are checked and stay in ``raw``; a number of ``logprobs`` becomes
    ``top_logprobs``. Of several prompts, the first is that of the request; see :meth:`ChatRequest.parts`.
    """
    raw = read_json(body, content_type, checked=checked)
    known = COMPLETION.read(raw, checked=checked)
    for name in ("best_of", "echo", "suffix"):
        known.pop(name, None)
    logprobs = known.pop("logprobs", None)
    prompts = known.pop("prompt")
    if logprobs is not None:
        known |= {"logprobs": True, "top_logprobs": logprobs}
    known.setdefault("max_tokens", _COMPLETION_TOKENS)
    if len(prompts) > 1:
        known["prompts"] = prompts
    return ChatRequest(raw=raw, headers=headers, **prompt_fields(prompts[0]), **known)


def read_embedding(
    body: bytes, content_type: str, headers: Mapping[str, str], *, checked: bool = False
) -> EmbeddingRequest:
    """Read a request to ``/v1/embeddings``."""
    raw = read_json(body, content_type, checked=checked)
    known = EMBEDDING.read(raw, checked=checked)
    return EmbeddingRequest(inputs=known.pop("input"), raw=raw, headers=headers, **known)


def _audio(
    table: Table, form: Form, headers: Mapping[str, str], *, translate: bool, checked: bool
) -> ASRRequest:
    known = table.read_form(form.fields, checked=checked)
    (file,) = table.read_files(form, checked=checked)["file"]
    return ASRRequest(
        audio=file.data,
        filename=file.name,
        mime_type=file.mime_type,
        translate=translate,
        raw=_raw(form),
        headers=headers,
        **known,
    )


def read_transcription(
    body: bytes, content_type: str, headers: Mapping[str, str], *, checked: bool = False
) -> ASRRequest:
    """Read a request to ``/v1/audio/transcriptions``."""
    return transcription_of(read_form(body, content_type), headers, checked=checked)


def transcription_of(form: Form, headers: Mapping[str, str], *, checked: bool = False) -> ASRRequest:
    """Return the request to ``/v1/audio/transcriptions`` that is in a form."""
    return _audio(TRANSCRIPTION, form, headers, translate=False, checked=checked)


def read_translation(
    body: bytes, content_type: str, headers: Mapping[str, str], *, checked: bool = False
) -> ASRRequest:
    """Read a request to ``/v1/audio/translations``."""
    return translation_of(read_form(body, content_type), headers, checked=checked)


def translation_of(form: Form, headers: Mapping[str, str], *, checked: bool = False) -> ASRRequest:
    """Return the request to ``/v1/audio/translations`` that is in a form."""
    return _audio(TRANSLATION, form, headers, translate=True, checked=checked)


def read_speech(
    body: bytes, content_type: str, headers: Mapping[str, str], *, checked: bool = False
) -> TTSRequest:
    """Read a request to ``/v1/audio/speech``."""
    raw = read_json(body, content_type, checked=checked)
    return TTSRequest(raw=raw, headers=headers, **SPEECH.read(raw, checked=checked))


def read_image_generation(
    body: bytes, content_type: str, headers: Mapping[str, str], *, checked: bool = False
) -> ImageGenRequest:
    """Read a request to ``/v1/images/generations``."""
    raw = read_json(body, content_type, checked=checked)
    return ImageGenRequest(raw=raw, headers=headers, **IMAGE_GENERATION.read(raw, checked=checked))


def read_image_edit(
    body: bytes, content_type: str, headers: Mapping[str, str], *, checked: bool = False
) -> ImageEditRequest:
    """Read a request to ``/v1/images/edits``."""
    return image_edit_of(read_form(body, content_type), headers, checked=checked)


def image_edit_of(form: Form, headers: Mapping[str, str], *, checked: bool = False) -> ImageEditRequest:
    """Return the request to ``/v1/images/edits`` that is in a form."""
    known = IMAGE_EDIT.read_form(form.fields, checked=checked)
    files = IMAGE_EDIT.read_files(form, checked=checked)
    return ImageEditRequest(
        images=[file.data for file in files["image"]],
        image_types=[file.mime_type for file in files["image"]],
        mask=next((file.data for file in files["mask"]), None),
        raw=_raw(form),
        headers=headers,
        **known,
    )

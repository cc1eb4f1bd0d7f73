"""``hibari``: English text to speech with Hibari, whose default voice is part of its package.

The text is spoken sentence by sentence, and each sentence is sent as soon as it is computed. A cancelled request stops
after the current sentence, tens of milliseconds later.

The formats are ``wav``, which is also used if the client sets none, and ``pcm``, both with 16-bit little-endian
samples, 24 kHz, one channel. There is no encoder for ``mp3``, ``opus``, ``aac`` and ``flac``; requests for them are
refused. The WAV file of a single sentence states its length. That of several sentences is sent before its length is
known, so that both lengths in its header are the largest possible, as in OpenAI's own responses; browsers, VLC, ffmpeg
and Python's ``wave`` play such a file to its end.

There is one voice. Every name of a voice is accepted, also those of OpenAI's voices, and is spoken with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Final

import attrs

from trio_cluster.errors import ClusterError, InvalidRequest
from trio_cluster.local.adapters import Provider
from trio_cluster.local.slots import Slots
from trio_cluster.openai import OutputChunk, TTSRequest
from trio_cluster.openai.responses.pcm import wav_header

from ._engine import LoadingEngine, Option, ServedModel, text, whole_number
from ._threads import Outlet, ThreadStream

__all__ = ["Speaker", "engine"]

_FORMATS: Final = ("wav", "pcm")


class _Hibari(LoadingEngine):
    summary = "text to speech: English, with Hibari"
    requires = ("hibari", "onnxruntime", "numpy")
    extra = "trio-cluster[hibari]"
    options: ClassVar[Mapping[str, Option]] = {
        "name": Option(text, "hibari", "the model's name"),
        "threads": Option(whole_number(1, 1024), 1, "threads for each sentence"),
        "parallel": Option(whole_number(1, 64), 2, "requests that are worked on at once"),
    }

    @contextmanager
    def open(self, argument: str, options: Mapping[str, Any]) -> Iterator[ServedModel]:
        """See :meth:`LoadingEngine.open`."""
        yield ServedModel(options["name"], "tts", Speaker.load(options).speak)


engine = _Hibari()


@attrs.frozen(eq=False)
class Speaker:
    """A loaded voice."""

    _voice: Any
    _slots: Slots

    @classmethod
    def load(cls, options: Mapping[str, Any]) -> Speaker:
        """Load the voice. Blocks.

        Args:
            options: a value for every option of the engine.

        Raises:
            ClusterError: the library cannot load it.
        """
        import hibari

        try:
            voice = hibari.Hibari(threads=options["threads"])
            # The first call loads the rules of pronunciation, which two threads must not do at the same time.
            voice.phonemize("Ready.")
        except Exception as error:
            # The library and onnxruntime below it may raise anything; none of it lets the engine serve.
            raise ClusterError(f"cannot load Hibari's voice: {error}") from error
        return cls(voice, Slots(options["parallel"]))

    async def speak(self, request: TTSRequest, provider: Provider) -> None:
        """Handle a request; the handler that is registered. Cancellation waits for the current sentence.

        Raises:
            InvalidRequest: the format is not supported, or the input has no words.
        """
        # The API's default is mp3, which is not supported; it only counts if the client has set it.
        chosen = request.response_format if "response_format" in request.raw else "wav"
        if chosen not in _FORMATS:
            raise InvalidRequest(
                f"This model has the formats {' and '.join(_FORMATS)}, not {chosen}",
                param="response_format",
                code="unsupported_value",
            )
        rate = self._voice.sample_rate
        async with ThreadStream(self._speech(request), self._slots, name="hibari", bound=4) as sentences:
            started = False
            async for audio, is_whole in sentences:
                if chosen == "wav" and not started:
                    audio = wav_header(rate, length=len(audio) if is_whole else None) + audio
                started = True
                await provider.push(OutputChunk.audio(audio, f"audio/{chosen}"))

    def _speech(self, request: TTSRequest) -> Callable[[Outlet[tuple[bytes, bool]]], None]:
        """Return the work of one request: it puts the samples of each sentence, and whether it is the only one."""
        from .audio import wav

        def work(outlet: Outlet[tuple[bytes, bool]]) -> None:
            sentences = self._voice.phonemize(request.input)
            if not sentences:
                raise InvalidRequest("There are no words in the input that can be spoken", param="input")
            for sentence in sentences:
                if outlet.closed():
                    return
                samples = self._voice.from_phonemes(sentence, speed=request.speed, seed=0)
                if not outlet.put((wav.to_pcm16(samples), len(sentences) == 1)):
                    return

        return work

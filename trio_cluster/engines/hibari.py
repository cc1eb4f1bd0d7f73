"""``hibari``: English text to speech with Hibari, whose default voice is part of its package.

The text is spoken sentence by sentence, and each sentence is sent as soon as it is computed. A cancelled request stops
after the current sentence, tens of milliseconds later.

The formats are ``wav``, which is also used if the client sets none (the option ``format`` changes that), ``pcm``, and
with PyAV, which the extra brings, ``mp3``, ``opus``, ``aac`` and ``flac`` (see ``engines/audio/container.py``). Samples
have 16 bits, 24 kHz and one channel; Opus has 48 kHz. The WAV file of a single sentence states its length. That of
several sentences is sent before its length is known, so that both lengths in its header are the largest possible, as in
OpenAI's own responses; browsers, VLC, ffmpeg and Python's ``wave`` play such a file to its end.

There is one voice. Every name of a voice is accepted, also those of OpenAI's voices, and is spoken with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import attrs

from trio_cluster.errors import ClusterError, InvalidRequest
from trio_cluster.local.adapters import Provider
from trio_cluster.local.slots import Slots
from trio_cluster.openai import OutputChunk, TTSRequest

from ._engine import LoadingEngine, Option, ServedModel, install_command, not_loaded, text, whole_number
from ._threads import Outlet, ThreadStream
from .audio.container import AUDIO_EXTRA, FORMATS, AudioEncoder, has_codecs

__all__ = ["Speaker", "engine"]


def _format(value: str) -> str:
    if value not in FORMATS:
        raise ValueError(f"expected one of {', '.join(FORMATS)}, got '{value}'")
    return value


class _Hibari(LoadingEngine):
    summary = "text to speech: English, with Hibari"
    requires = ("hibari", "onnxruntime", "numpy")
    extra = "trio-cluster[hibari]"
    options: ClassVar[Mapping[str, Option]] = {
        "name": Option(text, "hibari", "the model's name"),
        "threads": Option(whole_number(1, 1024), 1, "threads for each sentence"),
        "parallel": Option(whole_number(1, 64), 2, "requests that are worked on at once"),
        "format": Option(_format, "wav", "the format of speech whose client sets none"),
    }

    def check(self, argument: str, options: Mapping[str, Any]) -> None:
        """See :meth:`Engine.check`."""
        if options["format"] not in ("wav", "pcm") and not has_codecs():
            raise ValueError(
                f"format={options['format']} needs PyAV, not installed here; install it with:"
                f" {install_command(AUDIO_EXTRA)}"
            )

    @contextmanager
    def open(self, argument: str, options: Mapping[str, Any]) -> Iterator[ServedModel]:
        """See :meth:`LoadingEngine.open`."""
        yield attrs.evolve(self.describe(argument, options), handler=Speaker.load(options).speak)

    def describe(self, argument: str, options: Mapping[str, Any]) -> ServedModel:
        """See :meth:`LoadingEngine.describe`."""
        return ServedModel(options["name"], "tts", not_loaded)


engine = _Hibari()


@attrs.frozen(eq=False)
class Speaker:
    """A loaded voice."""

    _voice: Any
    _slots: Slots
    _format: str

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
        return cls(voice, Slots(options["parallel"]), options["format"])

    async def speak(self, request: TTSRequest, provider: Provider) -> None:
        """Handle a request; the handler that is registered. Cancellation waits for the current sentence.

        Raises:
            InvalidRequest: the format is not supported, or the input has no words.
        """
        # The API's own default is mp3; the request says that too where the client has set nothing.
        chosen = request.response_format if "response_format" in request.raw else self._format
        encoder = AudioEncoder(chosen, self._voice.sample_rate)
        async with ThreadStream(
            self._speech(request, encoder), self._slots, name="hibari", bound=4
        ) as sentences:
            async for audio in sentences:
                await provider.push(OutputChunk.audio(audio, encoder.mime_type))

    def _speech(self, request: TTSRequest, encoder: AudioEncoder) -> Callable[[Outlet[bytes]], None]:
        """Return the work of one request: it puts the audio of each sentence."""
        from .audio import wav

        def work(outlet: Outlet[bytes]) -> None:
            sentences = self._voice.phonemize(request.input)
            if not sentences:
                raise InvalidRequest("There are no words in the input that can be spoken", param="input")
            for index, sentence in enumerate(sentences):
                if outlet.closed():
                    return
                samples = self._voice.from_phonemes(sentence, speed=request.speed, seed=0)
                audio = encoder.encode(wav.to_pcm16(samples), last=index == len(sentences) - 1)
                # An encoder may need more samples before it gives anything.
                if audio and not outlet.put(audio):
                    return

        return work

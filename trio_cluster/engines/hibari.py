"""``hibari``: English text to speech with Hibari, whose default voice is in its package.

The text is spoken sentence by sentence, and each sentence goes out as soon as it is there; a request that is
given up stops after the sentence it is at, tens of milliseconds later.

Formats are ``wav`` (the answer where the client did not choose one) and ``pcm``, both of 16-bit samples,
little endian, 24 kHz, one channel. There is no encoder for ``mp3``, ``opus``, ``aac`` and ``flac``; who asks
for one is told so. The WAV file of a single sentence states its length. That of several is sent before its
length is known, and both lengths in it are then the largest there are, as in OpenAI's own answers; browsers,
VLC, ffmpeg and Python's ``wave`` play on to the end of such a file.

There is one voice. The names of others, those of OpenAI's among them, are accepted and spoken with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Final

import attrs
import trio

from trio_cluster.errors import ClusterError, InvalidRequest
from trio_cluster.local.adapters import Provider
from trio_cluster.openai import OutputChunk, TTSRequest

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
    _slots: trio.CapacityLimiter

    @classmethod
    def load(cls, options: Mapping[str, Any]) -> Speaker:
        """Load the voice. Blocks.

        Raises:
            ClusterError: the library cannot.
        """
        import hibari

        try:
            voice = hibari.Hibari(threads=options["threads"])
            # The rules of pronunciation are loaded with the first words, and not by two threads at once.
            voice.phonemize("Ready.")
        except Exception as error:
            # Whatever the library, or onnxruntime under it, raises: the node cannot start.
            raise ClusterError(f"cannot load Hibari's voice: {error}") from error
        return cls(voice, trio.CapacityLimiter(options["parallel"]))

    async def speak(self, request: TTSRequest, provider: Provider) -> None:
        """Answer a request; the handler that is registered."""
        from .audio import wav

        # The documented default is a format that we do not have. Who did not choose it does not insist on it.
        chosen = request.response_format if "response_format" in request.raw else "wav"
        if chosen not in _FORMATS:
            raise InvalidRequest(
                f"This model speaks {' and '.join(_FORMATS)}, not {chosen}",
                param="response_format",
                code="unsupported_value",
            )
        rate = self._voice.sample_rate
        async with ThreadStream(self._speaking(request), self._slots, name="hibari", bound=4) as sentences:
            begun = False
            async for audio, is_whole in sentences:
                if chosen == "wav" and not begun:
                    audio = wav.header(rate, length=len(audio) if is_whole else None) + audio
                begun = True
                await provider.push(OutputChunk.audio(audio, f"audio/{chosen}"))

    def _speaking(self, request: TTSRequest) -> Callable[[Outlet[tuple[bytes, bool]]], None]:
        """Return the work of one request: the samples of each sentence, and whether that is all there is."""
        from .audio import wav

        def work(outlet: Outlet[tuple[bytes, bool]]) -> None:
            sentences = self._voice.phonemize(request.input)
            if not sentences:
                raise InvalidRequest("There is nothing in the input that can be spoken", param="input")
            for sentence in sentences:
                if outlet.closed():
                    return
                samples = self._voice.from_phonemes(sentence, speed=request.speed, seed=0)
                if not outlet.put((wav.to_pcm16(samples), len(sentences) == 1)):
                    return

        return work

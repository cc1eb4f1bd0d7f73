"""``whisper``: speech to text with a Whisper model in CTranslate2's format.

The model processes windows of 30 seconds. It writes text with timestamps in between, and the next window begins where
the last complete segment ended, so that no word is cut in two. The text of each window is sent as soon as it is there.

A window is one blocking call that cannot be interrupted, about a second with a tiny model; a cancelled request stops
after it. The windows of several requests are processed one after the other, unless ``parallel`` is more than 1.

WAV files are always read. Other formats need PyAV, which the extra brings (see ``engines/audio/container.py``); without
it they are refused with an error that says what to install. Decoding stops between two packets of audio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Final

import attrs

from trio_cluster.errors import ClusterError, InvalidRequest
from trio_cluster.local.adapters import Provider
from trio_cluster.local.slots import Slots
from trio_cluster.openai import ASRRequest, OutputChunk

from ._engine import LoadingEngine, Option, ServedModel, not_loaded, text, whole_number
from ._pinned_weights import WEIGHTS
from ._threads import Outlet, ThreadStream
from ._weights import ensure_weights

__all__ = ["Segment", "Whisper", "engine", "split_segments"]

_DEMO: Final = "tiny.en"
_FILES: Final = ("config.json", "model.bin", "tokenizer.json")

#: A window is silence if the model's probability of no speech is above this, and the average log probability of its
#: text is below the second one (section 4.5 of the Whisper paper).
_NO_SPEECH: Final = 0.6
_MIN_LOG_PROBABILITY: Final = -1.0

#: Seconds of audio that the model processes at a time.
_WINDOW: Final = 30.0

#: Seconds from one timestamp token to the next.
_TICK: Final = 0.02

#: Tokens of the prompt. Whisper's decoder has 448 positions, half of which the prompt may use.
_MAX_PROMPT: Final = 223


class _Whisper(LoadingEngine):
    summary = "speech to text: Whisper in CTranslate2's format"
    argument = f"folder of a converted model, or {_DEMO} (the default)"
    requires = ("ctranslate2", "tokenizers", "numpy")
    extra = "trio-cluster[whisper]"
    options: ClassVar[Mapping[str, Option]] = {
        "name": Option(text, None, "the model's name; whisper- and the folder's name by default"),
        "parallel": Option(whole_number(1, 64), 1, "requests that are worked on at once"),
        "threads": Option(whole_number(1, 1024), 1, "threads for each of them"),
        "beam": Option(whole_number(1, 20), 1, "width of the beam search; 1 is greedy and fastest"),
        "max_seconds": Option(
            whole_number(1, 86_400), 7200, "the longest audio that is accepted, in seconds"
        ),
    }

    def check(self, argument: str, options: Mapping[str, Any]) -> None:
        """See :meth:`Engine.check`."""
        if argument in ("", _DEMO):
            return
        missing = [name for name in _FILES if not (Path(argument) / name).is_file()]
        if missing:
            raise ValueError(
                f"'{argument}' is not the folder of a converted model: it lacks {', '.join(missing)}"
            )

    async def prepare(self, argument: str, options: Mapping[str, Any]) -> str:
        """See :meth:`LoadingEngine.prepare`."""
        if argument in ("", _DEMO):
            return str(await ensure_weights(WEIGHTS[f"whisper-{_DEMO}"]))
        return argument

    @contextmanager
    def open(self, argument: str, options: Mapping[str, Any]) -> Iterator[ServedModel]:
        """See :meth:`LoadingEngine.open`."""
        loaded = Whisper.load(str(Path(argument).resolve()), options)
        yield attrs.evolve(self.describe(argument, options), handler=loaded.transcribe)

    def describe(self, argument: str, options: Mapping[str, Any]) -> ServedModel:
        """See :meth:`LoadingEngine.describe`."""
        folder = Path(argument).resolve()
        is_demo = folder.name == WEIGHTS[f"whisper-{_DEMO}"].folder_name
        return ServedModel(
            options["name"] or f"whisper-{_DEMO if is_demo else folder.name}", "asr", not_loaded
        )


engine = _Whisper()


@attrs.frozen
class Segment:
    """A segment of speech.

    Attributes:
        start: seconds from the beginning of the window.
        end: seconds from the beginning of the window.
        tokens: the text.
    """

    start: float
    end: float
    tokens: tuple[int, ...]


@attrs.frozen(eq=False)
class Whisper:
    """A loaded model."""

    _model: Any
    _tokenizer: Any
    _slots: Slots
    _beam: int
    _max_seconds: int

    @classmethod
    def load(cls, folder: str, options: Mapping[str, Any]) -> Whisper:
        """Load a model. Blocks.

        Args:
            folder: the folder of the converted model.
            options: a value for every option of the engine.

        Raises:
            ClusterError: it is not a Whisper model, or it is damaged.
        """
        import ctranslate2
        from tokenizers import Tokenizer

        parallel = options["parallel"]
        try:
            tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
            model = ctranslate2.models.Whisper(
                folder,
                device="cpu",
                compute_type="int8",
                inter_threads=parallel,
                intra_threads=options["threads"],
            )
        # The tokenizers library raises plain Exception.
        except Exception as error:
            raise ClusterError(f"cannot load the Whisper model in '{folder}': {error}") from error
        return cls(model, tokenizer, Slots(parallel), options["beam"], options["max_seconds"])

    async def transcribe(self, request: ASRRequest, provider: Provider) -> None:
        """Handle a request; the handler that is registered. Cancellation waits for the current window.

        Raises:
            InvalidRequest: the audio cannot be read, or the model does not know the language.
        """
        language = self._language(request)
        async with ThreadStream(
            self._transcription(request, language), self._slots, name="whisper"
        ) as pieces:
            async for piece in pieces:
                await provider.push(OutputChunk.json(piece))

    def _language(self, request: ASRRequest) -> str | None:
        """Return the code of the spoken language; ``None`` if the model should detect it."""
        if not self._model.is_multilingual:
            if request.language not in (None, "en", "english"):
                raise InvalidRequest(
                    "This model understands English only; leave language out, or set it to 'en'",
                    param="language",
                    code="invalid_value",
                )
            return "en"
        if request.language is not None and self._tokenizer.token_to_id(f"<|{request.language}|>") is None:
            raise InvalidRequest(
                f"The language '{request.language}' is not known to this model; give a code such as 'en'",
                param="language",
                code="invalid_value",
            )
        return request.language

    def _transcription(
        self, request: ASRRequest, language: str | None
    ) -> Callable[[Outlet[dict[str, Any]]], None]:
        """Return the work of one request: it puts the JSON of each window, and of the whole at the end."""
        from .audio import mel
        from .audio.container import decode_audio

        def work(outlet: Outlet[dict[str, Any]]) -> None:
            samples = decode_audio(
                request.audio, rate=mel.RATE, max_seconds=self._max_seconds, stopped=outlet.closed
            )
            if outlet.closed():
                return
            duration = len(samples) / mel.RATE
            detected = language
            position = 0
            earlier: tuple[int, ...] = tuple(
                self._ids(" " + request.prompt.strip()) if request.prompt else ()
            )
            # A rest of less than a hundredth of a second is dropped.
            while position + mel.RATE // 100 < len(samples):
                window = samples[position : position + mel.WINDOW_SAMPLES]
                features = mel.log_mel(window, self._model.n_mels)
                if outlet.closed():
                    return
                if detected is None:
                    detected = self._detect(features)
                segments, settled = self._decode(features, detected, earlier, request, len(window) / mel.RATE)
                piece = {"language": detected, "duration": duration, "segments": []}
                piece["segments"] = shown = self._to_json(segments, position / mel.RATE)
                piece["text"] = "".join(segment["text"] for segment in shown)
                if not outlet.put(piece):
                    return
                earlier = (*earlier, *(token for segment in segments for token in segment.tokens))
                position += max(round(settled * mel.RATE), mel.RATE)
            # As the API reports it for Whisper, in whole seconds.
            usage = {"type": "duration", "seconds": math.ceil(duration)}
            outlet.put({"language": detected or language or "", "duration": duration, "usage": usage})

        return work

    def _detect(self, features: Any) -> str:
        (ranking,) = self._model.detect_language(self._view(features))
        return str(ranking[0][0]).strip("<|>")

    def _decode(
        self, features: Any, language: str, earlier: tuple[int, ...], request: ASRRequest, seconds: float
    ) -> tuple[list[Segment], float]:
        """Return the segments of one window, and the seconds of it that need not be processed again."""
        begin = self._special("<|startoftranscript|>")
        prompt = [begin]
        if self._model.is_multilingual:
            task = "<|translate|>" if request.translate else "<|transcribe|>"
            prompt += [self._special(f"<|{language}|>"), self._special(task)]
        if earlier:
            prompt = [self._special("<|startofprev|>"), *earlier[-_MAX_PROMPT:], *prompt]
        hot = request.temperature > 0
        (result,) = self._model.generate(
            self._view(features),
            [prompt],
            beam_size=1 if hot else self._beam,
            sampling_topk=0 if hot else 1,
            sampling_temperature=request.temperature if hot else 1.0,
            return_scores=True,
            return_no_speech_prob=True,
            suppress_blank=True,
        )
        if result.no_speech_prob > _NO_SPEECH and result.scores[0] < _MIN_LOG_PROBABILITY:
            return [], seconds
        first_time = self._special("<|notimestamps|>") + 1
        return split_segments(result.sequences_ids[0], first_time, self._special("<|endoftext|>"), seconds)

    def _to_json(self, segments: list[Segment], offset: float) -> list[dict[str, Any]]:
        """Return the segments that have a text, with times from the beginning of the audio."""
        entries = []
        for segment in segments:
            segment_text = self._tokenizer.decode(list(segment.tokens))
            if segment_text.strip():
                start, end = round(offset + segment.start, 2), round(offset + segment.end, 2)
                entries.append(
                    {"start": start, "end": end, "text": segment_text, "tokens": list(segment.tokens)}
                )
        return entries

    def _ids(self, words: str) -> list[int]:
        return list(self._tokenizer.encode(words, add_special_tokens=False).ids)

    def _special(self, token: str) -> int:
        return int(self._tokenizer.token_to_id(token))

    @staticmethod
    def _view(features: Any) -> Any:
        import ctranslate2
        import numpy as np

        return ctranslate2.StorageView.from_array(np.ascontiguousarray(features[None]))


def split_segments(
    tokens: list[int], first_time: int, end_of_text: int, seconds: float
) -> tuple[list[Segment], float]:
    """Split a window's tokens at its timestamps.

    Args:
        tokens: text and timestamp tokens, as the model wrote them.
        first_time: the token for 0.00 s; it and all higher tokens are timestamps.
        end_of_text: the first of the special tokens below ``first_time``, which are no text.
        seconds: the length of the window's audio.

    Returns:
        The segments, and where the next window should begin, in seconds from the beginning of this one: at the end of
        the last segment that the model has closed, if it has opened another one after it; otherwise at the end of this
        window.
    """
    segments: list[Segment] = []
    start, text_tokens = 0.0, list[int]()
    settled = seconds
    for token in tokens:
        if token < first_time:
            if token < end_of_text:
                text_tokens.append(token)
            continue
        moment = min((token - first_time) * _TICK, seconds)
        if text_tokens:
            segments.append(Segment(start, max(start, moment), tuple(text_tokens)))
            text_tokens = []
        start = moment
    closed = len(tokens) >= 2 and tokens[-1] >= first_time and tokens[-2] >= first_time
    if text_tokens:
        # The last segment has no end. In a full window, the speech may go on after it.
        if segments and seconds >= _WINDOW:
            settled = start
        else:
            segments.append(Segment(start, seconds, tuple(text_tokens)))
    elif closed and segments:
        settled = segments[-1].end
    return segments, settled

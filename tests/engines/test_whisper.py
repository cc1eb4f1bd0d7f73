"""The whisper engine: the way from tokens to segments and windows, with a fake model."""

from __future__ import annotations

import sys
import threading
from typing import Any

import attrs
import pytest
import trio
from recording_provider import RecordingProvider

np = pytest.importorskip("numpy")

from trio_cluster.engines import whisper  # noqa: E402
from trio_cluster.engines.audio import mel, wav  # noqa: E402
from trio_cluster.engines.whisper import Segment, split_segments  # noqa: E402
from trio_cluster.errors import ApiError  # noqa: E402
from trio_cluster.local.slots import Slots  # noqa: E402
from trio_cluster.openai import ASRRequest  # noqa: E402
from trio_cluster.openai.responses.pcm import wav_header  # noqa: E402

END, NO_TIMES = 90, 99
FIRST = NO_TIMES + 1


def at(seconds: float) -> int:
    return FIRST + round(seconds / 0.02)


@pytest.mark.parametrize(
    ("tokens", "seconds", "segments", "settled"),
    [
        ([], 30, [], 30),
        ([at(0), 1, 2, at(3), END], 30, [Segment(0, 3, (1, 2))], 30),
        # A closed segment with an opened one after it: the next window begins there.
        ([at(0), 1, at(3), at(3), 2, at(9), at(9)], 30, [Segment(0, 3, (1,)), Segment(3, 9, (2,))], 9),
        # An open last segment: after a full window it is processed again, in the last window it ends with the audio.
        ([at(0), 1, at(3), at(3), 2], 30, [Segment(0, 3, (1,))], 3),
        ([at(0), 1, at(3), at(3), 2], 8, [Segment(0, 3, (1,)), Segment(3, 8, (2,))], 8),
        ([at(0), 1, 2], 30, [Segment(0, 30, (1, 2))], 30),
        ([1, 2], 5, [Segment(0, 5, (1, 2))], 5),
        # Timestamps beyond the end, and timestamps that run backwards.
        ([at(1), 1, at(28)], 5, [Segment(1, 5, (1,))], 5),
        ([at(4), 1, at(2)], 5, [Segment(4, 4, (1,))], 5),
        # Special tokens are no text.
        ([at(0), END + 3, 1, at(2)], 5, [Segment(0, 2, (1,))], 5),
    ],
)
def test_tokens_are_split_at_their_timestamps(
    tokens: list[int], seconds: float, segments: list[Segment], settled: float
) -> None:
    found, next_start = split_segments(tokens, FIRST, END, seconds)
    assert [(round(s.start, 2), round(s.end, 2), s.tokens) for s in found] == [
        (s.start, s.end, s.tokens) for s in segments
    ]
    assert next_start == pytest.approx(settled)


@attrs.define
class Result:
    sequences_ids: list[list[int]]
    scores: list[float]
    no_speech_prob: float


class FakeModel:
    """A model with one scripted result per window. Records the prompts."""

    is_multilingual = False
    n_mels = 80

    def __init__(self, *results: Any, multilingual: bool = False) -> None:
        self.results = list(results)
        self.prompts: list[list[int]] = []
        self.is_multilingual = multilingual

    def generate(self, features: Any, prompts: list[list[int]], **settings: Any) -> list[Result]:
        self.prompts.append(prompts[0])
        result = self.results.pop(0)
        return [result if isinstance(result, Result) else Result([result], [-0.1], 0.0)]

    def detect_language(self, features: Any) -> list[list[tuple[str, float]]]:
        return [[("<|fi|>", 0.9), ("<|en|>", 0.1)]]


class Tokens:
    special = {  # noqa: RUF012
        "<|startoftranscript|>": 91,
        "<|startofprev|>": 92,
        "<|transcribe|>": 93,
        "<|translate|>": 94,
        "<|fi|>": 95,
        "<|endoftext|>": END,
        "<|notimestamps|>": NO_TIMES,
    }

    def token_to_id(self, token: str) -> int | None:
        return self.special.get(token)

    def decode(self, ids: list[int]) -> str:
        return "".join(f" w{each}" for each in ids)

    def encode(self, text: str, add_special_tokens: bool) -> Any:
        return attrs.make_class("E", {"ids": attrs.field(default=[len(text)])})()


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(whisper.Whisper, "_view", staticmethod(lambda features: features))

    def make(*results: Any, multilingual: bool = False) -> whisper.Whisper:
        fake = FakeModel(*results, multilingual=multilingual)
        return whisper.Whisper(fake, Tokens(), Slots(1), 1, 7200)

    return make


def audio(seconds: float) -> bytes:
    data = wav.to_pcm16(np.full(int(seconds * 16_000), 0.1, np.float32))
    return wav_header(16_000, length=len(data)) + data


async def transcribe(model: whisper.Whisper, seconds: float = 5, **fields: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {"text": "", "segments": []}
    output = RecordingProvider()
    await model.transcribe(ASRRequest(model="w", **({"audio": audio(seconds)} | fields)), output)
    for piece in output.values("json"):
        whole["text"] += piece.pop("text", "")
        whole["segments"] += piece.pop("segments", [])
        whole |= piece
    return whole


async def test_a_short_recording_is_one_window(model: Any) -> None:
    answer = await transcribe(model([at(0), 1, 2, at(2), END]))
    assert answer["text"] == " w1 w2"
    assert [(s["start"], s["end"], s["text"]) for s in answer["segments"]] == [(0.0, 2.0, " w1 w2")]
    assert (answer["language"], answer["duration"]) == ("en", 5.0)
    assert answer["usage"] == {"type": "duration", "seconds": 5}


async def test_the_next_window_begins_after_the_last_closed_segment_and_has_the_text_before_it(
    model: Any,
) -> None:
    whole = model([at(0), 1, at(25), at(25), 2], [at(0), 3, at(9)])
    answer = await transcribe(whole, 40)
    assert [(s["start"], s["end"], s["text"]) for s in answer["segments"]] == [
        (0.0, 25.0, " w1"),
        (25.0, 34.0, " w3"),
    ]
    assert whole._model.prompts == [[91], [92, 1, 91]]


async def test_silence_has_no_text(model: Any) -> None:
    answer = await transcribe(model(Result([[at(0), 1, at(2)]], [-1.5], 0.9)))
    assert answer["text"] == ""


@pytest.mark.parametrize("fields", [{"language": "de"}, {"language": "xx"}])
async def test_an_english_model_refuses_other_languages(model: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match="English only; leave language out") as caught:
        await transcribe(model(), **fields)
    assert caught.value.param == "language"


async def test_a_multilingual_model_detects_the_language_unless_it_is_given(model: Any) -> None:
    detecting = model([1], multilingual=True)
    assert (await transcribe(detecting))["language"] == "fi"
    assert detecting._model.prompts == [[91, 95, 93]]
    given = model([1], multilingual=True)
    await transcribe(given, language="fi", translate=True)
    assert given._model.prompts == [[91, 95, 94]]
    with pytest.raises(ApiError, match="'xx' is not known"):
        await transcribe(model(multilingual=True), language="xx")


async def test_a_prompt_comes_before_the_first_window(model: Any) -> None:
    prompted = model([1])
    await transcribe(prompted, prompt="names")
    assert prompted._model.prompts == [[92, len(" names"), 91]]


async def test_other_formats_are_refused_by_name(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ApiError, match="this is MP3 audio; send WAV") as caught:
        await transcribe(model(), audio=b"ID3rest")
    assert (caught.value.status, caught.value.param) == (400, "file")


async def test_an_empty_recording_has_no_text(model: Any) -> None:
    answer = await transcribe(model(), 0)
    usage = {"type": "duration", "seconds": 0}
    assert answer == {"text": "", "segments": [], "language": "en", "duration": 0.0, "usage": usage}


async def test_a_cancelled_request_stops_after_its_window(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = model(*[[1]] * 100)
    in_window, proceed = trio.Event(), threading.Event()
    token = trio.lowlevel.current_trio_token()
    generate = whole._model.generate

    def slow(*arguments: Any, **settings: Any) -> Any:
        token.run_sync_soon(in_window.set)
        proceed.wait(5)
        return generate(*arguments, **settings)

    monkeypatch.setattr(whole._model, "generate", slow)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(transcribe, whole, 100)
        await in_window.wait()
        nursery.cancel_scope.cancel()
        proceed.set()
    assert len(whole._model.prompts) == 1
    assert whole._slots.running == 0


def test_the_window_length_is_the_same_everywhere() -> None:
    assert mel.WINDOW_SAMPLES == whisper._WINDOW * mel.RATE

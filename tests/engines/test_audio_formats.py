"""Audio without PyAV: WAV and raw samples work, and the refusal of everything else says what to install."""

from __future__ import annotations

import io
import sys
import wave

import pytest

np = pytest.importorskip("numpy")

from trio_cluster.engines import AudioEncoder, decode_audio, parse_serve  # noqa: E402
from trio_cluster.engines.audio import wav  # noqa: E402
from trio_cluster.engines.audio.container import FORMATS  # noqa: E402
from trio_cluster.errors import ApiError, OptionsError  # noqa: E402
from trio_cluster.openai.requests.tables import SPEECH  # noqa: E402
from trio_cluster.openai.responses import speech  # noqa: E402
from trio_cluster.openai.responses.pcm import wav_header  # noqa: E402

SAMPLES = np.arange(-500, 500, dtype="<i2").tobytes()


@pytest.fixture(autouse=True)
def without_av(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have PyAV not installed, whether it is or not."""
    monkeypatch.setitem(sys.modules, "av", None)


def test_the_formats_and_their_content_types_are_those_of_the_api() -> None:
    assert {name: each.mime_type for name, each in FORMATS.items()} == speech._TYPES
    for name in FORMATS:
        SPEECH.read({"model": "m", "input": "x", "voice": "x", "response_format": name})


def test_wav_is_decoded_and_resampled() -> None:
    data = wav_header(48_000, length=96_000) + wav.to_pcm16(np.full(48_000, 0.5, np.float32))
    samples = decode_audio(data, rate=16_000, max_seconds=2)
    assert (samples.shape, samples.dtype) == ((16_000,), np.float32)
    assert samples[8000] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            b"ID3rest",
            "this is MP3 audio; send WAV .* Other formats need an extra on the server: pip install .*audio",
        ),
        (b"\0\0\0\x18ftypM4A ", "this is MP4 or M4A audio; .* pip install .*audio"),
        (b"nothing", "not a known audio file; .* pip install .*audio"),
        (b"", "the audio file is empty"),
        (b"RIFF\0\0\0\0WAVE", "the WAV file is damaged"),
    ],
)
def test_what_cannot_be_decoded_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        decode_audio(data, rate=16_000, max_seconds=60)
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, "file", "unsupported_audio")


def test_audio_that_is_too_long_is_refused() -> None:
    with pytest.raises(ApiError, match="the audio is 2 s long; send at most 1 s"):
        decode_audio(wav_header(1000, length=4000) + bytes(4000), rate=16_000, max_seconds=1)


def test_pcm_is_what_it_was_and_samples_may_arrive_in_halves() -> None:
    encoder = AudioEncoder("pcm", 24_000)
    pieces = [encoder.encode(SAMPLES[i : i + 333]) for i in range(0, len(SAMPLES), 333)]
    assert all(len(piece) % 2 == 0 for piece in pieces)
    assert b"".join(pieces) + encoder.encode(b"", last=True) == SAMPLES
    assert encoder.mime_type == "audio/pcm"


@pytest.mark.parametrize("channels", [1, 2])
def test_a_wav_file_has_one_header(channels: int) -> None:
    encoder = AudioEncoder("wav", 24_000, channels=channels)
    data = encoder.encode(SAMPLES[:1000]) + encoder.encode(SAMPLES[1000:]) + encoder.encode(b"", last=True)
    with wave.open(io.BytesIO(data)) as opened:
        assert (opened.getframerate(), opened.getnchannels()) == (24_000, channels)
        assert opened.readframes(opened.getnframes()) == SAMPLES
    assert encoder.mime_type == "audio/wav"


def test_a_wav_file_of_one_piece_states_its_length() -> None:
    data = AudioEncoder("wav", 24_000).encode(SAMPLES, last=True)
    assert data == wav_header(24_000, length=len(SAMPLES)) + SAMPLES


@pytest.mark.parametrize("wanted", ["mp3", "opus", "aac", "flac"])
def test_a_format_that_needs_an_encoder_is_refused_with_what_to_install(wanted: str) -> None:
    with pytest.raises(
        ApiError, match=f"formats wav and pcm, not {wanted}. .* pip install .*audio"
    ) as caught:
        AudioEncoder(wanted, 24_000)
    assert (caught.value.status, caught.value.param) == (400, "response_format")
    with pytest.raises(ApiError, match=r"not midi$"):
        AudioEncoder("midi", 24_000)


def test_arguments_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="channels: expected 1 or 2, got 3"):
        AudioEncoder("wav", 24_000, channels=3)
    with pytest.raises(ValueError, match="rate: expected 1000 to 384000, got 1"):
        AudioEncoder("wav", 1)
    encoder = AudioEncoder("wav", 24_000)
    encoder.encode(b"", last=True)
    with pytest.raises(ValueError, match="the last samples were encoded before"):
        encoder.encode(SAMPLES)


def test_an_engine_whose_default_format_needs_the_library_does_not_start_without_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("trio_cluster.engines.hibari.engine.requires", (), raising=False)
    with pytest.raises(
        OptionsError, match=r"format=mp3 needs PyAV, not installed here; .* pip install .*audio"
    ):
        parse_serve("hibari,format=mp3")
    with pytest.raises(
        OptionsError, match="format: expected one of mp3, opus, aac, flac, wav, pcm, got 'ogg'"
    ):
        parse_serve("hibari,format=ogg")
    assert parse_serve("hibari").options["format"] == "wav"

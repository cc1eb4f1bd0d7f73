"""WAV files: the formats that are read, the errors for all others, and the headers that are written."""

from __future__ import annotations

import io
import struct
import wave
from contextlib import suppress

import pytest
from hypothesis import given, strategies as st

np = pytest.importorskip("numpy")

from trio_cluster.engines.audio import wav as audio  # noqa: E402
from trio_cluster.openai.responses.pcm import wav_header  # noqa: E402

TONE = np.sin(2 * np.pi * 440 * np.arange(800) / 8000).astype(np.float32) * 0.5


def wav(
    data: bytes, *, encoding: int = 1, channels: int = 1, rate: int = 8000, bits: int = 16, **sizes: int
) -> bytes:
    width = channels * bits // 8
    form = struct.pack("<HHIIHH", encoding, channels, rate, rate * width, width, bits)
    body = b"fmt " + struct.pack("<I", len(form)) + form
    body += b"LIST" + struct.pack("<I", 3) + b"abc\0"  # a chunk of odd length, padded
    body += b"data" + struct.pack("<I", sizes.get("size", len(data))) + data
    return b"RIFF" + struct.pack("<I", sizes.get("riff", len(body) + 4)) + b"WAVE" + body


def encoded(samples: np.ndarray, bits: int) -> bytes:
    if bits == 8:
        return np.round(samples * 127 + 128).astype(np.uint8).tobytes()
    whole = np.round(samples.astype(np.float64) * (2 ** (bits - 1) - 1)).astype("<i4")
    return whole.view(np.uint8).reshape(-1, 4)[:, : bits // 8].tobytes()


@pytest.mark.parametrize(("bits", "error"), [(8, 0.01), (16, 1e-4), (24, 1e-6), (32, 1e-6)])
def test_whole_number_samples_of_every_width_are_read(bits: int, error: float) -> None:
    samples, rate = audio.read(wav(encoded(TONE, bits), bits=bits), max_seconds=1)
    assert rate == 8000
    assert np.abs(samples - TONE).max() < error


@pytest.mark.parametrize("bits", [32, 64])
def test_floating_point_samples_are_read_and_clipped(bits: int) -> None:
    wild = np.array([0.25, -0.5, np.nan, np.inf, -7.0], f"<f{bits // 8}")
    samples, _ = audio.read(wav(wild.tobytes(), encoding=3, bits=bits), max_seconds=1)
    assert samples.tolist() == [0.25, -0.5, 0.0, 1.0, -1.0]


def test_an_extensible_header_is_read() -> None:
    form = (
        struct.pack("<HHIIHH", 0xFFFE, 1, 8000, 24000, 3, 24) + struct.pack("<HHIH", 22, 24, 4, 1) + bytes(14)
    )
    data = encoded(TONE, 24)
    file = (
        b"RIFF\0\0\0\0WAVEfmt "
        + struct.pack("<I", len(form))
        + form
        + b"data"
        + struct.pack("<I", len(data))
        + data
    )
    samples, _ = audio.read(file, max_seconds=1)
    assert np.abs(samples - TONE).max() < 1e-6


def test_channels_are_mixed_down() -> None:
    both = np.stack([TONE, -TONE], axis=1).ravel()
    samples, _ = audio.read(wav(encoded(both, 16), channels=2), max_seconds=1)
    assert len(samples) == len(TONE)
    assert np.abs(samples).max() < 1e-4


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 2 * len(TONE) + 100])
def test_a_length_beyond_the_end_means_up_to_the_end(size: int) -> None:
    samples, _ = audio.read(wav(encoded(TONE, 16), size=size, riff=0xFFFFFFFF), max_seconds=1)
    assert len(samples) == len(TONE)


def test_our_headers_are_read_by_the_standard_library_and_by_us() -> None:
    data = audio.to_pcm16(TONE)
    for length in (len(data), None):
        file = wav_header(8000, length=length) + data
        with wave.open(io.BytesIO(file)) as opened:
            assert (opened.getnchannels(), opened.getsampwidth(), opened.getframerate()) == (1, 2, 8000)
            assert opened.readframes(opened.getnframes()) == data
        assert len(audio.read(file, max_seconds=1)[0]) == len(TONE)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the audio file is empty"),
        (b"ID3\x04rest", "this is MP3 audio; send WAV with 8, 16, 24 or 32-bit PCM"),
        (b"\xff\xfb\x90\x00", "this is MP3 audio"),
        (b"OggS\0\0", "this is Ogg audio"),
        (b"fLaC\0\0", "this is FLAC audio"),
        (b"\0\0\0\x20ftypM4A ", "this is MP4 or M4A audio"),
        (b"\x1a\x45\xdf\xa3", "this is WebM or Matroska audio"),
        (b"hello", "this is not a known audio file; send WAV"),
        (b"RIFF\0\0\0\0WAVE", "damaged: it has no samples"),
        (b"RIFF\0\0\0\0WAVEdata\x02\0\0\0ab", "damaged"),
        (b"RIFF\0\0\0\0WAVEfmt \x02\0\0\0ab", "format chunk is too short"),
        (wav(b"", encoding=17, bits=4), "encoding 17 with 4 bits"),
        (wav(b"", channels=0), "0 channels"),
        (wav(b"", rate=0), "0 samples per second"),
        (wav(bytes(2 * 8001)), "the audio is 1 s long; send at most 1 s"),
    ],
)
def test_audio_that_cannot_be_read_is_refused_with_the_reason(data: bytes, message: str) -> None:
    with pytest.raises(audio.WavError, match=message):
        audio.read(data, max_seconds=1)


@given(st.binary(max_size=200) | st.binary(max_size=80).map(lambda tail: wav(b"")[:36] + tail))
def test_arbitrary_bytes_are_read_or_refused(data: bytes) -> None:
    with suppress(audio.WavError):
        audio.read(data, max_seconds=1)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 24000, 44100, 48000, 96000])
def test_a_tone_keeps_its_pitch_and_strength_at_another_rate(rate: int) -> None:
    tone = np.sin(2 * np.pi * 1000 * np.arange(rate) / rate).astype(np.float32)
    result = audio.resample(tone, rate, 16_000)
    assert abs(len(result) - 16_000) <= 1
    expected = np.sin(2 * np.pi * 1000 * np.arange(len(result)) / 16_000)
    middle = slice(500, -500)
    assert np.abs(result[middle] - expected[middle]).max() < 0.01


def test_frequencies_over_the_lower_rate_s_limit_are_filtered_out() -> None:
    tone = np.sin(2 * np.pi * 12_000 * np.arange(48_000) / 48_000).astype(np.float32)
    assert np.abs(audio.resample(tone, 48_000, 16_000)[500:-500]).max() < 0.02

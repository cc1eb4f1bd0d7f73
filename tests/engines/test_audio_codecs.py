"""Audio with PyAV: what people's programs and telephones write, and what clients of text to speech ask for.

The library is no part of the default tests, since its wheel is large; ``nox -s engines`` installs it.
"""

from __future__ import annotations

import io
import random
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from recording_provider import RecordingProvider
from test_hibari import speaker

av = pytest.importorskip("av", reason="needs av; the extra audio brings it")
np = pytest.importorskip("numpy")

from trio_cluster.engines import AudioEncoder, decode_audio  # noqa: E402
from trio_cluster.engines.audio import wav  # noqa: E402
from trio_cluster.errors import ApiError, InvalidRequest  # noqa: E402
from trio_cluster.openai import TTSRequest  # noqa: E402

pytestmark = pytest.mark.engines

SECONDS = 3.0
HERTZ = 440


def tone(rate: int, seconds: float = SECONDS) -> bytes:
    times = np.arange(int(seconds * rate)) / rate
    return wav.to_pcm16(0.3 * np.sin(2 * np.pi * HERTZ * times))


def encode(response_format: str, rate: int = 24_000, channels: int = 1) -> tuple[bytes, int]:
    """Return a file with a tone, and in how many pieces it came."""
    samples = np.repeat(np.frombuffer(tone(rate), "<i2"), channels).tobytes()
    encoder = AudioEncoder(response_format, rate, channels=channels)
    # A piece ends in the middle of a sample.
    pieces = [encoder.encode(samples[i : i + 4801]) for i in range(0, len(samples), 4801)]
    pieces.append(encoder.encode(b"", last=True))
    return b"".join(pieces), sum(map(bool, pieces))


def mux(container: str, codec: str, rate: int = 24_000, *, video: bool = False) -> bytes:
    """Return a file with a tone, as another program would write it: with seeking."""
    sink = io.BytesIO()
    with av.open(sink, "w", format=container) as output:
        moving = output.add_stream("mpeg4", rate=10, width=64, height=64) if video else None
        stream = output.add_stream(codec, rate=rate, layout="mono")
        if moving is not None:
            for picture in range(30):
                frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
                frame.pts = picture
                output.mux(moving.encode(frame))
            output.mux(moving.encode(None))
        samples = np.frombuffer(tone(rate), "<i2")[None]
        for begin in range(0, samples.shape[1], 2400):
            piece = av.AudioFrame.from_ndarray(samples[:, begin : begin + 2400], format="s16", layout="mono")
            piece.sample_rate = rate
            output.mux(stream.encode(piece))
        output.mux(stream.encode(None))
    return sink.getvalue()


#: A name for each kind of file, FFmpeg's names of its container and its codec, and a rate.
KINDS: dict[str, tuple[Any, ...]] = {
    "mp3": ("mp3", "libmp3lame"),
    "m4a": ("ipod", "aac"),
    "m4a-alac": ("ipod", "alac"),
    "mp4": ("mp4", "aac"),
    "aac": ("adts", "aac"),
    "ogg": ("ogg", "libopus", 48_000),
    "webm": ("webm", "libopus", 48_000),
    "flac": ("flac", "flac"),
    "aiff": ("aiff", "pcm_s16be"),
    "caf": ("caf", "pcm_s16be"),
    "amr": ("amr", "libopencore_amrnb", 8000),
    "wav-alaw": ("wav", "pcm_alaw"),
    "wav-adpcm": ("wav", "adpcm_ms"),
}


def assert_tone(samples: Any, rate: int = 16_000) -> None:
    assert (samples.dtype, samples.ndim) == (np.float32, 1)
    # Encoders put a little silence around the sound.
    assert len(samples) / rate == pytest.approx(SECONDS, abs=0.25)
    middle = samples[rate : 2 * rate]
    assert np.abs(np.fft.rfft(middle)).argmax() == HERTZ
    assert np.abs(middle).max() == pytest.approx(0.3, abs=0.06)


# Decoding


@pytest.mark.parametrize("kind", KINDS)
def test_every_common_file_is_decoded_to_the_rate_of_the_model(kind: str) -> None:
    assert_tone(decode_audio(mux(*KINDS[kind]), rate=16_000, max_seconds=10))


def test_the_sound_of_a_video_is_decoded_and_its_pictures_are_not() -> None:
    assert_tone(decode_audio(mux("mp4", "aac", video=True), rate=16_000, max_seconds=10))


@pytest.mark.parametrize("kind", KINDS)
def test_audio_that_is_too_long_is_refused_without_being_decoded_further(kind: str) -> None:
    with pytest.raises(ApiError, match="the audio is longer than 1 s; send at most that") as caught:
        decode_audio(mux(*KINDS[kind]), rate=16_000, max_seconds=1)
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, "file", "unsupported_audio")


def test_a_small_file_with_an_hour_of_silence_is_refused_soon() -> None:
    encoder = AudioEncoder("flac", 8000)
    hour = b"".join(encoder.encode(bytes(16_000 * 60)) for _ in range(60)) + encoder.encode(b"", last=True)
    assert len(hour) < 1_000_000
    asked = []

    def stopped() -> bool:
        asked.append(None)
        return False

    with pytest.raises(ApiError, match="longer than 10 s"):
        decode_audio(hour, rate=16_000, max_seconds=10, stopped=stopped)
    # Once for each packet, and not for those of the hour, which has fifty thousand.
    assert len(asked) < 200


@pytest.mark.parametrize(("rate", "why"), [(1, "1 samples"), (900_000_000, "900000000 samples")])
def test_a_rate_that_would_take_gigabytes_to_convert_is_refused(rate: int, why: str) -> None:
    data = bytearray(mux("wav", "pcm_alaw"))
    struct.pack_into("<I", data, 24, rate)
    with pytest.raises(ApiError, match=why):
        decode_audio(bytes(data), rate=16_000, max_seconds=7200)


def test_decoding_stops_between_two_packets() -> None:
    data = mux(*KINDS["mp3"])
    left = 20

    def stopped() -> bool:
        nonlocal left
        left -= 1
        return left < 0

    samples = decode_audio(data, rate=16_000, max_seconds=10, stopped=stopped)
    assert 0 < len(samples) < 16_000
    assert len(decode_audio(data, rate=16_000, max_seconds=10, stopped=lambda: True)) == 0


@pytest.mark.parametrize("kind", ["mp3", "ogg", "webm", "flac", "aac"])
def test_a_truncated_file_is_decoded_as_far_as_it_goes(kind: str) -> None:
    data = mux(*KINDS[kind])
    samples = decode_audio(data[: len(data) // 2], rate=16_000, max_seconds=10)
    assert 0.9 < len(samples) / 16_000 < 2.5


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"ID3rest", "the MP3 file is damaged"),
        (b"OggS" + bytes(100), "the Ogg file is damaged"),
        (b"\x1a\x45\xdf\xa3" + bytes(1000), "the WebM or Matroska file is damaged"),
        (b"\0\0\0\x18ftypM4A " + bytes(1000), "the MP4 or M4A file is damaged"),
        (b"hello " * 1000, "not a known audio file; send MP3, MP4 or M4A"),
        (bytes(100_000), "not a known audio file"),
        (b"", "the audio file is empty"),
    ],
)
def test_what_is_no_audio_is_a_400(data: bytes, message: str) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        decode_audio(data, rate=16_000, max_seconds=60)
    assert (caught.value.status, caught.value.param) == (400, "file")


def test_a_video_without_sound_is_a_400() -> None:
    sink = io.BytesIO()
    with av.open(sink, "w", format="mp4") as output:
        stream = output.add_stream("mpeg4", rate=10, width=64, height=64)
        frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    with pytest.raises(ApiError, match="has no audio track"):
        decode_audio(sink.getvalue(), rate=16_000, max_seconds=60)


@pytest.fixture
def visited() -> Iterator[tuple[int, list[str]]]:
    """A server: its port, and the paths that it is asked for."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_error(404)

        def log_message(self, *arguments: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server.server_port, paths
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("kind", ["playlist with a URL", "playlist with a file", "list of files", "session"])
def test_a_file_cannot_make_the_server_read_other_files_or_urls(
    kind: str, visited: tuple[int, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, paths = visited
    secret = tmp_path / "secret.mp3"
    secret.write_bytes(mux(*KINDS["mp3"]))
    # FFmpeg's own rules are least strict about files beside the first one.
    monkeypatch.chdir(tmp_path)
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{}\n#EXT-X-ENDLIST\n"
    data = {
        "playlist with a URL": playlist.format(f"http://127.0.0.1:{port}/a.mp3"),
        "playlist with a file": playlist.format(secret.as_uri()),
        "list of files": f"ffconcat version 1.0\nfile {secret.name}\n",
        "session": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 9 RTP/AVP 0\n",
    }[kind]
    with pytest.raises(ApiError, match="not a known audio file"):
        decode_audio(data.encode(), rate=16_000, max_seconds=60)
    assert paths == []


def test_damaged_files_are_decoded_or_refused_and_nothing_else() -> None:
    draw = random.Random(7)
    files = [mux(*kind) for kind in KINDS.values()]
    for _ in range(400):
        data = bytearray(draw.choice(files))
        if draw.random() < 0.3:
            del data[draw.randrange(len(data)) :]
        else:
            # Headers are near the beginning, most of the time.
            end = draw.choice((600, len(data)))
            for _ in range(draw.choice((1, 3, 10, 50))):
                data[draw.randrange(min(end, len(data)))] = draw.randrange(256)
        try:
            samples = decode_audio(bytes(data), rate=16_000, max_seconds=10)
        except InvalidRequest:
            continue
        assert np.abs(samples).max(initial=0.0) <= 1.0


# Encoding


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8000, 22_050, 24_000, 96_000])
@pytest.mark.parametrize("response_format", ["mp3", "opus", "aac", "flac"])
def test_what_is_encoded_can_be_decoded(response_format: str, rate: int, channels: int) -> None:
    data, pieces = encode(response_format, rate, channels)
    # Both channels have the tone, and their mean is as loud as each.
    assert_tone(decode_audio(data, rate=16_000, max_seconds=10))
    # It is sent while it is made.
    assert pieces >= 10
    with av.open(io.BytesIO(data)) as opened:
        assert opened.streams.audio[0].codec_context.channels == channels


@pytest.mark.parametrize(
    ("response_format", "mime_type", "magic"),
    [
        ("mp3", "audio/mpeg", b"ID3"),
        ("opus", "audio/ogg", b"OggS"),
        ("aac", "audio/aac", b"\xff\xf1"),
        ("flac", "audio/flac", b"fLaC"),
    ],
)
async def test_hibari_speaks_the_format_that_is_asked_for(
    response_format: str, mime_type: str, magic: bytes
) -> None:
    fields = {"response_format": response_format}
    output = RecordingProvider()
    text = "Word. " * 30
    await speaker().speak(TTSRequest(model="h", input=text, voice="x", raw=fields, **fields), output)
    assert {chunk.mime_type for chunk in output.pieces} == {mime_type}
    audio = output.values("audio")
    assert len(audio) > 5
    assert audio[0].startswith(magic)
    samples = decode_audio(b"".join(audio), rate=24_000, max_seconds=10)
    assert len(samples) / 24_000 == pytest.approx(3.0, abs=0.25)


async def test_hibari_speaks_its_default_format_if_the_client_sets_none() -> None:
    output = RecordingProvider()
    await speaker("mp3").speak(TTSRequest(model="h", input="One.", voice="x"), output)
    assert {chunk.mime_type for chunk in output.pieces} == {"audio/mpeg"}

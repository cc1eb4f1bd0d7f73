"""Audio in the formats that people send and ask for: MP3, AAC, Opus, FLAC and others, with PyAV.

Theory of operation
===================

PyAV has FFmpeg's libraries in its wheel and needs nothing else. It is optional: WAV files and raw samples are read and
written without it, and the error for every other format says what to install.

*Decoding* is FFmpeg on bytes that a stranger has sent, so it is kept narrow. Only the containers in ``_CONTAINERS`` are
opened. This also keeps playlists out (HLS, ``concat`` and the like), with which a file could make FFmpeg read other
files of this machine, or URLs; no protocol is allowed either. Only the audio decoders in ``_DECODERS`` are opened, so
that pictures and video in the same file are never decoded. A small file can hold hours of silence; decoding ends as
soon as the audio is longer than it may be, and is stopped between two packets when the request is over. Damaged packets
are skipped, as players do, and a file of which nothing can be decoded is refused.

*Encoding* takes samples piece by piece and gives what the encoder has finished, so that speech is sent while it is
made. All formats can be written without seeking back. What that costs: an MP3 file has no table of contents, and FLAC
and WAV files do not state their length (a WAV file that is one piece does).
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any, Final

import attrs

from trio_cluster.errors import InvalidRequest
from trio_cluster.openai.responses.pcm import wav_header

from .._engine import install_command

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Samples = NDArray[np.float32]

__all__ = ["AUDIO_EXTRA", "FORMATS", "AudioEncoder", "decode_audio", "has_codecs"]

#: The extra that brings PyAV, for messages.
AUDIO_EXTRA: Final = "trio-cluster[audio]"

# FFmpeg's names.
_CONTAINERS: Final = ("aac", "aiff", "amr", "caf", "flac", "matroska", "webm", "mov", "mp3", "ogg", "wav")
_DECODERS: Final = (
    *("aac", "alac", "amrnb", "amrwb", "flac", "libopencore_amrnb", "libopencore_amrwb", "libopus", "mp2"),
    *("mp2float", "mp3", "mp3float", "opus", "vorbis", "adpcm_ima_wav", "adpcm_ms", "pcm_alaw", "pcm_mulaw"),
    *("pcm_f32be", "pcm_f32le", "pcm_f64be", "pcm_f64le", "pcm_s16be", "pcm_s16le", "pcm_s24be", "pcm_s24le"),
    *("pcm_s32be", "pcm_s32le", "pcm_s8", "pcm_u8"),
)

#: The formats that are decoded with PyAV, for error messages.
_ACCEPTED: Final = "MP3, MP4 or M4A, AAC, Ogg, Opus, WebM, FLAC, AIFF, CAF, AMR or WAV"


@attrs.frozen
class _Format:
    """How a format is written.

    Attributes:
        mime_type: the content type.
        container: FFmpeg's name of the container; empty for formats that are written without PyAV.
        codec: FFmpeg's name of the encoder.
        rates: the rates in Hz that the encoder takes, rising; empty for any rate.
        bit_rate: bits per second and channel; 0 for lossless formats.
        options: of the container.
    """

    mime_type: str
    container: str = ""
    codec: str = ""
    rates: tuple[int, ...] = ()
    bit_rate: int = 0
    options: Mapping[str, str] = attrs.field(factory=dict)


_MP3_RATES: Final = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)
_AAC_RATES: Final = (7_350, *_MP3_RATES, 64_000, 88_200, 96_000)

#: The values of ``response_format``, and how each is written. The content types are those of the OpenAI API.
FORMATS: Final[Mapping[str, _Format]] = {
    "mp3": _Format("audio/mpeg", "mp3", "libmp3lame", _MP3_RATES, 64_000),
    # A page of Ogg is sent when it is complete; by default that takes a second.
    "opus": _Format("audio/ogg", "ogg", "libopus", (48_000,), 48_000, {"page_duration": "200000"}),
    "aac": _Format("audio/aac", "adts", "aac", _AAC_RATES, 64_000),
    "flac": _Format("audio/flac", "flac", "flac"),
    "wav": _Format("audio/wav"),
    "pcm": _Format("audio/pcm"),
}


def has_codecs() -> bool:
    """Tell whether PyAV is installed, which all formats but WAV and raw samples need. Imports it. Synchronous."""
    return _library() is not None


def _library() -> Any:
    try:
        return importlib.import_module("av")
    except ImportError:
        return None


# Decoding


def decode_audio(
    data: bytes, *, rate: int, max_seconds: float, stopped: Callable[[], bool] = lambda: False
) -> Samples:
    """Decode an audio file, or the first audio track of a video. Blocks; call it in a thread.

    WAV files are read without PyAV, except those whose samples are compressed.

    Args:
        data: the whole file.
        rate: the rate in Hz to which the audio is converted.
        max_seconds: the longest audio that is accepted; not more than that is ever decoded.
        stopped: asked between two packets whether the samples are not needed any more. From then on nothing is decoded.

    Returns:
        The samples, mixed down to one channel, from -1 to 1, in the shape (samples,). If ``stopped`` was true, those
        that had been decoded by then.

    Raises:
        InvalidRequest: the audio cannot be read, is longer than ``max_seconds``, or needs PyAV, which is not installed.
            A 400 for the client; the message says which it is.
    """
    from . import wav

    try:
        samples, native = wav.read(data, max_seconds=max_seconds)
        return wav.resample(samples, native, rate)
    except wav.OtherFormatError as error:
        library = _library()
        if library is None:
            raise _refusal(
                f"{error}. Other formats need an extra on the server: {install_command(AUDIO_EXTRA)}"
            ) from error
        kind = error.kind
    except wav.WavError as error:
        raise _refusal(str(error)) from error
    return _decode(library, data, kind, rate, max_seconds, stopped)


def _refusal(message: str) -> InvalidRequest:
    return InvalidRequest(message, param="file", code="unsupported_audio")


def _decode(
    library: Any, data: bytes, kind: str | None, rate: int, max_seconds: float, stopped: Callable[[], bool]
) -> Samples:
    import numpy as np

    # Samples one after the other: a file may have as many frames as bytes, and an object for each would be far larger.
    buffer = bytearray()
    what = f"the {kind} file" if kind else "the file"
    options = {
        "format_whitelist": ",".join(_CONTAINERS),
        "codec_whitelist": ",".join(_DECODERS),
        "protocol_whitelist": "none",
    }
    try:
        # Names and titles in the file may be in any encoding.
        with closing(
            library.open(io.BytesIO(data), "r", options=options, metadata_errors="replace")
        ) as opened:
            if not opened.streams.audio:
                raise _refusal(f"{what} has no audio track")
            track = opened.streams.audio[0]
            codec = "unknown" if track.codec_context is None else track.codec_context.name
            if codec not in _DECODERS:
                raise _refusal(f"{what} has audio of the codec {codec}; send {_ACCEPTED}")
            track.codec_context.thread_count = 1
            for piece in _resampled(library, opened, track, rate, max_seconds, stopped):
                buffer += piece
    except (library.error.FFmpegError, ValueError, OverflowError) as error:
        if kind is None:
            raise _refusal(f"this is not a known audio file; send {_ACCEPTED}") from error
        raise _refusal(f"{what} is damaged: it cannot be opened") from error
    if not buffer and not stopped():
        raise _refusal(f"{what} is damaged, or empty: no audio can be decoded from it")
    samples = np.frombuffer(buffer, np.float32)
    np.nan_to_num(samples, copy=False, nan=0.0, posinf=1.0, neginf=-1.0)
    return np.clip(samples, -1.0, 1.0, out=samples)


def _resampled(
    library: Any, opened: Any, track: Any, rate: int, max_seconds: float, stopped: Callable[[], bool]
) -> Iterator[Any]:
    """Decode a track packet by packet; yield its samples at ``rate``, in one channel, as 32-bit floating-point numbers.

    Damaged packets are skipped.
    """
    seconds = 0.0
    resampler: Any = None
    layout: Any = None
    packets = opened.demux(track)
    while not stopped():
        try:
            packet = next(packets, None)
        except library.error.FFmpegError:
            # The container is damaged from here on, or the file ends too early.
            packet = None
        try:
            frames = track.codec_context.decode(packet)
        except library.error.FFmpegError:
            frames = []
        for frame in frames:
            # What is refused here is refused before it is resampled: at a rate of a few hertz, a small frame becomes
            # gigabytes, and at one of megahertz the filter does.
            if not 1000 <= frame.sample_rate <= 384_000:
                raise _refusal(
                    f"the audio has {frame.sample_rate} samples per second; accepted are 1000 to 384000"
                )
            if not 1 <= frame.layout.nb_channels <= 64:
                raise _refusal(f"the audio has {frame.layout.nb_channels} channels; accepted are 1 to 64")
            seconds += frame.samples / frame.sample_rate
            if seconds > max_seconds:
                raise _refusal(f"the audio is longer than {max_seconds:.0f} s; send at most that")
            # The resampler takes frames of one kind; a stream may change, for instance where files were joined.
            if resampler is None or layout != (frame.format.name, frame.layout.name, frame.sample_rate):
                if resampler is not None:
                    yield from (_mono(each) for each in resampler.resample(None))
                layout = (frame.format.name, frame.layout.name, frame.sample_rate)
                resampler = library.AudioResampler(format="flt", layout=frame.layout, rate=rate)
            # Gaps between timestamps are not filled, so timestamps are not needed; some that are wrong are refused.
            frame.pts = None
            yield from (_mono(each) for each in resampler.resample(frame))
        if packet is None:
            break
    if resampler is not None and not stopped():
        yield from (_mono(each) for each in resampler.resample(None))


def _mono(frame: Any) -> Any:
    """Return the mean of the channels, as bytes: FFmpeg's own way to mix them makes speech 3 dB louder, and clips."""
    import numpy as np

    channels = frame.layout.nb_channels
    # A plane may be longer than the samples in it.
    samples = memoryview(frame.planes[0])[: 4 * channels * frame.samples]
    if channels == 1:
        return samples
    return np.frombuffer(samples, np.float32).reshape(-1, channels).mean(axis=1, dtype=np.float32).data


# Encoding


class AudioEncoder:
    """Encodes samples piece by piece into one of the formats that clients ask for.

    For handlers of text to speech, whose model gives raw samples::

        encoder = AudioEncoder(request.response_format, rate=24_000)
        for samples in model.speak(request.input):
            yield OutputChunk.audio(encoder.encode(samples), encoder.mime_type)
        yield OutputChunk.audio(encoder.encode(b"", last=True), encoder.mime_type)

    ``wav`` and ``pcm`` need no library; the others need PyAV (``trio-cluster[audio]``). An encoder is used by one
    thread at a time, and needs no closing. Encoding a second of speech takes milliseconds.

    Args:
        response_format: ``mp3``, ``opus``, ``aac``, ``flac``, ``wav`` or ``pcm``.
        rate: the rate of the samples in Hz. Where the format has no such rate (Opus has 48 kHz only), the samples are
            converted to the next higher one that it has, or the highest.
        channels: 1 or 2; the samples of two channels alternate.

    Raises:
        InvalidRequest: there is no such format, or PyAV is not installed for it; a 400 for the client.
        ValueError: ``channels`` is neither 1 nor 2, or ``rate`` is not from 1000 to 384000.
    """

    def __init__(self, response_format: str, rate: int, *, channels: int = 1) -> None:
        if channels not in (1, 2):
            raise ValueError(f"channels: expected 1 or 2, got {channels}")
        if not 1000 <= rate <= 384_000:
            raise ValueError(f"rate: expected 1000 to 384000, got {rate}")
        found = FORMATS.get(response_format)
        library = _library() if found is not None and found.container else None
        if found is None or (found.container and library is None):
            here = "wav and pcm" if not has_codecs() else "mp3, opus, aac, flac, wav and pcm"
            hint = (
                "" if found is None else f". It needs an extra on the server: {install_command(AUDIO_EXTRA)}"
            )
            raise InvalidRequest(
                f"This model has the formats {here}, not {response_format}{hint}",
                param="response_format",
                code="unsupported_value",
            )
        self.mime_type: str = found.mime_type
        """The content type of what is encoded."""
        self._format = response_format
        self._rate = rate
        self._channels = channels
        # Bytes of a sample whose rest has not come yet.
        self._rest = b""
        self._begun = False
        self._ended = False
        self._sink = _Sink()
        if found.container:
            self._open(library, found)

    def _open(self, library: Any, found: _Format) -> None:
        self._library = library
        self._layout = "mono" if self._channels == 1 else "stereo"
        usable = [each for each in found.rates if each >= self._rate] or found.rates[-1:] or [self._rate]
        self._container = library.open(self._sink, "w", format=found.container, options=dict(found.options))
        self._stream = self._container.add_stream(found.codec, rate=usable[0], layout=self._layout)
        if found.bit_rate:
            self._stream.codec_context.bit_rate = found.bit_rate * self._channels

    def encode(self, samples: bytes, *, last: bool = False) -> bytes:
        """Encode the next samples. Synchronous.

        Args:
            samples: 16-bit little-endian PCM, as many bytes as there are.
            last: whether nothing follows. A WAV file that consists of one piece states its length.

        Returns:
            What can be sent now, which may be nothing, and is the rest of the file with ``last``.

        Raises:
            ValueError: the last samples were encoded before.
        """
        if self._ended:
            raise ValueError("the last samples were encoded before")
        self._ended = last
        data = self._rest + samples
        whole = len(data) - len(data) % (2 * self._channels)
        data, self._rest = data[:whole], data[whole:]
        first, self._begun = not self._begun, True
        if self._format == "pcm":
            return data
        if self._format == "wav":
            if first:
                length = len(data) if last else None
                return wav_header(self._rate, length=length, channels=self._channels) + data
            return data
        self._feed(data)
        if last:
            for packet in self._stream.encode(None):
                self._container.mux(packet)
            self._container.close()
        return self._sink.take()

    def _feed(self, data: bytes) -> None:
        import numpy as np

        # A frame takes many times its size while it is converted.
        step = 2 * self._channels * self._rate
        for begin in range(0, len(data), step):
            piece = np.frombuffer(data[begin : begin + step], "<i2").reshape(1, -1)
            frame = self._library.AudioFrame.from_ndarray(piece, format="s16", layout=self._layout)
            frame.sample_rate = self._rate
            for packet in self._stream.encode(frame):
                self._container.mux(packet)


class _Sink:
    """A file that is written and not read; without ``seek``, so that nothing is written that needs it."""

    def __init__(self) -> None:
        self._data = bytearray()

    def write(self, data: bytes) -> int:
        """Take what FFmpeg has written."""
        self._data += data
        return len(data)

    def take(self) -> bytes:
        """Return what was written since the last call."""
        data = bytes(self._data)
        self._data.clear()
        return data

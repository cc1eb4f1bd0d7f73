"""The log-mel spectrogram that is the input of Whisper.

Written from the description in the Whisper paper (Radford et al. 2022, section 2.2) and the definition of the Slaney
mel
scale: 16 kHz audio, windows of 25 ms (400 samples, Hann) every 10 ms, 80 mel bands from 0 to 8 kHz, the logarithm
limited to 8 decades below its maximum and scaled to about -1 to 1.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["RATE", "WINDOW_FRAMES", "WINDOW_SAMPLES", "log_mel"]

Samples = NDArray[np.float32]

#: Samples per second.
RATE: Final = 16_000

#: Samples of one frame, and from one frame to the next.
_FFT: Final = 400
_HOP: Final = 160

#: Whisper always processes 30 seconds at a time: in samples, and in frames.
WINDOW_SAMPLES: Final = 30 * RATE
WINDOW_FRAMES: Final = WINDOW_SAMPLES // _HOP


def log_mel(samples: Samples, bands: int = 80) -> Samples:
    """Return the spectrogram of at most 30 s of audio, padded with silence to 30 s.

    Args:
        samples: 16 kHz, one channel, from -1 to 1, in the shape (samples,). More than 30 s are cut off.
        bands: mel bands; 80, or 128 for the large-v3 models.

    Returns:
        The spectrogram in the shape (bands, 3000).
    """
    padded = np.zeros(WINDOW_SAMPLES, np.float32)
    padded[: len(samples)] = samples[:WINDOW_SAMPLES]
    # Each frame is centred on its time, so half a frame has to be added at either end.
    padded = np.pad(padded, _FFT // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, _FFT)[::_HOP][:WINDOW_FRAMES]
    hann = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_FFT) / _FFT)).astype(np.float32)
    power = np.abs(np.fft.rfft(frames * hann)) ** 2
    energy = _filters(bands) @ power.T.astype(np.float32)
    logarithm = np.log10(np.maximum(energy, 1e-10))
    logarithm = np.maximum(logarithm, logarithm.max() - 8.0)
    return np.asarray((logarithm + 4.0) / 4.0, np.float32)


@lru_cache(maxsize=2)
def _filters(bands: int) -> Samples:
    """Return the filter of each band in the shape (bands, 201): triangles over the frequencies, of equal area."""
    edges = _to_hertz(np.linspace(0.0, _to_mel(RATE / 2), bands + 2))
    frequencies = np.fft.rfftfreq(_FFT, 1 / RATE)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising = (frequencies - low) / (centre - low)
    falling = (high - frequencies) / (high - centre)
    triangles = np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (high - low))
    return np.asarray(triangles, np.float32)


# Slaney's scale is linear up to 1 kHz (15 mel) and logarithmic above, with 27 mel to a factor of 6.4.
_BREAK_HERTZ: Final = 1000.0
_BREAK_MEL: Final = 15.0
_STEP: Final = np.log(6.4) / 27.0


def _to_mel(hertz: float) -> float:
    if hertz < _BREAK_HERTZ:
        return hertz * _BREAK_MEL / _BREAK_HERTZ
    return float(_BREAK_MEL + np.log(hertz / _BREAK_HERTZ) / _STEP)


def _to_hertz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    linear = mel * _BREAK_HERTZ / _BREAK_MEL
    return np.where(mel < _BREAK_MEL, linear, _BREAK_HERTZ * np.exp(_STEP * (mel - _BREAK_MEL)))

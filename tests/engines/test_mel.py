"""The log-mel spectrogram: properties that follow from its definition."""

from __future__ import annotations

import pytest

np = pytest.importorskip("numpy")

from trio_cluster.engines.audio import mel  # noqa: E402


def tone(hertz: float, seconds: float = 1.0) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(int(seconds * mel.RATE)) / mel.RATE).astype(np.float32)


def test_audio_of_any_length_is_padded_to_thirty_seconds() -> None:
    for samples in (np.zeros(0, np.float32), tone(440, 0.1), tone(440, 31)):
        assert mel.log_mel(samples).shape == (80, 3000)
    assert mel.log_mel(tone(440), bands=128).shape == (128, 3000)


def test_silence_is_uniform_and_the_range_is_limited_to_eight_decades() -> None:
    silence = mel.log_mel(np.zeros(16_000, np.float32))
    assert np.ptp(silence) == 0
    loud = mel.log_mel(tone(440))
    assert loud.max() - loud.min() == pytest.approx(2.0, abs=1e-5)


@pytest.mark.parametrize("hertz", [300, 1000, 3000, 6000])
def test_a_tone_is_loudest_in_the_band_around_it(hertz: float) -> None:
    edges = mel._to_hertz(np.linspace(0.0, mel._to_mel(8000), 82))
    band = int(mel.log_mel(tone(hertz))[:, 50].argmax())
    assert edges[band] < hertz < edges[band + 2]


def test_a_click_is_in_the_frame_of_its_time() -> None:
    samples = np.zeros(32_000, np.float32)
    samples[16_000] = 1.0
    assert abs(int(mel.log_mel(samples).sum(axis=0).argmax()) - 100) <= 1


def test_the_scale_is_slaneys() -> None:
    # Values of the published definition: linear to 1 kHz, then 27 steps to a factor of 6.4.
    assert mel._to_mel(1000.0) == pytest.approx(15.0)
    assert mel._to_mel(500.0) == pytest.approx(7.5)
    assert mel._to_mel(6400.0) == pytest.approx(42.0)
    assert mel._to_hertz(np.array([7.5, 15.0, 42.0])).tolist() == pytest.approx([500.0, 1000.0, 6400.0])
    area = mel._filters(80).sum(axis=1) * mel.RATE / 400
    # Each band has the same area, as far as the grid of frequencies resolves it.
    assert area[20:].std() / area[20:].mean() < 0.1

"""The arithmetic of the ``digits`` model: a diffusion model over 8 by 8 pixels, in numpy.

Theory. A picture is drowned in Gaussian noise along a continuous time from 0 (clean) to 1 (nothing but
noise): ``noisy = signal(t) * clean + spread(t) * noise`` with ``signal**2 + spread**2 == 1``, along the
cosine schedule of Nichol and Dhariwal. A network learns to tell the noise from the picture. Sampling walks
the time backwards in a few deterministic steps (DDIM; Song, Meng and Ermon 2020): guess the noise, take the
guess for the clean picture, put back less noise. *Guidance* exaggerates what the asked class adds over "any
digit" (Ho and Salimans 2022).

``scripts/train_digits.py`` trains the weights and shares this module, so that training and sampling cannot
drift apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "CLASSES",
    "PIXELS",
    "SIDE",
    "TIME_FEATURES",
    "load",
    "predict_noise",
    "sample",
    "schedule",
    "time_features",
]

SIDE: Final = 8
PIXELS: Final = SIDE * SIDE
CLASSES: Final = 10
TIME_FEATURES: Final = 64

# The schedule is cut short of 0 and 1, where the signal or the noise would vanish and be divided by.
_OFFSET: Final = 0.008
_CUT: Final = 0.992

Array = NDArray[np.float32]


def load(path: Path) -> dict[str, Array]:
    """Return the weights stored at ``path``, widened to single precision."""
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name].astype(np.float32) for name in stored.files}


def schedule(times: Array) -> tuple[Array, Array]:
    """Return how much of the picture and how much noise there is at each time of ``times`` (0 to 1)."""
    angle = np.asarray((_OFFSET + _CUT * times) / (1.0 + _OFFSET) * (np.pi / 2), np.float32)
    return np.cos(angle), np.sin(angle)


def time_features(times: Array) -> Array:
    """Return sines and cosines of each time at geometrically spaced frequencies, for the network to read."""
    frequencies = np.exp(np.linspace(0.0, np.log(1000.0), TIME_FEATURES // 2)).astype(np.float32)
    phase = times[:, None] * frequencies
    return np.concatenate([np.sin(phase), np.cos(phase)], axis=1)


def predict_noise(
    weights: Mapping[str, Array], noisy: Array, times: Array, classes: NDArray[np.int64]
) -> Array:
    """Return the network's guess at the noise in each row of ``noisy``; class 10 means any digit."""
    condition = _silu(
        time_features(times) @ weights["time_w"] + weights["time_b"] + weights["class_w"][classes]
    )
    hidden = noisy @ weights["in_w"] + weights["in_b"]
    block = 0
    while f"block{block}_up_w" in weights:
        inner = _silu(hidden + condition)
        inner = _silu(inner @ weights[f"block{block}_up_w"] + weights[f"block{block}_up_b"])
        hidden = hidden + inner @ weights[f"block{block}_down_w"] + weights[f"block{block}_down_b"]
        block += 1
    return np.asarray(_silu(hidden) @ weights["out_w"] + weights["out_b"], np.float32)


def sample(
    weights: Mapping[str, Array],
    classes: NDArray[np.int64],
    *,
    seed: int | None = None,
    steps: int = 30,
    guidance: float = 2.0,
    go_on: Callable[[int], bool] = lambda step: True,
) -> Array | None:
    """Draw one picture for each class of ``classes``.

    Args:
        weights: as returned by :func:`load`.
        classes: the digit that each picture shall show.
        seed: makes the result repeatable; drawn by chance when ``None``.
        steps: how many times the network is asked.
        guidance: 1 samples what was learnt; more is more legible and less varied.
        go_on: called with the number of each step before it is taken; sampling ends when it says no.

    Returns:
        The pictures with values from -1 (paper) to 1 (ink), in the shape (count, 8, 8); ``None`` if it was
        ended.
    """
    rng = np.random.default_rng(seed)
    count = len(classes)
    picture = rng.standard_normal((count, PIXELS), dtype=np.float32)
    both = np.concatenate([classes, np.full(count, CLASSES)])
    stops = np.linspace(1.0, 0.0, steps + 1).astype(np.float32)
    signals, spreads = schedule(stops)
    for step in range(steps):
        if not go_on(step):
            return None
        guess = predict_noise(
            weights, np.concatenate([picture, picture]), np.full(2 * count, stops[step], np.float32), both
        )
        noise = guess[count:] + guidance * (guess[:count] - guess[count:])
        # Guided guesses overshoot; ink cannot be blacker than black, so the excess is cut and the noise
        # follows.
        clean = np.clip((picture - spreads[step] * noise) / signals[step], -1.0, 1.0)
        noise = (picture - signals[step] * clean) / spreads[step]
        picture = signals[step + 1] * clean + spreads[step + 1] * noise
    return np.clip(picture, -1.0, 1.0).reshape(count, SIDE, SIDE)


def _silu(x: Any) -> Any:
    return x / (1.0 + np.exp(-x))

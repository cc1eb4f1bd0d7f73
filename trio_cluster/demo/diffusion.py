"""The arithmetic of the ``digits`` model: a diffusion model over 8 by 8 pixels, in numpy.

Theory of operation
===================

A picture is mixed with Gaussian noise along a continuous time from 0 (clean) to 1 (only noise): ``noisy = signal(t) *
clean + spread(t) * noise`` with ``signal**2 + spread**2 == 1``, along the cosine schedule of Nichol and Dhariwal
(2021). A network learns to predict the noise. Sampling goes backwards in time in a few deterministic steps (DDIM; Song,
Meng and Ermon 2020): predict the noise, compute the clean picture from the prediction, mix it with less noise.
*Guidance* amplifies the difference between the prediction for the wanted class and that for "any digit" (Ho and
Salimans 2022).

``scripts/train_digits.py`` trains the weights and uses this module, so that training and sampling cannot diverge.
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

# The schedule stops short of 0 and 1, where the noise or the signal would be 0 and a divisor.
_OFFSET: Final = 0.008
_CUT: Final = 0.992

Array = NDArray[np.float32]


def load(path: Path) -> dict[str, Array]:
    """Return the weights stored at ``path``, in single precision. Blocks. Raises ``OSError``."""
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name].astype(np.float32) for name in stored.files}


def schedule(times: Array) -> tuple[Array, Array]:
    """Return the factors of the picture and of the noise at each time of ``times`` (0 to 1), in its shape."""
    angle = np.asarray((_OFFSET + _CUT * times) / (1.0 + _OFFSET) * (np.pi / 2), np.float32)
    return np.cos(angle), np.sin(angle)


def time_features(times: Array) -> Array:
    """Return sines and cosines of each time at geometrically spaced frequencies, in the shape (count, 64)."""
    frequencies = np.exp(np.linspace(0.0, np.log(1000.0), TIME_FEATURES // 2)).astype(np.float32)
    phase = times[:, None] * frequencies
    return np.concatenate([np.sin(phase), np.cos(phase)], axis=1)


def predict_noise(
    weights: Mapping[str, Array], noisy: Array, times: Array, classes: NDArray[np.int64]
) -> Array:
    """Return the network's prediction of the noise in noisy pictures.

    Args:
        weights: as returned by :func:`load`.
        noisy: the pictures in the shape (count, 64).
        times: the time of each picture, 0 to 1, in the shape (count,).
        classes: the digit in each picture, in the shape (count,); 10 means any digit.

    Returns:
        The noise in the shape (count, 64).
    """
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
    should_continue: Callable[[int], bool] = lambda step: True,
) -> Array | None:
    """Draw one picture for each class of ``classes``. Blocks.

    Args:
        weights: as returned by :func:`load`.
        classes: the digit in each picture, in the shape (count,).
        seed: makes the result repeatable; random if ``None``.
        steps: evaluations of the network.
        guidance: 1 samples the learnt distribution; larger values make the digits more legible and less varied.
        should_continue: called with the number of each step before it; sampling stops if it returns false.

    Returns:
        The pictures with values from -1 (paper) to 1 (ink), in the shape (count, 8, 8); ``None`` if sampling was
        stopped.
    """
    rng = np.random.default_rng(seed)
    count = len(classes)
    picture = rng.standard_normal((count, PIXELS), dtype=np.float32)
    both = np.concatenate([classes, np.full(count, CLASSES)])
    stops = np.linspace(1.0, 0.0, steps + 1).astype(np.float32)
    signals, spreads = schedule(stops)
    for step in range(steps):
        if not should_continue(step):
            return None
        predicted = predict_noise(
            weights, np.concatenate([picture, picture]), np.full(2 * count, stops[step], np.float32), both
        )
        noise = predicted[count:] + guidance * (predicted[:count] - predicted[count:])
        # Guidance overshoots: values beyond paper and ink are clipped, and the noise is computed anew from the result.
        clean = np.clip((picture - spreads[step] * noise) / signals[step], -1.0, 1.0)
        noise = (picture - signals[step] * clean) / spreads[step]
        picture = signals[step + 1] * clean + spreads[step + 1] * noise
    return np.clip(picture, -1.0, 1.0).reshape(count, SIDE, SIDE)


def _silu(x: Any) -> Any:
    return x / (1.0 + np.exp(-x))

#!/usr/bin/env python3
"""Train the tiny diffusion model behind the ``digits`` engine and write ``trio_cluster/demo/digits.npz``.

The model is a denoising diffusion model (Ho, Jain and Abbeel 2020) with a cosine noise schedule (Nichol and Dhariwal
2021), trained for classifier-free guidance (Ho and Salimans 2022): for one sample in ten the class is replaced by an
eleventh, "any digit". The network is a residual multilayer perceptron over the 64 pixels, small enough to be written
with its backward pass in numpy. The data are the 1797 handwritten digits of 8 by 8 pixels that come with scikit-learn
(the test half of the UCI "Optical Recognition of Handwritten Digits" set).

The result depends only on the seed and the versions of numpy and its BLAS. Training takes a minute or two on one
core::

    pip install numpy scikit-learn
    OMP_NUM_THREADS=1 python scripts/train_digits.py

At the end it prints how often a 3-nearest-neighbour classifier, fitted on the same real digits, recognizes the wanted
digit in a generated picture, and how far the pictures are from their nearest real neighbour, compared with the real
ones among themselves: a model that had memorized its data would have a ratio near 0.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from trio_cluster.demo import diffusion

Array = NDArray[np.float32]

WIDTH = 112
BLOCKS = 2
BATCH = 256
CLASS_DROPOUT = 0.1
EMA = 0.999


def new_parameters(rng: np.random.Generator) -> dict[str, Array]:
    """Return random weights. The last layer of each block is zero, so that a block starts as the identity."""

    def dense(rows: int, columns: int) -> Array:
        return (rng.standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32)

    parameters = {
        "in_w": dense(diffusion.PIXELS, WIDTH),
        "in_b": np.zeros(WIDTH, np.float32),
        "time_w": dense(diffusion.TIME_FEATURES, WIDTH),
        "time_b": np.zeros(WIDTH, np.float32),
        "class_w": (0.5 * rng.standard_normal((diffusion.CLASSES + 1, WIDTH))).astype(np.float32),
        "out_w": np.zeros((WIDTH, diffusion.PIXELS), np.float32),
        "out_b": np.zeros(diffusion.PIXELS, np.float32),
    }
    for block in range(BLOCKS):
        parameters[f"block{block}_up_w"] = dense(WIDTH, WIDTH)
        parameters[f"block{block}_up_b"] = np.zeros(WIDTH, np.float32)
        parameters[f"block{block}_down_w"] = np.zeros((WIDTH, WIDTH), np.float32)
        parameters[f"block{block}_down_b"] = np.zeros(WIDTH, np.float32)
    return parameters


def silu_and_slope(x: Array) -> tuple[Array, Array]:
    """Return SiLU(x) and its derivative."""
    gate = 1.0 / (1.0 + np.exp(-x))
    return x * gate, gate * (1.0 + x * (1.0 - gate))


def gradients(
    p: dict[str, Array], noisy: Array, times: Array, classes: NDArray[np.int64], noise: Array
) -> tuple[float, dict[str, Array]]:
    """Return the mean squared error of the predicted noise, and its gradient for every weight.

    The forward pass is that of :func:`trio_cluster.demo.diffusion.predict_noise`; it keeps what the backward pass
    needs.

    Args:
        p: the weights.
        noisy: noisy pictures in the shape (count, 64).
        times: the time of each picture, 0 to 1, in the shape (count,).
        classes: the digit in each picture, 10 for "any digit", in the shape (count,).
        noise: the noise in each picture, in the shape (count, 64).
    """
    features = diffusion.time_features(times)
    condition, condition_slope = silu_and_slope(features @ p["time_w"] + p["time_b"] + p["class_w"][classes])
    hidden = noisy @ p["in_w"] + p["in_b"]
    kept = []
    for block in range(BLOCKS):
        first, first_slope = silu_and_slope(hidden + condition)
        second, second_slope = silu_and_slope(first @ p[f"block{block}_up_w"] + p[f"block{block}_up_b"])
        kept.append((first, first_slope, second, second_slope))
        hidden = hidden + second @ p[f"block{block}_down_w"] + p[f"block{block}_down_b"]
    last, last_slope = silu_and_slope(hidden)
    error = last @ p["out_w"] + p["out_b"] - noise

    g: dict[str, Array] = {}
    back = (2.0 / error.size) * error
    g["out_w"], g["out_b"] = last.T @ back, back.sum(0)
    back = (back @ p["out_w"].T) * last_slope
    condition_back = np.zeros_like(condition)
    for block in reversed(range(BLOCKS)):
        first, first_slope, second, second_slope = kept[block]
        g[f"block{block}_down_w"], g[f"block{block}_down_b"] = second.T @ back, back.sum(0)
        inner = (back @ p[f"block{block}_down_w"].T) * second_slope
        g[f"block{block}_up_w"], g[f"block{block}_up_b"] = first.T @ inner, inner.sum(0)
        inner = (inner @ p[f"block{block}_up_w"].T) * first_slope
        condition_back += inner
        back = back + inner
    g["in_w"], g["in_b"] = noisy.T @ back, back.sum(0)
    condition_back *= condition_slope
    g["time_w"], g["time_b"] = features.T @ condition_back, condition_back.sum(0)
    g["class_w"] = np.zeros_like(p["class_w"])
    np.add.at(g["class_w"], classes, condition_back)
    return float((error**2).mean()), g


def train(images: Array, labels: NDArray[np.int64], steps: int, seed: int) -> dict[str, Array]:
    """Return the exponential moving average of the weights over ``steps`` steps of Adam."""
    rng = np.random.default_rng(seed)
    p = new_parameters(rng)
    average = {name: value.copy() for name, value in p.items()}
    first = {name: np.zeros_like(value) for name, value in p.items()}
    second = {name: np.zeros_like(value) for name, value in p.items()}
    running = 1.0
    began = time.perf_counter()
    for step in range(1, steps + 1):
        pick = rng.integers(0, len(images), BATCH)
        clean, classes = images[pick], labels[pick].copy()
        classes[rng.random(BATCH) < CLASS_DROPOUT] = diffusion.CLASSES
        times = rng.random(BATCH, dtype=np.float32)
        noise = rng.standard_normal(clean.shape, dtype=np.float32)
        signal, spread = diffusion.schedule(times)
        noisy = signal[:, None] * clean + spread[:, None] * noise
        loss, g = gradients(p, noisy, times, classes, noise)
        rate = 1e-3 * min(1.0, step / 500) * 0.5 * (1.0 + np.cos(np.pi * step / steps))
        for name, slope in g.items():
            first[name] += 0.1 * (slope - first[name])
            second[name] += 0.01 * (slope * slope - second[name])
            mean = first[name] / (1.0 - 0.9**step)
            size = second[name] / (1.0 - 0.99**step)
            p[name] -= rate * (mean / (np.sqrt(size) + 1e-8) + 1e-4 * p[name])
            keep = min(EMA, (1.0 + step) / (10.0 + step))
            average[name] += (1.0 - keep) * (p[name] - average[name])
        running += 0.002 * (loss - running)
        if step % 1000 == 0:
            print(f"step {step:6d}  loss {running:.4f}  {time.perf_counter() - began:5.0f} s", flush=True)
    return average


def report(weights: dict[str, Array], images: Array, labels: NDArray[np.int64]) -> None:
    """Print how well a classifier of real digits recognizes the generated ones, and how new they are."""
    classifier = KNeighborsClassifier(3).fit(images, labels)
    real_gap = classifier.kneighbors(n_neighbors=1)[0].mean()
    wanted = np.repeat(np.arange(10), 30)
    for guidance in (1.0, 2.0, 3.0):
        made: Any = diffusion.sample(weights, wanted, seed=1, guidance=guidance)
        assert made is not None
        gap = classifier.kneighbors(made.reshape(len(made), -1), n_neighbors=1)[0].mean()
        recognized = 100 * (classifier.predict(made.reshape(len(made), -1)) == wanted).mean()
        print(
            f"guidance {guidance}: {recognized:.1f} % recognized, nearest-neighbour ratio {gap / real_gap:.2f}"
        )


def main() -> None:
    """Train with the arguments of the command line, write the weights, and print the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(diffusion.__file__).with_name("digits.npz"))
    arguments = parser.parse_args()
    data = load_digits()
    images = (data.data / 8.0 - 1.0).astype(np.float32)
    labels = data.target.astype(np.int64)
    weights = train(images, labels, arguments.steps, arguments.seed)
    half_precision: dict[str, Any] = {name: value.astype(np.float16) for name, value in weights.items()}
    np.savez_compressed(arguments.out, **half_precision)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e3:.0f} kB")
    report(diffusion.load(arguments.out), images, labels)


if __name__ == "__main__":
    main()

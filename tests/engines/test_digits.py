"""The diffusion model of the demo, with its real weights, which are small enough for every test run."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import trio
from recording_provider import RecordingProvider

np = pytest.importorskip("numpy")

from trio_cluster.demo import diffusion, digits  # noqa: E402
from trio_cluster.engines import parse_serve  # noqa: E402
from trio_cluster.errors import ApiError  # noqa: E402
from trio_cluster.openai import ImageGenRequest  # noqa: E402


@pytest.fixture(scope="module")
def model() -> digits.Digits:
    return digits.Digits.load(parse_serve("digits").options)


async def draw(model: digits.Digits, prompt: str = "a seven", **fields: Any) -> list[bytes]:
    output = RecordingProvider()
    await model.draw(ImageGenRequest(model="digits", prompt=prompt, **fields), output)
    return output.values("image")


def size_of(png: bytes) -> tuple[int, int]:
    width, height = struct.unpack_from(">II", png, 16)
    return width, height


@pytest.mark.parametrize(
    ("prompt", "digit"),
    [
        ("7", 7),
        ("a handwritten Seven, please", 7),
        ("draw 42", 4),
        ("three or 5", 3),
        ("ZERO", 0),
        ("no digit at all", None),
        ("someone tennis weighty", None),
        ("", None),
        ("٣", None),
    ],
)
def test_the_first_digit_in_the_prompt_counts(prompt: str, digit: int | None) -> None:
    assert digits.first_digit(prompt) == digit


async def test_the_number_and_size_of_pictures_are_those_of_the_request(model: digits.Digits) -> None:
    assert [size_of(each) for each in await draw(model)] == [(256, 256)]
    assert [size_of(each) for each in await draw(model, n=3, size="40x24")] == [(40, 24)] * 3


async def test_a_seed_makes_pictures_repeatable(model: digits.Digits) -> None:
    first, second = [await draw(model, n=2, size="16x16", raw={"seed": 5}) for _ in range(2)]
    assert first == second
    assert first[0] != first[1]
    assert await draw(model, n=2, size="16x16", raw={"seed": 6}) != first
    assert await draw(model, size="16x16") != await draw(model, size="16x16")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "a cat"}, "prompt"),
        ({"size": "4096x4096"}, "size"),
        ({"size": "256x1"}, "size"),
        ({"raw": {"seed": "x"}}, "seed"),
        ({"raw": {"seed": -1}}, "seed"),
        ({"raw": {"seed": True}}, "seed"),
        ({"output_format": "webp", "raw": {"output_format": "webp"}}, "output_format"),
    ],
)
async def test_a_field_that_cannot_be_served_is_named_in_the_error(
    model: digits.Digits, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(ApiError) as caught:
        await draw(model, **fields)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_different_digits_look_different_and_guidance_makes_them_alike() -> None:
    weights = diffusion.load(digits._WEIGHTS)
    classes = np.repeat(np.arange(10), 10)
    pictures = diffusion.sample(weights, classes, seed=1, steps=12, guidance=3.0)
    assert pictures is not None
    means = pictures.reshape(10, 10, 64).mean(axis=1)
    # Nearly every picture is nearer to the mean of its own class than to that of any other.
    distance = ((pictures.reshape(100, 1, 64) - means) ** 2).sum(axis=2)
    assert (distance.argmin(axis=1) == classes).mean() > 0.95
    free = diffusion.sample(weights, classes, seed=1, steps=12, guidance=1.0)
    assert free is not None
    assert free.reshape(10, 10, 64).std(axis=1).mean() > pictures.reshape(10, 10, 64).std(axis=1).mean()


def test_sampling_can_be_stopped_at_every_step() -> None:
    weights = diffusion.load(digits._WEIGHTS)
    seen: list[int] = []

    def should_continue(step: int) -> bool:
        seen.append(step)
        return step < 4

    assert diffusion.sample(weights, np.array([3]), steps=30, should_continue=should_continue) is None
    assert seen == [0, 1, 2, 3, 4]


async def test_a_cancelled_request_stops_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    model = digits.Digits.load(parse_serve("digits,steps=1000").options)
    steps, predict = 0, diffusion.predict_noise
    begun = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def counted(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            token.run_sync_soon(begun.set)
        return predict(*arguments)

    monkeypatch.setattr(diffusion, "predict_noise", counted)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: draw(model, n=10))
        await begun.wait()
        nursery.cancel_scope.cancel()
    assert 3 <= steps < 900
    assert model._slots.running == 0

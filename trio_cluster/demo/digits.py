"""``digits``: handwritten digits drawn by a tiny diffusion model, whose weights are part of this package.

It is a real diffusion model with classifier-free guidance, and a toy: seventy thousand weights, trained in minutes on
1797 scans of 8 by 8 pixels (see ``scripts/train_digits.py``); it can draw ten things. It exists because serving it
takes what serving a large one takes: many steps for one picture, cancellation between any two of them, several pictures
in one request, seeds, sizes.

The first digit in the prompt is drawn, written ``7`` or ``seven``; ``42`` is a four. A prompt without a digit is
refused. Pictures are PNG files, ink on white, 256 by 256 pixels unless the client sets another size. ``seed`` in the
request makes them repeatable.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Final

import attrs

from trio_cluster.errors import ClusterError, InvalidRequest
from trio_cluster.local.adapters import Provider
from trio_cluster.local.slots import Slots
from trio_cluster.openai import ImageGenRequest, OutputChunk

from ..engines import LoadingEngine, Option, Outlet, ServedModel, ThreadStream, fraction, text, whole_number

__all__ = ["Digits", "engine", "first_digit"]

_WORDS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_DIGIT: Final = re.compile(rf"[0-9]|\b(?:{'|'.join(_WORDS)})\b", re.IGNORECASE)

#: Pixels of a side by default, and the range that is accepted.
_SIDE: Final = 256
_SIDES: Final = range(8, 2049)

_WEIGHTS: Final = Path(__file__).with_name("digits.npz")


class _Digits(LoadingEngine):
    summary = "images: handwritten digits from a tiny diffusion model"
    requires = ("numpy",)
    extra = "trio-cluster[digits]"
    options: ClassVar[Mapping[str, Option]] = {
        "name": Option(text, "digits", "the model's name"),
        "steps": Option(whole_number(1, 1000), 30, "steps from noise to picture"),
        "guidance": Option(
            fraction(0, 20), 2.0, "1 draws as people do; more is more legible and less varied"
        ),
        "parallel": Option(whole_number(1, 64), 1, "requests that are worked on at once"),
    }

    @contextmanager
    def open(self, argument: str, options: Mapping[str, Any]) -> Iterator[ServedModel]:
        """See :meth:`LoadingEngine.open`."""
        yield ServedModel(options["name"], "image_generation", Digits.load(options).draw)


engine = _Digits()


@attrs.frozen(eq=False)
class Digits:
    """The loaded model."""

    _weights: Mapping[str, Any]
    _slots: Slots
    _steps: int
    _guidance: float

    @classmethod
    def load(cls, options: Mapping[str, Any]) -> Digits:
        """Load the model. Blocks.

        Args:
            options: a value for every option of the engine.

        Raises:
            ClusterError: the installation is incomplete: the file with the weights is missing.
        """
        from . import diffusion

        try:
            weights = diffusion.load(_WEIGHTS)
        except OSError as error:
            raise ClusterError(f"cannot read the model's weights, reinstall trio-cluster: {error}") from error
        return cls(weights, Slots(options["parallel"]), options["steps"], options["guidance"])

    async def draw(self, request: ImageGenRequest, provider: Provider) -> None:
        """Handle a request; the handler that is registered. Cancellation waits for the current step.

        Raises:
            InvalidRequest: there is no digit in the prompt, or a field has a value that is not supported.
        """
        digit = first_digit(request.prompt)
        if digit is None:
            raise InvalidRequest(
                "This model draws single digits: name one in the prompt, as '7' or 'seven'",
                param="prompt",
            )
        if request.output_format != "png" and "output_format" in request.raw:
            raise InvalidRequest(
                "This model makes png files only", param="output_format", code="unsupported_value"
            )
        width, height = request.width or _SIDE, request.height or _SIDE
        if width not in _SIDES or height not in _SIDES:
            raise InvalidRequest(
                f"This model makes pictures of {_SIDES[0]} to {_SIDES[-1]} pixels a side", param="size"
            )
        seed = request.raw.get("seed")
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or seed < 0):
            raise InvalidRequest("seed must be a whole number, 0 or more", param="seed")
        work = self._drawing_work(digit, request.n, (height, width), seed)
        async with ThreadStream(work, self._slots, name="digits", bound=1) as pictures:
            async for picture in pictures:
                await provider.push(OutputChunk.image(picture, "image/png"))

    def _drawing_work(
        self, digit: int, count: int, size: tuple[int, int], seed: int | None
    ) -> Callable[[Outlet[bytes]], None]:
        """Return the work of one request: it draws its pictures together, and puts them one by one, as PNG files."""
        import numpy as np

        from . import diffusion, png

        def work(outlet: Outlet[bytes]) -> None:
            pictures = diffusion.sample(
                self._weights,
                np.full(count, digit, np.int64),
                seed=seed,
                steps=self._steps,
                guidance=self._guidance,
                should_continue=lambda step: not outlet.closed(),
            )
            for picture in () if pictures is None else pictures:
                paper = 127.5 - 127.5 * png.scale(picture, *size)
                if not outlet.put(png.encode_grey(np.clip(np.round(paper), 0, 255).astype(np.uint8))):
                    return

        return work


def first_digit(prompt: str) -> int | None:
    """Return the first digit in a text, a figure or an English word; ``None`` if there is none."""
    found = _DIGIT.search(prompt)
    if found is None:
        return None
    word = found[0].lower()
    return int(word) if word.isdecimal() else _WORDS.index(word)

"""Images to learn from: cropped, mirrored and coloured at random, shuffled, in batches that can be restarted anywhere.

Grain does the shuffling and the reading ahead, as its datasets can be asked for batch n at once: a run that is
interrupted goes on with the batch it would have seen. Pillow cuts and resizes, as in `jaxvit.prepare`, because
photographs come in all sizes, which a program on the device would have to be compiled for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import grain
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageEnhance

from jaxvit.io.images import decode
from jaxvit.model.config import Preprocess

FILTERS = {name: getattr(Image.Resampling, name.upper()) for name in ("bicubic", "bilinear", "lanczos", "nearest")}


@dataclass(frozen=True)
class Variation:
    """How an image is varied.

    Attributes:
      area: the least part of it that a crop keeps. Where no such crop has an allowed aspect ratio, the largest one in
        the middle that has is taken.
      ratio: how far a crop's aspect ratio is from that of what the model reads, at most: this factor, or 1 by it. The
        crop is stretched by as much.
      mirror: probability of a mirror image.
      colour: how much brightness, contrast and saturation change at most.
    """

    area: float = 0.35
    ratio: float = 4 / 3
    mirror: float = 0.5
    colour: float = 0.2

    def __post_init__(self) -> None:
        ranges = {"area": (0 < self.area <= 1, "more than 0, at most 1"), "ratio": (self.ratio >= 1, "1 or more")}
        ranges |= {"mirror": (0 <= self.mirror <= 1, "0 to 1"), "colour": (0 <= self.colour < 1, "0 or more, below 1")}
        for name, (fits, expected) in ranges.items():
            if not fits:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {expected}")

    def box(
        self, width: int, height: int, aspect: float, rng: np.random.Generator
    ) -> tuple[float, float, float, float]:
        """left, top, right, bottom of a random crop, in pixels.

        Args:
          aspect: width by height of what the model reads.
        """
        for _ in range(10):
            area = rng.uniform(self.area, 1) * width * height
            ratio = aspect * math.exp(rng.uniform(-1, 1) * math.log(self.ratio))
            w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if w <= width and h <= height:
                left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
                return left, top, left + w, top + h
        # As a rule none fits: the largest in the middle, of the allowed ratio that is next to the image's own.
        ratio = min(max(width / height, aspect / self.ratio), aspect * self.ratio)
        w, h = min(width, height * ratio), min(height, width / ratio)
        left, top = (width - w) / 2, (height - h) / 2
        return left, top, left + w, top + h

    def __call__(
        self, pixels: UInt8[np.ndarray, "H W 3"], preprocess: Preprocess, rng: np.random.Generator
    ) -> Float[np.ndarray, "h w 3"]:
        """A varied image as a model reads it."""
        image = Image.fromarray(pixels)
        height, width = preprocess.size
        resampling = FILTERS.get(preprocess.interpolation, Image.Resampling.BICUBIC)
        image = image.resize((width, height), resampling, box=self.box(*image.size, width / height, rng))
        if rng.random() < self.mirror:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = change(image).enhance(rng.uniform(1 - self.colour, 1 + self.colour))
        mean, std = (np.asarray(values, np.float32)[None, None] for values in (preprocess.mean, preprocess.std))
        return (np.asarray(image, np.float32) / 255 - mean) / std


class Batches:
    """Batches of varied images and their labels; `batches[n]` is always the same.

    Args:
      source: gives the image of a number, as `jaxvit.decode` takes it.
      labels: of the images by number.
      numbers: which images to learn from.
      preprocess: of the model, for RGB.
      batch_size: of each; a batch at the end of an epoch is filled up from the next.
      variation: how images are varied.
      seed: of the order and the variations.

    Raises:
      ValueError: fewer images than a batch, or a model that does not read RGB.

    Example:

        batches = Batches(paths.__getitem__, labels, range(len(paths)), model.config.preprocess, 32)
        images, labels = batches[0]  # [32, 224, 224, 3] float32, [32] int32
        for images, labels in batches.since(100): ...  # read ahead by threads, without end
    """

    def __init__(
        self,
        source: Callable[[int], Any],
        labels: Sequence[int] | np.ndarray,
        numbers: Sequence[int] | np.ndarray,
        preprocess: Preprocess,
        batch_size: int,
        variation: Variation | None = None,
        seed: int = 0,
    ):
        if len(preprocess.mean) != 3:
            raise ValueError(f"a model of {len(preprocess.mean)} channels: only RGB can be varied")
        if not 1 <= batch_size <= len(numbers):
            raise ValueError(f"a batch of {batch_size} cannot be made of {len(numbers)} images to learn from")
        chosen, known, change = np.asarray(numbers), np.asarray(labels), variation or Variation()

        def one(index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.int32]:
            number = int(chosen[index])
            return change(decode(source(number)), preprocess, rng), np.int32(known[number])

        shuffled = grain.MapDataset.range(len(chosen)).seed(seed).shuffle()
        self.epoch = len(chosen) // batch_size
        """Batches of an epoch."""
        self._batches = shuffled.repeat().random_map(one).batch(batch_size)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        return cast(Any, self._batches[number])

    def since(self, number: int, threads: int = 8) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The batches from this number on, without end, read ahead by so many threads."""
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
        return iter(self._batches[number:].to_iter_dataset(options))

"""Scores that are made of sums over images, so that they can be resampled image by image.

An accuracy is a mean over images. Mean IoU is not: it is a mean over classes of quotients of sums over images. Both are
functions of sums, and so is their difference under an intervention, on the same images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

DRAWS = 2000
CONFIDENCE = 0.95


class Score(NamedTuple):
    """What was counted of each image, and the number that the sums of it give.

    Attributes:
      counts: [images, ..].
      of: sums [.., *axes of counts but the first] -> numbers [..].
    """

    counts: Float[np.ndarray, "images ..."]
    of: Callable[[np.ndarray], Any]

    @property
    def value(self) -> float:
        return float(self.of(self.counts.sum(axis=0)))

    def summary(self, seed: int = 0) -> dict[str, float]:
        """The value, and its interval over images by the bootstrap."""
        return interval(self.value, self.of(resampled(self.counts, seed)))

    def minus(self, other: Score, seed: int = 0) -> dict[str, float]:
        """The difference from another score of the same images, with its interval over images.

        Raises:
          ValueError: another number of images.
        """
        if len(self.counts) != len(other.counts):
            raise ValueError(f"scores of {len(self.counts)} and of {len(other.counts)} images cannot be paired")
        draws = self.of(resampled(self.counts, seed)) - other.of(resampled(other.counts, seed))
        return interval(self.value - other.value, draws)


def mean_of(values: Shaped[np.ndarray, " images"]) -> Score:
    """The mean over images, such as an accuracy of zeros and ones.

    Example:

        mean_of(np.array([True, True, False])).value  # 2 / 3
    """
    counts = np.stack([np.asarray(values, np.float64), np.ones(len(values))], axis=1)
    return Score(counts, lambda sums: sums[..., 0] / sums[..., 1])


def resampled(counts: np.ndarray, seed: int) -> np.ndarray:
    """Sums over images drawn with replacement, [DRAWS, ..]; the same images for the same seed."""
    n = len(counts)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=DRAWS).astype(np.float64)
    return (drawn @ counts.reshape(n, -1)).reshape(DRAWS, *counts.shape[1:])


def interval(value: float, draws: np.ndarray) -> dict[str, float]:
    """The percentiles of the bootstrap; draws in which the score is not defined are left out."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(draws, (tail, 1 - tail)) if np.isfinite(draws).any() else (np.nan, np.nan)
    return {"value": value, "low": float(low), "high": float(high)}

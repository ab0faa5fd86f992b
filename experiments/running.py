"""Statistics of many images in a fixed amount of memory."""

from __future__ import annotations

from typing import Any

import numpy as np

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Running:
    """Moments of a stream of numbers, and an evenly spaced sample of it for pictures and quantiles.

    Mean, standard deviation, minimum and maximum are of everything. The sample holds every k-th number, k doubling
    whenever it would exceed `capacity`: all of them for short streams, and the same for the same stream.
    """

    def __init__(self, capacity: int = 4096):
        self.capacity, self.every = capacity, 1
        self.n, self.mean, self.square = 0, 0.0, 0.0
        self.min, self.max = np.inf, -np.inf
        self.sample: list[float] = []

    def update(self, values: np.ndarray) -> None:
        """Adds numbers, [b]."""
        for value in np.asarray(values, np.float64).tolist():
            if self.n % self.every == 0:
                self.sample.append(value)
                if len(self.sample) > self.capacity:
                    self.sample, self.every = self.sample[::2], 2 * self.every
            self.n += 1
            # Welford's update: a difference of large sums would lose the variance's digits.
            delta = value - self.mean
            self.mean += delta / self.n
            self.square += delta * (value - self.mean)
            self.min, self.max = min(self.min, value), max(self.max, value)

    def result(self) -> dict[str, Any]:
        """n, mean, std (of the population), min, max, quantiles of the sample, and the sample itself."""
        if not self.n:
            return {"n": 0}
        quantiles = dict(zip(map(str, QUANTILES), np.quantile(self.sample, QUANTILES).tolist(), strict=True))
        return {
            "n": self.n,
            "mean": self.mean,
            "std": float(np.sqrt(self.square / self.n)),
            "min": self.min,
            "max": self.max,
            "quantiles": quantiles,
            "sampled_every": self.every,
            "sample": self.sample,
        }

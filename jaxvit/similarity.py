"""Similarity of representations: cosines, and linear CKA of any number of images in a fixed amount of memory.

For centred X [n, d1] and Y [n, d2], linear CKA is ||Y'X||^2 / (||X'X|| ||Y'Y||), Frobenius norms (Kornblith et al.
2019). Where n is not far above d it is inflated: independent X and Y have a CKA well above 0. So a result always
comes with n and d, with the estimate that corrects for it (the unbiased HSIC of Song et al. 2012, as Nguyen et al. 2021
use it), and with the mean of the biased value over all n! pairings of the rows, which has a closed form:

    E ||Y_s' X||^2 = tr(X'X) tr(Y'Y) / (n - 1)        for rows of Y in a random order s
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class CKA(NamedTuple):
    """Linear CKA of n pairs of vectors of d1 and d2 numbers.

    Attributes:
      biased: the usual estimate, in [0, 1].
      unbiased: from unbiased HSICs; about 0 for independent data, may be slightly negative. NaN below 4 pairs.
      null: what `biased` is on average over all orders of the rows of one side.
    """

    n: int
    d1: int
    d2: int
    biased: float
    unbiased: float
    null: float


def cosine(x: Float[Array, "*#batch D"], y: Float[Array, "*#batch D"]) -> Float[Array, "*out"]:
    """Cosine similarity over the last axis; 0 where a vector is zero."""
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return jnp.where(norms > 0, (x * y).sum(-1) / jnp.where(norms > 0, norms, 1), 0)


class StreamingCKA:
    """Linear CKA between several named representations and one `reference`, batch by batch.

    Memory is a few matrices of the sizes of the representations, whatever the number of rows. Accumulates on the host
    in float64. The result equals the direct formulas on all rows at once.

        cka = StreamingCKA()
        for batch in batches:
            cka.update(full, {"patches": patches, "registers": registers})
        cka.results()["patches"].unbiased
    """

    def __init__(self) -> None:
        self.n = 0
        self.origins: dict[str, np.ndarray] = {}
        self.sums: dict[str, dict[str, np.ndarray]] = {}

    def update(self, reference: np.ndarray, others: dict[str, np.ndarray]) -> None:
        """Adds rows: `reference` [b, d1] and each of `others` [b, d2], of the same images in the same order.

        Raises:
          ValueError: numbers of rows that differ, or other names or widths than before; nothing is added.
        """
        for name, rows in others.items():
            if len(rows) != len(reference):
                raise ValueError(f"{name} has {len(rows)} rows, the reference {len(reference)}")
        given = {"reference": reference, **{f"other {name}": rows for name, rows in others.items()}}
        for name, rows in given.items():
            width = self.origins[name].shape if name in self.origins else np.shape(rows)[1:]
            if np.ndim(rows) != 2 or np.shape(rows)[1:] != width:
                raise ValueError(f"{name} has shape {np.shape(rows)}; expected [rows, {', '.join(map(str, width))}]")
        if self.n and set(others) != set(self._names()):
            raise ValueError(f"representations are {sorted(others)}, but were {sorted(self._names())} so far")
        if len(reference) == 0:
            return
        x = self._shifted("reference", reference)
        self._add("reference", moments(x, x))
        for name, rows in others.items():
            y = self._shifted(f"other {name}", rows)
            self._add(f"other {name}", moments(y, y))
            self._add(f"cross {name}", moments(x, y))
        self.n += len(x)

    def _names(self) -> list[str]:
        return [key.removeprefix("other ") for key in self.sums if key.startswith("other ")]

    def _shifted(self, name: str, rows: np.ndarray) -> np.ndarray:
        # CKA does not depend on the origin, but its rounding error does: count from the first batch's mean.
        rows = np.asarray(rows, np.float64)
        return rows - self.origins.setdefault(name, rows.mean(axis=0))

    def _add(self, name: str, new: dict[str, np.ndarray]) -> None:
        sums = self.sums.setdefault(name, {})
        for key, value in new.items():
            sums[key] = sums[key] + value if key in sums else value

    def results(self) -> dict[str, CKA]:
        """The CKA of each representation with the reference."""
        results = {}
        for name in self._names():
            xx, yy, xy = (self.sums[key] for key in ("reference", f"other {name}", f"cross {name}"))
            biased_of, unbiased_of = (
                [hsic(sums, self.n) for sums in (xy, xx, yy)] for hsic in (biased_hsic, unbiased_hsic)
            )
            traces = [total_variance(sums, self.n) for sums in (xx, yy)]
            scale = np.sqrt(biased_of[1] * biased_of[2])
            results[name] = CKA(
                n=self.n,
                d1=xy["xy"].shape[0],
                d2=xy["xy"].shape[1],
                biased=_ratio(*biased_of),
                unbiased=_ratio(*unbiased_of),
                null=float(traces[0] * traces[1] / (self.n - 1) / scale) if self.n > 1 and scale > 0 else float("nan"),
            )
        return results


def moments(x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """The sums over rows from which both HSICs of X and Y follow; additive over batches."""
    xx, yy = (x * x).sum(1), (y * y).sum(1)
    return {
        "x": x.sum(0),
        "y": y.sum(0),
        "xy": x.T @ y,
        "xx": xx.sum(),
        "yy": yy.sum(),
        "x_yy": x.T @ yy,
        "xx_y": xx @ y,
        "xx_yy": xx @ yy,
    }


def total_variance(sums: dict[str, np.ndarray], n: int) -> float:
    """tr(X'X) of the centred X, from the moments of X with itself."""
    return float(sums["xx"] - sums["x"] @ sums["x"] / n)


def biased_hsic(sums: dict[str, np.ndarray], n: int) -> float:
    """||X'Y||^2 of the centred matrices."""
    return float(np.square(sums["xy"] - np.outer(sums["x"], sums["y"]) / n).sum())


def unbiased_hsic(sums: dict[str, np.ndarray], n: int) -> float:
    """HSIC_1 of Song et al. 2012 (equation 5), for linear kernels, in feature space.

    With K = XX', L = YY', both with a zero diagonal:
    [ tr(KL) + 1'K1 1'L1 / ((n - 1)(n - 2)) - 2 1'KL1 / (n - 2) ] / (n (n - 3))
    """
    if n < 4:
        return float("nan")
    x, y, xy = sums["x"], sums["y"], sums["xy"]
    trace = np.square(xy).sum() - sums["xx_yy"]
    total_k, total_l = x @ x - sums["xx"], y @ y - sums["yy"]
    cross = x @ xy @ y - x @ sums["x_yy"] - sums["xx_y"] @ y + sums["xx_yy"]
    return float((trace + total_k * total_l / ((n - 1) * (n - 2)) - 2 * cross / (n - 2)) / (n * (n - 3)))


def _ratio(xy: float, xx: float, yy: float) -> float:
    return xy / float(np.sqrt(xx * yy)) if xx > 0 and yy > 0 else float("nan")

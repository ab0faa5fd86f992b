"""Similarity of representations: cosines, and linear CKA of any number of images in a fixed amount of memory.

For centred X [n, d1] and Y [n, d2], linear CKA is ||Y'X||^2 / (||X'X|| ||Y'Y||), Frobenius norms (Kornblith et al.
2019). Where n is not far above d it is inflated: independent X and Y have a CKA well above 0. So a result always
comes with n and d, with the estimate that corrects for it (the unbiased HSIC of Song et al. 2012, as Nguyen et al. 2021
use it), and with the mean of the biased value over all n! pairings of the rows, which has a closed form:

    E ||Y_s' X||^2 = tr(X'X) tr(Y'Y) / (n - 1)        for rows of Y in a random order s
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Numbers = np.ndarray | np.floating | float
"""One number, or an array of them, for representations with axes in front of their rows."""


class CKA(NamedTuple):
    """Linear CKA of n pairs of vectors of d1 and d2 numbers.

    Attributes:
      biased: the usual estimate, in [0, 1].
      unbiased: from unbiased HSICs; about 0 for independent data, may be slightly negative. NaN below 4 pairs.
      null: what `biased` is on average over all orders of the rows of one side.

    The three are numbers, or arrays [*batch] of representations with axes in front of their rows.
    """

    n: int
    d1: int
    d2: int
    biased: Any
    unbiased: Any
    null: Any


def cosine(x: Float[Array, "*#batch D"], y: Float[Array, "*#batch D"]) -> Float[Array, "*out"]:
    """Cosine similarity over the last axis; 0 where a vector is zero.

    Example:

        cosine(out.cls[:, None], out.patches)  # [B, N]
    """
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return jnp.where(norms > 0, (x * y).sum(-1) / jnp.where(norms > 0, norms, 1), 0)


class StreamingCKA:
    """Linear CKA between several named representations and one `reference`, batch by batch.

    Memory is a few matrices of the sizes of the representations, and no more rows than there are numbers in one,
    whatever the number of rows in all. Accumulates on the host in float64. The result equals the direct
    formulas on all rows at once.

        cka = StreamingCKA()
        for batch in batches:
            cka.update(full, {"patches": patches, "registers": registers})
        cka.results()["patches"].unbiased

    Representations may have axes in front of their rows, [layers, heads, rows, d], the same for all: then there is one
    CKA for each entry of these.

    Example:

        cka = StreamingCKA()
        for batch in jaxvit.stream(paths, model.config, 8):
            found = model(batch.images)
            rows = [np.asarray(a)[batch.valid] for a in (found.cls, found.patches.mean(1))]
            cka.update(rows[0], {"mean patch": rows[1]})
        cka.results()["mean patch"].unbiased  # linear CKA of [CLS] and the mean patch, over all images
    """

    def __init__(self) -> None:
        self.n = 0
        self.waiting: list[dict[str, np.ndarray]] = []  # batches that are not in the sums yet
        self.sizes: dict[str, tuple[int, ...]] = {}
        self.origins: dict[str, np.ndarray] = {}
        self.sums: dict[str, dict[str, np.ndarray]] = {}

    def update(self, reference: np.ndarray, others: Mapping[str, np.ndarray]) -> None:
        """Adds rows: `reference` [*batch, b, d1] and each of `others` [*batch, b, d2], of the same images in the same
        order.

        Raises:
          ValueError: numbers of rows that differ, or other names or sizes than before; nothing is added.
        """
        front, count = np.shape(reference)[:-2], np.shape(reference)[-2:-1]
        for name, rows in others.items():
            if np.shape(rows)[-2:-1] != count:
                raise ValueError(f"{name} has {len_of(rows)} rows, the reference {len_of(reference)}")
        given = {REFERENCE: reference, **others}
        for name, rows in given.items():
            known = self.sizes.get(name, (*front, *np.shape(rows)[-1:]))
            if np.ndim(rows) < 2 or (*np.shape(rows)[:-2], *np.shape(rows)[-1:]) != known:
                axes = ", ".join(map(str, (*known[:-1], "rows", *known[-1:])))
                raise ValueError(f"{name or 'the reference'} has shape {np.shape(rows)}; expected [{axes}]")
        if self.n and given.keys() != self.sizes.keys():
            raise ValueError(f"representations are {sorted(others)}, but were {sorted(self.names)} so far")
        if count == (0,):
            return
        self.sizes = {name: (*front, np.shape(rows)[-1]) for name, rows in given.items()}
        # In one order, which sums depend on to the bit; a file has no other.
        self.waiting.append({name: np.array(rows, order="C") for name, rows in given.items()})
        self.n += count[0]
        if sum(map(len_of, (batch[REFERENCE] for batch in self.waiting))) > max(
            size[-1] for size in self.sizes.values()
        ):
            self._fold()

    @property
    def names(self) -> list[str]:
        """Of the representations that are compared with the reference."""
        return [name for name in self.sizes if name != REFERENCE]

    def _fold(self) -> None:
        """Adds all waiting batches to the sums, as one: many rows at once cost hardly more than few."""
        whole = {name: np.concatenate([batch[name] for batch in self.waiting], axis=-2) for name in self.sizes}
        x = self._shifted(REFERENCE, whole[REFERENCE])
        self._add("reference", moments(x, x))
        for name in self.names:
            y = self._shifted(name, whole[name])
            self._add(f"other {name}", moments(y, y))
            self._add(f"cross {name}", moments(x, y))
        self.waiting = []

    def _folded(self) -> StreamingCKA:
        """The same with all rows in its sums."""
        if not self.waiting:
            return self
        whole = StreamingCKA()
        whole.n, whole.sizes, whole.waiting = self.n, self.sizes, self.waiting
        whole.origins, whole.sums = dict(self.origins), {name: dict(sums) for name, sums in self.sums.items()}
        whole._fold()
        return whole

    def _shifted(self, name: str, rows: np.ndarray) -> np.ndarray:
        # CKA does not depend on the origin, but its rounding error does: count from the mean of the first rows.
        rows = np.asarray(rows, np.float64)
        return rows - self.origins.setdefault(name, rows.mean(axis=-2))[..., None, :]

    def _add(self, name: str, new: dict[str, Any]) -> None:
        sums = self.sums.setdefault(name, {})
        for key, value in new.items():
            sums[key] = sums[key] + value if key in sums else value

    def merge(self, other: StreamingCKA) -> None:
        """Adds the rows that `other` was given, behind these.

        Raises:
          ValueError: representations of other names or sizes; nothing is added.

        Example:

            first.merge(second)  # as if `first` had been given the rows of both
        """
        if not other.n:
            return
        if self.n and other.sizes != self.sizes:
            raise ValueError(f"representations are {other.sizes}, but were {self.sizes} so far")
        mine, more = self._folded(), other._folded()
        self.n, self.sizes, self.waiting = mine.n + more.n, more.sizes, []
        self.origins, self.sums = mine.origins or dict(more.origins), mine.sums
        ends = {f"other {name}": (name, name) for name in more.names} | {"reference": (REFERENCE, REFERENCE)}
        ends |= {f"cross {name}": (REFERENCE, name) for name in more.names}
        for key, (x, y) in ends.items():
            of_x, of_y = (more.origins[name] - self.origins[name] for name in (x, y))
            self._add(key, moved(more.sums[key], of_x, of_y, more.n))

    def mean(self, name: str | None = None) -> np.ndarray:
        """Of a representation over rows, or of the reference, [*batch, d]."""
        whole = self._folded()
        return whole.origins[name or REFERENCE] + whole.sums[_own(name)]["x"] / self.n

    def cross(self, name: str | None = None) -> np.ndarray:
        """X'Y of the centred reference and the representation `name`, or X'X of the reference itself,
        [*batch, d1, d2].
        """
        sums = self._folded().sums
        return centred_cross(sums["reference" if name is None else f"cross {name}"], self.n)

    def covariance(self, name: str | None = None) -> np.ndarray:
        """Y'Y / n of a centred representation, or of the reference, [*batch, d, d]."""
        return centred_cross(self._folded().sums[_own(name)], self.n) / self.n

    def results(self) -> dict[str, CKA]:
        """The CKA of each representation with the reference."""
        results, of = {}, self._folded().sums
        for name in self.names:
            xx, yy, xy = (of[key] for key in ("reference", f"other {name}", f"cross {name}"))
            biased_of, unbiased_of = (
                [hsic(sums, self.n) for sums in (xy, xx, yy)] for hsic in (biased_hsic, unbiased_hsic)
            )
            traces = [total_variance(sums, self.n) for sums in (xx, yy)]
            chance = traces[0] * traces[1] / max(self.n - 1, 1)
            results[name] = CKA(
                n=self.n,
                d1=xy["xy"].shape[-2],
                d2=xy["xy"].shape[-1],
                biased=_ratio(*biased_of),
                unbiased=_ratio(
                    unbiased_of[0],
                    *(_above_rounding(u, b, self.n) for u, b in zip(unbiased_of[1:], biased_of[1:], strict=True)),
                ),
                null=_ratio(chance if self.n > 1 else np.nan * chance, *biased_of[1:]),
            )
        return results

    def state(self) -> dict[str, np.ndarray]:
        """All that was accumulated, as arrays by name, for `restore`."""
        arrays = {f"sizes/{name}": np.asarray(size) for name, size in self.sizes.items()}
        for i, batch in enumerate(self.waiting):
            arrays |= {f"waiting {i}/{name}": rows for name, rows in batch.items()}
        arrays |= {f"origins/{name}": value for name, value in self.origins.items()}
        for name, sums in self.sums.items():
            arrays |= {f"sums {key}/{name}": value for key, value in sums.items()}
        return arrays | {"n": np.asarray(self.n)}

    @classmethod
    def restore(cls, state: Mapping[str, np.ndarray]) -> StreamingCKA:
        """One that goes on where `state` was taken, to the same bit."""
        cka, waiting = cls(), {}
        cka.n = int(state["n"])
        for path, value in state.items():
            kind, _, name = path.partition("/")
            kind, _, part = kind.partition(" ")
            if kind == "sizes":
                cka.sizes[name] = tuple(np.asarray(value).tolist())
            elif kind == "origins":
                cka.origins[name] = value
            elif kind == "waiting":
                waiting.setdefault(int(part), {})[name] = value
            elif kind == "sums":
                cka.sums.setdefault(name, {})[part] = value
        cka.waiting = [waiting[i] for i in sorted(waiting)]
        return cka


REFERENCE = ""
"""Its name among the representations."""


def _own(name: str | None) -> str:
    """Where the moments of a representation with itself are, or those of the reference."""
    return "reference" if name is None else f"other {name}"


def len_of(rows: np.ndarray) -> int:
    return np.shape(rows)[-2] if np.ndim(rows) > 1 else 0


def moments(x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    """The sums over rows, [*batch, rows, d], from which both HSICs of X and Y follow; additive over batches of rows."""
    xx, yy = (x * x).sum(-1), (y * y).sum(-1)
    xt = x.swapaxes(-1, -2)
    return {
        "x": x.sum(-2),
        "y": y.sum(-2),
        "xy": xt @ y,
        "xx": xx.sum(-1),
        "yy": yy.sum(-1),
        "x_yy": (xt @ yy[..., None])[..., 0],
        "xx_y": (xx[..., None, :] @ y)[..., 0, :],
        "xx_yy": (xx * yy).sum(-1),
    }


def moved(sums: dict[str, Any], a: np.ndarray, b: np.ndarray, n: int) -> dict[str, Any]:
    """The `moments` of X + a and Y + b, from those of n rows of X and Y."""
    x, y, xy = sums["x"], sums["y"], sums["xy"]
    dot = lambda u, v: (u * v).sum(-1)  # noqa: E731
    wide = lambda of: np.asarray(of)[..., None]  # noqa: E731
    aa, bb, ax, by = dot(a, a), dot(b, b), dot(a, x), dot(b, y)
    xyb, axy = (xy @ b[..., None])[..., 0], (a[..., None, :] @ xy)[..., 0, :]
    shift_x, shift_y = sums["xx"] + 2 * ax + n * aa, sums["yy"] + 2 * by + n * bb
    return {
        "x": x + n * a,
        "y": y + n * b,
        "xy": xy
        + a[..., :, None] * y[..., None, :]
        + x[..., :, None] * b[..., None, :]
        + n * wide(a) * b[..., None, :],
        "xx": shift_x,
        "yy": shift_y,
        "x_yy": sums["x_yy"] + 2 * xyb + wide(bb) * x + a * wide(shift_y),
        "xx_y": sums["xx_y"] + 2 * axy + wide(aa) * y + b * wide(shift_x),
        "xx_yy": sums["xx_yy"]
        + 2 * dot(b, sums["xx_y"])
        + bb * sums["xx"]
        + 2 * dot(a, sums["x_yy"])
        + 4 * dot(axy, b)
        + 2 * bb * ax
        + aa * shift_y,
    }


def centred_cross(sums: dict[str, np.ndarray], n: int) -> np.ndarray:
    """X'Y of the centred matrices."""
    return sums["xy"] - sums["x"][..., :, None] * sums["y"][..., None, :] / n


def total_variance(sums: dict[str, np.ndarray], n: int) -> Numbers:
    """tr(X'X) of the centred X, from the moments of X with itself."""
    return sums["xx"] - np.square(sums["x"]).sum(-1) / n


def biased_hsic(sums: dict[str, np.ndarray], n: int) -> Numbers:
    """||X'Y||^2 of the centred matrices."""
    return np.square(centred_cross(sums, n)).sum((-1, -2))


def unbiased_hsic(sums: dict[str, np.ndarray], n: int) -> Numbers:
    """HSIC_1 of Song et al. 2012 (equation 5), for linear kernels, in feature space.

    With K = XX', L = YY', both with a zero diagonal:
    [ tr(KL) + 1'K1 1'L1 / ((n - 1)(n - 2)) - 2 1'KL1 / (n - 2) ] / (n (n - 3))
    """
    x, y, xy = sums["x"], sums["y"], sums["xy"]
    if n < 4:
        return np.full(np.shape(sums["xx"]), np.nan)
    trace = np.square(xy).sum((-1, -2)) - sums["xx_yy"]
    total_k, total_l = np.square(x).sum(-1) - sums["xx"], np.square(y).sum(-1) - sums["yy"]
    through = (x[..., None, :] @ xy @ y[..., None])[..., 0, 0]
    cross = through - (x * sums["x_yy"]).sum(-1) - (sums["xx_y"] * y).sum(-1) + sums["xx_yy"]
    return (trace + total_k * total_l / ((n - 1) * (n - 2)) - 2 * cross / (n - 2)) / (n * (n - 3))


def _above_rounding(unbiased: Numbers, biased: Numbers, n: int) -> Numbers:
    """An unbiased HSIC of rows with themselves, or 0 where it is but the rounding error of its sums: rows that are all
    the same, or all but one.
    """
    return np.where((biased > 0) & (n * (n - 3) * np.abs(unbiased) > 1e-12 * np.abs(biased)), unbiased, 0)


def _ratio(xy: Numbers, xx: Numbers, yy: Numbers) -> Any:
    """A float, or an array with axes; NaN where a representation does not vary."""
    fine = (xx > 0) & (yy > 0)
    ratio = np.where(fine, xy / np.sqrt(np.where(fine, xx * yy, 1)), np.nan)
    return ratio if ratio.ndim else float(ratio)

"""Means and variances of activations over any number of images: what controls put in place of a token."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float
from safetensors.numpy import save_file

from jaxvit.io import parallel
from jaxvit.io.batches import Images, batches_of, spread_batches
from jaxvit.io.checkpoint import CheckpointError, SafetensorsFile, replacing_file
from jaxvit.io.progress import track
from jaxvit.model.layers import wide_dtype
from jaxvit.model.run import each_layer
from jaxvit.model.sites import ATTENTION_SITES, Take, check_sites
from jaxvit.model.tokens import TokenLayout
from jaxvit.model.vit import ViT


class ActivationStats:
    """Mean and variance of each channel, by layer and group of tokens; each patch counts as one value of its group.

    stats = ActivationStats.collect(model, jaxvit.stream(paths, model.config, 8), sites=("resid_pre",))
    stats.save("stats.safetensors")
    stats.mean("resid_pre")  # [L, 1, G, D]

    Batches are summed in float64 on the host, by Chan's formula: no digits are lost to large means.

    Attributes:
      count: [G], values seen of each group.
      means, squares: site -> [L, G, ..], the mean, and the sum of squared differences from it.

    Example:

        stats = ActivationStats.collect(model, jaxvit.stream(paths, model.config, 8), ["resid_pre", "z"])
        stats.means["resid_pre"]  # [L, G, D]
        edits = replace_by_mean(model, "resid_pre", stats, layers=-1, tokens="registers")
    """

    def __init__(self) -> None:
        self.count = np.zeros(0)
        self.means: dict[str, np.ndarray] = {}
        self.squares: dict[str, np.ndarray] = {}

    @classmethod
    def collect(
        cls,
        model: ViT,
        images: Images,
        sites: str | Iterable[str] = ("resid_pre",),
        mesh: Mesh | None = None,
        progress: bool = True,
    ) -> ActivationStats:
        """Runs the model over images and measures these sites.

        Args:
          images: as of `jaxvit.stream`, or arrays [B, H, W, 3].
          sites: one or several, of those with one axis of tokens.
          mesh: of `jaxvit.parallel.mesh`; each batch is spread over its devices. With several processes `images` are
            those of this process, and all have the statistics of all images.

        Raises:
          ValueError: no image, an unknown site, or one of attention, which has no single axis of tokens; processes with
            the same images.
        """
        sites = (sites,) if isinstance(sites, str) else tuple(sites)
        check_sites(sites)
        if wrong := sorted(set(sites) & set(ATTENTION_SITES)):
            raise ValueError(
                f"no statistics of {', '.join(map(repr, wrong))}: they are for sites with one axis of tokens"
            )
        stats = cls()
        model, mesh = parallel.working(model, mesh)
        batches = track(batches_of(images), "statistics", enabled=progress)
        for _, batch, valid in spread_batches(batches, mesh):
            layout = model.config.layout(*batch.shape[1:3])
            found = _moments(model, batch, valid, sites, layout)
            stats.add(valid.sum() * layout.membership.sum(0, dtype=np.float64), *parallel.fetch(found))
        if not stats.count.size:
            raise ValueError("no images to take statistics of")
        if mesh is None or jax.process_count() == 1:
            return stats
        whole = cls()
        for each in parallel.gather({"count": stats.count, "means": stats.means, "squares": stats.squares}):
            whole.add(each["count"], each["means"], each["squares"])
        return whole

    def add(self, count: np.ndarray, means: dict[str, np.ndarray], squares: dict[str, np.ndarray]) -> None:
        """Adds a batch's count, mean and sum of squared differences."""
        if not self.count.size:
            self.count = np.zeros_like(count)
        total = self.count + count
        share = np.divide(count, total, out=np.zeros_like(total), where=total > 0)
        for site, new in means.items():
            wide, weight = np.asarray(new, np.float64), share.reshape(-1, *[1] * (new.ndim - 2))
            old = self.means.setdefault(site, np.zeros_like(wide))
            between = np.square(wide - old) * weight * self.count.reshape(weight.shape)
            self.squares[site] = self.squares.get(site, 0) + np.asarray(squares[site], np.float64) + between
            self.means[site] = old + (wide - old) * weight
        self.count = total

    def mean(self, site: str) -> Float[Array, "L 1 G *channels"]:
        """The mean over the values seen.

        Raises:
          ValueError: no statistics of this site.
        """
        return jnp.asarray(self._of(self.means, site)[:, None], float)

    def variance(self, site: str) -> Float[Array, "L 1 G *channels"]:
        """The variance over the values seen: the sum of squared differences, divided by their number.

        Raises:
          ValueError: no statistics of this site.
        """
        squares = self._of(self.squares, site)
        count = np.maximum(self.count, 1).reshape(-1, *[1] * (squares.ndim - 2))
        return jnp.asarray((squares / count)[:, None], float)

    def noise(
        self, site: str, rng: Array, batch: int, layout: TokenLayout | None = None
    ) -> Float[Array, "L B T *axes"]:
        """Gaussian noise with this mean and variance.

        Each image gets its own draw for each token of `layout`. Without a layout there is one draw for each group of
        tokens, and the axis T has size G.

        Raises:
          ValueError: no statistics of this site.
        """
        mean, deviation = self.mean(site), jnp.sqrt(self.variance(site))
        if layout is not None:
            mean, deviation = (jnp.take(a, jnp.asarray(layout.groups), axis=2) for a in (mean, deviation))
        draw = jax.random.normal(rng, (mean.shape[0], batch, *mean.shape[2:]), mean.dtype)
        return mean + deviation * draw

    def _of(self, kind: dict[str, np.ndarray], site: str) -> np.ndarray:
        if site not in kind:
            raise ValueError(f"no statistics of {site!r}; there are {', '.join(kind) or 'none'}")
        return kind[site]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, all or nothing."""
        tensors = {"count": self.count}
        for site in self.means:
            tensors |= {f"mean.{site}": self.means[site], f"squares.{site}": self.squares[site]}
        with replacing_file(Path(path)) as temporary:
            save_file({name: np.ascontiguousarray(a) for name, a in tensors.items()}, temporary)
            temporary.chmod(0o644)  # safetensors makes its files private

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ActivationStats:
        """Reads what `save` wrote.

        Raises:
          CheckpointError: not such a file.
        """
        file = SafetensorsFile(Path(path))
        sites = [name.removeprefix("mean.") for name in file if name.startswith("mean.")]
        if sorted(file) != sorted(["count", *(f"{kind}.{site}" for kind in ("mean", "squares") for site in sites)]):
            raise CheckpointError(f"{path} holds no activation statistics: its tensors are {', '.join(file) or 'none'}")
        stats = cls()
        stats.count = file["count"]
        stats.means = {site: file[f"mean.{site}"] for site in sites}
        stats.squares = {site: file[f"squares.{site}"] for site in sites}
        for site in sites:
            shape, groups = stats.means[site].shape, stats.count.shape
            if stats.squares[site].shape != shape or shape[1:2] != groups:
                raise CheckpointError(
                    f"{path} holds no activation statistics: mean, squares and count of {site!r} have shapes "
                    f"{list(shape)}, {list(stats.squares[site].shape)} and {list(groups)}"
                )
        return stats


@partial(jax.jit, static_argnames=("sites", "layout"))
def _moments(model: ViT, images: Array, valid: Array, sites: tuple[str, ...], layout: TokenLayout) -> Any:
    """Site -> mean, and sum of squared differences from it, [L, G, ..]; one layer after another."""
    dtype = wide_dtype(model.dtype)  # in half precision a sum over a thousand patches would have two digits
    membership = jnp.asarray(layout.membership, dtype)
    weight = jnp.asarray(valid, dtype)[:, None, None] * membership[None]  # B T G
    count = jnp.maximum(weight.sum((0, 1)), 1)
    precise = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    def of_layer(trace: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
        means, squares = {}, {}
        for site, x in trace.items():
            # The barrier makes these the rounded numbers of the stream, and not what they were before.
            flat = jax.lax.collapse(jax.lax.optimization_barrier(x), 2).astype(dtype)
            mean = precise("BTG,BTX->GX", weight, flat) / count[:, None]
            square = precise("BTG,BTX->GX", weight, jnp.square(flat - precise("TG,GX->TX", membership, mean)[None]))
            means[site], squares[site] = (a.reshape(len(count), *x.shape[2:]) for a in (mean, square))
        return means, squares

    return each_layer(model, images, of_layer, {site: Take(tokens="all") for site in sites})

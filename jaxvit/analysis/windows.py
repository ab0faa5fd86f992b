"""Dense features of large pictures: windows that overlap, each run by itself, blended.

A model trained at 224 or 518 pixels sees a picture of 2000 pixels as one of many more tokens than it knows, and the
cost of attention grows with the square of their number. Windows keep both as they were. What a window cannot do is look
outside: features at its edge lack their neighbourhood, and [CLS] and the registers differ from window to window. So
blended features equal those of the whole picture only where nothing is exchanged between patches.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxvit.analysis.readouts import Readout, axes_of, check_fits, parsed, read_stream
from jaxvit.model.config import both_sides
from jaxvit.model.sites import ATTENTION_SITES
from jaxvit.model.vit import ViT


@dataclass(frozen=True)
class Windows:
    """How pictures are cut.

    Attributes:
      size: pixels of a window, one number or (height, width), multiples of the patch; smaller pictures are one window.
      overlap: of neighbouring windows, as a part of their side: 0 to less than 1.
      positions: which ones patches get: "window", those of a picture of the window's size, or "whole", their own in the
        whole picture. Rotary positions are always those of the window.

    Example:

        Windows(518, overlap=0.25)  # squares of 518 pixels, each a quarter over the next
    """

    size: int | tuple[int, int]
    overlap: float | int = 0.5
    positions: str = "window"

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap is {self.overlap}; expected 0 to less than 1")
        if self.positions not in ("window", "whole"):
            raise ValueError(f"positions is {self.positions!r}; expected 'window' or 'whole'")

    def places(self, grid: tuple[int, int], patch: int) -> tuple[tuple[int, int], list[tuple[int, int]]]:
        """Rows and columns of patches of a window, and where windows start, in patches.

        Raises:
          ValueError: sides that are no multiples of the patch.
        """
        sides = both_sides(self.size, "size of windows")
        if any(side % patch or side < patch for side in sides):
            raise ValueError(
                f"windows of {sides[0]}x{sides[1]} pixels; expected multiples of the patch, {patch} pixels"
            )
        shape = (min(sides[0] // patch, grid[0]), min(sides[1] // patch, grid[1]))
        starts = []
        for n, w in zip(grid, shape, strict=True):
            step = max(round(w * (1 - self.overlap)), 1)
            starts.append([*range(0, n - w, step), n - w])  # the last ends where the picture ends
        return shape, [(row, column) for row in starts[0] for column in starts[1]]


def read_windows(
    model: ViT,
    images: Float[Array, "B H W C"],
    take: str | Readout | Iterable[str | Readout],
    windows: Windows,
) -> dict[str, Array]:
    """`jaxvit.read_out` of patches, window by window, blended.

    A patch that several windows hold gets the mean of what they give, weighted by its distance from the window's edge.

    Args:
      images: normalised, as from `jaxvit.prepare(.., crop=False)`.
      take: readouts of patches: "patches", "patches@[3,-1]:normed:grid", "resid_mid@5:patches", "patch_mean".

    Returns:
      name -> [B, ..], as `jaxvit.read_out`, of all patches of the picture.

    Raises:
      ValueError: a readout of anything else, or sizes that do not fit.

    Example:

        images = jaxvit.prepare("large.jpg", model.config, crop=False)
        jaxvit.read_windows(model, images, "patches:grid", jaxvit.Windows(518))  # [1, rows, columns, D]
    """
    readouts = parsed(take)
    check_fits(readouts, model)
    check_dense(readouts)
    grid = model.check_images(images)
    shape, places = windows.places(grid, model.config.patch)
    dense = tuple(replace(each, mean=False, grid=True) for each in readouts)
    weights = np.multiply.outer(*(np.minimum(np.arange(1, n + 1), np.arange(n, 0, -1)) for n in shape))
    weights, total = jnp.asarray(weights / weights.max(), model.dtype), jnp.zeros(grid, model.dtype)
    entering = model.embed(images) if windows.positions == "whole" else images
    sums: dict[str, Array] = {}
    for place in places:
        start = np.asarray(place)
        found = _window(model, entering, start, readouts=dense, shape=shape, grid=grid, positions=windows.positions)
        for each in dense:
            at, value = axes_of(each).index("row"), found[each.name]
            if each.name not in sums:
                sums[each.name] = jnp.zeros((*value.shape[:at], *grid, *value.shape[at + 2 :]), value.dtype)
            sums[each.name] = _added(sums[each.name], value, weights, start, at=at)
        total = _added(total, jnp.ones_like(weights), weights, start, at=0)
    return {each.name: _finished(sums[each.name], total, readout=each) for each in readouts}


def check_dense(readouts: Iterable[Readout]) -> None:
    """Raises a ValueError for readouts that are not of patches."""
    for each in readouts:
        if each.whole or each.tokens != "patches" or each.site in ATTENTION_SITES:
            raise ValueError(f"{each.text!r}: windows give features of patches alone, such as patches@-1:normed")


@partial(jax.jit, static_argnames=("readouts", "shape", "grid", "positions"))
def _window(
    model: ViT,
    entering: Array,
    start: Array,
    *,
    readouts: tuple[Readout, ...],
    shape: tuple[int, int],
    grid: tuple[int, int],
    positions: str,
) -> dict[str, Array]:
    """What is read in the window that begins at patch `start`, of the images or of the whole stream."""
    B, patch, prefix = len(entering), model.config.patch, model.config.prefix
    if positions == "window":
        sizes = (B, shape[0] * patch, shape[1] * patch, entering.shape[-1])
        pixels = jax.lax.dynamic_slice(entering, (0, start[0] * patch, start[1] * patch, 0), sizes)
        return read_stream(model, model.embedding(pixels), readouts, shape)
    patches = entering[:, prefix:].reshape(B, *grid, -1)
    cut = jax.lax.dynamic_slice(patches, (0, start[0], start[1], 0), (B, *shape, patches.shape[-1]))
    stream = jnp.concatenate([entering[:, :prefix], cut.reshape(B, -1, cut.shape[-1])], axis=1)
    return read_stream(model, stream, readouts, shape)


@partial(jax.jit, static_argnames="at")
def _added(whole: Array, value: Array, weights: Array, start: Array, *, at: int) -> Array:
    """The sum with a weighted window in its place; rows and columns are axes `at` and `at + 1`."""
    corner: list[int | Array] = [0] * value.ndim
    corner[at : at + 2] = [start[0], start[1]]
    there = jax.lax.dynamic_slice(whole, corner, value.shape)
    return jax.lax.dynamic_update_slice(whole, there + value * along(weights, at, value.ndim), corner)


@partial(jax.jit, static_argnames="readout")
def _finished(value: Array, total: Array, *, readout: Readout) -> Array:
    """The mean over windows, laid out as the readout wants it."""
    at = axes_of(replace(readout, mean=False, grid=True)).index("row")
    value = value / along(total, at, value.ndim)
    if readout.grid:
        return value
    value = value.reshape(*value.shape[:at], -1, *value.shape[at + 2 :])
    return value.mean(at) if readout.mean else value


def along(a: Array, at: int, ndim: int) -> Array:
    """[rows, columns] as two axes among ones."""
    return a.reshape((1,) * at + a.shape + (1,) * (ndim - at - 2))

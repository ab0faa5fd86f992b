"""Pillow's bicubic resize as a JAX program, bit for bit (libImaging/Resample.c): another antialiased bicubic moves
pixels by a few grey levels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

_BITS = 22  # fractional bits of Pillow's fixed-point weights for 8-bit images


def resize(
    image: UInt8[np.ndarray | Array, "height width 3"],
    size: tuple[int, int],
    crop: tuple[int, int, int, int] | None = None,
) -> UInt8[Array, "rows columns 3"]:
    """Pillow's `resize(.., Image.BICUBIC)` inside a JAX program, equal in every bit.

    The order of the two passes is Pillow 13's. Earlier versions always take the horizontal one first, and so differ in
    some pixels, mostly by one grey level, where a picture more than twice as tall as wide is shrunk in proportion.

    Use it for pixels that are on the device already, inside `jax.jit` and `jax.vmap`. Each pair of sizes is a program
    of its own: for photographs of many sizes use `prepare` or `stream`, in which Pillow itself resizes. It rounds to
    whole grey levels, so it has no gradient; `jax.image.resize` has one.

    Args:
      image: RGB pixels.
      size: (height, width) of the whole resized image, in pixels.
      crop: (top, left, height, width), the window of the resized image to compute; default: all of it.

    Raises:
      ValueError: if the image is not uint8 [H, W, 3] with at least one pixel, a side of the result is not positive, or
        the window is empty or reaches outside `size`.

    Example:

        small = jax.jit(jax.vmap(lambda image: jaxvit.resize(image, (224, 224))))(frames)  # uint8 [B, 224, 224, 3]
    """
    pixels: Any = image if isinstance(image, jax.Array) else np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        found = f"an array of {pixels.dtype} {list(pixels.shape)}"
        raise ValueError(f"expected uint8 pixels [height, width, 3], got {found}; use jaxvit.decode")
    top, left, height, width = crop or (0, 0, *size)
    if min(size) < 1:
        raise ValueError(f"the resized image cannot be of size (height, width) {size}; sides must be at least 1")
    if min(top, left) < 0 or min(height, width) < 1 or top + height > size[0] or left + width > size[1]:
        raise ValueError(f"crop (top, left, height, width) {crop} must lie inside the resized image, {size}")
    rows, *vertical = _taps(pixels.shape[0], size[0], top, height)
    columns, *horizontal = _taps(pixels.shape[1], size[1], left, width)
    # Pillow takes the vertical pass first where that leaves less to do, and rounds after each pass: order matters.
    lost_rows, lost_columns = pixels.shape[0] - size[0], pixels.shape[1] - size[1]
    vertical_first = lost_rows > max(0, 2 * lost_columns)
    return _resample(pixels[rows, columns], horizontal, vertical, vertical_first)


def _taps(source: int, target: int, start: int, length: int) -> tuple[slice, np.ndarray, np.ndarray]:
    """For outputs start .. start + length - 1 of a side: the slice of the source they read, and how.

    How: indices into that slice and fixed-point weights, both int32 [taps, length]. Where the side does not change, the
    weights are those of the identity. Floating-point operations are in the order of Pillow's `precompute_coeffs`.
    """
    scale = source / target
    stretch = max(scale, 1.0)
    center = (np.arange(start, start + length) + 0.5) * scale
    low = np.maximum(center - 2 * stretch + 0.5, 0).astype(np.int64)
    high = np.minimum((center + 2 * stretch + 0.5).astype(np.int64), source)

    index = low + np.arange((high - low).max())[:, None]
    x = np.abs((index - center + 0.5) * (1 / stretch))
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    weight = np.where(index < high, np.where(x < 1, near, np.where(x < 2, far, 0.0)), 0.0)
    weight /= np.cumsum(weight, axis=0)[-1]  # not np.sum, which adds in another order
    weight = weight * 2**_BITS + np.copysign(0.5, weight)  # the cast truncates: halves are rounded away from zero

    first, last = int(low.min()), int(high.max())
    index = np.minimum(index, last - 1) - first
    return slice(first, last), index.astype(np.int32), weight.astype(np.int32)


@partial(jax.jit, static_argnames="vertical_first")
def _resample(image: Array, horizontal: Sequence[Array], vertical: Sequence[Array], vertical_first: bool) -> Array:
    for axis in (0, 1) if vertical_first else (1, 0):
        # A pass gathers along its first axis: whole rows of memory, which is what makes it fast on a CPU.
        image = _pass(image.swapaxes(0, axis), *(vertical, horizontal)[axis]).swapaxes(0, axis)
    return image


def _pass(source: Array, index: Array, weight: Array) -> Array:
    flat = source.reshape(len(source), -1)

    def add_tap(total: Array, tap: tuple[Array, Array]) -> tuple[Array, None]:
        index, weight = tap
        pixels = flat.at[index].get(mode="promise_in_bounds").astype(jnp.int32)
        return total + weight[:, None] * pixels, None

    half = jnp.full((index.shape[1], flat.shape[1]), 1 << (_BITS - 1), jnp.int32)
    total, _ = jax.lax.scan(add_tap, half, (index, weight), unroll=4)
    return jnp.clip(total >> _BITS, 0, 255).astype(jnp.uint8).reshape(-1, *source.shape[1:])

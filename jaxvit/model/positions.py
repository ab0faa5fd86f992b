"""Positions: those learned on one grid of patches, brought to another; and rotary ones, computed for any grid.

Every rule in use is linear and separable, so it is two small matrices, one per axis, computed in float64. Three rules
are needed, because the libraries that publish the same checkpoints do not agree:

  rule                kernel             antialiased   sample i of n, from 0 .. N - 1   who
  bicubic_antialias   cubic, a = -0.5    yes           (i + 1/2) N/n - 1/2              timm; DINOv2 with registers
  bicubic             cubic, a = -0.75   no            (i + 1/2) N/n - 1/2              transformers' DINOv2, CLIP
  bicubic_offset      cubic, a = -0.75   no            (i + 1/2) N/(n + 0.1) - 1/2      DINO, DINOv2's own code

All three are what `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)` computes: with
`antialias=True`, with `size=`, and with `scale_factor=(n + 0.1) / N`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float

from jaxvit.model.config import Resampling, Rope
from jaxvit.model.layers import wide_dtype


def cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel: 1 at 0, 0 at the other integers and outside (-2, 2)."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def resampling_matrix(n_in: int, n_out: int, rule: Resampling) -> np.ndarray:
    """[n_out, n_in] float64, rows summing to 1: multiply a signal of n_in samples by it to get n_out samples."""
    out, source = np.arange(n_out)[:, None], np.arange(n_in)
    if rule == "bicubic_antialias":  # the kernel is stretched when shrinking, cut off at the border, and renormalised
        scale = n_in / n_out
        stretch = max(scale, 1.0)
        weights = cubic((source + 0.5 - (out + 0.5) * scale) / stretch, a=-0.5)
        return weights / weights.sum(axis=1, keepdims=True)
    ratio = (n_out + 0.1) / n_in if rule == "bicubic_offset" else n_out / n_in
    center = (out + 0.5) / ratio - 0.5
    taps = np.floor(center).astype(int) + np.arange(-1, 3)  # [n_out, 4]; taps beyond the border read the border
    matrix = np.zeros((n_out, n_in))
    np.add.at(matrix, (out, taps.clip(0, n_in - 1)), cubic(center - taps, a=-0.75))
    return matrix


def resample_positions(
    positions_hwD: Float[Array, "h w D"], grid: tuple[int, int], rule: Resampling
) -> Float[Array, "h2 w2 D"]:
    """Positions for a grid of another size; on their own grid they are returned unchanged.

    Computed in at least float32, and returned so: the sum with the tokens is what is rounded.
    """
    if positions_hwD.shape[:2] == grid:
        return positions_hwD
    wide = positions_hwD.astype(wide_dtype(positions_hwD.dtype))
    rows, columns = (
        jnp.asarray(resampling_matrix(n_in, n_out, rule), wide.dtype)
        for n_in, n_out in zip(positions_hwD.shape[:2], grid, strict=True)
    )
    return jnp.einsum("ih,hwd,jw->ijd", rows, wide, columns, precision=jax.lax.Precision.HIGHEST)


def rope_periods(head_size: int, base: float, rounded: Rope) -> np.ndarray:
    """[d / 4] float64: base^(2 j / (d / 2)), as the type that checkpoints keep them in has them."""
    periods = (base ** (np.arange(head_size // 4) / (head_size // 4))).astype(np.float32)
    return (periods.astype(ml_dtypes.bfloat16) if rounded == "bfloat16" else periods).astype(np.float64)


def rope_angles(grid: tuple[int, int], periods: np.ndarray) -> np.ndarray:
    """[N, d / 2] float64: the angle by which each plane of a patch's queries and keys is rotated.

    The first half of the planes rotates with the row of the patch's centre, the second with its column, both measured
    from -1 to 1 over the image (DINOv3: `RopePositionEmbedding` with normalize_coords="separate").
    """
    rows, columns = (2 * (np.arange(n) + 0.5) / n - 1 for n in grid)
    centres = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)
    return (2 * np.pi * centres[:, :, None] / periods).reshape(len(centres), -1)


def rotary(
    grid: tuple[int, int], head_size: int, base: float, rounded: Rope, prefix: int
) -> Callable[[Float[Array, "B T H d"]], Float[Array, "B T H d"]]:
    """`apply_rope`, which rotates plane j of a patch's query or key: its entries j and j + d / 2. The tokens before the
    patches stay as they are. It takes the first tokens alone too. Computed in at least float32 and rounded once.
    """
    angles = rope_angles(grid, rope_periods(head_size, base, rounded))
    still = np.zeros((prefix, angles.shape[1]))
    cos, sin = (np.tile(f(np.concatenate([still, angles])), 2) for f in (np.cos, np.sin))

    def apply_rope(x_BTHd: Array) -> Array:
        x = x_BTHd.astype(wide_dtype(x_BTHd.dtype))
        first, second = jnp.split(x, 2, axis=-1)
        c, s = (jnp.asarray(a[: x.shape[1]], x.dtype)[None, :, None] for a in (cos, sin))
        return (x * c + jnp.concatenate([-second, first], axis=-1) * s).astype(x_BTHd.dtype)

    return apply_rope

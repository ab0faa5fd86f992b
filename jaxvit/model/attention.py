"""Attention. Weights are written out where somebody reads or edits them; elsewhere a fused form may be used.

Which form XLA computes depends on the platform a program is lowered for, never on the machine that traces it. cuDNN's
kernel is chosen by the argument `attention`. Axes as in `jaxvit.model.vit`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from jaxvit.model.config import ViTConfig
from jaxvit.model.edits import times
from jaxvit.model.layers import Linear, Norm, identity, make_norm, wide_dtype
from jaxvit.model.tap import KnockoutFactor, Tap

Rope = Callable[[Array], Array]
"""Rotates queries or keys [B, T, H, d] by their position."""

Form = Literal["auto", "xla", "cudnn", "cpu"]
"""A `Kernel`, or `cpu` in a program, or a part of one, that is for a CPU."""
Kernel = Literal["auto", "xla", "cudnn"]
"""How attention is computed where nobody reads or edits its weights.

`xla`: JAX operations, on every platform. `cudnn`: NVIDIA's flash attention, in half precision; an error elsewhere.
`auto`: cuDNN in programs for NVIDIA GPUs where it can be used, `xla` everywhere else.
"""


class Attention(nnx.Module):
    def __init__(self, c: ViTConfig, rngs: nnx.Rngs):
        # One matrix product for all three, whose heads are an axis that can be sharded.
        self.qkv: Linear = Linear(c.width, (3, c.heads, c.head_size), c.qkv_bias, rngs)
        self.q_norm: Norm = make_norm(c, c.head_size, c.qk_norm)
        self.k_norm: Norm = make_norm(c, c.head_size, c.qk_norm)
        self.norm: Norm = make_norm(c, c.width, c.branch_norms)
        self.proj: Linear = Linear((c.heads, c.head_size), c.width, c.proj_bias, rngs)

    def __call__(
        self, x_BTD: Array, tap: Tap, apply_rope: Rope = identity, kernel: Form = "auto", rows: int | None = None
    ) -> Array:
        """[B, T, D], or [B, rows, D]: of the first query rows alone."""
        if rows is None:
            q, k, v = jnp.unstack(by_rows(self.qkv, x_BTD, kernel), axis=2)
        else:
            kernel = "cpu" if kernel == "cpu" else "xla"  # few rows are written out in no time, and cuDNN asks for many
            (q,) = jnp.unstack(self.qkv(x_BTD[:, :rows], slice(0, 1)), axis=2)
            k, v = jnp.unstack(by_rows(lambda x: self.qkv(x, slice(1, 3)), x_BTD, kernel), axis=2)
        q, k, v = tap("q", apply_rope(self.q_norm(q))), tap("k", apply_rope(self.k_norm(k))), tap("v", v)
        z_BTHd = tap("z", attend(q, k, v, tap, kernel))
        if self.norm is not identity:
            z_BTHd = self.norm(jax.lax.collapse(z_BTHd, 2)).reshape(z_BTHd.shape)
        return by_rows(self.proj, z_BTHd, kernel)


def by_rows(function: Callable[[Array], Array], x_BTD: Array, kernel: Form) -> Array:
    """A function of each token. Of one image on a CPU: in two halves, which are computed at the same time."""
    B, T = x_BTD.shape[:2]
    if kernel != "cpu" or B > 1 or T < 128:
        return function(x_BTD)
    return joined([function(x_BTD[:, part]) for part in cuts(T, 2)], axis=1)


def attend(q_BQHd: Array, k_BTHd: Array, v_BTHd: Array, tap: Tap, kernel: Form) -> Array:
    """[B, Q, H, d]. Only rows whose weights are read or edited are written out."""
    Q, T = q_BQHd.shape[1], k_BTHd.shape[1]
    rows = tap.explicit_rows(Q)
    outputs = []
    if rows:
        scores = tap("scores", scaled_scores(q_BQHd[:, :rows], k_BTHd))
        pattern = tap("pattern", softmax(scores, np.arange(rows), tap.knockout_factor(0, T)))
        outputs.append(jnp.einsum("BHQT,BTHd->BQHd", pattern.astype(v_BTHd.dtype), v_BTHd))
    if rows < Q:
        factor = tap.knockout_factor(rows, T)
        outputs.append(fused_attention(q_BQHd[:, rows:], k_BTHd, v_BTHd, rows, factor, kernel))
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)


def scaled_scores(q_BQHd: Array, k_BTHd: Array) -> Array:
    """[B, H, Q, T] in at least float32: in half precision a softmax over hundreds of tokens would not sum to 1."""
    scaled = q_BQHd * q_BQHd.shape[-1] ** -0.5
    return jnp.einsum("BQHd,BTHd->BHQT", scaled, k_BTHd, preferred_element_type=wide_dtype(q_BQHd.dtype))


def exponentials(scores_BHQT: Array, rows: Array | np.ndarray, factor: KnockoutFactor | None) -> tuple[Array, Array]:
    """exp(scores - the row's maximum) times the knock-outs' factor; and their sums [B, H, Q, 1], 1 where these are 0.

    Args:
      rows: numbers of these query rows.
    """
    if factor is None:
        top = _finite_or_0(jax.lax.stop_gradient(scores_BHQT).max(-1, keepdims=True))  # cancels
        weights = jnp.exp(scores_BHQT - top)
    else:
        kept = factor(rows, scores_BHQT.dtype)
        # The maximum over keys that are not knocked out: were a cut key far above, the others' weights would underflow.
        top = jax.lax.stop_gradient(jnp.where(kept == 0, -jnp.inf, scores_BHQT)).max(-1, keepdims=True)
        exponents = jnp.minimum(scores_BHQT - _finite_or_0(top), 80)  # a cut key's must be finite to become 0
        weights = times(kept, jnp.exp(exponents))
    total = weights.sum(-1, keepdims=True)
    return weights, jnp.where(total == 0, 1, total)


def _finite_or_0(top: Array) -> Array:
    return jnp.where(jnp.isneginf(top), 0, top)


def softmax(scores_BHQT: Array, rows: Array | np.ndarray | None = None, factor: KnockoutFactor | None = None) -> Array:
    """The softmax over keys; a row of which every key is knocked out is zeros."""
    weights, total = exponentials(scores_BHQT, np.arange(scores_BHQT.shape[2]) if rows is None else rows, factor)
    return weights / total


def attention(
    q_BQHd: Array, k_BTHd: Array, v_BTHd: Array, rows: Array | np.ndarray, factor: KnockoutFactor | None = None
) -> Array:
    """softmax(q k / sqrt(d)) v, [B, Q, H, d], with all scores written out."""
    weights, total = exponentials(scaled_scores(q_BQHd, k_BTHd), rows, factor)
    # Dividing the outputs by the sum of weights, not the weights, saves a pass over T x T numbers.
    rounded, wide = weights.astype(v_BTHd.dtype), weights.dtype
    z_BHQd = jnp.einsum("BHQT,BTHd->BHQd", rounded, v_BTHd, preferred_element_type=wide)
    return (z_BHQd / total).astype(v_BTHd.dtype).swapaxes(1, 2)


def fused_attention(
    q_BQHd: Array,
    k_BTHd: Array,
    v_BTHd: Array,
    first: int = 0,
    factor: KnockoutFactor | None = None,
    kernel: Form = "auto",
) -> Array:
    """The same by the fastest means; the weights cannot be seen.

    Args:
      first: number of the first query row, which `factor` is asked for.
      kernel: see `Form`; knock-outs always take the XLA form.
    """
    rows = first + np.arange(q_BQHd.shape[1])

    def whole(q: Array, k: Array, v: Array) -> Array:
        return attention(q, k, v, rows, factor)

    if factor is None and kernel == "cudnn":
        return cudnn_attention(q_BQHd, k_BTHd, v_BTHd)
    on_cpu = partial(attention_in_tiles, first=first, factor=factor)
    if kernel == "cpu":
        return jax.checkpoint(on_cpu, prevent_cse=False)(q_BQHd, k_BTHd, v_BTHd)
    by_platform: dict[str, Callable[..., Array]] = {}
    if factor is None and kernel == "auto" and cudnn_takes(q_BQHd.dtype, q_BQHd.shape[-1]) and cudnn_is_here():
        by_platform["cuda"] = cudnn_attention
    if any(len(parts) > 1 for parts in tiles(q_BQHd.shape, k_BTHd.shape[1])):
        by_platform["cpu"] = on_cpu
    if not by_platform:
        return whole(q_BQHd, k_BTHd, v_BTHd)
    choose = partial(jax.lax.platform_dependent, default=whole, **by_platform)
    # Rematerialised in a backward pass: else each platform's residuals would be kept for all of them.
    return jax.checkpoint(choose, prevent_cse=False)(q_BQHd, k_BTHd, v_BTHd)


# --- on a CPU: query rows and heads in tiles, whose scores stay in the caches

ROWS, HEADS = 352, 3
"""Query rows and heads of a tile at most; `python -m benchmarks tiles` measures others."""
TILE_BYTES = 2**22
"""As much of the scores as a tile has: what leaves the caches costs more than twice."""
LEAST_BYTES = 2**18
"""Scores as small as this are one tile."""
TILES = 24
"""At most so many independent tiles: each makes the program larger. More are computed one after another."""


def cuts(n: int, pieces: int) -> list[slice]:
    """Parts of 0 .. n - 1 of nearly one size."""
    at = [round(i * n / pieces) for i in range(pieces + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(at)]


def tiles(shape_BQHd: tuple[Any, ...], tokens: int) -> tuple[list[slice], list[slice]]:
    """Query rows and heads of the tiles."""
    B, Q, H, _ = shape_BQHd
    if not isinstance(B, int) or 4 * B * H * Q * tokens <= LEAST_BYTES:  # not an int: symbolic, of an exported program
        return [slice(0, Q)], [slice(0, H)]
    rows = cuts(Q, -(-Q // ROWS))
    heads = min(max(TILE_BYTES // (4 * B * (rows[0].stop - rows[0].start) * tokens), 1), HEADS)
    groups = next(n for n in range(min(-(-H // heads), H), H + 1) if H % n == 0)
    return rows, cuts(H, groups)


def attention_in_tiles(
    q_BQHd: Array, k_BTHd: Array, v_BTHd: Array, *, first: int, factor: KnockoutFactor | None
) -> Array:
    """`attention`, for tiles that are independent of each other: XLA's CPU backend computes them at the same time."""
    rows, heads = tiles(q_BQHd.shape, k_BTHd.shape[1])
    if len(rows) * len(heads) > TILES:
        if q_BQHd.shape[0] > 1:
            return of_each_image(q_BQHd, k_BTHd, v_BTHd, first=first, factor=factor)
        return of_rows_in_turn(q_BQHd, k_BTHd, v_BTHd, first=first, factor=factor)
    numbers = first + np.arange(q_BQHd.shape[1])
    return joined([of_heads(q_BQHd[:, r], k_BTHd, v_BTHd, numbers[r], factor, heads) for r in rows], axis=1)


def of_heads(
    q_BQHd: Array,
    k_BTHd: Array,
    v_BTHd: Array,
    rows: Array | np.ndarray,
    factor: KnockoutFactor | None,
    heads: Sequence[slice],
) -> Array:
    """`attention`, with some heads at a time."""
    factors = [factor and partial(_of_heads, factor=factor, heads=h) for h in heads]
    parts = [
        attention(q_BQHd[:, :, h], k_BTHd[:, :, h], v_BTHd[:, :, h], rows, of_these)
        for h, of_these in zip(heads, factors, strict=True)
    ]
    return joined(parts, axis=2)


def joined(parts: Sequence[Array], axis: int = 0) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)


def _of_heads(rows: Array | np.ndarray, dtype: np.dtype, factor: KnockoutFactor, heads: slice) -> Array:
    every = factor(rows, dtype)
    return every if every.shape[1] == 1 else every[:, heads]


def of_each_image(q_BQHd: Array, k_BTHd: Array, v_BTHd: Array, *, first: int, factor: KnockoutFactor | None) -> Array:
    """`attention_in_tiles`, one image after another."""

    def of_image(image: tuple[Array, Array, Array, Array]) -> Array:
        *qkv, i = image

        def mine(rows: Array | np.ndarray, dtype: np.dtype, factor: KnockoutFactor) -> Array:
            every = factor(rows, dtype)
            return every if every.shape[0] == 1 else jax.lax.dynamic_slice_in_dim(every, i, 1)

        of_this = factor and partial(mine, factor=factor)
        return attention_in_tiles(*(a[None] for a in qkv), first=first, factor=of_this)[0]

    return jax.lax.map(of_image, (q_BQHd, k_BTHd, v_BTHd, jnp.arange(q_BQHd.shape[0])))


def of_rows_in_turn(q_BQHd: Array, k_BTHd: Array, v_BTHd: Array, *, first: int, factor: KnockoutFactor | None) -> Array:
    """`attention_in_tiles`, with one tile of query rows after another."""
    B, Q, H, d = q_BQHd.shape
    parts, heads = tiles(q_BQHd.shape, k_BTHd.shape[1])
    blocks, rows = len(parts), max(part.stop - part.start for part in parts)
    padded = jnp.pad(q_BQHd, ((0, 0), (0, rows * blocks - Q), (0, 0), (0, 0)))
    split = jnp.moveaxis(padded.reshape(B, blocks, rows, H, d), 1, 0)
    numbers = first + np.arange(rows * blocks).reshape(blocks, rows).clip(max=Q - 1)
    z = jax.lax.map(
        lambda block: of_heads(block[0], k_BTHd, v_BTHd, block[1], factor, heads), (split, jnp.asarray(numbers))
    )
    return jnp.moveaxis(z, 0, 1).reshape(B, rows * blocks, H, d)[:, :Q]


# --- cuDNN


@jax.custom_vjp
def cudnn_attention(q_BQHd: Array, k_BTHd: Array, v_BTHd: Array) -> Array:
    return jax.nn.dot_product_attention(q_BQHd, k_BTHd, v_BTHd, implementation="cudnn")


def _cudnn_forward(q: Array, k: Array, v: Array) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array]]]:
    return jax.vjp(_cudnn_of_even_length, q, k, v)


def _cudnn_backward(pull_back: Callable[[Array], tuple[Array, Array, Array]], z_bar: Array) -> tuple[Array, ...]:
    return pull_back(z_bar)


def _cudnn_of_even_length(q_BQHd: Array, k_BTHd: Array, v_BTHd: Array) -> Array:
    """The same, with one token more where their number is odd that nobody attends to, as cuDNN's backward pass asks."""
    Q, T = q_BQHd.shape[1], k_BTHd.shape[1]
    if Q % 2 == 0 and T % 2 == 0:
        return jax.nn.dot_product_attention(q_BQHd, k_BTHd, v_BTHd, implementation="cudnn")
    q, k, v = (jnp.pad(a, ((0, 0), (0, a.shape[1] % 2), (0, 0), (0, 0))) for a in (q_BQHd, k_BTHd, v_BTHd))
    counts = (jnp.full(len(q), n, jnp.int32) for n in (Q, T))
    lengths = dict(zip(("query_seq_lengths", "key_value_seq_lengths"), counts, strict=True))
    return jax.nn.dot_product_attention(q, k, v, **lengths, implementation="cudnn")[:, :Q]


cudnn_attention.defvjp(_cudnn_forward, _cudnn_backward)


def cudnn_takes(dtype: Any, head_size: int) -> bool:
    """Whether cuDNN's flash attention takes queries of this type and size."""
    return dtype in (jnp.bfloat16, jnp.float16) and head_size % 8 == 0 and head_size <= 128


@cache
def cudnn_is_here() -> bool:
    """Whether this machine has an NVIDIA GPU of Ampere or newer: JAX checks cuDNN's version while it traces."""
    try:
        device = jax.local_devices(backend="cuda")[0]
    except RuntimeError:  # no such platform
        return False
    capability = str(getattr(device, "compute_capability", "0"))
    return float(capability) >= 8


def check_kernel(kernel: str, dtype: Any, head_size: int, device: Any) -> None:
    """Raises a ValueError if `attention=kernel` cannot run in this type, or on this device.

    Args:
      device: where the program will run, or the name of its platform; None where that is not known.
    """
    if kernel not in get_args(Kernel):
        raise ValueError(f"attention is {kernel!r}; expected 'auto', 'xla' or 'cudnn'")
    if kernel != "cudnn":
        return
    if not cudnn_takes(dtype, head_size):
        raise ValueError(
            f"attention='cudnn' takes bfloat16 or float16, and heads of at most 128 channels, a multiple of 8; this "
            f"model is {np.dtype(dtype).name} with heads of {head_size}: use attention='auto'"
        )
    platform = device if isinstance(device, str | None) else device.platform
    if not cudnn_is_here() or platform not in (None, "gpu", "cuda"):
        where = f"the device is a {platform}" if cudnn_is_here() else "this machine has none"
        raise ValueError(f"attention='cudnn' needs an NVIDIA GPU of Ampere or newer, and {where}: use attention='auto'")

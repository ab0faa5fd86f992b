"""Attention, whose weights are written out where somebody reads or edits them. Axes as in `jaxvit.model.vit`."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jaxvit.model.config import ViTConfig
from jaxvit.model.layers import identity, make_norm
from jaxvit.model.tap import Tap

Turn = Callable[[Array], Array]
"""Of queries or keys [B, T, H, d]."""


class Attention(nnx.Module):
    def __init__(self, c: ViTConfig, rngs: nnx.Rngs):
        self.qkv = nnx.Linear(c.width, 3 * c.width, use_bias=c.qkv_bias, rngs=rngs)
        self.q_norm, self.k_norm = (make_norm(c, c.head_size, c.qk_norm) for _ in range(2))
        self.norm = make_norm(c, c.width, c.branch_norms)
        self.proj = nnx.Linear(c.width, c.width, use_bias=c.proj_bias, rngs=rngs)
        self.heads = c.heads

    def __call__(self, x_BTD: Array, tap: Tap, turn: Turn = identity) -> Array:
        """`turn` gives queries and keys their rotary positions."""
        B, T, D = x_BTD.shape
        q, k, v = jnp.unstack(self.qkv(x_BTD).reshape(B, T, 3, self.heads, D // self.heads), axis=2)
        q, k, v = tap("q", turn(self.q_norm(q))), tap("k", turn(self.k_norm(k))), tap("v", v)
        z_BTHd = tap("z", self.attend(q, k, v, tap))
        return self.proj(self.norm(jax.lax.collapse(z_BTHd, 2)))

    def attend(self, q_BTHd: Array, k_BTHd: Array, v_BTHd: Array, tap: Tap) -> Array:
        """Rows whose weights somebody reads or edits are written out; the others may use a fused kernel."""
        T = q_BTHd.shape[1]
        rows = tap.explicit_rows(T)
        if not rows:
            return fused_attention(q_BTHd, k_BTHd, v_BTHd)
        pattern = tap("pattern", softmax(tap("scores", scaled_scores(q_BTHd[:, :rows], k_BTHd)), tap))
        z_BQHd = jnp.einsum("BHQT,BTHd->BQHd", pattern.astype(v_BTHd.dtype), v_BTHd)
        if rows == T:
            return z_BQHd
        return jnp.concatenate([z_BQHd, fused_attention(q_BTHd[:, rows:], k_BTHd, v_BTHd)], axis=1)


def scaled_scores(q_BQHd: Array, k_BTHd: Array) -> Array:
    """[B, H, Q, T] in at least float32: in half precision a softmax over hundreds of tokens would not sum to 1."""
    wide = jnp.float64 if q_BQHd.dtype == jnp.float64 else jnp.float32
    return jnp.einsum("BQHd,BTHd->BHQT", q_BQHd * q_BQHd.shape[-1] ** -0.5, k_BTHd, preferred_element_type=wide)


def fused_attention(q_BQHd: Array, k_BTHd: Array, v_BTHd: Array) -> Array:
    """softmax(q k / sqrt(d)) v, by the fastest means; the weights are not to be seen."""
    if cudnn_takes(q_BQHd):
        return jax.nn.dot_product_attention(q_BQHd, k_BTHd, v_BTHd, implementation="cudnn")
    pieces = cpu_pieces(q_BQHd, k_BTHd)
    if pieces == 1:
        return attention(q_BQHd, k_BTHd, v_BTHd)

    def of_image(qkv: tuple[Array, Array, Array]) -> Array:
        q_QHd, k_THd, v_THd = qkv
        rows = -(-len(q_QHd) // pieces)
        padded = jnp.pad(q_QHd, ((0, rows * pieces - len(q_QHd)), (0, 0), (0, 0)))
        parts = padded.reshape(pieces, 1, rows, *q_QHd.shape[1:])
        z = jax.lax.map(lambda part: attention(part, k_THd[None], v_THd[None]), parts)
        return jax.lax.collapse(z, 0, 3)[: len(q_QHd)]

    return jax.lax.map(of_image, (q_BQHd, k_BTHd, v_BTHd))


CPU_BYTES = 2**24
"""As much of one image's scores as is written out at once on a CPU: what leaves the caches costs more than twice."""


def cpu_pieces(q_BQHd: Array, k_BTHd: Array) -> int:
    """Into how many pieces the query rows of each image are split; 1 for all images and rows at once.

    Only on a CPU, and not where images may be spread over several devices.
    """
    if jax.default_backend() != "cpu" or jax.device_count() > 1:
        return 1
    _, Q, H, _ = q_BQHd.shape
    return -(-H * Q * k_BTHd.shape[1] * max(q_BQHd.dtype.itemsize, 4) // CPU_BYTES)


def attention(q_BQHd: Array, k_BTHd: Array, v_BTHd: Array) -> Array:
    """The same, with all scores written out."""
    scores = scaled_scores(q_BQHd, k_BTHd)
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))  # cancels
    weights = jnp.exp(scores - top)
    # Dividing the outputs by the sum of weights, not the weights, saves a pass over T x T numbers.
    z_BHQd = jnp.einsum("BHQT,BTHd->BHQd", weights.astype(v_BTHd.dtype), v_BTHd, preferred_element_type=scores.dtype)
    return (z_BHQd / weights.sum(-1, keepdims=True)).astype(v_BTHd.dtype).swapaxes(1, 2)


def cudnn_takes(q_BQHd: Array) -> bool:
    """Whether cuDNN's flash attention is there for such queries: half precision, on NVIDIA's Ampere or newer."""
    if q_BQHd.dtype not in (jnp.bfloat16, jnp.float16) or q_BQHd.shape[-1] % 8 or q_BQHd.shape[-1] > 128:
        return False
    if jax.default_backend() != "gpu":
        return False
    capability = str(getattr(jax.local_devices()[0], "compute_capability", "0"))  # "9.0"; AMD's is "gfx942"
    return capability.replace(".", "", 1).isdigit() and float(capability) >= 8


def softmax(scores_BHQT: Array, tap: Tap) -> Array:
    """The softmax over keys, by way of the site `weights`. A row without any weight is zeros."""
    if "weights" in tap.edits:
        # The largest score is that of the keys which are not cut: were one that is cut far above, the others' weights
        # would underflow. A key is cut where any weight would become 0.
        some, none = (tap.edited("weights", make(scores_BHQT)) for make in (jnp.ones_like, jnp.zeros_like))
        counted = jnp.where((some == 0) & (none == 0), -jnp.inf, scores_BHQT)
    else:
        counted = jax.lax.stop_gradient(scores_BHQT)  # what is subtracted cancels
    top = counted.max(-1, keepdims=True)
    exponents = scores_BHQT - jnp.where(jnp.isneginf(top), 0, top)
    if "weights" in tap.edits:
        exponents = jnp.minimum(exponents, 80)  # the weight of a key that is cut must be finite to become 0
    weights = tap("weights", jnp.exp(exponents))
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total == 0, 1, total)

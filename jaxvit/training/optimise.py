"""What optax needs to know of a model: which parameters decay, and how fast each layer learns. And losses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxvit.model.layers import wide_dtype


def decays(learn: Mapping[str, Array]) -> dict[str, bool]:
    """Which parameters weight decay acts on: kernels and low-rank matrices, not biases, norms, scales and tokens.

    Example:

        optax.adamw(1e-4, weight_decay=0.05, mask=decays)
    """
    return {name: ".kernel" in name for name in learn}


def layer_decay(depth: int, factor: float) -> optax.GradientTransformation:
    """Multiplies updates by `factor` for each layer between them and the head, as timm's layer_decay.

    Head and final norm learn at the full rate, the last block at `factor`, the embedding at
    `factor` to the power of depth + 1.

    Args:
      depth: number of blocks.
      factor: above 0; 1 changes nothing.

    Raises:
      ValueError: a factor of 0 or less.

    Example:

        optax.chain(optax.adamw(1e-4), layer_decay(model.config.depth, 0.75))
    """
    if factor <= 0:
        raise ValueError(f"factor is {factor}; expected more than 0")

    def scaled(updates: Any, params: Any = None) -> Any:
        return {name: a * rate(name, a) for name, a in updates.items()}

    def rate(name: str, a: Array) -> Array:
        layers = re.match(r"blocks(?:\[(\d+):(\d+)\])?\.", name)
        if layers is None:
            last = name.startswith(("norm.", "head.", "pool."))
            return jnp.asarray(factor ** (0 if last else depth + 1), a.dtype)
        start, stop = (int(layers[1]), int(layers[2])) if layers[1] else (0, depth)
        each = jnp.asarray([factor ** (depth - layer) for layer in range(start, stop)], a.dtype)
        return each.reshape(-1, *[1] * (a.ndim - 1))

    return optax.stateless(scaled)


def cross_entropy(logits: Float[Array, "B C"], labels: Int[Array, " B"], smoothing: float = 0.0) -> Float[Array, ""]:
    """The mean over images, in at least float32.

    Args:
      smoothing: how much of each label is spread evenly over all classes.

    Example:

        cross_entropy(model(images).logits, jnp.array([3, 7]), smoothing=0.1)
    """
    scores = jax.nn.log_softmax(logits.astype(wide_dtype(logits.dtype)))
    right = jnp.take_along_axis(scores, labels[:, None], axis=1)[:, 0]
    return -((1 - smoothing) * right + smoothing * scores.mean(axis=1)).mean()

"""Models with something new to learn: a classifier, or registers."""

from __future__ import annotations

from dataclasses import replace

import jax
from flax import nnx
from jaxtyping import Array

from jaxvit.interventions import registers
from jaxvit.model.config import Pool
from jaxvit.model.heads import make_head
from jaxvit.model.params import from_params, to_params
from jaxvit.model.pieces import name_of
from jaxvit.model.vit import ViT


def attach_head(model: ViT, classes: int, *, pool: Pool | None = None, key: Array) -> ViT:
    """A copy with a linear classifier of `classes`, freshly drawn, in place of the head it has; biases are 0.

    Args:
      pool: what is classified: `cls`, `mean`, or `cls_mean`; by default what the model pools.

    Raises:
      ValueError: fewer than two classes, or a pool that the model lacks the tokens or the weights for.

    Example:

        model = attach_head(model, 10, key=jax.random.key(0))
        model(images).logits  # [B, 10]
    """
    if classes < 2:
        raise ValueError(f"classes is {classes}; expected 2 or more")
    pool = pool or model.config.pool
    if pool != model.config.pool and pool not in ("cls", "mean", "cls_mean"):
        raise ValueError(f"pool is {pool!r}; expected 'cls', 'mean' or 'cls_mean': others have weights of their own")
    config = replace(model.config, classes=classes, projection=0, pool=pool)
    params = {name: a for name, a in to_params(model).items() if not name.startswith("head.")}
    if pool != model.config.pool:
        params = {name: a for name, a in params.items() if not name.startswith("pool.")}
    head = make_head(config, nnx.Rngs(key))
    leaves, _ = jax.tree_util.tree_flatten_with_path(head)
    dtype = model.patch_embed.kernel.dtype
    new = {f"head.{name_of(path)}": a.astype(dtype) for path, a in leaves}
    return from_params(config, params | new)


def add_registers(model: ViT, count: int, *, key: Array, deviation: float = 0.02) -> ViT:
    """A copy with more registers, drawn at random, to be trained: `split(model, "registers", ..)`.

    `jaxvit.add_registers` appends empty ones.

    Args:
      deviation: standard deviation of their values.

    Raises:
      ValueError: `count` is less than 1.

    Example:

        learn, frozen = split(add_registers(model, 4, key=jax.random.key(0)), "registers", "blocks")
    """
    values = jax.random.normal(key, (max(count, 0), model.config.width), model.dtype) * deviation
    return registers.add_registers(model, count, values)

"""What stands behind the blocks: how tokens are pooled, and a linear layer on that. Axes as in `jaxvit.model.vit`."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jaxvit.model.attention import fused_attention
from jaxvit.model.config import ViTConfig
from jaxvit.model.layers import ACTIVATIONS, Linear, Norm, make_norm


class ClsPool(nnx.Module):
    """[CLS]."""

    reads_patches = False

    def __init__(self, c: ViTConfig, rngs: nnx.Rngs):
        pass

    def __call__(self, x_BTD: Array, prefix: int) -> Array:
        return x_BTD[:, 0]


class MeanPool(nnx.Module):
    """The mean of the patches."""

    reads_patches = True

    def __init__(self, c: ViTConfig, rngs: nnx.Rngs):
        pass

    def __call__(self, x_BTD: Array, prefix: int) -> Array:
        return x_BTD[:, prefix:].mean(1)


class ClsMeanPool(nnx.Module):
    """[CLS], and behind it the mean of the patches: what the classifiers of transformers' DINOv2 read."""

    reads_patches = True

    def __init__(self, c: ViTConfig, rngs: nnx.Rngs):
        pass

    def __call__(self, x_BTD: Array, prefix: int) -> Array:
        return jnp.concatenate([x_BTD[:, 0], x_BTD[:, prefix:].mean(1)], axis=-1)


class DistilledPool(nnx.Module):
    """The mean of [CLS] and the distillation token, which stands last before the patches."""

    reads_patches = False

    def __init__(self, c: ViTConfig, rngs: nnx.Rngs):
        pass

    def __call__(self, x_BTD: Array, prefix: int) -> Array:
        return (x_BTD[:, 0] + x_BTD[:, prefix - 1]) / 2


class AttentionPool(nnx.Module):
    """A learned query attends to all tokens, and goes through an MLP (as in SigLIP; timm's `AttentionPoolLatent`)."""

    reads_patches = True

    def __init__(self, c: ViTConfig, rngs: nnx.Rngs):
        self.latent: nnx.Param[Array] = nnx.Param(
            nnx.initializers.truncated_normal(c.width**-0.5)(rngs.params(), (c.width,))
        )
        self.q: Linear = Linear(c.width, c.width, True, rngs)
        self.kv: Linear = Linear(c.width, (2, c.heads, c.head_size), True, rngs)
        self.proj: Linear = Linear(c.width, c.width, True, rngs)
        self.norm: Norm = make_norm(c)
        self.fc1: Linear = Linear(c.width, c.hidden, True, rngs)
        self.fc2: Linear = Linear(c.hidden, c.width, True, rngs)
        self.prefix_too: bool = c.pool_prefix
        self.activation: str = c.mlp

    def __call__(self, x_BTD: Array, prefix: int) -> Array:
        x = x_BTD if self.prefix_too else x_BTD[:, prefix:]
        k, v = jnp.unstack(self.kv(x), axis=2)
        query = self.q(self.latent[...]).reshape(1, 1, *k.shape[2:])
        q_BQHd = jnp.zeros_like(k[:, :1]) + query  # and not a broadcast: the batch may be sharded
        x = self.proj(jax.lax.collapse(fused_attention(q_BQHd, k, v)[:, 0], 1))
        return x + self.fc2(ACTIVATIONS[self.activation](self.fc1(self.norm(x))))


Pool = ClsPool | MeanPool | ClsMeanPool | DistilledPool | AttentionPool

POOLS: dict[str, Callable[[ViTConfig, nnx.Rngs], Pool]] = {
    "cls": ClsPool,
    "mean": MeanPool,
    "cls_mean": ClsMeanPool,
    "attention": AttentionPool,
    "distilled": DistilledPool,
}


class LinearHead(nnx.Module):
    """A classifier of what is pooled, or a CLIP's projection of it."""

    def __init__(self, c: ViTConfig, rngs: nnx.Rngs):
        width = 2 * c.width if c.pool == "cls_mean" else c.width
        self.linear: Linear = Linear(width, c.classes or c.projection, c.classes > 0, rngs)

    def __call__(self, pooled_BD: Array, x_BTD: Array, prefix: int) -> Array:
        return self.linear(pooled_BD)


class DistilledHead(nnx.Module):
    """The mean of two classifiers, one of [CLS] and one of the distillation token."""

    def __init__(self, c: ViTConfig, rngs: nnx.Rngs):
        self.linear: Linear = Linear(c.width, c.classes, True, rngs)
        self.distilled: Linear = Linear(c.width, c.classes, True, rngs)

    def __call__(self, pooled_BD: Array, x_BTD: Array, prefix: int) -> Array:
        return (self.linear(x_BTD[:, 0]) + self.distilled(x_BTD[:, prefix - 1])) / 2


def no_head(pooled_BD: Array, x_BTD: Array, prefix: int) -> None:
    return None


Head = Callable[[Array, Array, int], Array | None]
"""Of what is pooled, the tokens, and how many stand before the patches."""


def make_head(c: ViTConfig, rngs: nnx.Rngs) -> Head:
    if not c.classes and not c.projection:
        return no_head
    return DistilledHead(c, rngs) if c.pool == "distilled" else LinearHead(c, rngs)

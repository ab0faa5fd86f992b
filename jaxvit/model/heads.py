"""What stands behind the blocks: how tokens are pooled, and a linear layer on that. Axes as in `jaxvit.model.vit`."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jaxvit.model.attention import fused_attention
from jaxvit.model.config import ViTConfig
from jaxvit.model.layers import ACTIVATIONS, make_norm


class ClsPool(nnx.Module):
    """[CLS]."""

    def __init__(self, c: ViTConfig, rngs: nnx.Rngs):
        pass

    def __call__(self, x_BTD: Array, prefix: int) -> Array:
        return x_BTD[:, 0]


class MeanPool(nnx.Module):
    """The mean of the patches."""

    def __init__(self, c: ViTConfig, rngs: nnx.Rngs):
        pass

    def __call__(self, x_BTD: Array, prefix: int) -> Array:
        return x_BTD[:, prefix:].mean(1)


class ClsMeanPool(nnx.Module):
    """[CLS], and behind it the mean of the patches: what the classifiers of transformers' DINOv2 read."""

    def __init__(self, c: ViTConfig, rngs: nnx.Rngs):
        pass

    def __call__(self, x_BTD: Array, prefix: int) -> Array:
        return jnp.concatenate([x_BTD[:, 0], x_BTD[:, prefix:].mean(1)], axis=-1)


class DistilledPool(nnx.Module):
    """The mean of [CLS] and the distillation token, which stands last before the patches."""

    def __init__(self, c: ViTConfig, rngs: nnx.Rngs):
        pass

    def __call__(self, x_BTD: Array, prefix: int) -> Array:
        return (x_BTD[:, 0] + x_BTD[:, prefix - 1]) / 2


class AttentionPool(nnx.Module):
    """A learned query attends to all tokens, and goes through an MLP (as in SigLIP; timm's `AttentionPoolLatent`)."""

    def __init__(self, c: ViTConfig, rngs: nnx.Rngs):
        self.latent = nnx.Param(nnx.initializers.truncated_normal(c.width**-0.5)(rngs.params(), (c.width,)))
        self.q = nnx.Linear(c.width, c.width, rngs=rngs)
        self.kv = nnx.Linear(c.width, 2 * c.width, rngs=rngs)
        self.proj = nnx.Linear(c.width, c.width, rngs=rngs)
        self.norm = make_norm(c)
        self.fc1 = nnx.Linear(c.width, c.hidden, rngs=rngs)
        self.fc2 = nnx.Linear(c.hidden, c.width, rngs=rngs)
        self.heads, self.prefix_too, self.activation = c.heads, c.pool_prefix, c.mlp

    def __call__(self, x_BTD: Array, prefix: int) -> Array:
        x = x_BTD if self.prefix_too else x_BTD[:, prefix:]
        B, T, D = x.shape
        k, v = jnp.unstack(self.kv(x).reshape(B, T, 2, self.heads, D // self.heads), axis=2)
        q_BHd = jnp.broadcast_to(self.q(self.latent[...]).reshape(1, 1, self.heads, -1), (B, 1, *k.shape[2:]))
        x = self.proj(fused_attention(q_BHd, k, v).reshape(B, D))
        return x + self.fc2(ACTIVATIONS[self.activation](self.fc1(self.norm(x))))


POOLS: dict[str, Callable[[ViTConfig, nnx.Rngs], Callable[[Array, int], Array]]] = {
    "cls": ClsPool,
    "mean": MeanPool,
    "cls_mean": ClsMeanPool,
    "attention": AttentionPool,
    "distilled": DistilledPool,
}


class LinearHead(nnx.Module):
    """A linear layer on what is pooled."""

    def __init__(self, c: ViTConfig, rngs: nnx.Rngs):
        width = 2 * c.width if c.pool == "cls_mean" else c.width
        self.linear = nnx.Linear(width, c.classes, use_bias=c.head_bias, rngs=rngs)

    def __call__(self, pooled_BD: Array, x_BTD: Array, prefix: int) -> Array:
        return self.linear(pooled_BD)


class DistilledHead(nnx.Module):
    """The mean of two classifiers, one of [CLS] and one of the distillation token."""

    def __init__(self, c: ViTConfig, rngs: nnx.Rngs):
        self.linear, self.distilled = (
            nnx.Linear(c.width, c.classes, use_bias=c.head_bias, rngs=rngs) for _ in range(2)
        )

    def __call__(self, pooled_BD: Array, x_BTD: Array, prefix: int) -> Array:
        return (self.linear(x_BTD[:, 0]) + self.distilled(x_BTD[:, prefix - 1])) / 2


def no_head(pooled_BD: Array, x_BTD: Array, prefix: int) -> None:
    return None


def make_head(c: ViTConfig, rngs: nnx.Rngs) -> Callable[[Array, Array, int], Array | None]:
    if not c.classes:
        return no_head
    return DistilledHead(c, rngs) if c.pool == "distilled" else LinearHead(c, rngs)

"""Norms, MLPs, and what else a block is made of. Axes as in `jaxvit.model.vit`."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jaxvit.model.config import ViTConfig
from jaxvit.model.tap import Tap


def per_channel(a_D: Array, x: Array) -> Array:
    """A vector over the last axis, with as many axes as x."""
    return jnp.expand_dims(a_D, range(x.ndim - 1))


def identity(x: Array) -> Array:
    return x


class LayerNorm(nnx.Module):
    """Normalises the last axis. Two passes: E[x^2] - E[x]^2, Flax's default, cancels the digits of tokens with a large
    mean; statistics in at least float32, under any rule of promotion, which Flax's module does not take.
    """

    def __init__(self, c: ViTConfig, size: int):
        self.scale, self.bias = nnx.Param(jnp.ones(size)), nnx.Param(jnp.zeros(size))
        self.eps = c.eps

    def __call__(self, x: Array) -> Array:
        wide = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        return normal.astype(x.dtype) * per_channel(self.scale[...], x) + per_channel(self.bias[...], x)


class RmsNorm(nnx.Module):
    """Divides by the root of the mean square over the last axis."""

    def __init__(self, c: ViTConfig, size: int):
        self.scale = nnx.Param(jnp.ones(size))
        self.eps = c.eps

    def __call__(self, x: Array) -> Array:
        wide = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
        normal = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        return normal.astype(x.dtype) * per_channel(self.scale[...], x)


NORMS: dict[str, Callable[[ViTConfig, int], Callable[[Array], Array]]] = {"layer": LayerNorm, "rms": RmsNorm}


def make_norm(c: ViTConfig, size: int | None = None, present: bool = True) -> Callable[[Array], Array]:
    """The config's norm over vectors of `size`, a token's by default; or nothing in its place."""
    return NORMS[c.norm](c, size or c.width) if present else identity


class LayerScale(nnx.Module):
    def __init__(self, c: ViTConfig):
        self.gamma = nnx.Param(jnp.ones(c.width))

    def __call__(self, x: Array) -> Array:
        return x * per_channel(self.gamma[...], x)


def gelu(x: Array) -> Array:
    """x Phi(x), exact, as PyTorch computes it. JAX's own goes by way of erfc, which takes twice as long on a CPU."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


def quick_gelu(x: Array) -> Array:
    """OpenAI's approximation, which its CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": quick_gelu,
}


class PlainMlp(nnx.Module):
    """fc2(activation(fc1(x)))."""

    def __init__(self, c: ViTConfig, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(c.width, c.hidden, use_bias=c.proj_bias, rngs=rngs)
        self.norm = make_norm(c, c.hidden, c.branch_norms)
        self.fc2 = nnx.Linear(c.hidden, c.width, use_bias=c.proj_bias, rngs=rngs)
        self.activation = c.mlp

    def __call__(self, x_BTD: Array, tap: Tap) -> Array:
        pre = tap("mlp_pre", self.fc1(x_BTD))
        return self.fc2(self.norm(tap("mlp_post", ACTIVATIONS[self.activation](pre))))


class SwigluMlp(nnx.Module):
    """out(silu(gate(x)) * value(x))."""

    def __init__(self, c: ViTConfig, rngs: nnx.Rngs):
        self.gate = nnx.Linear(c.width, c.hidden, use_bias=c.proj_bias, rngs=rngs)
        self.value = nnx.Linear(c.width, c.hidden, use_bias=c.proj_bias, rngs=rngs)
        self.norm = make_norm(c, c.hidden, c.branch_norms)
        self.out = nnx.Linear(c.hidden, c.width, use_bias=c.proj_bias, rngs=rngs)

    def __call__(self, x_BTD: Array, tap: Tap) -> Array:
        gate = tap("mlp_pre", self.gate(x_BTD))
        return self.out(self.norm(tap("mlp_post", jax.nn.silu(gate) * self.value(x_BTD))))


def make_mlp(c: ViTConfig, rngs: nnx.Rngs) -> Callable[[Array, Tap], Array]:
    return SwigluMlp(c, rngs) if c.mlp == "swiglu" else PlainMlp(c, rngs)

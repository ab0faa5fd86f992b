"""Linear layers, norms, MLPs, and what else a block is made of. Axes as in `jaxvit.model.vit`."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxvit.model.config import ViTConfig
from jaxvit.model.tap import Tap


def per_channel(a_D: Array, x: Array) -> Array:
    """A vector over the last axis, with as many axes as x."""
    return jnp.expand_dims(a_D, range(x.ndim - a_D.ndim))


def identity(x: Array) -> Array:
    return x


def wide_dtype(dtype: Any) -> jnp.dtype:
    """float64 for itself, else float32: where half precision would lose digits, values are computed in this type."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def rounded_once(function: Callable[..., Array]) -> Callable[..., Array]:
    """`function` of arrays in at least float32, its result rounded once to the type of the first."""

    def wide(*arrays: Array) -> Array:
        dtype = arrays[0].dtype
        return function(*(a.astype(wide_dtype(dtype)) for a in arrays)).astype(dtype)

    return wide


def contract(x: Array, kernel: Array, axes: int = 1) -> Array:
    """Sums over the last axes of x and the first of the kernel, and over devices if these axes are sharded."""
    letters = iter(string.ascii_letters)
    summed = "".join(next(letters) for _ in range(axes))
    kept, new = ("".join(next(letters) for _ in range(a.ndim - axes)) for a in (x, kernel))
    equation = f"{kept}{summed},{summed}{new}->{kept}{new}"
    shardings = [jax.typeof(a).sharding for a in (x, kernel)]
    mesh = shardings[0].mesh
    if AxisType.Explicit not in mesh.axis_types:
        return jnp.einsum(equation, x, kernel)
    # Under an explicit mesh JAX asks how a sum over a sharded axis is to be laid out.
    spec = [*shardings[0].spec[: len(kept)], *shardings[1].spec[axes:]]
    return jnp.einsum(equation, x, kernel, out_sharding=NamedSharding(mesh, PartitionSpec(*spec)))


class Linear(nnx.Module):
    """x @ kernel + bias, from the last axes of x to new ones.

    The kernel is [*inputs, *outputs]: with heads as an axis of its own it can be sharded over heads.
    """

    def __init__(self, inputs: int | Sequence[int], outputs: int | Sequence[int], bias: bool, rngs: nnx.Rngs):
        ins, outs = ((n,) if isinstance(n, int) else tuple(n) for n in (inputs, outputs))
        axes = dict(in_axis=tuple(range(len(ins))), out_axis=tuple(range(len(ins), len(ins) + len(outs))))
        self.kernel: nnx.Param[Array] = nnx.Param(
            jax.nn.initializers.lecun_normal(**axes)(rngs.params(), (*ins, *outs))
        )
        self.bias: nnx.Param[Array] | None = nnx.Param(jnp.zeros(outs)) if bias else None
        self.axes: int = len(ins)

    def __call__(self, x: Array, part: slice = slice(None)) -> Array:
        """[*kept, *outputs], or only a part of the first axis of the outputs."""
        y = contract(x, self.kernel[(*[slice(None)] * self.axes, part)], self.axes)
        return y if self.bias is None else y + per_channel(self.bias[part], y)


class LayerNorm(nnx.Module):
    """Normalises the last axis, in two passes: the fast variance E[x^2] - E[x]^2 loses digits where the mean is large.

    Computed in at least float32 and rounded once.
    """

    def __init__(self, c: ViTConfig, size: int):
        self.scale: nnx.Param[Array] = nnx.Param(jnp.ones(size))
        self.bias: nnx.Param[Array] = nnx.Param(jnp.zeros(size))
        self.eps: float = c.eps

    def __call__(self, x: Array) -> Array:
        return rounded_once(self.normalise)(x, self.scale[...], self.bias[...])

    def normalise(self, x: Array, scale: Array, bias: Array) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        return normal * per_channel(scale, x) + per_channel(bias, x)


class RmsNorm(nnx.Module):
    """Divides by the root of the mean square over the last axis. Computed as `LayerNorm`."""

    def __init__(self, c: ViTConfig, size: int):
        self.scale: nnx.Param[Array] = nnx.Param(jnp.ones(size))
        self.eps: float = c.eps

    def __call__(self, x: Array) -> Array:
        return rounded_once(self.normalise)(x, self.scale[...])

    def normalise(self, x: Array, scale: Array) -> Array:
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps) * per_channel(scale, x)


Norm = Callable[[Array], Array]
"""A norm over the last axis, or the identity."""
NORMS: dict[str, Callable[[ViTConfig, int], Norm]] = {"layer": LayerNorm, "rms": RmsNorm}


def make_norm(c: ViTConfig, size: int | None = None, present: bool = True) -> Norm:
    """The config's norm over vectors of `size`, a token's by default; or the identity in its place."""
    return NORMS[c.norm](c, size or c.width) if present else identity


class LayerScale(nnx.Module):
    def __init__(self, c: ViTConfig):
        self.gamma: nnx.Param[Array] = nnx.Param(jnp.ones(c.width))

    def __call__(self, x: Array) -> Array:
        return x * per_channel(self.gamma[...], x)


def gelu(x: Array) -> Array:
    """x Phi(x), exact, as PyTorch computes it. JAX's own uses erfc, which takes twice as long on a CPU."""
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))


def gelu_tanh(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


def quick_gelu(x: Array) -> Array:
    """OpenAI's approximation, which its CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": rounded_once(gelu),
    "gelu_tanh": rounded_once(gelu_tanh),
    "quick_gelu": rounded_once(quick_gelu),
}


class PlainMlp(nnx.Module):
    """fc2(activation(fc1(x)))."""

    def __init__(self, c: ViTConfig, rngs: nnx.Rngs):
        self.fc1: Linear = Linear(c.width, c.hidden, c.proj_bias, rngs)
        self.norm: Norm = make_norm(c, c.hidden, c.branch_norms)
        self.fc2: Linear = Linear(c.hidden, c.width, c.proj_bias, rngs)
        self.activation: str = c.mlp

    def __call__(self, x_BTD: Array, tap: Tap) -> Array:
        pre = tap("mlp_pre", self.fc1(x_BTD))
        return self.fc2(self.norm(tap("mlp_post", ACTIVATIONS[self.activation](pre))))


@rounded_once
def gated(gate: Array, value: Array) -> Array:
    return jax.nn.silu(gate) * value


class SwigluMlp(nnx.Module):
    """out(silu(gate(x)) * value(x))."""

    def __init__(self, c: ViTConfig, rngs: nnx.Rngs):
        self.gate: Linear = Linear(c.width, c.hidden, c.proj_bias, rngs)
        self.value: Linear = Linear(c.width, c.hidden, c.proj_bias, rngs)
        self.norm: Norm = make_norm(c, c.hidden, c.branch_norms)
        self.out: Linear = Linear(c.hidden, c.width, c.proj_bias, rngs)

    def __call__(self, x_BTD: Array, tap: Tap) -> Array:
        gate = tap("mlp_pre", self.gate(x_BTD))
        return self.out(self.norm(tap("mlp_post", gated(gate, self.value(x_BTD)))))


def make_mlp(c: ViTConfig, rngs: nnx.Rngs) -> PlainMlp | SwigluMlp:
    return SwigluMlp(c, rngs) if c.mlp == "swiglu" else PlainMlp(c, rngs)

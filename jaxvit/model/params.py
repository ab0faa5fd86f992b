"""A model as a plain dict of named arrays, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxvit.model.config import ViTConfig
from jaxvit.model.pieces import name_of
from jaxvit.model.vit import Output, ViT

Params = dict[str, Any]
"""Dotted parameter name -> array; of the blocks with an axis L in front: `blocks.attn.qkv.kernel` [L, D, 3, H, d]."""


def abstract(config: ViTConfig) -> ViT:
    """A model of shapes and dtypes alone, which takes no memory: what `config` expects of its parameters."""
    return _abstract(config, enabled(np.float64))


@lru_cache(maxsize=32)
def _abstract(config: ViTConfig, wide: bool) -> ViT:
    return jax.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0)))  # in float64 where that is enabled


def to_params(model: ViT) -> Params:
    """The model's parameters by name, in a fixed order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    return {name_of(path): leaf for path, leaf in leaves}


def from_params(config: ViTConfig, params: Mapping[str, Any]) -> ViT:
    """The model with these parameters. Works on arrays, on tracers, and on parameters with extra leading axes.

    Raises:
      ValueError: names that are missing or too many, or shapes that do not fit the config; all of them are listed.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract(config))
    names = [name_of(path) for path, _ in leaves]
    if set(names) != set(params):
        missing, extra = sorted(set(names) - set(params)), sorted(set(params) - set(names))
        raise ValueError(f"parameters do not fit the config: missing {missing}, not expected {extra}")
    shapes = [(name, tuple(leaf.shape), np.shape(params[name])) for name, (_, leaf) in zip(names, leaves, strict=True)]
    wrong = [(name, fit, found) for name, fit, found in shapes if found[len(found) - len(fit) :] != fit]
    if wrong:
        every = "; ".join(f"{name} has shape {list(found)}, expected {list(fit)}" for name, fit, found in wrong)
        raise ValueError(f"parameters do not fit the config: {every}")
    return jax.tree.unflatten(structure, [params[name] for name in names])


def matrix_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a parameter whose linear layers are plain matrices [inputs, outputs], without axes of heads.

    The numbers are the same, in the same order: checkpoints of PyTorch are read and written in this shape.
    """
    layers, shape = (tuple(shape[:1]), shape[1:]) if name.startswith("blocks.") else ((), shape)
    if name.endswith(".kernel"):
        inputs = 2 if name.endswith(".attn.proj.kernel") else 1
        return (*layers, math.prod(shape[:inputs]), math.prod(shape[inputs:]))
    if name.endswith(".bias"):
        return (*layers, math.prod(shape))
    return (*layers, *shape)


def functional(model: ViT) -> tuple[Callable[..., Output], Params]:
    """The model as a function of a plain dict of arrays.

    A dict costs less to pass to a compiled function than a module: use it in hot loops, with optimisers, for export.

    Returns:
      `(apply, params)`. `apply(params, images, edits, record)` takes what the model takes, and returns its `Output`.

    Example:

        apply, params = jaxvit.functional(model)
        slopes = jax.grad(lambda params: apply(params, images).cls.sum())(params)  # name -> array
    """
    config = model.config

    def apply(params: Mapping[str, Any], *args: Any, **kwargs: Any) -> Output:
        return from_params(config, params)(*args, **kwargs)

    return apply, to_params(model)


def cast(model: ViT, dtype: DTypeLike) -> ViT:
    """The same model in another floating-point type: its parameters, and so its arithmetic.

    Raises:
      ValueError: not a floating-point type, or float64 while it is disabled in JAX.

    Example:

        half = jaxvit.cast(model, "bfloat16")
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype is {np.dtype(dtype)}; expected a floating-point type, such as bfloat16")
    if not enabled(dtype):
        raise ValueError(f"{np.dtype(dtype)} is disabled: run under `jax.enable_x64(True)` or set JAX_ENABLE_X64=1")
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), model)


def enabled(dtype: DTypeLike) -> bool:
    """Whether JAX keeps arrays of this type as they are; 64 bits have to be switched on."""
    return jax.dtypes.canonicalize_dtype(dtype) == np.dtype(dtype)

"""What holds in every test: strict promotion of dtypes and ranks, no warnings, shapes checked at run time."""

import os

# The suite tests CPU semantics; without this, JAX would grab a GPU for a handful of tiny programs.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxvit import ViT, ViTConfig

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def random_model(config: ViTConfig, seed: int = 0) -> ViT:
    """A model with nothing at its initial value: norms, LayerScale and tokens would hide errors at theirs."""
    model = ViT(config, rngs=nnx.Rngs(seed))
    leaves, structure = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, noisy)


def random_images(seed: int, batch: int, height: int, width: int | None = None) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, height, width or height, 3)), jnp.float32)


TINY = dict(depth=3, width=32, heads=4, hidden=48, patch=4, grid=(5, 5))
"""A model small enough to test laws on, with more than one of everything; its patches count differs from its tokens."""

FAMILIES = {
    "dinov2": ViTConfig(**TINY),
    "dinov2 with registers": ViTConfig(**TINY, registers=3),
    "dinov2 giant": ViTConfig(**TINY, mlp="swiglu"),
    "dinov2 giant with registers": ViTConfig(**TINY, registers=3, mlp="swiglu"),
}


@pytest.fixture(params=FAMILIES, scope="session")
def model(request: pytest.FixtureRequest) -> ViT:
    """A random model of each family."""
    return random_model(FAMILIES[request.param])

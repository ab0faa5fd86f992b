"""What holds in every test: strict promotion of dtypes and ranks, no warnings, shapes checked at run time."""

import os

# The suite tests CPU semantics; without this, JAX would grab a GPU for a handful of tiny programs.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Its programs compile for seconds and run for microseconds. XLA_FLAGS= runs the suite on optimised ones.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

# Several processes share the cores: PyTorch's threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvit import ViT, ViTConfig
from jaxvit.model.params import abstract, from_params, to_params

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def random_model(config: ViTConfig, seed: int = 0) -> ViT:
    """A model with nothing at its initial value: norms, LayerScale and tokens would hide errors at theirs."""
    rng = np.random.default_rng(seed)  # NumPy, as JAX would compile a program for every shape

    def draw(name: str, shape: tuple[int, ...]) -> jax.Array:
        center = 1.0 if name.endswith(("scale", "gamma")) else 0.0
        return jnp.asarray(center + 0.2 * rng.normal(size=shape), jnp.float32)

    shapes = to_params(abstract(config))
    return from_params(config, {name: draw(name, leaf.shape) for name, leaf in shapes.items()})


def random_images(seed: int, batch: int, height: int, width: int | None = None) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, height, width or height, 3)), jnp.float32)


TINY = dict(depth=3, width=32, heads=4, hidden=48, patch=4, grid=(5, 5))
"""A model small enough to test laws on, with more than one of everything; its patches count differs from its tokens."""

FAMILIES = {
    "dinov2": ViTConfig(**TINY),
    "dinov2 with registers": ViTConfig(**TINY, registers=3),
    "dinov2 giant": ViTConfig(**TINY, mlp="swiglu"),
    "clip": ViTConfig(**TINY, mlp="quick_gelu", layer_scale=False, patch_bias=False, pre_norm=True, eps=1e-5),
    "dinov2 giant with registers": ViTConfig(**TINY, registers=3, mlp="swiglu"),
}


@pytest.fixture(params=["dinov2", "dinov2 with registers", "clip", "dinov2 giant with registers"], scope="session")
def model(request: pytest.FixtureRequest) -> ViT:
    """A random model of each family."""
    return random_model(FAMILIES[request.param])

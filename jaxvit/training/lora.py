"""Low-rank additions to frozen kernels (LoRA, Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxvit.model.params import Params, to_params
from jaxvit.model.vit import ViT
from jaxvit.training.split import BLOCKS, LORA, layers_of, ranges

WHERE = ("attn.qkv", "attn.proj")


def lora(
    model: ViT, rank: int, where: Sequence[str] = WHERE, *, layers: str = ":", key: Array, alpha: float | None = None
) -> Params:
    """Two small matrices for each chosen kernel, whose product is added to it: W + a b.

    They are further names of the dict that learns: `learn, frozen = split(model, "head"); learn |= lora(model, 8, ..)`.
    `join` adds them up exactly, to a plain model. `b` starts at 0, so the model starts as it is.

    Args:
      rank: r of a [layers, *inputs, r] and b [layers, r, *outputs]. Of queries, keys and values, a is shared.
      where: kernels in a block: `attn.qkv`, `attn.proj`, `mlp.fc1`, `mlp.fc2`, or those of a SwiGLU.
      layers: an index or a slice, such as "-4:".
      alpha: strength; a is scaled by alpha / r, which is 1 by default. At the start only a matters, so Adam's steps of
        b grow with it.

    Raises:
      ValueError: a kernel or layers that are not there, or a rank below 1.

    Example:

        learn, frozen = split(attach_head(model, 10, key=jax.random.key(1)), "head")
        learn |= lora(model, 8, key=jax.random.key(0))
    """
    params, depth = to_params(model), model.config.depth
    kernels = [name for name in params if name.startswith(BLOCKS) and name.endswith(".kernel")]
    if rank < 1:
        raise ValueError(f"rank is {rank}; expected 1 or more")
    found: Params = {}
    for place in where:
        name = f"{BLOCKS}{place}.kernel"
        if name not in kernels:
            known = ", ".join(each.removeprefix(BLOCKS).removesuffix(".kernel") for each in kernels)
            raise ValueError(f"blocks have no kernel {place!r}; there are {known}")
        kernel = params[name]
        inputs = 2 if place == "attn.proj" else 1
        ins, outs = kernel.shape[1 : 1 + inputs], kernel.shape[1 + inputs :]
        for start, stop in ranges(layers_of(layers, depth, f"layers={layers!r}")):
            key, own = jax.random.split(key)
            whole = (start, stop) == (0, depth)
            short = f"{'blocks' if whole else f'blocks[{start}:{stop}]'}.{place}.kernel"
            scale = (1.0 if alpha is None else alpha / rank) / np.sqrt(np.prod(ins))
            first = jax.random.normal(own, (stop - start, *ins, rank), kernel.dtype) * np.asarray(scale, kernel.dtype)
            second = jnp.zeros((stop - start, rank, *outs), kernel.dtype)
            found |= {short + end: a for end, a in zip(LORA, (first, second), strict=True)}
    return found

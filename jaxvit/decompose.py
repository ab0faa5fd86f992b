"""What an attention layer adds to a token, split exactly by where it came from.

For one query, with attention row a, values v, output projection W_o (bias b_o) and LayerScale gamma,

    attn_out = sum over tokens i of part(i) + bias,   part(i) = gamma * W_o concat_h(a_i^h v_i^h),   bias = gamma * b_o

(Lappe & Giese 2025, section 3). Value biases travel with the values. Parts of a group of tokens add up.

Axes as in `jaxvit.vit`; G groups of tokens, in the order of `TokenLayout.group_names`.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxvit.tokens import TokenLayout
from jaxvit.vit import Block, ViT

# These are sums of a few large terms that cancel: keep all bits also where matrix products default to fewer.
einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


class Parts(NamedTuple):
    """`groups.sum(axis=2) + bias` is attn_out.

    Attributes:
      groups: what each group of tokens contributes to each query row.
      bias: the output projection's bias, after LayerScale.
    """

    groups: Float[Array, "B Q G D"]
    bias: Float[Array, " D"]


def block_of(model: ViT, layer: int) -> Block:
    """One block's parameters, without the layer axis; `layer` may count from the end.

    Raises:
      ValueError: there is no such layer.
    """
    if not -model.config.depth <= layer < model.config.depth:
        raise ValueError(f"there is no layer {layer} in a model of {model.config.depth} layers")
    return jax.tree.map(lambda a: a[layer], model.blocks)


def attention_mass(pattern: Float[Array, "*batch T"], layout: TokenLayout) -> Float[Array, "*batch G"]:
    """How much of each attention row falls on each group; sums to 1 over groups."""
    return einsum("...T,TG->...G", pattern, jnp.asarray(layout.membership, pattern.dtype))


def attention_parts(
    model: ViT, layer: int, pattern: Float[Array, "B H Q T"], v: Float[Array, "B T H d"], layout: TokenLayout
) -> Parts:
    """Splits attn_out of one layer by groups of tokens.

    Args:
      pattern, v: what was recorded at these sites of this layer; Q may be any number of query rows.
    """
    block = block_of(model, layer)
    membership = jnp.asarray(layout.membership, pattern.dtype)
    z = einsum("BHQT,TG,BTHd->BQGHd", pattern, membership, v)
    out = einsum("BQGHd,HdD->BQGD", z, output_matrix(block))
    bias = block.attn.proj.bias
    assert bias is not None  # Attention always makes one
    return Parts(block.scale1(out), block.scale1(bias[...]))


def contributions(
    model: ViT,
    layer: int,
    pattern: Float[Array, "B H Q T"],
    v: Float[Array, "B T H d"],
    direction: Float[Array, "B Q D"],
) -> Float[Array, "B Q T"]:
    """<part(i), direction> for every token i: a map of what each token adds along a direction of the output.

    With direction = attn_out, the sum over tokens plus <bias, attn_out> is ||attn_out||^2.
    """
    block = block_of(model, layer)
    # Pulling the direction back through the output projection costs one vector, not one per token.
    pulled = einsum("BQD,HdD->BQHd", block.scale1(direction), output_matrix(block))
    return einsum("BHQT,BTHd,BQHd->BQT", pattern, v, pulled)


def output_matrix(block: Block) -> Float[Array, "H d D"]:
    """W_o, its input split by heads."""
    kernel = block.attn.proj.kernel[...]
    return kernel.reshape(block.attn.heads, -1, kernel.shape[1])

"""What a token is made of: the exact parts of what attention adds to it, and of what all layers together add.

For one query, with attention row a, values v, output projection W_o (bias b_o) and LayerScale gamma,

    attn_out = sum over tokens i and heads h of part(i, h) + bias,
    part(i, h) = gamma * W_o^h a_i^h v_i^h,    bias = gamma * b_o

(Lappe & Giese 2025, section 3). Value biases travel with the values. The parts of several tokens or heads add up.

All functions can be jitted, with `layers`, `layout` and words static. Arguments named after a site are what was
recorded there, after its edits: the parts of an edited run are as exact, unless `z` or `attn_out` itself was edited.

Axes as in `jaxvit.model.vit`; G groups of tokens, in the order of `TokenLayout.group_names`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxvit.model.layers import LayerNorm, LayerScale, RmsNorm
from jaxvit.model.tokens import TokenLayout
from jaxvit.model.vit import ViT

# These are sums of a few large terms that cancel: keep all bits also where matrix products default to fewer.
einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

Split = Literal["group", "head"]
"""Along what an update is split: groups of the tokens it came from, the heads it came through."""

Stage = Literal["heads", "proj", "layerscale"]
"""Where parts are read: outputs of the heads side by side, as the output projection reads them (H d = D numbers); after
the output projection; after LayerScale, where they are added to the stream. All three are D numbers."""

Layers = int | Sequence[int] | None
"""One layer, whose arrays have no axis of layers; or several, or all (None), whose arrays have it in front. Negative
ones count from the end."""


class Parts(NamedTuple):
    """The summands of what attention adds. With layers in front if there are several: [L, B, Q, .., D] and [L, D].

    Attributes:
      parts: [B, Q, *what it was split by, D].
      bias: [D], that of the output projection; zeros at the stage `heads`.
    """

    parts: Float[Array, "*axes D"]
    bias: Float[Array, "*layers D"]

    def total(self) -> Float[Array, "*axes D"]:
        """[B, Q, D], what `attention_parts` split: z at the stage `heads`, attn_out at `layerscale`."""
        split = self.parts.ndim - self.bias.ndim - 2
        return self.parts.sum(range(-1 - split, -1)) + jnp.expand_dims(self.bias, (-2, -3))


class Maps(NamedTuple):
    """Over the grid of patches, [B, Q, rows, columns]: where a token looks, and what that brings.

    Attributes:
      attention: the attention weights.
      contribution: <part(i), direction> of every patch i.
    """

    attention: Float[Array, "*axes rows columns"]
    contribution: Float[Array, "*axes rows columns"]


class Readout(NamedTuple):
    """What follows the heads in one layer: W_o, its input split by heads, its bias, and LayerScale."""

    kernel: Float[Array, "H d D"]
    bias: Float[Array, " D"]
    gamma: Float[Array, " D"]


def attention_mass(pattern: Float[Array, "*batch T"], layout: TokenLayout) -> Float[Array, "*batch G"]:
    """How much of each attention row falls on each group; sums to 1 over groups (figure 2a).

    Raises:
      ValueError: rows that do not have the layout's number of tokens.

    Example:

        pattern = model(images, record={"pattern": Take(layers=-1)}).trace["pattern"][0]
        attention_mass(pattern[:, :, 0], model.layout)  # [B, H, G]: attention of [CLS] on each group
    """
    _check_keys(pattern, layout)
    return einsum("...T,TG->...G", pattern, jnp.asarray(layout.membership, pattern.dtype))


def attention_flow(pattern: Float[Array, "*batch T T2"], layout: TokenLayout) -> Float[Array, "*batch G G2"]:
    """The attention of each group of queries, on average, to each group of keys; rows sum to 1.

    Heads and layers stay. Where the patterns of all layers are too much to hold, see `each_layer`.

    Args:
      pattern: of all queries, record={"pattern": Take(tokens="all")}.

    Raises:
      ValueError: a pattern that is not of all queries and keys.

    Example:

        pattern = model(images, record={"pattern": Take(tokens="all")}).trace["pattern"]
        attention_flow(pattern, model.layout)  # [L, B, H, G, G], from group to group
    """
    _check_keys(pattern, layout)
    _check_queries(pattern)
    total = einsum("...QF,QG->...GF", attention_mass(pattern, layout), jnp.asarray(layout.membership, pattern.dtype))
    sizes = jnp.asarray(layout.membership.sum(axis=0), pattern.dtype)
    return total / jnp.expand_dims(sizes, (*range(total.ndim - 2), -1))


def rollout(
    pattern: Float[Array, "L B H T T2"], *, rows: int | None = None, residual: float | Array = 0.5
) -> Float[Array, "B Q T"]:
    """Attention rollout (Abnar & Zuidema 2020): the product A_L-1 .. A_1 A_0, where

        A_l = residual I + (1 - residual) mean over heads of pattern_l

    Row q says how much every token of the embedding mixed into token q, were attention weights all there is. Rows sum
    to 1 if those of the pattern do.

    Args:
      pattern: of all queries, record={"pattern": Take(tokens="all")}; `[:l]` of it for the rollout up to block l.
      rows: for how many queries, from the first: 1 is [CLS] alone, which takes products of a vector with matrices in
        place of products of matrices. None: all.
      residual: weight of the identity branch.

    Raises:
      ValueError: a pattern that is not of all queries, a number of rows or a weight out of range.

    Example:

        pattern = model(images, record={"pattern": Take(tokens="all")}).trace["pattern"]
        rollout(pattern, rows=1)  # [B, 1, T], of [CLS]
    """
    _check_queries(pattern)
    T = pattern.shape[-1]
    rows = T if rows is None else rows
    if not 1 <= rows <= T:
        raise ValueError(f"rows is {rows}; expected 1 to {T}, the number of tokens")
    if not isinstance(residual, jax.Array) and not 0 <= residual <= 1:
        raise ValueError(f"residual is {residual}; expected a weight from 0 to 1")

    # From the last layer back, as the product is needed for its first rows only.
    def step(rolled_BQT, pattern_BHTT):
        attended = einsum("BQT,BTS->BQS", rolled_BQT, pattern_BHTT.mean(axis=1))
        return residual * rolled_BQT + (1 - residual) * attended, None

    # Zeros of the pattern's own batch, and not a broadcast: it holds as it is when images are sharded.
    start = jnp.zeros_like(pattern[-1, :, 0, :rows]) + jnp.eye(rows, T, dtype=pattern.dtype)[None]
    return jax.lax.scan(step, start, pattern, reverse=True)[0]


def attention_parts(
    model: ViT,
    layers: Layers,
    pattern: Float[Array, "*layers B H Q T"],
    v: Float[Array, "*layers B T H d"],
    layout: TokenLayout,
    *,
    by: Split | Sequence[Split] = "group",
    stage: Stage = "layerscale",
) -> Parts:
    """Splits what attention adds to its queries; `total()` of the parts is attn_out, for every stage its own value.

    Takes the memory of its result and no more: layers go one after another, and no intermediate has axes of both
    groups and tokens. Is computed in at least float32, whatever the model.

    Args:
      layers: which layers pattern and v are of.
      pattern: of any number of queries; `pattern[..., :1, :]` is the row of [CLS] alone.
      by: `group` of tokens, `head`, or both, ("group", "head"); the parts have these axes, in this order. Parts of a
        head at the stage `heads` are zero outside of its own d numbers, so that they add up like all others.

    Raises:
      ValueError: no such layer, stage or split; a pattern or values that do not fit the model, layers or layout.

    Example:

        trace = model(images, record={"pattern": Take(layers=-1), "v": Take(layers=-1)}).trace
        parts = attention_parts(model, -1, trace["pattern"][0], trace["v"][0], model.layout)
        parts.parts  # [B, Q, G, D], of each group of tokens; with `parts.bias` they add up to the update
    """
    split = (by,) if isinstance(by, str) else tuple(by)
    if not set(split) <= set(get_args(Split)) or len(set(split)) < len(split):
        raise ValueError(f"by is {by!r}; expected 'group', 'head', or both: ('group', 'head')")
    _check_stage(stage)
    _check_keys(pattern, layout)
    if layout.prefix != model.prefix:
        raise ValueError(f"the layout has {layout.registers} registers, the model {model.config.registers}")
    G = "G" if "group" in split else ""
    out = "BQ" + "".join({"group": "G", "head": "H"}[each] for each in split)
    kept = jnp.asarray(layout.membership[:, -1], pattern.dtype)  # the patches

    def of_layer(readout: Readout, pattern_BHQT: Array, v_BTHd: Array) -> Parts:
        if G:
            # Each prefix token is a group of its own. Patches are picked by zeros in the pattern: a copy of few rows
            # costs less than one of the values.
            prefix = layout.prefix
            z_prefix = einsum("BHQP,BPHd->BQPHd", pattern_BHQT[..., :prefix], v_BTHd[:, :prefix])
            z_patches = einsum("BHQT,BTHd->BQHd", pattern_BHQT * kept[None, None, None], v_BTHd)
            z = jnp.concatenate([z_prefix, z_patches[:, :, None]], axis=2)
        else:
            z = einsum("BHQT,BTHd->BQHd", pattern_BHQT, v_BTHd)
        if stage == "heads":
            if "head" in split:
                apart = jnp.eye(z.shape[-2], dtype=z.dtype)
                z = einsum(f"BQ{G}Hd,HK->{out}Kd", z, apart)
            return Parts(jax.lax.collapse(z, z.ndim - 2), jnp.zeros_like(readout.bias))
        parts = Parts(einsum(f"BQ{G}Hd,HdD->{out}D", z, readout.kernel), readout.bias)
        return parts if stage == "proj" else jax.tree.map(lambda x: x * _aligned(readout.gamma, x.ndim), parts)

    return _over_layers(model, layers, of_layer, pattern, v)


def contributions(
    model: ViT,
    layers: Layers,
    pattern: Float[Array, "*layers B H Q T"],
    v: Float[Array, "*layers B T H d"],
    direction: Float[Array, "*layers B Q D"],
    *,
    by_head: bool = False,
    stage: Stage = "layerscale",
) -> Float[Array, "*axes Q T"]:
    """<part(i), direction> for every token i, [B, Q, T]: a map of what each token adds along a direction of the output.

    With direction = attn_out, the sum over tokens plus <bias, attn_out> is ||attn_out||^2. Forms no vector per token.

    Args:
      layers, pattern, v, stage: as of `attention_parts`; the direction is one of that stage.
      by_head: <part(i, h), direction>, [B, H, Q, T] like the pattern.

    Raises:
      ValueError: no such layer or stage; arrays that do not fit the model or the layers.

    Example:

        trace = model(images, record=dict.fromkeys(("pattern", "v", "attn_out"), Take(layers=-1))).trace
        update = trace["attn_out"][0][:, : model.prefix]
        contributions(model, -1, trace["pattern"][0], trace["v"][0], update)  # [B, Q, T]: what each token brings of it
    """
    _check_stage(stage)

    def of_layer(readout: Readout, pattern_BHQT: Array, v_BTHd: Array, direction_BQD: Array) -> Array:
        # Apply the transposed output projection to the direction once, not to every token.
        if stage == "heads":
            pulled = direction_BQD.reshape(*direction_BQD.shape[:2], *readout.kernel.shape[:2])
        else:
            scaled = direction_BQD * readout.gamma[None, None] if stage == "layerscale" else direction_BQD
            pulled = einsum("BQD,HdD->BQHd", scaled, readout.kernel)
        maps_BHQT = pattern_BHQT * einsum("BTHd,BQHd->BHQT", v_BTHd, pulled)
        return maps_BHQT if by_head else maps_BHQT.sum(axis=1)

    return _over_layers(model, layers, of_layer, pattern, v, direction)


def patch_maps(
    model: ViT,
    layers: Layers,
    pattern: Float[Array, "*layers B H Q T"],
    v: Float[Array, "*layers B T H d"],
    layout: TokenLayout,
    direction: Float[Array, "*layers B Q D"] | None = None,
    *,
    by_head: bool = False,
) -> Maps:
    """Attention maps and contribution maps side by side (figure 4), [B, Q, rows, columns] over the grid of patches.

    A patch that is looked at may add nothing, or be cancelled; its contribution says what it adds.

    Args:
      layers, pattern, v, layout: as of `attention_parts`.
      direction: along what contributions are measured; None: the update itself, attn_out.
      by_head: [B, H, Q, rows, columns] for both; else attention is averaged and contributions are summed over heads.

    Raises:
      ValueError: as `attention_parts`.

    Example:

        trace = model(images, record={"pattern": Take(layers=-1), "v": Take(layers=-1)}).trace
        maps = patch_maps(model, -1, trace["pattern"][0], trace["v"][0], model.layout)
        maps.attention[:, 0]  # [B, rows, columns], of [CLS]
    """
    if direction is None:
        direction = attention_parts(model, layers, pattern, v, layout, by=()).total()
    _check_keys(pattern, layout)
    attention = pattern if by_head else pattern.mean(axis=-3)
    contribution = contributions(model, layers, pattern, v, direction, by_head=by_head)
    return Maps(*(m[..., layout.prefix :].reshape(*m.shape[:-1], *layout.grid) for m in (attention, contribution)))


def residual_parts(trace: Mapping[str, Array]) -> Float[Array, "S B T D"]:
    """The summands of the residual stream after L blocks, in order: embedding, attn_out 0, mlp_out 0, attn_out 1, ..

    So S = 1 + 2 L, attn_out is `[1::2]` and mlp_out `[2::2]`. They sum to the last resid_post. That holds in edited
    runs too, as long as the stream itself is left alone: an edit at `skip_attn` or `skip_mlp` (or `resid_mid`, ..) adds
    what it changes there, which is in none of these summands, and their sum is off by just the total of that.

    Args:
      trace: with `resid_pre` of the first layer or of all, and `attn_out` and `mlp_out` of all layers, of the same
        tokens; of any start, `run_from(l, ..)` too.

    Raises:
      ValueError: sites that are missing, or not of the same layers or tokens.

    Example:

        trace = model(images, record=["resid_pre", "attn_out", "mlp_out"]).trace
        residual_parts(trace).sum(0)  # [B, T, D], which is resid_post of the last layer
    """
    sites = ("resid_pre", "attn_out", "mlp_out")
    if missing := [site for site in sites if site not in trace]:
        raise ValueError(f"the trace lacks {', '.join(map(repr, missing))}; record {', '.join(map(repr, sites))}")
    first, attention, mlp = (trace[site] for site in sites)
    one_size = attention.shape == mlp.shape and first.shape[1:] == attention.shape[1:]
    if not one_size or len(first) not in (1, len(attention)):
        shapes = ", ".join(f"{site} {list(trace[site].shape)}" for site in sites)
        raise ValueError(f"the sum needs the same tokens of all layers, but the trace holds {shapes}")
    layers = jnp.stack([attention, mlp], axis=1)
    return jnp.concatenate([first[:1], jax.lax.collapse(layers, 0, 2)])


def accumulated_residual(
    trace: Mapping[str, Array], norm: Callable[[Array], Array] | None = None
) -> Float[Array, "S B T D"]:
    """The residual stream before the first block and after each sub-layer: the running sums of `residual_parts`.

    Entry 0 is the embedding, 2 l + 1 is resid_mid of layer l, 2 l + 2 its resid_post; for edited runs see
    `residual_parts`.

    Args:
      trace: as of `residual_parts`.
      norm: what to read the stream through; `model.norm` gives every entry as if the blocks ended there, with
        statistics of its own.

    Example:

        trace = model(images, record=["resid_pre", "attn_out", "mlp_out"]).trace
        accumulated_residual(trace, model.norm)[:, :, 0]  # [S, B, D]: [CLS], had the model ended there
    """

    # One after another, as the model adds them, so that in few bits too it is rounded like the model's stream.
    def step(x, part):
        x = x + part
        return x, x

    parts = residual_parts(trace)
    stream = jax.lax.scan(step, jnp.zeros_like(parts[0]), parts)[1]
    return stream if norm is None else norm(stream)


def through_norm(model: ViT, summands: PyTree[Array], tokens: Float[Array, "*batch D"]) -> PyTree[Array]:
    """What each summand of the final stream becomes in the model's output: `summands` after the final norm.

    A norm is linear once its statistics are known, and here they are those of `tokens`, the whole: summands that add up
    to it are sent to ones that, with the norm's bias `model.norm.bias`, add up to `model.norm(tokens)`.

    Args:
      summands, tokens: as summands and output of `direct_contributions`.

    Example:

        trace = model(images, record=["resid_pre", "attn_out", "mlp_out"]).trace
        parts = residual_parts(trace)
        through_norm(model, list(parts), parts.sum(0))  # of each part; with the norm's bias they add up to the output
    """
    norm = model.norm
    if not isinstance(norm, LayerNorm | RmsNorm):
        raise ValueError("this model has no norm after its blocks")
    centring = isinstance(norm, LayerNorm)

    def one(part: Array, whole: Array) -> Array:
        if centring:
            part, whole = (x - x.mean(-1, keepdims=True) for x in (part, whole))
        power = jnp.square(whole).mean(-1, keepdims=True)
        return part * jax.lax.rsqrt(power + norm.eps) * _aligned(norm.scale[...].astype(part.dtype), part.ndim)

    return _each(one, summands, tokens)


def direct_contributions(summands: PyTree[Array], output: Float[Array, "*batch D"]) -> PyTree[Array]:
    """<part, output> for every summand.

    Args:
      summands: any pytree of vectors, such as `Parts` or a dict. Their axes are those of the output, then whatever they
        were split by, then D; a bias may lack the last axes of the output. Where the output has size 1 it stands for
        all, so `out.tokens[None, :, :1]` is compared with the parts of all layers, [L, B, 1, G, D].
      output: [B, D], [B, Q, D], ..; attn_out, or the stream the summands are part of.

    Returns:
      The same pytree, without D.

    Raises:
      ValueError: a summand whose shape does not fit the output.

    Example:

        trace = model(images, record=["resid_pre", "attn_out", "mlp_out"]).trace
        parts = residual_parts(trace)[:, :, 0]
        direct_contributions(list(parts), parts.sum(0))  # of each part, how much of [CLS] lies along it
    """
    return _each(lambda part, whole: (part * whole).sum(-1), summands, output)


def projection_shares(summands: PyTree[Array], output: Float[Array, "*batch D"]) -> PyTree[Array]:
    """<part, output> / ||output||^2 for every summand: sums to 1 over summands that sum to the output (figures 5a, 7).

    A share may be negative, or above 1. All are 0 where the output is 0.

    Args, returns and errors: as of `direct_contributions`.

    Example:

        trace = model(images, record=["resid_pre", "attn_out", "mlp_out"]).trace
        parts = residual_parts(trace)[:, :, 0]
        projection_shares(list(parts), parts.sum(0))  # shares that sum to 1
    """

    def share(part: Array, whole: Array) -> Array:
        energy = (whole * whole).sum(-1)
        return jnp.where(energy > 0, (part * whole).sum(-1) / jnp.where(energy > 0, energy, 1), 0)

    return _each(share, summands, output)


def readout(model: ViT) -> Readout:
    """What follows the heads, of all layers: each of its arrays has an axis of layers in front.

    Raises:
      ValueError: a model that normalises what its heads write together, which is no sum over them.
    """
    c, attention = model.config, model.blocks.attn.proj
    if c.branch_norms:
        raise ValueError("this model normalises the joint output of its heads: it is not a sum of parts")
    kernel = attention.kernel[...]
    bias = jnp.zeros((c.depth, c.width), kernel.dtype) if attention.bias is None else attention.bias[...]
    gamma = model.blocks.scale1.gamma[...] if isinstance(model.blocks.scale1, LayerScale) else jnp.ones_like(bias)
    return Readout(kernel, bias, gamma)


def _over_layers(model: ViT, layers: Layers, of_layer: Callable[..., Any], pattern: Array, v: Array, *more: Array):
    """`of_layer(readout, pattern, v, *more)` of one layer, or of several one after another."""
    c = model.config
    several = range(c.depth) if layers is None else layers
    one = not isinstance(several, Sequence)
    for layer in [several] if one else several:
        if not -c.depth <= layer < c.depth:
            raise ValueError(f"there is no layer {layer} in a model of {c.depth} layers")
    front = () if one else (len(several),)
    n = len(front)
    B, _, Q, T = pattern.shape[n:] if pattern.ndim == n + 4 else (0,) * 4
    expected = {"pattern": (B, c.heads, Q, T), "v": (B, T, c.heads, c.head_size), "direction": (B, Q, c.width)}
    for (name, shape), array in zip(expected.items(), (pattern, v, *more), strict=False):
        if array.shape != front + shape:
            axes = {"pattern": "B H Q T", "v": "B T H d", "direction": "B Q D"}[name]
            raise ValueError(
                f"{name} has shape {list(array.shape)}; of {'layer' if one else 'layers'} {layers} and with a pattern "
                f"of shape {list(pattern.shape)}, expected {list(front + shape)} ({'' if one else 'L '}{axes})"
            )
    # A type of its own for all, as half precision has weights in float32 and values not.
    dtype = _wide(pattern, v, *more)
    arrays = [array.astype(dtype) for array in (pattern, v, *more)]
    at = several if one else np.asarray(several)
    readouts = readout(model)
    chosen = readouts if layers is None else jax.tree.map(lambda a: a[at], readouts)
    chosen = jax.tree.map(lambda a: a.astype(dtype), chosen)
    return of_layer(chosen, *arrays) if one else jax.lax.map(lambda xs: of_layer(*xs), (chosen, *arrays))


def _each(function: Callable[[Array, Array], Array], summands: PyTree[Array], output: Array) -> PyTree[Array]:
    """`function(part, output)` of every summand, both with as many axes, in one type."""

    def one(part: Array) -> Array:
        ndim, dtype = max(part.ndim, output.ndim), _wide(part, output)
        pair = [_aligned(x.astype(dtype), ndim) for x in (part, output)]
        if any(a != b and 1 not in (a, b) for a, b in zip(*(x.shape for x in pair), strict=True)):
            raise ValueError(
                f"a summand of shape {list(part.shape)} does not fit the output, {list(output.shape)}: expected its "
                f"axes, then what was split, then D"
            )
        return function(*pair)

    return jax.tree.map(one, summands)


def _aligned(x: Array, ndim: int) -> Array:
    """With axes of size 1 in front of the last, as many as are missing."""
    return jnp.expand_dims(x, range(x.ndim - 1, ndim - 1))


def _wide(*arrays: Array) -> jnp.dtype:
    """float64 if there is any, else float32: too few bits would not let parts add up."""
    return jnp.dtype(jnp.float64 if any(a.dtype == jnp.float64 for a in arrays) else jnp.float32)


def _check_stage(stage: str) -> None:
    if stage not in get_args(Stage):
        raise ValueError(f"no stage {stage!r}; the stages are {', '.join(get_args(Stage))}")


def _check_keys(pattern: Array, layout: TokenLayout) -> None:
    if pattern.shape[-1] != layout.tokens:
        raise ValueError(
            f"the pattern is over {pattern.shape[-1]} tokens, the layout has {layout.tokens}: for images of another "
            "size, use config.layout(height, width)"
        )


def _check_queries(pattern: Array) -> None:
    if pattern.shape[-2] != pattern.shape[-1]:
        raise ValueError(
            f"the pattern has rows of {pattern.shape[-2]} of {pattern.shape[-1]} queries, and all are needed: record "
            '{"pattern": Take(tokens="all")}'
        )

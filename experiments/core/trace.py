"""One run of the model, and all that the experiments read of it: every layer's update of [CLS], split by source.

Axes: L layers that ran, B images, H heads, T tokens, P prefix, R registers, N patches, G groups (`TokenLayout`), d, D.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal, NamedTuple, TypeVar, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxvit import Take, ViT
from jaxvit.analysis.decompose import Stage, attention_flow, attention_mass, einsum, readout
from jaxvit.model.edits import Edits
from jaxvit.model.run import layer_by_layer
from jaxvit.model.tap import Tap
from jaxvit.model.vit import Block

Reading = Stage | Literal["block", "final"]
"""Where a part is read: as `jaxvit.decompose.Stage`; or [CLS] after a block to which attention added only that part,
`block`, and that after the final norm, `final`."""
READINGS: tuple[str, ...] = (*get_args(Stage), "block", "final")

T = TypeVar("T")


class Trace(NamedTuple):
    """All but `attention` and `flow` of the query [CLS] alone, unless said otherwise. In at least float32, whatever the
    model: norms and cosines would be rounded to half per cents in bfloat16.

    Attributes:
      row: its attention, [L, B, H, T].
      mass: `row` summed over groups, [L, B, H, G].
      z: what the heads read, split by the group it came from, [L, B, G, H, d]; sums over G to the site `z`.
      skip, update, middle, mlp, after: sites skip_attn, attn_out, resid_mid, mlp_out and resid_post, [L, B, D].
      prefix: all prefix tokens as they enter each block, resid_pre, [L, B, P, D].
      tokens: all tokens after the last block, [B, T, D].
      norms: of all tokens after each block, [L, B, T].
      contribution: <part of a token, update> of every token, over all heads, [L, B, T], after LayerScale; with
        <bias, update> it sums to ||update||^2; only if wanted.
      attention: of all queries, mean over heads, [L, B, T, T]; only if wanted.
      flow: `attention` from group to group, [L, B, G, G]; only if wanted.
      largest, median: the largest |x| and the median |x| over tokens and channels after each block, [L, B]; where the
        largest stands, [L, B], by token and by channel; only if `activations` is wanted.
      sites: name -> [L, B, ..], whole, of the sites that experiments ask for (`Experiment.sites`).
    """

    row: Float[Array, "L B H T"]
    mass: Float[Array, "L B H G"]
    z: Float[Array, "L B G H d"]
    skip: Float[Array, "L B D"]
    update: Float[Array, "L B D"]
    middle: Float[Array, "L B D"]
    mlp: Float[Array, "L B D"]
    after: Float[Array, "L B D"]
    prefix: Float[Array, "L B P D"]
    norms: Float[Array, "L B T"]
    tokens: Float[Array, "B T D"]
    contribution: Float[Array, "L B T"] | None = None
    attention: Float[Array, "L B T T"] | None = None
    flow: Float[Array, "L B G G"] | None = None
    largest: Float[Array, "L B"] | None = None
    largest_token: Array | None = None
    largest_channel: Array | None = None
    median: Float[Array, "L B"] | None = None
    sites: Mapping[str, Array] = {}


def observe(
    model: ViT,
    images: Float[Array, "B H W 3"],
    edits: Edits | None = None,
    wants: Collection[str] = (),
    start: tuple[int, Array] | None = None,
    sites: Collection[str] = (),
) -> Trace:
    """Runs the model once; a pure function, to be jitted with `wants` and the number in `start` static.

    Args:
      wants: of "contribution", "attention", "flow" and "activations", the fields that cost time or memory.
      start: as of `each_layer`; then L counts the layers that ran.
      sites: names of `jaxvit.SITES` that are given whole beside the rest, for experiments that ask for them.
    """
    layout = model.config.layout(*images.shape[1:3])
    rows: Literal["all", "prefix"] = "all" if {"attention", "flow"} & set(wants) else "prefix"
    record = dict.fromkeys(("skip_attn", "attn_out", "resid_mid", "mlp_out", "resid_pre"), Take(tokens="prefix"))
    record |= {"pattern": Take(tokens=rows), "v": Take(), "resid_post": Take()}
    record |= dict.fromkeys(sites, Take(tokens="all"))

    def of_layer(trace: Mapping[str, Array], block: Block, layer: Array) -> dict[str, Array]:
        trace, block = widened((trace, block))
        pattern, v, after = trace["pattern"], trace["v"], trace["resid_post"]
        row = pattern[:, :, 0]
        prefix = layout.prefix
        z_prefix = einsum("BHP,BPHd->BPHd", row[..., :prefix], v[:, :prefix])
        z_patches = einsum("BHN,BNHd->BHd", row[..., prefix:], v[:, prefix:])
        of_cls = dict(skip="skip_attn", update="attn_out", middle="resid_mid", mlp="mlp_out")
        found = {name: trace[site][:, 0] for name, site in of_cls.items()}
        found |= {
            "row": row,
            "mass": attention_mass(row, layout),
            "z": jnp.concatenate([z_prefix, z_patches[:, None]], axis=1),
            "after": after[:, 0],
            "prefix": trace["resid_pre"][:, :prefix],
            "sites": {site: trace[site] for site in sites},
            "norms": jnp.linalg.norm(after, axis=-1),
        }
        if "contribution" in wants:
            # Apply the transposed output projection to the update once, not to every token.
            pulled = einsum("BD,HdD->BHd", block.scale1(found["update"]), block.attn.proj.kernel[...])
            found["contribution"] = einsum("BHT,BHT->BT", row, einsum("BTHd,BHd->BHT", v, pulled))
        mean = pattern.mean(axis=1)
        if "attention" in wants:
            found["attention"] = mean
        if "flow" in wants:
            found["flow"] = attention_flow(mean, layout)
        if "activations" in wants:
            size = jnp.abs(after).reshape(len(after), -1)
            at = size.argmax(axis=1)
            found |= {"largest": size.max(axis=1), "median": median(size)}
            found |= {"largest_token": at // after.shape[-1], "largest_channel": at % after.shape[-1]}
        return found

    ran = layer_by_layer(model, images, of_layer, record, edits, start=start)
    return Trace(tokens=widened(ran.stream), **ran.measured)


def widened(tree: T) -> T:
    """Arrays, or a model, with half-precision numbers as float32; a model that reads a `Trace` is to be so."""

    def wide(a: Array) -> Array:
        return a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) and a.dtype.itemsize < 4 else a

    return jax.tree.map(wide, tree)


def median(sizes: Float[Array, "B n"]) -> Float[Array, " B"]:
    """The median of numbers that are not negative, exact: bits are chosen from the highest down by counting, which on
    a CPU takes a tenth of the time of sorting.
    """
    kind = jnp.dtype(f"int{8 * sizes.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(sizes, kind)  # in the order of the numbers
    top, n = 8 * sizes.dtype.itemsize - 2, sizes.shape[1]
    lower, upper = (n - 1) // 2, n // 2

    def step(i: Array, found: Array) -> Array:
        larger = found | jnp.left_shift(jnp.ones_like(found), (top - i).astype(kind))
        return jnp.where((bits < larger[:, None]).sum(axis=1) <= lower, larger, found)

    low = jax.lax.fori_loop(0, top + 1, step, jnp.zeros_like(bits[:, 0]))
    next_one = jnp.where(bits > low[:, None], bits, jnp.iinfo(kind).max).min(axis=1)
    high = jnp.where((bits <= low[:, None]).sum(axis=1) > upper, low, next_one)
    low, high = (jax.lax.bitcast_convert_type(a, sizes.dtype) for a in (low, high))
    return low + (high - low) / 2


def parts(
    trace: Trace, model: ViT, layer: int = -1, *, stage: Stage = "layerscale", renormalise: bool = False
) -> dict[str, Float[Array, "B D"]]:
    """What each source adds to [CLS] in one layer: `cls`, `registers` (if there are any), `patches`, and the `bias`.

    They sum to the site attn_out (stage layerscale), to it before LayerScale (proj), or to the heads' outputs side by
    side (heads).

    Args:
      layer: of those of the trace, from the end: -1 is the model's last.
      renormalise: divide what a source gives to a head by the head's attention on that source, as if the softmax had
        been over it alone. They then no longer sum to the update.
    """
    return split(trace.z[layer], trace.mass[layer], model, layer, stage=stage, renormalise=renormalise)


def split(
    z_BGHd: Array, mass_BHG: Array, model: ViT, layer: int, *, stage: Stage = "layerscale", renormalise: bool = False
) -> dict[str, Float[Array, "B D"]]:
    """`parts` of the arrays of one layer."""
    after = jax.tree.map(lambda a: a[layer].astype(z_BGHd.dtype), readout(model))
    found = {}
    for name, z in by_source(z_BGHd, model, axis=1).items():
        if renormalise:
            mass = by_source(mass_BHG, model, axis=2)[name][..., None]
            z = jnp.where(mass > 0, z / jnp.where(mass > 0, mass, 1), 0)
        found[name] = z.reshape(len(z), -1) if stage == "heads" else einsum("BHd,HdD->BD", z, after.kernel)
    found["bias"] = jnp.zeros_like(found["patches"]) + (0 if stage == "heads" else after.bias[None])
    return found if stage != "layerscale" else {name: part * after.gamma[None] for name, part in found.items()}


def by_source(x: Array, model: ViT, axis: int) -> dict[str, Array]:
    """Sums an axis of groups into `cls`, `registers` (if there are any) and `patches`."""
    ranges = {"cls": (0, 1), "registers": (1, model.prefix), "patches": (model.prefix, model.prefix + 1)}
    return {
        name: jax.lax.slice_in_dim(x, *ends, axis=axis).sum(axis) for name, ends in ranges.items() if ends[0] < ends[1]
    }


def through_block(model: ViT, middle: Float[Array, "B D"], layer: int = -1) -> Float[Array, "B D"]:
    """A token after the MLP of a layer, from the stream between attention and MLP."""
    block = jax.tree.map(lambda a: a[layer], model.blocks)
    return middle + block.scale2(block.mlp(block.norm2(middle), Tap({}, {}, model.prefix)))


def cls_reading(model: ViT, middle: Float[Array, "B D"], reading: Literal["block", "final"]) -> Float[Array, "B D"]:
    """[CLS] after the last block, or after the final norm too, from the stream between its attention and MLP."""
    after = through_block(model, middle)
    return model.norm(after) if reading == "final" else after

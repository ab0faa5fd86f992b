"""Edits by the names of what they do. Each returns a mapping of sites to edits, for `model(images, edits)`.

    model(images, ablate(model, "z", layers=-1, heads=(0, 3)))
    model(images, knockout(model, query="cls", key="registers"))
    model(images, merge(steer(model, "resid_post", v, layers=5, tokens="cls"), remove_registers(model)))

What a number or a name selects may also be an array, a traced one too: an integer stands for that index, so that one
compiled program serves every layer, head and group; an array of the selection's length is used as the mask itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array

from jaxvit.edits import Edit, Operation, Over, Queries, Shuffle
from jaxvit.sites import ATTENTION_SITES, SITES, check_sites
from jaxvit.statistics import ActivationStats
from jaxvit.tokens import TokenLayout
from jaxvit.vit import ViT

SiteEdits = Mapping[str, Operation]


@dataclass(frozen=True)
class Positions:
    """Single tokens, by their place in the sequence of `layout`: an index, several, or a mask of all of them."""

    index: int | Sequence[int] | Array | np.ndarray
    layout: TokenLayout


Indices = int | Sequence[int] | Array | np.ndarray | None
Tokens = str | Sequence[str] | Indices | Positions


class Where(TypedDict, total=False):
    """What to edit; what is not named is edited whole.

    layers, heads, channels: an index (negative ones count from the end), several, an integer array that is an index, or
      a mask over all of them. `heads` where the site has heads; `channels` counts its last axis.
    tokens: `cls`, `registers`, `register 1` .., `patches`, several of these, a group's index, a mask over groups, or
      `Positions` for single tokens. Not at the attention sites.
    query, key: the same, at the attention sites, for the rows and columns of attention.
    queries: at the attention sites, `prefix` where only rows of [CLS] and registers change, which costs less, or `all`.
      By default read off `query`, if that is a name.
    """

    layers: Indices
    heads: Indices
    channels: Indices
    tokens: Tokens
    query: Tokens
    key: Tokens
    queries: Queries


def ablate(model: ViT, site: str, **where: Unpack[Where]) -> SiteEdits:
    """Sets values to zero. At the attention sites use `zero_attention` or `knockout`, which say what happens to the
    rest of the row.
    """
    return {site: Edit(**select(model, site, where))}


def patch(model: ViT, site: str, value: ArrayLike, over: Over | Literal["prefix"] = "tokens", **where: Unpack[Where]):
    """Puts the values of another run in place: `patch(model, "resid_post", other.trace["resid_post"], layers=5)`.

    Args:
      value: with the axes of the site; or with an axis of layers before them, of all layers, of the selected ones in
        order of depth, or of one.
      over: what the token axis of `value` counts: `tokens`; `groups`; or `prefix` for a value recorded of [CLS] and
        registers alone, which then are all that can be edited. At the attention sites the number of query rows must fit
        `queries`, which is `prefix` unless given, as in recording.
    """
    attention = site in ATTENTION_SITES
    if attention:
        where.setdefault("queries", "prefix")
    chosen = select(model, site, where)
    value = _with_layers(model, site, jnp.asarray(value), where.get("layers"))
    if over == "prefix":
        if attention:
            raise ValueError("over='prefix' is for sites of tokens; at the attention sites give queries='prefix'")
        if isinstance(where.get("tokens"), str | Sequence) and "patches" in _spelled(where.get("tokens")):
            raise ValueError("a value of [CLS] and registers alone cannot replace patches")
        value = jnp.pad(value, [(0, int(name == "T")) for name in ["L", *SITES[site].split()]])
        patches = jnp.arange(_groups(model)) < model.prefix
        chosen["mask"] = chosen["mask"] * _along(site, {"T": patches.astype(chosen["mask"].dtype)})
        over = "groups"
    return {site: Edit(shift=value, value_over=over, **chosen)}


def replace_by_mean(model: ViT, site: str, stats: ActivationStats, **where: Unpack[Where]) -> SiteEdits:
    """Puts the mean over images in place, of each layer and group."""
    return {site: Edit(shift=stats.mean(site), **select(model, site, where))}


def replace_by_noise(
    model: ViT,
    site: str,
    stats: ActivationStats,
    rng: Array,
    batch: int,
    layout: TokenLayout | None = None,
    **where: Unpack[Where],
) -> SiteEdits:
    """Puts Gaussian noise in place, with the mean and variance over images of each layer, group and channel.

    Args:
      rng: `jax.random.key(0)`.
      batch: number of images; each gets its own noise.
      layout: of the images, to draw for each patch by itself. Without it there is one draw for each group, which is all
        that [CLS] and registers need, and the edit leaves patches alone.
    """
    chosen = select(model, site, where)
    if layout is None:
        patches = jnp.arange(_groups(model)) < model.prefix
        chosen["mask"] = chosen["mask"] * _along(site, {"T": patches.astype(chosen["mask"].dtype)})
    return {
        site: Edit(shift=stats.noise(site, rng, batch, layout), value_over="tokens" if layout else "groups", **chosen)
    }


def replace_by_shuffle(
    model: ViT, site: str, order: ArrayLike, clean: ArrayLike | None = None, **where: Unpack[Where]
) -> SiteEdits:
    """Puts another image's values in place.

    Args:
      order: [B] or [L, B] integers: which image each image takes its values from.
      clean: [L, B, T, ..] or [1, B, T, ..], what was recorded at this site of a run without edits: the donor's values
        come from there. Without it they come from the same run, where the donor may have been edited too.
    """
    order = jnp.atleast_2d(jnp.asarray(order))
    chosen = select(model, site, where)
    if clean is None:
        return {site: Shuffle(order=order, **chosen)}
    clean = jnp.asarray(clean)
    rows = jnp.broadcast_to(order, (clean.shape[0], order.shape[1]))
    donor = jax.vmap(lambda x, one: jnp.take(x, one, axis=0))(clean, rows)
    return {site: Edit(shift=donor, value_over="tokens", **chosen)}


def amplify(model: ViT, site: str, factor: ArrayLike, **where: Unpack[Where]) -> SiteEdits:
    """Multiplies values by `factor`, a number or an array with the axes of an `Edit`."""
    return {site: Edit(scale=_number(factor), **select(model, site, where))}


def steer(model: ViT, site: str, vector: ArrayLike, **where: Unpack[Where]) -> SiteEdits:
    """Adds `vector`, [D] (at `q`, `k`, `v`, `z`: [d] or [H, d]), or an array with the axes of an `Edit`."""
    v = jnp.asarray(vector, float)
    rank = len(SITES[site].split()) + 1
    shift = jnp.expand_dims(v, range(rank - v.ndim)) if v.ndim else v
    return {site: Edit(scale=jnp.ones(()), shift=shift, **select(model, site, where))}


def knockout(model: ViT, **where: Unpack[Where]) -> SiteEdits:
    """Cuts attention from `query` to `key` before the softmax: what is left of a row is divided by its sum, and a row
    of which nothing is left is zeros.
    """
    return {"weights": Edit(**select(model, "weights", where))}


def zero_attention(model: ViT, **where: Unpack[Where]) -> SiteEdits:
    """Cuts attention from `query` to `key` after the softmax: the rest of a row stays as it is, and sums to less."""
    return {"pattern": Edit(**select(model, "pattern", where))}


def freeze_attention(model: ViT, pattern: ArrayLike, **where: Unpack[Where]) -> SiteEdits:
    """Uses the attention weights of another run.

    Args:
      pattern: as recorded: [L, B, H, Q, T], of [CLS] and registers, or of all queries with queries="all".
    """
    return patch(model, "pattern", pattern, **where)


def scale_skip(
    model: ViT, factor: ArrayLike, branch: Literal["attn", "mlp"] = "attn", **where: Unpack[Where]
) -> SiteEdits:
    """Multiplies the identity branch that attention's, or the MLP's, output is added to; 0 cuts the residual path."""
    return amplify(model, f"skip_{branch}", factor, **where)


def remove_registers(model: ViT, registers: Tokens = "registers") -> SiteEdits:
    """Nobody attends to these registers, in any layer: for all other tokens they are as good as deleted."""
    if not model.config.registers:
        raise ValueError("this model has no registers to remove")
    return knockout(model, key=registers)


# --- selection


def select(model: ViT, site: str, where: Where) -> dict[str, Any]:
    """`mask`, `mask_over` and `queries` of an edit.

    Raises:
      ValueError: an unknown site, a selection that the site does not have, an index or a name that is not there.
    """
    check_sites([site])
    axes = SITES[site].split()
    c = model.config
    last = {"D": c.width, "d": c.head_size, "F": c.hidden}.get(axes[-1])
    token_axes = {"query": "Q", "key": "T"} if site in ATTENTION_SITES else {"tokens": "T"}
    usable = ["layers", *token_axes, *(["heads"] if "H" in axes else []), *(["channels"] if last else [])]
    usable += ["queries"] if site in ATTENTION_SITES else []
    if wrong := [name for name in where if name not in usable]:
        raise ValueError(f"{site!r} has no {', '.join(wrong)}; what can be selected there: {', '.join(usable)}")

    masks = {"L": choose("layer", c.depth, where.get("layers"))}
    if "H" in axes:
        masks["H"] = choose("head", c.heads, where.get("heads"))
    if last and where.get("channels") is not None:
        masks[axes[-1]] = choose("channel", last, where.get("channels"))
    given = {axis: where.get(name) for name, axis in token_axes.items()}
    layouts = {what.layout for what in given.values() if isinstance(what, Positions)}
    if len(layouts) > 1:
        raise ValueError(f"positions in sequences of different layouts: {layouts}")
    layout = layouts.pop() if layouts else None
    for axis, what in given.items():
        if what is not None:
            masks[axis] = _tokens(c.registers, what, layout)
    queries: Queries = where.get("queries") or _rows(given.get("Q"))
    if queries == "prefix" and layout and "Q" in masks:
        masks["Q"] = masks["Q"][: layout.prefix]
    chosen: dict[str, Any] = {"mask": _along(site, masks), "mask_over": "tokens" if layout else "groups"}
    return {**chosen, "queries": queries} if site in ATTENTION_SITES else chosen


def choose(kind: str, size: int, what: Any, names: Mapping[str, Sequence[int]] | None = None) -> Array:
    """[size], 1 where selected."""
    if what is None:
        return jnp.ones(size)
    if isinstance(what, jax.Array | np.ndarray) and (what.ndim or isinstance(what, jax.Array)):
        if not jnp.issubdtype(what.dtype, jnp.integer):
            if what.shape != (size,):
                raise ValueError(f"a mask over {kind}s has shape {list(what.shape)}; expected [{size}]")
            return jnp.asarray(what, float)
        index = jnp.atleast_1d(jnp.where(what < 0, what + size, what))
        return (jnp.arange(size)[:, None] == index[None]).any(1).astype(float)
    mask = np.zeros(size)
    for one in [what] if isinstance(what, str) or not isinstance(what, Sequence) else what:
        if isinstance(one, str):
            if one not in (names or {}):
                raise ValueError(f"no {kind} {one!r}; there are {', '.join(names or ()) or f'0 to {size - 1}'}")
            mask[list((names or {})[one])] = 1
        elif not -size <= int(one) < size:
            raise ValueError(f"there is no {kind} {one}: they are 0 to {size - 1}")
        else:
            mask[int(one)] = 1
    return jnp.asarray(mask, float)


def _tokens(registers: int, what: Tokens, layout: TokenLayout | None) -> Array:
    """A mask over groups, or over the tokens of `layout`."""
    if isinstance(what, Positions):
        return choose("token", what.layout.tokens, what.index)
    groups = TokenLayout(registers, (1, 1)).group_names
    names = {name: [i] for i, name in enumerate(groups)}
    names |= {"registers": range(1, registers + 1), "all": range(len(groups))}
    mask = choose("group of tokens", len(groups), what, names)
    return mask if layout is None else mask[layout.groups]


def _spelled(what: Any) -> tuple[Any, ...]:
    return (what,) if isinstance(what, str) else tuple(what)


def _rows(query: Any) -> Queries:
    """Whether a selection of queries can hold patches."""
    if query is None or isinstance(query, Positions | jax.Array | np.ndarray | int):
        return "all"
    return "all" if {"patches", "all"} & set(_spelled(query)) else "prefix"


def _groups(model: ViT) -> int:
    return model.config.registers + 2


def _along(site: str, masks: Mapping[str, Array]) -> Array:
    """The product of masks, each along its axis of the site."""
    axes = ["L", *SITES[site].split()]
    product = jnp.ones([1] * len(axes))
    for name, mask in masks.items():
        product = product * jnp.expand_dims(mask, [i for i, axis in enumerate(axes) if axis != name])
    return product


def _number(value: ArrayLike) -> Array:
    return jnp.asarray(value, float)


def _with_layers(model: ViT, site: str, value: Array, layers: Any) -> Array:
    """A value with an axis of layers: of one, or of all."""
    rank, depth = len(SITES[site].split()), model.config.depth
    if value.ndim == rank:
        return value[None]
    if value.ndim != rank + 1:
        raise ValueError(
            f"the value for {site!r} has shape {list(value.shape)}; expected [{SITES[site].replace(' ', ', ')}], or "
            f"with an axis of layers before these"
        )
    if value.shape[0] in (1, depth):
        return value
    if isinstance(layers, Tracer):
        raise ValueError(f"the value has {value.shape[0]} layers and the layers are traced: give all {depth}, or one")
    chosen = np.flatnonzero(np.asarray(choose("layer", depth, layers)))
    if len(chosen) != value.shape[0]:
        raise ValueError(f"the value has {value.shape[0]} layers, and {len(chosen)} of {depth} layers are selected")
    return jnp.zeros((depth, *value.shape[1:]), value.dtype).at[chosen].set(value)

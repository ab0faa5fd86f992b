"""Edits by the names of what they do. Each returns a mapping of sites to edits, for `model(images, edits)`.

    model(images, ablate(model, "z", layers=-1, heads=(0, 3)))
    model(images, knockout(model, query="cls", key="registers"))
    model(images, merge(steer(model, "resid_post", v, layers=5, tokens="cls"), remove_registers(model)))

What a number or a name selects may also be an array, a traced one too: integers stand for those indices, so that one
compiled program serves every layer, head and group; numbers or booleans of the selection's length are the mask itself.
A traced index that is not there selects nothing; all else that does not fit is a ValueError.
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

from jaxvit.interventions.statistics import ActivationStats
from jaxvit.model.edits import Edit, Knockout, Operation, Over, Queries, Shuffle
from jaxvit.model.sites import ATTENTION_SITES, SITES, check_sites
from jaxvit.model.tokens import TokenLayout
from jaxvit.model.vit import ViT

SiteEdits = Mapping[str, Operation]


@dataclass(frozen=True)
class Positions:
    """Single tokens, by their place in the sequence of `layout`: an index, several, or a mask of all of them."""

    index: int | np.integer | Sequence[Any] | Array | np.ndarray
    layout: TokenLayout


Indices = int | np.integer | Sequence[Any] | Array | np.ndarray | None
Tokens = str | Sequence[str] | Indices | Positions


class Where(TypedDict, total=False):
    """What to edit; what is not named is edited whole.

    layers, heads, channels: an index (negative ones count from the end), several, an array of them, or a mask over all:
      floating-point numbers or booleans. `heads` where the site has heads; `channels` counts its last axis.
    tokens: `cls`, `registers`, `register 1` .., `patches`, several of these, a group's index, a mask over groups, or
      `Positions` for single tokens. Not at the attention sites.
    query, key: the same, at the attention sites, for the rows and columns of attention.
    queries: at the attention sites, `prefix` where only rows of [CLS] and registers change, which costs less, or `all`.
      By default read off `query`, if that is given by names.
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


def patch(
    model: ViT, site: str, value: ArrayLike, over: Over | Literal["prefix"] = "tokens", **where: Unpack[Where]
) -> SiteEdits:
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
        chosen["mask"] = _without_patches(model, site, where, chosen["mask"])
        value = jnp.pad(value, [(0, int(name == "T")) for name in ["L", *SITES[site].split()]])
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
        chosen["mask"] = _without_patches(model, site, where, chosen["mask"])
    noise = stats.noise(site, rng, batch, layout)
    return {site: Edit(shift=noise, value_over="groups" if layout is None else "tokens", **chosen)}


def replace_by_shuffle(
    model: ViT,
    site: str,
    order: ArrayLike | Sequence[int],
    clean: ArrayLike | None = None,
    **where: Unpack[Where],
) -> SiteEdits:
    """Puts another image's values in place.

    Args:
      order: [B] or [L, B] integers: which image each image takes its values from.
      clean: what was recorded at this site of a run without edits, as `patch` takes it: the donor's values come from
        there. Without it they come from the same run, where the donor may have been edited too.
    """
    order = order if isinstance(order, jax.Array) else np.asarray(order)
    order = order[None] if order.ndim == 1 else order
    if clean is None:
        return {site: Shuffle(order=order, **select(model, site, where))}
    check_sites([site])
    clean = _with_layers(model, site, jnp.asarray(clean), where.get("layers"))
    images, depth = clean.shape[1], model.config.depth
    if problems := Shuffle(0.0, order).problems(site, {"B": images}):
        raise ValueError(f"the shuffle at {site!r} {problems[0]}")
    if order.ndim != 2 or order.shape[1] != images or order.shape[0] not in (1, depth):
        raise ValueError(f"order has shape {list(order.shape)}; expected [{images}] or [{depth}, {images}]")
    each = (jnp.broadcast_to(a, (max(len(order), len(clean)), *a.shape[1:])) for a in (clean, jnp.asarray(order)))
    return patch(model, site, jax.vmap(lambda x, one: jnp.take(x, one, axis=0))(*each), **where)


def amplify(model: ViT, site: str, factor: ArrayLike, **where: Unpack[Where]) -> SiteEdits:
    """Multiplies values by `factor`, a number or an array with the axes of an `Edit`."""
    return {site: Edit(scale=jnp.asarray(factor, float), **select(model, site, where))}


def steer(model: ViT, site: str, vector: ArrayLike, **where: Unpack[Where]) -> SiteEdits:
    """Adds `vector`, [D] (at `q`, `k`, `v`, `z`: [d] or [H, d]), or a number or an array with the axes of an `Edit`."""
    check_sites([site])
    v, axes = jnp.asarray(vector, float), ["L", *SITES[site].split()]
    if v.ndim not in (0, 1, *([2] if "H d" in SITES[site] else []), len(axes)):
        raise ValueError(
            f"the vector for {site!r} has shape {list(v.shape)}; expected [{axes[-1]}], or all of [{', '.join(axes)}]"
        )
    shift = jnp.expand_dims(v, range(len(axes) - v.ndim)) if v.ndim else v
    return {site: Edit(scale=1.0, shift=shift, **select(model, site, where))}


def knockout(model: ViT, **where: Unpack[Where]) -> SiteEdits:
    """Cuts attention from `query` to `key` before the softmax: the rest of a row is renormalised, and a row of which
    nothing is left is zeros.
    """
    return {"scores": Knockout(**select(model, "scores", where))}


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
    """Nobody attends to these registers, in any layer: for all other tokens they are as good as deleted.

    Args:
      registers: all, or those of these names or groups: `register 2`, 2, (1, 2) ..
    """
    if not model.config.registers:
        raise ValueError("this model has no registers to remove")
    mask = _tokens(model, registers, None)
    if isinstance(mask, np.ndarray) and (mask[[0, -1]] != 0).any():
        raise ValueError(f"{registers!r} are not only registers; to cut off other tokens use knockout(model, key=..)")
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
    attention = site in ATTENTION_SITES
    token_axes = {"query": "Q", "key": "T"} if attention else {"tokens": "T"}
    usable = ["layers", *token_axes, *(["heads"] if "H" in axes else []), *(["channels"] if last else [])]
    usable += ["queries"] if attention else []
    if wrong := [name for name in where if name not in usable]:
        raise ValueError(f"{site!r} has no {', '.join(wrong)}; what can be selected there: {', '.join(usable)}")

    masks = {"L": choose("layer", c.depth, where.get("layers"))}
    if where.get("heads") is not None:
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
            masks[axis] = _tokens(model, what, layout)
    chosen: dict[str, Any] = {"mask_over": "groups" if layout is None else "tokens"}
    if attention:
        queries = where.get("queries") or _rows(model, given["Q"], masks.get("Q"))
        if queries == "prefix" and "Q" in masks:
            masks["Q"] = _prefix_rows(model, masks["Q"], layout)
        chosen["queries"] = queries
    return {"mask": _along(site, masks), **chosen}


Mask = Array | np.ndarray
"""A NumPy array unless what it selects is traced, so that `merge` and checks see it inside of `jit` too."""


def choose(kind: str, size: int, what: Any, names: Mapping[str, Sequence[int]] | None = None) -> Mask:
    """[size], 1 where selected."""
    if what is None:
        return np.ones(size, _float())
    if not isinstance(what, jax.Array | np.ndarray):
        entries = what if isinstance(what, Sequence) and not isinstance(what, str) else [what]
        if unknown := [one for one in entries if isinstance(one, str) and one not in (names or {})]:
            there = ", ".join(names or ()) or f"0 to {size - 1}"
            raise ValueError(f"no {kind} {', '.join(map(repr, unknown))}; there are {there}")
        spelled = [one for each in entries for one in ((names or {})[each] if isinstance(each, str) else [each])]
        if not spelled:
            return np.zeros(size, _float())
        traced = any(isinstance(one, Tracer) for one in spelled)
        try:
            what = jnp.stack([jnp.asarray(one) for one in spelled]) if traced else np.asarray(spelled)
        except (TypeError, ValueError):
            what = np.asarray(None)
    elif not isinstance(what, Tracer):
        what = np.asarray(what)
    if jnp.issubdtype(what.dtype, jnp.integer):
        return _indicated(kind, size, what.ravel())
    if what.shape != (size,) or what.dtype == object:
        of = f"an array of {what.dtype}, {list(what.shape)}" if what.dtype != object else f"{what!r}"
        raise ValueError(f"a selection of {kind}s is {of}; expected indices, or a mask of shape [{size}]")
    return what.astype(_float())


def _indicated(kind: str, size: int, indices: Mask) -> Mask:
    """1 at these indices."""
    if isinstance(indices, np.ndarray) and (outside := indices[(indices < -size) | (indices >= size)]).size:
        raise ValueError(f"there is no {kind} {outside[0]}: they are 0 to {size - 1}")
    counted = jnp.where(indices < 0, indices + size, indices) if isinstance(indices, Tracer) else indices % size
    return (np.arange(size)[:, None] == counted[None]).any(1).astype(_float())


def _float() -> np.dtype:
    """What JAX takes Python's numbers for."""
    return jax.dtypes.canonicalize_dtype(float)


def _tokens(model: ViT, what: Tokens, layout: TokenLayout | None) -> Mask:
    """A mask over groups, or over the tokens of `layout`."""
    registers = model.config.registers
    if isinstance(what, Positions):
        if what.layout.prefix != model.prefix:
            raise ValueError(
                f"positions in a sequence with {what.layout.registers} registers; the model has {registers}"
            )
        return choose("token", what.layout.tokens, what.index)
    groups = TokenLayout(registers, (1, 1), model.config.cls).group_names
    names: dict[str, Sequence[int]] = {name: [i] for i, name in enumerate(groups)}
    names |= {"registers": range(model.prefix - registers, model.prefix)} if registers else {}
    mask = choose("group of tokens", len(groups), what, names | {"all": range(len(groups))})
    return mask if layout is None else mask[layout.groups]


def _rows(model: ViT, query: Tokens, mask: Mask | None) -> Queries:
    """Whether a selection of queries by names holds patches."""
    names = [query] if isinstance(query, str) else query if isinstance(query, Sequence) else [None]
    if isinstance(mask, np.ndarray) and all(isinstance(name, str) for name in names):
        return "prefix" if not mask[model.prefix :].any() else "all"
    return "all"


def _prefix_rows(model: ViT, mask_Q: Mask, layout: TokenLayout | None) -> Mask:
    """A selection of queries for an edit that writes out the rows of [CLS] and registers alone."""
    if isinstance(mask_Q, np.ndarray) and mask_Q[model.prefix :].any():
        raise ValueError("queries='prefix' edits rows of [CLS] and registers alone; for those of patches give 'all'")
    return mask_Q if layout is None else mask_Q[: model.prefix]


def _without_patches(model: ViT, site: str, where: Where, mask: Mask) -> Mask:
    """The mask of an edit whose values are of [CLS] and registers alone: patches stay as they are."""
    axis = 1 + SITES[site].split().index("T")
    named = where.get("tokens") is not None and isinstance(mask, np.ndarray)
    if named and np.take(mask, range(model.prefix, mask.shape[axis]), axis).any():
        raise ValueError("values of [CLS] and registers alone cannot replace those of patches: select other tokens")
    before = np.arange(max(mask.shape[axis], model.prefix + 1)) < model.prefix
    return mask * _along(site, {"T": before.astype(mask.dtype)})


def _along(site: str, masks: Mapping[str, Mask]) -> Mask:
    """The product of masks, each along its axis of the site."""
    axes = ["L", *SITES[site].split()]
    product: Mask = np.ones([1] * len(axes), _float())
    for name, mask in masks.items():
        shape = [mask.shape[0] if axis == name else 1 for axis in axes]
        product = product * mask.reshape(shape)
    return product


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
    mask = choose("layer", depth, layers)
    if not isinstance(mask, np.ndarray):
        raise ValueError(f"the value has {value.shape[0]} layers and the layers are traced: give all {depth}, or one")
    chosen = np.flatnonzero(mask)
    if len(chosen) != value.shape[0]:
        raise ValueError(f"the value has {value.shape[0]} layers, and {len(chosen)} of {depth} layers are selected")
    return jnp.zeros((depth, *value.shape[1:]), value.dtype).at[chosen].set(value)

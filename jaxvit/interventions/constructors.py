"""Edits by the names of what they do. Each returns a mapping of sites to edits, for `model(images, edits)`.

    model(images, ablate(model, "z", layers=-1, heads=(0, 3)))
    model(images, knockout(model, query="cls", key="registers"))
    model(images, merge(steer(model, "resid_post", v, layers=5, tokens="cls"), remove_registers(model)))

Layers, heads, channels and registers count from 0, and negative numbers count from the end.

A selection is an index, several indices, or a mask: integers are indices, booleans and floating-point numbers from 0 to
1 are a mask over the whole axis. Arrays may be traced, so that one compiled program serves every layer, head and group.
A traced index that is not there selects nothing. Anything else that does not fit is a ValueError. So are integers that
could be either: `heads=[0, 1, 1, 0]` in a model of 4 heads. (Traced ones are not checked: they are indices.)
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
from jaxvit.model.edits import OTHER_SIZE, Edit, Knockout, Operation, Over, Queries, Shuffle
from jaxvit.model.sites import ATTENTION_SITES, SITES, check_sites
from jaxvit.model.tokens import TokenLayout
from jaxvit.model.vit import ViT

SiteEdits = Mapping[str, Operation]


Indices = int | np.integer | Sequence[Any] | Array | np.ndarray | None


@dataclass(frozen=True)
class Registers:
    """Registers by number, for `tokens`, `query` and `key`: register 0 is the first, never [CLS].

        ablate(model, "resid_pre", tokens=Registers(0))
        ablate(model, "resid_pre", layers=point["layer"], tokens=Registers(point["register"]))  # of grids.registers

    Attributes:
      index: a number, several, or a mask of all registers; may be traced. None: all.

    Example:

        model(images, ablate(model, "resid_pre", layers=-1, tokens=Registers((0, 2))))
    """

    index: Indices = None


@dataclass(frozen=True)
class TokenIndices:
    """Single tokens, by their place in the sequence: [CLS] is 0, then registers, then patches row by row.

    Attributes:
      index: a number, several, or a mask of all tokens; may be traced.
      layout: the layout of the images, `model.config.layout(height, width)`; `model.layout` for the default size.

    Example:

        ablate(model, "resid_pre", tokens=TokenIndices(-1, model.layout))  # the last patch
    """

    index: Indices
    layout: TokenLayout


Tokens = str | Sequence[str] | Indices | Registers | TokenIndices


class Where(TypedDict, total=False):
    """What to edit; what is not named is edited whole.

    layers, heads, channels: an index (from 0; negative ones count from the end), several, an array of them, or a mask
      over all: booleans, or floating-point numbers from 0 to 1. `heads` where the site has heads; `channels` counts its
      last axis.
    tokens: `cls`, `registers`, `register 0` .., `patches`, or several of these; `Registers` by number; `TokenIndices`
      for single tokens; or a mask over groups. A bare integer is the index of a *group*, as in a grid of groups: 0 is
      [CLS], where there is one, and never a register's number. Not at the attention sites.
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
    """Sets values to zero.

    At the attention sites use `zero_attention` or `knockout`: they say what happens to the rest of a row.

    Args:
      where: what to set to zero, see `Where`; by default all of the site.

    Raises:
      ValueError: the model has no such site, layer, head, channel or token.

    Example:

        model(images, ablate(model, "z", layers=-1, heads=(0, 3))).cls  # [B, D], without two heads of the last layer
    """
    return {site: Edit(**select(model, site, where))}


def patch(
    model: ViT, site: str, value: ArrayLike, over: Over | Literal["prefix"] = "tokens", **where: Unpack[Where]
) -> SiteEdits:
    """Replaces values by those of another run.

    Args:
      value: has the axes of the site, and may have an axis of layers before them. That axis holds the selected layers
        in the order of `layers` (for a mask: in order of depth), all layers in order of depth, or one layer that is
        used for all.
      over: what the token axis of `value` counts. `tokens`: all tokens. `groups`: [CLS], each register, all patches.
        `prefix`: [CLS] and registers; then only these can be edited. At the attention sites the number of query rows
        must fit `queries`, which is `prefix` by default, as in recording.

    Raises:
      ValueError: a value of another shape, another number of tokens, or a selection that is not there.

    Example:

        other = model(other_images, record="resid_post")
        model(images, patch(model, "resid_post", other.trace["resid_post"][5], layers=5, tokens="cls"))
    """
    if site in ATTENTION_SITES:
        where.setdefault("queries", "prefix")
    chosen = select(model, site, where)
    value = _with_layers(model, site, jnp.asarray(value), where.get("layers"))
    return _patched(model, site, value, over, where, chosen)


def _patched(
    model: ViT, site: str, value: Array, over: Over | Literal["prefix"], where: Where, chosen: dict[str, Any]
) -> SiteEdits:
    """The patch by a value whose layers are in order of depth."""
    if over == "tokens":
        _check_tokens(site, value, where)
    if over == "prefix":
        if site in ATTENTION_SITES:
            raise ValueError("over='prefix' is not for the attention sites: there give queries='prefix'")
        chosen["mask"] = _without_patches(model, site, where, chosen["mask"])
        value = jnp.pad(value, [(0, int(name == "T")) for name in ["L", *SITES[site].split()]])
        over = "groups"
    return {site: Edit(shift=value, value_over=over, **chosen)}


def replace_by_mean(model: ViT, site: str, stats: ActivationStats, **where: Unpack[Where]) -> SiteEdits:
    """Replaces values by their mean over images, of each layer and group of tokens.

    Args:
      stats: collected at this site, see `ActivationStats.collect`.

    Raises:
      ValueError: no statistics of this site, or a selection that is not there.

    Example:

        stats = ActivationStats.collect(model, jaxvit.stream(paths, model.config, 8), "resid_pre")
        model(images, replace_by_mean(model, "resid_pre", stats, layers=-1, tokens="registers"))
    """
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
    """Replaces values by Gaussian noise with the mean and variance over images of each layer, group and channel.

    Args:
      stats: collected at this site, see `ActivationStats.collect`.
      rng: a key, such as `jax.random.key(0)`.
      batch: number of images, B. Each image gets its own noise.
      layout: the layout of the images, such as `model.layout`: each patch gets its own noise. Without it only [CLS] and
        registers are replaced.

    Raises:
      ValueError: no statistics of this site, a layout of another size, or a selection that is not there.

    Example:

        replace_by_noise(model, "resid_pre", stats, jax.random.key(0), len(images), tokens="registers")
    """
    chosen = select(model, site, where)
    if layout is None:
        chosen["mask"] = _without_patches(model, site, where, chosen["mask"])
    selected = _layout_of(where)
    if layout is not None and selected is not None and layout != selected:
        raise ValueError(
            f"the noise is for {_sequence(layout)}, but tokens are selected in {_sequence(selected)}; {OTHER_SIZE}"
        )
    noise = stats.noise(site, rng, batch, layout)
    return {site: Edit(shift=noise, value_over="groups" if layout is None else "tokens", **chosen)}


def replace_by_shuffle(
    model: ViT,
    site: str,
    order: ArrayLike | Sequence[int],
    clean: ArrayLike | None = None,
    **where: Unpack[Where],
) -> SiteEdits:
    """Replaces the values of each image by those of another image.

    Args:
      order: [B] or [L, B] integers from 0 to B - 1: which image each image takes its values from. The layers are as in
        `clean`.
      clean: the values of a run without edits at this site, as `patch` takes them. Without it, values come from the
        edited run itself.

    Raises:
      ValueError: an order that is not of this shape and range, or a selection that is not there.

    Example:

        order = jnp.roll(jnp.arange(len(images)), 1)  # each image takes the registers of the one before it
        clean = model(images, record="resid_pre").trace["resid_pre"]
        model(images, replace_by_shuffle(model, "resid_pre", order, clean, tokens="registers"))
    """
    donor: Any = order if isinstance(order, jax.Array) else np.asarray(order)
    if donor.ndim not in (1, 2):
        raise ValueError(f"order has shape {list(donor.shape)}; expected [B], or [L, B]")
    images = donor.shape[-1]
    if not jnp.issubdtype(donor.dtype, jnp.integer):
        raise ValueError(f"the shuffle at {site!r} has an order of {donor.dtype}; expected integers")
    if not isinstance(donor, Tracer):
        donor = np.asarray(donor)
        if (outside := donor[(donor < 0) | (donor >= images)]).size:
            raise ValueError(f"the shuffle at {site!r} takes values of image {outside[0]}; they are 0 to {images - 1}")
    donor = donor[None] if donor.ndim == 1 else _by_depth(model, donor, where.get("layers"), "order")
    if clean is None:
        return {site: Shuffle(order=donor, **select(model, site, where))}
    if site in ATTENTION_SITES:
        where.setdefault("queries", "prefix")
    chosen = select(model, site, where)
    clean = _with_layers(model, site, jnp.asarray(clean), where.get("layers"))
    if images != clean.shape[1]:
        raise ValueError(
            f"order has shape {list(donor.shape)}; expected [{clean.shape[1]}] or "
            f"[{model.config.depth}, {clean.shape[1]}]"
        )
    each = (jnp.broadcast_to(a, (max(len(donor), len(clean)), *a.shape[1:])) for a in (clean, jnp.asarray(donor)))
    values = jax.vmap(lambda x, one: jnp.take(x, one, axis=0))(*each)
    return _patched(model, site, values, "tokens", where, chosen)


def amplify(model: ViT, site: str, factor: ArrayLike, **where: Unpack[Where]) -> SiteEdits:
    """Multiplies values by a factor.

    Args:
      factor: a number, or an array with an axis of layers and the axes of the site, each of which may be 1. Layers are
        as in `patch`.

    Raises:
      ValueError: a factor that does not fit the site, or a selection that is not there.

    Example:

        model(images, amplify(model, "mlp_out", 2.0, layers=range(4), tokens="patches"))
    """
    chosen = select(model, site, where)
    scale = jnp.asarray(factor, float)
    if scale.ndim == 1 + len(SITES[site].split()):
        scale = _by_depth(model, scale, where.get("layers"), "the factor")
    return {site: Edit(scale=scale, **chosen)}


def steer(model: ViT, site: str, vector: ArrayLike, **where: Unpack[Where]) -> SiteEdits:
    """Adds a vector.

    Args:
      vector: [D], or at the sites `q`, `k`, `v`, `z` [d] or [H, d]. Also a number, or an array with an axis of layers
        and the axes of the site, each of which may be 1. Layers are as in `patch`.

    Raises:
      ValueError: a vector of another shape, or a selection that is not there.

    Example:

        model(images, steer(model, "resid_post", 4 * direction, layers=5, tokens="cls"))  # direction: [D]
    """
    check_sites([site])
    v, axes = jnp.asarray(vector, float), ["L", *SITES[site].split()]
    if v.ndim not in (0, 1, *([2] if "H d" in SITES[site] else []), len(axes)):
        raise ValueError(
            f"the vector for {site!r} has shape {list(v.shape)}; expected [{axes[-1]}], or all of [{', '.join(axes)}]"
        )
    if v.ndim == len(axes):
        v = _by_depth(model, v, where.get("layers"), "the vector")
    shift = jnp.expand_dims(v, range(len(axes) - v.ndim)) if v.ndim else v
    return {site: Edit(scale=1.0, shift=shift, **select(model, site, where))}


def knockout(model: ViT, **where: Unpack[Where]) -> SiteEdits:
    """Cuts attention from `query` to `key` before the softmax.

    The rest of a row is renormalised. A row with no key left is zeros.

    Raises:
      ValueError: a selection that is not there.

    Example:

        model(images, knockout(model, query="cls", key="patches", layers=-1))
    """
    return {"scores": Knockout(**select(model, "scores", where))}


def zero_attention(model: ViT, **where: Unpack[Where]) -> SiteEdits:
    """Cuts attention from `query` to `key` after the softmax.

    The rest of a row keeps its weights, which then sum to less than 1.

    Raises:
      ValueError: a selection that is not there.

    Example:

        model(images, zero_attention(model, query="cls", key="registers"))
    """
    return {"pattern": Edit(**select(model, "pattern", where))}


def freeze_attention(model: ViT, pattern: ArrayLike, **where: Unpack[Where]) -> SiteEdits:
    """Replaces the attention weights by those of another run.

    Args:
      pattern: [L, B, H, Q, T], as recorded: the rows of [CLS] and registers, or with queries="all" those of all tokens.

    Raises:
      ValueError: as `patch`.

    Example:

        clean = model(images, record="pattern")
        edits = merge(freeze_attention(model, clean.trace["pattern"]), ablate(model, "mlp_out", layers=3))
    """
    return patch(model, "pattern", pattern, **where)


def scale_skip(
    model: ViT, factor: ArrayLike, branch: Literal["attn", "mlp"] = "attn", **where: Unpack[Where]
) -> SiteEdits:
    """Multiplies the skip path of a block: the stream that the output of attention, or of the MLP, is added to.

    Args:
      factor: as of `amplify`; 0 cuts the skip path.
      branch: `attn`: the skip path around attention; `mlp`: the one around the MLP.

    Raises:
      ValueError: as `amplify`.

    Example:

        model(images, scale_skip(model, 0.0, layers=-1, tokens="cls")).cls  # only what attention brings to [CLS]
    """
    return amplify(model, f"skip_{branch}", factor, **where)


def remove_registers(model: ViT, registers: str | Sequence[str] | Indices = None, layers: Indices = None) -> SiteEdits:
    """Masks registers as attention keys: for all other tokens they do not exist.

    Args:
      registers: numbers from 0, a mask over all registers, or names such as `register 0`. Numbers may be traced. None:
        all registers.
      layers: in which layers. None: in every layer.

    Raises:
      ValueError: a model without registers, or a register that is not there.

    Example:

        model(images, remove_registers(model, 0)).cls  # without the first register
    """
    if not model.config.registers:
        raise ValueError("this model has no registers to remove")
    names = [registers] if isinstance(registers, str) else registers if isinstance(registers, Sequence) else []
    if wrong := [one for one in names if isinstance(one, str) and not one.startswith("register")]:
        raise ValueError(
            f"{', '.join(map(repr, wrong))} is not a register: to cut off other tokens use knockout(model, key=..)"
        )
    return knockout(model, key=Registers(registers), layers=layers)


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
    layout = _layout_of(where)
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
    found = _read(kind, size, what, names)
    if not jnp.issubdtype(found.dtype, jnp.integer):
        return found.astype(_float())
    counted = jnp.where(found < 0, found + size, found) if isinstance(found, Tracer) else found % size
    return (np.arange(size)[:, None] == counted[None]).any(1).astype(_float())


def _read(kind: str, size: int, what: Any, names: Mapping[str, Sequence[int]] | None = None) -> Mask:
    """Indices [n], integers in the order in which they are given; or a mask [size], of another type."""
    sure = isinstance(what, range)  # that integers are indices
    if not isinstance(what, jax.Array | np.ndarray):
        entries = what if isinstance(what, Sequence) and not isinstance(what, str) else [what]
        sure |= any(isinstance(one, str) for one in entries)
        if unknown := [one for one in entries if isinstance(one, str) and one not in (names or {})]:
            there = ", ".join(names or ()) or f"0 to {size - 1}"
            raise ValueError(f"no {kind} {', '.join(map(repr, unknown))}; there are {there}")
        spelled = [one for each in entries for one in ((names or {})[each] if isinstance(each, str) else [each])]
        if not spelled:
            return np.zeros(0, int)
        booleans = sum(isinstance(one, bool | np.bool_) for one in spelled)
        if 0 < booleans < len(spelled):
            raise ValueError(
                f"a selection of {kind}s mixes booleans and numbers, {what!r}; expected indices, or a mask of shape "
                f"[{size}]"
            )
        traced = any(isinstance(one, Tracer) for one in spelled)
        try:
            what = jnp.stack([jnp.asarray(one) for one in spelled]) if traced else np.asarray(spelled)
        except (TypeError, ValueError):
            what = np.asarray(None)
    elif not isinstance(what, Tracer):
        what = np.asarray(what)
    if jnp.issubdtype(what.dtype, jnp.integer):
        indices = what.ravel()
        if isinstance(indices, np.ndarray):
            _check_indices(kind, size, indices, sure)
        return indices
    fits = what.dtype == bool or jnp.issubdtype(what.dtype, jnp.floating)
    if what.shape != (size,) or not fits:
        of = f"an array of {what.dtype}, {list(what.shape)}" if what.dtype != object else f"{what!r}"
        raise ValueError(f"a selection of {kind}s is {of}; expected indices, or a mask of shape [{size}]")
    if isinstance(what, np.ndarray) and (outside := what[~((what >= 0) & (what <= 1))]).size:
        raise ValueError(
            f"a mask of {kind}s holds {outside[0]}; expected numbers from 0 to 1, or indices as integers, such as [0]"
        )
    return what


def _check_indices(kind: str, size: int, indices: np.ndarray, sure: bool) -> None:
    """Refuses indices that are not there, and integers that could be a mask."""
    if (outside := indices[(indices < -size) | (indices >= size)]).size:
        raise ValueError(f"there is no {kind} {outside[0]}: they are 0 to {size - 1}")
    if not sure and size > 1 and len(indices) == size and np.isin(indices, (0, 1)).all():
        numbers = sorted(set(indices.tolist()))
        spelled = "range(2)" if len(numbers) == size else f"{numbers}"
        raise ValueError(
            f"a selection of {kind}s is {indices.tolist()}, which could be a mask or indices: write "
            f"np.array({(indices == 1).tolist()}) for the mask, or {spelled} for the indices"
        )


def _float() -> np.dtype:
    """What JAX takes Python's numbers for."""
    return jax.dtypes.canonicalize_dtype(float)


def _layout_of(where: Where) -> TokenLayout | None:
    """The sequence in which single tokens are selected, if any are."""
    selections = (where.get("tokens"), where.get("query"), where.get("key"))
    layouts = {what.layout for what in selections if isinstance(what, TokenIndices)}
    if len(layouts) > 1:
        raise ValueError(
            f"tokens are selected in different layouts, {' and '.join(map(_sequence, layouts))}; {OTHER_SIZE}"
        )
    return layouts.pop() if layouts else None


def _sequence(layout: TokenLayout) -> str:
    return f"a sequence of {layout.tokens} tokens ({layout.grid[0]}x{layout.grid[1]} patches)"


def _check_tokens(site: str, value: Array, where: Where) -> None:
    """That a value over tokens is of the sequence in which single tokens are selected."""
    layout = _layout_of(where)
    if layout is None:
        return
    count = value.shape[1 + SITES[site].split().index("T")]
    if count not in (1, layout.tokens):
        raise ValueError(
            f"the value for {site!r} has {count} tokens, but tokens are selected in {_sequence(layout)}; {OTHER_SIZE}"
        )


def _tokens(model: ViT, what: Tokens, layout: TokenLayout | None) -> Mask:
    """A mask over groups, or over the tokens of `layout`."""
    c = model.config
    if isinstance(what, TokenIndices):
        if (what.layout.registers, what.layout.cls) != (c.registers, c.cls):
            raise ValueError(
                f"tokens are selected in a sequence with {what.layout.registers} registers; the model has "
                f"{c.registers}: take the layout from model.config.layout(height, width)"
            )
        try:
            return choose("token", what.layout.tokens, what.index)
        except ValueError as error:
            raise ValueError(f"{error}, in {_sequence(what.layout)}; {OTHER_SIZE}") from None
    groups = TokenLayout(c.registers, (1, 1), c.cls).group_names
    first, end = int(c.cls), int(c.cls) + c.registers
    if isinstance(what, Registers):
        if not c.registers:
            raise ValueError("registers are selected, but this model has none")
        numbers: dict[str, Sequence[int]] = {name: [i] for i, name in enumerate(groups[first:end])}
        chosen = choose("register", c.registers, what.index, numbers | {"registers": range(c.registers)})
        pad: Any = np.pad if isinstance(chosen, np.ndarray) else jnp.pad
        mask = pad(chosen, (first, 1))
    else:
        names: dict[str, Sequence[int]] = {name: [i] for i, name in enumerate(groups)}
        names |= {"registers": range(first, end)} if c.registers else {}
        mask = choose("group of tokens", len(groups), what, names | {"all": range(len(groups))})
    return mask if layout is None else mask[layout.groups]


def _rows(model: ViT, query: Tokens, mask: Mask | None) -> Queries:
    """Whether a selection of queries by names, or of registers, holds patches."""
    if isinstance(query, Registers):
        return "prefix"
    names = [query] if isinstance(query, str) else query if isinstance(query, Sequence) else [None]
    if isinstance(mask, np.ndarray) and all(isinstance(name, str) for name in names):
        return "prefix" if not mask[model.prefix :].any() else "all"
    return "all"


def _prefix_rows(model: ViT, mask_Q: Mask, layout: TokenLayout | None) -> Mask:
    """A selection of queries for an edit that writes out the rows of [CLS] and registers alone."""
    if isinstance(mask_Q, np.ndarray) and mask_Q[model.prefix :].any():
        raise ValueError("queries='prefix' edits only the rows of [CLS] and registers: give queries='all' for patches")
    return mask_Q if layout is None else mask_Q[: model.prefix]


def _without_patches(model: ViT, site: str, where: Where, mask: Mask) -> Mask:
    """The mask of an edit whose values are of [CLS] and registers alone: patches stay as they are."""
    axis = 1 + SITES[site].split().index("T")
    named = where.get("tokens") is not None and isinstance(mask, np.ndarray)
    if named and np.take(mask, range(model.prefix, mask.shape[axis]), axis).any():
        raise ValueError("these values are of [CLS] and registers and cannot replace patches: select other tokens")
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


def _with_layers(model: ViT, site: str, value: Array, layers: Indices) -> Array:
    """A value with an axis of layers in order of depth: of one, or of all."""
    rank = len(SITES[site].split())
    if value.ndim == rank:
        return value[None]
    if value.ndim != rank + 1:
        raise ValueError(
            f"the value for {site!r} has shape {list(value.shape)}; expected [{SITES[site].replace(' ', ', ')}], or "
            f"with an axis of layers before these"
        )
    return _by_depth(model, value, layers, "the value")


def _by_depth(model: ViT, value: Any, layers: Indices, what: str) -> Any:
    """[n, ..] whose layers are in the order in which `layers` names them, or all in order of depth; as [1 or L, ..] in
    order of depth. A single layer holds for all.
    """
    depth, n = model.config.depth, len(value)
    if n == 1 or (layers is None and n == depth):
        return value
    found = np.arange(depth) if layers is None else _read("layer", depth, layers)
    if not jnp.issubdtype(found.dtype, jnp.integer) and isinstance(found, np.ndarray):
        found = np.flatnonzero(found)
    if isinstance(found, np.ndarray):
        order = found % depth
        if len(set(order.tolist())) < len(order):
            raise ValueError(f"layers is {layers!r}, which names a layer twice; {what} needs each layer once")
        if len(order) != n and n != depth:
            raise ValueError(f"{what} has {n} layers, but {len(order)} of {depth} layers are selected")
    else:  # traced: indices that are not there are dropped
        order = jnp.where(found < 0, found + depth, found)
        order = jnp.where((order < 0) | (order >= depth), depth, order)
        if not jnp.issubdtype(found.dtype, jnp.integer) or len(found) != n:
            if n != depth:
                raise ValueError(
                    f"{what} has {n} layers, but the selected layers are traced: give all {depth} layers, or one"
                )
            return value
    if len(order) != n:
        return value
    if isinstance(value, np.ndarray) and isinstance(order, np.ndarray):
        placed = np.zeros((depth, *value.shape[1:]), value.dtype)
        placed[order] = value
        return placed
    return jnp.zeros((depth, *value.shape[1:]), value.dtype).at[order].set(value, mode="drop")

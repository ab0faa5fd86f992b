"""Interventions as data: what a run changes inside itself is a pytree of arrays.

Every edit has one form. With a mask m between 0 and 1, and what the edit puts in place of x,

    x <- (1 - m) x + m replacement(x)

which is x at m = 0 and the replacement at m = 1, both exactly, and whose derivative in m is what attribution patching
needs. `Edit`, whose replacement is scale x + shift, covers all but what depends on other activations of the same run:
`Shuffle` and `Relocate`.

A model takes a mapping of sites to edits. The sites are part of the program, every array is data: other values never
compile anything again, `jax.vmap` over masks runs many interventions at once, and `jax.grad` goes through.

Axes as in `jaxvit.sites`; G groups of tokens, in the order of `TokenLayout.group_names`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array

from jaxvit.sites import ATTENTION_SITES, SITES, check_sites

Over = Literal["groups", "tokens"]
"""What the token axes of an edit's arrays count."""
Queries = Literal["prefix", "all"]


class Operation(ABC):
    """x <- (1 - m) x + m replacement(x). Frozen dataclasses that are pytrees; see `Edit` for their arrays' axes."""

    mask: Any
    mask_over: Over
    queries: Queries = "all"

    @abstractmethod
    def replacement(self, site: str, x: Array, prefix: int) -> Array:
        """What stands in place of x where the mask is 1. The arrays have lost their layer axis."""

    @abstractmethod
    def token_axes(self) -> dict[str, Over | None]:
        """Field -> what its token axes count; None for a field without the axes of the site."""

    def __call__(self, site: str, x: Array, prefix: int) -> Array:
        """Applies the edit, its arrays without their layer axis, to the value of one layer."""
        if site in ATTENTION_SITES and self.queries == "prefix" and x.shape[2] > prefix:
            edited = self(site, x[:, :, :prefix], prefix)
            return jnp.concatenate([edited, x[:, :, prefix:]], axis=2)
        m = expand(site, self.mask, self.mask_over, x, prefix)
        new = self.replacement(site, x, prefix)
        # 0 times infinity is NaN: what is not finite does not count where its factor is 0. Gradients do not pass it.
        new = jnp.where(jnp.isfinite(new) | (m != 0), new, 0)
        x = jnp.where(jnp.isfinite(x) | (m != 1), x, 0)
        return (1 - m) * x + m * new


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["mask", "scale", "shift"],
    meta_fields=["mask_over", "value_over", "queries"],
)
@dataclass(frozen=True)
class Edit(Operation):
    """x <- (1 - m) x + m (scale x + shift).

    Arrays have the axes of the site, see `SITES`, after an axis of layers; every axis may be 1, which holds for all.
    Token axes count groups ([CLS], each register, all patches; expanded inside the block) or single tokens, which
    `mask_over` and `value_over` say. A number is the same everywhere. In float32 or the model's own type, whose
    arithmetic they take part in.

    Attributes:
      mask: where to edit, and how much of it, 0 to 1.
      scale, shift: 0 and 0 erase; 0 and v replace by v; s and 0 amplify; 1 and v steer.
      mask_over, value_over: whether token axes of `mask`, and of `scale` and `shift`, count `groups` or `tokens`.
      queries: at the attention sites, the query rows that may change: those of [CLS] and registers (`prefix`, whose
        weights are written out at little cost), or `all`. Over tokens, the query axis has as many rows.
    """

    mask: Any
    scale: Any = 0.0
    shift: Any = 0.0
    mask_over: Over = "groups"
    value_over: Over = "groups"
    queries: Queries = "all"

    def replacement(self, site: str, x: Array, prefix: int) -> Array:
        scale, shift = (expand(site, a, self.value_over, x, prefix) for a in (self.scale, self.shift))
        return scale * x + shift

    def token_axes(self) -> dict[str, Over | None]:
        return {"mask": self.mask_over, "scale": self.value_over, "shift": self.value_over}


@partial(jax.tree_util.register_dataclass, data_fields=["mask", "order"], meta_fields=["mask_over", "queries"])
@dataclass(frozen=True)
class Shuffle(Operation):
    """x <- (1 - m) x + m x[order]: another image's value in the same run, which may itself have been edited.

    Attributes:
      mask: as of `Edit`.
      order: [L or 1, B] integers: which image each image takes the value of.
    """

    mask: Any
    order: Any
    mask_over: Over = "groups"
    queries: Queries = "all"

    def replacement(self, site: str, x: Array, prefix: int) -> Array:
        return jnp.take(x, jnp.asarray(self.order), axis=0)

    def token_axes(self) -> dict[str, Over | None]:
        return {"mask": self.mask_over, "order": None}


@partial(jax.tree_util.register_dataclass, data_fields=["mask", "to"], meta_fields=["mask_over", "queries"])
@dataclass(frozen=True)
class Relocate(Operation):
    """Moves a channel's activation from the patches to chosen tokens: those get its largest value over all patches, all
    other tokens 0.

    With register neurons at `mlp_post` and an appended register, these are test-time registers (Jiang et al. 2025,
    arXiv 2506.08010).

    Attributes:
      mask: as of `Edit`; which channels, in which layers.
      to: [L or 1, 1, G or 1, 1], 1 for the groups of tokens that receive the value.
    """

    mask: Any
    to: Any
    mask_over: Over = "groups"
    queries: Queries = "all"

    def replacement(self, site: str, x: Array, prefix: int) -> Array:
        to = expand(site, self.to, "groups", x, prefix)
        return to * x[:, prefix:].max(axis=1, keepdims=True)

    def token_axes(self) -> dict[str, Over | None]:
        return {"mask": self.mask_over, "to": "groups"}


Edits = Mapping[str, Operation | Sequence[Operation]]
"""Site -> an edit, or several that are applied in order."""


def expand(site: str, leaf: ArrayLike, over: Over, x: Array, prefix: int) -> Array:
    """An edit's array, without its layer axis, in the type of x and with axes that fit it: groups become tokens."""
    a = jnp.asarray(leaf, x.dtype)
    if over == "tokens" or a.ndim == 0:
        return a
    for axis in token_axes(site):
        if a.shape[axis] > 1:
            a = spread(a, axis, x.shape[axis], prefix)
    return a


def token_axes(site: str) -> tuple[int, ...]:
    """Which axes of one layer count tokens."""
    return tuple(i for i, name in enumerate(SITES[site].split()) if name in "TQ")


def spread(a: Array, axis: int, tokens: int, prefix: int) -> Array:
    """Groups to tokens along one axis, or to the tokens before the patches alone."""
    if tokens == prefix:
        return jax.lax.slice_in_dim(a, 0, prefix, axis=axis)
    shape = list(a.shape)
    shape[axis] = tokens - prefix
    patches = jnp.broadcast_to(jax.lax.slice_in_dim(a, prefix, prefix + 1, axis=axis), shape)
    return jnp.concatenate([jax.lax.slice_in_dim(a, 0, prefix, axis=axis), patches], axis=axis)


def listed(edits: Edits | None) -> dict[str, tuple[Operation, ...]]:
    """The edits of every site as a tuple.

    Raises:
      ValueError: an unknown site, or something that is no edit.
    """
    if not isinstance(edits, Mapping | None):
        raise ValueError(f"edits is {edits!r}; expected a mapping of sites to edits (what to record is record=..)")
    check_sites(edits or ())
    every = {s: (e,) if isinstance(e, Operation) else tuple(e) for s, e in (edits or {}).items()}
    if wrong := [site for site, each in every.items() if not all(isinstance(e, Operation) for e in each)]:
        raise ValueError(f"what is given at {', '.join(map(repr, wrong))} is no Edit")
    return {site: each for site, each in every.items() if each}


def check_edits(edits: Mapping[str, Sequence[Operation]], sizes: Mapping[str, int]) -> None:
    """Raises a ValueError that lists every array whose shape does not fit, or that holds NaN or infinity.

    The values of arrays that are traced are not known: there, what is not finite reaches what the mask selects. Minus
    infinity is a score like any other.

    Args:
      sizes: axis name -> size, of the letters in `SITES`, L and P.
    """
    wrong = []
    for site, each in edits.items():
        for edit in each:
            for name, over in edit.token_axes().items():
                leaf = getattr(edit, name)
                if not isinstance(leaf, Tracer) and not np.isfinite(values := np.asarray(leaf, float)).all():
                    bad = values[~np.isfinite(values)]
                    if site != "scores" or name != "shift" or not np.isneginf(bad).all():
                        wrong.append(f"{name} of the {type(edit).__name__} at {site!r} holds NaN or infinity")
                shape = np.shape(leaf)
                if not shape:
                    continue
                axes = ["L", *(SITES[site].split() if over else ["B"])]
                known = {**sizes, "Q": sizes["P" if edit.queries == "prefix" else "T"]}
                if over == "groups":
                    known |= dict.fromkeys("TQ", sizes["P"] + 1)
                expected = [known[axis] for axis in axes]
                if len(shape) != len(expected) or any(n not in (1, e) for n, e in zip(shape, expected, strict=True)):
                    what = f"one for each of {sizes['P'] + 1} groups" if over == "groups" else "one for each token"
                    wrong.append(
                        f"{name} of the {type(edit).__name__} at {site!r} has shape {list(shape)}; expected "
                        f"{expected} ({' '.join(axes)}{f', {what}' if over else ''}), any axis of which may be 1"
                    )
    if wrong:
        raise ValueError("; ".join(wrong))


def by_layer(edits: Any, depth: int) -> tuple[list[Array], Callable[[Sequence[Array]], Any]]:
    """The arrays that differ between layers, to be scanned or indexed along their first axis; and a function from one
    layer's part of them to the edits of that layer. What is the same in all layers is not copied for each.
    """
    leaves, structure = jax.tree.flatten(edits)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    varies = [leaf.ndim > 0 and leaf.shape[0] == depth > 1 for leaf in leaves]

    def of_layer(parts: Sequence[Array]) -> Any:
        part = iter(parts)
        every = [next(part) if v else leaf[0] if leaf.ndim else leaf for leaf, v in zip(leaves, varies, strict=True)]
        return jax.tree.unflatten(structure, every)

    return [leaf for leaf, v in zip(leaves, varies, strict=True) if v], of_layer


def merge(*edits: Edits, in_order: bool = False) -> Edits:
    """All edits together.

    Edits of different sites go together as they are. At one site they are applied in the order given, which must not
    matter: their masks may not meet.

    Args:
      in_order: allow masks that meet; the later edit then reads what the earlier one left.

    Raises:
      ValueError: two edits of one site meet, or their masks are traced (inside `jit` or `vmap`), so that nobody can
        tell; `in_order=True` allows both.
    """
    merged: dict[str, tuple[Operation, ...]] = {}
    for more in edits:
        for site, new in listed(more).items():
            old = merged.get(site, ())
            if not in_order:
                for a in old:
                    for b in new:
                        _check_apart(site, a, b)
            merged[site] = old + new
    return {site: each[0] if len(each) == 1 else each for site, each in merged.items()}


def _check_apart(site: str, a: Operation, b: Operation) -> None:
    way_out = "or give in_order=True, and the later one reads what the earlier one left"
    if any(isinstance(edit.mask, Tracer) for edit in (a, b)):
        raise ValueError(
            f"two edits at {site!r} have masks that are traced, so that whether they meet cannot be seen: merge them "
            f"outside of the compiled function, {way_out}"
        )
    masks = [np.asarray(edit.mask) for edit in (a, b)]
    if a.mask_over != b.mask_over:
        grouped, single = masks if a.mask_over == "groups" else masks[::-1]
        for axis in token_axes(site):
            if grouped.ndim and single.ndim and grouped.shape[1 + axis] > 1 and single.shape[1 + axis] > 1:
                groups = np.minimum(np.arange(single.shape[1 + axis]), grouped.shape[1 + axis] - 1)
                grouped = np.take(grouped, groups, axis=1 + axis)
        masks = [grouped, single]
    try:
        meet = (masks[0] != 0) & (masks[1] != 0)
    except ValueError:
        raise ValueError(
            f"two edits at {site!r} have masks of shapes {list(masks[0].shape)} and {list(masks[1].shape)}, which do "
            f"not go together"
        ) from None
    if meet.any():
        layers = sorted({int(i) for i in np.nonzero(meet)[0]}) if meet.ndim else []
        where = f" in layers {layers}" if meet.ndim and meet.shape[0] > 1 else ""
        raise ValueError(f"two edits at {site!r} change the same values{where}: leave one out, {way_out}")

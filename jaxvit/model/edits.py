"""Interventions as data: what a run changes inside itself is a pytree of arrays.

Every edit has one form. With a mask m between 0 and 1, and what the edit puts in place of x,

    x <- (1 - m) x + m replacement(x)

which is x at m = 0 and the replacement at m = 1, both exactly, and whose derivative in m is what attribution patching
needs. `Edit`, whose replacement is scale x + shift, covers all but three: `Shuffle` and `Relocate` depend on other
activations of the same run, and `Knockout` adds log(1 - m) to attention scores.

A model takes a mapping of sites to edits. The sites are part of the program, every array is data: other values never
compile anything again, `jax.vmap` over masks runs many interventions at once, and `jax.grad` goes through.

Axes as in `jaxvit.model.sites`; G groups of tokens, in the order of `TokenLayout.group_names`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array

from jaxvit.model.sites import ATTENTION_SITES, SITES, check_sites

OTHER_SIZE = "for images of another size than the default take the layout from model.config.layout(height, width)"

Over = Literal["groups", "tokens"]
"""What the token axes of an edit's arrays count."""
Queries = Literal["prefix", "all"]


class Operation(ABC):
    """x <- (1 - m) x + m replacement(x). Frozen dataclasses that are pytrees; see `Edit` for their arrays' axes."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    mask: Any
    mask_over: Over
    queries: Queries = "all"
    reads_own_token: ClassVar[bool] = True  # and no other: it can be applied to some of the tokens

    def __post_init__(self) -> None:
        for name, choices in (("mask_over", Over), ("value_over", Over), ("queries", Queries)):
            if (value := getattr(self, name, None)) not in (None, *get_args(choices)):
                expected = " or ".join(map(repr, get_args(choices)))
                raise ValueError(f"{name} is {value!r}; expected {expected}")

    @abstractmethod
    def replacement(self, site: str, x: Array, prefix: int) -> Array:
        """What stands in place of x where the mask is 1. The arrays have lost their layer axis."""

    def derivative(self, site: str, x: Array, prefix: int) -> Array:
        """How x changes to first order as the mask goes from 0 to where it is."""
        return self(site, x, prefix) - x

    @abstractmethod
    def token_axes(self) -> dict[str, Over | None]:
        """Field -> what its token axes count; None for a field without the axes of the site."""

    def of_prefix(self, site: str, prefix: int) -> Operation:
        """The edit, its arrays without their layer axis, for a value that is there before the patches alone."""
        rows = token_axes(site)[0]
        changed = {
            name: jax.lax.slice_in_dim(jnp.asarray(a), 0, prefix, axis=rows)
            for name, over in self.token_axes().items()
            if over == "tokens" and np.ndim(a := getattr(self, name)) and a.shape[rows] > 1
        }
        return replace(self, **changed)

    def problems(self, site: str, sizes: Mapping[str, Any]) -> list[str]:
        """What else is wrong with the edit at this site, each after its name; see `check_edits`."""
        return []

    def __call__(self, site: str, x: Array, prefix: int) -> Array:
        """Applies the edit, its arrays without their layer axis, to the value of one layer."""
        if site in ATTENTION_SITES and self.queries == "prefix" and x.shape[2] > prefix:
            edited = self(site, x[:, :, :prefix], prefix)
            return jnp.concatenate([edited, x[:, :, prefix:]], axis=2)
        m = expand(site, self.mask, self.mask_over, x, prefix)
        return times(1 - m, x) + times(m, self.replacement(site, x, prefix))


def times(factor: Array, x: Array) -> Array:
    """factor x, where 0 times NaN or infinity is 0: what an edit takes out is gone, whatever it was."""
    return factor * jnp.where(jnp.isfinite(x) | (factor != 0), x, 0)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["mask", "scale", "shift"],
    meta_fields=["mask_over", "value_over", "queries"],
)
@dataclass(frozen=True)
class Edit(Operation):
    """x <- (1 - m) x + m (scale x + shift).

    Arrays have an axis of layers and then the axes of the site, see `SITES`. An axis of size 1 holds for all; so does a
    number. Token axes count groups ([CLS], each register, all patches) or single tokens: `mask_over` and `value_over`
    say which. Arrays are in float32 or in the model's own type.

    Attributes:
      mask: where to edit, and how much of it, 0 to 1.
      scale, shift: 0 and 0 erase; 0 and v replace by v; s and 0 amplify; 1 and v steer.
      mask_over, value_over: whether token axes of `mask`, and of `scale` and `shift`, count `groups` or `tokens`.
      queries: at the attention sites, the query rows that may change: those of [CLS] and registers (`prefix`, whose
        weights are written out at little cost), or `all`. Over tokens, the query axis has as many rows.

    Example:

        mask = np.zeros((12, 1, 1, 1), np.float32)  # layers, images, groups, channels
        mask[5] = 1
        model(images, {"mlp_out": Edit(mask, scale=0.5)})  # half of what the MLP of layer 5 adds; as `amplify`
    """

    mask: Any
    scale: Any = 0.0
    shift: Any = 0.0
    mask_over: Over = "groups"
    value_over: Over = "groups"
    queries: Queries = "all"

    def replacement(self, site: str, x: Array, prefix: int) -> Array:
        scale, shift = (expand(site, a, self.value_over, x, prefix) for a in (self.scale, self.shift))
        return times(scale, x) + shift

    def token_axes(self) -> dict[str, Over | None]:
        return {"mask": self.mask_over, "scale": self.value_over, "shift": self.value_over}


@partial(jax.tree_util.register_dataclass, data_fields=["mask", "order"], meta_fields=["mask_over", "queries"])
@dataclass(frozen=True)
class Shuffle(Operation):
    """x <- (1 - m) x + m x[order]: the value of another image in the same run, where it may have been edited too.

    Attributes:
      mask: as of `Edit`.
      order: [L or 1, B] integers: which image each image takes its value from.

    Example:

        model(images, {"resid_pre": Shuffle(1.0, np.array([[1, 0]]))})  # two images swap
    """

    mask: Any
    order: Any
    mask_over: Over = "groups"
    queries: Queries = "all"

    def replacement(self, site: str, x: Array, prefix: int) -> Array:
        return jnp.take(x, jnp.atleast_1d(self.order), axis=0)

    def token_axes(self) -> dict[str, Over | None]:
        return {"mask": self.mask_over, "order": None}

    def problems(self, site: str, sizes: Mapping[str, Any]) -> list[str]:
        if not jnp.issubdtype(jnp.result_type(self.order), jnp.integer):
            return [f"has an order of {jnp.result_type(self.order)}; expected integers"]
        if isinstance(self.order, Tracer):
            return []
        outside = [i for i in np.unique(np.asarray(self.order)).tolist() if not 0 <= i < sizes["B"]]
        return [f"takes values of image {outside[0]}; they are 0 to {sizes['B'] - 1}"] if outside else []


@partial(jax.tree_util.register_dataclass, data_fields=["mask", "to"], meta_fields=["mask_over", "queries"])
@dataclass(frozen=True)
class Relocate(Operation):
    """Moves the activation of channels from the patches to chosen tokens.

    These tokens get the largest value over all patches. All other tokens get 0.

    With register neurons at `mlp_post` and an appended register, these are test-time registers (Jiang et al. 2025,
    arXiv 2506.08010).

    Attributes:
      mask: as of `Edit`; which channels, in which layers.
      to: [L or 1, 1, G or 1, 1], at sites of heads [.., 1, 1]: 1 for the groups of tokens that receive the value.
    """

    mask: Any
    to: Any
    mask_over: Over = "groups"
    queries: Queries = "all"
    reads_own_token: ClassVar[bool] = False

    def replacement(self, site: str, x: Array, prefix: int) -> Array:
        to = expand(site, self.to, "groups", x, prefix)
        return times(to, x[:, prefix:].max(axis=1, keepdims=True))

    def token_axes(self) -> dict[str, Over | None]:
        return {"mask": self.mask_over, "to": "groups"}

    def problems(self, site: str, sizes: Mapping[str, Any]) -> list[str]:
        return ["moves values between tokens, and this site has two axes of them"] if site in ATTENTION_SITES else []


@partial(jax.tree_util.register_dataclass, data_fields=["mask"], meta_fields=["mask_over", "queries"])
@dataclass(frozen=True)
class Knockout(Operation):
    """scores <- scores + log(1 - m): cuts attention before the softmax, so that the rest of a row is renormalised.

    The mask is 1 where a query may not attend to a key; a fraction weakens. Stands at the site `scores` alone, and acts
    after all other edits there. A row of which every key is cut is zeros. Computed as a factor 1 - m on the weights
    before they are normalised: exact at m = 1, with finite gradients, and without writing out the weights of patches.

    Attributes:
      mask: as of `Edit`, [L, B, H, Q, T].
      queries: as of `Edit`.

    Example:

        model(images, {"scores": Knockout(mask)})  # `jaxvit.knockout` makes masks from names
    """

    mask: Any
    mask_over: Over = "groups"
    queries: Queries = "all"

    def replacement(self, site: str, x: Array, prefix: int) -> Array:
        return jnp.full_like(x, -jnp.inf)

    def __call__(self, site: str, x: Array, prefix: int) -> Array:
        rows = np.arange(x.shape[2])
        return x + jnp.log(self.factor(rows, x.shape[3], prefix, x.dtype))

    def derivative(self, site: str, x: Array, prefix: int) -> Array:
        return self.factor(np.arange(x.shape[2]), x.shape[3], prefix, x.dtype) - jnp.ones_like(x)

    def factor(self, rows: Array | np.ndarray, tokens: int, prefix: int, dtype: np.dtype) -> Array:
        """1 - mask for these query rows, [B or 1, H or 1, Q or 1, T or 1]."""
        m = jnp.asarray(self.mask, dtype)
        if not m.ndim:
            m = m.reshape(1, 1, 1, 1)
        if self.mask_over == "groups" and m.shape[3] > 1:
            m = spread(m, 3, tokens, prefix)
        within = jnp.asarray(rows < prefix)[:, None]
        if m.shape[2] > 1:
            places = rows if self.mask_over == "tokens" else jnp.minimum(jnp.asarray(rows), prefix)
            m = jnp.take(m, jnp.asarray(places), axis=2, mode="clip")
        if self.queries == "prefix":
            m = jnp.where(within[None, None], m, 0)
        return 1 - m

    def token_axes(self) -> dict[str, Over | None]:
        return {"mask": self.mask_over}

    def problems(self, site: str, sizes: Mapping[str, Any]) -> list[str]:
        return [] if site == "scores" else ["cuts attention before the softmax: it stands at 'scores' alone"]


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


def normalise_edits(edits: Edits | None) -> dict[str, tuple[Operation, ...]]:
    """The edits of every site as a tuple; sites without any are left out.

    Raises:
      ValueError: an unknown site, or something that is no edit.
    """
    if not isinstance(edits, Mapping | None):
        what = repr(edits) if isinstance(edits, str) else f"of type {type(edits).__name__}"
        raise ValueError(f"edits is {what}; expected a mapping of sites to edits (for what to record, use record=..)")
    check_sites(edits or ())
    every = {s: tuple(e) if isinstance(e, Sequence) else (e,) for s, e in (edits or {}).items()}
    if wrong := [site for site, each in every.items() if not all(isinstance(e, Operation) for e in each)]:
        raise ValueError(f"the edits at {', '.join(map(repr, wrong))} are neither an Edit nor a sequence of edits")
    return {site: each for site, each in every.items() if each}


def check_edits(edits: Mapping[str, Sequence[Operation]], sizes: Mapping[str, Any]) -> None:
    """Raises a ValueError that lists every array whose shape does not fit, or that holds NaN or infinity.

    Traced values are not checked: NaN then propagates where the mask is not zero. Minus infinity is a valid score.

    Args:
      sizes: axis name -> size, of the letters in `SITES`, L and P.
    """
    wrong = []
    for site, each in edits.items():
        for edit in each:
            if site in ATTENTION_SITES and edit.queries == "prefix" and not sizes["P"]:
                wrong.append(f"queries='prefix' at {site!r} edits nothing: this model has no class token or registers")
            of_arrays = [problem for name in edit.token_axes() for problem in _unfit(edit, name, site, sizes)]
            of_whole = [] if of_arrays else edit.problems(site, sizes)
            wrong += of_arrays + [f"the {type(edit).__name__} at {site!r} {problem}" for problem in of_whole]
    if wrong:
        raise ValueError("; ".join(wrong))


def _unfit(edit: Operation, name: str, site: str, sizes: Mapping[str, Any]) -> list[str]:
    """What is wrong with one array of an edit."""
    leaf, over = getattr(edit, name), edit.token_axes()[name]
    what = f"{name} of the {type(edit).__name__} at {site!r}"
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic | float | int):
        return [f"{what} is of type {type(leaf).__name__}; expected an array or a number"]
    wrong = []
    if not isinstance(leaf, Tracer):
        module: Any = jnp if isinstance(leaf, jax.Array) else np  # where the array is: it may be large
        with jax.ensure_compile_time_eval():
            fine = module.isfinite(leaf) | (module.isneginf(leaf) if site == "scores" and name == "shift" else False)
            if not fine.all():
                wrong.append(f"{what} holds NaN or infinity")
    axes = ["L", *(SITES[site].split() if over else ["B"])]
    known = {**sizes, "Q": sizes["P" if edit.queries == "prefix" else "T"]}
    if over == "groups":
        known |= dict.fromkeys("TQ", sizes["P"] + 1)
    shape, expected = np.shape(leaf), [known[axis] for axis in axes]
    if shape and (len(shape) != len(expected) or any(n not in (1, e) for n, e in zip(shape, expected, strict=True))):
        count = {None: "", "groups": f", one for each of {sizes['P'] + 1} groups", "tokens": ", one for each token"}
        size = f"; {OTHER_SIZE}"
        wrong.append(
            f"{what} has shape {list(shape)}; expected {expected} ({' '.join(axes)}{count[over]}), any axis of which "
            f"may be 1{size if over == 'tokens' else ''}"
        )
    return wrong


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
    """Combines several mappings of edits into one.

    Edits of one site are applied in the order given. Their masks may not overlap, so that the order does not matter.
    The masks of knock-outs may: these are always applied last.

    Args:
      in_order: allow masks that overlap; a later edit then reads what the earlier one left.

    Raises:
      ValueError: the masks of two edits of one site overlap, or are traced (inside `jit` or `vmap`), so that this is
        not known; `in_order=True` allows both.

    Example:

        merge(ablate(model, "z", layers=3, heads=0), steer(model, "resid_post", v, layers=5), remove_registers(model))
    """
    merged: dict[str, tuple[Operation, ...]] = {}
    for more in edits:
        for site, new in normalise_edits(more).items():
            old = merged.get(site, ())
            if not in_order:
                for a in old:
                    for b in new:
                        if not isinstance(a, Knockout) and not isinstance(b, Knockout):  # which come last anyway
                            _check_apart(site, a, b)
            merged[site] = old + new
    return {site: each[0] if len(each) == 1 else each for site, each in merged.items()}


def one_of(index: int | Array, *choices: Edits) -> Edits:
    """The edits of `choices[index]`, where the number may be traced: one program compares several interventions.

        one_of(point["control"], ablate(..), replace_by_mean(..))  # of a grid with control=("zero", "mean")

    All choices are part of the program, with their masks times 0 or 1. A number out of range edits nothing.

    Raises:
      ValueError: no choices, or a number out of range that is not traced.

    Example:

        one_of(1, ablate(model, "z", layers=3), ablate(model, "z", layers=4))  # the second; the number may be traced
    """
    if isinstance(index, int) and not 0 <= index < len(choices):
        raise ValueError(f"there is no choice {index}: they are 0 to {len(choices) - 1}" if choices else "no choices")
    switched = [
        {
            site: tuple(replace(edit, mask=jnp.where(index == i, edit.mask, 0)) for edit in each)
            for site, each in e.items()
        }
        for i, e in enumerate(map(normalise_edits, choices))
    ]
    return merge(*switched, in_order=True)


def _check_apart(site: str, a: Operation, b: Operation) -> None:
    way_out = "or give in_order=True, and the later one reads what the earlier one left"
    if any(isinstance(edit.mask, Tracer) for edit in (a, b)):
        raise ValueError(
            f"two edits at {site!r} have traced masks, so it is unknown whether they overlap: merge them "
            f"outside of the compiled function, {way_out}"
        )
    masks = _aligned(site, a, b)
    try:
        meet = (masks[0] != 0) & (masks[1] != 0)
    except ValueError:
        raise ValueError(
            f"two edits at {site!r} have masks of shapes {list(np.shape(a.mask))} and {list(np.shape(b.mask))}, which "
            f"do not go together"
        ) from None
    if meet.any():
        layers = sorted({int(i) for i in np.nonzero(meet)[0]}) if meet.ndim else []
        where = f" in layers {layers}" if meet.ndim and meet.shape[0] > 1 else ""
        raise ValueError(f"two edits at {site!r} change the same values{where}: remove one, {way_out}")


def _aligned(site: str, a: Operation, b: Operation) -> list[np.ndarray]:
    """The masks of two edits with token axes that count the same, and 0 in the rows that an edit does not reach."""
    edits, masks = (a, b), [np.asarray(edit.mask) for edit in (a, b)]
    rank = 1 + len(SITES[site].split())
    if any(mask.ndim != rank for mask in masks):  # the same everywhere, or of a shape that the model will refuse
        return masks
    grouped = [edit.mask_over == "groups" for edit in edits]
    for axis in (1 + axis for axis in token_axes(site)):
        rows = SITES[site].split()[axis - 1] == "Q"
        for i, edit in enumerate(edits):
            groups = max(masks[j].shape[axis] for j in (0, 1) if j == i or (grouped[i] and grouped[j]))
            if rows and edit.queries == "prefix" and grouped[i] and groups > 1:
                within = np.expand_dims(np.arange(groups) < groups - 1, [j for j in range(rank) if j != axis])
                masks[i] = masks[i] * within
        tokens = max((mask.shape[axis] for mask, g in zip(masks, grouped, strict=True) if not g), default=1)
        for i, mask in enumerate(masks):
            if mask.shape[axis] == 1 or tokens == 1:
                continue
            if grouped[i]:
                masks[i] = np.take(mask, np.minimum(np.arange(tokens), mask.shape[axis] - 1), axis=axis)
            else:  # that of an edit of the first rows is shorter
                masks[i] = np.pad(mask, [(0, tokens - mask.shape[axis] if j == axis else 0) for j in range(rank)])
    return masks

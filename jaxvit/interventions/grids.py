"""The points of a sweep: every combination of what stands along a few named axes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxvit.analysis.named import Label
from jaxvit.model.tokens import TokenLayout
from jaxvit.model.vit import ViT


class Grid:
    """Every combination of the values along its axes.

    Grid(layer=range(12), strength=(0.5, 1.0, 2.0), control=("zero", "mean"), group={"cls": 0, "patches": 5})

    An axis is given as numbers, as a mapping of labels to numbers, or as words, which stand for 0, 1, ... A point is a
    mapping of each axis to its number there, an array with no axes: the constructors of edits take an integer as an
    index, and `jnp.select`, `jax.lax.switch` and indexing of stacked values turn the number of a word into what it
    means. As `tokens`, `query` or `key`, a bare number is the index of a group, out of `grids.groups`; a register's
    number, which is another, goes as `Registers(point["register"])`.

    Example:

        grid = Grid(layer=range(12), strength=[0.0, 0.5, 1.0])

        def edits(point, clean):
            return scale_skip(model, point["strength"], layers=point["layer"], tokens="cls")

        sweep(model, images, edits, grid)  # layer x strength x image
    """

    def __init__(self, **axes: Iterable[Any] | Mapping[Label, Any]):
        if not axes:
            raise ValueError("a grid needs an axis: Grid(layer=range(12))")
        self.axes: dict[str, tuple[Label, ...]] = {}
        self.numbers: dict[str, np.ndarray] = {}
        for name, given in axes.items():
            if isinstance(given, str | bytes) or not isinstance(given, Iterable):
                raise ValueError(f"axis {name} is {given!r}; expected several values")
            entries = dict(given) if isinstance(given, Mapping) else None
            values = list(given.values()) if isinstance(given, Mapping) else list(given)
            if not values:
                raise ValueError(f"axis {name} is empty")
            words = all(isinstance(value, str) for value in values)
            plain = words or all(np.ndim(value) == 0 for value in values)
            self.numbers[name] = np.arange(len(values)) if words or not plain else np.asarray(values)
            if not plain or self.numbers[name].dtype.kind not in "iuf":
                raise ValueError(f"axis {name} is {values!r}; expected numbers, words, or words with numbers")
            self.axes[name] = tuple(entries or (values if words else self.numbers[name].tolist()))
            if len(set(self.axes[name])) < len(values):
                raise ValueError(f"axis {name} has the same value twice: {values!r}")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(len, self.axes.values()))

    def __len__(self) -> int:
        return int(np.prod(self.shape))

    @property
    def points(self) -> dict[str, np.ndarray]:
        """Axis -> its number at each of the n points, [n]; the last axis moves fastest."""
        columns = np.meshgrid(*self.numbers.values(), indexing="ij")
        typed = (c.astype(int if c.dtype.kind in "iu" else float).ravel() for c in columns)  # JAX narrows both
        return dict(zip(self.numbers, typed, strict=True))

    def __repr__(self) -> str:
        return f"Grid({', '.join(f'{axis} {len(labels)}' for axis, labels in self.axes.items())})"


def groups(model: ViT, which: str = "all") -> dict[Label, int]:
    """Labels and indices of the groups of tokens: `all`, `registers`, or `prefix`, [CLS] and registers.

    The index of a group is not a register's number: with a class token, group 0 is `cls` and group 1 is `register 0`.
    """
    names = TokenLayout(model.config.registers, (1, 1), model.config.cls).group_names
    start, stop = {"all": (0, None), "registers": (model.config.cls, -1), "prefix": (0, -1)}[which]
    if which == "registers" and not model.config.registers:
        raise ValueError("this model has no registers")
    return {name: names.index(name) for name in names[start:stop]}


def heads(model: ViT) -> Grid:
    """layer x head.

    Example:

        grids.heads(model)  # layer x head
    """
    return Grid(layer=range(model.config.depth), head=range(model.config.heads))


def layers_by_groups(model: ViT) -> Grid:
    """layer x group of tokens.

    Example:

        def edits(point, clean):
            return ablate(model, "resid_pre", layers=point["layer"], tokens=point["group"])

        sweep(model, images, edits, grids.layers_by_groups(model))  # layer x group x image
    """
    return Grid(layer=range(model.config.depth), group=groups(model))


def group_edges(model: ViT, queries: str = "all") -> Grid:
    """layer x query group x key group. With queries="prefix", only [CLS] and registers ask.

    Example:

        def edits(point, clean):
            return knockout(model, query=point["query"], key=point["key"], layers=point["layer"])

        sweep(model, images, edits, grids.group_edges(model, "prefix"))  # layer x query x key x image
    """
    return Grid(layer=range(model.config.depth), query=groups(model, queries), key=groups(model))


def registers(model: ViT) -> Grid:
    """layer x single register, by its number from 0: `tokens=Registers(point["register"])`.

    Example:

        def edits(point, clean):
            return ablate(model, "resid_pre", layers=point["layer"], tokens=Registers(point["register"]))

        sweep(model, images, edits, grids.registers(model))  # layer x register x image
    """
    if not model.config.registers:
        raise ValueError("this model has no registers")
    return Grid(layer=range(model.config.depth), register=range(model.config.registers))


def tokens(model: ViT, layout: TokenLayout | None = None) -> Grid:
    """Every token by its place in the sequence.

    Example:

        def edits(point, clean):
            return ablate(model, "resid_pre", layers=-1, tokens=TokenIndices(point["token"], model.layout))

        sweep(model, images, edits, grids.tokens(model))  # token x image
    """
    return Grid(token=range((layout or model.layout).tokens))

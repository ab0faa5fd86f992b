"""Parameters of some blocks that stand in for, or are added to, those of a model: what is being trained of a stack.

A stack of blocks is one array a parameter, [L, ...]. Where only some layers are trained, or a matrix gets a low-rank
addition, the trained arrays stay small and apart: `run_blocks` puts them in its place layer by layer, so that gradients
never have the size of the stack.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxvit.model.sites import Run


@partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["name", "start", "stop"])
@dataclass(frozen=True)
class Piece:
    """What stands in for one parameter of the layers from `start` to `stop` - 1.

    Attributes:
      name: of the parameter within a block, such as `attn.qkv.kernel`.
      arrays: one array [layers, *shape], in its place; or two of a low-rank addition to a kernel [*inputs, *outputs]:
        [layers, *inputs, rank] and [layers, rank, *outputs].
    """

    name: str
    start: int
    stop: int
    arrays: tuple[Array, ...]

    def of_layers(self, run: Run) -> tuple[Array, ...]:
        """The arrays of the layers of a run, all of which have it."""
        whole = (run.start, run.stop) == (self.start, self.stop)
        return self.arrays if whole else tuple(a[run.start - self.start : run.stop - self.start] for a in self.arrays)

    def covers(self, run: Run) -> bool:
        return self.start <= run.start and run.stop <= self.stop


def value(old: Array, arrays: Sequence[Array]) -> Array:
    """The parameter of one layer, or of a stack of them, from the model's own and a piece's arrays."""
    if len(arrays) == 1:
        return arrays[0].astype(old.dtype)
    first, second = arrays
    product = jnp.tensordot(first, second, axes=1, precision=jax.lax.Precision.HIGHEST)
    return old + product.astype(old.dtype)


def replaced(block: Any, names: Sequence[str], every: Sequence[Sequence[Array]]) -> Any:
    """A block of one layer with these parameters put in."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(block)
    known = [name_of(path) for path, _ in leaves]
    values = [leaf for _, leaf in leaves]
    for name, arrays in zip(names, every, strict=True):
        at = known.index(name)
        values[at] = value(values[at], arrays)
    return jax.tree.unflatten(structure, values)


def name_of(path: Iterable[Any]) -> str:
    """Dotted: a parameter is a Variable, whose one leaf hangs below it under the name "value"."""
    return ".".join(key.name for key in tuple(path)[:-1])


def cut(runs: Iterable[Run], pieces: Sequence[Piece]) -> tuple[Run, ...]:
    """The same layers, in runs that every piece covers or does not touch."""
    edges = {edge for piece in pieces for edge in (piece.start, piece.stop)}
    found = []
    for run in runs:
        at = [run.start, *sorted(edge for edge in edges if run.start < edge < run.stop), run.stop]
        found += [Run(a, b, run.wanted) for a, b in itertools.pairwise(at)]
    return tuple(found)

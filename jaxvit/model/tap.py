"""The hook through which every named value of a layer passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
from jaxtyping import Array

from jaxvit.model.edits import Operation
from jaxvit.model.sites import ATTENTION_SITES, Layer


class Tap:
    """Names the values of one layer as they go by: edits those that are to change, keeps those that were asked for.

    Args:
      wanted: site -> whether of all tokens.
      edits: site -> what is applied there, in order; of this layer, without a layer axis.
    """

    def __init__(self, wanted: Layer, edits: Mapping[str, Sequence[Operation]], prefix: int):
        self.wanted, self.edits, self.prefix = wanted, edits, prefix
        self.trace: dict[str, Array] = {}

    def __call__(self, site: str, x: Array) -> Array:
        x = self.edited(site, x)
        if site in self.wanted:
            axis = 2 if site in ATTENTION_SITES else 1
            self.trace[site] = x if self.wanted[site] else jax.lax.slice_in_dim(x, 0, self.prefix, axis=axis)
        return x

    def edited(self, site: str, x: Array) -> Array:
        for edit in self.edits.get(site, ()):
            x = edit(site, x, self.prefix)
        return x

    def explicit_rows(self, tokens: int) -> int:
        """How many query rows, from the first, need their attention weights written out."""
        asked = [self.wanted[site] for site in ATTENTION_SITES if site in self.wanted]
        asked += [edit.queries == "all" for site in ATTENTION_SITES for edit in self.edits.get(site, ())]
        return tokens if any(asked) else self.prefix if asked else 0

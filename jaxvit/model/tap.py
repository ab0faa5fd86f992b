"""The hook through which every named value of a layer passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Array

from jaxvit.model.edits import Knockout, Operation
from jaxvit.model.sites import ATTENTION_SITES


class Tap:
    """Edits and records the named values of one layer as they are computed.

    Args:
      wanted: site -> whether of all tokens.
      edits: site -> what is applied there, in order; of this layer, without a layer axis.
      prefix: number of tokens before the patches.
    """

    def __init__(self, wanted: Mapping[str, bool], edits: Mapping[str, Sequence[Operation]], prefix: int):
        self.wanted: Mapping[str, bool] = wanted
        self.edits: Mapping[str, Sequence[Operation]] = edits
        self.prefix: int = prefix
        self.trace: dict[str, Array] = {}

    def __call__(self, site: str, x: Array) -> Array:
        """The value after its edits. Knock-outs are left to the softmax: see `knockout_factor`."""
        every = self.edits.get(site, ())
        for edit in every:
            if not isinstance(edit, Knockout):
                x = edit(site, x, self.prefix)
        if site in self.wanted:
            shown = x
            for edit in every:
                if isinstance(edit, Knockout):
                    shown = edit(site, shown, self.prefix)
            axis = 2 if site in ATTENTION_SITES else 1
            prefix = jax.lax.slice_in_dim(shown, 0, self.prefix, axis=axis)
            self.trace[site] = shown if self.wanted[site] else prefix
        return x

    def touches(self, *sites: str) -> bool:
        """Whether any of these values is edited or recorded."""
        return any(site in self.wanted or self.edits.get(site) for site in sites)

    def explicit_rows(self, queries: int) -> int:
        """How many of so many query rows, from the first, need their attention weights written out."""
        of_all = [self.wanted[site] for site in ATTENTION_SITES if site in self.wanted]
        for site in ATTENTION_SITES:
            for edit in self.edits.get(site, ()):
                if not isinstance(edit, Knockout) or edit.queries == "prefix":
                    of_all.append(edit.queries == "all")
        return queries if any(of_all) else self.prefix if of_all else 0

    def knockout_factor(self, first: int, tokens: int) -> KnockoutFactor | None:
        """What attention weights of query rows from `first` on are multiplied by before they are normalised.

        None where no knock-out reaches these rows.
        """
        cuts = [edit for edit in self.edits.get("scores", ()) if isinstance(edit, Knockout)]
        cuts = [edit for edit in cuts if edit.queries == "all" or first < self.prefix]
        if not cuts:
            return None

        def of_rows(rows: Array | np.ndarray, dtype: np.dtype) -> Array:
            factor = cuts[0].factor(rows, tokens, self.prefix, dtype)
            for edit in cuts[1:]:
                factor = factor * edit.factor(rows, tokens, self.prefix, dtype)
            return factor

        return of_rows


KnockoutFactor = Callable[[Array | np.ndarray, np.dtype], Array]
"""Numbers of query rows [Q], dtype -> [B or 1, H or 1, Q or 1, T or 1], 1 - mask."""

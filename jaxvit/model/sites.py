"""The values inside a model that have a name, and what of them a run keeps.

Axes: B batch, T tokens, D width, H heads, d head size, F hidden, L depth, P prefix = [CLS] and registers, Q query rows
(P or T).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

SITES = {
    "resid_pre": "B T D",  # input of the block; of block 0: the embedding
    "q": "B T H d",  # what enters the dot product
    "k": "B T H d",
    "v": "B T H d",
    "scores": "B H Q T",  # after 1/sqrt(d), before the softmax
    "weights": "B H Q T",  # exp(scores - the row's largest that is not cut): the softmax before its division
    "pattern": "B H Q T",  # weights / their sum; zeros where that is 0
    "z": "B T H d",  # outputs of the heads, before the output projection
    "attn_out": "B T D",  # after LayerScale: what is added to the stream
    "skip_attn": "B T D",  # the identity branch it is added to
    "resid_mid": "B T D",  # skip_attn + attn_out
    "mlp_pre": "B T F",  # before the activation (SwiGLU: the gate)
    "mlp_post": "B T F",  # what the last matrix of the MLP reads (SwiGLU: silu(gate) * value)
    "mlp_out": "B T D",  # after LayerScale
    "skip_mlp": "B T D",
    "resid_post": "B T D",  # skip_mlp + mlp_out, = resid_pre of the next block
}
"""Every value that can be recorded and edited, in order of computation, with its axes in one layer."""

ATTENTION_SITES = ("scores", "weights", "pattern")


def check_sites(names: Iterable[str]) -> None:
    """Raises a ValueError that lists all of `names` that are no sites."""
    if unknown := sorted(set(names) - set(SITES)):
        raise ValueError(f"no site {', '.join(map(repr, unknown))}; the sites are {', '.join(SITES)}")


@dataclass(frozen=True)
class Take:
    """What to record of a site.

    Attributes:
      layers: one layer, several, or None for all; negative ones count from the end. Traces are in order of depth.
      tokens: `prefix` keeps [CLS] and the registers, `all` keeps every token; at the attention sites these are the
        query rows. None: the prefix at those sites, whose full size is T x T a head, and all tokens elsewhere.
    """

    layers: int | tuple[int, ...] | None = None
    tokens: Literal["prefix", "all"] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.layers, str | slice):
            raise ValueError(f"layers is {self.layers!r}; expected a number, several, or None for all")
        if self.tokens not in ("prefix", "all", None):
            raise ValueError(f"tokens is {self.tokens!r}; expected 'prefix', 'all' or None")


Record = str | Iterable[str] | Mapping[str, Take]
"""What to record: a site, several, or how much of each."""
Layer = dict[str, bool]  # what one layer records: site -> whether of all tokens


def as_takes(record: Record) -> dict[str, Take]:
    """What to record as site -> how much."""
    names = (record,) if isinstance(record, str) else record
    return dict(record) if isinstance(record, Mapping) else {site: Take() for site in names}


def recording_plan(record: Record, depth: int, first: int = 0) -> list[tuple[int, int, Layer]]:
    """Splits layers first .. depth - 1 into runs (start, stop, what to record) that record the same; a scan each.

    Raises:
      ValueError: an unknown site, or a layer that does not run.
    """
    takes = as_takes(record)
    if wrong := [site for site, take in takes.items() if not isinstance(take, Take)]:
        raise ValueError(f"record of {', '.join(map(repr, wrong))} is no Take: write {{'pattern': Take(layers=-1)}}")
    check_sites(takes)
    if not 0 <= first <= depth:
        raise ValueError(f"cannot start from layer {first} of a model of {depth} layers")
    wanted: list[Layer] = [{} for _ in range(depth)]
    for site, take in takes.items():
        layers = range(first, depth) if take.layers is None else take.layers
        asked = layers if isinstance(layers, Iterable) else (int(layers),)
        for layer in asked:
            if not first <= layer % depth or not -depth <= layer < depth:
                raise ValueError(f"cannot record {site!r} of layer {layer}: layers {first} to {depth - 1} run")
            wanted[layer % depth][site] = (take.tokens or ("prefix" if site in ATTENTION_SITES else "all")) == "all"
    runs = itertools.groupby(range(first, depth), key=lambda layer: wanted[layer])
    return [(run[0], run[-1] + 1, what) for what, group in runs for run in [list(group)]]

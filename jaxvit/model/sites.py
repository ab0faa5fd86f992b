"""The values inside a model that have a name, and which of them a run records.

Axes: B batch, T tokens, D width, H heads, d head size, F hidden, L depth, P prefix = [CLS] and registers, Q query rows
(P or T).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

SITES = {
    "resid_pre": "B T D",  # input of the block; of block 0: the embedding
    "q": "B T H d",  # what enters the dot product
    "k": "B T H d",
    "v": "B T H d",
    "scores": "B H Q T",  # after 1/sqrt(d), before the softmax
    "pattern": "B H Q T",  # after the softmax; a row of which every key is knocked out is zeros
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

ATTENTION_SITES = ("scores", "pattern")


def check_sites(names: Iterable[str]) -> None:
    """Raises a ValueError that lists all of `names` that are no sites."""
    if unknown := sorted(set(names) - set(SITES)):
        raise ValueError(f"no site {', '.join(map(repr, unknown))}; the sites are {', '.join(SITES)}")


@dataclass(frozen=True)
class Take:
    """What to record of a site.

    Attributes:
      layers: one layer, several, or None for all; negative ones count from the end. The leading axis of the trace
        follows the order given here: after `Take(layers=(-1, 0))`, entry 0 is the last layer.
      tokens: `prefix` keeps [CLS] and the registers, `all` keeps every token; at the attention sites these are the
        query rows. None: all tokens; at the attention sites, whose full size is T x T a head, the prefix (all rows of a
        model that has no prefix).

    Example:

        model(images, record={"pattern": Take(layers=-1), "resid_post": Take(layers=(0, 5), tokens="prefix")})
    """

    layers: int | Iterable[int] | np.ndarray | None = None
    tokens: Literal["prefix", "all"] | None = None

    def __post_init__(self) -> None:
        layers: Any = self.layers
        if isinstance(layers, Iterable) and not isinstance(layers, str | Mapping | set | frozenset):
            layers = tuple(layers)
        several: tuple[Any, ...] = layers if isinstance(layers, tuple) else () if layers is None else (layers,)
        if not all(isinstance(one, int | np.integer) and not isinstance(one, bool) for one in several):
            raise ValueError(f"layers is {self.layers!r}; expected a number, several in order, or None for all")
        plain = tuple(map(int, several))
        object.__setattr__(self, "layers", plain if isinstance(layers, tuple) else plain[0] if plain else None)
        if self.tokens not in ("prefix", "all", None):
            raise ValueError(f"tokens is {self.tokens!r}; expected 'prefix', 'all' or None")


Record = str | Iterable[str] | Mapping[str, Take]
"""What to record: a site, several, or how much of each."""


Wanted = tuple[tuple[str, bool], ...]
"""What a layer records: (site, whether of all tokens)."""


class Run(NamedTuple):
    """Consecutive layers that record the same: `start` .. `stop` - 1."""

    start: int
    stop: int
    wanted: Wanted


class Plan(NamedTuple):
    """What a run records, as a value that can be hashed.

    Attributes:
      runs: the layers in order of depth, in runs that record the same; each is one scan.
      order: (site, places of the layers asked for among those recorded in order of depth), where they differ.
    """

    runs: tuple[Run, ...]
    order: tuple[tuple[str, tuple[int, ...]], ...] = ()


def as_takes(record: Record) -> dict[str, Take]:
    """What to record as site -> how much."""
    names = (record,) if isinstance(record, str) else record
    return dict(record) if isinstance(record, Mapping) else {site: Take() for site in names}


def recording_plan(record: Record, depth: int, prefix: int, start: int = 0, stop: int | None = None) -> Plan:
    """What layers start .. stop - 1 of a model of `depth` layers and `prefix` tokens before the patches record.

    Raises:
      ValueError: an unknown site, a layer that does not run, or the prefix of a model that has none.
    """
    stop = depth if stop is None else stop
    takes = as_takes(record)
    if wrong := [site for site, take in takes.items() if not isinstance(take, Take)]:
        raise ValueError(f"record of {', '.join(map(repr, wrong))} is not a Take: write {{'pattern': Take(layers=-1)}}")
    check_sites(takes)
    if not 0 <= start <= stop <= depth:
        raise ValueError(f"cannot run layers {start} to {stop - 1} of a model of {depth} layers, 0 to {depth - 1}")
    wanted: list[dict[str, bool]] = [{} for _ in range(depth)]
    order = {}
    for site, take in takes.items():
        if take.tokens == "prefix" and not prefix:
            raise ValueError(f"cannot record the prefix of {site!r}: this model has no class token or registers")
        layers = range(start, stop) if take.layers is None else take.layers
        asked = [layers] if isinstance(layers, int) else list(layers)
        for layer in asked:
            if not -depth <= layer < depth or not start <= layer % depth < stop:
                raise ValueError(f"cannot record {site!r} of layer {layer}: layers {start} to {stop - 1} run")
            in_default = "prefix" if site in ATTENTION_SITES and prefix else "all"
            wanted[layer % depth][site] = (take.tokens or in_default) == "all"
        recorded = sorted({layer % depth for layer in asked})
        if (places := tuple(recorded.index(layer % depth) for layer in asked)) != tuple(range(len(recorded))):
            order[site] = places
    runs = itertools.groupby(range(start, stop), key=lambda layer: wanted[layer])
    each = [(list(group), tuple(what.items())) for what, group in runs]
    return Plan(tuple(Run(group[0], group[-1] + 1, what) for group, what in each), tuple(order.items()))

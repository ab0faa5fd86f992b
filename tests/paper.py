"""What tests of experiments share: an experiment on images in memory, without files or passes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import jax
import numpy as np
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from experiments.core.experiment import About, Experiment, Found, Measured
from experiments.core.passes import Pass
from experiments.core.trace import observe
from jaxvit import Take, ViT
from jaxvit.analysis.similarity import StreamingCKA
from jaxvit.model.edits import Edits


def about_of(model: ViT, key: str = "model", **changes: Any) -> About:
    """What is known of a model of random weights; `changes` pretend something else."""
    c = model.config
    known = dict(
        key=key,
        name=key,
        family="random",
        size=f"width {c.width}",
        depth=c.depth,
        width=c.width,
        heads=c.heads,
        parameters=sum(a.size for a in jax.tree.leaves(model)),
        registers=c.registers,
        registers_are="random" if c.registers else "none",
        weights="random",
        source={},
        config=c.to_dict(),
    )
    return About(**(known | changes))


def defaults(experiment: Experiment | Pass, **chosen: Any) -> dict[str, Any]:
    """The options of an experiment, or of a pass, at their defaults unless chosen."""
    return {option.name: option.default for option in experiment.options} | chosen


@cache
def compiled(experiment: Experiment, options: tuple[tuple[str, Any], ...], last: bool) -> Callable[..., Measured]:
    """One program for all models of a kind."""

    @jax.jit
    def run(model: ViT, edits: Edits | None, images: jax.Array) -> Measured:
        start = None
        if last:
            stream = model(images, edits, {"resid_pre": Take(layers=-1)}).trace["resid_pre"][-1]
            start = (model.config.depth - 1, stream)
        return experiment.measure(observe(model, images, edits, experiment.wants, start), model, dict(options))

    return run


def found_of(
    experiment: Experiment,
    model: ViT,
    images: jax.Array,
    options: Mapping[str, Any] | None = None,
    edits: Edits | None = None,
    batch: int = 4,
    last: bool = False,
) -> Found:
    """What one pass over the images finds.

    Args:
      options: defaults where not given.
      last: run as controls of the last block do: the trace is of that layer alone.
    """
    run = compiled(experiment, tuple(defaults(experiment, **(options or {})).items()), last)
    rows, keep, sums = defaultdict(list), defaultdict(list), {}
    cka: dict[str, StreamingCKA] = {}
    for at in range(0, len(images), batch):
        m = jax.device_get(run(model, edits, images[at : at + batch]))
        for name, values in m.per_image.items():
            rows[name].append(values)
        for name, values in m.keep.items():
            keep[name].append(values)
        for name, values in m.sums.items():
            sums[name] = sums.get(name, 0) + values.sum(axis=0, dtype=np.float64)
        for name, (reference, others) in m.pairs.items():
            cka.setdefault(name, StreamingCKA()).update(reference, others)
    per_image, kept = ({name: np.concatenate(v) for name, v in each.items()} for each in (rows, keep))
    return Found(len(images), per_image, cka, sums, kept)


def numbers_of(
    experiment: Experiment, model: ViT, images: jax.Array, options: Mapping[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """The numbers of one model whose weights are random."""
    found = found_of(experiment, model, images, options, **more)
    return experiment.numbers({"clean": found}, about_of(model), defaults(experiment, **(options or {})))


def drawn_numbers(figure: Figure) -> np.ndarray:
    """Every number that a figure draws: points of lines and clouds, heights of bars, values of pictures."""
    shown = [np.zeros(0)]
    for axes in figure.axes:
        shown += [np.ma.filled(np.ma.asarray(image.get_array(), float), np.nan) for image in axes.images]
        shown += [np.asarray(line.get_ydata(), float) for line in axes.lines]
        shown += [np.asarray(c.get_offsets(), float) for c in axes.collections if isinstance(c, PathCollection)]
        shown += [np.array([patch.get_height()]) for patch in axes.patches if hasattr(patch, "get_height")]
    return np.concatenate([each.ravel() for each in shown])

"""One arm in one cell: trained, measured, and written; or found finished."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxvit
from jaxvit import Provenance
from jaxvit.io.checkpoint import TRAINING
from jaxvit.model.params import cast, from_params

from ..models.subjects import TRAINED_HERE
from ..runner.source import of_modules, versions
from . import arms, data, measures, train
from .arms import ARMS
from .presets import Cell, Preset

POINTS = 200
"""Of a curve that is kept, each a mean over the steps around it."""


def settings(cell: Cell, name: str, preset: Preset, photographs: str) -> dict[str, Any]:
    """What tells a finished run from others: all that its numbers follow from, and the code that makes them.

    Args:
      photographs: `data.digest` of those that scenes are made of.
    """
    config = ARMS[name].config(cell.base)
    return {
        "arm": name,
        "title": ARMS[name].title,
        "config": config.to_dict(),
        "recipe": cell.recipe.to_dict(),
        "scenes": cell.train,
        "test scenes": preset.test,
        "seeds": preset.seeds,
        "penalty": ARMS[name].penalty,
        "photographs": photographs,
        "code": of_modules(*(module.__name__ for module in (arms, data, measures, train))),
    }


def finished(folder: Path, cell: Cell, name: str, preset: Preset, photographs: str) -> dict[str, Any] | None:
    """What the run of these settings left in `folder`; None if there is none.

    Raises:
      ValueError: there is a run of other settings.
    """
    path = folder / TRAINING
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    wanted = json.loads(json.dumps(settings(cell, name, preset, photographs)))
    if other := [key for key in wanted if found.get(key) != wanted[key]]:
        raise ValueError(f"{folder} holds a run with another {', '.join(other)}: give another --out, or remove it")
    return found


def run(
    folder: Path,
    cell: Cell,
    name: str,
    preset: Preset,
    photographs: str,
    scenes: data.Scenes,
    *,
    progress: bool = False,
) -> dict[str, Any]:
    """Trains an arm, measures it and writes a model of each seed in bfloat16; what is measured is what is written."""
    arm, seeds = ARMS[name], range(preset.seeds)
    config = arm.config(cell.base)
    trained = train.train(arm, cell.base, scenes, cell.recipe, seeds, name=f"{cell.name} {name}", progress=progress)
    kept = jax.tree.map(lambda a: a.astype("bfloat16").astype("float32"), trained.params)
    test = train.measure(arm, config, kept, scenes, measures.of_images)
    record = settings(cell, name, preset, photographs) | {
        "parameters": sum(a[0].size for a in jax.tree.leaves(trained.params)),
        "seconds": trained.seconds,
        "device": device(),
        "versions": versions(),
        "test": {each: [float(row.mean()) for row in values] for each, values in test.items()},
        "curves": {each: thinned(values) for each, values in trained.curves.items()},
    }
    for seed in seeds:
        model = from_params(config, jax.tree.map(lambda a: a[seed], trained.params))  # noqa: B023
        told = {"kind": TRAINED_HERE, "by": "jaxvit train-matched", "arm": name, "seed": seed}
        jaxvit.save(cast(model, "bfloat16"), folder / f"seed-{seed}", Provenance(source=told), overwrite=True)
    (folder / TRAINING).write_text(json.dumps(record, indent=1) + "\n")
    return record


def device() -> str:
    """The accelerator, or the processor and its number of cores."""
    kind = jax.devices()[0].device_kind
    if jax.default_backend() != "cpu":
        return kind
    path = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", path.read_text()) if path.is_file() else None
    return f"{named[1] if named else platform.machine()}, {jaxvit.model.run.cores()} cores"


def thinned(curves: np.ndarray) -> list[list[float]]:
    """[seeds, steps] as at most `POINTS` means of neighbouring steps, each seed a list."""
    parts = np.array_split(curves, min(POINTS, curves.shape[1]), axis=1)
    means = np.stack([part.mean(axis=1) for part in parts], axis=1)
    return [[round(float(x), 5) for x in row] for row in means]

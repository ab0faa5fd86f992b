"""The command `jaxvit train-matched`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxvit.machine import add_machine, on_machine

TEXT = """Trains small models alike but for one thing, such as registers, and compares what they become.

  jaxvit train-matched --preset tiny               3 arms, 3 seeds: minutes on two cores
  jaxvit train-matched --preset small              9 arms, 5 seeds, 2 sizes, 2 amounts of data: hours on a GPU
  jaxvit train-matched --preset demo               the two models of `make demo`, with and without registers

The images are generated scenes: textured shapes over photographs, of ten classes. Every arm learns from the same
scenes, varied in the same way, in the same order, and starts from the same seeds. All seeds of an arm are trained at
once.

OUT/CELL/ARM holds a model of each seed, which every command of jaxvit reads, and training.json. OUT/results.json and
OUT/results.md compare the arms. An arm that is finished is not trained again: call the command once more to go on."""


def parser() -> argparse.ArgumentParser:
    from .arms import ARMS
    from .presets import PRESETS

    arms = "".join(f"\n  {name:13} {arm.title}" for name, arm in ARMS.items())
    made = argparse.ArgumentParser(
        prog="jaxvit train-matched",
        description=f"{TEXT}\n\nArms:{arms}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--preset", choices=PRESETS, default="tiny", help="sizes, data, arms and seeds (%(default)s)")
    made.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM", help="only these; by default the preset's")
    made.add_argument("--seeds", type=int, metavar="N", help="how many, from 0 on; by default the preset's")
    made.add_argument("--steps", type=int, metavar="N", help="of training; by default the preset's")
    made.add_argument("--cells", type=int, metavar="N", help="only the first so many sizes and amounts of data")
    made.add_argument("--photographs", type=Path, help="a folder of photographs for scenes, instead of those from PyPI")
    made.add_argument("--out", type=Path, default=Path("out/matched"), help="where models go (%(default)s)")
    made.add_argument("--limit", type=float, metavar="SECONDS", help="start no arm after so many seconds")
    add_machine(made)
    return made


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status. What a user can cause is one line on stderr."""
    began, made = time.monotonic(), parser()
    options = made.parse_args(arguments)
    for name in ("seeds", "steps", "cells"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            made.error(f"--{name} {getattr(options, name)}: expected 1 or more")

    import jaxvit
    from jaxvit.io import embedded

    from .presets import PRESETS

    preset = PRESETS[options.preset].first(options.cells)
    preset = replace(preset, arms=options.arms or preset.arms, seeds=options.seeds or preset.seeds)
    if options.steps:
        cells = [cell._replace(recipe=replace(cell.recipe, steps=options.steps)) for cell in preset.cells]
        preset = replace(preset, cells=cells)
    try:
        photographs = jaxvit.find_images(options.photographs or embedded.photographs())
        with on_machine(options):
            results, missing = study(preset, photographs, options.out, began, options.limit, sys.stderr.isatty())
    except (jaxvit.CheckpointError, jaxvit.ImageError, embedded.DataError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)  # where the limit let nothing be trained
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    text = tables(results)
    (options.out / "results.md").write_text(text)
    print(text)
    for arm in missing:
        print(f"not trained, as the limit was reached: {arm}", file=sys.stderr)
    return 0


def study(
    preset: Any, photographs: Sequence[Path], out: Path, began: float, limit: float | None, progress: bool
) -> tuple[dict[str, Any], list[str]]:
    """Trains what is not there yet.

    Returns:
      cell -> arm -> what its training.json holds, also of finished arms that were not asked for; and the arms left out.

    Raises:
      ValueError: `out` holds an arm of other settings, which could not be compared.
    """
    from . import data, runs
    from .arms import ARMS

    digest = data.digest(photographs)
    results: dict[str, Any] = {}
    for cell in preset.cells:  # before anything is trained
        found = {name: runs.finished(out / cell.name / name, cell, name, preset, digest) for name in ARMS}
        results[cell.name] = {name: record for name, record in found.items() if record is not None}
    missing = []
    for cell in preset.cells:
        pixels, scenes = cell.base.preprocess.size[0], None
        for name in preset.arms:
            if name in results[cell.name]:
                continue
            if limit is not None and time.monotonic() - began > limit:
                missing.append(f"{cell.name} {name}")
                continue
            scenes = scenes or data.load(
                *(cell.train, preset.test, pixels, photographs, out / "scenes"), progress=progress
            )
            folder = out / cell.name / name
            results[cell.name][name] = runs.run(folder, cell, name, preset, digest, scenes, progress=progress)
    ordered = {cell: {name: arms[name] for name in ARMS if name in arms} for cell, arms in results.items()}
    return ordered, missing


def tables(results: Mapping[str, Any]) -> str:
    """All cells as Markdown."""
    from .arms import ARMS
    from .measures import TITLES, compared

    parts = []
    for cell, arms in results.items():
        if not arms:
            continue
        first = next(iter(arms))
        rows = compared({name: arms[name]["test"] for name in arms}, first)
        seeds = len(next(iter(arms[first]["test"].values())))
        sizes = sorted({arm["parameters"] for arm in arms.values()})
        devices = sorted({arm["device"] for arm in arms.values()})
        parts.append(
            f"**{cell}**: {' to '.join(f'{n:,}' for n in {sizes[0]: 0, sizes[-1]: 0})} parameters, "
            f"{arms[first]['scenes']} scenes, {arms[first]['recipe']['steps']} steps of "
            f"{arms[first]['recipe']['batch']}, {seeds} seed{'s' * (seeds > 1)}, on {'; '.join(devices)}. "
            f"Behind a mean: the difference from {first}, with its 95 % interval over seeds."
        )
        names = [name for name in TITLES if any(name in row for row in rows.values())]
        lines = [f"| arm | {' | '.join(TITLES[name] for name in names)} |", f"|---|{'---|' * len(names)}"]
        for arm, row in rows.items():
            cells = [told(row[name]) if name in row else "" for name in names]
            lines.append(f"| {arm}: {ARMS[arm].title} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def told(row: Mapping[str, Any]) -> str:
    text = f"{row['mean']:.3f}"
    if "difference" in row:
        d = row["difference"]
        text += f" ({d['mean']:+.3f}, {d['low']:+.3f} to {d['high']:+.3f})"
    return text

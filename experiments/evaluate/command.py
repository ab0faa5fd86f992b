"""The command `jaxvit evaluate`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TEXT = """Scores of tasks on frozen features, clean and under interventions.

  jaxvit evaluate demo
  jaxvit evaluate facebook/dinov2-with-registers-base --under registers=mean registers=shuffle knockout:cls<-registers
  jaxvit evaluate dinov2-small --labelled photographs --tasks knn probe --under heads=11.3 skip:cls=0@last

MODEL is what jaxvit convert takes or wrote; demo is the model of jaxvit look. Without --labelled, images are generated
scenes: textured shapes over photographs, whose classes, masks, boxes and points are known.

Tasks: knn, knn-top5, nearest-mean, probe, probe-patches; on scenes also segmentation, correspondence, pointing and
discovery. What is fitted has two scores under an intervention: `fixed`, fitted to clean features, and `refitted`.

--under takes any of

  TOKENS=zero|mean|noise|shuffle|remove     cls, registers, 'register 0' or patches, where they enter the blocks
  knockout:QUERY<-KEY  zero:QUERY<-KEY      attention cut before the softmax, or after it
  heads=LAYER.HEAD,..                       outputs of heads set to zero
  skip:TOKENS=NUMBER                        the skip path around attention, multiplied

each but heads perhaps with @last, @all or @3,6,-1. Layers count from 0. By default tokens are replaced from layer 1 on,
and the others act in all layers. Quote what holds < or a space."""


def parser() -> argparse.ArgumentParser:
    from jaxvit.convert.__main__ import add_reading
    from jaxvit.machine import add_machine

    made = argparse.ArgumentParser(
        prog="jaxvit evaluate", description=TEXT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("model", metavar="MODEL", help="a converted folder, a checkpoint or a hub id; or demo")
    made.add_argument("--under", nargs="+", default=[], metavar="WHAT", help="interventions")
    made.add_argument("--tasks", nargs="+", metavar="TASK", help="only these (all that are possible)")
    made.add_argument("--labelled", metavar="WHERE", help="a folder of classes, or datasets:NAME[:SPLIT]")
    made.add_argument("--train", type=int, default=300, metavar="N", help="scenes to learn from (%(default)s)")
    made.add_argument("--test", type=int, default=200, metavar="N", help="scenes to test on (%(default)s)")
    made.add_argument("--test-part", type=float, default=0.4, help="of each class of --labelled (%(default)s)")
    made.add_argument("--photographs", type=Path, help="a folder of photographs for scenes, instead of those from PyPI")
    made.add_argument("--size", metavar="N|HxW", help="pixels that the model reads; by default its own preparation's")
    made.add_argument("--batch-size", type=int, default=16, metavar="N", help="images at a time (%(default)s)")
    made.add_argument("--seed", type=int, default=0, help="of noise, splits and intervals (%(default)s)")
    made.add_argument("--out", type=Path, default=Path("evaluate.json"), help="numbers as JSON (%(default)s)")
    add_reading(made)
    add_machine(made)
    return made


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status. What a user can cause is one line on stderr."""
    made = parser()
    options = made.parse_args(arguments)

    from jaxvit.convert.__main__ import reading_of
    from jaxvit.io.provenance import versions
    from jaxvit.look_command import errors, opened_model, size_of
    from jaxvit.machine import on_machine

    from . import data, study, under

    size, reading = size_of(made, options.size), reading_of(made, options)
    try:
        interventions = [under.parse(text) for text in options.under]
        if len({each.text for each in interventions}) < len(interventions):
            raise ValueError("--under names one intervention twice")
        if options.out.is_dir() or not os.access(options.out.parent, os.W_OK):  # told before the work, not after it
            raise ValueError(f"--out {options.out}: expected a file, in a folder that is there and can be written to")
        model, provenance = opened_model(options.model, reading)
        if options.labelled:
            answers = data.labelled(options.labelled, options.test_part, options.seed)
        else:
            if not (min(options.train, options.test) > 0 and options.train % 10 == 0):
                raise ValueError("--train is a multiple of 10, the number of classes, and --test at least 1")
            answers = data.generated(options.train, options.test, options.photographs)
        images = next(data.batches(model, map(answers.source, (0, 1)), 2, size))[0]
        under.check(interventions, model, images)
        with on_machine(options):
            found = study.run(
                model,
                answers,
                interventions,
                options.tasks,
                batch_size=options.batch_size,
                size=size,
                seed=options.seed,
                progress=sys.stderr.isatty(),
            )
        preparation = model.config.preprocess.at(size).in_words()
        about = {
            "model": {"source": provenance.to_dict(), "config": model.config.to_dict()},
            "data": {"from": answers.name, "train": answers.train, "test": len(answers.labels) - answers.train},
            "preparation": preparation,
            "seed": options.seed,
            "batch size": options.batch_size,
            "versions": versions("jaxvit", "jax", "numpy", "optax", "pillow", "scipy"),
        }
        options.out.write_text(json.dumps(about | {"tasks": found}, indent=1) + "\n", encoding="utf-8")
    except BrokenPipeError:
        raise
    except (*errors(), OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{answers.name}: {answers.train} to learn from, {len(answers.labels) - answers.train} to test on")
    print(f"images: {preparation}\n")
    print(table(found))
    print(f"\nwrote {options.out}")
    return 0


def table(found: Mapping[str, Any]) -> str:
    """A Markdown table: percent, and differences from clean with their 95 % intervals over test images."""
    texts = list(next(iter(found.values()))["under"])
    lines = [["task", "clean", *(f"`{text}`" for text in texts)]]
    for task in found.values():
        clean = task["clean"]
        cells = [task["title"], f"{percent(clean['value'])} ({percent(clean['low'])} to {percent(clean['high'])})"]
        for text in texts:
            each = task["under"][text]
            cells.append("; ".join(f"{name_of(how, each)}{change(score['difference'])}" for how, score in each.items()))
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *rows[1:]])


def name_of(how: str, each: Mapping[str, Any]) -> str:
    return f"{how} " if len(each) > 1 else ""


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def change(difference: Mapping[str, float]) -> str:
    low, high = (f"{100 * difference[end] + 0.0:+.1f}" for end in ("low", "high"))
    return f"{100 * difference['value'] + 0.0:+.1f} ({low} to {high})"

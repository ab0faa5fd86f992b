"""The command `jaxvit finetune`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .look_command import add_model, errors, opened_model
from .machine import add_machine, on_machine

TEXT = """Trains a model to tell classes apart: a new head alone, the last blocks, low-rank additions, or all of it.

  jaxvit finetune dinov2-small --labelled photographs --train head
  jaxvit finetune dinov2-small --labelled photographs --train last=2 --rate 1e-4 --layer-decay 0.75
  jaxvit finetune facebook/dinov2-base --labelled datasets:beans --train lora=8 --compute bfloat16
  jaxvit finetune demo --scenes 400 --train head

MODEL is what jaxvit convert takes or wrote; demo is the model of jaxvit look. Images come from a folder with a
subfolder for each class, from a dataset, or are generated scenes: textured shapes over photographs, of ten classes.

A part of each class is held out. After each epoch the accuracy on it is printed; the best epoch is kept, and training
stops when no better one comes. OUT is a folder as jaxvit convert writes it, with training.json beside the weights.

--train takes head, last=BLOCKS, lora=RANK, all, or words as jaxvit.training.split does: norms, blocks[-2:].attn .."""


def parser() -> argparse.ArgumentParser:
    from jaxvit.convert.__main__ import add_reading

    made = argparse.ArgumentParser(
        prog="jaxvit finetune", description=TEXT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model(made)
    where = made.add_mutually_exclusive_group(required=True)
    where.add_argument("--labelled", metavar="WHERE", help="a folder of classes, or datasets:NAME[:SPLIT]")
    where.add_argument("--scenes", type=int, metavar="N", help="so many generated scenes")
    made.add_argument("--train", nargs="+", default=["head"], metavar="WHAT", help="what learns (head)")
    made.add_argument(
        "--head", choices=("linear", "own"), default="linear", help="a new linear head, or the model's own"
    )
    made.add_argument("--epochs", type=int, default=10, metavar="N", help="at most (%(default)s)")
    made.add_argument("--batch-size", type=int, default=32, metavar="N", help="images of a step (%(default)s)")
    made.add_argument("--rate", type=float, default=1e-3, help="largest learning rate (%(default)s)")
    made.add_argument("--weight-decay", type=float, default=0.05, help="of kernels (%(default)s)")
    made.add_argument("--layer-decay", type=float, default=1.0, help="of the rate, for each layer (%(default)s)")
    made.add_argument("--drop-path", type=float, default=0.0, help="rate of stochastic depth (%(default)s)")
    made.add_argument("--smoothing", type=float, default=0.0, help="of labels (%(default)s)")
    made.add_argument("--accumulate", type=int, default=1, metavar="N", help="steps of one update (%(default)s)")
    made.add_argument("--average", type=float, default=0.0, help="moving average of parameters, such as 0.99 (none)")
    made.add_argument("--patience", type=int, default=3, metavar="N", help="epochs without gain (%(default)s)")
    made.add_argument("--crop", type=float, default=0.35, metavar="AREA", help="least part a crop keeps (%(default)s)")
    made.add_argument("--held", type=float, default=0.2, help="part of each class that is held out (%(default)s)")
    made.add_argument("--compute", choices=("float32", "bfloat16"), default="float32", help="(%(default)s)")
    made.add_argument("--seed", type=int, default=0, help="of head, order, variations and split (%(default)s)")
    made.add_argument("--out", type=Path, default=Path("finetuned"), help="the folder to write (%(default)s)")
    made.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    made.add_argument("--overwrite", action="store_true", help="replace OUT, or a run that was interrupted")
    add_reading(made)
    add_machine(made)
    return made


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status. What a user can cause is one line on stderr."""
    made = parser()
    options = made.parse_args(arguments)
    from jaxvit.convert.__main__ import reading_of

    reading = reading_of(made, options)
    try:
        return tuned(options, reading)
    except errors() as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
    return 1


def tuned(options: argparse.Namespace, reading: Any) -> int:
    """Trains, and writes the model; returns the exit status."""
    import jaxvit
    from jaxvit.io.checkpoint import TRAINING, check_place
    from jaxvit.training.finetune import Recipe, finetune
    from jaxvit.training.images import Variation

    recipe = Recipe(
        epochs=options.epochs,
        batch_size=options.batch_size,
        rate=options.rate,
        weight_decay=options.weight_decay,
        layer_decay=options.layer_decay,
        smoothing=options.smoothing,
        drop_path=options.drop_path,
        accumulate=options.accumulate,
        average=options.average,
        patience=options.patience,
        seed=options.seed,
        dtype=None if options.compute == "float32" else options.compute,
    )
    variation = Variation(area=options.crop)
    check_place(options.out, options.overwrite)
    images, title = labelled(options)
    asked = asked_for(options, title)
    partial = partial_run(options, asked)
    model, provenance = opened_model(options.model, reading)
    print(f"images: {title}: {len(images.train)} to learn from, {len(images.held)} held out")

    def told(epoch: int, loss: float, accuracy: float) -> None:
        print(f"epoch {epoch}: loss {loss:.3f}, accuracy {100 * accuracy:.1f} %", flush=True)

    with on_machine(options):
        found = finetune(
            *(model, images, options.train, recipe),
            head=options.head == "linear",
            variation=variation,
            checkpoints=partial / "checkpoints",
            progress=sys.stderr.isatty(),
            on_epoch=told,
        )
    jaxvit.save(found.model, options.out, provenance, overwrite=options.overwrite)
    record = asked | {"classes": list(images.classes), "learned": found.learned, "best epoch": found.best}
    record |= {"accuracy": found.accuracy, "loss": found.loss}
    (options.out / TRAINING).write_text(json.dumps(record, indent=1) + "\n")
    shutil.rmtree(partial)
    of = sum(a.size for a in jaxvit.functional(found.model)[1].values())
    before, best = found.accuracy[0], found.accuracy[found.best]
    print(f"learned {found.learned:,} numbers for a model of {of:,}")
    print(f"accuracy on images held out: {100 * before:.1f} % before, {100 * best:.1f} % after epoch {found.best}")
    print(f"wrote {options.out}")
    if options.labelled:  # tested on the images that were held out, and on no other
        split = f"--test-part {options.held} --seed {options.seed}"
        print(f"next: jaxvit evaluate {options.out} --labelled {options.labelled} {split}")
    print(f"next: jaxvit export {options.out} {options.out}.safetensors --layout timm")
    return 0


def labelled(options: argparse.Namespace) -> tuple[Any, str]:
    """The images, and what they are called.

    Raises:
      ImageError, ValueError: see `jaxvit.experiments.evaluate.data`.
    """
    import numpy as np

    from jaxvit.experiments.evaluate import data
    from jaxvit.training.finetune import Labelled

    if options.labelled:
        answers = data.labelled(options.labelled, options.held, options.seed)
    else:
        held = round(options.held * options.scenes)
        if not 0 < held < options.scenes:
            raise ValueError(
                f"--held {options.held} of {options.scenes} scenes leaves nothing to learn from or to hold out"
            )
        answers = data.generated(options.scenes - held, held)
    numbers = np.arange(len(answers.labels))
    parts = numbers[: answers.train], numbers[answers.train :]
    return Labelled(answers.source, np.asarray(answers.labels), answers.classes, *parts), answers.name


def asked_for(options: argparse.Namespace, title: str) -> dict[str, Any]:
    """What tells one run from another."""
    left_out = {"out", "resume", "overwrite", "compilation_cache", "profile"}
    settings = {name: value for name, value in vars(options).items() if name not in left_out}
    return {"images": title, "options": {name: settings[name] for name in sorted(settings)}}


def partial_run(options: argparse.Namespace, asked: dict[str, Any]) -> Path:
    """The folder of a run that is not finished.

    Raises:
      ValueError: there is one, and it is neither to go on nor to be replaced; or one of other options.
    """
    place = options.out.with_name(options.out.name + ".partial")
    settings = place / "asked.json"
    text = json.dumps(asked, indent=1, default=str)
    if place.exists() and options.overwrite and not options.resume:
        shutil.rmtree(place)
    if settings.is_file():
        if not options.resume:
            raise ValueError(f"{place} holds a run that was interrupted: --resume goes on, --overwrite begins again")
        if settings.read_text() != text:
            raise ValueError(f"{place} holds a run with other options: give the same, or --overwrite without --resume")
    place.mkdir(parents=True, exist_ok=True)
    settings.write_text(text)
    return place

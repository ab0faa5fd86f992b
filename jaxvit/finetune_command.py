"""The command `jaxvit finetune`."""

from __future__ import annotations

import argparse
import json
import shlex
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

A part of each class is held out. The accuracy on it is printed before training and after each epoch; the best epoch is
kept, and training stops when no better one comes. OUT is a folder as jaxvit convert writes it. Beside the weights are
training.json, what was asked for and how it went; curves.png; and evaluate.json, where the features of the new model
are scored by jaxvit evaluate: k-NN and a linear probe, on the images held out or on new scenes.

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
    made.add_argument(
        "--held", type=float, default=0.2, help="part that is held out: of each class, or the last scenes (%(default)s)"
    )
    made.add_argument("--compute", choices=("float32", "bfloat16"), default="float32", help="(%(default)s)")
    made.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of head, order, variations, and of what is held out of --labelled (%(default)s)",
    )
    made.add_argument("--out", type=Path, default=Path("finetuned"), help="the folder to write (%(default)s)")
    made.add_argument("--no-evaluate", action="store_true", help="do not score the features of what was learned")
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
    except BrokenPipeError:
        raise
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
    return 1


def tuned(options: argparse.Namespace, reading: Any) -> int:
    """Trains, and writes the model; returns the exit status."""
    import jaxvit
    from jaxvit.io.checkpoint import CURVES, EVALUATE, TRAINING, check_place, write_json
    from jaxvit.training.finetune import RUN, Recipe, finetune
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
    partial = partial_run(options.out, options.resume, options.overwrite)
    images, title = labelled(options)
    model, provenance = opened_model(options.model, reading)
    assumed = own_classes(options.model, images.classes) if options.head == "own" else []
    for line in assumed:
        print(f"assumed: {line}")
    print(f"images: {title}: {len(images.train)} to learn from, {len(images.held)} held out")

    def told(epoch: int, loss: float, accuracy: float) -> None:
        start = f"epoch {epoch}: loss {loss:.3f}, " if epoch else "before training: "
        print(f"{start}accuracy {100 * accuracy:.1f} %", flush=True)

    if partial.exists() and not options.resume:
        shutil.rmtree(partial)
    with on_machine(options):
        found = finetune(
            *(model, images, options.train, recipe),
            head=options.head == "linear",
            variation=variation,
            checkpoints=partial,
            progress=sys.stderr.isatty(),
            on_epoch=told,
        )
    jaxvit.save(found.model, options.out, provenance, overwrite=options.overwrite)
    asked = {name: value for name, value in vars(options).items() if name not in NOT_ASKED}
    record = {"images": title, "asked": asked, "assumed": assumed, "run": json.loads((partial / RUN).read_text())}
    record |= {"classes": list(images.classes), "learned": found.learned, "best epoch": found.best}
    record |= {"accuracy": found.accuracy, "loss": found.loss}
    write_json(options.out / TRAINING, json.loads(json.dumps(record, default=str)))
    curves(found, title).savefig(options.out / CURVES, dpi=100)
    shutil.rmtree(partial)
    of = sum(a.size for a in jaxvit.functional(found.model)[1].values())
    before, best = found.accuracy[0], found.accuracy[found.best]
    print(f"learned {found.learned:,} numbers for a model of {of:,}")
    print(f"accuracy on images held out: {100 * before:.1f} % before, {100 * best:.1f} % after epoch {found.best}")
    print(f"wrote {options.out}")
    where = ["--labelled", options.labelled, "--test-part", options.held, "--seed", options.seed]
    scored = [str(options.out), "--tasks", "knn", "probe", *(map(str, where) if options.labelled else ())]
    if options.no_evaluate:
        print(f"next: jaxvit evaluate {shlex.join(scored)}")
    else:
        from jaxvit.experiments.evaluate.command import main as evaluate

        print(f"\njaxvit evaluate {shlex.join(scored)}")
        if evaluate([*scored, "--out", str(options.out / EVALUATE)]):
            print("its features were not scored; the model is written all the same", file=sys.stderr)
    print(f"next: jaxvit export {options.out} {options.out}.safetensors --layout timm")
    return 0


NOT_ASKED = ("resume", "overwrite", "compilation_cache", "profile", "no_evaluate")
"""Options that change nothing of what is learned."""


def own_classes(source: str, classes: Sequence[str]) -> list[str]:
    """What has to be assumed so that a model's own head tells the classes of the images.

    Raises:
      ValueError: the model was trained here to tell others, or in another order.
    """
    from jaxvit.io.checkpoint import TRAINING

    path = Path(source) / TRAINING
    if not path.is_file():
        return [f"the model's classes are those of the images, in this order: {', '.join(classes)}"]
    if (known := json.loads(path.read_text()).get("classes")) != list(classes):
        raise ValueError(
            f"the model tells {known}, in this order, and the images are of {list(classes)}: --head linear"
        )
    return []


def curves(found: Any, title: str) -> Any:
    """Loss of each step and accuracy after each epoch, as a figure of matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure((8, 3.2), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    per_epoch = len(found.loss) / max(len(found.accuracy) - 1, 1)
    loss.plot([(step + 1) / per_epoch for step in range(len(found.loss))], found.loss, linewidth=1)
    loss.set(xlabel="epoch", ylabel="loss, varied images")
    accuracy.plot([100 * each for each in found.accuracy], marker="o", markersize=4)
    accuracy.axvline(found.best, color="0.6", linestyle="--", linewidth=1, label="kept")
    accuracy.set(xlabel="epoch", ylabel="accuracy, images held out (%)")
    accuracy.legend(frameon=False)
    for axes in (loss, accuracy):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize="medium")
    return figure


FIRST_SCENE = 1_000_000
"""Number of the first scene to learn from: those that `jaxvit evaluate` draws are others."""


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
        answers = data.generated(options.scenes - held, held, first=FIRST_SCENE)
    numbers = np.arange(len(answers.labels))
    parts = numbers[: answers.train], numbers[answers.train :]
    return Labelled(answers.source, np.asarray(answers.labels), answers.classes, *parts), answers.name


def partial_run(out: Path, resume: bool, overwrite: bool) -> Path:
    """The folder of checkpoints of a run that is not finished.

    Raises:
      ValueError: there is one, and it is neither to go on nor to be replaced; or the folder holds other things.
    """
    from jaxvit.training.finetune import found_run

    place = out.with_name(out.name + ".partial")
    epochs = found_run(place)
    if epochs is None:
        if resume:
            print(f"{place} holds no finished epoch: this is a new run")
    elif resume:
        print(f"going on after epoch {epochs}")
    elif not overwrite:
        raise ValueError(f"{place} holds a run that was interrupted: --resume goes on, --overwrite begins again")
    return place

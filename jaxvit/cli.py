"""The command `jaxvit`: `jaxvit --help`."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Sequence

HELP = """Vision Transformers as JAX values: convert PyTorch checkpoints, prove them equal, run experiments on them.

  jaxvit look PHOTO ..                     what a model sees in a photograph, in one picture
  jaxvit features MODEL IMAGES             features of many images, on disk
  jaxvit evaluate MODEL                    scores of tasks, clean and under interventions
  jaxvit finetune MODEL                    train a head, the last blocks or low-rank additions on labelled images
  jaxvit convert SOURCE DEST               a PyTorch checkpoint to a jaxvit model
  jaxvit verify DEST ORIGINAL              compare a converted model with its original, layer by layer
  jaxvit show DEST                         what a converted model is, where it comes from, how equal it is
  jaxvit list                              known checkpoints: sizes, licences, hub ids
  jaxvit export DEST FILE --layout LAYOUT  back to a PyTorch state dict
  jaxvit export-stablehlo MODEL OUT        a program that runs wherever JAX does, without jaxvit
  jaxvit run --models MODEL ..             the experiments of Lappe & Giese 2025 on models and images, with a report
  jaxvit A3 --models MODEL ..              one experiment: A1 to A9 of the paper, B1 to B7 beyond it
  jaxvit sensitivity --models MODEL ..     three experiments under every reading of the paper
  jaxvit train-matched                     small models trained alike but for registers, or what [CLS] may read

For example

  jaxvit look photo.jpg
  jaxvit convert facebook/dinov2-with-registers-small dinov2-small
  jaxvit run --models dinov2-small --images photographs --out report

`jaxvit COMMAND --help` explains a command and its options.
"""

# Nothing is imported before it is known what is asked for: JAX alone takes a second.
COMMANDS = {"look": ("jaxvit.look_command", "experiments"), "features": ("jaxvit.features_command", "features")}
COMMANDS |= {"evaluate": ("jaxvit.experiments.evaluate.command", "experiments")}
COMMANDS |= {"export-stablehlo": ("jaxvit.stablehlo_command", "export")}
COMMANDS |= {"finetune": ("jaxvit.finetune_command", "training")}
COMMANDS |= {"train-matched": ("jaxvit.experiments.matched.command", "experiments")}
"""Command -> its module, and the extra that has what it needs."""
CONVERTER = ("convert", "verify", "show", "list", "export")
EXPERIMENTS = ("run", "sensitivity")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command, and returns the exit status. What a user can cause is one line on stderr."""
    try:
        try:
            return run(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def run(arguments: Sequence[str] | None) -> int:
    """See `main`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments[0] if arguments else ""
    if command in ("--help", "-h", "help"):
        print(HELP, end="")
        return 0
    if command in COMMANDS:
        module, extra = COMMANDS[command]
        arguments = arguments[1:]
    elif command in CONVERTER:
        module, extra = "jaxvit.convert.__main__", "convert"
    elif command in EXPERIMENTS or re.fullmatch("A[1-9]|B[1-7]", command):
        module, extra = "jaxvit.experiments.__main__", "experiments"
    else:
        problem = f"there is no command {command!r}" if command else "a command is missing"
        known = ", ".join((*COMMANDS, *CONVERTER, *EXPERIMENTS))
        print(f"error: {problem}; commands are {known}, and A1 to B7: see jaxvit --help", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(module).main(arguments)
    except ModuleNotFoundError as error:
        print(f"error: jaxvit {command} needs {error.name}: pip install 'jaxvit[{extra}]'", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    return 1

"""The command `jaxvit export-stablehlo`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .look_command import add_model, errors, opened_model, size_of

TEXT = """A model as a program of StableHLO that runs wherever JAX does, without jaxvit: on a CPU, a GPU, a TPU.

  jaxvit export-stablehlo dinov2-small program
  jaxvit export-stablehlo dinov2-small program --take cls patches:grid pattern@-1:cls --platforms cpu tpu
  python program/run.py images.npy outputs.npz

The folder holds the program, which takes any number of prepared images; the parameters; program.json, which says what
goes in and comes out and how images are prepared; and run.py, which needs jax, numpy and safetensors alone.

What is taken is written as in `jaxvit features --help`. No GPU or TPU need be at hand."""


def parser() -> argparse.ArgumentParser:
    from jaxvit.analysis.stablehlo import PLATFORMS
    from jaxvit.convert.__main__ import add_reading

    made = argparse.ArgumentParser(
        prog="jaxvit export-stablehlo", description=TEXT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model(made)
    made.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    made.add_argument("--take", nargs="+", default=["cls", "patches"], metavar="WHAT", help="outputs (cls patches)")
    made.add_argument(
        "--platforms", nargs="+", default=["cpu", "cuda", "tpu"], choices=PLATFORMS, help="where to run (cpu cuda tpu)"
    )
    made.add_argument("--size", metavar="N|HxW", help="pixels that the model reads; by default its own preparation's")
    made.add_argument("--compute", choices=("float32", "bfloat16"), default="float32", help="(%(default)s)")
    made.add_argument("--overwrite", action="store_true", help="replace a program that is there")
    add_reading(made)
    return made


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status. What a user can cause is one line on stderr."""
    made = parser()
    options = made.parse_args(arguments)

    from jaxvit.analysis.stablehlo import PROGRAM, check_free, write_program
    from jaxvit.convert.__main__ import reading_of

    size, reading = size_of(made, options.size), reading_of(made, options)
    try:
        check_free(options.out, options.overwrite)
        model, provenance = opened_model(options.model, reading, options.compute)
        write_program(
            *(model, options.out, options.take),
            platforms=options.platforms,
            size=size,
            provenance=provenance,
            overwrite=options.overwrite,
        )
    except errors() as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    told = (options.out / PROGRAM).stat().st_size
    print(f"wrote {options.out}: {told:,} bytes of program for {', '.join(options.platforms)}, and the parameters")
    return 0

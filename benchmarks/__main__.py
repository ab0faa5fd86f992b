"""Command line of the measurements: how fast, and how equal to PyTorch. Without a command: `speed`, the quick set."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{speed,parity}")
    raw = argparse.RawDescriptionHelpFormatter
    from benchmarks import parity, speed

    command = commands.add_parser(
        "speed", help="how fast jaxvit is beside PyTorch", description=speed.__doc__, formatter_class=raw
    )
    command.add_argument("--full", action="store_true", help="every model, size and batch")
    command.add_argument("--keep", metavar="NAME", help="keep as benchmarks/results/NAME.json, and show in README.md")
    command.add_argument("--precision", choices=speed.PRECISIONS, default="float32", help="of both sides")
    command.add_argument("--seconds", type=float, default=20.0, help="how long each set of alternatives takes turns")
    command.add_argument("--out", type=Path, default=Path("out/speed.json"), help="where the JSON goes (%(default)s)")
    command = commands.add_parser(
        "parity", help="how equal jaxvit and PyTorch are", description=parity.__doc__, formatter_class=raw
    )
    command.add_argument("--write", action="store_true", help="put the table into README.md")
    command = commands.add_parser("peak")  # one task of the memory table, in a process of its own
    command.add_argument("task")
    command.add_argument("size")
    command.add_argument("pixels", type=int)
    command.add_argument("batch", type=int)

    options = parser.parse_args(argv if argv else ["speed"])
    if options.command == "parity":
        parity.main(options.write)
    elif options.command == "peak":
        print(speed.peak_of(options.task, options.size, options.pixels, options.batch))
    else:
        speed.main(options.full, options.keep, options.precision, options.seconds, options.out)


if __name__ == "__main__":
    main()

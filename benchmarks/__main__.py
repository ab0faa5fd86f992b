"""Command line of the measurements: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse

from benchmarks import parity


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "parity",
        help="how equal jaxvit and PyTorch are",
        description=parity.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--write", action="store_true", help="put the table into README.md")
    options = parser.parse_args()
    parity.main(options.write)


if __name__ == "__main__":
    main()

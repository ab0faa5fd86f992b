"""Command line of the measurements: how fast, and how equal to PyTorch. Without a command: `speed`, the quick set."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import architectures, conversion, differences, families, features, parity, sources, speed, tiles

COMMANDS = {
    "speed": ("how fast jaxvit is beside PyTorch", speed),
    "tiles": ("how long attention takes on a CPU in tiles of several sizes", tiles),
    "features": ("how fast photographs become features on disk, in how much memory", features),
    "parity": ("how equal DINOv2 is to PyTorch's, at full depth", parity),
    "families": ("how equal every family is, from every source", families),
    "sources": ("what comes of every kind of file that users have", sources),
    "architectures": ("which of timm's Vision Transformers convert, and how equal they are", architectures),
    "differences": ("how far features move when one thing differs", differences),
    "conversion": ("how much memory the conversion of a large checkpoint takes", conversion),
}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar=f"{{{','.join(COMMANDS)}}}")
    of = {
        name: commands.add_parser(
            name, help=what, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        for name, (what, module) in COMMANDS.items()
    }
    command = of["speed"]
    command.add_argument("--full", action="store_true", help="every model, size and batch")
    command.add_argument("--keep", metavar="NAME", help="keep in benchmarks/results, show in docs/speed.md")
    command.add_argument("--only", metavar="SIZE:PIXELS", help="measure these anew, and replace them in what is kept")
    command.add_argument("--precision", choices=speed.PRECISIONS, default="float32", help="of both sides")
    command.add_argument("--seconds", type=float, default=20.0, help="how long each set of alternatives takes turns")
    command.add_argument("--out", type=Path, default=Path("out/speed.json"), help="where the JSON goes (%(default)s)")
    command = of["features"]
    command.add_argument("--rows", type=int, metavar="N", help="memory over so many rows")
    command.add_argument("--killed", type=int, metavar="N", help="a run over so many images that is killed and goes on")
    command.add_argument("--seconds", type=float, default=60.0, help="how long the two take turns (%(default)s)")
    command = of["conversion"]
    command.add_argument("--size", choices=conversion.SIZES, default="giant", help="of the model (%(default)s)")
    command.add_argument("--place", type=Path, help="a folder on a disk with room for it, instead of the temporary one")
    for name, where in (
        ("parity", "docs/parity.md"),
        ("conversion", "docs/conversion.md"),
        ("families", "docs/families.md"),
        ("sources", "docs/sources.md"),
        ("differences", "docs/guides/numbers-differ.md"),
    ):
        of[name].add_argument("--write", action="store_true", help=f"put the table into {where}")
    where = "docs/architectures.md and convert/architectures.json"
    of["architectures"].add_argument("--write", action="store_true", help=f"write {where}")
    of["architectures"].add_argument("--facts", action="store_true", help="write convert/architectures.json alone")
    command = commands.add_parser("peak")  # one task of the memory table, in a process of its own
    command.add_argument("task")
    command.add_argument("size")
    command.add_argument("pixels", type=int)
    command.add_argument("batch", type=int)

    o = parser.parse_args(argv if argv else ["speed"])
    match o.command:
        case "speed":
            if o.only:
                speed.again(o.only, o.keep or parser.error("--only needs --keep NAME"), o.seconds)
            else:
                sys.exit(speed.main(o.full, o.keep, o.precision, o.seconds, o.out))
        case "tiles":
            tiles.main()
        case "features":
            features.main(o.rows, o.killed, o.seconds)
        case "parity":
            parity.main(o.write)
        case "families":
            families.main(o.write)
        case "sources":
            sys.exit(sources.main(o.write))
        case "differences":
            differences.main(o.write)
        case "architectures":
            architectures.main(o.write, o.facts)
        case "conversion":
            conversion.main(o.size, o.write, o.place)
        case "peak":
            print(speed.peak_of(o.task, o.size, o.pixels, o.batch))


if __name__ == "__main__":
    main()

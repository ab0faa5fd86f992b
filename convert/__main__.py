"""Command line of the converter: `python -m convert --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import convert
import jaxvit
from jaxvit.config import Resampling

DESCRIPTION = """Converts a PyTorch checkpoint of DINOv2, with or without registers, to a jaxvit model.

  python -m convert SOURCE DEST                 convert
  python -m convert SOURCE DEST --verify        convert, then compare with the PyTorch original
  python -m convert verify DEST ORIGINAL        compare a converted model with its original

SOURCE is one of
  a file      model.safetensors, dinov2_vits14_reg4_pretrain.pth, an ONNX export of transformers' DINOv2
  a folder    as transformers or timm save it
  a hub id    facebook/dinov2-with-registers-small, timm/vit_small_patch14_reg4_dinov2.lvd142m

Layout and sizes are recognised from the content. Every tensor of the source is used or ignored by name, and every
parameter is set; otherwise nothing is written and every offender is listed. DEST becomes a folder of model.safetensors
and config.json. Reading safetensors and ONNX needs no PyTorch; .pth files and comparing do.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments[:1] == ["verify"]:
            return verify(arguments[1:])
        return convert_command(arguments)
    except (convert.ConversionError, jaxvit.CheckpointError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)  # libraries' messages have several lines
        return 1


def parser_for(name: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"python -m convert{name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def convert_command(arguments: Sequence[str]) -> int:
    parser = parser_for("", DESCRIPTION)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("dest", metavar="DEST", type=Path)
    parser.add_argument("--verify", action="store_true", help="compare with the original, and write parity.json")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the parameters"
    )
    parser.add_argument(
        "--resampling",
        choices=get_args(Resampling),
        help="how positions are brought to other image sizes (default: as the source's own library does)",
    )
    parser.add_argument("--revision", help="commit, branch or tag of a hub id")
    parser.add_argument("--overwrite", action="store_true", help="replace DEST if it holds a jaxvit model")
    options = parser.parse_args(arguments)
    if options.verify and options.dtype != "float32":
        parser.error("--verify compares float32 weights: leave out --dtype")
    model = convert.convert(
        options.source,
        options.dest,
        dtype=options.dtype,
        resampling=options.resampling,
        revision=options.revision,
        overwrite=options.overwrite,
    )
    c = model.config
    print(
        f"wrote {options.dest}: {c.depth} blocks of width {c.width}, {c.heads} heads, {c.registers} registers, {c.mlp}"
    )
    return _verify(options.dest, options.source, None, options.revision) if options.verify else 0


def verify(arguments: Sequence[str]) -> int:
    parser = parser_for(
        " verify",
        "Compares every internal value of a converted model with its PyTorch original, layer by layer, in float64 and\n"
        "float32, at the native size and two others. Prints the worst error of each kind, with the float32 error as a\n"
        "multiple of the original's own in brackets; writes parity.json. Exits 1 above the limits (1e-10, 2).",
    )
    parser.add_argument("dest", metavar="DEST", help="a folder that python -m convert wrote")
    parser.add_argument("original", metavar="ORIGINAL", help="the source it was converted from")
    parser.add_argument("--sizes", nargs="+", metavar="HxW", help="image sizes in pixels, such as 224x224 518x392")
    parser.add_argument("--revision", help="commit, branch or tag of a hub id")
    options = parser.parse_args(arguments)
    try:
        sizes = [tuple(map(int, size.split("x"))) for size in options.sizes or ()]
        if any(len(size) != 2 for size in sizes):
            raise ValueError
    except ValueError:
        parser.error(f"--sizes {' '.join(options.sizes)}: expected HEIGHTxWIDTH, such as 224x224")
    return _verify(options.dest, options.original, sizes or None, options.revision)


def _verify(folder: str | Path, source: str, sizes: Sequence[tuple[int, ...]] | None, revision: str | None) -> int:
    try:
        from convert.verify import Size, table, verify_folder
    except ImportError as error:
        raise convert.ConversionError(
            f"comparing needs {error.name}: pip install torch torchvision timm transformers"
        ) from None
    wanted = [Size(*size) for size in sizes] if sizes else None
    comparisons = verify_folder(folder, source, wanted, revision=revision, progress=True)
    print(table(comparisons))
    passed = all(comparison.passed for comparison in comparisons.values())
    print(f"{'equal' if passed else 'NOT EQUAL'} within the limits; wrote {Path(folder) / 'parity.json'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

"""Command line of the converter: `jaxvit convert --help`; in a checkout also `python -m convert`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import jaxvit
from jaxvit.io.checkpoint import PARITY, read_content
from jaxvit.io.provenance import verdict
from jaxvit.model.config import Resampling

from . import ConversionError, Reading, convert_to_folder
from .sources import Branch

DESCRIPTION = """Converts a PyTorch checkpoint of a Vision Transformer to a jaxvit model.

  jaxvit convert SOURCE DEST                 convert
  jaxvit convert SOURCE DEST --verify        convert, then compare with the PyTorch original
  jaxvit verify DEST ORIGINAL                compare a converted model with its original
  jaxvit show DEST                           what a converted model is, where it comes from, how equal it is
  jaxvit export DEST OTHER --layout L        back to PyTorch: a state dict, or a folder for timm or transformers
  jaxvit list                                known checkpoints: sizes, licences, hub ids

SOURCE is one of
  a file      model.safetensors, dinov2_vits14_reg4_pretrain.pth, deit_3_small_224_1k.pth, OpenAI's ViT-B-32.pt,
              a full checkpoint of DINO or iBOT, an ONNX export of transformers' DINOv2
  a folder    as transformers, timm or OpenCLIP save it
  a hub id    facebook/dinov2-with-registers-small, timm/deit3_small_patch16_224.fb_in1k

Families: DINOv2 with and without registers, DINOv3, DeiT III, CLIP's image side, DINO, iBOT, and all of timm's plain
Vision Transformers (docs/architectures.md). The converter recognises layout and sizes from the content. It asks for
what no file tells, such as the activation of a bare CLIP. Every tensor must be used or be on a list of tensors to
ignore, and every parameter must be set. If not, one error lists all problems and nothing is written.

DEST becomes a folder with model.safetensors and config.json. Safetensors and ONNX files need no PyTorch; other files
and --verify do.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one of `COMMANDS`, the first of the arguments; it may be left out where it is `convert`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments.pop(0) if arguments and arguments[0] in COMMANDS else "convert"
    try:
        return COMMANDS[command](arguments)
    except BrokenPipeError:
        raise
    except (ConversionError, jaxvit.CheckpointError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)  # libraries' messages have several lines
        return 1


def parser_for(name: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"jaxvit {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def convert_command(arguments: Sequence[str]) -> int:
    parser = parser_for("convert", DESCRIPTION)
    parser.add_argument("source", metavar="SOURCE", help="the checkpoint: a file, a folder or a hub id")
    parser.add_argument("dest", metavar="DEST", type=Path, help="the folder to write")
    parser.add_argument("--verify", action="store_true", help="compare with the original, and write parity.json")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="type of the parameters (default: %(default)s)",
    )
    parser.add_argument(
        "--resampling",
        choices=get_args(Resampling),
        help="how positions are resampled for other image sizes (default: as in the source's own library)",
    )
    add_reading(parser)
    parser.add_argument(
        "--random",
        action="store_true",
        help="the weights were never trained: experiments do not count them as evidence",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DEST if it holds a jaxvit model")
    options = parser.parse_args(arguments)
    known = reading_of(parser, options)
    if options.verify and options.dtype != "float32":
        parser.error("--verify compares float32 weights: leave out --dtype")
    config = convert_to_folder(
        options.source,
        options.dest,
        dtype=options.dtype,
        resampling=options.resampling,
        overwrite=options.overwrite,
        random=options.random,
        **known,
    )
    print(f"wrote {options.dest}")
    if options.verify:
        return _verify(options.dest, options.source, None, known)
    print(about(config, read_content(options.dest)["provenance"]))  # just written: no need to read the weights again
    return 0


def about(config: jaxvit.ViTConfig, provenance: jaxvit.Provenance) -> str:
    """A model and how images are prepared for it, and where both come from."""
    return f"{config.in_words()}\nimages: {config.preprocess.in_words()}\n{provenance}"


def add_reading(parser: argparse.ArgumentParser) -> None:
    """What a source may not tell itself; `Reading`."""
    parser.add_argument("--revision", help="commit, branch or tag of a hub id")
    parser.add_argument(
        "--architecture",
        metavar="NAME",
        help="timm's name of the model, which tells a bare file's heads, norms and preparation of photographs",
    )
    parser.add_argument(
        "--branch",
        choices=get_args(Branch),
        help="which weights to take if a training checkpoint holds several (default: the first of teacher, ema, raw)",
    )
    parser.add_argument(
        "--prefix", help="of an encoder inside a larger model, such as pretrained.: tensors outside it are not taken"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field of the config that no file tells, such as mlp=quick_gelu, heads=16 or grid=2x8; may be repeated",
    )


def reading_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Reading:
    config: dict[str, Any] = {}
    for each in options.set:
        name, equals, value = each.partition("=")
        if not equals:
            parser.error(f"--set {each}: expected FIELD=VALUE, such as mlp=quick_gelu")
        try:
            config[name] = json.loads(value)
        except ValueError:
            config[name] = value  # a word
    return Reading(
        revision=options.revision,
        architecture=options.architecture,
        branch=options.branch,
        prefix=options.prefix,
        config=config or None,
    )


def verify(arguments: Sequence[str]) -> int:
    parser = parser_for(
        "verify",
        "Compares a converted model with its PyTorch original: every internal value, layer by layer, in float64 and\n"
        "float32, at the native size and two others. Prints the largest float64 errors and, in brackets, the float32\n"
        "errors divided by those of the original. Writes parity.json. Exits 1 if one is above its limit (1e-10, 2).",
    )
    parser.add_argument("dest", metavar="DEST", help="a folder that jaxvit convert wrote")
    parser.add_argument("original", metavar="ORIGINAL", help="the source it was converted from")
    parser.add_argument("--sizes", nargs="+", metavar="HxW", help="image sizes in pixels, such as 224x224 518x392")
    add_reading(parser)
    options = parser.parse_args(arguments)
    try:
        sizes = [tuple(map(int, size.split("x"))) for size in options.sizes or ()]
        if any(len(size) != 2 for size in sizes):
            raise ValueError
    except ValueError:
        parser.error(f"--sizes {' '.join(options.sizes)}: expected HEIGHTxWIDTH, such as 224x224")
    return _verify(options.dest, options.original, sizes or None, reading_of(parser, options))


def _verify(folder: str | Path, source: str, sizes: Sequence[tuple[int, ...]] | None, known: Reading) -> int:
    try:
        from .verify import Size, table, verify_folder
    except ImportError as error:
        raise ConversionError(
            f"comparing needs {error.name}: pip install torch torchvision timm transformers"
        ) from None
    wanted = [Size(*size) for size in sizes] if sizes else None
    comparisons = verify_folder(folder, source, wanted, progress=True, **known)
    print(table(comparisons))
    passed = all(comparison.passed for comparison in comparisons.values())
    parity = json.loads((Path(folder) / PARITY).read_text(encoding="utf-8"))
    provenance = jaxvit.describe(folder)
    print(about(jaxvit.read_config(folder)[0], provenance))
    print(f"{verdict(parity)}; wrote {Path(folder) / PARITY}")
    guessed = any(line.startswith("preprocess ") for line in provenance.assumptions)
    assumed = ", which is an assumption: --set preprocess=.. settles it" if guessed else ""
    print(f"not compared: how photographs are prepared{assumed}")
    return 0 if passed else 1


def show(arguments: Sequence[str]) -> int:
    parser = parser_for(
        "show", "Shows what a converted model is, where it comes from, and how equal to its original it was found."
    )
    parser.add_argument("dest", metavar="DEST", help="a folder that jaxvit convert wrote")
    options = parser.parse_args(arguments)
    print(about(jaxvit.read_config(options.dest)[0], jaxvit.describe(options.dest)))
    return 0


def export_command(arguments: Sequence[str]) -> int:
    from .export import LAYOUTS, export, left_out, margins

    parser = parser_for(
        "export",
        "Writes a jaxvit model for the original library. DEST is\n"
        "  a name that ends in .safetensors   a state dict\n"
        "  a name without a suffix            a folder with config.json, from which timm and transformers build it\n\n"
        "  --layout timm           load_state_dict takes it strictly; timm.create_model('local-dir:DEST')\n"
        "  --layout transformers   the names of published files: from_pretrained loads them, in every version\n"
        "  --layout transformers5  the names of modules in memory: load_state_dict of transformers 5 takes them\n"
        "                          strictly, and its from_pretrained loads them too\n"
        "  --layout hub            the files of a family's authors\n\n"
        "Refused, with the reason, where the layout has no place for what the model has.",
    )
    parser.add_argument("model", metavar="MODEL", help="a folder that jaxvit convert wrote")
    parser.add_argument("dest", metavar="DEST", type=Path, help="the file (.safetensors) or folder to write")
    parser.add_argument("--layout", required=True, choices=LAYOUTS, help="whose names")
    parser.add_argument("--overwrite", action="store_true", help="replace DEST")
    options = parser.parse_args(arguments)
    model = jaxvit.load(options.model)
    export(model, options.dest, options.layout, overwrite=options.overwrite)
    print(f"wrote {options.dest} in the layout {options.layout}")
    if not options.dest.suffix:
        print(f"load it with {loader(options.dest)}")
        if there := margins(model, options.layout):
            how = {"round": "rounds it to even", "floor": "rounds it down"}[there]
            print(f"images: where half a pixel remains beside a crop, the library {how}, and the model does not")
    if missing := left_out(model, options.layout):
        print(f"left out, as this layout has no place for it and no features depend on it: {', '.join(missing)}")
    return 0


def loader(folder: Path) -> str:
    """What a user of timm or transformers types to load an exported folder."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "architecture" in config:
        return f'timm.create_model("local-dir:{folder}", pretrained=True)'
    return f'transformers.{config["architectures"][0]}.from_pretrained("{folder}")'


def list_command(arguments: Sequence[str]) -> int:
    from .catalogue import table

    parser_for("list", "Lists the checkpoints that this converter was made for: sizes, licences, hub ids.").parse_args(
        arguments
    )
    print(table())
    return 0


COMMANDS = {
    "convert": convert_command,
    "verify": verify,
    "show": show,
    "export": export_command,
    "list": list_command,
}

if __name__ == "__main__":
    sys.exit(main())

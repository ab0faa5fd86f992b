"""The command `jaxvit features`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxvit.machine import add_machine, on_machine
from jaxvit.processes import add_processes, in_processes

from .look_command import add_model, errors, opened_model, size_of

TEXT = """Features of many images, on disk: any token, layer, head or site of a model, one row for each image.

  jaxvit features facebook/dinov2-small photographs --out features.zarr
  jaxvit features dinov2-small 'shards/{000..009}.tar' --take cls patch_mean --dtype float16 --batch-size 64
  jaxvit features dinov2-small photographs --take 'dense=patches@[3,6,9,-1]:normed:grid' 'maps=pattern@-1:cls:head=mean'

What is taken is written WHAT[@LAYERS][:HOW], or NAME=WHAT..

  cls  registers  prefix  patches  tokens  patch_mean      after all layers and the final norm
  pooled  logits  projection                               what the model returns for the whole image
  tokens@-1  patches@[3,6,9,-1]:normed  cls@all            of the residual stream after these layers, from 0
  resid_pre@5  z@-1:cls  mlp_post@0:patches:mean  ..       any site that can be recorded: docs/interventions.md
  :normed  :mean  :grid  :head=0,3  :head=mean             the final norm; mean over tokens; rows x columns; heads

IMAGES is a folder, a list of paths (.txt), tar shards as of WebDataset, or datasets:NAME[:SPLIT]. The file ends in
.zarr, .npz, .safetensors or .parquet; jaxvit.read_features reads each. An image that cannot be used is named, left out
and counted: names always stand beside their rows."""


def parser() -> argparse.ArgumentParser:
    from jaxvit.convert.__main__ import add_reading

    made = argparse.ArgumentParser(
        prog="jaxvit features", description=TEXT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model(made)
    made.add_argument("images", metavar="IMAGES", help="where the images are")
    made.add_argument("--out", type=Path, default=Path("features.zarr"), help="the file to write (%(default)s)")
    made.add_argument("--take", nargs="+", default=["cls"], metavar="WHAT", help="what to read (cls)")
    made.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"), help="(%(default)s)")
    made.add_argument(
        "--compute", choices=("float32", "bfloat16"), help="type of the model's parameters and computation"
    )
    made.add_argument("--size", metavar="N|HxW", help="pixels that the model reads; by default its own preparation's")
    made.add_argument("--no-crop", action="store_true", help="whole photographs, at the nearest multiple of a patch")
    made.add_argument("--window", metavar="N|HxW", help="read patches of large pictures in windows of so many pixels")
    made.add_argument("--overlap", type=float, default=0.5, help="of windows, as a part of their side (%(default)s)")
    made.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at a time (%(default)s)")
    made.add_argument("--devices", default="1", metavar="N|all", help="over how many local devices (%(default)s)")
    made.add_argument(
        "--workers", type=int, metavar="N", help="threads that prepare images; by default one for each core"
    )
    made.add_argument("--labelled", action="store_true", help="the first subfolders of IMAGES are classes")
    made.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    made.add_argument("--overwrite", action="store_true", help="replace the file, or a run that was interrupted")
    add_reading(made)
    add_processes(made)
    add_machine(made)
    return made


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status. What a user can cause is one line on stderr."""
    made = parser()
    options = made.parse_args(arguments)
    size, window = size_of(made, options.size), size_of(made, options.window, "--window")
    return in_processes(made, options, lambda: written(made, options, size, window))


def written(
    made: argparse.ArgumentParser,
    options: argparse.Namespace,
    size: int | tuple[int, int] | None,
    window: int | tuple[int, int] | None,
) -> int:
    """Writes features; returns the exit status."""
    import jax

    import jaxvit
    from jaxvit.analysis.readouts import parsed
    from jaxvit.convert.__main__ import reading_of
    from jaxvit.io.image_sets import open_images
    from jaxvit.io.rows import writer_for

    reading = reading_of(made, options)

    def name_it(name: str, error: jaxvit.ImageError) -> None:
        print(f"left out: {error}", file=sys.stderr)

    try:
        mesh = jaxvit.parallel.mesh(devices=devices_of(jax.devices(), options.devices))
        parsed(options.take)
        writer_for(options.out)  # before anything is loaded
        images = open_images(options.images, labelled=options.labelled)
        model, provenance = opened_model(options.model, reading, options.compute or "float32")
        with on_machine(options):
            found = jaxvit.features(
                model,
                images,
                options.take,
                out=options.out,
                size=size,
                windows=jaxvit.Windows(window, options.overlap) if window else None,
                crop=not options.no_crop,
                batch_size=options.batch_size,
                dtype=options.dtype,
                mesh=mesh,
                workers=options.workers,
                on_error=name_it,
                resume=options.resume,
                overwrite=options.overwrite,
                progress=sys.stderr.isatty(),
                provenance=provenance,
            )
    except errors() as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except jaxvit.parallel.ProcessesError:
        raise  # an OSError that only whoever watches the processes can report
    except BrokenPipeError:
        raise
    except OSError as error:
        partial = Path(f"{options.out}.partial")
        kept = f": what is done is kept in {partial}, --resume goes on" if partial.is_dir() else f": {error.filename}"
        print(f"error: {error.strerror or error}{kept}", file=sys.stderr)
        return 1
    for name, array in found.items():
        print(f"{name}: {array.dtype}{list(array.shape)}")
    missing = len(found.header["left out"])
    also = f"; {missing} left out, named in its header" if missing else ""
    print(f"wrote {options.out}: {len(found.names)} images{also}")
    return 0


def devices_of(there: Sequence[Any], asked: str) -> Sequence[Any]:
    """So many of each process; raises a ValueError for more than there are."""
    by_process: dict[int, list[Any]] = {}
    for device in there:
        by_process.setdefault(device.process_index, []).append(device)
    most = min(map(len, by_process.values()))
    if asked == "all":
        return there
    if not asked.isdigit() or not 1 <= int(asked) <= most:
        raise ValueError(f"--devices {asked}: expected a number from 1 to {most}, or all")
    return [device for each in by_process.values() for device in each[: int(asked)]]

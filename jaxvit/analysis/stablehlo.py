"""A model's readouts as a portable program: StableHLO that runs wherever JAX does, without jaxvit.

    write_program(model, "program", ["cls", "pattern@-1:cls"], platforms=("cpu", "cuda", "tpu"))

The folder holds the program, which takes any number of images; the parameters; what goes in and comes out, and how
images are prepared; and run.py, which shows how to call it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from jaxvit.analysis.readouts import Readout, check_fits, parsed, read_out
from jaxvit.io.checkpoint import WEIGHTS, CheckpointError, replacing, save_file
from jaxvit.io.parallel import fetch
from jaxvit.io.provenance import Provenance, versions
from jaxvit.model.params import from_params, to_params
from jaxvit.model.vit import ViT

PROGRAM, ABOUT, RUN = "program.stablehlo", "program.json", "run.py"
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

SCRIPT = '''"""Runs the program beside this file. Needs jax, numpy and safetensors; not jaxvit.

    python run.py images.npy outputs.npz

images.npy holds prepared images: program.json says of which shape and type, and how they are prepared.
"""

import sys
from pathlib import Path

import jax
import jax.export
import numpy as np
from safetensors.numpy import load_file

here = Path(__file__).parent
program = jax.export.deserialize(bytearray((here / "program.stablehlo").read_bytes()))
params = load_file(here / "model.safetensors")
outputs = program.call(params, jax.numpy.asarray(np.load(sys.argv[1])))
np.savez(sys.argv[2], **{name: np.asarray(a, np.float32) for name, a in outputs.items()})
print({name: a.shape for name, a in outputs.items()})
'''


def write_program(
    model: ViT,
    folder: str | os.PathLike[str],
    take: str | Readout | Iterable[str | Readout] = ("cls", "registers", "patches"),
    *,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    size: int | tuple[int, int] | None = None,
    provenance: Provenance | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes the program and the parameters to a folder: all of it or nothing.

    Args:
      take: what it gives, as of `jaxvit.read_out`.
      platforms: where it is to run: cpu, cuda, rocm, tpu. None of them need be at hand.
      size: pixels of a side, or (height, width); by default those of the model's preparation.
      provenance: goes into program.json.
      overwrite: replace a folder that holds such a program; anything else is never replaced.

    Raises:
      ValueError: an unknown platform, what cannot be read, or a size that is no multiple of the patch.
      CheckpointError: the folder is there already, or cannot be written.
      ImportError: flatbuffers is missing: `pip install 'jaxvit[export]'`.

    Example:

        write_program(model, "program", ["cls", "logits"])  # python program/run.py images.npy outputs.npz
    """
    if wrong := [name for name in platforms if name not in PLATFORMS]:
        raise ValueError(f"there is no platform {wrong[0]!r}; expected of {', '.join(PLATFORMS)}")
    if not platforms:
        raise ValueError(f"no platform is given; expected of {', '.join(PLATFORMS)}")
    readouts = parsed(take)
    check_fits(readouts, model)
    config, params = model.config, to_params(model)
    preparation = config.preprocess.at(size)
    config.layout(*preparation.size)  # raises for a size that does not fit

    def program(params: dict[str, Array], images: Array) -> dict[str, Array]:
        return read_out(from_params(config, params), images, readouts)

    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *preparation.size, config.channels), np.float32)
    shapes = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in params.items()}
    exported = jax.export.export(jax.jit(program), platforms=tuple(platforms))(shapes, images)
    outputs: Any = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    about = {
        "inputs": {
            "params": f"{WEIGHTS}, by name",
            "images": {"shape": ["batch", *preparation.size, config.channels], "dtype": "float32"},
        },
        "preparation": preparation.in_words(),
        "outputs": {name: {"shape": [plain(n) for n in a.shape], "dtype": str(a.dtype)} for name, a in outputs.items()},
        "platforms": list(exported.platforms),
        "calling convention": exported.calling_convention_version,
        "versions": versions("jaxvit", "jax", "jaxlib"),
        "model": {"config": config.to_dict(), "provenance": (provenance or Provenance()).to_dict()},
    }
    check_free(Path(folder), overwrite)
    with replacing(Path(folder), (PROGRAM, ABOUT, RUN, WEIGHTS)) as temporary:
        (temporary / PROGRAM).write_bytes(exported.serialize())
        (temporary / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        (temporary / RUN).write_text(SCRIPT, encoding="utf-8")
        save_file(fetch(params), temporary / WEIGHTS)
    return Path(folder)


def plain(size: Any) -> int | str:
    """A size, or the name of one that is not known."""
    return int(size) if isinstance(size, int) else str(size)


def check_free(folder: Path, overwrite: bool) -> None:
    """Raises a CheckpointError for a place that is taken."""
    if not folder.exists():
        return
    if not (folder / PROGRAM).is_file():
        raise CheckpointError(f"{folder} exists, and holds no program: choose another folder")
    if not overwrite:
        raise CheckpointError(f"{folder} already holds a program: choose another folder, or give --overwrite")

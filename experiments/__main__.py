"""Command line of the experiments: `python -m experiments --help`."""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import convert
import jaxvit
from experiments import embedded, last_layer
from experiments.report import write_report
from jaxvit.checkpoint import replacing

SCHEMA = 1
FILES = ("report.html", "results.json", "per_image.csv")
EXPECTED = (convert.ConversionError, jaxvit.CheckpointError, jaxvit.ImageError, embedded.DataError)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "last-layer",
        help="what makes [CLS] in the last layer: patches, registers, or its own past",
        description=last_layer.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "--model",
        help="a converted model, a checkpoint file or folder, or a hub id such as facebook/dinov2-with-registers-small "
        "(default: a real DINOv2 ViT-S/14 out of a Python package)",
    )
    command.add_argument(
        "--images", type=user_path, help="a folder of images, searched at any depth (default: 136 crops)"
    )
    command.add_argument(
        "--out",
        type=user_path,
        default=Path("out/last-layer"),
        help="folder to write; an earlier report is replaced (default: %(default)s)",
    )
    command.add_argument("--size", type=int, help="side of the crops in pixels (default: the checkpoint's own)")
    command.add_argument("--batch-size", type=int, default=16, help="images at a time (default: %(default)s)")
    command.add_argument(
        "--show",
        nargs="+",
        metavar="PATTERN",
        help="examples to draw, by file name, such as 'cat*' (default: 8 of all)",
    )
    options = parser.parse_args(arguments)
    try:
        run_last_layer(options)
    except (*EXPECTED, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run_last_layer(options: argparse.Namespace) -> None:
    if options.batch_size < 1 or (options.size is not None and options.size < 1):
        raise ValueError("--batch-size and --size must be at least 1")
    started = time.perf_counter()
    check_ours(options.out)
    source = options.model or embedded.model_file()
    folder = options.images or embedded.photographs()
    show = options.show or (["*"] if options.images else embedded.EXAMPLES)
    sources = jaxvit.find_images(folder)
    model, description = convert.load_described(source)
    loaded = time.perf_counter()
    with replacing(options.out, FILES) as out:
        analysis = last_layer.analyse(
            model,
            sources,
            size=options.size,
            batch_size=options.batch_size,
            show=chosen(sources, show),
            per_image=out / "per_image.csv",
            progress=True,
        )
        done = time.perf_counter()
        results = {
            "schema": SCHEMA,
            "experiment": "last-layer",
            "command": shlex.join(["python", "-m", "experiments", *sys.argv[1:]]),
            "model": {
                "name": str(options.model or embedded.MODEL_NAME),
                "source": description,
                "parameters": sum(a.size for a in jax.tree.leaves(model)),
                "config": model.config.to_dict(),
            },
            **analysis.results,
            "versions": convert.versions("jaxvit", "jax", "jaxlib", "flax", "numpy", "pillow"),
            "device": f"{jax.devices()[0].device_kind} ({jax.default_backend()})",
            "seconds": {"loading": round(loaded - started, 1), "analysis": round(done - loaded, 1)},
        }
        results["images"]["folder"] = str(folder)
        (out / "results.json").write_text(json.dumps(finite(results), indent=1, allow_nan=False) + "\n")
        write_report(out / "report.html", results, analysis.examples)
    print_table(results)
    if skipped := results["images"]["skipped"]:
        print(f"\n{len(skipped)} of {len(sources)} images could not be used, such as {skipped[0]['error']}")
    print(f"\nwrote {options.out}: {', '.join(FILES)}")


def user_path(argument: str) -> Path:
    return Path(argument).expanduser()


def check_ours(out: Path) -> None:
    """Raises a ValueError if `out` holds a results.json or report.html that this command did not write."""
    try:
        ours = json.loads((out / "results.json").read_text())["experiment"] == "last-layer"
    except (OSError, ValueError, KeyError, TypeError):
        ours = not any((out / name).exists() for name in FILES)
    if not ours:
        raise ValueError(f"{out} holds files of another origin: choose another --out")


def chosen(sources: list[Path], patterns: Sequence[str], count: int = 8) -> set[int]:
    """Positions of `count` sources, evenly spaced among those whose name matches one of the patterns."""
    matching = [i for i, path in enumerate(sources) if any(fnmatch.fnmatch(path.name, p) for p in patterns)]
    if not matching:
        raise ValueError(f"no image is named like {' or '.join(patterns)}: --show takes patterns such as 'cat*'")
    return {matching[i] for i in np.linspace(0, len(matching) - 1, min(count, len(matching))).round().astype(int)}


def print_table(results: dict[str, Any]) -> None:
    """The main numbers, for the terminal."""
    print(f"\n{results['model']['name']}: last layer, query [CLS], {results['images']['n']} images")
    columns = (("A1 mass", 10), ("A7 norm", 10), ("share", 10), ("A5 cosine", 12), ("A9 CKA", 10))
    print("\n" + " " * 12 + "".join(f"{head:>{width}}" for head, width in (*columns, ("unbiased", 10), ("null", 8))))
    mass, norm, share = results["A1"]["mass"], results["A7"]["norm"], results["A7"]["share"]
    cosines, cka = results["A5"]["cosine with the update"], results["A9"]
    for name in share:
        cells = [
            mean(mass.get(name), 10),
            mean(norm[name], 10, 2),
            mean(share[name], 10),
            mean(cosines.get(name), 12),
            *(f"{cka[name][key]:{width}.3f}" if name in cka else " " * width for key, width in CKA_COLUMNS),
        ]
        print(f"{name:12}" + "".join(cells))
    print(f"\nA7 skip over patches, mean: {results['A7']['skip over patches']['mean']:.3f}")
    for before in results["A8"]["raw"][-2:-1]:  # there is none in a model of one block
        print(f"A8 cosine of [CLS] one block before the last with [CLS] after it, mean: {before['mean']:.3f}")


def finite(value: Any) -> Any:
    """Numbers that are not defined, such as the unbiased CKA of three images, as None: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


CKA_COLUMNS = (("biased", 10), ("unbiased", 10), ("null", 8))


def mean(statistics: dict[str, Any] | None, width: int, digits: int = 3) -> str:
    return " " * width if statistics is None else f"{statistics['mean']:{width}.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())

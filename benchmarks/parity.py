"""Measures parity with PyTorch for every family, library and size, and keeps the table in docs/parity.md.

    python -m benchmarks parity            print the table
    python -m benchmarks parity --write    and put it into docs/parity.md

Random weights of the full width; S and B at full depth, L and g with fewer blocks. The last row is the real DINOv2-S
on photographs. Takes a quarter of an hour on two cores.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

import convert
import jaxvit
from benchmarks.originals import random_original
from convert.originals import original_of
from convert.verify import FLOAT32_SITES, Comparison, Size, compare, default_sizes, random_images
from experiments import embedded
from jaxvit import ViTConfig

CASES = {"small": 12, "base": 12, "large": 2, "giant": 2}
"""Size -> number of blocks compared."""

MARK = "<!-- parity -->"
HEAD = """\
| model | compared with | pixels | float64: worst of all sites and layers | \
float32 ÷ PyTorch's own: stream, pattern, output | other sites |
|---|---|---|---|---|---|
"""


def rows() -> Iterator[str]:
    for size, depth in CASES.items():
        for registers in (0, 4):
            config = ViTConfig.dinov2(size, registers, depth=depth)
            for library in ("timm", "transformers"):
                module = random_original(config, library)
                model, original = convert.load(module), original_of(module)
                name = f"DINOv2-{size}{f' + {registers} registers' if registers else ''}, {depth} blocks, random"
                for pixels in default_sizes(model):
                    comparison = compare(model, original, random_images(model, pixels), defaults=False)
                    yield row(name, original.name, pixels, comparison)
    model, original = convert.load(embedded.model_file()), original_of(embedded.model_file())
    photographs = [path for path in jaxvit.find_images(embedded.photographs()) if path.stem == "0"][:4]
    images = np.asarray(jaxvit.prepare(photographs, model.config))
    comparison = compare(model, original, images, defaults=False)
    yield row("DINOv2-small, 12 blocks, **real**, 4 photographs", original.name, Size(*images.shape[1:3]), comparison)


def row(name: str, original: str, pixels: Size, comparison: Comparison) -> str:
    others = [site for site in comparison.float32 if site not in FLOAT32_SITES]
    errors = f"{comparison.worst64():.0e} | {comparison.worst_ratio():.2f} | {comparison.worst_ratio(others):.2f}"
    return f"| {name} | {original} | {pixels} | {errors} |"


def main(write: bool) -> None:
    lines = []
    print(HEAD, end="")
    for line in rows():
        print(line, flush=True)
        lines.append(line)
    if write:
        readme = Path("docs/parity.md")
        before, _, after = readme.read_text().split(MARK)
        readme.write_text(f"{before}{MARK}\n{HEAD}" + "\n".join(lines) + f"\n{MARK}{after}")

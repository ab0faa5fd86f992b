"""How equal every family is, from every source it is published in: the table of docs/families.md.

    python -m benchmarks families            measure, print the table
    python -m benchmarks families --write    and write docs/families.md

Each known checkpoint (`jaxvit list`) is built at its own width with random weights and one or two blocks,
brought into the layout of each source, converted from there, and compared at every site, in float64 and float32, at its
native size and at one that is not square. DINOv2 at full depth is compared by `python -m benchmarks parity`. Takes half
an hour on two cores.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import convert
from benchmarks.originals import randomise
from convert.catalogue import Checkpoint, known
from convert.engine import ConversionError
from convert.export import state_dict
from convert.originals import (
    build_clip,
    build_dinov3,
    build_dinov3_timm,
    build_timm,
    build_transformers,
    original_of,
)
from convert.verify import Comparison, Size, compare, random_images
from jaxvit import ViTConfig
from jaxvit.model.params import from_params, to_params

DOCS = Path("docs/families.md")
DEPTH = {True: 1, False: 2}
"""Blocks that are compared, of models wider than 1,024 and of others."""


def sources(family: str, config: ViTConfig) -> Iterator[tuple[str, Any, convert.Options]]:
    """What each library, and the family's authors, would publish: name, a module or state dict, what to say beside."""
    if family == "DINOv2":
        plain = randomise(build_timm(config, positioned=not config.registers))
        yield "timm", plain, {}
        yield "transformers", randomise(build_transformers(config)), {}
    elif family == "DINOv3":
        plain = randomise(build_dinov3_timm(config))
        yield "timm", plain, {}
        yield "transformers", randomise(build_dinov3(config)), {}
        config = replace(config, rope="bfloat16")
    elif family == "CLIP":
        plain = randomise(build_timm(config, positioned=True))
        yield "timm", plain, {}
        yield "transformers", randomise(build_clip(config)), {}
    else:
        plain = randomise(build_timm(config, positioned=family != "DeiT III"))
        yield "timm", plain, {}
    yield "authors' files", official(plain, config), given(family, config)


def official(module: Any, config: ViTConfig) -> dict[str, Any]:
    """The module's numbers in the layout of the family's authors."""
    model = convert.load(module)
    own = "bicubic" if config.pre_norm else "bicubic_antialias" if module.num_classes or config.registers else None
    changed = replace(model.config, rope=config.rope, pool="cls", resampling=own or "bicubic_offset")
    return state_dict(from_params(changed, to_params(model)), "hub")


def given(family: str, config: ViTConfig) -> convert.Options:
    return {"config": {"mlp": config.mlp}} if family == "CLIP" else {}


def rows() -> Iterator[str]:
    seen = set()
    for checkpoint in known():
        config = replace(checkpoint.config, depth=DEPTH[checkpoint.config.width > 1024])
        if (checkpoint.family, config) in seen:
            continue
        seen.add((checkpoint.family, config))
        yield from rows_of(checkpoint, config)


def rows_of(checkpoint: Checkpoint, config: ViTConfig) -> Iterator[str]:
    (rows, columns), p = config.grid, config.patch
    if config.rope:
        rows = columns = 14
    for source, published, options in sources(checkpoint.family, config):
        for size in (Size(rows * p, columns * p), Size((rows // 3 + 1) * p, (columns // 2 + 1) * p)):
            start = f"| {checkpoint.family} {checkpoint.name} | {source} | {size} |"
            try:
                found = measure(published, options, size)
            except ConversionError as error:
                yield f"{start} **failed** | {error} |"
                continue
            yield f"{start} {found.worst64():.0e} | {found.worst_ratio():.2f} |"


def measure(published: Any, options: convert.Options, size: Size) -> Comparison:
    model = convert.load(published, **options)
    original = original_of(published, **convert.reading(options))
    tokens = 500 * 384 // model.config.width  # wide models have many numbers in few tokens
    return compare(model, original, random_images(model, size, tokens=tokens), defaults=False)


def main(write: bool) -> None:
    lines = []
    for line in rows():
        print(line, file=sys.stderr, flush=True)
        lines.append(line)
    text = f"""# Families, sources and sizes

What `python -m benchmarks families --write` measured: every checkpoint of `jaxvit list` at its own width,
with random weights and {DEPTH[False]} blocks ({DEPTH[True]} above width 1,024), from every source it is published in.
"Authors' files" are in the layout of the family's own repository, and are compared with timm's model, loaded by timm's
own translation and with positions resampled as the authors do.

The float64 error is the worst of all sites and layers, max |difference| / max |value| (the limit is 1e-10). The float32
error is that of jaxvit against the original in float64, divided by the original's own, at the worst layer of the
residual stream, the attention pattern and the output (the limit is 2). It is a quotient of two maxima over one or a few
images, and moves between runs, as PyTorch's threads split sums in other ways.

| model | source | pixels | float64 error | float32 error ÷ the original's |
|---|---|---|---|---|
{chr(10).join(lines)}
"""
    print(text)
    if write:
        DOCS.write_text(text)

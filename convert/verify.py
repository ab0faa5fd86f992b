"""Parity with the PyTorch original: every internal value both sides have, layer by layer, in float64 and float32.

Error: the largest absolute difference, divided by the largest absolute value of the original, per site and layer.

* float64 shows that both compute the same function: limit 1e-10.
* float32 shows that jaxvit does it no worse: its error against the original's float64 run, divided by the error of the
  original's own float32 run against the same. The limit is 2 at every layer for the residual stream (embedding,
  resid_mid, resid_post), the attention pattern and the output; the values between them are reported. Errors below half
  a unit in the last place of the largest value (2^-24) count as that: no float32 result is closer.

Matrix products run at the highest precision the backend has. On a CPU that means without XLA's YNNPACK kernels, its
default since jaxlib 0.10: they add up all products of a row one after the other, where PyTorch's library and XLA's own
kernels add in blocks, and so make rounding errors up to four times as large in long sums. What the defaults give is
measured too, and reported without a limit.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

import jaxvit
from convert import versions
from convert.engine import ConversionError
from convert.originals import Original, Values, original_of
from convert.sources import sha256
from jaxvit import SITES, Output, Take, ViT, ViTConfig
from jaxvit.checkpoint import PARITY, WEIGHTS, replacing_file

FLOAT64_LIMIT = 1e-10
FLOAT32_LIMIT = 2.0
FLOAT32_FLOOR = 2.0**-24
FLOAT32_SITES = ("resid_pre", "resid_mid", "resid_post", "pattern", "final")

PRECISE_ON_CPU = {"xla_cpu_experimental_ynn_fusion_type": ""}
"""Compiler options; for a whole process: XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= (nothing after the =)."""


class Size(NamedTuple):
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


class Comparison(NamedTuple):
    """One size of images.

    Attributes:
      float64: site -> error of each layer.
      float32: site -> error of jaxvit, in each layer, against the original in float64.
      float32_original: the same for the original in float32.
      float32_defaults: the same for jaxvit with the backend's default matrix products; empty if not measured.
    """

    float64: dict[str, list[float]]
    float32: dict[str, list[float]]
    float32_original: dict[str, list[float]]
    float32_defaults: dict[str, list[float]]

    def ratios(self) -> dict[str, list[float]]:
        """How many times jaxvit's float32 error is the original's."""
        return {
            site: [
                ours / max(theirs, FLOAT32_FLOOR)
                for ours, theirs in zip(errors, self.float32_original[site], strict=True)
            ]
            for site, errors in self.float32.items()
        }

    def worst64(self) -> float:
        return worst(self.float64, self.float64)

    def worst_ratio(self, sites: Iterable[str] = FLOAT32_SITES) -> float:
        return worst(self.ratios(), sites)

    @property
    def passed(self) -> bool:
        # NaN compares false with everything, and so does not pass.
        return self.worst64() <= FLOAT64_LIMIT and self.worst_ratio() <= FLOAT32_LIMIT


def worst(errors: Mapping[str, Sequence[float]], sites: Iterable[str]) -> float:
    """The largest error at these sites; NaN if there is one, which Python's max may pass over."""
    return float(np.max([error for site in sites for error in errors[site]]))


def compare(model: ViT, original: Original, images: np.ndarray, defaults: bool = True) -> Comparison:
    """Runs both sides on images [B, H, W, 3], in both precisions; `defaults` is whether to measure that as well."""
    # Both precisions read the same numbers: those that float32 can hold.
    images = images.astype(np.float32)
    reference = original.run(images, torch.float64)
    with jax.enable_x64(True):
        float64 = errors(run(jaxvit.cast(model, "float64"), images, reference), reference)
    theirs = errors(original.run(images, torch.float32), reference)
    model = jaxvit.cast(model, "float32")
    ours = errors(run(model, images, reference), reference)
    by_default = errors(run(model, images, reference, precise=False), reference) if defaults else {}
    return Comparison(float64, ours, theirs, by_default)


def run(model: ViT, images: np.ndarray, sites: Iterable[str], precise: bool = True) -> Values:
    """jaxvit's values at these sites, all tokens and all query rows; and `final`, as originals name it.

    Args:
      precise: matrix products at the highest precision the backend has, not at its default.
    """
    options = PRECISE_ON_CPU if precise and jax.default_backend() == "cpu" else {}
    forward = compiled_by(tuple(site for site in sites if site in SITES), tuple(options.items()))
    with jax.default_matmul_precision("highest" if precise else None):
        out = forward(model, jnp.asarray(images, model.cls.dtype))
    final = jnp.concatenate([out.cls[:, None], out.registers, out.patches], axis=1)
    return {site: np.asarray(value) for site, value in {**out.trace, "final": final[None]}.items()}


@cache
def compiled_by(sites: tuple[str, ...], options: tuple[tuple[str, Any], ...]) -> Callable[[ViT, jax.Array], Output]:
    """The recording forward pass; kept, so that models of the same sizes compile once."""
    record = {site: Take(tokens="all") for site in sites}
    return jax.jit(lambda model, images: model(images, record=record), compiler_options=dict(options))


def errors(values: Values, reference: Values) -> dict[str, list[float]]:
    """max |difference| / max |reference|, site -> [per layer]."""

    def error(x: np.ndarray, y: np.ndarray) -> float:
        if x.shape != y.shape:
            raise ValueError(f"shapes differ: {x.shape} and {y.shape}")
        return float(np.abs(x - y).max() / np.abs(y).max())

    return {
        site: [error(x, y) for x, y in zip(values[site], layers, strict=True)] for site, layers in reference.items()
    }


def default_sizes(model: ViT) -> list[Size]:
    """The size positions were learned for, a smaller square, and one that is not square."""
    (rows, columns), p = model.config.grid, model.config.patch
    smaller = Size(max(rows * 3 // 7, 1) * p, max(columns * 3 // 7, 1) * p)
    return [Size(rows * p, columns * p), smaller, Size((rows // 3 + 1) * p, (columns // 2 + 1) * p)]


def verify(
    model: ViT, original: Original, sizes: Sequence[Size] | None = None, seed: int = 0, progress: bool = False
) -> dict[str, Comparison]:
    """Compares on random images: size -> comparison."""
    comparisons = {}
    for size in sizes or default_sizes(model):
        if progress:
            print(f"comparing at {size} with {original.name} ..", file=sys.stderr)
        comparisons[str(size)] = compare(model, original, random_images(model, size, seed))
    return comparisons


def random_images(model: ViT, size: Size, seed: int = 0, tokens: int = 500) -> np.ndarray:
    """Noise [B, H, W, 3], as many images as together have at least so many tokens.

    Errors are maxima, and the quotient of two maxima over few numbers is a matter of luck.
    """
    batch = -(-tokens // model.config.layout(*size).tokens)
    return np.random.default_rng(seed).normal(size=(batch, *size, 3))


def certificate(
    comparisons: Mapping[str, Comparison], original: Original, checksums: Mapping[str, str]
) -> dict[str, Any]:
    """What parity.json holds: everything measured, and between what."""
    return {
        "passed": all(c.passed for c in comparisons.values()),
        "original": original.name,
        "limits": {"float64 error": FLOAT64_LIMIT, "float32 error / the original's": FLOAT32_LIMIT},
        "sha256": dict(checksums),
        "versions": versions("jaxvit", "jax", "jaxlib", "flax", "torch", "timm", "transformers"),
        "sizes": {
            size: {
                "float64": c.float64,
                "float32": c.float32,
                "float32 of the original": c.float32_original,
                "float32 with default matrix products": c.float32_defaults,
                "worst float64": c.worst64(),
                "worst float32 ratio": c.worst_ratio(),
            }
            for size, c in comparisons.items()
        },
    }


TABLE_SITES = (("embedding", "resid_pre", 0), ("resid_mid", "resid_mid", None), ("resid_post", "resid_post", None))
TABLE_SITES += (("pattern", "pattern", None), ("output", "final", None))


def table(comparisons: Mapping[str, Comparison]) -> str:
    """Sizes by sites, worst layer: the float64 error, and in brackets the float32 ratio; last, over all sites."""
    head = f"{'':12}" + "".join(f"{title:>18}" for title, _, _ in TABLE_SITES) + f"{'all sites':>18}"
    lines = [head]
    for size, c in comparisons.items():
        ratios = c.ratios()
        cells = [
            (worst(c.float64, [site]), worst(ratios, [site]))
            if layer is None
            else (c.float64[site][layer], ratios[site][layer])
            for _, site, layer in TABLE_SITES
        ]
        cells.append((c.worst64(), c.worst_ratio(ratios)))
        lines.append(f"{size:12}" + "".join(f"{f'{error:.1e} ({ratio:.2f})':>18}" for error, ratio in cells))
    return "\n".join(lines)


def differing_sizes(ours: ViTConfig, theirs: ViTConfig) -> str:
    names = ("depth", "width", "heads", "hidden", "mlp", "registers", "patch", "grid")
    return ", ".join(
        f"{name} {getattr(ours, name)} and {getattr(theirs, name)}"
        for name in names
        if getattr(ours, name) != getattr(theirs, name)
    )


def verify_folder(
    folder: str | os.PathLike[str],
    source: Any,
    sizes: Sequence[Size] | None = None,
    revision: str | None = None,
    progress: bool = False,
) -> dict[str, Comparison]:
    """Compares a converted folder with its original and writes parity.json into it.

    Raises:
      ConversionError, jaxvit.CheckpointError: either side cannot be read, or the folder not be written.
    """
    folder = Path(folder)
    model = jaxvit.load(folder)
    try:
        for size in sizes or ():
            model.config.layout(*size)
    except ValueError as error:
        raise ConversionError(str(error)) from None
    original = original_of(source, model.config.resampling, revision)
    if differ := differing_sizes(model.config, original.config):
        raise ConversionError(f"{folder} and the original are different models: {differ}")
    comparisons = verify(model, original, sizes, progress=progress)
    report = certificate(comparisons, original, {WEIGHTS: sha256(folder / WEIGHTS)})
    with replacing_file(folder / PARITY) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")
    return comparisons

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

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import torch

import jaxvit
from jaxvit import SITES, Output, Take, ViT, ViTConfig
from jaxvit.io.checkpoint import PARITY, WEIGHTS, replacing_file, sha256, write_json
from jaxvit.io.provenance import without_preparation
from jaxvit.model.params import from_params, to_params

from . import Reading, versions
from .engine import ConversionError
from .originals import READ, Original, Values, original_of

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
    """Runs both sides on images [B, H, W, C], in both precisions; `defaults` is whether to measure that as well."""
    return compare_all(model, [original], images, defaults)[0]


def compare_all(
    model: ViT, originals: Sequence[Original], images: np.ndarray, defaults: bool = True
) -> list[Comparison]:
    """The same with several originals that have the same weights; jaxvit runs once for all of them."""
    # Both precisions read the same numbers: those that float32 can hold.
    images = images.astype(np.float32)
    ours = {"float64": run(model, images, "float64"), "float32": run(model, images, "float32")}
    if defaults:
        ours["float32_defaults"] = run(model, images, "float32", precise=False)
    theirs = [(original.run(images, torch.float64), original.run(images, torch.float32)) for original in originals]
    comparisons = [Comparison({}, {}, {}, {}) for _ in originals]

    def layer() -> None:
        """All sides go one layer further. What a layer's values take is free again when these functions return."""
        values = {name: next(layers) for name, layers in ours.items()}
        for comparison, (float64, float32) in zip(comparisons, theirs, strict=True):
            one(comparison, values, float64, float32)

    def one(comparison: Comparison, values: dict[str, Values], float64: Iterator[Values], float32: Iterator[Values]):
        reference = next(float64)
        for name, value in values.items():
            add_errors(getattr(comparison, name), value, reference)
        add_errors(comparison.float32_original, next(float32), reference)

    for _ in range(model.config.depth + 1):
        layer()
    return comparisons


TRACE_BYTES = 2**29
"""About how much jaxvit records at a time."""


def run(model: ViT, images: np.ndarray, dtype: str, precise: bool = True) -> Iterator[Values]:
    """jaxvit's values at the sites that originals have, all tokens and all query rows: layer by layer, then `results`.

    It is the model's own scan over its blocks: over all of them where what it records is small, and otherwise over as
    many at a time as TRACE_BYTES allows, each scan on the stream that the last one left.

    Args:
      precise: matrix products at the highest precision the backend has, not at its default.
    """
    options = PRECISE_ON_CPU if precise and jax.default_backend() == "cpu" else {}
    grid = model.config.layout(*images.shape[1:3]).grid
    embed, forward = compiled_by(tuple(options.items()), grid if model.config.rope else None)
    config = model.config
    layers = layers_at_a_time(config, images, dtype)
    with arithmetic(dtype, precise):
        stream = embed(share(model, 0, replace(config, depth=1), dtype), jnp.asarray(images, dtype))
    # Blocks do not resample positions: models that differ in the rule alone run the same program.
    config = replace(config, depth=layers, resampling="bicubic")
    for start in range(0, model.config.depth, layers):
        with arithmetic(dtype, precise):
            out = forward(share(model, start, config, dtype), stream)
            trace = {site: np.asarray(value) for site, value in out.trace.items()}
            stream = out.tokens
        values = [{site: value[layer] for site, value in trace.items()} for layer in range(layers)]
        if start + layers == model.config.depth:
            values.append({name: np.asarray(a) for name, a in results(out).items()})
        del out, trace
        while values:
            yield values.pop(0)  # held by nobody but who asked for it


def results(out: Output) -> dict[str, jax.Array]:
    """What is computed of the last block's tokens: all after the final norm, the pooled one, logits or projection."""
    cls = [] if out.cls is None else [out.cls[:, None]]
    values = {"final": jnp.concatenate([*cls, out.registers, out.patches], axis=1), "pooled": out.pooled}
    head = out.projection if out.logits is None else out.logits
    return values if head is None else {**values, "head": head}


@contextmanager
def arithmetic(dtype: str, precise: bool) -> Iterator[None]:
    """Within it, JAX knows the type, and multiplies matrices as precisely as the backend can, or by default."""
    with ExitStack() as stack:
        if dtype == "float64":
            stack.enter_context(jax.enable_x64(True))
        stack.enter_context(jax.default_matmul_precision("highest" if precise else None))
        yield


def share(model: ViT, start: int, config: ViTConfig, dtype: str) -> ViT:
    """A model of `config.depth` of the model's blocks, from block `start`; only these are cast."""
    stop = start + config.depth
    params = {
        name: np.asarray(a)[start:stop] if name.startswith("blocks.") else a for name, a in to_params(model).items()
    }
    return jaxvit.cast(from_params(config, params), dtype)


def layers_at_a_time(config: ViTConfig, images: np.ndarray, dtype: str) -> int:
    """How many layers one scan records: equal shares of all, as large as TRACE_BYTES allows, of at least one."""
    tokens = config.layout(*images.shape[1:3]).tokens
    axes = {"B": len(images), "T": tokens, "Q": tokens, "D": config.width, "H": config.heads, "d": config.head_size}
    axes["F"] = config.hidden
    numbers = sum(math.prod(axes[axis] for axis in SITES[site].split()) for site in READ)
    allowed = TRACE_BYTES // (numbers * np.dtype(dtype).itemsize)
    return max(n for n in range(1, config.depth + 1) if config.depth % n == 0 and n <= max(allowed, 1))


@cache
def compiled_by(
    options: tuple[tuple[str, Any], ...], grid: tuple[int, int] | None
) -> tuple[Callable[..., jax.Array], Callable[..., Output]]:
    """What enters the blocks, and what they do with it; kept, so that models of the same sizes compile once."""
    record = {site: Take(tokens="all") for site in READ}
    embed = jax.jit(lambda model, images: model.embed(images), compiler_options=dict(options))
    forward = jax.jit(lambda model, x: model.run_from(0, x, None, record, grid), compiler_options=dict(options))
    return embed, forward


def add_errors(measured: dict[str, list[float]], values: Values, reference: Values) -> None:
    """Appends max |difference| / max |reference| of each site."""
    if values.keys() != reference.keys():
        raise ValueError(f"sites differ: {sorted(values)} and {sorted(reference)}")
    for site, y in reference.items():
        measured.setdefault(site, []).append(error(values[site], y))


def error(x: np.ndarray, y: np.ndarray) -> float:
    """max |x - y| / max |y|; NaN if there is one, which NumPy's max and min keep."""
    if x.shape != y.shape:
        raise ValueError(f"shapes differ: {x.shape} and {y.shape}")
    x, y = x.reshape(-1), y.reshape(-1)
    piece = 2**16  # small enough for a core's cache: differences of all at once would take as much memory as x
    extremes = []
    for i in range(0, len(y), piece):
        difference, value = x[i : i + piece] - y[i : i + piece], y[i : i + piece]
        extremes.append((difference.max(), -difference.min(), value.max(), -value.min()))
    largest = np.max(extremes, axis=0)
    return float(np.max(largest[:2]) / np.max(largest[2:]))


def default_sizes(model: ViT) -> list[Size]:
    """The size positions were learned for, a smaller square, and one that is not square."""
    (rows, columns), p = model.config.grid, model.config.patch
    smaller = Size(max(rows * 3 // 7, 1) * p, max(columns * 3 // 7, 1) * p)
    return [Size(rows * p, columns * p), smaller, Size((rows // 3 + 1) * p, (columns // 2 + 1) * p)]


def sizes_for(model: ViT, original: Original) -> list[Size]:
    """`default_sizes`, or the one size that the original takes."""
    return default_sizes(model) if original.only is None else [Size(*original.only)]


def verify(
    model: ViT,
    source: Any,
    sizes: Sequence[Size] | None = None,
    seed: int = 0,
    progress: bool = False,
    **known: Unpack[Reading],
) -> dict[str, Comparison]:
    """Compares a model with its original on random images.

    Args:
      source: the original, as anything `convert.load` takes but a jaxvit folder: a live module of timm or transformers
        with its weights, a state dict, a file, a folder, a hub id; or an `Original`.
      sizes: of the images; by default the model's own, a smaller one, and one that is not square, or the only one that
        a live module takes.
      known: what the source does not tell, see `convert.Reading`.

    Returns:
      Size in words, such as "224x224" -> comparison, each with `passed`.

    Raises:
      ConversionError: the source cannot be read, is another model, or takes no images of these sizes.

    Example:

        module = timm.create_model("vit_small_patch16_224", pretrained=True)
        model = convert.load(module)
        comparisons = verify(model, module)
        assert all(comparison.passed for comparison in comparisons.values())
        print(table(comparisons))
    """
    original = source if isinstance(source, Original) else original_of(source, model.config.resampling, **known)
    if differ := differing_sizes(model.config, original.config):
        raise ConversionError(f"the model and the original are different models: {differ}")
    sizes = sizes or sizes_for(model, original)
    check_sizes(model, original, sizes)
    comparisons = {}
    for size in sizes:
        if progress:
            print(f"comparing at {size} with {original.name} ..", file=sys.stderr)
        comparisons[str(size)] = compare(model, original, random_images(model, size, seed))
    return comparisons


def check_sizes(model: ViT, original: Original, sizes: Iterable[Size]) -> None:
    """Raises a ConversionError unless both sides take images of these sizes."""
    for size in sizes:
        try:
            model.config.layout(*size)
        except ValueError as error:
            raise ConversionError(str(error)) from None
        if original.only is not None and original.only != (size[0], size[1]):
            raise ConversionError(
                f"this {original.name} takes images of {Size(*original.only)} alone, not {Size(*size)}: leave out the "
                f"sizes, or build it with dynamic_img_size=True"
            )


def random_images(model: ViT, size: Size, seed: int = 0, tokens: int = 500) -> np.ndarray:
    """Noise [B, H, W, C], as many images as together have at least so many tokens.

    Errors are maxima, and the quotient of two maxima over few numbers is a matter of luck.
    """
    batch = -(-tokens // model.config.layout(*size).tokens)
    return np.random.default_rng(seed).normal(size=(batch, *size, model.config.channels))


def certificate(
    comparisons: Mapping[str, Comparison],
    config: ViTConfig,
    original: Original,
    checksums: Mapping[str, str],
    assumed: Sequence[str],
) -> dict[str, Any]:
    """What parity.json holds: everything measured, between what, and the assumptions that both sides share."""
    return {
        "passed": all(c.passed for c in comparisons.values()),
        "assumptions": list(assumed),
        "original": original.name,
        "limits": {"float64 error": FLOAT64_LIMIT, "float32 error / the original's": FLOAT32_LIMIT},
        "sha256": dict(checksums),
        "config": without_preparation(config),
        "sha256 of the original": dict(original.checksums),
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
    names = [field.name for field in fields(ViTConfig) if field.name not in NOT_COMPARED]
    return ", ".join(
        f"{name} {getattr(ours, name)} and {getattr(theirs, name)}"
        for name in names
        if getattr(ours, name) != getattr(theirs, name)
    )


NOT_COMPARED = ("resampling", "preprocess", "mask_token")
"""Fields of a config in which a model may differ from its original: the rule is forced on that, the others change no
number that is compared."""


def shared_assumptions(ours: Sequence[str], theirs: Sequence[str]) -> list[str]:
    """What neither side was told: a comparison cannot see whether it is right. Assumptions start with a field's name.

    The original is built with the model's own rule of resampling, so that an assumption about that is always shared.
    """
    fields_of_ours = {assumption.split()[0] for assumption in ours}
    shared = [assumption for assumption in theirs if assumption.split()[0] in fields_of_ours]
    return shared + [each for each in ours if each.startswith("resampling ") and each not in shared]


def verify_folder(
    folder: str | os.PathLike[str],
    source: Any,
    sizes: Sequence[Size] | None = None,
    progress: bool = False,
    **known: Unpack[Reading],
) -> dict[str, Comparison]:
    """Compares a converted folder with its original and writes parity.json into it.

    Args:
      source, sizes, known: as for `verify`. The source may be a live module.

    Raises:
      ConversionError, jaxvit.CheckpointError: either side cannot be read, or the folder not be written.
    """
    folder = Path(folder)
    model = jaxvit.load(folder)
    original = original_of(source, model.config.resampling, **known)
    comparisons = verify(model, original, sizes, progress=progress)
    assumed = shared_assumptions(jaxvit.describe(folder).assumptions, original.assumed)
    report = certificate(comparisons, model.config, original, {WEIGHTS: sha256(folder / WEIGHTS)}, assumed)
    with replacing_file(folder / PARITY) as temporary:
        write_json(temporary, report)
    return comparisons

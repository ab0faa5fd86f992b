"""How far features of a real model move when one thing differs from what it was trained with.

    python -m benchmarks differences            print the table
    python -m benchmarks differences --write    and put it into docs/guides/numbers-differ.md

The DINOv2-S that comes from PyPI, in float32 at 224 px, on one picture of each of 17 photographs. Each row changes one
thing. Its features b are compared with those of the unchanged model, a: |b - a| / |a|, the mean over photographs for
[CLS], and over photographs and places for patches. The cosine is that of [CLS]. Takes two minutes on two cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

import convert
import jaxvit
from convert.originals import original_of
from experiments import embedded
from jaxvit import Output, Preprocess, ViT
from jaxvit.io.images import centre
from jaxvit.model.params import from_params, to_params

PAGE = Path("docs/guides/numbers-differ.md")
MARK = "<!-- differences -->"
HEAD = """\
| what differs | [CLS] | patches | cosine of [CLS] |
|---|---|---|---|
"""


class Features(NamedTuple):
    """[B, D] and [B, N, D]; or None where there is nothing of that shape to compare."""

    cls: np.ndarray
    patches: np.ndarray | None


class Setting(NamedTuple):
    """The unchanged model, and what it reads."""

    model: ViT
    paths: Sequence[Path]
    images: jax.Array


@jax.jit
def forward(model: ViT, images: jax.Array) -> Output:
    return model(images)


def of(model: ViT, images: Any) -> Features:
    out = forward(model, images)
    return Features(np.asarray(out.cls, np.float32), np.asarray(out.patches, np.float32))


# What differs ---------------------------------------------------------------------------------------------------------


def prepared(s: Setting, **changes: Any) -> Features:
    """With another preparation of the photographs."""
    return of(s.model, jaxvit.prepare(s.paths, replace(s.model.config.preprocess, **changes)))


def larger(s: Setting, size: int) -> Features:
    """At another size, whose patches are others."""
    return of(s.model, jaxvit.prepare(s.paths, s.model.config, size=size))._replace(patches=None)


def reordered(s: Setting) -> Features:
    """With the channels in the order that OpenCV reads: BGR, normalised as RGB."""
    pixels = [jaxvit.decode(path)[:, :, ::-1] for path in s.paths]
    return of(s.model, jaxvit.prepare(pixels, s.model.config))


def resized_by_torch(s: Setting, antialias: bool) -> Features:
    """Tensors resized by torchvision, not images by Pillow."""
    p: Preprocess = s.model.config.preprocess
    pixels = []
    for path in s.paths:
        image = torch.tensor(jaxvit.decode(path)).permute(2, 0, 1)
        image = transforms.resize(image, [p.resized[0]], InterpolationMode.BICUBIC, antialias=antialias)
        pixels.append(centre(image.permute(1, 2, 0).numpy(), p) / 255)
    return of(s.model, jnp.asarray((np.stack(pixels) - p.mean) / p.std, jnp.float32))


def configured(s: Setting, size: int | None = None, **changes: Any) -> Features:
    """With the same weights and another config."""
    images = s.images if size is None else jaxvit.prepare(s.paths, s.model.config, size=size)
    return of(from_params(replace(s.model.config, **changes), to_params(s.model)), images)


def at_highest(s: Setting) -> Features:
    """With matrix products at the highest precision of the device, not its default."""
    with jax.default_matmul_precision("highest"):
        return of(s.model, s.images)


def in_half(s: Setting, dtype: str) -> Features:
    return of(jaxvit.cast(s.model, dtype), s.images)


def original(s: Setting) -> Features:
    """The PyTorch model of the same weights, in float32."""
    *_, last = original_of(embedded.model_file()).run(np.asarray(s.images), torch.float32)
    return Features(last["final"][:, 0], last["final"][:, 1:])


def read_out(s: Setting, which: str) -> Features:
    """Another readout of the unchanged model: a text of `jaxvit.read_out` for [CLS] and patches."""
    names = [which.format(name) for name in ("cls", "patches")]
    found = jaxvit.read_out(s.model, s.images, names)
    return Features(*(np.asarray(found[name]) for name in names))


def mean_patch(s: Setting) -> Features:
    return Features(np.asarray(forward(s.model, s.images).patches).mean(1), None)


BEFORE_THE_MODEL: Mapping[str, Callable[[Setting], Features]] = {
    "mean and std of 0.5 instead of ImageNet's": partial(prepared, mean=(0.5,) * 3, std=(0.5,) * 3),
    "pixels from 0 to 1, not normalised": partial(prepared, mean=(0.0,) * 3, std=(1.0,) * 3),
    "pixels from 0 to 255, not normalised": partial(prepared, mean=(0.0,) * 3, std=(1 / 255,) * 3),
    "BGR instead of RGB": reordered,
    "518 px instead of 224": partial(larger, size=518),
    "the whole picture at 224 px, instead of 256 cropped to 224": partial(prepared, resize=224),
    "bilinear instead of bicubic": partial(prepared, interpolation="bilinear"),
    "Pillow's nearest instead of bicubic": partial(prepared, interpolation="nearest"),
    "torchvision's bicubic on tensors, without antialiasing": partial(resized_by_torch, antialias=False),
    "torchvision's bicubic on tensors, antialiased": partial(resized_by_torch, antialias=True),
}
IN_THE_MODEL: Mapping[str, Callable[[Setting], Features]] = {
    "positions by timm's rule, `bicubic_antialias`": partial(configured, resampling="bicubic_antialias"),
    "positions by the rule of Meta's own code, `bicubic_offset`": partial(configured, resampling="bicubic_offset"),
    "the activation `quick_gelu` instead of `gelu`": partial(configured, mlp="quick_gelu"),
    "the activation `gelu_tanh` instead of `gelu`": partial(configured, mlp="gelu_tanh"),
    "`eps` 1e-5 instead of 1e-6": partial(configured, eps=1e-5),
    "`eps` 1e-12 instead of 1e-6": partial(configured, eps=1e-12),
    "all in bfloat16": partial(in_half, dtype="bfloat16"),
    "all in float16": partial(in_half, dtype="float16"),
    '`jax.default_matmul_precision("highest")`': at_highest,
    "nothing: PyTorch in float32": original,
}
WHAT_IS_READ: Mapping[str, Callable[[Setting], Features]] = {
    "without the final norm": partial(read_out, which="{}@-1"),
    "a layer too early, normed": partial(read_out, which="{}@-2:normed"),
    "the mean of the patches instead of [CLS]": mean_patch,
}


# The table ------------------------------------------------------------------------------------------------------------


def distance(b: np.ndarray, a: np.ndarray) -> float:
    """Of vectors along the last axis: the mean of |b - a| / |a|."""
    return float((np.linalg.norm(b - a, axis=-1) / np.linalg.norm(a, axis=-1)).mean())


def cosine(b: np.ndarray, a: np.ndarray) -> float:
    return float(((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).mean())


def row(name: str, b: Features, a: Features) -> str:
    patches = "" if b.patches is None or a.patches is None else f"{distance(b.patches, a.patches):.1g}"
    return f"| {name} | {distance(b.cls, a.cls):.1g} | {patches} | {cosine(b.cls, a.cls):.4f} |"


def rows() -> Iterator[str]:
    model = convert.load(embedded.model_file())
    paths = [path for path in jaxvit.find_images(embedded.photographs()) if path.stem == "0"]
    s = Setting(model, paths, jaxvit.prepare(paths, model.config))
    unchanged = of(s.model, s.images)
    for name, change in {**BEFORE_THE_MODEL, **IN_THE_MODEL, **WHAT_IS_READ}.items():
        yield row(name, change(s), unchanged)


def main(write: bool) -> None:
    parts = PAGE.read_text().split(MARK)
    if write and len(parts) != 3:
        raise SystemExit(f"{PAGE} has no two lines {MARK}, between which the table would go")
    print(HEAD, end="")
    lines = []
    for line in rows():
        print(line, flush=True)
        lines.append(line)
    if write:
        PAGE.write_text(f"{parts[0]}{MARK}\n{HEAD}" + "\n".join(lines) + f"\n{MARK}{parts[2]}")

"""How the libraries of checkpoints prepare images, as a `Preprocess`: what their configs say, with their own defaults.

Margins around a centre crop are rounded to even in torchvision, timm and OpenCLIP, and down in transformers. What a
config asks for and `Preprocess` cannot express is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxvit import Preprocess, ViTConfig
from jaxvit.model.config import Fit, Interpolation, both_sides

from .engine import ConversionError

IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
OPENAI = {"image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711)}
HALF = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}

SAY = "say --set preprocess='{\"resize\": 256, \"crop\": 224, ..}' (config={'preprocess': jaxvit.Preprocess(..)})"

# timm and OpenCLIP ----------------------------------------------------------------------------------------------------

FITS: dict[str, Fit] = {"center": "cover", "squash": "stretch", "border": "contain"}
"""timm's modes of cropping."""
RESIZE_MODES: dict[str, Fit] = {"shortest": "cover", "squash": "stretch", "longest": "contain"}
"""OpenCLIP's."""


def of_timm(cfg: Mapping[str, Any]) -> Preprocess:
    """What timm's `create_transform(**resolve_data_config(pretrained_cfg=cfg))` does.

    Raises:
      ConversionError: values that make no sense, or a mode that is not known.
    """
    mode = cfg.get("crop_mode") or "center"
    if mode not in FITS:
        raise ConversionError(f"its pretrained_cfg crops images in the mode {mode!r}, which is not known here: {SAY}")
    try:
        _, *size = cfg.get("input_size") or (3, 224, 224)
        ratio = cfg.get("crop_pct") or 0.875
        height, width = both_sides(size, "input_size")
        return Preprocess(
            (math.floor(height / ratio), math.floor(width / ratio)),
            (height, width),
            numbers(cfg.get("mean") or IMAGENET["image_mean"]),
            numbers(cfg.get("std") or IMAGENET["image_std"]),
            FITS[mode],
            cfg.get("interpolation") or "bicubic",
            "round",
            "mean" if mode == "border" else "black",
        )
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ConversionError(f"its pretrained_cfg makes no sense: {error}") from error


def of_open_clip(cfg: Mapping[str, Any], size: tuple[int, int]) -> Preprocess:
    """What OpenCLIP's `image_transform` does for evaluation, with its `preprocess_cfg`.

    Raises:
      ConversionError: values that make no sense or cannot be expressed.
    """
    mode = cfg.get("resize_mode") or "shortest"
    if mode not in RESIZE_MODES or (mode == "longest" and cfg.get("fill_color")):
        asked = f"fills with {cfg['fill_color']!r}" if mode in RESIZE_MODES else f"resizes in the mode {mode!r}"
        raise ConversionError(f"its preprocess_cfg {asked}, which is not known here: {SAY}")
    try:
        mean, std = (numbers(cfg.get(name) or OPENAI[f"image_{name}"]) for name in ("mean", "std"))
        # It forgets the interpolation where it covers a size that is no square.
        plain = mode == "shortest" and size[0] != size[1]
        interpolation = "bicubic" if plain else cfg.get("interpolation") or "bicubic"
        return Preprocess(size, size, mean, std, RESIZE_MODES[mode], interpolation, "round")
    except (TypeError, ValueError) as error:
        raise ConversionError(f"its preprocess_cfg makes no sense: {error}") from error


# transformers ---------------------------------------------------------------------------------------------------------

META = Preprocess(margin="round")
"""Meta's evaluations of DINO, iBOT, DINOv2, DINOv3 and DeiT III, which use torchvision."""

CROPS: dict[str, Any] = {"crop_size": 224, "do_center_crop": True, "resample": 3}
CLIP: dict[str, Any] = CROPS | {"size": 224, "default_to_square": False} | OPENAI
VIT: dict[str, Any] = {"size": 224, "default_to_square": True, "do_center_crop": False, "resample": 2} | HALF
PROCESSORS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("Bit", "CLIP", "ChineseCLIP"), CLIP),
    "ViT": VIT,
    "DeiT": CROPS | {"size": 256, "default_to_square": True} | HALF,
    "DINOv3ViT": VIT | IMAGENET,
}
"""transformers' image processors -> their defaults: files may leave out values that equal them."""

SUFFIXES = ("FeatureExtractor", "ImageProcessor", "ImageProcessorFast", "ImageProcessorPil")
FILTERS: tuple[Interpolation, ...] = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""Pillow's numbers of filters."""


def of_transformers(config: Mapping[str, Any]) -> Preprocess:
    """What transformers' image processor does that a preprocessor_config.json describes.

    Its processors on Pillow; those on torchvision, which transformers 5 prefers, differ by a grey level in places.

    Raises:
      ConversionError: a processor that is not known, or that does what `Preprocess` cannot express.
    """
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
    name = next((kind.removesuffix(s) for s in SUFFIXES if kind.endswith(s)), kind)
    said = {key: value for key, value in config.items() if value is not None}
    if name not in PROCESSORS:
        needed = ("size", "resample", "image_mean", "image_std", "do_center_crop")
        if kind or not said.keys() >= set(needed):
            which = f"is for {kind}, which is not known here" if kind else "names no image processor"
            raise ConversionError(f"its preprocessor_config.json {which}: {SAY}, or leave that file out")
    said = {**PROCESSORS.get(name, {}), **said}
    try:
        return processor(said, whole=name != "DINOv3ViT")
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConversionError(f"its preprocessor_config.json makes no sense: {error!r}") from error


def processor(said: Mapping[str, Any], whole: bool) -> Preprocess:
    if said.get("do_pad"):
        raise ConversionError(f"its preprocessor_config.json pads images (do_pad), which is not known here: {SAY}")
    crops = said.get("do_center_crop", False)
    crop = sides(said["crop_size"], "crop_size") if crops else None
    size = said["size"]
    if isinstance(size, int) and not said["default_to_square"]:
        size = {"shortest_edge": size}
    if not said.get("do_resize", True):
        fit, resize = "none", crop
    elif isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
        fit, resize = "cover", sides(size["shortest_edge"], "size")
    else:
        fit, resize = "stretch", sides(size, "size")
        crop = crop or resize
    if crop is None or resize is None:
        kept = "keeps the aspect ratio of images and crops nothing, so they have no one size"
        raise ConversionError(f"its preprocessor_config.json {kept}: {SAY}")
    # (x f - mean) / std, where x are grey levels and f the factor, is (x / 255 - mean / 255 f) / (std / 255 f).
    scale = 255 * (said.get("rescale_factor", 1 / 255) if said.get("do_rescale", True) else 1)
    normalised = said.get("do_normalize", True)
    mean, std = (
        numbers(said[f"image_{name}"]) if normalised else 3 * (n,) for name, n in (("mean", 0.0), ("std", 1.0))
    )
    exact = abs(scale - 1) < 1e-6
    return Preprocess(
        resize,
        crop,
        mean if exact else tuple(x / scale for x in mean),
        std if exact else tuple(x / scale for x in std),
        fit,
        dict(enumerate(FILTERS))[said["resample"]] if fit != "none" else "bicubic",
        whole=whole,
    )


def sides(size: Any, name: str) -> tuple[int, int]:
    if isinstance(size, Mapping):
        if set(size) != {"height", "width"}:
            asked = ", ".join(map(str, size))
            raise ConversionError(f"its preprocessor_config.json resizes by {asked}, which is not known here: {SAY}")
        size = (size["height"], size["width"])
    return both_sides(size, name)


def numbers(values: float | Sequence[float]) -> tuple[float, ...]:
    """One for each channel; one alone stands for three."""
    return (float(values),) * 3 if isinstance(values, int | float) else tuple(map(float, values))


# Written for the libraries --------------------------------------------------------------------------------------------


def to_timm(prepared: Preprocess) -> dict[str, Any]:
    """The entries of a pretrained_cfg that ask timm for this preparation, but for the margin, which it rounds.

    Raises:
      ConversionError: timm cannot be asked for it.
    """
    (height, width), (rows, columns) = prepared.size, prepared.resized
    # The crop as a part of the short side, so that timm, which rounds down, finds the short side again.
    ratio = next((r for r in ratios(height, rows) if math.floor(width / r) == columns), height / rows)
    modes = {fit: mode for mode, fit in FITS.items()}
    cfg = {
        "input_size": [len(prepared.mean), height, width],
        "crop_pct": ratio,
        "crop_mode": modes.get(prepared.fit),
        "interpolation": prepared.interpolation,
        "mean": list(prepared.mean),
        "std": list(prepared.std),
    }
    return expressed(prepared, cfg, of_timm, "a pretrained_cfg of timm")


def ratios(crop: int, resize: int) -> list[float]:
    """Floats by which `crop` divided and rounded down is `resize`, the nearest first."""
    exact = crop / resize
    near = (exact, math.nextafter(exact, 0), math.nextafter(exact, math.inf))
    return [ratio for ratio in near if math.floor(crop / ratio) == resize]


def to_transformers(prepared: Preprocess, kind: str) -> dict[str, Any]:
    """The preprocessor_config.json that asks transformers for this preparation, but for the margin, which it floors.

    Args:
      kind: the family's image processor, such as "Bit" or "CLIP".

    Raises:
      ConversionError: transformers cannot be asked for it.
    """
    crop, size = (dict(zip(("height", "width"), each, strict=True)) for each in (prepared.size, prepared.resized))
    square = prepared.resized[0] == prepared.resized[1]
    crops = prepared.whole and (prepared.fit != "stretch" or crop != size)
    processor = dict(
        image_processor_type=f"{kind if prepared.whole else 'DINOv3ViT'}ImageProcessor",
        do_convert_rgb=True,
        do_resize=prepared.fit != "none",
        size={"shortest_edge": prepared.resized[0]} if prepared.fit == "cover" and square else size,
        resample=FILTERS.index(prepared.interpolation),
        do_center_crop=crops,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(prepared.mean),
        image_std=list(prepared.std),
        **({"crop_size": crop} if crops else {}),
    )
    return expressed(prepared, processor, of_transformers, "a preprocessor_config.json of transformers")


def expressed(
    prepared: Preprocess, written: dict[str, Any], read: Callable[[Mapping[str, Any]], Preprocess], what: str
) -> dict[str, Any]:
    """What is written, if it reads back as the same preparation; only the rounding of margins is the library's."""
    try:
        back = read(written)
    except ConversionError:
        back = None
    if back is None or replace(back, margin=prepared.margin) != prepared:
        raise ConversionError(
            f"{what} cannot ask for how images are prepared ({prepared.in_words()}): export a single file, which ends "
            "in .safetensors, and prepare images yourself"
        )
    return written


# Given by the user ----------------------------------------------------------------------------------------------------


def given(value: Any) -> Preprocess:
    """A preparation from the fields that JSON gives; one that is given already stays.

    Raises:
      ConversionError: fields that make no sense.
    """
    if isinstance(value, Preprocess):
        return value
    try:
        if not isinstance(value, Mapping):
            raise TypeError("expected its fields")
        return ViTConfig.from_dict(dict(depth=1, width=1, heads=1, hidden=1, preprocess=value)).preprocess
    except (TypeError, ValueError) as error:
        raise ConversionError(f"preprocess is {value!r}, which makes no sense ({error}): {SAY}") from None

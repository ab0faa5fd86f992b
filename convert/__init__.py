"""PyTorch checkpoints as jaxvit models: `convert.load(source)`, or `jaxvit convert SOURCE DEST`."""

from __future__ import annotations

if __name__ == "convert":  # in a checkout, this is jaxvit.convert
    from jaxvit.checkout import alias

    alias(__name__)

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack, cast

import jax
from jax.typing import DTypeLike

import jaxvit
from jaxvit import Provenance
from jaxvit.io.checkpoint import FormatError, check_place, checksum, saving, writing
from jaxvit.io.provenance import versions
from jaxvit.model.config import Resampling
from jaxvit.model.params import abstract, from_params, to_params

from . import clip, deit, dino, dinov2, dinov3, timm
from .engine import (
    AVERAGED,
    ConversionError,
    Layout,
    Renamed,
    convert_tensors,
    larger_model,
    locate,
    stream_tensors,
    unused,
)
from .meta import field_of
from .sources import Branch, Source, open_source

__all__ = ["ConversionError", "Options", "Reading", "convert", "convert_to_folder", "load", "load_described"]

LAYOUTS: tuple[Layout, ...] = (
    *dinov2.LAYOUTS,
    *dinov3.LAYOUTS,
    deit.LAYOUT,
    timm.LAYOUT,
    dino.LAYOUT,
    *clip.LAYOUTS,
)
"""Tried in this order."""


class Reading(TypedDict, total=False):
    """What is to be known about a source that it does not tell itself.

    Keys:
      revision: commit, branch or tag, for a hub id.
      architecture: timm's name of the model, such as "vit_base_patch16_clip_224", for a bare file in timm's layout.
      branch: of a training checkpoint that holds several: "teacher", "student", "ema" (the moving average of weights)
        or "raw" (the weights that were optimised); by default the first of teacher, ema and raw that it holds.
      prefix: of an encoder inside a larger model, such as "pretrained.": tensors outside it are not taken.
      config: fields of the config that neither tensors nor files beside them tell, such as {"mlp": "quick_gelu"}.
    """

    revision: str | None
    architecture: str | None
    branch: Branch | None
    prefix: str | None
    config: Mapping[str, Any] | None


class Options(Reading, total=False):
    """How a source is converted.

    Keys:
      dtype: of the parameters; float32 unless given.
      resampling: overrides the rule by which the source's own library brings positions to other image sizes.
    """

    dtype: DTypeLike
    resampling: Resampling | None


def load(source: Any, **options: Unpack[Options]) -> jaxvit.ViT:
    """A jaxvit model with the weights of a PyTorch checkpoint.

    Args:
      source: a file (.safetensors, .pth, .onnx, OpenAI's CLIP .pt), a folder written by transformers, timm or OpenCLIP,
        a hub id such as "facebook/dinov2-with-registers-small", a live timm or transformers module, or a state dict. A
        folder that `jaxvit.save` wrote is taken too.
      options: see `convert.Options`.

    Raises:
      ConversionError: the source cannot be read, is of no known layout, or does not fit its layout in every tensor.
      jaxvit.CheckpointError: a folder that `jaxvit.save` wrote is damaged.

    Example:

        model = convert.load("facebook/dinov2-with-registers-small", dtype="bfloat16")
    """
    dtype, resampling = options.pop("dtype", "float32"), options.pop("resampling", None)
    if is_jaxvit_folder(source):
        return changed(jaxvit.load(source), dtype, resampling)
    return _load(source, dtype, resampling, options)[0]


def load_described(source: Any, **options: Unpack[Options]) -> tuple[jaxvit.ViT, Provenance]:
    """As `load`, with the provenance of the weights: kind, path, revision, checksums, layout, versions.

    The provenance also holds the checksum of the model's weights, which takes some seconds for a large model. For a
    folder that `jaxvit.save` wrote it is the one that the folder keeps. Options that change such a model, `dtype` and
    `resampling`, then count as modifications.

    Example:

        model, provenance = convert.load_described(timm.create_model("vit_small_patch14_dinov2", pretrained=True))
        print(provenance)  # source: module timm.models.vision_transformer.VisionTransformer of timm 1.0.31, ..
        jaxvit.save(model, "small", provenance)
    """
    dtype, resampling = options.pop("dtype", "float32"), options.pop("resampling", None)
    if is_jaxvit_folder(source):
        loaded, provenance = jaxvit.load(source, described=True)
        model = changed(loaded, dtype, resampling)
        if dtype_of(model) != dtype_of(loaded) or model.config != loaded.config:
            provenance = provenance.compared(checksum(model), dtype_of(model), model.config)
        return model, provenance
    model, provenance = _load(source, dtype, resampling, options)
    return model, provenance.compared(checksum(model), dtype_of(model), model.config)


def changed(model: jaxvit.ViT, dtype: DTypeLike, resampling: Resampling | None) -> jaxvit.ViT:
    config = replace(model.config, resampling=resampling or model.config.resampling)
    return jaxvit.cast(from_params(config, to_params(model)), dtype)


def dtype_of(model: jaxvit.ViT) -> str:
    return model.patch_embed.kernel.dtype.name


def _load(
    source: Any, dtype: DTypeLike, resampling: Resampling | None, options: Options
) -> tuple[jaxvit.ViT, Provenance]:
    check_dtype(dtype)
    opened = read(source, **reading(options))
    layout, tensors, config = recognise(opened)
    config = with_resampling(opened, config, resampling)
    params = convert_tensors(layout, tensors, config, dtype, opened.ignored)
    # On a CPU they stay where they are; elsewhere they go one after the other.
    model = from_params(config, {name: jax.device_put(params.pop(name)) for name in list(params)})
    return model, Provenance(describe(opened, layout), assumptions=assumptions(opened, config))


def describe(opened: Source, layout: Layout) -> dict[str, Any]:
    """What a provenance keeps of a source."""
    about: dict[str, Any] = {"layout": layout.name, "versions": versions("jaxvit", "jax", "flax")}
    if "preprocess" not in opened.assumed:  # assumptions are kept by themselves
        about["preparation"] = opened.hints.get("preparation", f"as published for {layout.name}")
    return opened.description | about


def with_resampling(opened: Source, config: jaxvit.ViTConfig, resampling: Resampling | None) -> jaxvit.ViTConfig:
    """The config with the rule that is asked for; then it is no assumption of the source."""
    if resampling is None:
        return config
    opened.assumed.pop("resampling", None)
    return replace(config, resampling=resampling)


def assumptions(opened: Source, config: jaxvit.ViTConfig) -> tuple[str, ...]:
    """What was assumed, for a provenance: "heads 6 (width / 64)"."""
    return tuple(f"{field} {in_words(getattr(config, field))} ({why})" for field, why in opened.assumed.items())


def in_words(value: Any) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    if isinstance(value, jaxvit.Preprocess):
        return value.in_words()
    return str(value)


def convert(
    source: Any, folder: str | os.PathLike[str], *, overwrite: bool = False, **options: Unpack[Options]
) -> jaxvit.ViT:
    """Converts to a folder, as `convert_to_folder`, and returns the model that is in it."""
    convert_to_folder(source, folder, overwrite=overwrite, **options)
    return jaxvit.load(folder)


def convert_to_folder(
    source: Any,
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    random: bool = False,
    **options: Unpack[Options],
) -> jaxvit.ViTConfig:
    """Writes what `jaxvit.save` would write of what `load` returns, without ever holding the model.

    Tensors are read, converted and written a few at a time. From files that can be read so (.safetensors, .pth), memory
    is taken for those of one rule for one block, such as one matrix, and once more where they are joined to one or
    widened from half precision, whatever the size of the model.

    Args:
      folder, overwrite: those of `jaxvit.save`: all is written or nothing.
      random: whether the weights were drawn at random and not trained. No file tells; the folder then does.
      options: those of `load`.

    Returns:
      The config of the model.
    """
    dtype, resampling = options.pop("dtype", "float32"), options.pop("resampling", None)
    if is_jaxvit_folder(source):
        raise ConversionError(f"{source} is a jaxvit model already")
    check_dtype(dtype)
    check_place(folder, overwrite)  # before anything is fetched or read
    opened = read(source, **reading(options))
    layout, tensors, config = recognise(opened)
    config = with_resampling(opened, config, resampling)
    shapes = {name: (dtype, leaf.shape) for name, leaf in to_params(abstract(config)).items()}
    description = describe(opened, layout) | ({"weights": "random"} if random else {})
    provenance = Provenance(description, assumptions=assumptions(opened, config))
    with (
        saving(folder, config, provenance, overwrite=overwrite) as weights,
        writing(weights, shapes) as put,
    ):
        stream_tensors(put, layout, tensors, config, dtype, opened.ignored, progress=sys.stderr.isatty())
    return config


def check_dtype(dtype: DTypeLike) -> None:
    """Raises what `jaxvit.cast` raises, before anything is read."""
    jax.eval_shape(partial(jaxvit.cast, dtype=dtype), abstract(jaxvit.ViTConfig.dinov2("small", depth=1)))


def read(source: Any, **known: Unpack[Reading]) -> Source:
    """The tensors of a source, and what is known about them."""
    opened = open_source(source, *(known.get(name) for name in ("revision", "architecture", "branch", "prefix")))
    if any(name.split(".")[-1] == AVERAGED for name in opened.tensors):
        opened.ignored[f"{AVERAGED} (outside *"] = "how many models PyTorch's AveragedModel has averaged"
    if fields := known.get("config"):
        fields = {name: field_of(name, value) for name, value in fields.items()}
        unsure = {name: why for name, why in opened.hints.get("unsure", {}).items() if name not in fields}
        told = (*opened.hints.get("told", ()), *fields)
        opened.hints = {**opened.hints, **fields, "unsure": unsure, "told": told}
        if "preprocess" in fields:
            opened.hints["preparation"] = "given"
        # What was given may be a Preprocess; a provenance is JSON.
        opened.description["config given"] = {
            name: asdict(value) if isinstance(value, jaxvit.Preprocess) else value for name, value in fields.items()
        }
    return opened


def reading(options: Mapping[str, Any]) -> Reading:
    """Those of the options that are about reading a source."""
    return cast("Reading", {name: value for name, value in options.items() if name in Reading.__annotations__})


def is_jaxvit_folder(source: Any) -> bool:
    # os.path takes what cannot be a path, such as one that is too long, for one that does not exist.
    if not isinstance(source, str | os.PathLike) or not os.path.isfile(Path(source) / "config.json"):  # noqa: PTH113
        return False
    try:
        jaxvit.read_config(source)
    except FormatError:
        raise
    except jaxvit.CheckpointError:
        return False
    return True


def of_its_size(config: jaxvit.ViTConfig, hints: Mapping[str, Any]) -> tuple[jaxvit.ViTConfig, dict[str, str]]:
    """The config with a preparation of images that the original takes, and why it is an assumption, if it is one.

    Many models take images of one size alone ("fixed" of the hints). One that was fine-tuned at another size than its
    architecture's often keeps the architecture's preparation beside it, which the original itself would refuse.
    """
    own, prepared = (config.grid[0] * config.patch, config.grid[1] * config.patch), config.preprocess
    if not (hints.get("fixed") and config.positions and "preprocess" in hints) or prepared.size == own:
        return config, {}
    if hints.get("preparation") == "given":
        return config, {}
    h, w = prepared.size
    why = f"{hints.get('preparation', 'as published')} is for {h}x{w}, and the original takes {own[0]}x{own[1]} alone"
    also = hints.get("unsure", {}).get("preprocess")
    return replace(config, preprocess=prepared.at(own)), {"preprocess": f"{why}; {also}" if also else why}


def recognise(source: Source) -> tuple[Layout, Renamed, jaxvit.ViTConfig]:
    """The layout of a source, its tensors under the layout's names, and its config.

    What had to be assumed is set as `source.assumed`.
    """
    layout, tensors = locate(LAYOUTS, source.tensors, source.hints)
    unknown = source.hints.get("model type")
    if unknown is not None and not source.hints.keys() >= {"heads", "mlp", "eps"}:
        raise ConversionError(
            f"the config.json is of the model type {unknown}, whose defaults are not known here: say --set heads=.., "
            f"--set mlp=.. and --set eps=.. (config={{'heads': .., 'mlp': .., 'eps': ..}}), or give the weights alone"
        )
    try:
        prefix = source.hints.get("within", "") + tensors.prefix
        config, assumed = layout.config(tensors, {**source.hints, "prefix": prefix})
        config, fitted = of_its_size(config, source.hints)
        source.assumed = {**assumed, **source.hints.get("unsure", {}), **fitted}
        return layout, tensors, config
    except KeyError as error:
        raise ConversionError(f"not a complete {layout.name} checkpoint: {error.args[0]} is missing") from None
    except (ValueError, IndexError) as error:
        if isinstance(error, ConversionError):
            if more := larger_model(tensors, unused(layout, tensors, source.ignored)):
                raise ConversionError(f"{error}; {more}") from None
            raise
        raise ConversionError(f"the shapes in this {layout.name} checkpoint fit no config: {error}") from None

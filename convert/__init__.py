"""PyTorch checkpoints as jaxvit models: `convert.load(source)`, or `python -m convert SOURCE DEST`."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

import jaxvit
from convert import dinov2
from convert.engine import ConversionError, Layout, Tensors, convert_tensors, locate
from convert.sources import Source, open_source, sha256
from jaxvit.checkpoint import WEIGHTS
from jaxvit.config import Resampling
from jaxvit.params import from_params, to_params

__all__ = ["ConversionError", "convert", "load", "load_described"]

LAYOUTS: tuple[Layout, ...] = dinov2.LAYOUTS


def load(
    source: Any,
    *,
    dtype: DTypeLike = "float32",
    resampling: Resampling | None = None,
    revision: str | None = None,
) -> jaxvit.ViT:
    """A jaxvit model with the weights of a PyTorch checkpoint.

    Args:
      source: a file (.safetensors, .pth, .onnx), a folder written by transformers or timm, a hub id such as
        "facebook/dinov2-with-registers-small", a live timm or transformers module, or a state dict. A folder that
        `jaxvit.save` wrote is taken too.
      dtype: of the parameters.
      resampling: overrides the rule by which the source's own library brings positions to other image sizes.
      revision: commit, branch or tag, for a hub id.

    Raises:
      ConversionError: the source cannot be read, is of no known layout, or does not fit its layout in every tensor.
      jaxvit.CheckpointError: a folder that `jaxvit.save` wrote is damaged.
    """
    return load_described(source, dtype=dtype, resampling=resampling, revision=revision)[0]


def load_described(
    source: Any,
    *,
    dtype: DTypeLike = "float32",
    resampling: Resampling | None = None,
    revision: str | None = None,
) -> tuple[jaxvit.ViT, dict[str, Any]]:
    """As `load`, with what is known of where the weights come from: kind, path, revision, checksums, layout."""
    if is_jaxvit_folder(source):
        model, (config, description) = jaxvit.load(source), jaxvit.read_config(source)
        config = replace(config, resampling=resampling or config.resampling)
        description["converted sha256"] = sha256(Path(source) / WEIGHTS)
        return jaxvit.cast(from_params(config, to_params(model)), dtype), description
    opened = open_source(source, revision)
    layout, tensors, config = recognise(opened)
    config = replace(config, resampling=resampling or config.resampling)
    params = convert_tensors(layout, tensors, config, dtype, opened.ignored)
    model = from_params(config, {name: jnp.asarray(a) for name, a in params.items()})
    return jaxvit.cast(model, dtype), opened.description | {"layout": layout.name}


def convert(
    source: Any,
    folder: str | os.PathLike[str],
    *,
    dtype: DTypeLike = "float32",
    resampling: Resampling | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> jaxvit.ViT:
    """Converts and saves; the arguments are those of `load` and `jaxvit.save`. Returns the model."""
    if is_jaxvit_folder(source):
        raise ConversionError(f"{source} is a jaxvit model already")
    model, description = load_described(source, dtype=dtype, resampling=resampling, revision=revision)
    description["versions"] = versions("jaxvit", "jax", "flax")
    jaxvit.save(model, folder, source=description, overwrite=overwrite)
    return model


def is_jaxvit_folder(source: Any) -> bool:
    # os.path takes what cannot be a path, such as one that is too long, for one that does not exist.
    if not isinstance(source, str | os.PathLike) or not os.path.isfile(Path(source) / "config.json"):  # noqa: PTH113
        return False
    try:
        jaxvit.read_config(source)
    except jaxvit.CheckpointError:
        return False
    return True


def versions(*packages: str) -> dict[str, str]:
    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    return {package: of(package) for package in packages}


def recognise(source: Source) -> tuple[Layout, Tensors, jaxvit.ViTConfig]:
    """The layout of a source, its tensors under the layout's names, and its config."""
    layout, tensors = locate(LAYOUTS, source.tensors)
    try:
        return layout, tensors, layout.config(tensors, source.hints)
    except KeyError as error:
        raise ConversionError(f"not a complete {layout.name} checkpoint: {error.args[0]} is missing") from None
    except (ValueError, IndexError) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(f"the shapes in this {layout.name} checkpoint fit no config: {error}") from None

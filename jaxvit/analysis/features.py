"""Features of many images: streamed through a model, on all devices, into arrays or onto disk.

jaxvit features MODEL photographs --out features.zarr --take cls patches@-1:normed
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxvit.analysis.readouts import Readout, _read, check_fits, described, parsed
from jaxvit.analysis.windows import Windows, check_dense, read_windows
from jaxvit.io.checkpoint import checksum
from jaxvit.io.image_sets import ImageSet, of_sources, open_images
from jaxvit.io.images import WORKERS, Batch, ImageError, Sizing, Source, stream_items
from jaxvit.io.progress import bar
from jaxvit.io.provenance import Provenance, versions
from jaxvit.io.rows import (
    HEADER,
    LABELS,
    NAMES,
    Features,
    FeaturesError,
    Writer,
    check_shapes,
    labels_of,
    read_features,
    writer_for,
)
from jaxvit.model.params import enabled
from jaxvit.model.vit import ViT

Devices = Sequence[Any]
"""Of `jax.Device`, which is no type to pyright."""

DTYPES = ("float32", "float16", "bfloat16", "float64")


def features(
    model: ViT,
    images: str | os.PathLike[str] | ImageSet | Iterable[Source],
    take: str | Readout | Iterable[str | Readout] = "cls",
    *,
    out: str | os.PathLike[str] | None = None,
    labels: Iterable[Any] | None = None,
    size: int | tuple[int, int] | None = None,
    crop: bool = True,
    windows: Windows | None = None,
    batch_size: int = 32,
    dtype: str = "float32",
    devices: Devices | None = None,
    workers: int | None = None,
    on_error: Callable[[str, ImageError], None] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = False,
    provenance: Provenance | None = None,
) -> Features:
    """Reads features off any number of images, in order, in the memory of a few batches.

    Args:
      images: what `jaxvit.io.image_sets.open_images` opens, such as a folder; or images, as for `jaxvit.stream`.
      take: what to read, see `jaxvit.read_out` and docs/features.md.
      out: where to write: a name that ends in .zarr, .npz, .safetensors or .parquet. None: only the result is returned.
      labels: one for each of `images`, where these have none of their own.
      size, crop, workers: as for `jaxvit.stream`.
      windows: read patches of large pictures window by window, see `jaxvit.read_windows`; on one device.
      batch_size: images at a time, on all devices together.
      dtype: of the features; the model computes in the type of its parameters.
      devices: to spread each batch over; by default JAX's default device alone.
      on_error: called as on_error(name, error) for an image that cannot be used, which is then left out.
      resume: go on with a run to `out` that was interrupted. The result is the same to the byte, on the same machine.
      overwrite: replace what is at `out`.
      progress: show a bar.
      provenance: where the weights come from, for the header.

    Returns:
      Arrays [images, ..] by name, with the names and labels of the images that are in them. With `out`, as
      `jaxvit.read_features` reads them.

    Raises:
      ImageError: an image that cannot be used, if there is no `on_error`; or none can be used.
      FeaturesError: they cannot be written: a place that is taken, rows of several shapes, numbers that are not finite.
      ValueError: a readout that this model does not have, or arguments that make no sense.

    Example:

        found = jaxvit.features(model, "photographs", ["cls", "patch_mean"], batch_size=64)
        found["cls"], found.names  # [images, D], ['a.jpg', ..]
    """
    readouts = parsed(take)
    check_fits(readouts, model)
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected {', '.join(DTYPES)}")
    if not enabled(dtype):
        raise ValueError(f"JAX has disabled {dtype}: set JAX_ENABLE_X64=1")
    if taken := {NAMES, LABELS, HEADER} & {each.name for each in readouts}:
        raise ValueError(f"no array may be called {taken.pop()}: that is in each file already")
    placed = devices or []
    if batch_size < 1 or batch_size % max(len(placed), 1):
        raise ValueError(
            f"batch_size is {batch_size}; expected a multiple of the number of devices, {len(placed) or 1}"
        )
    found = opened(images, labels)
    if windows is not None:
        check_dense(readouts)
        windows.places(model.config.grid, model.config.patch)
        if len(placed) > 1:
            raise ValueError("windows run on one device: give no others")
    read = partial(read_batch, readouts=readouts, dtype=dtype, windows=windows)
    sizing = Sizing(model.config, size, crop)
    source = partial(stream_items, sizing=sizing, batch_size=batch_size, workers=workers or WORKERS)
    header = header_of(model, readouts, found, size, crop, batch_size, dtype, placed, provenance, windows)
    if out is None:
        kept = Kept()
        run(model, found, kept, source, header, read, placed, on_error, progress)
        return kept.features(header | {"classes": list(found.classes)})
    if resume and not found.identity:
        raise ValueError("resume takes folders, paths, shards and datasets: only images with names can be recognised")
    if dtype == "bfloat16" and not os.fspath(out).lower().endswith(".safetensors"):
        raise ValueError("only safetensors files hold bfloat16: choose another --out or dtype")
    with writer_for(out)(Path(out), header, resume=resume, overwrite=overwrite, batch_size=batch_size) as writer:
        if not writer.complete:
            run(model, found, writer, source, header, read, placed, on_error, progress)
            writer.finish({"classes": list(found.classes)})
    return read_features(out)


def opened(images: Any, labels: Iterable[Any] | None) -> ImageSet:
    if isinstance(images, ImageSet | str | os.PathLike):
        if labels is not None:
            raise ValueError("labels are for images in a list: a folder, shards and a dataset have labels of their own")
        return images if isinstance(images, ImageSet) else open_images(images)
    return of_sources(images, labels)


class Kept:
    """Features in memory; does what a `Writer` does."""

    def __init__(self) -> None:
        self.rows, self.next, self.left_out = 0, 0, []
        self.arrays: dict[str, list[np.ndarray]] = {}
        self.names: list[str] = []
        self.labels: list[Any] = []

    def add(self, arrays: dict[str, np.ndarray], names: Sequence[str], labels: Sequence[Any]) -> None:
        check_shapes(arrays, {name: rows[0].shape[1:] for name, rows in self.arrays.items()}, names[0])
        for name, rows in arrays.items():
            self.arrays.setdefault(name, []).append(rows)
        self.names += names
        self.labels += labels
        self.rows += len(names)

    def note(self, next: int) -> None:
        self.next = next

    def features(self, header: dict[str, Any]) -> Features:
        arrays = {name: np.concatenate(rows) for name, rows in self.arrays.items()}
        more = {"rows": self.rows, "left out": self.left_out}
        return Features(arrays, self.names, labels_of(self.labels), header | more)


def run(
    model: ViT,
    images: ImageSet,
    writer: Writer | Kept,
    source: Callable[..., Iterator[Batch]],
    header: dict[str, Any],
    read: Callable[[ViT, Array], tuple[dict[str, Array], dict[str, Array]]],
    devices: Devices,
    on_error: Callable[[str, ImageError], None] | None,
    progress: bool,
) -> None:
    """Reads what is not read yet."""
    offset = writer.next
    unusable: list[list[str]] = []

    def leave_out(name: str, error: ImageError) -> None:
        if on_error is None:
            raise error
        unusable.append([name, str(error)])
        on_error(name, error)

    where = devices[0] if len(devices) == 1 else None
    if len(devices) > 1:
        mesh = Mesh(np.asarray(devices), ("images",))
        where = NamedSharding(mesh, PartitionSpec("images"))
        model = jax.device_put(model, NamedSharding(mesh, PartitionSpec()))
    elif where is not None:
        model = jax.device_put(model, where)

    with bar("images", images.length, progress, initial=offset) as advance:

        def write(batch: Batch, arrays: dict[str, Array], finite: dict[str, Array]) -> None:
            valid = np.asarray(batch.valid)
            names = [name for name, there in zip(batch.names, valid, strict=True) if there]
            for name, each in jax.device_get(finite).items():
                if not each[valid].all():
                    image = names[int(np.argmin(each[valid]))]
                    raise FeaturesError(
                        f"{name} of {image} is not finite in {arrays[name].dtype}: choose a wider dtype"
                    )
            rows = {name: np.asarray(arrays[name])[valid] for name in header["arrays"]}
            labels = [None] * len(names) if batch.labels is None else list(np.asarray(batch.labels)[valid])
            writer.add(rows, names, [label.item() if isinstance(label, np.generic) else label for label in labels])
            done = int(np.asarray(batch.indices)[-1]) + 1 + offset
            missing = done - writer.next - len(names)
            writer.left_out += unusable[:missing]
            del unusable[:missing]
            advance(done - writer.next)
            writer.note(done)

        waiting = None
        for batch in source(images.start(offset), on_error=leave_out):
            pixels = batch.images if where is None else jax.device_put(batch.images, where)
            found = read(model, pixels)
            if waiting is not None:  # the batch before is fetched and written while this one is computed
                write(*waiting)
            waiting = batch, *found
        if waiting is not None:
            write(*waiting)
        writer.left_out += unusable
        advance(len(unusable))
    if not writer.rows:
        why = f"; the first: {writer.left_out[0][1]}" if writer.left_out else ": there are none"
        raise ImageError(f"none of the images of {images.title} can be used{why}")


def read_batch(
    model: ViT, images: Array, *, readouts: tuple[Readout, ...], dtype: str, windows: Windows | None
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The arrays, and of which images each is finite."""
    if windows is not None:
        return _checked(read_windows(model, images, readouts, windows), dtype=dtype)
    return _features(model, images, readouts=readouts, grid=model.check_images(images), dtype=dtype)


@partial(jax.jit, static_argnames=("readouts", "grid", "dtype"))
def _features(
    model: ViT, images: Array, *, readouts: tuple[Readout, ...], grid: tuple[int, int], dtype: str
) -> tuple[dict[str, Array], dict[str, Array]]:
    return _checked(_read(model, images, {}, readouts=readouts, grid=grid), dtype=dtype)


@partial(jax.jit, static_argnames="dtype")
def _checked(found: dict[str, Array], *, dtype: str) -> tuple[dict[str, Array], dict[str, Array]]:
    cast = {name: a.astype(dtype) for name, a in found.items()}
    return cast, {name: jnp.isfinite(a).all(axis=range(1, a.ndim)) for name, a in cast.items()}


def header_of(
    model: ViT,
    readouts: Sequence[Readout],
    images: ImageSet,
    size: int | tuple[int, int] | None,
    crop: bool,
    batch_size: int,
    dtype: str,
    devices: Devices,
    provenance: Provenance | None,
    windows: Windows | None,
) -> dict[str, Any]:
    """All that the features depend on."""
    preparation = model.config.preprocess.at(size) if crop else model.config.preprocess
    cut = {"windows": asdict(windows)} if windows else {}
    told = provenance.to_dict() if provenance else {}
    about = {"source": told.get("source", {}), "assumptions": told.get("assumptions", [])}
    header = {
        "format": 1,
        "model": {"config": model.config.to_dict(), "weights sha256": checksum(model), **about},
        "images": {
            "from": images.title,
            "identity": images.identity,
            "preparation": asdict(preparation),
            "size asked for": size,
            "whole": not crop,
            **cut,
        },
        "arrays": {each.name: described(each, model.config.depth) for each in readouts},
        "dtype": dtype,
        "batch size": batch_size,
        "devices": [each.device_kind for each in devices or jax.devices()[:1]],
        "versions": versions("jaxvit", "jax", "jaxlib", "numpy", "pillow"),
    }
    return json.loads(json.dumps(header))  # as it will be read again

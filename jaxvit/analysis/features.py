"""Features of many images: streamed through a model, on all devices, into arrays or onto disk.

jaxvit features MODEL photographs --out features.zarr --take cls patches@-1:normed
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from jaxvit.analysis.readouts import Readout, _read, check_fits, described, parsed
from jaxvit.analysis.windows import Windows, check_dense, read_windows
from jaxvit.io import parallel
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
    SafetensorsWriter,
    Writer,
    check_header,
    check_shapes,
    labels_of,
    read_features,
    writer_for,
)
from jaxvit.model.params import enabled
from jaxvit.model.vit import ViT

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
    mesh: Mesh | None = None,
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
      batch_size: images at a time, on all devices of a process together.
      dtype: of the features; the model computes in the type of its parameters.
      mesh: of `jaxvit.parallel.mesh`, to spread each batch over; by default JAX's default device alone. Several
        processes are all given the same images, and each reads its share; `out` is on a disk that all of them see.
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
    model, mesh = parallel.working(model, mesh)
    over = mesh.shape[parallel.DATA] if mesh else 1
    if batch_size < 1 or batch_size % over:
        raise ValueError(f"batch_size is {batch_size}; expected a multiple of the number of devices, {over}")
    found = opened(images, labels)
    if windows is not None:
        check_dense(readouts)
        windows.places(model.config.grid, model.config.patch)
        if over > 1:
            raise ValueError("windows run on one device: give no others")
    read = partial(read_batch, readouts=readouts, dtype=dtype, windows=windows)
    sizing = Sizing(model.config, size, crop)
    source = partial(stream_items, sizing=sizing, batch_size=batch_size, workers=workers or WORKERS)
    header = header_of(model, readouts, found, size, crop, batch_size, dtype, mesh, provenance, windows)
    many = mesh is not None and jax.process_count() > 1
    if out is None:
        if many:
            raise ValueError("with several processes give `out`: features of all images lie in no process's memory")
        kept = Kept()
        run(model, found, kept, source, header, read, mesh, on_error, progress)
        return kept.features(header | {"classes": list(found.classes)})
    if resume and not found.identity:
        raise ValueError("resume takes folders, paths, shards and datasets: only images with names can be recognised")
    if dtype == "bfloat16" and not os.fspath(out).lower().endswith(".safetensors"):
        raise ValueError("only safetensors files hold bfloat16: choose another --out or dtype")
    parts = Path(out).with_name(Path(out).name + ".parts")
    if many or (resume and parts.exists()):
        go = partial(run, model, source=source, read=read, mesh=mesh, on_error=on_error, progress=progress)
        in_parts(parts, Path(out), found, header, go, batch_size, resume=resume, overwrite=overwrite)
        return read_features(out)
    if parts.exists() and not overwrite:
        raise FeaturesError(
            f"{parts} holds a run of several processes that was interrupted: --resume goes on with it (resume=True), "
            "--overwrite starts anew"
        )
    with writer_for(out)(Path(out), header, resume=resume, overwrite=overwrite, batch_size=batch_size) as writer:
        if not writer.complete:
            run(model, found, writer, source, header, read, mesh, on_error, progress)
            writer.finish({"classes": list(found.classes)})
    shutil.rmtree(parts, ignore_errors=True)
    return read_features(out)


MOST_PARTS = 256
"""Of a run of several processes."""


def in_parts(
    parts: Path,
    out: Path,
    images: ImageSet,
    header: dict[str, Any],
    go: Callable[..., None],
    batch_size: int,
    *,
    resume: bool,
    overwrite: bool,
) -> None:
    """Reads images in parts, which are dealt to processes like cards, and joins them in order.

    Parts are the same for any number of processes, so that a run can go on with another number.

    Args:
      parts: the folder for them, which all processes see.
      go: `run` of images, a writer and its header.

    Raises:
      ValueError: nobody knows how many images there are, or processes see other images, settings or files.
      FeaturesError: there is something at `out`, or in `parts`, and neither `resume` nor `overwrite`.
    """
    if images.length is None:
        raise ValueError(f"{images.title} does not say how many images it holds: only one process can read them")
    me, count = jax.process_index(), jax.process_count()
    if len(set(parallel.told(json.dumps([header, str(out.absolute()), resume, overwrite])))) > 1:
        raise ValueError("processes are given other models, images or settings: start all with the same command")
    parallel.check_disk(out.parent)
    before = read_features(out).header if out.exists() else None  # what is no file of features is never replaced
    for there in (out, parts):
        if there.exists() and not (resume or overwrite):
            raise FeaturesError(f"{there} exists: give --resume (resume=True) or --overwrite (overwrite=True)")
    if before is not None and not overwrite:
        check_header(header, before, out)
        return
    parallel.wait("all have seen what there is")
    if me == 0:
        if overwrite:
            shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True, exist_ok=True)
    parallel.wait("parts begun")
    size = batch_size * max(1, -(-images.length // (batch_size * MOST_PARTS)))
    ranges = [(begin, min(begin + size, images.length)) for begin in range(0, images.length, size)]
    for begin, end in ranges[me::count]:
        some = images.part(begin, end)
        of_part = header | {"images": header["images"] | {"part": [begin, end]}}
        part = parts / f"{begin:012}.safetensors"
        with SafetensorsWriter(part, of_part, resume=True, overwrite=False, batch_size=batch_size) as writer:
            if not writer.complete:
                go(some, writer, header=of_part, may_be_empty=True)
                writer.finish({})
    parallel.wait("parts read")
    if me == 0:
        with writer_for(out)(out, header, resume=True, overwrite=overwrite, batch_size=batch_size) as writer:
            for begin, end in ranges:
                if end > writer.next:
                    add_part(writer, read_features(parts / f"{begin:012}.safetensors"), end)
            check_some(writer, images)
            writer.finish({"classes": list(images.classes)})
        shutil.rmtree(parts)
    parallel.wait("parts joined")


def add_part(writer: Writer, part: Features, end: int) -> None:
    """Appends a part, whose images go up to the one before `end`."""
    labels = [None] * len(part.names) if part.labels is None else part.labels.tolist()
    at_once = writer.batch_size
    for start in range(0, len(part.names), at_once):
        rows = slice(start, start + at_once)
        writer.add({name: np.asarray(a[rows]) for name, a in part.items()}, part.names[rows], labels[rows])
    writer.left_out += part.header["left out"]
    writer.note(end)


def check_some(writer: Writer | Kept, images: ImageSet) -> None:
    """Raises an ImageError if no image could be used."""
    if not writer.rows:
        why = f"; the first: {writer.left_out[0][1]}" if writer.left_out else ": there are none"
        raise ImageError(f"none of the images of {images.title} can be used{why}")


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
    mesh: Mesh | None,
    on_error: Callable[[str, ImageError], None] | None,
    progress: bool,
    may_be_empty: bool = False,
) -> None:
    """Reads what is not read yet.

    Args:
      mesh: where the model lies.
      may_be_empty: no image need be usable.
    """
    offset = writer.next
    unusable: list[list[str]] = []

    def leave_out(name: str, error: ImageError) -> None:
        if on_error is None:
            raise error
        unusable.append([name, str(error)])
        on_error(name, error)

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
            pixels = batch.images if mesh is None else parallel.spread(batch.images, mesh)
            found = read(model, pixels)
            if waiting is not None:  # the batch before is fetched and written while this one is computed
                write(*waiting)
            waiting = batch, *found
        if waiting is not None:
            write(*waiting)
        writer.left_out += unusable
        advance(len(unusable))
    if not may_be_empty:
        check_some(writer, images)


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
    mesh: Mesh | None,
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
        "devices": [each.device_kind for each in (mesh.devices.flat if mesh else jax.local_devices()[:1])],
        "versions": versions("jaxvit", "jax", "jaxlib", "numpy", "pillow"),
    }
    return json.loads(json.dumps(header))  # as it will be read again

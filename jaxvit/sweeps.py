"""Thousands of interventions in one compiled program, and their first-order estimate from one backward pass.

Points of a grid differ in numbers only, so all of them run through one program: in chunks, which bounds memory, under
`vmap`. Blocks before the first edited layer give the same for every point: each chunk starts from the run without
edits at the first layer that any of its points edits, which is read off the masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxvit.edits import Edit, Edits, Operation, by_layer, listed
from jaxvit.grids import Grid
from jaxvit.images import Batch
from jaxvit.named import NamedArray
from jaxvit.progress import track
from jaxvit.similarity import cosine
from jaxvit.sites import ATTENTION_SITES, Record, Take, as_takes
from jaxvit.vit import Output, ViT

Point = Mapping[str, Array]
"""Axis of the grid -> its number at this point; a traced array without axes."""
MakeEdits = Callable[[Point, Output], Edits]
Metric = Callable[[Output, Output], Any]
Images = Array | np.ndarray | Iterable[Any]


def cls_cosine(out: Output, clean: Output) -> Float[Array, " B"]:
    """Cosine of [CLS], after the final norm, with that of the run without edits."""
    return cosine(out.cls, clean.cls)


def sweep(
    model: ViT,
    images: Images,
    make_edits: MakeEdits,
    grid: Grid,
    metric: Metric = cls_cosine,
    *,
    batch_size: int = 16,
    record_clean: Record = (),
    record: Record = (),
    progress: bool = True,
) -> NamedArray:
    """Runs the model with the edits of every point of a grid.

        def edits(point, clean):
            return ablate(model, "z", layers=point["layer"], heads=point["head"])

        sweep(model, images, edits, grids.heads(model)).mean("image").plot("heads.png")

    Args:
      images: [B, H, W, 3], or any number of batches, such as of `jaxvit.stream`; batches of one size compile once.
      make_edits: `make_edits(point, clean)`, the edits of a point; `clean` is the run of the same images without edits,
        for values to put in place. Is traced once: its sites may not depend on the point, its arrays may.
      metric: `metric(out, clean)`, [B] or [B, ..] numbers about each image; or several by name, which become an axis
        `metric`.
      batch_size: points that run at once. More is faster on an accelerator; memory grows with it, and not with the
        number of points.
      record_clean: what `clean.trace` holds; all of `resid_pre` is always there.
      record: what `out.trace` holds. Runs that record start at the first layer.

    Returns:
      The metric with the axes of the grid, then `image`, then the metric's own.
    """
    takes = {**as_takes(record_clean), "resid_pre": Take()}
    results = []
    points = {axis: jnp.asarray(numbers) for axis, numbers in grid.points.items()}
    programs = _Programs.of(make_edits, metric, takes, record, batch_size)
    batches = _batches(images)
    chunks = -(-len(grid) // batch_size)
    for i, (batch, valid) in enumerate(batches):
        clean = programs.clean(model, batch)
        first = np.asarray(programs.first_layer(model, clean, points))
        order = np.argsort(first, kind="stable")
        found: list[Any] = []
        what = f"{len(grid)} points" if i == 0 else f"{len(grid)} points, batch {i + 1}"
        for chunk in track(range(chunks), what, enabled=progress):
            # The last chunk is filled up with its last point: a size of its own would compile again.
            chosen = order[np.minimum(np.arange(batch_size) + chunk * batch_size, len(grid) - 1)]
            start = 0 if record else min(int(first[chosen].min()), model.config.depth - 1)
            at = {axis: numbers[chosen] for axis, numbers in points.items()}
            found.append(jax.device_get(programs.run(model, batch, clean, at, jnp.asarray(start, jnp.int32))))
        whole = jax.tree.map(lambda *a: np.concatenate(a)[: len(grid)], *found)
        back = np.argsort(order, kind="stable")
        results.append(jax.tree.map(lambda a, back=back, valid=valid: a[back][:, valid], whole))
    if not results:
        raise ValueError("no images to run")
    return _named(grid, jax.tree.map(lambda *a: np.concatenate(a, axis=1), *results), metric)


class _Programs(NamedTuple):
    """The three compiled programs of a sweep."""

    clean: Callable[..., Output]
    first_layer: Callable[..., Array]
    run: Callable[..., Any]

    @classmethod
    def of(cls, make_edits: MakeEdits, metric: Metric, takes: Record, record: Record, batch_size: int) -> _Programs:
        @jax.jit
        def clean_run(model, images):
            return model(images, record=takes)

        @jax.jit
        def first_layers(model, clean, points):
            def one(point):
                return first_edited(listed(make_edits(point, clean)), model.config.depth)

            return jax.lax.map(one, points, batch_size=batch_size)

        @jax.jit
        def run(model, images, clean, points, start):
            def one(point):
                edits = make_edits(point, clean)
                out = model.run_from(0 if record else start, stream, edits, record)
                return metric(out, clean)

            stream = jax.lax.dynamic_index_in_dim(clean.trace["resid_pre"], 0 if record else start, keepdims=False)
            values = jax.vmap(one)(points)
            for value in jax.tree.leaves(values):
                if value.ndim < 2 or value.shape[1] != len(images):
                    raise ValueError(f"the metric returns {list(value.shape[1:])}; expected [{len(images)} images, ..]")
            return values

        return cls(clean_run, first_layers, run)


def first_edited(edits: Mapping[str, tuple[Operation, ...]], depth: int) -> Array:
    """The first layer in which any mask is not 0; `depth` if there is none."""
    edited = jnp.zeros(depth, bool)
    for each in edits.values():
        for edit in each:
            mask = jnp.asarray(edit.mask)
            layers = (mask != 0).any(range(1, mask.ndim)) if mask.ndim else mask[None] != 0
            edited |= layers
    return jnp.where(edited.any(), edited.argmax(), depth)


def attribute(
    model: ViT,
    images: Images,
    make_edits: MakeEdits,
    grid: Grid,
    metric: Metric,
    *,
    batch_size: int = 16,
    record_clean: Record = (),
    progress: bool = True,
) -> NamedArray:
    """Estimates `metric(edited) - metric(clean)` for every point of a grid, to first order (attribution patching).

    One backward pass gives the metric's gradient with respect to the value at every edited site; a point's estimate is
    its inner product with what the point's edit changes there. That is the derivative of the metric as the point's
    mask goes from 0 to where it is, taken at 0, and costs no run of the model for a point. Effects that are far from
    linear (a metric at its maximum in the clean run, such as `cls_cosine`, has derivative 0) need the `sweep`.

    Args and returns: as of `sweep`; the metric gives one number an image.
    """
    results = []
    points = {axis: jnp.asarray(numbers) for axis, numbers in grid.points.items()}
    depth = model.config.depth

    @jax.jit
    def gradients(model, images):
        clean = model(images, record={**as_takes(record_clean), "resid_pre": Take()})
        point = {axis: numbers[0] for axis, numbers in points.items()}
        edited = listed(jax.eval_shape(make_edits, point, clean))
        takes, queries = {}, {}
        for site, each in edited.items():
            queries[site] = "all" if any(edit.queries == "all" for edit in each) else "prefix"
            takes[site] = Take(tokens=queries[site] if site in ATTENTION_SITES else "all")
        shapes = jax.eval_shape(lambda: model.run_from(0, clean.trace["resid_pre"][0], record=takes).trace)

        def total(nudges):
            nudged = {
                site: Edit(1.0, 1.0, nudge, value_over="tokens", queries=queries[site])
                for site, nudge in nudges.items()
            }
            out = model.run_from(0, clean.trace["resid_pre"][0], nudged, takes)
            values = metric(out, clean)
            if not isinstance(values, jax.Array) or values.shape != images.shape[:1]:
                raise ValueError(f"the metric returns {jax.tree.map(jnp.shape, values)}; expected a number an image")
            return values.sum(), out.trace

        slopes, values = jax.grad(total, has_aux=True)(jax.tree.map(jnp.zeros_like, shapes))
        return clean, slopes, values

    @jax.jit
    def estimates(model, clean, slopes, values, points):
        def one(point):
            arrays, of_layer = by_layer(listed(make_edits(point, clean)), depth)

            def layer(total, xs):
                arrays, slopes, values = xs
                for site, each in of_layer(arrays).items():
                    new = values[site]
                    for edit in each:
                        new = edit(site, new, model.prefix)
                    change = slopes[site] * (new - values[site])
                    total = total + change.sum(range(1, change.ndim))
                return total, None

            start = jnp.zeros(clean.cls.shape[0], clean.cls.dtype)
            return jax.lax.scan(layer, start, (arrays, slopes, values))[0]

        return jax.lax.map(one, points, batch_size=batch_size)

    for batch, valid in track(_batches(images), "attribution", enabled=progress):
        clean, slopes, values = gradients(model, batch)
        results.append(np.asarray(estimates(model, clean, slopes, values, points))[:, valid])
    if not results:
        raise ValueError("no images to run")
    return _named(grid, np.concatenate(results, axis=1), metric, "estimated change of ")


def _batches(images: Images) -> Iterator[tuple[Array, np.ndarray]]:
    """Images, and which of them count."""
    if isinstance(images, jax.Array | np.ndarray) and images.ndim == 4:
        images = [images]
    for batch in images:
        if isinstance(batch, Batch):
            yield batch.images, batch.valid
        else:
            yield jnp.asarray(batch), np.ones(len(batch), bool)


def _named(grid: Grid, values: Any, metric: Metric, prefix: str = "") -> NamedArray:
    """The values of all points, [points, images, ..], with the axes of the grid."""
    axes = dict(grid.axes)
    name = metric.func.__name__ if isinstance(metric, partial) else getattr(metric, "__name__", "metric")
    if isinstance(values, Mapping):
        labels, values = tuple(values), np.stack(list(values.values()), axis=2)
        extra = {"metric": labels}
    else:
        extra = {}
    values = values.reshape(*grid.shape, *values.shape[1:])
    axes["image"] = tuple(range(values.shape[len(grid.shape)]))
    axes |= extra
    for i, size in enumerate(values.shape[len(axes) :]):
        axes[f"{name} {i}"] = tuple(range(size))
    return NamedArray(values, axes, prefix + ("value" if extra or name == "<lambda>" else name.replace("_", " ")))

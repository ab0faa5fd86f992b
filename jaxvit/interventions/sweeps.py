"""Thousands of interventions in one compiled program, and their first-order estimate from one backward pass.

Points of a grid differ in numbers only, so all of them run through one program: in chunks, which bounds memory, under
`vmap`. Blocks before the first edited layer give the same for every point: each chunk starts from the run without
edits at the first layer that any of its points edits, which is read off the masks.

A second sweep with functions that compute the same, and arrays of the same shapes, compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxvit.analysis.named import NamedArray
from jaxvit.analysis.similarity import cosine
from jaxvit.interventions.grids import Grid
from jaxvit.io import parallel
from jaxvit.io.batches import Images, batches_of, images_and_valid, spread_batches
from jaxvit.io.images import Batch
from jaxvit.io.progress import bar, length, track
from jaxvit.model.edits import Edit, Edits, Operation, by_layer, normalise_edits
from jaxvit.model.layers import wide_dtype
from jaxvit.model.programs import Program, kept
from jaxvit.model.run import Outputs
from jaxvit.model.sites import ATTENTION_SITES, Record, Take, as_takes
from jaxvit.model.vit import Output, PrefixOutput, ViT

Point = Mapping[str, Array]
"""Axis of the grid -> its number at this point; a traced array without axes."""
MakeEdits = Callable[[Point, Output], Edits]
Metric = Callable[[Any, Output], Any]
"""Of a run with edits, an `Output` or a `PrefixOutput`, and the one without."""
Metrics = Metric | Mapping[str, Metric]


def cls_cosine(out: Output | PrefixOutput, clean: Output) -> Float[Array, " B"]:
    """Cosine of [CLS] with that of the run without edits, both after the final norm: [B].

    Raises:
      ValueError: a model without [CLS].

    Example:

        jaxvit.cls_cosine(model(images, remove_registers(model)), model(images))  # [B]
    """
    if out.cls is None or clean.cls is None:
        raise ValueError("this model has no [CLS]: give a metric, such as one of `out.pooled` and `clean.pooled`")
    return cosine(out.cls, clean.cls)


def sweep(
    model: ViT,
    images: Images,
    make_edits: MakeEdits,
    grid: Grid,
    metric: Metrics = cls_cosine,
    *,
    batch_size: int | None = None,
    record_clean: Record = (),
    record: Record = (),
    outputs: Outputs | None = None,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> NamedArray:
    """Runs the model with the edits of every point of a grid.

        def edits(point, clean):
            return ablate(model, "z", layers=point["layer"], heads=point["head"])

        sweep(model, images, edits, grids.heads(model)).mean("image").plot("heads.png")

    Args:
      images: [B, H, W, 3], or any number of batches, such as of `jaxvit.stream`; batches of one size compile once.
      make_edits: `make_edits(point, clean)`, the edits of a point; `clean` is the run of the same images without edits,
        for values to put in place. Is traced, not called for each point: its sites may not depend on the point, its
        arrays may.
      metric: `metric(out, clean)`, [B] or [B, ..] numbers about each image. Several metrics become an axis `metric`:
        give a function that returns them by name, or a mapping of names to such functions.
      batch_size: points that run at once; memory grows with it, and not with the number of points. None: as many as
        make 64 images, or 2 on a CPU, where more only leave the caches.
      record_clean: what `clean.trace` holds; all of `resid_pre` is always there.
      record: what `out.trace` holds. Runs that record start at the first layer.
      outputs: of which tokens `out` has outputs, as for the model; `clean` has all. None: of [CLS] for `cls_cosine`, of
        all tokens for another metric.
      mesh: of `jaxvit.parallel.mesh`; points are spread over its devices, and over processes, each of which is given
        the same images and has the whole result.

    Returns:
      The metric with the axes of the grid, then `image`, then the metric's own. Images are labelled by their number, of
      `jaxvit.stream` by their place among its sources.

    Raises:
      ValueError: no images, a metric that is not about each image, or an axis of the grid called `image` or `metric`;
        processes with other images.

    Example:

        def edits(point, clean):
            return ablate(model, "z", layers=point["layer"], heads=point["head"])

        effect = sweep(model, images, edits, grids.heads(model))  # layer x head x image
        effect.mean("image").smallest(5)  # the heads without which [CLS] moves most
    """
    model, mesh = parallel.working(model, mesh)
    takes = tuple({**as_takes(record_clean), "resid_pre": Take()}.items())
    _check(batch_size, grid)
    measure = _together(metric)
    outputs = outputs or ("cls" if metric is cls_cosine and model.config.cls else "all")
    programs, results, labels = None, [], []
    batches = batches_of(images)
    known = length(batches)
    with bar(f"{len(grid)} points", None if known is None else len(grid) * known, progress) as advance:
        for each in batches:
            batch, valid = images_and_valid(each)
            chunk = min(batch_size or _points_at_once(len(batch)), len(grid))
            spread = None
            if mesh is not None:
                parallel.check_same(batch)
                batch, spread = parallel.copied(batch, mesh), NamedSharding(mesh, PartitionSpec(parallel.DATA))
                chunk = _chunk_of_process(chunk if batch_size else chunk * mesh.shape[parallel.DATA], len(grid), mesh)
            clean = _run(model, batch, takes)
            points = _filled(grid.points, chunk * (1 if mesh is None else jax.process_count()))
            programs = programs or _sweep_programs(
                *_traced(model, clean, make_edits, measure, points, record, outputs), outputs
            )
            first = np.asarray(programs.first_layer(model, clean, points))
            order = np.argsort(first, kind="stable")
            found: list[Any] = []
            running, size = None, 0  # a chunk whose results are copied while the next one computes
            mine = slice(None) if mesh is None else slice(jax.process_index(), None, jax.process_count())
            for chosen in order.reshape(-1, chunk)[mine]:
                start = 0 if record else min(int(first[chosen].min()), model.config.depth - 1)
                at = {axis: numbers[chosen] for axis, numbers in points.items()}
                at = at if spread is None else jax.device_put(at, spread)
                newer = programs.run(model, batch, clean, at, np.int32(start))
                if running is not None:
                    found.append(parallel.fetch(running))
                    advance(size)
                running, size = newer, int((chosen < len(grid)).sum())
            found.append(parallel.fetch(running))
            advance(size)
            if mesh is not None:
                found = parallel.dealt(found)
            whole = jax.tree.map(lambda *a: np.concatenate(a), *found)
            back = np.argsort(order)[: len(grid)]
            results.append(jax.tree.map(lambda a, back=back, valid=valid: a[back][:, valid], whole))
            labels.append(each.indices[valid] if isinstance(each, Batch) else None)
    if not results:
        raise ValueError("no images to run")
    return _named(grid, jax.tree.map(lambda *a: np.concatenate(a, axis=1), *results), labels, metric)


def _together(metric: Metrics) -> Metric:
    """One function that returns all metrics by name, if there are several."""
    if not isinstance(metric, Mapping):
        return metric
    if wrong := [name for name, each in metric.items() if not callable(each)]:
        raise ValueError(f"the metrics {', '.join(map(repr, wrong))} are not functions of (out, clean)")
    return lambda out, clean: {name: each(out, clean) for name, each in metric.items()}


@partial(jax.jit, static_argnames=("takes", "outputs"))
def _run(model: ViT, images: Array, takes: tuple[tuple[str, Take], ...], outputs: Outputs = "all") -> Any:
    """A run without edits; of no sweep in particular, so that all sweeps of a model share it."""
    return model(images, record=dict(takes), outputs=outputs)


def _point_of(points: Mapping[str, np.ndarray]) -> dict[str, jax.ShapeDtypeStruct]:
    """The shape of one point."""
    return {axis: jax.ShapeDtypeStruct((), jnp.result_type(numbers)) for axis, numbers in points.items()}


def _traced(
    model: ViT,
    clean: Output,
    make_edits: MakeEdits,
    metric: Metric,
    points: Mapping[str, np.ndarray],
    record: Record,
    outputs: Outputs = "all",
    gradient: bool = False,
) -> tuple[Program, Program, tuple[tuple[str, Take], ...]]:
    """What the programs of a sweep, or with `gradient` of an attribution, are told apart by."""
    takes = tuple(as_takes(record).items())
    out = jax.eval_shape(partial(_run, takes=takes, outputs=outputs), model, _images_like(model, clean))
    measure = Program(metric, out, clean, differentiated=gradient)
    return Program(make_edits, _point_of(points), clean), measure, takes


def _images_like(model: ViT, clean: Output) -> jax.ShapeDtypeStruct:
    """The shape of images that give sequences as long as those of this run; which of them does not matter."""
    rows = clean.patches.shape[1]
    patch, channels = model.config.patch, model.config.channels
    return jax.ShapeDtypeStruct((clean.tokens.shape[0], rows * patch, patch, channels), model.dtype)


class _Programs(NamedTuple):
    """The two compiled programs of a sweep."""

    first_layer: Callable[..., Array]
    run: Callable[..., Any]


@kept(maxsize=16)
def _sweep_programs(
    edits: Program, measure: Program, takes: tuple[tuple[str, Take], ...], outputs: Outputs
) -> _Programs:
    record = dict(takes)

    @jax.jit
    def first_layers(model: ViT, clean: Output, points: Point) -> Array:
        def one(point: Point) -> Array:
            return first_edited(normalise_edits(edits.function(point, clean)), model.config.depth)

        return jax.lax.map(one, points)

    @jax.jit
    def run(model: ViT, images: Array, clean: Output, points: Point, start: Array) -> Any:
        def one(point: Point) -> Any:
            changes = edits.function(point, clean)
            first, grid = 0 if record else start, grid_of(model, images)
            out = model.run_from(first, stream, changes, record, grid, outputs=outputs)
            return measure.function(out, clean)

        stream = jax.lax.dynamic_index_in_dim(clean.trace["resid_pre"], 0 if record else start, keepdims=False)
        values = jax.vmap(one)(points)
        every = list(values.values()) if isinstance(values, Mapping) else [values]
        shapes = [list(value.shape[1:]) if isinstance(value, Array) else type(value).__name__ for value in every]
        if not shapes or not all(shape == shapes[0] and shape[:1] == [len(images)] for shape in shapes):
            raise ValueError(
                f"the metric returns {', '.join(map(str, shapes)) or 'nothing'}; expected numbers of shape "
                f"[{len(images)} images, ..], or several of one shape by name"
            )
        return values

    return _Programs(first_layers, run)


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
    mesh: Mesh | None = None,
    progress: bool = True,
) -> NamedArray:
    """Estimates `metric(edited) - metric(clean)` for every point of a grid, to first order (attribution patching).

    One backward pass gives the metric's gradient with respect to the value at every edited site. A point's estimate is
    its inner product with what the point's edit changes there: the directional derivative along the edit, at the clean
    run. A point costs no run of the model. Effects that are far from linear need `sweep`. So does a metric that is at
    its maximum in the clean run: its derivative is 0. `cls_cosine` is such a metric, and is refused.

    Args, returns and raises: as of `sweep`; the metric gives one number for each image. On a mesh images are spread,
    not points: with several processes, `images` are those of this process, as for `jaxvit.over_images`.

    Example:

        def edits(point, clean):
            return ablate(model, "z", layers=point["layer"], heads=point["head"])

        attribute(model, images, edits, grids.heads(model), lambda out, clean: out.logits[:, 207])  # [L, H, B]
    """
    _check(batch_size, grid)
    if metric is cls_cosine:
        raise ValueError(
            "cls_cosine has no slope at the clean run, where it is at its maximum: use sweep, or a metric that can "
            "rise and fall, such as a logit"
        )
    batch_size = min(batch_size, len(grid))
    points, programs, results, labels = _filled(grid.points, batch_size), None, [], []
    takes = tuple({**as_takes(record_clean), "resid_pre": Take()}.items())
    model, mesh = parallel.working(model, mesh)
    for each, batch, valid in spread_batches(track(batches_of(images), "attribution", enabled=progress), mesh):
        labels.append(each.indices[each.valid] if isinstance(each, Batch) else None)
        clean = _run(model, batch, takes)
        programs = programs or _attribution_programs(
            *_traced(model, clean, make_edits, metric, points, (), gradient=True)[:2]
        )
        slopes, values = programs.slopes(model, clean, points, patches=grid_of(model, batch))
        estimates = programs.estimates(model, clean, slopes, values, points, batch_size=batch_size)
        results.append(parallel.fetch(estimates)[: len(grid), valid])
    if not results:
        raise ValueError("no images to run")
    values = np.concatenate(results, axis=1)
    if mesh is not None and jax.process_count() > 1:
        values, labels = parallel.joined(values.T).T, []  # numbers are within a process's own images
    return _named(grid, values, labels, metric, "estimated change of ")


class _Attribution(NamedTuple):
    """The two compiled programs of an attribution."""

    slopes: Callable[..., Any]
    estimates: Callable[..., Array]


@kept(maxsize=16)
def _attribution_programs(edits: Program, measure: Program) -> _Attribution:
    @partial(jax.jit, static_argnames="patches")
    def slopes(model: ViT, clean: Output, points: Point, patches: tuple[int, int]) -> tuple[Any, Any]:
        point = {axis: numbers[0] for axis, numbers in points.items()}
        edited = normalise_edits(jax.eval_shape(lambda *args: edits.function(*args), point, clean))
        takes, queries = {}, {}
        for site, each in edited.items():
            queries[site] = "all" if any(edit.queries == "all" for edit in each) else "prefix"
            takes[site] = Take(tokens=queries[site] if site in ATTENTION_SITES else "all")
        stream = clean.trace["resid_pre"][0]
        shapes = jax.eval_shape(lambda: model.run_from(0, stream, record=takes, grid=patches).trace)

        def total(nudges: Any) -> tuple[Array, Any]:
            nudged = {
                site: Edit(1.0, 1.0, nudge, value_over="tokens", queries=queries[site])
                for site, nudge in nudges.items()
            }
            out = model.run_from(0, stream, nudged, takes, patches)
            values = measure.function(out, clean)
            if not isinstance(values, jax.Array) or values.shape != clean.tokens.shape[:1]:
                raise ValueError(
                    f"the metric returns {jax.tree.map(jnp.shape, values)}; expected one number for each image"
                )
            return values.sum(), out.trace

        return jax.grad(total, has_aux=True)(jax.tree.map(jnp.zeros_like, shapes))

    @partial(jax.jit, static_argnames="batch_size")
    def estimates(model: ViT, clean: Output, slopes: Any, values: Any, points: Point, batch_size: int) -> Array:
        depth = model.config.depth

        def one(point: Point) -> Array:
            arrays, of_layer = by_layer(normalise_edits(edits.function(point, clean)), depth)

            def layer(total, xs):
                arrays, slopes, values = xs
                for site, each in of_layer(arrays).items():
                    for edit in each:  # to first order, edits of one value add up
                        change = slopes[site] * edit.derivative(site, values[site], model.prefix)
                        total = total + change.sum(range(1, change.ndim), dtype=total.dtype)
                return total, None

            # Zeros of the run's own images, which may be sharded.
            start = jnp.zeros_like(clean.tokens[:, 0, 0], wide_dtype(clean.tokens.dtype))
            return jax.lax.scan(layer, start, (arrays, slopes, values), depth)[0]

        return jax.lax.map(one, points, batch_size=batch_size)

    return _Attribution(slopes, estimates)


def grid_of(model: ViT, images: Array) -> tuple[int, int]:
    """Rows and columns of patches of these images."""
    return model.config.layout(*images.shape[1:3]).grid


def _check(batch_size: int | None, grid: Grid) -> None:
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected the number of points that run at once, 1 or more")
    if taken := {"image", "metric"} & set(grid.axes):
        raise ValueError(f"the result has an axis {taken.pop()!r} of its own: call the grid's axis something else")


def _points_at_once(images: int) -> int:
    """How many points of so many images a backend runs at once to advantage; see benchmarks."""
    return max(1, (2 if jax.default_backend() == "cpu" else 64) // max(images, 1))


def _chunk_of_process(points: int, of: int, mesh: Mesh) -> int:
    """How many points run at once on the devices of one process: no more than its share, and as many on each device."""
    devices = mesh.shape[parallel.DATA]
    return -(-min(points, -(-of // jax.process_count())) // devices) * devices


def _filled(points: Mapping[str, np.ndarray], batch_size: int) -> dict[str, np.ndarray]:
    """Whole chunks, of the last point again where there are no more: a rest would be compiled once more."""
    return {axis: np.pad(numbers, (0, -len(numbers) % batch_size), mode="edge") for axis, numbers in points.items()}


def _named(
    grid: Grid, values: Any, labels: Sequence[np.ndarray | None], metric: Metrics, prefix: str = ""
) -> NamedArray:
    """The values of all points, [points, images, ..], with the axes of the grid.

    Args:
      labels: of the images, in every batch that has some.
    """
    axes, extra = dict(grid.axes), {}
    name = metric.func.__name__ if isinstance(metric, partial) else getattr(metric, "__name__", "metric")
    if isinstance(values, Mapping):
        extra, values = {"metric": tuple(values)}, np.stack(list(values.values()), axis=2)
    if values.dtype.kind == "V":  # half precisions that NumPy and matplotlib do not know
        values = values.astype(np.float32)
    images = [int(label) for some in labels if some is not None for label in some]
    count = values.shape[1]
    axes["image"] = tuple(images if len(set(images)) == count else range(count))
    axes |= extra
    values = values.reshape(*grid.shape, *values.shape[1:])
    for i, size in enumerate(values.shape[len(axes) :]):
        axes[f"{name} {i}"] = tuple(range(size))
    return NamedArray(values, axes, prefix + ("value" if extra or name == "<lambda>" else name.replace("_", " ")))

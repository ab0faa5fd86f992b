"""The only loop over blocks: from one layer to another, with edits, with what to record or to measure of each layer.

`ViT.__call__`, `ViT.run_from`, `each_layer`, and all that records, measures or differentiates inside blocks call it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from jaxvit.model.attention import Form, Kernel, Rope, check_kernel, cuts, joined
from jaxvit.model.edits import Edits, Operation, Shuffle, by_layer, check_edits, normalise_edits
from jaxvit.model.layers import identity
from jaxvit.model.pieces import Piece, cut, replaced
from jaxvit.model.positions import rotary
from jaxvit.model.programs import Program, is_traced, kept
from jaxvit.model.sites import Plan, Record, Run, Wanted, recording_plan
from jaxvit.model.tap import Tap

if TYPE_CHECKING:
    from jaxvit.model.vit import Block, ViT

Remat = Literal["none", "block"]
"""What a backward pass computes again instead of keeping it: nothing, or all inside each block."""

Outputs = Literal["all", "prefix", "cls"]
"""Of which tokens a run returns outputs: in the last block the others are read, and not computed."""

Measure = Callable[[dict[str, Array], "Block", Array], Any]
"""`measure(trace, block, layer)`: of one layer's trace, without an axis of layers; its block; its number."""


class Ran(NamedTuple):
    """What `run_blocks` returns.

    Attributes:
      stream: the residual stream after the last layer that ran, before the final norm; with `outputs` other than
        "all", only its tokens before the patches.
      trace: site -> [recorded layers, *axes of the site].
      measured: what the measure gave, with an axis of the layers that ran in front; None without one.
    """

    stream: Float[Array, "B T D"]
    trace: dict[str, Array]
    measured: Any


def run_blocks(
    model: ViT,
    x_BTD: Array,
    edits: Mapping[str, tuple[Operation, ...]],
    plan: Plan,
    *,
    grid: tuple[int, int] | None = None,
    measure: Measure | None = None,
    first: Array | None = None,
    remat: Remat = "none",
    kernel: Kernel = "auto",
    outputs: Outputs = "all",
    pieces: Sequence[Piece] = (),
) -> Ran:
    """Runs the layers of `plan`. Is traced: call it inside of a compiled function.

    Args:
      edits: as `checked_edits` returns them.
      grid: rows and columns of patches; models with rotary positions need it.
      first: a traced number of the layer to start from, in place of the plan's. Then nothing is recorded or measured.
      remat: what a backward pass computes again.
      kernel: see `jaxvit.model.attention.Kernel`.
      outputs: of which tokens the stream is wanted.
      pieces: parameters of some layers that stand in for the model's; not with `first`.
    """
    rows = None if outputs == "all" else model.prefix
    run = partial(_run, plan=plan, grid=grid, measure=measure, remat=remat, rows=rows)
    whole = partial(run, kernel=kernel)
    args = (model, tuple(pieces), x_BTD, edits, first)
    if kernel == "cudnn" or not (parts := parts_on_cpu(model, x_BTD, edits)):
        return whole(*args)
    on_cpu = partial(run, kernel="cpu", parts=parts)
    chunks = 1 if measure is not None else chunks_on_cpu(model, x_BTD)
    if chunks > 1:
        on_cpu = partial(in_chunks, partial(run, kernel="cpu", parts=min(parts, len(x_BTD) // chunks)), chunks)
    # Around all layers, so that a backward pass keeps nothing for the other platforms.
    return jax.lax.platform_dependent(*args, cpu=on_cpu, default=whole)


def _run(
    model: ViT,
    pieces: tuple[Piece, ...],
    x_BTD: Array,
    edits: Any,
    first: Array | None,
    *,
    plan: Plan,
    grid: tuple[int, int] | None,
    measure: Measure | None,
    remat: Remat,
    kernel: Form,
    rows: int | None,
    parts: int = 1,
) -> Ran:
    """`run_blocks`, with images in independent parts through each block, and the last one for the first `rows`."""
    depth = model.config.depth
    scanned, of_layer = by_layer(edits, depth)
    apply_rope = rope_for(model, grid, x_BTD.shape[1])
    images = cuts(len(x_BTD), parts) if parts > 1 else [slice(None)]

    def step(
        xs: tuple[Array, ...], block: Block, edits: list[Array], layer: Array, wanted: Wanted, rows: int | None
    ) -> tuple[tuple[Array, ...], Any]:
        every, taps, new = of_layer(edits), [], []
        if rows is not None:
            every = of_prefix(every, rows)
        for x, part in zip(xs, images, strict=True):
            taps.append(Tap(dict(wanted), every if parts == 1 else of_images(every, part), model.prefix))
            new.append(block(x, taps[-1], apply_rope, kernel, rows))
        trace = {site: joined([tap.trace[site] for tap in taps]) for site in taps[0].trace}
        return tuple(new), (trace if measure is None else measure(trace, block, layer))

    if remat == "block":
        step = jax.checkpoint(step, prevent_cse=False, static_argnums=(4, 5))

    def numbered(
        xs: tuple[Array, ...],
        layer: Array | int,
        wanted: Wanted,
        rows: int | None = None,
        own: tuple[tuple[Array, ...], ...] = (),
        names: tuple[str, ...] = (),
    ) -> tuple[tuple[Array, ...], Any]:
        at = partial(jax.lax.dynamic_index_in_dim, index=layer, axis=0, keepdims=False)
        block, edits = jax.tree.map(at, (model.blocks, scanned))
        return step(xs, replaced(block, names, own) if names else block, edits, jnp.asarray(layer), wanted, rows)

    xs, found = tuple(x_BTD[part] for part in images) if parts > 1 else (x_BTD,), []

    def first_rows(xs: tuple[Array, ...]) -> tuple[Array, ...]:
        return xs if rows is None else tuple(x[:, :rows] for x in xs)

    if first is not None:
        narrow = rows is not None and narrows(edits, ())
        stop = depth - narrow
        xs = jax.lax.fori_loop(first, stop, lambda layer, xs: numbered(xs, layer, ())[0], xs)
        if narrow:
            xs = jax.lax.cond(first < depth, lambda xs: numbered(xs, stop, (), rows)[0], first_rows, xs)
        there = (first >= 0) & (first <= depth)
        stream = joined(first_rows(xs))
        return Ran(jnp.where(there, stream, jnp.nan), {}, None)  # another layer's answer would be wrong silently

    narrow = rows is not None and plan.runs and narrows(edits, plan.runs[-1].wanted)
    runs = cut(with_last_alone(plan.runs) if narrow else plan.runs, pieces)
    for run in runs:
        here = [piece for piece in pieces if piece.covers(run)]
        names, own = tuple(piece.name for piece in here), tuple(piece.of_layers(run) for piece in here)
        if narrow and run is runs[-1]:
            xs, new = numbered(xs, run.start, run.wanted, rows, jax.tree.map(lambda a: a[0], own), names)
            found.append(jax.tree.map(lambda a: a[None], new))
            continue
        layers = jnp.arange(run.start, run.stop)
        if run.stop - run.start == depth and not here:
            xs, new = jax.lax.scan(lambda x, xs: step(x, *xs, run.wanted, None), xs, (model.blocks, scanned, layers))  # noqa: B023
        else:  # by number: slices of the parameters for each run would be copies of them
            xs, new = jax.lax.scan(lambda x, i: numbered(x, i[0], run.wanted, None, i[1], names), xs, (layers, own))  # noqa: B023
        found.append(new)
    x = joined(first_rows(xs))
    if measure is not None:
        return Ran(
            x, {}, jax.tree.map(lambda *a: a[0] if len(a) == 1 else jnp.concatenate(a), *found) if found else None
        )
    trace: dict[str, Any] = {}
    for new in found:
        for site, value in new.items():
            trace.setdefault(site, []).append(value)
    trace = {site: v[0] if len(v) == 1 else jnp.concatenate(v) for site, v in trace.items()}
    for site, places in plan.order:
        trace[site] = trace[site][np.asarray(places)]
    return Ran(x, trace, None)


# --- on a CPU: images in independent parts

PARTS = 8
"""At most so many: each makes the program larger."""
PART_BYTES = 2**19
"""The largest activation of a part has at least as much: below, parts only take longer to compile."""
CHUNK_BYTES = 2**24
"""As much of the largest activation as goes through all layers at once on a CPU: more leaves the caches."""


def parts_on_cpu(model: ViT, x_BTD: Array, edits: Any) -> int:
    """Into how many parts images are split in a program for a CPU.

    XLA's CPU backend leaves cores idle within an operation, and runs independent ones at the same time: twice as many
    parts as cores keep them busy. 0: images stay together, where an edit mixes them and where they may be sharded. A
    process with several CPU devices may shard them in ways that cannot be seen here.
    """
    mixes = any(isinstance(edit, Shuffle) for each in edits.values() for edit in each)
    sharded = any(axis is not None for axis in jax.typeof(x_BTD).sharding.spec[:1])
    if mixes or sharded or jax.local_device_count("cpu") > 1 or not isinstance(x_BTD.shape[0], int) or x_BTD.size == 0:
        return 0
    return min(len(x_BTD), 2 * cores(), PARTS, len(x_BTD) * bytes_of_image(model, x_BTD) // PART_BYTES)


@cache
def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def chunks_on_cpu(model: ViT, x_BTD: Array) -> int:
    """Into how many chunks images are split that go through all layers one after another."""
    B, at_once = len(x_BTD), max(CHUNK_BYTES // bytes_of_image(model, x_BTD), 2)
    return next((n for n in range(-(-B // at_once), B // 2 + 1) if B % n == 0), 1)


def bytes_of_image(model: ViT, x_BTD: Array) -> int:
    """Of the largest activation in a block."""
    return x_BTD.shape[1] * max(model.config.hidden, 3 * model.config.width) * x_BTD.dtype.itemsize


def with_last_alone(runs: tuple[Run, ...]) -> tuple[Run, ...]:
    """The same layers, with the last one in a run of its own."""
    *before, (start, stop, wanted) = runs
    rest = [Run(start, stop - 1, wanted)] if start < stop - 1 else []
    return (*before, *rest, Run(stop - 1, stop, wanted))


def narrows(edits: Mapping[str, tuple[Operation, ...]], wanted: Wanted) -> bool:
    """Whether a block can run for the tokens before the patches alone: nothing is recorded of the others, and no edit
    of these tokens reads the others.
    """
    of_few = [of_all for site, of_all in wanted if site not in WHOLE_SITES]
    every = [edit for site, each in edits.items() if site not in WHOLE_SITES for edit in each]
    return not any(of_few) and all(edit.reads_own_token for edit in every)


WHOLE_SITES = ("resid_pre", "k", "v")
"""What each block computes for all tokens."""


def of_prefix(edits: Mapping[str, tuple[Operation, ...]], prefix: int) -> dict[str, tuple[Operation, ...]]:
    """The edits of one layer that computes the tokens before the patches alone."""
    return {
        site: each if site in WHOLE_SITES else tuple(edit.of_prefix(site, prefix) for edit in each)
        for site, each in edits.items()
    }


def of_images(edits: Any, part: slice) -> Any:
    """The edits of one layer for some of the images: arrays that are not the same for all images are cut."""
    return jax.tree.map(lambda a: a[part] if a.ndim and a.shape[0] > 1 else a, edits)


def in_chunks(
    run: Callable[..., Ran],
    chunks: int,
    model: ViT,
    pieces: tuple[Piece, ...],
    x_BTD: Array,
    edits: Any,
    first: Array | None,
) -> Ran:
    """`run` of chunks of images, one after another."""

    def split(a: Array, axis: int) -> Array:
        return jnp.moveaxis(a.reshape(*a.shape[:axis], chunks, -1, *a.shape[axis + 1 :]), axis, 0)

    def merge(a: Array, axis: int) -> Array:
        a = jnp.moveaxis(a, 0, axis)
        return a.reshape(*a.shape[:axis], -1, *a.shape[axis + 2 :])

    leaves, structure = jax.tree.flatten(edits)
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    differ = [leaf.ndim > 1 and leaf.shape[1] > 1 for leaf in leaves]

    def one(chunk: tuple[Array, list[Array]]) -> tuple[Array, dict[str, Array]]:
        x, own = chunk
        mine = iter(own)
        every = [next(mine) if varies else leaf for leaf, varies in zip(leaves, differ, strict=True)]
        ran = run(model, pieces, x, jax.tree.unflatten(structure, every), first)
        return ran.stream, ran.trace

    of_chunks = [split(leaf, 1) for leaf, varies in zip(leaves, differ, strict=True) if varies]
    stream, trace = jax.lax.map(one, (split(x_BTD, 0), of_chunks))
    return Ran(merge(stream, 0), {site: merge(value, 1) for site, value in trace.items()}, None)


def rope_for(model: ViT, grid: tuple[int, int] | None, tokens: int) -> Rope:
    """What gives queries and keys in a sequence of `tokens` over a `grid` of patches their rotary positions."""
    c = model.config
    if c.rope is None:
        return identity
    if grid is None or grid[0] * grid[1] + c.prefix != tokens:
        raise ValueError(
            f"a run of {tokens} tokens over a grid of {grid} patches: with rotary positions, give the grid of the "
            f"images, such as config.layout(height, width).grid"
        )
    return rotary(grid, c.head_size, c.rope_base, c.rope, c.prefix)


def checked_edits(model: ViT, edits: Edits | None, batch: Any, tokens: Any) -> dict[str, tuple[Operation, ...]]:
    """The edits of every site as a tuple.

    Args:
      batch, tokens: sizes; of a program that is exported they may be symbolic.

    Raises:
      ValueError: an unknown site, something that is no edit, or arrays that do not fit this model and these images.
    """
    c, every = model.config, normalise_edits(edits)
    axes = {"B": batch, "T": tokens, "D": c.width, "H": c.heads, "d": c.head_size, "F": c.hidden}
    check_edits(every, {**axes, "L": c.depth, "P": c.prefix})
    return every


def check_choices(model: ViT, x: Array, remat: str, kernel: str, outputs: str = "all") -> None:
    """Raises a ValueError that names the argument if one of these words is unknown, or cannot be used here."""
    if outputs not in get_args(Outputs):
        raise ValueError(f"outputs is {outputs!r}; expected 'all', 'prefix' or 'cls'")
    if not {"all": True, "prefix": model.prefix > 0, "cls": model.config.cls}[outputs]:
        missing = "class token" if outputs == "cls" else "class token and no registers"
        raise ValueError(f"outputs is {outputs!r}, and this model has no {missing}: leave it out")
    if remat not in get_args(Remat):
        raise ValueError(f"remat is {remat!r}; expected 'none' or 'block'")
    devices = set() if isinstance(x, Tracer) or not isinstance(x, jax.Array) else x.devices()
    device = next(iter(devices)) if devices else jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    check_kernel(kernel, model.dtype, model.config.head_size, device)


def each_layer(
    model: ViT,
    images: Float[Array, "B H W C"],
    measure: Callable[[dict[str, Array]], Any],
    record: Record,
    edits: Edits | None = None,
    *,
    start: tuple[int, Float[Array, "B T D"]] | None = None,
    attention: Kernel = "auto",
) -> PyTree[Array]:
    """Runs the model and measures every layer as it is computed, in the memory of one layer's trace.

    A second call with a function that computes the same, and arrays of the same shapes, compiles nothing.

    Args:
      images, edits, attention: as for the model.
      measure: function of a trace of one layer, whose arrays have no axis of layers.
      record: sites to measure; of all layers.
      start: a layer, and the stream that enters it, to run from there on, as `run_from` does; the images then only
        tell their size.

    Returns:
      What `measure` gives, with an axis of the layers that run in front.

    Raises:
      ValueError: a record of only some layers, or what the model raises.

    Example:

        flow = each_layer(
            model, images, lambda trace: attention_flow(trace["pattern"], layout), {"pattern": Take(tokens="all")}
        )  # [L, B, H, G, G], of patterns that for all layers may take gigabytes
    """

    def of_trace(trace: dict[str, Array], block: Block, layer: Array) -> Any:
        return measure(trace)

    return layer_by_layer(model, images, of_trace, record, edits, start=start, attention=attention).measured


def layer_by_layer(
    model: ViT,
    images: Float[Array, "B H W C"],
    measure: Measure,
    record: Record,
    edits: Edits | None = None,
    *,
    start: tuple[int, Float[Array, "B T D"]] | None = None,
    stop: int | None = None,
    attention: Kernel = "auto",
) -> Ran:
    """As `each_layer`, with a measure that also reads the layer's block and number, and with the stream at the end.

    Args:
      stop: run layers up to `stop` - 1; by default all.
    """
    c = model.config
    first, stream = start or (0, None)
    plan = recording_plan(record, c.depth, c.prefix, first, stop)
    if len(plan.runs) > 1 or plan.order:
        raise ValueError("each_layer measures all layers: leave out layers=.. of the sites to record")
    if stream is not None and (stream.ndim != 3 or stream.shape[-1] != c.width):
        raise ValueError(f"the stream has shape {stream.shape}; expected [batch, tokens, {c.width}]")
    grid = model.check_images(images)
    entering = images if stream is None else stream
    tokens = c.layout(*images.shape[1:3]).tokens if stream is None else stream.shape[1]
    every = checked_edits(model, edits, entering.shape[0], tokens)
    check_choices(model, entering, "none", attention)
    static: dict[str, Any] = dict(plan=plan, grid=grid, from_images=stream is None, kernel=attention)
    args = (model, entering, every)
    if is_traced(args, measure):
        return _measured(*args, measure, **static)
    (run,) = plan.runs or (Run(first, first, ()),)
    trace = _trace_shapes(model, entering, every, run, **static)
    block = jax.eval_shape(lambda blocks: jax.tree.map(lambda a: a[0], blocks), model.blocks)
    program = Program(measure, trace, block, jax.ShapeDtypeStruct((), jnp.int32))
    return _compiled(program)(*args, **static)


def _measured(
    model: ViT,
    entering: Array,
    edits: Any,
    measure: Measure,
    plan: Plan,
    grid: tuple[int, int],
    from_images: bool,
    kernel: Kernel,
) -> Ran:
    stream = model.embedding(entering) if from_images else entering
    return run_blocks(model, stream, edits, plan, grid=grid, measure=measure, kernel=kernel)


@kept(maxsize=64)
def _compiled(measure: Program) -> Callable[..., Ran]:
    """`_measured` with this measure."""

    @partial(jax.jit, static_argnames=("plan", "grid", "from_images", "kernel"))
    def run(model: ViT, entering: Array, edits: Any, **static: Any) -> Ran:
        return _measured(model, entering, edits, measure.function, **static)

    return run


def _trace_shapes(model: ViT, entering: Array, edits: Any, run: Run, **static: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of one layer's trace."""
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), jnp.result_type(a)), (model, entering, edits))
    leaves, structure = jax.tree.flatten(args)
    return dict(_shapes_of(tuple(leaves), structure, run, tuple(static.items())))


@lru_cache(maxsize=256)
def _shapes_of(leaves: Any, structure: Any, run: Run, static: tuple[tuple[str, Any], ...]) -> tuple[Any, ...]:
    def run_it(model: ViT, entering: Array, edits: Any) -> Any:
        return _measured(model, entering, edits, lambda trace, block, layer: trace, **dict(static)).measured

    found = jax.eval_shape(run_it, *jax.tree.unflatten(structure, leaves)) or {}
    return tuple((site, jax.ShapeDtypeStruct(a.shape[1:], a.dtype)) for site, a in found.items())

"""Times jaxvit beside timm in PyTorch, in one run, and keeps the tables in docs/speed.md.

    python -m benchmarks                           the quick set, ten minutes on two cores
    python -m benchmarks speed --full              every model, size and batch
    python -m benchmarks speed --full --keep NAME  keep it as benchmarks/results/NAME.json, and show it in docs/speed.md

docs/speed.md shows every file of benchmarks/results. Where one is of this processor, what has become slower than it by
more than noise is named, and the exit status is 1.

Random DINOv2 models with 4 registers; both sides hold the same weights and read the same images, and their outputs are
compared before anything is timed. PyTorch runs under inference_mode with fused attention wherever no weights are asked
for, eager, and through torch.compile where that works; the quicker of the two is what a forward pass is compared with.
Hook points are hooks at every submodule, with all weights written out, as in ViT-Prisma and TransformerLens.

Alternatives take turns, and the tables show medians of the quotients of neighbours: below 1, jaxvit is faster. Times
are of warm programs, compilation being measured apart; where it is included, the task says so. Each peak of memory is
that of a process of its own.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import convert
from benchmarks import hooks, last_layer
from benchmarks.originals import random_original
from benchmarks.timing import Timed, compiling, take_turns
from convert import versions
from jaxvit import Take, ViT, ViTConfig, ablate, cast, grids, knockout, sweep

MARK = "<!-- speed -->"
RESULTS = Path(__file__).parent / "results"
MEMORY_CASE = ("small", 224, 8)
FULL = {
    ("small", 224): (1, 8, 32),
    ("base", 224): (1, 8),
    ("small", 518): (1, 8),
}
"""(size, pixels) -> batches."""
QUICK = {("small", 224): (1, 8)}
TARGETS = {
    ("forward + pattern, prefix rows", "own forward"): 1.05,
    ("outputs of [CLS] alone", "own forward"): 0.95,
    ("last-layer analysis", "own forward"): 1.05,
    ("head sweep", "a hook a point"): 1 / 3,
    ("head sweep", "batched hooks"): 0.45,
    ("group-edge sweep", "a mask a point"): 0.5,
    ("compile, depth 40", "compile, depth 12"): 1.2,
}
"""(task, compared with) -> the quotient that we aim for."""
FORWARD = {("small", 224, 1): 1.05, ("small", 224, 8): 1.10, ("small", 224, 32): 0.85}
"""(size, pixels, batch) -> the same of a forward pass beside timm, eager; 1.15 for others."""
NOISE = 1.15
"""A quotient is worse than a kept one from this factor on."""
PRECISIONS = ("float32", "tf32", "bfloat16")


class Row(NamedTuple):
    """One comparison.

    Attributes:
      model, pixels, batch: of the case.
      task, other: what was timed, and what it is compared with.
      seconds, other_seconds: medians.
      ratio: the median of paired quotients, task / other.
      rounds: how many pairs.
    """

    model: str
    pixels: int
    batch: int
    task: str
    other: str
    seconds: float
    other_seconds: float
    ratio: float
    rounds: int

    @property
    def key(self) -> tuple[str, int, int, str, str]:
        """What is compared."""
        return self[:5]

    @property
    def case(self) -> str:
        return f"ViT-{self.model[0].upper()}, {self.pixels}, {self.batch}"

    @property
    def target(self) -> float | None:
        if (self.task, self.other) == ("forward", "timm, eager"):
            return FORWARD.get((self.model, self.pixels, self.batch), 1.15)
        return TARGETS.get((self.task, self.other))


class Case:
    """One model on both sides, with images; and everything that is timed, as functions that wait for their result."""

    def __init__(self, size: str, pixels: int, batch: int, precision: str = "float32"):
        self.size, self.pixels, self.batch = size, pixels, batch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = "bfloat16" if precision == "bfloat16" else "float32"
        module = random_original(ViTConfig.dinov2(size, 4), "timm")
        # Timed at its own size: timm then resamples positions once, not in every pass.
        module.set_input_size((pixels, pixels))
        self.module = module.to(self.device, getattr(torch, dtype))
        self.model = cast(convert.load(random_original(ViTConfig.dinov2(size, 4), "timm")), dtype)
        images = np.random.default_rng(0).normal(size=(batch, pixels, pixels, 3)).astype(np.float32)
        self.images = jnp.asarray(images, dtype)
        self.tensor = torch.tensor(images).permute(0, 3, 1, 2).contiguous().to(self.device, getattr(torch, dtype))
        self.compiled: Callable[[torch.Tensor], Any] | None = None

    # jaxvit

    def jitted(self, record: Any) -> Callable[[], Any]:
        def run(model: ViT, images: jax.Array) -> Any:
            out = model(images, record=record)
            return out.cls, out.trace

        compiled = jax.jit(run)
        return lambda: jax.block_until_ready(compiled(self.model, self.images))

    def forward(self) -> Callable[[], Any]:
        return self.jitted(())

    def cls_alone(self) -> Callable[[], Any]:
        compiled = jax.jit(lambda model, images: model(images, outputs="cls").cls)
        return lambda: jax.block_until_ready(compiled(self.model, self.images))

    def analysis(self) -> Callable[[], Any]:
        compiled = jax.jit(last_layer.analyse)
        return lambda: jax.block_until_ready(compiled(self.model, self.images))

    def swept(self, make_edits: Any, grid: Any, points: int | None = None) -> Callable[[], np.ndarray]:
        run = partial(
            sweep, self.model, self.images, make_edits, grid, cls, batch_size=points, outputs="cls", progress=False
        )
        return lambda: run().values.reshape(len(grid), self.batch, -1)

    def head_sweep(self) -> Callable[[], np.ndarray]:
        return self.swept(partial(cut_head, self.model), grids.heads(self.model))

    def edge_sweep(self) -> Callable[[], np.ndarray]:
        return self.swept(partial(cut_edge, self.model), grids.group_edges(self.model))

    # PyTorch

    def torch_run(self, run: Callable[..., Any], *args: Any) -> Callable[[], Any]:
        def timed() -> Any:
            result = run(self.module, self.tensor, *args)
            if self.device == "cuda":
                torch.cuda.synchronize()
            return result

        return timed

    def torch_compiled(self) -> Callable[[], Any] | None:
        """timm through torch.compile, or None where that fails."""
        compiled = torch.compile(self.module.forward_features)

        def timed() -> Any:
            with torch.inference_mode():
                result = compiled(self.tensor)[:, 0]
            if self.device == "cuda":
                torch.cuda.synchronize()
            return result

        try:
            timed()
        except Exception as error:  # whatever its compilers say: it is not there on every machine
            print(f"torch.compile does not work here: {str(error).splitlines()[0]}", file=sys.stderr)
            return None
        return timed


def warm(run: Callable[[], Any]) -> Callable[[], float]:
    """The run, returning the seconds of it that went into compiling, which do not count."""

    def timed() -> float:
        with compiling() as seconds:
            run()
        return sum(seconds, 0.0)

    return timed


def cls(out: Any, clean: Any) -> jax.Array:
    return out.cls


def cut_head(model: ViT, point: Any, clean: Any) -> Any:
    return ablate(model, "z", layers=point["layer"], heads=point["head"])


def cut_edge(model: ViT, point: Any, clean: Any) -> Any:
    return knockout(model, layers=point["layer"], query=point["query"], key=point["key"])


def compare_outputs(case: Case, ours: Any, theirs: torch.Tensor, what: str) -> None:
    """Raises where the two sides do not compute the same: their times would mean nothing."""
    x, y = np.asarray(ours, np.float32), theirs.float().cpu().numpy()
    error = np.abs(x - y).max() / np.abs(y).max()
    limit = 0.1 if case.images.dtype == jnp.bfloat16 else 1e-2 if case.device == "cuda" else 1e-4
    if not error <= limit:
        raise RuntimeError(f"{what}: jaxvit and PyTorch differ by {error:.1e}")


def forwards(case: Case, seconds: float) -> Iterator[Row]:
    """Forward passes, recording, and the last layer's analysis."""
    prefix = case.module.num_prefix_tokens
    ours = {
        "forward": case.forward(),
        "outputs of [CLS] alone": case.cls_alone(),
        "forward + pattern, prefix rows": case.jitted({"pattern": Take()}),
        "forward + pattern, all rows": case.jitted({"pattern": Take(tokens="all")}),
        "last-layer analysis": case.analysis(),
    }
    theirs = {
        "eager": case.torch_run(hooks.forward),
        "hooks, prefix rows": case.torch_run(hooks.record_patterns, prefix),
        "hooks, all rows": case.torch_run(hooks.record_patterns, None),
        "hooks, last layer": case.torch_run(hooks.last_layer_parts),
        "hook points": partial(hooks.with_hook_points, case.module, case.torch_run(hooks.forward)),
    }
    if compiled := case.torch_compiled():
        theirs["compiled"] = compiled
    compare_outputs(case, ours["forward"]()[0], theirs["eager"](), "forward")
    compare_outputs(case, ours["outputs of [CLS] alone"](), theirs["eager"](), "outputs of [CLS] alone")
    timed = take_turns(ours | theirs, seconds, rounds=(3 if case.batch > 8 or case.pixels > 224 else 5, 40))
    best = min((name for name in ("eager", "compiled") if name in theirs), key=timed.median)
    row = partial(make_row, case, timed)
    yield row("forward", best, "timm")
    for name in ("eager", "compiled"):
        if name in theirs:
            yield row("forward", name, f"timm, {name}")
    yield row("forward", "hook points", "hook points")
    yield row("outputs of [CLS] alone", "forward", "own forward")
    yield row("outputs of [CLS] alone", "eager", "timm, eager")
    for task, other in zip(list(ours)[2:], list(theirs)[1:4], strict=True):
        yield row(task, "forward", "own forward")
        yield row(task, other, "timm, hooks")


def make_row(case: Case, timed: Timed, task: str, other: str, shown: str) -> Row:
    rounds = len(timed.seconds[task])
    ratio = timed.ratio(task, other)
    return Row(case.size, case.pixels, case.batch, task, shown, timed.median(task), timed.median(other), ratio, rounds)


def sweeps(case: Case, seconds: float) -> Iterator[Row]:
    """All heads, and all edges between groups of tokens, of every layer."""
    depth, heads = case.model.config.depth, case.model.config.heads
    points = [(layer, head) for layer in range(depth) for head in range(heads)]
    one_by_one = case.torch_run(hooks.sweep_heads, points)
    everywhere = partial(hooks.with_hook_points, case.module, one_by_one)
    head_sweep = case.head_sweep()
    alternatives = {
        "head sweep": warm(head_sweep),
        "head sweep, compilation included": head_sweep,
        "a hook a point": one_by_one,
        "batched hooks": case.torch_run(hooks.sweep_heads_batched),
        "hook points": everywhere,
    }
    expected = one_by_one()
    compare_outputs(case, head_sweep(), expected, "head sweep")
    compare_outputs(case, alternatives["batched hooks"]().float().cpu().numpy(), expected, "batched hooks")
    timed = take_turns(alternatives, seconds, rounds=(3, 20))
    for name in ("a hook a point", "batched hooks", "hook points"):
        yield make_row(case, timed, "head sweep", name, name)
    yield make_row(case, timed, "head sweep, compilation included", "a hook a point", "a hook a point")

    # PyTorch takes minutes for them all: it runs every twelfth, and its time is multiplied.
    grid = grids.group_edges(case.model)
    every = list(zip(*(grid.points[axis].tolist() for axis in ("layer", "query", "key")), strict=True))
    some = every[5::12]
    ours, theirs = case.edge_sweep(), case.torch_run(hooks.sweep_edges, some)
    compare_outputs(case, ours()[5::12], theirs(), "edge sweep")
    timed = take_turns({"group-edge sweep": warm(ours), "some": theirs}, seconds, rounds=(3, 20))
    scaled = timed.seconds["some"] * len(every) / len(some)
    timed = Timed({"group-edge sweep": timed.seconds["group-edge sweep"], "a mask a point": scaled})
    yield make_row(case, timed, "group-edge sweep", "a mask a point", "a mask a point")


def compilation(rounds: int = 5) -> list[Row]:
    """Seconds to trace and compile a forward pass of ViT-S by depth; each time from nothing."""
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)

    def compile_at(depth: int) -> None:
        config = ViTConfig.dinov2("small", 4, depth=depth)
        model = jax.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0)))
        jax.clear_caches()
        jax.jit(lambda model, images: model(images).cls).lower(model, images).compile()

    timed = take_turns({f"compile, depth {d}": partial(compile_at, d) for d in (12, 24, 40)}, 0, (rounds, rounds))
    base = "compile, depth 12"
    return [
        Row("small", 224, 1, name, base, timed.median(name), timed.median(base), timed.ratio(name, base), rounds)
        for name in timed.seconds
    ]


# Memory ---------------------------------------------------------------------------------------------------------------

MEMORY_TASKS: dict[str, Callable[[Case], Callable[[], Any]]] = {
    "jaxvit: forward": Case.forward,
    "timm: forward": lambda case: case.torch_run(hooks.forward),
    "jaxvit: prefix rows": lambda case: case.jitted({"pattern": Take()}),
    "timm: prefix rows, hooks": lambda case: case.torch_run(hooks.record_patterns, case.module.num_prefix_tokens),
    "jaxvit: all patterns": lambda case: case.jitted({"pattern": Take(tokens="all")}),
    "timm: all patterns, hooks": lambda case: case.torch_run(hooks.record_patterns, None),
    "jaxvit: last-layer analysis": Case.analysis,
    "timm: last-layer analysis, hooks": lambda case: case.torch_run(hooks.last_layer_parts),
    "jaxvit: head sweep, 72 points": Case.head_sweep,
    "timm: head sweep, batched hooks": lambda case: case.torch_run(hooks.sweep_heads_batched),
    "jaxvit: sweep of 100 points": lambda case: case.swept(*many_points(case.model, 100)),
    "jaxvit: sweep of 1000 points": lambda case: case.swept(*many_points(case.model, 1000)),
}


def many_points(model: ViT, count: int) -> tuple[Any, grids.Grid]:
    """Partial ablations of single heads of the last layer: as many points as one likes."""

    def edits(point: Any, clean: Any) -> Any:
        strength = (jnp.arange(model.config.heads) == point["head"]) * point["strength"]
        return ablate(model, "z", layers=-1, heads=strength)

    return edits, grids.Grid(head=range(5), strength=np.linspace(0.01, 1, count // 5).tolist())


def peak_of(task: str, size: str, pixels: int, batch: int) -> float:
    """MB that a task takes at most beyond model and images; on a GPU, of its memory in all. For one process a task."""
    case = Case(size, pixels, batch)
    run = MEMORY_TASKS[task](case)
    if case.device == "cuda":
        run()
        if task.startswith("timm"):
            return torch.cuda.max_memory_allocated() / 1e6
        return (jax.local_devices()[0].memory_stats() or {})["peak_bytes_in_use"] / 1e6
    run()  # compiles, which takes memory of its own
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free, but kept by the allocator, would hide as much of the peak
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts over
    run()
    return (_status("VmHWM") - before) / 1e3


def _status(name: str) -> int:
    """kB, as Linux tells of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name)))


def memory(size: str, pixels: int, batch: int) -> dict[str, float]:
    """MB of every task."""
    found = {}
    for task in MEMORY_TASKS:
        command = [sys.executable, "-m", "benchmarks", "peak", task, size, str(pixels), str(batch)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{task}: {done.stderr.strip().splitlines()[-1]}")
        found[task] = float(done.stdout.split()[-1])
        print(f"  {task}: {found[task]:.0f} MB", file=sys.stderr)
    return found


# Tables ---------------------------------------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    lines = [
        "| model, pixels, batch | task | jaxvit | compared with | its time | jaxvit ÷ it | aim |",
        "|" + "---|" * 7,
    ]
    for row in rows:
        target = "" if row.target is None else f"≤ {row.target:.2f}"
        times = f"{show(row.seconds)} | {row.other} | {show(row.other_seconds)}"
        lines.append(f"| {row.case} | {row.task} | {times} | {row.ratio:.2f} | {target} |")
    return "\n".join(lines)


def show(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"


def memory_table(found: dict[str, float], size: str, pixels: int, batch: int) -> str:
    what = f"peak beyond model and images, ViT-{size[0].upper()}, {pixels} px, batch {batch}"
    return "\n".join([f"| {what} | MB |", "|---|---|", *(f"| {task} | {mb:.0f} |" for task, mb in found.items())])


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def set_precision(precision: str) -> None:
    """The same arithmetic on both sides. On CPUs float32 is float32; on GPUs, matrix products may take TF32."""
    jax.config.update("jax_default_matmul_precision", "highest" if precision == "float32" else "default")
    torch.set_float32_matmul_precision("highest" if precision == "float32" else "high")


def again(only: str, keep: str, seconds: float) -> None:
    """Measures the cases of one model and size anew, and replaces their rows in results that are kept.

    Args:
      only: "small:518".
    """
    size, _, pixels = only.partition(":")
    path = RESULTS / f"{keep}.json"
    batches = FULL.get((size, int(pixels or 0)))
    if batches is None or not path.is_file():
        raise SystemExit(f"error: {path} holds no {only}; there are {', '.join(f'{s}:{p}' for s, p in FULL)}")
    results = json.loads(path.read_text())
    if (device_name(), os.environ.get("XLA_FLAGS", "")) != (results["device"], results["XLA_FLAGS"]):
        raise SystemExit(f"error: {path} was measured on another device, or with other flags")
    set_precision(results["precision"])
    for batch in batches:
        new = [row._asdict() for row in forwards(Case(size, int(pixels), batch, results["precision"]), seconds)]
        measured = {Row(**row).key: row for row in new}
        results["rows"] = [measured.get(Row(**row).key, row) for row in results["rows"]]
        print(table([Row(**row) for row in new]))
    path.write_text(json.dumps(results, indent=1) + "\n")
    write_readme()


def worse(rows: Iterable[Row], kept: Iterable[Row]) -> list[str]:
    """What is slower than it was, in words."""
    before = {row.key: row.ratio for row in kept}
    return [
        f"{row.case}, {row.task}: {row.ratio:.2f} of {row.other}, was {before[row.key]:.2f}"
        for row in rows
        if row.ratio > NOISE * before.get(row.key, float("inf"))
    ]


def kept_like(results: dict[str, Any], folder: Path = RESULTS) -> list[Row]:
    """Rows that are kept of the same processor, precision and flags."""
    same = ("device", "precision", "XLA_FLAGS")
    every = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    alike = [each for each in every if all(each[name] == results[name] for name in same)]
    return [Row(**row) for each in alike for row in each["rows"]]


def main(full: bool, keep: str | None, precision: str, seconds: float, out: Path) -> int:
    """Returns the exit status: 1 if something has become slower than what is kept of this processor."""
    set_precision(precision)
    rows: list[Row] = []
    start = time.perf_counter()

    def say(more: Iterator[Row] | list[Row]) -> None:
        for row in more:
            rows.append(row)
            print(table([row]).splitlines()[-1], file=sys.stderr, flush=True)

    for (size, pixels), batches in (FULL if full else QUICK).items():
        for batch in batches:
            case = Case(size, pixels, batch, precision)
            say(forwards(case, seconds))
            if batch == 1 and size == "small" and pixels == 224:
                say(sweeps(case, seconds))
    say(compilation())
    results = {
        "device": device_name(),
        "precision": precision,
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "versions": versions("jax", "jaxlib", "torch", "timm"),
        "torch threads": torch.get_num_threads(),
        "rows": [row._asdict() for row in rows],
        "peak MB": memory(*MEMORY_CASE),
        "minutes": round((time.perf_counter() - start) / 60, 1),
    }
    print(text_of(results))
    slower = worse(rows, kept_like(results))
    for each in slower:
        print(f"slower than what is kept: {each}", file=sys.stderr)
    out = RESULTS / f"{keep}.json" if keep else out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    if keep:
        write_readme()
    return int(bool(slower))


def write_readme() -> None:
    """Puts all results that are kept into docs/speed.md."""
    texts = [text_of(json.loads(path.read_text())) for path in sorted(RESULTS.glob("*.json"))]
    readme = Path("docs/speed.md")
    before, _, after = readme.read_text().split(MARK)
    readme.write_text(f"{before}{MARK}\n" + "\n\n".join(texts) + f"\n{MARK}{after}")


def text_of(results: dict[str, Any]) -> str:
    """What a run found, as Markdown."""
    rows = [Row(**row) for row in results["rows"]]
    aims = [row.ratio <= row.target for row in rows if row.target is not None]
    software = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    flags = f"`XLA_FLAGS={results['XLA_FLAGS']}`" if results["XLA_FLAGS"] else "default XLA flags"
    head = (
        f"**{results['device']}, {results['precision']}, {flags}** ({software}): {sum(aims)} of {len(aims)} aims met."
    )
    return "\n\n".join([head, table(rows), memory_table(results["peak MB"], *MEMORY_CASE)])

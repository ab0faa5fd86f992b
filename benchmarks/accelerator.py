"""Measures jaxvit beside timm on one NVIDIA GPU: how exact, how fast, how much memory.

    python -m benchmarks.accelerator --out out/accelerator.json [--only forward sweep] [--limit 400]
    python -m benchmarks.accelerator --keep out/accelerator.json      keeps it, and writes docs/accelerators.md anew
    python -m benchmarks.accelerator --table out/accelerator.json     prints its tables as Markdown
    JAX_PLATFORMS=cpu python -m benchmarks.accelerator --smoke --sizes small --pixels 56 70     tries the code on a CPU

The models are DINOv2 with 4 registers and random weights. Both sides hold the same weights and read the same images.
The most important rows come first, and the file is written after each. A row that fails keeps its error.

  error     final tokens against timm in float64: the largest difference, divided by the largest value
  gradient  the same for the gradient of the sum of [CLS] with respect to the images
  forward   images per second of jaxvit, of timm, and of timm with torch.compile
  sweep     ablation of every head of every layer, and the same with hooks: a point at a time, or many in one batch
  record    a forward pass that also returns the attention pattern of [CLS] and registers in all layers
  memory    the peak beyond model and images

Arithmetic: bfloat16 weights; float32 with exact matrix products; tf32, which is float32 weights with TF32 products.
"""

# ruff: noqa: E402 -- the environment is set before JAX is imported

from __future__ import annotations

import os
import time

START = time.perf_counter()
# PyTorch and JAX share the GPU, so JAX must not take most of its memory at the start.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")

import argparse
import copy
import datetime
import gc
import itertools
import json
import platform
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import timm
import torch

import convert
import jaxvit
from benchmarks import hooks
from benchmarks.originals import randomise
from benchmarks.timing import Timed, compiling, take_turns

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
BATCHES: dict[str, tuple[int, int]] = {"small": (256, 64), "base": (256, 32), "large": (128, 16), "giant": (64, 8)}
"""Images at once of `forward` and `record`: below 518 px, and from there on."""
PEAK = {"bfloat16": 989.0, "tf32": 494.0, "float32": 67.0}
"""Dense TFLOP/s of an H100 or H200 SXM, from the datasheet."""
Row = dict[str, Any]
Run = Callable[[], Any]


class Job(NamedTuple):
    """What one row measures."""

    kind: str
    size: str
    pixels: int
    precision: str


def plan(sizes: Sequence[str], pixels: Sequence[int]) -> list[Job]:
    """All rows, the most important first. The first size of images is the usual one."""

    def jobs(kinds: str, initials: str, precisions: str, at: Sequence[int] = pixels[:1]) -> list[Job]:
        chosen = [size for size in sizes if size[0] in initials]
        each = itertools.product(kinds.split(), precisions.split(), at, chosen)
        return [Job(kind, size, side, precision) for kind, precision, side, size in each]

    more = pixels[1:]
    return [
        *jobs("error gradient", "s", "float32 bfloat16"),
        *jobs("forward", "sbl", "bfloat16"),
        *jobs("sweep record", "s", "bfloat16"),
        *jobs("forward", "sbl", "float32"),
        *jobs("sweep", "s", "tf32"),
        *jobs("forward", "sbl", "tf32"),
        *jobs("forward", "sbl", "bfloat16", more),
        *jobs("sweep", "b", "bfloat16 tf32"),
        *jobs("memory", "sbl", "bfloat16"),
        *jobs("forward", "g", "bfloat16"),
        *jobs("error gradient", "b", "float32 bfloat16"),
        *jobs("record", "b", "bfloat16"),
        *jobs("error", "s", "tf32"),
        *jobs("memory", "sb", "float32"),
        *jobs("forward", "sbl", "float32 tf32", more),
        *jobs("forward", "g", "bfloat16", more),
        *jobs("forward", "g", "float32 tf32", pixels),
    ]


# Both sides -----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def models(size: str, pixels: int, **more: Any) -> tuple[Any, jaxvit.ViT]:
    """timm's model with every parameter random, and jaxvit's with the same weights, in float32."""
    with torch.device(DEVICE):
        name = f"vit_{size}_patch14_reg4_dinov2"
        module = timm.create_model(name, img_size=pixels, num_classes=0, init_values=1.0, **more)
        return randomise(module).requires_grad_(False), convert.load(module)


class Case:
    """Both sides of a job: `model` and `images`, `module` and `tensor`; `original` and `exact` are float32 always."""

    def __init__(self, job: Job, batch: int, options: argparse.Namespace):
        self.job, self.batch, self.options = job, 2 if options.smoke else batch, options
        dtype = "bfloat16" if job.precision == "bfloat16" else "float32"
        self.original, model = models(job.size, job.pixels, **({"depth": 2} if options.smoke else {}))
        self.module = copy.deepcopy(self.original).to(getattr(torch, dtype))
        self.model = jaxvit.cast(model, getattr(jnp, dtype))
        shape = (self.batch, job.pixels, job.pixels, 3)
        images = np.random.default_rng(0).standard_normal(shape, np.float32)
        self.images = jnp.asarray(images, dtype)
        self.exact = torch.tensor(images, device=DEVICE).permute(0, 3, 1, 2).contiguous()
        self.tensor = self.exact.to(getattr(torch, dtype))

    def ours(self, record: Any = ()) -> Run:
        """Starts a forward pass of jaxvit."""
        compiled = jax.jit(partial(final_tokens, record=record))
        return lambda: compiled(self.model, self.images)

    def theirs(self, run: Callable[..., Any] = hooks.forward, *args: Any, module: Any = None) -> Run:
        """Starts timm."""
        return lambda: run(module or self.module, self.tensor, *args)

    def compiled(self, whole: bool = False) -> Run:
        """timm compiled in one piece, or by blocks: these share one program, which takes seconds at any depth."""
        twin = copy.deepcopy(self.module, {id(p): p for p in self.module.parameters()})  # with the same weights
        if whole:
            twin.forward_features = torch.compile(twin.forward_features, dynamic=False)
        for block in () if whole else twin.blocks:
            block.compile(dynamic=False)
        return self.theirs(module=twin)

    def flops(self) -> float:
        """Floating-point operations of one image: the embedding of patches, all linear layers, and attention."""
        tokens = hooks.forward_tokens(self.module, self.tensor)
        linear = sum(m.weight.numel() for m in self.module.blocks.modules() if isinstance(m, torch.nn.Linear))
        patches = self.module.patch_embed.num_patches * self.module.patch_embed.proj.weight.numel()
        attention = 2 * tokens**2 * self.module.embed_dim * len(self.module.blocks)
        return 2.0 * (tokens * linear + patches + attention)


def final_tokens(model: jaxvit.ViT, images: jax.Array, record: Any = ()) -> tuple[Any, ...]:
    """[CLS], registers and patches after the final norm, and the trace."""
    out = model(images, record=record)
    return out.cls, out.registers, out.patches, out.trace


@contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """Makes matrix products of float32 exact, or TF32, on both sides."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    with jax.default_matmul_precision("highest" if precision == "float32" else "default"):
        yield


def wait(result: Any) -> None:
    """Returns when the result of either side is there."""
    jax.block_until_ready(result)
    if CUDA:
        torch.cuda.synchronize()


def seconds_of(run: Run) -> float:
    """How long a run takes."""
    start = time.perf_counter()
    wait(run())
    return time.perf_counter() - start


def milliseconds(runs: dict[str, Run], seconds: float) -> Timed:
    """Times runs that are compiled. Each turn is several passes in a row, as over many images."""
    passes = max(1, min(50, int(0.05 / min(map(seconds_of, runs.values())))))

    def turn(run: Run) -> None:
        for _ in range(passes - 1):
            run()
        wait(run())

    timed = take_turns({name: partial(turn, run) for name, run in runs.items()}, seconds, rounds=(3, 20))
    return Timed({name: 1e3 * each / passes for name, each in timed.seconds.items()})


def as_numpy(value: Any) -> np.ndarray:
    """A result of either side in float64."""
    return value.detach().double().cpu().numpy() if torch.is_tensor(value) else np.asarray(value).astype(np.float64)


def difference(value: Any, reference: Any) -> float:
    """The largest difference, divided by the largest value of the reference."""
    x, y = as_numpy(value), as_numpy(reference)
    return float(np.abs(x - y).max() / np.abs(y).max())


# Rows. Each function fills a row step by step: what was found before a failure is kept --------------------------------


def errors(case: Case, row: Row) -> None:
    """Final tokens of both sides against timm in float64."""
    with torch.inference_mode():
        exact = copy.deepcopy(case.original).double().forward_features(case.exact.double())
        row["timm"] = difference(case.module.forward_features(case.tensor), exact)
    cls, registers, patches = map(as_numpy, case.ours()()[:3])
    row["jaxvit"] = difference(np.concatenate([cls[:, None], registers, patches], axis=1), exact)
    row["ratio"] = row["jaxvit"] / row["timm"]


def gradient(case: Case, row: Row) -> None:
    """Gradients with respect to images, of both sides, against timm in float64."""

    def slope(module: Any, tensor: torch.Tensor) -> torch.Tensor:
        leaf = tensor.clone().requires_grad_()
        return torch.autograd.grad(module.forward_features(leaf)[:, 0].sum(), leaf)[0].permute(0, 2, 3, 1)

    exact = slope(copy.deepcopy(case.original).double(), case.exact.double())
    row["tokens"] = hooks.forward_tokens(case.module, case.tensor)
    row["timm"] = difference(slope(case.module, case.tensor), exact)
    ours = jax.jit(jax.grad(lambda images, model: model(images).cls.sum()))
    row["jaxvit"] = difference(ours(case.images, case.model), exact)
    row["ratio"] = row["jaxvit"] / row["timm"]


def forward(case: Case, row: Row) -> None:
    """Images per second. One row also compiles timm in one piece, to compare with compiled blocks."""
    makers = {"jaxvit": case.ours, "timm eager": case.theirs, "timm blocks": case.compiled}
    if (case.job.size, case.job.precision) == ("small", "bfloat16") and case.job.pixels < 518:
        makers["timm compiled"] = partial(case.compiled, whole=True)
    row |= {"first call s": {}, "difference": {}}
    expected, runs = case.theirs()(), {}
    for name, make in makers.items():
        try:
            if name in ("timm blocks", "timm compiled") and left(case.options) < 30:
                raise TimeoutError("there was no time to compile")
            run = make()
            row["first call s"][name] = seconds_of(run)
            row["difference"][name] = difference(run()[0] if name == "jaxvit" else run(), expected)
            runs[name] = run
        except Exception as failure:  # whatever a compiler says; the others still run
            row[f"{name} failed"] = said(failure)
    timed = milliseconds(runs, case.options.seconds)
    row["GFLOP per image"] = case.flops() / 1e9
    row["ms"] = {name: timed.median(name) for name in runs}
    row["images per second"] = {name: 1e3 * case.batch / ms for name, ms in row["ms"].items()}
    row["TFLOP/s"] = {name: case.flops() * each / 1e12 for name, each in row["images per second"].items()}
    best = row["best of timm"] = min(runs.keys() - {"jaxvit"}, key=timed.median)
    row |= {"ratio": timed.ratio("jaxvit", best)} if "jaxvit" in runs else {}
    if CUDA and torch.cuda.get_device_name() in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"):
        of_peak = {name: each / PEAK[case.job.precision] for name, each in row["TFLOP/s"].items()}
        row["share of peak"] = of_peak | {"best of timm": of_peak[best]}


def sweep(case: Case, row: Row) -> None:
    """Milliseconds for each point of the grid of all layers and heads."""
    grid = jaxvit.grids.heads(case.model)
    points = [(layer, head) for layer in range(grid.shape[0]) for head in range(grid.shape[1])]
    row |= {"points": len(points), "hooked at once": 32}

    def edits(point: Any, clean: Any) -> Any:
        return jaxvit.ablate(case.model, "z", layers=point["layer"], heads=point["head"])

    def ours(images: Any) -> np.ndarray:
        more = {"batch_size": case.options.points, "progress": False}
        return jaxvit.sweep(case.model, images, edits, grid, jaxvit.cls_cosine, **more).values

    def theirs(run: Callable[..., torch.Tensor], *args: Any) -> np.ndarray:
        clean = hooks.forward(case.module, case.tensor).float()
        cls = run(case.module, case.tensor, points, *args).float()
        return as_numpy(torch.cosine_similarity(cls, clean[None], dim=-1))

    def batches() -> Iterator[jax.Array]:  # the sweep asks for the next one when it has finished the last
        for _ in range(4):
            asked.append(time.perf_counter())
            yield case.images

    start, found, asked = time.perf_counter(), ours(case.images), []
    row["first call s"] = time.perf_counter() - start
    with compiling() as compiled:
        ours(batches())
    second, *later = np.diff([*asked, time.perf_counter()]).tolist()
    row |= {"second call s": second, "second call s, compiling": sum(compiled, 0.0)}
    loop, at_once = partial(theirs, hooks.sweep_heads), partial(theirs, sweep_at_once, row["hooked at once"])
    row["difference"] = float(np.abs(found.reshape(len(points), -1) - loop()).max())
    row["difference of batched hooks"] = float(np.abs(at_once() - loop()).max())
    timed = take_turns({"hook": loop, "batched hooks": at_once}, case.options.seconds, rounds=(2, 10))
    seconds = {"jaxvit": second - sum(compiled, 0.0), "later": float(np.median(later))}
    seconds |= {name: timed.median(name) for name in timed.seconds}
    row["ms per point"] = {name: 1e3 * each / len(points) for name, each in seconds.items()}
    for mine in ("jaxvit", "later"):
        row[f"{mine} ÷ hooks"] = {name: seconds[mine] / seconds[name] for name in timed.seconds}


def sweep_at_once(module: Any, tensor: torch.Tensor, points: Sequence[tuple[int, int]], count: int) -> torch.Tensor:
    """[points, B, D]: as `hooks.sweep_heads`, with `count` points at once as copies of the images in one batch."""
    found = []
    for begin in range(0, len(points), count):
        chunk, added = points[begin : begin + count], []
        for layer in {layer for layer, _ in chunk}:
            attn = module.blocks[layer].attn
            keep = torch.ones(len(chunk), attn.num_heads, dtype=tensor.dtype)
            for i, (where, head) in enumerate(chunk):
                keep[i, head] = where != layer
            mask = keep.repeat_interleave(attn.head_dim, 1).repeat_interleave(len(tensor), 0)[:, None].to(tensor.device)
            added.append(attn.proj.register_forward_pre_hook(lambda _, inputs, mask=mask: (inputs[0] * mask,)))
        found.append(hooks.forward(module, tensor.repeat(len(chunk), 1, 1, 1)).unflatten(0, (len(chunk), -1)))
        for hook in added:
            hook.remove()
    return torch.cat(found)


def record(case: Case, row: Row) -> None:
    """What it costs to return the pattern's rows of [CLS] and registers, in all layers."""
    hooked = case.theirs(hooks.record_patterns, case.module.num_prefix_tokens)
    runs = {"jaxvit": case.ours(), "jaxvit recording": case.ours(("pattern",))}
    runs |= {"timm": case.theirs(), "timm recording": hooked}
    row["first call s"] = {name: seconds_of(run) for name, run in runs.items()}
    timed = milliseconds(runs, case.options.seconds)
    row["ms"] = {name: timed.median(name) for name in runs}
    row["ratio"] = {side: timed.ratio(f"{side} recording", side) for side in ("jaxvit", "timm")}


def memory(case: Case, row: Row) -> None:
    """MB at most beyond model and images: what XLA allots to its program, and what PyTorch takes.

    "seen" is what JAX took. That is known only where this is the first program that needs as much.
    """
    device = jax.local_devices()[0]
    program = jax.jit(final_tokens).lower(case.model, case.images).compile()
    if allotted := program.memory_analysis():
        row["jaxvit MB"] = (allotted.temp_size_in_bytes + allotted.output_size_in_bytes) / 1e6
    if before := device.memory_stats():
        wait(program(case.model, case.images))
        if (peak := device.memory_stats()["peak_bytes_in_use"]) > before["peak_bytes_in_use"]:
            row["jaxvit MB, seen"] = (peak - before["bytes_in_use"]) / 1e6
    if CUDA:
        wait(case.theirs()())
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        wait(case.theirs()())
        row["timm MB"] = (torch.cuda.max_memory_allocated() - held) / 1e6


KINDS: dict[str, tuple[Callable[[Case, Row], None], int | None]] = {
    "error": (errors, 8),
    "gradient": (gradient, 8),
    "forward": (forward, None),
    "sweep": (sweep, 8),
    "record": (record, None),
    "memory": (memory, 64),
}
"""What measures a kind of row, and the images at once; None: see `BATCHES`."""


def left(options: argparse.Namespace) -> float:
    """Seconds until no new row starts."""
    return options.limit - (time.perf_counter() - START)


def said(failure: BaseException) -> str:
    """Kind and text of an error, cut short."""
    return f"{type(failure).__name__}: {failure}"[:1500]


def measure(job: Job, options: argparse.Namespace) -> Row:
    """A row; its error is in it if it fails."""
    run, batch = KINDS[job.kind]
    row, start = job._asdict(), time.perf_counter()
    try:
        case = Case(job, batch or BATCHES[job.size][job.pixels >= 518], options)
        row["batch"] = case.batch
        with arithmetic(job.precision):
            run(case, row)
    except Exception as failure:
        row["failed"] = said(failure)
    row["took s"], case = time.perf_counter() - start, None
    torch.compiler.reset()  # it stops compiling, without a word, after some shapes and types of one function
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
    return row


# Tables ---------------------------------------------------------------------------------------------------------------

ERROR = "jaxvit={jaxvit:.1e}; timm={timm:.1e}; jaxvit ÷ timm={ratio:.2f}"
COLUMNS = {
    "error": ERROR,
    "gradient": ERROR,
    "forward": "jaxvit img/s={images per second[jaxvit]:.0f}; timm eager={images per second[timm eager]:.0f}; "
    "blocks compiled={images per second[timm blocks]:.0f}; all compiled={images per second[timm compiled]:.0f}; "
    "time ÷ timm's best={ratio:.2f}; TFLOP/s={TFLOP/s[jaxvit]:.1f}; of peak={share of peak[jaxvit]:.0%}; "
    "timm's of peak={share of peak[best of timm]:.0%}; difference={difference[jaxvit]:.0e}",
    "sweep": "points={points}; jaxvit ms/point={ms per point[jaxvit]:.2f}; later batches={ms per point[later]:.2f}; "
    "hook={ms per point[hook]:.2f}; batched hooks={ms per point[batched hooks]:.2f}; "
    "÷ hook={jaxvit ÷ hooks[hook]:.2f}; ÷ batched={jaxvit ÷ hooks[batched hooks]:.2f}; "
    "later ÷ hook={later ÷ hooks[hook]:.2f}; later ÷ batched={later ÷ hooks[batched hooks]:.2f}; "
    "first call s={first call s:.1f}; second call s={second call s:.1f}; difference={difference:.0e}",
    "record": "jaxvit ms={ms[jaxvit]:.1f}; recording={ms[jaxvit recording]:.1f}; ratio={ratio[jaxvit]:.2f}; "
    "timm ms={ms[timm]:.1f}; timm recording={ms[timm recording]:.1f}; timm's ratio={ratio[timm]:.2f}",
    "memory": "jaxvit MB={jaxvit MB:.0f}; seen={jaxvit MB, seen:.0f}; timm eager MB={timm MB:.0f}",
}
"""Kind of row -> titles, and what of the row stands under them."""


def lines(row: Row, titled: bool) -> list[str]:
    """A row of a Markdown table, under the titles of its kind if they are asked for. What it lacks is a dash."""
    shown = {f"{row['kind']:<17}": f"ViT-{row['size'][0]}, {row['pixels']} px, {row.get('batch')}"}
    shown["arithmetic"] = row["precision"]
    for column in COLUMNS[row["kind"]].split("; "):
        title, _, text = column.partition("=")
        try:
            shown[title] = text.format(**row)
        except KeyError:
            shown[title] = "-"
    body = [text.ljust(max(len(title), 7)) for title, text in shown.items()]
    head = [[title.ljust(7) for title in shown], ["-" * len(text) for text in body]] if titled else []
    return [f"| {' | '.join(each)} |" for each in [*head, body]]


def failures(row: Row) -> list[str]:
    """What failed in a row, a line each."""
    name = f"{row['kind']}, {row['size']}, {row['pixels']} px, {row['precision']}"
    return [f"- {name}: {key}: {' '.join(row[key].split())[:300]}" for key in row if key.endswith("failed")]


def table(results: Row) -> str:
    """All rows as Markdown, a table for each kind, and what failed as a list."""
    about = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    parts = [f"**{results['device']}**, driver {results['driver']}, {about}, {results['date']}"]
    for kind in COLUMNS:
        rows = [row for row in results["rows"] if row["kind"] == kind]
        parts.append("\n".join(text for i, row in enumerate(rows) for text in lines(row, titled=i == 0)))
    parts.append("\n".join(text for row in results["rows"] for text in failures(row)))
    return "\n\n".join(filter(None, parts))


RESULTS = Path(__file__).parent / "results" / "accelerators"
PAGE = Path(__file__).parents[1] / "docs" / "accelerators.md"


def keep(path: Path) -> None:
    """Copies results to benchmarks/results/accelerators, and writes the page of all that is kept there."""
    results = json.loads(path.read_text())
    RESULTS.mkdir(parents=True, exist_ok=True)
    name = "-".join(re.findall(r"\w+", results["device"].lower()))
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    _, _, models, kinds, arithmetics = __doc__.split("\n\n")
    tables = [table(json.loads(kept.read_text())) for kept in sorted(RESULTS.glob("*.json"))]
    title = "# On accelerators\n\nWritten by `python -m benchmarks.accelerator --keep FILE`. Below 1, jaxvit is faster."
    rows = "\n".join(f"    {line.strip()}" for line in kinds.splitlines())
    PAGE.write_text("\n\n".join([title, models, rows, arithmetics.strip(), *tables]) + "\n")
    print(f"wrote {PAGE}")


def header() -> Row:
    """The machine and the software."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "none"
    named = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    processor = f"{named[1] if named else platform.machine()}, {os.cpu_count()} cores"
    device, versions = torch.cuda.get_device_name() if CUDA else processor, ("jax", "jaxlib", "flax", "torch", "timm")
    return {"device": device, "jax device": jax.devices()[0].device_kind, "driver": driver, "processor": processor} | {
        "versions": {name: version(name) for name in versions},
        "date": datetime.date.today().isoformat(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "datasheet TFLOP/s": PEAK,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/accelerator.json"), help="results (%(default)s)")
    parser.add_argument("--sizes", nargs="+", choices=BATCHES, default=list(BATCHES), help="of the models")
    parser.add_argument("--pixels", nargs="+", type=int, default=[224, 518], help="after the first, only forward")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of rows")
    parser.add_argument("--seconds", type=float, default=6.0, help="how long alternatives take turns (%(default)s)")
    parser.add_argument("--limit", type=float, default=400.0, help="seconds after which no row starts (%(default)s)")
    parser.add_argument("--points", type=int, help="points that jaxvit's sweep runs at once, instead of its default")
    parser.add_argument("--smoke", action="store_true", help="models of two blocks, batches of 2")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the tables of FILE")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="keep FILE, and write docs/accelerators.md")
    options = parser.parse_args()
    if options.keep:
        keep(options.keep)
        return
    if options.table:
        print(table(json.loads(options.table.read_text())))
        return
    rows: list[Row] = []
    results = header() | {"rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    print(json.dumps(results), flush=True)
    for job in [job for job in plan(options.sizes, options.pixels) if job.kind in options.only]:
        if left(options) <= 0:
            print(f"\nThe limit is reached; this row and those after it are left out: {' '.join(map(str, job))}")
            break
        rows.append(measure(job, options))
        titled = len(rows) < 2 or rows[-2]["kind"] != job.kind
        print("\n" * titled + "\n".join([*lines(rows[-1], titled), *failures(rows[-1])]), flush=True)
        results["seconds"] = time.perf_counter() - START
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

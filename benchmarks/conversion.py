"""How much memory and time the conversion of a checkpoint of gigabytes takes.

    python -m benchmarks conversion                    DINOv2 giant, 4.5 GB
    python -m benchmarks conversion --size 7b          the largest DINOv3, 27 GB
    python -m benchmarks conversion --write            and put the table into docs/conversion.md

Writes random numbers in Meta's names and shapes as safetensors, tensor by tensor, and converts the file, to a folder
(`convert.convert_to_folder`) and to a model in memory (`convert.load`), each in a process of its own. Needs twice the
size on disk, and the second needs somewhat more than the size in memory: it is left out for 7b.

Peaks are beyond what the process holds before, a tiny model having been converted in it. RssAnon is memory that is the
process's own, sampled every 2 ms; VmHWM is the kernel's own peak, with pages of files, which it can take back. They are
divided by what has to be held at once: the tensors of one rule for one block, and the model where it is the result. The
aim is 1.3. In transformers' names, queries, keys and values are tensors of their own, and held once more when joined.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import convert
from convert.sources import Source
from jaxvit import ViTConfig
from jaxvit.io.checkpoint import SafetensorsFile, writing

MARK = "<!-- conversion -->"
HEAD = """\
| checkpoint | converted to | seconds, of which checksum | held at once | peak of RssAnon ÷ it | of VmHWM ÷ it |
|---|---|---|---|---|---|
"""
SIZES = {
    "giant": ("DINOv2 giant", ViTConfig.dinov2("giant", grid=(37, 37))),
    "7b": (
        "DINOv3 7B",
        ViTConfig(
            depth=40,
            width=4096,
            heads=32,
            hidden=8192,
            mlp="swiglu",
            registers=4,
            patch=16,
            positions=False,
            rope="bfloat16",
            qkv_bias=False,
        ),
    ),
}
TINY = ViTConfig(depth=1, width=64, heads=1, hidden=64, mlp="swiglu", patch=14, grid=(2, 2))


def shapes(c: ViTConfig) -> dict[str, tuple[int, ...]]:
    """What Meta's file of a model with SwiGLU holds."""
    found: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, c.width),
        "mask_token": (1, c.width),
        "patch_embed.proj.weight": (c.width, 3, c.patch, c.patch),
        "patch_embed.proj.bias": (c.width,),
    }
    if c.rope:
        found["storage_tokens"] = (1, c.registers, c.width)
    else:
        found["pos_embed"] = (1, 1 + c.grid[0] * c.grid[1], c.width)
    norms = ["norm"]
    linears = {}
    for i in range(c.depth):
        at = f"blocks.{i}"
        norms += [f"{at}.norm1", f"{at}.norm2"]
        found |= {f"{at}.{scale}.gamma": (c.width,) for scale in ("ls1", "ls2")}
        found[f"{at}.attn.qkv.weight"] = (3 * c.width, c.width)
        if c.qkv_bias:
            found[f"{at}.attn.qkv.bias"] = (3 * c.width,)
        linears[f"{at}.attn.proj"] = (c.width, c.width)
        gates = {"w1": c.hidden, "w2": c.hidden} if c.rope else {"w12": 2 * c.hidden}
        linears |= {f"{at}.mlp.{gate}": (rows, c.width) for gate, rows in gates.items()}
        linears[f"{at}.mlp.w3"] = (c.width, c.hidden)
    for name, (rows, columns) in linears.items():
        found |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    return found | {f"{name}.{kind}": (c.width,) for name in norms for kind in ("weight", "bias")}


def write_checkpoint(path: Path, sizes: Mapping[str, tuple[int, ...]]) -> None:
    """Random numbers under these names; of which a million, over and over, are held."""
    noise = 0.02 * np.random.default_rng(0).standard_normal(2**20, np.float32)
    with writing(path, {name: (np.float32, shape) for name, shape in sizes.items()}) as put:
        for name, shape in sizes.items():
            count = math.prod(shape)
            for start in range(0, count, len(noise)):
                put(name, start, noise[: count - start])


def largest_step(path: Path) -> int:
    """Bytes of the tensors that one rule reads for one block, where they are most."""
    file = SafetensorsFile(path)
    layout, tensors, config = convert.recognise(Source(file, {}))
    return max(
        sum(4 * math.prod(file.shape(tensors.names[source.format(i=0)])) for source in rule.sources)
        for rule in layout.rules(config, tensors)
    )


# In a process of its own ----------------------------------------------------------------------------------------------


class Peaks(NamedTuple):
    """Seconds, and bytes beyond what was held before."""

    seconds: float
    anonymous: int
    resident: int


def status(name: str) -> int:
    """Bytes, as Linux tells of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


@contextmanager
def sampled(name: str, seconds: float = 2e-3) -> Iterator[list[int]]:
    """A list of what `status(name)` was; whole when the block ends."""
    samples: list[int] = []
    done = threading.Event()

    def sample() -> None:
        while not done.wait(seconds):
            samples.append(status(name))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()
        samples.append(status(name))


def run(source: Path, target: str) -> Any:
    if target == "memory":
        return convert.load(source)
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        return convert.convert_to_folder(source, Path(folder) / "model")


def measure(source: Path, target: str) -> Peaks:
    with tempfile.TemporaryDirectory() as folder:
        tiny = Path(folder) / "tiny.safetensors"
        write_checkpoint(tiny, shapes(TINY))
        run(tiny, target)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free, but kept by the allocator, would hide as much of the peak
    anonymous, resident = status("RssAnon"), status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts over
    start = time.perf_counter()
    with sampled("RssAnon") as samples:
        result = run(source, target)
    seconds = time.perf_counter() - start
    del result
    return Peaks(seconds, max(samples) - anonymous, status("VmHWM") - resident)


# Tables ---------------------------------------------------------------------------------------------------------------


def rows(size: str, place: Path | None) -> Iterator[str]:
    name, config = SIZES[size]
    with tempfile.TemporaryDirectory(dir=place) as folder:
        source = Path(folder) / f"{size}.safetensors"
        write_checkpoint(source, shapes(config))
        total, step = source.stat().st_size, largest_step(source)
        start = time.perf_counter()
        convert.sources.sha256(source)
        checksum = time.perf_counter() - start
        for target in ("a folder",) if size == "7b" else ("a folder", "memory"):
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.conversion", source, target], capture_output=True, text=True
            )
            if done.returncode:
                raise RuntimeError(f"{target}: {done.stderr.strip().splitlines()[-1]}")
            peaks = Peaks(*json.loads(done.stdout))
            held = step + (total if target == "memory" else 0)
            seconds = f"{peaks.seconds:.0f}, {checksum:.0f}"
            quotients = f"{peaks.anonymous / held:.2f} | {peaks.resident / held:.2f}"
            yield f"| {name}, {total / 1e9:.1f} GB | {target} | {seconds} | {held / 1e6:.0f} MB | {quotients} |"


def main(size: str, write: bool, place: Path | None) -> None:
    readme = Path("docs/conversion.md")
    parts = readme.read_text().split(MARK)
    if write and len(parts) != 3:
        raise SystemExit(f"docs/conversion.md has no two lines {MARK}, between which the table would go")
    print(HEAD, end="")
    lines = []
    for line in rows(size, place):
        print(line, flush=True)
        lines.append(line)
    if write:
        readme.write_text(f"{parts[0]}{MARK}\n{HEAD}" + "\n".join(lines) + f"\n{MARK}{parts[2]}")


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2])))

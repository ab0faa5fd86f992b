"""What a run would fetch and how long it would take, without doing it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxvit import CheckpointError, ViTConfig, read_config
from jaxvit.convert import catalogue
from jaxvit.model.params import abstract, to_params

from ..core.controls import controls_of
from ..core.passes import Request
from ..core.trace import observe
from ..models import presets
from ..models.subjects import Spec, random_weights

WIDTHS = (384, 1024)
"""Of the models this machine is timed with."""


def announce(specs: Sequence[Spec], request: Request, preset: str | None, folder: Path) -> None:
    """Prints models, downloads, images and an estimate of the time."""
    images = len(request.images) or presets.COCO
    where = str(folder) if request.images else "to be given with --images"
    print(f"images: {images}, {where}")
    labelled = len(request.labelled.sources) if request.labelled else 0
    if reading := [e.id for e in request.experiments if "labelled" in e.passes]:
        most = request.options["labelled"]["per_class"]
        if request.labelled:
            labelled = min(labelled, most * len(request.labelled.classes))
        elif preset == "paper":
            labelled = most * presets.IMAGENET_CLASSES
        print(f"labelled images, for {', '.join(reading)}: {labelled or 'none, to be given with --labelled'}")
    print(f"experiments: {', '.join(e.id for e in request.experiments)}")
    print("timing this machine ..", flush=True)
    rates = {width: measured(width) for width in WIDTHS}
    print(f"\n{'model':32}{'parameters':>12}{'float32':>10}  {'weights':12}{'forward':>10}{'estimate':>10}  source")
    total, fetch, memory = 0.0, 0.0, dict[str, int]()
    for spec in specs:
        config = config_of(spec)
        if config is None:
            print(f"{spec.title:32}{'?':>12}{'?':>10}  {weights(spec):12}{'?':>10}{'?':>10}  {spec.source}")
            continue
        parameters = sum(int(np.prod(leaf.shape)) for leaf in to_params(abstract(config)).values())
        once = flops(config, request.size)
        seconds = once / np.interp(config.width, WIDTHS, [rates[w] for w in WIDTHS])
        whole = seconds * forwards(config.registers + spec.test_time_registers, request, images, labelled, spec)
        total += whole
        wider = replace(config, registers=config.registers + spec.test_time_registers)
        for e in request.experiments:
            memory[e.id] = max(memory.get(e.id, 0), e.moments(wider, request.options[e.id]))
        state = weights(spec)
        fetch += 4e-9 * parameters if state == "to fetch" else 0
        sizes = f"{parameters / 1e6:>10.1f} M{4e-9 * parameters:>7.2f} GB"
        print(f"{spec.title:32}{sizes}  {state:12}{1e3 * seconds:>7.0f} ms{spell(whole):>10}  {spec.source}")
    print(f"\nto fetch: at least {fetch:.1f} GB (a CLIP's file also holds its text side)")
    print(f"time on this machine ({jax.devices()[0].device_kind}, {jax.local_device_count()} devices): {spell(total)}")
    for id, most in memory.items():
        if most:
            print(
                f"memory for what {id} sums up over images: up to {1e-9 * most:.1f} GB; see {id} in jaxvit run --help"
            )
    for note in presets.PRESETS[preset]().notes if preset else ():
        print(f"note: {note}")


def forwards(registers: int, request: Request, images: int, labelled: int, spec: Spec) -> float:
    """How many times the model runs over one image, all passes together; attention of all queries counts a quarter."""
    passes = {name for e in request.experiments for name in e.passes}
    controlled = min(request.control_images, images)
    every = sum(control.where == "every" for control in controls_of(registers))
    count = 1.25 * images if passes & {"clean", "controls"} else 0
    count += (1 + every) * controlled if "controls" in passes else 0
    count += labelled if "labelled" in passes else 0
    return count + (3 * controlled if "test-time registers" in passes and not registers else 0)


def config_of(spec: Spec) -> ViTConfig | None:
    """Without fetching anything; None if that cannot be known."""
    if spec.random:
        return ViTConfig(**spec.random)
    for known in catalogue.known():
        if spec.source in known.sources:
            return known.config
    try:
        return read_config(spec.source)[0]
    except CheckpointError:
        return presets.embedded.CONFIG if Path(spec.source).name == Path(presets.embedded.MODEL_FILE).name else None


def weights(spec: Spec) -> str:
    """Whether they are here."""
    if spec.random:
        return "random"
    if Path(spec.source).exists():
        return "here"
    try:
        from huggingface_hub import scan_cache_dir
        from huggingface_hub.errors import CacheNotFound

        cached = any(repo.repo_id == spec.source for repo in scan_cache_dir().repos)
    except (ImportError, CacheNotFound):
        cached = False
    return "cached" if cached else "to fetch"


def flops(config: ViTConfig, size: int | None) -> float:
    """Of one forward pass of one image: its matrix products."""
    tokens, width = config.layout(*config.preprocess.at(size).size).tokens, config.width
    matrices = 4 * width**2 + (3 if config.mlp == "swiglu" else 2) * width * config.hidden
    return 2.0 * config.depth * (tokens * matrices + 2 * tokens**2 * width)


def measured(width: int, batch: int = 8, depth: int = 2) -> float:
    """Operations in a second, of this machine's run of a model of that width, with all that experiments read."""
    config = ViTConfig(
        depth=depth, width=width, heads=width // 64, hidden=4 * width, patch=14, grid=(16, 16), registers=4
    )
    model, images = random_weights(config), jnp.zeros((batch, 224, 224, 3))
    run = jax.jit(lambda model, images: observe(model, images).after)
    jax.block_until_ready(run(model, images))
    times = []
    for _ in range(3):
        started = time.perf_counter()
        jax.block_until_ready(run(model, images))
        times.append(time.perf_counter() - started)
    return batch * flops(config, 224) / float(np.median(times))


def spell(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

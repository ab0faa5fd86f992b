"""What holds in every test: strict promotion of dtypes and ranks, no warnings, shapes checked at run time."""

import ctypes
import gc
import os
import resource
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

# The suite tests CPU semantics; without this, JAX would grab a GPU for a handful of tiny programs.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Its programs compile for longer than they run. XLA_FLAGS= runs the suite on optimised ones.
FLAGS = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):  # XLA aborts on flags it does not know: another version may lack these
    # Without the emitters, and in one piece, programs compile three to five times as fast.
    FLAGS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("XLA_FLAGS", FLAGS)

# Several processes share the cores: PyTorch's threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvit import ViT, ViTConfig, cast
from jaxvit.model.params import abstract, from_params, to_params

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def random_model(config: ViTConfig, seed: int = 0) -> ViT:
    """A model with nothing at its initial value: norms, LayerScale and tokens would hide errors at theirs."""
    rng = np.random.default_rng(seed)  # NumPy, as JAX would compile a program for every shape

    def draw(name: str, shape: tuple[int, ...]) -> jax.Array:
        center = 1.0 if name.endswith(("scale", "gamma")) else 0.0
        return jnp.asarray(center + 0.2 * rng.normal(size=shape), jnp.float32)

    shapes = to_params(abstract(config))
    return from_params(config, {name: draw(name, leaf.shape) for name, leaf in shapes.items()})


@cache
def double(config: ViTConfig, seed: int = 0) -> ViT:
    """The same model in float64."""
    with jax.enable_x64(False):
        model = random_model(config, seed)
    with jax.enable_x64(True):
        return cast(model, jnp.float64)


@pytest.fixture
def float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def random_images(seed: int, batch: int, height: int, width: int | None = None) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, height, width or height, 3)), jnp.float32)


TINY = dict(depth=3, width=32, heads=4, hidden=48, patch=4, grid=(5, 5))
"""A model small enough to test laws on, with more than one of everything; its patches count differs from its tokens."""

FAMILIES = {
    "dinov2": ViTConfig(**TINY),
    "dinov2 with registers": ViTConfig(**TINY, registers=3),
    "dinov2 giant": ViTConfig(**TINY, mlp="swiglu"),
    "clip": ViTConfig(**TINY, mlp="quick_gelu", layer_scale=False, patch_bias=False, pre_norm=True, eps=1e-5),
    "dinov2 giant with registers": ViTConfig(**TINY, registers=3, mlp="swiglu"),
}


@pytest.fixture(params=["dinov2", "dinov2 with registers", "clip", "dinov2 giant with registers"], scope="session")
def model(request: pytest.FixtureRequest) -> ViT:
    """A random model of each family."""
    return random_model(FAMILIES[request.param])


GROWTH = 0.4e9
"""Bytes that a process may grow by before its programs are dropped."""


def memory() -> int:
    """Bytes that this process holds; 0 where the system does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else 0


def tidy() -> None:
    """Gives back what was freed: glibc keeps what lies in small pieces."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


@pytest.fixture(autouse=True, scope="module")
def release() -> Iterator[None]:
    """Frees what a module compiled, or a process grows to gigabytes: the next one needs other programs."""
    yield
    jax.clear_caches()
    tidy()


@pytest.fixture(autouse=True)
def bounded(request: pytest.FixtureRequest) -> Iterator[None]:
    """The same within a module, where its programs have grown large."""
    yield
    if memory() - HELD.setdefault(request.module, memory()) > GROWTH:
        jax.clear_caches()
        tidy()
        HELD[request.module] = memory()


HELD: dict[object, int] = {}
"""What the process held after the first test of a module, or when its programs were dropped."""


# --- the order of files, each of which one process runs

LONGEST_FIRST = (
    *("run", "parity", "interventions", "families", "paper_cka", "paper_beyond", "paper_norms", "sweeps", "decompose"),
    *("export", "vit", "paper_torch", "edits", "one_shot", "paper_report", "browser", "convert_cli", "engine", "docs"),
    *("readme", "safety", "convert", "hub", "properties", "streaming", "images"),
)
"""So that no process ends with a long file while the others have none left; the rest follow as they are."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {f"test_{name}.py": rank for rank, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


# --- how much memory each process took at most

GB = 1e9 if sys.platform == "darwin" else 1e6  # ru_maxrss is in bytes there, and in KB elsewhere
PEAKS: dict[str, float] = {}


def pytest_sessionfinish(session: pytest.Session) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GB
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["peak"] = peak
    else:
        PEAKS["this process"] = peak


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node: Any) -> None:
    if "peak" in (output := getattr(node, "workeroutput", {})):  # a worker that crashed has told nothing
        PEAKS[node.gateway.id] = output["peak"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    peaks = ", ".join(f"{name} {peak:.2f} GB" for name, peak in sorted(PEAKS.items()))
    terminalreporter.write_line(f"memory at most: {peaks}")

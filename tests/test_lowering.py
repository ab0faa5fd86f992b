"""Every program that the library runs can be lowered for TPU and CUDA; and what devices tell each other is counted."""

import os
import subprocess
import sys
import textwrap
from importlib import import_module
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_images, random_model
from PIL import Image
from recorder import recorded

import jaxvit
from jaxvit import Preprocess, ViTConfig, cli

ROOT = Path(__file__).parents[1]
CONFIG = ViTConfig(
    **dict(depth=2, width=32, heads=2, hidden=48, grid=(4, 4), registers=2), preprocess=Preprocess(56, 56)
)
PLATFORMS = ("tpu", "cuda")
MODULES = (
    *("analysis.features", "analysis.look", "analysis.over_images", "analysis.readouts", "analysis.windows"),
    *("interventions.registers", "interventions.statistics", "interventions.sweeps", "io.images", "tasks.classify"),
    *("experiments.core.examples", "experiments.evaluate.study", "experiments.matched.train"),
    *("experiments.runner.store", "training.finetune"),
)
"""Where programs are compiled; loaded before they are watched."""


def programs_of(go):
    """Runs `go`, and lowers all that it ran for the other platforms. Returns the names of the programs."""
    for name in MODULES:
        import_module(f"jaxvit.{name}")
    with recorded() as seen:
        go()
    for function, args, kwargs in seen:
        for platform in PLATFORMS:
            function.trace(*args, **kwargs).lower(lowering_platforms=(platform,))
    return {getattr(function, "__qualname__", "") for function, *_ in seen}


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def place(model, tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("lowering"), np.random.default_rng(0)
    jaxvit.save(model, folder / "model")
    for number in range(8):
        path = folder / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (70, 80, 3), dtype=np.uint8)).save(path)
    return folder


def test_the_experiments(place, tmp_path):
    words = ["--models", str(place / "model"), "--images", str(place / "images"), "--out", str(tmp_path / "out")]
    names = programs_of(lambda: cli.main(["run", *words, "--labelled", str(place / "images")]))
    assert any("run_pass" in name for name in names) and "_explain" in names


def test_commands(place, tmp_path):
    model, images, out = str(place / "model"), str(place / "images"), str(tmp_path / "out")
    fine = ["--train", "last=1", "--epochs", "1", "--batch-size", "2", "--out", out, "--no-evaluate"]
    photograph = str(next((place / "images").rglob("*.png")))

    def go():
        assert cli.main(["look", photograph, "--model", model, "--out", str(tmp_path / "look.png")]) == 0
        with jax.numpy_dtype_promotion("standard"):
            assert cli.main(["finetune", model, "--labelled", images, *fine]) == 0

    with jax.numpy_dtype_promotion("standard"):
        names = programs_of(go)
    assert {"_measure", "finetune.<locals>.step", "finetune.<locals>.right"} <= names


def test_functions(model, place):
    images = random_images(0, 4, 56)
    heads, grid = (
        lambda p, clean: jaxvit.ablate(model, "z", layers=p["layer"], heads=p["head"]),
        jaxvit.grids.heads(model),
    )
    cuts = lambda p, clean: jaxvit.knockout(model, query=p["query"], key=p["key"], layers=p["layer"])  # noqa: E731
    edges = jaxvit.grids.group_edges(model, "prefix")
    paths = jaxvit.find_images(place / "images")

    def go():
        for edits, points in ((heads, grid), (cuts, edges)):
            jaxvit.sweep(model, images, edits, points, progress=False)
            jaxvit.attribute(model, images, edits, points, lambda out, clean: out.cls[:, 0], progress=False)
        jaxvit.over_images(lambda m, x: m(x, record="v").trace["v"][-1], model, [images], progress=False)
        jaxvit.ActivationStats.collect(model, [images], ["resid_pre", "z"], progress=False)
        jaxvit.features(model, paths, ["cls", "tokens@[0,-1]:normed"])
        jaxvit.read_windows(model, random_images(0, 1, 84, 112), "patches:grid", jaxvit.Windows(56))
        jaxvit.find_register_neurons(model, [images], count=2, threshold=0.5, progress=False)

    names = programs_of(go)
    assert {"_sweep_programs.<locals>.run", "_attribution_programs.<locals>.slopes", "_features", "_moments"} <= names


def test_training_of_arms():
    from jaxvit.experiments.matched import presets, train
    from jaxvit.experiments.matched.arms import ARMS
    from jaxvit.experiments.matched.data import Scenes

    base = presets.sized(3, 16, 2, 24, 8, 32)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 4), dtype=np.uint8)
    scenes = Scenes(pixels, np.arange(8), 8)

    def go():
        train.train(ARMS["patches-only"], base, scenes, train.Recipe(2, batch=4, warmup=1), (0, 1))

    with jax.numpy_dtype_promotion("standard"):
        names = programs_of(go)
    assert any("steps" in name for name in names)


def test_what_a_platform_lacks_is_found(monkeypatch):
    """Attention whose kernel only a CPU has, in a program of the library."""
    from jaxvit.analysis import over_images

    def kernel(x):
        return jax.lax.platform_dependent(x, cpu=lambda x: x + 1)

    monkeypatch.setattr(over_images, "probe", jax.jit(kernel), raising=False)
    with pytest.raises(NotImplementedError):
        programs_of(lambda: over_images.probe(jnp.zeros(2)))


# Between devices ------------------------------------------------------------------------------------------------------

SCRIPT = """
    import collections, re
    import jax, numpy as np
    from conftest import FAMILIES, random_images, random_model
    from recorder import recorded
    import jaxvit
    from jaxvit import Take

    KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"

    def told(function, *args, **kwargs):
        text = function.lower(*args, **kwargs).compile().as_text()
        return dict(collections.Counter(re.findall(rf"= .*? ({KINDS})(?:-start)?\\(", text)))

    model, images = random_model(FAMILIES["dinov2 with registers"]), random_images(0, 16, 20)
    cut = jaxvit.knockout(model, query="patches", key="registers")
    RUNS = {
        "plain": lambda m, x: m(x).cls,
        "recorded": lambda m, x: m(x, record={"pattern": Take(tokens="all"), "resid_post": Take()}).trace,
        "edited": lambda m, x: m(x, cut).patches,
        "gradient of images": lambda m, x: jax.grad(lambda x: m(x).cls.sum())(x),
    }
    GRADIENT = lambda m, x: jax.grad(lambda m: m(x).cls.sum())(m)
    # The blocks are one block in a loop, whose program counts once.
    for mesh, block in ((jaxvit.parallel.mesh(), 0), (jaxvit.parallel.mesh(model=2), 2)):
        placed, spread = jaxvit.parallel.place(model, mesh), jaxvit.parallel.spread(images, mesh)
        for name, run in RUNS.items():
            found = told(jax.jit(run), placed, spread)
            passes = 2 if name.startswith("gradient") else 1
            assert found == ({"all-reduce": passes * block} if block else {}), (mesh, name, found)
    placed = jaxvit.parallel.place(model, jaxvit.parallel.mesh())
    found = told(jax.jit(GRADIENT), placed, jaxvit.parallel.spread(images, jaxvit.parallel.mesh()))
    assert set(found) == {"all-reduce"}, found  # of parameters: their sum over images

    heads = lambda point, clean: jaxvit.ablate(model, "z", layers=point["layer"], heads=point["head"])
    pictures = list(np.random.default_rng(0).integers(0, 256, (16, 20, 20, 3), dtype=np.uint8))
    import jaxvit.interventions.sweeps, jaxvit.interventions.statistics, jaxvit.analysis.features
    mesh = dict(mesh=jaxvit.parallel.mesh())
    with recorded() as seen:
        jaxvit.sweep(model, images, heads, jaxvit.grids.heads(model), progress=False, **mesh)
        jaxvit.attribute(
            model, images, heads, jaxvit.grids.heads(model), lambda out, clean: out.cls[:, 0], progress=False, **mesh
        )
        jaxvit.over_images(lambda m, x: m(x).cls, model, [images], progress=False, **mesh)
        jaxvit.features(model, pictures, ["cls"], size=20, batch_size=16, **mesh)
        jaxvit.ActivationStats.collect(model, [images], "resid_pre", progress=False, **mesh)
    names = set()
    for function, args, kwargs in seen:
        name = function.__qualname__
        found = told(function, *args, **kwargs)
        names.add(name)
        assert set(found) <= ({"all-reduce"} if name == "_moments" else set()), (name, found)  # sums over images
    assert {"_sweep_programs.<locals>.run", "_attribution_programs.<locals>.slopes", "_moments"} <= names, names
    print("counted")
"""


def test_data_parallel_programs_tell_each_other_nothing_and_model_parallel_ones_two_sums_a_block():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = os.environ | {
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)]),
    }
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "counted" in done.stdout, done.stderr

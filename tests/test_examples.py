"""The example in the docstring of every public name runs, and its values have the shapes that its comments say."""

import ast
import inspect
import re
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import random_images, random_model
from flax import nnx
from PIL import Image

import jaxvit
from jaxvit import Preprocess, Take, ViTConfig, convert, training
from jaxvit.analysis import decompose, similarity
from jaxvit.interventions import grids
from jaxvit.io import parallel
from jaxvit.model.params import from_params, to_params
from jaxvit.tasks import classify, dense, match, score

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS))
import generate

CONFIG = ViTConfig(
    **dict(depth=12, width=24, heads=6, hidden=32, grid=(4, 4), registers=4, classes=300, mask_token=True),
    preprocess=Preprocess(56, 56),
)
SIZES = {"B": 2, "D": 24, "L": 12, "H": 6, "R": 4, "G": 6, "Q": 5, "T": 21, "S": 25, "N": 16, "K": 4, "P": 5}

ELSEWHERE = {
    "jaxvit.convert.load": "test_hub.py",
    "jaxvit.convert.load_described": "test_hub.py",
    "jaxvit.Provenance": "test_provenance.py",
    "jaxvit.io.parallel.mesh": "test_parallel.py, docs/parallel.md",
    "jaxvit.io.parallel.place": "docs/parallel.md",
    "jaxvit.io.parallel.start": "test_processes.py",
}
"""What needs a hub, eight devices or several processes here, and where it is tested."""

NAMES = re.findall(r":: (jaxvit[\w.]+)", "\n".join(dict(generate.api_pages((DOCS / "names.md").read_text())).values()))


def examples_of(name: str) -> list[str]:
    """The code under `Example:` in the docstring of a name, and of its methods."""
    value = generate.resolved(name)
    texts = [inspect.getdoc(value) or ""]
    if isinstance(value, type):
        texts += [
            inspect.getdoc(each) or "" for each in vars(value).values() if callable(each) or hasattr(each, "__func__")
        ]
    return [
        textwrap.dedent(found[1])
        for text in texts
        for found in [re.search(r"^Example:\n\n((?: {4}.*\n?|\n)+)", text, re.MULTILINE)]
        if found
    ]


def outlying_model():
    """Of random weights; one patch stands apart, as registers' neurons are looked for where patches do."""
    params = to_params(random_model(CONFIG))
    params["positions"] = params["positions"].at[0, 3].multiply(300)
    return from_params(CONFIG, params)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the files that examples name."""
    folder, rng = tmp_path_factory.mktemp("examples"), np.random.default_rng(0)
    (folder / "photographs").mkdir()
    for number in range(8):
        pixels = rng.integers(0, 256, (60, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photographs" / f"{number}.jpg")
    for name, shape in (("photo", (480, 640, 3)), ("large", (574, 588, 3))):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{name}.jpg")
    model = outlying_model()
    jaxvit.save(model, folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        jaxvit.features(model, "photographs", ["cls", "patch_mean"], out="features.zarr", progress=False)
    return folder


@pytest.fixture(scope="module")
def known(place):
    """What examples take for granted."""
    model, images = outlying_model(), random_images(0, 2, 56)
    rng, paths = np.random.default_rng(0), jaxvit.find_images(place / "photographs")
    stats = jaxvit.ActivationStats.collect(model, jaxvit.stream(paths, CONFIG, 8), "resid_pre", progress=False)
    learn, frozen = training.split(training.attach_head(model, 10, key=jax.random.key(0)), "head", "blocks[-2:]")
    names = {name: getattr(jaxvit, name) for name in jaxvit.__all__}
    for module in (decompose, similarity, parallel, match, dense, classify, score):
        names |= {name: value for name, value in vars(module).items() if callable(value) and not name.startswith("_")}
    names |= {name: getattr(training, name) for name in training.__all__ if name != "add_registers"}

    def edits(point, clean):
        return jaxvit.ablate(model, "z", layers=point["layer"], heads=point["head"])

    return names | dict(
        **dict(jax=jax, jnp=jnp, np=np, nnx=nnx, optax=optax, jaxvit=jaxvit, convert=convert, grids=grids, Take=Take),
        **dict(model=model, images=images, other_images=random_images(1, 2, 56), paths=paths, stats=stats),
        **dict(neurons=jaxvit.find_register_neurons(model, jaxvit.stream(paths, CONFIG, 8), count=4, progress=False)),
        **dict(out=model(images), layout=model.layout, direction=jnp.ones(24), v=jnp.ones(24), key=jax.random.key(0)),
        **dict(learn=learn, frozen=frozen, frames=rng.integers(0, 256, (2, 300, 280, 3), dtype=np.uint8)),
        **dict(a=rng.normal(size=(4, 4, 24)), mask=np.zeros((1, 1, 1, 6, 6), np.float32)),
        **dict(features=rng.normal(size=(60, 24)).astype(np.float32), labels=np.arange(60) % 10),
        **dict(masks=np.arange(3)[:, None, None].repeat(56, 1).repeat(56, 2)),
        **dict(patches=rng.normal(size=(3, 4, 4, 24)).astype(np.float32)),
        **dict(measure=lambda model, images: model(images).cls, mesh=parallel.mesh(), edits=edits),
        **{name: similarity.StreamingCKA() for name in ("first", "second")},
    )


def run(code: str, names: dict) -> int:
    """Runs the lines, and compares shapes with comments such as `# [B, D]`. Returns how many were compared."""
    compared, lines = 0, code.splitlines()
    for statement in ast.parse(code).body:
        part = ast.Module([statement], [])
        comment = re.search(r"# \[([\w, +]+)\]", lines[(statement.end_lineno or 1) - 1])
        if not isinstance(statement, ast.Expr | ast.Assign):
            exec(compile(part, "example", "exec"), names)
            continue
        if isinstance(statement, ast.Expr):
            value = eval(compile(ast.Expression(statement.value), "example", "eval"), names)
        else:
            exec(compile(part, "example", "exec"), names)
            target = statement.targets[0]
            value = names[target.id] if isinstance(target, ast.Name) else None
        if comment and hasattr(value, "shape"):
            told = [word.strip() for word in comment[1].split(",")]
            assert len(value.shape) == len(told), (lines[statement.lineno - 1], value.shape)
            for word, size in zip(told, value.shape, strict=True):
                assert word not in SIZES or SIZES[word] == size, (lines[statement.lineno - 1], value.shape)
            compared += 1
    return compared


@pytest.mark.filterwarnings("ignore:the fit has not converged")
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ELSEWHERE])
def test_the_example_runs(name, place, known, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for path in place.iterdir():
        (tmp_path / path.name).symlink_to(path)
    own = {"add_registers": training.add_registers} if name.startswith("jaxvit.training") else {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for code in examples_of(name):
            run(code, {**known, **own})


def test_every_name_has_an_example():
    """Errors and results of functions whose examples show them have none."""
    shown = {"SITES", "CheckpointError", "ImageError", "FeaturesError", "ConversionError"}
    shown |= {"CKA", "Fit", "Probe", "Classifier", "Score", "Relocate"}
    assert {name.rpartition(".")[2] for name in NAMES if not examples_of(name)} <= shown
    assert set(ELSEWHERE) <= set(NAMES)


def test_a_wrong_shape_in_a_comment_is_found(known):
    assert run("model(images).cls  # [B, D]", dict(known)) == 1
    with pytest.raises(AssertionError):
        run("model(images).cls  # [B, N]", dict(known))

"""Programs that run without jaxvit."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxvit
from experiments.models.subjects import random_weights
from jaxvit import Preprocess, ViTConfig, cli
from jaxvit.analysis.stablehlo import PROGRAM, write_program

CONFIG = ViTConfig(
    depth=2, width=16, heads=2, hidden=24, patch=4, grid=(3, 3), registers=2, classes=5, preprocess=Preprocess(12, 12)
)
TAKE = ("cls", "logits", "maps=pattern@-1:cls", "resid_post@[0,1]:registers")
WITHOUT = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
assert not [name for name in sys.modules if name.split(".")[0] in ("jaxvit", "flax")]
"""


def run(folder, images, tmp_path):
    np.save(tmp_path / "images.npy", images)
    words = [sys.executable, "-c", WITHOUT, folder / "run.py", tmp_path / "images.npy", tmp_path / "outputs.npz"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.load(tmp_path / "outputs.npz")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_program_runs_in_a_process_without_jaxvit(dtype, tmp_path):
    model = random_weights(CONFIG, dtype)
    folder = write_program(model, tmp_path / "program", TAKE)
    images = np.random.default_rng(0).normal(size=(3, 12, 12, 3)).astype("float32")
    expected = jaxvit.read_out(model, jnp.asarray(images), TAKE)
    found = run(folder, images, tmp_path)
    assert set(found) == set(expected)
    for name, a in expected.items():
        wide = np.asarray(a, np.float32)
        within = 1e-6 if dtype == "float32" else 2e-2
        assert np.abs(found[name] - wide).max() <= within * np.abs(wide).max()
    about = json.loads((folder / "program.json").read_text())
    assert about["platforms"] == ["cpu", "cuda", "tpu"]
    assert about["outputs"]["cls"] == {"shape": ["batch", 16], "dtype": dtype}
    assert about["inputs"]["images"]["shape"] == ["batch", 12, 12, 3]


def test_any_number_of_images_and_another_size(tmp_path):
    model = random_weights(CONFIG)
    folder = write_program(model, tmp_path / "program", "patches:grid", platforms=("cpu",), size=(16, 20))
    program = jax.export.deserialize(bytearray((folder / PROGRAM).read_bytes()))
    params = jaxvit.functional(model)[1]
    for batch in (1, 5):
        images = np.random.default_rng(batch).normal(size=(batch, 16, 20, 3)).astype("float32")
        found = program.call(params, images)["patches:grid"]
        assert found.shape == (batch, 4, 5, 16)
        np.testing.assert_allclose(
            found, jaxvit.read_out(model, jnp.asarray(images), "patches:grid")["patches:grid"], atol=1e-5
        )


def test_the_command(tmp_path, capsys):
    jaxvit.save(random_weights(CONFIG), tmp_path / "model")
    words = ["export-stablehlo", str(tmp_path / "model"), str(tmp_path / "program")]
    assert cli.main([*words, "--take", "cls", "--platforms", "cpu"]) == 0
    assert "bytes of program for cpu" in capsys.readouterr().out
    assert cli.main(words) == 1
    assert "already holds a program" in capsys.readouterr().err
    assert cli.main([*words, "--overwrite", "--take", "projection"]) == 1
    assert "error: " in capsys.readouterr().err
    assert cli.main([*words, "--overwrite", "--take", "pooled", "--platforms", "tpu"]) == 0
    with pytest.raises(ValueError, match="multiple"):
        write_program(random_weights(CONFIG), tmp_path / "other", size=13)
    with pytest.raises(ValueError, match="no platform 'gpu'"):
        write_program(random_weights(CONFIG), tmp_path / "other", platforms=("gpu",))
    with pytest.raises(jaxvit.CheckpointError, match="holds no program"):
        write_program(random_weights(CONFIG), tmp_path / "model", overwrite=True)
    assert not (tmp_path / "other").exists()

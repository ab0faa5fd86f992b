"""--compilation-cache and --profile of commands."""

import jax
import numpy as np
import pytest
from PIL import Image

import jaxvit
from experiments.models.subjects import random_weights
from jaxvit import ViTConfig, cli
from jaxvit.machine import profiled


@pytest.fixture
def command(tmp_path):
    config = ViTConfig(depth=2, width=16, heads=2, hidden=24, grid=(16, 16))
    jaxvit.save(random_weights(config), tmp_path / "model")
    (tmp_path / "images").mkdir()
    Image.fromarray(np.zeros((230, 240, 3), np.uint8)).save(tmp_path / "images" / "one.png")
    return ["features", str(tmp_path / "model"), str(tmp_path / "images"), "--overwrite", "--batch-size", "1"]


def test_compiled_programs_are_kept_and_used_again(command, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxvit.machine.LEAST", 0.0)
    before = jax.config.jax_compilation_cache_dir
    cache, found = tmp_path / "deep" / "cache", []
    for out in ("a.npz", "b.npz"):
        jax.clear_caches()
        assert cli.main([*command, "--out", str(tmp_path / out), "--compilation-cache", str(cache)]) == 0
        found.append({path.name for path in cache.iterdir() if not path.name.endswith("-atime")})
    assert found[0] and found[1] == found[0]
    assert jax.config.jax_compilation_cache_dir == before
    one, two = (np.load(tmp_path / out)["cls"] for out in ("a.npz", "b.npz"))
    assert (one == two).all()


def test_a_profile_is_written(command, tmp_path, capsys):
    assert cli.main([*command, "--out", str(tmp_path / "a.npz"), "--profile", str(tmp_path / "profile")]) == 0
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert f"xprof --logdir {tmp_path / 'profile'}" in capsys.readouterr().err


def test_a_place_that_cannot_be_is_told(command, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main([*command, "--out", str(tmp_path / "a.npz"), "--profile", str(tmp_path / "file")]) == 1
    assert "error: --profile" in capsys.readouterr().err


def test_a_profile_of_what_failed_is_written_too(tmp_path, capsys):
    with pytest.raises(RuntimeError), profiled(tmp_path):
        jax.jit(lambda x: x + 1)(1.0)
        raise RuntimeError
    assert list(tmp_path.rglob("*.xplane.pb")) and f"--logdir {tmp_path}" in capsys.readouterr().err

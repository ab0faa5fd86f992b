"""Appended registers, and test-time registers: the neurons that make outliers are found, and their activation moved."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, TINY, random_images, random_model

import jaxvit
from jaxvit import Batch, Take, ViTConfig, add_registers, find_register_neurons, remove_registers, test_time_registers
from jaxvit.model.params import from_params, to_params

SIZE = (24, 16)
move_to_registers = test_time_registers


@partial(jax.jit, static_argnames="record")
def run(model, images, edits=None, record=()):
    return model(images, edits, record=dict.fromkeys(record, Take(tokens="all")))


def test_appended_registers_that_nobody_attends_to_change_nothing(model):
    images = random_images(0, 2, *SIZE)
    wider = add_registers(model, 2, 0.3)
    new = [f"register {model.config.registers + i}" for i in (0, 1)]
    out, expected = run(wider, images, remove_registers(wider, new)), run(model, images)
    assert out.registers.shape[1] == model.config.registers + 2
    assert np.abs(run(wider, images).cls - expected.cls).max() > 1e-3
    for ours, theirs in (
        (out.cls, expected.cls),
        (out.patches, expected.patches),
        (out.registers[:, :-2], expected.registers),
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_appended_registers_hold_what_they_are_given(model):
    value = np.random.default_rng(0).normal(size=(2, model.config.width))
    wider = add_registers(model, 2, value)
    old = jnp.zeros((0, model.config.width)) if model.registers is None else model.registers[...]
    assert wider.config == replace(model.config, registers=model.config.registers + 2)
    np.testing.assert_array_equal(wider.registers[...], np.concatenate([old, value.astype(np.float32)]))
    np.testing.assert_array_equal(add_registers(model).registers[-1], np.zeros(model.config.width))
    np.testing.assert_array_equal(add_registers(model, 2, value[0]).registers[-2], value[0].astype(np.float32))


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_the_neuron_that_makes_outliers_is_found_and_moved(mlp):
    """A planted one: in block 1, channel 7 is active at patches of one colour alone, and writes a huge vector."""
    model = random_model(ViTConfig(**TINY, mlp=mlp))
    params = {name: np.array(value) for name, value in to_params(model).items()}
    last = "fc2" if mlp == "gelu" else "out"
    images = np.array(random_images(1, 5, *SIZE))
    probe = images.copy()
    for i in range(4):  # the last image has no outlier
        y, x = 4 * (i + 1), 4 * (i % 3)
        probe[i, y : y + 4, x : x + 4] = 3.0
    read = {"gelu": "fc1", "swiglu": "gate"}[mlp]
    streams = model(jnp.asarray(probe), record={"resid_mid": Take(layers=1)}).trace["resid_mid"][0]
    normed = np.asarray(jax.tree.map(lambda a: a[1], model.blocks).norm2(streams))
    coloured = np.stack([normed[i, 1 + (i + 1) * 4 + i % 3] for i in range(4)])
    away = np.concatenate([normed[i, 1:] for i in range(5)])
    direction = coloured.mean(0) - away.mean(0)
    cut = (away @ direction).mean() + 3.5 * (away @ direction).std()
    assert (coloured @ direction).min() > cut
    size = 30 / ((coloured @ direction).min() - cut)  # active by at least 30 there
    params[f"blocks.mlp.{read}.kernel"][1, :, 7] = size * direction
    params[f"blocks.mlp.{read}.bias"][1, 7] = -size * cut
    if mlp == "swiglu":
        params["blocks.mlp.value.kernel"][1, :, 7], params["blocks.mlp.value.bias"][1, 7] = 0, 1
    params[f"blocks.mlp.{last}.kernel"][1, 7] = 10 * np.random.default_rng(0).normal(size=TINY["width"])
    planted = from_params(model.config, {name: jnp.asarray(value) for name, value in params.items()})

    found = find_register_neurons(planted, [jnp.asarray(probe)], 3, progress=False)
    assert (found.layer[0], found.channel[0]) == (1, 7) and found.score[0] > 2 * found.score[1]
    alone = find_register_neurons(planted, [jnp.asarray(probe)], 1, progress=False)
    wider, edits = move_to_registers(planted, alone)
    before = np.linalg.norm(run(planted, jnp.asarray(probe)).tokens[:, 1:], axis=-1)
    after = run(wider, jnp.asarray(probe), edits)
    patches = np.linalg.norm(after.tokens[:, 2:], axis=-1)
    assert (before[:4].max(1) > 3 * np.median(before[:4], axis=1)).all()
    assert (patches[:4].max(1) < 2 * np.median(patches[:4], axis=1)).all()
    assert (np.linalg.norm(after.tokens[:4, 1], axis=-1) > 3 * np.median(patches[:4], axis=1)).all()


def test_moved_activations_are_their_definition():
    model = random_model(FAMILIES["dinov2 with registers"])  # 3 registers
    neurons = jaxvit.Neurons(np.array([1, 1, 2]), np.array([5, 9, 0]), np.ones(3))
    wider, edits = move_to_registers(model, neurons, 2)
    images = random_images(3, 2, *SIZE)
    edited = run(wider, images, edits, ("mlp_post", "resid_post")).trace
    for layer, channels in ((0, []), (1, [5, 9]), (2, [0])):
        start = run(wider, images, None, ("resid_pre",)).trace["resid_pre"][0]
        start = start if layer == 0 else edited["resid_post"][layer - 1]
        clean = jax.jit(lambda x, layer=layer: wider.run_from(layer, x, record="mlp_post"))(start).trace["mlp_post"][0]
        expected = np.array(clean)
        for channel in channels:
            expected[:, 4:6, channel] = clean[:, 6:, channel].max(1, keepdims=True)
            expected[:, 6:, channel] = 0
        np.testing.assert_allclose(edited["mlp_post"][layer], expected, rtol=0, atol=1e-5)


def test_scores_are_their_definition_and_do_not_depend_on_batches(model):
    images = np.asarray(random_images(2, 5, 20))
    trace = run(model, jnp.asarray(images), None, ("mlp_post", "resid_post")).trace
    prefix = model.prefix
    norms = np.linalg.norm(trace["resid_post"][1, :, prefix:], axis=-1)
    threshold = float(np.sort(norms.ravel())[-4:-2].mean())  # three outliers, so images without one
    scores = [
        np.abs(trace["mlp_post"][:2, i, prefix:])[:, norms[i] > threshold].mean(1)
        for i in range(5)
        if (norms[i] > threshold).any()
    ]
    assert 1 <= len(scores) <= 3
    expected = np.mean(scores, axis=0)
    last = Batch(jnp.asarray(images[[3, 4, 4]]), np.array([True, True, False]), np.array([3, 4, 4]))
    search = partial(find_register_neurons, model, count=7, threshold=threshold, outliers_at=1, progress=False)
    for batches in ([jnp.asarray(images)], [jnp.asarray(images[:3]), last]):
        found = search(batches)
        assert (np.diff(found.score) <= 0).all() and len(found.score) == 7
        np.testing.assert_allclose(found.score, np.sort(expected.ravel())[::-1][:7], rtol=1e-5)
        np.testing.assert_allclose(found.score, expected[found.layer, found.channel], rtol=1e-5)


def test_a_file_that_imports_test_time_registers_has_no_test_of_that_name(tmp_path):
    (tmp_path / "test_of_a_user.py").write_text("from jaxvit import test_time_registers\n")
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-c", os.devnull]
    command += ["--rootdir", str(tmp_path), str(tmp_path / "test_of_a_user.py")]
    told = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert told.returncode == pytest.ExitCode.NO_TESTS_COLLECTED and "no tests collected" in told.stdout, told


def test_errors_are_one_sentence(model):
    images = [random_images(0, 2, *SIZE)]
    with pytest.raises(ValueError, match="count is 0; expected the number of registers"):
        add_registers(model, 0)
    with pytest.raises(ValueError, match=r"values have shape \[3\]; expected \[1, 32\]"):
        add_registers(model, 1, np.zeros(3))
    with pytest.raises(ValueError, match="none of 2 images has a patch whose norm is above 1000000.0: lower"):
        find_register_neurons(model, images, threshold=1e6, progress=False)
    with pytest.raises(ValueError, match="count is 0; expected 1 to 144"):
        find_register_neurons(model, images, 0, progress=False)
    with pytest.raises(ValueError, match="there is no layer 3"):
        find_register_neurons(model, images, layers=[3], progress=False)

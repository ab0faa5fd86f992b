"""Positions on other grids: PyTorch's numbers for every rule, and what any resampling should keep."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvit.model.config import Resampling
from jaxvit.model.positions import resample_positions, resampling_matrix

RULES = get_args(Resampling)

GRIDS = [
    ((37, 37), (16, 16)),
    ((37, 37), (16, 24)),
    ((37, 37), (1, 73)),  # not (73, 1): antialiasing to one column, PyTorch 2.14 gives every row the first one's value
    ((37, 37), (36, 38)),
    ((16, 16), (37, 37)),
    ((16, 16), (14, 40)),
    ((16, 16), (32, 16)),
    ((7, 5), (5, 7)),
    ((7, 5), (1, 1)),
    ((5, 9), (50, 90)),
    ((3, 3), (2, 4)),
    ((2, 2), (9, 5)),
    ((1, 1), (4, 3)),
    ((1, 6), (3, 2)),
]


def random_positions(grid, width=3):
    return np.random.default_rng(0).normal(size=(*grid, width))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


resample = jax.jit(resample_positions, static_argnames=("grid", "rule"))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("grid", "target"), GRIDS)
def test_equal_to_torch(x64, grid, target, rule):
    torch = pytest.importorskip("torch")
    positions = random_positions(grid)
    how = {
        "bicubic_antialias": dict(size=target, antialias=True),
        "bicubic": dict(size=target),
        "bicubic_offset": dict(scale_factor=tuple((n + 0.1) / m for n, m in zip(target, grid, strict=True))),
    }[rule]
    image = torch.from_numpy(positions).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(image, mode="bicubic", **how)[0].permute(1, 2, 0).numpy()
    actual = resample_positions(jnp.asarray(positions), target, rule)
    assert actual.dtype == jnp.float64
    if rule == "bicubic_offset" or target != grid:
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n_in", [1, 2, 5, 16, 37])
def test_rows_of_the_matrix_sum_to_one(rule, n_in):
    for n_out in (1, 2, 3, 7, 16, 37, 80):
        matrix = resampling_matrix(n_in, n_out, rule)
        assert matrix.shape == (n_out, n_in)
        assert matrix.dtype == np.float64
        np.testing.assert_allclose(matrix.sum(axis=1), 1, rtol=0, atol=1e-14)


@pytest.mark.parametrize("rule", ["bicubic_antialias", "bicubic"])
@pytest.mark.parametrize(("n_in", "n_out"), [(37, 16), (16, 37), (5, 9)])
def test_the_centred_rules_do_not_know_left_from_right(rule, n_in, n_out):
    matrix = resampling_matrix(n_in, n_out, rule)
    np.testing.assert_allclose(matrix[::-1, ::-1], matrix, rtol=0, atol=1e-13)


def test_the_rules_differ():
    matrices = [resampling_matrix(37, 16, rule) for rule in RULES]
    assert np.abs(matrices[0] - matrices[1]).max() > 0.1
    assert np.abs(matrices[1] - matrices[2]).max() > 0.1


@pytest.mark.parametrize("rule", RULES)
def test_the_own_grid_is_returned_untouched(rule):
    positions = jnp.asarray(random_positions((6, 4)), jnp.float32)
    assert resample_positions(positions, (6, 4), rule) is positions


@pytest.mark.parametrize("rule", RULES)
def test_constant_positions_stay_constant(rule):
    positions = jnp.broadcast_to(jnp.arange(3.0), (6, 4, 3))
    expected = jnp.broadcast_to(jnp.arange(3.0), (9, 3, 3))
    np.testing.assert_allclose(resample(positions, (9, 3), rule), expected, rtol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_resampling_is_linear(x64, rule):
    x, y = (jnp.asarray(np.random.default_rng(seed).normal(size=(6, 4, 3))) for seed in range(2))
    mixed = resample(2 * x - 3 * y, (4, 7), rule)
    np.testing.assert_allclose(mixed, 2 * resample(x, (4, 7), rule) - 3 * resample(y, (4, 7), rule), atol=1e-13)


@pytest.mark.parametrize("rule", RULES)
def test_rows_and_columns_are_resampled_alike(x64, rule):
    x = jnp.asarray(random_positions((6, 4)))
    swapped = resample(x.swapaxes(0, 1), (3, 9), rule)
    np.testing.assert_allclose(swapped, resample(x, (9, 3), rule).swapaxes(0, 1), atol=1e-13)

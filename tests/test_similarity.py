"""CKA: the streamed sums equal the direct formulas on all rows, and the formulas mean what they promise."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvit.analysis.similarity import CKA, StreamingCKA, cosine


def data(n, d1=5, d2=7, seed=0, shared=0.7):
    """Two correlated sets of vectors, away from the origin and with directions of different size."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d1)) * np.arange(1, d1 + 1) + 3
    y = shared * x @ rng.normal(size=(d1, d2)) + rng.normal(size=(n, d2)) * np.arange(d2, 0, -1) - 5
    return x, y


def stream(x, y, splits=()) -> CKA:
    cka = StreamingCKA()
    for a, b in zip(np.split(x, splits), np.split(y, splits), strict=True):
        cka.update(a, {"y": b})
    return cka.results()["y"]


def direct_biased(x, y):
    """Kornblith et al. 2019, with centred n x n kernels."""
    n = len(x)
    center = np.eye(n) - np.ones((n, n)) / n
    k, l = (center @ a @ a.T @ center for a in (x, y))
    return (k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum())


def direct_unbiased(x, y):
    """Song et al. 2012, equation 5, with n x n kernels whose diagonal is zero."""
    n, one = len(x), np.ones(len(x))

    def hsic(k, l):
        total = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
        return (np.trace(k @ l) + total - 2 / (n - 2) * one @ k @ l @ one) / (n * (n - 3))

    k, l = (a @ a.T * (1 - np.eye(n)) for a in (x, y))
    return hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))


@pytest.mark.parametrize("n", [4, 5, 12, 60])
@pytest.mark.parametrize("splits", [(), (1,), (1, 2, 3), (2, 2, 4)])
def test_streaming_equals_the_direct_formulas_whatever_the_batches(n, splits):
    x, y = data(n)
    result = stream(x, y, splits)
    np.testing.assert_allclose(result.biased, direct_biased(x, y), rtol=1e-10)
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(result.unbiased, direct_unbiased(x, y), rtol=1e-10)
    assert (result.n, result.d1, result.d2) == (n, 5, 7)


def test_an_origin_far_away_costs_no_digits():
    x, y = data(60)
    far = stream(x + 1e6, y - 1e6, (7, 30))
    np.testing.assert_allclose(far, stream(x, y), rtol=1e-8)


def test_null_is_the_mean_over_all_orders():
    x, y = data(5)
    values = [direct_biased(x, y[list(order)]) for order in itertools.permutations(range(5))]
    np.testing.assert_allclose(stream(x, y).null, np.mean(values), rtol=1e-10)


def test_null_is_the_mean_over_random_orders():
    x, y = data(30, shared=2)
    rng = np.random.default_rng(1)
    values = [direct_biased(x, rng.permutation(y)) for _ in range(2000)]
    result = stream(x, y)
    assert abs(result.null - np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))
    assert result.biased > 3 * result.null


@pytest.mark.parametrize("transform", ["rotation", "shift", "scale"])
def test_cka_does_not_depend_on_the_axes_the_origin_or_the_unit(transform):
    x, y = data(40)
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(7, 7)))[0]
    moved = {"rotation": y @ rotation, "shift": y + np.arange(7.0), "scale": -3.5 * y}[transform]
    np.testing.assert_allclose(stream(x, moved), stream(x, y), rtol=1e-10)


def test_cka_depends_on_unequal_scales():
    x, y = data(40)
    scaled = y * np.array([10.0, 1, 1, 1, 1, 1, 1])
    found, plain = stream(x, scaled), stream(x, y)
    np.testing.assert_allclose([found.biased, found.unbiased], [direct_biased(x, scaled), direct_unbiased(x, scaled)])
    assert found.biased != pytest.approx(plain.biased, rel=0.01)


def test_cka_is_symmetric():
    x, y = data(40)
    a, b = stream(x, y), stream(y, x)
    np.testing.assert_allclose([a.biased, a.unbiased, a.null], [b.biased, b.unbiased, b.null], rtol=1e-12)
    assert (a.d1, a.d2) == (b.d2, b.d1)


def test_cka_of_the_same_is_one():
    x, _ = data(40)
    result = stream(x, x, (13,))
    np.testing.assert_allclose([result.biased, result.unbiased], 1, rtol=1e-12)


def test_unbiased_sees_through_what_inflates_biased():
    rng = np.random.default_rng(3)
    results = [stream(rng.normal(size=(100, 100)), rng.normal(size=(100, 100))) for _ in range(20)]
    biased, unbiased, null = (np.array([getattr(r, name) for r in results]) for name in ("biased", "unbiased", "null"))
    # n rows of d independent channels each: the squared norm of X'Y is n d^2, that of X'X is n d (n + d).
    np.testing.assert_allclose(biased, 100 / (99 + 100), rtol=0.05)
    np.testing.assert_allclose(null, biased, rtol=0.05)
    assert np.abs(unbiased).max() < 0.1
    assert abs(unbiased.mean()) < 4 * unbiased.std() / np.sqrt(len(unbiased))


def test_memory_does_not_grow_with_the_rows():
    def size(batches, rows=50):
        cka = StreamingCKA()
        for seed in range(batches):
            x, y = data(rows, seed=seed)
            cka.update(x, {"a": y, "b": x})
        return sum(np.asarray(array).nbytes for array in cka.state().values())

    assert size(1) == size(10) < 8 * 20 * (5 + 7 + 2) ** 2
    assert size(1, rows=2) < size(3, rows=2) < size(1), "few rows take less than their moments"


def test_means_are_those_of_all_rows():
    x, y = data(20)
    for count in (3, 20):  # as rows, and as sums
        cka = StreamingCKA()
        cka.update(x[:2], {"y": y[:2]})
        cka.update(x[2:count], {"y": y[2:count]})
        np.testing.assert_allclose(cka.mean(), x[:count].mean(0))
        np.testing.assert_allclose(cka.mean("y"), y[:count].mean(0))


@pytest.mark.parametrize("count", [4, 6, 9])
def test_reading_results_early_changes_nothing(count):
    x, y = data(12)
    early, late = StreamingCKA(), StreamingCKA()
    for at in range(0, 12, 2):
        for cka in (early, late):
            cka.update(x[at : at + 2], {"y": y[at : at + 2]})
        if at < count:
            early.results()
    assert early.results() == late.results()


def test_several_representations_are_compared_with_the_reference_each():
    x, y = data(20)
    cka = StreamingCKA()
    for rows in (slice(0, 8), slice(8, 20)):
        cka.update(x[rows], {"y": y[rows], "x": x[rows], "reference": -y[rows]})
    results = cka.results()
    assert list(results) == ["y", "x", "reference"]
    np.testing.assert_allclose(results["y"], stream(x, y, (8,)), rtol=1e-12)
    np.testing.assert_allclose(results["x"].biased, 1, rtol=1e-12)
    np.testing.assert_allclose(results["reference"], results["y"], rtol=1e-12)


def test_float32_rows_are_summed_in_float64():
    x, y = (a.astype(np.float32) for a in data(200))
    np.testing.assert_allclose(stream(x, y, (3, 77)), stream(x.astype(float), y.astype(float)), rtol=1e-10)


@pytest.mark.parametrize("rows", [3, 5])
def test_rows_must_match(rows):
    cka = StreamingCKA()
    with pytest.raises(ValueError, match=f"patches has {rows} rows, the reference 4"):
        cka.update(np.ones((4, 2)), {"patches": np.ones((rows, 2))})


def test_a_batch_that_is_refused_leaves_no_trace():
    (x, y), cka = data(20), StreamingCKA()
    cka.update(x[:10], {"a": y[:10], "b": y[:10]})
    with pytest.raises(ValueError, match="b has 9 rows"):
        cka.update(x[10:], {"a": y[10:], "b": y[11:]})
    with pytest.raises(ValueError, match=r"\['a', 'c'\], but were \['a', 'b'\]"):
        cka.update(x[10:], {"a": y[10:], "c": y[10:]})
    cka.update(x[10:], {"a": y[10:], "b": y[10:]})
    for result in cka.results().values():
        np.testing.assert_allclose(result, stream(x, y), rtol=1e-10)


def test_an_empty_batch_changes_nothing():
    x, y = data(10)
    np.testing.assert_allclose(stream(x, y, (0, 4, 4, 10)), stream(x, y, (4,)), rtol=1e-12)
    assert StreamingCKA().results() == {}


@pytest.mark.parametrize("n", [1, 2, 3])
def test_too_few_rows_give_nan(n):
    result = stream(*data(n))
    assert np.isnan(result.unbiased)
    assert np.isnan([result.biased, result.null]).all() == (n == 1)


def test_a_constant_representation_has_no_similarity():
    x, _ = data(10)
    result = stream(x, np.ones((10, 3)))
    assert np.isnan([result.biased, result.unbiased, result.null]).all()


def test_cosine():
    x = jnp.array([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [-2.0, -2.0]])
    y = jnp.array([[6.0, 8.0], [0.0, 5.0], [1.0, 2.0], [0.0, 0.0], [1.0, 1.0]])
    np.testing.assert_allclose(jax.jit(cosine)(x, y), [1, 0, 0, 0, -1], atol=1e-6)


def test_a_refused_batch_leaves_no_trace():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 3)), rng.normal(size=(12, 4))
    clean, disturbed = StreamingCKA(), StreamingCKA()
    for cka in (clean, disturbed):
        cka.update(x[:6], {"y": y[:6]})
    for bad_x, bad_y in [(x, y[:, :1]), (x[:, :2], y), (x, y[:, 0]), (x, y[:5])]:
        with pytest.raises(ValueError):
            disturbed.update(bad_x, {"y": bad_y})
    for cka in (clean, disturbed):
        cka.update(x[6:], {"y": y[6:]})
    assert clean.results() == disturbed.results()


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("different", [0, 1])
def test_what_is_undefined_is_nan_and_not_what_rounding_leaves(seed, different):
    """Rows that are all the same, or all but one, have an unbiased HSIC of exactly zero with themselves."""
    rng = np.random.default_rng(seed)
    x = np.tile(rng.normal(size=6) * 10, (17, 1))
    x[:different] += rng.normal(size=6)
    result = stream(x, rng.normal(size=(17, 4)), (5, 10, 15))
    assert np.isnan(result.unbiased)
    assert np.isnan(result.biased) == (different == 0)


def test_axes_in_front_of_rows_are_cases_of_their_own():
    pairs = [[data(30, seed=3 * i + j) for j in range(3)] for i in range(2)]
    x, y = (np.asarray([[pair[k] for pair in row] for row in pairs]) for k in (0, 1))
    cka = StreamingCKA()
    for rows in (slice(0, 7), slice(7, 30)):
        cka.update(x[..., rows, :], {"y": y[..., rows, :]})
    whole = cka.results()["y"]
    for i, j in np.ndindex(2, 3):
        one = stream(x[i, j], y[i, j], (7,))
        for kind in ("biased", "unbiased", "null"):
            np.testing.assert_allclose(getattr(whole, kind)[i, j], getattr(one, kind), rtol=1e-12)
        centred = [a - a.mean(0) for a in (x[i, j], y[i, j])]
        np.testing.assert_allclose(cka.cross("y")[i, j], centred[0].T @ centred[1], atol=1e-9)
        np.testing.assert_allclose(cka.cross()[i, j], centred[0].T @ centred[0], atol=1e-9)
        np.testing.assert_allclose(cka.covariance("y")[i, j], np.cov(y[i, j].T, bias=True), atol=1e-10)
        np.testing.assert_allclose(cka.covariance()[i, j], np.cov(x[i, j].T, bias=True), atol=1e-10)


@pytest.mark.parametrize("at", [3, 9])
def test_a_restored_state_goes_on_to_the_same_bits(at):
    x, y = data(20)
    whole, first = StreamingCKA(), StreamingCKA()
    for cka in (whole, first):
        for rows in (slice(0, 2), slice(2, at)):
            cka.update(x[rows], {"y": y[rows], "/odd|name/": x[rows]})
    again = StreamingCKA.restore(first.state())
    for cka in (whole, again):
        cka.update(x[at:], {"y": y[at:], "/odd|name/": x[at:]})
    assert again.results() == whole.results()
    assert {k: v.tobytes() for k, v in again.state().items()} == {k: v.tobytes() for k, v in whole.state().items()}


@pytest.mark.parametrize("far", [0.0, 1e4])
def test_streams_merge_as_if_all_rows_had_gone_through_one(far):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 40, 7)) + far * rng.standard_normal((2, 1, 7))
    others = {"like": x[..., :4] + rng.standard_normal((2, 40, 4)), "unlike": rng.standard_normal((2, 40, 9)) - far}

    def fed(begin, end, step=6):
        cka = StreamingCKA()
        for i in range(begin, end, step):
            rows = slice(i, min(i + step, end))
            cka.update(x[:, rows], {name: y[:, rows] for name, y in others.items()})
        return cka

    whole = fed(0, 40)
    merged = StreamingCKA()
    for begin, end in ((0, 3), (3, 3), (3, 25), (25, 40)):
        merged.merge(fed(begin, end))
    merged.update(x[:, :2], {name: y[:, :2] for name, y in others.items()})
    whole.update(x[:, :2], {name: y[:, :2] for name, y in others.items()})
    for name, expected in whole.results().items():
        found = merged.results()[name]
        assert found.n == expected.n == 42
        for kind in ("biased", "unbiased", "null"):
            np.testing.assert_allclose(getattr(found, kind), getattr(expected, kind), rtol=1e-11)
        np.testing.assert_allclose(merged.covariance(name), whole.covariance(name), atol=1e-11)
        np.testing.assert_allclose(merged.mean(name), whole.mean(name), rtol=1e-13, atol=1e-13)
    with pytest.raises(ValueError, match="were"):
        other = StreamingCKA()
        other.update(x[0, :4], {"like": x[0, :4]})
        merged.merge(other)

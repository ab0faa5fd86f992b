"""Streamed statistics are NumPy's over all images at once, whatever the batches; files keep every bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, random_images, random_model
from safetensors.numpy import save_file

import jaxvit
from jaxvit import ActivationStats, Batch, CheckpointError, Take
from jaxvit.interventions.constructors import replace_by_mean

SITES = ("q", "k", "v", "z", "mlp_post", "resid_pre", "resid_mid", "resid_post")
SIDE, IMAGES, GROUPS = 8, 7, 5


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def model(float64):
    return jaxvit.cast(random_model(FAMILIES["dinov2 with registers"]), jnp.float64)


@pytest.fixture(scope="module")
def images(float64):
    return jnp.asarray(random_images(0, IMAGES, SIDE), jnp.float64) * 3 + 1


@pytest.fixture(scope="module")
def stats(model, images):
    return ActivationStats.collect(model, [images[:3], images[3:6], images[6:]], SITES, progress=False)


@pytest.fixture(scope="module")
def layout(model):
    return model.config.layout(SIDE)


def recorded(model, images):
    run = jax.jit(lambda m, x: m(x, record={site: Take(tokens="all") for site in SITES}).trace)
    return {site: np.asarray(value, np.float64) for site, value in run(model, images).items()}


def by_group(trace, layout, function):
    """[L, G, ..], a function of all the values of a group: over images and, for patches, over tokens."""
    groups = [trace[:, :, layout.groups == group] for group in range(GROUPS)]
    return np.stack([function(values, axis=(1, 2)) for values in groups], axis=1)


def assert_close(actual, expected, rtol=1e-12):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= rtol * np.abs(expected).max()


def same(a, b):
    np.testing.assert_array_equal(a.count, b.count)
    for kind in ("means", "squares"):
        assert sorted(getattr(a, kind)) == sorted(getattr(b, kind))
        for site, value in getattr(a, kind).items():
            assert value.dtype == getattr(b, kind)[site].dtype == np.float64
            np.testing.assert_array_equal(value, getattr(b, kind)[site])
    return True


def test_streamed_moments_are_numpys_over_everything_at_once(model, images, stats, layout):
    trace = recorded(model, images)
    np.testing.assert_array_equal(stats.count, [IMAGES] * 4 + [IMAGES * layout.patches])
    for site in SITES:
        assert_close(stats.mean(site)[:, 0], by_group(trace[site], layout, np.mean))
        assert_close(stats.variance(site)[:, 0], by_group(trace[site], layout, np.var))
    assert stats.mean("z").shape == (3, 1, GROUPS, 4, 8) and stats.mean("mlp_post").shape == (3, 1, GROUPS, 48)


def test_the_batches_do_not_matter(model, images, stats):
    whole = ActivationStats.collect(model, images, SITES, progress=False)
    for site in SITES:
        assert_close(whole.means[site], stats.means[site])
        assert_close(whole.squares[site], stats.squares[site])


def test_repeated_images_of_a_stream_do_not_count(model, images, stats):
    def batch(places, valid):
        places = np.array(places)
        return Batch(images[places], np.array(valid), places, names=tuple(map(str, places)))

    stream = [batch([0, 1, 2], [True] * 3), batch([3, 4, 5], [True] * 3), batch([6, 6, 6], [True, False, False])]
    streamed = ActivationStats.collect(model, iter(stream), SITES, progress=False)
    np.testing.assert_array_equal(streamed.count, stats.count)
    for site in SITES:
        assert_close(streamed.means[site], stats.means[site])
        assert_close(streamed.squares[site], stats.squares[site])
    none = batch([0, 0, 0], [False] * 3)
    assert_close(ActivationStats.collect(model, [*stream, none], SITES, progress=False).means["q"], stats.means["q"])
    alone = ActivationStats.collect(model, stream[-1], "q", progress=False)
    assert alone.count[0] == 1 and not alone.squares["q"][:, :4].any()


def test_images_of_several_sizes_go_together(model, images):
    small, tall = images[:2], jnp.asarray(random_images(1, 3, 12, 4), jnp.float64)
    stats = ActivationStats.collect(model, [small, tall], "resid_mid", progress=False)
    values = [recorded(model, x)["resid_mid"][:, :, 4:].reshape(3, -1, 32) for x in (small, tall)]
    values = np.concatenate(values, axis=1)
    assert stats.count[-1] == values.shape[1] == 2 * 4 + 3 * 3
    assert_close(stats.mean("resid_mid")[:, 0, -1], values.mean(1))
    assert_close(stats.variance("resid_mid")[:, 0, -1], values.var(1))


def test_large_means_cost_no_digits():
    """Chan's formula, on batches far from the origin and far apart from each other."""
    values = (
        np.random.default_rng(0).normal(size=(2, 90, 1, 4))
        + 1e6 * np.arange(1, 5)
        + np.repeat([0, 30], 45)[:, None, None]
    )
    stats = ActivationStats()
    for some in np.split(values, [1, 30, 30, 77], axis=1):
        if not (n := some.shape[1]):
            continue
        mean = some.mean(1)
        stats.add(np.array([float(n)]), {"q": mean}, {"q": np.square(some - mean[:, None]).sum(1)})
    with np.errstate(all="raise"):
        assert_close(stats.mean("q")[:, 0], values.mean(1), 1e-14)
        assert_close(stats.variance("q")[:, 0], values.var(1), 1e-9)


@pytest.mark.parametrize(("dtype", "digits"), [("float32", 2e-6), ("bfloat16", 2e-6)])
def test_sums_are_as_precise_as_float32_in_models_of_less(dtype, digits, model, images, layout):
    """Of the values that such a model itself has: a bfloat16 sum has two digits."""
    narrow = jaxvit.cast(model, dtype)
    with jax.enable_x64(False):
        images = jnp.tile(jnp.asarray(images, jnp.float32), (20, 1, 1, 1))
        stats = ActivationStats.collect(narrow, images, "resid_post", progress=False)
        trace = jax.jit(lambda m, x: m(x, record="resid_post").trace)(narrow, images)["resid_post"]
    trace = np.asarray(trace.astype(jnp.float32), np.float64)
    np.testing.assert_array_equal(stats.count, [140] * 4 + [560])
    assert_close(stats.means["resid_post"], by_group(trace, layout, np.mean), digits)
    assert_close(stats.variance("resid_post")[:, 0], by_group(trace, layout, np.var), 10 * digits)


def test_noise_has_the_mean_and_the_variance(stats, layout):
    noise = np.asarray(stats.noise("z", jax.random.key(0), 4000))
    assert noise.shape == (3, 4000, GROUPS, 4, 8)
    mean, variance = np.asarray(stats.mean("z"))[:, 0], np.asarray(stats.variance("z"))[:, 0]
    error = (noise.mean(1) - mean) / np.sqrt(variance / 4000)
    assert np.abs(error).max() < 5 and abs(error.std() - 1) < 0.15
    ratio = (noise.var(1) / variance - 1) / np.sqrt(2 / 4000)
    assert np.abs(ratio).max() < 5 and abs(ratio.std() - 1) < 0.15
    assert not np.array_equal(noise, stats.noise("z", jax.random.key(1), 4000))
    np.testing.assert_array_equal(noise, stats.noise("z", jax.random.key(0), 4000))


def test_noise_of_a_layout_is_drawn_for_every_token(stats, layout):
    noise = np.asarray(stats.noise("resid_post", jax.random.key(0), 3000, layout))
    assert noise.shape == (3, 3000, layout.tokens, 32)
    mean, variance = (np.asarray(a)[:, 0] for a in (stats.mean("resid_post"), stats.variance("resid_post")))
    for token, group in enumerate(layout.groups):
        assert np.abs((noise[:, :, token].mean(1) - mean[:, group]) / np.sqrt(variance[:, group] / 3000)).max() < 5
    patches = (noise[:, :, 4:] - mean[:, None, None, 4]) / np.sqrt(variance[:, None, None, 4])
    assert abs((patches[:, :, 0] * patches[:, :, 1]).mean()) < 0.01


def test_the_mean_in_place_is_the_group_s_mean(model, images, stats, layout):
    edits = replace_by_mean(model, "resid_post", stats, layers=1, tokens=("register 1", "patches"))
    trace = jax.jit(lambda m, x, e: m(x, e, record="resid_post").trace)(model, images, edits)["resid_post"]
    plain = recorded(model, images)["resid_post"]
    mean = by_group(plain, layout, np.mean)
    assert_close(trace[0], plain[0])
    assert_close(trace[1, :, [0, 1, 3]], plain[1][:, [0, 1, 3]].swapaxes(0, 1))
    assert_close(trace[1, :, 2], np.tile(mean[1, 2], (IMAGES, 1)))
    assert_close(trace[1, :, 4:], np.tile(mean[1, 4], (IMAGES, layout.patches, 1)))


def test_a_file_keeps_every_bit(stats, tmp_path):
    stats.save(tmp_path / "new" / "stats.safetensors")
    assert same(ActivationStats.load(str(tmp_path / "new" / "stats.safetensors")), stats)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["stats.safetensors"]
    assert (tmp_path / "new" / "stats.safetensors").stat().st_mode & 0o777 == 0o644


def test_statistics_that_were_loaded_can_be_added_to(model, images, stats, tmp_path):
    half = ActivationStats.collect(model, images[:3], SITES, progress=False)
    half.save(tmp_path / "half")
    half = ActivationStats.load(tmp_path / "half")
    rest = ActivationStats.collect(model, [images[3:6], images[6:]], SITES, progress=False)
    half.add(rest.count, rest.means, rest.squares)
    np.testing.assert_array_equal(half.count, stats.count)
    assert_close(half.means["v"], stats.means["v"])
    assert_close(half.squares["v"], stats.squares["v"])


@pytest.mark.parametrize("damage", ["truncated", "text", "missing", "folder", "foreign", "incomplete", "shapes"])
def test_a_file_of_something_else_is_said_in_a_sentence(damage, stats, tmp_path):
    path = tmp_path / "stats.safetensors"
    stats.save(path)
    tensors = {"count": stats.count, "mean.q": stats.means["q"], "squares.q": stats.squares["q"]}
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "text":
        path.write_text("not statistics")
    elif damage in ("missing", "folder"):
        path.unlink()
        if damage == "folder":
            path.mkdir()
    elif damage == "foreign":
        save_file({"weight": np.zeros(3)}, path)
    elif damage == "incomplete":
        del tensors["squares.q"]
        save_file(tensors, path)
    else:
        save_file(tensors | {"count": np.ones(3)}, path)
    with pytest.raises(CheckpointError, match=str(path)) as error:
        ActivationStats.load(path)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_written_is_said_in_a_sentence(stats, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        stats.save(tmp_path / "file" / "stats")


def test_what_has_no_statistics_is_said_in_a_sentence(model, images, stats):
    with pytest.raises(ValueError, match="no statistics of 'attn_out'; there are k, mlp_post, q"):
        stats.mean("attn_out")
    with pytest.raises(ValueError, match="no site 'middle'"):
        ActivationStats.collect(model, images, "middle")
    with pytest.raises(
        ValueError, match="no statistics of 'pattern', 'scores': they are for sites with one axis of tokens"
    ):
        ActivationStats.collect(model, images, ("pattern", "q", "scores"))
    with pytest.raises(ValueError, match="no images to take statistics of"):
        ActivationStats.collect(model, [])
    with pytest.raises(ValueError, match=r"images have shape \[8, 8, 3\]; expected \[batch, height, width, channels\]"):
        ActivationStats.collect(model, np.asarray(images[0]), progress=False)
    with pytest.raises(ValueError, match="no statistics of 'q'; there are none"):
        ActivationStats().mean("q")


def test_progress_shows_on_stderr_and_can_be_switched_off(model, images, capsys):
    ActivationStats.collect(model, [images[:1], images[1:2]], "q")
    assert "statistics: 100%" in capsys.readouterr().err
    ActivationStats.collect(model, [images[:1]], "q", progress=False)
    assert capsys.readouterr() == ("", "")

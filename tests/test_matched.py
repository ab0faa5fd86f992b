"""Models trained alike but for one thing: what arms change, that they share their data, and the committed ones."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jaxvit
from experiments import embedded
from experiments.matched import data, measures, presets, train
from experiments.matched.arms import ARMS, late_cls, skip_share
from experiments.matched.command import main, tables
from experiments.matched.presets import Cell, Preset, sized
from experiments.matched.train import DENSE, Recipe
from experiments.models import scenes
from experiments.models.presets import TRAINED
from experiments.models.subjects import Spec, load, random_weights
from jaxvit import Take

BASE = sized(3, 16, 2, 24, 8, 32)
RECIPE = Recipe(6, batch=8, rate=1e-2, warmup=2)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (240, 250, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return jaxvit.find_images(folder)


@pytest.fixture(scope="module")
def drawn(photographs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    found = data.load(20, 10, 32, photographs, folder)
    again = data.load(20, 10, 32, photographs, folder)
    assert (found.images == again.images).all() and len(list(folder.iterdir())) == 1
    return found


@pytest.fixture(scope="module")
def images(drawn):
    return data.normalised(jnp.asarray(drawn.images[:4]), BASE.preprocess.mean, BASE.preprocess.std)


def model_of(arm):
    return random_weights(ARMS[arm].config(BASE))


def test_scenes_are_those_of_their_numbers(drawn, photographs):
    assert drawn.images.shape == (30, 32, 32, 4) and drawn.labels.tolist() == list(range(10)) * 3
    for number in (3, 27):
        scene = scenes.draw(number, photographs)
        small = np.asarray(Image.fromarray(scene.image).resize((32, 32), Image.Resampling.BOX))
        assert (drawn.images[number][..., :3] == small).all()
        share = (scene.mask > 0).reshape(4, 56, 4, 56).mean(axis=(1, 3))
        found = data.shares(jnp.asarray(drawn.images[number : number + 1]), 8).reshape(4, 4)
        np.testing.assert_allclose(found, share, atol=0.01)


def test_variations_move_the_picture_and_its_mask_together(drawn):
    red = np.zeros((6, 32, 32, 4), np.uint8)
    red[:, 8:20, 4:16] = (255, 0, 0, 255)
    found = np.asarray(data.varied(jnp.asarray(red), jax.random.key(0)))
    assert ((found[..., 3] > 0) == (found[..., 0] > found[..., 1] + 20)).all()
    columns = found[..., 3].max(axis=1) > 0
    assert len({tuple(row) for row in columns}) > 3


def test_what_cls_reads_is_what_the_arm_lets_it(images):
    last = {"pattern": Take(layers=-1), "skip_attn": Take(layers=-1, tokens="prefix")}
    for name, mass, skip in (("R4", True, True), ("R4m", False, True), ("no-residual", True, False)):
        model = model_of(name)
        out = model(images, ARMS[name].changes(model), last)
        row = out.trace["pattern"][0][:, :, 0]
        assert (row[..., 1:5] > 0).any() == mass and all((row[..., at] > 0).any() for at in (0, 5))
        assert (out.trace["skip_attn"][0][:, 0] != 0).any() == skip
        assert (out.trace["skip_attn"][0][:, 1:] != 0).any()
    model = model_of("patches-only")
    out = model(images, ARMS["patches-only"].changes(model), last)
    assert (out.trace["pattern"][0][:, :, 0, :5] == 0).all() and (out.trace["skip_attn"][0][:, 0] == 0).all()
    model = model_of("mean-pool")
    assert model.cls is None and model(images, ARMS["mean-pool"].changes(model)).logits.shape == (4, 10)


def test_a_late_cls_is_not_read_before_it_enters_and_enters_fresh(images):
    model = model_of("late")
    out = model(images, late_cls(model), {"pattern": Take(tokens="all"), "resid_pre": Take()})
    assert (out.trace["pattern"][0][:, :, 1:, 0] == 0).all() and (out.trace["pattern"][1:][:, :, :, 1:, 0] > 0).any()
    np.testing.assert_allclose(out.trace["resid_pre"][1][:, 0], jnp.broadcast_to(model.cls[...], (4, 16)), rtol=1e-6)
    with pytest.raises(ValueError, match="cannot enter late"):
        late_cls(random_weights(replace(BASE, depth=2)))


def test_the_penalty_is_the_share_of_the_skip_path(images):
    skip, update = jnp.array([[3.0, 0.0]]), jnp.array([[0.0, 4.0]])
    assert skip_share(skip, update).tolist() == pytest.approx([9 / 25])
    params = train.start(ARMS["R0"].config(BASE), RECIPE, (0,)).params
    one = {name: a[0] for name, a in params.items()}
    known = dict(images=images, labels=jnp.arange(4), shares=jnp.full((4, 16), 0.3), smoothing=0.1)
    plain, _ = train.loss_of(one, ARMS["R0"], ARMS["R0"].config(BASE), **known)
    with_it, parts = train.loss_of(one, ARMS["R0-penalty"], ARMS["R0"].config(BASE), **known)
    assert with_it - plain == pytest.approx(0.1 * float(parts["skip share"]), rel=1e-4)


def test_seeds_at_once_are_seeds_one_after_another(drawn):
    arm = ARMS["R4"]
    both = train.train(arm, BASE, drawn, RECIPE, (0, 1), at_once=4)
    alone = train.train(arm, BASE, drawn, RECIPE, (1,), at_once=6)
    assert both.curves["entropy"].shape == (2, 6) and DENSE not in both.params
    for name, curve in alone.curves.items():
        np.testing.assert_allclose(both.curves[name][1], curve[0], rtol=2e-3, atol=2e-3)
    assert np.abs(both.curves["entropy"][0] - both.curves["entropy"][1]).max() > 0.01


def test_arms_see_the_same_images_in_the_same_order(drawn, monkeypatch):
    seen = []

    def watched(images, mean, std):
        jax.debug.callback(lambda a: seen.append(float(a)), images.astype("float32").sum(), ordered=True)
        return data.normalised(images, mean, std)

    monkeypatch.setattr(train, "normalised", watched)
    orders = []
    for name in ("R0", "patches-only"):
        seen.clear()
        train.train(ARMS[name], BASE, drawn, Recipe(3, batch=8), (5,), at_once=3)
        jax.effects_barrier()
        orders.append(list(seen))
    assert len(set(orders[0])) == 3 and orders[0] == orders[1]


def test_a_few_steps_learn(drawn):
    found = train.train(ARMS["R4"], BASE, drawn, Recipe(40, batch=20, rate=5e-3, warmup=5), (0,), at_once=20)
    assert found.curves["entropy"][0, -5:].mean() < found.curves["entropy"][0, :5].mean() - 0.1


def test_differences_are_of_pairs():
    arms = {"R0": {"accuracy": [0.1, 0.5, 0.9]}, "R4": {"accuracy": [0.2, 0.6, 1.0], "mass": [1.0, 1.0, 1.0]}}
    found = measures.compared(arms, "R0")
    assert found["R4"]["accuracy"]["difference"]["low"] == pytest.approx(0.1)
    assert found["R4"]["accuracy"]["difference"]["high"] == pytest.approx(0.1)
    assert "difference" not in found["R0"]["accuracy"] and "difference" not in found["R4"]["mass"]


def test_the_command_goes_on_where_it_was(photographs, tmp_path, monkeypatch, capsys):
    cell = Cell("small", BASE, 20, Recipe(4, batch=8))
    monkeypatch.setitem(presets.PRESETS, "tiny", Preset([cell], ["R0", "R4"], 2, 10))
    words = ["--photographs", str(photographs[0].parent), "--out", str(tmp_path)]
    assert main([*words, "--limit", "0"]) == 0
    assert "small R0" in capsys.readouterr().err and json.loads((tmp_path / "results.json").read_text()) == {
        "small": {}
    }
    assert main([*words, "--arms", "R0"]) == 0
    before = (tmp_path / "small" / "R0" / "training.json").stat().st_mtime_ns
    assert main([*words, "--limit", "0"]) == 0
    assert "small R4" in capsys.readouterr().err
    assert main(words) == 0
    told = capsys.readouterr().out
    assert (tmp_path / "small" / "R0" / "training.json").stat().st_mtime_ns == before
    assert "| R0: no registers |" in told and "2 seeds" in told and " to +" in told
    record = json.loads((tmp_path / "small" / "R4" / "training.json").read_text())
    subject = load(Spec(str(tmp_path / "small" / "R4" / "seed-1")), "one")
    assert (subject.about.family, subject.about.registers_are, subject.about.weights) == (
        "scenes",
        "trained",
        "trained",
    )
    held = data.load(20, 10, 32, photographs, tmp_path / "scenes")
    images = data.normalised(jnp.asarray(held.images[20:]), BASE.preprocess.mean, BASE.preprocess.std)
    right = subject.model(images).logits.argmax(-1) == held.labels[20:]
    assert float(right.mean()) == pytest.approx(record["test"]["accuracy"][1])
    results = json.loads((tmp_path / "results.json").read_text())
    assert tables(results) == (tmp_path / "results.md").read_text()
    assert main([*words, "--arms", "R4"]) == 0
    assert list(json.loads((tmp_path / "results.json").read_text())["small"]) == ["R0", "R4"]  # all that is there
    assert main([*words, "--steps", "5"]) == 1
    assert "another recipe" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    Image.fromarray(np.zeros((240, 240, 3), np.uint8)).save(other / "black.png")
    others = ["--photographs", str(other), "--out", str(tmp_path)]
    assert main([*others, "--arms", "R4m"]) == 1  # what it would be compared with has seen other pictures
    assert "another photographs" in capsys.readouterr().err
    monkeypatch.setitem(ARMS, "R4", ARMS["R4"]._replace(penalty=0.5))
    assert main(words) == 1
    assert "another penalty" in capsys.readouterr().err


# The committed models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ["R0", "R4"])
def test_committed_models_are_what_training_left(arm, tmp_path):
    """A few steps from each begin at the loss at which its training ended, and learn on."""
    folder = TRAINED / f"scenes-{arm.lower()}"
    record = json.loads((folder / "training.json").read_text())
    model = jaxvit.cast(jaxvit.load(folder), "float32")
    preset = presets.PRESETS["demo"]
    (cell,) = preset.cells
    assert record["recipe"] == cell.recipe.to_dict() and model.config == ARMS[arm].config(cell.base)
    assert record["parameters"] == sum(a.size for a in jax.tree.leaves(model))
    found = jaxvit.find_images(embedded.photographs())
    drawn = data.load(30, 10, 224, found, tmp_path)
    params = jaxvit.functional(model)[1] | {DENSE: jnp.zeros((model.config.width, 11))}
    recipe = Recipe(6, batch=30, rate=3e-4, warmup=1)
    state = train.of_params(params, recipe, jax.random.key(1))
    state = jax.tree.map(lambda a: a[None], state)
    with jax.numpy_dtype_promotion("standard"):
        new, curves = train.stepper(ARMS[arm], model.config, recipe, 6)(
            state, jnp.asarray(drawn.images[:30]), jnp.asarray(drawn.labels[:30])
        )
    ended = {name: np.mean(record["curves"][name][0][-10:]) for name in ("entropy", "accuracy")}
    entropy, dense = curves["entropy"][0], curves["entropy of patches"][0]
    assert entropy[:2].mean() == pytest.approx(ended["entropy"], abs=0.05)  # the first rate is 0
    # Five steps that learn: steps the other way end at 1.0 and more, and at 2.5 for patches, whose head begins anew.
    assert entropy[2:].mean() < ended["entropy"] + 0.02
    assert (np.diff(dense[1:]) < 0).all() and dense[-1] < 2.3
    assert curves["accuracy"].mean() >= ended["accuracy"] - 0.05
    assert all((new.params[name][0] != before).any() for name, before in params.items())

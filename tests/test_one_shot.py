"""A4: images with classes from folders and datasets, the classifiers, and what is told where the answer is known."""

import json
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

# Before anything imports the hub's package; `offline` below also bars the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from conftest import FAMILIES, TINY, random_images, random_model
from PIL import Image

import jaxvit
from experiments.core import labelled
from experiments.core.experiment import About, Found, View
from experiments.core.passes import Labelled, Request
from experiments.core.trace import observe
from experiments.paper.a4_one_shot import EXPERIMENT, READINGS, draw_pairs, outputs, sample
from experiments.runner.store import Store, run_pass
from jaxvit import Edit, ImageError, ViT, ViTConfig
from jaxvit.io import image_sets
from jaxvit.model.config import Preprocess
from jaxvit.model.params import from_params, to_params
from jaxvit.tasks.classify import accuracy, logistic_regression, nearest_mean, t_interval
from jaxvit.tasks.directions import unit

PASS = labelled.LabelledImages()
OPTIONS = {option.name: option.default for option in EXPERIMENT.options}
COLOURS = np.array([[r, g, b] for r in (40, 210) for g in (40, 210) for b in (40, 210)], np.uint8)
CONFIG = ViTConfig(**TINY, registers=3, preprocess=Preprocess(resize=20, crop=20))


def about(key: str = "model", size: str = "S", parameters: int = 1, registers: int = 3) -> About:
    kind = "trained" if registers else "none"
    return About(key, key, "DINOv2", size, 3, 32, 4, parameters, registers, kind, "trained", {}, CONFIG.to_dict())


# --- classifiers


def problem(seed: int = 0, n: int = 40, width: int = 12, classes: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Several images a class, not of the same number each."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes)])
    centres = rng.normal(size=(classes, width))
    return unit(centres[labels] + rng.normal(size=(n, width)) + 1), labels


def reference(features: np.ndarray, labels: np.ndarray, classes: int, l2: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights and biases by SciPy, from the definition."""
    n, width = features.shape

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights, bias = flat[:-classes].reshape(width, classes), flat[-classes:]
        logits = features @ weights + bias[None]
        logits -= logits.max(1, keepdims=True)
        p = np.exp(logits)
        p /= p.sum(1, keepdims=True)
        value = -np.log(p[np.arange(n), labels]).sum() + l2 / 2 * (weights**2).sum()
        p[np.arange(n), labels] -= 1
        return value, np.concatenate([(features.T @ p + l2 * weights).ravel(), p.sum(0)])

    options = {"maxiter": 5000, "maxfun": 50000, "gtol": 1e-10, "ftol": 0}
    start = np.zeros((width + 1) * classes)
    found = scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    assert np.abs(objective(found.x)[1]).max() < 1e-6
    return found.x[:-classes].reshape(width, classes), found.x[-classes:]


@pytest.mark.parametrize("l2", [10.0, 1.0, 1e-3])
def test_logistic_regression_is_that_of_scipy(l2):
    features, labels = problem()
    weights, bias = reference(features, labels, 7, l2)
    with jax.enable_x64(True):
        fit = logistic_regression(features, labels, 7, l2=l2, iterations=3000, tolerance=1e-9)
    assert fit.gradient <= 1e-9 and fit.steps < 3000
    np.testing.assert_allclose(fit.classifier.weights, weights, rtol=0, atol=1e-4)
    np.testing.assert_allclose(fit.classifier.bias, bias, rtol=0, atol=1e-4)


def test_logistic_regression_converges_in_float32_and_says_when_it_has_not():
    features, labels = problem()
    fit = logistic_regression(features, labels, 7)
    assert fit.gradient <= OPTIONS["tolerance"] and fit.steps < 100
    weights, _ = reference(features, labels, 7, 1.0)
    np.testing.assert_allclose(fit.classifier.weights, weights, rtol=0, atol=1e-3)
    early = logistic_regression(features, labels, 7, iterations=2)
    assert early.steps == 2 and early.gradient > OPTIONS["tolerance"]
    again = logistic_regression(features, labels, 7)
    assert (again.classifier.weights == fit.classifier.weights).all()


def test_a_fit_without_a_penalty_is_refused():
    with pytest.raises(ValueError, match="l2 is 0"):
        logistic_regression(*problem(), 7, l2=0)


def test_classes_are_told_alike_in_any_order():
    (train, labels), (test, own) = problem(0), problem(0, n=60)
    order = np.random.default_rng(1).permutation(7)
    with jax.enable_x64(True):
        for fit in (
            nearest_mean,
            lambda x, y, c: logistic_regression(x, y, c, tolerance=1e-10).classifier,
        ):
            scores = fit(train, labels, 7).scores(test)
            permuted = fit(train, order[labels], 7).scores(test)
            np.testing.assert_allclose(permuted[:, order], scores, rtol=0, atol=1e-7)
            for top in (1, 3):
                assert accuracy(scores, own, top) == accuracy(permuted, order[own], top)


def test_nearest_mean_is_a_cosine():
    features, labels = problem()
    scores = nearest_mean(features, labels, 7).scores(features)
    mean = features[labels == 2].mean(0)
    expected = features @ mean / np.linalg.norm(mean)
    np.testing.assert_allclose(scores[:, 2], expected, rtol=0, atol=1e-12)


def test_accuracy_counts_ranks_and_shares_ties():
    scores = np.array([[3.0, 2, 1, 0], [0, 1, 2, 3], [1, 1, 1, 1], [0, 2, 2, 1]])
    labels = np.array([0, 0, 1, 2])
    assert accuracy(scores, labels, 1) == (1 + 0 + 1 / 4 + 1 / 2) / 4
    assert accuracy(scores, labels, 2) == (1 + 0 + 2 / 4 + 1) / 4
    assert accuracy(scores, labels, 4) == 1
    scores[0, 3] = np.nan
    assert accuracy(scores, labels, 4) == 3 / 4


def test_unit_leaves_zeros_and_passes_on_what_is_no_number():
    found = unit(np.array([[3.0, 4], [0, 0], [np.nan, 1]]))
    np.testing.assert_array_equal(found, [[0.6, 0.8], [0, 0], [np.nan, np.nan]])


def test_t_interval():
    found = t_interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2  # 4.302653: the 97.5 % quantile for 2 degrees of freedom, of any table
    np.testing.assert_allclose([found["low"], found["high"]], 2 + np.array([-1, 1]) * 4.302653 / 3**0.5, rtol=1e-6)
    assert np.isnan(t_interval([1.0])["low"]) and t_interval([0.5, 0.5])["high"] == 0.5
    rng = np.random.default_rng(0)
    covered = [t_interval(rng.normal(size=5)) for _ in range(4000)]
    share = np.mean([each["low"] < 0 < each["high"] for each in covered])
    assert abs(share - 0.95) < 4 * (0.95 * 0.05 / 4000) ** 0.5


# --- draws


def test_draws_are_pairs_of_different_images_of_a_class():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3, 5], [7, 2, 1, 6, 4]))
    pairs, classes = draw_pairs(labels, 6, seed=0)
    assert classes.tolist() == [0, 1, 3, 5] and pairs.shape == (6, 4, 2)
    assert (labels[pairs] == classes[None, :, None]).all()
    assert (pairs[..., 0] != pairs[..., 1]).all()
    for at, draws in enumerate((3, 1, 3, 2)):  # as many as there are images for share none
        assert len(np.unique(pairs[:draws, at])) == 2 * draws
    assert (draw_pairs(labels, 6, seed=0)[0] == pairs).all()
    assert (draw_pairs(labels, 3, seed=0)[0] == pairs[:3]).all()
    assert (draw_pairs(labels, 6, seed=1)[0] != pairs).any()


def test_images_are_chosen_by_seed():
    labels = [0] * 30 + [1] * 2 + [2] + [3] * 5
    chosen = labelled.choose(labels, 5, seed=0)
    assert (np.diff(chosen) > 0).all()
    assert np.bincount(np.asarray(labels)[chosen]).tolist() == [5, 2, 0, 5]
    assert (labelled.choose(labels, 5, seed=0) == chosen).all()
    assert (labelled.choose(labels, 5, seed=1) != chosen).any()


# --- planted features


def planted(patches_tell: bool, classes: int = 24, images: int = 20, width: int = 48) -> Found:
    """Two orthogonal halves of the features: one tells the class, the other is noise of every image alone."""
    rng = np.random.default_rng(3)
    labels = rng.permutation(np.repeat(np.arange(classes), images)).astype(np.int32)
    n, half = len(labels), width // 2
    telling = np.concatenate([np.eye(half)[labels] * 4 + 0.1 * rng.normal(size=(n, half)), np.zeros((n, half))], 1)
    other = np.concatenate([np.zeros((n, half)), rng.normal(size=(n, half))], 1)
    parts = {"patches": telling, "registers": other} if patches_tell else {"patches": other, "registers": telling}
    columns = {"layerscale full": telling + other, **{f"layerscale {name}": part for name, part in parts.items()}}
    columns = {name: value.astype(np.float32) for name, value in columns.items()}
    columns |= {"label": labels, "classes": np.full(n, classes + 2, np.int32), "image": np.arange(n)}
    return Found(n, columns, {}, {}, {})


def numbers_of(found: Found, **options) -> dict:
    return EXPERIMENT.numbers({"labelled": found}, about(), OPTIONS | options)


@pytest.mark.parametrize("patches_tell", [True, False])
def test_who_carries_the_class_tells_it_and_the_other_is_at_chance(patches_tell):
    numbers = numbers_of(planted(patches_tell))
    json.dumps(numbers, allow_nan=False)
    telling, other = ("patches", "registers") if patches_tell else ("registers", "patches")
    assert (numbers["classes"], numbers["draws"], numbers["reads"]) == (24, 10, "top5")
    assert numbers["draws that share no image"] == 10
    assert numbers["left out"] == {"classes": 2, "images": 0}
    assert numbers["chance"] == {"top1": 1 / 24, "top5": 5 / 24}
    stage = numbers["layerscale"]
    assert stage["fit"]["converged"] == 10 and stage["fit"]["largest gradient"] <= OPTIONS["tolerance"]
    for classifier in ("logistic", "nearest mean"):
        assert stage[classifier][telling]["top1"] == {"mean": 1, "low": 1, "high": 1}
        for top, chance in numbers["chance"].items():
            interval = stage[classifier][other][top]
            assert interval["low"] < chance < interval["high"] < 0.4


def test_numbers_are_those_of_their_seed():
    found = planted(True)
    found.per_image["layerscale full"][:] += np.random.default_rng(0).normal(size=(480, 48)) * 2
    assert numbers_of(found) == numbers_of(found)
    assert numbers_of(found, seed=1)["layerscale"] != numbers_of(found)["layerscale"]


def test_intervals_are_over_draws_that_share_no_image():
    """Of fewer images all draws would reuse them: only those that share none count."""
    few = planted(True, images=6)
    few.per_image["layerscale full"][:] += np.random.default_rng(0).normal(size=(144, 48)) * 2
    few = numbers_of(few)
    assert (few["draws"], few["draws asked for"], few["draws that share no image"]) == (3, 10, 3)
    full = few["layerscale"]["logistic"]["full"]["top1"]
    assert full["high"] > full["mean"] and few["layerscale"]["fit"]["converged"] <= 3
    assert "3 draws that share no image, of 10 asked for" in sample(few)
    # One class of three images leaves one draw: all count, and that is said.
    found = planted(True, images=3)
    one = numbers_of(found)
    assert (one["draws"], one["draws that share no image"]) == (10, 1)
    assert "10 draws of which 1 share no image: intervals are too short" in sample(one)
    results, models = results_of({"S": 0.6, "L": 0.1, "g": 0.1})
    for each in results.values():
        each |= {"draws": 10, "draws that share no image": 1}
    (claim,) = EXPERIMENT.claims(results, models)
    assert claim.holds is None and claim.by.startswith("needs at least 2 draws that share no image")


def test_the_default_draws_share_no_image():
    assert {option.name: option.default for option in PASS.options}["per_class"] >= 2 * OPTIONS["draws"]
    late = {option.name for option in EXPERIMENT.options if option.late}
    assert late == {"draws", "seed", "top", "l2", "iterations", "tolerance"}  # what `measure` and the pass do not read
    assert all(
        option.least is not None and option.default >= option.least for option in EXPERIMENT.options if option.late
    )


def test_few_classes_are_read_by_the_highest_score_alone():
    found = planted(True, classes=6)
    numbers = numbers_of(found)
    assert numbers["reads"] == "top1" and "top 5 of 6 classes" in numbers["note"]
    assert numbers["chance"] == {"top1": 1 / 6, "top5": 5 / 6}
    assert numbers_of(found, top=3)["reads"] == "top3"
    assert set(numbers_of(found, top=1)["layerscale"]["logistic"]["full"]) == {"top1"}


def test_one_class_gives_no_accuracy():
    found = planted(True, classes=1)
    numbers = numbers_of(found)
    assert numbers["classes"] == 1 and "layerscale" not in numbers and "at least 2" in numbers["note"]
    assert EXPERIMENT.table({"m": numbers}, {"m": about("m")}) is None
    assert EXPERIMENT.figures(View({"m": numbers}, {"m": about("m")}, {}, {})) == {}


# --- what is measured of a model


look = jax.jit(observe)
measured = jax.jit(outputs, static_argnames=("stage", "bias", "keep_cls"))


@jax.jit
def zeroed(model: ViT, images: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[CLS]'s last update and the output, where the mask is 1 on attention weights that are set to zero."""
    out = model(images, {"pattern": Edit(mask)}, record=("attn_out",))
    return out.trace["attn_out"][-1, :, 0], out.cls


def test_outputs_are_those_of_a_run_with_the_other_attention_at_zero(model):
    images = random_images(0, 2, 20)
    trace = look(model, images)
    P, depth = model.prefix, model.config.depth
    sources = {"cls": [0], "registers": list(range(1, P)), "patches": [P]}
    if P == 1:
        del sources["registers"]
    sources |= {"full": list(range(P + 1)), "skip": []}
    for keep_cls in (False, True):
        found = {stage: measured(trace, model, stage, keep_cls=keep_cls) for stage in ("layerscale", "final")}
        assert set(found["final"]) == set(sources) and set(sources) - set(found["layerscale"]) == {"skip"}
        for name, kept in sources.items():
            mask = np.zeros((depth, 1, 1, P + 1, P + 1), np.float32)
            mask[-1, :, :, 0] = 1
            mask[-1, :, :, 0, kept + ([0] if keep_cls and name in ("patches", "registers") else [])] = 0
            update, cls = zeroed(model, images, mask)
            if name in found["layerscale"]:
                np.testing.assert_allclose(found["layerscale"][name], update, rtol=0, atol=2e-5)
            np.testing.assert_allclose(found["final"][name], cls, rtol=0, atol=1e-4)


def test_the_bias_can_be_left_out(model):
    trace = look(model, random_images(0, 2, 20))
    with_bias, without = (measured(trace, model, "layerscale", bias=bias) for bias in (True, False))
    bias = with_bias["full"] - without["full"]
    assert np.abs(bias).max() > 1e-3
    for name in with_bias:
        np.testing.assert_allclose(with_bias[name] - without[name], bias, rtol=0, atol=1e-5)
    total = sum(without[name] for name in without if name != "full")
    np.testing.assert_allclose(total, without["full"], rtol=0, atol=1e-5)
    final = [measured(trace, model, "final", bias=bias)["patches"] for bias in (True, False)]
    np.testing.assert_array_equal(*final)


def patches_alone_tell() -> ViT:
    """Before the last layer no token hears of another, and there [CLS] attends to all alike: what registers bring is
    the same for every image.
    """
    model = random_model(CONFIG)
    params = dict(to_params(model))
    gamma, qkv, bias = (params[f"blocks.{name}"] for name in ("scale1.gamma", "attn.qkv.kernel", "attn.qkv.bias"))
    return from_params(
        CONFIG,
        params
        | {
            "blocks.scale1.gamma": gamma.at[:-1].set(0.0),
            "blocks.attn.qkv.kernel": qkv.at[-1, :, :2].set(0.0),
            "blocks.attn.qkv.bias": bias.at[-1].set(0.0),
            # The constant part is small beside that of the patches.
            "registers": 0.01 * params["registers"],
            "blocks.attn.proj.bias": 0 * params["blocks.attn.proj.bias"],
        },
    )


def picture(rng: np.random.Generator, label: int) -> Image.Image:
    noise = rng.integers(-12, 13, (22, 20, 3))
    return Image.fromarray(np.clip(COLOURS[label] + noise, 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A class for each of 8 colours, images at two depths, and what a folder should survive."""
    root = tmp_path_factory.mktemp("classes")
    rng = np.random.default_rng(0)
    for label in range(len(COLOURS)):
        for i in range(5):
            place = root / f"colour {label}" / ("deeper" if i % 2 else "")
            place.mkdir(parents=True, exist_ok=True)
            picture(rng, label).save(place / f"{i}.png")
    (root / "colour 0" / "0.png").write_bytes(b"no image")  # the first of all: every row after it is shifted
    (root / "colour 3" / "deeper" / "1.png").write_bytes(b"")
    for name in ("alone", "broken", "empty", ".hidden"):
        (root / name).mkdir()
    picture(rng, 1).save(root / "alone" / "0.png")
    picture(rng, 1).save(root / "broken" / "0.png")
    (root / "broken" / "1.png").write_bytes(b"no image")
    picture(rng, 1).save(root / ".hidden" / "0.png")
    (root / "notes.txt").write_text("not a class")
    return root


def request(images: Labelled | None, **options) -> Request:
    of_pass = {option.name: options.pop(option.name, option.default) for option in PASS.options}
    given = {"A4": OPTIONS | options, "labelled": of_pass}
    return Request((), [EXPERIMENT], given, images, batch_size=3, progress=False)


def run(model: ViT, asked: Request, place: Path, **more) -> Store:
    """As a session runs a pass."""
    measure = PASS.measure(asked, about())
    return run_pass(
        Store(place, PASS.settings(asked)),
        lambda arguments, images, position: measure(*arguments, images, position),
        (model, None, PASS.extra(asked, None, {})),
        PASS.sources(asked),
        model.config,
        batch_size=asked.batch_size,
        known=PASS.known(asked),
        **more,
    )


def told(store: Store, asked: Request) -> dict:
    return EXPERIMENT.numbers({"labelled": store.found().of("A4/")}, about(), asked.options["A4"])


def test_a_model_whose_patches_alone_carry_the_class(folder, tmp_path):
    asked = request(labelled.parse(str(folder)), draws=6)
    store = run(patches_alone_tell(), asked, tmp_path)
    assert sorted(Path(each["image"]).parent.name for each in store.skipped) == ["broken", "colour 0", "deeper"]
    columns = store.found().per_image
    names = [asked.labelled.sources[i].relative_to(folder).parts[0] for i in PASS.chosen(asked)[columns["image"]]]
    assert names == [asked.labelled.classes[label] for label in columns["A4/label"]]
    numbers = told(store, asked)
    assert (numbers["classes"], numbers["draws"], numbers["draws that share no image"]) == (8, 2, 2)
    assert numbers["draws asked for"] == 6
    assert numbers["left out"] == {"classes": 3, "images": 1}  # alone, broken, empty; the good one of broken
    assert numbers["reads"] == "top1"
    for classifier in ("logistic", "nearest mean"):
        each = numbers["layerscale"][classifier]
        assert set(each) == {"full", "patches", "registers", "cls"}
        assert each["full"]["top1"]["mean"] == each["patches"]["top1"]["mean"] == 1
        assert each["registers"]["top1"] == pytest.approx({"mean": 1 / 8, "low": 1 / 8, "high": 1 / 8})
        assert each["cls"]["top1"]["mean"] == pytest.approx(1 / 8)
        final = numbers["final"][classifier]
        assert set(final) == set(READINGS)
        assert final["full"]["top1"]["mean"] > 0.9 and final["patches"]["top1"]["mean"] > 0.9
        assert final["registers"]["top1"]["mean"] == pytest.approx(1 / 8) == final["skip"]["top1"]["mean"]


def test_the_accuracy_of_every_draw_is_kept(folder, tmp_path):
    asked = request(labelled.parse(str(folder)), draws=2, stage="layerscale")
    numbers = told(run(patches_alone_tell(), asked, tmp_path), asked)
    for classifier in ("logistic", "nearest mean"):
        for reading, each in numbers["layerscale"][classifier].items():
            draws = numbers["layerscale"]["draws"][classifier][reading]["top1"]
            assert len(draws) == numbers["draws"] == 2 and each["top1"]["mean"] == pytest.approx(np.mean(draws))


def test_a_stopped_pass_keeps_its_labels(folder, tmp_path, monkeypatch):
    asked = request(labelled.parse(str(folder)), stage="layerscale")
    model = patches_alone_tell()
    whole = run(model, asked, tmp_path / "whole").found().per_image
    store = Store(tmp_path / "parts", PASS.settings(asked))
    add = Store.add

    def stopping(self, *arguments):
        if self.n >= 9:
            raise KeyboardInterrupt
        add(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "add", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(model, asked, tmp_path / "parts", save_every=0)
    store = Store(tmp_path / "parts", PASS.settings(asked))
    assert store.n == 9 and not store.done
    parts = run(model, asked, tmp_path / "parts").found().per_image
    assert set(parts) == set(whole) and "A4/layerscale full" in parts
    for name in whole:
        np.testing.assert_array_equal(parts[name], whole[name])


def test_a_model_without_registers_or_of_few_bits(folder, tmp_path):
    asked = request(labelled.parse(str(folder)), draws=2)
    model = random_model(replace(FAMILIES["dinov2"], preprocess=CONFIG.preprocess))
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), model)
    for each, place in ((model, "whole"), (half, "half")):
        # Attention weights are in float32 whatever the model is, and are multiplied with its values.
        with jax.numpy_dtype_promotion("standard"):
            store = run(each, asked, tmp_path / place)
        numbers = told(store, asked)
        assert set(numbers["layerscale"]["logistic"]) == {"full", "patches", "cls"}
        assert store.found().per_image["A4/final full"].dtype == np.float32
    (claim,) = EXPERIMENT.claims({"model": numbers}, {"model": about(registers=0)})
    assert (
        claim.holds is None
        and claim.on == "DINOv2"
        and claim.by.startswith("needs trained models with registers, and images")
    )
    assert "registers" in EXPERIMENT.table({"model": numbers}, {"model": about(registers=0)}).head


def test_the_pass_says_what_it_lacks_and_what_it_depends_on(folder):
    assert "--labelled" in PASS.refuses(request(None), about())
    images = labelled.parse(str(folder))
    assert PASS.refuses(request(images), about()) is None
    same, other = PASS.settings(request(images)), PASS.settings(request(images, per_class=2))
    assert same == PASS.settings(request(labelled.parse(str(folder)))) != other
    assert len(PASS.sources(request(images, per_class=2))) == 2 * 9


# --- folders and datasets


def test_a_folder_is_classes_by_name(folder):
    found = labelled.labelled_folder(folder)
    assert found.classes == ["alone", "broken", *(f"colour {i}" for i in range(8)), "empty"]
    assert len(found.sources) == len(found.labels) == 8 * 5 + 1 + 2
    assert all(found.classes[label] in str(path) for path, label in zip(found.sources, found.labels, strict=True))


def test_folders_that_have_no_classes(folder, tmp_path):
    with pytest.raises(ImageError, match="is not there"):
        labelled.parse(str(tmp_path / "nowhere"))
    with pytest.raises(ImageError, match="a file, not a folder"):
        labelled.parse(str(folder / "notes.txt"))
    with pytest.raises(ImageError, match="no subfolders"):
        labelled.parse(str(folder / "alone"))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        picture(np.random.default_rng(0), 0).save(tmp_path / name / "0.png")
    picture(np.random.default_rng(0), 0).save(tmp_path / "a" / "1.png")
    with pytest.raises(ImageError, match="1 of 2 classes have two images or more"):
        labelled.parse(str(tmp_path))


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """The package, with a cache of its own and without a network."""
    package = pytest.importorskip("datasets")

    def barred(*arguments):
        raise AssertionError("something reached for the network")

    monkeypatch.setattr(socket.socket, "connect", barred)
    monkeypatch.setattr(socket, "getaddrinfo", barred)
    monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(package.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys.modules["huggingface_hub"].constants, "HF_HUB_OFFLINE", True)
    package.disable_progress_bars()
    return package


def colours(datasets, count: int = 4, label: str = "label", **more):
    """`count` images of each colour, mixed; the last image has no label."""
    rng = np.random.default_rng(5)
    labels = [*rng.permutation(np.repeat(np.arange(8), count)).tolist(), -1]
    columns = {"image": [picture(rng, i) for i in labels], label: labels}
    names = [f"colour {i}" for i in range(8)]
    features = {"image": datasets.Image(), label: datasets.ClassLabel(names=names)}
    columns |= {name: values for name, (_, values) in more.items()}
    features |= {name: kind for name, (kind, _) in more.items()}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features)), labels


def test_a_saved_dataset_is_read_row_by_row(datasets, tmp_path, monkeypatch):
    dataset, labels = colours(datasets)
    dataset.save_to_disk(tmp_path / "saved")
    decoded = []
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *a, **k: decoded.append(a))
    found = labelled.parse(f"datasets:{tmp_path / 'saved'}")
    assert list(found.labels) == labels[:-1] and found.classes == [f"colour {i}" for i in range(8)]
    assert len(found.sources) == 32 and decoded == []
    for i in (0, 7, 31):
        pixels = jaxvit.decode(found.sources[i].fetch())
        assert np.abs(pixels.mean((0, 1)) - COLOURS[labels[i]]).max() < 10
    assert str(found.sources[3]).endswith(" row 3") and found.sources[2:4][1].number == 3
    again = labelled.parse(f"datasets:{tmp_path / 'saved'}")
    assert str(again.sources[3]) == str(found.sources[3])


def test_a_dataset_gives_what_a_folder_gives(datasets, tmp_path):
    """Also where some of its images are no images."""
    dataset, labels = colours(datasets)
    rows = [dict(row) for row in dataset.cast_column("image", datasets.Image(decode=False))]
    rows[0]["image"] = {"bytes": b"no image", "path": None}
    rows[1]["image"] = None
    broken = datasets.Dataset.from_list(rows, features=dataset.features)
    broken.save_to_disk(tmp_path / "saved")
    asked = request(labelled.parse(f"datasets:{tmp_path / 'saved'}"), draws=3)
    store = run(patches_alone_tell(), asked, tmp_path / "pass")
    assert [each["image"].split()[-2:] for each in store.skipped] == [["row", "0"], ["row", "1"]]
    columns = store.found().per_image
    assert columns["A4/label"].tolist() == labels[2:-1]
    numbers = told(store, asked)
    assert numbers["classes"] == 8
    for classifier in ("logistic", "nearest mean"):
        assert numbers["layerscale"][classifier]["patches"]["top1"]["mean"] == 1
        assert numbers["layerscale"][classifier]["registers"]["top1"]["mean"] == pytest.approx(1 / 8)


def test_a_row_may_be_the_path_of_a_file(datasets, tmp_path):
    picture(np.random.default_rng(0), 3).save(tmp_path / "there.png")
    paths = [str(tmp_path / name) for name in ("there.png", "lost.png")]
    dataset = datasets.Dataset.from_dict({"image": paths}, features=datasets.Features({"image": datasets.Image()}))
    there, lost = image_sets.Rows(dataset, "image", range(2), "paths")
    assert there.fetch() == (tmp_path / "there.png").read_bytes()
    with pytest.raises(ImageError, match=r"empty \(0 bytes\)"):
        jaxvit.decode(lost.fetch())


def test_splits(datasets, tmp_path):
    few, _ = colours(datasets, 2)
    many, _ = colours(datasets, 3)
    datasets.DatasetDict({"train": many, "validation": few}).save_to_disk(tmp_path / "saved")
    place = f"datasets:{tmp_path / 'saved'}"
    assert len(labelled.parse(place).sources) == 16  # validation, if there is one
    found = labelled.parse(f"{place}:train")
    assert len(found.sources) == 24 and found.name == f"{place}:train"
    with pytest.raises(ImageError, match="no split test; it has train, validation"):
        labelled.parse(f"{place}:test")
    few.save_to_disk(tmp_path / "one")
    assert len(labelled.parse(f"datasets:{tmp_path / 'one'}").sources) == 16
    with pytest.raises(ImageError, match="holds one split"):
        labelled.parse(f"datasets:{tmp_path / 'one'}:train")


def test_a_folder_of_images_read_as_a_dataset(datasets, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            picture(rng, 1).save(tmp_path / "images" / name / f"{i}.png")
    found = labelled.parse(f"datasets:{tmp_path / 'images'}")
    assert found.classes == ["a", "b"] and found.labels == [0, 0, 0, 1, 1, 1]
    assert jaxvit.decode(found.sources[4].fetch()).shape == (22, 20, 3)


def test_columns_are_found_by_type_and_by_name(datasets, tmp_path):
    extra = np.arange(33) % 3
    coarse = (datasets.ClassLabel(names=["x", "y", "z"]), extra.tolist())
    dataset, labels = colours(datasets, label="fine_label", coarse=coarse)
    dataset.save_to_disk(tmp_path / "two")
    assert labelled.parse(f"datasets:{tmp_path / 'two'}").labels == labels[:-1]
    found = labelled.labelled_dataset(str(tmp_path / "two"), label="coarse")
    assert found.classes == ["x", "y", "z"] and found.labels == extra.tolist()
    words = [None if i == 32 else f"word {i % 2}" for i in range(33)]
    dataset = dataset.remove_columns(["fine_label", "coarse"]).add_column("cls", words)
    dataset.save_to_disk(tmp_path / "words")
    found = labelled.parse(f"datasets:{tmp_path / 'words'}")
    assert found.classes == ["word 0", "word 1"] and found.labels == [0, 1] * 16


def test_datasets_that_cannot_be_used(datasets, tmp_path):
    dataset, _ = colours(datasets)
    dataset.remove_columns("label").save_to_disk(tmp_path / "unlabelled")
    with pytest.raises(ImageError, match="needs one label column and has none; its columns are image"):
        labelled.parse(f"datasets:{tmp_path / 'unlabelled'}")
    dataset.remove_columns("image").save_to_disk(tmp_path / "imageless")
    with pytest.raises(ImageError, match="needs one image column and has none"):
        labelled.parse(f"datasets:{tmp_path / 'imageless'}")
    dataset.select(range(1)).save_to_disk(tmp_path / "small")
    with pytest.raises(ImageError, match="0 of 8 classes have two images"):
        labelled.parse(f"datasets:{tmp_path / 'small'}")
    dataset.save_to_disk(tmp_path / "good")
    with pytest.raises(ImageError, match="no column 'kind'; it has image, label"):
        labelled.labelled_dataset(str(tmp_path / "good"), label="kind")
    with pytest.raises(ImageError, match="names no dataset"):
        labelled.parse("datasets:")
    with pytest.raises(ImageError, match="dataset nobody/nothing, split train, cannot be loaded"):
        labelled.parse("datasets:nobody/nothing:train")


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImageError, match="pip install datasets"):
        labelled.parse("datasets:cifar10")


# --- what is made of the numbers


def results_of(patches: Mapping[str, float], half: float = 0.02) -> tuple[dict, dict[str, About]]:
    models = {size: about(size, size, parameters) for parameters, size in enumerate(patches)}
    results, template = {}, json.dumps(numbers_of(planted(True)))
    for size, mean in patches.items():
        each = json.loads(template)
        for classifier in ("logistic", "nearest mean"):
            interval = {"mean": mean, "low": mean - half, "high": mean + half}
            each["layerscale"][classifier]["patches"]["top5"] = interval
        results[size] = each
    return results, models


def test_the_claim_is_of_the_patches_in_large_and_small_models():
    (claim,) = EXPERIMENT.claims(*results_of({"S": 0.6, "B": 0.65, "L": 0.3, "g": 0.1}))
    assert claim.holds is True and claim.ordering == 3 and claim.on == "DINOv2: S, B, L, g"
    assert "S 60.0 ± 2.0 %" in claim.by and "g 10.0" in claim.by and "top-5 of 24 classes, 10 draws;" in claim.by
    assert "1.5 times" in claim.text and "(read" not in claim.text
    (claim,) = EXPERIMENT.claims(*results_of({"S": 0.6, "B": 0.65, "L": 0.58, "g": 0.1}))
    assert claim.holds is False  # less, but within the intervals
    (claim,) = EXPERIMENT.claims(*results_of({"S": 0.6, "B": 0.65, "L": 0.45, "g": 0.1}))
    assert claim.holds is False  # intervals apart, but not far less
    (claim,) = EXPERIMENT.claims(*results_of({"S": 0.6, "B": 0.65, "L": 0.39, "g": 0.1}, half=0.2))
    assert claim.holds is False  # far less, but within the intervals
    (claim,) = EXPERIMENT.claims(*results_of({"S": 0.6}))
    assert claim.holds is None
    results, models = results_of({"S": 0.6, "L": 0.1, "g": 0.1})
    for each in results.values():
        each["reading"] |= {"keep_cls": True, "l2": 0.1}
    assert EXPERIMENT.claims(results, models)[0].text.endswith("(read: keep cls, l2 0.1).")
    results["g"]["classes"] = 1000
    (claim,) = EXPERIMENT.claims(results, models)
    assert claim.holds is None and "not of the same classes" in claim.by
    results["g"]["classes"] = 24
    results["g"]["layerscale"]["logistic"]["patches"]["top5"] = {"mean": 0.1, "low": None, "high": None}  # one draw
    assert EXPERIMENT.claims(results, models)[0].holds is None
    for models_given in (models, {}):
        (claim,) = EXPERIMENT.claims({}, models_given)
        assert (claim.holds, claim.on, claim.ordering) == (None, "DINOv2", 3)


def test_table_and_figure_show_accuracies_and_chance():
    results, models = results_of({"S": 0.6, "g": 0.1})
    table = EXPERIMENT.table(results, models)
    assert [row[0] for row in table.rows] == ["S", "S", "g", "g"]
    assert all(len(row) == len(table.head) for row in table.rows)
    row = dict(zip(table.head, table.rows[0], strict=True))
    full = results["S"]["layerscale"]["logistic"]["full"]["top5"]
    assert row["full"] == f"{100 * full['mean']:.1f} ± {100 * (full['high'] - full['mean']):.1f} %"
    assert row["patches"] == "60.0 ± 2.0 %"
    assert row["chance"].startswith("20.8")
    assert "top-5 of 24 classes, 10 draws" in table.note
    figures = EXPERIMENT.figures(View(results, models, {}, {}))
    assert set(figures) == {"3b"}
    for axes in figures["3b"].axes:
        heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers if len(bars) == 2}
        np.testing.assert_allclose(heights["patches"], [60, 10])
        dashes = {tuple(np.round(line.get_ydata(), 3)) for line in axes.lines if len(line.get_ydata()) == 2}
        assert (20.833, 20.833) in dashes
    figures["3b"].canvas.draw()
    assert EXPERIMENT.figures(View({}, models, {}, {})) == {} and EXPERIMENT.table({}, models) is None

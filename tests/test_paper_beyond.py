"""B1, B2, B4, B5, B6 and the replacement controls: identities on random models, and models whose answer is known."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, TINY, random_images, random_model
from matplotlib.figure import Figure
from paper import about_of, defaults, drawn_numbers, found_of, numbers_of

import jaxvit
from experiments.beyond import (
    b1_token_flow,
    b2_replacement,
    b4_outliers,
    b5_test_time_registers,
    b6_rollout,
    b7_open_questions,
)
from experiments.core import controls, examples
from experiments.core.charts import styled, write_figure
from experiments.core.claims import FEWEST
from experiments.core.experiment import Experiment, Measured, Subject, View
from experiments.core.passes import Clean, Request
from experiments.core.trace import cls_reading, median, observe, parts, widened
from experiments.models import test_time
from experiments.paper import a5_patch_cosine
from experiments.runner import registry
from experiments.runner.store import Store, run_pass
from jaxvit import ActivationStats, Take, ViT, ViTConfig
from jaxvit.analysis.decompose import attention_parts, contributions, rollout
from jaxvit.analysis.similarity import cosine
from jaxvit.model.config import Preprocess
from jaxvit.model.params import from_params, to_params

SIDE = 20
move_to_registers = jaxvit.test_time_registers
PREPARED = dict(preprocess=Preprocess(SIDE, SIDE))


@partial(jax.jit, static_argnames="record")
def run(model, images, edits=None, record=()):
    return model(images, edits, record=dict(record))


def takes(**sites) -> tuple:
    return tuple(sites.items())


def model_of(family: str, **changes) -> ViT:
    return random_model(replace(FAMILIES[family], **PREPARED, **changes))


def changed(model: ViT, **arrays) -> ViT:
    """With other parameters; names have two underscores for a dot, values are arrays or functions of the old ones."""
    params = {name: np.array(value) for name, value in to_params(model).items()}
    for name, new in arrays.items():
        name = name.replace("__", ".")
        params[name] = new(params[name]) if callable(new) else np.broadcast_to(new, params[name].shape)
    return from_params(model.config, {name: jnp.asarray(value, jnp.float32) for name, value in params.items()})


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8))


def prepared(sources: list[np.ndarray], model: ViT) -> jax.Array:
    return jaxvit.prepare(sources, model.config)


def request_of(sources, experiments, **more) -> Request:
    chosen = more.pop("options", {})
    options = {e.id: defaults(e, **chosen.get(e.id, {})) for e in experiments}
    options |= {p.name: defaults(p, **chosen.get(p.name, {})) for p in registry.PASSES}
    return Request(sources, experiments, options, progress=False, **more)


def run_passes(folder, request: Request, subject: Subject, *passes) -> dict:
    """What the passes find, each with what those before it found, by the engine itself."""
    found = {}
    for each in passes:
        store = Store(folder / each.name, {})
        extra, measure = each.extra(request, subject, found), each.measure(request, subject.about)
        run_pass(
            store,
            lambda arguments, images, position, measure=measure: measure(*arguments, images, position),
            (subject.model, subject.edits, extra),
            each.sources(request),
            subject.model.config,
            batch_size=request.batch_size,
        )
        found[each.name] = store.found()
    return found


def drawn(experiment: Experiment, results, models, found, shown=None, folder=None) -> dict[str, Figure]:
    with styled():
        figures = experiment.figures(View(results, models, found, shown or {}))
        for name, figure in figures.items() if folder else ():
            write_figure(figure, folder, name)
    return figures


# --- B1


@pytest.mark.parametrize("family", ["dinov2", "dinov2 with registers"])
def test_token_flow_is_mean_attention_from_group_to_group(family):
    model, images = model_of(family), random_images(0, 5, SIDE)
    pattern = run(model, images, record=takes(pattern=Take(tokens="all"))).trace["pattern"]  # L B H T T
    mean, prefix = np.asarray(pattern, np.float64).mean((1, 2)), model.prefix
    parts = {"cls": slice(0, 1), "registers": slice(1, prefix), "patches": slice(prefix, None)}
    if not model.config.registers:
        del parts["registers"]
    expected = [[[layer[q, k].sum(1).mean() for k in parts.values()] for q in parts.values()] for layer in mean]
    numbers = numbers_of(b1_token_flow.EXPERIMENT, model, images)
    assert numbers["groups"] == list(parts)
    np.testing.assert_allclose(numbers["flow"], expected, atol=1e-6)
    np.testing.assert_allclose(np.sum(numbers["flow"], axis=-1), 1, atol=1e-6)
    each = np.asarray(pattern, np.float64).mean(2)[..., prefix:, :1].mean((2, 3))  # patches to [CLS], L B
    np.testing.assert_allclose(np.asarray(numbers["std"])[:, -1, 0], each.std(1), atol=2e-4)
    assert numbers["patches of all tokens"] == pytest.approx(25 / (25 + prefix))
    if prefix > 1:
        single = numbers["each register"]
        assert single["groups"] == ["cls", "register 0", "register 1", "register 2", "patches"]
        np.testing.assert_allclose(np.sum(single["flow"], axis=-1), 1, atol=1e-6)
        np.testing.assert_allclose(single["flow"][1][4][2], mean[1][prefix:, 2].mean(), atol=1e-6)
    else:
        assert "each register" not in numbers


def test_flow_of_uniform_attention_is_the_share_of_tokens():
    model = changed(model_of("dinov2 with registers"), blocks__attn__qkv__kernel=0.0, blocks__attn__qkv__bias=0.0)
    numbers = numbers_of(b1_token_flow.EXPERIMENT, model, random_images(0, 2, SIDE))
    np.testing.assert_allclose(numbers["flow"], np.broadcast_to(np.array([1, 3, 25]) / 29, (3, 3, 3)), atol=1e-6)
    np.testing.assert_allclose(numbers["std"], 0, atol=3e-4)


# --- controls and B2


CONTROLS = controls.Controls()


class Probe(Experiment):
    """Keeps what a run ends with, under every control."""

    id = "P"
    passes = ("clean", "controls")
    controlled = True

    def measure(self, trace, model, options):
        return Measured({"tokens": trace.tokens})


@pytest.mark.parametrize("family", ["dinov2 with registers", "dinov2"])
def test_mean_and_variance_of_controls_are_those_of_the_library(family, tmp_path):
    model, sources = model_of(family), pictures(7)
    request = request_of(sources, [b2_replacement.EXPERIMENT], batch_size=3)
    subject = Subject(about_of(model), model)
    extra = CONTROLS.extra(request, subject, run_passes(tmp_path, request, subject, Clean()))
    stats = ActivationStats.collect(model, prepared(sources, model), progress=False)
    mean, variance = (
        np.asarray(a)[:, 0, : model.prefix] for a in (stats.mean("resid_pre"), stats.variance("resid_pre"))
    )
    np.testing.assert_allclose(extra["mean"], mean, rtol=1e-5, atol=1e-6)
    # Their squares are summed from float32: a token that is the same in all images has not quite no variance.
    np.testing.assert_allclose(extra["std"] ** 2, variance, rtol=1e-4, atol=2e-6)
    entering = run(model, prepared(sources, model), record=takes(resid_pre=Take(tokens="prefix"))).trace["resid_pre"]
    np.testing.assert_allclose(extra["bank"], jnp.moveaxis(entering, 0, 1), rtol=1e-4, atol=1e-5)


def test_replacements_are_what_they_are_called():
    rng = np.random.default_rng(0)
    L, P, D, K = 2, 3, 5, 4
    extra = {
        "bank": jnp.asarray(rng.normal(size=(K, L, P, D)), jnp.float32),
        "mean": jnp.asarray(rng.normal(size=(L, P, D)), jnp.float32),
        "std": jnp.asarray(rng.uniform(0.1, 2, size=(L, P, D)), jnp.float32),
    }
    n = 4000
    make = jax.jit(lambda position: controls.replacements(extra, position, 0))
    zero, mean, noise, shuffle, donor = map(np.asarray, make(jnp.arange(n)))
    assert all(a.shape == (L, n, P, D) for a in (zero, mean, noise, shuffle, donor))
    assert not zero.any()
    np.testing.assert_array_equal(mean, np.repeat(np.asarray(extra["mean"])[:, None], n, 1))
    error = extra["std"] / n**0.5
    assert (np.abs(noise.mean(1) - extra["mean"]) < 5 * error).all()
    np.testing.assert_allclose(noise.std(1), extra["std"], rtol=0.06)
    drawn_once = noise[:, :2].reshape(2 * 2, -1)
    assert len(np.unique(drawn_once)) == drawn_once.size  # layers, images, tokens and channels each have their own
    bank = np.moveaxis(np.asarray(extra["bank"]), 0, 1)
    np.testing.assert_array_equal(shuffle[:, :6], bank[:, [1, 2, 3, 0, 1, 2]])
    np.testing.assert_array_equal(donor[:, :3], bank[:, [1, 0, 0]])
    for ours, whole in zip(make(jnp.array([7, 2])), (zero, mean, noise, shuffle, donor), strict=True):
        np.testing.assert_array_equal(ours, whole[:, [7, 2]])
    for other, whole in zip(controls.replacements(extra, jnp.arange(3), 1), (noise, shuffle), strict=False):
        assert other.shape[1] == 3 and whole.shape[1] == n
    assert (np.asarray(controls.replacements(extra, jnp.arange(3), 1)[2]) != noise[:, :3]).all()


@pytest.mark.parametrize("count", [2, 3, 64, 65])
def test_no_image_donates_to_itself(count):
    """Also where more images are run than donate."""
    size = min(count, 64)
    extra = {"bank": jnp.arange(size, dtype=jnp.float32)[:, None, None, None]}
    extra |= {name: jnp.zeros((1, 1, 1), jnp.float32) for name in ("mean", "std")}
    *_, shuffle, donor = controls.replacements(extra, jnp.arange(count), 0)
    for given in (shuffle, donor):
        assert (np.asarray(given).ravel() != np.arange(count)).all()
    assert set(np.asarray(donor).ravel().tolist()) == {0.0, 1.0}


def edited_by_hand(model, images, extra, control, edits=None):
    """The whole model, with the library's own `patch` in the layers of a control."""
    last = model.config.depth - 1
    layers = [last] if control.where == "last" else list(range(min(1, last), last + 1))
    value = controls.replacements(extra, jnp.arange(len(images)), 0)[controls.KINDS.index(control.kind)]
    patched = jaxvit.patch(model, "resid_pre", value, over="prefix", layers=layers, tokens=control.tokens)
    return run(model, images, jaxvit.merge(edits or {}, patched))


@pytest.mark.parametrize("case", ["registers", "giant with registers", "one block", "test-time registers"])
def test_every_control_is_a_run_of_the_whole_model_with_its_edit(case, tmp_path):
    """So a run that starts at the last block is the full run; and numbers do not depend on how images are batched."""
    family = {"test-time registers": "dinov2", "giant with registers": "dinov2 giant with registers"}
    depth = {"depth": 1} if case == "one block" else {}
    model, edits, sources = model_of(family.get(case, "dinov2 with registers"), **depth), None, pictures(5)
    if case == "test-time registers":
        model, edits = move_to_registers(model, jaxvit.Neurons(np.array([0, 2]), np.array([3, 4]), np.ones(2)))
    subject, experiments = Subject(about_of(model), model, edits), [Probe(), b2_replacement.EXPERIMENT]
    images = prepared(sources, model)
    clean, every = run(model, images, edits), controls.controls_of(model.config.registers)
    for size in (2, 3) if case == "registers" else (3,):
        request = request_of(sources, experiments, batch_size=size)
        found = run_passes(tmp_path / str(size), request, subject, Clean(), CONTROLS)
        extra, under = CONTROLS.extra(request, subject, found), found["controls"]
        assert {n.split("/")[0] for n in under.per_image if n != "image"} == {controls.NONE, *(c.name for c in every)}
        none = under.of(f"{controls.NONE}/").per_image
        np.testing.assert_allclose(none["P/tokens"], clean.tokens, atol=2e-4, rtol=1e-4)
        assert not [name for name in none if name.startswith("B2/")]  # a run compared with itself
        for control in every:
            out = edited_by_hand(model, images, extra, control, edits)
            columns = under.of(f"{control.name}/").per_image
            np.testing.assert_allclose(columns["P/tokens"], out.tokens, atol=2e-4, rtol=1e-4)
            np.testing.assert_allclose(columns["B2/cosine cls"], cosine(out.cls, clean.cls), atol=1e-4)
            patches = cosine(out.patches, clean.patches).mean(1)
            np.testing.assert_allclose(columns["B2/cosine patches"], patches, atol=1e-4)
            norms = [np.linalg.norm(o.tokens[:, model.prefix :], axis=-1) for o in (out, clean)]
            np.testing.assert_allclose(columns["B2/norm patches"], (norms[0] / norms[1] - 1).mean(1), atol=1e-4)


def b2_numbers(model, tmp_path, count=6, edits=None):
    e = b2_replacement.EXPERIMENT
    request = request_of(pictures(count), [e], batch_size=4)
    subject = Subject(about_of(model), model, edits)
    found = run_passes(tmp_path, request, subject, Clean(), CONTROLS)
    each = found["controls"]
    names = [{n: values[n] for n in values} for values in each[1:]]
    names = [{n.replace("/B2/", "/"): value for n, value in kind.items()} for kind in names]
    return e.numbers({"controls": type(each)(each.n, *names)}, subject.about, {})


def test_what_reaches_nobody_changes_nothing(tmp_path):
    """Attention whose output is multiplied by zero: patches know of no other token, [CLS] of no register."""
    model = changed(model_of("dinov2 with registers"), blocks__scale1__gamma=0.0)
    numbers = b2_numbers(model, tmp_path)
    assert list(numbers) == [c.name for c in controls.controls_of(3)]
    for name, each in numbers.items():
        assert each["cosine patches"]["min"] > 1 - 1e-5 and abs(each["norm patches"]["mean"]) < 1e-5
        if name.startswith("registers"):
            assert each["cosine cls"]["min"] > 1 - 1e-5
    # A [CLS] of zeros that enters the last block becomes what that block's MLP makes of it, whatever the image.
    images = prepared(pictures(6), model)
    alone = jax.jit(lambda m, x: m.run_from(2, x).cls)(model, jnp.zeros((1, model.layout.tokens, 32)))
    expected = cosine(run(model, images).cls, alone).mean()
    assert numbers["cls zero every"]["cosine cls"]["mean"] == pytest.approx(float(expected), abs=1e-4)


def test_cka_under_controls_is_of_clean_and_changed_cls(tmp_path):
    model = model_of("dinov2 with registers")
    numbers = b2_numbers(model, tmp_path, 6)
    images = prepared(pictures(6), model)
    request = request_of(pictures(6), [b2_replacement.EXPERIMENT], batch_size=6)
    subject = Subject(about_of(model), model)
    extra = CONTROLS.extra(request, subject, run_passes(tmp_path / "again", request, subject, Clean()))
    control = controls.Control("registers", "shuffle", "every")
    x, y = (
        np.asarray(out.cls, np.float64) - np.asarray(out.cls, np.float64).mean(0)
        for out in (run(model, images), edited_by_hand(model, images, extra, control))
    )
    expected = np.square(y.T @ x).sum() / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
    cka = numbers[control.name]["cka cls"]
    assert (cka["n"], cka["d1"], cka["d2"]) == (6, 32, 32)
    assert cka["biased"] == pytest.approx(expected, rel=1e-3)


def b2_planted(zero: float, others: float, n: int = FEWEST):
    return {
        c.name: {
            **{
                of: {"n": n, "mean": zero if c.kind == "zero" else others, "sem": 0.0}
                for of in ("cosine cls", "cosine patches")
            },
            "norm patches": {"mean": 0.1},
            "cka cls": {"n": 9, "d1": 4, "d2": 4, "biased": 0.5, "unbiased": 0.4, "null": 0.1},
        }
        for c in controls.controls_of(3)
    }


def test_the_claim_of_zeros_is_tested():
    about = about_of(model_of("dinov2 with registers"), "with", registers_are="trained", weights="trained", family="F")
    without = about_of(model_of("dinov2"), "without")
    models = {"with": about, "without": without}
    e = b2_replacement.EXPERIMENT
    for zero, others, holds in ((0.3, 0.9, True), (0.9, 0.8, False), (0.8, 0.8, False)):
        (claim,) = e.claims({"with": b2_planted(zero, others), "without": {}}, models)
        assert (claim.holds, claim.on, claim.ordering) == (holds, "F", 0)
        assert f"{zero:.3f}" in claim.by and f"{others:.3f}" in claim.by
    (claim,) = e.claims({"with": b2_planted(0.3, 0.9, n=3)}, models)
    assert claim.holds is None and claim.by.startswith("needs at least 30 images") and claim.by.endswith("n = 3")
    (claim,) = e.claims({"with": b2_planted(0.3, float("nan"))}, models)
    assert claim.holds is None and claim.by.startswith("undefined")
    assert e.claims({}, models) == [] and e.claims({"without": {}}, models) == []
    assert e.refuses(about) is None
    one = request_of(pictures(1), [e])
    assert "2 or more images" in CONTROLS.refuses(one, about)
    assert CONTROLS.refuses(request_of(pictures(2), [e]), about) is None
    assert CONTROLS.refuses(request_of(pictures(2), [e], control_images=1), about)


# --- B4


@pytest.mark.parametrize("n", [1, 2, 3, 8, 1001, 1002])
def test_the_median_by_counting_is_the_median(n):
    rng = np.random.default_rng(n)
    x = np.abs(rng.normal(size=(6, n))).astype(np.float32)
    x[1] = np.round(x[1])  # equal values
    x[2] = 0
    x[3] *= 1e-30
    x[4] *= 1e30
    np.testing.assert_allclose(jax.jit(median)(x), np.median(x, axis=1), rtol=1e-6)
    assert float(median(x[2:3])[0]) == 0


def test_norms_of_outliers_are_drawn_from_the_results_alone():
    model, e = model_of("dinov2 with registers"), b4_outliers.EXPERIMENT
    found = found_of(e, model, random_images(0, 6, SIDE))
    numbers = json.loads(json.dumps(e.numbers({"clean": found}, about_of(model), defaults(e))))
    shares, edges = (numbers["distribution"][name] for name in ("shares", "edges"))
    assert set(shares) == {"cls", "registers", "patches"}
    for each in shares.values():
        assert sum(each) == pytest.approx(1) and len(each) == len(edges) - 1
    expected = np.histogram(found.keep["norms"][:, model.prefix :], edges)[0] / (6 * 25)
    np.testing.assert_allclose(shares["patches"], expected)
    assert set(drawn(e, {"model": numbers}, {"model": about_of(model)}, {})) == {"b4-norms", "b4-massive"}


@pytest.mark.parametrize("family", ["dinov2", "dinov2 with registers"])
def test_outliers_and_activations_are_their_definitions(family):
    model, images = model_of(family), random_images(0, 6, SIDE)
    options = {"sigma": 1.5, "above": 4.0, "times": 5.0}
    e = b4_outliers.EXPERIMENT
    found = found_of(e, model, images, options)
    stream = np.asarray(run(model, images, record=takes(resid_post=Take())).trace["resid_post"], np.float64)  # L B T D
    norms, prefix = np.linalg.norm(stream, axis=-1), model.prefix
    patches = norms[..., prefix:]
    count = (patches > (patches.mean(-1) + 1.5 * patches.std(-1))[..., None]).sum(-1).T
    assert count.max() > 0
    np.testing.assert_array_equal(found.per_image["outliers"], count)
    np.testing.assert_allclose(found.per_image["largest norm"], patches.max(-1).T, rtol=1e-5)
    size = np.abs(stream).reshape(*stream.shape[:2], -1)
    np.testing.assert_allclose(found.per_image["activation median"], np.median(size, -1).T, rtol=1e-5)
    numbers = e.numbers({"clean": found}, about_of(model), defaults(e, **options))
    massive = (size.max(-1) > 4) & (size.max(-1) > 5 * np.median(size, -1))
    assert 0 < massive.mean() < 1
    np.testing.assert_allclose(numbers["massive"]["share of images"], massive.mean(1))
    token, channel = np.divmod(size.argmax(-1), model.config.width)
    for layer in range(3):
        names = channel[layer][massive[layer]]
        told = numbers["massive"]["channels"][layer]
        assert [one["share"] for one in told] == sorted((one["share"] for one in told), reverse=True)
        for one in told:
            assert one["share"] == pytest.approx((names == one["channel"]).mean())
        inside = (token[layer] >= prefix) & massive[layer]
        if massive[layer].any():
            share = numbers["massive"]["tokens"]["patches"][layer]
            assert share == pytest.approx(inside.sum() / massive[layer].sum())
    assert numbers["patches"] == 25 and numbers["n"] == 6
    np.testing.assert_allclose(numbers["norms"]["cls"], norms[..., 0].mean(1), rtol=1e-5)
    assert ("registers" in numbers["norms"]) == ("registers" in numbers["massive"]["tokens"]) == (prefix > 1)


def test_a_planted_outlier_and_a_planted_activation_are_found():
    model = model_of("dinov2 with registers")
    model = changed(
        model,
        positions=lambda p: p + 300 * (np.arange(25) == 12).reshape(5, 5, 1),
        registers=lambda r: r + 50000 * np.outer(np.arange(3) == 1, np.arange(32) == 9),
    )
    images = random_images(0, 4, SIDE)
    numbers = numbers_of(b4_outliers.EXPERIMENT, model, images)
    assert numbers["outliers"]["mean number"] == [1.0] * 3 and numbers["outliers"]["share of images"] == [1.0] * 3
    assert numbers["outliers"]["share of patches"] == pytest.approx([1 / 25] * 3)
    assert numbers["norms"]["largest"][-1] > 1000 > numbers["norms"]["median"][-1]
    assert numbers["massive"]["share of images"] == [1.0] * 3
    assert numbers["massive"]["channels"] == [[{"channel": 9, "share": 1.0}]] * 3
    assert numbers["massive"]["tokens"] == {"cls": [0.0] * 3, "registers": [1.0] * 3, "patches": [0.0] * 3}
    absolute = numbers_of(b4_outliers.EXPERIMENT, model, images, {"threshold": 1e4})
    assert absolute["outliers"]["mean number"] == [0.0] * 3
    absolute = numbers_of(b4_outliers.EXPERIMENT, model, images, {"threshold": 1e-3})
    assert absolute["outliers"]["mean number"] == [25.0] * 3
    none = numbers_of(b4_outliers.EXPERIMENT, model, images, {"above": 1e6})
    assert none["massive"]["channels"] == [[]] * 3 and np.isnan(none["massive"]["tokens"]["registers"]).all()


# --- B5


def planted(mlp: str = "gelu", seed: int = 1) -> tuple[ViT, list[np.ndarray]]:
    """A model whose neuron 7 of block 1 is active at white patches alone and writes a huge vector; each of four images
    has one of these, the last has none.
    """
    model = random_model(ViTConfig(**TINY, mlp=mlp, **PREPARED))
    sources = pictures(5, seed)
    for i in range(4):
        y, x = 4 * (i + 1), 4 * (i % 3)
        sources[i][y : y + 4, x : x + 4] = 255
    images = prepared(sources, model)
    middle = run(model, images, record=takes(resid_mid=Take(layers=1))).trace["resid_mid"][0]
    normed = np.asarray(jax.tree.map(lambda a: a[1], model.blocks).norm2(middle))[:, 1:]
    at = [5 * (i + 1) + i % 3 for i in range(4)]
    white = np.stack([normed[i, at[i]] for i in range(4)])
    away = np.concatenate([np.delete(normed[i], at[i], 0) for i in range(4)] + [normed[4]])
    direction = np.linalg.solve(np.cov(away.T) + 0.05 * np.eye(32), white.mean(0) - away.mean(0))
    low, high = (away @ direction).max(), (white @ direction).min()
    assert high > low
    size = 60 / (high - low)
    read, last = ("fc1", "fc2") if mlp == "gelu" else ("gate", "out")
    params = {name: np.array(value) for name, value in to_params(model).items()}
    params[f"blocks.mlp.{read}.kernel"][1, :, 7] = size * direction
    params[f"blocks.mlp.{read}.bias"][1, 7] = -size * (low + high) / 2
    if mlp == "swiglu":
        params["blocks.mlp.value.kernel"][1, :, 7], params["blocks.mlp.value.bias"][1, 7] = 0, 1
    params[f"blocks.mlp.{last}.kernel"][1, 7] = 10 * np.random.default_rng(0).normal(size=32)
    return from_params(model.config, {name: jnp.asarray(value) for name, value in params.items()}), sources


def b5_found(tmp_path, model, sources, batch_size=3, **options):
    e = b5_test_time_registers.EXPERIMENT
    request = request_of(sources, [e], batch_size=batch_size, options={"test-time registers": options})
    subject = Subject(about_of(model), model)
    found = run_passes(tmp_path, request, subject, b5_test_time_registers.PASS)["test-time registers"]
    return found, e.numbers({"test-time registers": found.of("B5/")}, subject.about, request.options["B5"])


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_test_time_registers_take_a_planted_outlier(mlp, tmp_path):
    model, sources = planted(mlp)
    _, numbers = b5_found(tmp_path, model, sources[:4], neurons=1)
    assert [(n["layer"], n["channel"]) for n in numbers["neurons"]] == [(1, 7)]
    assert numbers["no outliers"] is False and np.isnan(numbers["threshold"]) and numbers["n"] == 4
    largest = {run: numbers[run]["largest norm"] for run in b5_test_time_registers.RUNS}
    moved = numbers["register neurons"]
    assert largest["register neurons"]["max"] < 0.3 * largest["plain"]["min"]
    assert largest["random neurons"]["min"] > 0.8 * largest["plain"]["min"]
    assert largest["empty"]["min"] > 0.8 * largest["plain"]["min"]
    assert moved["register norm"]["min"] > 2 * largest["register neurons"]["max"]
    assert moved["register norm"]["min"] > 2 * numbers["empty"]["register norm"]["max"]
    assert numbers["plain"]["above the plain limit"] == numbers["plain"]["outliers"]
    assert numbers["plain"]["outliers"]["min"] == 1 and moved["above the plain limit"]["max"] == 0
    assert numbers["plain"]["cosine cls"]["min"] > 1 - 1e-5 and "register norm" not in numbers["plain"]
    (claim,) = b5_test_time_registers.EXPERIMENT.claims({"model": numbers}, {"model": about_of(model)})
    assert claim.holds is None and claim.by.startswith("needs at least 30 images")
    for run in b5_test_time_registers.RUNS:
        numbers[run]["largest norm"]["n"] = FEWEST
    (claim,) = b5_test_time_registers.EXPERIMENT.claims({"model": numbers}, {"model": about_of(model)})
    assert claim.holds is True
    swapped = numbers | {"register neurons": numbers["random neurons"], "random neurons": moved}
    (claim,) = b5_test_time_registers.EXPERIMENT.claims({"model": swapped}, {"model": about_of(model)})
    assert claim.holds is False


def test_a_pass_of_test_time_registers_is_the_library_s(tmp_path):
    model, sources = planted()
    found, numbers = b5_found(tmp_path, model, sources, neurons=4, images=3, seed=5)
    other, _ = b5_found(tmp_path / "again", model, sources, batch_size=2, neurons=4, images=3, seed=5)
    images = prepared(sources, model)
    for name in found.per_image:
        np.testing.assert_allclose(other.per_image[name], found.per_image[name], rtol=2e-4, atol=2e-5)
    neurons = jaxvit.find_register_neurons(model, [images[:3]], 4, progress=False)
    assert [n["layer"] for n in numbers["neurons"]] == neurons.layer.tolist()
    assert [n["channel"] for n in numbers["neurons"]] == neurons.channel.tolist()
    np.testing.assert_allclose([n["score"] for n in numbers["neurons"]], neurons.score, rtol=1e-5)
    wider, edits = move_to_registers(model, neurons)
    record = takes(resid_post=Take(), pattern=Take(layers=-1))
    out, plain = run(wider, images, edits, record), run(model, images)
    columns = found.of("B5/register neurons/").per_image
    norms = np.linalg.norm(out.trace["resid_post"], axis=-1)
    np.testing.assert_allclose(columns["largest norm"], norms[-1, :, 2:].max(1), rtol=1e-4)
    np.testing.assert_allclose(columns["largest norm of all layers"], norms[:, :, 2:].max((0, 2)), rtol=1e-4)
    np.testing.assert_allclose(columns["register norm"], norms[-1, :, 1], rtol=1e-4)
    np.testing.assert_allclose(columns["register attention"], out.trace["pattern"][-1][:, :, 0, 1].mean(1), atol=1e-5)
    np.testing.assert_allclose(columns["cosine cls"], cosine(out.cls, plain.cls), atol=1e-4)
    np.testing.assert_allclose(columns["cosine patches"], cosine(out.patches, plain.patches).mean(1), atol=1e-4)
    empty = run(jaxvit.add_registers(model), images)
    np.testing.assert_allclose(found.per_image["B5/empty/cosine cls"], cosine(empty.cls, plain.cls), atol=1e-4)


def test_random_neurons_are_others_of_the_same_layers():
    chosen = np.zeros((3, 10), np.float32)
    chosen[0, [1, 2]] = chosen[2, :7] = 1
    drawn_ones = b5_test_time_registers.others(chosen, 0)
    assert drawn_ones.sum(1).tolist() == [2, 0, 3] and not (drawn_ones * chosen).any()
    assert (b5_test_time_registers.others(chosen, 1) != drawn_ones).any()


def test_without_outliers_the_highest_norms_stand_for_them():
    model = model_of("dinov2")
    images = random_images(0, 4, SIDE)
    norms = np.linalg.norm(run(model, images).tokens[:, 1:], axis=-1)
    assert (norms <= (norms.mean(1) + 3 * norms.std(1))[:, None]).all()
    with pytest.raises(ValueError, match="none of 4 images has a patch"):
        jaxvit.find_register_neurons(model, [images], 3, progress=False)
    wider, edits, chosen = test_time.with_test_time_registers(model, [images], 2, 3, quantile=0.95)
    assert chosen.no_outliers and chosen.threshold == pytest.approx(np.quantile(norms, 0.95), rel=1e-5)
    expected = jaxvit.find_register_neurons(model, [images], 3, threshold=chosen.threshold, progress=False)
    np.testing.assert_array_equal(chosen.neurons.channel, expected.channel)
    assert wider.config.registers == 2 and list(edits) == ["mlp_post"]
    top = test_time.find(model, [images], 3, quantile=1.0)  # still the highest one
    assert top.threshold < norms.max() + 1e-4 and len(top.neurons.layer) == 3
    early = test_time.find(model, [images], 3, top_layer=0)
    assert early.neurons.layer.tolist() == [0, 0, 0]


def test_a_run_without_outliers_says_so(tmp_path):
    model, sources = model_of("dinov2"), pictures(4)
    _, numbers = b5_found(tmp_path, model, sources, neurons=3)
    norms = np.linalg.norm(run(model, prepared(sources, model)).tokens[:, 1:], axis=-1)
    assert numbers["no outliers"] is True and numbers["threshold"] == pytest.approx(np.quantile(norms, 0.995), rel=1e-5)
    (claim,) = b5_test_time_registers.EXPERIMENT.claims({"model": numbers}, {"model": about_of(model)})
    assert claim.holds is None and "no image has an outlier" in claim.by


def test_a_model_with_test_time_registers_is_a_subject_of_its_own(tmp_path):
    model, sources = planted()
    e = b5_test_time_registers
    request = request_of(sources, [b4_outliers.EXPERIMENT])
    subject = test_time.appended(Subject(about_of(model), model), request, 2)
    assert (subject.about.registers, subject.about.registers_are) == (2, "test-time")
    assert ViTConfig.from_dict(subject.about.config) == subject.model.config
    told = subject.about.source["test-time registers"]
    assert told["no outliers"] is False and len(told["neurons"]) == 20 and told["neurons"][0]["channel"] == 7
    assert e.EXPERIMENT.refuses(subject.about) and e.EXPERIMENT.refuses(about_of(model)) is None
    assert e.PASS.refuses(request, subject.about) and e.PASS.refuses(request, about_of(model)) is None
    images = prepared(sources, model)
    plain = np.linalg.norm(run(model, images).tokens[:4, 1:], axis=-1).max(1)
    moved = np.linalg.norm(run(subject.model, images, subject.edits).tokens[:4, 3:], axis=-1).max(1)
    assert (moved < 0.5 * plain).all()
    with pytest.raises(ValueError, match="model has registers"):
        test_time.appended(subject, request)


# --- B6


@pytest.mark.parametrize("family", ["dinov2", "dinov2 with registers", "clip", "dinov2 giant with registers"])
def test_contribution_maps_sum_to_the_update(family):
    model, images = model_of(family), random_images(0, 3, SIDE)
    trace = jax.jit(partial(observe, wants={"contribution", "attention"}))(model, images)
    full = run(model, images, record=takes(pattern=Take(), v=Take(), attn_out=Take(tokens="prefix"))).trace
    expected = contributions(model, None, full["pattern"][:, :, :, :1], full["v"], full["attn_out"][:, :, :1])[:, :, 0]
    np.testing.assert_allclose(trace.contribution, expected, rtol=1e-3, atol=1e-4)
    bias = attention_parts(model, None, full["pattern"], full["v"], model.config.layout(SIDE)).bias
    total = trace.contribution.sum(-1) + (trace.update * bias[:, None]).sum(-1)
    np.testing.assert_allclose(total, np.square(trace.update).sum(-1), rtol=1e-4)


@pytest.mark.parametrize("family", ["dinov2", "dinov2 with registers"])
def test_maps_are_their_definitions(family):
    model, images = model_of(family), random_images(0, 6, SIDE)
    options = {"residual": 0.3, "top": 0.2}
    found = found_of(b6_rollout.EXPERIMENT, model, images, options)
    prefix = model.prefix
    trace = run(model, images, record=takes(pattern=Take(tokens="all"), v=Take(), attn_out=Take())).trace
    rolled = rollout(trace["pattern"], residual=0.3)[:, 0, prefix:]
    wants = b6_rollout.EXPERIMENT.wants
    maps = b6_rollout.maps_of(jax.jit(partial(observe, wants=wants))(model, images), model, 0.3)
    np.testing.assert_allclose(maps["rollout"], rolled, atol=1e-6)
    np.testing.assert_allclose(found.per_image["rollout on patches"], rolled.sum(1), rtol=1e-5)
    attention = trace["pattern"][-1][:, :, 0, prefix:].mean(1)
    np.testing.assert_allclose(maps["attention"], attention, atol=1e-6)
    # Every patch's part as a vector: the model's own output projection of what one patch gives to all heads.
    z = jnp.einsum("BHT,BTHd->BTHd", trace["pattern"][-1][:, :, 0], trace["v"][-1]).reshape(6, -1, 32)
    block = jax.tree.map(lambda a: a[-1], model.blocks)
    vectors = np.asarray(
        block.scale1(z @ np.asarray(block.attn.proj.kernel[...]).reshape(z.shape[-1], -1)), np.float64
    )[:, prefix:]
    update = np.asarray(trace["attn_out"][-1][:, 0], np.float64)
    parts = np.einsum("BND,BD->BN", vectors, update)
    np.testing.assert_allclose(maps["contribution"], parts, rtol=1e-3, atol=1e-3)
    shares = {}
    for name, each in (("attention", attention), ("rollout", rolled), ("contribution", parts)):
        taken = np.argsort(-np.asarray(each), axis=1)[:, :5]  # of 25
        removed = np.stack([vectors[i, taken[i]].sum(0) for i in range(6)])
        left = ((update - removed) * update).sum(1) / np.square(update).sum(1)
        shares[name] = 1 - left
        np.testing.assert_allclose(found.per_image[f"share/{name}"], 1 - left, rtol=1e-3, atol=1e-4)
    whole = found.per_image["share/all patches"]
    np.testing.assert_allclose(found.per_image["share/random"], whole / 5, rtol=1e-5)
    assert (shares["contribution"] >= np.maximum(shares["attention"], shares["rollout"]) - 1e-9).all()
    for pair, x, y in (("attention and rollout", attention, rolled), ("attention and contribution", attention, parts)):
        pearson = [np.corrcoef(np.asarray(a, np.float64), b)[0, 1] for a, b in zip(x, np.asarray(y), strict=True)]
        np.testing.assert_allclose(found.per_image[f"pearson/{pair}"], pearson, atol=1e-4)
        orders = [np.asarray(a).argsort(1).argsort(1) for a in (x, y)]
        spearman = [np.corrcoef(a, b)[0, 1] for a, b in zip(*orders, strict=True)]
        np.testing.assert_allclose(found.per_image[f"spearman/{pair}"], spearman, atol=1e-4)
    numbers = b6_rollout.EXPERIMENT.numbers(
        {"clean": found}, about_of(model), defaults(b6_rollout.EXPERIMENT, **options)
    )
    assert (numbers["taken"], numbers["patches"], numbers["n"], numbers["residual"]) == (5, 25, 6, 0.3)
    assert set(numbers["spearman"]) == set(b6_rollout.PAIRS)


def test_ranks_and_correlations_of_known_rows():
    x = jnp.asarray([[3.0, 1.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    np.testing.assert_array_equal(b6_rollout.mean_ranks(x), [[2.5, 0, 2.5, 1], [1.5] * 4])
    y = jnp.asarray([[1.0, 2.0, 3.0, 4.0]])
    for z, expected in ((jnp.exp(y), 1.0), (-(y**3), -1.0)):
        ranks = b6_rollout.correlation(b6_rollout.mean_ranks(y), b6_rollout.mean_ranks(z))
        np.testing.assert_allclose(ranks, expected, rtol=1e-6)
    np.testing.assert_allclose(b6_rollout.correlation(y, 2e30 * y + 1), 1, rtol=1e-5)
    assert np.isnan(b6_rollout.correlation(x[1:], y)).all()
    np.testing.assert_array_equal(b6_rollout.at_top(y, 10 * y[:, ::-1], 2), [30.0])
    assert [b6_rollout.how_many(part, 25) for part in (0.0, 0.1, 0.5, 2.0)] == [1, 2, 12, 25]


def test_maps_agree_where_all_values_are_one(tmp_path):
    """One head and values that are the same vector for all tokens: contributions are attention, up to a factor."""
    model = random_model(replace(ViTConfig(**TINY | {"heads": 1, "depth": 1}), **PREPARED))

    def no_values(kernel):
        kernel = kernel.copy()
        kernel[:, :, 2] = 0
        return kernel

    model = changed(model, blocks__attn__qkv__kernel=no_values, blocks__attn__proj__bias=0.0)
    images = random_images(0, 4, SIDE)
    numbers = numbers_of(b6_rollout.EXPERIMENT, model, images)
    for kind in ("pearson", "spearman"):
        for pair in b6_rollout.PAIRS:
            assert numbers[kind][pair]["min"] > 1 - 1e-3  # with one layer, rollout too is attention
    # Every token adds the update times its attention: shares are sums of attention.
    row = np.asarray(run(model, images, record=takes(pattern=Take())).trace["pattern"][0, :, 0, 0, 1:], np.float64)
    highest = np.sort(row, axis=1)[:, -numbers["taken"] :].sum(1).mean()
    share = numbers["share of the update"]
    expected = {"attention": highest, "contribution": highest, "rollout": highest, "all patches": row.sum(1).mean()}
    assert {name: share[name]["mean"] for name in expected} == pytest.approx(expected, rel=1e-5)


# --- B7


def test_ends_of_a_ranking_are_told_by_name_or_number():
    about = about_of(model_of("dinov2"), "m")

    def told(*images):
        order = {"top": [{"image": i, "value": 1.0} for i in images]}
        order["bottom"] = order["top"][::-1]
        return {"ranking": {"registers": order, "skip": {"top": [], "bottom": []}}}

    assert (
        b7_open_questions.ends(told("a/x.png", "y.png", "z.png"), about) == "m: a/x.png and y.png, and z.png and y.png"
    )
    assert b7_open_questions.ends(told(3, 0), about) == "m: image 3 and image 0, and image 0 and image 3"
    alone = {"ranking": {"skip": told("a.png")["ranking"]["registers"]}}
    assert b7_open_questions.ends(alone, about) == "m: a.png, and a.png"


# --- options


def test_late_options_are_not_read_when_images_are_measured():
    """Else a change of them would show numbers of another choice."""
    model, images = model_of("dinov2 with registers"), random_images(0, 2, SIDE)
    experiments = [e.EXPERIMENT for e in (b1_token_flow, b2_replacement, b4_outliers, b6_rollout, b7_open_questions)]
    late = [o.name for e in experiments for o in e.options if o.late]
    assert late == ["above", "times"]
    for e in experiments:
        early = {o.name: o.default for o in e.options if not o.late}
        jax.eval_shape(lambda x, e=e, early=early: e.measure(observe(model, x, None, e.wants), model, early), images)


# --- figures and tables


def values_of(figure, key, numbers):
    """Numbers of one model that have to be in a figure, as it draws them."""
    match figure:
        case "b1":
            groups = numbers["groups"]
            edges = (b1_token_flow.of_edge(numbers, query, to) for query in b1_token_flow.QUERIES for to in groups)
            return [edge[0] for edge in edges if edge is not None]
        case "b2":
            controls = [of for of in numbers.values() if isinstance(of, dict) and "cosine cls" in of]
            return [of[f"cosine {to}"]["mean"] for of in controls for to in ("cls", "patches")]
        case "b4-norms":
            return [numbers["norms"][name] for name in ("cls", "patches", "largest")]
        case "b4-massive":
            return [numbers["massive"][name] for name in ("largest", "median", "share of images")]
        case "b5":
            runs = [numbers[run] for run in b5_test_time_registers.RUNS]
            named = ("largest norm", "register norm", "register attention")
            return [run[name]["mean"] for run in runs for name in named if name in run]
        case "b6":
            return [numbers["spearman"][pair]["mean"] for pair in b6_rollout.PAIRS]
    assert figure in ("b6-maps-with", "b6-maps-without")  # whose pictures the next test compares
    return []


def assert_drawn(figure, values):
    """Each of the values is one that the figure draws, and all it draws are numbers."""
    shown = drawn_numbers(figure)
    assert shown.size and np.isfinite(shown).all()
    for value in np.concatenate([np.zeros(0), *map(np.ravel, values)]):
        assert np.isclose(shown, value, rtol=1e-5, atol=1e-9).any(), value


def test_figures_and_tables_cope_with_any_models(tmp_path):
    models, results, found = {}, {}, {}
    shown = {}
    for key, family in (("with", "dinov2 with registers"), ("without", "dinov2")):
        model, sources = model_of(family), pictures(4)
        models[key] = about_of(model, key)
        for e in (b1_token_flow.EXPERIMENT, b4_outliers.EXPERIMENT, b6_rollout.EXPERIMENT):
            each = found_of(e, model, prepared(sources, model))
            found.setdefault(e.id, {})[key] = {"clean": each}
            results.setdefault(e.id, {})[key] = e.numbers({"clean": each}, models[key], defaults(e))
        shown[key] = examples.explain(Subject(models[key], model), sources[1:3], ["a", "b"], None)
        results.setdefault("B2", {})[key] = b2_numbers(model, tmp_path / key, 4)
    planted_model, sources = planted()
    _, results["B5"] = {}, {"without": b5_found(tmp_path / "b5", planted_model, sources)[1]}
    names = {"B1": {"b1"}, "B2": {"b2"}, "B4": {"b4-norms", "b4-massive"}, "B5": {"b5"}}
    names["B6"] = {"b6", "b6-maps-with", "b6-maps-without"}
    modules = (b1_token_flow, b2_replacement, b4_outliers, b5_test_time_registers, b6_rollout)
    for e in (module.EXPERIMENT for module in modules):
        figures = drawn(e, results[e.id], models, found.get(e.id, {}), shown, tmp_path)
        assert set(figures) == names[e.id]
        for axes in (axes for figure in figures.values() for axes in figure.axes if axes.get_xlabel() == "layer"):
            assert list(axes.get_xticks()) == [0, 1, 2]  # layers count from 0, and no tick is between two
            assert all(list(line.get_xdata()) == [0, 1, 2] for line in axes.lines if len(line.get_xdata()) > 2)
        for name, figure in figures.items():
            assert ET.parse(tmp_path / f"{name}.svg").getroot().tag.endswith("svg")
            for key in results[e.id]:
                assert_drawn(figure, values_of(name, key, results[e.id][key]))
        table = e.table(results[e.id], models)
        assert table.rows and all(len(row) == len(table.head) for row in table.rows)
        if e.id == "B4":  # no activation is massive: the first layer
            assert [row[4].split(" (")[1] for row in table.rows] == ["layer 0)", "layer 0)"]
        assert drawn(e, {}, models, {}) == {} and e.table({}, models) is None and e.claims({}, models) == []
        for key in results[e.id]:
            assert drawn(e, {key: results[e.id][key]}, models, found.get(e.id, {}), {})


def test_maps_in_figures_are_of_the_images_that_are_shown(tmp_path):
    """Of any image, wherever it stands; contributions in A5's colours."""
    model, sources = model_of("dinov2 with registers"), pictures(2, seed=5)
    shown = examples.explain(Subject(about_of(model, "m"), model), sources, ["a", "b"], None, 0.3)
    examples.save(shown, tmp_path / "e.npz")
    for kept, example in zip(examples.load(tmp_path / "e.npz"), shown, strict=True):
        for name in examples.Example._fields:
            np.testing.assert_array_equal(getattr(kept, name), getattr(example, name))
    images = prepared(sources, model)
    pattern = run(model, images, record=takes(pattern=Take(tokens="all"))).trace["pattern"]
    rolled = rollout(pattern, rows=1, residual=0.3)[:, 0, model.prefix :]
    with styled():
        figure = b6_rollout.maps_figure(about_of(model, "m"), shown)
        paper = a5_patch_cosine.maps([about_of(model, "m")], {"m": shown})
    for i, example in enumerate(shown):
        np.testing.assert_allclose(example.rollout, rolled[i], atol=1e-6)
        *_, attention, drawn_one, signed = (ax.images[0] for ax in figure.axes[4 * i : 4 * i + 4])
        np.testing.assert_array_equal(drawn_one.get_array(), example.rollout.reshape(example.grid))
        np.testing.assert_allclose(attention.get_array(), example.attention[-1, :, 0].mean(0).reshape(example.grid))
        theirs = paper.axes[3 * i + 2].images[0]
        np.testing.assert_array_equal(signed.to_rgba(signed.get_array()), theirs.to_rgba(theirs.get_array()))
        red, _, blue, _ = signed.cmap(signed.norm(np.abs(example.contribution).max() * 9))
        assert blue > red  # along the update


def test_a_model_without_numbers_has_no_means():
    """Maps of NaN, as of a model that overflows."""
    model = changed(model_of("dinov2"), cls=np.nan)
    numbers = numbers_of(b6_rollout.EXPERIMENT, model, random_images(0, 2, SIDE))
    row = b6_rollout.EXPERIMENT.table({"model": numbers}, {"model": about_of(model)}).rows[0]
    assert set(row[1:]) == {"undefined"}


# --- half precision


@pytest.mark.parametrize("family", ["dinov2 with registers", "dinov2 giant with registers", "clip"])
def test_a_trace_of_half_precision_is_in_float32(family):
    """Nothing that leaves it is rounded to 8 bits; it is what was recorded, up to the rounding of the model itself."""
    model = jaxvit.cast(model_of(family), "bfloat16")
    images = random_images(0, 3, SIDE)
    wants = {"attention", "flow", "contribution", "activations"}
    trace = jax.jit(partial(observe, wants=wants))(model, images)
    for value in jax.tree.leaves(trace):
        assert not jnp.issubdtype(value.dtype, jnp.floating) or value.dtype == jnp.float32
    for value in (trace.norms, trace.z, trace.contribution):
        assert (value != value.astype(jnp.bfloat16).astype(jnp.float32)).mean() > 0.9
    full = run(model, images, record=takes(resid_post=Take(), pattern=Take(tokens="all"), v=Take())).trace
    step = 2.0**-8
    np.testing.assert_allclose(trace.norms, np.linalg.norm(full["resid_post"].astype(jnp.float32), axis=-1), rtol=step)
    row, v = np.asarray(full["pattern"], np.float64)[:, :, :, 0], np.asarray(full["v"], np.float64)
    z = np.einsum("LBHT,LBTHd->LBHd", row, v)
    np.testing.assert_allclose(trace.z.sum(2), z, atol=step * np.abs(v).max())
    split, wide = parts(trace, model), parts(trace, widened(model))
    for name in split:
        np.testing.assert_allclose(split[name], wide[name], atol=1e-6)
        assert split[name].dtype == jnp.float32
    for reading in ("block", "final"):
        assert cls_reading(widened(model), trace.middle[-1], reading).dtype == jnp.float32


def test_passes_of_half_precision(tmp_path):
    """Cosines with the clean run are exact, and not to half a per cent as they would be in bfloat16."""
    model, sources = jaxvit.cast(model_of("dinov2 with registers"), "bfloat16"), pictures(4)
    e = b2_replacement.EXPERIMENT
    request, subject = request_of(sources, [e], batch_size=4), Subject(about_of(model), model)
    found = run_passes(tmp_path, request, subject, Clean(), CONTROLS)
    extra = CONTROLS.extra(request, subject, found)
    images, norm = prepared(sources, model), widened(model).norm
    final = norm(run(model, images).tokens.astype(jnp.float32))
    control = controls.Control("registers", "mean", "last")
    other = norm(
        edited_by_hand(model, images, jax.tree.map(lambda a: a.astype(jnp.bfloat16), extra), control).tokens.astype(
            jnp.float32
        )
    )
    columns = found["controls"].of(f"{control.name}/B2/").per_image
    np.testing.assert_allclose(columns["cosine cls"], cosine(final, other)[:, 0], atol=1e-4)
    plain = jaxvit.cast(model_of("dinov2"), "bfloat16")
    _, numbers = b5_found(tmp_path / "b5", plain, sources, neurons=3)
    norm = widened(plain).norm
    ends = (norm(run(m, images).tokens.astype(jnp.float32))[:, 0] for m in (plain, jaxvit.add_registers(plain)))
    expected = cosine(*ends)
    empty = numbers["empty"]["cosine cls"]
    np.testing.assert_allclose([empty["min"], empty["mean"]], [expected.min(), expected.mean()], atol=1e-4)
    assert numbers["plain"]["cosine cls"]["min"] == pytest.approx(1, abs=1e-6)

"""A1, A2, A5, A7 and A8: laws, every number computed by another way, and models for which the answer is known."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, TINY, random_images, random_model
from paper import about_of, defaults, drawn_numbers, found_of, numbers_of
from PIL import Image

from experiments.core.charts import styled
from experiments.core.claims import FAR, FEWEST, falls
from experiments.core.examples import explain
from experiments.core.experiment import About, Subject, View
from experiments.core.trace import observe
from experiments.paper import a1_attention_mass, a2_top_register, a5_patch_cosine, a7_norms, a8_depth_cosine
from jaxvit import Preprocess, Take, ViTConfig, cast
from jaxvit.interventions.constructors import knockout
from jaxvit.model.params import from_params, to_params

A1, A2, A5, A7, A8 = (
    module.EXPERIMENT for module in (a1_attention_mass, a2_top_register, a5_patch_cosine, a7_norms, a8_depth_cosine)
)
ALL = (A1, A2, A5, A7, A8)
N = 8


def changed(model, **values):
    """The model with other parameters: name with __ for dots -> value, or function of the old one."""
    params = to_params(model)
    for name, value in values.items():
        name = name.replace("__", ".")
        new = value(np.array(params[name])) if callable(value) else value
        params[name] = jnp.broadcast_to(jnp.asarray(new, params[name].dtype), params[name].shape)
    return from_params(model.config, params)


def at(index, value):
    """Sets one entry of an array, for `changed`."""

    def put(a):
        a[index] = value
        return a

    return put


def cosine(x, y):
    return (x @ y) / np.linalg.norm(x) / np.linalg.norm(y)


@pytest.fixture(scope="module")
def direct(model):
    """The model in float64, images, all that was recorded of them, and the parts of the last update, token by token."""
    R, H, D = model.config.registers, model.config.heads, model.config.width
    with jax.enable_x64(True):
        model, images = cast(model, "float64"), jnp.asarray(random_images(3, N, 20, 24), "float64")
        out = model(images, record={site: Take(tokens="all") for site in RECORDED})
        trace = {site: np.asarray(value) for site, value in out.trace.items()}
        block = jax.tree.map(lambda a: a[-1], model.blocks)
        gamma = np.asarray(block.scale1.gamma[...]) if model.config.layer_scale else np.ones(D)
        w, b = np.asarray(block.attn.proj.kernel[...]).reshape(H, -1, D), np.asarray(block.attn.proj.bias[...])
    row, v = trace["pattern"][-1][:, :, 0], trace["v"][-1]
    heads = np.einsum("BHT,BTHd->BTHd", row, v)  # what each token gives to each head

    def parts(stage):
        each = heads.reshape(*heads.shape[:2], -1) if stage == "heads" else np.einsum("BTHd,HdD->BTD", heads, w)
        each = each * gamma if stage == "layerscale" else each
        groups = {"cls": each[:, 0], "registers": each[:, 1 : 1 + R].sum(1), "patches": each[:, 1 + R :].sum(1)}
        groups["bias"] = np.zeros((N, D)) + {"heads": 0, "proj": b, "layerscale": gamma * b}[stage]
        return {name: part for name, part in groups.items() if R or name != "registers"}

    return model, images, trace, parts


RECORDED = ("pattern", "v", "resid_pre", "attn_out", "mlp_out", "resid_post")


def found64(experiment, direct, **more):
    with jax.enable_x64(True):
        return found_of(experiment, *direct[:2], **more)


def numbers64(experiment, direct, options=None):
    with jax.enable_x64(True):
        return numbers_of(experiment, *direct[:2], options)


def check(summary, values):
    """A summary is of these values."""
    assert summary["n"] == len(values)
    for name, function in (("mean", np.mean), ("std", np.std), ("min", np.min), ("max", np.max)):
        np.testing.assert_allclose(summary[name], function(values), rtol=1e-8, atol=1e-11, err_msg=name)


# --- A1


def test_a1_by_another_way(direct):
    model, _, trace, _ = direct
    R = model.config.registers
    row = trace["pattern"][-1][:, :, 0].mean(axis=1)
    numbers = numbers64(A1, direct)
    expected = {"cls": row[:, 0], "patches": row[:, 1 + R :].sum(1)}
    if R:
        registers = row[:, 1 : 1 + R].sum(1)
        expected |= {"registers": registers, "registers of both": registers / (1 - row[:, 0])}
    assert numbers.keys() == {*expected, "reading"}
    for name, values in expected.items():
        check(numbers[name], values)


def test_a1_masses_sum_to_one(model):
    columns = found_of(A1, model, random_images(1, N, 20)).per_image
    assert sum(columns[f"mass {name}"] for name in ("cls", "registers", "patches") if f"mass {name}" in columns) == (
        pytest.approx(np.ones(N), abs=1e-6)
    )


@pytest.fixture(scope="module")
def register_watcher():
    """One block, whose queries are constant and whose keys are long where channel 0 is: in the registers alone."""
    config = ViTConfig(**TINY | dict(depth=1), registers=3)
    D, H = config.width, config.heads
    kernel, bias = np.zeros((1, D, 3, H, D // H)), np.zeros((1, 3, H, D // H))
    kernel[0, 0, 1], bias[0, 0] = 10, 10
    return changed(
        random_model(config),
        registers=lambda a: np.where(np.arange(D) == 0, 100.0, a),
        blocks__attn__qkv__kernel=kernel,
        blocks__attn__qkv__bias=bias,
        blocks__norm1__scale=1,
        blocks__norm1__bias=0,
        cls=lambda a: np.where(np.arange(D) == 0, 0.0, a),
        positions=lambda a: np.where(np.arange(D) == 0, 0.0, a),
        patch_embed__kernel=lambda a: np.where(np.arange(D) == 0, 0.0, a),
        patch_embed__bias=at(0, 0.0),
    )


def test_a1_attention_on_registers_alone(register_watcher):
    numbers = numbers_of(A1, register_watcher, random_images(0, N, 20))
    for name, all_of_it in (("registers", 1), ("registers of both", 1), ("patches", 0), ("cls", 0)):
        np.testing.assert_allclose([numbers[name]["min"], numbers[name]["max"]], all_of_it, atol=1e-6)
    # The other way round: where registers cannot be seen, they get nothing.
    blind = knockout(register_watcher, query="cls", key="registers")
    numbers = numbers_of(A1, register_watcher, random_images(0, N, 20), edits=blind)
    assert numbers["registers"]["max"] == 0 == numbers["registers of both"]["max"]


def test_a1_no_attention_on_either_is_not_counted():
    model = random_model(FAMILIES["dinov2 with registers"])
    itself = knockout(model, query="cls", key=["registers", "patches"])
    numbers = numbers_of(A1, model, random_images(0, N, 20), edits=itself)
    assert numbers["cls"]["min"] == 1 and numbers["registers"]["max"] == 0
    assert numbers["registers of both"] == {"n": 0}


# --- A2


@pytest.mark.parametrize("ranking", ["absolute", "signed"])
def test_a2_by_another_way(direct, ranking):
    """Cosines over all pairs, one by one; LN1 in NumPy."""
    model, _, trace, _ = direct
    R = model.config.registers
    if not R:
        assert A2.refuses(about_of(model)) == "has no registers"
        return
    assert A2.refuses(about_of(model)) is None
    numbers = numbers64(A2, direct, {"ranking": ranking, "count": 5})
    before = trace["resid_pre"][-1][:, 1 : 1 + R]
    centred = before - before.mean(-1, keepdims=True)
    scale, bias = (np.asarray(getattr(model.blocks.norm1, name)[...])[-1] for name in ("scale", "bias"))
    after = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + model.config.eps) * scale + bias
    norms = np.linalg.norm(before, axis=-1)
    register = norms.mean(0).argmax()
    assert numbers["register"] == register
    assert numbers["is the argmax"] == np.mean(norms.argmax(1) == register)
    assert sum(each["is the argmax"] for each in numbers["per register"]) == pytest.approx(1)
    tops = []
    for place, x in (("before", before), ("after", after)):
        for r in range(R):
            pairs = [cosine(x[i, r], x[j, r]) for i, j in combinations(range(N), 2)]
            assert numbers["per register"][r][f"cosine {place}"] == pytest.approx(np.mean(pairs), abs=1e-12)
        assert numbers[f"cosine {place}"] == numbers["per register"][register][f"cosine {place}"]
        mean, absolute = x[:, register].mean(0), np.abs(x[:, register]).mean(0)
        order = np.argsort(-(absolute if ranking == "absolute" else mean))[:5]
        top = numbers[f"top {place}"]
        assert [each["dimension"] for each in top] == order.tolist()
        np.testing.assert_allclose([each["mean"] for each in top], mean[order], rtol=1e-9)
        np.testing.assert_allclose([each["mean absolute"] for each in top], absolute[order], rtol=1e-9)
        tops.append(set(order.tolist()))
    assert numbers["overlap"] == len(tops[0] & tops[1]) / 5
    for r in range(R):
        check(numbers["norms"][r], norms[:, r])


def test_a2_finds_the_planted_register_and_dimension():
    """Register 1 holds -1000 in channel 7, which LN1 of the last block takes out again."""
    model = changed(
        random_model(FAMILIES["dinov2 with registers"]),
        registers=at((1, 7), -1000.0),
        blocks__norm1__scale=at((-1, 7), 0.0),
    )
    images = random_images(0, N, 20)
    numbers = numbers_of(A2, model, images)
    assert numbers["register"] == 1 and numbers["is the argmax"] == 1
    largest = numbers["top before"][0]
    assert largest["dimension"] == 7 and largest["mean"] == pytest.approx(-1000, rel=0.05)
    assert largest["mean absolute"] == pytest.approx(-largest["mean"])
    assert 0.9999 < numbers["cosine before"] <= 1 + 1e-6
    assert numbers["top after"][0]["dimension"] != 7
    assert len(numbers["top before"]) == TINY["width"] and numbers["overlap"] == 1  # fewer than 100 dimensions
    # Ranked by sign, the largest is not what is most negative.
    signed = numbers_of(A2, model, images, {"ranking": "signed", "count": 3})
    assert 7 not in {each["dimension"] for each in signed["top before"]}
    assert numbers_of(A2, model, images, {"ranking": "signed"})["top before"][-1]["dimension"] == 7


def test_a2_counts_the_images_of_another_maximum():
    """Registers 0 and 2 differ by less than images differ, so that none is first in all."""
    model = random_model(FAMILIES["dinov2 with registers"], seed=1)
    images = random_images(5, 40, 20) * 3
    found = found_of(A2, model, images)
    first = found.per_image["norm"].argmax(1)
    counts = np.bincount(first, minlength=3) / 40
    numbers = A2.numbers({"clean": found}, about_of(model), defaults(A2))
    assert [each["is the argmax"] for each in numbers["per register"]] == pytest.approx(counts.tolist())
    assert counts.max() < 1, "this model was chosen to have no register that is always first"


def test_a2_of_one_image_has_no_pairs():
    model = random_model(FAMILIES["dinov2 with registers"])
    image = random_images(0, 1, 20)
    numbers = numbers_of(A2, model, image)
    assert math.isnan(numbers["cosine before"]) and math.isnan(numbers["cosine after"])
    # Nor has one image a spread.
    assert math.isnan(numbers["norms"][0]["std"]) and math.isnan(numbers["norms"][0]["sem"])
    before = model(image, record={"resid_pre": Take(layers=-1, tokens="prefix")}).trace["resid_pre"][-1, 0, 1:]
    assert [norms["n"] for norms in numbers["norms"]] == [1] * 3
    means = [norms["mean"] for norms in numbers["norms"]]
    np.testing.assert_allclose(means, np.linalg.norm(before, axis=-1), rtol=1e-5)


def test_a2_of_the_highest_register_of_each_image():
    """By another way; and in the model above it is not always the same register."""
    model, images = random_model(FAMILIES["dinov2 with registers"], seed=1), random_images(5, 40, 20) * 3
    numbers = numbers_of(A2, model, images, {"register": "argmax", "count": 4})
    fixed = numbers_of(A2, model, images, {"count": 4})
    before = model(images, record={"resid_pre": Take(layers=-1, tokens="prefix")}).trace["resid_pre"][-1][:, 1:]
    before = np.asarray(before, np.float64)
    norms = np.linalg.norm(before, axis=-1)
    x = before[np.arange(40), norms.argmax(1)]
    pairs = [cosine(x[i], x[j]) for i, j in combinations(range(40), 2)]
    assert numbers["cosine before"] == pytest.approx(np.mean(pairs), abs=1e-5)
    assert numbers["cosine before"] != pytest.approx(fixed["cosine before"], abs=1e-4)
    order = np.argsort(-np.abs(x).mean(0))[:4]
    assert [each["dimension"] for each in numbers["top before"]] == order.tolist()
    np.testing.assert_allclose([each["mean"] for each in numbers["top before"]], x.mean(0)[order], rtol=1e-4)
    assert numbers["highest norm"]["mean"] == pytest.approx(norms.max(1).mean(), rel=1e-5)
    same = ("register", "is the argmax", "norms", "per register", "highest norm")
    assert all(numbers[name] == fixed[name] for name in same) and len(numbers["per register"]) == 3


def test_options_say_what_is_read_late_and_what_is_too_small():
    """`measure` is given no late option: it would fail if it read one."""
    model, images = random_model(FAMILIES["dinov2 with registers"]), random_images(0, 2, 20)
    for e in ALL:
        early = {option.name: option.default for option in e.options if not option.late}
        e.measure(observe(model, images, None, e.wants), model, early)
    late = {(e.id, option.name) for e in ALL for option in e.options if option.late}
    expected = {("A1", "figure"), ("A2", "ranking"), ("A2", "count"), ("A2", "register"), ("A5", "bias")}
    assert late == expected | {("A8", "reading")}
    assert next(option.least for option in A2.options if option.name == "count") == 1


# --- A5


@pytest.mark.parametrize("stage", ["heads", "proj", "layerscale"])
def test_a5_by_another_way(direct, stage):
    trace, parts = direct[2:]
    numbers = numbers64(A5, direct, {"stage": stage})
    each = parts(stage)
    total = sum(each.values())
    if stage == "layerscale":
        np.testing.assert_allclose(total, trace["attn_out"][-1][:, 0], atol=1e-12)
    for name in each.keys() - {"bias"}:
        check(numbers[name], [cosine(x, y) for x, y in zip(each[name], total, strict=True)])
        without = [cosine(x, y) for x, y in zip(each[name], total - each["bias"], strict=True)]
        check(numbers[f"{name} without bias"], without)
    assert ("registers" in numbers) == ("registers" in each)


def test_a5_patches_alone_are_the_whole_less_the_bias():
    model = random_model(FAMILIES["dinov2 with registers"])
    alone, images = knockout(model, query="cls", key=["cls", "registers"]), random_images(0, N, 20)
    numbers = numbers_of(A5, model, images, edits=alone)
    assert numbers["patches without bias"]["min"] == pytest.approx(1, abs=1e-6)
    # The whole has the bias of the output projection too, after LayerScale.
    update = model(images, alone, {"attn_out": Take(layers=-1)}).trace["attn_out"][-1, :, 0]
    update, params = np.asarray(update, np.float64), to_params(model)
    bias = np.asarray(params["blocks.attn.proj.bias"][-1] * params["blocks.scale1.gamma"][-1], np.float64)
    expected = [cosine(whole - bias, whole) for whole in update]
    assert [numbers["patches"][name] for name in ("mean", "min", "max")] == pytest.approx(
        [np.mean(expected), min(expected), max(expected)], abs=1e-5
    )
    assert numbers["registers"]["max"] == 0 == numbers["cls without bias"]["max"]


# --- A7


def test_a7_by_another_way(direct):
    trace, parts = direct[2:]
    numbers = numbers64(A7, direct)
    summands = {"skip": trace["resid_pre"][-1][:, 0], **parts("layerscale"), "mlp": trace["mlp_out"][-1][:, 0]}
    output = trace["resid_post"][-1][:, 0]
    np.testing.assert_allclose(sum(summands.values()), output, atol=1e-11)
    norms = {name: np.linalg.norm(x, axis=1) for name, x in summands.items()}
    assert numbers["norm"].keys() == numbers["share"].keys() == summands.keys()
    for name, x in summands.items():
        check(numbers["norm"][name], norms[name])
        check(numbers["share"][name], (x * output).sum(1) / (output * output).sum(1))
    check(numbers["skip over patches"], norms["skip"] / norms["patches"])


def test_a7_shares_sum_to_one(model):
    columns = found_of(A7, model, random_images(1, N, 20)).per_image
    total = sum(values for name, values in columns.items() if name.startswith("share "))
    assert total == pytest.approx(np.ones(N), abs=1e-5)


def test_attention_that_adds_nothing(model):
    """LayerScale of 0, or an output projection of 0: the skip path is all there is beside the MLP."""
    layer_scale = model.config.layer_scale
    gone = dict(blocks__scale1__gamma=0) if layer_scale else dict(blocks__attn__proj__kernel=0)
    images = random_images(0, N, 20)
    numbers = numbers_of(A7, changed(model, **gone), images)
    assert numbers["norm"]["patches"]["max"] == 0 == numbers["norm"]["cls"]["max"]
    assert numbers["skip over patches"] == {"n": 0}
    share = {name: each["mean"] for name, each in numbers["share"].items()}
    assert share["skip"] + share["mlp"] + share["bias"] == pytest.approx(1, abs=1e-5)
    assert share["patches"] == 0
    cosines = numbers_of(A5, changed(model, **gone), images)
    assert cosines["patches"]["max"] == 0 == cosines["patches without bias"]["min"]


@pytest.mark.parametrize("experiment", [A1, A7])
def test_controlled_ones_read_the_last_layer_alone(experiment):
    """As controls of the last block run them; edits of that block are seen."""
    model = random_model(FAMILIES["dinov2 with registers"])
    images = random_images(2, N, 20)
    edits = knockout(model, query="cls", key="patches", layers=-1)
    assert experiment.controlled and experiment.passes == ("clean", "controls")
    for edit in (None, edits):
        whole, last = (numbers_of(experiment, model, images, edits=edit, last=last) for last in (False, True))
        assert whole.pop("reading", None) == last.pop("reading", None)
        flat, other = (jax.tree.leaves(each) for each in (whole, last))
        np.testing.assert_allclose(flat, other, rtol=1e-5, atol=1e-6)


# --- A8


def test_a8_by_another_way(direct):
    model, _, trace, _ = direct
    numbers = numbers64(A8, direct)
    x = trace["resid_post"][:, :, 0]
    centred = x - x.mean(axis=1, keepdims=True)
    scale, bias = (np.asarray(getattr(model.norm, name)[...]) for name in ("scale", "bias"))
    without_mean = x - x.mean(-1, keepdims=True)
    normed = without_mean / np.sqrt(np.square(without_mean).mean(-1, keepdims=True) + model.config.eps) * scale + bias
    for name, y in {"raw": x, "after the final norm": normed, "centred": centred}.items():
        for layer in range(model.config.depth):
            check(numbers[name][layer], [cosine(y[layer, i], y[-1, i]) for i in range(N)])
        assert numbers[name][-1]["min"] == pytest.approx(1, abs=1e-12)
    assert len(numbers["raw"]) == model.config.depth
    # All images side by side are one long vector a layer.
    flat = centred.reshape(len(centred), -1)
    np.testing.assert_allclose(numbers["centred, pooled"], [cosine(each, flat[-1]) for each in flat], rtol=1e-9)


def test_a8_in_single_precision(model):
    """What is summed up in float32 is as good as its bits."""
    images = random_images(7, 40, 20)
    numbers = numbers_of(A8, model, images, batch=8)
    x = np.asarray(model(images, record={"resid_post": Take(tokens="prefix")}).trace["resid_post"][:, :, 0], np.float64)
    centred = (x - x.mean(axis=1, keepdims=True)).reshape(len(x), -1)
    np.testing.assert_allclose(numbers["centred, pooled"], [cosine(each, centred[-1]) for each in centred], atol=2e-4)


def test_a8_of_equal_images_has_no_centred_cosine(model):
    images = jnp.repeat(random_images(0, 1, 20), 4, axis=0)
    numbers = numbers_of(A8, model, images)
    assert all(math.isnan(value) for value in numbers["centred, pooled"])
    assert numbers["raw"][-1]["min"] == pytest.approx(1, abs=1e-6)


def test_a8_of_blocks_that_add_nothing():
    """[CLS] is what it will be from the first block on."""
    model = changed(random_model(FAMILIES["dinov2"]), blocks__scale1__gamma=0, blocks__scale2__gamma=0)
    for name in ("raw", "after the final norm"):
        for layer in numbers_of(A8, model, random_images(0, N, 20))[name]:
            assert layer["min"] == pytest.approx(1, abs=1e-6) and layer["std"] < 1e-6


# --- claims


def family(sizes, registers, name="DINOv2", **more):
    """Models that are said to have been trained, from small to large, and in another order."""
    config = FAMILIES["dinov2 with registers" if registers else "dinov2"]
    model = random_model(config)
    known = dict(family=name, weights="trained", registers_are="trained" if registers else "none") | more
    members = {
        size: about_of(model, f"{name}-{size}", size=size, parameters=i + 1, **known) for i, size in enumerate(sizes)
    }
    return {about.key: about for about in reversed(members.values())}


def told(experiment, values, models):
    """The claims, of numbers and of what results.json makes of them."""
    claims = experiment.claims(values, models)
    assert all(c.experiment == experiment.id and c.text.endswith(".") and c.by for c in claims)
    assert claims == experiment.claims(json.loads(json.dumps(values).replace("NaN", "null")), models)
    return claims


def verdicts(experiment, values, models, on="DINOv2"):
    """Of one family, if it was given."""
    return [c.holds for c in told(experiment, values, models) if c.on.startswith(f"{on}:")]


def untested(experiment, values, models):
    """Orderings that no model was given for: how many statements, and the paper's families."""
    claims = [c for c in told(experiment, values, models) if ":" not in c.on]
    assert all(c.holds is None and c.ordering and c.by.startswith("needs") for c in claims)
    assert len({c.text for c in claims}) == len(claims)
    return [c.on for c in claims]


RATIO = {"reading": {"figure": "ratio"}}


def test_a1_claims():
    models = family("SBLg", registers=True)

    def of(means, stds, n=FEWEST):
        both = "registers of both"
        return {
            f"DINOv2-{s}": RATIO | {both: {"n": n, "mean": m, "std": d}}
            for s, m, d in zip("SBLg", means, stds, strict=True)
        }

    assert verdicts(A1, of((0.1, 0.2, 0.4, 0.3), (1, 1, 1, 2)), models) == [True, True]
    assert verdicts(A1, of((0.1, 0.35, 0.4, 0.3), (1, 3, 1, 2)), models) == [False, False]
    assert verdicts(A1, of((0.1, 0.2, 0.4, 0.3), (1, 1, 1, 2), n=FEWEST - 1), models) == [None, None]
    first, second = told(A1, of((0.1, 0.2, 0.4, 0.3), (1, 1, 1, 2)), models)
    assert (first.ordering, second.ordering) == (1, 1) and first.by.endswith("gap +0.100; n = 30")
    assert first.on == "DINOv2: DINOv2-S, DINOv2-B, DINOv2-L, DINOv2-g"
    some = of((0.1, 0.2, 0.4, 0.3), (1, 1, 1, 2))
    del some["DINOv2-S"], some["DINOv2-B"]
    assert verdicts(A1, some, models) == [None, True]  # large ones alone: their spread can be compared
    undefined = of((0.1, math.nan, 0.4, 0.3), (1, math.nan, 1, 2))
    assert verdicts(A1, undefined, models) == [None, None]
    assert all(claim.by.startswith("undefined") for claim in told(A1, undefined, models))
    whole = of((0.1, 0.2, 0.4, 0.3), (1, 1, 1, 2))
    pair = {key: whole[key] for key in ("DINOv2-S", "DINOv2-L")}  # S and L say nothing of g, which is large too
    assert [claim.by for claim in told(A1, pair, models)] == ["needs DINOv2 g"] * 2
    assert {claim.by for claim in told(A1, {}, models)} == {"no numbers of DINOv2-S, DINOv2-B, DINOv2-L and DINOv2-g"}


def test_the_largest_model_is_the_papers():
    """What is stated of g says nothing of L, which is the largest of those given."""
    both = "registers of both"
    models = family("SBLg", registers=True)
    results = {key: RATIO | {both: {"n": 50, "mean": a.parameters, "std": a.parameters}} for key, a in models.items()}
    for keys in (("DINOv2-S", "DINOv2-B"), ("DINOv2-S", "DINOv2-B", "DINOv2-L")):
        spread = told(A1, {key: results[key] for key in keys}, models)[1]
        assert spread.holds is None and spread.by == "needs DINOv2 g"
    assert told(A1, results, models)[1].holds is True
    # A family the paper does not know has no size it calls the largest.
    others = {f"other-{key}": replace(a, key=f"other-{key}", family="DINOv3") for key, a in models.items()}
    some = {f"other-{key}": results[key] for key in ("DINOv2-S", "DINOv2-B")}
    claims = [c for c in told(A1, some, others) if c.on.startswith("DINOv3: ")]
    assert [(c.ordering, c.holds) for c in claims] == [(0, True), (0, True)]
    assert all(c.text.startswith("As the paper states of DINOv2: ") for c in claims)


def test_models_of_the_largest_size_are_not_compared_with_each_other():
    """CLIP L/14 and L/14 of 336 px against both B."""
    model = random_model(FAMILIES["dinov2"])
    small, large = ({"grid": (side, side), "patch": 14} for side in (16, 24))
    known = dict(family="CLIP", weights="trained", registers_are="none")
    models = {
        "b32": about_of(model, "b32", name="B/32", size="B", parameters=2, config=small, **known),
        "b16": about_of(model, "b16", name="B/16", size="B", parameters=1, config=small, **known),
        "l14": about_of(model, "l14", name="L/14", size="L", parameters=3, config=small, **known),
        "l336": about_of(model, "l336", name="L/14 336", size="L", parameters=4, config=large, **known),
    }

    def of(**medians):
        return {k: {"skip over patches": {"n": 40, "quantiles": {"0.5": x}}} for k, x in medians.items()}

    values = of(b32=1.0, b16=2.0, l14=3.1, l336=1.0)
    (claim,) = (c for c in told(A7, values, models) if c.on.startswith("CLIP:"))
    assert claim.holds is True and claim.on == "CLIP: B/16, B/32, L/14" and claim.ordering == 5
    assert claim.by == "B/16 2.00, B/32 1.00, L 3.10; 1.55 times; n = 40"
    assert verdicts(A7, of(b32=2.1, b16=2.0, l14=3.1, l336=9.0), models, "CLIP") == [False]  # not 1.5 times b32
    # No other of that size: it stands for it.
    assert verdicts(A7, of(b32=1.0, b16=2.0, l336=9.0), models, "CLIP") == [True]
    # Both of one resolution: all of the largest size must be larger than all others.
    models["l336"] = replace(models["l336"], config=small)
    assert verdicts(A7, values, models, "CLIP") == [False]


def test_a1_of_the_mass_says_so():
    models = family("SLg", registers=True)
    ratio, mass = "registers of both", "registers"
    for figure, expected in (("ratio", True), ("mass", False)):
        results = {
            f"DINOv2-{s}": {
                ratio: {"n": 40, "mean": m, "std": m},
                mass: {"n": 40, "mean": -m, "std": -m},
                "reading": {"figure": figure},
            }
            for s, m in (("S", 0.1), ("L", 0.3), ("g", 0.4))
        }
        claims = told(A1, results, models)
        assert [c.holds for c in claims] == [expected] * 2
        assert all(("(read: figure mass)." in c.text) == (figure == "mass") for c in claims)


def test_what_no_model_was_given_for_is_not_tested():
    """One row for each statement, whatever else was given."""
    random = {f"r{i}": about_of(random_model(FAMILIES["dinov2"]), f"r{i}", parameters=i) for i in range(2)}
    ratios = {key: {"skip over patches": {"n": 40, "quantiles": {"0.5": 1.0}}} for key in random}
    cosines = {key: {"reading": "raw", "raw": [{"n": 40, "mean": 0.5}, {"n": 40, "mean": 1.0}]} for key in random}
    for models in ({}, random):
        assert untested(A1, {key: {"patches": {}} for key in models}, models) == ["DINOv2"] * 2
        assert untested(A2, {}, models) == ["DINOv2"] * 3
        assert untested(A7, ratios if models else {}, models) == ["DINOv2, CLIP, iBOT"]
        assert untested(A8, cosines if models else {}, models) == ["DINOv2, CLIP, iBOT", "DeiT III"]
    clip = family("BL", registers=False, name="CLIP")
    ratios = {key: {"skip over patches": {"n": 40, "quantiles": {"0.5": 1.0}}} for key in clip}
    assert untested(A7, ratios, clip) == ["DINOv2, iBOT"]


def test_a2_claims():
    models = family("SBLg", registers=True)

    def of(share, before, after, n=FEWEST, register="fixed"):
        known = {"register": 3, "highest norm": {"n": n}, "reading": {"register": register}}
        return known | {"is the argmax": share, "cosine before": before, "cosine after": after}

    small = of(0.2, 0.1, 0.9)
    for g, expected in (
        (of(1.0, 0.9989, 0.8), [True, True, True]),
        (of(0.999, 0.98, 0.985), [False, False, False]),
        (of(1.0, math.nan, math.nan), [True, None, None]),
        (of(1.0, 0.9989, 0.8, n=FEWEST - 1), [None, None, None]),
    ):
        assert verdicts(A2, {"DINOv2-S": small, "DINOv2-g": g}, models) == expected
    # Of L alone nothing is stated.
    claims = told(A2, {"DINOv2-S": small, "DINOv2-L": of(1.0, 0.9989, 0.8)}, models)
    assert [(c.ordering, c.holds, c.by) for c in claims] == [(4, None, "needs DINOv2 g")] * 3
    claims = told(A2, {"DINOv2-g": of(1.0, 0.9989, 0.8, register="argmax")}, models)
    assert ["(read: register argmax)" in c.text for c in claims] == [False, True, True]
    assert claims[0].by == "g: register 3, in 100.0\N{NO-BREAK SPACE}% of images; n = 30"


def test_a7_claims():
    def of(ratios, n=FEWEST):
        return {
            key: {"skip over patches": {"n": n, "mean": 100 - ratio, "quantiles": {"0.5": ratio}}}
            for key, ratio in ratios.items()
        }

    models = family("SBLg", registers=False) | family("BL", registers=False, name="CLIP")
    models |= family("SBLH", registers=False, name="DeiT III")
    dino = {"DINOv2-S": 1, "DINOv2-B": 2, "DINOv2-L": 1.5}
    ratios = dino | {"DINOv2-g": 9, "CLIP-B": 5, "CLIP-L": 4, "DeiT III-S": 1, "DeiT III-H": 5}
    claims = {c.on.partition(":")[0]: (c.ordering, c.holds) for c in told(A7, of(ratios), models)}
    assert claims == {"DINOv2": (5, True), "CLIP": (5, False), "DeiT III": (0, True), "iBOT": (5, None)}
    assert verdicts(A7, of(dino | {"DINOv2-g": 2 * FAR}), models) == [True]
    assert verdicts(A7, of(dino | {"DINOv2-g": 2 * FAR - 0.01}), models) == [False]  # larger, and not far larger
    assert verdicts(A7, of(ratios, n=FEWEST - 1), models) == [None]
    assert verdicts(A7, of(dino), models) == [None]  # L is no g
    assert verdicts(A7, of({"DINOv2-g": 9}), models) == [None]
    assert verdicts(A7, {"DINOv2-g": {"skip over patches": {"n": 0}}} | of({"DINOv2-S": 1}), models) == [None]


def test_a8_claims():
    names = a8_depth_cosine.READINGS

    def of(values, reading="raw", n=FEWEST):
        layers = {key: [{"n": n, "mean": x} for x in (0.0, value, 1.0)] for key, value in values.items()}
        return {key: {"reading": reading, names[reading]: each} for key, each in layers.items()}

    models = family("SBLg", registers=False) | family("SBLH", registers=False, name="DeiT III")
    dino = {"DINOv2-S": 0.2, "DINOv2-L": 0.3, "DINOv2-g": 0.9}
    for reading in names:
        (claim,) = (c for c in told(A8, of(dino, reading), models) if c.on.startswith("DINOv2:"))
        assert claim.holds is True and claim.ordering == 5
        assert (f"(read: {reading})." in claim.text) == (reading != "raw")
    assert verdicts(A8, of(dino | {"DINOv2-L": 0.95}), models) == [False]
    assert verdicts(A8, of(dino | {"DINOv2-L": 0.81}), models) == [False]  # closer, and not far closer
    assert verdicts(A8, of(dino, n=FEWEST - 1), models) == [None]
    deit = {"DeiT III-S": 0.5, "DeiT III-B": 0.4}
    for large, holds in ((0.38, True), (0.54, True), (0.56, False), (0.36, True), (0.34, False)):
        assert verdicts(A8, of(deit | {"DeiT III-L": large, "DeiT III-H": large}), models, "DeiT III") == [holds], large
    (claim,) = (
        c for c in told(A8, of(deit | {"DeiT III-L": 0.34, "DeiT III-H": 0.34}), models) if c.on.startswith("DeiT III:")
    )
    assert claim.ordering == 5 and claim.by.endswith("above by -0.160, below by 0.060; n = 30")
    assert verdicts(A8, of({"DeiT III-L": 0.5}), models, "DeiT III") == [None]
    one_block = {key: {"reading": "raw", "raw": [{"n": 40, "mean": 1.0}]} for key in ("DINOv2-S", "DINOv2-g")}
    assert verdicts(A8, one_block, models) == [None]


def test_what_falls():
    assert falls([[3.0, 4.0], [2.0], [1.0]]) and not falls([[3.0, 2.0], [2.0], [1.0]])
    assert not falls([[3.0], [1.0], [2.0]]) and not falls([[1.0], [1.0]])
    assert falls([[0.5], [0.51], [0.3]], 0.02) and not falls([[0.5], [0.53], [0.3]], 0.02)
    assert not falls([[0.5], [0.49]], 0.02)


# --- tables and figures


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Two families, with registers and without, under all five experiments."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    paths = [folder / f"{i}.png" for i in range(4)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path)
    configs = {
        f"{name} {size}": replace(FAMILIES[name], preprocess=Preprocess(resize=20, crop=20))
        for name in ("dinov2", "dinov2 with registers", "clip")
        for size in ("small", "large")
    }
    models, examples, abouts = {}, {}, {}
    for seed, (key, config) in enumerate(configs.items()):
        models[key] = random_model(config, seed)
        kind = "trained" if config.registers else "none"
        of_family = dict(family="CLIP" if "clip" in key else "DINOv2", registers_are=kind, weights="trained")
        of_family["parameters"] = seed  # to compare without programs of two sizes
        abouts[key] = about_of(models[key], key, size=key.rpartition(" ")[2], **of_family)
        # One image could not be used by one of the models.
        used = paths[1:] if key == "clip small" else paths
        examples[key] = explain(Subject(abouts[key], models[key]), used, [p.name for p in used], None)
    images = random_images(0, N, 20)
    views = {}
    for e in ALL:
        keys = [key for key in configs if e.refuses(abouts[key]) is None]
        found = {key: {"clean": found_of(e, models[key], images)} for key in keys}
        options = {option.name: option.default for option in e.options}
        results = {key: e.numbers(found[key], abouts[key], options) for key in keys}
        views[e.id] = View(json.loads(json.dumps(results)), abouts, found, examples)
    return views


@pytest.mark.parametrize("experiment", ALL, ids=lambda e: e.id)
def test_tables(shown, experiment):
    view = shown[experiment.id]
    table = experiment.table(view.results, view.models)
    assert {row[0] for row in table.rows} == set(view.results)
    assert {len(row) for row in table.rows} == {len(table.head)}
    assert experiment.table({}, view.models).rows == []
    assert not any("undefined" in cell for row in table.rows for cell in row)


@pytest.mark.parametrize("experiment", ALL, ids=lambda e: e.id)
def test_figures(shown, experiment, tmp_path):
    expected = {"A1": {"2a"}, "A2": {"2b", "2b-all"}, "A5": {"4", "4-cosines"}}
    expected |= {"A7": {"5a", "7", "7-shares"}, "A8": {"5b", "9"}}
    view = shown[experiment.id]
    with styled():
        figures = experiment.figures(view)
        assert figures.keys() == expected[experiment.id]
        for name, figure in figures.items():
            figure.savefig(tmp_path / f"{name}.png", dpi=60)
            assert_drawn(figure, values_of(name, view))
        # One model alone, without examples.
        key = next(iter(view.results))
        alone = view._replace(results={key: view.results[key]}, found={key: view.found[key]}, examples={})
        few = experiment.figures(alone)
        assert few.keys() == expected[experiment.id] - {"2b-all", "4", "7", "9"}
        for name, figure in few.items():
            figure.savefig(tmp_path / f"{name}.png", dpi=60)
            assert_drawn(figure, values_of(name, alone))


def values_of(figure, view):
    """Numbers of the models that have to be in a figure, as it draws them."""
    results = view.results
    match figure:
        case "2a":
            return [
                of[name]["mean"] for of in results.values() for name in ("cls", "registers", "patches") if name in of
            ]
        case "2b" | "2b-all":
            models = results if figure == "2b-all" else [max(results, key=lambda key: view.models[key].parameters)]
            tops = [results[key][f"top {place}"] for key in models for place in ("before", "after")]
            return [each["mean absolute"] for top in tops for each in top]
        case "4":
            names = [example.name for example in view.examples["dinov2 small"][: a5_patch_cosine.SHOWN]]
            explained = [example for key in results for example in view.examples[key] if example.name in names]
            return [of for e in explained for of in (e.attention[-1, :, 0].mean(0), e.contribution[-1, :, 0].sum(0))]
        case "4-cosines":
            return [of[name]["mean"] for of in results.values() for name in ("patches", "registers") if name in of]
        case "5a" | "7":
            keys = [key for key in results if figure == "7" or view.models[key].family == "DINOv2"]
            found = [view.found[key]["clean"].per_image for key in keys]
            return [of[name].mean() for of in found for name in ("norm patches", "norm skip", "skip over patches")]
        case "7-shares":
            return [share["mean"] for of in results.values() for share in of["share"].values()]
        case "5b" | "9":
            keys = [key for key in results if figure == "9" or view.models[key].family == "DINOv2"]
            return [layer["mean"] for key in keys for layer in a8_depth_cosine.shown_of(results[key])]
    raise AssertionError(figure)


def assert_drawn(figure, values):
    """Each of the values is one that the figure draws, and all it draws are numbers."""
    drawn, values = drawn_numbers(figure), np.concatenate([np.ravel(value) for value in values])
    assert np.isfinite(drawn).all()
    missing = [value for value in values if not np.isclose(drawn, value, rtol=1e-5, atol=1e-9).any()]
    assert values.size and not missing, missing


def test_what_figures_show(shown):
    """Bars and pictures are the numbers they stand for."""
    with styled():
        rows, watched = A1.figures(shown["A1"])["2a"].axes[1], A1.figures(shown["A1"])["2a"].axes[0]
        tops = [bar.get_y() + bar.get_height() for bar in rows.patches]
        assert max(tops) == pytest.approx(1, abs=1e-5) and len(rows.patches) == 3 * 6
        means = [line.get_ydata()[0] for line in watched.lines if line.get_marker() == "D"]
        of = shown["A1"].results
        expected = [of[f"dinov2 with registers {size}"]["registers of both"]["mean"] for size in ("small", "large")]
        assert means == pytest.approx(expected, rel=1e-6)

        before = A2.figures(shown["A2"])["2b"].axes[0]
        top = shown["A2"].results["dinov2 with registers large"]["top before"]
        assert [bar.get_height() for bar in before.patches] == pytest.approx([each["mean absolute"] for each in top])

        curves = A8.figures(shown["A8"])["5b"]
        drawn = [line.get_ydata() for ax in curves.axes for line in ax.lines if len(line.get_ydata()) > 2]
        of = [numbers for key, numbers in shown["A8"].results.items() if key.startswith("dinov2")]
        expected = [[each["mean"] for each in a8_depth_cosine.shown_of(numbers)] for numbers in of]
        assert sorted(map(list, drawn)) == [pytest.approx(line, rel=1e-6) for line in sorted(expected)]

        shares = A7.figures(shown["A7"])["7-shares"].axes[0]
        total = sum(bar.get_height() for bar in shares.patches)
        assert total == pytest.approx(6, abs=1e-4)  # of six models

        maps = A5.figures(shown["A5"])["4"]
        pictures = [
            [ax.images[0].get_array() if ax.images else None for ax in maps.axes[9 * i :][:9]] for i in range(6)
        ]
        example = shown["A5"].examples["dinov2 small"][0]
        np.testing.assert_allclose(pictures[0][1].ravel(), example.attention[-1, :, 0].mean(0))
        np.testing.assert_allclose(pictures[0][2].ravel(), example.contribution[-1, :, 0].sum(0))
        # The image that one model lacks leaves a gap; the others stay in their places.
        empty = [[p is None for p in row] for row in pictures]
        assert sum(map(sum, empty)) == 3 and [True] * 3 + [False] * 6 in empty


def test_what_other_readings_show(shown):
    """The mass for the ratio, and the highest register of each image, in figures and tables."""
    view = shown["A1"]
    results = {key: of | {"reading": {"figure": "mass"}} for key, of in view.results.items()}
    key = "dinov2 with registers small"
    with styled():
        left = A1.figures(view._replace(results=results))["2a"].axes[0]
    means = [line.get_ydata()[0] for line in left.lines if line.get_marker() == "D"]
    assert means[0] == pytest.approx(results[key]["registers"]["mean"], rel=1e-6)
    assert left.get_ylabel() == "attention on registers"
    table = A1.table(results, view.models)
    row = dict(zip(table.head, next(row for row in table.rows if row[0] == key), strict=True))
    assert row["std of attention on registers"] == f"{results[key]['registers']['std']:.3f}"

    view = shown["A2"]
    results = {key: of | {"reading": {"register": "argmax"}} for key, of in view.results.items()}
    with styled():
        (title, _) = (ax.get_title(loc="left") for ax in A2.figures(view._replace(results=results))["2b"].axes)
    assert "highest register of each image" in title
    row = next(row for row in A2.table(results, view.models).rows if row[0] == key)
    assert row[3] == f"{results[key]['highest norm']['mean']:.1f}"


def test_random_weights_are_a_family_of_their_own():
    """They are compared among each other, under their own name, as no ordering of the paper's."""
    about: About = about_of(random_model(FAMILIES["dinov2"]), "a", parameters=1, size="1")
    models = {"a": about, "b": replace(about, key="b", name="b", size="2", parameters=2)}
    results = {k: {"skip over patches": {"n": 40, "quantiles": {"0.5": x}}} for k, x in (("a", 1.0), ("b", 2.0))}
    claim, missing = A7.claims(results, models)
    assert (claim.on, claim.holds, claim.ordering) == ("random weights: a, b", True, 0)
    assert (missing.on, missing.holds, missing.ordering) == ("DINOv2, CLIP, iBOT", None, 5)

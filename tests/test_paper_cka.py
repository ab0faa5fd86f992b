"""A3, A6, A9, B3, B7 and all readings: equal to direct formulas over all images, in float64, of really edited runs."""

import json
from dataclasses import replace
from functools import cache
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import paper
import pytest
from conftest import FAMILIES, random_images, random_model
from paper import about_of, defaults
from test_similarity import direct_biased, direct_unbiased

import jaxvit
from experiments.beyond import b3_layers_heads, b7_open_questions, sensitivity
from experiments.core import charts as draw
from experiments.core.claims import FEWEST
from experiments.core.experiment import View
from experiments.core.trace import READINGS
from experiments.paper import a3_update_cka, a5_patch_cosine, a6_gram_split, a9_skip_cka
from experiments.runner import progress
from jaxvit import Take, knockout, patch, zero_attention

A3, A5, A6 = a3_update_cka.EXPERIMENT, a5_patch_cosine.EXPERIMENT, a6_gram_split.EXPERIMENT
A9, B3, B7 = a9_skip_cka.EXPERIMENT, b3_layers_heads.EXPERIMENT, b7_open_questions.EXPERIMENT
SENSITIVITY = sensitivity.EXPERIMENT
ALL = (A3, A6, A9, B3, B7, SENSITIVITY)
CLOSE = dict(rtol=1e-8, atol=1e-11)
N = 11

FOUND = {}


def found_of(experiment, model, images, options=None, edits=None, last=False):
    """That of `paper`; several tests ask for the same, and compiling takes long."""
    asked = (experiment.id, id(model), id(images), str(options or {}), id(edits), last)
    if asked not in FOUND:
        found = paper.found_of(experiment, model, images, options, edits, last=last)
        FOUND[asked] = (found, model, images, edits)  # kept, so that no other gets their ids
    return FOUND[asked][0]


def numbers_of(experiment, model, images, options=None, **more):
    found = found_of(experiment, model, images, options, **more)
    return experiment.numbers({"clean": found}, about_of(model), defaults(experiment, **(options or {})))


CONFIGS = {name: FAMILIES[name] for name in ("dinov2 giant with registers", "clip")}


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@cache
def model64(name):
    return jaxvit.cast(random_model(CONFIGS[name]), "float64")


@pytest.fixture(scope="module")
def images():
    return jnp.asarray(random_images(3, N, 20, 24), jnp.float64)


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return model64(request.param)


@pytest.fixture(scope="module")
def registers():
    return model64("dinov2 giant with registers")


def sources_of(model):
    return ("cls", "registers", "patches") if model.config.registers else ("cls", "patches")


@pytest.fixture(scope="module")
def run(model, images):
    """Everything, recorded in one run without the framework of experiments."""
    sites = ("pattern", "v", "z", "attn_out", "skip_attn", "resid_mid", "mlp_out", "resid_post")
    recorded = jax.jit(lambda model, images: model(images, record=dict.fromkeys(sites, Take())).trace)(model, images)
    return {name: np.asarray(a) for name, a in recorded.items()}


def weights(model, layer=-1):
    """W_o [H d, D], its bias and LayerScale of a layer."""
    block = jax.tree.map(lambda a: np.asarray(a[layer]), model.blocks)
    gamma = block.scale1.gamma[...] if model.config.layer_scale else np.ones(model.config.width)
    return block.attn.proj.kernel[...].reshape(model.config.width, -1), block.attn.proj.bias[...], gamma


def z_by_hand(model, run, source, layer=-1):
    """Outputs of the heads for [CLS], of one source: all other columns of the attention row are zeros, [B, H, d]."""
    row = run["pattern"][layer][:, :, 0].copy()
    prefix = 1 + model.config.registers
    ends = {"cls": (0, 1), "registers": (1, prefix), "patches": (prefix, row.shape[-1])}[source]
    keep = np.zeros(row.shape[-1])
    keep[slice(*ends)] = 1
    return np.einsum("bht,bthd->bhd", row * keep, run["v"][layer])


def part_by_hand(model, run, source, layer=-1):
    """After LayerScale, without the bias, [B, D]."""
    z = z_by_hand(model, run, source, layer)
    kernel, _, gamma = weights(model, layer)
    return z.reshape(len(z), -1) @ kernel * gamma


def assert_cka(found, x, y, **close):
    close = CLOSE | close
    assert (found["n"], found["d1"], found["d2"]) == (len(x), x.shape[1], y.shape[1])
    np.testing.assert_allclose(found["biased"], direct_biased(x, y), **close)
    np.testing.assert_allclose(found["unbiased"], direct_unbiased(x, y), **close)
    x, y = (a - a.mean(0) for a in (x, y))
    chance = np.square(x).sum() * np.square(y).sum() / (len(x) - 1)
    np.testing.assert_allclose(found["null"], chance / np.sqrt(np.square(x.T @ x).sum() * np.square(y.T @ y).sum()))


def edited(model, images, source, stage, *, renormalise=False, keep_cls=False):
    """[CLS] at a reading, of a run in which it really attends to one source alone in the last layer."""
    kept = {source} | ({"cls"} if keep_cls else set())
    others = [name for name in sources_of(model) if name not in kept]
    cut = knockout if renormalise else zero_attention
    out = rerun(model, images, cut(model, query="cls", key=others, layers=-1) if others else None)
    return np.asarray(at_stage(out, stage))


@jax.jit
def rerun(model, images, edits=None):
    return model(images, edits, dict.fromkeys(("z", "attn_out", "resid_post"), Take(layers=-1)))


def at_stage(out, stage):
    if stage in ("heads", "proj"):
        return out.trace["z"][-1][:, 0].reshape(len(out.cls), -1)  # W_o is applied by `projected`
    return {
        "layerscale": out.trace["attn_out"][-1][:, 0],
        "block": out.trace["resid_post"][-1][:, 0],
        "final": out.cls,
    }[stage]


def projected(model, x, stage):
    kernel, bias, _ = weights(model)
    return x @ kernel + bias if stage == "proj" else x


@pytest.fixture(scope="module")
def sensitivity_of(model, images):
    return numbers_of(SENSITIVITY, model, images)


# --- A3


def test_a3_is_cka_with_columns_of_attention_set_to_zero(model, images, run):
    numbers = numbers_of(A3, model, images)
    assert set(numbers) == {"reading", *sources_of(model)}
    update = run["attn_out"][-1][:, 0]
    for source in sources_of(model):
        assert_cka(numbers[source], update, part_by_hand(model, run, source))


@pytest.mark.parametrize("stage", READINGS)
def test_every_reading_of_a3_is_a_run_of_the_model_with_attention_cut(model, images, sensitivity_of, stage):
    """Without renormalising, weights are set to zero after the softmax; with it, scores are cut before the softmax."""
    whole = rerun(model, images)
    reference = projected(model, np.asarray(at_stage(whole, stage)), stage)
    readings = [reading for reading in sensitivity.readings(A3) if reading["stage"] == stage]
    assert len(readings) == 4
    for reading in readings:
        of = sensitivity.as_numbers(sensitivity_of["rows"], "A3", reading)
        assert set(of) == set(sources_of(model)) - {"cls"}
        for source, found in of.items():
            expected = projected(model, edited(model, images, source, **reading), stage)
            assert_cka(found, reference, expected)


@pytest.mark.parametrize(
    "reading",
    [{"renormalise": True}, {"keep_cls": True}, {"stage": "heads"}, {"stage": "final", "renormalise": True}],
    ids=str,
)
def test_options_of_a3_are_its_readings(registers, images, reading):
    numbers, usual = numbers_of(A3, registers, images, reading), numbers_of(A3, registers, images)
    expected = projected(registers, edited(registers, images, "patches", **({"stage": "layerscale"} | reading)), "")
    whole = at_stage(rerun(registers, images), reading.get("stage", "layerscale"))
    assert_cka(numbers["patches"], np.asarray(whole), expected)
    assert abs(numbers["patches"]["biased"] - usual["patches"]["biased"]) > 1e-6


def test_keep_cls_leaves_the_own_part_of_cls_as_it_is(registers, images):
    kept, usual = numbers_of(A3, registers, images, {"keep_cls": True}), numbers_of(A3, registers, images)
    assert kept["cls"] == usual["cls"]


@pytest.mark.parametrize("renormalise", [False, True])
def test_attention_to_registers_alone_leaves_nothing_to_patches(registers, images, renormalise):
    only = knockout(registers, query="cls", key=("cls", "patches"), layers=-1)
    numbers = numbers_of(A3, registers, images, {"renormalise": renormalise}, edits=only)
    for which in ("biased", "unbiased"):
        np.testing.assert_allclose(numbers["registers"][which], 1, rtol=1e-12)
    assert all(
        np.isnan(numbers[name][which]) for name in ("patches", "cls") for which in ("biased", "unbiased", "null")
    )


def test_attention_to_patches_alone_leaves_nothing_to_registers(registers, images):
    only = knockout(registers, query="cls", key=("cls", "registers"), layers=-1)
    numbers = numbers_of(A3, registers, images, edits=only)
    np.testing.assert_allclose(numbers["patches"]["unbiased"], 1, rtol=1e-12)
    assert np.isnan(numbers["registers"]["unbiased"])


@pytest.mark.parametrize("experiment", [A3, A9], ids=lambda e: e.id)
@pytest.mark.parametrize("reading", ["default", "final"])
def test_the_last_layer_alone_gives_the_same_numbers(registers, images, experiment, reading):
    """As controls of the last layer run it."""
    options = {} if reading == "default" else {experiment.options[-1].name: reading}
    whole, alone = (numbers_of(experiment, registers, images, options, last=last) for last in (False, True))
    assert whole.pop("reading") == alone.pop("reading") == defaults(experiment, **options)
    for name, cka in whole.items():
        np.testing.assert_allclose(list(alone[name].values()), list(cka.values()), rtol=1e-9)


# --- A6


def direct_gram(model, run, centred):
    """Shares of n x n matrices."""
    update = run["attn_out"][-1][:, 0]
    parts = {
        name: part_by_hand(model, run, name) for name in ("patches", "registers", "cls") if name in sources_of(model)
    }
    if not centred:
        parts["bias"] = np.zeros_like(update) + update - sum(parts.values())
    if centred:
        update, parts = update - update.mean(0), {name: x - x.mean(0) for name, x in parts.items()}
    whole = update @ update.T
    terms = {name: x @ x.T for name, x in parts.items()}
    terms |= {f"{a} x {b}": parts[a] @ parts[b].T + parts[b] @ parts[a].T for a, b in combinations(parts, 2)}
    gram = {name: (term * whole).sum() / np.square(whole).sum() for name, term in terms.items()}
    return gram, {name: np.trace(term) / np.trace(whole) for name, term in terms.items()}


@pytest.mark.parametrize("centred", [True, False])
def test_a6_equals_gram_matrices_over_images(model, images, run, centred):
    numbers = numbers_of(A6, model, images, {"centred": centred})
    for kind, expected in zip(("gram", "trace"), direct_gram(model, run, centred), strict=True):
        assert numbers[kind].keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(numbers[kind][name], value, rtol=1e-8, atol=1e-10, err_msg=f"{kind} {name}")
        np.testing.assert_allclose(sum(numbers[kind].values()), 1, rtol=1e-10)
        np.testing.assert_allclose(numbers["sum"][kind], 1, rtol=1e-10)


def test_a6_sums_to_one_in_float32(registers, images):
    with jax.enable_x64(False):
        numbers = numbers_of(A6, jaxvit.cast(registers, "float32"), images.astype("float32"))
    assert numbers["sum"] == pytest.approx({"gram": 1, "trace": 1}, abs=1e-5)
    assert numbers["sum"] == {kind: sum(numbers[kind].values()) for kind in ("gram", "trace")}


def test_a6_of_registers_alone_is_all_theirs(registers, images):
    only = knockout(registers, query="cls", key=("cls", "patches"), layers=-1)
    numbers = numbers_of(A6, registers, images, edits=only)
    for kind in ("gram", "trace"):
        assert numbers[kind].pop("registers") == pytest.approx(1)
        assert all(value == pytest.approx(0, abs=1e-9) for value in numbers[kind].values())


# --- A9


def test_a9_is_cka_with_every_summand(model, images, run):
    numbers = numbers_of(A9, model, images)
    middle = run["resid_mid"][-1][:, 0]
    assert set(numbers) == {"skip", "reading", *sources_of(model)}
    assert_cka(numbers["skip"], middle, run["skip_attn"][-1][:, 0])
    for source in sources_of(model):
        assert_cka(numbers[source], middle, part_by_hand(model, run, source))


@pytest.mark.parametrize("reading", ["block", "final"])
def test_a9_sends_each_summand_through_the_rest_of_the_model(model, images, run, sensitivity_of, reading):
    summands = {name: part_by_hand(model, run, name) for name in sources_of(model)}
    summands["skip"] = run["skip_attn"][-1][:, 0]

    reference = np.asarray(at_stage(rerun(model, images), reading))
    rows = sensitivity.as_numbers(sensitivity_of["rows"], "A9", {"reading": reading})
    assert set(rows) == set(summands)
    for name, x in summands.items():
        value = np.zeros((len(x), 1 + model.config.registers, x.shape[1]))
        value[:, 0] = x
        edits = patch(model, "resid_mid", value, over="prefix", layers=-1, tokens="cls")
        assert_cka(rows[name], reference, np.asarray(at_stage(rerun(model, images, edits), reading)))


def planted(model, layer_scale):
    """The last layer's attention is multiplied by a number before it is added to the stream."""
    params = jaxvit.model.params.to_params(model)
    name = next(name for name in params if "scale1" in name)
    params = dict(params) | {name: params[name].at[-1].set(layer_scale)}
    return jaxvit.model.params.from_params(model.config, params)


def test_where_attention_adds_nothing_the_skip_path_is_all(registers, images):
    numbers = numbers_of(A9, planted(registers, 0.0), images)
    np.testing.assert_allclose([numbers["skip"][name] for name in ("biased", "unbiased")], 1, rtol=1e-12)
    assert all(np.isnan(numbers[name]["biased"]) for name in ("patches", "registers", "cls"))


def test_where_attention_adds_much_the_skip_path_is_little(registers, images):
    of = {gamma: numbers_of(A9, planted(registers, gamma), images) for gamma in (1e-4, 1e4)}
    assert of[1e-4]["skip"]["unbiased"] > 1 - 1e-3
    update = numbers_of(A3, planted(registers, 1e4), images)
    for name in ("patches", "registers", "cls"):  # what is added is all there is: A9 is A3
        assert of[1e4][name]["unbiased"] == pytest.approx(update[name]["unbiased"], abs=1e-3)


# --- B3


def test_b3_is_a3_and_a9_of_every_layer(model, images, run):
    numbers = numbers_of(B3, model, images)
    depth = model.config.depth
    assert numbers["layers"] == list(range(depth))

    def at(cka, layer):
        return {name: x[layer] if isinstance(x, list) else x for name, x in cka.items()}

    for layer in range(depth):
        update, middle = run["attn_out"][layer][:, 0], run["resid_mid"][layer][:, 0]
        for source in sources_of(model):
            part = part_by_hand(model, run, source, layer)
            if not constant(part):
                assert_cka(at(numbers["update"][source], layer), update, part)
        if layer:
            assert_cka(at(numbers["stream"]["skip"], layer), middle, run["skip_attn"][layer][:, 0])
    for source in sources_of(model):
        last = numbers_of(A3, model, images)[source]
        assert at(numbers["update"][source], -1) == pytest.approx(last, rel=1e-9)
    assert at(numbers["stream"]["skip"], -1) == pytest.approx(numbers_of(A9, model, images)["skip"], rel=1e-9)


def constant(x):
    return np.ptp(x, axis=0).max() <= 1e-12 * np.abs(x).max()


def test_b3_of_heads_is_cka_of_what_they_write(model, images, run):
    numbers = numbers_of(B3, model, images)
    for layer in range(model.config.depth):
        for source in sources_of(model):
            part = z_by_hand(model, run, source, layer)
            for head in range(model.config.heads):
                found = {
                    name: x if name in "n d1 d2" else x[layer][head] for name, x in numbers["heads"][source].items()
                }
                x, y = run["z"][layer][:, 0, head], part[:, head]
                if not constant(y):
                    assert_cka(found, x, y)
            mass = run["pattern"][layer][:, :, 0, :].mean(0)
            prefix = 1 + model.config.registers
            columns = {"cls": mass[:, :1], "registers": mass[:, 1:prefix], "patches": mass[:, prefix:]}[source]
            np.testing.assert_allclose(numbers["mass"][source][layer], columns.sum(-1), rtol=1e-9)


def test_b3_norms_and_shares_are_means_over_images(model, images, run):
    numbers = numbers_of(B3, model, images)
    for layer in range(model.config.depth):
        of = {name: run[site][layer][:, 0] for name, site in SUMMAND_SITES.items()}
        of |= {source: part_by_hand(model, run, source, layer) for source in sources_of(model)}
        of["bias"] = of["update"] - sum(of[source] for source in sources_of(model))
        assert numbers["norms"].keys() == of.keys()
        for name, x in of.items():
            norm = np.linalg.norm(x, axis=1).mean()
            np.testing.assert_allclose(numbers["norms"][name][layer], norm, rtol=1e-9, atol=1e-12)
        for name in numbers["shares"]:
            share = ((of[name] * of["after"]).sum(1) / np.square(of["after"]).sum(1)).mean()
            np.testing.assert_allclose(numbers["shares"][name][layer], share, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(np.sum(list(numbers["shares"].values()), axis=0), 1, rtol=1e-9)


SUMMAND_SITES = {
    "skip": "skip_attn",
    "update": "attn_out",
    "middle": "resid_mid",
    "mlp": "mlp_out",
    "after": "resid_post",
}


def test_b3_takes_every_so_many_layers_from_the_last(registers, images):
    whole, some = numbers_of(B3, registers, images), numbers_of(B3, registers, images, {"stride": 2})
    assert some["layers"] == [0, 2]
    for kind in ("norms", "shares", "mass"):
        for name, values in whole[kind].items():
            np.testing.assert_allclose(some[kind][name], np.asarray(values)[[0, 2]], rtol=1e-12)
    for kind in ("update", "heads"):
        for source in sources_of(registers):
            expected = np.asarray(whole[kind][source]["biased"])[2]
            np.testing.assert_allclose(some[kind][source]["biased"][1], expected, rtol=1e-9)
    assert numbers_of(B3, registers, images, {"stride": 5})["layers"] == [2]


def test_in_the_first_layer_the_skip_path_does_not_vary(registers, images):
    with jax.enable_x64(False):
        numbers = numbers_of(B3, jaxvit.cast(registers, "float32"), images.astype("float32"))
    exact = numbers_of(B3, registers, images)["stream"]["skip"]["biased"]
    np.testing.assert_allclose(numbers["stream"]["skip"]["biased"], [np.nan, *exact[1:]], rtol=1e-4)


# --- B7


def test_b7_shares_sum_to_one_and_rank_images(model, images, run):
    found = found_of(B7, model, images)
    columns = found.per_image
    np.testing.assert_allclose(sum(x for name, x in columns.items() if name.startswith("share ")), 1, rtol=1e-9)
    update = run["attn_out"][-1][:, 0]
    for source in sources_of(model):
        part = part_by_hand(model, run, source)
        share = (part * update).sum(1) / np.square(update).sum(1)
        np.testing.assert_allclose(columns[f"share {source}"], share, **CLOSE)
        np.testing.assert_allclose(columns[f"norm {source}"], np.linalg.norm(part, axis=1), **CLOSE)
    skip, middle = run["skip_attn"][-1][:, 0], run["resid_mid"][-1][:, 0]
    np.testing.assert_allclose(columns["stream share skip"], (skip * middle).sum(1) / np.square(middle).sum(1), **CLOSE)
    numbers = B7.numbers({"clean": found}, about_of(model), {})
    assert set(numbers["ranking"]) == {"skip"} | ({"registers"} if model.config.registers else set())
    for name, ends in numbers["ranking"].items():
        values = columns[b7_open_questions.RANKED[name]]
        order = list(np.argsort(values))
        assert [each["image"] for each in ends["bottom"]] == order[:10]
        assert [each["image"] for each in ends["top"]] == order[::-1][:10]
        assert all(each["value"] == values[each["image"]] for end in ends.values() for each in end)


def test_b7_entropy_is_that_of_each_head_over_the_patches(model, images, run):
    row = run["pattern"][-1][:, :, 0, 1 + model.config.registers :]
    p = row / row.sum(-1, keepdims=True)
    expected = -(p * np.log(p)).sum(-1).mean(1) / np.log(p.shape[-1])
    np.testing.assert_allclose(found_of(B7, model, images).per_image["entropy"], expected, rtol=1e-9)


def test_entropy_of_even_single_and_no_attention():
    rows = jnp.asarray([[[0.25] * 4, [0.0, 0.5, 0.0, 0.0], [0.0] * 4]])
    np.testing.assert_allclose(b7_open_questions.entropy(rows), [[1, 0, 0]], atol=1e-12)


def test_ranking_tells_places_among_the_images_that_were_given(registers, images):
    found = found_of(B7, registers, images)
    places = 100 + 2 * np.arange(N)
    moved = B7.numbers(
        {"clean": found._replace(per_image={**found.per_image, "image": places})}, about_of(registers), {}
    )
    usual = B7.numbers({"clean": found}, about_of(registers), {})
    for kind, ends in usual["ranking"].items():
        for end, entries in ends.items():
            assert [100 + 2 * each["image"] for each in entries] == [e["image"] for e in moved["ranking"][kind][end]]


def test_correlations_know_order_and_line():
    x = np.asarray([3.0, 1.0, 4.0, 1.5, 9.0])
    rising = b7_open_questions.correlations(x, np.exp(x))
    assert rising["spearman"] == pytest.approx(1)
    assert rising["pearson"] == pytest.approx(np.corrcoef(x, np.exp(x))[0, 1])
    assert b7_open_questions.correlations(x, 2 - x) == pytest.approx({"pearson": -1, "spearman": -1})
    assert all(np.isnan(value) for value in b7_open_questions.correlations(x, np.ones(5)).values())
    np.testing.assert_array_equal(b7_open_questions.ranks(np.asarray([5, 2, 5, 7])), [1.5, 0, 1.5, 3])


def test_directions_of_planted_subspaces():
    """Patches vary in four directions alike, registers in two of these, the skip path in others."""
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(12, 12)))[0]

    def of(*variances):
        return (rotation * np.pad(np.asarray(variances, float), (0, 12 - len(variances)))) @ rotation.T

    found = b7_open_questions.directions(
        {
            "patches": of(1, 1, 1, 1),
            "registers": of(0, 0, 3, 1),
            "skip": of(0, 0, 0, 0, 1, 1),
            "nothing": np.zeros((12, 12)),
        }
    )
    assert found["k"] == [1, 2, 3, 5, 10, 12]
    np.testing.assert_allclose(found["chance"], np.asarray(found["k"]) / 12)
    assert found["spectra"]["patches"]["participation"] == pytest.approx(4)
    assert found["spectra"]["registers"]["participation"] == pytest.approx(16 / 10)
    assert [found["spectra"][name]["components for 90 %"] for name in ("patches", "registers", "skip")] == [4, 2, 2]
    np.testing.assert_allclose(found["spectra"]["registers"]["within own"], [0.75, 1, 1, 1, 1, 1])
    np.testing.assert_allclose(found["overlap"]["registers in patches"][3:], 1)
    np.testing.assert_allclose(found["overlap"]["patches in registers"][:2], [0.25, 0.5])
    np.testing.assert_allclose(found["overlap"]["skip in patches"][:3], 0, atol=1e-12)
    np.testing.assert_allclose(found["overlap"]["skip in patches"][-1], 1)
    assert (
        np.isnan(found["overlap"]["nothing in patches"]).all()
        and np.isnan(found["overlap"]["patches in nothing"]).all()
    )
    assert np.isnan(found["spectra"]["nothing"]["participation"])


def test_b7_directions_are_those_of_the_parts(registers, images):
    run = registers(images, record=dict.fromkeys(("pattern", "v", "skip_attn"), Take())).trace
    run = {name: np.asarray(a) for name, a in run.items()}
    x = {name: part_by_hand(registers, run, name) for name in ("patches", "registers")}
    x["skip"] = run["skip_attn"][-1][:, 0]
    singular = {}
    for name, rows in x.items():
        _, values, vectors = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
        singular[name] = values**2, vectors
    numbers = numbers_of(B7, registers, images)
    for name, (values, _) in singular.items():
        ratio = values.sum() ** 2 / np.square(values).sum()
        assert numbers["spectra"][name]["participation"] == pytest.approx(ratio)
    for a, b in (("registers", "patches"), ("patches", "registers"), ("skip", "patches")):
        at = numbers["k"].index(3)
        centred = x[a] - x[a].mean(0)
        share = np.square(centred @ singular[b][1][:3].T).sum() / np.square(centred).sum()
        assert numbers["overlap"][f"{a} in {b}"][at] == pytest.approx(share)
    assert_cka(numbers["cka"]["registers"], x["patches"], x["registers"])


# --- sensitivity


def test_sensitivity_has_every_reading_once_and_the_default_marked(model, sensitivity_of):
    rows = sensitivity_of["rows"]
    seen = [(row["experiment"], json.dumps(row["reading"], sort_keys=True), row["quantity"]) for row in rows]
    assert len(set(seen)) == len(seen)
    sides = len(sources_of(model)) - 1
    expected = {"A3": 5 * 2 * 2 * sides, "A5": 3 * 2 * (sides + 1), "A9": 3 * (sides + 2)}
    assert {id: sum(name == id for name, _, _ in seen) for id in expected} == expected
    marked = {(row["experiment"], json.dumps(row["reading"])) for row in rows if row["default"]}
    assert marked == {(e.id, json.dumps(defaults(e))) for e in (A3, A5, A9)}


@pytest.mark.parametrize("experiment", [A3, A9], ids=lambda e: e.id)
def test_sensitivity_at_the_default_is_the_experiment_itself(model, images, sensitivity_of, experiment):
    numbers = numbers_of(experiment, model, images)
    of = sensitivity.as_numbers(sensitivity_of["rows"], experiment.id, defaults(experiment))
    for name, row in of.items():
        assert {key: row[key] for key in numbers[name]} == pytest.approx(numbers[name], rel=1e-9)
        assert row["value"] == row["unbiased"]


@pytest.mark.parametrize("stage", ["heads", "layerscale"])
def test_sensitivity_of_cosines_is_a5(model, images, sensitivity_of, stage):
    numbers = numbers_of(A5, model, images, {"stage": stage})
    for bias, end in (("with", ""), ("without", a5_patch_cosine.WITHOUT)):
        for source in sources_of(model):
            expected = numbers[source + end]
            rows = sensitivity_of["rows"]
            value = sensitivity.value_of(rows, "A5", {"stage": stage, "bias": bias}, f"cosine({source})")
            assert value == pytest.approx(expected["mean"], rel=1e-9)
            (row,) = (
                row
                for row in rows
                if row["quantity"] == f"cosine({source})" and row["reading"] == {"stage": stage, "bias": bias}
            )
            assert row["std"] == pytest.approx(expected["std"], rel=1e-6)


def test_orderings_say_where_another_reading_turns_them_round():
    def rows(flipped):
        for reading in sensitivity.readings(A9):
            skip, patches = (0.2, 0.6) if reading["reading"] in flipped else (0.7, 0.6)
            for name, value in (("skip", skip), ("patches", patches)):
                yield sensitivity.row(A9, reading, f"CKA({name})", {"unbiased": value})

    def same(*flipped):
        found = sensitivity.orderings(list(rows(flipped)))
        return {each["reading"]["reading"]: each["as default"] for each in found if each["experiment"] == "A9"}

    assert same() == {"middle": True, "block": True, "final": True}
    assert same("final") == {"middle": True, "block": True, "final": False}
    assert same("middle") == {"middle": True, "block": False, "final": False}
    undefined = [each for each in sensitivity.orderings(list(rows(()))) if each["experiment"] == "A3"]
    assert len(undefined) == 20 and all(each["holds"] is each["as default"] is None for each in undefined)


# --- claims, tables and figures


def family(model, registers, sizes="SBLg", of="DINOv2"):
    kind = dict(family=of, weights="trained", registers=4 * registers, registers_are="trained" if registers else "none")
    return {size: about_of(model, size, size=size, parameters=i, **kind) for i, size in enumerate(sizes)}


def ckas(n=FEWEST, **values):
    return {name: dict(n=n, d1=8, d2=8, biased=x, unbiased=x, null=0.0) for name, x in values.items()}


def of_family(claims, name="DINOv2"):
    return [claim for claim in claims if claim.on.startswith(f"{name}:")]


def test_a3_claims_a_fall_and_a_crossing(registers):
    models = family(registers, True)

    def holds(patches, of_registers=(0.1, 0.1, 0.3, 0.6), n=FEWEST):
        each = zip(models, patches, of_registers, strict=True)
        results = {key: ckas(n, patches=p, registers=r) for key, p, r in each}
        claims = A3.claims(results, models)
        assert all(claim.ordering == 2 and claim.on == "DINOv2: S, B, L, g" for claim in claims)
        return [claim.holds for claim in claims]

    assert holds((0.99, 0.97, 0.7, 0.3)) == [True, True]
    assert holds((0.97, 0.99, 0.7, 0.65)) == [True, False]
    assert holds((0.99, 0.97, 0.3, 0.7))[0] is False  # rises from L to g
    assert holds((0.99, 0.85, 0.7, 0.3))[0] is False  # B is not about 1
    assert holds((0.99, 0.97, 0.98, 0.3))[0] is False  # L is not below B
    assert holds((0.99, float("nan"), 0.7, 0.3))[0] is None
    assert holds((0.99, 0.97, 0.7, float("nan"))) == [None, None]
    assert holds((0.99, 0.97, 0.7, 0.3), n=FEWEST - 1) == [None, None]
    for sizes, needs in (("SB", ["L and g", "g"]), ("SBL", ["g", "g"]), ("SBg", ["L", None])):
        some = family(registers, True, sizes)
        patches = dict(zip(sizes, (0.99, 0.98, 0.1), strict=False))
        results = {key: ckas(patches=patches[key], registers=0.2) for key in some}
        for claim, missing in zip(A3.claims(results, some), needs, strict=True):
            assert claim.holds is (None if missing else True)
            assert missing is None or claim.by == f"needs DINOv2 {missing}"
    some = [claim.by for claim in A3.claims({key: ckas(patches=0.9, registers=0.1) for key in models}, models)]
    assert all(by.endswith("; n = 30") for by in some)


def test_what_no_model_was_given_for_is_not_tested(registers):
    """One row for each statement, on the paper's families."""
    none = family(registers, False)
    random = {"r": replace(about_of(registers, "r"), size="1"), "q": replace(about_of(registers, "q"), size="2")}
    for results, models in (({}, {}), ({key: ckas(patches=0.5) for key in none}, none)):
        claims = A3.claims(results, models)
        assert [(c.ordering, c.holds, c.on) for c in claims] == [(2, None, "DINOv2")] * 2
    claims = A3.claims({key: ckas(patches=0.99, registers=0.1) for key in random}, random)
    assert [(c.ordering, c.on.partition(":")[0]) for c in claims] == [(0, "random weights"), (2, "DINOv2")] * 2
    for models in ({}, random):
        claims = A9.claims({key: ckas(patches=0.5) for key in models}, models)
        assert [(c.ordering, c.holds, c.on) for c in claims] == [(5, None, "DINOv2, CLIP, iBOT")]


def test_a9_claims_a_fall_in_each_family_without_registers(registers):
    models = family(registers, False) | family(registers, False, ("CLIP B", "L2"), "CLIP")
    models |= family(registers, False, ("deit S", "H"), "DeiT III")
    models["L2"] = replace(models["L2"], size="L")
    values = dict(S=0.9, B=0.8, L=0.7, g=0.2) | {"CLIP B": 0.4, "L2": 0.6, "deit S": 0.5, "H": 0.4}

    def claims(n=FEWEST, **changed):
        results = {key: ckas(n, patches=x, skip=0.5) for key, x in (values | changed).items()}
        return {claim.on.partition(":")[0]: claim for claim in A9.claims(results, models)}

    found = claims()
    holds = {name: (claim.ordering, claim.holds) for name, claim in found.items()}
    assert holds == {"DINOv2": (5, True), "CLIP": (5, False), "DeiT III": (0, None), "iBOT": (5, None)}
    assert found["DeiT III"].by == "needs DeiT III L"
    assert "S 0.900" in found["DINOv2"].by and found["DINOv2"].by.endswith("; n = 30")
    assert found["DINOv2"].on == "DINOv2: S, B, L, g" and "0.02" in found["DINOv2"].text
    # It falls from each size to the next, and not only from small to large.
    assert claims(L=0.2, g=0.7)["DINOv2"].holds is False and claims(S=0.8, B=0.9)["DINOv2"].holds is False
    assert claims(S=0.8, B=0.815)["DINOv2"].holds is True
    assert claims(B=0.9, L=0.9, g=0.89)["DINOv2"].holds is False  # by less than it may rise
    assert claims(n=FEWEST - 1)["DINOv2"].holds is None
    assert [claim.holds for claim in of_family(A9.claims({"g": ckas(patches=0.2)}, {"g": models["g"]}))] == [None]
    assert of_family(A9.claims({"g": ckas(patches=0.2)}, family(registers, True))) == []


def test_claims_say_what_was_read(registers):
    models, plain = family(registers, True), family(registers, False)
    results = {key: ckas(patches=0.5, registers=0.1, skip=0.5) for key in models}
    for e, models_of, reading, words in (
        (A3, models, {}, None),
        (A3, models, {"stage": "proj", "keep_cls": True}, "(read: keep cls, stage proj)."),
        (A9, plain, {}, None),
        (A9, plain, {"reading": "final"}, "(read: final)."),
    ):
        read = {key: each | {"reading": defaults(e, **reading)} for key, each in results.items()}
        for claim in of_family(e.claims(read, models_of)):
            assert claim.text.endswith(words) if words else "(read" not in claim.text


def test_sensitivity_tests_claims_under_every_reading(registers):
    models = family(registers, False)

    def results(turned):
        found = {}
        for i, key in enumerate(models):
            rows = []
            for reading in sensitivity.readings(A9):
                value = i / 10 if reading["reading"] in turned else 1 - i / 10
                values = ckas(patches=value, skip=0.5)
                rows += [sensitivity.row(A9, reading, f"CKA({name})", cka) for name, cka in values.items()]
            found[key] = {"rows": rows, "orderings": sensitivity.orderings(rows)}
        return found

    (same,) = SENSITIVITY.claims(results(()), models)
    start = "The verdict does not depend on the reading of A9 (default: holds): Without registers, CKA([CLS], patches)"
    assert same.holds is True and same.ordering == 0 and same.text.startswith(start)
    (turned,) = SENSITIVITY.claims(results(("final",)), models)
    assert turned.holds is False and "not so under: final" in turned.by and "1 of 2 other" in turned.by
    # That no reading makes a claim hold does not read as if it held.
    (never,) = SENSITIVITY.claims(results(("middle", "block", "final")), models)
    assert never.holds is True and "(default: does not hold)" in never.text and never.ordering == 0
    assert never.by.startswith("does not hold under the default (") and "n = 30" in never.by
    assert SENSITIVITY.claims({}, {}) == []


@pytest.mark.parametrize("experiment", ALL, ids=lambda e: e.id)
def test_tables_and_figures_of_any_set_of_models(images, experiment):
    """Of a model with registers and one without, as they come from results.json."""
    models, results, found = {}, {}, {}
    chosen = {"small": "dinov2 with registers", "plain": "dinov2"}
    with jax.enable_x64(False):
        for key, name in chosen.items():
            model = random_model(FAMILIES[name])
            models[key] = about_of(model, key)
            found[key] = {"clean": found_of(experiment, model, images.astype("float32"))}
            results[key] = experiment.numbers(found[key], models[key], defaults(experiment))
            if experiment.controlled:
                results[key] |= {
                    "controls": {"cls zero last": dict(results[key]), "cls mean every": dict(results[key])}
                }
    plain = json.loads(json.dumps(progress.plain(results, finite=True), allow_nan=False))
    for keys in (list(models), ["plain"], ["small"], []):
        some = {key: plain[key] for key in keys}
        table = experiment.table(some, models)
        assert (table is None) == (not keys)
        if table:
            assert all(len(row) == len(table.head) and all(isinstance(c, str) for c in row) for row in table.rows)
            assert not any("nan" in cell for row in table.rows for cell in row)
        assert all(claim.by and claim.text for claim in experiment.claims(some, models))
        with draw.styled():
            figures = experiment.figures(View(some, models, found, {}))
            assert bool(figures) == bool(keys)
            for figure in figures.values():
                figure.canvas.draw()
                labelled = [axes for axes in figure.axes if axes.get_xlabel() in ("layer", "head")]
                # Layers and heads count from 0, and no tick is between two.
                assert all(list(axes.get_xticks()) == list(range(len(axes.get_xticks()))) for axes in labelled)
                assert all(axes.images or len(axes.get_xticks()) == 3 for axes in labelled)


def test_figures_have_the_papers_names(registers, images):
    found = {"g": {"clean": found_of(A9, registers, images)}}
    for with_registers, names in ((False, {"6", "8"}), (True, {"8"})):
        models = family(registers, with_registers, "g")
        results = {"g": A9.numbers(found["g"], models["g"], defaults(A9))}
        with draw.styled():
            assert set(A9.figures(View(results, models, found, {}))) == names


def test_models_of_one_size_stand_together(registers):
    models = family(registers, True) | {f"{key} plain": about for key, about in family(registers, False).items()}
    models = {key: replace(about, key=key, width=100 * about.parameters) for key, about in models.items()}
    groups = b7_open_questions.matched(list(models.values()))
    assert sorted(sorted(about.key for about in group) for group in groups) == [[s, f"{s} plain"] for s in "BLSg"]
    assert b7_open_questions.matched([models["S"], models["B"]]) == []


def test_nothing_is_found_where_nothing_varies(registers, images):
    """All images alike: every CKA is undefined, and no number is invented for it."""
    one = jnp.zeros_like(images[:8]) + images[:1]  # batches of one size, which are rounded alike
    with jax.enable_x64(False):
        model, one = jaxvit.cast(registers, "float32"), one.astype("float32")
        for experiment in (A3, A9):
            numbers = numbers_of(experiment, model, one)
            assert numbers.pop("reading") == defaults(experiment)
            for cka in numbers.values():
                assert np.isnan([cka["biased"], cka["unbiased"], cka["null"]]).all()
        numbers = numbers_of(A6, model, one)
    assert all(np.isnan(value) for value in numbers["gram"].values())

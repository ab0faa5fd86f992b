"""The experiments against PyTorch: their numbers, streamed and in float64, are those of hooks on timm's own model."""

from copy import copy
from functools import cache
from itertools import combinations
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")

import paper_torch as by_torch
from paper import about_of, defaults
from paper_torch import Paper, random_timm

import convert
from experiments.core.controls import Controls, controls_of
from experiments.core.experiment import Subject
from experiments.core.passes import Clean, Request
from experiments.runner import registry
from experiments.runner.store import Store, run_pass
from jaxvit import prepare

SIZES = dict(img_size=42, depth=3, embed_dim=32, num_heads=4)
MODELS = {"registers": "vit_giant_patch14_reg4_dinov2", "no registers": "vit_small_patch14_dinov2"}
SIDE = 56  # 4 x 4 patches; positions are of 3 x 3
IMAGES, BATCH = 17, 5
CLOSE = 1e-9

EXPERIMENTS = {id: registry.EXPERIMENTS[id] for id in ("A1", "A2", "A3", "A5", "A6", "A7", "A8", "A9")}


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@cache
def images():
    """Pixels of many sizes."""
    rng = np.random.default_rng(3)
    sizes = rng.integers(57, 80, (IMAGES, 2))
    return [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in sizes]


@cache
def original(which):
    """timm's model, and the pixels that the passes give to ours."""
    module = random_timm(MODELS[which], **SIZES)
    model = convert.load(module, dtype="float64")
    pixels = np.asarray(prepare(images(), model.config, size=SIDE))
    return module, model, torch.tensor(pixels).permute(0, 3, 1, 2).double()


@cache
def paper(which):
    module, _, pixels = original(which)
    return Paper(module, pixels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("passes")


@cache
def found(which, each, folder):
    """What a pass finds of a model."""
    model = original(which)[1]
    about, readings = about_of(model), readings_of(which)
    asked = Request(
        images=images(),
        experiments=[reading for reading, _ in readings.values()],
        options={name: options for name, (_, options) in readings.items()} | {"controls": {"seed": 0}},
        size=SIDE,
    )
    earlier = {"clean": found(which, Clean, folder)} if each is Controls else {}
    extra = each().extra(asked, Subject(about, model), earlier)
    measure = each().measure(asked, about)

    def in_float64(arguments, pixels, position):
        return measure(arguments[0], None, arguments[1], pixels.astype(jnp.float64), position)

    store = Store(folder / which / each.name, {})
    run_pass(store, in_float64, (model, extra), images(), model.config, batch_size=BATCH, size=SIDE)
    assert store.n == IMAGES
    return store.found()


def readings_of(which):
    """Experiments at their defaults, and under other options, each by a name of its own."""
    readings = {}
    for name in READINGS[which]:
        experiment, options = OPTIONS[name]
        reading = copy(EXPERIMENTS[experiment])
        reading.id = name
        reading.controlled = reading.controlled and not options  # else controls would take long to compile
        readings[name] = reading, defaults(reading, **options)
    return readings


def check(name, p, which, under):
    """Compares one reading with PyTorch.

    Args:
      under: what was found, with names as in `Measured`.
    """
    reading, options = readings_of(which)[name]
    mine = under.of(f"{name}/")
    numbers = reading.numbers({"clean": mine}, about_of(original(which)[1]), options)
    experiment, changed = OPTIONS[name]
    CHECKS[experiment](SimpleNamespace(numbers=numbers, of=mine.per_image), p, **changed)


def close(actual, expected, label="", size=None):
    """Numbers of one kind, in float64, relative to the largest, or to `size`."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape and actual.dtype == expected.dtype == np.float64, label
    size = np.abs(expected).max() if size is None else size
    assert np.abs(actual - expected).max() <= CLOSE * size < np.inf, (label, actual, expected)  # not of NaN either


def close_summary(summary, values, label=""):
    n, mean, size = len(values), sum(values) / len(values), max(map(abs, values))
    std = (sum((value - mean) ** 2 for value in values) / n) ** 0.5
    assert summary["n"] == n == IMAGES and n % 4 == 1  # so that these quantiles are values
    expected = {"mean": mean, "std": std, "sem": std / (n - 1) ** 0.5, "min": min(values), "max": max(values)}
    for name, value in expected.items():
        close(summary[name], value, f"{label}: {name}", size)
    for quantile in (0.25, 0.5, 0.75):
        close(summary["quantiles"][str(quantile)], sorted(values)[int(quantile * (n - 1))], label, size)


@pytest.mark.parametrize("which", MODELS)
def test_hooks_are_consistent(which):
    """What is compared with: the parts of PyTorch sum to what PyTorch adds to [CLS]."""
    p = paper(which)
    summed = sum(p.part(source) for source in p.tokens) + p.bias()
    close(summed, p.update())
    close(p.part(*p.tokens, stage="proj") + p.bias("proj"), p.seen.attended[:, 0])
    close(p.skip() + summed, p.middle())
    close(p.onward(p.middle(), "block"), p.seen.after[-1][:, 0])
    close(p.onward(p.middle(), "final"), p.seen.final[:, 0])
    assert p.rows.std(-1).min() > 1e-2 * p.rows.mean()  # attention is not uniform


# --- what is expected of each experiment; `found` has its numbers, and `of` each image what was measured


def check_a1(found, p):
    expected = {name: [] for name in p.tokens}
    for image in range(IMAGES):
        for name, tokens in p.tokens.items():
            masses = [sum(float(p.rows[image, head, i]) for i in tokens) for head in range(p.heads)]
            expected[name].append(sum(masses) / len(masses))
    if "registers" in expected:
        pairs = zip(expected["registers"], expected["patches"], strict=True)
        expected["registers of both"] = [registers / (registers + patches) for registers, patches in pairs]
    assert without_controls(found.numbers).keys() == expected.keys()
    for name, values in expected.items():
        close(found.of[f"mass {name}"], values, name)
        close_summary(found.numbers[name], values, name)


def check_a2(found, p, ranking="absolute", count=32):
    registers = p.tokens["registers"]
    before, after = p.seen.before[-1][:, registers], p.seen.normed[:, registers]  # [n, R, D]
    norms = torch.tensor([by_torch.norms(image) for image in before], dtype=torch.float64)
    means = [sum(norms[:, r].tolist()) / IMAGES for r in range(len(registers))]
    top = means.index(max(means))
    highest = [max(range(len(registers)), key=lambda r: image[r]) for image in norms.tolist()]
    assert len(set(highest)) > 1  # else the share below is 1 whatever is counted
    close(found.of["norm"], norms)
    of = found.numbers
    assert of["register"] == top
    close(of["is the argmax"], highest.count(top) / IMAGES)
    for place, x in (("before", before), ("after", after)):
        close(of[f"cosine {place}"], by_torch.mean_pairwise_cosine(x[:, top]), place)
        for r, each in enumerate(of["per register"]):
            close(each[f"cosine {place}"], by_torch.mean_pairwise_cosine(x[:, r]), place)
        mean, absolute = x[:, top].mean(0).tolist(), x[:, top].abs().mean(0).tolist()
        rank = absolute if ranking == "absolute" else mean
        order = sorted(range(len(rank)), key=lambda i: rank[i], reverse=True)[:count]
        listed = of[f"top {place}"]
        assert [each["dimension"] for each in listed] == order
        close([each["mean"] for each in listed], [mean[i] for i in order])
        close([each["mean absolute"] for each in listed], [absolute[i] for i in order])


def check_a3(found, p, stage="layerscale", renormalise=False, keep_cls=False):
    """Attention that is set to zero, and what is then read."""

    def read(part):
        return p.onward(p.skip() + part + p.bias(), stage) if stage in ("block", "final") else part

    at = stage if stage in ("heads", "proj", "layerscale") else "layerscale"
    full = {
        "heads": lambda: p.part(*p.tokens, stage="heads"),
        "proj": lambda: p.seen.attended[:, 0],
        "layerscale": p.update,
        "block": lambda: p.seen.after[-1][:, 0],
        "final": lambda: p.seen.final[:, 0],
    }[stage]()
    assert without_controls(found.numbers).keys() == p.tokens.keys()
    for name in p.tokens:
        sources = ("cls", name) if keep_cls and name != "cls" else (name,)
        part = p.part(*sources, stage=at, renormalise=renormalise)
        close_cka(found.numbers[name], full, read(part), name)


def check_a5(found, p, stage="layerscale"):
    """The bias is in the whole, and in no part."""
    parts = {name: p.part(name, stage=stage) for name in p.tokens}
    whole = {
        "heads": lambda: p.part(*p.tokens, stage="heads"),
        "proj": lambda: p.seen.attended[:, 0],
        "layerscale": p.update,
    }[stage]()
    expected = {}
    for name, part in parts.items():
        expected[name] = by_torch.cosines(part, whole)
        expected[f"{name} without bias"] = by_torch.cosines(part, whole - p.bias(stage))
    assert found.numbers.keys() == {"stage", "bias"} | expected.keys()
    for name, values in expected.items():
        close(found.of[name], values, name)
        close_summary(found.numbers[name], values, name)


def check_a6(found, p, centred=True):
    """Of n x n matrices, of similarities between images."""
    parts = {name: p.part(name) for name in ("patches", "registers", "cls") if name in p.tokens}
    if not centred:
        parts["bias"] = p.bias()
    rows = {name: x - x.mean(0) if centred else x for name, x in parts.items()}
    whole = p.update() - p.update().mean(0) if centred else p.update()
    G = whole @ whole.T
    terms = {name: x @ x.T for name, x in rows.items()}
    terms |= {f"{a} x {b}": rows[a] @ rows[b].T + rows[b] @ rows[a].T for a, b in combinations(rows, 2)}
    close(sum(terms.values()), G)
    gram = {name: float((term * G).sum() / (G * G).sum()) for name, term in terms.items()}
    trace = {name: float(term.trace() / G.trace()) for name, term in terms.items()}
    for kind, expected in (("gram", gram), ("trace", trace)):
        assert found.numbers[kind].keys() == expected.keys()
        names = list(expected)
        close([found.numbers[kind][name] for name in names], [expected[name] for name in names], kind)
        close(found.numbers["sum"][kind], 1.0)


def check_a7(found, p):
    summands = {"skip": p.skip(), **{name: p.part(name) for name in p.tokens}, "bias": p.bias()}
    summands["mlp"] = p.seen.mlp[:, 0]
    output = p.seen.after[-1][:, 0]
    close(sum(summands.values()), output)
    expected = {f"norm {name}": by_torch.norms(x) for name, x in summands.items()}
    for name, x in summands.items():
        expected[f"share {name}"] = [
            float(torch.dot(one, o) / torch.dot(o, o)) for one, o in zip(x, output, strict=True)
        ]
    for kind in ("norm", "share"):
        assert found.numbers[kind].keys() == summands.keys()
        for name in summands:
            close(found.of[f"{kind} {name}"], expected[f"{kind} {name}"], f"{kind} {name}")
            close_summary(found.numbers[kind][name], expected[f"{kind} {name}"], f"{kind} {name}")
    ratios = [skip / patches for skip, patches in zip(expected["norm skip"], expected["norm patches"], strict=True)]
    close(found.of["skip over patches"], ratios)
    close_summary(found.numbers["skip over patches"], ratios)


def check_a8(found, p):
    layers = [x[:, 0] for x in p.seen.after]
    normed = [p.module.norm(x) for x in layers]
    centred = [x - x.mean(0) for x in layers]
    close(normed[-1], p.seen.final[:, 0])
    for name, column, each in (
        ("raw", "raw", layers),
        ("after the final norm", "norm", normed),
        ("centred", None, centred),
    ):
        values = [by_torch.cosines(x, each[-1]) for x in each]
        assert len(found.numbers[name]) == len(layers)
        for layer, of_layer in enumerate(values):
            close_summary(found.numbers[name][layer], of_layer, name)
        if column:
            close(found.of[column].T, values, name)
    pooled = [by_torch.cosine(x.flatten(), centred[-1].flatten()) for x in centred]
    close(found.numbers["centred, pooled"], pooled)


def check_a9(found, p, reading="middle"):
    """Every summand alone, through what follows."""

    def read(x):
        return x if reading == "middle" else p.onward(x, reading)

    full = {"middle": p.middle, "block": lambda: p.seen.after[-1][:, 0], "final": lambda: p.seen.final[:, 0]}[reading]()
    summands = {"skip": p.skip(), **{name: p.part(name) for name in p.tokens}}
    assert without_controls(found.numbers).keys() == summands.keys()
    for name, x in summands.items():
        close_cka(found.numbers[name], full, read(x), name)


def close_cka(found, full, other, label=""):
    """Where it is the same for all images, or all but one, estimates are quotients of nothing by nothing."""
    assert (found["n"], found["d1"], found["d2"]) == (IMAGES, full.shape[1], other.shape[1])
    expected = by_torch.cka(full, other)
    assert label == "skip" or all(map(np.isfinite, expected.values()))
    for name, value in expected.items():
        if np.isfinite(value):
            close(found[name], value, f"{label} {name}")
        else:
            assert np.isnan(found[name]), (label, found)


def without_controls(numbers):
    return {name: value for name, value in numbers.items() if name not in ("controls", "reading")}


CHECKS = {
    "A1": check_a1,
    "A2": check_a2,
    "A3": check_a3,
    "A5": check_a5,
    "A6": check_a6,
    "A7": check_a7,
    "A8": check_a8,
    "A9": check_a9,
}
OTHER_OPTIONS = {
    "A2": [{"ranking": "signed", "count": 7}],
    "A3": [
        {"stage": "heads"},
        {"stage": "proj", "renormalise": True},
        {"stage": "block", "keep_cls": True},
        {"stage": "final", "renormalise": True, "keep_cls": True},
    ],
    "A5": [{"stage": "heads"}, {"stage": "proj"}],
    "A6": [{"centred": False}],
    "A9": [{"reading": "block"}, {"reading": "final"}],
}
OPTIONS = {name: (name, {}) for name in CHECKS} | {
    " ".join((name, *map(str, options.values()))): (name, options)
    for name, each in OTHER_OPTIONS.items()
    for options in each
}
"""Name of a reading -> the experiment and its options that are not at their defaults."""
READINGS = {"registers": list(OPTIONS), "no registers": [name for name in CHECKS if name != "A2"]}


def test_a2_refuses_models_without_registers():
    about = about_of(original("no registers")[1])
    assert [e.id for e in EXPERIMENTS.values() if e.refuses(about)] == ["A2"]


@pytest.mark.parametrize("which", MODELS)
def test_clean(which, folder):
    for name in READINGS[which]:
        check(name, paper(which), which, found(which, Clean, folder))


@pytest.mark.parametrize("which", MODELS)
def test_under_controls(which, folder):
    """Registers, or [CLS], are replaced by hooks as they enter the last block, or all blocks but the first."""
    module, _, pixels = original(which)
    tokens, clean = paper(which).tokens, paper(which).seen.before
    under = found(which, Controls, folder)
    controls = [control for control in controls_of(len(tokens.get("registers", ()))) if control.kind != "noise"]
    assert len(controls) == 8 * (len(tokens) - 1)
    for control in controls:
        layers = [SIZES["depth"] - 1] if control.where == "last" else range(1, SIZES["depth"])
        at = tokens[control.tokens]
        p = Paper(module, pixels, {i: replacing(at, replacement(control.kind, clean[i][:, at])) for i in layers})
        for name in ("A1", "A3", "A7", "A9"):
            check(name, p, which, under.of(f"{control.name}/"))


def replacement(kind, tokens):
    """What stands for the tokens of every image, [n, P, D]."""
    return {
        "zero": torch.zeros_like(tokens),
        "mean": torch.stack([tokens.mean(0)] * IMAGES),
        "shuffle": torch.stack([tokens[(i + 1) % IMAGES] for i in range(IMAGES)]),
        "donor": torch.stack([tokens[1], *[tokens[0]] * (IMAGES - 1)]),
    }[kind]


def replacing(at, values):
    def change(x):
        x[:, at] = values
        return x

    return change

"""Outputs of [CLS] and registers alone are those of the whole run: under edits, in pieces, from any start."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, TINY, double, random_images, random_model
from reference import BATCH, HEIGHT, WIDTH, sizes

import jaxvit
from jaxvit import SITES, Edit, Knockout, PrefixOutput, Relocate, Shuffle, Take, ViTConfig
from jaxvit.analysis import readouts
from jaxvit.model import run
from jaxvit.model.sites import ATTENTION_SITES

ROUNDING = 1e-12
MODELS = {
    "no registers": FAMILIES["dinov2"],
    "registers": FAMILIES["dinov2 giant with registers"],
    "rotary": ViTConfig(**TINY, registers=3, positions=False, rope="float32"),
    "mean": ViTConfig(**TINY, registers=2, pool="mean", classes=5),
    "distilled": ViTConfig(**TINY, registers=1, pool="distilled", classes=5),
    "norm of what is pooled": ViTConfig(**TINY, registers=2, final_norm="pooled", projection=7),
    "one layer": ViTConfig(**TINY | dict(depth=1), registers=3, mlp="swiglu"),
    "registers alone": ViTConfig(**TINY, cls=False, registers=2, pool="mean"),
}


pytestmark = pytest.mark.usefixtures("float64")


def built(name):
    return double(MODELS[name])


@cache
def pictures():
    return jnp.asarray(random_images(0, BATCH, HEIGHT, WIDTH), jnp.float64)


def assert_same(few, whole):
    """Of every output that both have, and the traces."""
    assert isinstance(few, PrefixOutput) and few.trace.keys() == whole.trace.keys()
    for name in ("cls", "registers", "pooled", "logits", "projection"):
        if (value := getattr(few, name)) is not None:
            np.testing.assert_allclose(value, getattr(whole, name), rtol=0, atol=ROUNDING * 10, err_msg=name)
    for site, value in few.trace.items():
        expected = np.asarray(whole.trace[site])
        np.testing.assert_allclose(value, expected, rtol=0, atol=ROUNDING * abs(expected).max(), err_msg=site)


@pytest.mark.parametrize("name", MODELS)
def test_they_are_those_of_the_whole_run(name):
    model = built(name)
    whole, few = (model(pictures(), outputs=outputs) for outputs in ("all", "prefix"))
    assert_same(few, whole)
    assert few.registers.shape == whole.registers.shape and (few.cls is None) == (whole.cls is None)
    reads_patches = MODELS[name].pool == "mean"
    assert (few.pooled is None) == reads_patches and (few.logits is None) == (reads_patches or whole.logits is None)
    if model.config.cls:
        one = model(pictures(), outputs="cls")
        assert_same(one, whole)
        assert one.registers is None


def test_what_was_not_computed_says_so():
    few = built("registers")(pictures(), outputs="cls")
    for name in ("patches", "tokens"):
        with pytest.raises(AttributeError, match=f"{name} were not computed: .*outputs='all'"):
            getattr(few, name)
    with pytest.raises(AttributeError, match="a PrefixOutput has no 'patch'"):
        _ = few.patch
    assert repr(few).startswith("PrefixOutput(cls=float64[")


@pytest.mark.parametrize(
    ("config", "outputs", "words"),
    [
        (dict(cls=False, registers=2, pool="mean"), "cls", "'cls', and this model has no class token: leave it out"),
        (dict(cls=False, pool="mean"), "prefix", "'prefix', and this model has no class token and no registers"),
    ],
)
def test_outputs_that_are_not_there_are_refused(config, outputs, words):
    with jax.enable_x64(False):
        model, images = random_model(ViTConfig(**TINY, **config)), random_images(0, 1, 20)
        with pytest.raises(ValueError, match=words):
            model(images, outputs=outputs)
        with pytest.raises(ValueError, match=words):
            model.run_from(0, model.embed(images), outputs=outputs)
        with pytest.raises(ValueError, match="outputs is 'patches'; expected 'all', 'prefix' or 'cls'"):
            run.check_choices(model, images, "none", "auto", "patches")


# --- edits


def random_edits(config, over, queries):
    """One at every site, and what else stands there."""
    rng = np.random.default_rng(1)
    edits = {}
    for site, axes in SITES.items():
        known = sizes(config, Edit(0.0, queries=queries if site in ATTENTION_SITES else "all"), over)
        shape = [known["L"], *(known[axis] for axis in axes.split())]
        mask, scale, shift = rng.uniform(0, 0.5, shape), rng.normal(size=shape), 0.1 * rng.normal(size=shape)
        of_rows = queries if site in ATTENTION_SITES else "all"
        edits[site] = [Edit(mask, scale, shift, mask_over=over, value_over=over, queries=of_rows)]
        if site == "scores":
            edits[site].append(Knockout(rng.uniform(0, 0.9, shape), mask_over=over, queries=queries))
        if site == "resid_post":
            edits[site].append(Shuffle(0.3, np.stack([rng.permutation(BATCH) for _ in range(known["L"])])))
    return edits


@pytest.mark.parametrize(("over", "queries"), [("tokens", "all"), ("groups", "all"), ("tokens", "prefix")])
def test_under_edits_at_every_site(over, queries):
    """Of arrays that differ in every axis, over tokens and over groups, with a shuffle and a knock-out."""
    model = built("registers")
    edits = random_edits(model.config, over, queries)
    record = {site: Take(tokens="prefix") for site in SITES}
    plain = model(pictures(), outputs="prefix")
    few, whole = (model(pictures(), edits, record, outputs=outputs) for outputs in ("prefix", "all"))
    assert_same(few, whole)
    assert abs(few.cls - plain.cls).max() > 0.01


def test_an_edit_that_reads_patches_runs_the_whole_block():
    model = built("registers")
    mask = np.zeros((3, 1, 1, model.config.hidden))
    mask[:, ..., :5] = 1
    edits = {"mlp_post": Relocate(mask, np.float64([0, 1, 0, 0, 0]).reshape(1, 1, 5, 1))}
    assert_same(model(pictures(), edits, outputs="prefix"), model(pictures(), edits))


# --- what is computed


def operations(function, *arguments) -> float:
    """Floating-point operations of a compiled program."""
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def test_the_last_block_computes_less():
    """All of patches but their keys and values."""
    model, images = built("one layer"), pictures()  # a loop over several would be counted as one
    whole, few = (operations(lambda m, x, o=o: m(x, outputs=o).cls, model, images) for o in ("all", "cls"))
    c, tokens = model.config, model.config.layout(HEIGHT, WIDTH).tokens
    rows, inputs = tokens - model.prefix, 2 * BATCH
    saved = inputs * rows * (2 * c.width**2 + 2 * tokens * c.width + 3 * c.width * c.hidden)
    assert whole - few >= 0.95 * saved


def test_records_of_the_last_layer_are_whole():
    """What is asked for of all tokens there is recorded, and what is computed for all is not cut."""
    model = built("registers")
    record = {"resid_pre": Take(), "v": Take(layers=-1), "pattern": Take(layers=(-1, 0))}
    assert_same(model(pictures(), record=record, outputs="cls"), model(pictures(), record=record))
    record = {"z": Take(tokens="all"), "pattern": Take(layers=-1, tokens="all")}
    assert_same(model(pictures(), record=record, outputs="cls"), model(pictures(), record=record))


@pytest.mark.parametrize("name", ["registers", "rotary"])
def test_runs_from_every_layer(name):
    model = built(name)
    whole, grid = model(pictures(), record="resid_pre"), model.check_images(pictures())
    traced = jax.jit(lambda model, layer, stream: model.run_from(layer, stream, grid=grid, outputs="prefix"))
    for layer in range(model.config.depth):
        stream = whole.trace["resid_pre"][layer]
        assert_same(model.run_from(layer, stream, grid=grid, outputs="cls"), whole._replace(trace={}))
        assert_same(traced(model, layer, stream), whole._replace(trace={}))
    assert_same(traced(model, model.config.depth, whole.tokens), whole._replace(trace={}))
    assert_same(model.run_from(model.config.depth, whole.tokens, grid=grid, outputs="cls"), whole._replace(trace={}))
    assert np.isnan(traced(model, model.config.depth + 1, whole.tokens).cls).all()


@pytest.mark.parametrize("remat", ["none", "block"])
def test_gradients(remat):
    model = built("registers")

    @jax.jit
    @jax.grad
    def slopes(images):
        return model(images, outputs="cls", remat=remat).cls.sum()

    expected = jax.jit(jax.grad(lambda images: model(images).cls.sum()))(pictures())
    np.testing.assert_allclose(slopes(pictures()), expected, rtol=0, atol=1e-11 * abs(expected).max())


def test_in_pieces_and_chunks(monkeypatch):
    """As large batches go through the blocks on a CPU; with edits that differ between images."""
    monkeypatch.setattr(run, "PART_BYTES", 1)
    monkeypatch.setattr(run, "CHUNK_BYTES", 1)
    model = built("registers")
    edits = {"z": random_edits(model.config, "tokens", "all")["z"]}
    record = {"z": Take(layers=-1, tokens="prefix")}
    fresh = [jax.jit(lambda x, o=o: model(x, edits, record, outputs=o)) for o in ("prefix", "all")]
    assert_same(*(each(pictures()) for each in fresh))


def test_sweeps_read_cls_alone_and_find_the_same():
    model = built("registers")

    def edits(point, clean):
        return jaxvit.ablate(model, "z", layers=point["layer"], heads=point["head"])

    grid = jaxvit.grids.heads(model)
    found = [
        jaxvit.sweep(model, pictures(), edits, grid, progress=False, **more)
        for more in ({}, {"outputs": "prefix"}, {"metric": lambda out, clean: jaxvit.cls_cosine(out, clean)})
    ]
    for each in found[:2]:
        np.testing.assert_allclose(each.values, found[2].values, rtol=0, atol=ROUNDING)
    with pytest.raises(AttributeError, match="patches were not computed"):
        jaxvit.sweep(
            model, pictures(), edits, grid, lambda out, clean: out.patches.mean((1, 2)), outputs="cls", progress=False
        )


@pytest.mark.parametrize(
    ("take", "needs"), [("cls", False), ("pooled", False), ("cls@1", False), ("patch_mean", True), ("tokens", True)]
)
def test_readouts_ask_for_what_they_need(take, needs, monkeypatch):
    model, asked = built("registers"), []

    def noticed(*args, outputs="all", **more):
        asked.append(outputs)
        return run.run_blocks(*args, outputs=outputs, **more)

    monkeypatch.setattr(readouts, "run_blocks", noticed)
    jax.clear_caches()
    found = jaxvit.read_out(model, pictures(), take)[take]
    assert asked == ["all" if needs else "prefix"]
    out = model(pictures(), record={"resid_post": Take(layers=1)})
    tokens = jnp.concatenate([out.cls[:, None], out.registers, out.patches], axis=1)
    expected = {"cls": out.cls, "pooled": out.pooled, "cls@1": out.trace["resid_post"][0, :, 0]}
    expected |= {"patch_mean": out.patches.mean(1), "tokens": tokens}
    np.testing.assert_allclose(found, expected[take], rtol=0, atol=1e-11)


def test_they_can_be_exported():
    model = built("no registers")
    program = jax.export.export(jax.jit(lambda images: model(images, outputs="cls")))(pictures())
    again = jax.export.deserialize(program.serialize()).call(pictures())
    assert_same(again, model(pictures()))

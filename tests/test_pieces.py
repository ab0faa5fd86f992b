"""In programs for a CPU, images go through the blocks in pieces and in chunks: what comes out is the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_model

import jaxvit
from jaxvit import Edit, Knockout, Relocate, Shuffle, Take, ViTConfig, each_layer
from jaxvit.model import attention, run
from jaxvit.model.params import abstract
from jaxvit.model.sites import ATTENTION_SITES, SITES

CONFIG = ViTConfig(depth=3, width=32, heads=4, hidden=48, patch=4, grid=(3, 3), registers=2)
B, T = 6, 12


@pytest.fixture(scope="module")
def model():
    with jax.enable_x64(True):
        yield jaxvit.cast(random_model(CONFIG), "float64")


@pytest.fixture
def images():
    with jax.enable_x64(True):
        yield jnp.asarray(np.random.default_rng(0).normal(size=(B, 12, 12, 3)))


def edits():
    """At every site, of arrays that differ between images, and of others."""
    rng, c = np.random.default_rng(1), CONFIG
    sizes = {"B": B, "T": T, "D": c.width, "H": c.heads, "d": c.head_size, "F": c.hidden, "Q": T}

    def array(site, *same):
        axes = ["L", *SITES[site].split()]
        return rng.uniform(size=[1 if a in same else c.depth if a == "L" else sizes[a] for a in axes])

    every = {}
    for i, site in enumerate(SITES):
        same = [("D", "d", "F", "T", "Q"), ("B", "L"), ("L",)][i % 3]
        every[site] = Edit(0.2 * array(site, *same), 0.9, array(site, *same), mask_over="tokens", value_over="tokens")
    every["scores"] = (Edit(0.1, 1.0, array("scores", "L")[..., :4, :4]), Knockout(array("scores", "L")[..., :4, :4]))
    every["mlp_post"] = Relocate(0.3 * array("mlp_post", "L")[:, :, :4], np.eye(4)[1][None, None, :, None])
    return every


def some():
    return {site: edit for site, edit in edits().items() if site in ("q", "scores", "mlp_post")}


def sums(trace):
    return trace["z"].sum(0), trace["pattern"].max(-1)


def near(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-13 * np.abs(expected).max())


def whole_trace():
    return {site: Take(tokens="all") for site in SITES}


RUNS = {
    "plain": lambda m, x: m(x),
    "recorded": lambda m, x: m(x, record=whole_trace()),
    "of some layers, out of order": lambda m, x: m(x, record={"z": Take(layers=(2, 0)), "pattern": Take(layers=1)}),
    "edited": lambda m, x: m(x, edits(), whole_trace()),
    "mixed": lambda m, x: m(x, {"resid_mid": Shuffle(0.5, np.arange(B)[::-1][None])}),
    "from a layer": lambda m, x: m.run_from(1, m.embed(x), edits()),
    "from a traced layer": lambda m, x: jax.jit(lambda layer: m.run_from(layer, m.embed(x), edits()))(1),
    "measured": lambda m, x: each_layer(
        m, x, lambda t: (t["z"].sum(0), t["pattern"].max(-1)), ("z", "pattern"), edits()
    ),
    "vmapped": lambda m, x: jax.vmap(lambda s: m(x, {"z": Edit(s, 0.0)}).cls)(jnp.linspace(0, 1, 3)),
    "gradient": lambda m, x: jax.grad(lambda x: (m(x, some(), "z").trace["z"] ** 2).sum())(x),
    "gradient, blocks again": lambda m, x: jax.grad(lambda x: (m(x, some(), remat="block").tokens ** 2).sum())(x),
    "forward mode": lambda m, x: jax.jvp(lambda x: m(x).tokens, (x,), (jnp.ones_like(x),)),
}


@pytest.fixture
def forms(monkeypatch):
    """Sets how programs for a CPU are cut; nothing of before is kept."""

    def form(pieces, chunk_bytes=2**24, rows=192):
        jax.clear_caches()
        monkeypatch.setattr(run, "PART_BYTES", 1)
        monkeypatch.setattr(run, "parts_on_cpu", lambda m, x, edits: PARTS(m, x, edits) and min(pieces, len(x)))
        monkeypatch.setattr(attention, "LEAST_BYTES", 0)
        monkeypatch.setattr(run, "CHUNK_BYTES", chunk_bytes)
        monkeypatch.setattr(attention, "ROWS", rows)

    yield form
    jax.clear_caches()


PARTS = run.parts_on_cpu


@pytest.mark.parametrize("name", RUNS)
def test_pieces_and_chunks_are_the_whole(name, model, images, forms):
    forms(0)
    expected = RUNS[name](model, images)
    for pieces, chunk_bytes, rows in ((4, 2**24, 192), (1, 2**24, 5), (2, 1, 7)):
        forms(pieces, chunk_bytes, rows)
        found = RUNS[name](model, images)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        jax.tree.map(near, found, expected)


def test_a_program_is_cut_as_it_says(model, images, forms):
    def products(m, x, **how):
        return jax.jit(lambda m, x: m(x, **how)).lower(m, x).as_text().count("stablehlo.dot_general")

    forms(0)
    whole = products(model, images)
    forms(3)
    assert products(model, images) == 1 + 3 * (whole - 1)  # all but the embedding
    assert products(model, images, edits={"z": Shuffle(1.0, np.zeros((1, B), int))}) == whole
    forms(3, chunk_bytes=1)
    text = jax.jit(lambda m, x: m(x)).lower(model, images).as_text()
    assert text.count("stablehlo.while") == 2


def test_small_models_are_not_cut(model, images):
    jax.clear_caches()
    assert run.parts_on_cpu(model, jnp.zeros((B, T, 32)), {}) == 0
    assert [len(parts) for parts in attention.tiles((B, T, 4, 8), T)] == [1, 1]
    small = ViTConfig.dinov2("small", 4)
    shapes = [(1, 261, 384), (8, 261, 384), (2, 1374, 384)]
    pieces = [run.parts_on_cpu(abstract(small), jnp.zeros(shape, "float32"), {}) for shape in shapes]
    assert pieces == [1, min(8, 2 * run.cores()), 2]


@pytest.mark.parametrize("n, pieces", [(6, 4), (1, 1), (7, 7), (9, 2)])
def test_cuts_are_of_nearly_one_size(n, pieces):
    sizes = [part.stop - part.start for part in attention.cuts(n, pieces)]
    assert sum(sizes) == n and len(sizes) == pieces and max(sizes) - min(sizes) <= 1


def test_attention_sites_are_edited_over_groups():
    assert all(edits()[site] for site in ATTENTION_SITES)

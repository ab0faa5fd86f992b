"""What attention adds to a token, split by source: the parts sum to the whole, and each is what its definition says."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, random_images, random_model

import jaxvit
from jaxvit import Take
from jaxvit.decompose import attention_mass, attention_parts, contributions

CASES = {
    "no registers": FAMILIES["dinov2"],
    "registers": FAMILIES["dinov2 with registers"],
    "no layer scale": replace(FAMILIES["dinov2 giant with registers"], layer_scale=False),
}
LAYERS = range(3)
SIZE = (24, 16)
RECORD = {site: Take(tokens="all") for site in ("pattern", "v", "attn_out")}


@pytest.fixture(params=CASES, scope="module")
def case(request):
    """A model, its layout, and a trace of all query rows; in float64, as NumPy arrays."""
    model = random_model(CASES[request.param])
    with jax.enable_x64(True):
        model = jaxvit.cast(model, jnp.float64)
        trace = jax.jit(lambda m, x: m(x, record=RECORD).trace)(model, random_images(0, 2, *SIZE))
        return model, model.config.layout(*SIZE), trace


def of_layer(trace, layer, rows):
    """pattern and v of one layer, and attn_out, for the first query rows."""
    return trace["pattern"][layer, :, :, :rows], trace["v"][layer], trace["attn_out"][layer, :, :rows]


split = jax.jit(attention_parts, static_argnames=("layer", "layout"))
contribute = jax.jit(contributions, static_argnames="layer")


def naive_parts(model, layer, pattern, v):
    """[B, Q, T, D], token by token and head by head, with NumPy."""
    pattern, v = np.asarray(pattern), np.asarray(v)
    attention, scale = model.blocks.attn, model.blocks.scale1
    kernel = np.asarray(attention.proj.kernel[layer])
    gamma = np.asarray(scale.gamma[layer]) if model.config.layer_scale else np.ones(model.config.width)
    (B, H, Q, T), d = pattern.shape, v.shape[-1]
    parts = np.zeros((B, Q, T, model.config.width))
    for b in range(B):
        for i in range(T):
            for h in range(H):
                output = v[b, i, h] @ kernel[h * d : (h + 1) * d]
                parts[b, :, i] += pattern[b, h, :, i, None] * (gamma * output)
    return parts


def naive_bias(model, layer):
    gamma = np.asarray(model.blocks.scale1.gamma[layer]) if model.config.layer_scale else 1.0
    return gamma * np.asarray(model.blocks.attn.proj.bias[layer])


@pytest.mark.parametrize("queries", ["prefix", "all"])
def test_parts_sum_to_what_attention_adds(case, queries):
    model, layout, trace = case
    rows = layout.prefix if queries == "prefix" else layout.tokens
    with jax.enable_x64(True):
        for layer in LAYERS:
            pattern, v, attn_out = of_layer(trace, layer, rows)
            parts = split(model, layer, pattern, v, layout)
            assert parts.groups.shape == (2, rows, len(layout.group_names), model.config.width)
            whole = parts.groups.sum(axis=2) + parts.bias[None, None]
            np.testing.assert_allclose(whole, attn_out, rtol=0, atol=1e-12 * np.abs(attn_out).max())


def test_parts_sum_to_what_attention_adds_in_float32():
    model = random_model(CASES["registers"])
    layout = model.config.layout(*SIZE)
    # As a user records it: the weights of the prefix, the rest of all tokens.
    trace = jax.jit(lambda m, x: m(x, record=("pattern", "v", "attn_out")).trace)(model, random_images(0, 2, *SIZE))
    for layer in LAYERS:
        pattern, v, attn_out = of_layer(trace, layer, layout.prefix)
        parts = split(model, layer, pattern, v, layout)
        whole = parts.groups.sum(axis=2) + parts.bias[None, None]
        np.testing.assert_allclose(whole, attn_out, rtol=0, atol=1e-5 * np.abs(attn_out).max())


def test_parts_are_their_definition(case):
    model, layout, trace = case
    with jax.enable_x64(True):
        for layer in LAYERS:
            pattern, v, _ = of_layer(trace, layer, layout.prefix)
            parts = split(model, layer, pattern, v, layout)
            tokens = naive_parts(model, layer, pattern, v)
            expected = np.stack(
                [tokens[:, :, layout.groups == g].sum(axis=2) for g in range(layout.prefix + 1)], axis=2
            )
            np.testing.assert_allclose(parts.groups, expected, rtol=0, atol=1e-12)
            np.testing.assert_allclose(parts.bias, naive_bias(model, layer), rtol=1e-14)


def test_contributions_are_their_definition(case):
    model, layout, trace = case
    with jax.enable_x64(True):
        for layer in LAYERS:
            pattern, v, _ = of_layer(trace, layer, layout.prefix)
            direction = jnp.asarray(np.random.default_rng(layer).normal(size=(2, layout.prefix, model.config.width)))
            expected = np.einsum("bqtd,bqd->bqt", naive_parts(model, layer, pattern, v), direction)
            actual = contribute(model, layer, pattern, v, direction)
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-11)


def test_contributions_along_the_output_sum_to_its_square(case):
    model, layout, trace = case
    with jax.enable_x64(True):
        for layer in LAYERS:
            pattern, v, o = of_layer(trace, layer, layout.tokens)
            total = contribute(model, layer, pattern, v, o).sum(axis=-1) + o @ naive_bias(model, layer)
            np.testing.assert_allclose(total, (o**2).sum(axis=-1), rtol=1e-11)


def test_mass_is_the_attention_on_each_group(case):
    _, layout, trace = case
    with jax.enable_x64(True):
        mass = jax.jit(attention_mass, static_argnames="layout")(trace["pattern"], layout)
        assert mass.shape == (*trace["pattern"].shape[:-1], len(layout.group_names))
        np.testing.assert_allclose(mass.sum(axis=-1), 1, rtol=1e-12)
        np.testing.assert_allclose(mass[..., : layout.prefix], trace["pattern"][..., : layout.prefix], rtol=1e-14)
        patches = trace["pattern"][..., layout.prefix :].sum(axis=-1)
        np.testing.assert_allclose(mass[..., layout.prefix], patches, rtol=1e-12)


def test_mass_of_a_single_row():
    layout = jaxvit.TokenLayout(1, (1, 2))
    mass = attention_mass(jnp.array([0.5, 0.25, 0.125, 0.125]), layout)
    np.testing.assert_allclose(mass, [0.5, 0.25, 0.25], rtol=1e-6)


def test_vmap_over_models_is_a_loop(case):
    model, layout, trace = case
    layer = 1
    pattern, v, o = of_layer(trace, layer, layout.prefix)
    with jax.enable_x64(True):
        other = jax.tree.map(lambda a: 1.5 * a, model)
        both = jax.tree.map(lambda *a: jnp.stack(a), model, other)
        split_layer = partial(attention_parts, layer=layer, layout=layout)
        parts = jax.jit(jax.vmap(lambda m: split_layer(m, pattern=pattern, v=v)))(both)
        maps = jax.jit(jax.vmap(lambda m: contributions(m, layer, pattern, v, o)))(both)
        for i, m in enumerate((model, other)):
            expected = split(m, layer, pattern, v, layout)
            np.testing.assert_allclose(parts.groups[i], expected.groups, rtol=0, atol=1e-12)
            np.testing.assert_allclose(parts.bias[i], expected.bias, rtol=1e-12)
            np.testing.assert_allclose(maps[i], contribute(m, layer, pattern, v, o), rtol=0, atol=1e-11)


def test_gradients_flow_through_the_parts():
    config = FAMILIES["dinov2"]
    layout = config.layout(*SIZE)

    def loss(model, images):
        trace = model(images, record=("pattern", "v")).trace
        return (attention_parts(model, 1, trace["pattern"][1], trace["v"][1], layout).groups ** 2).sum()

    gradients = jax.jit(jax.grad(loss))(random_model(config), random_images(0, 2, *SIZE))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert (gradients.blocks.scale1.gamma[1] != 0).all()
    assert (gradients.blocks.scale1.gamma[2] == 0).all()

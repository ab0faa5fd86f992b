"""What a token is made of: the parts sum to the whole, and each is what its definition says, in plain NumPy loops."""

import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, random_images, random_model

import jaxvit
from jaxvit import Preprocess, Take, TokenLayout, ablate, amplify, each_layer, knockout, over_images
from jaxvit.analysis.decompose import (
    accumulated_residual,
    attention_flow,
    attention_mass,
    attention_parts,
    contributions,
    direct_contributions,
    patch_maps,
    projection_shares,
    residual_parts,
    rollout,
    through_norm,
)

CASES = {
    "no registers": FAMILIES["dinov2"],
    "registers": FAMILIES["dinov2 with registers"],
    "no layer scale": replace(FAMILIES["dinov2 giant with registers"], layer_scale=False),
}
STAGES = ("heads", "proj", "layerscale")
SPLITS = ((), ("group",), ("head",), ("group", "head"), ("head", "group"))
LAYERS = range(3)
SIZE = (24, 16)
RECORD = {site: Take(tokens="all") for site in ("pattern", "v", "z")}
RECORD |= {site: Take() for site in ("resid_pre", "attn_out", "skip_attn", "resid_mid", "mlp_out", "skip_mlp")}
RECORD |= {"resid_post": Take()}

run = jax.jit(lambda m, x, edits=None: m(x, edits, RECORD))
split = jax.jit(attention_parts, static_argnames=("layers", "layout", "by", "stage"))
contribute = jax.jit(contributions, static_argnames=("layers", "by_head", "stage"))


@pytest.fixture(params=CASES, scope="module")
def case(request):
    """A model and a run of two images, with a trace of all tokens and queries; in float64."""
    model = random_model(CASES[request.param])
    with jax.enable_x64(True):
        model = jaxvit.cast(model, jnp.float64)
        images = jnp.asarray(random_images(0, 2, *SIZE), jnp.float64)
        out = run(model, images)
        return SimpleNamespace(
            model=model, config=model.config, layout=model.config.layout(*SIZE), images=images, out=out, trace=out.trace
        )


one_case = pytest.mark.parametrize("case", ["registers"], indirect=True)


def weights(model, layer):
    """W_o, b_o and gamma of one layer, as NumPy arrays."""
    proj, width = model.blocks.attn.proj, model.config.width
    gamma = np.asarray(model.blocks.scale1.gamma[layer]) if model.config.layer_scale else np.ones(width)
    return np.asarray(proj.kernel[layer]).reshape(width, width), np.asarray(proj.bias[layer]), gamma


def naive_parts(model, layer, pattern, v, stage="layerscale"):
    """[B, Q, T, H, D], token by token and head by head."""
    pattern, v = np.asarray(pattern), np.asarray(v)
    kernel, _, gamma = weights(model, layer)
    (B, H, Q, T), d = pattern.shape, v.shape[-1]
    parts = np.zeros((B, Q, T, H, model.config.width))
    for b in range(B):
        for q in range(Q):
            for i in range(T):
                for h in range(H):
                    of_head = pattern[b, h, q, i] * v[b, i, h]
                    side_by_side = np.zeros(H * d)
                    side_by_side[h * d : (h + 1) * d] = of_head
                    out = {"heads": side_by_side, "proj": side_by_side @ kernel}
                    out["layerscale"] = gamma * out["proj"]
                    parts[b, q, i, h] = out[stage]
    return parts


def naive_bias(model, layer, stage="layerscale"):
    _, bias, gamma = weights(model, layer)
    return {"heads": 0 * bias, "proj": bias, "layerscale": gamma * bias}[stage]


def by_group(tokens, layout, axis):
    """Sums an axis of tokens within each group."""
    groups = [np.compress(layout.groups == g, tokens, axis).sum(axis) for g in range(layout.prefix + 1)]
    return np.stack(groups, axis)


def update_at(case, stage, rows):
    """What attention computed, as recorded, where parts of a stage are read."""
    if stage == "layerscale":
        return case.trace["attn_out"][:, :, :rows]
    z = np.asarray(case.trace["z"][:, :, :rows]).reshape(len(LAYERS), 2, rows, -1)
    if stage == "heads":
        return z
    return np.stack([z[l] @ weights(case.model, l)[0] + weights(case.model, l)[1] for l in LAYERS])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("stage", STAGES)
def test_parts_are_their_definition(case, stage):
    model, layout = case.model, case.layout
    pattern, v = case.trace["pattern"][:, :, :, :2], case.trace["v"]
    tokens = np.stack([naive_parts(model, l, pattern[l], v[l], stage) for l in LAYERS])  # L B Q T H D
    bias = np.stack([naive_bias(model, l, stage) for l in LAYERS])
    groups = by_group(tokens, layout, 3)
    expected = {
        (): tokens.sum((3, 4)),
        ("group",): groups.sum(4),
        ("head",): tokens.sum(3),
        ("group", "head"): groups,
        ("head", "group"): groups.swapaxes(3, 4),
    }
    for by in SPLITS:
        parts = split(model, None, pattern, v, layout, by=by, stage=stage)
        np.testing.assert_allclose(parts.parts, expected[by], rtol=0, atol=1e-12, err_msg=str(by))
        np.testing.assert_allclose(parts.bias, bias, rtol=1e-14)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("stage", STAGES)
def test_parts_sum_to_what_attention_adds(case, stage):
    sizes = {"group": len(case.layout.group_names), "head": case.config.heads}
    for rows, splits in ((2, SPLITS), (case.layout.tokens, ("group",))):
        pattern, v = case.trace["pattern"][:, :, :, :rows], case.trace["v"]
        update = update_at(case, stage, rows)
        for by in splits:
            parts = split(case.model, None, pattern, v, case.layout, by=by, stage=stage)
            by = (by,) if isinstance(by, str) else by
            assert parts.parts.shape == (3, 2, rows, *(sizes[each] for each in by), case.config.width)
            whole = np.asarray(parts.parts).sum(tuple(range(3, 3 + len(by)))) + np.asarray(parts.bias)[:, None, None]
            for total in (whole, parts.total()):
                np.testing.assert_allclose(total, update, rtol=0, atol=1e-12 * np.abs(update).max(), err_msg=str(by))


@pytest.mark.usefixtures("float64")
@one_case
def test_layers_are_those_that_were_asked_for(case):
    pattern, v, o = case.trace["pattern"][:, :, :, :2], case.trace["v"], case.trace["attn_out"][:, :, :2]
    every = split(case.model, None, pattern, v, case.layout)
    maps = contribute(case.model, None, pattern, v, o)
    for layers in (0, -1, (2, 0), (-2,)):
        at = np.array(layers)
        parts = split(case.model, layers, pattern[at], v[at], case.layout)
        np.testing.assert_allclose(parts.parts, every.parts[at], rtol=0, atol=1e-13)
        np.testing.assert_allclose(parts.bias, every.bias[at], rtol=1e-14)
        actual = contribute(case.model, layers, pattern[at], v[at], o[at])
        np.testing.assert_allclose(actual, maps[at], rtol=0, atol=1e-12)


def test_the_split_by_groups_is_the_default():
    model = random_model(CASES["registers"])
    layout = model.config.layout(*SIZE)
    trace = run(model, random_images(0, 2, *SIZE)).trace
    default = split(model, 1, trace["pattern"][1], trace["v"][1], layout)
    for same in ("group", ("group",)):
        parts = split(model, 1, trace["pattern"][1], trace["v"][1], layout, by=same, stage="layerscale")
        jax.tree.map(np.testing.assert_array_equal, parts, default)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_parts_sum_in_few_bits_too(dtype, tolerance):
    model = jaxvit.cast(random_model(CASES["registers"]), dtype)
    layout = model.config.layout(*SIZE)
    # As a user records it: the weights of the prefix, the rest of all tokens.
    trace = jax.jit(lambda m, x: m(x, record=("pattern", "v", "attn_out")).trace)(model, random_images(0, 2, *SIZE))
    attn_out = trace["attn_out"][:, :, : layout.prefix].astype("float32")
    parts = split(model, None, trace["pattern"], trace["v"], layout, by=("group", "head"))
    assert parts.parts.dtype == parts.bias.dtype == jnp.float32
    np.testing.assert_allclose(parts.total(), attn_out, rtol=0, atol=tolerance * np.abs(attn_out).max())
    shares = projection_shares(parts, trace["attn_out"][:, :, : layout.prefix])
    np.testing.assert_allclose(shares.parts.sum((3, 4)) + shares.bias, 1, atol=10 * tolerance)


@pytest.mark.usefixtures("float64")
@one_case
def test_parts_of_an_edited_run(case):
    edits = jaxvit.merge(
        knockout(case.model, layers=1, query="cls", key="patches"),
        ablate(case.model, "v", layers=0, heads=2),
        amplify(case.model, "skip_attn", 0.3, layers=1),
    )
    trace = run(case.model, case.images, edits).trace
    assert not np.allclose(trace["attn_out"], case.trace["attn_out"])
    parts = split(case.model, None, trace["pattern"], trace["v"], case.layout, by=("head", "group"))
    np.testing.assert_allclose(parts.total(), trace["attn_out"], rtol=0, atol=1e-11)
    assert (parts.parts[1, :, 0, :, -1] == 0).all() and (parts.parts[0, :, :, 2] == 0).all()
    assert (parts.parts[1, :, 1, :, -1] != 0).any()


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_larger_than_arguments_and_result_is_formed(stage):
    model = random_model(CASES["registers"])
    layout = model.config.layout(64, 64)  # many more tokens than anything else
    pattern, v = jnp.zeros((2, 4, 2, layout.tokens)), jnp.zeros((2, layout.tokens, 4, 8))
    for by in SPLITS:
        program = jax.jit(partial(attention_parts, model, -1, layout=layout, by=by, stage=stage)).lower(pattern, v)
        sizes = [
            np.prod([int(n) for n in shape.split("x")])
            for shape in re.findall(r"tensor<([\dx]+)xf32>", program.as_text())
        ]
        result = sum(leaf.size for leaf in jax.tree.leaves(program.out_info))
        assert v.size in sizes and max(sizes) <= max(v.size, result)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("stage", STAGES)
def test_contributions_are_their_definition(case, stage):
    pattern, v = case.trace["pattern"][:, :, :, :2], case.trace["v"]
    direction = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2, 2, case.config.width)))
    expected = np.stack(
        [
            np.einsum("bqthD,bqD->bhqt", naive_parts(case.model, l, pattern[l], v[l], stage), direction[l])
            for l in LAYERS
        ]
    )
    actual = contribute(case.model, None, pattern, v, direction, by_head=True, stage=stage)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-11)
    actual = contribute(case.model, None, pattern, v, direction, stage=stage)
    np.testing.assert_allclose(actual, expected.sum(2), rtol=0, atol=1e-11)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("stage", STAGES)
def test_contributions_along_the_output_sum_to_its_square(case, stage):
    o = jnp.asarray(update_at(case, stage, case.layout.tokens))
    total = contribute(case.model, None, case.trace["pattern"], case.trace["v"], o, stage=stage).sum(-1)
    total += np.stack([o[l] @ naive_bias(case.model, l, stage) for l in LAYERS])
    np.testing.assert_allclose(total, (o**2).sum(axis=-1), rtol=1e-11)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("by_head", [False, True])
def test_patch_maps_are_attention_and_contribution_of_every_patch(case, by_head):
    rows, columns = case.layout.grid
    pattern, v, o = (case.trace[site] for site in ("pattern", "v", "attn_out"))
    pattern, o = pattern[:, :, :, :1], o[:, :, :1]
    draw = jax.jit(patch_maps, static_argnames=("layers", "layout", "by_head"))
    maps = draw(case.model, None, pattern, v, case.layout, by_head=by_head)
    given = draw(case.model, None, pattern, v, case.layout, -2 * o, by_head=by_head)
    heads = (case.config.heads,) if by_head else ()
    assert maps.attention.shape == maps.contribution.shape == (3, 2, *heads, 1, rows, columns)
    for layer in LAYERS:
        tokens = naive_parts(case.model, layer, pattern[layer], v[layer])
        for image in range(2):
            for patch in range(case.layout.patches):
                at = (layer, image, *([slice(None)] if by_head else []), 0, patch // columns, patch % columns)
                token = case.layout.prefix + patch
                seen = np.asarray(pattern[layer, image, :, 0, token])
                brought = tokens[image, 0, token] @ np.asarray(o[layer, image, 0])  # a number for each head
                expected = (seen, brought) if by_head else (seen.mean(), brought.sum())
                np.testing.assert_allclose(maps.attention[at], expected[0], rtol=1e-12)
                np.testing.assert_allclose(maps.contribution[at], expected[1], rtol=0, atol=1e-11)
    np.testing.assert_array_equal(given.attention, maps.attention)
    np.testing.assert_allclose(given.contribution, -2 * maps.contribution, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_mass_is_the_attention_on_each_group(case):
    pattern, layout = case.trace["pattern"], case.layout
    mass = jax.jit(attention_mass, static_argnames="layout")(pattern, layout)
    assert mass.shape == (*pattern.shape[:-1], len(layout.group_names))
    np.testing.assert_allclose(mass.sum(axis=-1), 1, rtol=1e-12)
    np.testing.assert_allclose(mass, by_group(np.asarray(pattern), layout, 4), rtol=1e-12)


def test_mass_of_a_single_row():
    layout = TokenLayout(1, (1, 2))
    mass = attention_mass(jnp.array([0.5, 0.25, 0.125, 0.125]), layout)
    np.testing.assert_allclose(mass, [0.5, 0.25, 0.25], rtol=1e-6)


@pytest.mark.usefixtures("float64")
def test_flow_is_the_mean_over_queries_of_the_mass_on_keys(case):
    pattern, layout = np.asarray(case.trace["pattern"]), case.layout
    flow = jax.jit(attention_flow, static_argnames="layout")(case.trace["pattern"], layout)
    G = len(layout.group_names)
    expected = np.zeros((*pattern.shape[:3], G, G))
    for g in range(G):
        for f in range(G):
            queries, keys = np.flatnonzero(layout.groups == g), np.flatnonzero(layout.groups == f)
            for q in queries:
                for k in keys:
                    expected[..., g, f] += pattern[..., q, k] / len(queries)
    np.testing.assert_allclose(flow, expected, rtol=1e-11)
    np.testing.assert_allclose(flow.sum(axis=-1), 1, rtol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("residual", [0.5, 0.2, 0.0])
def test_rollout_is_the_product_over_layers(case, residual):
    pattern = np.asarray(case.trace["pattern"])
    T = case.layout.tokens
    expected = np.zeros((2, T, T))
    for image in range(2):
        product = np.eye(T)
        for layer in LAYERS:  # from the embedding up
            mean = sum(pattern[layer, image, h] for h in range(case.config.heads)) / case.config.heads
            product = (residual * np.eye(T) + (1 - residual) * mean) @ product
        expected[image] = product
    roll = jax.jit(rollout, static_argnames="rows")
    np.testing.assert_allclose(roll(case.trace["pattern"], residual=residual), expected, rtol=0, atol=1e-13)
    for rows in (1, case.layout.prefix):
        some = roll(case.trace["pattern"], rows=rows, residual=residual)
        np.testing.assert_allclose(some, expected[:, :rows], rtol=0, atol=1e-13)
    np.testing.assert_allclose(expected.sum(-1), 1, rtol=1e-12)


@pytest.mark.usefixtures("float64")
@one_case
def test_rollout_by_default_halves(case):
    pattern = case.trace["pattern"]
    np.testing.assert_array_equal(rollout(pattern), rollout(pattern, residual=0.5))
    identity = np.broadcast_to(np.eye(case.layout.tokens), (2, case.layout.tokens, case.layout.tokens))
    np.testing.assert_array_equal(rollout(pattern, residual=1.0), identity)


@pytest.mark.usefixtures("float64")
def test_the_stream_is_the_sum_of_its_parts(case):
    trace = case.trace
    parts = jax.jit(residual_parts)(trace)
    np.testing.assert_array_equal(parts[0], trace["resid_pre"][0])
    np.testing.assert_array_equal(parts[1::2], trace["attn_out"])
    np.testing.assert_array_equal(parts[2::2], trace["mlp_out"])
    np.testing.assert_allclose(parts.sum(0), case.out.tokens, rtol=0, atol=1e-12)
    stream = jax.jit(accumulated_residual)(trace)
    assert stream.shape == (7, *case.out.tokens.shape)
    np.testing.assert_array_equal(stream[0], trace["resid_pre"][0])
    np.testing.assert_allclose(stream[1::2], trace["resid_mid"], rtol=0, atol=1e-13)
    np.testing.assert_allclose(stream[2::2], trace["resid_post"], rtol=0, atol=1e-13)


@pytest.mark.usefixtures("float64")
def test_the_stream_of_the_prefix_through_the_norm(case):
    takes = {site: Take(tokens="prefix") for site in ("attn_out", "mlp_out")}
    takes["resid_pre"] = Take(layers=0, tokens="prefix")

    @jax.jit
    def read(model, images):
        return accumulated_residual(model(images, record=takes).trace, norm=model.norm)

    stream = read(case.model, case.images)
    assert stream.shape == (7, 2, case.layout.prefix, case.config.width)
    np.testing.assert_allclose(stream[-1, :, 0], case.out.cls, rtol=0, atol=1e-12)
    x = np.asarray(case.trace["resid_mid"][1][:, : case.layout.prefix])
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + case.config.eps)
    expected = normal * np.asarray(case.model.norm.scale[...]) + np.asarray(case.model.norm.bias[...])
    np.testing.assert_allclose(stream[3], expected, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("float64")
@one_case
def test_the_stream_of_a_run_from_the_middle(case):
    out = jax.jit(lambda m, x: m.run_from(1, x, record=RECORD))(case.model, case.trace["resid_pre"][1])
    stream = accumulated_residual(out.trace)
    assert len(stream) == 5
    np.testing.assert_allclose(stream[-1], case.out.tokens, rtol=0, atol=1e-12)


def test_the_stream_is_rounded_like_the_models():
    model = jaxvit.cast(random_model(CASES["registers"]), "bfloat16")
    trace = run(model, random_images(0, 2, *SIZE)).trace
    stream = accumulated_residual(trace)
    assert stream.dtype == jnp.bfloat16
    # A sum in a tree, or of exact terms, would be off by a unit of the last place in many entries.
    assert (stream[2::2] == trace["resid_post"]).mean() > 0.99


@pytest.mark.usefixtures("float64")
@one_case
def test_the_stream_of_edited_runs(case):
    branches = jaxvit.merge(ablate(case.model, "z", layers=1, heads=0), amplify(case.model, "mlp_out", 3.0, layers=0))
    out = run(case.model, case.images, branches)
    assert not np.allclose(out.tokens, case.out.tokens)
    np.testing.assert_allclose(accumulated_residual(out.trace)[2::2], out.trace["resid_post"], rtol=0, atol=1e-12)

    skips = jaxvit.merge(
        amplify(case.model, "skip_attn", 0.5, layers=1, tokens="cls"), amplify(case.model, "skip_mlp", 0.2, layers=0)
    )
    out = run(case.model, case.images, skips)
    changed = out.trace["skip_attn"] - out.trace["resid_pre"] + out.trace["skip_mlp"] - out.trace["resid_mid"]
    missing = out.tokens - residual_parts(out.trace).sum(0)
    assert np.abs(missing).max() > 0.1
    np.testing.assert_allclose(missing, changed.sum(0), rtol=0, atol=1e-12)


def refined(case, by):
    """[CLS] of the last stream as embedding, MLPs, and the attention of all layers split up."""
    parts = residual_parts(case.trace)[:, :, :1]
    pattern = case.trace["pattern"][:, :, :, :1]
    attention = attention_parts(case.model, None, pattern, case.trace["v"], case.layout, by=by)
    return {"embedding": parts[:1], "mlp": parts[2::2], "attention": attention}, case.out.tokens[None, :, :1]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("by", SPLITS, ids=" ".join)
def test_shares_of_all_summands_sum_to_one(case, by):
    summands, output = refined(case, by)
    shares = jax.jit(projection_shares)(summands, output)
    assert shares["attention"].parts.shape == summands["attention"].parts.shape[:-1]
    assert shares["attention"].bias.shape == (3, 2, 1)
    of_image = [share.sum([axis for axis in range(share.ndim) if axis != 1]) for share in jax.tree.leaves(shares)]
    np.testing.assert_allclose(sum(of_image), [1, 1], rtol=1e-12)


@pytest.mark.usefixtures("float64")
def test_direct_contributions_are_inner_products(case):
    summands, output = refined(case, ("group", "head"))
    direct, shares = direct_contributions(summands, output), projection_shares(summands, output)
    parts = np.asarray(summands["attention"].parts)
    for image in range(2):
        o = np.asarray(output[0, image, 0])
        for layer in LAYERS:
            for g in range(len(case.layout.group_names)):
                for h in range(case.config.heads):
                    inner = sum(parts[layer, image, 0, g, h, i] * o[i] for i in range(len(o)))
                    np.testing.assert_allclose(direct["attention"].parts[layer, image, 0, g, h], inner, atol=1e-11)
                    share = shares["attention"].parts[layer, image, 0, g, h]
                    np.testing.assert_allclose(share, inner / np.linalg.norm(o) ** 2, atol=1e-13)
            bias = naive_bias(case.model, layer) @ o
            np.testing.assert_allclose(direct["attention"].bias[layer, image, 0], bias, atol=1e-11)
        np.testing.assert_allclose(direct["embedding"][0, image, 0], case.trace["resid_pre"][0, image, 0] @ o)


def test_shares_of_a_zero_output_are_zero():
    x = jnp.ones((2, 3))
    output = jnp.stack([jnp.zeros(3), jnp.ones(3)])
    np.testing.assert_array_equal(projection_shares(x, output), [0, 1])
    slopes = jax.grad(lambda o: projection_shares(x, o).sum())(output)
    # Of sum(o) / ||o||^2 at ones: 1 / 3 - 2 * 3 / 9; and where the share is 0 by definition, 0.
    np.testing.assert_allclose(slopes, [[0] * 3, [-1 / 3] * 3], rtol=1e-6)


@pytest.mark.usefixtures("float64")
def test_summands_through_the_norm_sum_to_the_output(case):
    summands, tokens = refined(case, "head")
    normed = jax.jit(through_norm)(case.model, summands, tokens)
    attention = normed["attention"]
    total = sum(a.sum(0) for a in (normed["embedding"], normed["mlp"], attention.parts.sum(3), attention.bias))
    np.testing.assert_allclose(total[:, 0] + case.model.norm.bias[...][None], case.out.cls, rtol=0, atol=1e-12)
    part, whole = np.asarray(summands["mlp"][1, 0, 0]), np.asarray(tokens[0, 0, 0])
    expected = (part - part.mean()) / np.sqrt(whole.var() + case.config.eps) * np.asarray(case.model.norm.scale[...])
    np.testing.assert_allclose(normed["mlp"][1, 0, 0], expected, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("float64")
@one_case
def test_each_layer_measures_what_a_trace_holds(case):
    def flow(trace):
        return {"flow": attention_flow(trace["pattern"], case.layout), "cls": trace["resid_post"][:, 0]}

    edits = ablate(case.model, "attn_out", layers=(0, 1), tokens="cls")
    record = {"pattern": Take(tokens="all"), "resid_post": Take()}
    for edit, trace in ((None, case.trace), (edits, run(case.model, case.images, edits).trace)):
        found = jax.jit(lambda m, x, e: each_layer(m, x, flow, record, e))(case.model, case.images, edit)
        np.testing.assert_allclose(found["flow"], attention_flow(trace["pattern"], case.layout), rtol=1e-11)
        np.testing.assert_allclose(found["cls"], trace["resid_post"][:, :, 0], rtol=0, atol=1e-12)
    assert not np.allclose(found["cls"], case.trace["resid_post"][:, :, 0])


class TestOverImages:
    config = replace(FAMILIES["dinov2 with registers"], preprocess=Preprocess(resize=24, crop=20))
    images = np.random.default_rng(0).integers(0, 256, (7, 22, 25, 3), dtype=np.uint8)

    @staticmethod
    def measure(model, images):
        out = model(images, record={"pattern": Take(layers=-1)})
        mass = attention_mass(out.trace["pattern"][-1][:, :, 0], model.layout)
        return {"mass": mass, "norm": (jnp.linalg.norm(out.cls, axis=-1), images[:, 0, 0, 0])}

    def test_is_the_measure_of_all_images_in_order(self):
        model = random_model(self.config)
        prepared = jaxvit.prepare(self.images, self.config)
        expected = jax.jit(self.measure)(model, prepared)
        for batches in (
            jaxvit.stream(self.images, self.config, 3),  # 3, 3, and 1 filled up
            [prepared[:4], np.asarray(prepared[4:])],
            iter([prepared]),
        ):
            found = over_images(self.measure, model, batches, progress=False)
            assert jax.tree.structure(found) == jax.tree.structure(expected)
            assert all(isinstance(leaf, np.ndarray) and len(leaf) == 7 for leaf in jax.tree.leaves(found))
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), found, expected)

    def test_compiles_once(self):
        traced = []

        def measure(model, images):
            traced.append(images.shape)
            return model(images).cls

        model = random_model(self.config)
        for _ in range(2):
            over_images(measure, model, jaxvit.stream(self.images, self.config, 3), progress=False)
        assert traced == [(3, 20, 20, 3)] * 3  # once a call, to see what it computes, and once to compile it

    def test_shows_how_far_it_is(self, capfd):
        pytest.importorskip("tqdm")
        batches = partial(jaxvit.stream, self.images, self.config, 3)
        over_images(lambda m, x: x[:, 0, 0], None, batches(), total=7)
        assert "7/7" in capfd.readouterr().err
        over_images(lambda m, x: x[:, 0, 0], None, batches(), progress=False)
        assert not capfd.readouterr().err

    def test_refuses_what_is_not_about_each_image(self):
        batches = [np.zeros((3, 20, 20, 3), np.float32)]
        with pytest.raises(ValueError, match=r"measure\['mean'\] has shape \[\]; expected \[3 images, \.\.\]"):
            over_images(lambda m, x: {"mean": x.mean()}, None, batches, progress=False)
        with pytest.raises(ValueError, match=r"measure has shape \[20\]; expected \[3 images"):
            over_images(lambda m, x: x[0, 0, :, 0], None, batches, progress=False)
        with pytest.raises(ValueError, match="no images to measure"):
            over_images(self.measure, None, [], progress=False)


@pytest.mark.usefixtures("float64")
@one_case
def test_vmap_over_models_is_a_loop(case):
    pattern, v, o = case.trace["pattern"][:, :, :, :1], case.trace["v"], case.trace["attn_out"][:, :, :1]
    other = jax.tree.map(lambda a: 1.5 * a, case.model)
    both = jax.tree.map(lambda *a: jnp.stack(a), case.model, other)

    def everything(model):
        parts = attention_parts(model, None, pattern, v, case.layout, by=("group", "head"))
        return {
            "parts": parts,
            "total": parts.total(),
            "maps": contributions(model, None, pattern, v, o),
            "last": attention_parts(model, -1, pattern[-1], v[-1], case.layout, by="head", stage="proj"),
            "shares": projection_shares(parts, o),
            "normed": through_norm(model, parts, o),
            "each": each_layer(model, case.images, lambda trace: trace["attn_out"][:, 0], "attn_out"),
        }

    found = jax.jit(jax.vmap(everything))(both)
    for i, model in enumerate((case.model, other)):
        here = jax.tree.map(lambda a, i=i: a[i], found)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-10), here, jax.jit(everything)(model))


@pytest.mark.usefixtures("float64")
def test_gradients_flow_through_everything():
    config = FAMILIES["dinov2 with registers"]
    model = jaxvit.cast(random_model(config), jnp.float64)
    layout, images = config.layout(8, 8), jnp.asarray(random_images(0, 2, 8, 8), jnp.float64)

    def loss(model, images):
        out = model(images, record={site: Take(tokens="all") for site in ("pattern", "v", "resid_pre")} | BRANCHES)
        pattern, v = out.trace["pattern"], out.trace["v"]
        parts = attention_parts(model, None, pattern, v, layout, by=("group", "head"))
        maps = patch_maps(model, 1, pattern[1], v[1], layout)
        shares = projection_shares(through_norm(model, parts, out.tokens[None]), out.tokens[None])
        terms = [parts.parts**2, maps.contribution, shares.parts, attention_flow(pattern, layout) ** 2]
        terms += [rollout(pattern, rows=1) ** 2, accumulated_residual(out.trace, model.norm) ** 2]
        return sum(term.mean() for term in terms)

    value, (slopes, image_slopes) = jax.jit(jax.value_and_grad(loss, (0, 1)))(model, images)
    assert np.isfinite(value) and all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), (model, images))
    h = 1e-6
    ends = [jax.jit(loss)(*jax.tree.map(lambda a, d, s=s: a + s * h * d, (model, images), direction)) for s in (1, -1)]
    leaves = zip(jax.tree.leaves((slopes, image_slopes)), jax.tree.leaves(direction), strict=True)
    slope = sum((a * b).sum() for a, b in leaves)
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * h), rtol=1e-6)


BRANCHES = {"attn_out": Take(), "mlp_out": Take()}


@pytest.fixture(scope="module")
def recorded():
    model = random_model(CASES["registers"])
    return model, model.config.layout(*SIZE), run(model, random_images(0, 2, *SIZE)).trace


@pytest.fixture
def unchecked_shapes():
    """As users run it: without jaxtyping, which refuses in its own words what does not fit."""
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


ERRORS = {
    "a layer that is not there": (
        lambda m, p, v, lay: attention_parts(m, 3, p[0], v[0], lay),
        "no layer 3 in a model of 3 layers",
    ),
    "one of several layers that is not there": (
        lambda m, p, v, lay: contributions(m, (0, -4), p[:2], v[:2], jnp.zeros((2, 2, p.shape[3], 32))),
        "no layer -4 in a model of 3",
    ),
    "a stage": (
        lambda m, p, v, lay: attention_parts(m, 0, p[0], v[0], lay, stage="z"),
        "no stage 'z'; the stages are heads, proj, layerscale",
    ),
    "a stage of contributions": (
        lambda m, p, v, lay: contributions(m, 0, p[0], v[0], v[0], stage="block"),
        "no stage 'block'",
    ),
    "a split": (
        lambda m, p, v, lay: attention_parts(m, 0, p[0], v[0], lay, by="groups"),
        r"by is 'groups'; expected 'group', 'head', or both",
    ),
    "a split twice": (lambda m, p, v, lay: attention_parts(m, 0, p[0], v[0], lay, by=("head", "head")), "by is"),
    "all layers where one is meant": (
        lambda m, p, v, lay: attention_parts(m, 0, p, v, lay),
        r"pattern has shape \[3, 2, 4, 28, 28\]; of layer 0 .* expected .* \(B H Q T\)",
    ),
    "one layer where all are meant": (
        lambda m, p, v, lay: attention_parts(m, None, p[0], v[0], lay),
        r"pattern has shape \[2, 4, 28, 28\]; .* \(L B H Q T\)",
    ),
    "fewer layers than named": (
        lambda m, p, v, lay: attention_parts(m, (0, 1), p[:1], v[:1], lay),
        r"pattern has shape \[1, .* of layers \(0, 1\)",
    ),
    "values of other tokens": (
        lambda m, p, v, lay: attention_parts(m, 0, p[0], v[0, :, :-1], lay),
        r"v has shape \[2, 27, 4, 8\]; .* pattern of shape \[2, 4, 28, 28\], expected \[2, 28, 4, 8\] \(B T H d\)",
    ),
    "values of other images": (lambda m, p, v, lay: attention_parts(m, 0, p[0], v[0, :1], lay), "v has shape"),
    "a direction of other queries": (
        lambda m, p, v, lay: contributions(m, 0, p[0], v[0], jnp.zeros((2, 1, 32))),
        r"direction has shape \[2, 1, 32\]; .* expected \[2, 28, 32\] \(B Q D\)",
    ),
    "another size of image": (
        lambda m, p, v, lay: attention_parts(m, 0, p[0], v[0], m.layout),
        r"over 28 tokens, the layout has 3[0-9]*: .*use config.layout\(height, width\)",
    ),
    "mass with another layout": (lambda m, p, v, lay: attention_mass(p, m.layout), "over 28 tokens"),
    "maps with another layout": (
        lambda m, p, v, lay: patch_maps(m, 0, p[0], v[0], m.layout, jnp.zeros((2, 28, 32))),
        "over 28 tokens",
    ),
    "a layout of another model": (
        lambda m, p, v, lay: attention_parts(m, 0, p[0], v[0], TokenLayout(0, (1, lay.tokens - 1))),
        "the layout has 0 registers, the model 3",
    ),
    "flow of the prefix": (
        lambda m, p, v, lay: attention_flow(p[:, :, :, :4], lay),
        r"rows of 4 of 28 queries, and all are needed: record \{\"pattern\": Take\(tokens=\"all\"\)\}",
    ),
    "rollout of the prefix": (lambda m, p, v, lay: rollout(p[:, :, :, :4]), "rows of 4 of 28 queries"),
    "rollout of no rows": (lambda m, p, v, lay: rollout(p, rows=0), "rows is 0; expected 1 to 28"),
    "a weight of the residual": (lambda m, p, v, lay: rollout(p, residual=1.5), "residual is 1.5; expected"),
    "a trace without a site": (
        lambda m, p, v, lay: residual_parts({"resid_pre": p, "attn_out": p}),
        "the trace lacks 'mlp_out'; record 'resid_pre', 'attn_out', 'mlp_out'",
    ),
    "a trace of some layers": (
        lambda m, p, v, lay: accumulated_residual(
            dict(resid_pre=v[:1, ..., 0], attn_out=v[..., 0], mlp_out=v[1:, ..., 0])
        ),
        "needs the same tokens of all layers",
    ),
    "a trace of other tokens": (
        lambda m, p, v, lay: residual_parts(
            dict(resid_pre=v[:1, :, :4, 0], attn_out=v[:, :, :, 0], mlp_out=v[:, :, :, 0])
        ),
        r"but the trace holds resid_pre \[1, 2, 4, 8\], attn_out \[3, 2, 28, 8\]",
    ),
    "a first layer that may be another": (
        lambda m, p, v, lay: residual_parts(dict(resid_pre=v[:2, ..., 0], attn_out=v[..., 0], mlp_out=v[..., 0])),
        "needs the same tokens of all layers",
    ),
    "summands of another output": (
        lambda m, p, v, lay: projection_shares({"a": jnp.ones((2, 5, 8))}, jnp.ones((3, 8))),
        r"a summand of shape \[2, 5, 8\] does not fit the output, \[3, 8\]",
    ),
    "a measure of some layers": (
        lambda m, p, v, lay: each_layer(m, random_images(0, 1, 8), dict, {"v": Take(layers=-1)}),
        "measures all layers",
    ),
}


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_is_wrong(recorded, name):
    model, layout, trace = recorded
    call, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        call(model, trace["pattern"], trace["v"], layout)

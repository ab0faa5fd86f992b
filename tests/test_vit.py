"""The model's laws: what is recorded is what was computed, and a model is a value under every transformation."""

import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, TINY, random_images, random_model
from flax import nnx
from scipy.stats import truncnorm

import jaxvit
from jaxvit import SITES, Knockout, Take, ViT, ViTConfig
from jaxvit.model import attention
from jaxvit.model.layers import PlainMlp
from jaxvit.model.params import abstract, from_params, to_params
from jaxvit.model.positions import resample_positions
from jaxvit.model.sites import ATTENTION_SITES
from jaxvit.model.tap import Tap

HEIGHT, WIDTH = 24, 16  # 6 x 4 patches: another grid than the positions', and not square
BATCH = 2
SOME = ("pattern", "resid_post")
EVERYTHING = tuple((site, Take(tokens="all")) for site in SITES)


@partial(jax.jit, static_argnames="record")
def run(model, images, record=()):
    """The compiled model; `record` is hashable: names, or pairs of a name and a Take."""
    named = all(isinstance(entry, str) for entry in record)
    return model(images, record=record if named else dict(record))


@pytest.fixture(scope="session")
def images():
    return random_images(0, BATCH, HEIGHT, WIDTH)


@pytest.fixture(params=["dinov2", "dinov2 giant with registers"], scope="session")
def extreme(request):
    """Models of the two families that differ in everything, for laws whose tests compile much."""
    return random_model(FAMILIES[request.param])


@pytest.fixture(scope="session")
def one():
    """A model of the family that has everything, for laws of the machinery around the model."""
    return random_model(FAMILIES["dinov2 giant with registers"])


@pytest.fixture
def full(model, images):
    """The run with every site recorded in full."""
    return run(model, images, EVERYTHING)


def assert_close(actual, expected, rtol):
    """Within `rtol` of the largest expected value, leaf by leaf."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        if b.size:
            assert np.abs(a - b).max() <= rtol * np.abs(b).max()


def assert_same(actual, expected):
    """In every bit."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def final(out):
    """An output without its trace."""
    return out.cls, out.registers, out.patches, out.tokens


def stacked(*models):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)


# --- outputs


def test_outputs_are_the_final_norm_of_the_tokens(model, images):
    out, c = run(model, images), model.config
    layout = c.layout(HEIGHT, WIDTH)
    assert out.tokens.shape == (BATCH, layout.tokens, c.width)
    mean = out.tokens.mean(-1, keepdims=True)
    variance = ((out.tokens - mean) ** 2).mean(-1, keepdims=True)
    scale, bias = (p[...][None, None] for p in (model.norm.scale, model.norm.bias))
    normed = (out.tokens - mean) / jnp.sqrt(variance + c.eps) * scale + bias
    cut = [1, layout.prefix]
    assert_close([out.cls[:, None], out.registers, out.patches], jnp.split(normed, cut, axis=1), 1e-5)
    assert out.cls.shape == (BATCH, c.width)
    assert out.trace == {}


def test_images_become_tokens_patch_by_patch_in_row_major_order(model, images):
    c = model.config
    positions = resample_positions(model.positions[...], (6, 4), c.resampling)
    bias = model.patch_embed.bias[...] if c.patch_bias else jnp.zeros(c.width)
    if c.pre_norm:
        after, norm = jax.jit(ViT.embed)(model, images), model.pre_norm
        rest = {name: a for name, a in to_params(model).items() if not name.startswith("pre_norm.")}
        model = from_params(replace(c, pre_norm=False), rest)
        assert_close(after, norm(jax.jit(ViT.embed)(model, images)), 1e-5)
    tokens = jax.jit(ViT.embed)(model, images)
    assert_close(tokens[:, 0], jnp.broadcast_to(model.cls[...], (BATCH, c.width)), 1e-6)
    if c.registers:
        expected = jnp.broadcast_to(model.registers[...], (BATCH, c.registers, c.width))
        assert_close(tokens[:, 1 : 1 + c.registers], expected, 1e-6)
    for row in range(6):
        for column in range(4):
            y, x = row * c.patch, column * c.patch
            pixels = images[:, y : y + c.patch, x : x + c.patch].reshape(BATCH, -1)
            expected = pixels @ model.patch_embed.kernel[...] + bias[None]
            token = tokens[:, 1 + c.registers + row * 4 + column]
            assert_close(token, expected + positions[row, column][None], 1e-5)


@pytest.mark.parametrize("size", [(4, 4), (4, 20), (20, 4), (16, 16), (20, 20), (40, 12)])
def test_every_grid_runs(size):
    config = FAMILIES["dinov2 with registers"]
    out = jax.eval_shape(run, abstract(config), jax.ShapeDtypeStruct((1, *size, 3), jnp.float32))
    assert out.patches.shape == (1, size[0] * size[1] // 16, 32)


def test_no_images_give_no_outputs(one, images):
    assert run(one, images[:0], SOME).trace["pattern"].shape == (3, 0, 4, 4, 28)


def test_a_fresh_model_is_random_in_every_layer():
    """Kernels have variance 1 / inputs; tokens and positions are 0.02 times a normal variable cut off at 2."""
    model = jax.jit(lambda: ViT(FAMILIES["dinov2 with registers"], rngs=nnx.Rngs(0)))()
    inputs = {"patch_embed": 48, "blocks.attn.qkv": 32, "blocks.attn.proj": 32, "blocks.mlp.fc1": 32}
    inputs |= {"blocks.mlp.fc2": 48}
    for name, value in to_params(model).items():
        module, _, leaf = name.rpartition(".")
        if leaf in ("bias", "scale", "gamma"):
            np.testing.assert_array_equal(value, 0 if leaf == "bias" else 1, err_msg=name)
            continue
        std = inputs[module] ** -0.5 if leaf == "kernel" else 0.02 * truncnorm(-2, 2).std()
        error = (2 * value.size) ** -0.5  # of the estimate, relative
        assert float(value.std()) == pytest.approx(std, rel=4 * error), name
        assert abs(float(value.mean())) < 4 * std * value.size**-0.5, name
        if name.startswith("blocks."):
            assert (value[0] != value[1]).all(), name


# --- recording


def test_recording_changes_no_bit_where_nobody_reads_the_trace(extreme, images):
    record = {site: Take() for site in SITES if site not in ATTENTION_SITES}
    unread = jax.jit(lambda m, x: final(m(x, record=record)))
    assert_same(unread(extreme, images), final(run(extreme, images)))


def test_recording_the_other_sites_changes_outputs_by_rounding_only(extreme, images):
    # Of XLA's making: what leaves the program is not fused as what stays in it.
    record = tuple(site for site in SITES if site not in ATTENTION_SITES)
    assert_close(final(run(extreme, images, record)), final(run(extreme, images)), 1e-6)


def test_recording_attention_changes_outputs_by_rounding_only(model, images, full):
    # Rows that are recorded are computed explicitly, the others by a fused kernel.
    expected = final(run(model, images))
    assert_close(final(full), expected, 3e-6)
    assert_close(final(run(model, images, SOME)), expected, 3e-6)


def test_sites_have_the_documented_axes(model, full):
    c = model.config
    tokens = c.layout(HEIGHT, WIDTH).tokens
    sizes = dict(B=BATCH, T=tokens, Q=tokens, D=c.width, H=c.heads, d=c.head_size, F=c.hidden)
    assert list(SITES) == [site for site in SITES if site in full.trace]
    for site, axes in SITES.items():
        assert full.trace[site].shape == (c.depth, *(sizes[a] for a in axes.split())), site


def test_the_residual_stream_adds_up(full):
    t = full.trace
    assert_close(t["resid_mid"], t["skip_attn"] + t["attn_out"], 1e-7)
    assert_close(t["resid_post"], t["skip_mlp"] + t["mlp_out"], 1e-7)
    assert_same(t["skip_attn"], t["resid_pre"])
    assert_same(t["skip_mlp"], t["resid_mid"])
    assert_same(t["resid_post"][:-1], t["resid_pre"][1:])
    assert_same(t["resid_post"][-1], full.tokens)


def test_the_first_stream_is_the_embedding(model, images, full):
    assert_close(full.trace["resid_pre"][0], jax.jit(ViT.embed)(model, images), 1e-6)


def test_attention_is_what_was_recorded(model, full):
    t, d = full.trace, model.config.head_size
    assert_close(t["scores"], jnp.einsum("LBQHd,LBTHd->LBHQT", t["q"], t["k"]) / np.sqrt(d), 1e-6)
    assert_close(t["pattern"], jax.nn.softmax(t["scores"], axis=-1), 1e-6)
    np.testing.assert_allclose(t["pattern"].sum(-1), 1, rtol=1e-6)
    assert_close(t["z"], jnp.einsum("LBHQT,LBTHd->LBQHd", t["pattern"], t["v"]), 1e-6)


def test_mlp_post_is_the_activation_of_mlp_pre(model, full):
    pre, post = full.trace["mlp_pre"], full.trace["mlp_post"]
    if isinstance(model.blocks.mlp, PlainMlp):
        exact = jax.scipy.stats.norm.cdf(pre)
        gate = exact if model.config.mlp == "gelu" else jax.nn.sigmoid(1.702 * pre)  # quick_gelu
        assert_close(post, pre * gate, 1e-6)
        return
    value = model.blocks.mlp.value
    for l in range(model.config.depth):
        x, norm = full.trace["resid_mid"][l], jax.tree.map(lambda a, l=l: a[l], model.blocks.norm2)
        gate = pre[l] / (1 + jnp.exp(-pre[l]))
        assert_close(post[l], gate * (norm(x) @ value.kernel[l] + value.bias[l][None, None]), 1e-5)


def assert_taken(trace, full, tokens):
    """That `trace` is the full record at these tokens (site -> prefix or all) of `tokens`."""
    prefix = full.registers.shape[1] + 1
    for site, taken in tokens.items():
        rows = slice(prefix if taken == "prefix" else None)
        whole = full.trace[site]
        assert_close(trace[site], whole[:, :, :, rows] if site in ATTENTION_SITES else whole[:, :, rows], 3e-6)


def test_take_prefix_keeps_the_first_tokens_at_every_site(extreme, images):
    record = tuple((site, Take(tokens="prefix")) for site in SITES)
    full = run(extreme, images, EVERYTHING)
    assert_taken(run(extreme, images, record).trace, full, dict.fromkeys(SITES, "prefix"))


def test_by_default_attention_is_taken_of_the_prefix_and_the_rest_of_all_tokens(extreme, images):
    out, full = run(extreme, images, tuple(SITES)), run(extreme, images, EVERYTHING)
    assert_taken(out.trace, full, {site: "prefix" if site in ATTENTION_SITES else "all" for site in SITES})
    # Also where only the prefix is written out are the recorded weights the ones that were used.
    z = jnp.einsum("LBHQT,LBTHd->LBQHd", out.trace["pattern"], out.trace["v"])
    assert_close(out.trace["z"][:, :, : z.shape[2]], z, 1e-6)


def test_the_leading_axis_of_a_trace_follows_the_layers_asked_for(one, images):
    asked = {
        "resid_pre": (None, [0, 1, 2]),
        "q": (0, [0]),
        "k": (-1, [2]),
        "v": ((0, 2), [0, 2]),
        "pattern": ((2, 0), [2, 0]),
        "z": ((1, 1, -2), [1, 1, 1]),
        "attn_out": ((-1, -3), [2, 0]),
        "mlp_post": (range(2, 0, -1), [2, 1]),
        "mlp_out": (np.array([1, 2, 0]), [1, 2, 0]),
        "mlp_pre": ((), []),
    }
    out = run(one, images, tuple((site, Take(layers=layers)) for site, (layers, _) in asked.items()))
    full = run(one, images, tuple(SITES))
    assert "mlp_pre" not in out.trace  # no layers, no trace
    for site, (_, layers) in asked.items():
        if layers:
            assert_close(out.trace[site], full.trace[site][np.array(layers)], 3e-6)
    assert_close(final(out), final(full), 3e-6)


def test_a_run_continues_from_every_layer(extreme, images):
    out = run(extreme, images, tuple(SITES))
    run_from = jax.jit(ViT.run_from, static_argnames=("layer", "record"))
    for layer, stream in enumerate([*out.trace["resid_pre"], out.tokens]):
        again = run_from(extreme, layer, stream, record=("attn_out",))
        assert_close(final(again), final(out), 3e-6)
        if layer < extreme.config.depth:
            assert_close(again.trace["attn_out"], out.trace["attn_out"][layer:], 3e-6)
        else:
            assert again.trace == {}


def test_a_continued_run_records_absolute_layers(one, images):
    full = run(one, images, tuple(SITES))
    record = {"z": Take(layers=(2,)), "q": Take(layers=-2)}
    again = jax.jit(lambda m, x: m.run_from(1, x, record=record))(one, full.trace["resid_pre"][1])
    assert_close(again.trace["z"], full.trace["z"][2:], 3e-6)
    assert_close(again.trace["q"], full.trace["q"][1:2], 3e-6)


# --- the model as a value


def test_compiling_changes_results_by_rounding_only(one, images):
    assert_close(run(one, images, SOME), one(images, record=SOME), 1e-5)


def test_running_twice_gives_the_same_bits_and_leaves_the_model_as_it_was(model, images):
    before = jax.tree.map(jnp.copy, model)
    assert_same(run(model, images, EVERYTHING), run(model, images, EVERYTHING))
    assert_same(model, before)
    assert jax.tree.structure(model) == jax.tree.structure(before)


def test_vmap_over_models_is_a_loop(extreme, images):
    models = [extreme, random_model(extreme.config, seed=1)]
    out = jax.jit(jax.vmap(lambda m, x: m(x, record=SOME), in_axes=(0, None)))(stacked(*models), images)
    assert_close(out, stacked(*(run(m, images, SOME) for m in models)), 5e-6)


def test_vmap_over_images_is_the_batch(one, images):
    out = jax.jit(jax.vmap(lambda m, x: m(x[None]), in_axes=(None, 0)))(one, images)
    assert_close(jax.tree.map(lambda a: a[:, 0], out), run(one, images), 5e-6)


def test_scan_and_map_over_batches_are_a_loop(one, images):
    batches = jnp.stack([images, images[::-1] + 1])
    loop = stacked(*(run(one, x, SOME) for x in batches))

    def step(count, x):
        return count + 1, one(x, record=SOME)

    count, scanned = jax.jit(lambda xs: jax.lax.scan(step, 0, xs))(batches)
    assert count == 2
    assert_close(scanned, loop, 5e-6)
    assert_close(jax.jit(lambda m, xs: jax.lax.map(lambda x: m(x, record=SOME), xs))(one, batches), loop, 5e-6)


def test_gradients_are_finite_reach_every_parameter_and_equal_finite_differences(extreme, images):
    def loss(model, images):
        out = model(images, record=("pattern", "mlp_post"))
        # Cubes, as the mean square after a LayerNorm hardly depends on what comes before it.
        return sum((leaf**3).mean() for leaf in (out.cls, out.patches, *out.trace.values()))

    with jax.enable_x64(True):
        exact, images = jaxvit.cast(extreme, jnp.float64), jnp.asarray(images, jnp.float64)
        gradients = to_params(jax.jit(jax.grad(loss))(exact, images))
        for name, gradient in gradients.items():
            assert jnp.isfinite(gradient).all(), name
            assert (gradient != 0).any(), name

        rng, params = np.random.default_rng(0), to_params(exact)
        direction = {name: jnp.asarray(rng.normal(size=a.shape)) for name, a in params.items()}
        slope = sum((gradients[name] * direction[name]).sum() for name in params)

        @jax.jit
        def along(h):
            return loss(
                from_params(exact.config, {name: a + h * direction[name] for name, a in params.items()}), images
            )

        np.testing.assert_allclose(slope, (along(1e-5) - along(-1e-5)) / 2e-5, rtol=1e-6)


def test_images_of_a_batch_do_not_touch(model, images):
    a, b = run(model, images, SOME), run(model, images.at[0].mul(-3.0), SOME)
    assert_same([x[1] for x in final(a)], [x[1] for x in final(b)])
    assert_same([x[:, 1] for x in a.trace.values()], [x[:, 1] for x in b.trace.values()])
    assert (a.cls[0] != b.cls[0]).any()


def test_models_of_a_config_share_a_structure_and_a_compilation(images):
    traces = []

    @jax.jit
    def forward(model, x):
        traces.append(model.config)
        return model(x).cls

    config = FAMILIES["dinov2 with registers"]
    models = [random_model(config, seed) for seed in range(3)]
    models.append(from_params(ViTConfig.from_dict(config.to_dict()), to_params(models[0])))
    assert len({jax.tree.structure(m) for m in models}) == 1
    outputs = [forward(m, images) for m in models]
    assert len(traces) == 1
    assert_same(outputs[0], outputs[3])
    assert (outputs[0] != outputs[1]).any()
    jax.eval_shape(forward, random_model(replace(config, eps=1e-3)), images)
    assert len(traces) == 2


@pytest.mark.parametrize("record", [(), ("pattern", "resid_post")])
def test_the_program_does_not_grow_with_depth(record):
    def lines(depth):
        model = abstract(ViTConfig(**TINY | dict(depth=depth), registers=3))
        x = jax.ShapeDtypeStruct((BATCH, HEIGHT, WIDTH, 3), jnp.float32)
        return jax.jit(lambda m, x: m(x, record=record)).lower(model, x).as_text().count("\n")

    assert lines(2) == lines(40)


@pytest.mark.parametrize("registers", [0, 4])
def test_giant_costs_nothing_as_shapes(registers):
    config = ViTConfig.dinov2("giant", registers)
    model = abstract(config)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model))
    D, F = config.width, config.hidden
    block = (D + 1) * 3 * D + (D + 1) * D + 2 * (D + 1) * F + (F + 1) * D + 4 * D + 2 * D
    total = 40 * block + (3 * 14**2 + 1) * D + (1 + registers + 37 * 37) * D + 2 * D
    # The published model has one more row: its mask token. Our `cls` is its class token and that token's position.
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == total == 1_136_480_768 - 2 * D + registers * D
    out = jax.eval_shape(run, model, jax.ShapeDtypeStruct((8, 518, 518, 3), jnp.float32), ("pattern",))
    assert out.patches.shape == (8, 37 * 37, D)
    assert out.trace["pattern"].shape == (40, 8, 24, 1 + registers, 1 + registers + 37 * 37)


def test_functional_is_the_model(one, images):
    apply, params = jaxvit.functional(one)
    out = jax.jit(lambda p, x: apply(p, x, record=SOME))(params, images)
    assert_same(out, run(one, images, SOME))
    assert type(params) is dict
    assert all(isinstance(value, jax.Array) for value in params.values())


def test_wrong_parameter_names_are_all_listed(one, images):
    apply, params = jaxvit.functional(one)
    params = {"head.kernel": params.pop("cls"), "head.bias": params.pop("norm.scale"), **params}
    with pytest.raises(ValueError, match="do not fit") as caught:
        apply(params, images)
    assert all(repr(name) in str(caught.value) for name in ("head.kernel", "head.bias", "cls", "norm.scale"))


def test_registers_in_another_order_give_the_outputs_in_that_order(images):
    model = random_model(FAMILIES["dinov2 with registers"])
    order = np.array([2, 0, 1])
    params = to_params(model)
    permuted = from_params(model.config, params | {"registers": params["registers"][order]})
    a, b = run(model, images), run(permuted, images)
    assert_close(b.registers, a.registers[:, order], 1e-5)
    assert_close([b.cls, b.patches], [a.cls, a.patches], 1e-5)


# --- precision


def test_float64_agrees_with_float32_to_its_rounding(extreme, images):
    single = run(extreme, images, SOME)
    with jax.enable_x64(True):
        double = run(jaxvit.cast(extreme, jnp.float64), images, SOME)
        assert {leaf.dtype for leaf in jax.tree.leaves(double)} == {np.dtype("float64")}
        assert_close(single, double, 5e-6)
    assert (np.asarray(single.tokens) != np.asarray(double.tokens)).mean() > 0.9


def test_bfloat16_is_roughly_right(extreme, images):
    out = run(jaxvit.cast(extreme, jnp.bfloat16), images, SOME)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(out._replace(trace={"resid_post": out.trace["resid_post"]}))}
    assert dtypes == {np.dtype(jnp.bfloat16)}
    assert out.trace["pattern"].dtype == jnp.float32  # in bfloat16 its rows would not sum to 1
    np.testing.assert_allclose(out.trace["pattern"].sum(-1), 1, atol=1e-5)
    assert_close(out, run(extreme, images, SOME), 0.05)


def test_float64_is_refused_where_jax_has_it_disabled(one):
    with pytest.raises(ValueError, match=r"jax\.enable_x64"):
        jaxvit.cast(one, jnp.float64)


# --- errors


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 22, 24, 3), ["22x24", "multiples", "patch size 4", "jaxvit.prepare"]),
        ((1, 24, 22, 3), ["24x22", "multiples", "patch size 4"]),
        ((1, 0, 24, 3), ["0x24", "positive"]),
        ((24, 24, 3), ["(24, 24, 3)", "[batch, height, width, 3 channels]"]),
        ((1, 24, 24, 4), ["(1, 24, 24, 4)", "3 channels"]),
        ((1, 3, 24, 24), ["(1, 3, 24, 24)", "3 channels"]),
    ],
)
def test_wrong_images_are_described(shape, words):
    assert all(word in refusal(jax.ShapeDtypeStruct(shape, jnp.float32)) for word in words)


def test_pixels_that_are_not_normalised_are_refused():
    message = refusal(jax.ShapeDtypeStruct((1, 24, 24, 3), jnp.uint8))
    assert "uint8" in message and "jaxvit.prepare" in message


def refusal(images):
    # By shapes alone and without the run-time types of the signature, which would speak first.
    embed = getattr(ViT.embed, "__wrapped__", ViT.embed)
    with pytest.raises(ValueError) as caught:
        jax.eval_shape(embed, abstract(FAMILIES["dinov2"]), images)
    return str(caught.value)


def test_a_take_of_unknown_tokens_is_refused():
    take = object.__new__(Take)  # past the run-time types of its constructor, which would speak first
    object.__setattr__(take, "tokens", "patches")
    with pytest.raises(ValueError, match="tokens is 'patches'; expected 'prefix', 'all' or None"):
        take.__post_init__()


def test_one_site_needs_no_tuple(one, images):
    assert_same(run(one, images, ("q",)).trace, jax.jit(lambda m, x: m(x, record="q"))(one, images).trace)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (("patern", "q", "zz"), ["'patern', 'zz'", *SITES]),
        ({"q": Take(layers=3)}, ["'q'", "layer 3", "0 to 2"]),
        ({"q": Take(layers=-4)}, ["'q'", "layer -4", "0 to 2"]),
        ({"pattern": Take(layers=(0, 7))}, ["'pattern'", "layer 7", "0 to 2"]),
    ],
)
def test_wrong_records_are_described(record, words, images):
    with pytest.raises(ValueError) as caught:
        jax.eval_shape(lambda m, x: m(x, record=record), abstract(FAMILIES["dinov2"]), images)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("layer", "record", "words"),
    [
        (4, (), ["layers 4 to", "3 layers"]),
        (-1, (), ["layers -1", "3 layers"]),
        (2, {"q": Take(layers=1)}, ["'q'", "layer 1", "2 to 2"]),
        (1, {"q": Take(layers=-3)}, ["'q'", "layer -3", "1 to 2"]),
    ],
)
def test_wrong_starts_are_described(layer, record, words):
    with pytest.raises(ValueError) as caught:
        jax.eval_shape(
            lambda m, x: m.run_from(layer, x, record=record),
            abstract(FAMILIES["dinov2"]),
            jax.ShapeDtypeStruct((1, 26, 32), jnp.float32),
        )
    assert all(word in str(caught.value) for word in words)


# --- Flax's other mode


def test_models_are_plain_trees_whatever_the_mode_of_flax():
    script = """
        import warnings
        warnings.simplefilter("error")
        import jax, jax.numpy as jnp, numpy as np
        from jaxvit import ViTConfig
        from jaxvit.model.params import abstract

        config = ViTConfig(depth=2, width=16, heads=2, hidden=24, patch=4, grid=(3, 3), registers=2, mlp="swiglu")
        rng = np.random.default_rng(0)
        draw = lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype)
        models = [jax.tree.map(draw, abstract(config)) for _ in range(2)]
        images = draw(jax.ShapeDtypeStruct((2, 8, 16, 3), jnp.float32))
        out = jax.jit(lambda m, x: m(x, record=("pattern", "resid_post")))(models[0], images)
        assert out.trace["pattern"].shape == (2, 2, 2, 3, 11)
        assert (out.trace["resid_post"][-1] == out.tokens).all()
        gradient = jax.jit(jax.grad(lambda m: (m(images).cls ** 3).sum()))(models[0])
        assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient))
        both = jax.jit(jax.vmap(lambda m: m(images).cls))(jax.tree.map(lambda *a: jnp.stack(a), *models))
        assert jnp.allclose(both[0], out.cls, atol=1e-4) and not jnp.allclose(both[1], out.cls, atol=1e-2)
        print("ran to the end")
    """
    mode = dict(NNX_GRAPH_MODE="false", NNX_GRAPH_UPDATES="false")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=os.environ | mode, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "ran to the end" in done.stdout


@pytest.mark.parametrize("rows, size, most", [(12, 2**22, 24), (5, 2**10, 24), (6, 1, 999), (5, 2**10, 2), (12, 1, 1)])
def test_attention_in_tiles_is_attention(rows, size, most, monkeypatch):
    """On a CPU, some rows and heads at a time, and too many tiles one after another: the same values and gradients."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 24, 3, 8)), jnp.float32) for _ in range(3))
    q = q[:, 1:]  # 23 rows, which some blocks do not divide
    mask = jnp.asarray(rng.choice([0.0, 0.5, 1.0], size=(2, 3, 24, 24)), jnp.float32)

    def run(q, k, v, mask):
        def total(q, k, v, mask):
            cut = Tap({}, {"scores": (Knockout(mask, mask_over="tokens"),)}, 1).knockout_factor(1, 24)
            plain, edited = (attention.fused_attention(q, k, v, 1, factor) for factor in (None, cut))
            return (plain**2).sum() + (edited**3).sum()

        return jax.jit(jax.value_and_grad(total, (0, 1, 2, 3)))(q, k, v, mask)

    whole = run(q, k, v, mask)
    monkeypatch.setattr(attention, "ROWS", rows)
    monkeypatch.setattr(attention, "TILE_BYTES", size)
    monkeypatch.setattr(attention, "TILES", most)
    monkeypatch.setattr(attention, "LEAST_BYTES", 0)
    assert sum(map(len, attention.tiles(q.shape, 24))) > 2
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-6), run(q, k, v, mask), whole)


def test_images_of_four_channels():
    """In everything that makes images or their shapes itself."""
    model = random_model(ViTConfig(**TINY, channels=4))
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 20, 20, 4)), jnp.float32)
    gray = images.at[..., 3].set(0)
    assert not np.allclose(model(images).cls, model(gray).cls)
    found = jaxvit.sweep(
        model,
        images,
        lambda point, clean: jaxvit.ablate(model, "z", layers=point["layer"], heads=point["head"]),
        jaxvit.grids.heads(model),
        lambda out, clean: out.trace["pattern"].mean((0, 2, 3, 4)),
        record=("pattern",),
        progress=False,
    )
    assert np.isfinite(found.values).all()
    words = r"images have shape \(2, 20, 20, 3\); expected \[batch, height, width, 4 channels\]"
    for call in (model, model.embed, jax.jit(model)):
        with pytest.raises(ValueError, match=words):
            call(images[..., :3])


def test_a_mask_token_changes_nothing():
    """It is a parameter like others, and no forward pass reads it."""
    config = ViTConfig(**TINY, registers=2)
    model, images = random_model(config), random_images(0, 2, 20)
    params = to_params(model) | {"mask_token": jnp.full(config.width, jnp.nan)}
    masked = from_params(replace(config, mask_token=True), params)
    jax.tree.map(np.testing.assert_array_equal, masked(images), model(images))
    apply, params = jaxvit.functional(jaxvit.cast(masked, "float16"))
    assert params["mask_token"].dtype == "float16" and np.isfinite(apply(params, images).cls).all()
    grads = jax.grad(lambda model: model(images).cls.sum())(random_model(masked.config))
    assert not np.asarray(to_params(grads)["mask_token"]).any()

"""What is compiled, how often, and for which platform."""

import contextlib
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, TINY, random_images, random_model

import jaxvit
from jaxvit import (
    Grid,
    Knockout,
    Take,
    ViT,
    ViTConfig,
    ablate,
    attribute,
    each_layer,
    functional,
    grids,
    knockout,
    over_images,
    steer,
    sweep,
)
from jaxvit.interventions import sweeps
from jaxvit.interventions.registers import _scores
from jaxvit.interventions.statistics import _moments
from jaxvit.model import attention
from jaxvit.model.params import abstract
from jaxvit.model.programs import Program
from jaxvit.model.run import check_choices

COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations():
    """Counts what XLA compiles."""
    found = []

    def listen(event, seconds, **_):
        if event == COMPILED:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def model():
    return random_model(FAMILIES["dinov2 with registers"])


@pytest.fixture(scope="module")
def images():
    return random_images(0, 2, 24, 16)


def heads(model):
    return lambda point, clean: ablate(model, "z", layers=point["layer"], heads=point["head"])


def first_entry(out, clean):
    return out.cls[:, 0]


CALLS = {
    "plain": lambda m, x: m(x),
    "recording": lambda m, x: m(x, record={"pattern": Take(layers=(-1, 0)), "v": Take()}),
    "edited": lambda m, x: m(x, knockout(m, query="cls", key="registers")),
    "run_from": lambda m, x: m.run_from(1, m.embed(x), record="resid_post"),
    "each_layer": lambda m, x: each_layer(m, x, lambda trace: trace["v"].mean((1, 2, 3)), "v"),
    "sweep": lambda m, x: sweep(m, x, heads(m), grids.heads(m), progress=False),
    "attribute": lambda m, x: attribute(m, x, heads(m), grids.heads(m), first_entry, progress=False),
    "over_images": lambda m, x: over_images(lambda m, x: m(x).cls, m, [x, x], progress=False),
    "statistics": lambda m, x: jaxvit.ActivationStats.collect(m, [x], progress=False),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_second_call_compiles_nothing(name, model, images):
    """Outside of jit, with new lambdas that compute the same, and with other numbers."""
    call = CALLS[name]
    with compilations() as first:
        jax.block_until_ready(call(model, images))
    others, other_images = random_model(model.config, 1), random_images(1, 2, 24, 16)
    with compilations() as second:
        jax.block_until_ready(call(others, other_images))
        jax.block_until_ready(call(model, images))
    assert first or name in ("plain", "statistics")
    assert not second


def test_what_a_function_captures_is_part_of_what_it_computes(model, images):
    """A function that was seen before, whose captured values have changed since, is not run as it was."""
    strength = {"value": 0.0}

    def edits(point, clean):
        return steer(model, "resid_post", strength["value"] * np.arange(32.0), layers=point["layer"])

    def measure(trace):
        return trace["v"].mean() * strength["value"]

    grid, found = Grid(layer=(0, 2)), []
    for value in (0.0, 1.0, 0.0):
        strength["value"] = value
        found.append(
            (
                sweep(model, images, edits, grid, first_entry, progress=False).values,
                each_layer(model, images, measure, "v"),
            )
        )
    assert (found[0][0] != found[1][0]).all() and (found[0][0] == found[2][0]).all()
    assert (found[1][1] != 0).all() and (found[0][1] == 0).all() and (found[2][1] == 0).all()


def test_a_kept_program_is_traced_anew_from_the_newest_function(model, images):
    """Two functions that compute the same share programs; later the first one's captured value changes."""
    strength = {"value": 1.0}
    grid = Grid(layer=(0, 1, 2))

    def first(point, clean):
        return steer(model, "resid_post", strength["value"] * np.arange(32.0), layers=point["layer"])

    def second(point, clean):
        return steer(model, "resid_post", 1.0 * np.arange(32.0), layers=point["layer"])

    expected = sweep(model, images, first, grid, first_entry, batch_size=1, progress=False).values
    strength["value"] = 0.0
    found = sweep(model, images, second, grid, first_entry, batch_size=3, progress=False).values  # traced once more
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_programs_are_told_apart_by_what_they_compute():
    x, big = jnp.ones(300), np.random.default_rng(0).normal(size=300)
    same = Program(lambda x: x * big, x), Program(lambda y: y * np.array(big), x)
    assert same[0] == same[1] and hash(same[0]) == hash(same[1])
    other = big.copy()
    other[-1] += 1
    assert Program(lambda x: x * other, x) != same[0]
    assert Program(lambda x: {"a": x}, x) != Program(lambda x: {"b": x}, x)
    assert Program(lambda x: "no array", x) != Program(lambda x: "no array", x)

    def straight(x):
        return x.sum()

    def stopped(x):
        return jax.lax.stop_gradient(x).sum()

    assert Program(straight, x) == Program(stopped, x)
    assert Program(straight, x, differentiated=True) != Program(stopped, x, differentiated=True)


def test_functions_that_hold_traced_values_are_part_of_the_program_around(model, images):
    def loss(scale):
        return each_layer(model, images, lambda trace: trace["v"].sum() * scale, "v").sum()

    assert float(jax.grad(loss)(1.0)) == pytest.approx(float(loss(1.0)), rel=1e-5) != 0
    np.testing.assert_allclose(jax.vmap(loss)(jnp.arange(3.0)), np.arange(3.0) * float(loss(1.0)), rtol=1e-5)


# Platforms ------------------------------------------------------------------------------------------------------------

PLATFORMS = ("cpu", "cuda", "tpu")
SMALL = ViTConfig.dinov2("small", 4, depth=2)
PROGRAMS = {
    "plain": lambda m, x: m(x).cls,
    "cls alone": lambda m, x: m(x, outputs="cls").cls,
    "recorded": lambda m, x: m(x, record={"pattern": Take(), "resid_post": Take(tokens="prefix")}).trace,
    "edited": lambda m, x: m(x, {"scores": Knockout(jnp.zeros((1, 1, 1, 6, 6))), **ablate(m, "z", heads=1)}).cls,
    "gradient": lambda m, x: jax.grad(lambda x: m(x).cls.astype(jnp.float32).sum())(x),
}


def loops(text):
    """How many loops a program has that are not the one over blocks: of its forward, and of its backward pass."""
    return len(re.findall(r"stablehlo\.while", text))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pixels", [224, 518])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_that_of_the_platform_it_is_exported_for(name, pixels, dtype):
    model = jax.eval_shape(lambda m: jaxvit.cast(m, dtype), abstract(SMALL))
    images = jax.ShapeDtypeStruct((2, pixels, pixels, 3), dtype)
    texts = {}
    for platform in PLATFORMS:
        exported = jax.export.export(jax.jit(PROGRAMS[name]), platforms=[platform])(model, images)
        texts[platform] = exported.mlir_module()
        assert "cudnn" not in texts[platform].lower()  # this machine has none, so that `auto` is XLA's form
    over_blocks = 1 + (name == "gradient")
    assert [loops(text) for text in texts.values()] == [over_blocks] * 3
    products = {platform: text.count("stablehlo.dot_general") for platform, text in texts.items()}
    assert products["cpu"] > products["cuda"] == products["tpu"]  # in pieces and tiles


def test_the_choice_of_attention_is_checked(model, images, monkeypatch):
    with pytest.raises(ValueError, match=r"attention is 'flash'; expected 'auto', 'xla' or 'cudnn'"):
        attention.check_kernel("flash", "float32", 8, None)  # before the run-time types of the tests see it
    with pytest.raises(ValueError, match=r"attention='cudnn' takes bfloat16 or float16.* this model is float32"):
        model(images, attention="cudnn")
    half = jaxvit.cast(random_model(ViTConfig(**TINY)), "bfloat16")
    with pytest.raises(ValueError, match=r"attention='cudnn' needs an NVIDIA GPU .* this machine has none: use"):
        half(images, attention="cudnn")
    monkeypatch.setattr(attention, "cudnn_is_here", lambda: True)
    with pytest.raises(ValueError, match=r"attention='cudnn' needs an NVIDIA GPU .* the device is a cpu: use"):
        half(images, attention="cudnn")
    with jax.default_device(jax.devices("cpu")[0]), pytest.raises(ValueError, match="the device is a cpu"):
        jax.eval_shape(lambda m, x: m(x, attention="cudnn"), half, images)
    with pytest.raises(ValueError, match=r"remat is 'all'; expected 'none' or 'block'"):
        check_choices(model, images, "all", "auto")


def test_where_cudnn_is_here_programs_for_other_platforms_do_without(monkeypatch):
    """As on a machine with a GPU, whose programs for its CPU are traced with the same `auto`."""
    monkeypatch.setattr(attention, "cudnn_is_here", lambda: True)
    monkeypatch.setattr(attention, "cudnn_attention", lambda q, k, v: v * 123.0 + q)
    model = jax.eval_shape(lambda m: jaxvit.cast(m, "bfloat16"), abstract(SMALL))
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), "bfloat16")
    for name in ("plain", "gradient"):
        jax.clear_caches()
        text = {
            platform: jax.export.export(jax.jit(PROGRAMS[name]), platforms=[platform])(model, images).mlir_module()
            for platform in PLATFORMS
        }
        assert "1.230000e+02" in text["cuda"]
        assert "1.230000e+02" not in text["cpu"] + text["tpu"]
    one = jax.eval_shape(lambda m: jaxvit.cast(m, "bfloat16"), abstract(ViTConfig.dinov2("small", 4, depth=1)))
    few, whole = (
        jax.export.export(jax.jit(PROGRAMS[name]), platforms=["cuda"])(one, images).mlir_module()
        for name in ("cls alone", "plain")
    )
    assert "1.230000e+02" in whole and "1.230000e+02" not in few  # few rows are written out
    jax.clear_caches()


def test_a_forward_pass_is_exported_with_a_symbolic_batch_and_read_back(model, images):
    """As README shows it."""
    apply, params = functional(model)
    (batch,) = jax.export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, 24, 16, 3), "float32")
    record = {"pattern": Take(layers=-1)}
    forward = jax.jit(lambda params, images: apply(params, images, record=record))
    stored = jax.export.export(forward)(params, shape).serialize()
    again = jax.export.deserialize(stored)
    for count in (1, 2):
        out, expected = again.call(params, images[:count]), forward(params, images[:count])
        assert isinstance(out, jaxvit.Output) and out.trace.keys() == {"pattern"}
        jax.tree.map(near, out, expected)


def near(actual, expected):
    """A batch of unknown size stays whole, and its sums are in another order."""
    np.testing.assert_allclose(actual, expected, rtol=0, atol=5e-6 * np.abs(expected).max())


# Memory ---------------------------------------------------------------------------------------------------------------


def temporary(function, *args, **static):
    return (
        jax.jit(function, static_argnames=tuple(static))
        .lower(*args, **static)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
    )


def test_statistics_hold_one_layer_at_a_time():
    def peak(depth):
        config = ViTConfig(**TINY | dict(depth=depth, grid=(16, 16)), registers=3)
        images = jax.ShapeDtypeStruct((4, 64, 64, 3), "float32")
        layout = config.layout(64, 64)
        return temporary(
            _moments, abstract(config), images, jax.ShapeDtypeStruct((4,), bool), sites=("mlp_post",), layout=layout
        )

    one_trace = 4 * 260 * 48 * 4
    assert peak(20) - peak(2) < one_trace  # 18 more layers take less than one more layer's trace


def test_a_search_for_register_neurons_holds_one_layer_at_a_time():
    def peak(depth):
        config = ViTConfig(**TINY | dict(depth=depth, grid=(16, 16)))
        images, valid = jax.ShapeDtypeStruct((4, 64, 64, 3), "float32"), jax.ShapeDtypeStruct((4,), bool)
        layers = tuple(range(depth))
        return temporary(_scores, abstract(config), images, valid, None, outliers_at=-1, layers=layers)

    one_trace = 4 * 257 * 48 * 4
    assert peak(20) - peak(2) < one_trace


def test_rematerialised_blocks_give_the_same_gradients_in_less_memory(model, images):
    def gradient(model, images, remat):
        return jax.grad(lambda images: (model(images, remat=remat).cls ** 2).sum())(images)

    plain, again = (jax.jit(gradient, static_argnums=2)(model, images, remat) for remat in ("none", "block"))
    np.testing.assert_allclose(again, plain, rtol=1e-4, atol=1e-5 * float(jnp.abs(plain).max()))
    deep = abstract(ViTConfig(**TINY | dict(depth=12, grid=(16, 16)), registers=3))
    many = jax.ShapeDtypeStruct((4, 64, 64, 3), "float32")
    peaks = [temporary(gradient, deep, many, remat=remat) for remat in ("none", "block")]
    assert peaks[1] < 0.5 * peaks[0]


# What a user meets ----------------------------------------------------------------------------------------------------


def test_outputs_show_shapes_and_not_numbers(model, images):
    out = model(images, record="pattern")
    assert repr(out) == (
        "Output(cls=float32[2, 32], registers=float32[2, 3, 32], patches=float32[2, 24, 32], "
        "tokens=float32[2, 28, 32], trace={pattern: float32[3, 2, 4, 4, 28]}, pooled=float32[2, 32], "
        "logits=None, projection=None)"
    )
    assert repr(out.trace) == "{pattern: float32[3, 2, 4, 4, 28]}"
    assert jax.tree.map(lambda a: a, out.trace).keys() == {"pattern"}
    assert len(repr(model)) < 200 and "\n" not in repr(model)


def test_stages_have_names_in_profiles(model, images):
    text = jax.jit(lambda m, x: m(x).cls).lower(model, images).as_text(debug_info=True)
    for scope in ("embed", "attention", "mlp", "output"):
        assert f"/{scope}/" in text or f'"{scope}/' in text, scope


@pytest.mark.parametrize("metric", ["function", "mapping"])
def test_several_metrics_come_from_a_function_or_a_mapping(metric, model, images):
    def cosine(out, clean):
        return jaxvit.cls_cosine(out, clean)

    given = {"cosine": cosine, "first": first_entry}
    if metric == "function":
        given = lambda out, clean: {"cosine": cosine(out, clean), "first": first_entry(out, clean)}  # noqa: E731
    found = sweep(model, images, heads(model), grids.heads(model), given, progress=False)
    assert found.axes["metric"] == ("cosine", "first")
    for name, one in (("cosine", cosine), ("first", first_entry)):
        alone = sweep(model, images, heads(model), grids.heads(model), one, progress=False)
        np.testing.assert_allclose(found.select(metric=name).values, alone.values, rtol=1e-6)


def test_a_mapping_of_what_is_no_metric_is_refused():
    plain = getattr(
        sweeps._together, "__wrapped__", sweeps._together
    )  # without run-time types, which would speak first
    with pytest.raises(ValueError, match="the metrics 'a' are not functions"):
        plain({"a": 3.0, "b": first_entry})


@pytest.mark.parametrize("layer", [-1, 4, 99])
def test_a_start_outside_of_the_layers_is_refused_or_nan(layer, model, images):
    """It was the last block and then all, or the input as it is."""
    stream = model.embed(images)
    for concrete in (layer, jnp.asarray(layer), np.int32(layer)):
        with pytest.raises(ValueError, match=rf"cannot run layers {layer} to 2 of a model of 3 layers"):
            model.run_from(concrete, stream)
    traced = jax.jit(lambda m, layer, x: m.run_from(layer, x).tokens)
    assert jnp.isnan(traced(model, layer, stream)).all()
    np.testing.assert_array_equal(traced(model, 3, stream), stream)  # no layer is left to run


@pytest.mark.parametrize("layer", [1.0, jnp.ones(1, int), True])
def test_a_start_is_a_whole_number(layer, model, images):
    plain = getattr(ViT.run_from, "__wrapped__", ViT.run_from)
    with pytest.raises(ValueError, match="expected a whole number from 0 to 3"):
        plain(model, layer, model.embed(images))


def test_concrete_arrays_start_like_numbers(model, images):
    out = model(images, record="resid_pre")
    again = model.run_from(jnp.asarray(1), out.trace["resid_pre"][1], record="z")
    assert again.trace["z"].shape[0] == 2
    np.testing.assert_allclose(again.cls, out.cls, atol=1e-5)


@pytest.mark.parametrize("layers", [(-1, 0), (0, 2), (2, 1, 0)])
def test_layers_mean_the_same_in_records_and_in_parts(layers, model, images):
    """The parts of layers in an order of one's own are those of these layers: they were paired with others."""
    from jaxvit.analysis.decompose import attention_parts

    sites = {site: Take(layers=layers, tokens="all") for site in ("pattern", "v", "attn_out")}
    trace = model(images, record=sites).trace
    layout = model.config.layout(24, 16)
    parts = attention_parts(model, layers, trace["pattern"], trace["v"], layout)
    np.testing.assert_allclose(parts.total(), trace["attn_out"], rtol=0, atol=1e-4)


# Models without a prefix ----------------------------------------------------------------------------------------------


def test_models_without_prefix_tokens_record_all_rows(images):
    bare = random_model(ViTConfig(**TINY, cls=False, pool="mean"))
    out = bare(images, record="pattern")
    assert out.trace["pattern"].shape == (3, 2, 4, 24, 24)
    np.testing.assert_allclose(out.trace["pattern"].sum(-1), 1, rtol=1e-5)
    with pytest.raises(ValueError, match="cannot record the prefix of 'pattern': this model has no class token"):
        bare(images, record={"pattern": Take(tokens="prefix")})
    with pytest.raises(ValueError, match="queries='prefix' at 'scores' edits nothing"):
        bare(images, {"scores": Knockout(np.zeros((1, 1, 1, 1, 1)), queries="prefix")})


# Half precision -------------------------------------------------------------------------------------------------------


def test_activations_are_rounded_once():
    """gelu(-3) is -0.00405; in bfloat16 steps it came out as -0.0059."""
    from jaxvit.model.layers import ACTIVATIONS, gated

    x = jnp.linspace(-6, 6, 997).astype(jnp.bfloat16)
    for name, function in ACTIVATIONS.items():
        exact = function(x.astype(jnp.float32))
        np.testing.assert_array_equal(function(x), exact.astype(jnp.bfloat16), err_msg=name)
    assert float(ACTIVATIONS["gelu"](jnp.asarray(-3.0, jnp.bfloat16))) == pytest.approx(-0.00405, rel=4e-3)
    exact = gated(x.astype(jnp.float32), x[::-1].astype(jnp.float32))
    np.testing.assert_array_equal(gated(x, x[::-1]), exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norms_are_rounded_once(norm):
    from jaxvit.model.layers import make_norm

    rng = np.random.default_rng(0)
    layer = make_norm(ViTConfig(**TINY, norm=norm))
    draw = lambda a: jnp.asarray(1 + rng.normal(size=a.shape), jnp.bfloat16)  # noqa: E731
    half = jax.tree.map(draw, layer)
    x = jnp.asarray(30 + rng.normal(size=(5, 32)), jnp.bfloat16)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), half)(x.astype(jnp.float32))
    np.testing.assert_array_equal(half(x), wide.astype(jnp.bfloat16))


def test_positions_and_rotations_are_rounded_once(images):
    config = ViTConfig(**TINY, registers=3)
    half = jaxvit.cast(random_model(config), "bfloat16")
    pixels = images.astype(jnp.bfloat16)
    found = half.embed(pixels)
    patches = half.patch_embed(pixels.reshape(2, 6, 4, 4, 4, 3).swapaxes(2, 3).reshape(2, 24, 48))
    from jaxvit.model.positions import resample_positions, rotary

    added = resample_positions(half.positions[...].astype(jnp.float32), (6, 4), config.resampling).reshape(24, 32)
    np.testing.assert_array_equal(found[:, 4:], (patches.astype(jnp.float32) + added[None]).astype(jnp.bfloat16))
    rope = rotary((3, 4), 8, 100.0, "float32", 1)
    q = jnp.asarray(np.random.default_rng(0).normal(size=(2, 13, 2, 8)), jnp.bfloat16)
    np.testing.assert_array_equal(rope(q), rope(q.astype(jnp.float32)).astype(jnp.bfloat16))

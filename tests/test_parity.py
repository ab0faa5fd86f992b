"""Parity with PyTorch, by the standard of `convert.verify`: every value both sides have, every layer, three sizes.

Random weights of the full width: each width once, with registers or without, and with `make test-all` both. That also
has small and base at full depth. `python -m benchmarks parity` compares base at full depth at every size. Real weights
on photographs, at full depth, are further down.
"""

import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("transformers")

from conftest import tidy
from layouts import WRITERS, numbers

import convert
import convert.verify as verify
import jaxvit
from benchmarks.originals import random_original
from convert.engine import convert_tensors, locate
from convert.originals import interpolation, original_of
from convert.verify import FLOAT32_SITES, Size, compare, compare_all, default_sizes, layers_at_a_time, random_images
from experiments import embedded
from jaxvit import ViTConfig
from jaxvit.model.params import abstract, from_params, to_params

DATA = Path(__file__).parents[1] / ".data"
CONFIGS = {
    f"{size}{'-registers' if registers else ''}": ViTConfig.dinov2(size, registers, depth=depth)
    for size, registers, depth in (
        *(("small", 0, 4), ("small", 4, 12)),  # the real weights, at full depth too, have no registers
        *((size, registers, 2 if registers else 1) for size in ("base", "large", "giant") for registers in (0, 4)),
    )
}
ONCE = ("small", "base-registers of 182px", "large of 182px", "giant-registers of 182px")
"""Every width, both MLPs, each rule of resampling, with registers and without. Wider ones take gigabytes at 518 px."""
CONFIGS |= {name: replace(CONFIGS[name.split(" ")[0]], grid=(13, 13)) for name in ONCE if "182" in name}
CONFIGS["giant-registers of 182px"] = replace(CONFIGS["giant-registers of 182px"], depth=1)
SITES_BOTH_HAVE = {"resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid"} | {
    "mlp_pre", "mlp_post", "mlp_out", "resid_post", "final", "pooled"
}  # fmt: skip


@pytest.fixture(autouse=True)
def optimised(monkeypatch):
    """These programs run for longer than they compile: they are optimised, as the rest of the suite is not."""
    monkeypatch.setitem(verify.PRECISE_ON_CPU, "xla_backend_optimization_level", 3)
    if "fusion_emitters" in os.environ["XLA_FLAGS"]:
        monkeypatch.setitem(verify.PRECISE_ON_CPU, "xla_cpu_use_fusion_emitters", True)


@pytest.fixture(autouse=True)
def few_layers_at_a_time(monkeypatch):
    """Or several of 518 px take a gigabyte, twice. Recording them all at once is tested below."""
    monkeypatch.setattr(verify, "TRACE_BYTES", 2**27)


@pytest.fixture(autouse=True)
def release_programs():
    """Frees those of a test, which no other runs; and what else it held, gigabytes after some."""
    yield
    jax.clear_caches()
    tidy()


def check(model, originals, images):
    depth = model.config.depth
    comparisons = compare_all(model, originals, images, defaults=False)
    tidy()  # the copies in float64: the next check makes its own
    for comparison in comparisons:
        assert set(comparison.float64) == SITES_BOTH_HAVE
        assert all(
            len(layers) == (1 if site in ("final", "pooled") else depth) for site, layers in comparison.float64.items()
        )
        for site, layers in comparison.float64.items():
            assert max(layers) <= 1e-10, (site, layers)
        for site in FLOAT32_SITES:
            assert max(comparison.ratios()[site]) <= 2, (site, comparison.ratios()[site])


SIZES = Size(168, 168), Size(126, 224)
"""Beside the native one: of as many tokens, so that they run the same program."""


def noise(model, size):
    """Wide models have many numbers in few tokens."""
    return random_images(model, size, tokens=500 * 384 // model.config.width)


def weights(config):
    """Random ones, under the names of `layouts.numbers`.

    Matrices are so large that attention is neither uniform nor one-hot: were it close to one-hot, the largest float32
    error of a layer would be that of a handful of weights, and its quotient with the original's a matter of luck.
    """
    return {name: 3 * array if array.ndim == 2 else array for name, array in numbers(config, seed=2).items()}


@pytest.mark.parametrize(
    "name", [name if name in ONCE else pytest.param(name, marks=pytest.mark.long) for name in CONFIGS]
)
def test_random_weights(name):
    """The same weights in all three layouts of files: timm's, transformers', and that of Meta's hub.

    The last is read by timm's own loader, and its positions resampled as Meta's code does.
    """
    config, n = CONFIGS[name], weights(CONFIGS[name])
    originals, rules, params = {}, {}, None
    for layout, write in WRITERS.items():
        state = write(config, n)
        originals[layout] = original_of(state)
        model = convert.load(state)
        del state
        rules[layout] = model.config.resampling
        assert (
            replace(model.config, resampling=config.resampling, preprocess=config.preprocess, mask_token=False)
            == config
        )
        held = to_params(model)
        held.pop("mask_token", None)  # which timm's file does not have
        params = params or held
        assert all(np.array_equal(array, params[name]) for name, array in held.items())
    antialias, bicubic, offset = "bicubic_antialias", "bicubic", "bicubic_offset"
    assert [*rules.values()] == ([antialias] * 3 if config.registers else [offset, antialias, bicubic])
    del n, model
    # What timm makes of the hub's file is what it makes of its own, to the last bit.
    ours, hub = (originals[layout].module.state_dict() for layout in ("timm", "dinov2/hub"))
    assert ours.keys() == hub.keys() and all(torch.equal(ours[name], hub[name]) for name in ours)
    del ours, hub
    if rules["timm"] == rules["dinov2/hub"]:
        del originals["dinov2/hub"]  # one model twice

    native = Size(*(config.patch * n for n in config.grid))
    for rule in set(rules.values()):
        model = from_params(replace(config, resampling=rule), params)
        same = [original for layout, original in originals.items() if rules[layout] == rule]
        for size in SIZES:
            check(model, same, noise(model, size))
    # Where nothing is resampled, the three are one model.
    assert native == default_sizes(model)[0]
    originals.pop("dinov2/hub", None)
    del same
    check(model, [*originals.values()], noise(model, native))


@pytest.mark.long
def test_full_depth(monkeypatch):
    """Of base; all blocks in one scan."""
    monkeypatch.setattr(verify, "TRACE_BYTES", 2**29)
    config = ViTConfig.dinov2("base", 4)
    n = weights(config)
    states = [WRITERS[layout](config, n) for layout in ("timm", "dinov2/transformers")]
    model, images = convert.load(states[0]), noise(convert.load(states[0]), SIZES[1])
    assert layers_at_a_time(model.config, images, "float64") == model.config.depth == 12
    check(model, [original_of(state) for state in states], images)


@pytest.mark.parametrize(("grid", "sizes"), [((37, 37), "518x518 210x210 182x266"), ((2, 3), "28x42 14x14 14x28")])
def test_default_sizes(grid, sizes):
    """The size positions were learned for, a smaller one, and one of another shape."""
    assert " ".join(map(str, default_sizes(abstract(ViTConfig.dinov2("small", grid=grid))))) == sizes


def test_resampling_rules_differ():
    """The rule matters: another library's rule, away from the native size, is far outside the limits."""
    module = random_original(ViTConfig.dinov2("small", depth=1), "timm")
    original = original_of(module)
    images = np.random.default_rng(0).normal(size=(1, 112, 112, 3))
    wrong = compare(convert.load(module, resampling="bicubic"), original, images, defaults=False)
    assert not wrong.passed and wrong.worst64() > 1e-3


def test_a_wrong_weight_is_found():
    module = random_original(ViTConfig.dinov2("small", 4, depth=2), "timm")
    original = original_of(module)
    model = convert.load(module)
    with torch.no_grad():
        module.blocks[1].ls2.gamma[7] += 1e-3
    comparison = compare(model, original, np.random.default_rng(0).normal(size=(1, 56, 56, 3)), defaults=False)
    assert not comparison.passed
    assert max(comparison.float64["resid_mid"]) < 1e-10 < comparison.float64["resid_post"][1]


@pytest.fixture(scope="module")
def real():
    source = embedded.model_file(DATA)
    photographs = [path for path in jaxvit.find_images(embedded.photographs(DATA)) if path.stem == "0"]
    return convert.load(source), original_of(source), photographs


@pytest.mark.parametrize(("size", "count"), [(224, 2), (518, 1)])
def test_real_weights_on_photographs(real, size, count):
    model, original, photographs = real
    check(model, [original], np.asarray(jaxvit.prepare(photographs[:count], model.config, size)))


def test_real_weights_on_a_photograph_that_is_not_square(real):
    model, original, photographs = real
    image = np.asarray(jaxvit.prepare(photographs[4], model.config))
    check(model, [original], image[:, :154])


@pytest.fixture(params=["gelu", "swiglu"])
def mlp(request):
    return request.param


@pytest.fixture(params=[0, 4])
def registers(request):
    return request.param


@pytest.fixture(params=["timm", "transformers"])
def library(request):
    return request.param


def small(mlp, registers, depth=2):
    hidden = 344 if mlp == "swiglu" else 512
    return ViTConfig(depth=depth, grid=(4, 4), width=128, heads=2, hidden=hidden, mlp=mlp, registers=registers)


@pytest.mark.parametrize("shape", [(2, 56, 56, 3), (2, 28, 70, 3)], ids=["native", "resampled"])
def test_originals_run_as_in_their_library(library, registers, mlp, shape):
    """Block after block gives what the library's own forward pass gives, to the last bit."""
    module = random_original(small(mlp, registers, depth=3), library)
    images = np.random.default_rng(0).normal(size=shape)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    *layers, last = original_of(module).run(images, torch.float32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert len(layers) == 3 and last.keys() == {"final", "pooled"}
    for layer, following in pairwise(layers):
        np.testing.assert_array_equal(layer["resid_post"], following["resid_pre"])

    pixels = torch.tensor(images, dtype=torch.float32).permute(0, 3, 1, 2).contiguous()
    with torch.inference_mode():
        if library == "timm":
            for block in module.blocks:
                block.attn.fused_attn = False
            whole = module.forward_features(pixels)
        else:
            whole = module(pixels).last_hidden_state
    np.testing.assert_array_equal(last["final"], whole.numpy())


def test_scans_over_some_of_the_blocks(monkeypatch):
    """What several scans record is what one over all blocks records."""
    model = convert.load(random_original(small("gelu", 4, depth=6), "timm"))
    images = np.random.default_rng(0).normal(size=(2, 56, 42, 3))
    one_layer = 8 * 2 * (2 * 17**2 + 17 * (9 * 128 + 2 * 512))
    for allowed, layers in ((0, 1), (one_layer, 1), (4 * one_layer, 3), (6 * one_layer, 6), (2 * one_layer, 2)):
        monkeypatch.setattr(verify, "TRACE_BYTES", allowed)
        assert layers_at_a_time(model.config, images, "float64") == layers
    *layers, last = verify.run(model, images, "float64")
    with jax.enable_x64(True):
        out = jax.jit(lambda model, images: model(images, record=("resid_post", "mlp_post")))(
            jaxvit.cast(model, "float64"), jnp.asarray(images)
        )
    assert len(layers) == 6 and last.keys() == {"final", "pooled"}
    for site, value in out.trace.items():
        np.testing.assert_allclose(np.stack([layer[site] for layer in layers]), value, rtol=0, atol=1e-13)
    final = np.concatenate([out.cls[:, None], out.registers, out.patches], axis=1)
    np.testing.assert_allclose(last["final"], final, rtol=0, atol=1e-13)


def test_gradients(library, registers, mlp):
    """In float64, with respect to the images and to every parameter."""
    config = small(mlp, registers)
    module = random_original(config, library).double()
    rng = np.random.default_rng(4)
    images = rng.normal(size=(2, 56, 56, 3))
    weights = rng.normal(size=(2, config.layout(56).tokens, config.width))

    pixels = torch.tensor(images).permute(0, 3, 1, 2).requires_grad_()
    with interpolation(torch.float64, None):
        final = module.forward_features(pixels) if library == "timm" else module(pixels).last_hidden_state
    (final * torch.tensor(weights)).sum().backward()
    gradients = {name: np.zeros(p.shape) if p.grad is None else p.grad.numpy() for name, p in module.named_parameters()}
    for name in ("pos_embed", "embeddings.position_embeddings"):
        if name in gradients and gradients[name].shape[1] == 1 + 16:
            # Conversion adds the class token and its position; the gradient of the sum is that of either.
            gradients[name][:, 0] = 0
    layout, tensors = locate(convert.LAYOUTS, gradients)

    def loss(model, images):
        out = model(images)
        return (jnp.concatenate([out.cls[:, None], out.registers, out.patches], 1) * weights).sum()

    with jax.enable_x64(True):
        model = convert.load(module, dtype="float64")
        of_model, of_images = jax.jit(jax.grad(loss, argnums=(0, 1)))(model, jnp.asarray(images))
        expected = convert_tensors(layout, tensors, model.config, "float64") | {
            "images": pixels.grad.permute(0, 2, 3, 1).numpy()
        }
        for name, gradient in (to_params(of_model) | {"images": of_images}).items():
            if name == "mask_token":  # of no use in a forward pass
                assert not gradient.any() and not expected[name].any()
                continue
            error = np.abs(gradient - expected[name]).max() / np.abs(expected[name]).max()
            # The key bias moves all scores of a row alike: its gradient is zero but for rounding, within q, k and v's.
            assert error <= 1e-9, (name, error)


def test_nan_never_passes():
    good = {site: [1e-15, 1e-15] for site in SITES_BOTH_HAVE}
    for site in SITES_BOTH_HAVE:
        bad = good | {site: [1e-15, float("nan")]}
        assert verify.Comparison(good, good, good, {}).passed
        assert not verify.Comparison(bad, good, good, {}).passed
    assert not verify.Comparison(good, good | {"final": [1e-15, float("nan")]}, good, {}).passed

"""Parity with PyTorch, by the standard of `convert.verify`: every value both sides have, every layer, three sizes.

Random weights of the full width; small and base at full depth. Real weights on photographs are at the end.
"""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("transformers")

from layouts import hub_state, numbers

import convert
import convert.verify as verify
import jaxvit
from benchmarks.originals import random_original
from benchmarks.parity import CASES
from convert.engine import convert_tensors, locate
from convert.originals import interpolation, original_of
from convert.verify import FLOAT32_SITES, Size, compare, default_sizes, random_images
from experiments import embedded
from jaxvit import ViTConfig
from jaxvit.params import to_params

DATA = Path(__file__).parents[1] / ".data"
CONFIGS = {
    f"{size}{'-registers' if registers else ''}": ViTConfig.dinov2(size, registers, depth=depth)
    for size, depth in CASES.items()
    for registers in (0, 4)
}
SITES_BOTH_HAVE = {"resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid"} | {
    "mlp_pre", "mlp_post", "mlp_out", "resid_post", "final"
}  # fmt: skip


@pytest.fixture(autouse=True)
def optimised(monkeypatch):
    """These programs run for longer than they compile: they are optimised, as the rest of the suite is not."""
    monkeypatch.setitem(verify.PRECISE_ON_CPU, "xla_backend_optimization_level", 3)


def check(model, original, images):
    comparison = compare(model, original, images, defaults=False)
    assert set(comparison.float64) == SITES_BOTH_HAVE
    depth = model.config.depth
    assert all(len(layers) == (1 if site == "final" else depth) for site, layers in comparison.float64.items())
    for site, layers in comparison.float64.items():
        assert max(layers) <= 1e-10, (site, layers)
    for site in FLOAT32_SITES:
        assert max(comparison.ratios()[site]) <= 2, (site, comparison.ratios()[site])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_random_weights(name, library):
    config = CONFIGS[name]
    module = random_original(config, library)
    model, original = convert.load(module), original_of(module)
    assert model.config.depth == config.depth and model.config.registers == config.registers
    sizes = default_sizes(model)
    assert len({size.height != size.width for size in sizes}) == 2 and sizes[0] == Size(518, 518)
    for size in sizes:
        check(model, original, random_images(model, size))


@pytest.mark.parametrize("name", CONFIGS)
def test_hub_files(name, tmp_path):
    """Files in the layout of Meta's hub, read by timm's own loader, positions resampled as Meta's code does.

    What differs from timm's files, names and positions, shows in two blocks.
    """
    config = replace(CONFIGS[name], depth=2)
    state = {key: torch.tensor(value) for key, value in hub_state(config, numbers(config, seed=2)).items()}
    torch.save(state, tmp_path / "pretrain.pth")
    model, original = convert.load(tmp_path / "pretrain.pth"), original_of(tmp_path / "pretrain.pth")
    assert model.config.resampling == ("bicubic_antialias" if config.registers else "bicubic_offset")
    for size in default_sizes(model):
        check(model, original, random_images(model, size))


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
    photographs = [path for path in jaxvit.find_images(embedded.photographs(DATA)) if path.stem.endswith("-0")]
    return convert.load(source), original_of(source), photographs


@pytest.mark.parametrize("size", [224, 518])
def test_real_weights_on_photographs(real, size):
    model, original, photographs = real
    check(model, original, np.asarray(jaxvit.prepare(photographs[:2], model.config, size)))


def test_real_weights_on_a_photograph_that_is_not_square(real):
    model, original, photographs = real
    image = np.asarray(jaxvit.prepare(photographs[4], model.config))
    check(model, original, image[:, :154])


SMALL = dict(depth=2, grid=(4, 4), width=128, heads=2, hidden=344)


@pytest.mark.parametrize("library", ["timm", "transformers"])
@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_gradients(library, registers, mlp):
    """In float64, with respect to the images and to every parameter."""
    hidden = 344 if mlp == "swiglu" else 512
    config = ViTConfig(**(SMALL | dict(hidden=hidden)), mlp=mlp, registers=registers)
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

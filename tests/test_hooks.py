"""Interventions are what forward hooks on the PyTorch original do: timm's DINOv2, float64, all tokens after the norm.

The hooks are written here, on timm's own modules, and share nothing with jaxvit.
"""

from contextlib import ExitStack, contextmanager
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")

import convert
from benchmarks.originals import random_original
from convert.originals import interpolation
from jaxvit import TokenIndices, ViTConfig, merge
from jaxvit.interventions.constructors import (
    ablate,
    amplify,
    freeze_attention,
    knockout,
    patch,
    remove_registers,
    scale_skip,
    steer,
    zero_attention,
)

SIZES = dict(depth=3, width=32, heads=4, hidden=128, grid=(3, 3))
HEIGHT, WIDTH = 28, 56  # 2 x 4 patches: positions are resampled
HEAD = 8

run = jax.jit(lambda model, images, edits: model(images, edits))


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@cache
def built(registers):
    """The original, the converted model, and images."""
    module = random_original(ViTConfig(**SIZES, registers=registers), "timm").double()
    for block in module.blocks:
        block.attn.fused_attn = False  # so that the weights pass `attn_drop`
    pixels = torch.tensor(np.random.default_rng(1).normal(size=(2, 3, HEIGHT, WIDTH)))
    return module, convert.load(module, dtype="float64"), pixels


@pytest.fixture(params=[4, 0], ids=["registers", "no registers"])
def both(request):
    """With registers, and without."""
    return built(request.param)


@pytest.fixture
def case():
    return built(4)


def of_torch(module, pixels, *hooks):
    """All tokens after the norm, while hooks are in place."""
    with ExitStack() as stack, torch.inference_mode(), interpolation(torch.float64, None):
        for hook in hooks:
            stack.enter_context(hook)
        return module.forward_features(pixels).numpy()


@cache
def clean_run(registers):
    module, _, pixels = built(registers)
    return of_torch(module, pixels)


def of_jaxvit(model, pixels, edits):
    out = run(model, jnp.asarray(pixels.permute(0, 2, 3, 1).numpy()), edits)
    return np.concatenate([out.cls[:, None], out.registers, out.patches], axis=1)


def check(case, edits, *hooks):
    """Both agree, and differ from the run without interventions."""
    module, model, pixels = case
    expected, clean = of_torch(module, pixels, *hooks), clean_run(model.config.registers)
    assert np.abs(expected - clean).max() > 1e-3 * np.abs(clean).max()
    actual = of_jaxvit(model, pixels, edits)
    assert actual.dtype == expected.dtype == np.float64
    assert np.abs(actual - expected).max() <= 1e-10 * np.abs(expected).max()


# --- hooks: context managers, so that none is left behind


@contextmanager
def on_input(module, change):
    """`change` gets the input and returns what the module is to see."""
    handle = module.register_forward_pre_hook(lambda _, inputs: (change(inputs[0].clone()),))
    yield
    handle.remove()


@contextmanager
def on_output(module, change):
    handle = module.register_forward_hook(lambda _, inputs, output: change(output.clone()))
    yield
    handle.remove()


@contextmanager
def with_forward(module, forward):
    """Another forward pass, of the module's own layers."""
    module.forward = forward
    yield
    del module.forward


def head_zeroed(block, head):
    def change(x):
        x[..., head * HEAD : (head + 1) * HEAD] = 0
        return x

    return on_input(block.attn.proj, change)


def added_to_scores(block, mask, heads=slice(None)):
    """timm's attention with a mask [queries, keys] that is added before the softmax."""
    attn = block.attn

    def forward(x, *args, **kwargs):
        B, T, D = x.shape
        q, k, v = attn.qkv(x).reshape(B, T, 3, attn.num_heads, HEAD).permute(2, 0, 3, 1, 4)
        scores = (q * attn.scale) @ k.transpose(-2, -1)
        scores[:, heads] += mask
        z = torch.softmax(scores, dim=-1) @ v
        return attn.proj(z.transpose(1, 2).reshape(B, T, D))

    return with_forward(attn, forward)


def weights_zeroed(block, queries, keys, heads=slice(None)):
    """After the softmax, without renormalising."""

    def change(pattern):
        rows = torch.zeros(pattern.shape[-2:], dtype=bool)
        rows[queries, keys] = True
        pattern[:, heads] = pattern[:, heads].masked_fill(rows, 0)
        return pattern

    return on_input(block.attn.attn_drop, change)


def scaled_skip(block, factors):
    """timm's block, whose identity branches are multiplied."""

    def forward(x, *args, **kwargs):
        x = factors[0] * x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
        return factors[1] * x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    return with_forward(block, forward)


def spans(model):
    """Group of tokens -> where it stands, counted by hand."""
    registers = model.config.registers
    names = {"cls": slice(0, 1), "patches": slice(1 + registers, None), "registers": slice(1, 1 + registers)}
    names |= {f"register {i}": slice(i + 1, i + 2) for i in range(registers)}
    return {name: span for name, span in names.items() if registers or not name.startswith("register")}


def cut(queries, keys, tokens):
    mask = torch.zeros(tokens, tokens, dtype=torch.float64)
    mask[queries, keys] = -torch.inf
    return mask


# --- the same by data


def test_without_interventions_both_agree(both):
    module, model, pixels = both
    expected = of_torch(module, pixels)
    assert np.abs(of_jaxvit(model, pixels, {}) - expected).max() <= 1e-10 * np.abs(expected).max()


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_zeroing_a_head(both, layer):
    for head in (0, 3):
        check(both, ablate(both[1], "z", layers=layer, heads=head), head_zeroed(both[0].blocks[layer], head))


def test_zeroing_heads_of_several_layers(case):
    module, model, _ = case
    edits = merge(ablate(model, "z", layers=0, heads=(1, 2)), ablate(model, "z", layers=(1, -1), heads=3))
    hooks = [head_zeroed(module.blocks[layer], head) for layer, head in ((0, 1), (0, 2), (1, 3), (2, 3))]
    check(case, edits, *hooks)


@pytest.mark.parametrize("layer", [0, -1])
def test_cutting_attention_before_the_softmax(both, layer):
    """Every pair of groups: added minus infinity. A group is all the patches, or one token that may not see itself."""
    module, model, _ = both
    tokens = model.config.layout(HEIGHT, WIDTH).tokens
    for query, rows in spans(model).items():
        for key, columns in spans(model).items():
            if layer == -1 and query != "cls" and key == "cls":
                continue
            hook = added_to_scores(module.blocks[layer], cut(rows, columns, tokens))
            check(both, knockout(model, layers=layer, query=query, key=key), hook)


def test_cutting_attention_of_some_heads_with_a_large_negative_number(case):
    module, model, _ = case
    mask = torch.where(
        cut(slice(0, 1), spans(model)["patches"], model.config.layout(HEIGHT, WIDTH).tokens) < 0, -1e9, 0
    )
    hook = added_to_scores(module.blocks[1], mask.double(), heads=[0, 2])
    check(case, knockout(model, layers=1, heads=(0, 2), query="cls", key="patches"), hook)


def test_cutting_attention_to_single_patches_in_every_layer(case):
    module, model, _ = case
    layout = model.config.layout(HEIGHT, WIDTH)
    place = layout.prefix + 5
    hooks = [added_to_scores(block, cut(slice(None), place, layout.tokens)) for block in module.blocks]
    check(case, knockout(model, key=TokenIndices(place, layout)), *hooks)


@pytest.mark.parametrize("layer", [0, 2])
def test_zeroing_attention_after_the_softmax(case, layer):
    module, model, _ = case
    for query, rows in spans(model).items():
        for key, columns in spans(model).items():
            edits = zero_attention(model, layers=layer, query=query, key=key)
            check(case, edits, weights_zeroed(module.blocks[layer], rows, columns))
    edits = zero_attention(model, layers=layer, heads=2, query="patches", key="cls")
    check(case, edits, weights_zeroed(module.blocks[layer], spans(model)["patches"], slice(0, 1), heads=[2]))


def test_removing_registers_is_cutting_their_columns_in_every_layer(case):
    module, model, _ = case
    tokens = model.config.layout(HEIGHT, WIDTH).tokens
    for which in ("registers", "register 1"):
        mask = cut(slice(None), spans(model)[which], tokens)
        check(case, remove_registers(model, which), *(added_to_scores(block, mask) for block in module.blocks))


@pytest.mark.parametrize("layer", [0, 1])
def test_replacing_tokens_after_a_block(both, layer):
    """By the same tokens of the other image, of the clean run, as a hook stored them."""
    module, model, pixels = both
    stored = []
    of_torch(module, pixels, on_output(module.blocks[layer], lambda x: stored.append(x) or x))
    donors = stored[0].flip(0)
    for group, span in spans(model).items():

        def change(x, span=span):
            x[:, span] = donors[:, span]
            return x

        edits = patch(model, "resid_post", jnp.asarray(donors.numpy()), layers=layer, tokens=group)
        check(both, edits, on_output(module.blocks[layer], change))


@pytest.mark.parametrize("layer", [0, 2])
def test_zeroing_and_steering_tokens_after_a_block(case, layer):
    module, model, _ = case
    layout = model.config.layout(HEIGHT, WIDTH)
    vector = torch.linspace(-1, 2, 32, dtype=torch.float64)
    places = [0, layout.prefix, layout.tokens - 1]

    def zero(x):
        x[:, places] = 0
        return x

    def add(x):
        x[:, :1] += vector
        return x

    block = module.blocks[layer]
    check(case, ablate(model, "resid_post", layers=layer, tokens=TokenIndices(places, layout)), on_output(block, zero))
    check(
        case, steer(model, "resid_post", jnp.asarray(vector.numpy()), layers=layer, tokens="cls"), on_output(block, add)
    )


@pytest.mark.parametrize(
    ("branch", "factors"), [("attn", (0.5, 1)), ("mlp", (1, -2.0)), ("attn", (0, 1)), ("mlp", (1, 0))]
)
def test_scaling_the_identity_branch(both, branch, factors):
    module, model, _ = both
    for layers in ((1,), (0, 2)):
        edits = scale_skip(model, factors[branch == "mlp"], branch, layers=layers)
        check(both, edits, *(scaled_skip(module.blocks[layer], factors) for layer in layers))


def test_amplifying_branches_and_neurons(case):
    module, model, _ = case

    def neurons(x):
        x[..., [3, 100]] *= 5
        return x

    hooks = [on_output(module.blocks[0].ls1, lambda x: 1.5 * x), on_output(module.blocks[2].ls2, lambda x: 0 * x)]
    edits = merge(amplify(model, "attn_out", 1.5, layers=0), ablate(model, "mlp_out", layers=2))
    check(case, edits, *hooks)
    check(case, amplify(model, "mlp_post", 5, layers=1, channels=(3, 100)), on_input(module.blocks[1].mlp.fc2, neurons))


def test_freezing_attention_to_that_of_other_images(case):
    module, model, pixels = case
    stored = []
    hooks = [on_input(block.attn.attn_drop, lambda x: stored.append(x) or x) for block in module.blocks]
    of_torch(module, pixels.flip(2), *hooks)
    edits = freeze_attention(model, np.stack([x.numpy() for x in stored]), queries="all")
    frozen = (
        on_input(block.attn.attn_drop, lambda x, own=own: own) for block, own in zip(module.blocks, stored, strict=True)
    )
    check(case, edits, *frozen)


def test_all_at_once(case):
    """Several interventions in one run, at several depths."""
    module, model, _ = case
    tokens = model.config.layout(HEIGHT, WIDTH).tokens
    edits = merge(
        ablate(model, "z", layers=0, heads=1),
        knockout(model, layers=1, query="cls", key="patches"),
        scale_skip(model, 0.7, "mlp", layers=2),
    )
    check(
        case,
        edits,
        head_zeroed(module.blocks[0], 1),
        added_to_scores(module.blocks[1], cut(slice(0, 1), spans(model)["patches"], tokens)),
        scaled_skip(module.blocks[2], (1, 0.7)),
    )


def test_a_hook_elsewhere_is_noticed(case):
    """Another head, layer, row, or place of the cut is outside the limit."""
    module, model, _ = case
    blocks, tokens = module.blocks, model.config.layout(HEIGHT, WIDTH).tokens
    patches = spans(model)["patches"]
    head, edge = ablate(model, "z", layers=1, heads=2), knockout(model, layers=1, query="cls", key="patches")
    skip = scale_skip(model, 0.5, "attn", layers=1)
    for edits, hook in (
        (head, head_zeroed(blocks[1], 1)),
        (head, head_zeroed(blocks[0], 2)),
        (edge, weights_zeroed(blocks[1], slice(0, 1), patches)),
        (edge, added_to_scores(blocks[1], cut(patches, slice(0, 1), tokens))),
        (skip, scaled_skip(blocks[1], (1, 0.5))),
    ):
        with pytest.raises(AssertionError):
            check(case, edits, hook)

"""Conversion of every layout, under every damage: the right numbers, or one error that names a tensor.

Wherever a checkpoint could also be another, complete one (without registers, without a classifier), nobody can tell;
these cases are listed, and everything else must be found.
"""

import re
from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
pytest.importorskip("transformers")

from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import hub_state, numbers, tiny, transformers_state
from test_safety import clip_state
from timm.models.vision_transformer import VisionTransformer

import convert
from convert import LAYOUTS, ConversionError, engine
from convert.engine import convert_tensors
from convert.originals import build_clip, build_dinov3, build_dinov3_timm, build_timm, build_transformers
from jaxvit import ViTConfig
from jaxvit.model.positions import rope_periods

BASE = dict(depth=2, width=64, heads=2, hidden=128, patch=4, grid=(4, 4))
DINOV3 = dict(**BASE, registers=3, positions=False, rope="float32", eps=1e-5)
CLIP = dict(projection=9, pre_norm=True, patch_bias=False, eps=1e-5, layer_scale=False)
TIMM = dict(img_size=16, patch_size=4, embed_dim=64, depth=2, num_heads=2)


def state_of(module, **renamed):
    """Nothing at its initial value; `renamed` are parts of names, `__` for a dot."""
    draw = np.random.default_rng(0)
    state = {}
    for name, tensor in module.state_dict().items():
        if tensor.dtype == torch.float32:  # all but a count of positions
            for ours, theirs in renamed.items():
                name = name.replace(ours.replace("__", "."), theirs)
            state[name] = (tensor.numpy() + 0.1 * draw.normal(size=tensor.shape)).astype(np.float32)
    return state


def dinov3_hub(gates):
    mlp = {1: {}, 2: dict(fc1_g="w1", fc1_x="w2", fc2="w3")}[gates]
    config = ViTConfig(**DINOV3, mlp="swiglu" if gates == 2 else "gelu")
    names = dict(reg_token="storage_tokens", gamma_1="ls1.gamma", gamma_2="ls2.gamma", **mlp)
    state = state_of(build_dinov3_timm(config, gates), **names)
    for i in range(config.depth):
        q, v = (state.pop(f"blocks.{i}.attn.{name}_bias") for name in "qv")
        state[f"blocks.{i}.attn.qkv.bias"] = np.concatenate([q, q + v, v])
        state[f"blocks.{i}.attn.qkv.bias_mask"] = np.repeat(np.float32([1, 0, 1]), 64)
    return state | {"rope_embed.periods": rope_periods(64, 100.0, "bfloat16").astype(np.float32)}


SIGLIP = dict(class_token=False, global_pool="map", act_layer="gelu_tanh", num_classes=0)
SIGLIP_CONFIG = dict(heads=2, mlp="gelu_tanh", eps=1e-6, pool="attention", final_norm="tokens")
ODD = dict(
    class_token=False, global_pool="avg", qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True, init_values=1e-5
)
ODD_CONFIG = dict(heads=2, mlp="quick_gelu", eps=1e-6, pool="mean", final_norm="pooled")

CASES = {
    "dinov2/hub": lambda: (hub_state(tiny(registers=4), numbers(tiny(registers=4))), {}),
    "dinov2/hub swiglu": lambda: (hub_state(tiny("swiglu"), numbers(tiny("swiglu"))), {}),
    "dinov2/transformers": lambda: (transformers_state(tiny(registers=4), numbers(tiny(registers=4))), {}),
    "dinov2/transformers in memory": lambda: (
        state_of(build_transformers(ViTConfig(**BASE | dict(hidden=176), mlp="swiglu", classes=7))),
        {},
    ),
    "dinov3/hub": lambda: (dinov3_hub(1), {}),
    "dinov3/hub swiglu": lambda: (dinov3_hub(2), {}),
    "dinov3/timm": lambda: (state_of(build_dinov3_timm(ViTConfig(**DINOV3))), {}),
    "dinov3/transformers": lambda: (state_of(build_dinov3(ViTConfig(**DINOV3))), {}),
    "dinov3/transformers swiglu": lambda: (
        state_of(build_dinov3(ViTConfig(**DINOV3, mlp="swiglu", qkv_bias=False))),
        {},
    ),
    "deit3": lambda: (
        state_of(
            VisionTransformer(**TIMM, no_embed_class=True, init_values=1e-5, num_classes=5),
            ls1__gamma="gamma_1",
            ls2__gamma="gamma_2",
        ),
        {},
    ),
    "dino": lambda: (state_of(build_timm(ViTConfig(**BASE, layer_scale=False), positioned=True)), {}),
    "dino mean": lambda: (state_of(VisionTransformer(**TIMM, global_pool="avg", num_classes=0)), {}),
    "timm": lambda: (state_of(VisionTransformer(**TIMM, num_classes=5)), {}),
    "timm siglip": lambda: (state_of(VisionTransformer(**TIMM, **SIGLIP)), SIGLIP_CONFIG),
    "timm odd": lambda: (state_of(VisionTransformer(**TIMM, **ODD, reg_tokens=2, num_classes=5)), ODD_CONFIG),
    "clip/openai": lambda: ({name: a.numpy() for name, a in clip_state().items()}, {"mlp": "gelu"}),
    "clip/transformers": lambda: (
        state_of(build_clip(ViTConfig(**BASE, **CLIP, mlp="quick_gelu"))),
        {"mlp": "quick_gelu"},
    ),
}

SPARE = {
    "dinov2/hub": ("register_tokens",),
    "dinov2/transformers": ("embeddings.register_tokens",),
    "dinov2/transformers in memory": ("classifier.weight",),
    "dinov3/hub": ("blocks.0.attn.qkv.bias", "rope_embed.periods"),
    "dinov3/timm": ("blocks.0.attn.q_bias",),
    "dinov3/transformers": ("layer.0.attention.q_proj.bias",),
    "deit3": ("head.weight",),
    "timm": ("head.weight", "reg_token", "blocks.0.attn.qkv.bias", "pos_embed"),
    "clip/openai": ("visual.proj",),
    "clip/transformers": ("visual_projection.weight",),
}
"""What a complete model of the layout may lack. Without it, it is another model."""

COUNTS = ("register_tokens", "reg_token", "storage_tokens", "visual_projection.weight", "pos_embed")
"""Whose rows are free: they count registers and classes, or positions without that of [CLS]."""


@pytest.fixture(autouse=True, scope="module")
def shapes_once():
    """Tracing a model for its shapes takes longer than converting it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "abstract", cache(engine.abstract))
        yield


@cache
def case(name):
    state, known = CASES[name]()
    return state, known, converted(state, known)


def converted(state, known):
    """The layout and the parameters."""
    source = convert.read(state, config=known)
    layout, tensors, config = convert.recognise(source)
    return layout.name, convert_tensors(layout, tensors, config, "float32", source.ignored)


def same(a, b):
    return a[0] == b[0] and {*a[1]} == {*b[1]} and all(np.array_equal(a[1][name], b[1][name]) for name in a[1])


def test_every_layout_has_a_case():
    for name in CASES:
        assert case(name)[2][0] == name.split(" ")[0] or name.startswith(case(name)[2][0]), name
    assert {layout.name for layout in LAYOUTS} == {case(name)[2][0] for name in CASES}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_precisions(name, dtype):
    """Half precision is widened exactly, whichever tensors have it; float64 is rounded once."""
    state, known, _ = case(name)
    cast = {key: array.astype(jnp.dtype(dtype)) for key, array in state.items()}
    wide = {key: array.astype(np.float32) for key, array in cast.items()}
    assert same(converted(cast, known), converted(wide, known))


@pytest.mark.parametrize("name", ["dinov2/hub", "dinov3/timm", "timm", "clip/openai"])
def test_every_name_counts(name):
    state, known, right = case(name)
    for key in state:
        if not key.endswith("mask_token") and key not in SPARE.get(right[0], ()):
            refused({other: a for other, a in state.items() if other != key}, known, state)


DAMAGES = ("removed", "added", "renamed", "transposed", "cut", "shorter", "extended", "flat", "scalar", "empty")
DAMAGES += ("not a number", "infinite", "integers", "float16", "bfloat16")
CASTS = ("float16", "bfloat16")


@pytest.mark.parametrize("name", CASES)
@given(st.data())
@settings(max_examples=15, deadline=None, derandomize=True)
def test_never_silent(name, data):
    state, known, right = case(name)
    damaged, cast, only_cast = dict(state), dict(state), True
    for key in data.draw(st.lists(st.sampled_from(sorted(state)), min_size=1, max_size=4, unique=True)):
        how = data.draw(st.sampled_from(DAMAGES))
        if how in CASTS:
            damaged[key] = state[key].astype(jnp.dtype(how))
            cast[key] = damaged[key].astype(np.float32)
        else:
            only_cast = False
            damage(damaged, key, how, SPARE.get(right[0], ()))
    if only_cast:
        assert same(converted(damaged, known), converted(cast, known))
        return
    try:
        found = converted(damaged, known)
    except ConversionError as error:
        named(str(error), damaged, state)
    else:
        assert same(found, converted(cast, known)), "another model, without a word"


def damage(state, name, how, spare):
    array = state[name]
    largest = int(np.argmax(array.shape))
    if how == "removed" and name not in spare:
        del state[name]
    elif how == "added":
        state[f"{name}2"] = array
    elif how == "renamed":
        state[name.replace("weight", "wieght") if "weight" in name else f"x{name}"] = state.pop(name)
    elif how == "transposed" and array.ndim > 1 and array.shape[-1] != array.shape[-2]:
        state[name] = array.swapaxes(-1, -2)
    elif how == "cut":
        state[name] = np.take(array, range(array.shape[largest] - 1), largest)
    elif how == "shorter" and array.ndim > 1 and not name.endswith(COUNTS):
        state[name] = array[..., :-1, :]
    elif how == "extended":
        state[name] = np.concatenate([array, array], largest)
    elif how == "flat":
        state[name] = array.reshape(-1)
    elif how == "scalar":
        state[name] = array.reshape(-1)[0]
    elif how == "empty":
        state[name] = array[..., :0]
    elif how == "infinite":
        state[name] = np.full_like(array, -np.inf)
    elif how == "integers":
        state[name] = (100 * array).astype(np.int32)
    else:
        state[name] = array.copy()
        state[name].flat[-1] = np.nan


def refused(state, known, before):
    with pytest.raises(ConversionError) as raised:
        converted(state, known)
    named(str(raised.value), state, before)


def named(message, *states):
    """One line, and the name of a tensor in it."""
    assert message.strip() and "\n" not in message
    names = {WRAPPERS.sub("", name) for state in states for name in state}
    known = any(name in message for name in names) or any(words in message for words in WITHOUT_NAMES)
    assert known or re.search(r"blocks\.0\.mlp\.fc2\.weight is missing", message), message


WRAPPERS = re.compile(r"^(visual|vision_model|dinov2|model)\.")
WITHOUT_NAMES = ("patches of", "do not tell", "parameters", "should", "must be", "reads a token")
"""Errors about sizes, and about what a checkpoint without some of its names would be."""


OPTIONAL = ("head.", "reg_token", "register_tokens", "storage_tokens", "dist_token", "classifier.", "fc_norm.")
"""What makes another complete model of some."""


@given(st.data())
@settings(max_examples=20, deadline=None, derandomize=True)
def test_mixtures(data):
    """Tensors of two checkpoints in one: whatever of them is used, the rest is not dropped."""
    one, other = (data.draw(st.sampled_from(sorted(CASES))) for _ in range(2))
    (state, known, right), (more, _, _) = case(one), case(other)
    foreign = {name: a for name, a in more.items() if name not in state and not name.startswith(OPTIONAL)}
    if not foreign:
        return
    picked = data.draw(st.lists(st.sampled_from(sorted(foreign)), min_size=1, max_size=5, unique=True))
    try:
        found = converted(state | {name: foreign[name] for name in picked}, known)
    except ConversionError as error:
        named(str(error), state, more)
    else:
        assert same(found, right)

"""Every family beside DINOv2: files in the layouts their authors publish, against the libraries that run them.

Official files are made from timm's or transformers' model with random weights, by renaming; nothing of the converter's
tables is used. Sizes are tiny, so that all kinds of models can be compared at every site and layer.
"""

import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

from layouts import write_safetensors

import convert
import convert.timm as plain
import jaxvit
from benchmarks.originals import randomise
from convert import ConversionError, clip, dinov3
from convert.catalogue import known
from convert.export import state_dict
from convert.originals import (
    build_clip,
    build_dinov3,
    build_dinov3_timm,
    build_timm,
    build_transformers,
    original_of,
)
from convert.verify import FLOAT32_SITES, Size, compare, random_images
from jaxvit import ViTConfig
from jaxvit.model.params import to_params
from jaxvit.model.positions import rope_periods

TINY = dict(depth=2, width=128, heads=2, hidden=512, patch=4, grid=(4, 4))
PLAIN = ViTConfig(**TINY, layer_scale=False)
CLIP = ViTConfig(**TINY, mlp="quick_gelu", layer_scale=False, patch_bias=False, pre_norm=True, eps=1e-5, projection=9)
DINOV3 = ViTConfig(**TINY, registers=3, positions=False, rope="float32", eps=1e-5)
GATED = replace(DINOV3, mlp="swiglu", qkv_bias=False)
DEIT3 = ViTConfig(**TINY, classes=10)


def state_of(module):
    return {name: tensor.numpy().copy() for name, tensor in module.state_dict().items()}


def renamed(state, *pairs):
    """Each name with the first of the pairs that fits it."""

    def new(name):
        for old, other in pairs:
            if old in name:
                return name.replace(old, other)
        return name

    return {new(name): array for name, array in state.items()}


# Files as their authors publish them ----------------------------------------------------------------------------------


def deit3():
    state = state_of(randomise(build_timm(DEIT3, positioned=False)))
    return {"model": tensors(renamed(state, ("ls1.gamma", "gamma_1"), ("ls2.gamma", "gamma_2")))}


def dino(head=True):
    """A full checkpoint of DINO: the teacher, a student wrapped for several GPUs, and heads beside both."""
    states = [state_of(randomise(build_timm(PLAIN, positioned=True), seed)) for seed in (0, 1)]
    heads = {"head.mlp.0.weight": np.ones((4, 4), np.float32), "head.last_layer.weight_g": np.ones((4, 1), np.float32)}
    teacher = {f"backbone.{name}": a for name, a in states[0].items()} | (heads if head else {})
    student = {f"module.backbone.{name}": a for name, a in states[1].items()}
    student |= {f"module.{name}": a for name, a in heads.items()}
    return {"teacher": tensors(teacher), "student": tensors(student), "epoch": 3, "optimizer": {"state": {}}}


def ibot():
    """One with LayerScale, the token for masked patches, and the last norm behind a mean pool."""
    config = replace(PLAIN, layer_scale=True, final_norm="pooled", pool="mean")
    state = renamed(
        state_of(randomise(build_timm(config, positioned=True))), ("ls1.gamma", "gamma_1"), ("ls2.gamma", "gamma_2")
    )
    return {"state_dict": tensors(state | {"masked_embed": np.zeros((1, 128), np.float32)})}


def openai(archive=True):
    """The names of OpenAI's archive and of OpenCLIP's files, in half precision, with the text side beside."""
    state = state_of(randomise(build_timm(CLIP, positioned=True)))
    state["proj"] = state.pop("head.weight").T
    del state["head.bias"]
    state["class_embedding"] = state.pop("cls_token")[0, 0]
    state["positional_embedding"] = state.pop("pos_embed")[0]
    pairs = (("patch_embed.proj", "conv1"), ("norm_pre", "ln_pre"), ("attn.qkv.", "attn.in_proj_"))
    pairs += (("attn.proj", "attn.out_proj"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"))
    state = renamed(renamed(state, *pairs), ("norm1", "ln_1"), ("norm2", "ln_2"), ("norm.", "ln_post."))
    state = {f"visual.{name.replace('blocks.', 'transformer.resblocks.')}": a for name, a in state.items()}
    text = ["transformer.resblocks.0.attn.in_proj_weight", "token_embedding.weight", "positional_embedding"]
    text += ["ln_final.weight", "text_projection", "logit_scale"]
    state |= {name: np.ones((2, 2), np.float32) for name in text}
    if archive:
        state |= {name: np.array(7) for name in ("input_resolution", "context_length", "vocab_size")}
    return tensors({name: a.astype(np.float16) if a.dtype == np.float32 else a for name, a in state.items()})


def clip_transformers(both=True):
    """A whole CLIP as transformers publishes it."""
    state = renamed(state_of(randomise(build_clip(CLIP))))
    assert "vision_model.encoder.layers.0.self_attn.q_proj.weight" in state
    extra = {"vision_model.embeddings.position_ids": np.arange(17)[None], "logit_scale": np.ones(())}
    extra |= {"text_model.final_layer_norm.weight": np.ones(4), "text_projection.weight": np.ones((4, 4))}
    return tensors(state | (extra if both else {}))


def dinov3_hub(config=DINOV3):
    state = state_of(randomise(build_dinov3_timm(replace(config, mlp=config.mlp), gates=2)))
    D = config.width
    if config.qkv_bias:
        for i in range(config.depth):
            q, v = (state.pop(f"blocks.{i}.attn.{name}_bias") for name in "qv")
            # Keys have a bias here, which the mask takes away.
            state[f"blocks.{i}.attn.qkv.bias"] = np.concatenate([q, np.full(D, 0.7, np.float32), v])
            state[f"blocks.{i}.attn.qkv.bias_mask"] = np.repeat(np.array([1, 0, 1], np.float32), D)
    pairs = (("reg_token", "storage_tokens"), ("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma"))
    pairs += (("mlp.fc1_g", "mlp.w1"), ("mlp.fc1_x", "mlp.w2"))
    if config.mlp == "swiglu":
        pairs += (("mlp.fc2", "mlp.w3"),)
    periods = torch.tensor(100.0) ** (torch.arange(16) / 16)
    more = {"mask_token": torch.zeros(1, D), "rope_embed.periods": periods.bfloat16()}
    return tensors(renamed(state, *pairs)) | more


OWN_DINOV3 = replace(DINOV3, registers=0, eps=1e-6, mask_token=True)


def dinov3_trained(config=OWN_DINOV3):
    """A teacher that DINOv3's code trained by its defaults: no storage tokens, no mask, periods in float32."""
    state = dinov3_hub(config)
    state = {name: tensor for name, tensor in state.items() if not name.endswith("bias_mask")}
    state["rope_embed.periods"] = torch.tensor(100.0) ** (torch.arange(16) / 16)
    heads = {"dino_head.mlp.0.weight": torch.zeros(3, 3), "ibot_head.last_layer.weight": torch.zeros(3)}
    return {"teacher": {f"backbone.{name}": tensor for name, tensor in state.items()} | heads}


def dinov3_transformers(config=DINOV3):
    """The published names, before transformers 5 moved layers into `model`."""
    state = {name.removeprefix("model."): a for name, a in state_of(randomise(build_dinov3(config))).items()}
    assert "layer.0.attention.q_proj.weight" in state
    return tensors(state)


def tensors(state):
    return {name: torch.tensor(array) for name, array in state.items()}


OFFICIAL = {
    "deit3": (deit3, {}, DEIT3),
    "dino": (dino, {}, replace(PLAIN, resampling="bicubic_offset")),
    "ibot": (
        ibot,
        {},
        ViTConfig(**TINY, final_norm="pooled", pool="mean", resampling="bicubic_offset", mask_token=True),
    ),
    "clip/openai": (openai, {}, replace(CLIP, resampling="bicubic")),
    "clip/transformers": (clip_transformers, {"config": {"mlp": "quick_gelu"}}, replace(CLIP, resampling="bicubic")),
    "dinov3/hub": (dinov3_hub, {}, replace(DINOV3, rope="bfloat16", grid=(14, 14), mask_token=True)),
    "dinov3/hub gated": (
        lambda: dinov3_hub(GATED),
        {},
        replace(GATED, rope="bfloat16", grid=(14, 14), mask_token=True),
    ),
    "dinov3/hub trained": (dinov3_trained, {}, replace(OWN_DINOV3, grid=(14, 14))),
    "dinov3/transformers": (dinov3_transformers, {}, replace(DINOV3, grid=(14, 14), mask_token=True)),
    "dinov3/transformers gated": (
        lambda: dinov3_transformers(GATED),
        {},
        replace(GATED, grid=(14, 14), mask_token=True),
    ),
}
"""Layout -> a file in it, what has to be said beside it, and the config it must be read as."""

CHANNELS = {
    "timm, 1 channel": lambda: timm_model(in_chans=1),
    "timm, 4 channels": lambda: timm_model(in_chans=4, reg_tokens=2),
    "dinov2, 1 channel": lambda: build_transformers(ViTConfig(**TINY, channels=1)),
    "dinov3/timm, 4 channels": lambda: build_dinov3_timm(replace(DINOV3, channels=4)),
    "dinov3, 2 channels": lambda: build_dinov3(replace(DINOV3, channels=2)),
    "clip, 4 channels": lambda: build_clip(replace(CLIP, channels=4, mlp="gelu")),
}
MODULES = {
    **CHANNELS,
    "dinov3/timm": lambda: build_dinov3_timm(replace(DINOV3, pool="mean")),
    "dinov3/timm gated": lambda: build_dinov3_timm(GATED, gates=2),
    "clip/transformers module": lambda: build_clip(replace(CLIP, mlp="gelu")),
    "dinov2 classifier": lambda: build_transformers(ViTConfig(**TINY, registers=2, classes=7, pool="cls_mean")),
    "timm, all norms": lambda: timm_model(qk_norm=True, scale_attn_norm=True, scale_mlp_norm=True, pre_norm=True),
    "timm, registers with positions": lambda: timm_model(reg_tokens=2, global_pool="avg", act_layer="gelu_tanh"),
    "timm, no positions": lambda: timm_model(pos_embed="none", reg_tokens=1, final_norm=False),
}


def timm_model(**changes):
    sizes = dict(img_size=16, patch_size=4, embed_dim=128, depth=2, num_heads=2, num_classes=5, dynamic_img_size=True)
    return timm.models.vision_transformer.VisionTransformer(**sizes, **changes)


def assert_equal(model, original, sizes=((4, 4), (2, 8), (8, 2))):
    """By the standard of `convert.verify`, at the native size and others of as many tokens, which run one program.

    In models so small, the quotient of two largest float32 errors is a matter of luck: at every site and layer, that of
    the middle one of three runs counts.
    """
    p, ratios = model.config.patch, []
    for seed, (rows, columns) in enumerate(sizes):
        images = random_images(model, Size(rows * p, columns * p), seed=seed, tokens=500)
        found = compare(model, original, images, defaults=False)
        assert {"resid_pre", "q", "k", "pattern", "final", "pooled"} <= set(found.float64)
        assert ("head" in found.float64) == (model.config.classes + model.config.projection > 0)
        assert found.worst64() <= 1e-10, found.float64
        ratios.append(np.concatenate([found.ratios()[site] for site in FLOAT32_SITES]))
    assert len(ratios) == 3 and np.median(ratios, axis=0).max() <= 2, ratios


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_files(name):
    make, known, config = OFFICIAL[name]
    file = make()
    model = convert.load(file, **known)
    assert replace(model.config, preprocess=config.preprocess) == config
    assert_equal(model, original_of(file, **known))


@pytest.mark.parametrize("name", CHANNELS)
def test_channels(name):
    """Read off the tensors; images of others are refused; a state dict tells as much as a module."""
    module = randomise(MODULES[name]())
    model, (expected,) = convert.load(module), re.findall(r"\d", name.partition(",")[2])
    assert model.config.channels == int(expected) and f"images of {expected} channels" in model.config.in_words()
    words = rf"images have shape \(1, 16, 16, 3\); expected \[batch, height, width, {expected} channels\]"
    with pytest.raises(ValueError, match=words):
        model(jnp.zeros((1, 16, 16, 3)))
    told = {field: getattr(model.config, field) for field in ("heads", "mlp", "eps", "pool", "final_norm")}
    again = convert.load(state_dict(model, "timm" if "timm" in name else "transformers"), config=told)
    assert np.array_equal(again.patch_embed.kernel[...], model.patch_embed.kernel[...])


@pytest.mark.parametrize("name", MODULES)
def test_live_modules(name):
    module = randomise(MODULES[name]())
    assert_equal(convert.load(module), original_of(module), [(2, 8)] * 3)


@pytest.mark.parametrize("quick", [True, False])
def test_open_clip(quick):
    """A whole CLIP of OpenCLIP, by its own code, whose names are OpenAI's: every block, and the projection."""
    open_clip = pytest.importorskip("open_clip.model")
    vision = open_clip.CLIPVisionCfg(layers=2, width=128, head_width=64, patch_size=4, image_size=16)
    text = open_clip.CLIPTextCfg(context_length=8, vocab_size=50, width=64, heads=2, layers=1)
    whole = randomise(open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text, quick_gelu=quick))
    with jax.enable_x64(True):
        model = convert.load(whole.state_dict(), config={"mlp": "quick_gelu" if quick else "gelu"}, dtype="float64")
    visual, stream = whole.visual, []
    for block in visual.double().transformer.resblocks:
        block.register_forward_hook(lambda _, inputs, output: stream.append(output.numpy()))
    images = random_images(model, Size(16, 16), tokens=100).astype(np.float32)
    with torch.inference_mode():
        projected = visual(torch.tensor(images, dtype=torch.float64).permute(0, 3, 1, 2)).numpy()
    with jax.enable_x64(True):
        run = jax.jit(lambda model, images: model(images, record="resid_post"))
        out = run(model, jnp.asarray(images, jnp.float64))
    np.testing.assert_allclose(out.trace["resid_post"], np.stack(stream), rtol=0, atol=1e-12)
    np.testing.assert_allclose(out.projection, projected, rtol=0, atol=1e-12)


def test_teacher_or_student():
    file = dino()
    teacher, student = (convert.load(file, branch=branch) for branch in ("teacher", "student"))
    default = convert.load(file)
    assert np.array_equal(teacher.cls[...], default.cls[...]) and not np.array_equal(teacher.cls[...], student.cls[...])
    expected = state_of(randomise(build_timm(PLAIN, positioned=True), seed=1))
    np.testing.assert_array_equal(student.norm.scale[...], expected["norm.weight"])
    with pytest.raises(ConversionError, match="holds no student"):
        convert.load(file["teacher"], branch="student")


def test_a_bare_clip_is_asked_for_its_activation(tmp_path):
    for file in (openai(archive=False), clip_transformers()):
        with pytest.raises(ConversionError, match=r"do not tell its activation.*quick_gelu"):
            convert.load(file)
        assert convert.load(file, config={"mlp": "gelu"}).config.mlp == "gelu"


def test_a_large_clip_is_asked_for_its_heads():
    found = dict(depth=32, width=1280, hidden=5120, patch=14, grid=(16, 16))
    with pytest.raises(ConversionError, match=r"width 1280 do not tell its number of heads.*heads=16"):
        clip.decided(found, {"mlp": "gelu"})
    assert clip.decided(found, {"mlp": "gelu", "heads": 16}).config.head_size == 80


def test_a_config_given_must_be_one():
    with pytest.raises(ConversionError, match="a config has no activation"):
        convert.load(openai(), config={"activation": "gelu"})
    with pytest.raises(ConversionError, match="depth 2, not 3"):
        convert.load(openai(), config={"depth": 3})


def test_rotary_periods_must_be_those_of_the_config():
    file = dinov3_hub()
    file["rope_embed.periods"] = file["rope_embed.periods"] * 2
    with pytest.raises(ConversionError, match=r"rope_embed\.periods are not those of base 100"):
        convert.load(file)


def test_what_trained_dinov3_assumes_and_asks():
    """Storage tokens, mask and periods show which model it is; of some other mixture, epsilon is asked for."""
    file = dinov3_trained()
    _, provenance = convert.load_described(file)
    said = {line.split()[0]: line for line in provenance.assumptions}
    assert "eps 1e-06 (the default of DINOv3's training code" in said["eps"] and "keys too" in said["qkv_bias"]
    assert "heads" not in said and "rope" not in said
    assert "eps" not in str(convert.load_described(file, config={"eps": 1e-5})[1].assumptions)
    state = {name.removeprefix("backbone."): a for name, a in file["teacher"].items() if name.startswith("backbone.")}
    for other in (
        state | {"storage_tokens": torch.ones(1, 3, 128)},
        state | {"rope_embed.periods": dinov3_hub()["rope_embed.periods"]},
        {name: a for name, a in dinov3_hub().items() if name != "storage_tokens"},
    ):
        with pytest.raises(ConversionError, match=r"--set eps=1e-6 .* layernormbf16"):
            convert.load(other)
        model = convert.load(other, config={"eps": 1e-5})
        assert model.config.eps == 1e-5 and model.config.registers == (3 if "storage_tokens" in other else 0)
    published = convert.load_described(dinov3_hub())[1].assumptions
    assert not {"eps", "qkv_bias", "rope", "heads"} & {line.split()[0] for line in published}


def test_a_key_bias_counts_where_nothing_masks_it():
    file = dinov3_trained()["teacher"]
    state = {name: a for name, a in file.items() if name.startswith("backbone.")}
    zeroed = {
        name: a * (torch.arange(384) // 128 != 1) if name.endswith("qkv.bias") else a for name, a in state.items()
    }
    images = jnp.asarray(np.random.default_rng(0).normal(size=(1, 16, 16, 3)), jnp.float32)
    assert np.abs(convert.load(state)(images).cls - convert.load(zeroed)(images).cls).max() > 1e-3
    some = {name: a for name, a in dinov3_hub().items() if name != "blocks.1.attn.qkv.bias_mask"}
    with pytest.raises(ConversionError, match=r"blocks\.1\.attn\.qkv\.bias_mask is missing"):
        convert.load(some)


def test_periods_tell_heads_and_base():
    state = dinov3_hub()
    with pytest.raises(ConversionError, match=r"heads of 64 numbers at width 128, not to 4 heads"):
        convert.load(state, config={"heads": 4})
    state["rope_embed.periods"] = (torch.tensor(50.0) ** (torch.arange(16) / 16)).bfloat16()
    with pytest.raises(ConversionError, match=r"not those of base 100, .* --set rope_base="):
        convert.load(state)
    config = convert.load(state, config={"rope_base": 50}).config
    assert (config.rope_base, config.rope) == (50, "bfloat16")


@pytest.mark.parametrize("size, bias", [("small", ""), ("small", "_qkvb"), ("7b", "")])
def test_timm_folders_of_dinov3(tmp_path, size, bias):
    name = f"vit_{size}_patch16_dinov3{bias}"
    with torch.device("meta"):
        full = timm.create_model(name, depth=1)
    assert full.global_pool == "avg" and full.rope.temperature == 100.0 and full.blocks[0].norm1.eps == 1e-5
    module = randomise(build_dinov3_timm(replace(DINOV3, pool="mean", qkv_bias=bool(bias))))
    write_safetensors(tmp_path / "model.safetensors", state_of(module))
    prepared = {"input_size": [3, 32, 32], "crop_pct": 1.0, "mean": [0.5] * 3, "std": [0.25] * 3}
    content = {"architecture": f"{name}.lvd1689m", "num_classes": 0, "global_pool": "avg", "pretrained_cfg": prepared}
    (tmp_path / "config.json").write_text(
        json.dumps(content | {"model_args": {"num_heads": 2, "qkv_bias": bool(bias)}})
    )
    assert replace(convert.load(tmp_path).config, grid=(4, 4)) == replace(
        convert.load(module).config,
        grid=(4, 4),
        preprocess=jaxvit.Preprocess(32, 32, (0.5,) * 3, (0.25,) * 3, margin="round"),
    )


def test_all_of_timm_s_dinov3_are_known():
    names = {name for name in timm.list_models() if "dinov3" in name and name.startswith("vit_")}
    assert {name for name in names if plain.DINOV3.fullmatch(name)} == names and len(names) >= 6


def test_the_largest_has_wider_heads():
    """Of the 7B's shapes: 32 heads of 128, which its 32 periods show and its config.json says."""
    D = 4096
    shapes = {"patch_embed.proj.weight": (D, 3, 16, 16), "cls_token": (1, 1, D), "storage_tokens": (1, 4, D)}
    block = {"norm1.weight": (D,), "attn.qkv.weight": (3 * D, D), "ls1.gamma": (D,)}
    block |= {"mlp.w1.weight": (2 * D, D), "mlp.w2.weight": (2 * D, D), "mlp.w3.weight": (D, 2 * D)}
    shapes |= {f"blocks.{i}.{name}": shape for i in range(40) for name, shape in block.items()}
    state = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    state["rope_embed.periods"] = rope_periods(128, 100.0, "bfloat16").astype(np.float32)
    config = dinov3.hub_config(state, {}).config
    (published,) = [each.config for each in known() if each.name == "7B/16"]
    assert config == replace(published, rope="bfloat16", qkv_bias=config.qkv_bias, preprocess=config.preprocess)
    assert (config.heads, config.head_size, config.hidden) == (32, 128, 8192)


def test_both_conventions_of_periods_differ():
    """In float32 and rounded: the same weights give other features, so that it matters which are taken."""
    model = convert.load(dinov3_transformers())
    images = jnp.asarray(random_images(model, Size(16, 16)), jnp.float32)
    rounded = jaxvit.model.params.from_params(replace(model.config, rope="bfloat16"), to_params(model))
    difference = jnp.abs(model(images).cls - rounded(images).cls).max()
    assert 1e-6 < difference < 0.1


# Rotary positions and the laws ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rotary():
    return convert.load(dinov3_transformers())


def test_rotary_runs_from_any_layer_and_wants_the_grid(rotary):
    images = jnp.asarray(random_images(rotary, Size(8, 24))[:2], jnp.float32)
    run = jax.jit(lambda m, x: m(x, record="resid_pre"))
    out = run(rotary, images)
    again = jax.jit(lambda m, x: m.run_from(1, x, grid=(2, 6)))(rotary, out.trace["resid_pre"][1])
    np.testing.assert_allclose(again.tokens, out.tokens, atol=1e-5)
    turned = jax.jit(lambda m, x: m.run_from(1, x, grid=(6, 2)))(rotary, out.trace["resid_pre"][1])
    assert np.abs(turned.tokens - out.tokens).max() > 1e-3
    for grid in (None, (3, 3)):
        with pytest.raises(ValueError, match="give the grid of the images"):
            rotary.run_from(1, out.trace["resid_pre"][1], grid=grid)


def test_rotary_sweeps_and_removed_registers(rotary):
    images = jnp.asarray(random_images(rotary, Size(8, 12))[:2], jnp.float32)
    from jaxvit import ablate, grids, remove_registers, sweep

    swept = sweep(
        rotary,
        images,
        lambda point, clean: ablate(rotary, "z", layers=point["layer"], heads=point["head"]),
        grids.heads(rotary),
        lambda out, clean: out.cls.sum(-1),
        progress=False,
    )
    run = jax.jit(lambda m, x, e: m(x, e).cls.sum(-1))
    one = run(rotary, images, ablate(rotary, "z", layers=1, heads=0))
    np.testing.assert_allclose(swept.values[1, 0], one, rtol=2e-5)
    params = {name: a for name, a in to_params(rotary).items() if name != "registers"}
    without = jaxvit.model.params.from_params(replace(rotary.config, registers=0), params)
    cut = jax.jit(lambda m, x, e: m(x, e).cls)(rotary, images, remove_registers(rotary))
    np.testing.assert_allclose(cut, jax.jit(lambda m, x: m(x).cls)(without, images), atol=1e-5)


# Models without a class token -----------------------------------------------------------------------------------------


def test_models_without_a_class_token():
    module = randomise(timm_model(class_token=False, global_pool="avg", reg_tokens=2, no_embed_class=True))
    model = convert.load(module)
    images = jnp.asarray(random_images(model, Size(16, 16))[:2], jnp.float32)
    out = model(images, record="pattern")
    assert out.cls is None and out.registers.shape == (2, 2, 128) and out.trace["pattern"].shape == (2, 2, 2, 2, 18)
    assert model.layout.group_names == ("register 0", "register 1", "patches")
    pixels = torch.tensor(np.asarray(images)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        np.testing.assert_allclose(out.logits, module(pixels).numpy(), atol=1e-5)
    with pytest.raises(ValueError, match=r"no \[CLS\]: give a metric"):
        jaxvit.sweep(model, images, lambda p, c: jaxvit.ablate(model, "z", heads=p["head"]), jaxvit.Grid(head=range(2)))
    with pytest.raises(ValueError, match="cls"):
        jaxvit.knockout(model, query="cls", key="registers")
    jaxvit.knockout(model, query="register 1", key="patches")


# timm's names ---------------------------------------------------------------------------------------------------------


def test_the_table_of_architectures_is_what_timm_says():
    """Every name of timm's two files is there, and is refused or has the facts of timm's model."""
    from benchmarks.architectures import names

    known = plain.architectures()
    assert set(names()) == set(known)
    refused = {name for name, facts in known.items() if "refused" in facts}
    assert len(known) - len(refused) >= 160
    for name in ("vit_base_patch16_xp_224", "vit_small_patch16_18x2_224", "vit_base_patch16_rpn_224"):
        assert name in refused
        with pytest.raises(ConversionError, match=f"{name}.some_tag cannot be converted: .*"):
            plain.architecture_hints(f"{name}.some_tag")
    with pytest.raises(ConversionError, match="none of timm's plain Vision Transformers"):
        plain.architecture_hints("resnet50")


KINDS = (
    "aimv2_large_patch14_224",
    "beit3_base_patch16_224",
    "deit3_small_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "eva_large_patch14_196",
    "flexivit_small",
    "vit_base_patch14_reg1_tipsv2",
    "vit_base_patch16_clip_224",
    "vit_base_patch16_clip_quickgelu_224",
    "vit_base_patch16_gap_224",
    "vit_base_patch16_radio_v3",
    "vit_base_patch16_siglip_224",
    "vit_base_patch32_siglip_gap_256",
    "vit_giant_patch14_reg4_dinov2",
    "vit_intern300m_patch14_448",
    "vit_medium_patch16_gap_240",
    "vit_so150m2_patch16_reg1_gap_256",
    "vit_so150m_patch16_reg4_map_256",
    "vit_tiny_patch16_224",
    "test_vit4",
)
"""One name of every kind; docs/architectures.md has been measured for all of them."""


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_architectures(name, tmp_path):
    """As a folder that timm saves, whose config.json names the architecture; narrow, so that it is quick."""
    from benchmarks.architectures import build, facts

    known = plain.architectures()[name]
    found = json.loads(json.dumps(facts(name, depth=1)))
    assert found["shape"] == [1, *known["shape"][1:]] and found | {"shape": known["shape"]} == known
    narrow = {"test_vit4": {}, "vit_giant_patch14_reg4_dinov2": dict(embed_dim=96, num_heads=24)}
    heads = known["heads"]
    changes = narrow.get(name, dict(embed_dim=16 * heads, num_heads=heads))
    module = randomise(build(name, depth=1, **changes))
    write_safetensors(tmp_path / "model.safetensors", state_of(module))
    content = {"architecture": name, "num_classes": module.num_classes, "pretrained_cfg": {}}
    content["model_args"] = {"depth": 1, "embed_dim": module.embed_dim}
    (tmp_path / "config.json").write_text(json.dumps(content))
    model = convert.load(tmp_path)
    live = convert.load(module)
    assert replace(model.config, preprocess=live.config.preprocess, grid=live.config.grid) == live.config
    size = Size(2 * model.config.patch, 3 * model.config.patch)
    found = compare(model, original_of(module), random_images(model, size, tokens=60), defaults=False)
    assert found.worst64() <= 1e-10, found.float64

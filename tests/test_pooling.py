"""timm's poolings and what else changes an architecture, and MAE's fine-tuned models: against timm's own numbers."""

import argparse
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
pytest.importorskip("transformers")

from layouts import write_safetensors

import convert
import jaxvit
from benchmarks.originals import randomise
from convert import ConversionError
from convert.originals import original_of
from convert.verify import Size, compare, random_images

SIZES = dict(img_size=32, patch_size=16, embed_dim=192, depth=1, num_heads=3, num_classes=5, mlp_ratio=0.5)
"""Of the width of timm's vit_tiny; 4 patches."""


def vit(**changes):
    return randomise(timm.models.vision_transformer.VisionTransformer(**{**SIZES, **changes})).eval()


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


IMAGES = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
PIXELS = torch.tensor(IMAGES).permute(0, 3, 1, 2)


def logits_of(model):
    with jax.enable_x64(True):
        return np.asarray(jaxvit.cast(model, "float64")(jnp.asarray(IMAGES, "float64")).logits)


def theirs(module):
    with torch.inference_mode():
        return module.double()(PIXELS.double()).numpy()


def close(ours, theirs):
    """float32 weights in float64: only [CLS] plus its position was rounded."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def assumed(source, **known):
    model, provenance = convert.load_described(source, **known)
    return model, {line.split(" ")[0]: line for line in provenance.assumptions}


def fails(source, *words, **known):
    with pytest.raises(ConversionError) as raised:
        convert.load(source, **known)
    assert [word for word in words if word not in str(raised.value)] == [], raised.value


# The norm behind the pool ---------------------------------------------------------------------------------------------


def mae_file(module):
    """As MAE's main_finetune.py writes it: the names of its VisionTransformer(global_pool=True), and its settings."""
    state = state_of(module)
    assert "fc_norm.weight" in state and "head.weight" in state and "norm.weight" not in state
    return {"model": state, "optimizer": {"state": {}}, "epoch": 99, "scaler": {}, "args": argparse.Namespace(lr=1.0)}


def mae_logits(module):
    """The forward pass of facebookresearch/mae's models_vit.py, over the same parts."""
    m, x = module.double(), PIXELS.double()
    with torch.inference_mode():
        x = m.patch_embed(x)
        x = torch.cat([m.cls_token.expand(len(x), -1, -1), x], dim=1) + m.pos_embed
        for block in m.blocks:
            x = block(x)
        return m.head(m.fc_norm(x[:, 1:, :].mean(dim=1))).numpy()


def test_mae_fine_tuned_with_mean_pooling(tmp_path):
    module = vit(global_pool="avg", fc_norm=True)
    torch.save(mae_file(module), tmp_path / "mae_finetuned_vit_tiny.pth")
    model, said = assumed(tmp_path / "mae_finetuned_vit_tiny.pth")
    assert (model.config.pool, model.config.final_norm, model.config.eps) == ("mean", "pooled", 1e-6)
    assert {"pool", "eps", "resampling", "preprocess"} <= set(said) and "MAE" in said["pool"]
    again = original_of(tmp_path / "mae_finetuned_vit_tiny.pth")
    found = compare(model, again, random_images(model, Size(32, 32), tokens=20), defaults=False)
    assert found.worst64() <= 1e-10 and "head" in found.float64
    close(logits_of(model), mae_logits(module))
    close(logits_of(model), theirs(module))


def test_it_is_no_mean_of_normalised_tokens():
    module = vit(global_pool="avg", fc_norm=True)
    other = {name.replace("fc_norm", "norm"): tensor for name, tensor in state_of(module).items()}
    one, two = convert.load(state_of(module)), convert.load(other, config={"pool": "mean"})
    assert np.abs(logits_of(one) - logits_of(two)).max() > 0.01


@pytest.mark.parametrize("pool, fc_norm", [("avg", None), ("avg", False), ("token", None), ("token", True)])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k"])
def test_an_architecture_with_another_pooling(name, pool, fc_norm):
    module = vit(global_pool=pool, fc_norm=fc_norm)
    known = {"architecture": name, "config": {"depth": len(module.blocks), "width": module.embed_dim}}
    if (pool, fc_norm) in (("avg", False), ("token", True)):  # the norm does not stand where timm puts it
        known["config"]["pool"] = {"avg": "mean", "token": "cls"}[pool]
    model, said = assumed(state_of(module), **known)
    assert ("pool" in said) == ((pool, fc_norm) == ("avg", None))
    close(logits_of(model), theirs(module))


# model_args -----------------------------------------------------------------------------------------------------------


def folder(path, module, arguments, architecture="vit_tiny_patch16_224", **content):
    write_safetensors(path / "model.safetensors", {n: t.numpy() for n, t in state_of(module).items()})
    content |= {"architecture": architecture, "model_args": arguments, "pretrained_cfg": {}}
    (path / "config.json").write_text(json.dumps(content))
    return path


PLAIN = dict(img_size=32, embed_dim=192, depth=1, mlp_ratio=0.5, num_classes=5, num_heads=3, patch_size=16)
CHANGES = {
    "shown or idle": dict(
        in_chans=3, qkv_bias=True, drop_path_rate=0.1, drop_rate=0.0, weight_init="", class_token=True
    ),
    "heads": dict(num_heads=12),
    "no bias": dict(qkv_bias=False, qk_norm=True, init_values=1e-5, reg_tokens=2),
    "average": dict(global_pool="avg"),
    "average of tokens": dict(global_pool="avg", fc_norm=False),
    "pooled token": dict(fc_norm=True),
    "attention": dict(global_pool="map", pool_include_prefix=True),
    "activation": dict(act_layer="quick_gelu"),
    "no norm": dict(final_norm=False),
    "no class token": dict(class_token=False, global_pool="avg", final_norm=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_arguments_of_a_folder(tmp_path, change):
    """As timm reads them: the architecture, then model_args."""
    arguments = PLAIN | CHANGES[change]
    module = randomise(timm.create_model("vit_tiny_patch16_224", **arguments)).eval()
    model, said = assumed(folder(tmp_path, module, arguments))
    assert set(said) <= {"preprocess"}
    assert replace(model.config, preprocess=jaxvit.Preprocess()) == replace(
        convert.load(module).config, preprocess=jaxvit.Preprocess()
    )
    close(logits_of(model), theirs(module))


def test_arguments_that_are_refused(tmp_path):
    module = vit()
    for name, value in {"act_layer": "relu", "norm_layer": "rmsnorm", "block_fn": "other", "foo": 1}.items():
        fails(folder(tmp_path, module, PLAIN | {name: value}), "changes the architecture", name, "not known here")
    fails(folder(tmp_path, module, PLAIN | {"qkv_bias": False}), "qkv_bias True, not False")
    fails(folder(tmp_path, module, PLAIN | {"embed_dim": 384}), "width 192, not 384")
    fails(folder(tmp_path, module, PLAIN | {"num_heads": 7}), "heads, 7")
    fails(folder(tmp_path, module, PLAIN | {"num_heads": "three"}), "heads is 'three'")
    fails(folder(tmp_path, module, PLAIN | {"global_pool": "avgmax"}), "the pooling 'avgmax'")
    fails(folder(tmp_path, module, PLAIN | {"global_pool": "avg"}, global_pool="token"), "several poolings")
    fails(folder(tmp_path, module, PLAIN | {"global_pool": "avg", "pool_include_prefix": True}), "includes the tokens")
    fails(folder(tmp_path, module, [1]), "model_args [1]")


# Models that pool nothing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [0, 5])
@pytest.mark.parametrize("cls", [True, False])
def test_a_live_model_that_leaves_tokens_as_they_are(cls, classes):
    module = vit(global_pool="", num_classes=classes, class_token=cls, reg_tokens=1)
    model, said = assumed(module)
    assert model.config.pool == ("cls" if cls else "mean") and "returns all tokens" in said["pool"]
    found = compare(model, original_of(module), random_images(model, Size(32, 32), tokens=20), defaults=False)
    assert found.worst64() <= 1e-10 and {"final", "pooled"} <= set(found.float64)
    assert ("head" in found.float64) == (classes > 0)
    told, said = assumed(module, config={"pool": "mean"})
    assert told.config.pool == "mean" and "pool" not in said


def test_a_folder_of_a_model_that_leaves_tokens_as_they_are(tmp_path):
    module = vit(global_pool="")
    model, said = assumed(folder(tmp_path, module, PLAIN | {"global_pool": ""}, global_pool=""))
    assert model.config.pool == "cls" and "returns all tokens" in said["pool"]


def test_a_live_dinov3_of_every_pooling():
    from convert.originals import build_dinov3_timm
    from jaxvit import ViTConfig

    sizes = dict(depth=1, width=64, heads=1, hidden=64, patch=4, grid=(4, 4), registers=2)
    module = randomise(build_dinov3_timm(ViTConfig(**sizes, positions=False, rope="float32", eps=1e-5)))
    module.global_pool = ""
    model, said = assumed(module)
    assert model.config.pool == "cls" and "returns all tokens" in said["pool"]
    found = compare(model, original_of(module), random_images(model, Size(16, 16), tokens=20), defaults=False)
    assert found.worst64() <= 1e-10
    module.global_pool = "avgmax"
    fails(module, "this Eva cannot be converted", "'avgmax'")

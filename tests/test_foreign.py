"""What a foreign checkpoint looks like: one sentence that names it. From live models where they are cheap.

Names written by hand are those of published files.
"""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
torchvision = pytest.importorskip("torchvision")

from layouts import hub_state, numbers, tiny, transformers_state

import convert
from convert import LAYOUTS, ConversionError
from convert.foreign import describe_foreign, describe_foreign_extras

SIZES = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=16
)
TEXT = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=10)
TEXT |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
SMALL = dict(depth=1, embed_dim=16, num_heads=2)

LIVE = {
    "a transformers ViT": lambda: transformers.ViTModel(transformers.ViTConfig(**SIZES)),
    "a BEiT": lambda: transformers.BeitModel(transformers.BeitConfig(**SIZES, use_relative_position_bias=True)),
    "a SigLIP": lambda: transformers.SiglipModel(
        transformers.SiglipConfig(vision_config=dict(SIZES), text_config=dict(TEXT))
    ),
    "a masked autoencoder": lambda: transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            **SIZES,
            decoder_hidden_size=16,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=16,
        )
    ),
    "a language model of Llama's kind": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)),
    "a language model of BERT's kind": lambda: transformers.BertModel(transformers.BertConfig(**TEXT)),
    "a language model of GPT's kind": lambda: transformers.GPT2Model(
        transformers.GPT2Config(vocab_size=10, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2)
    ),
    "the text side of a CLIP": lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)),
    "a Swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1), embed_dim=8, num_heads=(2, 2)
    ),
    "a ConvNeXt": lambda: timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)),
    "a ConvNeXt ": lambda: transformers.ConvNextModel(
        transformers.ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])
    ),
    "an EVA": lambda: timm.create_model("eva_giant_patch14_224", img_size=28, **SMALL),
    "a BEiT ": lambda: timm.create_model("beit_base_patch16_224", img_size=32, **SMALL),
    "torchvision's ViT": lambda: torchvision.models.VisionTransformer(32, 16, 1, 2, 16, 16),
    "a Swin ": lambda: torchvision.models.SwinTransformer([4, 4], 8, [1, 1], [2, 2], [4, 4]),
    "a ResNet": lambda: timm.create_model("resnet10t"),
    "a convolutional network": lambda: timm.create_model("efficientnet_b0"),
}
BY_NAME = {
    "a LoRA or an adapter": ["base_model.model.encoder.layer.0.attention.attention.query.lora_A.weight"],
    "a LoRA or an adapter ": ["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"],
    "a quantised model": ["model.layers.0.self_attn.q_proj.qweight", "model.layers.0.self_attn.q_proj.scales"],
    "a quantised model ": ["encoder.layer.0.mlp.fc1.weight", "encoder.layer.0.mlp.fc1.SCB"],
    "a quantised model  ": ["h.0.attn.c_attn.weight.absmax", "h.0.attn.c_attn.weight.quant_map"],
    "the state of an optimizer": ["optimizer.state.0.exp_avg", "optimizer.state.0.exp_avg_sq"],
    "the weights of a jaxvit model": ["blocks.attn.qkv.kernel", "blocks.attn.qkv.bias", "cls"],
    "a Flax checkpoint": ["params/Transformer/encoderblock_0/LayerNorm_0/scale", "params/embedding/kernel"],
    "a Keras": ["vit/embeddings/patch_embeddings/projection/kernel:0"],
    "a CLIP whose image side is a ResNet": ["visual.layer1.0.conv1.weight", "visual.attnpool.positional_embedding"],
    "a Stable Diffusion": ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.quant_conv.weight"],
    "a diffusion model's UNet": ["down_blocks.0.resnets.0.conv1.weight", "time_embedding.linear_1.weight"],
    "a diffusion model's VAE": ["encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.up_blocks.0.conv.weight"],
    "a diffusion Transformer": ["transformer_blocks.0.attn.to_q.weight", "x_embedder.weight"],
    "a Segment Anything": ["image_encoder.blocks.0.attn.rel_pos_h", "mask_decoder.iou_token.weight"],
    "a masked autoencoder ": ["mask_token", "decoder_embed.weight", "decoder_blocks.0.norm1.weight"],
    "a language model of T5's kind": ["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"],
    "a BEiT  ": ["beit.encoder.layer.0.attention.attention.relative_position_bias.relative_position_bias_table"],
    "a transformers ViT ": ["vit.encoder.layer.0.layernorm_before.weight", "vit.embeddings.cls_token"],
    "the text side of a CLIP ": ["token_embedding.weight", "text_projection", "ln_final.weight"],
    "an EVA ": ["blocks.0.attn.q_bias", "blocks.0.attn.inner_attn_ln.weight", "rope.freqs_cos"],
}


def refusal(state):
    """The message: one line."""
    with pytest.raises(ConversionError) as raised:
        convert.load(state)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("what", LIVE, ids=str.split)
def test_live_models(what):
    state = LIVE[what]().state_dict()
    assert f"it looks like {what.strip()}" in refusal(state)


@pytest.mark.parametrize("what", BY_NAME)
def test_names(what):
    state = {name: np.zeros((2, 2), np.float32) for name in BY_NAME[what]}
    message = refusal(state)
    assert message.startswith(f"not a checkpoint of a known layout: it looks like {what.strip()}")
    assert f"; {BY_NAME[what][0]}" not in message and f"it looks like {what.strip()}" in message
    assert message.count("looks like") == 1 and BY_NAME[what][0] in message


@pytest.mark.parametrize(
    "state, what",
    [
        ({"state": {0: {"exp_avg": np.zeros(3)}}, "param_groups": []}, "the state of an optimizer"),
        ({"metadata": {}, "weight_map": {"a": "b"}}, "the index of a checkpoint in shards"),
    ],
    ids=["optimizer", "index"],
)
def test_what_is_no_state_dict(state, what):
    message = refusal(state)
    assert "not a state dict" in message and f"it looks like {what}" in message


def test_files_of_json(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {}}))
    message = refusal(path)
    assert "holds no tensors" in message and f"give the folder that holds it, {tmp_path}" in message


HUB = hub_state(tiny(), numbers(tiny()))
MORE = {
    "a LoRA": "blocks.0.attn.qkv.lora_A.weight",
    "a quantised model": "blocks.0.attn.qkv.SCB",
    "the state of an optimizer": "optimizer.0.exp_avg",
    "a masked autoencoder with its decoder": "decoder_embed.weight",
    "an EVA": "blocks.0.attn.q_bias",
    "a BEiT": "blocks.0.attn.relative_position_bias_table",
}


@pytest.mark.parametrize("what", MORE)
def test_a_known_layout_with_more(what):
    message = refusal(HUB | {MORE[what]: np.zeros((2, 2), np.float32)})
    assert message.startswith("not a complete dinov2/hub checkpoint: ")
    assert f"{MORE[what]} is not expected" in message and f"it looks like {what}" in message
    assert message.count("looks like") == 1


def test_a_published_vit_is_no_dinov2():
    """Its file has most of DINOv2's names."""
    theirs = transformers_state(tiny(), numbers(tiny()), prefix="vit.")
    names = {
        name: name.replace(".norm1.", ".layernorm_before.").replace(".mlp.fc1.", ".intermediate.dense.")
        for name in theirs
    }
    message = refusal({names[name]: array for name, array in theirs.items()})
    assert "not a checkpoint of a known layout" in message and "it looks like a transformers ViT" in message


def test_nearest_layout():
    """Of a checkpoint that lacks one of the names its layout is known by, the layout and the name are said."""
    lacking = {name: array for name, array in HUB.items() if name not in ("cls_token", "blocks.0.attn.qkv.weight")}
    message = refusal(lacking)
    assert "it is nearest to timm, but lacks blocks.0.attn.qkv.weight; its 33 tensors" in message
    assert "nearest" not in refusal({"a": np.zeros(3, np.float32)})


def test_known_layouts_look_like_nothing_else():
    state = transformers_state(tiny(), numbers(tiny()))
    assert describe_foreign(HUB) == describe_foreign(state) == describe_foreign([]) == ""
    for layout in LAYOUTS:
        assert describe_foreign(layout.anchors) == describe_foreign_extras(layout.anchors) == "", layout.name

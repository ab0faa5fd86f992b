"""CLIP's image encoders: OpenAI's archives and OpenCLIP's files, which share their names, and transformers'.

Only the image encoder is converted; the text encoder is ignored by name. The projection into the space shared with
texts is `Output.projection`. OpenAI trained with an approximation of GELU, OpenCLIP mostly with GELU itself, and the
tensors do not tell: OpenAI's archives are known by the three numbers they hold beside their tensors, others need a
config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxvit import Preprocess, ViTConfig

from .engine import (
    ConversionError,
    Decided,
    Layout,
    Rule,
    Tensors,
    copy,
    joined_linear,
    linear,
    matrix,
    norm,
    patch_conv,
)
from .meta import count_blocks, decide, grid_of, shape_of, square, token_rules, with_heads
from .preparation import OPENAI as CLIPS

TEXT = "the text side of CLIP"
NUMBERS = ("input_resolution", "context_length", "vocab_size")
"""What OpenAI's archives hold beside their tensors."""
VISUAL, TOWER = "visual.", "vision_model."
"""What stands before the names of the image encoder in a whole CLIP: OpenAI's, and transformers'."""


def decided(found: dict[str, Any], hints: Mapping[str, Any], of_grid: str = "", own: bool = False) -> Decided:
    """The config; `of_grid` is why the grid is an assumption, `own` whether the model is OpenAI's for sure."""
    side = found["grid"][0] * found["patch"]
    told = dict(
        layer_scale=False,
        patch_bias=False,
        pre_norm=True,
        eps=1e-5,
        resampling="bicubic",
        preprocess=Preprocess(side, side, CLIPS["image_mean"], CLIPS["image_std"], margin="round"),
    )
    if own:
        told["mlp"] = "quick_gelu"
    elif "mlp" not in hints:
        raise ConversionError(
            "the tensors of this CLIP do not tell its activation: say config={'mlp': 'quick_gelu'} "
            "(--set mlp=quick_gelu) if it is OpenAI's or one trained like it, or 'gelu' if not"
        )
    if found["width"] > 1024 and "heads" not in hints:  # OpenCLIP's H, g and G have heads of 80, 88 and 104
        raise ConversionError(
            f"the tensors of this CLIP of width {found['width']} do not tell its number of heads: say "
            f"config={{'heads': 16}} (--set heads=16), or give the folder with its config"
        )
    of_heads, assumed = with_heads(found, hints, ("CLIP",))
    assumed |= {"grid": of_grid} if of_grid else {}
    if not own:
        some = "as OpenAI's; some of OpenCLIP's have others"
        assumed |= {"eps": some, "pool": some, "preprocess": some}
    return decide(found, told | of_heads, hints, assumed)


# OpenAI and OpenCLIP --------------------------------------------------------------------------------------------------

BLOCK = "transformer.resblocks.{i}"


def openai_config(tensors: Tensors, hints: Mapping[str, Any]) -> Decided:
    width, channels, *patch = shape_of(tensors, "conv1.weight", 4)
    grid, why = grid_of(tensors, "positional_embedding", 2, (1,), square(*patch), hints, ("CLIP",))
    found = dict(
        depth=count_blocks(tensors, BLOCK),
        width=width,
        channels=channels,
        hidden=shape_of(tensors, f"{BLOCK.format(i=0)}.mlp.c_fc.weight", 2)[0],
        patch=square(*patch),
        grid=grid,
        projection=shape_of(tensors, "proj", 2)[1] if "proj" in tensors else 0,
    )
    own = all(f"{name} (outside {VISUAL})" in tensors for name in NUMBERS)
    return decided(found, hints, why, own)


def openai_rules(config: ViTConfig, tensors: Tensors) -> list[Rule]:
    return [
        *patch_conv("conv1", "patch_embed", bias=False, channels=config.channels),
        *token_rules(config, tensors, (), "class_embedding", "positional_embedding"),
        *norm("ln_pre", "pre_norm"),
        *norm(f"{BLOCK}.ln_1", "blocks.norm1"),
        matrix(f"{BLOCK}.attn.in_proj_weight", "blocks.attn.qkv.kernel"),
        copy(f"{BLOCK}.attn.in_proj_bias", "blocks.attn.qkv.bias"),
        *linear(f"{BLOCK}.attn.out_proj", "blocks.attn.proj"),
        *norm(f"{BLOCK}.ln_2", "blocks.norm2"),
        *linear(f"{BLOCK}.mlp.c_fc", "blocks.mlp.fc1"),
        *linear(f"{BLOCK}.mlp.c_proj", "blocks.mlp.fc2"),
        *norm("ln_post", "norm"),
        *([copy("proj", "head.linear.kernel")] if config.projection else []),
    ]


OPENAI = Layout(
    name="clip/openai",
    anchors=(
        "conv1.weight",
        "class_embedding",
        "positional_embedding",
        "ln_pre.weight",
        "transformer.resblocks.0.attn.in_proj_weight",
    ),
    config=openai_config,
    rules=openai_rules,
    ignored={
        **dict.fromkeys(("transformer.* (outside *", "token_embedding.* (outside *", "ln_final.* (outside *"), TEXT),
        **dict.fromkeys(("positional_embedding (outside *", "text_projection* (outside *"), TEXT),
        **dict.fromkeys(("text.* (outside *", "attn_mask (outside *", "logit_bias (outside *"), TEXT),
        "logit_scale (outside *": "the temperature of CLIP's loss",
        **dict.fromkeys((f"{name} (outside *" for name in NUMBERS), "a number about the archive"),
    },
)


# transformers ---------------------------------------------------------------------------------------------------------

LAYER = "encoder.layers.{i}"


def transformers_config(tensors: Tensors, hints: Mapping[str, Any]) -> Decided:
    width, channels, *patch = shape_of(tensors, "embeddings.patch_embedding.weight", 4)
    positions = "embeddings.position_embedding.weight"
    grid, why = grid_of(tensors, positions, 2, (1,), square(*patch), hints, ("CLIP",))
    found = dict(
        depth=count_blocks(tensors, LAYER),
        width=width,
        channels=channels,
        hidden=shape_of(tensors, f"{LAYER.format(i=0)}.mlp.fc1.weight", 2)[0],
        patch=square(*patch),
        grid=grid,
        projection=shape_of(tensors, "visual_projection.weight", 2)[0] if "visual_projection.weight" in tensors else 0,
    )
    return decided(found, hints, why)


def transformers_rules(config: ViTConfig, tensors: Tensors) -> list[Rule]:
    positions = "embeddings.position_embedding.weight"
    return [
        *patch_conv("embeddings.patch_embedding", "patch_embed", bias=False, channels=config.channels),
        *token_rules(config, tensors, (), "embeddings.class_embedding", positions),
        *norm("pre_layrnorm", "pre_norm"),  # so in the published files
        *norm(f"{LAYER}.layer_norm1", "blocks.norm1"),
        *joined_linear([f"{LAYER}.self_attn.{name}_proj" for name in "qkv"], "blocks.attn.qkv"),
        *linear(f"{LAYER}.self_attn.out_proj", "blocks.attn.proj"),
        *norm(f"{LAYER}.layer_norm2", "blocks.norm2"),
        *linear(f"{LAYER}.mlp.fc1", "blocks.mlp.fc1"),
        *linear(f"{LAYER}.mlp.fc2", "blocks.mlp.fc2"),
        *norm("post_layernorm", "norm"),
        *(linear("visual_projection", "head.linear", bias=False) if config.projection else ()),
    ]


TRANSFORMERS = Layout(
    name="clip/transformers",
    anchors=(
        "embeddings.class_embedding",
        "embeddings.patch_embedding.weight",
        "pre_layrnorm.weight",
        "encoder.layers.0.self_attn.q_proj.weight",
    ),
    config=transformers_config,
    rules=transformers_rules,
    ignored={
        **dict.fromkeys(("text_model.*", "text_projection.*"), TEXT),
        "logit_scale*": "the temperature of CLIP's loss",
        "embeddings.position_ids": "counts from 0",
    },
    outside=("visual_projection.weight",),
)

LAYOUTS = (OPENAI, TRANSFORMERS)

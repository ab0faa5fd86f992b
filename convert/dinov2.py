"""DINOv2, with and without registers: as Meta and transformers publish it, and as transformers 5 names it in memory.

All of them share: LayerScale on both branches, heads of size 64, exact GELU or SwiGLU, LayerNorm epsilon 1e-6. The
class token and its position are only ever used as a sum, and their sum is what jaxvit keeps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxvit import ViTConfig

from .engine import Decided, Layout, Rule, Tensors, copy, joined_linear, linear, norm, patch_conv, split_linear, squeeze
from .meta import (
    PLAIN,
    Names,
    count_blocks,
    decide,
    grid_of,
    plain_mlp,
    read_config,
    shape_of,
    square,
    table,
    token_rules,
    when,
    with_heads,
)
from .preparation import META

HEAD = "a head that pretraining puts on top of the backbone"

HUB_NAMES = Names(registers=("register_tokens",), gates=("w12",), out="w3", mask="mask_token")


def hub_config(tensors: Tensors, hints: Mapping[str, Any]) -> Decided:
    # Meta's code resamples positions with an offset of 0.1, but not in its models with registers.
    rule = "bicubic_antialias" if "register_tokens" in tensors else "bicubic_offset"
    return read_config(
        tensors,
        hints,
        HUB_NAMES,
        families=("DINOv2",),
        always={**PLAIN, "layer_scale": True, "classes": 0},
        before=(1,),
        final_norm="tokens",
        resampling=rule,
        preprocess=META,
    )


# transformers ---------------------------------------------------------------------------------------------------------


MASK = "embeddings.mask_token"


def transformers(
    config: ViTConfig, tensors: Tensors, qkv: Sequence[str], proj: str, swiglu: Sequence[Rule]
) -> list[Rule]:
    at = "encoder.layer.{i}"
    registers = ("embeddings.register_tokens",)
    return [
        *patch_conv("embeddings.patch_embeddings.projection", "patch_embed", channels=config.channels),
        *token_rules(config, tensors, registers, "embeddings.cls_token", "embeddings.position_embeddings"),
        *when(config.mask_token, [squeeze(MASK, "mask_token")]),
        *norm(f"{at}.norm1", "blocks.norm1"),
        *joined_linear([f"{at}.attention.{name}" for name in qkv], "blocks.attn.qkv"),
        *linear(f"{at}.attention.{proj}", "blocks.attn.proj"),
        copy(f"{at}.layer_scale1.lambda1", "blocks.scale1.gamma"),
        *norm(f"{at}.norm2", "blocks.norm2"),
        *(swiglu if config.mlp == "swiglu" else plain_mlp(f"{at}.mlp")),
        copy(f"{at}.layer_scale2.lambda1", "blocks.scale2.gamma"),
        *norm("layernorm", "norm"),
        *(linear("classifier", "head.linear") if config.classes else ()),
    ]


def transformers_config(tensors: Tensors, hints: Mapping[str, Any]) -> Decided:
    registers = "embeddings.register_tokens"
    width, channels, *patch = shape_of(tensors, "embeddings.patch_embeddings.projection.weight", 4)
    count = shape_of(tensors, registers, 3)[1] if registers in tensors else 0
    mlp = "encoder.layer.0.mlp"
    gated = [f"{mlp}.{out}.weight" for out in ("weights_out", "down_proj") if f"{mlp}.{out}.weight" in tensors]
    classes = shape_of(tensors, "classifier.weight", 2)[0] if "classifier.weight" in tensors else 0
    grid, why = grid_of(tensors, "embeddings.position_embeddings", 3, (1,), square(*patch), hints, ("DINOv2",))
    found = dict(
        depth=count_blocks(tensors, "encoder.layer.{i}"),
        registers=count,
        width=width,
        channels=channels,
        hidden=shape_of(tensors, gated[0] if gated else f"{mlp}.fc2.weight", 2)[1],
        patch=square(*patch),
        grid=grid,
        mask_token=MASK in tensors,
        classes=classes,
    )
    told, assumed = with_heads(found, hints, ("DINOv2",))
    assumed |= {"grid": why} if why else {}
    told |= dict(
        mlp="swiglu" if gated else "gelu",
        resampling="bicubic_antialias" if count else "bicubic",
        pool="cls_mean" if classes else "cls",  # what transformers' classifier reads
    )
    return decide(found, told, hints, assumed)


# Layouts --------------------------------------------------------------------------------------------------------------

HUB = Layout(
    name="dinov2/hub",
    anchors=("cls_token", "mask_token", "pos_embed", "blocks.0.attn.qkv.weight", "blocks.0.ls1.gamma"),
    config=hub_config,
    rules=lambda config, tensors: table(config, tensors, HUB_NAMES),
    ignored={"dino_head.*": HEAD, "ibot_head.*": HEAD},
    # Models sharded for training keep blocks in chunks, blocks.<chunk>.<block>; <block> already counts over all chunks.
    rename=lambda name: re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name),
)

IN_BLOCK = "encoder.layer.{i}"
TRANSFORMERS = Layout(
    name="dinov2/transformers",
    anchors=(
        "embeddings.cls_token",
        "embeddings.position_embeddings",
        "encoder.layer.0.attention.attention.query.weight",
    ),
    config=transformers_config,
    rules=lambda config, tensors: transformers(
        config,
        tensors,
        qkv=("attention.query", "attention.key", "attention.value"),
        proj="output.dense",
        swiglu=split_linear(f"{IN_BLOCK}.mlp.weights_in", ("blocks.mlp.gate", "blocks.mlp.value"))
        + linear(f"{IN_BLOCK}.mlp.weights_out", "blocks.mlp.out"),
    ),
    outside=("classifier.weight", "classifier.bias"),
    accepts=lambda tensors, hints: "encoder.layer.0.layernorm_before.weight" not in tensors,  # a plain ViT's
)

TRANSFORMERS_IN_MEMORY = Layout(
    name="dinov2/transformers in memory",
    anchors=("embeddings.cls_token", "embeddings.position_embeddings", "encoder.layer.0.attention.q_proj.weight"),
    config=transformers_config,
    rules=lambda config, tensors: transformers(
        config,
        tensors,
        qkv=("q_proj", "k_proj", "v_proj"),
        proj="o_proj",
        swiglu=linear(f"{IN_BLOCK}.mlp.gate_proj", "blocks.mlp.gate")
        + linear(f"{IN_BLOCK}.mlp.up_proj", "blocks.mlp.value")
        + linear(f"{IN_BLOCK}.mlp.down_proj", "blocks.mlp.out"),
    ),
    outside=TRANSFORMERS.outside,
)

LAYOUTS = (HUB, TRANSFORMERS, TRANSFORMERS_IN_MEMORY)

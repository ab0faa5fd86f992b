"""DINOv3's Vision Transformers (S, S+, B, L, H+, 7B): as Meta, transformers and timm publish them.

Rotary positions on patches alone, registers (Meta: storage tokens), keys without a bias. Meta's files keep the rotary
periods rounded to bfloat16, and its code reads them; the other two compute them in float32. Meta's keys have a bias and
a mask of zeros over it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from jaxvit import ViTConfig
from jaxvit.model.positions import rope_periods

from .engine import (
    ConversionError,
    Decided,
    Layout,
    Rule,
    Tensors,
    copy,
    joined_linear,
    linear,
    norm,
    patch_conv,
    squeeze,
)
from .meta import (
    BLOCK,
    PLAIN,
    Names,
    count_blocks,
    decide,
    mlp_rules,
    read_config,
    shape_of,
    square,
    table,
    token_rules,
    when,
    with_heads,
)

FAMILY: dict[str, Any] = dict(
    eps=1e-5, grid=(14, 14), rope_base=100.0, final_norm="tokens", resampling="bicubic_antialias"
)
SHARED = {"preprocess": "as for photographs; DINOv3's models for satellite images have another mean and deviation"}
ALWAYS = {**PLAIN, "layer_scale": True}
del ALWAYS["qkv_bias"]  # which the 7B has not

# Meta -----------------------------------------------------------------------------------------------------------------

HUB_NAMES = Names(registers=("storage_tokens",), gates=("w1", "w2"), out="w3", mask="mask_token")
PERIODS = "rope_embed.periods"


def hub_config(tensors: Tensors, hints: Mapping[str, Any]) -> Decided:
    family: dict[str, Any] = FAMILY | dict(rope="bfloat16")
    found = read_config(tensors, hints, HUB_NAMES, families=("DINOv3",), always=ALWAYS, **family)
    config = found.config
    expected = rope_periods(config.head_size, config.rope_base, "bfloat16")
    if PERIODS in tensors and not np.array_equal(np.asarray(tensors[PERIODS], np.float64), expected):
        raise ConversionError(f"{PERIODS} are not those of base 100 in bfloat16: rotary positions of another kind")
    assumed = {} if PERIODS in tensors else {"rope": "as Meta's files have it; this one has no periods"}
    return found.assuming(SHARED | assumed | {**found.assumed}, hints)


def masked(bias: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    return [bias * mask.reshape(bias.shape)]  # never broadcast


def third_without_bias(bias: np.ndarray) -> list[np.ndarray]:
    """Biases of queries, keys and values, of which keys must have none."""
    q, k, v = np.split(bias, 3)
    if k.any():
        raise ValueError("its keys have a bias, there they have none")
    return [q, k, v]


def with_mask(bias: np.ndarray) -> list[np.ndarray]:
    q, k, v = third_without_bias(bias)
    return [bias, np.concatenate([np.ones_like(q), np.zeros_like(k), np.ones_like(v)])]


def hub_rules(config: ViTConfig, tensors: Tensors) -> list[Rule]:
    bias, mask = f"{BLOCK}.attn.qkv.bias", f"{BLOCK}.attn.qkv.bias_mask"
    # Without the mask a bias of keys would count, and with rotary positions change attention.
    both = Rule((bias, mask), ("blocks.attn.qkv.bias",), masked, with_mask)
    return [both if rule.sources == (bias,) else rule for rule in table(config, tensors, HUB_NAMES)]


HUB = Layout(
    name="dinov3/hub",
    anchors=("cls_token", "storage_tokens", "blocks.0.attn.qkv.weight", "blocks.0.ls1.gamma"),
    config=hub_config,
    rules=hub_rules,
    ignored={
        PERIODS: "computed, and compared",
        "local_cls_norm.*": "the norm of [CLS] of the small crops of pretraining",
    },
)

# timm -----------------------------------------------------------------------------------------------------------------


def timm_names(tensors: Tensors) -> Names:
    gates = ("fc1_g", "fc1_x") if "blocks.0.mlp.fc1_g.weight" in tensors else ("fc1",)
    return Names(registers=("reg_token",), scales=("gamma_1", "gamma_2"), gates=gates)


def timm_config(tensors: Tensors, hints: Mapping[str, Any]) -> Decided:
    family: dict[str, Any] = FAMILY | dict(rope="float32")
    config, assumed = read_config(tensors, hints, timm_names(tensors), families=("DINOv3",), always=ALWAYS, **family)
    config = replace(config, qkv_bias="blocks.0.attn.q_bias" in tensors)
    return Decided(config).assuming(SHARED | {**assumed}, hints)


def timm_rules(config: ViTConfig, tensors: Tensors) -> list[Rule]:
    rules = table(replace(config, qkv_bias=False), tensors, timm_names(tensors))
    return rules + ([keyless(f"{BLOCK}.attn.q_bias", f"{BLOCK}.attn.v_bias")] if config.qkv_bias else [])


def keyless(q: str, v: str) -> Rule:
    """Biases of queries and values; keys have none."""

    def join(q: np.ndarray, v: np.ndarray) -> list[np.ndarray]:
        if q.shape != v.shape:
            raise ValueError("may add up to the right shape, but do not belong together")
        return [np.concatenate([q, np.zeros_like(q), v])]

    return Rule((q, v), ("blocks.attn.qkv.bias",), join, lambda bias: third_without_bias(bias)[::2])


TIMM = Layout(
    name="dinov3/timm",
    anchors=("cls_token", "reg_token", "blocks.0.attn.qkv.weight", "blocks.0.gamma_1", "blocks.0.norm2.weight"),
    config=timm_config,
    rules=timm_rules,
    accepts=lambda tensors, hints: "pos_embed" not in tensors,
)

# transformers ---------------------------------------------------------------------------------------------------------

LAYER, MASK = "layer.{i}", "embeddings.mask_token"


def transformers_config(tensors: Tensors, hints: Mapping[str, Any]) -> Decided:
    width, channels, *patch = shape_of(tensors, "embeddings.patch_embeddings.weight", 4)
    gated = "layer.0.mlp.gate_proj.weight" in tensors
    found = dict(
        depth=count_blocks(tensors, LAYER),
        width=width,
        channels=channels,
        hidden=shape_of(tensors, "layer.0.mlp.down_proj.weight", 2)[1],
        registers=shape_of(tensors, "embeddings.register_tokens", 3)[1],
        patch=square(*patch),
        positions=False,
        mask_token=MASK in tensors,
        qkv_bias="layer.0.attention.q_proj.bias" in tensors,
    )
    told, assumed = with_heads(found, hints, ("DINOv3",))
    told |= dict(mlp="swiglu" if gated else "gelu", rope="float32", **FAMILY)
    return decide(found, told, {**hints, **({"mlp": "swiglu"} if gated else {})}, SHARED | assumed)


def transformers_rules(config: ViTConfig, tensors: Tensors) -> list[Rule]:
    attention = f"{LAYER}.attention"
    qkv = joined_linear([f"{attention}.{name}_proj" for name in "qkv"], "blocks.attn.qkv")[:1]
    if config.qkv_bias:
        qkv.append(keyless(f"{attention}.q_proj.bias", f"{attention}.v_proj.bias"))
    mlp = [
        replace(rule, sources=tuple(s.replace(BLOCK, LAYER) for s in rule.sources))
        for rule in mlp_rules(config, Names(gates=("gate_proj", "up_proj"), out="down_proj"))
    ]
    if config.mlp != "swiglu":
        mlp = linear(f"{LAYER}.mlp.up_proj", "blocks.mlp.fc1") + linear(f"{LAYER}.mlp.down_proj", "blocks.mlp.fc2")
    return [
        *patch_conv("embeddings.patch_embeddings", "patch_embed", channels=config.channels),
        *token_rules(config, tensors, ("embeddings.register_tokens",), "embeddings.cls_token"),
        *when(config.mask_token, [squeeze(MASK, "mask_token", axes=2)]),
        *norm(f"{LAYER}.norm1", "blocks.norm1"),
        *qkv,
        *linear(f"{attention}.o_proj", "blocks.attn.proj"),
        copy(f"{LAYER}.layer_scale1.lambda1", "blocks.scale1.gamma"),
        *norm(f"{LAYER}.norm2", "blocks.norm2"),
        *mlp,
        copy(f"{LAYER}.layer_scale2.lambda1", "blocks.scale2.gamma"),
        *norm("norm", "norm"),
    ]


TRANSFORMERS = Layout(
    name="dinov3/transformers",
    anchors=(
        "embeddings.cls_token",
        "embeddings.register_tokens",
        "layer.0.attention.q_proj.weight",
        "layer.0.layer_scale1.lambda1",
    ),
    config=transformers_config,
    rules=transformers_rules,
    rename=lambda name: name.removeprefix("model."),  # transformers 5 in memory
)

LAYOUTS = (HUB, TIMM, TRANSFORMERS)

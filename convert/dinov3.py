"""DINOv3's Vision Transformers (S, S+, B, L, H+, 7B): as Meta, transformers and timm publish them.

Rotary positions on patches alone, registers (Meta: storage tokens), keys without a bias. Meta's files keep the rotary
periods rounded to bfloat16, and its code reads them; the other two compute them in float32. Meta's keys have a bias and
a mask of zeros over it. By its defaults Meta's training code makes another model: no storage tokens, no mask, periods
in float32, and norms of another epsilon.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from jaxvit import ViTConfig
from jaxvit.model.config import Rope
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
from .preparation import META, of_timm, of_transformers

FAMILY: dict[str, Any] = dict(
    eps=1e-5, grid=(14, 14), rope_base=100.0, final_norm="tokens", resampling="bicubic_antialias"
)
SHARED = {"preprocess": "as for photographs; DINOv3's models for satellite images have another mean and deviation"}
ALWAYS = {**PLAIN, "layer_scale": True}
del ALWAYS["qkv_bias"]  # which the 7B has not

# Meta -----------------------------------------------------------------------------------------------------------------

HUB_NAMES = Names(registers=("storage_tokens",), gates=("w1", "w2"), out="w3", mask="mask_token")
PERIODS = "rope_embed.periods"


BIAS, BIAS_MASK = f"{BLOCK}.attn.qkv.bias", f"{BLOCK}.attn.qkv.bias_mask"


def hub_config(tensors: Tensors, hints: Mapping[str, Any]) -> Decided:
    rope, assumed = rope_of(tensors, hints)
    if PERIODS in tensors:  # one for every four numbers of a head
        width, head = shape_of(tensors, "cls_token", 3)[-1], 4 * shape_of(tensors, PERIODS, 1)[0]
        if width % max(head, 1) or hints.get("heads", width // head) != width // head:
            also = f", not to {hints['heads']} heads" if "heads" in hints else ""
            raise ConversionError(f"{PERIODS} belong to heads of {head} numbers at width {width}{also}")
        hints = {**hints, "heads": width // head}
    eps, why = eps_of(tensors, rope, hints)
    assumed |= {"eps": why} if why else {}
    if key_biases(tensors):
        assumed["qkv_bias"] = "of keys too: no bias_mask takes them away, as it does in Meta's own files"
    family: dict[str, Any] = FAMILY | dict(rope=rope, eps=eps, preprocess=META)
    found = read_config(tensors, hints, HUB_NAMES, families=("DINOv3",), always=ALWAYS, **family)
    return found.assuming(SHARED | assumed | {**found.assumed}, hints)


def rope_of(tensors: Tensors, hints: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """The type that rotary periods have, and why it is an assumption.

    Raises:
      ConversionError: those in the file are of another base, or of another kind.
    """
    if PERIODS not in tensors:
        return "bfloat16", {"rope": "as Meta's files have it; this one has no periods"}
    periods, base = np.asarray(tensors[PERIODS], np.float64), hints.get("rope_base", FAMILY["rope_base"])
    kinds: tuple[Rope, ...] = ("bfloat16", "float32")
    fit = [kind for kind in kinds if base > 0 and np.array_equal(periods, rope_periods(4 * len(periods), base, kind))]
    if not fit:
        raise ConversionError(
            f"{PERIODS} are not those of base {base:g}, in bfloat16 or float32: if it was trained with another base "
            f"(pos_embed_rope_base), say --set rope_base=.. (config={{'rope_base': ..}}); other ways to space them are "
            f"not known here"
        )
    return hints["rope"] if hints.get("rope") in fit else fit[0], {}


def key_biases(tensors: Tensors) -> bool:
    """Whether keys have biases that count: Meta's own models mask them, its training code by default does not."""
    return BIAS.format(i=0) in tensors and BIAS_MASK.format(i=0) not in tensors


def eps_of(tensors: Tensors, rope: str, hints: Mapping[str, Any]) -> tuple[float, str]:
    """The epsilon of norms, and why it is an assumption. No tensor shows it; what does is what it comes with: Meta's
    models have 1e-5, the defaults of its training code 1e-6.

    Raises:
      ConversionError: the model is neither like the ones nor like the other.
    """
    kind = ("storage_tokens" in tensors, not key_biases(tensors), rope)
    if kind == (True, True, "bfloat16") or "eps" in hints:
        return 1e-5, ""
    if kind == (False, False, "float32"):
        return 1e-6, "the default of DINOv3's training code, norm_layer: layernorm; layernormbf16 has 1e-5"
    raise ConversionError(
        "this DINOv3 is neither like Meta's models nor like the defaults of its training code, and no tensor shows the "
        "epsilon of its norms: say --set eps=1e-6 (config={'eps': 1e-6}) if it was trained with norm_layer: layernorm, "
        "or 1e-5 for layernormbf16"
    )


def masked(bias: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    return [bias * mask.reshape(bias.shape)]  # never broadcast


def third_without_bias(bias: np.ndarray) -> list[np.ndarray]:
    """Biases of queries, keys and values, of which keys must have none."""
    q, k, v = np.split(bias, 3)
    if k.any():
        raise ValueError("its keys have a bias, which has no place there")
    return [q, k, v]


def with_mask(bias: np.ndarray) -> list[np.ndarray]:
    q, k, v = third_without_bias(bias)
    return [bias, np.concatenate([np.ones_like(q), np.zeros_like(k), np.ones_like(v)])]


def hub_rules(config: ViTConfig, tensors: Tensors) -> list[Rule]:
    rules = table(config, tensors, HUB_NAMES)
    if key_biases(tensors):
        return rules
    # Without the mask a bias of keys would count, and with rotary positions change attention.
    both = Rule((BIAS, BIAS_MASK), ("blocks.attn.qkv.bias",), masked, with_mask)
    return [both if rule.sources == (BIAS,) else rule for rule in rules]


HUB = Layout(
    name="dinov3/hub",
    anchors=("cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.ls1.gamma"),
    config=hub_config,
    rules=hub_rules,
    ignored={
        PERIODS: "computed, and compared",
        "local_cls_norm.*": "the norm of [CLS] of the small crops of pretraining",
        **dict.fromkeys(("dino_head.*", "ibot_head.*"), "a head that pretraining puts on top of the backbone"),
    },
    # By default its training code makes no storage tokens.
    accepts=lambda tensors, hints: "pos_embed" not in tensors and ("storage_tokens" in tensors or PERIODS in tensors),
)

# timm -----------------------------------------------------------------------------------------------------------------


def timm_names(tensors: Tensors) -> Names:
    gates = ("fc1_g", "fc1_x") if "blocks.0.mlp.fc1_g.weight" in tensors else ("fc1",)
    return Names(registers=("reg_token",), scales=("gamma_1", "gamma_2"), gates=gates)


def timm_config(tensors: Tensors, hints: Mapping[str, Any]) -> Decided:
    family: dict[str, Any] = FAMILY | dict(
        rope="float32", preprocess=of_timm({"input_size": (3, 256, 256), "crop_pct": 1.0})
    )
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
PROCESSOR = {"image_processor_type": "DINOv3ViTImageProcessor"}


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
    told |= dict(mlp="swiglu" if gated else "gelu", rope="float32", preprocess=of_transformers(PROCESSOR), **FAMILY)
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

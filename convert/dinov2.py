"""DINOv2, with and without registers: three published layouts, and the names transformers 5 has in memory.

All of them share: LayerScale on both branches, heads of size 64, exact GELU or SwiGLU, LayerNorm epsilon 1e-6. The
class token and its position are only ever used as a sum, and their sum is what jaxvit keeps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

import numpy as np

from convert.engine import (
    ConversionError,
    Layout,
    Rule,
    Tensors,
    copy,
    joined_linear,
    linear,
    norm,
    patch_conv,
    split_linear,
    squeeze,
)
from jaxvit import Preprocess, ViTConfig
from jaxvit.config import Resampling

MASK = "stands in for hidden patches during pretraining; takes no part when whole images are read"
HEAD = "a head on top of the backbone"


# Tables ---------------------------------------------------------------------------------------------------------------


def meta(
    config: ViTConfig, *, registers: str, gate_and_value: str, out: str, class_has_position: bool = True
) -> list[Rule]:
    """The names of Meta's own code, which timm follows but for the pieces that are arguments here."""
    at = "blocks.{i}"
    return [
        *patch_conv("patch_embed.proj", "patch_embed"),
        *class_and_positions("cls_token", "pos_embed", config, class_has_position),
        *([squeeze(registers, "registers")] if config.registers else []),
        *norm(f"{at}.norm1", "blocks.norm1"),
        *linear(f"{at}.attn.qkv", "blocks.attn.qkv"),  # rows: all queries, all keys, all values; within each by head
        *linear(f"{at}.attn.proj", "blocks.attn.proj"),
        copy(f"{at}.ls1.gamma", "blocks.scale1.gamma"),
        *norm(f"{at}.norm2", "blocks.norm2"),
        *(
            gelu_mlp(f"{at}.mlp")
            if config.mlp == "gelu"
            else split_linear(f"{at}.mlp.{gate_and_value}", ("blocks.mlp.gate", "blocks.mlp.value"))
            + linear(f"{at}.mlp.{out}", "blocks.mlp.out")
        ),
        copy(f"{at}.ls2.gamma", "blocks.scale2.gamma"),
        *norm("norm", "norm"),
    ]


def transformers(config: ViTConfig, *, qkv: Sequence[str], proj: str, swiglu: Sequence[Rule]) -> list[Rule]:
    at = "encoder.layer.{i}"
    return [
        *patch_conv("embeddings.patch_embeddings.projection", "patch_embed"),
        *class_and_positions("embeddings.cls_token", "embeddings.position_embeddings", config),
        *([squeeze("embeddings.register_tokens", "registers")] if config.registers else []),
        *norm(f"{at}.norm1", "blocks.norm1"),
        *joined_linear([f"{at}.attention.{name}" for name in qkv], "blocks.attn.qkv"),
        *linear(f"{at}.attention.{proj}", "blocks.attn.proj"),
        copy(f"{at}.layer_scale1.lambda1", "blocks.scale1.gamma"),
        *norm(f"{at}.norm2", "blocks.norm2"),
        *(gelu_mlp(f"{at}.mlp") if config.mlp == "gelu" else swiglu),
        copy(f"{at}.layer_scale2.lambda1", "blocks.scale2.gamma"),
        *norm("layernorm", "norm"),
    ]


def class_and_positions(cls: str, positions: str, config: ViTConfig, class_has_position: bool = True) -> list[Rule]:
    """A class token [1, 1, D]; positions [1, N, D], before which stands the class token's if it has one."""
    shape = (*config.grid, config.width)
    if not class_has_position:
        return [Rule((cls, positions), ("cls", "positions"), lambda c, p: (c.reshape(-1), p.reshape(shape)))]

    def add(c: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # reshape, where indexing and broadcasting would make do with other shapes.
        rows = p.reshape(1 + config.grid[0] * config.grid[1], config.width)
        return c.reshape(config.width) + rows[0], rows[1:].reshape(shape)

    return [Rule((cls, positions), ("cls", "positions"), add)]


def gelu_mlp(at: str) -> list[Rule]:
    return [*linear(f"{at}.fc1", "blocks.mlp.fc1"), *linear(f"{at}.fc2", "blocks.mlp.fc2")]


# Configs --------------------------------------------------------------------------------------------------------------


def read_config(
    tensors: Tensors,
    hints: Mapping[str, Any],
    *,
    conv: str,
    positions: int,
    registers: str,
    block: str,
    gates: Mapping[str, str],
    resampling: Resampling,
) -> ViTConfig:
    """The config that the shapes imply.

    Args:
      hints: `heads`, `eps`, `preprocess` where a file beside the tensors gives them: they cannot be read from shapes.
        `depth` and `registers`, where given, must be what the tensors have.
      positions: number of patch positions.
      block: the start of the names of a block, with a `{i}`.
      gates: tensor of block 0 that only a SwiGLU has -> the tensor whose last axis is its hidden size.
    """
    width, _, patch, patch_x = shape_of(tensors, conv, 4)
    if patch != patch_x or isqrt(positions) ** 2 != positions:
        raise ConversionError(f"patches of {patch}x{patch_x} pixels, {positions} positions: expected squares of both")
    pattern = re.compile(re.escape(block).replace(r"\{i\}", r"(\d+)") + r"\.")
    numbers = {int(match[1]) for name in tensors if (match := pattern.match(name))}
    if len(numbers) != max(numbers) + 1:
        listed = ", ".join(map(str, sorted(numbers)))
        raise ConversionError(f"the checkpoint's blocks are numbered {listed}: expected no gaps from 0 to the last")
    found = {"depth": len(numbers), "registers": shape_of(tensors, registers, 3)[1] if registers in tensors else 0}
    if differ := [f"{n} {name}, not {hints[name]}" for name, n in found.items() if hints.get(name, n) != n]:
        raise ConversionError(f"the checkpoint's tensors and its config disagree: {'; '.join(differ)}")
    swiglu = [out for gate, out in gates.items() if gate in tensors]
    hidden = swiglu[0] if swiglu else f"{block.format(i=0)}.mlp.fc2.weight"
    return ViTConfig(
        depth=found["depth"],
        registers=found["registers"],
        width=width,
        heads=hints.get("heads", width // 64),
        hidden=shape_of(tensors, hidden, 2)[1],
        mlp="swiglu" if swiglu else "gelu",
        patch=patch,
        grid=(isqrt(positions), isqrt(positions)),
        eps=hints.get("eps", 1e-6),
        resampling=resampling,
        preprocess=hints.get("preprocess", Preprocess()),
    )


def shape_of(tensors: Tensors, name: str, axes: int) -> tuple[int, ...]:
    shape = tensors[name].shape
    if len(shape) != axes:
        raise ConversionError(f"{name} has shape {list(shape)}, expected {axes} axes")
    return shape


def hub_config(tensors: Tensors, hints: Mapping[str, Any]) -> ViTConfig:
    # Meta's code resamples positions with an offset of 0.1, but not in its models with registers.
    return read_config(
        tensors,
        hints,
        conv="patch_embed.proj.weight",
        positions=shape_of(tensors, "pos_embed", 3)[1] - 1,
        registers="register_tokens",
        block="blocks.{i}",
        gates={"blocks.0.mlp.w12.weight": "blocks.0.mlp.w3.weight"},
        resampling="bicubic_antialias" if "register_tokens" in tensors else "bicubic_offset",
    )


def timm_config(tensors: Tensors, hints: Mapping[str, Any]) -> ViTConfig:
    has_registers = "reg_token" in tensors
    fc1, fc2 = "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"
    packed = shape_of(tensors, fc1, 2)[0] == 2 * shape_of(tensors, fc2, 2)[1]  # gate and value in one matrix
    return read_config(
        tensors,
        hints,
        conv="patch_embed.proj.weight",
        positions=shape_of(tensors, "pos_embed", 3)[1] - (not has_registers),
        registers="reg_token",
        block="blocks.{i}",
        gates={fc1: fc2} if packed else {},
        resampling="bicubic_antialias",
    )


def transformers_config(tensors: Tensors, hints: Mapping[str, Any]) -> ViTConfig:
    has_registers = "embeddings.register_tokens" in tensors
    mlp = "encoder.layer.0.mlp"
    return read_config(
        tensors,
        hints,
        conv="embeddings.patch_embeddings.projection.weight",
        positions=shape_of(tensors, "embeddings.position_embeddings", 3)[1] - 1,
        registers="embeddings.register_tokens",
        block="encoder.layer.{i}",
        gates={
            f"{mlp}.weights_in.weight": f"{mlp}.weights_out.weight",
            f"{mlp}.gate_proj.weight": f"{mlp}.down_proj.weight",
        },
        resampling="bicubic_antialias" if has_registers else "bicubic",
    )


# Layouts --------------------------------------------------------------------------------------------------------------

HUB = Layout(
    name="dinov2/hub",
    anchors=("cls_token", "mask_token", "pos_embed", "blocks.0.attn.qkv.weight", "blocks.0.ls1.gamma"),
    config=hub_config,
    rules=lambda config: meta(config, registers="register_tokens", gate_and_value="w12", out="w3"),
    ignored={"mask_token": MASK, "dino_head.*": HEAD, "ibot_head.*": HEAD},
    # Models sharded for training keep blocks in chunks, blocks.<chunk>.<block>; <block> already counts over all chunks.
    rename=lambda name: re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name),
)

TIMM = Layout(
    name="dinov2/timm",
    anchors=("cls_token", "pos_embed", "blocks.0.attn.qkv.weight", "blocks.0.ls1.gamma"),
    config=timm_config,
    rules=lambda config: meta(
        config,
        registers="reg_token",
        gate_and_value="fc1",
        out="fc2",
        class_has_position=not config.registers,  # with registers, timm has added it to the class token
    ),
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
    rules=lambda config: transformers(
        config,
        qkv=("attention.query", "attention.key", "attention.value"),
        proj="output.dense",
        swiglu=split_linear(f"{IN_BLOCK}.mlp.weights_in", ("blocks.mlp.gate", "blocks.mlp.value"))
        + linear(f"{IN_BLOCK}.mlp.weights_out", "blocks.mlp.out"),
    ),
    ignored={"embeddings.mask_token": MASK, "classifier.*": HEAD},
)

TRANSFORMERS_IN_MEMORY = Layout(
    name="dinov2/transformers in memory",
    anchors=("embeddings.cls_token", "embeddings.position_embeddings", "encoder.layer.0.attention.q_proj.weight"),
    config=transformers_config,
    rules=lambda config: transformers(
        config,
        qkv=("q_proj", "k_proj", "v_proj"),
        proj="o_proj",
        swiglu=linear(f"{IN_BLOCK}.mlp.gate_proj", "blocks.mlp.gate")
        + linear(f"{IN_BLOCK}.mlp.up_proj", "blocks.mlp.value")
        + linear(f"{IN_BLOCK}.mlp.down_proj", "blocks.mlp.out"),
    ),
    ignored=TRANSFORMERS.ignored,
)

LAYOUTS = (HUB, TIMM, TRANSFORMERS, TRANSFORMERS_IN_MEMORY)

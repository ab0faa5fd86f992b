"""DINOv2 with random numbers, written in every layout it is published in.

The writers follow how the libraries name things, not the converter's tables. The same numbers stand in all layouts, so
conversions of all of them must agree to the last bit with `expected`, which goes from the numbers to jaxvit's names by
its own way. That the layouts are the libraries' own is tested by loading them into the libraries' models, strictly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jaxvit import ViTConfig
from jaxvit.model.params import abstract, to_params

State = dict[str, np.ndarray]
"""Tensor name -> array, in PyTorch's orientation."""

HIDDEN = {"gelu": 256, "swiglu": 176}
"""Of width 64: 4 * 64, and (int(4 * 64 * 2 / 3) + 7) // 8 * 8."""

LINEARS = {"gelu": ("fc1", "fc2"), "swiglu": ("gate", "value", "out")}


def tiny(mlp: str = "gelu", registers: int = 0, **changes: Any) -> ViTConfig:
    sizes: dict[str, Any] = dict(depth=2, width=64, heads=1, hidden=HIDDEN[mlp], patch=14, grid=(4, 4))
    return ViTConfig(**{**sizes, "mlp": mlp, "registers": registers, **changes})


def numbers(config: ViTConfig, seed: int = 0) -> State:
    """What a checkpoint of these sizes holds, under neutral names; nothing is at its usual initial value."""
    rng = np.random.default_rng(seed)
    D, F, patches = config.width, config.hidden, config.grid[0] * config.grid[1]

    def draw(*shape: int, center: float = 0.0) -> np.ndarray:
        return (center + 0.2 * rng.normal(size=shape)).astype(np.float32)

    def linear(name: str, inputs: int, outputs: int) -> State:
        return {f"{name}.weight": draw(outputs, inputs) / np.float32(inputs**0.5), f"{name}.bias": draw(outputs)}

    def norm(name: str) -> State:
        return {f"{name}.weight": draw(D, center=1.0), f"{name}.bias": draw(D)}

    state = {"cls": draw(1, 1, D), "positions": draw(1, 1 + patches, D), "mask": draw(1, D)}
    if config.registers:
        state["registers"] = draw(1, config.registers, D)
    state |= {"patch.weight": draw(D, 3, config.patch, config.patch) / np.float32(24), "patch.bias": draw(D)}
    for i in range(config.depth):
        for name in ("q", "k", "v", "proj"):
            state |= linear(f"{i}.{name}", D, D)
        for name in LINEARS[config.mlp]:
            state |= linear(f"{i}.{name}", *((F, D) if name in ("fc2", "out") else (D, F)))
        state |= norm(f"{i}.norm1") | norm(f"{i}.norm2")
        state |= {f"{i}.scale1": draw(D, center=1.0), f"{i}.scale2": draw(D, center=1.0)}
    return state | norm("norm")


def expected(config: ViTConfig, n: Mapping[str, np.ndarray]) -> State:
    """The same numbers as jaxvit's parameters."""

    def stack(*names: str) -> np.ndarray:
        """Parts beside each other on the last axis, blocks on the first; matrices as [in, out]."""
        blocks = [[np.moveaxis(n[f"{i}.{name}"], 0, -1) for name in names] for i in range(config.depth)]
        return np.stack([np.concatenate(parts, axis=-1) for parts in blocks])

    p, D = config.patch, config.width
    kernel = np.zeros((p, p, 3, D), np.float32)
    for y in range(p):
        for x in range(p):
            for channel in range(3):
                kernel[y, x, channel] = n["patch.weight"][:, channel, y, x]
    params = {
        "cls": n["cls"][0, 0] + n["positions"][0, 0],
        "positions": np.stack(np.split(n["positions"][0, 1:], config.grid[0])),
        "patch_embed.kernel": kernel.reshape(p * p * 3, D),
        "patch_embed.bias": n["patch.bias"],
        "blocks.attn.qkv.kernel": stack("q.weight", "k.weight", "v.weight"),
        "blocks.attn.qkv.bias": stack("q.bias", "k.bias", "v.bias"),
        "blocks.scale1.gamma": stack("scale1"),
        "blocks.scale2.gamma": stack("scale2"),
        "norm.scale": n["norm.weight"],
        "norm.bias": n["norm.bias"],
    }
    if config.registers:
        params["registers"] = n["registers"][0]
    if config.mask_token:
        params["mask_token"] = n["mask"][0]
    for source, target in [("proj", "attn.proj"), *((name, f"mlp.{name}") for name in LINEARS[config.mlp])]:
        params[f"blocks.{target}.kernel"] = stack(f"{source}.weight")
        params[f"blocks.{target}.bias"] = stack(f"{source}.bias")
    for name in ("norm1", "norm2"):
        params[f"blocks.{name}.scale"], params[f"blocks.{name}.bias"] = stack(f"{name}.weight"), stack(f"{name}.bias")
    shapes = to_params(abstract(config))  # where heads have axes of their own
    return {name: a.reshape(shapes[name].shape) for name, a in params.items()}


# Layouts --------------------------------------------------------------------------------------------------------------


def hub_state(config: ViTConfig, n: Mapping[str, np.ndarray], *, chunk: int = 0, prefix: str = "") -> State:
    """Meta's own .pth. With `chunk` blocks to a chunk: blocks.<chunk>.<block>, the block counted over all chunks."""
    state = {
        "cls_token": n["cls"],
        "pos_embed": n["positions"],
        "mask_token": n["mask"],
        "patch_embed.proj.weight": n["patch.weight"],
        "patch_embed.proj.bias": n["patch.bias"],
        "norm.weight": n["norm.weight"],
        "norm.bias": n["norm.bias"],
    }
    if config.registers:
        state["register_tokens"] = n["registers"]
    for i in range(config.depth):
        at = f"blocks.{i // chunk}.{i}" if chunk else f"blocks.{i}"
        state |= meta_block(at, n, i, config.mlp, gates="w12", out="w3")
    return {prefix + name: array for name, array in state.items()}


def timm_state(config: ViTConfig, n: Mapping[str, np.ndarray]) -> State:
    """timm's file: no mask token; with registers, the class token's position is already added to it."""
    state = {
        "cls_token": n["cls"],
        "pos_embed": n["positions"],
        "patch_embed.proj.weight": n["patch.weight"],
        "patch_embed.proj.bias": n["patch.bias"],
        "norm.weight": n["norm.weight"],
        "norm.bias": n["norm.bias"],
    }
    if config.registers:
        state["reg_token"] = n["registers"]
        state["cls_token"] = n["cls"] + n["positions"][:, :1]
        state["pos_embed"] = n["positions"][:, 1:]
    for i in range(config.depth):
        state |= meta_block(f"blocks.{i}", n, i, config.mlp, gates="fc1", out="fc2")
    return state


def meta_block(at: str, n: Mapping[str, np.ndarray], i: int, mlp: str, *, gates: str, out: str) -> State:
    names = {"norm1": "norm1", "norm2": "norm2", "attn.proj": "proj"}
    names |= {"mlp.fc1": "fc1", "mlp.fc2": "fc2"} if mlp == "gelu" else {f"mlp.{out}": "out"}
    state = {f"{at}.ls1.gamma": n[f"{i}.scale1"], f"{at}.ls2.gamma": n[f"{i}.scale2"]}
    for kind in ("weight", "bias"):
        state |= {f"{at}.{name}.{kind}": n[f"{i}.{source}.{kind}"] for name, source in names.items()}
        state[f"{at}.attn.qkv.{kind}"] = np.concatenate([n[f"{i}.{part}.{kind}"] for part in "qkv"])
        if mlp == "swiglu":
            state[f"{at}.mlp.{gates}.{kind}"] = np.concatenate([n[f"{i}.{part}.{kind}"] for part in ("gate", "value")])
    return state


def transformers_state(config: ViTConfig, n: Mapping[str, np.ndarray], prefix: str = "") -> State:
    """The published file of transformers."""
    state = {
        "embeddings.cls_token": n["cls"],
        "embeddings.position_embeddings": n["positions"],
        "embeddings.mask_token": n["mask"],
        "embeddings.patch_embeddings.projection.weight": n["patch.weight"],
        "embeddings.patch_embeddings.projection.bias": n["patch.bias"],
        "layernorm.weight": n["norm.weight"],
        "layernorm.bias": n["norm.bias"],
    }
    if config.registers:
        state["embeddings.register_tokens"] = n["registers"]
    attention = {"q": "attention.query", "k": "attention.key", "v": "attention.value", "proj": "output.dense"}
    names = {f"attention.{theirs}": ours for ours, theirs in attention.items()} | {"norm1": "norm1", "norm2": "norm2"}
    names |= {"mlp.fc1": "fc1", "mlp.fc2": "fc2"} if config.mlp == "gelu" else {"mlp.weights_out": "out"}
    for i in range(config.depth):
        at = f"encoder.layer.{i}"
        state |= {f"{at}.layer_scale{j}.lambda1": n[f"{i}.scale{j}"] for j in (1, 2)}
        for kind in ("weight", "bias"):
            state |= {f"{at}.{name}.{kind}": n[f"{i}.{source}.{kind}"] for name, source in names.items()}
            if config.mlp == "swiglu":
                gates = np.concatenate([n[f"{i}.gate.{kind}"], n[f"{i}.value.{kind}"]])
                state[f"{at}.mlp.weights_in.{kind}"] = gates
    return {prefix + name: array for name, array in state.items()}


WRITERS = {"dinov2/hub": hub_state, "timm": timm_state, "dinov2/transformers": transformers_state}


# Files ----------------------------------------------------------------------------------------------------------------


def write_safetensors(path: Path, state: Mapping[str, np.ndarray]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(array) for name, array in state.items()}, path)
    return path


def write_shards(folder: Path, state: Mapping[str, np.ndarray]) -> Path:
    """Two shards and their index, as transformers writes what is too large for one file."""
    names = sorted(state)
    parts = (names[: len(names) // 2], names[len(names) // 2 :])
    files = [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    for file, part in zip(files, parts, strict=True):
        write_safetensors(folder / file, {name: state[name] for name in part})
    where = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    total = sum(array.nbytes for array in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def transformers_json(config: ViTConfig) -> dict[str, Any]:
    """The config.json beside a published file, as far as it matters here."""
    registers = {"num_register_tokens": config.registers} if config.registers else {}
    return registers | {
        "architectures": ["Dinov2WithRegistersModel" if config.registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if config.registers else "dinov2",
        "hidden_act": "gelu",
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.depth,
        "layer_norm_eps": config.eps,
        "use_swiglu_ffn": config.mlp == "swiglu",
    }

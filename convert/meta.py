"""The names of Meta's own Vision Transformers, which timm follows: DINO, iBOT, DeiT, DINOv2, timm's plain ones.

One table and one reading of shapes serve them all; what each library or family calls otherwise is a `Names`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import isqrt
from typing import Any

import numpy as np

from jaxvit import ViTConfig
from jaxvit.model.config import CHOICES, KINDS

from .catalogue import known
from .engine import (
    ConversionError,
    Decided,
    Rule,
    Tensors,
    copy,
    linear,
    norm,
    patch_conv,
    split_linear,
    squeeze,
    tensor_shape,
)
from .preparation import given
from .published import heads

MEASURED = {"depth", "width", "hidden", "cls", "registers", "patch", "channels", "grid", "positions", "layer_scale"} | {
    "norm", "patch_bias", "qkv_bias", "proj_bias", "patch_norm", "pre_norm", "qk_norm", "branch_norms", "classes",
    "mask_token",
}  # fmt: skip
"""Fields of a config that shapes tell; where a file beside them tells them too, both must agree."""

PLAIN = dict.fromkeys(("patch_bias", "qkv_bias", "proj_bias"), True) | {"norm": "layer"}
PLAIN |= dict.fromkeys(("patch_norm", "pre_norm", "qk_norm", "branch_norms"), False)
"""What all of Meta's families have in common that other models of these names do not."""


@dataclass(frozen=True)
class Names:
    """What differs.

    Attributes:
      registers: tokens between [CLS] and the patches, in order.
      scales: LayerScale's two vectors.
      gates: the layers of a SwiGLU: one that holds gate and value, in this order, or two.
      out: its last layer.
      mask: the token that stands in for hidden patches, [1, D]; empty if the library has none.
    """

    registers: tuple[str, ...] = ("reg_token", "dist_token")
    scales: tuple[str, str] = ("ls1.gamma", "ls2.gamma")
    gates: tuple[str, ...] = ("fc1",)
    out: str = "fc2"
    mask: str = ""


BLOCK = "blocks.{i}"


def table(config: ViTConfig, tensors: Tensors, names: Names) -> list[Rule]:
    """The rules for a model of `config`. Of the tensors only names and shapes matter."""
    c = config
    return [
        *patch_conv("patch_embed.proj", "patch_embed", c.patch_bias, c.channels),
        *when(c.patch_norm, norm("patch_embed.norm", "patch_norm", c.norm)),
        *token_rules(c, tensors, names.registers),
        *when(c.mask_token, [squeeze(names.mask, "mask_token")]),
        *when(c.pre_norm, norm("norm_pre", "pre_norm", c.norm)),
        *norm(f"{BLOCK}.norm1", "blocks.norm1", c.norm),
        *linear(f"{BLOCK}.attn.qkv", "blocks.attn.qkv", c.qkv_bias),  # rows: all queries, keys, values; each by head
        *when(c.qk_norm, norm(f"{BLOCK}.attn.q_norm", "blocks.attn.q_norm", c.norm)),
        *when(c.qk_norm, norm(f"{BLOCK}.attn.k_norm", "blocks.attn.k_norm", c.norm)),
        *when(c.branch_norms, norm(f"{BLOCK}.attn.norm", "blocks.attn.norm", c.norm)),
        *linear(f"{BLOCK}.attn.proj", "blocks.attn.proj", c.proj_bias),
        *when(c.layer_scale, [copy(f"{BLOCK}.{names.scales[0]}", "blocks.scale1.gamma")]),
        *norm(f"{BLOCK}.norm2", "blocks.norm2", c.norm),
        *mlp_rules(c, names),
        *when(c.layer_scale, [copy(f"{BLOCK}.{names.scales[1]}", "blocks.scale2.gamma")]),
        *when(c.final_norm == "tokens", norm("norm", "norm", c.norm)),
        *when(c.final_norm == "pooled", norm("fc_norm", "norm", c.norm)),
        *when(c.pool == "attention", attention_pool(c)),
        *when(c.classes > 0, linear("head", "head.linear")),
        *when(c.classes > 0 and c.pool == "distilled", linear("head_dist", "head.distilled")),
    ]


def when(condition: bool, rules: Sequence[Rule]) -> Sequence[Rule]:
    return rules if condition else ()


def token_rules(
    config: ViTConfig,
    tensors: Tensors,
    registers: Sequence[str],
    cls: str = "cls_token",
    positions: str = "pos_embed",
) -> list[Rule]:
    """[CLS] and registers, each [1, n, D] in the source, and positions: of the patches, before which may stand those of
    [CLS] alone or of all tokens. A token and its position are only ever used as their sum, and jaxvit keeps that.
    """
    before = ([cls] if config.cls else []) + [name for name in registers if name in tensors]
    targets = ["cls"] * config.cls + ["registers"] * (config.registers > 0) + ["positions"] * config.positions
    if not config.positions:
        positioned = 0
    else:
        shape = tensor_shape(tensors, positions) if positions in tensors else (0, 0, 0)
        positioned = max(shape[-2] - config.grid[0] * config.grid[1], 0)

    def join(*arrays: np.ndarray) -> list[np.ndarray]:
        # reshape, where indexing and broadcasting would make do with other shapes.
        # In float64, so that the sum is rounded once, to the type of the model.
        tokens = [a.reshape(-1, config.width) for a in arrays[: len(before)]]
        prefix = np.concatenate([np.zeros((0, config.width)), *tokens])
        results = [prefix]
        if config.positions:
            rows = arrays[-1].reshape(-1, config.width)
            prefix = np.concatenate([prefix[:positioned] + rows[:positioned], prefix[positioned:]])
            results = [prefix, rows[positioned:].reshape(*config.grid, config.width)]
        if len(prefix) != config.prefix:
            raise ValueError("too many or too few tokens")
        own = ([prefix[0]] if config.cls else []) + ([prefix[config.cls :]] if config.registers else [])
        return own + results[1:]

    sources = before + ([positions] if config.positions else [])

    def split(*parts: np.ndarray) -> list[np.ndarray]:
        """A sum of a token and its position is written as the token; the position is 0."""
        parts = tuple(a.reshape(-1, config.width) for a in parts)
        own, rows = (parts[:-1], parts[-1:]) if config.positions else (parts, ())
        ends = np.cumsum([math.prod(tensor_shape(tensors, name)) // config.width for name in before])
        tokens = np.split(np.concatenate(own), ends[:-1]) if own else []
        padded = [np.concatenate([np.zeros((positioned, config.width), a.dtype), a]) for a in rows]
        return [a.reshape(tensor_shape(tensors, name)) for name, a in zip(sources, [*tokens, *padded], strict=True)]

    return [Rule(tuple(sources), tuple(targets), join, split)] if sources else []


def mlp_rules(c: ViTConfig, names: Names) -> list[Rule]:
    at = f"{BLOCK}.mlp"
    rules = [*when(c.branch_norms, norm(f"{at}.norm", "blocks.mlp.norm", c.norm))]
    if c.mlp != "swiglu":
        return rules + plain_mlp(at, c.proj_bias)
    ours = ("blocks.mlp.gate", "blocks.mlp.value")
    if len(names.gates) == 1:
        rules += split_linear(f"{at}.{names.gates[0]}", ours, c.proj_bias)
    else:
        for theirs, target in zip(names.gates, ours, strict=True):
            rules += linear(f"{at}.{theirs}", target, c.proj_bias)
    return rules + linear(f"{at}.{names.out}", "blocks.mlp.out", c.proj_bias)


def plain_mlp(at: str, bias: bool = True) -> list[Rule]:
    return [*linear(f"{at}.fc1", "blocks.mlp.fc1", bias), *linear(f"{at}.fc2", "blocks.mlp.fc2", bias)]


def attention_pool(c: ViTConfig) -> list[Rule]:
    """timm's `AttentionPoolLatent`."""
    rules = [Rule(("attn_pool.latent",), ("pool.latent",), lambda a: [a.reshape(c.width)], lambda a: [a[None, None]])]
    for name in ("q", "kv", "proj", "mlp.fc1", "mlp.fc2"):
        rules += linear(f"attn_pool.{name}", f"pool.{name.removeprefix('mlp.')}")
    return rules + norm("attn_pool.norm", "pool.norm", c.norm)


# Configs --------------------------------------------------------------------------------------------------------------


def read_config(
    tensors: Tensors,
    hints: Mapping[str, Any],
    names: Names,
    *,
    families: Sequence[str],
    alone: bool = True,
    always: Mapping[str, Any] | None = None,
    before: Sequence[int] | None = None,
    **family: Any,
) -> Decided:
    """The config that shapes imply, with what they do not tell from `hints`, and else from `family`.

    Args:
      hints: fields of a config that a file beside the tensors gives, or a module.
      families, alone: whose names the tensors have, for `convert.published.heads`.
      always: measured fields that are the same in the whole family. A tensor that is lacking then is missing, where it
        would otherwise make another model.
      before: how many of the tokens before the patches have positions; by default all, [CLS] alone, or none.
      family: fields that are the same in the whole family and that shapes do not tell: resampling, eps ..
    """
    width, channels, patch, patch_x = shape_of(tensors, "patch_embed.proj.weight", 4)
    fc1, fc2 = (f"blocks.0.mlp.{name}.weight" for name in (names.gates[0], names.out))
    gated = fc1 in tensors and fc2 in tensors
    gated = gated and (len(names.gates) == 2 or shape_of(tensors, fc1, 2)[0] == 2 * shape_of(tensors, fc2, 2)[1])
    plain = "blocks.0.mlp.fc2.weight"
    cls = "cls_token" in tensors
    registers = sum(shape_of(tensors, name, 3)[1] for name in names.registers if name in tensors)
    final = "tokens" if "norm.weight" in tensors else "pooled" if "fc_norm.weight" in tensors else "none"
    pool = "mean" if final == "pooled" or not cls else "cls"
    pool = "attention" if "attn_pool.latent" in tensors else "distilled" if "dist_token" in tensors else pool
    found: dict[str, Any] = dict(
        depth=count_blocks(tensors, BLOCK),
        width=width,
        channels=channels,
        hidden=shape_of(tensors, fc2 if gated else plain, 2)[1],
        cls=cls,
        registers=registers,
        patch=square(patch, patch_x),
        positions="pos_embed" in tensors,
        mask_token=names.mask in tensors,
        patch_bias="patch_embed.proj.bias" in tensors,
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
        proj_bias="blocks.0.attn.proj.bias" in tensors,
        patch_norm="patch_embed.norm.weight" in tensors,
        pre_norm="norm_pre.weight" in tensors,
        qk_norm="blocks.0.attn.q_norm.weight" in tensors,
        branch_norms="blocks.0.attn.norm.weight" in tensors,
        layer_scale=f"blocks.0.{names.scales[0]}" in tensors,
        norm="layer" if "blocks.0.norm1.bias" in tensors else "rms",
        classes=shape_of(tensors, "head.weight", 2)[0] if "head.weight" in tensors else 0,
    )
    found |= always or {}
    told, assumed = with_heads(found, hints, families, alone)
    if found["positions"]:
        counts = before or (int(cls), cls + registers, 0)
        found["grid"], why = grid_of(tensors, "pos_embed", 3, counts, found["patch"], hints, families)
        assumed |= {"grid": why} if why else {}
    told |= dict(mlp="gelu", final_norm=final, pool=pool)
    return decide(found, told | family, {**hints, **({"mlp": "swiglu"} if gated else {})}, assumed)


def with_heads(
    found: Mapping[str, Any], hints: Mapping[str, Any], families: Sequence[str], alone: bool = True
) -> tuple[dict[str, Any], dict[str, str]]:
    """The number of heads as a field that was told, unless `hints` give it, and what about it is an assumption."""
    if "heads" in hints:
        return {}, {}
    wrapped = not OWN_PREFIX.fullmatch(hints.get("prefix", ""))
    own = () if wrapped and not alone else families
    count, why = heads(found["width"], found["depth"], own, alone and not wrapped)
    return {"heads": count}, {"heads": why} if why else {}


OWN_PREFIX = re.compile(
    r"((module|model|_orig_mod|teacher|student|backbone|teacher_backbone|student_backbone|encoder|visual|vision_model|"
    r"dinov2|dinov2_with_registers|clip|vision_tower|trunk|model_ema|ema)\.)*"
)
"""Wrappers in which families publish their models. Other wrappers may hold another family of the same names."""


def field_of(name: str, value: Any) -> Any:
    """A field of a config from what JSON, a command line or Python say: a grid as "2x8" or [2, 8], 1 for 1.0.

    Raises:
      ConversionError: a config has no such field, or a field no such value.
    """
    types = {field.name: str(field.type) for field in fields(ViTConfig)}
    if name not in types:
        raise ConversionError(f"a config has no {name}; it has {', '.join(types)}")
    expected = ""
    if name == "grid":
        try:
            rows, columns = value.split("x") if isinstance(value, str) else value
            return int(rows), int(columns)
        except (TypeError, ValueError):
            expected = "rows and columns of patches, such as 2x8"
    elif name == "preprocess":
        return given(value)
    elif name in CHOICES and value not in list(CHOICES[name]):
        expected = f"one of {', '.join(map(str, CHOICES[name]))}"
    elif types[name] in KINDS:
        kind, words = KINDS[types[name]]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            expected = words
        elif types[name] == "float":
            value = float(value)
    if expected:
        raise ConversionError(f"{name} is {value!r}; expected {expected}")
    return value


def decide(
    found: Mapping[str, Any],
    told: Mapping[str, Any],
    hints: Mapping[str, Any],
    assumed: Mapping[str, str] | None = None,
) -> Decided:
    """The config of fields that were measured, fields told by the family, and hints, which must not contradict the
    former; `assumed` are those of the told fields that are assumptions, and why.
    """
    names = {field.name for field in fields(ViTConfig)}
    differ = [
        f"{name} {value}, not {hints[name]}"
        for name, value in found.items()
        if name in hints and hints[name] != value and name in MEASURED
    ]
    if differ and "architecture" in hints:
        raise ConversionError(f"this is not {hints['architecture']}: {another_architecture(differ, found, hints)}")
    if differ:
        raise ConversionError(f"the checkpoint's tensors and its config disagree: {'; '.join(differ)}")
    config = ViTConfig(**{**told, **{name: value for name, value in hints.items() if name in names}, **found})
    c = config
    matrices = c.depth * (4 * c.width + 3 * c.hidden)
    vectors = c.grid[0] * c.grid[1] * c.positions + c.registers + c.classes + c.channels * c.patch**2
    if c.width * (matrices + vectors) > LARGEST:  # sizes of two tensors, each small, may multiply to anything
        sizes = ", ".join(f"{name} {getattr(c, name)}" for name in ("depth", "width", "hidden", "registers", "grid"))
        raise ConversionError(
            f"the checkpoint's sizes ({sizes}) would make a model of more than {LARGEST:,} parameters"
        )
    return Decided(config).assuming(assumed or {}, hints)


def another_architecture(differ: Sequence[str], found: Mapping[str, Any], hints: Mapping[str, Any]) -> str:
    """In which sizes tensors differ from the architecture that was named, and what to say."""
    names = [name for name in found if name in hints and hints[name] != found[name] and name in MEASURED]
    told = " ".join(f"--set {name}={json.dumps(found[name])}" for name in names)
    return (
        f"the tensors have {'; '.join(differ)}. Name the right one; or, if this is the same with other sizes, say so "
        f"({told}, config={ {name: found[name] for name in names} }), and --set heads=.. unless they are still "
        f"{hints.get('heads')}"
    )


LARGEST = 2**36
"""Parameters of a model; more than any Vision Transformer has."""


def grid_of(
    tensors: Tensors,
    name: str,
    axes: int,
    before: Sequence[int],
    patch: int,
    hints: Mapping[str, Any],
    families: Sequence[str],
) -> tuple[tuple[int, int], str]:
    """The grid of positions [.., rows, D], of which the first may be those of so many tokens before the patches; and
    why it is an assumption, nothing where it is known.

    It is known where `hints` give a `grid`, the pixels of an `image`, or a crop, that fit; and where the families have
    published it. Else it is a square: where several counts leave one (4 = 2 x 2, or 1 + 3), the first of them.
    """
    rows = shape_of(tensors, name, axes)[-2]
    counts = [rows - count for count in dict.fromkeys(before) if rows > count]
    image, preprocess = hints.get("image"), hints.get("preprocess")
    for hint in (hints.get("grid"), image and (image[0] // patch, image[1] // patch)):
        if hint and hint[0] * hint[1] in counts:
            return hint, ""
    squares = [isqrt(count) for count in counts if isqrt(count) ** 2 == count]
    if not squares:
        tokens = " or ".join(map(str, dict.fromkeys(before)))
        raise ConversionError(
            f"{name} has {rows} rows; expected a square number of patches and {tokens} tokens before them: for a grid "
            f"that is not square, give its rows and columns, such as --set grid=2x8 (config={{'grid': (2, 8)}})"
        )
    side = squares[0]
    published = {(c.config.patch, c.config.grid[0]) for c in known() if c.family in families}
    fits = preprocess is not None and preprocess.size == (side * patch, side * patch)
    return (side, side), "" if fits or (patch, side) in published else f"a square of {side**2} positions"


def square(patch: int, patch_x: int) -> int:
    if patch != patch_x:
        raise ConversionError(f"patches of {patch}x{patch_x} pixels: expected squares")
    return patch


def count_blocks(tensors: Tensors, block: str) -> int:
    pattern = re.compile(re.escape(block).replace(r"\{i\}", r"(\d+)") + r"\.")
    numbers = {int(match[1]) for name in tensors if (match := pattern.match(name))}
    if len(numbers) != max(numbers) + 1:
        listed = ", ".join(map(str, sorted(numbers)))
        raise ConversionError(f"the checkpoint's blocks are numbered {listed}: expected no gaps from 0 to the last")
    return len(numbers)


def shape_of(tensors: Tensors, name: str, axes: int) -> tuple[int, ...]:
    shape = tensor_shape(tensors, name)
    if len(shape) != axes:
        raise ConversionError(f"{name} has shape {list(shape)}, expected {axes} axes")
    return shape

"""DeiT III as its authors publish it: LayerScale as `gamma_1` and `gamma_2`, positions of patches and none of [CLS].

Of 224 or 384 pixels; classifiers of 1,000 or 21,841 classes come along. The first DeiT, distilled or not, has timm's
names (`convert.timm`).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

from .engine import Decided, Layout, Tensors, tensor_shape
from .meta import PLAIN, Names, read_config, shape_of, table
from .preparation import META

NAMES = Names(registers=(), scales=("gamma_1", "gamma_2"))


def config(tensors: Tensors, hints: Mapping[str, Any]) -> Decided:
    *_, patch = shape_of(tensors, "patch_embed.proj.weight", 4)
    side = isqrt(shape_of(tensors, "pos_embed", 3)[1]) * patch
    return read_config(
        tensors,
        hints,
        NAMES,
        families=("DeiT III",),  # huge has heads of 80
        always={**PLAIN, "layer_scale": True},
        before=(0,),
        final_norm="tokens",
        resampling="bicubic_antialias",
        preprocess=META.at(side) if side else META,
    )


def is_deit3(tensors: Tensors, hints: Mapping[str, Any]) -> bool:
    """iBOT calls LayerScale the same, but has a position for [CLS]."""
    shape, grid = tensor_shape(tensors, "pos_embed"), hints.get("grid")
    if len(shape) != 3:
        return False
    return shape[1] == grid[0] * grid[1] if grid else isqrt(shape[1]) ** 2 == shape[1]


LAYOUT = Layout(
    name="deit3",
    anchors=("cls_token", "pos_embed", "blocks.0.attn.qkv.weight", "blocks.0.gamma_1"),
    config=config,
    rules=lambda config, tensors: table(config, tensors, NAMES),
    accepts=is_deit3,
)
"""Official files keep it under "model"."""

"""DINO and iBOT as their authors publish them: bare backbones, and full checkpoints with a teacher and a student.

The two share their names. iBOT has LayerScale only if it was trained with it, may keep the token that stood in for
masked patches, and, with mean pooling, has its last norm behind the pool.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxvit import ViTConfig

from .engine import Layout, Tensors
from .meta import PLAIN, Names, read_config, table

NAMES = Names(registers=(), scales=("gamma_1", "gamma_2"))


def config(tensors: Tensors, hints: Mapping[str, Any]) -> ViTConfig:
    final = "pooled" if "fc_norm.weight" in tensors else "tokens"
    return read_config(tensors, hints, NAMES, always=PLAIN, before=(1,), final_norm=final, resampling="bicubic_offset")


LAYOUT = Layout(
    name="dino",
    anchors=("cls_token", "pos_embed", "blocks.0.attn.qkv.weight", "blocks.0.norm1.weight"),
    config=config,
    rules=lambda config, tensors: table(config, tensors, NAMES),
    ignored={
        "masked_embed": "stands in for hidden patches during pretraining",
        **dict.fromkeys(("head.mlp.*", "head.last_*"), "the projection head of pretraining"),
        **dict.fromkeys(("module.head.mlp.*", "module.head.last_*"), "the same, of a student on several GPUs"),
    },
    accepts=lambda tensors, hints: "blocks.0.ls1.gamma" not in tensors and "head.weight" not in tensors,
)

"""DINO and iBOT as their authors publish them: bare backbones, and full checkpoints with a teacher and a student.

The two share their names. iBOT has LayerScale only if it was trained with it, may keep the token that stood in for
masked patches, and, with mean pooling, has its last norm behind the pool.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .engine import Decided, Layout, Tensors
from .meta import PLAIN, Names, read_config, table
from .preparation import META

NAMES = Names(registers=(), scales=("gamma_1", "gamma_2"), mask="masked_embed")


def config(tensors: Tensors, hints: Mapping[str, Any]) -> Decided:
    final = "pooled" if "fc_norm.weight" in tensors else "tokens"
    own = is_own(tensors, hints)
    found = read_config(
        tensors,
        hints,
        NAMES,
        families=("DINO", "iBOT"),
        alone=own,
        always=PLAIN,
        before=(1,),
        final_norm=final,
        resampling="bicubic_offset",
        preprocess=META,
    )
    if own:
        return found
    others = "MAE, MoCo v3 and timm's models without a classifier have the same names"
    assumed = {"resampling": f"as DINO does it; {others}, and timm's rule is bicubic_antialias"}
    assumed["preprocess"] = f"DINO's; {others}"
    return found.assuming({**found.assumed, **assumed}, hints)


def is_own(tensors: Tensors, hints: Mapping[str, Any]) -> bool:
    """Whether this is DINO's or iBOT's for sure: it was beside a student or a teacher, or has what only these have."""
    prefix = hints.get("prefix", "")
    # `teacher_backbone.` is the name of libraries that train backbones of others.
    beside = "" if "_backbone" in prefix else prefix + str(hints.get("branch", ""))
    marks = ("masked_embed", "blocks.0.gamma_1", "head.mlp.0.weight", "head.last_layer.weight_v")
    return "teacher" in beside or "student" in beside or any(name in tensors for name in marks)


LAYOUT = Layout(
    name="dino",
    anchors=("cls_token", "pos_embed", "blocks.0.attn.qkv.weight", "blocks.0.norm1.weight"),
    config=config,
    rules=lambda config, tensors: table(config, tensors, NAMES),
    ignored={
        **dict.fromkeys(("head.mlp.*", "head.last_*"), "the projection head of pretraining"),
        **dict.fromkeys(("module.head.mlp.*", "module.head.last_*"), "the same, of a student on several GPUs"),
    },
    accepts=lambda tensors, hints: "blocks.0.ls1.gamma" not in tensors and "head.weight" not in tensors,
)

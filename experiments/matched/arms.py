"""The arms: what is different of models that are trained on the same images in the same order from the same seeds.

What an arm changes inside the model is an edit, in training and afterwards: the parameters stay those of a plain ViT.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from jaxvit import Take, ViT, ViTConfig, knockout, merge, patch, scale_skip
from jaxvit.model.edits import Edits
from jaxvit.model.sites import Record

REGISTERS = 4
LATE = 2
"""Layers at the end that [CLS] takes part in, where it enters late."""


class Arm(NamedTuple):
    """One way to train.

    Attributes:
      title: what is different.
      registers: how many.
      mean: whether there is no [CLS], and the mean of the patches is classified.
      edits: what is changed inside the model, always; None: nothing.
      penalty: weight in the loss of the share of the skip path in [CLS]'s last update.
    """

    title: str
    registers: int = 0
    mean: bool = False
    edits: Callable[[ViT], Edits] | None = None
    penalty: float = 0.0

    def config(self, base: ViTConfig) -> ViTConfig:
        """The sizes of a model without registers, for this arm."""
        pool = dict(cls=False, pool="mean") if self.mean else {}
        return replace(base, registers=self.registers, **pool)

    def changes(self, model: ViT) -> Edits | None:
        return None if self.edits is None else self.edits(model)

    @property
    def records(self) -> Record:
        """What the penalty reads."""
        last = Take(layers=-1, tokens="prefix")
        return {"skip_attn": last, "attn_out": last} if self.penalty else ()


def no_registers_for_cls(model: ViT) -> Edits:
    """In the last layer [CLS] does not attend to the registers."""
    return knockout(model, query="cls", key="registers", layers=-1)


def late_cls(model: ViT) -> Edits:
    """[CLS] enters in front of the last two layers: nobody attends to it before, and what it had read is dropped."""
    enters = model.config.depth - LATE
    others = ["registers", "patches"] if model.config.registers else "patches"
    if model.cls is None or enters < 1:
        raise ValueError(f"[CLS] cannot enter late in a model of {model.config.depth} layers, or without [CLS]")
    hidden = knockout(model, query=others, key="cls", layers=range(enters))
    token = model.pre_norm(model.cls[...])
    fresh = jnp.broadcast_to(token, (1, 1 + model.config.registers + 1, len(token)))
    return merge(hidden, patch(model, "resid_pre", fresh, over="groups", tokens="cls", layers=enters))


def no_residual(model: ViT) -> Edits:
    """In the last layer [CLS] is what attention brings: its own stream is not added."""
    return scale_skip(model, 0.0, layers=-1, tokens="cls")


def patches_only(model: ViT) -> Edits:
    """In the last layer [CLS] only asks: it attends to patches alone, and its own stream is not added."""
    others = ["cls", "registers"] if model.config.registers else "cls"
    return merge(knockout(model, query="cls", key=others, layers=-1), no_residual(model))


ARMS = {
    "R0": Arm("no registers"),
    "R4": Arm("4 registers", REGISTERS),
    "R4m": Arm("4 registers, masked from [CLS] in the last layer", REGISTERS, edits=no_registers_for_cls),
    "late": Arm("4 registers, [CLS] enters in front of the last two layers", REGISTERS, edits=late_cls),
    "no-residual": Arm("4 registers, the residual of [CLS] is cut in the last layer", REGISTERS, edits=no_residual),
    "patches-only": Arm("4 registers, [CLS] reads patches alone in the last layer", REGISTERS, edits=patches_only),
    "mean-pool": Arm("4 registers, no [CLS]: the mean of the patches", REGISTERS, mean=True),
    "R0-penalty": Arm("no registers, a penalty on the skip share", penalty=0.1),
    "R4-penalty": Arm("4 registers, a penalty on the skip share", REGISTERS, penalty=0.1),
}


def skip_share(skip_BD: Array, update_BD: Array) -> Array:
    """The share of the skip path in the last layer: |skip|^2 / (|skip|^2 + |update|^2), [B]."""
    skip, update = (jnp.square(a.astype(jnp.float32)).sum(-1) for a in (skip_BD, update_BD))
    return skip / (skip + update)

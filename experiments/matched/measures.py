"""What is measured of a trained arm on the scenes to test on; one number an image each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxvit import Take, ViT
from jaxvit.analysis.decompose import attention_mass
from jaxvit.tasks.classify import t_interval

from .arms import Arm, skip_share

TITLES = {
    "accuracy": "accuracy on new scenes",
    "skip share": "share of the skip path in [CLS]'s last update",
    "mass on registers": "attention of [CLS] on registers, last layer",
    "mass on patches": "attention of [CLS] on patches, last layer",
    "largest norm": "largest norm of a patch ÷ the median, last layer",
}


def of_images(arm: Arm, model: ViT, images: Array, labels: Array) -> dict[str, Array]:
    """Name -> [B]; what a model without [CLS] has none of is left out."""
    c, last = model.config, Take(layers=-1, tokens="prefix")
    record = {"resid_post": Take(layers=-1)}
    record |= dict.fromkeys(("skip_attn", "attn_out", "pattern"), last) if c.cls else {}
    out = model(images, arm.changes(model), record)
    assert out.logits is not None, "models of arms have classes"
    norms = jnp.linalg.norm(out.trace["resid_post"][0][:, model.prefix :], axis=-1)
    found = {
        "accuracy": (out.logits.argmax(-1) == labels).astype(jnp.float32),
        "largest norm": norms.max(1) / jnp.median(norms, axis=1),
    }
    if c.cls:
        layout = c.layout(*images.shape[1:3])
        mass = attention_mass(out.trace["pattern"][0][:, :, 0], layout).mean(axis=1)  # [B, G]
        found["skip share"] = skip_share(out.trace["skip_attn"][0][:, 0], out.trace["attn_out"][0][:, 0])
        found["mass on patches"] = mass[:, -1]
        if c.registers:
            found["mass on registers"] = mass[:, 1:-1].sum(1)
    return found


def compared(arms: Mapping[str, Mapping[str, Any]], baseline: str) -> dict[str, Any]:
    """Of each arm and measure, the mean over seeds, and the difference from the baseline with its interval.

    Seeds are paired: a seed gives every arm the same scenes in the same order. The interval is Student's.

    Args:
      arms: name -> measure -> one number a seed.

    Returns:
      arm -> measure -> {"mean", "difference"}; without a difference for the baseline, where it lacks the measure, and
      from a single seed. The difference is {"mean", "low", "high"}.
    """
    found: dict[str, Any] = {}
    for name, measures in arms.items():
        found[name] = {}
        for measure, values in measures.items():
            mine, other = np.asarray(values, np.float64), arms.get(baseline, {}).get(measure)
            row: dict[str, Any] = {"mean": float(mine.mean())}
            if name != baseline and other is not None and len(mine) > 1:
                row["difference"] = t_interval(mine - np.asarray(other, np.float64))
            found[name][measure] = row
    return found

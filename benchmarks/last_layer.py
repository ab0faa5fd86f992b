"""The paper's quantities of the last layer in one forward pass: what `speed` times as "last-layer analysis"."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxvit import Take, ViT
from jaxvit.analysis.decompose import attention_mass, attention_parts, patch_maps, projection_shares
from jaxvit.analysis.similarity import cosine


def analyse(model: ViT, images: Float[Array, "B H W 3"]) -> dict[str, Array]:
    """Mass of [CLS]'s attention by group (A1); cosine of each part with the update, and maps over patches (A5); norms
    and projection shares (A7); cosines over depth, raw and after the final norm (A8); vectors for CKA (A9).
    """
    last, prefix = Take(layers=-1), Take(layers=-1, tokens="prefix")
    record = {"pattern": last, "v": last, "skip_attn": prefix, "attn_out": prefix, "resid_mid": prefix}
    record |= {"mlp_out": prefix, "resid_post": Take(tokens="prefix")}
    out = model(images, record=record)
    layout = model.config.layout(*images.shape[1:3])
    pattern, v = out.trace["pattern"][-1][:, :, :1], out.trace["v"][-1]  # the row of [CLS]
    skip, update, middle, mlp, after = (
        out.trace[site][-1][:, 0] for site in ("skip_attn", "attn_out", "resid_mid", "mlp_out", "resid_post")
    )
    parts = attention_parts(model, -1, pattern, v, layout)
    groups = dict(zip(layout.group_names, jnp.moveaxis(parts.parts[:, 0], 1, 0), strict=True))
    bias = jnp.broadcast_to(parts.bias[None], update.shape)
    summands = {"skip": skip, **groups, "bias": bias, "mlp": mlp}
    found = {"mass": attention_mass(pattern[:, :, 0].mean(axis=1), layout), "full": middle, "skip": skip, **groups}
    found |= {f"norm {name}": jnp.linalg.norm(part, axis=-1) for name, part in summands.items()}
    found |= {f"share {name}": share for name, share in projection_shares(summands, after).items()}
    for name, group in groups.items():
        found[f"cosine {name}"] = cosine(group, update)
        found[f"cosine {name} without bias"] = cosine(group, update - bias)
    over_depth = out.trace["resid_post"][:, :, 0]
    normed = model.norm(over_depth)
    maps = patch_maps(model, -1, pattern, v, layout, update[:, None])
    return found | maps._asdict() | {"raw": cosine(over_depth, over_depth[-1:]), "normed": cosine(normed, normed[-1:])}

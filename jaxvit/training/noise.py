"""What is left out at random while training: branches, patches, and what masks hide. Functions of a key."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxvit.model.edits import Edit, Edits


def stochastic_depth(key: Array, depth: int, batch: int, rate: float) -> Edits:
    """Drops branches of single images at random, and scales those that stay (Huang et al. 2016, arXiv 1603.09382).

    It is an edit like any other. As in timm, the rate rises evenly from 0 in the first layer to `rate` in the last, and
    attention and MLP are dropped independently.

    Args:
      depth, batch: numbers of layers and of images.
      rate: of the last layer, from 0 and below 1.

    Raises:
      ValueError: another rate.

    Example:

        apply(learn, frozen, images, stochastic_depth(key, 12, len(images), 0.1))
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate is {rate}; expected 0 or more, and less than 1")
    stays = 1 - jnp.linspace(0, rate, depth)[:, None]
    edits = {}
    for site, own in zip(("attn_out", "mlp_out"), jax.random.split(key), strict=True):
        drawn = jax.random.uniform(own, (depth, batch)) < stays
        edits[site] = Edit(1.0, scale=jnp.where(drawn, 1 / stays, 0.0)[:, :, None, None])
    return edits


def some_patches(key: Array, batch: int, patches: int, keep: float) -> Int[Array, "B K"]:
    """Numbers of the patches that are kept, drawn for each image and in order: for `apply(.., kept=)`.

    Args:
      keep: which part of the patches, above 0 and at most 1; at least one.

    Raises:
      ValueError: another part.

    Example:

        kept = some_patches(jax.random.key(0), len(images), model.layout.patches, 0.25)
        apply(learn, frozen, images, kept=kept).patches  # [B, K, D], a quarter of the patches
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}; expected more than 0, and at most 1")
    count = max(round(keep * patches), 1)
    order = jax.random.uniform(key, (batch, patches)).argsort(axis=1)[:, :count]
    return jnp.sort(order, axis=1)


def random_mask(key: Array, batch: int, patches: int, part: float) -> Bool[Array, "B N"]:
    """Which patches are hidden, the same number of each image: for `apply(.., masked=)`.

    Raises:
      ValueError: a part that is not from 0 to 1.

    Example:

        masked = random_mask(jax.random.key(0), len(images), 16, 0.4)  # [B, N]
    """
    if not 0 <= part <= 1:
        raise ValueError(f"part is {part}; expected 0 to 1")
    rank = jax.random.uniform(key, (batch, patches)).argsort(axis=1).argsort(axis=1)
    return rank < round(part * patches)

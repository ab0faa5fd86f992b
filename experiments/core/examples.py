"""A few images in full: attention, contributions and shares of every layer, head and prefix query, for figures and the
explorer. Axes: L layers, H heads, P prefix queries, G groups, N patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxvit import Take, denormalize, stream
from jaxvit.analysis.decompose import (
    attention_mass,
    attention_parts,
    contributions,
    projection_shares,
    rollout,
)
from jaxvit.io.checkpoint import replacing_file
from jaxvit.model.run import layer_by_layer

from .experiment import Subject
from .trace import by_source, widened

SUMMANDS = ("skip", "cls", "registers", "patches", "bias", "mlp")
"""What a prefix token is made of after a block; `registers` only where there are any."""


class Example(NamedTuple):
    """One image under one model.

    Attributes:
      name: path below the folder of images.
      pixels: as the model saw them, uint8 [S, S, 3].
      grid: rows and columns of patches.
      attention: on the patches, [L, H, P, N].
      contribution: <part of a patch through a head, update> / ||update||^2, [L, H, P, N]; over all heads, tokens and
        the bias these sum to 1.
      mass: attention on each group, [L, H, P, G].
      parts: the same as `contribution`, summed over each group, [L, H, P, G].
      shares: of `SUMMANDS` in the token after the block, which sum to 1, [L, P, S]; 0 for registers if there are none.
      rollout: row of [CLS] in attention rollout over all layers, on the patches, [N].
    """

    name: str
    pixels: np.ndarray
    grid: tuple[int, int]
    attention: np.ndarray
    contribution: np.ndarray
    mass: np.ndarray
    parts: np.ndarray
    shares: np.ndarray
    rollout: np.ndarray


def explain(
    subject: Subject, sources: Sequence[Path], names: Sequence[str], size: int | None, residual: float = 0.5
) -> list[Example]:
    """Examples of one model; images that cannot be used are left out.

    Args:
      residual: weight of the identity in rollout, B6's option.
    """
    config = subject.model.config
    preprocess = config.preprocess.at(size)
    grid = config.layout(*preprocess.size).grid
    found = []
    for batch in stream(sources, config, 1, size, on_error=lambda name, error: None):
        arrays = jax.device_get(_explain(subject.model, subject.edits, batch.images, residual))
        pixels = np.asarray(denormalize(batch.images[0], preprocess)) * 255
        shown = np.clip(pixels, 0, 255).round().astype(np.uint8)
        name = names[int(batch.indices[0])]
        found.append(Example(name, shown, grid, *(np.asarray(a, np.float32) for a in arrays)))
    return found


@jax.jit
def _explain(model, edits, images, residual):
    prefix = Take(tokens="prefix")
    record = dict.fromkeys(("attn_out", "skip_attn", "mlp_out", "resid_post"), prefix)
    record |= {"v": Take(), "pattern": Take(tokens="all")}
    n = model.prefix

    def of_layer(trace, block, layer):
        # All queries of all layers are kept as a mean over heads alone: those of a large model would take gigabytes.
        return {**trace, "pattern": trace["pattern"][:, :, :n], "mean": trace["pattern"].mean(axis=1, keepdims=True)}

    trace = widened(layer_by_layer(model, images, of_layer, record, edits).measured)
    layout = model.config.layout(*images.shape[1:3])
    pattern, v, update = trace["pattern"], trace["v"], trace["attn_out"]
    parts = attention_parts(model, None, pattern, v, layout)
    summands = {"skip": trace["skip_attn"], **by_source(parts.parts, model, axis=3)}
    summands |= {"bias": jnp.zeros_like(update) + parts.bias[:, None, None], "mlp": trace["mlp_out"]}
    shares = projection_shares(summands, trace["resid_post"])
    none = jnp.zeros_like(shares["skip"])
    energy = jnp.square(update).sum(-1)[:, :, None, :, None]  # L B 1 P 1
    each = contributions(model, None, pattern, v, update, by_head=True)
    each = jnp.where(energy > 0, each / jnp.where(energy > 0, energy, 1), 0)  # L B H P T
    rolled = rollout(trace["mean"], rows=1, residual=residual)[0, 0, n:]
    arrays = (
        pattern[..., n:],
        each[..., n:],
        attention_mass(pattern, layout),
        attention_mass(each, layout),
        jnp.stack([shares.get(name, none) for name in SUMMANDS], axis=-1),
    )
    return (*(a[:, 0] for a in arrays), rolled)


def save(examples: Sequence[Example], path: Path) -> None:
    """Writes one .npz, all or nothing."""
    arrays = {"names": np.asarray([e.name for e in examples])}
    for i, example in enumerate(examples):
        arrays |= {f"{i}/{field}": np.asarray(getattr(example, field)) for field in Example._fields[1:]}
    with replacing_file(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


def load(path: Path) -> list[Example]:
    """Reads what `save` wrote."""
    with np.load(path) as arrays:
        names = arrays["names"].tolist()

        def field(i: int, name: str) -> np.ndarray:
            return arrays[f"{i}/{name}"]

        found = []
        for i, name in enumerate(names):
            get = partial(field, i)
            rows, columns = get("grid").tolist()
            found.append(Example(name, get("pixels"), (rows, columns), *map(get, Example._fields[3:])))
        return found

"""The paper's label-free analysis of the last layer: does [CLS] gather the patches, or registers, or its own past?

    python -m experiments last-layer --model MODEL --images FOLDER --out OUT

Computes, in one pass over the images, the quantities of Lappe & Giese 2025 for the query [CLS]:

  A1  mass of its last attention row on itself, the registers, the patches (mean over heads; figure 2a)
  A5  cosine between the part that came from patches and the whole update, attention and contribution maps (figure 4)
  A7  norms of the parts and of the skip path, and their projection shares, which sum to 1 (figures 5a, 7)
  A8  cosine of [CLS] after every block with [CLS] after the last (figures 5b, 9)
  A9  linear CKA of [CLS] after attention with the patches' part, the registers' part, and the skip path (figures 6, 8)

Parts are read after the output projection and LayerScale; clean runs only, nothing is ablated.
"""

from __future__ import annotations

import csv
import hashlib
from collections import defaultdict
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tqdm import tqdm

from experiments.running import Running
from jaxvit import ImageError, Take, TokenLayout, ViT, stream
from jaxvit.decompose import attention_mass, attention_parts, patch_maps, projection_shares
from jaxvit.similarity import StreamingCKA, cosine

SOURCES = ("cls", "registers", "patches")
"""Where an attention update comes from, registers taken together."""


class Measured(NamedTuple):
    """What one batch gives. Scalars are per image; vectors go into CKA; maps are drawn for a few images.

    Attributes:
      scalars: name -> [B].
      depth_cosine: name -> [L, B], [CLS] after each block against [CLS] after the last.
      vectors: name -> [B, D].
      maps: name -> [B, h, w], over the grid of patches.
    """

    scalars: dict[str, Float[Array, " B"]]
    depth_cosine: dict[str, Float[Array, "L B"]]
    vectors: dict[str, Float[Array, "B D"]]
    maps: dict[str, Float[Array, "B h w"]]


def measure(model: ViT, images: Float[Array, "B H W 3"]) -> Measured:
    """All quantities for one batch, in one forward pass; a pure function, to be jitted."""
    last, prefix = Take(layers=-1), Take(layers=-1, tokens="prefix")
    record = {"pattern": last, "v": last, "skip_attn": prefix, "attn_out": prefix, "resid_mid": prefix}
    record |= {"mlp_out": prefix, "resid_post": Take(tokens="prefix")}
    out = model(images, record=record)
    layout = model.config.layout(*images.shape[1:3])

    pattern = out.trace["pattern"][-1][:, :, :1]  # the row of [CLS]
    v = out.trace["v"][-1]
    skip, update, middle, mlp, after = (
        out.trace[site][-1][:, 0] for site in ("skip_attn", "attn_out", "resid_mid", "mlp_out", "resid_post")
    )
    parts = attention_parts(model, -1, pattern, v, layout)
    groups = by_source(parts.parts[:, 0], layout, axis=1)
    mass = by_source(attention_mass(pattern[:, :, 0].mean(axis=1), layout), layout, axis=1)
    bias = jnp.broadcast_to(parts.bias[None], update.shape)

    summands = {"skip": skip, **groups, "bias": bias, "mlp": mlp}  # of [CLS] after the block
    scalars = {f"mass {name}": value for name, value in mass.items()}
    scalars |= {f"norm {name}": jnp.linalg.norm(value, axis=-1) for name, value in summands.items()}
    scalars |= {"norm update": jnp.linalg.norm(update, axis=-1), "norm output": jnp.linalg.norm(after, axis=-1)}
    scalars |= {f"share {name}": value for name, value in projection_shares(summands, after).items()}
    others = {name: group for name, group in groups.items() if name != "cls"}
    for name, group in others.items():
        scalars[f"cosine {name}"] = cosine(group, update)
        scalars[f"cosine {name} without bias"] = cosine(group, update - bias)
    scalars["skip over patches"] = scalars["norm skip"] / scalars["norm patches"]

    cls_LBD = out.trace["resid_post"][:, :, 0]
    normed_LBD = model.norm(cls_LBD)
    maps = patch_maps(model, -1, pattern, v, layout, update[:, None])
    return Measured(
        scalars=scalars,
        depth_cosine={
            "raw": cosine(cls_LBD, cls_LBD[-1:]),
            "after the final norm": cosine(normed_LBD, normed_LBD[-1:]),
        },
        vectors={"full": middle, "skip": skip, **others},
        maps={name: m[:, 0] for name, m in maps._asdict().items()},
    )


def by_source(x: Array, layout: TokenLayout, axis: int) -> dict[str, Array]:
    """Sums the axis of groups into cls, registers (if there are any) and patches."""
    take = partial(jax.lax.slice_in_dim, x, axis=axis)
    ranges = {"cls": (0, 1), "registers": (1, layout.prefix), "patches": (layout.prefix, layout.prefix + 1)}
    return {name: take(*ends).sum(axis) for name, ends in ranges.items() if ends[0] < ends[1]}


class Example(NamedTuple):
    """One image to show: its pixels as the model saw them [H, W, 3] in 0 to 255, its maps and its scalars."""

    name: str
    pixels: np.ndarray
    maps: dict[str, np.ndarray]
    scalars: dict[str, float]


class Analysis(NamedTuple):
    results: dict[str, Any]
    examples: list[Example]


def analyse(
    model: ViT,
    sources: Sequence[Path],
    *,
    size: int | None = None,
    batch_size: int = 16,
    show: Collection[int] = (),
    per_image: Path | None = None,
    progress: bool = False,
) -> Analysis:
    """Streams images through `measure` and sums up; memory does not depend on their number.

    Args:
      sources: image files. One that cannot be decoded is reported in the results and left out.
      size: side of the crops in pixels; None is the checkpoint's own.
      show: positions among the sources of the images to keep as examples.
      per_image: where to write a table with every image's scalars.

    Raises:
      jaxvit.ImageError: not one image could be used.
      ValueError: a model without a class token, or whose attention is no sum of its heads.
    """
    if not model.config.cls or model.config.branch_norms:
        what = "normalises what its heads write" if model.config.cls else "has no [CLS]"
        raise ValueError(f"this model {what}: there is no update of [CLS] that splits into parts")
    preprocess = model.config.preprocess if size is None else model.config.preprocess.at(size)
    layout = model.config.layout(preprocess.crop)
    run = jax.jit(measure)
    scalars: dict[str, Running] = defaultdict(Running)
    depth: dict[str, list[Running]] = defaultdict(lambda: [Running() for _ in range(model.config.depth)])
    cka, digest = StreamingCKA(), hashlib.sha256()
    examples: list[Example] = []
    skipped: list[dict[str, str]] = []

    def skip(name: str, error: Exception) -> None:
        skipped.append({"image": name, "error": str(error)})
        bar.update()

    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=len(sources), unit="image", disable=not progress, smoothing=0.1))
        table = csv.writer(stack.enter_context(open(per_image, "w", newline=""))) if per_image else None
        for batch in stream(sources, model.config, batch_size, size, on_error=skip):
            m = jax.tree.map(np.asarray, run(model, batch.images))
            keep = batch.valid
            pixels = np.asarray(batch.images)
            digest.update(pixels[keep].tobytes())
            if table:
                if not scalars:
                    table.writerow(["image", *m.scalars])
                for i in np.flatnonzero(keep):
                    table.writerow([batch.names[i], *(f"{value[i]:.7g}" for value in m.scalars.values())])
            for name, value in m.scalars.items():
                scalars[name].update(value[keep])
            for name, value in m.depth_cosine.items():
                for statistics, row in zip(depth[name], value, strict=True):
                    statistics.update(row[keep])
            vectors = {name: value[keep] for name, value in m.vectors.items()}
            cka.update(vectors.pop("full"), vectors)
            for i in np.flatnonzero(keep):
                if batch.indices[i] in show:
                    shown = np.clip((pixels[i] * preprocess.std + preprocess.mean) * 255, 0, 255).round()
                    of_image = jax.tree.map(lambda a, i=i: a[i], (m.maps, m.scalars))
                    examples.append(Example(Path(batch.names[i]).stem, shown.astype(np.uint8), *of_image))
            bar.update(int(keep.sum()))
    if not cka.n:
        raise ImageError(f"none of the {len(sources)} images can be used; the first: {skipped[0]['error']}")

    def of(kind: str) -> dict[str, Any]:
        return {n.removeprefix(f"{kind} "): s.result() for n, s in scalars.items() if n.startswith(f"{kind} ")}

    results = {
        "images": {"n": cka.n, "skipped": skipped, "sha256 of the prepared pixels": digest.hexdigest()},
        "choices": {
            "size in pixels": preprocess.crop,
            "patches": list(layout.grid),
            "query": "cls",
            "layer": model.config.depth - 1,
            "heads": "attention rows averaged",
            "parts read after": "output projection and LayerScale",
            "A9 full": "cls after attention, before the MLP",
            "ablation": "none: parts of the clean run",
            "precision": str(jax.tree.leaves(model)[0].dtype),
            "matmul precision": str(jax.config.jax_default_matmul_precision or "backend's default"),
            "batch size": batch_size,
        },
        "A1": {"mass": of("mass")},
        "A5": {"cosine with the update": of("cosine"), "shown": [example.name for example in examples]},
        "A7": {"norm": of("norm"), "share": of("share"), "skip over patches": scalars["skip over patches"].result()},
        "A8": {name: [s.result() for s in layers] for name, layers in depth.items()},
        "A9": {name: result._asdict() for name, result in cka.results().items()},
    }
    return Analysis(results, examples)

"""What a model sees in a photograph: one picture of norms, features, attention and what attention adds.

    jaxvit look photo.jpg
    jaxvit look a.jpg b.jpg --model facebook/dinov2-with-registers-base --layer 6 --size 448x672 --out look.png

From Python, `jaxvit.look(model, "photo.jpg")` gives the numbers as named arrays, and draws itself in a notebook.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxvit.analysis.decompose import attention_mass, attention_parts, patch_maps, projection_shares
from jaxvit.analysis.named import NamedArray
from jaxvit.analysis.outliers import outliers
from jaxvit.io.images import Source, denormalize, prepare
from jaxvit.model.sites import Take
from jaxvit.model.tokens import TokenLayout
from jaxvit.model.vit import ViT

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Seen(NamedTuple):
    """What one model sees in one photograph, after or in one layer.

    Attributes:
      photograph: name of the photograph.
      model: name of the model.
      pixels: what the model read, uint8 [height, width, 3].
      layer: which layer; the last is L - 1.
      layout: where tokens stand.
      norms: of the patches in the residual stream after the layer: row, column.
      outliers: the probability that a patch's norm stands apart: row, column; see `jaxvit.analysis.outliers`.
      features: of the patches after the layer, with the final norm: row, column, channel.
      colours: the features' first three principal components, shared by all photographs of the model, in [0, 1]: row,
        column, colour; NaN on the background, if that was asked for.
      attention: of [CLS] and each register to patches: query, head, row, column. None without [CLS] and registers.
      contribution: what each patch adds to the update of the query by attention, along that update; likewise.
      mass: attention to each group of tokens, mean over heads: query, group; likewise.
      shares: shares of what the layer's attention block leaves in [CLS] and registers, along it: query, part. The parts
        are the residual ("skip"), each group of tokens, and the bias of attention; they add up to 1; likewise.
    """

    photograph: str
    model: str
    pixels: np.ndarray
    layer: int
    layout: TokenLayout
    norms: NamedArray
    outliers: NamedArray
    features: NamedArray
    colours: NamedArray
    attention: NamedArray | None
    contribution: NamedArray | None
    mass: NamedArray | None
    shares: NamedArray | None

    def __str__(self) -> str:
        share, n = self.outliers.values.mean(), self.norms.values.size
        lines = [f"{self.photograph}, {self.model}, layer {self.layer}: {n} patches"]
        norms = self.norms.values
        lines.append(
            f"  norms: median {np.median(norms):.3g}, largest {norms.max():.3g}; "
            + (f"{share:.1%} of the patches are outliers" if share else "no outliers")
        )
        if self.mass is None or self.shares is None:
            return "\n".join([*lines, "  no class token and no registers: nothing on their attention"])
        for query in self.shares.axes["query"]:
            parts = ", ".join(
                f"{part} {percent(value)}"
                for part, value in zip(self.shares.axes["part"], self.shares.select(query=query).values, strict=True)
            )
            lines.append(f"  {query} after attention is made of: {parts}")
        return "\n".join(lines)


def percent(share: float | np.floating) -> str:
    """Without a minus sign before zero."""
    return f"{round(float(share), 2) + 0.0:.0%}"


@dataclass(frozen=True)
class Look:
    """What models see in photographs; a sequence of `Seen`, which a notebook shows as a picture."""

    seen: tuple[Seen, ...]

    def __getitem__(self, place: int) -> Seen:
        return self.seen[place]

    def __len__(self) -> int:
        return len(self.seen)

    def __iter__(self) -> Iterator[Seen]:
        return iter(self.seen)

    def __str__(self) -> str:
        return "\n".join(map(str, self.seen))

    def figure(self, heads: Sequence[int] | None = None) -> Figure:
        """The picture: a row for each photograph and model.

        Args:
          heads: whose attention is drawn, each by itself; None: the mean over all.

        Raises:
          ImportError: matplotlib is not installed.
          ValueError: no such head.
        """
        from jaxvit.analysis.look_figure import draw

        return draw(self.seen, heads)

    def save(self, path: str | os.PathLike[str], heads: Sequence[int] | None = None) -> None:
        """Writes the picture as .png, .pdf or .svg, or as .html: a page with its numbers that needs no other file.

        Raises:
          ValueError: another kind of file, or no such head.
        """
        from jaxvit.analysis.look_figure import save

        save(self, Path(path), heads)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.figure().savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()


def look(
    models: ViT | Mapping[str, ViT],
    photographs: Source | Sequence[Source],
    *,
    layer: int = -1,
    size: int | tuple[int, int] | None = None,
    crop: bool = True,
    foreground: bool = False,
) -> Look:
    """Runs models on photographs, and takes apart what one layer does.

    Args:
      models: one, or several by name.
      photographs: one, or several; each of any size.
      layer: which; -1 is the last.
      size, crop: as of `jaxvit.prepare`.
      foreground: leave the background out of the colours. It is told by the first principal component of the features:
        the side of its mean on which fewer patches lie at the edge of the pictures.

    Returns:
      What was seen, photograph by photograph, and within it model by model.

    Raises:
      ImageError: a photograph that cannot be used.
      ValueError: no such layer, or sizes that make no sense.

    Example:

        seen = jaxvit.look(model, "photo.jpg")
        seen[0].attention.mean("head").select(query="cls").plot()
        seen.save("look.png")
    """
    named = {"model": models} if isinstance(models, ViT) else dict(models)
    several = isinstance(photographs, Sequence) and not isinstance(photographs, str | bytes)
    sources: list[Any] = list(photographs) if several else [photographs]  # type: ignore[arg-type]
    by_model = [_seen(name, model, sources, layer, size, crop, foreground) for name, model in named.items()]
    return Look(tuple(seen for of_photograph in zip(*by_model, strict=True) for seen in of_photograph))


def _seen(
    name: str,
    model: ViT,
    sources: Sequence[Source],
    layer: int,
    size: int | tuple[int, int] | None,
    crop: bool,
    foreground: bool,
) -> list[Seen]:
    c = model.config
    if not -c.depth <= layer < c.depth:
        raise ValueError(f"{name} has no layer {layer}: it has {c.depth}, from 0 to {c.depth - 1}, or -1 for the last")
    layer %= c.depth
    found: list[tuple[np.ndarray, TokenLayout, dict[str, np.ndarray]]] = []
    for source in sources:
        images = prepare(source, c, size, crop=crop)
        pixels = np.clip(np.asarray(denormalize(images[0], c)) * 255, 0, 255).round().astype(np.uint8)
        layout = c.layout(*images.shape[1:3])
        found.append((pixels, layout, jax.device_get(_measure(model, images, layer=layer, layout=layout))))
    colours = _colours([arrays["features"] for *_, arrays in found], foreground)
    return [
        _named(name, photograph, layer, *each, colour)
        for photograph, each, colour in zip(_names(sources), found, colours, strict=True)
    ]


@partial(jax.jit, static_argnames=("layer", "layout"))
def _measure(model: ViT, images: Array, *, layer: int, layout: TokenLayout) -> dict[str, Array]:
    """Of one image, without its axis."""
    take, prefix = Take(layers=layer, tokens="all"), Take(layers=layer, tokens="prefix")
    record = {"resid_post": take}
    if layout.prefix:
        record |= {"pattern": prefix, "v": take, "attn_out": prefix, "skip_attn": prefix, "resid_mid": prefix}
    trace = {site: value[0] for site, value in model(images, record=record).trace.items()}
    stream = trace["resid_post"][:, layout.prefix :].astype(jnp.float32)
    norms = jnp.linalg.norm(stream, axis=-1)
    normed = model.norm(trace["resid_post"]) if model.config.final_norm == "tokens" else trace["resid_post"]
    grid = layout.grid
    arrays = {
        "norms": norms.reshape(*grid),
        "outliers": outliers(norms).probability.reshape(*grid),
        "features": normed[0, layout.prefix :].reshape(*grid, -1),
    }
    if layout.prefix:
        pattern, v = trace["pattern"], trace["v"]
        maps = patch_maps(model, layer, pattern, v, layout, by_head=True)
        parts = attention_parts(model, layer, pattern, v, layout)
        groups = jnp.moveaxis(parts.parts, 2, 0)  # G B Q D
        summands = {"skip": trace["skip_attn"], "bias": jnp.broadcast_to(parts.bias, trace["skip_attn"].shape)}
        summands |= dict(zip(layout.group_names, groups, strict=True))
        shares = projection_shares(summands, trace["resid_mid"])
        order = ["skip", *layout.group_names, "bias"]
        arrays |= {
            "attention": maps.attention[0].swapaxes(0, 1),
            "contribution": maps.contribution[0].swapaxes(0, 1),
            "mass": attention_mass(pattern.mean(axis=1), layout)[0],
            "shares": jnp.stack([shares[part][0] for part in order], axis=-1),
        }
    return {name: value.astype(jnp.float32) for name, value in arrays.items()}


def _named(
    model: str,
    photograph: str,
    layer: int,
    pixels: np.ndarray,
    layout: TokenLayout,
    arrays: Mapping[str, np.ndarray],
    colours: np.ndarray,
) -> Seen:
    rows, columns = (tuple(range(n)) for n in layout.grid)
    place = {"row": rows, "column": columns}
    queries = layout.group_names[: layout.prefix]
    values = {
        "norms": (place, "norm"),
        "outliers": (place, "probability of an outlier"),
        "features": (place | {"channel": tuple(range(arrays["features"].shape[-1]))}, "feature"),
    }
    if layout.prefix:
        heads = tuple(range(arrays["attention"].shape[1]))
        values |= {
            "attention": ({"query": queries, "head": heads} | place, "attention"),
            "contribution": ({"query": queries, "head": heads} | place, "contribution"),
            "mass": ({"query": queries, "group": layout.group_names}, "attention"),
            "shares": ({"query": queries, "part": ("skip", *layout.group_names, "bias")}, "share"),
        }
    made = {field: NamedArray(np.asarray(arrays[field]), axes, name) for field, (axes, name) in values.items()}
    none = dict.fromkeys(("attention", "contribution", "mass", "shares"))
    colour = NamedArray(colours, place | {"colour": ("red", "green", "blue")}, "colour")
    return Seen(photograph, model, pixels, layer, layout, colours=colour, **{**none, **made})


def _names(sources: Sequence[Source]) -> list[str]:
    """Names of photographs: of files, with the folder where several have one name."""
    paths = [Path(source) if isinstance(source, str | os.PathLike) else None for source in sources]
    plain = [path.name for path in paths if path]
    return [
        f"photograph {i}" if path is None else path.name if plain.count(path.name) == 1 else "/".join(path.parts[-2:])
        for i, path in enumerate(paths)
    ]


def _colours(features: Sequence[np.ndarray], foreground: bool) -> list[np.ndarray]:
    """The first three principal components of the patches of all pictures, each from its 1st to its 99th percentile."""
    flat = np.concatenate([each.reshape(-1, each.shape[-1]) for each in features]).astype(np.float64)
    shown = np.ones(len(flat), bool)
    if foreground:
        first = _components(flat, 1)[:, 0]
        edge = np.concatenate([_edge(each.shape[:2]).ravel() for each in features])
        upper = first > 0
        # Of the two sides, the background is the one that lies at the edges more often.
        shown = upper if edge[upper].mean() < edge[~upper].mean() else ~upper
    colours = np.full((len(flat), 3), np.nan)
    components = _components(flat[shown], 3)
    low, high = np.percentile(components, (1, 99), axis=0)
    colours[shown] = np.clip((components - low) / np.where(high > low, high - low, 1), 0, 1)
    ends = np.cumsum([each.shape[0] * each.shape[1] for each in features])[:-1]
    return [c.reshape(*each.shape[:2], 3) for c, each in zip(np.split(colours, ends), features, strict=True)]


def _components(rows: np.ndarray, n: int) -> np.ndarray:
    """The first principal components of rows, [rows, n]; zeros where there are fewer. Signs are arbitrary: here the
    largest entry of each axis is positive."""
    centred = rows - rows.mean(axis=0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    axes = axes[:, ::-1][:, :n]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), range(axes.shape[1])])
    return centred @ axes


def _edge(grid: Sequence[int]) -> np.ndarray:
    """Which patches lie at the edge of the picture."""
    edge = np.ones(grid, bool)
    edge[1:-1, 1:-1] = False
    return edge

"""B6: three maps of what an image's patches do for [CLS], and how far they agree.

    jaxvit B6 --models MODEL .. --images FOLDER --out OUT

  attention      the row of [CLS] in the last layer, mean over heads
  rollout        attention rollout (Abnar & Zuidema 2020): the row of [CLS] in the product over layers of
                 r I + (1 - r) A, A the mean over heads; `residual` is r
  contribution   <part of a patch, update of [CLS]> in the last layer, over all heads, after the output projection and
                 LayerScale: exact, and signed

Of each image, over its patches: Pearson's and Spearman's correlation of each pair of maps (equal values share their
mean rank). And what the maps are worth for the update o of the last layer: the `top` part of the patches with the
largest values of each map is taken, and the sum of their contributions divided by ||o||^2 is what the length of o along
itself loses when exactly these patches' parts are taken out. Nothing is run again: the update is a sum. `all patches`
is the share of all, `random` that times the part taken.

What to know: contributions are what the share is made of, so no map can beat that one here; the question is how much
less the others get. It is about one layer's attention update: what the layers before have gathered in [CLS] and in
registers it leaves out, which rollout is after, though it takes attention weights for all there is (and drops values,
MLPs and the true weight of the residual). Rollout's mass on patches is told apart, as [CLS] and registers get the rest.

Rollout needs the attention of all queries in all layers, as a mean over heads: 4 L T^2 bytes an image. That is 0.3 GB
for a giant at 518 pixels (40 layers, 1374 tokens) and 11 MB at 224; and one layer's of all heads while it runs, 0.2 GB
and 7 MB. Both times --batch-size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from jaxvit import ViT
from jaxvit.analysis.decompose import rollout

from ..core.charts import SIGNED, canvas, caption, number, ordered, percent, shades, short, violins
from ..core.claims import mean_of
from ..core.examples import Example
from ..core.experiment import About, Experiment, Found, Measured, Option, Results, Table, View, summary
from ..core.trace import Trace

MAPS = ("attention", "rollout", "contribution")
PAIRS = tuple(f"{a} and {b}" for a, b in combinations(MAPS, 2))


class Maps(Experiment):
    id = "B6"
    title = "Attention, rollout and contribution maps"
    shown = (
        "Distribution over images of the rank correlation of each pair of maps; and the maps themselves, of images "
        "that are shown: of attention and rollout, brighter is more; contributions are blue along the update, red "
        "against it."
    )
    wants = frozenset({"attention", "contribution"})
    options = (
        Option("residual", 0.5, "weight of the identity in rollout, 0 to 1", least=0, most=1),
        Option("top", 0.1, "fraction of the patches that is taken out", least=0),
    )

    def measure(self, trace: Trace, model: ViT, options: Mapping[str, Any]) -> Measured:
        maps = maps_of(trace, model, options["residual"])
        ranks = {name: mean_ranks(each) for name, each in maps.items()}
        per_image = {}
        for pair in PAIRS:
            a, b = pair.split(" and ")
            per_image[f"pearson/{pair}"] = correlation(maps[a], maps[b])
            per_image[f"spearman/{pair}"] = correlation(ranks[a], ranks[b])
        energy = jnp.square(trace.update[-1]).sum(axis=-1)
        total = maps["contribution"].sum(axis=-1)
        number = how_many(options["top"], maps["attention"].shape[1])
        shares = {name: at_top(each, maps["contribution"], number) for name, each in maps.items()}
        shares |= {"all patches": total, "random": total * (number / maps["attention"].shape[1])}
        for name, value in shares.items():
            per_image[f"share/{name}"] = value / jnp.where(energy == 0, 1, energy)
        per_image["rollout on patches"] = maps["rollout"].sum(axis=-1)
        # The number of patches, which differs with the images' size.
        patches = jnp.full(len(total), maps["attention"].shape[1], total.dtype)
        return Measured(per_image=per_image, sums={"patches": patches})

    def explained(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"residual": options["residual"]}

    def numbers(self, found: Mapping[str, Found], about: About, options: Mapping[str, Any]) -> dict[str, Any]:
        clean = found["clean"]
        patches = round(float(clean.sums["patches"] / clean.n))

        def of(prefix: str) -> dict[str, Any]:
            columns = clean.of(f"{prefix}/").per_image
            return {name: summary(columns[name][np.isfinite(columns[name])]) for name in columns}

        return {
            "n": clean.n,
            "patches": patches,
            "residual": options["residual"],
            "taken": how_many(options["top"], patches),
            "pearson": of("pearson"),
            "spearman": of("spearman"),
            "share of the update": of("share"),
            "rollout on patches": summary(clean.per_image["rollout on patches"]),
        }

    def table(self, results: Results, models: Mapping[str, About]) -> Table | None:
        rows = []
        names = ("all patches", *reversed(MAPS), "random")
        for about in ordered({key: models[key] for key in results}):
            each = results[about.key]
            cells = [number(mean_of(each["spearman"][pair])) for pair in PAIRS]
            rows.append([about.name, *cells, *(percent(mean_of(each["share of the update"][n])) for n in names)])
        head = ["", *PAIRS, *(f"share of {name}" if name == names[0] else f"top by {name}" for name in names)]
        return (
            Table(head, rows, "rank correlations, and shares of the last update; means over images") if rows else None
        )

    def figures(self, view: View) -> dict[str, Figure]:
        models = ordered({key: view.models[key] for key in view.results})
        if not models:
            return {}
        figure, axes = canvas(1, 3, max(6.4, 1.2 + 0.7 * len(models)), 7.0, squeeze=False, sharey=True)
        names, colours = [short(about) for about in models], shades(models)
        for ax, pair in zip(axes[:, 0], PAIRS, strict=True):
            columns = [view.found[about.key]["clean"].per_image[f"spearman/{pair}"] for about in models]
            violins(ax, columns, names, colours)
            ax.axhline(0, linewidth=0.8, color="#50555c")
            ax.set(title=pair, ylabel="rank correlation", ylim=(-1.05, 1.05))
        figures = {"b6": caption(figure, "Rank correlation over patches of each pair of maps, image by image.")}
        for about in models:
            if examples := view.examples.get(about.key):
                residual = view.results[about.key]["residual"]
                text = (
                    f"{about.name}: attention of [CLS] in the last layer, mean over heads; rollout over all layers, "
                    f"with weight {residual:g} of the identity (both brighter for more); and contributions to the last "
                    "layer's update, blue along it, red against it. Each map has its own range."
                )
                figures[f"b6-maps-{about.key}"] = caption(maps_figure(about, examples), text)
        return figures


def maps_of(trace: Trace, model: ViT, residual: float) -> dict[str, Float[Array, "B N"]]:
    assert trace.attention is not None and trace.contribution is not None, "wanted"
    rolled = rollout(trace.attention[:, :, None], rows=1, residual=residual)[:, 0]
    whole = {"attention": trace.row[-1].mean(axis=1), "rollout": rolled, "contribution": trace.contribution[-1]}
    return {name: whole[name][:, model.prefix :] for name in MAPS}


def how_many(part: float, patches: int) -> int:
    """Of the patches: at least one, at most all."""
    return min(max(round(part * patches), 1), patches)


def mean_ranks(x: Float[Array, "B N"]) -> Float[Array, "B N"]:
    """Ranks from 0; equal values share the mean of theirs."""

    def of_row(row: Array) -> Array:
        ordered_row = jnp.sort(row)
        below = jnp.searchsorted(ordered_row, row, side="left")
        upto = jnp.searchsorted(ordered_row, row, side="right")
        return (below + upto - 1).astype(row.dtype) / 2

    return jax.vmap(of_row)(x)


def correlation(x: Float[Array, "B N"], y: Float[Array, "B N"]) -> Float[Array, " B"]:
    """Pearson's, of each row; NaN where one does not vary."""
    # Scaled to 1 first: squares of contributions may leave the range of float32.
    x, y = (a - a.mean(axis=1, keepdims=True) for a in (x, y))
    sizes = [jnp.abs(a).max(axis=1, keepdims=True) for a in (x, y)]
    x, y = (a / jnp.where(size > 0, size, 1) for a, size in zip((x, y), sizes, strict=True))
    norms = jnp.linalg.norm(x, axis=1) * jnp.linalg.norm(y, axis=1)
    return jnp.where(norms > 0, (x * y).sum(axis=1) / jnp.where(norms > 0, norms, 1), jnp.nan)


def at_top(by: Float[Array, "B N"], values: Float[Array, "B N"], count: int) -> Float[Array, " B"]:
    """The sum of values where another map is largest."""
    return jnp.take_along_axis(values, jax.lax.top_k(by, count)[1], axis=1).sum(axis=1)


def maps_figure(about: About, examples: Sequence[Example], limit: int = 6) -> Figure:
    """Photographs with their maps side by side."""
    examples = examples[:limit]
    figure, axes = canvas(4, len(examples), 7.2, 0.4 + 1.8 * len(examples), squeeze=False)
    for row, example in zip(axes, examples, strict=True):
        attention = example.attention[-1, :, 0].mean(axis=0)
        contribution = example.contribution[-1, :, 0].sum(axis=0)
        size = max(float(np.abs(contribution).max()), 1e-30)
        row[0].imshow(example.pixels)
        row[1].imshow(attention.reshape(example.grid), cmap="inferno", vmin=0)
        row[2].imshow(example.rollout.reshape(example.grid), cmap="inferno")
        row[3].imshow(contribution.reshape(example.grid), cmap=SIGNED, vmin=-size, vmax=size)
        for ax in row:
            ax.set_axis_off()
    for ax, title in zip(axes[0], ("photograph", *MAPS), strict=True):
        ax.set_title(title)
    figure.suptitle(short(about).replace("\n", " "), fontsize=10)
    return figure


EXPERIMENT = Maps()

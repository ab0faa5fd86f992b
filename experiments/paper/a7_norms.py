"""A7, figures 5a and 7: how long the summands of [CLS] are in the last layer, and how much of the result each makes up.

    jaxvit A7 --models MODEL .. --images FOLDER --out OUT

The last block adds to [CLS] as it came in (the skip path) what attention takes from [CLS] itself, the registers and the
patches, the bias of attention's output, and what the MLP adds. Parts are read after LayerScale, where they enter the
sum. Of each summand, for every image: its L2 norm; and its projection share <summand, o> / ||o||^2 of the output o of
the block, which sums to 1 over summands. skip over patches is the ratio of the two norms, image by image; images whose
patches add nothing have none, and are not counted in its n. The statement is decided on the median over images, since
a few images with a short patches' part would decide a mean, and of 30 images or more. The paper says that the ratio is
far larger in the largest model and gives no number: tested is whether it is at least 1.5 times that of every smaller
one.

Norms do not add up: long summands may cancel. A share may be negative, or above 1. Both weigh a channel by its size, so
a few enormous dimensions can decide them. What follows reads [CLS] through a norm, which changes these weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from jaxvit import ViT
from jaxvit.analysis.decompose import projection_shares

from ..core.charts import LABELS, canvas, caption, number, ordered, percent, shades, short, stacked, violins
from ..core.claims import FAR, Verdict, compare, images_of, mean_of, median_of, tested
from ..core.examples import SUMMANDS
from ..core.experiment import About, Claim, Experiment, Found, Measured, Results, Table, View, summary
from ..core.trace import Trace, parts

RATIO = "skip over patches"


class Norms(Experiment):
    id = "A7"
    title = "Lengths and shares of what [CLS] is made of"
    figure = "figures 5a and 7"
    shown = (
        "L2 norms of the patches' part of the last update of [CLS] and of its skip path, and their ratio, over images; "
        "and what share of [CLS] after the block each summand makes up, on average."
    )
    passes = ("clean", "controls")
    controlled = True

    def measure(self, trace: Trace, model: ViT, options: Mapping[str, Any]) -> Measured:
        each = parts(trace, model)
        dtype = each["patches"].dtype
        summands = {"skip": trace.skip[-1].astype(dtype), **each, "mlp": trace.mlp[-1].astype(dtype)}
        norms = {name: jnp.linalg.norm(x, axis=-1) for name, x in summands.items()}
        shares = projection_shares(summands, trace.after[-1].astype(dtype))
        patches = norms["patches"]
        ratio = jnp.where(patches > 0, norms["skip"] / jnp.where(patches > 0, patches, 1), jnp.nan)
        named = {f"norm {name}": value for name, value in norms.items()}
        return Measured(per_image=named | {f"share {name}": value for name, value in shares.items()} | {RATIO: ratio})

    def numbers(self, found: Mapping[str, Found], about: About, options: Mapping[str, Any]) -> dict[str, Any]:
        columns = found["clean"].per_image
        each = {
            kind: {name: summary(columns[f"{kind} {name}"]) for name in SUMMANDS if f"{kind} {name}" in columns}
            for kind in ("norm", "share")
        }
        ratio = columns[RATIO]
        return each | {RATIO: summary(ratio[np.isfinite(ratio)])}

    def claims(self, results: Results, models: Mapping[str, About]) -> list[Claim]:
        text = (
            "Without registers, the skip path is far longer, relative to the patches' part, in the largest model "
            f"(tested: the median ratio is at least {FAR} times that of every smaller one)."
        )

        def test(members: list[About]) -> Verdict:
            def ratio(about: About) -> float:
                return median_of(results[about.key][RATIO])

            n = {about.key: images_of(results[about.key][RATIO]) for about in members}
            return compare(members, ratio, lambda a: n[a.key], digits=2, largest=True, times=FAR)

        return tested(5, self.id, text, test, results, models, registers=False)

    def table(self, results: Results, models: Mapping[str, About]) -> Table:
        rows = []
        for about in ordered({key: models[key] for key in results}):
            of = results[about.key]
            norms = [number(mean_of(of["norm"][name]), 2) for name in ("patches", "skip")]
            shares = [percent(mean_of(of["share"].get(name))) if name in of["share"] else "" for name in SUMMANDS]
            rows.append([about.name, *norms, number(median_of(of[RATIO]), 2), *shares])
        head = [
            "model",
            "norm of patches' part",
            "of skip path",
            "ratio, median",
            *(f"share: {LABELS[s]}" for s in SUMMANDS),
        ]
        return Table(head, rows, "Means over images; the ratio is the median of ratios. Shares sum to 100 %.")

    def figures(self, view: View) -> dict[str, Figure]:
        models = ordered({key: view.models[key] for key in view.results})
        families = list(dict.fromkeys(about.family for about in models))
        first = "DINOv2" if "DINOv2" in families else families[0]
        figures = {"5a": norms_of([about for about in models if about.family == first], view)}
        if len(families) > 1:
            figures["7"] = norms_of(models, view)
        figure, ax = canvas(width=max(6.4, 1.6 + 0.75 * len(models)), height=3.8)
        present = [name for name in SUMMANDS if any(name in view.results[about.key]["share"] for about in models)]
        means = {name: [mean_of(view.results[about.key]["share"].get(name)) for about in models] for name in present}
        stacked(ax, means, [short(about) for about in models])
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set(title="[CLS] after the last block", ylabel="projection share, mean")
        figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        text = "Projection shares of all summands in [CLS] after the last block, means over images; they sum to 1."
        return figures | {"7-shares": caption(figure, text)}


def norms_of(models: Sequence[About], view: View) -> Figure:
    """Distributions of the two norms and of their ratio, a chart each."""
    figure, axes = canvas(3, width=max(9, 2.4 + 1.6 * len(models)), height=3.4)
    names, colours = [short(about) for about in models], shades(models)
    columns = {
        "norm patches": ("Patches' part", "L2 norm"),
        "norm skip": ("Skip path", "L2 norm"),
        RATIO: ("Skip path over patches' part", "ratio of norms"),
    }
    for ax, (column, (title, label)) in zip(axes, columns.items(), strict=True):
        violins(ax, [view.found[about.key]["clean"].per_image[column] for about in models], names, colours)
        ax.set(title=title, ylabel=label)
        ax.set_ylim(bottom=0)
    return caption(figure, "Last layer, over images: bars are quartiles, dashes medians, diamonds means.")


EXPERIMENT = Norms()

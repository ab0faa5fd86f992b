"""A8, figures 5b and 9: how early [CLS] is what it will be at the end.

    jaxvit A8 --models MODEL .. --images FOLDER --out OUT

Cosine of [CLS] after every block with [CLS] after the last, image by image; 1 after the last. Three readings, of which
--a8-reading says the one that tables, figures and statements show; all three are computed.

  raw       the residual stream as it is (default, the paper's)
  norm      both through the model's final norm, as if the blocks ended there
  centred   both less their mean over all images: how early that is settled by which images differ

The paper says that [CLS] one block before the last is far closer to its end in the largest model and gives no number:
tested is a cosine at least 0.1 higher than in every smaller model, which cannot hold where a smaller one is above 0.9.
That DeiT III has no trend is tested as large models at most 0.05 above, and at most 0.05 below, all small ones. Both
are decided on 30 images or more.

Raw cosines are high where a few enormous dimensions, or whatever else all images share, outweigh the rest.

Centring needs the mean over all images before any of them can be measured. So the centred cosines image by image are of
the first images alone (up to 64 of them; n tells), around the mean over all; images sorted by class make this a
biased sample. `centred, pooled` is of all images, and exact: the sum of <x, y> over images divided by the root of the
sum of ||x||^2 times that of ||y||^2, x and y centred. It weighs an image by how far it is from the mean. It is
undefined where images differ by less than a thousandth of what they share, which single precision cannot tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxvit import ViT
from jaxvit.analysis.similarity import cosine

from ..core.charts import canvas, caption, number, ordered, shades
from ..core.claims import Verdict, compare, images_of, mean_of, sides, tested
from ..core.experiment import About, Claim, Experiment, Found, Measured, Option, Results, Table, View, summary
from ..core.trace import Trace

READINGS = {"raw": "raw", "norm": "after the final norm", "centred": "centred"}
POOLED = "centred, pooled"
NO_TREND = "DeiT III"
MARGIN = 0.05
"""DeiT III has no size trend if no large model is above or below all small ones by more than this."""
HIGHER = 0.1
"""The paper gives no number for `far closer`: by how much the cosine is higher."""


class DepthCosine(Experiment):
    id = "A8"
    title = "[CLS] after every block and after the last"
    figure = "figures 5b and 9"
    shown = (
        "Cosine of [CLS] after each block with [CLS] after the last: mean, and the middle 90 % of images, over depth."
    )
    options = (Option("reading", "raw", "which cosine is shown", tuple(READINGS), late=True),)

    def measure(self, trace: Trace, model: ViT, options: Mapping[str, Any]) -> Measured:
        x_LBD = trace.after
        normed_LBD = model.norm(x_LBD)
        x_LBD, normed_LBD = (x.astype(trace.row.dtype) for x in (x_LBD, normed_LBD))  # at least float32
        cosines = {"raw": cosine(x_LBD, x_LBD[-1:]), "norm": cosine(normed_LBD, normed_LBD[-1:])}
        x_BLD = jnp.moveaxis(x_LBD, 0, 1)
        return Measured(
            per_image={name: value.T for name, value in cosines.items()},
            sums={"cls": x_BLD, "squared": jnp.square(x_BLD).sum(-1), "with the last": (x_BLD * x_BLD[:, -1:]).sum(-1)},
            keep={"cls": x_BLD},
        )

    def numbers(self, found: Mapping[str, Found], about: About, options: Mapping[str, Any]) -> dict[str, Any]:
        clean = found["clean"]
        n, columns = clean.n, clean.per_image
        numbers = {READINGS[name]: [summary(layer) for layer in columns[name].T] for name in ("raw", "norm")}
        mean = clean.sums["cls"] / n
        centred = cosines_with_last(np.asarray(clean.keep["cls"], np.float64) - mean)
        numbers["centred"] = [summary(layer[np.isfinite(layer)]) for layer in centred.T]
        inner = clean.sums["with the last"] - n * (mean * mean[-1]).sum(-1)
        squared = clean.sums["squared"] - n * np.square(mean).sum(-1)
        scale = np.sqrt(np.maximum(squared * squared[-1], 0))
        # A variance below the rounding error of the sums is none.
        fine = (n > 1) & (squared > 1e-6 * clean.sums["squared"]) & (squared[-1] > 1e-6 * clean.sums["squared"][-1])
        numbers[POOLED] = np.where(fine, inner / np.where(fine, scale, 1), np.nan).tolist()
        return numbers | {"reading": options["reading"]}

    def claims(self, results: Results, models: Mapping[str, About]) -> list[Claim]:
        def layer(about: About) -> Mapping[str, Any] | None:
            layers = shown_of(results[about.key])
            return layers[-2] if len(layers) > 1 else None

        def value(about: About) -> float:
            return mean_of(layer(about))

        def images(about: About) -> int:
            return images_of(shown_of(results[about.key])[-1])

        def closer(members: list[About]) -> Verdict:
            return compare(members, value, images, largest=True, more=HIGHER)

        def alike(members: list[About]) -> Verdict:
            verdict = compare(members, value, images)
            if verdict.holds is None:
                return verdict
            small, large = ([value(about) for about in side] for side in sides(members))
            above, below = max(large) - max(small), min(small) - min(large)
            told, _, n = verdict.by.rsplit("; ", 2)
            return Verdict(
                above <= MARGIN and below <= MARGIN, f"{told}; above by {above:.3f}, below by {below:.3f}; {n}"
            )

        far = (
            "Without registers, [CLS] one block before the last is far closer to its final state in the largest model "
            f"(tested: a cosine at least {HIGHER} higher than in every smaller one)."
        )
        none = (
            "[CLS] one block before the last is as close to its final state in large models as in small ones "
            f"(tested: the large ones' cosines exceed the highest, or are below the lowest, by at most {MARGIN})."
        )
        return [
            *tested(
                5,
                self.id,
                far,
                closer,
                results,
                models,
                registers=False,
                options=self.options,
                without=(NO_TREND,),
            ),
            *tested(
                5,
                self.id,
                none,
                alike,
                results,
                models,
                registers=False,
                options=self.options,
                paper=(NO_TREND,),
                others=False,
            ),
        ]

    def table(self, results: Results, models: Mapping[str, About]) -> Table:
        rows = []
        for about in ordered({key: models[key] for key in results}):
            of = results[about.key]
            layers = shown_of(of)
            depth = len(layers)
            # After a quarter, half and three quarters of the blocks, and before the last.
            at = [max(math.ceil(depth * q) - 1, 0) for q in (0.25, 0.5, 0.75)]
            cells = [number(mean_of(layers[i])) for i in at]
            last = [""] * 4
            if depth > 1:
                last = [*(number(mean_of(of[name][-2])) for name in READINGS.values()), number(of[POOLED][-2])]
            rows.append([about.name, *cells, *last])
        head = ["model", "after 1/4 of the blocks", "1/2", "3/4"]
        head += [f"before the last: {name}" for name in (*READINGS.values(), POOLED)]
        reading = next((READINGS[of["reading"]] for of in results.values()), "raw")
        return Table(head, rows, f"Cosine of [CLS] with [CLS] after the last block, means; by depth: {reading}.")

    def figures(self, view: View) -> dict[str, Figure]:
        models = ordered({key: view.models[key] for key in view.results})
        families = list(dict.fromkeys(about.family for about in models))
        first = "DINOv2" if "DINOv2" in families else families[0]
        figures = {"5b": over_depth([about for about in models if about.family == first], view)}
        if len(families) > 1:
            figures["9"] = over_depth(models, view)
        return figures


def cosines_with_last(x_BLD: np.ndarray) -> np.ndarray:
    """Cosine over D with the last of L, [B, L]; NaN where a vector is zero."""
    norms = np.linalg.norm(x_BLD, axis=-1)
    scale = norms * norms[:, -1:]
    return np.where(scale > 0, (x_BLD * x_BLD[:, -1:]).sum(-1) / np.where(scale > 0, scale, 1), np.nan)


def shown_of(of: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The summaries by block of the reading to show."""
    return of[READINGS[of["reading"]]]


def over_depth(models: Sequence[About], view: View) -> Figure:
    """A chart for each family with each kind of registers; a line for each model."""
    charts: dict[tuple[str, str], list[About]] = {}
    for about in models:
        charts.setdefault((about.family, about.registers_are), []).append(about)
    columns = min(len(charts), 3)
    rows = -(-len(charts) // columns)
    figure, axes = canvas(
        columns, rows, width=max(5.2, 3.6 * columns), height=0.3 + 3.1 * rows, squeeze=False, sharey=True
    )
    for ax, chart in zip(axes.ravel(), charts.values(), strict=False):
        for about, colour in zip(chart, shades(chart), strict=True):
            draw_depth(ax, shown_of(view.results[about.key]), about.size, colour)
        extra = {"none": "", "trained": ", with registers", "random": ", with registers"}
        kind = extra.get(chart[0].registers_are, ", test-time registers")
        ax.set(title=chart[0].family + kind, xlabel="share of blocks", xlim=(0, 1))
        ax.legend()
    reading = READINGS[view.results[models[0].key]["reading"]]
    caption(
        figure,
        f"Cosine of [CLS] after each block with [CLS] after the last ({reading}): mean, and 5 to 95 % of images.",
    )
    for ax in axes.ravel()[len(charts) :]:
        ax.set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel("cosine with the last")
    return figure


def draw_depth(axes: Axes, layers: Sequence[Mapping[str, Any]], label: str, colour: str) -> None:
    x = np.arange(1, len(layers) + 1) / len(layers)
    axes.plot(x, [mean_of(layer) for layer in layers], "-o", color=colour, markersize=2.5, label=label)
    low, high = ([(layer.get("quantiles") or {}).get(q, math.nan) for layer in layers] for q in ("0.05", "0.95"))
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


EXPERIMENT = DepthCosine()

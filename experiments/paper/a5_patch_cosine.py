"""A5, figure 4: does what [CLS] takes from the patches point where its whole update points? And where does it look?

    jaxvit A5 --models MODEL .. --images FOLDER --out OUT

Last layer, query [CLS]: cosine of the patches' part, and of the registers' and its own, with the whole of what
attention adds, for every image. The paper prints it for one image of DINOv2 g, -0.0092.

The bias of the output projection is no one's part, but it is in the whole, and is the same for all images. Cosines are
computed with the whole, and with the whole less the bias; --a5-bias says which of the two tables and figures show.

--a5-stage is where parts are read: after LayerScale, where they are added to the stream (default); after the output
projection; or as the heads leave them, side by side, where there is no bias. A cosine is taken over channels, and
LayerScale weighs these, so the stages differ.

The whole contains the part. Of two parts of equal length that have nothing to do with each other, each has a cosine of
0.71 with their sum: a high cosine may only say that a part is long.

Figure 4 puts the attention of [CLS] on the patches beside what each patch adds along the update (after LayerScale,
whatever the stage): a patch that is looked at need not add anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxvit import ViT
from jaxvit.analysis.similarity import cosine

from ..core.charts import LABELS, canvas, caption, number, ordered, percent, shades, short, violins
from ..core.claims import mean_of
from ..core.examples import Example
from ..core.experiment import SOURCES, About, Experiment, Found, Measured, Option, Results, Table, View, summary
from ..core.trace import Trace, parts

WITHOUT = " without bias"
SHOWN = 3
"""How many images a figure of maps has."""


class PatchCosine(Experiment):
    id = "A5"
    title = "Patches' part and the whole update"
    figure = "figure 4"
    shown = (
        "Where [CLS] looks in the last layer, mean over heads, beside what each patch adds along the update, sum over "
        "heads (blue: along it, red: against it); and the cosines of the parts with the whole update, over images."
    )
    options = (
        Option("stage", "layerscale", "where parts are read", ("heads", "proj", "layerscale")),
        Option(
            "bias", "with", "whether the whole update that is shown contains the bias", ("with", "without"), late=True
        ),
    )

    def measure(self, trace: Trace, model: ViT, options: Mapping[str, Any]) -> Measured:
        each = parts(trace, model, stage=options["stage"])
        bias = each.pop("bias")
        without = sum(each.values())
        cosines = {}
        for name, part in each.items():
            cosines |= {name: cosine(part, without + bias), name + WITHOUT: cosine(part, without)}
        return Measured(per_image=cosines)

    def numbers(self, found: Mapping[str, Found], about: About, options: Mapping[str, Any]) -> dict[str, Any]:
        columns = found["clean"].per_image
        names = [name + end for name in reversed(SOURCES) for end in ("", WITHOUT)]
        return {
            "stage": options["stage"],
            "bias": options["bias"],
            **{name: summary(columns[name]) for name in names if name in columns},
        }

    def table(self, results: Results, models: Mapping[str, About]) -> Table:
        sources = ("patches", "registers", "cls")
        rows = []
        for about in ordered({key: models[key] for key in results}):
            of = results[about.key]
            cells = [number(mean_of(of[name])) if name in of else "" for name in headline(of, sources)]
            patches = headline(of, ("patches",))[0]
            low, high = (number((of[patches].get("quantiles") or {}).get(q)) for q in ("0.05", "0.95"))
            rows.append([about.name, *cells, f"{low} to {high}", number(mean_of(of[flipped(patches)]))])
        bias = {of["bias"] for of in results.values()} or {"with"}
        other = "without" if bias == {"with"} else "with"
        head = ["model", *(LABELS[name] for name in sources), "patches: 5 to 95 % of images", f"patches, {other} bias"]
        return Table(head, rows, "Cosine with the whole update, means over images.")

    def figures(self, view: View) -> dict[str, Figure]:
        models = ordered({key: view.models[key] for key in view.results})
        figures = {}
        explained = [about for about in models if view.examples.get(about.key)]
        if explained:
            text = (
                "Last layer, query [CLS]: attention on each patch, mean over heads, and what the patch adds along the "
                "update, sum over heads; blue along it, red against it. Below: the sum over patches, of attention and "
                "of the squared length of the update."
            )
            figure = maps(explained, {about.key: view.examples[about.key] for about in explained})
            figures["4"] = caption(figure, text)
        panels = {}
        for source in ("patches", "registers"):
            if having := [about for about in models if source in view.results[about.key]]:
                panels[source] = having
        ratios = [len(panel) + 1 for panel in panels.values()]
        figure, axes = canvas(
            len(panels), width=max(6.4, 1.4 + 0.7 * sum(ratios)), squeeze=False, gridspec_kw={"width_ratios": ratios}
        )
        for ax, (source, having) in zip(axes[0], panels.items(), strict=True):
            samples = [
                view.found[about.key]["clean"].per_image[headline(view.results[about.key], (source,))[0]]
                for about in having
            ]
            violins(ax, samples, [short(about) for about in having], shades(having))
            ax.axhline(0, color="black", linewidth=0.8)
            ax.set(title=f"Part of the {source}", ylabel="cosine with the update")
        text = "Cosine of a part with the whole update of [CLS] in the last layer, over images."
        return figures | {"4-cosines": caption(figure, text)}


def headline(of: Mapping[str, Any], sources: Sequence[str]) -> list[str]:
    """The names of the numbers to show."""
    return [source + (WITHOUT if of["bias"] == "without" else "") for source in sources]


def flipped(name: str) -> str:
    """With the bias for without, and back."""
    return name.removesuffix(WITHOUT) if name.endswith(WITHOUT) else name + WITHOUT


def maps(models: Sequence[About], examples: Mapping[str, Sequence[Example]]) -> Figure:
    """A row for each model; photograph, attention and contributions of a few images, the same for all models."""
    names = [e.name for e in examples[models[0].key][:SHOWN]]
    figure, axes = canvas(
        3 * len(names), len(models), width=0.9 + 3.3 * len(names), height=0.4 + 1.35 * len(models), squeeze=False
    )
    for ax in axes.ravel():
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        ax.spines[:].set_visible(False)
    for row, about in zip(axes, models, strict=True):
        row[0].set_ylabel(short(about), rotation=0, ha="right", va="center")
        of = {e.name: e for e in examples[about.key]}
        for i, name in enumerate(names):
            if name in of:
                draw_maps(row[3 * i : 3 * i + 3], of[name])
    for ax, title in zip(axes[0], ("image", "attention", "contribution") * len(names), strict=True):
        ax.set_title(title, fontsize=8.5, fontweight="normal", loc="center")
    return figure


def draw_maps(axes: Sequence[Axes], example: Example) -> None:
    attention = example.attention[-1, :, 0].mean(axis=0).reshape(example.grid)
    contribution = example.contribution[-1, :, 0].sum(axis=0).reshape(example.grid)
    reach = float(np.abs(contribution).max()) or 1.0
    axes[0].imshow(example.pixels)
    axes[1].imshow(attention, cmap="inferno", vmin=0)
    axes[2].imshow(contribution, cmap="RdBu", vmin=-reach, vmax=reach)
    axes[1].set_xlabel(percent(float(attention.sum())), fontsize=8, labelpad=2)
    axes[2].set_xlabel(percent(float(contribution.sum())), fontsize=8, labelpad=2)


EXPERIMENT = PatchCosine()

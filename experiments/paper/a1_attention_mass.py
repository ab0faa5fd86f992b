"""A1, figure 2a: how much of its attention [CLS] spends in the last layer on itself, the registers and the patches.

    jaxvit A1 --models MODEL .. --images FOLDER --out OUT

Post-softmax attention row of [CLS] in the last layer, averaged over heads, summed over groups of tokens, for every
image. --a1-figure says what figure, statements and the spread in the table are of: registers / (registers + patches),
as in the paper (ratio, the default), or what registers get of the whole row (mass). Both are computed.

Statements are decided on 30 images or more.

Attention is not contribution: a token may get much of the row and add little, as its values are short or cancel those
of others. A7 measures what is added. Heads count alike here, whatever they write.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from jaxvit import ViT

from ..core.charts import LABELS, canvas, caption, number, ordered, shades, short, stacked, violins
from ..core.claims import compare, images_of, mean_of, stated, tested
from ..core.experiment import (
    SOURCES,
    About,
    Claim,
    Experiment,
    Found,
    Measured,
    Option,
    Results,
    Table,
    View,
    summary,
)
from ..core.trace import Trace, by_source

BOTH = "registers of both"
"""registers / (registers + patches); NaN where neither gets any attention."""
FIGURES = {"ratio": (BOTH, "registers / (registers + patches)"), "mass": ("registers", "attention on registers")}
"""Option `figure` -> which number that is, and its name for people."""


class AttentionMass(Experiment):
    id = "A1"
    title = "Attention of [CLS] in the last layer"
    figure = "figure 2a"
    shown = (
        "What registers get of the attention that [CLS] pays to registers and patches, over images; and the whole "
        "attention row on average. Last layer, mean over heads."
    )
    passes = ("clean", "controls")
    controlled = True
    options = (
        Option(
            "figure",
            "ratio",
            "what is shown and tested: registers / (registers + patches), or their share of the row",
            tuple(FIGURES),
            late=True,
        ),
    )

    def measure(self, trace: Trace, model: ViT, options: Mapping[str, Any]) -> Measured:
        mass = by_source(trace.mass[-1].mean(axis=1), model, axis=1)
        if "registers" in mass:
            both = mass["registers"] + mass["patches"]
            mass[BOTH] = jnp.where(both > 0, mass["registers"] / jnp.where(both > 0, both, 1), jnp.nan)
        return Measured(per_image={f"mass {name}": value for name, value in mass.items()})

    def numbers(self, found: Mapping[str, Found], about: About, options: Mapping[str, Any]) -> dict[str, Any]:
        columns = found["clean"].per_image
        each = {name.removeprefix("mass "): columns[name] for name in columns if name.startswith("mass ")}
        numbers = {name: summary(values[np.isfinite(values)]) for name, values in each.items()}
        return numbers | {"reading": {"figure": options["figure"]}}

    def claims(self, results: Results, models: Mapping[str, About]) -> list[Claim]:
        def of(about: About) -> Mapping[str, Any] | None:
            return results[about.key].get(column(results[about.key]))

        def test(largest: bool) -> Any:
            def value(about: About) -> float:
                return stated(of(about), "std" if largest else "mean")

            return lambda members: compare(members, value, lambda a: images_of(of(a)), largest=largest)

        texts = (
            "Registers get more of the attention of [CLS] in every large model than in every small one.",
            "The registers' share of attention differs most between images in the largest model.",
        )
        more = {"registers": True, "options": self.options}
        claims = []
        for text, largest in zip(texts, (False, True), strict=True):
            claims += tested(1, self.id, text, test(largest), results, models, **more)
        return claims

    def table(self, results: Results, models: Mapping[str, About]) -> Table:
        rows = []
        for about in ordered({key: models[key] for key in results}):
            of = results[about.key]
            masses = [number(mean_of(of[name])) if name in of else "" for name in (*SOURCES, BOTH)]
            rows.append([about.name, *masses, number(stated(of[column(of)], "std")) if BOTH in of else ""])
        read = {of["reading"]["figure"] for of in results.values()} or {"ratio"}
        spread = "its std" if read == {"ratio"} else f"std of {FIGURES['mass'][1]}"
        head = ["model", *(LABELS[name] for name in SOURCES), FIGURES["ratio"][1], spread]
        return Table(head, rows, "Means over images, and the standard deviation over images.")

    def figures(self, view: View) -> dict[str, Figure]:
        models = ordered({key: view.models[key] for key in view.results})
        having = [about for about in models if BOTH in view.results[about.key]]
        # Charts are as wide as they have models.
        panels = [panel for panel in (having, models) if panel]
        ratios = [len(panel) + 1 for panel in panels]
        width = max(6.4, 1.4 + 0.7 * sum(ratios))
        figure, axes = canvas(len(panels), width=width, squeeze=False, gridspec_kw={"width_ratios": ratios})
        if having:
            name, label = FIGURES[view.results[having[0].key]["reading"]["figure"]]
            samples = [view.found[about.key]["clean"].per_image[f"mass {name}"] for about in having]
            violins(axes[0, 0], samples, [short(about) for about in having], shades(having))
            axes[0, 0].set(title="Registers' share", ylabel=label, ylim=(0, 1))
        sources = [name for name in SOURCES if name != "registers" or having]
        means = {name: [mean_of(view.results[about.key].get(name)) for about in models] for name in sources}
        stacked(axes[0, -1], means, [short(about) for about in models])
        axes[0, -1].set(title="The whole row", ylabel="attention, mean over images", ylim=(0, 1))
        figure.legend(*axes[0, -1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        shown = FIGURES[view.results[models[0].key]["reading"]["figure"]][1]
        text = (
            f"Attention of [CLS] in the last layer, mean over heads. Left, where there are registers: {shown}, over "
            "images; bars are quartiles, diamonds means. Right: the whole row."
        )
        return {"2a": caption(figure, text)}


def column(of: Mapping[str, Any]) -> str:
    """Which number figure and statements are of."""
    return FIGURES[of["reading"]["figure"]][0]


EXPERIMENT = AttentionMass()

"""A9, figures 6 and 8: whether [CLS] after the last attention varies with what patches bring, or with its own residual.

    jaxvit A9 --models MODEL .. --images FOLDER --out OUT

Linear CKA over images between [CLS] after the attention of the last layer, residual included, and each of its summands
alone: the skip path, and what attention brings from patches, from registers and from [CLS] itself.

--a9-reading:

  middle  the sums as they are, before the MLP (the default)
  block   [CLS] after the block, and each summand alone after the same MLP: x + MLP(x), with its own norm
  final   these, after the final norm, each with statistics of its own

A summand alone is nothing the MLP or the norm has seen in training: `block` and `final` say what they make of it, not
what it contributes. The norm also undoes differences in size between images. CKA is inflated unless n is far above d:
claims are decided on the unbiased estimate. It does not see means over images, so a summand may dominate the stream
and have a low CKA, because it is the same in all images; norms are A7.

The paper says that the patches' CKA falls with size. Tested is whether every model of a size is below all of the size
before, or above them by no more than 0.02, and those of the largest size are below all of the smallest by more than
that; of 30 images or more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from jaxtyping import Array
from matplotlib.figure import Figure

from jaxvit import ViT

from ..core import charts
from ..core.cka import cka_bars, cka_images, cka_table, controls_figure, plain_cka, told_ckas, unbiased
from ..core.claims import Verdict, decide, falls, groups, lacking, tested
from ..core.experiment import About, Claim, Experiment, Found, Measured, Option, Pairs, Results, Table, View
from ..core.trace import Trace, cls_reading, parts

NAMES = ("patches", "skip", "registers", "cls")
RISE = 0.02
"""By how much a CKA that falls with size may rise from one size to the next."""
STAGES = ("middle", "block", "final")


class SkipCKA(Experiment):
    id = "A9"
    title = "CKA of [CLS] after the last attention with its patches' part and its skip path"
    figure = "figures 6 and 8"
    shown = (
        "Linear CKA over images between [CLS] after the last layer's attention and its summands alone. Bars: unbiased; "
        "circles: biased; dashes: the biased one's mean over all orders of the images."
    )
    passes = ("clean", "controls")
    controlled = True
    options = (Option("reading", "middle", "where [CLS] and its summands are read", STAGES),)

    def measure(self, trace: Trace, model: ViT, options: Mapping[str, Any]) -> Measured:
        return Measured(pairs={"stream": readings(trace, model, options["reading"])})

    def numbers(self, found: Mapping[str, Found], about: About, options: Mapping[str, Any]) -> dict[str, Any]:
        ckas = {name: plain_cka(cka) for name, cka in found["clean"].cka["stream"].results().items()}
        return ckas | {"reading": dict(options)}

    def claims(self, results: Results, models: Mapping[str, About]) -> list[Claim]:
        text = (
            "Without registers, CKA([CLS], patches) falls with size "
            f"(tested: by more than {RISE} in all, with no rise of more from one size to the next)."
        )

        def test(members: list[About]) -> Verdict:
            if missing := lacking(members):
                return Verdict(None, missing)
            levels = [[unbiased(results, about, "patches") for about in group] for group in groups(members)]
            by, n = told_ckas(results, members, "patches"), [cka_images(results, about) for about in members]
            return decide(by, n, chain(*levels), lambda: falls(levels, RISE))

        return tested(5, self.id, text, test, results, models, registers=False, options=self.options)

    def table(self, results: Results, models: Mapping[str, About]) -> Table | None:
        return cka_table(results, models, NAMES)

    def figures(self, view: View) -> dict[str, Figure]:
        shown = [about for about in charts.ordered(view.models) if about.key in view.results]
        without = [about for about in shown if about.family == "DINOv2" and about.registers_are == "none"]
        figures = {}
        if without:
            figure, axes = charts.canvas(width=max(5.0, 1.0 + 1.1 * len(without)))
            cka_bars(axes, view.results, without, ("patches", "skip"))
            axes.set_title("DINOv2 without registers")
            figures["6"] = figure
        if shown:
            figures["8"] = families(view, shown)
        if controls := controls_figure(view, ("patches", "skip", "registers")):
            figures["6-controls"] = controls
        return figures


def families(view: View, shown: Sequence[About]) -> Figure:
    """One chart for each family."""
    names = list(dict.fromkeys(about.family for about in shown))
    of = {family: [about for about in shown if about.family == family] for family in names}
    widths = [len(each) for each in of.values()]
    figure, axes = charts.canvas(
        len(names), width=max(5.0, 1.2 + 1.1 * sum(widths)), squeeze=False, sharey=True, width_ratios=widths
    )
    for chart, (family, each) in zip(axes[0], of.items(), strict=True):
        cka_bars(chart, view.results, each, ("patches", "skip"), legend=chart is axes[0][-1])
        chart.set_title("random weights" if family == "random" else family)
        chart.label_outer()
    return figure


def readings(trace: Trace, model: ViT, reading: str) -> Pairs:
    """[CLS] in the last layer after attention, and each summand alone, at any reading."""
    summands = {"skip": trace.skip[-1], **parts(trace, model)}
    del summands["bias"]

    def at(x: Array) -> Array:
        return x if reading == "middle" else cls_reading(model, x, reading)  # type: ignore[arg-type]

    return Pairs(at(trace.middle[-1]), {name: at(x) for name, x in summands.items()})


EXPERIMENT = SkipCKA()

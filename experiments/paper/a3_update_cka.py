"""A3, figure 3a: how much of what attention brings to [CLS] in the last layer is in the patches' part, and how much in
the registers'.

    jaxvit A3 --models MODEL .. --images FOLDER --out OUT

Linear CKA over images between the full update of [CLS] by attention and the part of it that patches alone, or registers
alone, bring. By default a part is what is left of the update when the attention weights on all other tokens are set to
zero after the softmax, and the rest of the row stays as it is: so the parts of [CLS], registers and patches, and the
bias, add up to the update. The attention of [CLS] to itself is in neither of the two parts, but it is in the update.
Both are read after the output projection and LayerScale, without the residual.

Options:

  renormalise  divide each head's part by its attention on the tokens that are left, as if the softmax had been over
               them alone
  keep_cls     leave the attention of [CLS] to itself in both parts
  stage        heads       outputs of the heads side by side, before the output projection
               proj        after the output projection
               layerscale  after LayerScale
               block       [CLS] after the block, residual and MLP included, if attention had brought that part and the
                           bias alone
               final       that, after the final norm

CKA does not see the bias before `block`. Its usual estimate is inflated unless n is far above d, so it comes with the
unbiased one, on which the claims are decided (of 30 images or more), and with the mean of the biased one over all
orders of the rows (null).
A CKA says that two sets of vectors vary alike over images, and nothing of their sizes: the parts' CKAs do not add up,
and parts that vary together both have a high one. A part that does not vary has none (NaN).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jaxvit import ViT
from jaxvit.analysis.decompose import einsum, readout
from jaxvit.analysis.similarity import CKA

from ..core import charts
from ..core.claims import (
    TWO,
    Verdict,
    counted,
    falls,
    groups,
    images_of,
    large_sizes,
    largest_of,
    names,
    sides,
    tested,
    too_few,
)
from ..core.experiment import About, Claim, Experiment, Found, Measured, Option, Pairs, Results, Table, View
from ..core.trace import READINGS, Trace, by_source, cls_reading

ALMOST_ALL = 0.9
"""What counts as a CKA of about 1."""
ESTIMATES = ("biased", "unbiased", "null")


class UpdateCKA(Experiment):
    id = "A3"
    title = "CKA of the full [CLS] update with its patches' and its registers' part"
    figure = "figure 3a"
    shown = (
        "Linear CKA over images between what attention adds to [CLS] in the last layer and the part that comes from "
        "patches, or from registers, alone. Bars: unbiased; circles: biased; dashes: the biased one's mean over all "
        "orders of the images."
    )
    passes = ("clean", "controls")
    controlled = True
    options = (
        Option("renormalise", False, "divide a part by the head's attention on the tokens that are left"),
        Option("keep_cls", False, "leave the attention of [CLS] to itself in both parts"),
        Option("stage", "layerscale", "where update and parts are read", READINGS),
    )

    def measure(self, trace: Trace, model: ViT, options: Mapping[str, Any]) -> Measured:
        return Measured(pairs={"update": readings(trace, model, **options)})

    def numbers(self, found: Mapping[str, Found], about: About, options: Mapping[str, Any]) -> dict[str, Any]:
        ckas = {name: plain(cka) for name, cka in found["clean"].cka["update"].results().items()}
        return ckas | {"reading": dict(options)}

    def claims(self, results: Results, models: Mapping[str, About]) -> list[Claim]:
        texts = {
            f"CKA(update, patches) is about 1 (above {ALMOST_ALL}) in the small models and falls from one large size "
            "to the next.": falls_in,
            "In the largest model, CKA(update, registers) is above CKA(update, patches).": overtakes,
        }
        found = []
        for text, test in texts.items():
            found += tested(
                2, self.id, text, partial(test, results), results, models, registers=True, options=self.options
            )
        return found

    def table(self, results: Results, models: Mapping[str, About]) -> Table | None:
        return cka_table(results, models, ("patches", "registers", "cls"))

    def figures(self, view: View) -> dict[str, Figure]:
        shown = [about for about in charts.ordered(view.models) if about.key in view.results]
        if not shown:
            return {}
        figure, axes = charts.canvas(width=max(5.0, 1.0 + 1.1 * len(shown)))
        cka_bars(axes, view.results, shown, ("patches", "registers"))
        axes.set_title("Full update and its parts")
        figures = {"3a": figure}
        if controls := controls_figure(view, ("patches", "registers")):
            figures["3a-controls"] = controls
        return figures


def falls_in(results: Results, members: Sequence[About]) -> Verdict:
    """The paper's: in a family that was given with all of its large sizes."""
    small, large = sides(members)
    missing = [size for size in large_sizes(members) if size not in {about.size for about in large}]
    if missing:
        return Verdict(None, f"needs {members[0].family} {' and '.join(missing)}")
    if not small or not large:
        return Verdict(None, TWO)
    by = told(results, members, "patches")
    if few := too_few([images(results, about) for about in members], by):
        return few
    values = {about.key: unbiased(results, about, "patches") for about in members}
    holds = None
    if all(map(math.isfinite, values.values())):
        levels = [[values[about.key] for about in each] for each in (small, *groups(large))]
        holds = min(levels[0]) > ALMOST_ALL and falls(levels)
    return Verdict(holds, f"{by}; {counted([images(results, about) for about in members])}")


def overtakes(results: Results, members: Sequence[About]) -> Verdict:
    large, missing = largest_of(members)
    if not large:
        return Verdict(None, missing)
    values = {a.key: [unbiased(results, a, name) for name in ("registers", "patches")] for a in large}
    called = names(members)
    each = (f"{called[key]} {charts.number(a)} against {charts.number(b)}" for key, (a, b) in values.items())
    by, n = f"unbiased: {', '.join(each)}", [images(results, about) for about in large]
    if few := too_few(n, by):
        return few
    defined = all(math.isfinite(x) for pair in values.values() for x in pair)
    return Verdict(all(a > b for a, b in values.values()) if defined else None, f"{by}; {counted(n)}")


def readings(trace: Trace, model: ViT, *, renormalise: bool, keep_cls: bool, stage: str) -> Pairs:
    """The full update of [CLS] in the last layer and its parts, at any reading."""
    others = {name: read(trace, model, z, stage) for name, z in kept(trace, model, renormalise, keep_cls).items()}
    return Pairs(full(trace, model, stage), others)


def kept(trace: Trace, model: ViT, renormalise: bool, keep_cls: bool) -> dict[str, Float[Array, "B H d"]]:
    """What the heads write in the last layer if [CLS] attends to one source alone: `patches`, `registers` (if there are
    any), `cls`.
    """
    z, mass = by_source(trace.z[-1], model, axis=1), by_source(trace.mass[-1], model, axis=2)
    if keep_cls:
        z, mass = ({n: x if n == "cls" else x + each["cls"] for n, x in each.items()} for each in (z, mass))
    if renormalise:
        z = {name: _over(z[name], mass[name][..., None]) for name in z}
    return z


def _over(x: Array, mass: Array) -> Array:
    """0 where there is no attention at all."""
    return jnp.where(mass > 0, x / jnp.where(mass > 0, mass, 1), 0)


def full(trace: Trace, model: ViT, stage: str) -> Float[Array, "B D"]:
    """The whole whose parts `read` gives."""
    if stage in ("block", "final"):
        return trace.after[-1] if stage == "block" else model.norm(trace.after[-1])
    return trace.update[-1] if stage == "layerscale" else read(trace, model, trace.z[-1].sum(axis=1), stage)


def read(trace: Trace, model: ViT, z_BHd: Float[Array, "B H d"], stage: str) -> Float[Array, "B D"]:
    """What becomes of outputs of the heads of the last layer, at one of `READINGS`; with the bias."""
    if stage == "heads":
        return z_BHd.reshape(len(z_BHd), -1)
    after = jax.tree.map(lambda a: a[-1].astype(z_BHd.dtype), readout(model))
    update = einsum("BHd,HdD->BD", z_BHd, after.kernel) + after.bias[None]
    if stage == "proj":
        return update
    update = update * after.gamma[None]
    return update if stage == "layerscale" else cls_reading(model, trace.skip[-1] + update, stage)  # type: ignore[arg-type]


def plain(cka: CKA) -> dict[str, Any]:
    """For results.json: n, d1, d2, and each estimate, nested lists if there are axes in front."""
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in cka._asdict().items()}


def estimate(results: Results, about: About, name: str, which: str) -> float:
    """NaN where undefined, or where there is no such part."""
    value = results[about.key].get(name, {}).get(which)
    return math.nan if value is None else value


def unbiased(results: Results, about: About, name: str) -> float:
    return estimate(results, about, name, "unbiased")


def images(results: Results, about: About) -> int:
    return images_of(results[about.key].get("patches"))


def told(results: Results, models: Sequence[About], name: str) -> str:
    """Both estimates of each model."""
    called = names(models)
    each = (
        f"{called[about.key]} {charts.number(unbiased(results, about, name))} "
        f"({charts.number(estimate(results, about, name, 'biased'))})"
        for about in models
    )
    return f"unbiased (biased): {', '.join(each)}"


def cka_table(results: Results, models: Mapping[str, About], names: Sequence[str]) -> Table | None:
    """One row a model: each CKA as unbiased (biased, null)."""
    shown = [about for about in charts.ordered(models) if about.key in results]
    if not shown:
        return None
    rows = []
    for about in shown:
        first = results[about.key]["patches"]
        cells = []
        for name in names:
            values = {which: charts.number(estimate(results, about, name, which)) for which in ESTIMATES}
            there = name in results[about.key]
            cells.append("{unbiased} ({biased}, {null})".format(**values) if there else "–")  # noqa: RUF001
        rows.append((about.name, str(first["n"]), str(first["d1"]), *cells))
    head = ("model", "images", "d", *(charts.LABELS.get(name, name) for name in names))
    return Table(head, rows, "unbiased (biased, mean of the biased one over all orders of the images)")


def cka_bars(axes: Axes, results: Results, models: Sequence[About], names: Sequence[str], legend: bool = True) -> None:
    """One group of bars a model: unbiased CKA as bars, biased as circles, null as dashes."""
    labels = {name: charts.LABELS[name] for name in names}

    def series(which: str) -> dict[str, list[float]]:
        return {labels[name]: [estimate(results, about, name, which) for about in models] for name in names}

    colours = {labels[name]: charts.COLOURS[name] for name in names}
    charts.bars(axes, series("unbiased"), [charts.short(about) for about in models], colours, marks=series("null"))
    width = 0.8 / len(names)
    for i, (label, values) in enumerate(series("biased").items()):
        x = np.arange(len(models)) + (i - (len(names) - 1) / 2) * width
        axes.plot(x, values, "o", markerfacecolor="white", markeredgecolor=charts.INK, markersize=5, label=f"_{label}")
    axes.set_ylim(min(0, axes.get_ylim()[0]), 1.05)
    axes.set_ylabel("linear CKA")
    if not legend:
        return
    signs = [
        Line2D([], [], marker="o", color="none", markerfacecolor="white", markeredgecolor=charts.INK, label="biased"),
        Line2D([], [], color=charts.INK, linewidth=1.6, label="null of the biased"),
    ]
    bars = axes.get_legend_handles_labels()[0]
    axes.figure.legend(handles=[*bars, *signs], loc="outside lower center", ncols=len(names) + 2)


def controls_figure(view: View, names: Sequence[str]) -> Figure | None:
    """The unbiased CKAs under each replacement control, one chart a model; None if there are no controls."""
    shown = [about for about in charts.ordered(view.models) if view.results.get(about.key, {}).get("controls")]
    if not shown:
        return None
    most = max(len(view.results[about.key]["controls"]) for about in shown)
    figure, axes = charts.canvas(
        len(shown), width=1.8 + 2.4 * len(shown), height=1.2 + 0.2 * most, squeeze=False, sharex=True
    )
    for about, chart in zip(shown, axes[0], strict=True):
        controls = {"none": view.results[about.key], **view.results[about.key]["controls"]}
        for name in names:
            values = [unbiased({about.key: each}, about, name) for each in controls.values()]
            if np.isfinite(values).any():
                chart.plot(values, range(len(values)), "o", color=charts.COLOURS[name], label=charts.LABELS[name])
        chart.set_yticks(range(len(controls)), list(controls))
        chart.invert_yaxis()
        chart.set_title(charts.short(about).replace("\n", " "))
        chart.set_xlabel("CKA, unbiased")
        chart.grid(True, axis="both")
    handles, labels = max((chart.get_legend_handles_labels() for chart in axes[0]), key=lambda each: len(each[0]))
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names))
    return figure


EXPERIMENT = UpdateCKA()

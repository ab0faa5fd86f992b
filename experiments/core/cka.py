"""What experiments share whose numbers are CKAs: numbers for results.json, a table, bars, and a figure of controls.

A CKA comes as three estimates: the usual one, which is biased; the unbiased one, on which claims are decided; and the
mean of the biased one over all orders of the images (null).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from jaxvit.analysis.similarity import CKA

from . import charts
from .claims import images_of, names
from .experiment import About, Results, Table, View

ESTIMATES = ("biased", "unbiased", "null")


def plain_cka(cka: CKA) -> dict[str, Any]:
    """For results.json: n, d1, d2, and each estimate, nested lists if there are axes in front."""
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in cka._asdict().items()}


def estimate(results: Results, about: About, name: str, which: str) -> float:
    """NaN where undefined, or where there is no such part."""
    value = results[about.key].get(name, {}).get(which)
    return math.nan if value is None else value


def unbiased(results: Results, about: About, name: str) -> float:
    return estimate(results, about, name, "unbiased")


def cka_images(results: Results, about: About) -> int:
    return images_of(results[about.key].get("patches"))


def told_ckas(results: Results, models: Sequence[About], name: str) -> str:
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

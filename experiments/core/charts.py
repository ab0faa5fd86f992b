"""What all figures share: colours, names, kinds of chart, and how a figure becomes a file or part of a page."""

# ruff: noqa: RUF001 (what people read has true minus signs and apostrophes)

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .experiment import About

COLOURS = {
    "skip": "#009e73",
    "cls": "#cc79a7",
    "registers": "#d55e00",
    "patches": "#0072b2",
    "bias": "#50555c",
    "mlp": "#e0a100",
}
"""One colour for each summand of [CLS], the same everywhere, in the order of drawing (after Okabe and Ito)."""
LABELS = {"skip": "skip path", "cls": "[CLS] itself", "registers": "registers", "patches": "patches"}
LABELS |= {"bias": "bias", "mlp": "MLP"}
SIZES = ("#9ecae1", "#6baed6", "#2f7ebc", "#0b4a86", "#08264d")
"""For models of one family, from small to large."""
SIGNED = "RdBu"
"""Colour map of contributions, wherever they are shown: blue along the update, red against it, pale for nothing."""
INK, QUIET, RULE = "#1d2228", "#5c6670", "#dde1e5"
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text; the page replaces the font
    "svg.hashsalt": "jaxvit",
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "text.color": INK,
    "axes.labelcolor": QUIET,
    "axes.labelsize": 9.5,
    "axes.edgecolor": QUIET,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def styled() -> Any:
    """The context in which figures are made and written."""
    return matplotlib.style.context(["default", STYLE])


def caption(figure: Figure, text: str) -> Figure:
    """Says what this figure shows; the report prints it below."""
    figure.set_label(text)
    return figure


def canvas(columns: int = 1, rows: int = 1, width: float = 6.4, height: float = 3.4, **more: Any) -> tuple[Figure, Any]:
    """A figure of `rows` x `columns` charts, and the chart, or an array of them; sizes in inches, of the whole."""
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, **more)


def ordered(models: Mapping[str, About]) -> list[About]:
    """Family by family in the order they were given, within each by what registers they have, then by size."""
    families = list(dict.fromkeys(about.family for about in models.values()))
    kinds = ("none", "trained", "test-time", "random")
    return sorted(models.values(), key=lambda a: (families.index(a.family), kinds.index(a.registers_are), a.parameters))


def short(about: About) -> str:
    """A name of a few letters, for an axis: family, size, registers."""
    family = "random" if about.weights == "random" else about.family
    extra = {"none": "", "trained": "+reg", "random": "+reg", "test-time": "+test-time reg"}[about.registers_are]
    return f"{family}\n{about.size}{extra}"


def shades(models: Sequence[About]) -> list[str]:
    """A colour for each, lighter for smaller ones, by size among its family with the same kind of registers."""

    def alike(about: About) -> list[int]:
        return sorted(
            a.parameters for a in models if (a.family, a.registers_are) == (about.family, about.registers_are)
        )

    def place(about: About) -> int:
        sizes = alike(about)
        at = sizes.index(about.parameters) / (len(sizes) - 1) if len(sizes) > 1 else 0.5
        return round(at * (len(SIZES) - 1))

    return [SIZES[place(about)] for about in models]


def violins(axes: Axes, samples: Sequence[np.ndarray], names: Sequence[str], colours: str | Sequence[str]) -> None:
    """Distributions side by side: density, quartiles and mean; a line where there is no spread."""
    colours = [colours] * len(samples) if isinstance(colours, str) else colours
    for at, (sample, colour) in enumerate(zip(samples, colours, strict=True)):
        sample = np.asarray(sample, np.float64)
        sample = sample[np.isfinite(sample)]
        if not len(sample):
            continue
        if len(sample) > 2 and np.ptp(sample) > 1e-9 * max(np.abs(sample).max(), 1e-30):
            for body in axes.violinplot([sample], [at], widths=0.8, showextrema=False)["bodies"]:  # type: ignore[attr-defined]
                body.set(facecolor=colour, edgecolor=colour, alpha=0.5)
        low, middle, high = np.quantile(sample, (0.25, 0.5, 0.75))
        axes.plot([at, at], [low, high], color=colour, linewidth=4, solid_capstyle="butt")
        axes.plot([at - 0.12, at + 0.12], [middle] * 2, color=INK, linewidth=1.2)
        axes.plot(at, sample.mean(), "D", color=INK, markersize=4, markeredgecolor="white", markeredgewidth=0.7)
    name_models(axes, names)


def bars(
    axes: Axes,
    values: Mapping[str, Sequence[float]],
    names: Sequence[str],
    colours: Mapping[str, str],
    errors: Mapping[str, Sequence[float]] | None = None,
    marks: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Bars in groups: one group for each of `names`, one bar in it for each series; NaN leaves a gap.

    Args:
      errors: half lengths of intervals.
      marks: a black dash over each bar, such as its null.
    """
    width = 0.8 / max(len(values), 1)
    for i, (series, heights) in enumerate(values.items()):
        x = np.arange(len(names)) + (i - (len(values) - 1) / 2) * width
        y = np.nan_to_num(np.asarray(heights, float))
        error = None if errors is None else np.asarray(errors[series], float)
        axes.bar(
            x, y, 0.92 * width, color=colours[series], label=series, yerr=error, ecolor=INK, error_kw={"elinewidth": 1}
        )
        for at, mark in zip(x, (marks or {}).get(series, ()), strict=False):
            if math.isfinite(mark):
                axes.plot([at - 0.4 * width, at + 0.4 * width], [mark] * 2, color=INK, linewidth=1.6)
    name_models(axes, names)


def stacked(
    axes: Axes, values: Mapping[str, Sequence[float]], names: Sequence[str], colours: Mapping[str, str] = COLOURS
) -> None:
    """One bar for each of `names`, stacked from the series; negative values are stacked below 0, NaN is left out."""
    above, below = np.zeros(len(names)), np.zeros(len(names))
    for series, heights in values.items():
        y = np.nan_to_num(np.asarray(heights, float))
        axes.bar(range(len(names)), y, 0.7, np.where(y < 0, below, above), color=colours[series], label=LABELS[series])
        above, below = above + np.maximum(y, 0), below + np.minimum(y, 0)
    name_models(axes, names)


def name_models(axes: Axes, names: Sequence[str]) -> None:
    """Names below places 0, 1 .. of the x axis; on one line and slanted where they would touch each other."""
    subplot, figure = axes.get_subplotspec(), axes.get_figure(root=True)
    columns = 1 if subplot is None else subplot.get_gridspec().ncols / len(subplot.colspan)
    points = 72 * (figure.get_figwidth() / columns - 0.7) / max(len(names), 1)  # 0.7 inches for the y axis
    longest = max((len(line) for name in names for line in name.split("\n")), default=0)
    if 5.6 * longest < points:
        axes.set_xticks(range(len(names)), names)
    else:
        flat = [name.replace("\n", " ") for name in names]
        axes.set_xticks(range(len(names)), flat, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.6, len(names) - 0.4)


def tick_step(count: int, most: int = 8) -> int:
    """The smallest of 1, 2, 5, 10, .. that leaves at most so many ticks."""
    return next(step for step in (1, 2, 5, 10, 20, 50, 100, 10**9) if count <= most * step)


def layer_ticks(axes: Axes, layers: Sequence[int]) -> None:
    """Ticks of the x axis at layers, which count from 0; never between two."""
    axes.set_xticks(list(layers)[:: tick_step(len(layers))])


def number(x: float | None, digits: int = 3) -> str:
    """Rounded; with a true minus sign, and never minus zero; NaN, which results.json has as null, is "undefined"."""
    if x is None or math.isnan(x):
        return "undefined"
    return f"{round(x, digits) or 0:.{digits}f}".replace("-", "−")


def percent(x: float | None) -> str:
    text = number(None if x is None else 100 * x, 1)
    return text if text == "undefined" else f"{text}\N{NO-BREAK SPACE}%"


def listed(parts: Iterable[str]) -> str:
    """a, b and c."""
    *first, last = list(parts) or [""]
    return " and ".join(filter(None, [", ".join(first), last]))


def write_figure(figure: Figure, folder: Path, name: str) -> None:
    """PNG and SVG: the same bytes for the same figure."""
    folder.mkdir(parents=True, exist_ok=True)
    white = re.sub(r"<svg[^>]*>", r'\g<0>\n <rect width="100%" height="100%" fill="#ffffff"/>', svg(figure), count=1)
    (folder / f"{name}.svg").write_text(white, encoding="utf-8")
    figure.savefig(folder / f"{name}.png", dpi=160, metadata={"Software": None})


_DRAWN: WeakKeyDictionary[Figure, str] = WeakKeyDictionary()


def svg(figure: Figure) -> str:
    """A figure with a transparent ground, drawn once: it is not to be changed after that."""
    if figure not in _DRAWN:
        buffer = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
        _DRAWN[figure] = buffer.getvalue()
        figure.set_layout_engine("none")  # stays as it was laid out, which takes longer than drawing it
    return _DRAWN[figure]


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """A figure as an element of a page: no outer files, and ids that no other figure has.

    Args:
      name: of this figure alone on its page.
    """
    name = re.sub(r"[^\w-]", "-", name)
    text = svg(figure)
    text = text[text.index("<svg") :].strip().replace("xlink:href", "href")
    text = re.sub(r"<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    view = re.search(r'viewBox="[^"]*"', text)
    assert view, "matplotlib writes one"
    return re.sub(r"<svg[^>]*>", f'<svg {view[0]} role="img" aria-label="{escape(description)}">', text, count=1)

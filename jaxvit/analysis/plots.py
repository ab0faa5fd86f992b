"""Pictures of arrays with named axes: a line or bars, a heat map, or a row of heat maps. Needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxvit.analysis.named import Label, NamedArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(**given: Any) -> Figure:
    """A figure that a notebook shows, whether or not pyplot was imported; its arguments are those of matplotlib's.

    Raises:
      ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("matplotlib is not installed: pip install matplotlib") from None

    class ShownFigure(Figure):
        def _repr_png_(self) -> bytes:
            picture = io.BytesIO()
            self.savefig(picture, format="png", dpi=100)
            return picture.getvalue()

    return ShownFigure(**given)


def plot(
    array: NamedArray, path: Any = None, x: str | None = None, y: str | None = None, col: str | None = None
) -> Figure:
    """See `NamedArray.plot`."""
    if not 1 <= len(array.axes) <= 3:
        raise ValueError(f"{array!r} cannot be drawn: take the mean over, or select, all but one to three axes")
    roles = ("x", "y", "col")[: len(array.axes)]
    given = {role: array._axis(axis) for role, axis in (("x", x), ("y", y), ("col", col)) if axis}
    if not set(given) <= set(roles) or len(set(given.values())) < len(given):
        raise ValueError(f"{array!r} is drawn with {' and '.join(roles)}, an axis each; {given} do not fit")
    left = iter(axis for axis in array.axes if axis not in given.values())
    chosen = {role: given.get(role) or next(left) for role in roles}
    figure = new_figure(layout="constrained")
    if len(array.axes) == 1:
        _draw_line(array, figure, chosen["x"])
    else:
        _draw_maps(array, figure, chosen["x"], chosen["y"], chosen.get("col"))
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _draw_line(array: NamedArray, figure: Figure, x: str) -> None:
    labels = array.axes[x]
    figure.set_size_inches(max(3.5, 0.25 * len(labels) + 1.5), 3)
    panel = figure.subplots()
    if numbers(labels):
        panel.plot(labels, array.values, marker="o", markersize=3)
        if all(isinstance(label, int) for label in labels):  # layers, heads: a tick never stands between two
            panel.set_xticks(labels[:: _step(labels)])
    else:
        panel.bar(range(len(labels)), array.values)
        ticks(panel.xaxis, labels)
    panel.set(xlabel=x, ylabel=array.name)


def _draw_maps(array: NamedArray, figure: Figure, x: str, y: str, col: str | None) -> None:
    values = np.transpose(array.values, [list(array.axes).index(axis) for axis in (*([col] if col else []), y, x)])
    columns = array.axes[col] if col else ("",)
    wide, tall = (max(2.0, 0.22 * len(array.axes[axis])) for axis in (x, y))
    figure.set_size_inches(min(3.0 + wide * len(columns), 16), min(1.3 + tall, 12))
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    signed = low < 0 < high
    limit = max(-low, high)
    scale = dict(vmin=-limit, vmax=limit, cmap="RdBu_r") if signed else dict(vmin=low, vmax=high, cmap="viridis")
    panels = figure.subplots(1, len(columns), squeeze=False, sharey=True)[0]
    for panel, one, label in zip(panels, values if col else values[None], columns, strict=True):
        panel.imshow(one, aspect="auto", origin="lower", interpolation="none", **scale)
        panel.set(xlabel=x, title=f"{col} {label}" if col and numbers([label]) else str(label))
        ticks(panel.xaxis, array.axes[x])
        ticks(panel.yaxis, array.axes[y])
    panels[0].set_ylabel(y)
    figure.colorbar(panels[0].images[0], ax=list(panels), label=array.name)


def numbers(labels: Sequence[Label]) -> bool:
    return not any(isinstance(label, str) for label in labels)


def _step(labels: Sequence[Label], most: int = 14) -> int:
    """Which of many labels are written: every second, fifth, .."""
    return next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**9) if len(labels) <= most * s)


def ticks(axis: Any, labels: Sequence[Label], most: int = 14) -> None:
    """Writes labels at the middle of their cells: all words, and of many numbers every second, fifth, .."""
    step = _step(labels, most) if numbers(labels) else 1
    places = range(0, len(labels), step)
    turned = axis.axis_name == "x" and max(len(str(label)) for label in labels) > 3
    axis.set_ticks(places, [str(labels[i]) for i in places], **(dict(rotation=45, ha="right") if turned else {}))

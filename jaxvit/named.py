"""Arrays whose axes have names and labels, and that plot themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Label = str | int


@dataclass(frozen=True)
class NamedArray:
    """An array, with a name for each axis and a label for each place along it.

    effect.mean("image").select(control="zero").plot()

    Attributes:
      values: the numbers.
      axes: axis name -> labels, in the order of the array's axes.
      name: what the numbers are.
    """

    values: np.ndarray
    axes: Mapping[str, tuple[Label, ...]]
    name: str = "value"

    def __post_init__(self) -> None:
        sizes = tuple(len(labels) for labels in self.axes.values())
        if self.values.shape != sizes:
            raise ValueError(
                f"values have shape {self.values.shape}, the axes {dict(zip(self.axes, sizes, strict=True))}"
            )

    def mean(self, *axes: str) -> NamedArray:
        """The mean over these axes; over all without any."""
        return self._reduced(np.mean, axes)

    def std(self, *axes: str) -> NamedArray:
        """The standard deviation over these axes, of the values themselves (divided by their number)."""
        return self._reduced(np.std, axes)

    def _reduced(self, function: Any, axes: Sequence[str]) -> NamedArray:
        axes = axes or tuple(self.axes)
        places = tuple(self._place(axis) for axis in axes)
        left = {axis: labels for axis, labels in self.axes.items() if axis not in axes}
        return NamedArray(np.asarray(function(self.values, axis=places)), left, self.name)

    def select(self, **labels: Label) -> NamedArray:
        """The part at these labels, without their axes: `select(layer=3, control="zero")`."""
        values, left = self.values, dict(self.axes)
        for axis, label in labels.items():
            if label not in self.axes[self._axis(axis)]:
                raise ValueError(f"no {axis} {label!r}; there are {', '.join(map(str, self.axes[axis]))}")
            values = np.take(values, self.axes[axis].index(label), axis=list(left).index(axis))
            del left[axis]
        return NamedArray(np.asarray(values), left, self.name)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.values, dtype, copy=copy)

    def to_xarray(self) -> Any:
        """The same as an `xarray.DataArray`, if xarray is installed."""
        import xarray

        coordinates = {axis: list(labels) for axis, labels in self.axes.items()}
        return xarray.DataArray(self.values, coordinates, tuple(self.axes), self.name)

    def _axis(self, name: str) -> str:
        if name not in self.axes:
            raise ValueError(f"no axis {name!r}; there are {', '.join(self.axes) or 'none'}")
        return name

    def _place(self, name: str) -> int:
        return list(self.axes).index(self._axis(name))

    def __repr__(self) -> str:
        axes = ", ".join(f"{axis} {len(labels)}" for axis, labels in self.axes.items())
        return f"NamedArray({self.name!r}, [{axes}])"

    def plot(self, path: Any = None, x: str | None = None, y: str | None = None, col: str | None = None) -> Figure:
        """One axis: a line or bars. Two: a heat map. Three: a row of heat maps on one colour scale.

        Values of both signs get a scale around 0. Axes that are left over must be averaged or selected first.

        Args:
          path: where to save the picture, as .png, .svg or .pdf.
          x, y, col: the axes that go along, up, and over the row of maps; by default the first three in the order
            x, y, col.

        Raises:
          ValueError: an axis that is not there, or other than one to three axes.
        """
        from matplotlib.figure import Figure

        left = [axis for axis in self.axes if axis not in (x, y, col)]
        given = {name: self._axis(axis) for name, axis in (("x", x), ("y", y), ("col", col)) if axis}
        chosen = given | dict(zip((n for n in ("x", "y", "col") if n not in given), left, strict=False))
        if not 1 <= len(self.axes) <= 3 or len(chosen) != len(self.axes) or len(set(chosen.values())) != len(chosen):
            raise ValueError(f"{self!r} cannot be drawn: take the mean over, or select, all but one to three axes")
        figure = Figure(layout="constrained")
        if len(self.axes) == 1:
            self._draw_line(figure, chosen["x"])
        else:
            self._draw_maps(figure, chosen["x"], chosen["y"], chosen.get("col"))
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def _draw_line(self, figure: Figure, x: str) -> None:
        labels = self.axes[x]
        figure.set_size_inches(max(3.5, 0.25 * len(labels) + 1.5), 3)
        panel = figure.subplots()
        if all(isinstance(label, int) for label in labels):
            panel.plot(labels, self.values, marker="o", markersize=3)
        else:
            panel.bar(range(len(labels)), self.values)
            ticks(panel.xaxis, labels)
        panel.set(xlabel=x, ylabel=self.name)

    def _draw_maps(self, figure: Figure, x: str, y: str, col: str | None) -> None:
        values = np.transpose(self.values, [self._place(axis) for axis in (*([col] if col else []), y, x)])
        columns = self.axes[col] if col else ("",)
        wide, tall = (max(2.0, 0.22 * len(self.axes[axis])) for axis in (x, y))
        figure.set_size_inches(min(3.0 + wide * len(columns), 16), min(1.3 + tall, 12))
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        signed = low < 0 < high
        limit = max(-low, high)
        scale = dict(vmin=-limit, vmax=limit, cmap="RdBu_r") if signed else dict(vmin=low, vmax=high, cmap="viridis")
        panels = figure.subplots(1, len(columns), squeeze=False, sharey=True)[0]
        for panel, one, label in zip(panels, values if col else values[None], columns, strict=True):
            panel.imshow(one, aspect="auto", origin="lower", interpolation="none", **scale)
            panel.set(xlabel=x, title=f"{col}: {label}" if col and isinstance(label, int) else str(label))
            ticks(panel.xaxis, self.axes[x])
            ticks(panel.yaxis, self.axes[y])
        panels[0].set_ylabel(y)
        figure.colorbar(panels[0].images[0], ax=list(panels), label=self.name)


def ticks(axis: Any, labels: Sequence[Label], most: int = 14) -> None:
    """Writes labels at the middle of their cells: all words, and of many numbers every second, fifth, .."""
    step = 1
    if all(isinstance(label, int) for label in labels):
        step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**9) if len(labels) <= most * s)
    places = range(0, len(labels), step)
    turned = axis.axis_name == "x" and max(len(str(label)) for label in labels) > 3
    axis.set_ticks(places, [str(labels[i]) for i in places], **(dict(rotation=45, ha="right") if turned else {}))

"""Arrays whose axes have names and labels.

`NamedArray` is a small container of our own because xarray depends on pandas, and the library stays light. Where xarray
is installed, `.to_xarray()` gives the same values and labels as a `DataArray`, for everything that is not here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile
from zlib import error as ZlibError

import numpy as np

from jaxvit.io.checkpoint import replacing_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Label = str | int | float


@dataclass(frozen=True, eq=False)
class NamedArray:
    """An array, with a name for each axis and a label for each place along it.

    effect.mean("image").select(control="zero").plot("effect.png")
    effect.mean("image").largest(3)  # [({"layer": 5, "head": 0, "control": "mean"}, 0.93), ..]
    np.asarray(effect)  # the numbers alone

    Attributes:
      values: the numbers.
      axes: axis name -> labels, in the order of the array's axes.
      name: what the numbers are.
    """

    values: np.ndarray
    axes: Mapping[str, tuple[Label, ...]]
    name: str = "value"

    def __post_init__(self) -> None:
        sizes = {axis: len(labels) for axis, labels in self.axes.items()}
        if self.values.shape != tuple(sizes.values()):
            raise ValueError(f"values have shape {list(self.values.shape)}; expected that of the axes, {sizes}")

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

    def select(self, **labels: Label | Sequence[Label]) -> NamedArray:
        """The part at these labels: `select(layer=3, control=("zero", "mean"))`. An axis with one label goes."""
        values, left = self.values, dict(self.axes)
        for axis, chosen in labels.items():
            every = self.axes[self._axis(axis)]
            several = tuple(chosen) if isinstance(chosen, Sequence) and not isinstance(chosen, str) else None
            wanted = (chosen,) if several is None else several
            if wrong := [label for label in wanted if label not in every]:
                raise ValueError(f"no {axis} {wrong[0]!r}; there are {', '.join(map(str, every))}")
            place = list(left).index(axis)
            values = np.take(values, [every.index(label) for label in wanted], axis=place)
            if several is None:
                values = values.squeeze(place)
                del left[axis]
            else:
                left[axis] = several
        return NamedArray(np.asarray(values), left, self.name)

    def largest(self, n: int = 1, magnitude: bool = False) -> list[tuple[dict[str, Label], float]]:
        """Where the n largest values are, and what they are; with `magnitude`, those farthest from 0. NaN never is."""
        key = np.abs(self.values) if magnitude else self.values
        order = np.argsort(-key, axis=None, kind="stable")  # NaN last
        places = [np.unravel_index(i, self.values.shape) for i in order if not np.isnan(key.flat[i])][:n]
        return [
            ({axis: labels[i] for (axis, labels), i in zip(self.axes.items(), at, strict=True)}, float(self.values[at]))
            for at in places
        ]

    def smallest(self, n: int = 1) -> list[tuple[dict[str, Label], float]]:
        """Where the n smallest values are, and what they are. NaN never is.

        Example:

            sweep(model, images, edits, grids.heads(model)).mean("image").smallest(5)  # the heads that matter most
        """
        opposite = NamedArray(-self.values, self.axes, self.name)
        return [(place, -value) for place, value in opposite.largest(n)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.values, dtype, copy=copy)

    def to_xarray(self) -> Any:
        """The same as an `xarray.DataArray`, if xarray is installed."""
        try:
            import xarray
        except ImportError:
            raise ImportError("xarray is not installed: pip install xarray, or use .values and .axes") from None
        coordinates = {axis: list(labels) for axis, labels in self.axes.items()}
        return xarray.DataArray(self.values, coordinates, tuple(self.axes), self.name)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an .npz file of `values`, and of `axes` and `name` as JSON; all or nothing."""
        labels = json.dumps({"name": self.name, "axes": list(map(list, self.axes.items()))})
        with replacing_file(Path(path)) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, values=self.values, labels=labels)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> NamedArray:
        """Reads what `save` wrote.

        Raises:
          ValueError: not such a file.
        """
        try:
            with Path(path).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                labels = json.loads(str(file["labels"]))
                axes = {axis: tuple(every) for axis, every in labels["axes"]}
                return cls(file["values"], axes, labels["name"])
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist") from None
        except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, BadZipFile, ZlibError) as error:
            raise ValueError(f"{path} is not a complete file of NamedArray.save: {error}") from error

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
        """One axis: a line over numbers, bars over words. Two: a heat map. Three: a row of them on one colour scale.

        Values of both signs get a scale around 0; NaN stays blank. Axes that are left over must be averaged or selected
        first.

        Args:
          path: where to save the picture, as .png, .svg or .pdf.
          x, y, col: the axes that go along, up, and over the row of maps; by default the first three in the order
            x, y, col.

        Raises:
          ValueError: an axis that is not there, or other than one to three axes.
        """
        from jaxvit.analysis import plots

        return plots.plot(self, path, x, y, col)

"""What an experiment is: what it measures of one batch, which numbers follow, what it claims and how it is drawn.

Every row of the paper, A1 to A9, and B1 to B7 beyond it, is a subclass of `Experiment` in a module of its own.
`experiments.runner.store` streams the images, once for all experiments that read the same runs of the model.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure

from jaxvit import ViT, ViTConfig
from jaxvit.analysis.similarity import StreamingCKA
from jaxvit.model.edits import Edits

if TYPE_CHECKING:
    from .examples import Example

KEPT = 64
"""Of how many images `Measured.keep` is kept."""
SOURCES = ("cls", "registers", "patches")
"""Where an attention update comes from, registers taken together."""

Results = Mapping[str, Mapping[str, Any]]
"""Key of a model -> the numbers of one experiment, as in results.json."""


@dataclass(frozen=True)
class About:
    """What is known of a model under study; goes into results.json.

    Attributes:
      key: short and unique, fit for file names.
      name: for people.
      family: models of one family are compared over their sizes: "DINOv2", "CLIP" .., "random".
      size: "S", "B", "L", "H", "g", or the width in words.
      registers: how many.
      registers_are: trained with the model; "test-time": appended to a model trained without (Jiang et al. 2025).
      weights: "random" ones show that the code runs and prove nothing about Vision Transformers.
      source: where the weights come from, as `experiments.models.subjects.told` makes it of a provenance.
      config: of the model, `ViTConfig.to_dict`.
    """

    key: str
    name: str
    family: str
    size: str
    depth: int
    width: int
    heads: int
    parameters: int
    registers: int
    registers_are: Literal["none", "trained", "test-time", "random"]
    weights: Literal["trained", "random"]
    source: Mapping[str, Any]
    config: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Subject(NamedTuple):
    """A model under study, and the edits that are part of it, such as test-time registers."""

    about: About
    model: ViT
    edits: Edits | None = None


class Pairs(NamedTuple):
    """What linear CKA compares: rows of a reference, [*axes, B, d], and of others by name, [*axes, B, d2]."""

    reference: Float[Array, "*axes B d"]
    others: dict[str, Float[Array, "*axes B d2"]]


class Measured(NamedTuple):
    """What one batch gives; a pytree of arrays. Names are the experiment's own.

    Attributes:
      per_image: name -> [B, ..]; kept of every image, and written to per_image/<model>.npz.
      pairs: name -> what to compare by CKA, over all images, in fixed memory.
      sums: name -> [B, ..]; summed over all images in float64.
      keep: name -> [B, ..]; kept of the first `KEPT` images alone.
    """

    per_image: dict[str, Array] = {}  # noqa: RUF012
    pairs: dict[str, Pairs] = {}  # noqa: RUF012
    sums: dict[str, Array] = {}  # noqa: RUF012
    keep: dict[str, Array] = {}  # noqa: RUF012

    def update(self, other: Measured) -> None:
        """Adds what `other` holds, in place."""
        for mine, more in zip(self, other, strict=True):
            mine.update(more)

    def prefixed(self, prefix: str) -> Measured:
        return Measured(*({f"{prefix}{name}": value for name, value in each.items()} for each in self))


class Found(NamedTuple):
    """What was measured of all images of one pass over them.

    Attributes:
      n: number of images.
      per_image: name -> [n, ..], in the order of the images; read from disk on use.
      cka: name of `Measured.pairs` -> the accumulated moments; `.results()` are the CKAs.
      sums: name -> [..], float64.
      keep: name -> [up to KEPT, ..].
    """

    n: int
    per_image: Mapping[str, np.ndarray]
    cka: Mapping[str, StreamingCKA]
    sums: Mapping[str, np.ndarray]
    keep: Mapping[str, np.ndarray]

    def of(self, prefix: str) -> Found:
        """Only the names that begin with `prefix`, without it."""

        return self.renamed(lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None)

    def renamed(self, rename: Callable[[str], str | None]) -> Found:
        """Under other names; without those that become None."""
        return Found(self.n, *(Renamed(named, rename) for named in self[1:]))


class Renamed(Mapping[str, Any]):
    """A mapping under other names, of which nothing is read before it is asked for."""

    def __init__(self, named: Mapping[str, Any], rename: Callable[[str], str | None]):
        self.named = named
        self.names = {new: old for old in named if (new := rename(old)) is not None}

    def __getitem__(self, name: str) -> Any:
        return self.named[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Option(NamedTuple):
    """A choice the paper leaves open; the command line has it as --<id>-<name>, results.json records it.

    A pass has options too, which all experiments that read it share: --<name of the pass>-<name>.

    Attributes:
      default: the reading that is taken unless another is asked for. Its type is the option's; False makes a switch.
      choices: what is allowed, if not everything of that type.
      late: whether it is read only after all images were measured, so that a change measures nothing again.
      least, most: the smallest and the largest value that are allowed.
    """

    name: str
    default: Any
    help: str
    choices: tuple[Any, ...] | None = None
    late: bool = False
    least: float | None = None
    most: float | None = None

    def add_to(self, parser: argparse._ActionsContainer, of: str) -> None:
        flag, dest = f"--{of.lower()}-{self.name}".replace("_", "-").replace(" ", "-"), f"{of}.{self.name}"
        if isinstance(self.default, bool):
            given: dict[str, Any] = dict(action=argparse.BooleanOptionalAction, help=self.help)
        else:
            given = dict(type=self.read, choices=self.choices, help=f"{self.help} (default: %(default)s)")
            if not self.choices:
                given["metavar"] = "X" if isinstance(self.default, float) else "N"
        parser.add_argument(flag, dest=dest, default=self.default, **given)

    def read(self, text: str) -> Any:
        """The value that was typed."""
        kind = type(self.default)
        try:
            value = kind(text)
        except ValueError:
            what = {int: "a whole number", float: "a number"}.get(kind, kind.__name__)
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None
        if self.least is not None and not value >= self.least:
            raise argparse.ArgumentTypeError(f"{text} is not at least {self.least}")
        if self.most is not None and not value <= self.most:
            raise argparse.ArgumentTypeError(f"{text} is not at most {self.most}")
        return value


class Claim(NamedTuple):
    """A statement of the paper, tested.

    Attributes:
      ordering: which of the paper's, 1 to 5, on the families it states them of; 0 for others.
      text: the statement, one sentence, with what was read if that is not the default.
      holds: None if it could not be decided: models or images were missing, or a number is undefined.
      by: by how much, in words and numbers, and on how many images: "0.32 against 0.11; n = 500"; or what was missing.
      on: family of the models it was tested on, or families that were missing; and the models' names.
    """

    ordering: int
    experiment: str
    text: str
    holds: bool | None
    by: str
    on: str


class Table(NamedTuple):
    """For the terminal and the report; the first cell of each row names it."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


class View(NamedTuple):
    """What figures are drawn from.

    Attributes:
      results: key of a model -> the numbers of this experiment.
      models: all that were run, also those this experiment says nothing about.
      found: key of a model -> pass -> what it found for this experiment, for distributions.
      examples: key of a model -> the images that are shown.
    """

    results: Results
    models: Mapping[str, About]
    found: Mapping[str, Mapping[str, Found]]
    examples: Mapping[str, Sequence[Example]]


class Experiment:
    """One row of the paper.

    The module's docstring is its help. Methods are pure; `measure` is traced together with those of other experiments.

    Attributes:
      id: "A1".
      title: a short sentence, of the report's heading.
      figure: of the paper, "figure 2a", or "" if it has none.
      shown: what the figures show, in a sentence or two, for the report.
      passes: names of the runs over images it reads, see `experiments.core.passes`; "clean" runs are shared by all.
      wants: costly fields of `experiments.core.trace.Trace` it reads.
      sites: names of sites it reads beside, whole, as `trace.sites[name]`, [L, B, ..]; they take memory.
      controlled: whether it is measured under replacement of registers and [CLS] too.
      alone: whether it is run only when it is asked for by name.
      options: choices the paper leaves open.
    """

    id: ClassVar[str]
    title: ClassVar[str]
    figure: ClassVar[str] = ""
    shown: ClassVar[str] = ""
    passes: ClassVar[tuple[str, ...]] = ("clean",)
    wants: ClassVar[frozenset[str]] = frozenset()
    sites: ClassVar[tuple[str, ...]] = ()
    controlled: ClassVar[bool] = False
    alone: ClassVar[bool] = False
    options: ClassVar[tuple[Option, ...]] = ()

    @property
    def help(self) -> str:
        """The docstring of its module."""
        return sys.modules[type(self).__module__].__doc__ or ""

    def refuses(self, about: About) -> str | None:
        """Why it says nothing about this model, or None."""
        return None

    def measure(self, trace: Any, model: ViT, options: Mapping[str, Any]) -> Measured:
        """What one batch gives, from the shared run of the model.

        Args:
          trace: `experiments.core.trace.Trace`.
          options: name -> value; Python values, static under jit.
        """
        return Measured()

    def compare(self, trace: Any, clean: Any, model: ViT, options: Mapping[str, Any]) -> Measured:
        """What a control changes: of a run under it, and the last block of the same run without it.

        Args:
          trace, clean: `experiments.core.trace.Trace`; `clean` of the last layer alone.
        """
        return Measured()

    def numbers(self, found: Mapping[str, Found], about: About, options: Mapping[str, Any]) -> dict[str, Any]:
        """The numbers of one model, for results.json: plain Python values only, NaN where undefined.

        Args:
          found: pass -> what it found. Under a control, "clean" is what was measured under it.
        """
        raise NotImplementedError

    def claims(self, results: Results, models: Mapping[str, About]) -> list[Claim]:
        """The paper's statements, tested on the models that were given."""
        return []

    def table(self, results: Results, models: Mapping[str, About]) -> Table | None:
        """The main numbers."""
        return None

    def explained(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """With which arguments of `examples.explain` the images that are shown are to be explained."""
        return {}

    def moments(self, config: ViTConfig, options: Mapping[str, Any]) -> int:
        """About how many bytes its sums over images take while it runs, if they are many; for --dry-run."""
        return 0

    def figures(self, view: View) -> dict[str, Figure]:
        """Name of a file -> figure, in the paper's arrangement; see `experiments.core.charts`."""
        return {}


def readable(text: str) -> str:
    """A text with the bytes of file names that are not UTF-8 written out, as in caf\\xe9.png."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def summary(values: np.ndarray) -> dict[str, Any]:
    """Of one number an image: n, mean, its standard error, std (of the population), min, max and quantiles.

    One image has no spread: its std and standard error are NaN.
    """
    values = np.asarray(values, np.float64).ravel()
    if not len(values):
        return {"n": 0}
    std = float(values.std()) if len(values) > 1 else math.nan
    return {
        "n": len(values),
        "mean": float(values.mean()),
        "sem": std / max(len(values) - 1, 1) ** 0.5,
        "std": std,
        "min": float(values.min()),
        "max": float(values.max()),
        "quantiles": {str(q): float(np.quantile(values, q)) for q in QUANTILES},
    }


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

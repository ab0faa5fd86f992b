"""What is trained: sizes, amounts of data, arms and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from jaxvit import Preprocess, ViTConfig

from ..models.scenes import CLASSES
from .arms import ARMS
from .train import Recipe


def sized(depth: int, width: int, heads: int, hidden: int, patch: int, pixels: int) -> ViTConfig:
    """A classifier of scenes, without registers and LayerScale."""
    return ViTConfig(
        depth=depth,
        width=width,
        heads=heads,
        hidden=hidden,
        patch=patch,
        grid=(pixels // patch, pixels // patch),
        classes=len(CLASSES),
        layer_scale=False,
        preprocess=Preprocess(pixels, pixels),
    )


class Cell(NamedTuple):
    """One size of model on one amount of data.

    Attributes:
      name: fit for a folder.
      base: sizes of the model without registers.
      train: number of scenes to learn from.
      recipe: how every arm is trained.
    """

    name: str
    base: ViTConfig
    train: int
    recipe: Recipe


@dataclass(frozen=True)
class Preset:
    """Every arm and seed in every cell.

    Attributes:
      test: number of scenes to test on.
    """

    cells: Sequence[Cell]
    arms: Sequence[str]
    seeds: int
    test: int = 1000

    def first(self, count: int | None) -> Preset:
        return self if count is None else replace(self, cells=self.cells[:count])


TINY, NARROW, WIDE = sized(4, 64, 2, 192, 8, 48), sized(4, 64, 2, 192, 8, 64), sized(6, 128, 4, 448, 8, 64)
DEMO = sized(6, 128, 4, 448, 14, 224)

PRESETS = {
    "tiny": Preset([Cell("tiny-4000", TINY, 4000, Recipe(1200, batch=64, rate=2e-3))], ["R0", "R4", "patches-only"], 3),
    "small": Preset(
        [
            Cell(f"{name}-{n}", base, n, Recipe(6000, batch=128, rate=rate))
            for name, base, rate in (("narrow", NARROW, 2e-3), ("wide", WIDE, 1e-3))
            for n in (12000, 3000)
        ],
        list(ARMS),
        5,
    ),
    "demo": Preset([Cell("demo", DEMO, 12000, Recipe(9000, batch=128))], ["R0", "R4"], 1),
}

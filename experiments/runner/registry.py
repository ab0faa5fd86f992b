"""All experiments, in the order of the report, and all passes, in the order they run.

A module of the rooms `paper` and `beyond` that has `EXPERIMENT` is one; `PASS` is a pass of its own, if it needs one.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

from .. import beyond, paper
from ..core.controls import Controls
from ..core.experiment import Experiment
from ..core.labelled import LabelledImages
from ..core.passes import Clean, Pass


def modules_of(room: ModuleType) -> list[ModuleType]:
    """Those that hold an experiment, by name."""
    found = (import_module(f"{room.__name__}.{each.name}") for each in iter_modules(room.__path__))
    return [module for module in found if hasattr(module, "EXPERIMENT")]


MODULES = [*modules_of(paper), *modules_of(beyond)]
EVERY: dict[str, Experiment] = {module.EXPERIMENT.id: module.EXPERIMENT for module in MODULES}
EXPERIMENTS: dict[str, Experiment] = {id: e for id, e in EVERY.items() if not e.alone}
"""Those that are run where none is asked for by name."""
PASSES: list[Pass] = [Clean(), Controls(), LabelledImages()]
PASSES += [module.PASS for module in MODULES if hasattr(module, "PASS")]

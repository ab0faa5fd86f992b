"""All experiments, in the order of the report, and all passes, in the order they run.

A module of the rooms `paper` and `beyond` that has `EXPERIMENT` is one; `PASS` is a pass of its own, if it needs one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
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


@contextlib.contextmanager
def plugged(paths: Iterable[Path]) -> Iterator[None]:
    """The experiments of files of one's own are known within the block, and forgotten behind it.

    So a second run in one process takes the files as they are then, and a run without plug-ins knows none.
    """
    registries: list[dict[str, Experiment]] = [EVERY, EXPERIMENTS]
    before, passes, modules, searched = (
        [dict(each) for each in registries],
        list(PASSES),
        set(sys.modules),
        list(sys.path),
    )
    paths = [Path(path).expanduser().absolute() for path in paths]
    try:
        for path in paths:
            plug(path)
        yield
    finally:
        for registry, known in zip(registries, before, strict=True):
            registry.clear()
            registry.update(known)
        PASSES[:], sys.path[:] = passes, searched
        folders = {str(path.parent) for path in paths}
        for name in set(sys.modules) - modules:
            if str(Path(getattr(sys.modules[name], "__file__", None) or "").parent) in folders:
                del sys.modules[name]


def plug(path: Path) -> Experiment:
    """Adds the experiment of a file of one's own, as one of the package's; what lies beside the file can be imported.

    Raises:
      ValueError: there is no such file, it has no `EXPERIMENT`, or its id is taken or not fit for a file name.
    """
    path = path.expanduser().absolute()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(f"--plugin {path}: expected a Python file")
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) != str(path):
        raise ValueError(f"--plugin {path}: a module {path.stem} is loaded already; give the file another name")
    if known is None:
        sys.path.insert(0, str(path.parent))
        known = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(known)
    e = getattr(known, "EXPERIMENT", None)
    if not isinstance(e, Experiment):
        raise ValueError(f"{path} has no EXPERIMENT = .., an instance of jaxvit.experiments.core.experiment.Experiment")
    if not re.fullmatch(r"[A-Za-z]\w*", e.id) or EVERY.get(e.id, e) is not e:
        raise ValueError(f"{path}: the id {e.id!r} is taken, or is not one word of letters and digits")
    EVERY[e.id] = EXPERIMENTS[e.id] = e
    if (own := getattr(known, "PASS", None)) is not None and own not in PASSES:
        PASSES.append(own)
    return e

"""One module for two names: in a checkout, `convert` is `jaxvit.convert` and `experiments` is `jaxvit.experiments`.

The folders convert/ and experiments/ lie beside jaxvit/. So a checkout's root on the path of modules offers `convert`
too, and `python -m convert` works there. Python would load each file once for each name, and `convert.ConversionError`
would not catch a `jaxvit.convert.ConversionError`. An installed jaxvit has the longer names alone, and uses nothing of
this file.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType


def alias(name: str) -> None:
    """Makes `name` another name of `jaxvit.name`, and its submodules other names of that module's.

    The package calls this first of all, when it is loaded by its short name. Python then takes what is in `sys.modules`
    for the package. Its own code runs to the end, finds the same submodules by its relative imports, and is dropped.
    """
    sys.modules[name] = importlib.import_module(f"jaxvit.{name}")
    sys.meta_path.insert(0, Submodules(name))


class Submodules(MetaPathFinder, InspectLoader):
    """Finds `name.x` as `jaxvit.name.x`."""

    def __init__(self, name: str):
        self.name = name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        ours = sys.modules.get(self.name) is sys.modules.get(f"jaxvit.{self.name}")  # not someone's own convert.py
        if not ours or not fullname.startswith(f"{self.name}."):
            return None
        found = importlib.util.find_spec(f"jaxvit.{fullname}")
        return found and ModuleSpec(fullname, self, origin=found.origin)

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = importlib.import_module(f"jaxvit.{module.__name__}")

    def get_code(self, fullname: str) -> CodeType | None:
        """For `python -m name`, which runs the code of `name.__main__` instead of importing it."""
        found = importlib.util.find_spec(f"jaxvit.{fullname}")
        return found.loader.get_code(found.name) if found and isinstance(found.loader, InspectLoader) else None

    def get_source(self, fullname: str) -> None:
        return None

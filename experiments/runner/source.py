"""Which code a number depends on: what is measured by other code, or other versions, is another measurement."""

from __future__ import annotations

import ast
import hashlib
import platform
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import jaxvit
from jaxvit import convert

EXPERIMENTS = __name__.removesuffix(".runner.source")
"""Name of the package of experiments."""
COMPUTE = ("jaxvit", "jax", "jaxlib", "flax", "numpy", "scipy", "pillow", "optax", "ml_dtypes", "safetensors", "onnx")
"""Packages whose versions may change a number."""


@cache
def versions() -> dict[str, str]:
    """Of Python and of all packages that compute."""
    return {"python": platform.python_version(), **convert.versions(*COMPUTE)}


@cache
def library() -> str:
    """sha256 of the source of jaxvit and of jaxvit.convert, without the experiments."""
    ours, theirs = Path(jaxvit.__file__).parent, Path(convert.__file__).parent
    apart = Path(sys.modules[EXPERIMENTS].__file__ or "").parent
    files = {path for folder in (ours, theirs) for end in ("*.py", "*.json") for path in folder.rglob(end)}
    return checksum(path for path in files if not path.is_relative_to(apart))


@cache
def of_modules(*names: str) -> str:
    """sha256 of the source of modules, and of all that they import from the experiments, or from beside themselves."""
    found: set[Path] = set()
    for name in names:
        module = sys.modules[name]
        assert module.__file__, f"{name} has no file"
        if name.startswith(f"{EXPERIMENTS}."):
            folder, whole = Path(sys.modules[EXPERIMENTS].__file__ or "").parent, EXPERIMENTS
        else:
            folder, whole = Path(module.__file__).parents[name.count(".")], ""
        follow(Path(module.__file__), folder, whole, found)
    return checksum(found)


def follow(path: Path, folder: Path, whole: str, found: set[Path]) -> None:
    """Adds a file, and all files of a folder that it imports, directly or not.

    Args:
      whole: name of the package that the folder is; "" for a folder of modules.
    """
    if path in found:
        return
    found.add(path)
    inside = path.relative_to(folder).with_suffix("").parts
    package = [*([whole] if whole else []), *inside[:-1]]
    for name in imported(path, ".".join(package)):
        if not whole or name.startswith(f"{whole}."):
            parts = name.removeprefix(f"{whole}.").split(".") if whole else name.split(".")
            for end in range(1, len(parts) + 1):
                place = folder.joinpath(*parts[:end])
                for each in (place.with_suffix(".py"), place / "__init__.py"):
                    if each.is_file():
                        follow(each, folder, whole, found)


def imported(path: Path, package: str) -> Iterator[str]:
    """The whole names of all that a file of a package imports, also inside of functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            place = parts[: len(parts) + 1 - node.level] if node.level else []
            module = ".".join([*place, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def checksum(files: Iterable[Path]) -> str:
    """Of contents, in an order that no folder's place changes."""
    contents = sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in files)
    return hashlib.sha256(" ".join(contents).encode()).hexdigest()

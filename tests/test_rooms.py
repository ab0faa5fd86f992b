"""The rooms of jaxvit and of its experiments: each imports only what stands before it, and none needs PyTorch."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import jaxvit
from jaxvit import experiments
from jaxvit.experiments.runner.source import imported

LIBRARY = {
    "model": (),
    "io": ("model",),
    "analysis": ("model", "io"),
    "interventions": ("model", "io", "analysis"),
    "tasks": ("model", "io", "analysis", "interventions"),
    "training": ("model", "io", "analysis", "interventions"),
}
PAPER = {
    "core": (),
    "models": ("core",),
    "paper": ("core",),
    "beyond": ("core", "models", "paper"),
    "evaluate": ("core", "models"),
    "report": ("core", "models"),
    "runner": ("core", "models", "paper", "beyond", "report"),
    "matched": ("core", "models", "runner"),
}
ROOMS = [("jaxvit", room, before) for room, before in LIBRARY.items()]
ROOMS += [("jaxvit.experiments", room, before) for room, before in PAPER.items()]
FOLDERS = {"jaxvit": Path(jaxvit.__file__).parent, "jaxvit.experiments": Path(experiments.__file__).parent}
FILES = [
    (whole, room, before, p) for whole, room, before in ROOMS for p in sorted((FOLDERS[whole] / room).glob("*.py"))
]


def rooms_of(names: Iterator[str], whole: str) -> set[str]:
    """In which rooms of a package these names are."""
    return {name.removeprefix(f"{whole}.").split(".")[0] for name in names if name.startswith(f"{whole}.")}


@pytest.mark.parametrize(
    ("whole", "room", "before", "path"), FILES, ids=[f"{whole}.{room}.{path.stem}" for whole, room, _, path in FILES]
)
def test_imports_run_one_way(whole, room, before, path):
    names = list(imported(path, f"{whole}.{room}"))
    assert rooms_of(names, whole) <= {room, *before}
    assert not {name.split(".")[0] for name in names} & {"torch", "convert", "experiments", "benchmarks"}


def test_every_file_of_the_experiments_has_a_room():
    outside = {path.name for path in FOLDERS["jaxvit.experiments"].glob("*.py")}
    assert outside == {"__init__.py", "__main__.py"}
    folders = {path.parent.name for path in FOLDERS["jaxvit.experiments"].glob("*/*.py")}
    assert folders == set(PAPER)


@pytest.mark.parametrize(("whole", "room"), [(whole, room) for whole, room, _ in ROOMS])
def test_every_room_says_what_lives_there(whole, room):
    text = ast.get_docstring(ast.parse((FOLDERS[whole] / room / "__init__.py").read_text(encoding="utf-8")))
    assert text is not None and "mport" in text, room


def test_the_order_of_rooms_is_found_wrong_where_it_is(tmp_path):
    """The test above would see a wrong import, also a relative one."""
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "def f():\n    from jaxvit.interventions.sweeps import sweep\n    from ..runner import store\n"
        "    from ..paper.a3_update_cka import read\n    from .trace import parts\n    return sweep, store, read\n"
    )
    names = list(imported(wrong, "jaxvit.experiments.core"))
    assert rooms_of(names, "jaxvit.experiments") == {"runner", "paper", "core"}
    assert "jaxvit.interventions.sweeps.sweep" in names and "jaxvit.experiments.core.trace.parts" in names

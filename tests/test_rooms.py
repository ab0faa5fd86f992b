"""The rooms of jaxvit: each imports only what stands before it, and none needs PyTorch."""

import ast
from pathlib import Path

import pytest

import jaxvit

ROOT = Path(jaxvit.__file__).parent
MAY_IMPORT = {
    "model": (),
    "io": ("model",),
    "analysis": ("model", "io"),
    "interventions": ("model", "io", "analysis"),
}
FILES = [(room, path) for room in MAY_IMPORT for path in sorted((ROOT / room).glob("*.py"))]


def imported(path):
    """The names of all modules that a file imports, also inside of functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or path.name == "__init__.py", f"{path}: an import from a relative place"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(("room", "path"), FILES, ids=[f"{room}/{path.name}" for room, path in FILES])
def test_imports_run_one_way(room, path):
    ours = [name.split(".")[1] for name in imported(path) if name.startswith("jaxvit.")]
    assert set(ours) <= {room, *MAY_IMPORT[room]}
    assert not {name.split(".")[0] for name in imported(path)} & {"torch", "convert", "experiments", "benchmarks"}


def test_every_room_says_what_lives_there():
    for room in MAY_IMPORT:
        text = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text(encoding="utf-8")))
        assert text is not None and "mport" in text, room


def test_the_order_of_rooms_is_found_wrong_where_it_is(tmp_path):
    """The test above would see a wrong import."""
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def f():\n    from jaxvit.interventions.sweeps import sweep\n    return sweep\n")
    assert list(imported(wrong)) == ["jaxvit.interventions.sweeps.sweep"]

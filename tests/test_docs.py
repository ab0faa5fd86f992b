"""The study in docs/ is what its page shows, gives what single runs give, and runs on the real model."""

import builtins
import dis
import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, random_images, random_model
from matplotlib.figure import Figure

import jaxvit
from jaxvit import ActivationStats, Registers, ViTConfig, ablate, replace_by_mean
from jaxvit.model.params import from_params, to_params

pytest.importorskip("onnx")
DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("which_registers", DOCS / "which_registers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_the_script():
    script = (DOCS / "which_registers.py").read_text().split("# study\n")[1]
    (shown,) = re.findall(r"```python\n(.*?)```", (DOCS / "which-registers.md").read_text(), re.DOTALL)
    imports, function = shown.split("\n\n\n", 1)
    assert function.strip() == script.strip()
    names = {}
    exec(imports, names)  # which is all that the function needs
    exec(function, names)
    code = names["which_registers"].__code__
    inner = [each for each in code.co_consts if hasattr(each, "co_code")]
    used = {i.argval for each in (code, *inner) for i in dis.get_instructions(each) if i.opname == "LOAD_GLOBAL"}
    assert used <= names.keys() | vars(builtins).keys()
    assert len([line for line in script.splitlines() if line.strip()]) < 20
    assert "(which-registers.png)" in (DOCS / "which-registers.md").read_text()


def test_points_are_what_single_runs_give(study):
    model = random_model(ViTConfig(**TINY, registers=3))
    images = random_images(0, 3, 20)
    effect = study.which_registers(model, images)
    assert list(effect.axes) == ["control", "register", "layer", "image"] and effect.values.shape == (4, 3, 3, 3)
    stats = ActivationStats.collect(model, [images], "resid_pre", progress=False)
    clean = model(images, record="resid_pre")
    for layer in range(3):
        where = dict(layers=layer, tokens=Registers(1))
        for control, edits in {
            "zero": ablate(model, "resid_pre", **where),
            "mean": replace_by_mean(model, "resid_pre", stats, **where),
        }.items():
            expected = jaxvit.cls_cosine(model(images, edits), clean)
            found = effect.select(control=control, register=1, layer=layer).values
            np.testing.assert_allclose(found, expected, atol=1e-5)

    assert effect.axes["register"] == (0, 1, 2)
    # Registers enter the first block alike in all images: there, only zero is another value.
    first = effect.select(layer=0)
    for control in ("mean", "noise", "shuffle"):
        np.testing.assert_allclose(first.select(control=control).values, 1, atol=1e-5)
    assert (first.select(control="zero").values < 1 - 1e-4).all()
    assert effect.select(layer=2, control="noise").values.min() < 1 - 1e-6


def test_the_real_model_runs(study, tmp_path, monkeypatch, capsys):
    """Its first two blocks, with four appended registers; and the picture is drawn."""
    monkeypatch.chdir(DOCS.parent)
    figures, save = {}, Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, path, **more: (figures.update({path: self}), save(self, path, **more))[1]
    )
    whole = study.real_model()
    assert whole.config.registers == 4
    noise = np.asarray(whole.registers[...]) / np.asarray(whole.positions[...]).std()
    np.testing.assert_allclose([noise.mean(), noise.std()], [0, 1], atol=4 * noise.size**-0.5)
    two = {name: a[:2] if name.startswith("blocks.") else a for name, a in to_params(whole).items()}
    monkeypatch.setattr(study, "real_model", lambda: from_params(replace(whole.config, depth=2), two))
    effect = study.main(False, tmp_path / "out" / "map.png", 2)
    printed = capsys.readouterr().out
    cosines = dict(re.findall(r"(\w+) +mean cosine (-?\d\.\d+)", printed))
    assert list(cosines) == list(effect.axes["control"]) == ["zero", "mean", "noise", "shuffle"]
    assert [*map(float, cosines.values())] == pytest.approx(effect.values.mean((1, 2)).tolist(), abs=1e-4)
    # Four maps, of registers x layers, in the order of the controls.
    maps = [
        np.asarray(axes.images[0].get_array()) for axes in figures[tmp_path / "out" / "map.png"].axes if axes.images
    ]
    assert len(maps) == 4
    for control, shown in zip(effect.axes["control"], maps, strict=True):
        np.testing.assert_allclose(shown, effect.select(control=control).values, rtol=1e-6)

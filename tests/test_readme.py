"""What README.md shows works, word for word."""

import re
from pathlib import Path
from typing import Any

import pytest

import convert
import jaxvit
from experiments import embedded

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_examples(monkeypatch, capsys, tmp_path):
    pytest.importorskip("onnx")
    data = ROOT / embedded.DATA
    embedded.model_file(data), embedded.photographs(data)
    (tmp_path / embedded.DATA).symlink_to(data)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(code, "README.md", "exec"), names)
    masses = eval(capsys.readouterr().out)
    assert list(masses) == ["cls", "patches"] and sum(masses.values()) == pytest.approx(1, abs=1e-5)
    assert names["saliency"].shape == (1, 224, 224, 3) and float(abs(names["saliency"]).max()) > 0
    effect = names["effect"]
    assert list(effect.axes) == ["layer", "head", "image"] and effect.values.shape == (12, 6, 1)
    assert -1 <= effect.values.min() < 0.999 and effect.values.max() <= 1 + 1e-5
    assert (tmp_path / "heads.png").stat().st_size > 5_000


def test_every_public_name_is_listed():
    """On the page of names; and every name there exists."""
    (page,) = re.findall(r"## All names.*?\n(.*?)\n## ", README, re.DOTALL)
    listed = [word for name in re.findall(r"`(.*?)`", page) for word in [name.split("(")[0]]]
    plain = {name for name in listed if "." not in name}
    modules = {"decompose", "grids", "similarity"}
    assert plain | modules >= set(jaxvit.__all__), set(jaxvit.__all__) - plain - modules
    assert plain - {"model"} <= set(jaxvit.__all__), plain - set(jaxvit.__all__)
    last = jaxvit.NamedArray
    for name in listed:
        start, _, rest = name.partition(".")
        if rest and start in ("convert", "model"):
            assert hasattr({"convert": convert, "model": jaxvit.ViT}[start], rest), name
        elif rest:
            last = getattr(jaxvit, start) if start else last
            assert hasattr(last, rest), name
        elif name == "NamedArray":
            last = jaxvit.NamedArray


def test_every_site_is_described():
    described = re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (`.*?) \| B ", README, re.MULTILINE)))
    assert described == list(jaxvit.SITES)


@pytest.mark.parametrize("target", ["demo", "test"])
def test_commands_exist(target):
    assert f"    make {target} " in README and re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)

"""What README.md shows works, word for word."""

import re
from pathlib import Path

import pytest

import jaxvit
from experiments import embedded

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_example(monkeypatch, capsys):
    pytest.importorskip("onnx")
    monkeypatch.chdir(ROOT)
    embedded.model_file(), embedded.photographs()
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    masses = eval(capsys.readouterr().out)
    assert list(masses) == ["cls", "patches"] and sum(masses.values()) == pytest.approx(1, abs=1e-5)
    assert names["saliency"].shape == (1, 224, 224, 3) and float(abs(names["saliency"]).max()) > 0


def test_every_site_is_described():
    described = re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (`.*?) \| B ", README, re.MULTILINE)))
    assert described == list(jaxvit.SITES)


@pytest.mark.parametrize("target", ["demo", "test"])
def test_commands_exist(target):
    assert f"    make {target} " in README and re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)

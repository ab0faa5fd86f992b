"""jaxvit beside other people's code: one name in site-packages, one command, and one module for each file."""

import os
import re
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from layouts import expected, hub_state, numbers, tiny, write_safetensors
from PIL import Image

import jaxvit
from jaxvit import cli
from jaxvit.model.params import to_params

ROOT = Path(__file__).parents[1]


def python(code: str, *arguments: object) -> None:
    """Runs code in a Python of its own, in the checkout."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# As a wheel -----------------------------------------------------------------------------------------------------------


def test_the_wheel(tmp_path):
    """One test, as the wheel is built once: it holds jaxvit alone, and works beside a user's convert."""
    pytest.importorskip("hatchling")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]

    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}

    def run(*command: object, cwd: Path = tmp_path, fails: bool = False, environment: dict[str, str] = alone) -> str:
        done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
        assert (done.returncode != 0) is fails, done.stdout + done.stderr
        return done.stderr if fails else done.stdout

    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", tmp_path, ROOT]
    run(*pip, *build, environment=dict(os.environ))
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in held} == {"jaxvit", f"{wheel.name.split('-py3')[0]}.dist-info"}
    sources = [
        path.relative_to(ROOT) for top in ("jaxvit", "convert", "experiments") for path in (ROOT / top).rglob("*")
    ]
    files = {path.as_posix() for path in sources if (ROOT / path).is_file() and "__pycache__" not in path.parts}
    assert {name for name in held if name.startswith("jaxvit/")} == {
        re.sub("^(convert|experiments)/", r"jaxvit/\1/", name) for name in files
    }
    assert {"jaxvit/py.typed", "jaxvit/convert/architectures.json", "jaxvit/experiments/report/report.html"} <= held

    # An environment with all packages of this one but an editable jaxvit.
    venv.create(tmp_path / "venv", symlinks=True)
    own, bin = (
        Path(sysconfig.get_path(name, "venv", {"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")}))
        for name in ("purelib", "scripts")
    )
    packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (own / "others.pth").write_text("\n".join(sorted(packages)))
    install = ["install", "--no-deps", "--no-index", "--ignore-installed", wheel]
    run(*pip, "--python", bin / "python", *install)
    assert {path.name for path in own.iterdir()} - {"others.pth"} == {name.split("/")[0] for name in held}

    work = tmp_path / "work"
    (work / "experiments").mkdir(parents=True)
    for file in ("convert.py", "experiments/__init__.py", "benchmarks.py"):
        (work / file).write_text("MINE = True\n")
    config = tiny(registers=1, depth=1)
    there = numbers(config)
    write_safetensors(work / "some.safetensors", hub_state(config, there))

    command = bin / "jaxvit"
    assert "jaxvit convert SOURCE DEST" in run(command, "--help", cwd=work)
    assert "wrote model" in run(command, "convert", "some.safetensors", "model", cwd=work)
    found = to_params(jaxvit.load(work / "model"))
    assert all((found[name] == array).all() for name, array in expected(config, there).items())
    assert "some.safetensors" in run(bin / "python", "-m", "jaxvit", "show", "model", cwd=work)
    assert run(command, "convert", "gone.pth", "other", cwd=work, fails=True).count("\n") == 1
    assert "facebook/dinov2-small" in run(command, "list", cwd=work)
    assert "--only" in run(command, "run", "--help", cwd=work)
    (work / "images").mkdir()
    for i in range(3):
        Image.fromarray(np.full((56, 56, 3), 60 * i, np.uint8)).save(work / "images" / f"{i}.png")
    own_experiment = re.findall(r"```python\n(.*?)```", (ROOT / "docs/experiments.md").read_text(), flags=re.DOTALL)[0]
    (work / "my_experiments.py").write_text(own_experiment)
    words = ["run", "--plugin", "my_experiments.py", "--only", "Z1", "--models", "model", "--images", "images"]
    assert "Z1  Lengths" in run(command, *words, "--size", "56", "--examples", "1", "--out", "out", cwd=work)
    assert "Lengths of the patches" in (work / "out" / "report.html").read_text()
    code = """
        import sys
        import jaxvit.convert
        import jaxvit.experiments.runner.registry
        import convert, experiments
        assert convert.MINE and experiments.MINE and "convert.engine" not in sys.modules
        assert "torch" not in sys.modules
        print(jaxvit.__file__)
    """
    assert Path(run(bin / "python", "-c", textwrap.dedent(code), cwd=work).strip()).is_relative_to(own)


# In a checkout --------------------------------------------------------------------------------------------------------

ORDERS = {
    "the short name first": "from convert.engine import ConversionError; from experiments.core import trace",
    "the long name first": "import jaxvit.convert.engine; import jaxvit.experiments.core.trace; import convert.engine",
}


@pytest.mark.parametrize("order", ORDERS)
def test_both_names_are_one_module(order):
    python(
        f"""
        {ORDERS[order]}
        import pickle, sys
        import convert, convert.__main__, convert.timm, experiments, experiments.core.trace
        import jaxvit.convert.meta, jaxvit.experiments.core.claims
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] in ("convert", "experiments"):
                assert module is sys.modules[f"jaxvit.{{name}}"], name
                assert module.__name__ == module.__spec__.name == f"jaxvit.{{name}}"
        import convert.meta, experiments.core.claims  # after the long names
        assert convert.meta is jaxvit.convert.meta and experiments.core.claims is jaxvit.experiments.core.claims
        assert convert.ConversionError is jaxvit.convert.engine.ConversionError
        assert type(pickle.loads(pickle.dumps(convert.ConversionError("so")))) is convert.ConversionError
        try:
            import convert.nothing
        except ModuleNotFoundError as error:
            assert error.name == "convert.nothing"
        else:
            raise AssertionError
        """
    )


def test_a_users_own_convert_is_left_alone(tmp_path):
    """Of an editable install too, where the checkout comes after the user's folder."""
    (tmp_path / "convert.py").write_text("MINE = True\n")
    python(
        """
        import sys
        sys.path.insert(0, sys.argv[1])
        import jaxvit.convert, jaxvit.experiments.core.trace
        import convert
        assert convert.MINE and jaxvit.convert.load and "convert.engine" not in sys.modules
        """,
        tmp_path,
    )


def test_imports_are_light():
    """Help needs no JAX; no use of the library's names needs torch, or starts a backend."""
    python(
        """
        import sys
        from jaxvit.cli import main
        assert main(["--help"]) == 0 and main(["no such"]) == 2
        assert "jax" not in sys.modules and "numpy" not in sys.modules
        import jaxvit
        assert set(jaxvit.__all__) <= set(dir(jaxvit)) and jaxvit.ViT
        from jaxvit import *
        import jaxvit.convert, jaxvit.experiments.core.trace
        assert load is jaxvit.load and "torch" not in sys.modules
        from jax._src import xla_bridge
        assert not xla_bridge._backends
        """
    )


def test_names_that_are_not_there():
    with pytest.raises(AttributeError, match="module 'jaxvit' has no attribute 'lod'"):
        jaxvit.lod  # noqa: B018
    with pytest.raises(ImportError, match="lod"):
        from jaxvit import lod  # noqa: F401


# The command ----------------------------------------------------------------------------------------------------------


def test_help_teaches(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  jaxvit {command} " in out for command in (*cli.COMMANDS, *cli.CONVERTER, *cli.EXPERIMENTS))
    assert "facebook/dinov2-with-registers-small" in out and len(out.splitlines()) < 25


def test_a_reader_that_has_seen_enough_is_no_error():
    """`jaxvit list | head -1`: the pipe is closed while the command writes."""
    reads, writes = os.pipe()
    os.close(reads)
    code = "import sys; from jaxvit import cli; sys.exit(cli.main(['list']))"
    done = subprocess.run([sys.executable, "-c", code], stdout=writes, stderr=subprocess.PIPE, cwd=ROOT, text=True)
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("words", [[], ["convrt", "a", "b"], ["--verify"], ["A10"]], ids=" ".join)
def test_unknown_commands(words, capsys):
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert all(word in err for word in (*words[:1], "convert", "sensitivity", "jaxvit --help"))


@pytest.mark.parametrize("command", [*cli.COMMANDS, *cli.CONVERTER, *cli.EXPERIMENTS, "A3", "B7"])
def test_commands_have_help_of_their_own(command, capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main([command, "--help"])
    out = capsys.readouterr().out
    assert raised.value.code == 0 and out.startswith(f"usage: jaxvit {command} ")


def test_a_source_may_have_the_name_of_a_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["convert", "list", "model"]) == 1
    assert "list is neither a file" in capsys.readouterr().err


def test_failures_are_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "full").write_text("")
    assert cli.main(["show", str(tmp_path / "full")]) == 1
    assert cli.main(["run", "--models", "a", "--images", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: __import__("a_missing_package"))
    assert cli.main(["run"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("error: ") == err.count("\n") == 3
    assert "jaxvit run needs a_missing_package: pip install 'jaxvit[experiments]'" in err

    def stop(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", stop)
    assert cli.main(["run"]) == 130 and capsys.readouterr().err == "\nstopped\n"

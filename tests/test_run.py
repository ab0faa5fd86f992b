"""The command that runs the paper: what it writes, that it survives what may happen to it, and what it says then."""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jaxtyping  # noqa: F401 (its hook is on before the modules under test are imported)
import numpy as np
import pytest
from conftest import TINY, random_model
from PIL import Image

import jaxvit
from experiments.__main__ import main
from experiments.runner import dry_run
from experiments.runner.folder import alone
from experiments.runner.registry import EXPERIMENTS
from jaxvit import Preprocess, ViTConfig

ROOT = Path(__file__).parents[1]
CLASSES, EACH = 4, 5
FEW = ("--only", "A1", "A9")


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Path:
    """Two small models, with and without registers, and images in class folders, one of which is damaged."""
    folder = tmp_path_factory.mktemp("toys")
    for name, registers in (("plain", 0), ("registers", 2)):
        config = ViTConfig(**TINY, registers=registers, preprocess=Preprocess(resize=20, crop=20))
        jaxvit.save(random_model(config), folder / name)
    rng = np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / "images" / f"class {label}").mkdir(parents=True)
        scene = rng.integers(0, 256, (24, 30, 3))
        for i in range(EACH):
            pixels = np.clip(scene + rng.normal(0, 40, scene.shape), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"class {label}" / f"{i}.png")
    (folder / "images" / "class 0" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """What is compiled in one run is not compiled again in the next."""
    cache = tmp_path_factory.mktemp("compiled")
    more = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return {**os.environ, **more}


@pytest.fixture(scope="module")
def arguments(toys) -> list[str]:
    models = [f"{name}={toys / name}" for name in ("plain", "registers")]
    return ["--models", *models, "--images", str(toys / "images"), "--batch-size", "4", "--size", "native"]


def start(environment, *words, before: Sequence[str] = (), root: Path = ROOT) -> subprocess.Popen:
    command = [*before, sys.executable, "-m", "experiments", *map(str, words)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=root, env=environment, text=True, stdout=pipe, stderr=pipe)


def succeeds(environment, *words, root: Path = ROOT) -> str:
    """In a process of its own, for what needs other code, other devices or another end."""
    process = start(environment, *words, root=root)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


def runs(*words) -> str:
    """In this process, where it takes a fraction of the time."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["run", *map(str, words)]) == 0
    return out.getvalue()


def last_line(process: subprocess.Popen) -> str:
    """Of what it said on stderr; and that there was no traceback."""
    _, err = process.communicate()
    assert process.returncode != 0 and "Traceback" not in err, err
    return re.split(r"[\r\n]", err.strip())[-1]


def numbers(out: Path) -> dict:
    def refuse(constant):
        raise AssertionError(f"results.json holds {constant}")

    return json.loads((out / "results.json").read_text(), parse_constant=refuse)


def fingerprint(out: Path) -> dict[str, str]:
    files = [out / "results.json", out / "report.html", *sorted((out / "per_image").iterdir())]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def few(tmp_path_factory, arguments) -> Path:
    """A run of some experiments that nothing happened to."""
    out = tmp_path_factory.mktemp("few") / "out"
    runs(*arguments, *FEW, "--out", out)
    return out


# --- everything


def test_a_run_of_everything(tmp_path, toys, arguments):
    """With a test-time register appended to the plain model. One test, as the run takes a minute."""
    out = tmp_path / "out"
    more = ("--labelled", toys / "images", "--test-time-registers", "1", "--examples", "2", "--control-images", "6")
    told = runs(*arguments, *more, "--out", out)
    check_results(out, told)
    check_skipped(out, told)
    check_per_image(out, toys)
    check_controls(out)


def check_results(out, told):
    results = numbers(out)
    assert results["schema"] == 1
    assert list(results["experiments"]) == list(EXPERIMENTS)
    assert list(results["models"]) == ["plain", "plain-1-test-time-registers", "registers"]
    for id, entry in results["experiments"].items():
        ran, not_run = set(entry["results"]), {k for k, m in results["models"].items() if id in m["not run"]}
        assert ran | not_run == set(results["models"]) and not ran & not_run, id
        assert ran, f"{id} was run on no model"
        assert f"\n{id}  " in told
    assert {claim["ordering"] for claim in results["claims"]} >= {1, 2, 3, 4, 5}
    assert {"text", "holds", "by", "on", "experiment", "ordering"} == set(results["claims"][0])
    for figure in ("2a", "2b", "3a", "3b", "4", "5a", "5b", "8"):  # 6 is of DINOv2 alone
        assert {f"{figure}.png", f"{figure}.svg"} <= {p.name for p in (out / "figures").iterdir()}
    figures = sorted(p.stem for p in (out / "figures").glob("*.png"))
    assert figures == sorted(p.stem for p in (out / "figures").glob("*.svg"))
    report = (out / "report.html").read_text()
    assert report.count("<svg") >= len(figures)
    assert (out / "explorer.html").is_file() and len(list((out / "explorer").iterdir())) == 6


def check_skipped(out, told):
    """A damaged image is named, left out and counted."""
    results = numbers(out)
    assert results["images"]["n"] == CLASSES * EACH + 1
    for model in results["models"].values():
        assert model["images"]["n"] == CLASSES * EACH
        assert [entry["image"] for entry in model["images"]["skipped"]] == ["class 0/broken.png"]
    assert "1 images could not be used" in told or "1 image could not be used" in told
    assert "class 0/broken.png" in (out / "report.html").read_text()


def check_per_image(out, toys):
    """Numbers of single images are written with their names, and are those of the model, run by hand."""
    model = jaxvit.load(toys / "registers")
    with np.load(out / "per_image" / "registers.npz") as arrays:
        names, mass = arrays["clean/image"], arrays["clean/A1/mass registers"]
        assert all(len(arrays[name]) == len(names) for name in arrays.files if name.startswith("clean/"))
        assert not any(name.startswith("labelled/A4") for name in arrays.files), "features are for A4 alone"
    assert len(names) == CLASSES * EACH and set(names) == {f"class {c}/{i}.png" for c in range(4) for i in range(5)}
    for name, found in zip(names[:3], mass, strict=False):
        image = jaxvit.prepare(toys / "images" / name, model.config)
        row = model(image, record="pattern").trace["pattern"][-1, 0, :, 0].mean(0)
        assert found == pytest.approx(float(row[1:3].sum()), abs=1e-6)


def check_controls(out):
    """They are beside what they control, on as many images as were asked for."""
    results = numbers(out)["experiments"]
    for id in ("A1", "A3", "A7", "A9"):
        controls = results[id]["results"]["registers"]["controls"]
        assert "registers mean every" in controls and "cls shuffle last" in controls
        assert controls["registers zero last"].keys() == results[id]["results"]["registers"].keys() - {"controls"}
    cka = results["A9"]["results"]["registers"]["controls"]["registers mean last"]["registers"]
    assert cka["n"] == 6


# --- what may happen


def wait_for(process: subprocess.Popen, out: Path, key: str, name: str, batches: int = 1) -> None:
    """Until a pass has saved its state so many times."""
    seen, n = None, 0
    while process.poll() is None and n < batches:
        time.sleep(0.002)
        for path in out.glob(f"progress/{key}/{name}-*/state.npz"):
            if (stamp := path.stat().st_mtime_ns) != seen:
                seen, n = stamp, n + 1


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, arguments, environment, few):
    out = tmp_path / "out"
    places = [("plain", "clean", 2), ("plain", "controls", 1), ("registers", "clean", 1), ("registers", "controls", 3)]
    kills = 0
    for i, (key, name, batches) in enumerate(places):
        words = ["run", *arguments, *FEW, "--out", out, "--save-every", "0", *(["--resume"] if i else [])]
        process = start(environment, *words)
        wait_for(process, out, key, name, batches)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills == len(places), "a run ended before it was killed"
    assert not (out / "results.json").exists()
    runs(*arguments, *FEW, "--out", out, "--resume")
    assert same(out, few)


def same(out: Path, expected: Path) -> bool:
    """The same bits; the command line, which names --out, apart."""
    ours, theirs = (re.sub(r'"command": .*', "", (folder / "results.json").read_text()) for folder in (out, expected))
    a, b = fingerprint(out), fingerprint(expected)
    return ours == theirs and {k: a[k] for k in a if k.endswith("npz")} == {k: b[k] for k in b if k.endswith("npz")}


def test_what_is_finished_is_not_measured_again(tmp_path, arguments, few, toys):
    """Nor lost: not with fewer experiments, other readings of what was measured, or one more model."""
    out = tmp_path / "out"
    shutil.copytree(few, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("state.npz")}

    def unchanged():
        return before == {path: path.stat().st_mtime_ns for path in before}

    runs(*arguments, *FEW, "--out", out, "--resume", "--limit", "100")
    assert same(out, few) and len(before) == 4 and unchanged()
    runs(*arguments, "--only", "A9", "--out", out, "--resume")
    assert unchanged() and set(out.rglob("state.npz")) == set(before)
    assert list(numbers(out)["experiments"]) == ["A9"]
    more = [*arguments[:3], f"again={toys / 'plain'}", *arguments[3:]]
    runs(*more, *FEW, "--out", out, "--resume")
    assert unchanged() and list(numbers(out)["models"]) == ["plain", "registers", "again"]
    runs(*arguments, *FEW, "--out", out, "--resume")
    assert same(out, few)


def test_one_more_experiment_measures_what_is_missing(tmp_path, arguments, few):
    """And nothing else; other readings of one that is there are measured beside it."""
    out = tmp_path / "out"
    shutil.copytree(few, out)
    known = set(out.rglob("settings.json"))
    runs(*arguments, "--only", "A1", "A3", "A9", "--out", out, "--resume")
    new = [json.loads(path.read_text()) for path in set(out.rglob("settings.json")) - known]
    assert len(new) == 4 and all(list(settings["experiments"]) == ["A3"] for settings in new)
    results, before = numbers(out)["experiments"], numbers(few)["experiments"]
    assert {id: results[id] for id in ("A1", "A9")} == before and results["A3"]["results"]["registers"]["controls"]
    with np.load(out / "per_image" / "registers.npz") as ours, np.load(few / "per_image" / "registers.npz") as theirs:
        assert set(ours.files) == set(theirs.files)  # A3 has no number of single images
    known = set(out.rglob("settings.json"))
    runs(*arguments, *FEW, "--a9-reading", "final", "--out", out, "--resume")
    new = [json.loads(path.read_text()) for path in set(out.rglob("settings.json")) - known]
    assert len(new) == 4 and all(list(settings["experiments"]) == ["A9"] for settings in new)
    assert numbers(out)["experiments"]["A1"] == before["A1"] and numbers(out)["experiments"]["A9"] != before["A9"]
    runs(*arguments, *FEW, "--out", out, "--resume")
    assert same(out, few)


def test_other_code_measures_again(tmp_path, arguments, environment, few):
    """Of the experiment, of what it imports, or of the library; and what is measured says by which versions."""
    out, root = tmp_path / "out", tmp_path / "checkout"
    for name in ("jaxvit", "convert", "experiments"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(few, out)

    def again() -> dict[str, float]:
        succeeds(environment, "run", *arguments, *FEW, "--out", out, "--resume", root=root)
        experiments = numbers(out)["experiments"]
        return {id: experiments[id]["results"]["registers"]["patches"] for id in ("A1", "A9")}

    before = again()
    assert same(out, few)
    path = root / "experiments/paper/a1_attention_mass.py"
    path.write_text(path.read_text().replace("trace.mass[-1].mean(axis=1)", "0.5 * trace.mass[-1].mean(axis=1)"))
    after = again()
    assert after["A1"]["mean"] == pytest.approx(before["A1"]["mean"] / 2) and after["A9"] == before["A9"]
    path = root / "jaxvit/analysis/decompose.py"
    path.write_text(path.read_text() + "\n# other code\n")
    known = set(out.rglob("settings.json"))
    again()
    new = set(out.rglob("settings.json")) - known
    assert len(new) == 4, "both passes of both models"
    assert {json.loads(path.read_text())["model"]["versions"]["jax"] for path in new} == {
        numbers(out)["versions"]["jax"]
    }


def test_a_model_that_cannot_be_run_does_not_cost_the_others(tmp_path, arguments, environment, few):
    out = tmp_path / "out"
    shutil.copytree(few, out)
    missing = [*arguments[:1], "gone=no/such/place/at/all", *arguments[1:]]
    process = start(environment, "run", *missing, *FEW, "--out", out, "--resume")
    told, err = process.communicate()
    assert process.returncode == 1 and "Traceback" not in err
    assert "gone could not be run" in told and "gone cannot be run" in err
    results = numbers(out)
    assert list(results["models"]) == ["plain", "registers"] and "no/such/place" in results["failed"]["gone"]["reason"]
    assert results["experiments"] == numbers(few)["experiments"]


@pytest.mark.parametrize("where", ["measure", "numbers", "claims", "figures", "table"])
def test_what_fails_in_one_experiment_does_not_cost_the_others(tmp_path, arguments, few, monkeypatch, capsys, where):
    """Its name, the model and the reason are in the report and on the terminal, and the exit status says so."""

    def fails(self, *more, **named):
        raise FloatingPointError("a number is none")

    if where in ("claims", "figures", "table"):  # of what is measured already
        shutil.copytree(few, tmp_path / "out")
    monkeypatch.setattr(type(EXPERIMENTS["A1"]), where, fails)
    words = ["--models", f"registers={arguments[2].partition('=')[2]}", *arguments[3:], *FEW, "--control-images", "0"]
    assert main(["run", *words, "--out", str(tmp_path / "out"), "--resume", "--examples", "1"]) == 1
    told, err = capsys.readouterr()
    results, page = numbers(tmp_path / "out"), (tmp_path / "out" / "report.html").read_text()
    for text in (told, page):
        assert "FloatingPointError: a number is none (test_run.py, line" in text
    assert "A1 failed" in err and "Some experiments failed" in page
    assert results["experiments"]["A9"]["results"]["registers"]["patches"]["n"] == CLASSES * EACH
    if where in ("measure", "numbers"):
        assert results["models"]["registers"]["failed"].keys() == {"A1"}
        assert not results["experiments"]["A1"]["results"] and "registers" not in results["failed"]
    else:
        assert results["experiments"]["A1"]["failed"] and results["experiments"]["A1"]["results"]


def test_names_of_any_bytes_and_batches_of_any_size(tmp_path, arguments):
    """A file name that is not UTF-8 is written out; the checksum of pixels is the same for all sizes of batches."""
    (tmp_path / "images").mkdir()
    for i, name in enumerate((b"caf\xe9.png", b"tea.png", b"\xff.jpg")):
        pixels = (tmp_path / "image.png").with_suffix(".png")
        Image.fromarray(np.full((24, 30, 3), 40 * i, np.uint8)).save(pixels)
        shutil.copy(pixels, os.path.join(os.fsencode(tmp_path / "images"), name))  # noqa: PTH118
    Path(os.fsdecode(os.path.join(os.fsencode(tmp_path / "images"), b"\xff.jpg"))).write_bytes(b"no image")  # noqa: PTH118
    digests = set()
    for size in ("1", "2"):
        words = [*arguments[:2], "--size", "native", "--images", str(tmp_path / "images"), "--batch-size", size]
        out = tmp_path / f"out{size}"
        assert main(["run", *words, "--only", "A1", "--control-images", "0", "--examples", "2", "--out", str(out)]) == 0
        images = numbers(out)["models"]["plain"]["images"]
        digests.add(images["sha256 of the prepared pixels"])
        assert images["skipped"][0]["image"] == "\\xff.jpg" and "\\xff.jpg" in (out / "report.html").read_text()
        with np.load(out / "per_image" / "plain.npz") as arrays:
            assert set(arrays["clean/image"]) == {"caf\\xe9.png", "tea.png"}
    assert len(digests) == 1


def test_no_readable_image_is_an_error(tmp_path, arguments, capsys):
    """Of all images; and of those that register neurons are sought on, which costs that model alone."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    words = ["run", *arguments[:3], "--size", "native", "--images", str(tmp_path / "images"), *FEW]
    assert main([*words, "--out", str(tmp_path / "out")]) == 1
    assert "none of the 1 images can be used" in capsys.readouterr().err.splitlines()[-1]
    folder = tmp_path / "images"
    for i in range(4):
        shutil.copy(Path(arguments[arguments.index("--images") + 1]) / "class 1" / f"{i}.png", folder / f"{i}.png")
    (folder / "broken.png").unlink()
    first = np.random.default_rng(0).permutation(4)[0]  # of the order in which a run takes images
    (folder / f"{first}.png").write_bytes(b"no image")
    more = ["--test-time-registers", "1", "--test-time-registers-images", "1", "--control-images", "0"]
    assert main([*words, *more, "--out", str(tmp_path / "other"), "--examples", "1"]) == 1
    results = numbers(tmp_path / "other")
    assert "that neurons are sought on" in results["failed"]["plain-1-test-time-registers"]["reason"]
    assert results["experiments"]["A1"]["results"]["plain"]


def test_an_experiment_of_ones_own_is_run_like_the_others(tmp_path, toys, arguments, environment):
    """That of docs/experiments.md, from a file, under controls too."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs/experiments.md").read_text(), flags=re.DOTALL)[0]
    controlled = '    title = "Lengths of the patches\' values"\n'
    more = '    passes = ("clean", "controls")\n    controlled = True\n'
    (tmp_path / "my_experiments.py").write_text(code.replace(controlled, controlled + more))
    out, plugin = tmp_path / "out", ["--plugin", tmp_path / "my_experiments.py"]
    told = runs(*arguments, *plugin, "--only", "Z1", "A1", "--control-images", "4", "--out", out)
    assert (
        "\nZ1  Lengths of the patches' values" in told and "Lengths of the patches" in (out / "report.html").read_text()
    )
    found = numbers(out)["experiments"]["Z1"]["results"]["registers"]
    assert (
        found["layers"][-1]["n"] == CLASSES * EACH and found["controls"]["registers zero every"]["layers"][-1]["n"] == 4
    )
    with np.load(out / "per_image" / "registers.npz") as arrays:
        name, lengths = arrays["clean/image"][0], arrays["clean/Z1/length"]
    model = jaxvit.load(toys / "registers")
    image = jaxvit.prepare(toys / "images" / name, model.config)
    v = model(image, record="v").trace["v"][:, 0, model.prefix :]
    np.testing.assert_allclose(lengths[0], np.linalg.norm(v, axis=-1).mean((1, 2)), rtol=1e-5)
    assert "Z1" not in EXPERIMENTS and "my_experiments" not in sys.modules  # a next run knows nothing of it
    (tmp_path / "empty.py").write_text("")
    assert "has no EXPERIMENT" in last_line(start(environment, "run", *arguments, "--plugin", tmp_path / "empty.py"))


def test_one_run_at_a_time_writes_to_a_folder(tmp_path, capsys):
    with alone(tmp_path), pytest.raises(ValueError, match="another run is writing"), alone(tmp_path):
        pass
    with alone(tmp_path):
        pass


def test_what_is_there_is_not_emptied_under_a_live_run_or_for_a_run_without_models(tmp_path, arguments, few, capsys):
    out = tmp_path / "out"
    shutil.copytree(few, out)
    before = fingerprint(out) | {str(path): "" for path in out.rglob("*")}
    with alone(out):
        assert main(["run", *arguments, *FEW, "--out", str(out), "--overwrite"]) == 1
        assert "another run is writing" in capsys.readouterr().err
    missing = [*arguments[:1], "gone=no/such/place/at/all", *arguments[1:]]
    assert main(["run", *missing, *FEW, "--out", str(out), "--overwrite"]) == 1
    assert "gone cannot be run" in (error := capsys.readouterr().err) and "nothing in" in error
    assert fingerprint(out) | {str(path): "" for path in out.rglob("*")} == before


def test_eight_devices_give_what_one_gives(tmp_path, arguments, environment, few):
    flags = environment.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    eight = {**environment, "XLA_FLAGS": flags}
    succeeds(eight, "run", *arguments, *FEW, "--out", tmp_path / "out", "--batch-size", "8")
    ours, theirs = numbers(tmp_path / "out"), numbers(few)
    assert "8 used" in ours["device"] and "1 used" in theirs["device"]

    def compare(a, b, path=""):
        if isinstance(a, dict):
            assert a.keys() == b.keys(), path
            for key in a:
                compare(a[key], b[key], f"{path}/{key}")
        elif isinstance(a, list):
            for i, (x, y) in enumerate(zip(a, b, strict=True)):
                compare(x, y, f"{path}/{i}")
        elif isinstance(a, float):
            assert a == pytest.approx(b, rel=1e-6, abs=1e-6), path
        else:
            assert a == b, path

    compare(ours["experiments"], theirs["experiments"])


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path, arguments, environment, few):
    """The system refuses to write more than so many kilobytes to one file."""
    out = tmp_path / "out"
    words = ["run", *arguments, *FEW, "--out", out, "--save-every", "0"]
    quiet = {k: v for k, v in environment.items() if "CACHE" not in k}  # whose files may be larger
    line = last_line(start(quiet, *words, before=("bash", "-c", 'ulimit -f 20; exec "$@"', "bash")))
    assert line.startswith("error: ") and "File too large" in line and "--resume" in line, line
    runs(*words[1:], "--resume")
    assert same(out, few)


def test_a_run_that_is_asked_to_end_says_how_to_go_on(tmp_path, arguments, environment, few):
    out = tmp_path / "out"
    process = start(environment, "run", *arguments, *FEW, "--out", out, "--save-every", "0")
    wait_for(process, out, "plain", "clean")
    process.terminate()
    assert "--resume" in last_line(process) and process.returncode == 130
    runs(*arguments, *FEW, "--out", out, "--resume")
    assert same(out, few)


# --- what it says


def test_what_cannot_be_run_is_one_sentence(tmp_path, toys, few, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "empty").mkdir()
    images, out = ["--images", str(toys / "images")], ["--out", str(tmp_path / "out")]
    model = ["--models", str(toys / "plain")]
    for words, expected in (
        ([*images, *out], "no models"),
        (["--preset", "paper", *out], "no images"),
        ([*model, "--images", str(tmp_path / "empty"), *out], "holds no image"),
        ([*model, *images, "--out", str(tmp_path / "mine")], "thesis.tex"),
        ([*model, *images, "--out", str(few)], "--resume goes on"),
        (["--models", "no/such/place/at/all", *images, *out], "no model could be run"),
        ([*model, *images, *out, "--show", "zebra*"], "no image is named like zebra"),
        ([*model, *images, *out, "--labelled", str(tmp_path / "empty")], str(tmp_path / "empty")),
    ):
        assert main(["run", *words]) == 1, words
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and expected in error, error
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("id", EXPERIMENTS)
def test_every_experiment_explains_itself(id, capsys):
    with pytest.raises(SystemExit) as ended:
        main([id, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and f"{id}" in text and "--models" in text
    for option in EXPERIMENTS[id].options:
        assert f"--{id.lower()}-{option.name.replace('_', '-')}" in text
        assert option.help
    assert f"jaxvit {id}" in text, "the docstring shows its command"


def test_the_list_of_experiments(capsys):
    assert main(["list"]) == 0
    told = capsys.readouterr().out
    assert [line.split()[0] for line in told.splitlines()] == list(EXPERIMENTS)


def test_a_dry_run_of_the_paper(capsys, monkeypatch, tmp_path):
    """What it would fetch, how many images it wants, and how long that takes on a machine of known speed."""
    monkeypatch.setattr(dry_run, "measured", lambda width, *more: 1e11 if width == 384 else 2e11)
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--preset", "paper", "--dry-run"]) == 0
    told = capsys.readouterr().out
    for words in ("images: 5000", "facebook/dinov2-with-registers-giant", "openai/clip-vit-large-patch14", "iBOT"):
        assert words in told
    giant = next(line for line in told.splitlines() if "facebook/dinov2-giant" in line)
    T, D, F = 257, 1536, 4096
    forward = 40 * (2 * T * D * 4 * D + 2 * 2 * T * T * D + 3 * 2 * T * D * F) / 2e11
    assert f"1136.5 M 4.55 GB to fetch {1e3 * forward:.0f} ms" in " ".join(giant.split())
    assert "what B3 sums up over images: up to 7.5 GB" in told
    rows = re.findall(r"([\d.]+) GB  to fetch +\d+ ms +([\d.]+) (s|min|h) ", told)
    ((fetch,), ((time, unit),)) = (
        re.findall(pattern, told)
        for pattern in (r"to fetch: at least ([\d.]+) GB", r"time on this machine .*: ([\d.]+) (s|min|h)\n")
    )
    assert len(rows) > 1 and float(fetch) == pytest.approx(
        sum(float(size) for size, *_ in rows), abs=0.05 + 0.005 * len(rows)
    )
    seconds = {"s": 1, "min": 60, "h": 3600}
    whole = sum(float(number) * seconds[of] for _, number, of in rows)
    assert float(time) * seconds[unit] == pytest.approx(whole, rel=0.05)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--a4-l2", "0"], "not at least"),
        (["--b3-stride", "0"], "not at least 1"),
        (["--labelled-per-class", "1"], "not at least 2"),
        (["--a4-draws", "many"], "not a whole number"),
        (["--control-images", "-1"], "at least 0"),
        (["--batch-size", "0"], "at least 1"),
        (["--size", "large"], "whole number"),
        (["--a3-stage", "somewhere"], "invalid choice"),
    ],
)
def test_options_are_checked_before_anything_runs(words, expected, capsys):
    with pytest.raises(SystemExit):
        main(["run", "--preset", "embedded", *words])
    assert expected in capsys.readouterr().err


def test_operations_of_a_forward_pass():
    """Of DINOv2-S at 224 px as its matrix products, counted one by one."""
    config = ViTConfig.dinov2("small")
    T, D, F = 257, 384, 1536
    block = 2 * T * D * 3 * D + 2 * 2 * T * T * D + 2 * T * D * D + 2 * 2 * T * D * F
    assert dry_run.flops(config, 224) == pytest.approx(12 * block)

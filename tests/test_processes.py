"""Several real processes on this machine: they give what one gives, and when one ends, all end and can go on."""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import time
import tomllib
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import TINY, random_model
from PIL import Image

import jaxvit
from experiments.__main__ import main as experiments
from experiments.runner.parts import dealt, missing, run_parts
from experiments.runner.store import Store
from jaxvit import Preprocess, ViTConfig, parallel, processes
from jaxvit.features_command import main as features

HERE = Path(__file__).parent


def test_what_is_missing_is_found_and_dealt_evenly():
    ranges = missing([(0, 3), (5, 5), (7, 9)], 12)
    assert ranges == [(3, 7), (9, 12)]
    assert missing([], 4) == [(0, 4)]
    assert missing([(0, 4)], 4) == []
    for count in range(1, 9):
        each = [dealt(ranges, me, count) for me in range(count)]
        numbers = [[i for begin, end in mine for i in range(begin, end)] for mine in each]
        assert [i for mine in numbers for i in mine] == [3, 4, 5, 6, 9, 10, 11]
        assert max(map(len, numbers)) - min(map(len, numbers)) <= 1


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Path:
    """A small model, and images with one among them that is damaged."""
    folder = tmp_path_factory.mktemp("toys")
    config = ViTConfig(**TINY, registers=2, preprocess=Preprocess(resize=20, crop=20))
    jaxvit.save(random_model(config), folder / "model")
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(22):
        pixels = rng.integers(0, 256, (24, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i:02}.png")
    (folder / "images" / "07.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


def start(count: int, *words, code: str = "") -> list[subprocess.Popen]:
    """A command, or code with the port, the number of processes and its own as arguments, in so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
        "JAX_COMPILATION_CACHE_DIR": "",
    }
    started = []
    for i in range(count):
        joining = ["--coordinator", f"127.0.0.1:{port}", "--processes", count, "--process-id", i, "--heartbeat", 10]
        arguments = ["-c", textwrap.dedent(code), port, count, i] if code else ["-m", "jaxvit", *words, *joining]
        started.append(
            subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=HERE.parent,
            )
        )
    return started


def succeed(processes: list[subprocess.Popen]) -> list[str]:
    told = [process.communicate(timeout=300) for process in processes]
    for process, (_, err) in zip(processes, told, strict=True):
        assert process.returncode == 0, err
    return [out for out, _ in told]


FROM_PYTHON = """
    import sys
    import jaxtyping, numpy as np
    import jaxvit
    from jaxvit import parallel

    port, count, me = sys.argv[1], *map(int, sys.argv[2:])
    parallel.start(f"127.0.0.1:{port}", count, me)
    import jax
    from conftest import FAMILIES, random_images, random_model

    assert jax.process_count() == count and jax.local_device_count() == 1
    model, images = random_model(FAMILIES["dinov2 with registers"]), np.asarray(random_images(0, 7, 8))
    mesh, mine = parallel.mesh(), parallel.share(images)
    assert parallel.told(str(len(mine))) == ["3", "4"]
    first = lambda out, clean: out.cls[:, 0]
    heads = lambda point, clean: jaxvit.ablate(model, "z", layers=point["layer"], heads=point["head"])
    pattern = lambda model, images: {"pattern": model(images, record="pattern").trace["pattern"][-1]}
    grid, one = jaxvit.Grid(layer=(0, 2), head=(0, 1, 3)), jaxvit.Grid(layer=(1,), head=(0,))
    collect = jaxvit.ActivationStats.collect
    RUNS = {
        "sweep": (images, lambda x, **m: jaxvit.sweep(model, x, heads, grid, first, **m).values),
        "one point": (images, lambda x, **m: jaxvit.sweep(model, x, heads, one, {"a": first}, **m).values),
        "attribute": (mine, lambda x, **m: jaxvit.attribute(model, x, heads, grid, first, **m).values),
        "over_images": (mine, lambda x, **m: jaxvit.over_images(pattern, model, [x], **m)),
        "statistics": (mine, lambda x, **m: vars(collect(model, x, "mlp_post", **m))),
    }
    for name, (given, go) in RUNS.items():
        found, expected = go(given, mesh=mesh, progress=False), go(images, progress=False)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert a.shape == b.shape, name
            assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max(), name

    # Arrays that no process holds whole.
    spread = parallel.spread(mine[:3], mesh)
    assert spread.shape == (3 * count, 8, 8, 3) and not spread.is_fully_addressable
    assert (parallel.fetch(spread)[3 * me : 3 * me + 3] == mine[:3]).all()
    out = jax.jit(lambda model, x: model(x).cls)(parallel.place(model, mesh), spread)
    whole = np.concatenate(parallel.gather({"x": mine[:3]})[me]["x"][None])
    assert np.allclose(parallel.fetch(out)[3 * me : 3 * me + 3], model(whole).cls, atol=1e-5)
    half = parallel.gather({"half": np.asarray(jax.numpy.arange(me + 2, dtype="bfloat16"))})
    assert [(each["half"].dtype.name, len(each["half"])) for each in half] == [("bfloat16", 2), ("bfloat16", 3)]

    # What would be wrong without a word.
    for name, go, given, why in (
        ("over_images", RUNS["over_images"][1], images, "the same images"),
        ("sweep", RUNS["sweep"][1], mine[:3], "different images"),
        ("statistics", RUNS["statistics"][1], images, "the same images"),
        ("attribute", RUNS["attribute"][1], images, "the same images"),
    ):
        try:
            go(given, mesh=mesh, progress=False)
        except ValueError as error:
            assert why in str(error), error
        else:
            raise AssertionError(f"{name} took {why}")
    try:
        parallel.check_disk(jaxvit.io.parallel.Path(sys.argv[1] if me else "."))
    except ValueError as error:
        assert "is not that of process 0" in str(error)
    else:
        raise AssertionError("two folders passed for one")
    try:
        parallel.wait("here" if me else "there")
    except parallel.ProcessesError as error:
        assert "no longer do the same" in str(error)
    else:
        raise AssertionError("two waits passed for one")
    print("ran to the end")
"""


def test_a_part_that_fails_without_a_word_fails_the_pass(tmp_path):
    def silent(part, which):
        raise AssertionError

    with pytest.raises(AssertionError):
        run_parts(Store(tmp_path / "one", {}), 3, silent)
    with pytest.raises(ValueError, match="lacks the images from 0 on"):
        run_parts(Store(tmp_path / "two", {}), 3, lambda part, which: None)


def test_functions_that_take_a_mesh_give_every_process_what_one_process_gives(tmp_path):
    for out in succeed(start(2, code=FROM_PYTHON)):
        assert out.endswith("ran to the end\n")


def test_features_of_several_processes_are_those_of_one_to_the_byte(tmp_path, toys):
    words = ["features", toys / "model", toys / "images", "--take", "cls", "patches@0", "--batch-size", "3"]
    for suffix in ("zarr", "safetensors"):
        assert features([*map(str, words[1:]), "--out", str(tmp_path / f"one.{suffix}")]) == 0
        told = succeed(start(2, *words, "--out", tmp_path / f"two.{suffix}"))
        assert all("21 images; 1 left out" in each for each in told)
        assert content(tmp_path / f"two.{suffix}") == content(tmp_path / f"one.{suffix}")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("two")) == [
        "two.safetensors",
        "two.zarr",
    ]
    refused = start(2, *words, "--out", tmp_path / "two.zarr")
    assert all("exists" in process.communicate()[1] and process.returncode == 1 for process in refused)


def test_features_of_several_processes_go_on_in_one(tmp_path, toys):
    model, images = jaxvit.load(toys / "model"), toys / "images"
    go = partial(jaxvit.features, model, images, ["cls"], batch_size=3, mesh=jaxvit.parallel.mesh())
    leave_out = {"on_error": lambda name, error: None}
    go(out=tmp_path / "one.npz", **leave_out)
    out, parts = tmp_path / "two.npz", tmp_path / "two.npz.parts"
    parts.mkdir()  # as a run of several processes leaves it
    with pytest.raises(jaxvit.FeaturesError, match="several processes that was interrupted: --resume"):
        go(out=out, **leave_out)
    with pytest.raises(jaxvit.ImageError):
        go(out=out, resume=True)  # it stops at the damaged one
    assert len(list(parts.glob("*.safetensors"))) == 2 and not out.exists()
    go(out=out, resume=True, **leave_out)
    assert content(out) == content(tmp_path / "one.npz") and not parts.exists()
    with pytest.raises(ValueError, match="how many images"):
        parts.mkdir()
        endless = jaxvit.io.image_sets.ImageSet("a generator", "same", lambda first: iter([]))
        jaxvit.features(model, endless, out=out, resume=True)


def content(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    return {each.relative_to(path).as_posix(): each.read_bytes() for each in files}


def test_a_run_that_lost_a_process_ends_soon_and_goes_on_with_another_number(tmp_path, toys):
    words = ["run", "--models", f"tiny={toys / 'model'}", "--images", toys / "images", "--only", "A1", "A2", "B2"]
    words += ["--batch-size", "2", "--size", "native", "--save-every", "0", "--control-images", "9"]
    assert experiments([*map(str, words), "--out", str(tmp_path / "one")]) == 0

    out = tmp_path / "several"
    both = start(2, *words, "--out", out)
    deadline = time.monotonic() + 120
    while not list(out.glob("progress/tiny/clean-*/parts/*/state.npz")):
        assert time.monotonic() < deadline and all(process.poll() is None for process in both)
        time.sleep(0.02)
    workers = subprocess.run(["pgrep", "-P", str(both[1].pid)], capture_output=True, text=True, check=True).stdout
    os.kill(int(workers.split()[0]), 9)
    killed = time.monotonic()
    told = [process.communicate(timeout=120)[1] for process in both]
    assert time.monotonic() - killed < 60
    assert all(process.returncode == 1 for process in both)
    assert told[0].strip().splitlines()[-1].startswith("error: another process of this run has ended")
    assert told[1].strip().splitlines()[-1].startswith("error: the worker was ended by SIGKILL")
    assert not (out / "results.json").exists()

    succeed(start(3, *words, "--out", out, "--resume"))
    assert not list(out.glob("progress/*/*/parts"))
    with np.load(tmp_path / "one" / "per_image" / "tiny.npz") as one, np.load(out / "per_image" / "tiny.npz") as found:
        assert found.files == one.files
        for name in one.files:
            np.testing.assert_array_equal(found[name], one[name], err_msg=name)
    one, found = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path / "one", out))
    assert found["models"] == one["models"]
    assert_near(found["experiments"], one["experiments"])
    assert re.sub(" --out .*", "", found["command"]) == " ".join(["jaxvit", *map(str, words)])


def assert_near(found, expected, where: str = "") -> None:
    """Sums come together in another order."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_near(found[key], expected[key], f"{where} {key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for a, b in zip(found, expected, strict=True):
            assert_near(a, b, where)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12), where
    else:
        assert found == expected, where


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--processes", "2"], "need --coordinator"),
        (["--coordinator", "127.0.0.1:1", "--processes", "2", "--process-id", "2"], "from 0 to N - 1"),
        (["--distributed", "--process-id", "0"], "leave out"),
    ],
)
def test_options_that_make_no_run_are_refused(capsys, toys, words, why):
    with pytest.raises(SystemExit):
        features([str(toys / "model"), str(toys / "images"), *words])
    assert why in capsys.readouterr().err


def test_who_watches_says_that_another_process_was_lost(monkeypatch, capfd):
    """Also where the worker learned of it from Python, and JAX had the last word of it."""
    program = "import sys; sys.stderr.write('JAX: PollForError'); sys.exit(75)"
    monkeypatch.setattr(sys, "orig_argv", ["python", "-c", program])
    assert processes.watched() == 1
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: another process of this run has ended")

    def lost() -> int:
        raise jaxvit.parallel.ProcessesError("another process of this run has ended")

    monkeypatch.setenv(processes.WORKER, "1")
    monkeypatch.setattr(jaxvit.parallel, "start", lambda *given, heartbeat: None)
    monkeypatch.setattr(os, "_exit", sys.exit)
    parser = argparse.ArgumentParser()
    processes.add_processes(parser)
    with pytest.raises(SystemExit) as ended:
        processes.in_processes(parser, parser.parse_args(["--distributed"]), lost)
    assert ended.value.code == processes.LOST


@pytest.mark.parametrize(
    ("tasks", "visible", "expected"),
    [
        ("1(x4)", "0,1,2,3", [0, 1, 2, 3]),  # JAX would take one of the four
        ("1", "GPU-a,GPU-b", [0, 1]),
        ("4(x2)", "0,1,2,3", None),
        ("1,4", "0,1,2,3", None),
        ("", "0,1", None),
        ("1(x2)", "", None),
    ],
)
def test_a_task_that_is_alone_on_its_node_takes_all_its_gpus(tasks, visible, expected, monkeypatch):
    given = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: given.append(args))
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", tasks)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    parallel.start()
    assert given == [(None, None, None, expected)]


@pytest.mark.parametrize("name", ["tpu", "cuda"])
def test_dockerfiles_copy_what_is_there_and_ask_for_extras_that_exist(name):
    root = Path(__file__).parents[1]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = [line for line in (root / "docker" / f"{name}.Dockerfile").read_text().splitlines() if line[:1] != "#"]
    parts = [line.split(maxsplit=1) for line in lines]
    assert [word for word, _ in parts] == [
        *("FROM", "WORKDIR", "COPY", "COPY", "COPY", "COPY", "RUN", "WORKDIR", "ENTRYPOINT", "CMD")
    ]
    copied = [source for word, rest in parts if word == "COPY" for source in rest.split()[:-1]]
    assert all((root / source).exists() for source in copied)
    wheel = {"jaxvit", "convert", "experiments", "pyproject.toml", "README.md", "LICENSE"}
    assert set(copied) == wheel  # all that a wheel is built of
    (asked,) = re.findall(r'"\.\[(.*)\]"', dict(parts)["RUN"])
    assert set(asked.split(",")) <= set(extras) and f"jax[{'tpu' if name == 'tpu' else 'cuda13'}]" in dict(parts)["RUN"]
    assert json.loads(dict(parts)["ENTRYPOINT"]) == ["jaxvit"]

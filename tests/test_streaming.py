"""Conversion to a folder never holds the model, writes what `load` and `save` write, and leaves nothing if it fails."""

import errno
import gc
import signal
import subprocess
import sys
import textwrap
import tracemalloc
import weakref
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from layouts import (
    WRITERS,
    expected,
    hub_state,
    numbers,
    tiny,
    transformers_state,
    write_safetensors,
    write_shards,
)
from safetensors.numpy import load_file
from safetensors.numpy import save_file as library_save_file

import convert
import jaxvit
from convert import ConversionError, engine
from jaxvit import CheckpointError
from jaxvit.io import checkpoint
from jaxvit.io.checkpoint import SafetensorsFile, claimed, save_file
from jaxvit.model.params import to_params

ROOT = Path(__file__).parents[1]
FAMILIES = {f"{mlp}-{registers}": tiny(mlp, registers) for mlp in ("gelu", "swiglu") for registers in (0, 4)}
CONFIG = FAMILIES["swiglu-4"]
HUB = hub_state(CONFIG, numbers(CONFIG))

WIDE = tiny("swiglu", width=384, hidden=1024, depth=5)
"""36 MB in float32."""


def contents(folder):
    """All files below a folder, hidden ones too, and what is in them."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A file that is large beside what Python takes, in the layout of transformers, and its largest step's bytes."""
    folder = tmp_path_factory.mktemp("wide")
    state = transformers_state(WIDE, numbers(WIDE))
    return write_safetensors(folder / "model.safetensors", state), 4 * 2 * WIDE.hidden * WIDE.width


# What is written ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", WRITERS)
def test_the_folder_is_what_load_and_save_write(family, layout, tmp_path):
    config = FAMILIES[family]
    path = write_safetensors(tmp_path / "some.safetensors", WRITERS[layout](config, numbers(config)))
    told = convert.convert_to_folder(path, tmp_path / "streamed")
    model, provenance = convert.load_described(path)
    jaxvit.save(model, tmp_path / "whole", provenance)
    assert told == model.config
    assert contents(tmp_path / "streamed") == contents(tmp_path / "whole")
    assert {path.stat().st_mode for path in (tmp_path / "streamed").iterdir()} == {0o100644}
    wanted = expected(replace(config, mask_token=told.mask_token), numbers(config))
    for name, array in load_file(tmp_path / "streamed" / "model.safetensors").items():
        np.testing.assert_array_equal(array, wanted[name], err_msg=name, strict=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_types(dtype, tmp_path):
    """Written and read, from a source of each: every bit, in pieces as in whole."""
    with jax.enable_x64(dtype == "float64"):
        model = convert.convert(HUB, tmp_path / "model", dtype=dtype)
        whole = convert.load(HUB, dtype=dtype)
        for name, leaf in to_params(whole).items():
            assert leaf.dtype == dtype
            assert np.asarray(leaf).tobytes() == np.asarray(to_params(model)[name]).tobytes()
    half = {name: array.astype(model.cls.dtype) for name, array in HUB.items()}
    path = write_safetensors(tmp_path / "half.safetensors", half)
    convert.convert_to_folder(path, tmp_path / "from file")
    convert.convert_to_folder(half, tmp_path / "from memory")
    weights = [tmp_path / place / "model.safetensors" for place in ("from file", "from memory")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize("rows", [1, 3, 7, 1000])
def test_pieces_of_any_size(rows, tmp_path, monkeypatch):
    whole = to_params(convert.load(HUB))
    monkeypatch.setattr(engine, "PIECE", 4 * CONFIG.width * rows)
    for name, leaf in to_params(convert.convert(HUB, tmp_path / "model")).items():
        assert np.asarray(leaf).tobytes() == np.asarray(whole[name]).tobytes(), name


@pytest.mark.parametrize("dtype", ["int8", "complex64", "float64"])
def test_types_that_models_cannot_have(dtype, tmp_path):
    for run in (
        lambda: convert.load(HUB, dtype=dtype),
        lambda: convert.convert_to_folder(HUB, tmp_path / "m", dtype=dtype),
    ):
        with pytest.raises(
            ValueError, match=f"{dtype} is disabled" if dtype == "float64" else f"dtype is {dtype}; expected a floating"
        ):
            run()
    assert names(tmp_path) == []


def test_files_are_the_librarys(tmp_path):
    """Byte by byte, but for its order of types."""
    for arrays in (
        HUB,
        {},
        {"é": np.zeros((0, 3), np.float16), "a": np.ones((), np.float16), 'b"': np.ones((2, 1), np.float16)},
    ):
        arrays = {name: np.ascontiguousarray(a).reshape(a.shape) for name, a in arrays.items()}
        library_save_file(arrays, tmp_path / "theirs")
        save_file(arrays, tmp_path / "ours")
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    mixed = {f"{i}": np.arange(3).astype(dtype) for i, dtype in enumerate(checkpoint.TYPES.values())}
    save_file(mixed, tmp_path / "ours")
    for read in (SafetensorsFile(tmp_path / "ours"), load_file(tmp_path / "ours")):
        assert set(read) == set(mixed)
        for name, array in mixed.items():
            np.testing.assert_array_equal(read[name], array, strict=True)
    with pytest.raises(ValueError, match="hold no complex128, object$"):
        save_file({"a": np.zeros(3, complex), "b": np.zeros(3, object)}, tmp_path / "ours")


def test_safetensors_are_read_when_asked_for(tmp_path):
    path = write_safetensors(tmp_path / "some.safetensors", HUB)
    file = SafetensorsFile(path)
    path.write_bytes(path.read_bytes()[:-1])
    assert {name: file.shape(name) for name in file} == {name: array.shape for name, array in HUB.items()}
    assert "norm.bias" in file and "norm" not in file and {file.dtype(name).name for name in file} == {"float32"}
    last = max(file, key=lambda name: file.entries[name]["data_offsets"])
    with pytest.raises(CheckpointError, match="has become shorter"):
        file[last]
    path.unlink()
    with pytest.raises(CheckpointError, match=r"some\.safetensors cannot be read: No such file"):
        file["norm.bias"]


# Memory ---------------------------------------------------------------------------------------------------------------


@contextmanager
def traced():
    """Bytes that Python and NumPy take at most beyond what they hold before: a list of one number, when it is over."""
    gc.collect()
    tracemalloc.start()
    peak = []
    try:
        yield peak
        peak.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


def test_peak_of_a_conversion_to_a_folder(wide, tmp_path, monkeypatch):
    path, step = wide
    monkeypatch.setattr(engine, "PIECE", 2**17)  # beside the matrices of a giant, pieces are as small
    convert.convert_to_folder(path, tmp_path / "warm")  # what JAX keeps of a config is not counted
    with traced() as peak:
        convert.convert_to_folder(path, tmp_path / "model")
    assert step <= peak[0] <= 1.3 * step < path.stat().st_size / 8


def test_peak_of_a_conversion_to_memory(wide):
    path, step = wide
    convert.load(HUB)
    with traced() as peak:
        model = convert.load(path)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    assert total <= peak[0] <= 1.3 * (total + step)


def test_peak_of_loading_and_saving(wide, tmp_path):
    convert.convert_to_folder(wide[0], tmp_path / "model")
    with traced() as peak:
        model = jaxvit.load(tmp_path / "model")
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    assert peak[0] <= 1.3 * total
    with traced() as peak:
        jaxvit.save(model, tmp_path / "again")
    assert peak[0] <= 0.1 * total


class Counting(Mapping):
    """Tensors made when they are asked for; counts the bytes of those that live at once."""

    def __init__(self, state):
        self.state, self.live, self.peak = state, 0, 0

    def __getitem__(self, name):
        array = self.state[name].copy()
        self.live += array.nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(array, self.drop, array.nbytes)
        return array

    def drop(self, size):
        self.live -= size

    def __contains__(self, name):
        return name in self.state

    def __iter__(self):
        return iter(self.state)

    def __len__(self):
        return len(self.state)


@pytest.mark.parametrize("layout", WRITERS)
def test_tensors_of_one_step_are_held(layout, monkeypatch, tmp_path):
    config = tiny("swiglu", 4, depth=4)
    counting = Counting(WRITERS[layout](config, numbers(config)))
    monkeypatch.setattr(convert, "open_source", lambda *args: convert.Source(counting, {"kind": "counting"}))
    convert.convert_to_folder("anything", tmp_path / "model")
    # At this size the embedding of patches is the largest matrix.
    assert counting.peak == 4 * 3 * config.patch**2 * config.width and counting.live == 0


def test_torch_files_are_not_copied(tmp_path):
    torch = pytest.importorskip("torch")
    for dtype in (torch.float32, torch.bfloat16):
        torch.save({name: torch.tensor(array).to(dtype) for name, array in HUB.items()}, tmp_path / "some.pth")
        tensors = convert.read(tmp_path / "some.pth").tensors
        assert not any(array.flags.owndata for array in tensors.values())
        for name, array in tensors.items():
            assert array.astype(np.float32).tobytes() == torch.tensor(HUB[name]).to(dtype).float().numpy().tobytes()


def test_shards_are_read_lazily(tmp_path):
    write_shards(tmp_path, transformers_state(CONFIG, numbers(CONFIG)))
    opened = convert.read(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        [opened.tensors[name] for name in opened.tensors]


# All or nothing -------------------------------------------------------------------------------------------------------


def test_layouts_and_configs_are_found_without_reading_tensors(tmp_path):
    """In a Python without checks of types, which read tensors themselves."""
    places = []
    for n, (layout, write) in enumerate(WRITERS.items()):
        state = write(CONFIG, numbers(CONFIG))
        places += [layout, write_safetensors(tmp_path / f"{n}.safetensors", state)]
        places += [layout, write_shards(tmp_path / f"{n}", state)]
    code = """
        import sys
        import convert
        from jaxvit.io.checkpoint import SafetensorsFile

        def refuse(self, name):
            raise AssertionError(f"{name} was read")

        SafetensorsFile.__getitem__ = refuse
        for layout, path in zip(sys.argv[1::2], sys.argv[2::2]):
            found, tensors, config = convert.recognise(convert.read(path))
            assert found.name == layout and config.registers == 4 and len(found.rules(config, tensors)) > 10
    """
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, places)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def source(tmp_path):
    return write_safetensors(tmp_path / "sources" / "some.safetensors", HUB)


@pytest.fixture
def place(tmp_path):
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def failing(monkeypatch, error, after):
    """`put` raises the error once it has been called so many times."""
    real = checkpoint.writing

    @contextmanager
    def writing(path, tensors):
        calls = iter(range(10**9))
        with real(path, tensors) as put:

            def limited(name, start, values):
                if next(calls) >= after:
                    raise error
                put(name, start, values)

            yield limited

    monkeypatch.setattr(convert, "writing", writing)


@pytest.mark.parametrize("after", [0, 1, 20])
def test_an_interruption_leaves_nothing(source, place, monkeypatch, after):
    with monkeypatch.context() as patched:
        failing(patched, KeyboardInterrupt(), after)
        with pytest.raises(KeyboardInterrupt):
            convert.convert_to_folder(source, place / "model")
    assert names(place) == []
    convert.convert_to_folder(source, place / "model")
    assert names(place) == ["model"]


def test_an_interruption_leaves_the_old_model(source, place, monkeypatch):
    jaxvit.save(convert.load(HUB, resampling="bicubic"), place / "model")
    before = contents(place)
    failing(monkeypatch, KeyboardInterrupt(), 20)
    with pytest.raises(KeyboardInterrupt):
        convert.convert_to_folder(source, place / "model", overwrite=True)
    assert contents(place) == before


def test_a_full_disk_is_one_sentence(source, place, monkeypatch):
    """The file of weights takes some writes, and then no more."""

    class Full:
        def __init__(self, file):
            self.file, self.left = file, 5

        def write(self, data):
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *caught):
            self.file.close()

    def full(path, mode="r"):
        return Full(open(path, mode)) if mode == "wb" else open(path, mode)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "open", full, raising=False)
        with pytest.raises(CheckpointError, match=r"^cannot write .*model: No space left on device$"):
            convert.convert_to_folder(source, place / "model")
    assert names(place) == []
    convert.convert_to_folder(source, place / "model")


def test_a_killed_conversion_leaves_no_model(source, place):
    """Killed half-way, when nothing can be tidied up: what is left is no model, and the next run takes it away.

    But not what a process that still runs is writing.
    """
    code = f"""
        import os, signal, sys
        from pathlib import Path
        import convert
        from convert import engine

        step, calls = engine._step, []

        def killing(*arguments):
            calls.append(1)
            if len(calls) == 20:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*arguments)

        engine._step = killing
        convert.convert_to_folder(Path({str(source)!r}), Path({str(place)!r}) / "model")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (place / "model").exists()
    assert len([*place.iterdir()]) == 1
    for left in place.iterdir():  # a hidden folder of some tensors
        assert left.name.startswith(".model.")
        for read in (jaxvit.load, jaxvit.read_config, convert.load):
            with pytest.raises((CheckpointError, ConversionError)):
                read(left)
        with pytest.raises(CheckpointError, match="not a complete safetensors file"):
            SafetensorsFile(left / "model.safetensors")
    with claimed(left) as ours:
        assert ours
        convert.convert_to_folder(source, place / "model")
        assert left.is_dir()
    assert jaxvit.load(place / "model").config == convert.load(source).config
    convert.convert_to_folder(source, place / "model", overwrite=True)
    assert names(place) == ["model"]


def test_all_offenders_are_listed_and_nothing_is_written(place):
    state = HUB | {
        "norm.bias": np.full(CONFIG.width, np.nan, np.float32),
        "blocks.1.norm2.bias": np.zeros(3, np.float32),
        "blocks.0.more": np.zeros(3, np.float32),
    }
    del state["blocks.0.attn.proj.bias"]
    with pytest.raises(ConversionError) as raised:
        convert.convert_to_folder(state, place / "model")
    for problem in (
        "norm.bias holds NaN",
        "blocks.1.norm2.bias [3] cannot become",
        "blocks.0.more is not expected",
        "blocks.0.attn.proj.bias is missing",
    ):
        assert problem in str(raised.value)
    assert names(place) == []
    with pytest.raises(ConversionError) as loaded:
        convert.load(state)
    assert str(loaded.value) == str(raised.value)


def test_a_number_that_is_too_large_is_found_in_any_piece(place, monkeypatch):
    monkeypatch.setattr(engine, "PIECE", 1000)
    state = dict(HUB)
    name = "blocks.1.mlp.w3.weight"
    state[name] = state[name].copy()
    state[name][-1, -1] = 1e6
    with pytest.raises(ConversionError, match=f"checkpoint: {name} exceeds what float16 can hold$"):
        convert.convert_to_folder(state, place / "model", dtype="float16")
    state[name][-1, -1] = np.inf
    with pytest.raises(ConversionError, match=f"checkpoint: {name} holds NaN or infinity$"):
        convert.convert_to_folder(state, place / "model")
    assert names(place) == []


def test_a_place_that_is_taken_is_refused_before_anything_is_read(place, monkeypatch):
    convert.convert_to_folder(HUB, place / "model")
    (place / "other").mkdir()
    (place / "other" / "notes.txt").write_text("mine")
    monkeypatch.setattr(convert, "read", lambda *args, **known: pytest.fail("was read"))
    with pytest.raises(CheckpointError, match="already holds a model"):
        convert.convert_to_folder(HUB, place / "model")
    with pytest.raises(CheckpointError, match="is not a jaxvit model"):
        convert.convert_to_folder(HUB, place / "other", overwrite=True)


def test_every_parameter_must_be_set():
    """A table that forgets one is an error, not a model with whatever lay in memory."""
    layout, tensors, config = convert.recognise(convert.Source(HUB, {}))
    short = engine.Layout(layout.name, layout.anchors, layout.config, lambda c, t: layout.rules(c, t)[1:], {"*": "-"})
    with pytest.raises(ConversionError, match=r"checkpoint: patch_embed\.kernel is set by no rule$"):
        engine.convert_tensors(short, tensors, config, "float32")


# Progress -------------------------------------------------------------------------------------------------------------


def test_progress(source, place, monkeypatch, capsys):
    pytest.importorskip("tqdm")
    convert.convert_to_folder(source, place / "quiet")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    convert.convert_to_folder(source, place / "shown")
    assert "converting: 100%" in capsys.readouterr().err

"""Models on disk: every bit comes back, nothing but a complete model is read, and nothing is ever half written."""

import errno
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, random_model
from safetensors.numpy import load_file, save_file

import jaxvit
from jaxvit import CheckpointError, Provenance
from jaxvit.io import checkpoint
from jaxvit.model.params import to_params

CONFIG = FAMILIES["dinov2 with registers"]


@pytest.fixture(scope="module")
def other():
    return random_model(CONFIG, seed=1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a model; tests that spoil it take a copy."""
    return jaxvit.save(random_model(CONFIG), tmp_path_factory.mktemp("saved") / "model", Provenance({"from": "here"}))


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the saved model, to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def assert_same(actual, expected):
    """The same model in every bit."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def contents(folder):
    """All files below a folder, hidden ones too, and what is in them."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def one_sentence(caught):
    message = str(caught.value)
    assert "\n" not in message
    assert "Traceback" not in message
    return message


# --- round trip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_bit_comes_back(model, dtype, tmp_path):
    model = jaxvit.cast(model, dtype)
    assert jaxvit.save(model, tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    assert_same(jaxvit.load(tmp_path / "new" / "folder"), model)


def test_every_bit_of_float64_comes_back(tmp_path):
    with jax.enable_x64(True):
        model = jax.tree.map(lambda a: a + 1e-12, jaxvit.cast(random_model(CONFIG), jnp.float64))
        jaxvit.save(model, tmp_path / "model")
        assert_same(jaxvit.load(tmp_path / "model"), model)
    with pytest.raises(CheckpointError, match="float64, which JAX has disabled: set JAX_ENABLE_X64=1"):
        jaxvit.load(tmp_path / "model")


def test_unusual_values_come_back(tmp_path, other):
    cls = other.cls[...].at[:4].set(jnp.array([jnp.nan, jnp.inf, -0.0, 1e-40]))
    model = jaxvit.model.params.from_params(CONFIG, to_params(other) | {"cls": cls})
    jaxvit.save(model, tmp_path / "model")
    assert_same(jaxvit.load(tmp_path / "model"), model)


def test_names_may_be_strings(tmp_path, other):
    assert_same(jaxvit.load(str(jaxvit.save(other, str(tmp_path / "model")))), other)


def test_config_and_source_come_back(model, tmp_path):
    source = {"name": "hub:facebook/dinov2", "files": [{"sha256": "0" * 64}], "torch": "2.9"}
    jaxvit.save(model, tmp_path / "model", Provenance(source))
    assert jaxvit.read_config(tmp_path / "model") == (model.config, source)
    assert jaxvit.read_config(jaxvit.save(model, tmp_path / "plain")) == (model.config, {})


def test_a_saved_model_is_two_readable_files_and_nothing_beside_them(saved):
    assert sorted(contents(saved.parent)) == ["model/config.json", "model/model.safetensors"]
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in (saved, *saved.iterdir()))


# --- reading what is not a model


def rewrite(folder, change):
    """The weights, after `change` has had its way with the dict of arrays."""
    arrays = load_file(folder / "model.safetensors")
    change(arrays)
    save_file(arrays, folder / "model.safetensors")


def test_all_parameters_that_do_not_fit_are_listed(folder):
    def spoil(arrays):
        del arrays["cls"], arrays["blocks.norm1.scale"]
        arrays["head.kernel"] = np.zeros((2, 2), np.float32)
        arrays["mask"] = np.zeros(2, np.float32)
        arrays["norm.bias"] = arrays["norm.bias"][:-1]
        arrays["positions"] = arrays["positions"].reshape(25, -1)
        arrays["registers"] = arrays["registers"].astype(np.float16)

    rewrite(folder, spoil)
    with pytest.raises(CheckpointError, match="does not fit its config") as caught:
        jaxvit.load(folder)
    message = one_sentence(caught)
    for problem in (
        "cls is missing",
        "blocks.norm1.scale is missing",
        "head.kernel is not expected",
        "mask is not expected",
        "norm.bias has shape [31], expected [32]",
        "positions has shape [25, 32], expected [5, 5, 32]",
        "dtypes are ['float16', 'float32']",
    ):
        assert problem in message
    assert message.count(";") == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop("cls"), "config: cls is missing$"),
        (lambda arrays: arrays.update(extra=arrays["cls"] + 0), "config: extra is not expected$"),
        (lambda arrays: arrays.update(cls=arrays["cls"][None]), r"config: cls has shape \[1, 32\], expected \[32\]$"),
        (lambda arrays: arrays.update(cls=arrays["cls"].astype("float16")), r"config: dtypes are \['float16', 'fl"),
        (lambda arrays: arrays.update({k: v.astype("int32") for k, v in arrays.items()}), "dtypes are .'int32'., exp"),
        (lambda arrays: arrays.clear(), "cls is missing; .*registers is missing$"),
    ],
    ids=["missing", "extra", "shape", "mixed", "integers", "empty"],
)
def test_a_single_parameter_that_does_not_fit_is_named(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        jaxvit.load(folder)
    one_sentence(caught)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 2000, -1])
def test_a_truncated_file_is_not_read(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a complete safetensors file") as caught:
        jaxvit.load(folder)
    one_sentence(caught)


@pytest.mark.parametrize("garbage", [b"garbage" * 1000, b"\x00" * 1000, b"\xff" * 1000, b"version https://git-lfs"])
def test_a_foreign_file_is_not_read(folder, garbage):
    (folder / "model.safetensors").write_bytes(garbage)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a complete safetensors file") as caught:
        jaxvit.load(folder)
    one_sentence(caught)


def test_missing_weights_are_named(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not exist"):
        jaxvit.load(folder)


@pytest.mark.parametrize("read", [jaxvit.load, jaxvit.read_config])
def test_a_folder_without_a_model_is_described(tmp_path, read):
    (tmp_path / "file").write_text("")
    for path, words in (
        (tmp_path, "has no config.json"),
        (tmp_path / "nowhere", "is not a folder"),
        (tmp_path / "file", "is not a folder"),
    ):
        with pytest.raises(CheckpointError, match=f"{path} {words}: expected a folder written by jaxvit.save"):
            read(path)


def without(config, name):
    return {key: value for key, value in config.items() if key != name}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda c: "{", ["is not the config of a jaxvit model"]),
        (lambda c: "", ["is not the config of a jaxvit model"]),
        (lambda c: [], ["is not the config of a jaxvit model"]),
        (lambda c: {"model_type": "dinov2", "hidden_size": 384}, ["is not the config of a jaxvit model", "format"]),
        (lambda c: c | {"format": 1}, ["is of format 1", "no longer reads: convert the model again"]),
        (lambda c: without(c, "config"), ["not the config", "config"]),
        (lambda c: without(c, "provenance"), ["not the config", "provenance"]),
        (lambda c: c | {"provenance": {}}, ["not the config", "source"]),
        (lambda c: c | {"provenance": {"source": {}, "config": 3}}, ["not the config"]),
        (lambda c: c | {"config": 3}, ["not the config"]),
        (lambda c: c | {"config": c["config"] | {"roped": 1, "bias": 2}}, ["fields 'bias', 'roped', which jaxvit"]),
        (lambda c: c | {"config": without(c["config"], "depth")}, ["missing names ['depth']"]),
        (lambda c: c | {"config": c["config"] | {"heads": 5}}, ["not a multiple of the number of heads"]),
        (lambda c: c | {"config": c["config"] | {"depth": "3"}}, ["not the config"]),
        (lambda c: c | {"config": c["config"] | {"preprocess": None}}, ["not the config"]),
    ],
)
def test_a_config_that_makes_no_sense_is_described(folder, spoil, words):
    path = folder / "config.json"
    spoiled = spoil(json.loads(path.read_text()))
    path.write_text(spoiled if isinstance(spoiled, str) else json.dumps(spoiled))
    for read in (jaxvit.load, jaxvit.read_config):
        with pytest.raises(CheckpointError) as caught:
            read(folder)
        assert all(word in one_sentence(caught) for word in [str(path), *words])


def test_a_config_that_is_not_text_is_described(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="is not the config of a jaxvit model"):
        jaxvit.load(folder)


def test_weights_of_another_config_do_not_load(folder):
    config = CONFIG.to_dict() | {"registers": 0, "mlp": "swiglu"}
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"config": config}))
    with pytest.raises(CheckpointError) as caught:
        jaxvit.load(folder)
    for problem in ("blocks.mlp.gate.kernel is missing", "registers is not expected", "blocks.mlp.fc1.bias is not"):
        assert problem in str(caught.value)


# --- writing all or nothing


def disk_full(arrays, path):
    Path(path).write_bytes(b"half of the weights")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_fills_up_leaves_nothing(other, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "save_file", disk_full)
    with pytest.raises(CheckpointError, match=r"cannot write .*model: No space left on device"):
        jaxvit.save(other, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing(other, tmp_path, monkeypatch):
    def interrupt(arrays, path):
        Path(path).write_bytes(b"half of the weights")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        jaxvit.save(other, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_is_not_json_leaves_nothing(other, tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        jaxvit.save(other, tmp_path / "model", Provenance({"path": Path()}))
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_replaced_only_when_asked_to(folder, other):
    before = contents(folder.parent)
    with pytest.raises(CheckpointError, match="already holds a model: choose another folder, or give --overwrite"):
        jaxvit.save(other, folder)
    assert contents(folder.parent) == before
    jaxvit.save(other, folder, overwrite=True)
    assert_same(jaxvit.load(folder), other)
    assert contents(folder.parent).keys() == before.keys()


def test_replacing_a_model_also_drops_its_proof(folder, other):
    (folder / checkpoint.PARITY).write_text("{}")
    jaxvit.save(other, folder, overwrite=True)
    assert not (folder / checkpoint.PARITY).exists()


def test_an_old_model_is_intact_when_the_disk_fills_up(folder, other, monkeypatch):
    before = contents(folder.parent)
    monkeypatch.setattr(checkpoint, "save_file", disk_full)
    with pytest.raises(CheckpointError, match="No space left"):
        jaxvit.save(other, folder, overwrite=True)
    assert contents(folder.parent) == before


def test_an_old_model_comes_back_when_the_new_one_cannot_take_its_place(folder, other, monkeypatch):
    before, rename = contents(folder.parent), Path.rename

    def refuse(path, target):
        # What two processes saving to one folder see: it is there again when it has just been moved away.
        if Path(target).name == folder.name and not path.name.endswith(".old"):
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(CheckpointError, match="Directory not empty"):
        jaxvit.save(other, folder, overwrite=True)
    assert contents(folder.parent) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "files",
    [
        {"notes.txt": "mine"},
        {"model.safetensors": "weights"},
        {"config.json": '{"model_type": "dinov2"}', "model.safetensors": "weights"},
        {"config.json": "not even JSON"},
    ],
    ids=["notes", "weights alone", "transformers", "broken"],
)
def test_a_folder_that_is_something_else_is_never_replaced(other, tmp_path, files, overwrite):
    (tmp_path / "folder").mkdir()
    for name, text in files.items():
        (tmp_path / "folder" / name).write_text(text)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="exists and is not a jaxvit model: choose another folder"):
        jaxvit.save(other, tmp_path / "folder", overwrite=overwrite)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_never_replaced(other, tmp_path, overwrite):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not a jaxvit model"):
        jaxvit.save(other, tmp_path / "file", overwrite=overwrite)
    assert contents(tmp_path) == {"file": b"mine"}


def test_an_empty_folder_is_filled(other, tmp_path):
    (tmp_path / "model").mkdir()
    jaxvit.save(other, tmp_path / "model")
    assert_same(jaxvit.load(tmp_path / "model"), other)


def test_a_link_to_a_model_stays_a_link(folder, other, tmp_path):
    link = tmp_path / "latest"
    link.symlink_to(folder)
    jaxvit.save(other, link, overwrite=True)
    assert link.is_symlink()
    assert_same(jaxvit.load(folder), other)
    assert {path.name for path in tmp_path.iterdir()} == {"latest", "model"}


def test_a_place_that_cannot_be_written_is_described(other, tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file" / "model", tmp_path / "file" / "deeper" / "model"):
        with pytest.raises(
            CheckpointError, match=r"cannot write .*file.*model: (Not a directory|File exists)"
        ) as caught:
            jaxvit.save(other, place)
        one_sentence(caught)
    assert contents(tmp_path) == {"file": b"mine"}


def test_a_model_folder_with_other_things_in_it_is_never_replaced(tmp_path):
    model = random_model(FAMILIES["dinov2"])
    jaxvit.save(model, tmp_path / "model")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds other things, such as notes.txt"):
        jaxvit.save(model, tmp_path / "model", overwrite=True)
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

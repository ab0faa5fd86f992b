"""Files as people have them: checkpoints of whole trainings, under any name, and files that are something else."""

import argparse
import collections
import datetime
import enum
import gzip
import io
import pathlib
import sys
import tarfile
import types
import zipfile

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from layouts import hub_state, numbers, tiny, write_safetensors

import convert
from convert import ConversionError
from convert.pickles import Inert, load_pickle, stand_in

CONFIG = tiny(depth=1)
HUB = hub_state(CONFIG, numbers(CONFIG))
TENSORS = {name: torch.tensor(array) for name, array in HUB.items()}


def holds_hub(source, **known):
    model, provenance = convert.load_described(source, **known)
    np.testing.assert_array_equal(model.norm.scale[...], HUB["norm.weight"])
    return provenance


def fails(source, *words, **known):
    with pytest.raises(ConversionError) as raised:
        convert.load(source, **known)
    message = str(raised.value)
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message
    return message


# Checkpoints of a training --------------------------------------------------------------------------------------------


class Enum(enum.Enum):
    TRAIN = "train"


class Config(dict):
    """As configuration libraries have them: a dict with attributes."""


class Plain:
    def __init__(self, **values):
        self.__dict__.update(values)


class Row(collections.UserList):
    pass


@pytest.fixture
def pretend(monkeypatch):
    """Gives an object's class the name of another library's, which is not installed here."""

    def pretend(kind, module, name):
        parts = module.split(".")
        for i in range(len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[: i + 1]), types.ModuleType(".".join(parts[: i + 1])))
        renamed = type(name, (kind,), {"__module__": module, "__qualname__": name})
        setattr(sys.modules[module], name, renamed)
        return renamed

    return pretend


def dino_training():
    """The keys of DINO's `save_on_master`."""
    args = argparse.Namespace(arch="vit_small", patch_size=16, lr=5e-4, output_dir=pathlib.PurePosixPath("out"))
    student = {f"module.backbone.{name}": tensor + 1 for name, tensor in TENSORS.items()}
    teacher = {f"backbone.{name}": tensor for name, tensor in TENSORS.items()}
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))]).state_dict()
    return {
        "student": student,
        "teacher": teacher,
        "optimizer": optimizer,
        "epoch": 3,
        "args": args,
        "dino_loss": {"center": torch.zeros(1, 8)},
        "best": np.float64(0.75),
        "rng": np.random.RandomState(0).get_state(),
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "name", ["checkpoint.pth", "checkpoint.pth.tar", "c.PTH", "c.pyth", "c.model", "c", "c.safetensors"]
)
def test_a_full_checkpoint_of_dino(tmp_path, name, zipped):
    torch.save(dino_training(), tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert holds_hub(tmp_path / name).source["branch"] == "teacher, from teacher; student not taken"
    student = convert.load(tmp_path / name, branch="student")
    np.testing.assert_array_equal(student.norm.scale[...], HUB["norm.weight"] + 1)


SETTINGS = {
    "path": pathlib.Path("somewhere"),
    "date": datetime.datetime(2025, 1, 1),
    "scalars": [np.float32(1), np.int64(2), np.bool_(True), np.str_("a")],
    "arrays": {"a": np.arange(3), "b": np.array([None, "text"], object)},
    "generator": np.random.default_rng(0).bit_generator.state,
    "default": collections.defaultdict(list, {"a": [1]}),
    "deque": collections.deque([1, 2], maxlen=3),
    "size": torch.Size([2, 3]),
    "dtype": [torch.float16, np.dtype("f4")],
    "namespace": types.SimpleNamespace(a=argparse.Namespace(b=1)),
    "types": [int, dict, frozenset([1])],
}


@pytest.mark.parametrize("what", SETTINGS)
def test_settings_beside_weights(tmp_path, what):
    torch.save({"state_dict": TENSORS, "hyper_parameters": SETTINGS[what]}, tmp_path / "some.ckpt")
    holds_hub(tmp_path / "some.ckpt")


LIBRARIES = {
    "omegaconf.dictconfig.DictConfig": Plain,
    "omegaconf.base.ContainerMetadata": Plain,
    "yacs.config.CfgNode": Config,
    "fvcore.common.config.CfgNode": Config,
    "easydict.EasyDict": Config,
    "addict.addict.Dict": Config,
    "mmengine.config.config.ConfigDict": Config,
    "mmengine.logging.history_buffer.HistoryBuffer": Plain,
    "ml_collections.config_dict.config_dict.ConfigDict": Plain,
    "lightning.fabric.utilities.data.AttributeDict": Config,
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint": Plain,
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_settings_of_libraries_that_are_not_here(tmp_path, pretend, name):
    kind = pretend(LIBRARIES[name], *name.rpartition(".")[::2])
    settings = kind(lr=1.0)
    settings.inner = kind()
    torch.save({"state_dict": TENSORS, "cfg": settings, "callbacks": {kind: 1}}, tmp_path / "some.ckpt")
    holds_hub(tmp_path / "some.ckpt")


def test_enums_of_settings(tmp_path, pretend):
    module = "lightning_utilities.core.enums"
    pretend(Plain, module, "Stage")
    kind = sys.modules[module].Stage = enum.Enum("Stage", {"TRAIN": "train"}, module=module)
    torch.save({"state_dict": TENSORS, "stage": kind.TRAIN, "of": {kind.TRAIN: 1}}, tmp_path / "some.ckpt")
    holds_hub(tmp_path / "some.ckpt")


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "f8", "f2"])
def test_weights_in_numpy_s_arrays(tmp_path, dtype, order):
    torch.save({"model": {n: np.array(a, dtype, order=order) for n, a in HUB.items()}}, tmp_path / "some.pth")
    model = convert.load(tmp_path / "some.pth", config={"heads": 1})
    np.testing.assert_array_equal(model.norm.scale[...], HUB["norm.weight"].astype(dtype).astype("f4"))
    kernel = HUB["blocks.0.mlp.fc1.weight"].astype(dtype).astype("f4")
    np.testing.assert_array_equal(model.blocks.mlp.fc1.kernel[...][0], kernel.T)


class Unknown:
    pass


def test_other_names_are_refused_with_what_to_do(tmp_path):
    for value in (Unknown(), Enum.TRAIN, Row([1]), torch.nn.Linear(2, 2), print, eval, np.load, collections.namedtuple):
        torch.save({"state_dict": TENSORS, "extra": value}, tmp_path / "some.pth")
        fails(tmp_path / "some.pth", "some.pth holds ", "not trusted", "save the state dict alone")
    torch.save({"state_dict": TENSORS, "extra": Unknown()}, tmp_path / "some.pth")
    fails(tmp_path / "some.pth", "test_files.Unknown")


def test_stand_ins_call_nothing(tmp_path):
    """Not even where the name is that of a function of Python: `getattr` looks nothing up, `type` is none of them."""

    class Reads:
        def __reduce__(self):
            return getattr, (Enum, "__class__")

    torch.save({"state_dict": TENSORS, "extra": Reads()}, tmp_path / "some.pth")
    fails(tmp_path / "some.pth", "Enum, which is not trusted")

    class Opens:
        def __reduce__(self):
            return pathlib.Path, (str(tmp_path / "made"),)

    torch.save({"extra": Opens(), "more": argparse.Namespace(a=1)}, tmp_path / "some.pth")
    content = load_pickle(tmp_path / "some.pth", mapped=True)
    assert {type(value) for value in content.values()} == {Inert}
    before = torch.serialization.get_safe_globals()
    load_pickle(tmp_path / "some.pth", mapped=True)
    assert torch.serialization.get_safe_globals() == before
    for name in ("os.system", "posix.mkdir", "builtins.eval", "builtins.exec", "builtins.__import__", "builtins.type"):
        assert stand_in(name) is None
    for name in ("argparse.Namespace.__init__", "numpy.load", "numpy.lib.npyio.load", "datetime.sys.modules"):
        assert stand_in(name) is None


def test_settings_are_no_weights(tmp_path):
    torch.save({**TENSORS, "args": argparse.Namespace(a=1)}, tmp_path / "some.pth")
    fails(tmp_path / "some.pth", "not a state dict", "'args'")
    torch.save(argparse.Namespace(a=1), tmp_path / "some.pth")
    fails(tmp_path / "some.pth", "settings alone", "state dict")


# Names of files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model", "model.pth", "model.bin", "weights.v2"])
def test_safetensors_under_any_name(tmp_path, name):
    write_safetensors(tmp_path / name, HUB)
    holds_hub(tmp_path / name)


def test_onnx_under_any_name(tmp_path):
    onnx = pytest.importorskip("onnx")
    for name in ("some.pb", "some.pth", "some"):
        tensor = onnx.numpy_helper.from_array(np.zeros((2, 2), np.float32), "weight")
        node = onnx.helper.make_node("MatMul", ["x", "weight"], ["y"])
        graph = onnx.helper.make_graph([node], "g", [], [], [tensor])
        model = onnx.helper.make_model(graph, producer_name="pytorch" if name != "some" else "")
        (tmp_path / name).write_bytes(model.SerializeToString())
        fails(tmp_path / name, "known layout", "weight")


def tarred():
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.pth"), io.BytesIO())
    return content.getvalue()


def zipped(name):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(name, b"123")
    return content.getvalue()


def arrays():
    content = io.BytesIO()
    np.savez(content, a=np.zeros(3))
    return content.getvalue()


OTHERS = {
    "Git-LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n", "git lfs pull"),
    "gzip": (gzip.compress(b"some"), "unpack it"),
    "tar archive": (tarred(), "tar xf"),
    "zip archive": (zipped("folder/model.pth"), "folder/model.pth"),
    "NumPy arrays": (arrays(), "np.load"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "PyTorch checkpoint"),
    "web page": (b"<!DOCTYPE html><html>", "download the file itself"),
    "JSON": (b'{\n  "weight_map": {}\n}', "give the folder"),
    "torch.save did not write": (b"\x80\x04K\x03.", "write it with torch.save"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".onnx", ".tar", ""])
@pytest.mark.parametrize("what", OTHERS)
def test_files_that_are_something_else(tmp_path, what, suffix):
    content, advice = OTHERS[what]
    (tmp_path / f"some{suffix}").write_bytes(content)
    fails(tmp_path / f"some{suffix}", str(tmp_path / f"some{suffix}"), what, advice)


def test_a_file_of_no_kind(tmp_path):
    for content, words in ((b"", "is empty"), (b"hello there", "starts with b'hello th'")):
        (tmp_path / "some").write_bytes(content)
        fails(tmp_path / "some", "no known kind", words, "torch.save")

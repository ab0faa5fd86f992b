"""Files that lie or attack: nothing in them runs, nothing is written, and no memory is taken that they do not fill."""

import json
import os
import pickle
import resource
import struct
import sys
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

from layouts import hub_state, numbers, tiny, write_safetensors, write_shards

import convert
from convert import ConversionError, sources
from convert.sources import _json, open_source
from convert.torchscript import tensor as rebuilt
from jaxvit import Preprocess
from jaxvit.model.params import to_params

CONFIG = tiny()
HUB = hub_state(CONFIG, numbers(CONFIG))
TENSORS = {name: torch.tensor(array) for name, array in HUB.items()}
SLACK = 300 * 2**20
"""Bytes of memory that reading a file of some KB may take, compiled code included."""


def fails(path, *words):
    """Opening and converting fail with one line, soon, and without taking memory."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(ConversionError) as raised:
        convert.load(path)
    message = str(raised.value)
    assert "\n" not in message and [word for word in words if word not in message] == [], message
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    assert taken < SLACK and time.monotonic() - start < 20
    return message


# Pickles --------------------------------------------------------------------------------------------------------------


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda payload: payload,
        lambda payload: {"model": {**TENSORS, "extra": payload}},
        lambda payload: {"teacher": TENSORS, "args": {"deep": [1, (2, {"deeper": payload})]}},
        lambda payload: {**TENSORS, payload: torch.zeros(3)},
    ],
    ids=["alone", "nested", "deep", "key"],
)
def test_payloads_do_not_run(tmp_path, zipped, wrap):
    marker = tmp_path / "ran"
    content = Payload(marker)
    torch.save(wrap(content), tmp_path / "some.pth", _use_new_zipfile_serialization=zipped)
    fails(tmp_path / "some.pth", "some.pth", "mkdir", "not trusted")
    assert not marker.exists()


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
def test_payloads_in_bare_pickles_do_not_run(tmp_path, suffix):
    path = tmp_path / f"some{suffix}"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps({"a": Payload(tmp_path / "ran")}, protocol=protocol))
        fails(path, str(path))
    assert not (tmp_path / "ran").exists()


def test_payloads_in_archives_like_torchscript_do_not_run(tmp_path):
    """Neither in a file of torch.save with code beside it, nor in one that TorchScript wrote."""
    marker = tmp_path / "ran"
    payload = pickle.dumps(Payload(marker), protocol=2)
    torch.save({**TENSORS, "extra": Payload(marker)}, tmp_path / "a.pt")
    add(tmp_path / "a.pt", {"a/constants.pkl": payload, "a/code/__torch__.py": b"import os\nos.mkdir('ran')\n"})
    fails(tmp_path / "a.pt", "a.pt is not a complete TorchScript archive")
    script(torch.nn.Linear(2, 2), tmp_path / "b.pt")
    for member in ("data.pkl", "constants.pkl", "attributes.pkl"):
        replaced(tmp_path / "b.pt", tmp_path / "c.pt", {f"b/{member}": payload})
        fails(tmp_path / "c.pt")
    assert not marker.exists()


# Archives -------------------------------------------------------------------------------------------------------------


def add(path, members, **how):
    with zipfile.ZipFile(path, "a") as archive:
        for name, content in members.items():
            archive.writestr(name, content, **how)


def replaced(source, path, members):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            if name not in members:
                new.writestr(name, old.read(name))
        for name, content in members.items():
            new.writestr(name, content)


def script(module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module).save(str(path))
    return path


class Visual(torch.nn.Module):
    """What stands in an archive as OpenAI's: numbers beside tensors."""

    def __init__(self, state, **numbers):
        super().__init__()
        for name, tensor in state.items():
            at, (*path, last) = self, name.split(".")
            for part in path:
                at.add_module(part, getattr(at, part, torch.nn.Module()))
                at = getattr(at, part)
            at.register_parameter(last, torch.nn.Parameter(tensor))
        for name, number in numbers.items():
            self.register_buffer(name, torch.tensor(number))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def clip_state(prefix="visual."):
    """An image encoder of CLIP under OpenAI's names: 2 blocks of width 64, patches of 4 pixels on a grid of 4 x 4."""
    draw = torch.Generator().manual_seed(0)
    shapes = {
        "class_embedding": (64,),
        "positional_embedding": (17, 64),
        "proj": (64, 24),
        "conv1.weight": (64, 3, 4, 4),
    }
    shapes |= {f"{norm}.{kind}": (64,) for norm in ("ln_pre", "ln_post") for kind in ("weight", "bias")}
    for i in range(2):
        at = f"transformer.resblocks.{i}"
        shapes |= {f"{at}.{norm}.{kind}": (64,) for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")}
        linears = {"attn.out_proj": (64, 64), "mlp.c_fc": (128, 64), "mlp.c_proj": (64, 128)}
        shapes |= {f"{at}.attn.in_proj_weight": (192, 64), f"{at}.attn.in_proj_bias": (192,)}
        for name, shape in linears.items():
            shapes |= {f"{at}.{name}.weight": shape, f"{at}.{name}.bias": shape[:1]}
    return {prefix + name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def same(a, b):
    assert a.config == b.config
    ours, theirs = to_params(a), to_params(b)
    for name, array in theirs.items():
        np.testing.assert_array_equal(np.asarray(ours[name]), np.asarray(array), err_msg=name, strict=True)


def test_openai_archives(tmp_path):
    """TorchScript, in half precision, with three numbers beside the tensors that tell its activation."""
    state = {name: tensor.half() for name, tensor in clip_state().items()}
    about = dict(input_resolution=16, context_length=77, vocab_size=100)
    model = convert.load(script(Visual(state, **about), tmp_path / "ViT.pt"))
    assert model.config.mlp == "quick_gelu" and model.config.projection == 24
    same(model, convert.load(state, config={"mlp": "quick_gelu"}))


def test_torchscript_is_not_run(tmp_path, monkeypatch):
    """Not a line of its code, which torch.jit.load compiles and in part runs."""
    state = {name: tensor.half() for name, tensor in clip_state().items()}
    path = script(Visual(state, input_resolution=16, context_length=77, vocab_size=100), tmp_path / "ViT.pt")
    whole = convert.load(path)
    with zipfile.ZipFile(path) as archive:
        code = {name: b"def f(:" for name in archive.namelist() if "/code/" in name}
    assert code
    replaced(path, tmp_path / "b.pt", code)
    monkeypatch.setattr(torch.jit, "load", None)
    same(convert.load(tmp_path / "b.pt"), whole)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_in_torchscript_do_not_run(tmp_path, protocol):
    marker = tmp_path / "ran"
    script(torch.nn.Linear(2, 2), tmp_path / "b.pt")
    for content in (Payload(marker), {"a": Payload(marker)}, [eval], getattr):
        payload = pickle.dumps(content, protocol=protocol)
        replaced(tmp_path / "b.pt", tmp_path / "c.pt", {"b/data.pkl": payload})
        fails(tmp_path / "c.pt", "c.pt is not a complete TorchScript archive", "not trusted")
    assert not marker.exists()


@pytest.mark.parametrize(
    "offset, size, stride", [(5, (2,), (1,)), (0, (7,), (1,)), (-1, (2,), (1,)), (0, (2,), (-1,)), (0, (99,), (0,))]
)
def test_tensors_stay_within_their_storage(offset, size, stride):
    with pytest.raises(ValueError, match="tensor"):
        rebuilt(np.zeros(6, np.float32), offset, size, stride)
    np.testing.assert_array_equal(rebuilt(np.arange(6), 1, (2, 2), (1, 2)), [[1, 3], [2, 4]])


def test_configs_are_utf_8(tmp_path):
    assert _json_of(tmp_path, '{"name": "é"}'.encode()) == {"name": "é"}
    with pytest.raises(ConversionError, match="is not JSON"):
        _json_of(tmp_path, '{"name": "é"}'.encode("latin-1"))


def _json_of(folder, content):
    (folder / "config.json").write_bytes(content)
    return _json(folder / "config.json")


def test_torchscript_of_other_things(tmp_path):
    fails(script(torch.nn.Linear(2, 2), tmp_path / "some.pt"), "known layout", "weight, bias")
    whole = (tmp_path / "some.pt").read_bytes()
    for size in (100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        fails(tmp_path / "cut.pt", "cut.pt is not a complete")


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil-of-jaxvit", "a/../../evil", "..\\evil"])
def test_archives_write_nothing(tmp_path, name):
    """They are read in place, whatever the names in them."""
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    torch.save(TENSORS, folder / "some.pth")
    add(folder / "some.pth", {name: b"evil"})
    with zipfile.ZipFile(folder / "evil.pt", "w") as archive:
        archive.writestr(name, b"evil")
    fails(folder / "some.pth", "some.pth is not a complete PyTorch file")
    torch.save(TENSORS, folder / "some.pth")
    add(folder / "some.pth", {f"some/{name}": b"evil"})
    convert.load(folder / "some.pth")
    fails(folder / "evil.pt", "evil.pt is not a complete PyTorch file")
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"some.pth", "evil.pt"}
    assert not Path("/tmp/evil-of-jaxvit").exists()


# Sizes ----------------------------------------------------------------------------------------------------------------


def header(path, entries, length=None, data=b""):
    """A safetensors file by hand."""
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


HUGE = 2**40


@pytest.mark.parametrize("length", [HUGE, 2**63, 2**64 - 1, 99_000_000])
def test_safetensors_with_a_huge_header(tmp_path, length):
    fails(header(tmp_path / "some.safetensors", {}, length), "some.safetensors is not a complete safetensors file")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [HUGE], "data_offsets": [0, 4 * HUGE]},
        {"dtype": "F32", "shape": [HUGE], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
    ],
    ids=str,
)
def test_safetensors_that_claim_more(tmp_path, entry):
    path = header(tmp_path / "some.safetensors", {"cls_token": entry}, data=bytes(16))
    fails(path, "some.safetensors is not a complete safetensors file")


def test_sizes_that_no_byte_stands_for(tmp_path):
    """A tensor without elements may have any other side; two small ones may multiply to anything."""
    wide = {"patch_embed.proj.weight": torch.zeros(2**40, 0, 14, 14)}
    path = tmp_path / "some.pth"
    torch.save(TENSORS | wide, path)
    fails(path, "channels must be at least 1, not 0")
    torch.save(TENSORS | {"register_tokens": torch.zeros(1, 2**40, 0)}, path)
    fails(path, "registers 1099511627776", "parameters")
    sizes = {"patch_embed.proj.weight": np.zeros((10**6, 1, 1, 1)), "blocks.0.mlp.fc2.weight": np.zeros((1, 10**6))}
    fails(HUB | sizes, "width 1000000, hidden 1000000", "parameters")


def test_bombs(tmp_path):
    """A megabyte that claims to be a gigabyte, and a member that only says so."""
    path = tmp_path / "bomb.pth"
    torch.save(TENSORS, path)
    add(path, {"bomb/data/900": bytes(2**28)}, compress_type=zipfile.ZIP_DEFLATED)
    fails(path, "bomb.pth claims to hold", "torch.save")
    torch.save(TENSORS, path)
    content = bytearray(path.read_bytes())
    at = content.rfind(b"PK\x01\x02")  # the last entry of the directory: its sizes stand at 20 and 24
    content[at + 20 : at + 28] = struct.pack("<II", 2**32 - 2, 2**32 - 2)
    path.write_bytes(content)
    fails(path, "bomb.pth claims to hold")


@pytest.mark.parametrize("zipped", [True, False])
def test_storages_that_claim_more(tmp_path, zipped):
    """A storage of a trillion numbers, in a file of some KB."""
    path = tmp_path / "some.pth"
    torch.save({"cls_token": torch.arange(7777.0)}, path, _use_new_zipfile_serialization=zipped)
    few, many = b"M" + struct.pack("<H", 7777), b"\x8a\x06" + struct.pack("<Q", HUGE)[:6]  # pickle's integers
    if zipped:
        with zipfile.ZipFile(path) as archive:
            content = archive.read("some/data.pkl")
        assert content.count(few) == 2  # of the storage, and of the tensor
        replaced(path, tmp_path / "more.pth", {"some/data.pkl": content.replace(few, many)})
    else:
        content = path.read_bytes()
        assert content.count(few) == 2
        (tmp_path / "more.pth").write_bytes(content.replace(few, many))
    fails(tmp_path / "more.pth", "more.pth is not a complete PyTorch file")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_that_repeat_one_number(tmp_path, zipped, dtype):
    """Strides of 0: a view of a trillion numbers."""
    path = tmp_path / "some.pth"
    wide = {"pos_embed": torch.zeros(1, dtype=dtype).expand(1, 2**20, 2**20)}
    torch.save(TENSORS | wide, path, _use_new_zipfile_serialization=zipped)
    fails(path, "these tensors claim more: pos_embed")


def test_objects_that_claim_more(tmp_path):
    """Strings and bytes of a pickle that are longer than the file."""
    for opcode in (b"X" + struct.pack("<I", 2**32 - 1), b"\x8d" + struct.pack("<Q", HUGE), b"B" + b"\xff\xff\xff\x7f"):
        (tmp_path / "some.pth").write_bytes(b"\x80\x04" + opcode + b"short")
        fails(tmp_path / "some.pth", "some.pth")


def test_shards_elsewhere(tmp_path):
    """The files that an index names stand beside it."""
    write_safetensors(tmp_path / "secret.safetensors", HUB)
    write_shards(tmp_path / "model", HUB)
    index = tmp_path / "model" / "model.safetensors.index.json"
    for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors")):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(HUB, name)}))
        fails(tmp_path / "model", "outside its folder", name)


# OpenCLIP -------------------------------------------------------------------------------------------------------------

VISION = {"layers": 2, "width": 64, "patch_size": 4, "image_size": 16}
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]


def open_clip(folder, state, vision=VISION, file="open_clip_model.safetensors", **model):
    text = {"text_projection": torch.zeros(8, 24), "transformer.resblocks.0.ln_1.weight": torch.zeros(8)}
    text |= {"logit_scale": torch.tensor(1.0), "token_embedding.weight": torch.zeros(9, 8)}
    if file.endswith(".bin"):
        torch.save(state | text, folder / file)
    else:
        write_safetensors(folder / file, {name: tensor.numpy() for name, tensor in (state | text).items()})
    cfg = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": {}, **model}
    about = {"model_cfg": cfg, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize("file", sources.OPEN_CLIP)
def test_open_clip_folders(tmp_path, file):
    config = convert.load(open_clip(tmp_path, clip_state(), file=file)).config
    assert (config.mlp, config.heads, config.eps) == ("gelu", 1, 1e-5)
    assert config.preprocess == Preprocess(16, 16, tuple(MEAN), tuple(STD), margin="round")


@pytest.mark.parametrize(
    "vision, model, wanted",
    [
        ({}, {"quick_gelu": True}, {"mlp": "quick_gelu", "heads": 1}),
        ({"head_width": 16}, {}, {"mlp": "gelu", "heads": 4}),
        ({"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-6}}, {}, {"mlp": "gelu_tanh", "eps": 1e-6}),
    ],
    ids=str,
)
def test_what_an_open_clip_config_tells(tmp_path, vision, model, wanted):
    hints = open_source(open_clip(tmp_path, clip_state(), VISION | vision, **model)).hints
    assert {name: hints[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    "vision, words",
    [
        ({"pool_type": "avg"}, ["pooling"]),
        ({"attentional_pool": True}, ["pooling"]),
        ({"final_ln_after_pool": True}, ["pooling"]),
        ({"width": None}, ["makes no sense"]),
        ({"head_width": 0}, ["makes no sense"]),
        ({"image_size": "large"}, ["makes no sense"]),
        ({"width": 192}, ["multiple of the number of heads, 3"]),
    ],
    ids=str,
)
def test_open_clip_configs_that_do_not_fit(tmp_path, vision, words):
    fails(open_clip(tmp_path, clip_state(), VISION | vision), *words)


def test_open_clip_around_timm(tmp_path, monkeypatch):
    """The image side may be timm's, which brings its own names and its own facts."""
    from timm.models.vision_transformer import VisionTransformer

    sizes = dict(img_size=16, patch_size=4, embed_dim=64, depth=2, num_heads=2, num_classes=0)
    module = VisionTransformer(**sizes, class_token=False, global_pool="map", act_layer="gelu_tanh")
    facts = dict(library="timm", heads=2, mlp="gelu_tanh", eps=1e-6, pool="mean", final_norm="tokens")
    monkeypatch.setattr(sources, "architecture_hints", {"vit_tiny_siglip": facts}.get)
    state = {f"visual.trunk.{name}": tensor for name, tensor in module.state_dict().items()}
    vision = {"timm_model_name": "vit_tiny_siglip", "timm_pool": "map", "timm_proj": "none", "image_size": 16}
    config = convert.load(open_clip(tmp_path, state | {"logit_bias": torch.zeros(1)}, vision)).config
    assert (config.heads, config.mlp, config.pool) == (2, "gelu_tanh", "attention")
    assert config.preprocess == Preprocess(16, 16, tuple(MEAN), tuple(STD), margin="round")
    fails(open_clip(tmp_path, state | {"visual.head.proj.weight": torch.zeros(24, 64)}, vision), "visual.head.proj")

"""The converter's command line: what it writes, what it says, and that every failure is one line and leaves nothing."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

from layouts import expected, hub_state, numbers, timm_state, tiny, transformers_state, write_safetensors, write_shards

import convert
import jaxvit
from benchmarks.originals import randomise
from convert.__main__ import main
from convert.verify import Size, verify, verify_folder
from jaxvit.model.params import from_params, to_params

ROOT = Path(__file__).parents[1]
CONFIG = tiny(registers=4, depth=1)
NUMBERS = numbers(CONFIG)
HUB = hub_state(CONFIG, NUMBERS)


@pytest.fixture
def source(tmp_path):
    return write_safetensors(tmp_path / "sources" / "some.safetensors", HUB)


@pytest.fixture
def dest(tmp_path):
    """A folder that does not exist, in one that is empty."""
    (tmp_path / "models").mkdir()
    return tmp_path / "models" / "tiny"


@pytest.fixture
def succeeds(capsys):
    def run(*arguments):
        assert main([*map(str, arguments)]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def fails(capsys):
    def run(*arguments, words=()):
        """Exits with 1, after one line on stderr in which all these words stand, and nothing on stdout."""
        assert main([*map(str, arguments)]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
        assert [word for word in words if str(word) not in err] == [], err
        return err

    return run


@pytest.fixture
def usage(capsys):
    def run(*arguments, words=()):
        """Exits with 2 and argparse's usage, in which all these words stand."""
        with pytest.raises(SystemExit) as raised:
            main([*map(str, arguments)])
        assert raised.value.code == 2
        err = capsys.readouterr().err
        assert [word for word in ("usage: ", *words) if word not in err] == [], err

    return run


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_holds(folder, n, dtype=np.float32):
    params = to_params(jaxvit.load(folder))
    for name, array in expected(CONFIG, n).items():
        np.testing.assert_array_equal(np.asarray(params[name]), array.astype(dtype), err_msg=name)


def state_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Converting -----------------------------------------------------------------------------------------------------------


def test_converts(source, dest, succeeds):
    out = succeeds(source, dest)
    words = "1 blocks of width 64, 1 heads, gelu MLP, 4 registers, patches of 14 px, a grid of 4x4"
    assert out == f"wrote {dest}\n{words}\nimages: {jaxvit.Preprocess().in_words()}\n{jaxvit.describe(dest)}\n"
    assert names(dest) == ["config.json", "model.safetensors"]
    assert names(dest.parent) == ["tiny"]
    assert_holds(dest, NUMBERS)
    about = json.loads((dest / "config.json").read_text())["provenance"]["source"]
    assert about["layout"] == "dinov2/hub"
    assert about["sha256"] == {source.name: hashlib.sha256(source.read_bytes()).hexdigest()}
    assert set(about["versions"]) == {"jaxvit", "jax", "flax"} and about["versions"]["jax"] == jax.__version__


def test_as_a_command(source, dest, tmp_path):
    """A Python of its own, without torch where safetensors are read, and quiet about everything else."""

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-W", "error", "-m", "convert", *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )

    done = run(source, dest)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(f"wrote {dest}")
    done = run(tmp_path / "gone.pth", tmp_path / "other")
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "gone.pth" in done.stderr


@pytest.mark.parametrize("command", [["--help"], ["verify", "--help"]], ids=" ".join)
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as raised:
        main(command)
    assert raised.value.code == 0
    out = capsys.readouterr().out
    wanted = {
        1: ("hub id", "facebook/dinov2", "verify", ".pth", ".safetensors", "ONNX", "--overwrite", "--resampling"),
        2: ("ORIGINAL", "parity.json", "--sizes", "float64", "Exits 1"),
    }[len(command)]
    assert [word for word in (*wanted, f"jaxvit {command[0]}".replace("--help", "convert")) if word not in out] == []


def test_no_arguments(usage):
    usage(words=["SOURCE", "DEST"])
    usage("verify", words=["DEST", "ORIGINAL"])


def test_dtype(source, dest, succeeds, usage):
    succeeds(source, dest, "--dtype", "bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(jaxvit.load(dest))} == {"bfloat16"}
    assert_holds(dest, NUMBERS, jax.numpy.bfloat16)
    usage(source, dest, "--dtype", "int8", words=["int8", "bfloat16"])
    usage(source, dest, "--dtype", "bfloat16", "--verify", words=["--verify", "--dtype"])


def test_resampling(source, dest, succeeds, usage):
    succeeds(source, dest)
    assert jaxvit.read_config(dest)[0].resampling == "bicubic_antialias"
    succeeds(source, dest, "--overwrite", "--resampling", "bicubic_offset")
    assert jaxvit.read_config(dest)[0].resampling == "bicubic_offset"
    usage(source, dest, "--resampling", "nearest", words=["nearest", "bicubic_antialias"])


def test_folders(tmp_path, dest, succeeds):
    folder = write_shards(tmp_path / "shards", transformers_state(CONFIG, NUMBERS))
    succeeds(folder, dest)
    assert_holds(dest, NUMBERS)
    about = jaxvit.read_config(dest)[1]
    assert about["kind"] == "folder" and set(about["sha256"]) == {path.name for path in folder.glob("*.safetensors")}


# DEST -----------------------------------------------------------------------------------------------------------------


def test_existing_model(tmp_path, source, dest, succeeds, fails):
    succeeds(source, dest)
    before = state_of(dest)
    fails(source, dest, words=[dest, "already holds a model"])
    assert state_of(dest) == before
    other = numbers(CONFIG, seed=1)
    succeeds(write_safetensors(tmp_path / "other.safetensors", hub_state(CONFIG, other)), dest, "--overwrite")
    assert_holds(dest, other)
    assert names(dest.parent) == ["tiny"]


def test_failed_overwrite_keeps_the_model(tmp_path, source, dest, succeeds, fails):
    succeeds(source, dest)
    before = state_of(dest)
    fails(write_safetensors(tmp_path / "bad.safetensors", {"a": np.zeros(3)}), dest, "--overwrite")
    assert state_of(dest) == before and names(dest.parent) == ["tiny"]


def test_folder_of_something_else(source, dest, fails):
    dest.mkdir()
    (dest / "thesis.tex").write_text("years of work")
    for options in ([], ["--overwrite"]):
        fails(source, dest, *options, words=[dest, "not a jaxvit model"])
    assert state_of(dest) == {"thesis.tex": b"years of work"}


def test_unwritable_dest(tmp_path, source, fails):
    (tmp_path / "file").write_text("text")
    for dest in (tmp_path / "file" / "model", tmp_path / "file" / "deep" / "model"):
        fails(source, dest, words=[dest, "cannot write"])
    fails(source, tmp_path / "file", words=[tmp_path / "file", "not a jaxvit model"])
    assert (tmp_path / "file").read_text() == "text"
    assert names(tmp_path) == ["file", "sources"]


def test_empty_folder(source, dest, succeeds):
    dest.mkdir()
    succeeds(source, dest)
    assert_holds(dest, NUMBERS)


# Errors ---------------------------------------------------------------------------------------------------------------


def without(state, *dropped):
    return {name: array for name, array in state.items() if name not in dropped}


def damaged(folder):
    """Name -> (a source that does not convert, words of the error)."""
    folder.mkdir()

    def raw(name, content):
        (folder / name).write_bytes(content)
        return folder / name

    def tensors(name, state):
        return write_safetensors(folder / f"{name}.safetensors", state)

    def pickled(name, content):
        torch.save(content, folder / name)
        return folder / name

    whole = tensors("whole", HUB).read_bytes()
    empty = folder / "empty"
    empty.mkdir()
    shards = write_shards(folder / "shards", transformers_state(CONFIG, NUMBERS))
    (shards / "model-00002-of-00002.safetensors").unlink()
    index = folder / "index"
    index.mkdir()
    (index / "model.safetensors.index.json").write_text("no json\nat all")
    act = folder / "act"
    write_safetensors(act / "model.safetensors", transformers_state(CONFIG, NUMBERS))
    (act / "config.json").write_text(json.dumps({"model_type": "dinov2", "hidden_act": "relu"}))
    nan = HUB | {"norm.bias": np.full(64, np.nan, np.float32)}
    missing = ("blocks.0.norm1.weight", "norm.bias")
    both = without(HUB, *missing) | {"extra.weight": np.zeros(3, np.float32), "norm.weight": np.zeros(3, np.float32)}
    return {
        "no such file": (folder / "gone.safetensors", ["gone.safetensors"]),
        "unknown suffix": (raw("some.txt", b"text"), ["some.txt", "known kind"]),
        "zero bytes": (raw("zero.pth", b""), ["zero.pth"]),
        "text": (raw("text.pth", b"hello\nthere\n" * 50), ["text.pth"]),
        "cut .safetensors": (raw("cut.safetensors", whole[:-1]), ["cut.safetensors", "not a complete"]),
        "cut .pth": (raw("cut.pth", pickled("w.pth", {"a": torch.zeros(99)}).read_bytes()[:-200]), ["cut.pth"]),
        "cut .onnx": (raw("cut.onnx", b"\x08\x0a\x3a\xff\xff\x03only the start"), ["cut.onnx"]),
        "list": (pickled("list.pth", [1]), ["list", "state dict"]),
        "module": (pickled("module.pth", torch.nn.Linear(2, 2)), ["Linear", "not trusted"]),
        "no tensors": (tensors("none", {}), ["no tensors"]),
        "another model": (tensors("resnet", {"conv1.weight": np.zeros((2, 2))}), ["known layout", "conv1.weight"]),
        "several offenders": (tensors("both", both), [*missing, "extra.weight", "norm.weight"]),
        "not a number": (tensors("nan", nan), ["norm.bias", "NaN"]),
        "empty folder": (empty, ["model.safetensors"]),
        "missing shard": (shards, ["model-00002-of-00002.safetensors"]),
        "broken index": (index, ["index.json", "not JSON"]),
        "activation": (act, ["relu", "gelu"]),
        "newline": (tensors("newline", HUB | {"a\nb": np.zeros(3, np.float32)}), ["a b is not expected"]),
        "hub id": ("a..b/c--d", ["a..b/c--d", "hub"]),
    }


def test_errors(tmp_path, dest, fails):
    for source, words in damaged(tmp_path / "damaged").values():
        fails(source, dest, words=words)
        assert names(dest.parent) == [], source


# Verifying ------------------------------------------------------------------------------------------------------------


def test_verify(tmp_path, source, dest, succeeds, capsys):
    small = "14x28"
    succeeds(source, dest)
    out = succeeds("verify", dest, source, "--sizes", small)
    equal = (
        "equal within the limits, if the assumptions hold: heads 1 (width / 64), grid 4x4 (a square of 16 positions)"
    )
    assert small in out and f"{equal}; wrote {dest / 'parity.json'}" in out and "NOT" not in out
    assert names(dest) == ["config.json", "model.safetensors", "parity.json"]
    parity = json.loads((dest / "parity.json").read_text())
    assert parity["passed"] is True and "timm" in parity["original"]
    assert parity["sha256"] == {
        "model.safetensors": hashlib.sha256((dest / "model.safetensors").read_bytes()).hexdigest()
    }
    assert parity["sha256 of the original"] == {source.name: hashlib.sha256(source.read_bytes()).hexdigest()}
    assert {"jax", "torch", "timm", "transformers"} <= set(parity["versions"])
    assert set(parity["sizes"]) == {small}
    measured = parity["sizes"][small]
    assert measured["worst float64"] == max(max(layers) for layers in measured["float64"].values()) < 1e-10
    assert measured["worst float32 ratio"] <= 2
    assert len(measured["float32"]["resid_post"]) == CONFIG.depth
    assert set(measured["float32"]) == set(measured["float64"]) == set(measured["float32 of the original"])
    shown = succeeds("show", dest)
    config = jaxvit.load(dest).config
    assert shown == f"{config.in_words()}\nimages: {config.preprocess.in_words()}\n{jaxvit.describe(dest)}\n"
    # Prepared images are what both models get: a wrong preparation passes, so the last line says it.
    assert out.endswith(f"{shown}{equal}; wrote {dest / 'parity.json'}\nnot compared: how photographs are prepared\n")
    for word in ("parity: equal", small, f"{measured['worst float64']:.1e}", parity["original"], source.name):
        assert word in shown

    changed = {name: array.copy() for name, array in HUB.items()}
    changed["blocks.0.mlp.fc2.weight"][3, 5] += 1e-3
    other = write_safetensors(tmp_path / "other.safetensors", changed)
    assert main(["verify", str(dest), str(other), "--sizes", small]) == 1
    out, err = capsys.readouterr()
    assert "NOT EQUAL within the limits" in out and "Traceback" not in err
    assert json.loads((dest / "parity.json").read_text())["passed"] is False


LIVE = {
    "timm of one size": lambda: timm.create_model("vit_tiny_patch16_224", img_size=48, depth=1, num_classes=3),
    "timm": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=48, depth=1, num_classes=3, dynamic_img_size=True
    ),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**HUGGING)),
    "dinov3": lambda: transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(**HUGGING, intermediate_size=64, num_register_tokens=2)
    ),
    "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**HUGGING, intermediate_size=64)),
}
HUGGING = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=16)


@pytest.mark.parametrize("name", LIVE)
def test_a_live_module_is_an_original(name, dest):
    """As it was built: with the attention that its library chose, and images of the sizes that it takes."""
    module = randomise(LIVE[name]())
    comparisons = verify(convert.load(module), module)
    fixed = name == "timm of one size"
    assert [*comparisons][:1] == ["48x48" if fixed or name == "timm" else "224x224" if name == "dinov3" else "64x64"]
    assert len(comparisons) == (1 if fixed else 3)
    # In models so small, the quotient of two float32 errors is a matter of luck.
    assert all(comparison.worst64() <= 1e-10 for comparison in comparisons.values())
    if fixed:
        convert.convert(module, dest)
        verify_folder(dest, module)
        assert jaxvit.describe(dest).parity["sizes"].keys() == {"48x48"}
        with pytest.raises(
            convert.ConversionError, match=r"takes images of 48x48 alone, not 32x48: .*dynamic_img_size"
        ):
            verify_folder(dest, module, [Size(32, 48)])


def test_verify_takes_what_load_takes(source):
    model = convert.load(source)
    assert verify(model, source, [Size(28, 28)])["28x28"].worst64() <= 1e-10
    with pytest.raises(convert.ConversionError, match="different models: depth 1 and 2"):
        verify(model, hub_state(tiny(registers=4), numbers(tiny(registers=4))))


def test_verify_a_folder_without_the_mask_token(tmp_path, source, dest, succeeds):
    """Releases that did not keep it wrote such folders; nothing that is compared depends on it."""
    model = convert.load(source)
    params = {name: array for name, array in to_params(model).items() if name != "mask_token"}
    jaxvit.save(from_params(replace(model.config, mask_token=False), params), dest)
    assert "equal within the limits" in succeeds("verify", dest, source, "--sizes", "28x28")


def test_verify_what_cannot_be_compared(tmp_path, source, dest, succeeds, fails, usage):
    succeeds(source, dest)
    for size in ("15x28", "0x14"):
        fails("verify", dest, source, "--sizes", size, words=[size, "multiples of the patch size 14"])
    for size in ("14", "14x14x3", "axb", "14,14"):
        usage("verify", dest, source, "--sizes", size, words=[size, "HEIGHTxWIDTH"])
    deep = tiny(depth=2)
    deeper = write_safetensors(tmp_path / "deeper.safetensors", timm_state(deep, numbers(deep)))
    fails("verify", dest, deeper, words=["different models", "depth 1 and 2", "registers 4 and 0"])
    fails("verify", dest, tmp_path / "gone.pth", words=["gone.pth"])
    fails("verify", tmp_path / "gone", source, words=["gone"])
    broken = write_safetensors(tmp_path / "broken.safetensors", without(HUB, "blocks.0.norm1.weight"))
    fails("verify", dest, broken, words=["blocks.0.norm1.weight"])
    assert names(dest) == ["config.json", "model.safetensors"]


def test_convert_and_verify(source, dest, capsys, monkeypatch):
    monkeypatch.setattr("convert.verify.default_sizes", lambda model: [Size(14, 14)])  # of three, which take longer
    assert main([str(source), str(dest), "--verify"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"wrote {dest}") and "equal within the limits" in out
    sizes = json.loads((dest / "parity.json").read_text())["sizes"]
    assert set(sizes) == {"14x14"} and "comparing at 14x14 with timm" in err


# Showing, listing, exporting ------------------------------------------------------------------------------------------


def test_show(source, dest, succeeds, fails, usage):
    succeeds(source, dest)
    shown = succeeds("show", dest)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    for words in (
        "1 blocks of width 64",
        "4 registers",
        f"sha256 {digest}",
        "layout dinov2/hub",
        "parity: not verified",
    ):
        assert words in shown
    fails("show", dest / "nothing", words=["nothing"])
    (dest / "parity.json").write_text('{"passed": true}')
    fails("show", dest, words=["parity.json", "not a certificate"])
    usage("show")


def test_what_was_changed_is_shown(tmp_path, source, dest, succeeds):
    succeeds(source, dest)
    model, provenance = jaxvit.load(dest, described=True)
    jaxvit.save(jaxvit.add_registers(model), tmp_path / "wider", provenance)
    shown = succeeds("show", tmp_path / "wider")
    assert "5 registers" in shown and "modified since: the weights are not the ones this source gave" in shown
    assert f"{source.name}: sha256" in shown and "parity: not verified" in shown
    (dest / "model.safetensors").write_bytes((tmp_path / "wider" / "model.safetensors").read_bytes())
    assert "modified since: model.safetensors is not the file that was saved here" in succeeds("show", dest)


def test_list(succeeds):
    lines = succeeds("list").splitlines()
    for words in (
        ("DINOv2", "S/14", "22 M", "0.09 GB", "Apache-2.0", "facebook/dinov2-small", "dinov2_vits14_pretrain.pth"),
        ("DINOv2", "g/14", "1136 M", "4.55 GB", "facebook/dinov2-giant"),
        ("DINOv3", "7B/16", "6716 M", "DINOv3 License", "facebook/dinov3-vit7b16-pretrain-lvd1689m"),
        ("DeiT III", "H/14", "632 M", "timm/deit3_huge_patch14_224.fb_in1k"),
        ("CLIP", "B/32", "88 M", "MIT", "openai/clip-vit-base-patch32", "ViT-B-32.pt"),
        ("DINO", "S/8", "22 M", "timm/vit_small_patch8_224.dino"),
        ("iBOT", "L/16", "303 M"),
    ):
        assert any(all(word in line for word in words) for line in lines), words


def test_export(tmp_path, source, dest, succeeds, fails, usage):
    succeeds(source, dest)
    file = tmp_path / "back.safetensors"
    assert str(file) in succeeds("export", dest, file, "--layout", "timm")
    assert_same_numbers(convert.load(file), jaxvit.load(dest))
    fails("export", dest, file, "--layout", "timm", words=[file, "exists"])
    succeeds("export", dest, file, "--layout", "hub", "--overwrite")
    fails("export", tmp_path / "gone", file, "--layout", "hub", words=["gone"])
    usage("export", dest, file, words=["--layout"])
    usage("export", dest, file, "--layout", "onnx", words=["timm", "transformers", "hub"])


def assert_same_numbers(a, b):
    for name, array in to_params(a).items():
        np.testing.assert_array_equal(array, to_params(b)[name], err_msg=name)


def test_what_no_file_tells(tmp_path, dest, succeeds, fails, usage):
    clip = {"norm_pre.weight": np.ones(64, np.float32), "norm_pre.bias": np.zeros(64, np.float32)}
    bare = write_safetensors(
        tmp_path / "bare.safetensors", without(timm_state(CONFIG, NUMBERS), "patch_embed.proj.bias") | clip
    )
    fails(bare, dest, words=["activation", "--architecture"])
    fails(bare, dest, "--architecture", "resnet50", words=["resnet50", "none of timm's"])
    fails(bare, dest, "--set", "heads=1", "--set", "colour=red", words=["colour", "mlp"])
    usage(bare, dest, "--set", "heads", words=["FIELD=VALUE"])
    succeeds(bare, dest, "--set", "heads=1", "--set", "mlp=quick_gelu", "--set", "eps=1e-5")
    config = jaxvit.load(dest).config
    assert (config.heads, config.mlp, config.eps, config.pre_norm) == (1, "quick_gelu", 1e-5, True)
    assert "config given: {'heads': 1" in succeeds("show", dest)
    fails(bare, dest, "--set", "heads=1", "--branch", "student", "--overwrite", words=["no student"])

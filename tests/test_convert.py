"""Conversion: from every layout and every kind of source to the same bits, or one error that names every offender."""

import hashlib
import io
import json
import os
import subprocess
import sys
import textwrap
import types
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import (
    WRITERS,
    expected,
    hub_state,
    numbers,
    timm_state,
    tiny,
    transformers_json,
    transformers_state,
    write_safetensors,
    write_shards,
)
from safetensors.numpy import load_file

import convert
import jaxvit
from convert import LAYOUTS, ConversionError
from convert.__main__ import main
from convert.engine import Layout, check_table, convert_tensors, copy
from convert.originals import build_timm, build_transformers
from convert.sources import Source
from jaxvit.io.embedded import MODEL_SHA256, model_file, photographs
from jaxvit.model.params import from_params, to_params

ROOT = Path(__file__).parents[1]
FAMILIES = {f"{mlp}-{registers}": tiny(mlp, registers) for mlp in ("gelu", "swiglu") for registers in (0, 4)}
RESAMPLING = {
    ("dinov2/hub", False): "bicubic_offset",
    ("dinov2/hub", True): "bicubic_antialias",
    ("timm", False): "bicubic_antialias",
    ("timm", True): "bicubic_antialias",
    ("dinov2/transformers", False): "bicubic",
    ("dinov2/transformers", True): "bicubic_antialias",
}
RECOGNISED = ("depth", "width", "heads", "hidden", "mlp", "registers", "patch", "grid", "eps")

CONFIG = FAMILIES["gelu-4"]
NUMBERS = numbers(CONFIG)
HUB = hub_state(CONFIG, NUMBERS)


@pytest.fixture(params=FAMILIES, scope="module")
def family(request):
    config = FAMILIES[request.param]
    return config, numbers(config)


@pytest.fixture(params=WRITERS)
def layout(request):
    return request.param


def tensors(state):
    return {name: torch.tensor(array) for name, array in state.items()}


def assert_holds(model, config, n, dtype=np.float32):
    """The model's parameters are these numbers, to the last bit, and its sizes are the config's."""
    params, wanted = to_params(model), expected(replace(config, mask_token=model.config.mask_token), n)
    assert set(params) == set(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(np.asarray(params[name]), array.astype(dtype), err_msg=name, strict=True)
    assert {name: getattr(model.config, name) for name in RECOGNISED} == {
        name: getattr(config, name) for name in RECOGNISED
    }


def fails(source, *words, **arguments):
    """Conversion fails with one message of one line, in which all these words stand."""
    with pytest.raises(ConversionError) as raised:
        convert.load(source, **arguments)
    message = str(raised.value)
    assert [word for word in words if word not in message] == []
    assert "\n" not in message and message.strip()
    return message


# Tables and layouts ---------------------------------------------------------------------------------------------------


def test_tables_are_total(family):
    config, n = family
    for one in LAYOUTS:
        if one.name in WRITERS:
            check_table(one, config, WRITERS[one.name](config, n))


@pytest.mark.parametrize("change", ["not set", "unknown", "twice"])
def test_check_table_finds_what_is_wrong(change):
    good = LAYOUTS[0]
    rules = {
        "not set": lambda c, t: good.rules(c, t)[1:],
        "unknown": lambda c, t: [*good.rules(c, t), copy("a", "b")],
        "twice": lambda c, t: [*good.rules(c, t), copy("a", "norm.bias")],
    }[change]
    with pytest.raises(ConversionError, match=change):
        check_table(Layout(good.name, good.anchors, good.config, rules), CONFIG, HUB)


def test_writers_write_what_the_libraries_read(family, tmp_path):
    """timm takes its state, and the hub's by its own filter; transformers' file has exactly these names and shapes."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    config, n = family
    module = build_timm(config, positioned=not config.registers)
    module.load_state_dict(tensors(timm_state(config, n)), strict=True)
    filtered = checkpoint_filter_fn(tensors(hub_state(config, n)), build_timm(config, not config.registers))
    assert set(filtered) == set(module.state_dict())
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, filtered[name]), name

    build_transformers(config).save_pretrained(tmp_path)
    theirs = {name: array.shape for name, array in load_file(tmp_path / "model.safetensors").items()}
    assert {name: array.shape for name, array in transformers_state(config, n).items()} == theirs


def test_layouts(family, layout):
    config, n = family
    model = convert.load(WRITERS[layout](config, n))
    assert_holds(model, config, n)
    assert model.config.resampling == RESAMPLING[layout, bool(config.registers)]
    assert model.config.mask_token == (layout != "timm")


@pytest.mark.parametrize(
    "variant",
    [dict(chunk=1), dict(chunk=2), dict(prefix="module."), dict(prefix="teacher.backbone.", chunk=1)],
    ids=str,
)
def test_hub_variants(family, variant):
    config, n = family
    assert_holds(convert.load(hub_state(config, n, **variant)), config, n)


def test_chunks_of_more_than_ten_blocks():
    config = tiny(depth=12, width=64, patch=2)
    n = numbers(config)
    assert_holds(convert.load(hub_state(config, n, chunk=3)), config, n)


def test_classifier():
    """transformers' classifiers read [CLS] and the mean of the patches; they stand beside the backbone."""
    weight = np.random.default_rng(0).normal(size=(5, 128)).astype(np.float32)
    head = {"classifier.weight": weight, "classifier.bias": np.ones(5, np.float32)}
    for config, prefix in ((tiny(), "dinov2."), (CONFIG, "dinov2_with_registers.")):
        n = numbers(config)
        model = convert.load(transformers_state(config, n, prefix) | head)
        assert (model.config.classes, model.config.pool) == (5, "cls_mean")
        params = to_params(model)
        np.testing.assert_array_equal(params.pop("head.linear.kernel"), weight.T)
        np.testing.assert_array_equal(params.pop("head.linear.bias"), np.ones(5))
        backbone = from_params(replace(model.config, classes=0, pool="cls"), params)
        assert_holds(backbone, config, n)


def test_overrides():
    model = convert.load(HUB, resampling="bicubic", dtype="bfloat16")
    assert model.config.resampling == "bicubic"
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(model)} == {"bfloat16"}


# Sources --------------------------------------------------------------------------------------------------------------


def test_state_dicts():
    for state in (
        HUB,
        tensors(HUB),
        OrderedDict(tensors(HUB)),
        {k: torch.nn.Parameter(v) for k, v in tensors(HUB).items()},
    ):
        assert_holds(convert.load(state), CONFIG, NUMBERS)


def test_safetensors(tmp_path, layout):
    path = write_safetensors(tmp_path / "some.safetensors", WRITERS[layout](CONFIG, NUMBERS))
    assert_holds(convert.load(path), CONFIG, NUMBERS)
    assert_holds(convert.load(str(path)), CONFIG, NUMBERS)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
def test_pickles(tmp_path, suffix):
    path = tmp_path / f"some{suffix}"
    torch.save(tensors(HUB), path)
    assert_holds(convert.load(path), CONFIG, NUMBERS)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model": state, "optimizer": {"state": {}}, "epoch": 3},
        lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
        lambda state: {
            "teacher": {f"backbone.{name}": tensor for name, tensor in state.items()}
            | {"dino_head.mlp.0.weight": torch.zeros(3, 3), "ibot_head.last_layer.weight_v": torch.zeros(3)},
            "student": {},
        },
    ],
    ids=["model", "state_dict", "teacher"],
)
def test_nested_pickles(tmp_path, wrap):
    torch.save(wrap(tensors(HUB)), tmp_path / "some.pth")
    assert_holds(convert.load(tmp_path / "some.pth"), CONFIG, NUMBERS)


def test_pickles_older_than_pytorch_1_6(tmp_path):
    torch.save(tensors(HUB), tmp_path / "some.pth", _use_new_zipfile_serialization=False)
    assert_holds(convert.load(tmp_path / "some.pth"), CONFIG, NUMBERS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(tmp_path, dtype):
    """Widened before any sum: every kind of source gives the same bits."""
    from safetensors.torch import save_file

    half = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors(HUB).items()}
    torch.save(half, tmp_path / "some.pth")
    save_file(half, tmp_path / "some.safetensors")
    n = {name: torch.tensor(a).to(getattr(torch, dtype)).float().numpy() for name, a in NUMBERS.items()}
    for source in (half, tmp_path / "some.pth", tmp_path / "some.safetensors"):
        assert_holds(convert.load(source), CONFIG, n)


def test_float64(tmp_path):
    """Summed in the precision they have, rounded once."""
    wide = {name: array.astype(np.float64) + 1e-9 for name, array in HUB.items()}
    n = {name: array.astype(np.float64) + 1e-9 for name, array in NUMBERS.items()}
    assert_holds(convert.load(write_safetensors(tmp_path / "some.safetensors", wide)), CONFIG, n)


def test_transformers_folder(family, tmp_path):
    """A folder that transformers itself wrote holds what its model, alive, holds."""
    module = randomised(build_transformers(family[0]))
    module.save_pretrained(tmp_path)
    assert_same(convert.load(tmp_path), convert.load(module))


def test_transformers_reads_what_we_read(family, tmp_path):
    """The published file, taken through transformers' own loader, is the same model as the file taken by us."""
    config, n = family
    write_safetensors(tmp_path / "model.safetensors", transformers_state(config, n))
    build_transformers(config).config.save_pretrained(tmp_path)
    live = type(build_transformers(config)).from_pretrained(tmp_path)
    for source in (tmp_path, live):
        model = convert.load(source)
        assert_holds(model, config, n)
        assert model.config.resampling == RESAMPLING["dinov2/transformers", bool(config.registers)]


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(1 + torch.randn(parameter.shape, generator=generator))
    return module


def assert_same(a, b):
    assert a.config == b.config
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_live_transformers_module():
    """Of heads and epsilon, the module's config is asked."""
    config = tiny(heads=4, eps=1e-5)
    n = numbers(config)
    module = build_transformers(config)
    ours = module.state_dict()
    for name, array in transformers_state(config, n).items():
        memory = (
            name.replace("attention.attention.query", "attention.q_proj")
            .replace("attention.attention.key", "attention.k_proj")
            .replace("attention.attention.value", "attention.v_proj")
            .replace("attention.output.dense", "attention.o_proj")
        )
        ours[memory].copy_(torch.tensor(array))
    assert_holds(convert.load(module), config, n)


def test_live_classifier():
    module = transformers.Dinov2ForImageClassification(build_transformers(tiny(heads=2)).config)
    model = convert.load(randomised(module))
    assert (model.config.heads, model.config.classes, model.config.pool) == (2, 2, "cls_mean")
    params = {name: a for name, a in to_params(model).items() if not name.startswith("head.")}
    assert_same(from_params(replace(model.config, classes=0, pool="cls"), params), convert.load(module.dinov2))


def test_live_timm_module(family):
    config, n = family
    config = jaxvit.ViTConfig.from_dict(config.to_dict() | {"heads": 2, "grid": [4, 4]})
    module = build_timm(config, positioned=not config.registers)
    module.load_state_dict(tensors(timm_state(config, n)), strict=True)
    model = convert.load(module)
    assert_holds(model, config, n)
    assert model.config.resampling == "bicubic_antialias"


def test_activation_of_a_live_timm_module():
    module = build_timm(tiny(), positioned=True)
    for act in (torch.nn.SiLU(), torch.nn.ReLU()):
        module.blocks[0].mlp.act = act
        fails(module, "MLP", str(act))
    module.blocks[0].mlp.act = torch.nn.GELU(approximate="tanh")
    fails(module, "its blocks differ")
    module.blocks[1].mlp.act = torch.nn.GELU(approximate="tanh")
    assert convert.load(module).config.mlp == "gelu_tanh"
    module = build_timm(tiny("swiglu"), positioned=True)
    module.blocks[0].mlp.gate_last = True
    fails(module, "MLP", "GluMlp")


@pytest.mark.parametrize("shards", [False, True])
def test_published_folder(family, tmp_path, shards):
    config, n = family
    state = transformers_state(config, n)
    if shards:
        write_shards(tmp_path, state)
    else:
        write_safetensors(tmp_path / "model.safetensors", state)
    assert_holds(convert.load(tmp_path), config, n)
    (tmp_path / "config.json").write_text(json.dumps(transformers_json(config) | {"num_attention_heads": 2}))
    assert convert.load(tmp_path).config.heads == 2


def test_timm_folder(tmp_path):
    """Of heads, the architecture is asked, and of the preparation of images, the pretrained_cfg."""
    config, n = replace(CONFIG, heads=16), NUMBERS
    write_safetensors(tmp_path / "model.safetensors", timm_state(config, n))
    prepared = {"input_size": [3, 56, 56], "crop_pct": 0.875, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    about = {"architecture": "vit_large_patch14_reg4_dinov2", "num_classes": 0, "pretrained_cfg": prepared}
    about["model_args"] = {"depth": 2, "embed_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps(about))
    model = convert.load(tmp_path)
    assert_holds(model, config, n)
    assert model.config.preprocess == jaxvit.Preprocess(64, 56, (0.5,) * 3, (0.25,) * 3, margin="round")
    (tmp_path / "config.json").write_text(json.dumps(about | {"model_args": {"act_layer": "relu", "img_size": 56}}))
    fails(tmp_path, "changes the architecture", "act_layer")
    (tmp_path / "config.json").write_text(json.dumps(about | {"architecture": "resnet50"}))
    fails(tmp_path, "resnet50", "none of timm's plain Vision Transformers")


def test_folder_of_a_pickle(tmp_path):
    torch.save(tensors(transformers_state(CONFIG, NUMBERS)), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(transformers_json(CONFIG)))
    assert_holds(convert.load(tmp_path), CONFIG, NUMBERS)


def test_preprocess(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", transformers_state(CONFIG, NUMBERS))
    assert convert.load(tmp_path).config.preprocess == jaxvit.Preprocess()
    settings = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": 60},
        "crop_size": {"height": 56, "width": 56},
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
    }
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(settings))
    assert convert.load(tmp_path).config.preprocess == jaxvit.Preprocess(60, 56, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert convert.load_described(tmp_path)[1].source["preparation"] == "its preprocessor_config.json"
    for change in ({"crop_size": {"height": 61, "width": 0}}, {"image_mean": [1, 2]}):
        path.write_text(json.dumps(settings | change))
        fails(tmp_path, "preprocessor_config.json makes no sense")


def test_a_preparation_can_be_given(tmp_path, capsys):
    path = write_safetensors(tmp_path / "some.safetensors", hub_state(CONFIG, NUMBERS))
    given = {"resize": [64, 64], "crop": 56, "mean": [0.1, 0.2, 0.3], "fit": "stretch", "interpolation": "bilinear"}
    expected = jaxvit.Preprocess((64, 64), 56, (0.1, 0.2, 0.3), fit="stretch", interpolation="bilinear")
    assert main(["convert", str(path), str(tmp_path / "model"), "--set", f"preprocess={json.dumps(given)}"]) == 0
    said = capsys.readouterr().out
    assert "images: stretch to 64x64, bilinear; crop 56x56; mean 0.1 0.2 0.3, std 0.229 0.224 0.225" in said
    assert "preparation: given" in said
    assert main(["show", str(tmp_path / "model")]) == 0
    assert capsys.readouterr().out in said
    assert jaxvit.read_config(tmp_path / "model")[0].preprocess == expected
    assert convert.load(path, config={"preprocess": expected}).config.preprocess == expected
    for wrong in ("squash", {"crops": 3}, {"crop": 0}, {"std": [0, 0, 0]}):
        with pytest.raises(ConversionError, match=r"(?s)preprocess is .* makes no sense .* --set preprocess="):
            convert.load(path, config={"preprocess": wrong})


def test_jaxvit_folder(tmp_path):
    convert.convert(HUB, tmp_path / "model")
    assert_holds(convert.load(tmp_path / "model"), CONFIG, NUMBERS)
    assert convert.load(tmp_path / "model", resampling="bicubic").config.resampling == "bicubic"
    with pytest.raises(ConversionError, match="jaxvit model already"):
        convert.convert(tmp_path / "model", tmp_path / "other")


def test_source_is_recorded(tmp_path, layout):
    path = write_safetensors(tmp_path / "some.safetensors", WRITERS[layout](CONFIG, NUMBERS))
    model = convert.convert(path, tmp_path / "model")
    config, source = jaxvit.read_config(tmp_path / "model")
    assert config == model.config
    assert source["kind"] == "file" and source["path"] == "some.safetensors" and source["layout"] == layout
    assert source["sha256"] == {"some.safetensors": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert set(source["versions"]) >= {"jaxvit", "jax"}
    assert_holds(jaxvit.load(tmp_path / "model"), CONFIG, NUMBERS)


def test_shards_are_recorded(tmp_path):
    write_shards(tmp_path / "model", transformers_state(CONFIG, NUMBERS))
    model, provenance = convert.load_described(tmp_path / "model")
    source = provenance.source
    files = (tmp_path / "model").glob("*.safetensors")
    assert {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files} == source["sha256"]
    assert source["layout"] == "dinov2/transformers"
    assert_holds(model, CONFIG, NUMBERS)


def python(code, *arguments, **environment):
    """Runs code in a Python of its own."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_hub_cache(tmp_path):
    """A hub id that was downloaded before, while offline: folders and links as huggingface_hub lays them out."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--someone--dinov2-tiny"
    files = {"config.json": json.dumps(transformers_json(CONFIG)).encode()}
    files["model.safetensors"] = write_safetensors(
        tmp_path / "m.safetensors", transformers_state(CONFIG, NUMBERS)
    ).read_bytes()
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    for name, content in files.items():
        blob = hashlib.sha256(content).hexdigest()
        (repo / "blobs" / blob).write_bytes(content)
        (repo / "snapshots" / commit / name).symlink_to(Path("../../blobs") / blob)
    python(
        """
        import sys
        import convert
        convert.convert("someone/dinov2-tiny", sys.argv[1])
        assert "torch" not in sys.modules
        try:
            convert.load("someone/else")
        except convert.ConversionError as error:
            assert "someone/else is no path here, and the hub did not give it" in str(error), error
            assert "\\n" not in str(error)
        else:
            raise AssertionError
        """,
        tmp_path / "model",
        HF_HOME=str(tmp_path),
        HF_HUB_OFFLINE="1",
    )
    assert_holds(jaxvit.load(tmp_path / "model"), CONFIG, NUMBERS)
    _, source = jaxvit.read_config(tmp_path / "model")
    assert (source["kind"], source["path"], source["revision"]) == ("hub", "someone/dinov2-tiny", commit)
    assert set(source["sha256"]) == {"model.safetensors"}


# The real export ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def export():
    return model_file(ROOT / ".data")


def test_export_without_torch(export, tmp_path):
    python(
        """
        import sys
        import convert
        convert.convert(sys.argv[1], sys.argv[2])
        assert "torch" not in sys.modules and "transformers" not in sys.modules
        """,
        export,
        tmp_path / "model",
    )
    config, source = jaxvit.read_config(tmp_path / "model")
    assert source["sha256"] == {export.name: MODEL_SHA256}
    assert source["layout"] == "dinov2/transformers"
    assert config == jaxvit.ViTConfig.dinov2("small", resampling="bicubic")


def test_export_computes_what_its_graph_computes(export):
    """The graph, run by ONNX's own reference, up to the last norm: a matrix under a wrong name would change it.

    Takes 10 s.
    """
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = convert.load(export)
    image = np.asarray(jaxvit.prepare(photographs(ROOT / ".data") / "chelsea" / "0.png", model.config))
    image = image.reshape(1, 224, 224, 3)
    graph = upto(onnx.load(export), "/backbone/layernorm/Add_1_output_0")
    (theirs,) = ReferenceEvaluator(graph).run(None, {"input_image": np.ascontiguousarray(image.transpose(0, 3, 1, 2))})
    out = model(jnp.asarray(image))
    ours = np.concatenate([out.cls[:, None], out.patches], axis=1)
    assert ours.shape == theirs.shape == (1, 257, 384)
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


def upto(model, output):
    """The part of an ONNX model that `output` is made from."""
    from onnx import TensorProto, helper

    maker = {name: node for node in model.graph.node for name in node.output}
    needed, todo = set(), [output]
    while todo:
        name = todo.pop()
        if name not in needed:
            needed.add(name)
            todo += maker[name].input if name in maker else []
    graph = helper.make_graph(
        [node for node in model.graph.node if needed & set(node.output)],
        "upto",
        model.graph.input,
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        [tensor for tensor in model.graph.initializer if tensor.name in needed],
    )
    return helper.make_model(graph, opset_imports=model.opset_import)


def test_truncated_export(export, tmp_path):
    path = tmp_path / "some.onnx"
    path.write_bytes(export.read_bytes()[:1_000_000])
    fails(path, "some.onnx is not a complete ONNX file")


# Errors: tensors ------------------------------------------------------------------------------------------------------


def changed(state=HUB, drop=(), **changes):
    """The state without some names, and with some tensors replaced or added; `__` stands for a dot."""
    kept = {name: array for name, array in state.items() if name not in drop}
    return kept | {name.replace("__", "."): array for name, array in changes.items()}


def test_every_offender_is_named():
    dropped = ("blocks.1.norm1.weight", "blocks.0.attn.proj.bias", "norm.bias")
    wrong = {
        "blocks__0__mlp__fc1__bias": np.zeros(255, np.float32),
        "blocks__1__attn__qkv__weight": np.zeros((64, 192), np.float32),
        "blocks__1__ls2__gamma": np.zeros((1, 64), np.float32),
    }
    added = {"blocks__0__attn__extra": np.zeros(3, np.float32), "head__weight": np.zeros((5, 64), np.float32)}
    bad = {
        "norm__weight": np.full(64, np.nan, np.float32),
        "patch_embed__proj__bias": np.array([np.inf] + [0] * 63, np.float32),
        "blocks__1__attn__proj__weight": np.zeros((64, 64), np.int8),
    }
    names = [name.replace("__", ".") for name in (*wrong, *added, *bad)]
    message = fails(changed(HUB, dropped, **wrong, **added, **bad), *dropped, *names, "dinov2/hub")
    for what in ("is missing", "is not expected", "wrong shape", "NaN", "int8"):
        assert what in message


@pytest.mark.parametrize("layout_name", WRITERS)
def test_every_name_counts(layout_name):
    """Without any one tensor, or with any one more, nothing converts.

    But a model is complete without a mask token, and where no config stands beside it, without registers; and timm has
    models without positions, and without biases of queries, keys and values.
    """
    config = tiny(registers=4, depth=1)
    state = WRITERS[layout_name](config, numbers(config))
    spare = ("mask_token", "register_tokens", "reg_token")
    spare += ("pos_embed", "attn.qkv.bias") if layout_name == "timm" else ()
    for name in state:
        if not name.endswith(spare):
            fails({key: array for key, array in state.items() if key != name})
    with pytest.raises(ConversionError, match=r"and \d+ more of this kind$") as raised:
        convert.load(state | {f"{name}.more": state[name] for name in state})
    assert sorted(raised.value.problems) == sorted(f"{name}.more is not expected" for name in state)


def test_transposed_matrices():
    for name, array in HUB.items():
        if array.ndim == 2 and array.shape[0] != array.shape[1]:
            fails(HUB | {name: array.T}, name)


@pytest.mark.parametrize(
    "name, shape",
    [
        ("cls_token", (1, 1, 1)),
        ("cls_token", (1, 2, 64)),
        ("cls_token", ()),
        ("pos_embed", (2, 17, 64)),
        ("pos_embed", (1, 16, 64)),
        ("pos_embed", (17, 64)),
        ("register_tokens", (2, 4, 64)),
        ("register_tokens", (64,)),
        ("patch_embed.proj.weight", (64, 588)),
        ("patch_embed.proj.weight", (64, 0, 14, 14)),
        ("patch_embed.proj.weight", (64, 3, 14, 13)),
        ("blocks.0.mlp.fc2.weight", (256,)),
        ("norm.weight", (1,)),
    ],
)
def test_shapes_that_broadcasting_would_hide(name, shape):
    fails(HUB | {name: np.zeros(shape, np.float32)})


def test_parts_of_different_sizes():
    """Queries, keys and values that only add up to the right number of rows."""
    at = "encoder.layer.0.attention.attention"
    odd = {f"{at}.{name}.weight": np.zeros((rows, 64), np.float32) for name, rows in (("query", 32), ("value", 96))}
    fails(transformers_state(CONFIG, NUMBERS) | odd, *odd, "wrong shape")


def test_tensors_outside_a_wrapper():
    """A head's norm neither replaces the backbone's nor stands in for it."""
    state = hub_state(CONFIG, NUMBERS, prefix="backbone.")
    fails(state | {"norm.weight": HUB["norm.weight"]}, "norm.weight (outside backbone.) is not expected")
    del state["backbone.norm.weight"]
    fails({"norm.weight": HUB["norm.weight"]} | state, "norm.weight is missing")
    both = hub_state(CONFIG, NUMBERS, prefix="teacher.") | hub_state(CONFIG, NUMBERS, prefix="student.")
    fails(both, "(outside teacher.) is not expected", "--branch teacher or --branch student")


def test_two_tensors_of_one_name():
    state = hub_state(CONFIG, NUMBERS, chunk=1)
    fails(state | {"blocks.7.1.norm1.weight": HUB["norm.weight"]}, "two tensors have the name blocks.1.norm1.weight")


def test_blocks_with_gaps():
    state = {name: array for name, array in HUB.items() if not name.startswith("blocks.0.norm")}
    renamed = {name.replace("blocks.1.", "blocks.90000000."): array for name, array in state.items()}
    fails(renamed, "0, 90000000", "gaps")


def test_values_that_no_parameter_can_hold():
    fails(changed(norm__bias=np.full(64, 1e5, np.float32)), "norm.bias exceeds", "float16", dtype="float16")
    fails(changed(norm__bias=np.full(64, 1e300)), "norm.bias exceeds", "float32")
    fails(changed(cls_token=np.full((1, 1, 64), 3e38, np.float32), pos_embed=np.full((1, 17, 64), 3e38, np.float32)))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "bool", "complex64", "object"])
def test_types_that_are_no_weights(dtype):
    fails(changed(norm__bias=np.zeros(64, dtype)), "norm.bias holds", dtype, "floating-point")


def test_tensors_that_are_no_arrays(tmp_path):
    odd = {
        "norm__bias": torch.zeros(64).to(torch.float8_e4m3fn),
        "norm__weight": torch.zeros(64).to_sparse(),
        "cls_token": torch.zeros(1, 1, 64, device="meta"),
    }
    fails(changed(tensors(HUB), **odd), *(name.replace("__", ".") for name in odd))
    from safetensors.torch import save_file

    save_file(changed(tensors(HUB), norm__bias=odd["norm__bias"]), tmp_path / "some.safetensors")
    fails(tmp_path / "some.safetensors", "norm.bias", "F8_E4M3")


def test_empty_state_dict(tmp_path):
    fails({}, "no tensors")
    fails(write_safetensors(tmp_path / "some.safetensors", {}), "no tensors")


RESNET = ["conv1.weight", "bn1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "fc.weight", "fc.bias"]
CLIP = [
    "visual.class_embedding",
    "visual.positional_embedding",
    "visual.conv1.weight",
    "visual.transformer.resblocks.0.attn.in_proj_weight",
    "visual.ln_post.weight",
]
VIT = ["cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"]


@pytest.mark.parametrize("names", [RESNET, CLIP, VIT, ["a"], ["cls_token"]], ids=["resnet", "clip", "vit", "a", "cls"])
def test_other_models(names):
    """What it looks like is said, or else the known layouts; and the first names found."""
    state = {name: np.zeros((2, 2), np.float32) for name in names}
    message = fails(state, "known layout", *names[:5])
    assert ("looks like" in message) != all(layout.name in message for layout in LAYOUTS)


@pytest.mark.parametrize(
    "state", [{0: np.zeros(3)}, {"a": 3}, {"a": None}, {"a": {"b": {"c": {"d": np.zeros(3)}}}}], ids=str
)
def test_mappings_that_are_no_state_dicts(state):
    fails(state, "not a state dict")


@pytest.mark.parametrize("source", [3, None, [1], 1.5, b"bytes"], ids=repr)
def test_what_is_no_source(source):
    fails(source, type(source).__name__, "expected a path")


STATES = {
    name: WRITERS[layout](FAMILIES[key], numbers(FAMILIES[key]))
    for name, layout, key in (
        ("hub", "dinov2/hub", "gelu-4"),
        ("timm", "timm", "gelu-0"),
        ("timm swiglu", "timm", "swiglu-4"),
        ("transformers", "dinov2/transformers", "swiglu-4"),
    )
}
DAMAGES = ("removed", "added", "renamed", "transposed", "cut", "extended", "not a number", "integers")


@given(st.sampled_from(sorted(STATES)), st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_damage_is_never_silent(which, data):
    """Whatever is done to whichever tensors: a ConversionError, never a model and never another error."""
    state = dict(STATES[which])
    used = [name for name in sorted(state) if not name.endswith("mask_token")]
    for name in data.draw(st.lists(st.sampled_from(used), min_size=1, max_size=4, unique=True)):
        damage(state, name, data.draw(st.sampled_from(DAMAGES)))
    fails(state)


def damage(state, name, how):
    array = state[name]
    axis = int(np.argmax(array.shape))
    if how == "removed" and not name.endswith("register_tokens"):  # without them, it is a model without registers
        del state[name]
    elif how == "added":
        state[f"{name}2"] = array
    elif how == "renamed":
        state[name.replace("weight", "wieght") if "weight" in name else f"x{name}"] = state.pop(name)
    elif how == "transposed" and array.ndim == 2 and array.shape[0] != array.shape[1]:
        state[name] = array.T
    elif how == "cut":
        state[name] = np.take(array, range(array.shape[axis] - 1), axis)
    elif how == "extended":
        state[name] = np.concatenate([array, array], axis)
    elif how == "integers":
        state[name] = array.astype(np.int32)
    else:
        state[name] = array.copy()
        state[name].flat[-1] = np.nan


# Errors: files and folders --------------------------------------------------------------------------------------------


def saved(path, content=None, **options):
    torch.save(tensors(HUB) if content is None else content, path, **options)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".onnx"])
@pytest.mark.parametrize(
    "content", [b"", b"hello there\nthis is a text\n" * 40, b"\0" * 100], ids=["empty", "text", "0"]
)
def test_foreign_files(tmp_path, suffix, content):
    path = tmp_path / f"some{suffix}"
    path.write_bytes(content)
    message = fails(path)
    assert str(path) in message or message == "the checkpoint holds no tensors"  # which an empty ONNX file is


def test_truncated_files(tmp_path):
    whole = write_safetensors(tmp_path / "whole.safetensors", HUB).read_bytes()
    for size in (4, 100, len(whole) // 2, len(whole) - 1):
        path = tmp_path / "cut.safetensors"
        path.write_bytes(whole[:size])
        fails(path, str(path), "not a complete safetensors file")
    for zipped in (True, False):
        whole = saved(tmp_path / "whole.pth", _use_new_zipfile_serialization=zipped).read_bytes()
        for size in (4, 100, len(whole) // 2, len(whole) - 1):
            path = tmp_path / "cut.pth"
            path.write_bytes(whole[:size])
            fails(path, str(path), "not a")


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_malicious_pickle(tmp_path):
    marker = tmp_path / "ran"
    for zipped in (True, False):
        content = {**tensors(HUB), "payload": Malicious(marker)}
        path = saved(tmp_path / "some.pth", content, _use_new_zipfile_serialization=zipped)
        fails(path, str(path), "mkdir", "not trusted")
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the payload is a live one
    assert marker.exists()


def test_pickles_of_other_things(tmp_path):
    fails(saved(tmp_path / "some.pth", [1, 2]), "list", "state dict")
    fails(saved(tmp_path / "some.pth", {"epoch": 3}), "epoch", "state dict")
    fails(saved(tmp_path / "some.pth", torch.nn.Linear(2, 2)), "Linear", "not trusted")
    fails(saved(tmp_path / "some.pth", types.SimpleNamespace(a=1)), "settings alone", "state dict")


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore:.torch.jit:FutureWarning")
def test_torchscript(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "some.pt"))
    fails(tmp_path / "some.pt", "known layout")


def test_broken_pickles(tmp_path):
    """Bytes at random, some with the start of a pickle: nothing but ConversionErrors."""
    rng = np.random.default_rng(0)
    path = tmp_path / "some.pth"
    for i in range(200):
        path.write_bytes((b"\x80\x02" if i % 2 else b"") + rng.bytes(rng.integers(1, 60)))
        fails(path, str(path))


def test_paths(tmp_path):
    (tmp_path / "some.txt").write_text("text")
    fails(tmp_path / "some.txt", "some.txt", "known kind", ".safetensors", ".pth", ".onnx")
    fails(tmp_path / "gone.pth", "gone.pth", "neither a file, nor a folder")
    fails("gone.pth", "gone.pth", "neither a file, nor a folder")
    fails(tmp_path, str(tmp_path), "model.safetensors", "pytorch_model.bin")
    fails("x" * 5000, "neither a file")
    fails("a\0b", "neither a file")


def test_unreadable_files(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    write_safetensors(tmp_path / "model.safetensors", HUB)
    monkeypatch.setattr("convert.sources.sha256", refuse)
    for source in (tmp_path, tmp_path / "model.safetensors"):
        fails(source, str(source), "Permission denied")


def test_hub_ids(monkeypatch):
    """An id nobody can have, and one that a hub without network does not give."""
    huggingface_hub = pytest.importorskip("huggingface_hub")

    fails("a..b/c--d", "a..b/c--d", "hub did not give it")

    def offline(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    fails("facebook/dinov2-nothing", "facebook/dinov2-nothing", "hub did not give it", "no network")


def test_shards(tmp_path):
    write_shards(tmp_path, transformers_state(CONFIG, NUMBERS))
    first, second = sorted(tmp_path.glob("*.safetensors"))
    content = first.read_bytes()
    first.unlink()
    fails(tmp_path, first.name, "shards")
    second.unlink()
    fails(tmp_path, first.name, second.name)
    first.write_bytes(content)
    second.write_bytes(content[:1000])
    fails(tmp_path, str(second), "not a complete safetensors file")


@pytest.mark.parametrize("text", ["", "no json", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "\xff"])
def test_shard_index(tmp_path, text):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text, encoding="latin-1")
    fails(tmp_path, str(path))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"hidden_act": "quick_gelu"}, ["quick_gelu", "exact GELU"]),
        ({"num_hidden_layers": 3, "num_register_tokens": 5}, ["depth 2, not 3", "registers 4, not 5"]),
        ({"num_attention_heads": 5}, ["64", "heads, 5"]),
        ({"num_attention_heads": "six"}, ["num_attention_heads", "numbers"]),
        ({"layer_norm_eps": None}, ["layer_norm_eps", "numbers"]),
    ],
    ids=str,
)
def test_config_that_contradicts(tmp_path, change, words):
    write_safetensors(tmp_path / "model.safetensors", transformers_state(CONFIG, NUMBERS))
    (tmp_path / "config.json").write_text(json.dumps(transformers_json(CONFIG) | change))
    fails(tmp_path, *words)


def test_config_of_another_model(tmp_path):
    """Around the backbone, whose config is a level down; else it is not known what it leaves out."""
    write_safetensors(tmp_path / "model.safetensors", transformers_state(CONFIG, NUMBERS))
    path = tmp_path / "config.json"
    backbone = transformers_json(CONFIG)
    path.write_text(json.dumps({"model_type": "depth_anything", "backbone_config": backbone}))
    assert_holds(convert.load(tmp_path), CONFIG, NUMBERS)
    for unknown in ({"model_type": "depth_anything", "backbone_config": {}}, {"model_type": "depth_anything"}):
        path.write_text(json.dumps(unknown))
        fails(tmp_path, "model type depth_anything", "--set heads=")
        assert_holds(convert.load(tmp_path, config={"heads": 1, "mlp": "gelu", "eps": 1e-6}), CONFIG, NUMBERS)
    for text in ("no json", "[]"):
        path.write_text(text)
        fails(tmp_path, "config.json")


def test_nothing_is_written_on_failure(tmp_path):
    with pytest.raises(ConversionError):
        convert.convert(changed(drop=["norm.bias"]), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_tensors_are_read_once():
    """Giant checkpoints are mapped, not held: each tensor is read for its rule, and not to see whether it is there."""

    class Counting(dict):
        def __getitem__(self, name):
            counts[name] = counts.get(name, 0) + 1
            return super().__getitem__(name)

    counts: dict[str, int] = {}
    layout, found, config = convert.recognise(Source(Counting(HUB), {}))
    convert_tensors(layout, found, config, "float32")
    small = {name for name in HUB if "blocks.1." in name}
    assert {counts[name] for name in small} == {1}


# Folders that hold several --------------------------------------------------------------------------------------------


OTHERS = numbers(CONFIG, seed=1)


def pickled(path, n=NUMBERS):
    torch.save(tensors(transformers_state(CONFIG, n)), path)
    return path.name


def pickled_shards(folder, index="pytorch_model.bin.index.json", n=NUMBERS):
    state = tensors(transformers_state(CONFIG, n))
    names = sorted(state)
    parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in parts.items():
        torch.save({name: state[name] for name in part}, folder / file)
    where = {name: file for file, part in parts.items() for name in part}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder / index


def test_shards_of_pickles(tmp_path):
    pickled_shards(tmp_path)
    model, provenance = convert.load_described(tmp_path)
    assert_holds(model, CONFIG, NUMBERS)
    files = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    assert sorted(provenance.source["sha256"]) == files and "weights" not in provenance.source


def test_an_index_that_does_not_fit_its_shards(tmp_path):
    index = pickled_shards(tmp_path)
    content = json.loads(index.read_text())
    where = content["weight_map"]
    first = sorted(where)[0]
    index.write_text(json.dumps({"weight_map": where | {"more": where[first]}}))
    fails(tmp_path, "lack tensors that it names: more")
    index.write_text(json.dumps({"weight_map": {name: file for name, file in where.items() if name != first}}))
    fails(tmp_path, f"hold tensors that it does not name: {first}")


VARIANTS = ("model.fp32.safetensors", "model.fp16.safetensors", "model.bf16.safetensors", "model.other.safetensors")
ORDER = ("model.safetensors", "pytorch_model.bin", *VARIANTS, "pytorch_model.fp16.bin")


@pytest.mark.parametrize("first", range(len(ORDER)))
def test_which_of_several_is_taken(tmp_path, first):
    """Every file from one on: the first is taken, the others are named."""
    for i, name in enumerate(ORDER[first:]):
        n = OTHERS if i else NUMBERS
        if name.endswith(".bin"):
            pickled(tmp_path / name, n)
        else:
            write_safetensors(tmp_path / name, transformers_state(CONFIG, n))
    model, provenance = convert.load_described(tmp_path)
    assert_holds(model, CONFIG, NUMBERS)
    others = f"; {', '.join(ORDER[first + 1 :])} not taken" if ORDER[first + 1 :] else ""
    assert provenance.source["weights"] == ORDER[first] + others
    assert list(provenance.source["sha256"]) == [ORDER[first]]
    convert.convert(tmp_path, tmp_path / "out")
    assert f"weights: {ORDER[first]}" in str(jaxvit.describe(tmp_path / "out"))


def test_shards_of_a_variant(tmp_path):
    pickled_shards(tmp_path, "pytorch_model.bin.index.fp16.json")
    model, provenance = convert.load_described(tmp_path)
    assert_holds(model, CONFIG, NUMBERS)
    assert provenance.source["weights"] == "pytorch_model.bin.index.fp16.json"


def test_transformers_writes_these_names(tmp_path):
    build_transformers(CONFIG).save_pretrained(tmp_path, variant="fp16")
    (file,) = [path.name for path in tmp_path.glob("*.safetensors")]
    assert convert.load_described(tmp_path)[1].source["weights"] == file == "model.fp16.safetensors"
    (tmp_path / file).unlink()
    build_transformers(CONFIG).save_pretrained(tmp_path, variant="fp16", max_shard_size="100KB")
    index = convert.load_described(tmp_path)[1].source["weights"]
    assert index == "model.safetensors.index.fp16.json" and (tmp_path / index).is_file()


def test_folders_of_other_names_say_what_to_give(tmp_path):
    write_safetensors(tmp_path / "some.safetensors", HUB)
    fails(tmp_path, "holds none of", f"give the file itself: {tmp_path / 'some.safetensors'}")
    (tmp_path / ".metadata").write_bytes(b"")
    fails(tmp_path, "distributed checkpoint of PyTorch", "dcp_to_torch")


def test_streams_are_no_paths():
    fails(io.BytesIO(b""), "BytesIO")

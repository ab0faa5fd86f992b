"""What a file does not tell is asked for, refused, or an assumption that is kept with the result: not a guess."""

import json
from dataclasses import fields

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

from layouts import hub_state, numbers, tiny, transformers_state, write_safetensors

import convert
import jaxvit
from benchmarks.originals import randomise
from convert import ConversionError, catalogue
from convert.__main__ import main
from convert.originals import build_timm, original_of
from convert.published import kinds
from convert.sources import DEFAULTS
from convert.verify import Size, compare, random_images
from jaxvit import ViTConfig
from jaxvit.convert.verify import shared_assumptions
from jaxvit.model.params import to_params

SMALL = dict(depth=12, width=384, heads=12, hidden=32, patch=16, grid=(2, 2), layer_scale=False)
"""As wide and deep as DINO's S, which has 6 heads, and MoCo v3's, which has 12; with a narrow MLP."""


def module_of(**changes):
    return randomise(build_timm(ViTConfig(**{**SMALL, **changes}), positioned=True))


def state_of(prefix="", **changes):
    return {prefix + name: tensor.numpy().copy() for name, tensor in module_of(**changes).state_dict().items()}


def assumed(source, **known):
    """Field -> all of what is said about it."""
    _, provenance = convert.load_described(source, **known)
    return {line.split(" ")[0]: line for line in provenance.assumptions}


def asks(source, *words, **known):
    with pytest.raises(ConversionError) as raised:
        convert.load(source, **known)
    assert [word for word in words if word not in str(raised.value)] == [], raised.value


# Heads ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", ["module.base_encoder.", "module.momentum_encoder."])
def test_a_moco_is_asked_for_its_heads(wrapper):
    module = module_of()
    state = {wrapper + name: tensor for name, tensor in module.state_dict().items()}
    asks(state, "number of heads", "12 in MoCo v3", "--set heads=12")
    model = convert.load(state, config={"heads": 12})
    images = random_images(model, Size(32, 32), tokens=20)
    assert compare(model, original_of(module), images, defaults=False).worst64() <= 1e-10


def test_the_same_shapes_under_bare_names_are_an_assumption():
    found = assumed(state_of())
    assert found["heads"].startswith("heads 6 (width / 64, as in DINO") and "12 in MoCo v3" in found["heads"]
    assert "heads" not in assumed(state_of(), config={"heads": 12})
    # With a classifier, the names are timm's.
    assert assumed(state_of(classes=2))["heads"].startswith("heads 6 (width / 64, as in timm; there are 12 in MoCo")


def test_a_width_of_several_numbers_of_heads_is_asked_for():
    wide = dict(width=1280, heads=16, depth=2, hidden=8)
    asks(state_of(**wide), "width 1280", "20 in DINOv3", "16 in ", "--set heads=")
    assert convert.load(state_of(**wide), config={"heads": 16}).config.heads == 16
    asks(state_of(width=96, heads=2, depth=1), "width 96")


def test_what_a_family_published_once_is_known():
    """Beside a student, the names are DINO's; with a mask token, DINOv2's."""
    assert not {"heads", "resampling", "preprocess"} & set(assumed(state_of("teacher.backbone.", heads=6)))
    for each in catalogue.known():
        c = each.config
        same = {kind[3] for kind in kinds() if kind[:3] == (each.family, c.width, c.depth)}
        assert same == {c.heads}, each


def test_a_teacher_that_was_nested_is_one():
    found = assumed({"teacher": state_of("backbone.", heads=6), "student": {}})
    assert not {"heads", "resampling", "preprocess"} & set(found)


def test_sizes_that_nobody_published_are_an_assumption(tmp_path):
    """In memory, in the folder, in what is printed, and in its certificate; not if it is told."""
    config = tiny(depth=1)
    source = write_safetensors(tmp_path / "some.safetensors", hub_state(config, numbers(config)))
    line = "heads 1 (width / 64)"
    assert assumed(source)["heads"] == line
    assert convert.load(source).config == convert.convert(source, tmp_path / "a").config
    _, provenance = convert.load_described(source)
    assert jaxvit.describe(tmp_path / "a") == provenance and line in provenance.assumptions
    assert f"assumed: {line}" in str(provenance).splitlines()
    assert line in json.loads((tmp_path / "a" / "config.json").read_text())["provenance"]["assumptions"]
    convert.convert(source, tmp_path / "b", config={"heads": 1})
    assert "heads" not in str(jaxvit.describe(tmp_path / "b").assumptions)


def test_a_verification_names_the_assumptions_that_it_shares(tmp_path, capsys):
    config = tiny(depth=1)
    source = write_safetensors(tmp_path / "some.safetensors", hub_state(config, numbers(config)))
    convert.convert(source, tmp_path / "a")
    shared = ["heads 1 (width / 64)", "grid 4x4 (a square of 16 positions)"]
    said = f"equal within the limits, if the assumptions hold: {', '.join(shared)}"
    assert main(["verify", str(tmp_path / "a"), str(source), "--sizes", "14x28"]) == 0
    assert said in capsys.readouterr().out
    assert json.loads((tmp_path / "a" / "parity.json").read_text())["assumptions"] == shared
    assert main(["show", str(tmp_path / "a")]) == 0
    assert f"parity: {said}" in capsys.readouterr().out
    # An original whose heads are told shares none.
    assert original_of(source, config={"heads": 1, "grid": (4, 4)}).assumed == ()
    assert original_of(module_of(depth=1)).assumed == ()


def test_a_verification_says_that_an_assumed_preparation_is_not_compared(tmp_path, capsys):
    """A bare file in timm's names, whose model may have any preparation."""
    source = write_safetensors(tmp_path / "some.safetensors", state_of(classes=2, heads=6))
    line = "not compared: how photographs are prepared"
    convert.convert(source, tmp_path / "a")
    assert main(["verify", str(tmp_path / "a"), str(source), "--sizes", "32x32"]) == 0
    said = f"{line}, which is an assumption: --set preprocess=.. settles it"
    assert capsys.readouterr().out.splitlines()[-1] == said
    assert "--architecture NAME" in " ".join(jaxvit.describe(tmp_path / "a").assumptions)
    rule = 'preprocess={"resize": 32, "crop": 32}'
    assert main([str(source), str(tmp_path / "b"), "--set", rule, "--verify"]) == 0
    assert line in capsys.readouterr().out.splitlines()


# Other fields ---------------------------------------------------------------------------------------------------------


def test_dino_s_rule_of_positions_is_an_assumption_where_others_have_its_names():
    """MAE's files and timm's without a classifier have the same names."""
    state = state_of(heads=6)
    found = assumed(state)
    assert found["resampling"].startswith("resampling bicubic_offset") and "bicubic_antialias" in found["resampling"]
    assert "preprocess" in found
    assert "resampling" not in assumed(state, resampling="bicubic")
    told = assumed(state, architecture="vit_small_patch16_224.dino")
    assert not {"resampling", "heads"} & set(told)
    assert "for 224x224, and the original takes 32x32 alone" in told["preprocess"]


def test_an_architecture_of_other_sizes_is_refused(tmp_path):
    """Its heads, epsilon and pooling would be taken for granted. Those who know better say so."""
    state = state_of(width=128, heads=2, depth=2, classes=3)
    name = "vit_base_patch16_224"
    asks(
        state,
        f"this is not {name}: the tensors have depth 2, not 12; width 128, not 768",
        "--set depth=2 --set width=128, config={'depth': 2, 'width': 128}",
        "--set heads=.. unless they are still 12",
        architecture=name,
    )
    told = {"depth": 2, "width": 128, "heads": 2}
    assert convert.load(state, architecture=name, config=told).config.heads == 2
    asks(state_of(depth=11, classes=3), "depth 11, not 12", architecture="vit_small_patch16_224")
    none = module_of(width=128, heads=2, depth=1, cls=False, pool="mean").state_dict()
    asks(none, "cls False, not True", "--set cls=false", architecture=name, config={"depth": 1, "width": 128})
    # A folder's arguments are part of what it declares.
    write_safetensors(tmp_path / "model.safetensors", {n: np.asarray(t) for n, t in state.items()})
    content = {"architecture": name, "num_classes": 3, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    asks(tmp_path, f"this is not {name}", "depth 2, not 12")
    content["model_args"] = {"depth": 2, "embed_dim": 128}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert convert.load(tmp_path, config={"heads": 2}).config.depth == 2


def test_one_field_does_not_answer_for_another():
    """The number of heads of a CLIP in timm's names does not tell its activation."""
    state = state_of(pre_norm=True, patch_bias=False, width=64, heads=1, depth=1)
    asks(state, "activation", "--set mlp=", config={"heads": 1})
    config = {"heads": 1, "mlp": "quick_gelu", "eps": 1e-5}
    assert convert.load(state, config=config).config.mlp == "quick_gelu"


def test_a_timm_model_of_its_own_size_assumes_what_architectures_decide():
    found = assumed(state_of(width=128, heads=2, depth=1, classes=3))
    assert {"heads", "mlp", "eps", "pool", "preprocess"} <= set(found)
    assert np.all([field in found[field] for field in found])


def test_a_live_module_tells_what_it_computes():
    model, provenance = convert.load_described(module_of(depth=1))
    assert [line.split()[0] for line in provenance.assumptions] == [
        "preprocess"
    ]  # of timm's create_model not even that
    assert model.config.heads == 12


# Training checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", ["state_dict_ema", "model_ema"])
@pytest.mark.parametrize("raw", ["state_dict", "model"])
def test_the_moving_average_is_taken_as_timm_takes_it(tmp_path, ema, raw):
    from timm.models import load_state_dict

    config = tiny(depth=1)
    one, other = (hub_state(config, numbers(config, seed)) for seed in (0, 1))
    content = {raw: {n: torch.tensor(a) for n, a in one.items()}, ema: {n: torch.tensor(a) for n, a in other.items()}}
    path = tmp_path / "some.pth"
    torch.save(content | {"epoch": 3}, path)
    theirs = load_state_dict(str(path), weights_only=True)["norm.weight"].numpy()
    for source in (path, content):
        model, provenance = convert.load_described(source)
        np.testing.assert_array_equal(model.norm.scale[...], theirs)
        assert f"  branch: ema, from {ema}; {raw} not taken" in str(provenance).splitlines()
        same, _ = convert.load_described(source, branch="ema")
        np.testing.assert_array_equal(same.norm.scale[...], theirs)
        kept, provenance = convert.load_described(source, branch="raw")
        np.testing.assert_array_equal(kept.norm.scale[...], one["norm.weight"])
        assert f"  branch: raw, from {raw}; {ema} not taken" in str(provenance).splitlines()
    asks({raw: content[raw]}, "holds no ema", branch="ema")
    convert.convert(path, tmp_path / "model")
    assert jaxvit.describe(tmp_path / "model").source["branch"].startswith("ema")


def test_a_branch_that_is_asked_for_is_not_passed_over():
    """Neither one level down, nor where there is only something else."""
    config = tiny(depth=1)
    teacher, student = (hub_state(config, numbers(config, seed)) for seed in (0, 1))
    both = {f"teacher.{n}": a for n, a in teacher.items()} | {f"student.{n}": a for n, a in student.items()}
    for content in (both, {"model": both}):
        model = convert.load(content, branch="student")
        np.testing.assert_array_equal(model.norm.scale[...], student["norm.weight"])
    asks({"model_ema": teacher}, "holds no student", branch="student")


# Configs that leave out what equals their library's default -----------------------------------------------------------


@pytest.mark.parametrize("kind", ["CLIP", "MetaClip2", "ChineseCLIP"])
@pytest.mark.parametrize("left_out", [(), ("hidden_act",), ("hidden_act", "num_attention_heads", "layer_norm_eps")])
def test_defaults_are_those_of_the_model_type(tmp_path, kind, left_out):
    """12 heads of 8, where width / 64 would be 1; in a config of its own, and in one of both sides."""
    sizes = dict(hidden_size=96, num_hidden_layers=1, intermediate_size=64, image_size=32, patch_size=16)
    sizes |= dict(num_attention_heads=12, hidden_act="quick_gelu")
    module = randomise(
        getattr(transformers, f"{kind}VisionModel")(getattr(transformers, f"{kind}VisionConfig")(**sizes))
    )
    module.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = {name: value for name, value in json.loads(path.read_text()).items() if name not in left_out}
    inner = {name: value for name, value in content.items() if name != "model_type"}
    whole = {"model_type": content["model_type"].removesuffix("_vision_model"), "vision_config": inner}
    for written in (content, whole):
        path.write_text(json.dumps(written))
        config = convert.load(tmp_path).config
        assert (config.mlp, config.heads, config.eps) == ("quick_gelu", 12, 1e-5)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3))
    with jax.enable_x64(True):
        ours = jaxvit.cast(convert.load(tmp_path), "float64")(jax.numpy.asarray(images)).tokens
    fold = getattr(module, "vision_model", module).embeddings
    with torch.inference_mode():
        fold.class_embedding += fold.position_embedding.weight[0]
        fold.position_embedding.weight[0] = 0
        pixels = torch.tensor(images).permute(0, 3, 1, 2)
        theirs = module.double()(pixels, interpolate_pos_encoding=True).last_hidden_state.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_the_table_of_defaults_is_transformers_own():
    for kind, values in DEFAULTS.items():
        names = [name for name in (f"{kind}_vision_model", kind) if name in transformers.CONFIG_MAPPING]
        own = transformers.CONFIG_MAPPING[names[0]]()
        assert {name: getattr(own, name) for name in values} == values, kind


def test_a_model_type_that_is_not_known_is_refused_by_name(tmp_path):
    config = tiny(depth=1)
    write_safetensors(tmp_path / "model.safetensors", transformers_state(config, numbers(config)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "some_new_vit"}))
    asks(tmp_path, "model type some_new_vit", "--set heads=")


# Live modules ---------------------------------------------------------------------------------------------------------


WRAP = {
    "compile": lambda module: torch.compile(module, backend="eager"),
    "DataParallel": torch.nn.DataParallel,
    "both": lambda module: torch.nn.DataParallel(torch.compile(module, backend="eager")),
}


@pytest.mark.parametrize("wrap", WRAP)
def test_a_wrapped_module_keeps_its_settings(wrap):
    """Pooling, whether it reads the tokens before the patches, the number of heads, the grid."""
    for pool in (dict(global_pool="avg"), dict(global_pool="map", pool_include_prefix=True)):
        sizes = dict(img_size=(16, 64), patch_size=8, embed_dim=64, depth=1, num_heads=4, num_classes=3, fc_norm=False)
        module = randomise(timm.models.vision_transformer.VisionTransformer(**sizes, **pool))
        module.eval()
        alone, wrapped = convert.load(module), convert.load(WRAP[wrap](module))
        assert wrapped.config == alone.config and wrapped.config.heads == 4 and wrapped.config.grid == (2, 8)
        assert wrapped.config.pool == {"avg": "mean", "map": "attention"}[pool["global_pool"]]
        assert wrapped.config.pool_prefix == ("pool_include_prefix" in pool)
        assert original_of(WRAP[wrap](module)).config == alone.config


def test_an_average_with_the_tokens_before_the_patches_is_refused():
    module = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=64, depth=1, num_heads=4, global_pool="avg", pool_include_prefix=True
    )
    asks(module, "average pooling includes the tokens before the patches")


def test_a_pooling_that_is_not_known_is_refused(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", state_of(width=64, heads=1, depth=1))
    content = {"architecture": "vit_small_patch16_224", "global_pool": "avgmax"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    asks(tmp_path, "avgmax", "token, avg, map")


# Sums -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_sums_are_rounded_once(dtype):
    config = tiny(depth=1)
    state = hub_state(config, numbers(config))
    # Whose float32 sum is half way between two of bfloat16, and the exact sum above it.
    state["cls_token"][:], state["pos_embed"][:, 0] = 1 + 2**-8, 2**-30
    exact = state["cls_token"][0, 0].astype(np.float64) + state["pos_embed"][0, 0].astype(np.float64)
    with jax.enable_x64(True):
        ours = np.asarray(convert.load(state, dtype=dtype, config={"heads": 1}).cls[...])
    assert exact[0] == 1 + 2**-8 + 2**-30
    np.testing.assert_array_equal(ours, exact.astype(jax.numpy.dtype(dtype)))


# Positions ------------------------------------------------------------------------------------------------------------

OBLONG = dict(depth=1, width=64, heads=1, grid=(2, 8))


def oblong_folder(folder, module, **content):
    write_safetensors(folder / "model.safetensors", {n: t.numpy() for n, t in module.state_dict().items()})
    about = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {}} | content
    about["model_args"] = {"depth": 1, "embed_dim": module.embed_dim} | about.get("model_args", {})
    (folder / "config.json").write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize(
    "size", [{"model_args": {"img_size": [32, 128]}}, {"pretrained_cfg": {"input_size": [3, 32, 128]}}]
)
def test_a_folder_with_oblong_images(tmp_path, size):
    module = module_of(**OBLONG | dict(heads=3, width=96))
    for name in ("pretrained_cfg",):
        size = {
            key: value | ({"mean": [0.5] * 3, "std": [0.5] * 3} if key == name else {}) for key, value in size.items()
        }
    model, provenance = convert.load_described(oblong_folder(tmp_path, module, **size))
    assert model.config.grid == (2, 8) and "grid" not in str(provenance.assumptions)
    images = random_images(model, Size(32, 128), tokens=20)
    assert compare(model, original_of(module), images, defaults=False).worst64() <= 1e-10
    if "pretrained_cfg" in size:
        assert "preprocess" not in str(provenance.assumptions) and model.config.preprocess.size == (32, 128)


def test_a_bare_grid_is_a_square_as_an_assumption(tmp_path):
    state = state_of(**OBLONG)
    assert assumed(state)["grid"] == "grid 4x4 (a square of 16 positions)"
    for grid in ((2, 8), [2, 8], "2x8"):
        model, provenance = convert.load_described(state, config={"grid": grid})
        assert model.config.grid == (2, 8) and "grid 4x4" not in str(provenance)
    for grid in ("2", [2, 8, 1], 16, "axb"):
        asks(state, "grid is", "such as 2x8", config={"grid": grid})
    asks(state, "grid (4, 4), not (3, 8)", config={"grid": (3, 8)})
    asks(state_of(**OBLONG | dict(grid=(2, 7))), "pos_embed has 15 rows", "--set grid=")
    source = write_safetensors(tmp_path / "some.safetensors", state)
    for i, said in enumerate(("grid=[2,8]", "grid=2x8")):
        assert main([str(source), str(tmp_path / f"{i}"), "--set", said]) == 0
        assert jaxvit.read_config(tmp_path / f"{i}")[0].grid == (2, 8)


NONSENSE = (None, True, 0, -1, 1.5, "some", "", [], [1, 2, 3], {}, {"resize": 256})


@pytest.mark.parametrize("layout", ["timm", "dinov2", "dinov3", "clip"])
def test_a_field_that_is_nonsense_is_refused_in_one_sentence(layout, tmp_path):
    """Whatever stands behind --set: a model or one line, and never another error."""
    from test_families import dinov3_hub, openai

    states = {"dinov3": dinov3_hub, "clip": openai, "timm": lambda: state_of(depth=1, width=64, heads=1, classes=2)}
    config = tiny(depth=1)
    state = states.get(layout, lambda: hub_state(config, numbers(config)))()
    for name in (field.name for field in fields(ViTConfig)):
        for value in NONSENSE:
            try:
                given = {"mlp": "gelu", name: value} if layout == "clip" else {name: value}
                convert.recognise(convert.read(state, config=given))
            except ConversionError as error:
                assert "\n" not in str(error) and name in str(error), (name, value, str(error))
    asks(state, "preprocess is {'resize': 0}, which makes no sense", config={"preprocess": {"resize": 0}})
    asks(state, "preprocess is 'x'", "--set preprocess=", config={"preprocess": "x"})
    asks(state, "mlp is 'relu'; expected one of gelu", config={"mlp": "relu"})
    asks(state, "a config has no activation; it has depth", config={"activation": "gelu"})


def test_a_field_of_the_command_line_is_refused_in_one_sentence(tmp_path, capsys):
    config = tiny(depth=1)
    source = write_safetensors(tmp_path / "some.safetensors", hub_state(config, numbers(config)))
    assert main([str(source), str(tmp_path / "a"), "--set", 'preprocess={"resize": 0}']) == 1
    assert capsys.readouterr().err.startswith("error: preprocess is {'resize': 0}, which makes no sense")


def test_every_layout_takes_the_grid_that_is_given():
    config = tiny(depth=1, grid=(2, 8))
    for write in (hub_state, transformers_state):
        assert convert.load(write(config, numbers(config)), config={"grid": (2, 8)}).config.grid == (2, 8)
    with pytest.raises(ConversionError, match="square grid"):
        original_of(transformers_state(config, numbers(config)), config={"grid": (2, 8)})
    state = {
        n.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): a
        for n, a in state_of(**OBLONG | dict(layer_scale=True, grid=(2, 4))).items()
    }
    # 1 + 8 positions: iBOT's, where 9 would be a square of DeiT III.
    assert convert.load_described(state, config={"grid": (2, 4)})[1].source["layout"] == "dino"


def test_a_published_grid_is_known():
    config = tiny(depth=1, grid=(37, 37))
    assert "grid" not in assumed(hub_state(config, numbers(config)))


def test_a_model_without_positions_is_asked_about(tmp_path):
    """A DINOv3 whose registers, periods and mask token were left out has timm's names, and rotary positions."""
    state = state_of(depth=1, width=64, heads=1, positions=False, layer_scale=True)
    asks(state, "no positions", "DINOv3", "--set positions=false")
    assert convert.load(state, config={"positions": False}).config.positions is False
    assert convert.load(module_of(depth=1, width=64, heads=1, positions=False)).config.positions is False


# Wrappers in names ----------------------------------------------------------------------------------------------------


WRAPPED = {
    "before": lambda n: f"module._orig_mod.{n}",
    "in each block": lambda n: n.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."),
    "both": lambda n: (
        "_orig_mod." + n.replace("blocks.0.", "blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module.")
    ),
}
NESTED = {
    "two levels": lambda state: {"model": {"state_dict": state}, "epoch": 1},
    "another name": lambda state: {"network": state, "epoch": 1, "optimizer": {"state": {}, "param_groups": []}},
    "another name, two levels": lambda state: {"checkpoint": {"weights": state}, "epoch": 1},
}


@pytest.mark.parametrize("how", [*WRAPPED, *NESTED])
def test_wrappers_and_levels_are_taken_off(how):
    config = tiny(depth=1)
    state = hub_state(config, numbers(config))
    source = {WRAPPED[how](n): a for n, a in state.items()} if how in WRAPPED else NESTED[how](state)
    assert original_of(source).config == convert.load(source).config
    np.testing.assert_array_equal(convert.load(source).norm.scale[...], state["norm.weight"])


def whole_models():
    """Models with tensors outside of the encoder: a text side, a classifier, a number."""
    clip = dict(SIZES_OF_CLIP, hidden_act="quick_gelu")
    config = transformers.CLIPConfig(vision_config=clip, text_config=TEXT, projection_dim=16)
    labelled = dict(SIZES_OF_CLIP, patch_size=14, image_size=28, num_labels=5)
    labelled = {name: value for name, value in labelled.items() if name != "intermediate_size"}
    yield transformers.CLIPModel(config).state_dict(), {"mlp": "quick_gelu"}
    yield transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**labelled, mlp_ratio=1)).state_dict(), {}
    config = tiny(depth=1)
    state = {f"module.{name}": array for name, array in hub_state(config, numbers(config)).items()}
    yield state | {"n_averaged": np.array(3)}, {}


SIZES_OF_CLIP = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64)
SIZES_OF_CLIP |= dict(image_size=32, patch_size=16)
TEXT = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=10)
TEXT |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)


@pytest.mark.parametrize("which", range(3))
def test_what_stands_before_all_names_is_no_part_of_them(which):
    state, config = list(whole_models())[which]
    config |= {"heads": 1}
    bare = to_params(convert.load(state, config=config))
    for prefix in ("module.", "model.", "_orig_mod.", "module.model.", "network.net."):
        source = {prefix + name: tensor for name, tensor in state.items()}
        found = to_params(convert.load(source, config=config))
        assert found.keys() == bare.keys() and all(np.array_equal(found[name], bare[name]) for name in bare)
        assert original_of(source, config=config).config == convert.load(source, config=config).config


def test_two_models_under_unknown_names_are_not_chosen_from():
    config = tiny(depth=1)
    state = hub_state(config, numbers(config))
    asks({"one": state, "other": state}, "not a state dict", "'one', 'other'")


def test_an_assumption_is_shared_if_neither_side_was_told():
    """The original is built with the model's rule of resampling: an assumption about that is always shared."""
    ours = ("resampling bicubic_offset (the names are DINO's)", "grid 2x2 (a square)", "preprocess .. (DINO's)")
    theirs = ("grid 2x2 (a square)", "heads 3 (width / 64)")  # the folder was told its heads, or they would differ
    assert shared_assumptions(ours, theirs) == ["grid 2x2 (a square)", ours[0]]
    assert shared_assumptions((), theirs) == []

"""Encoders inside larger models, and one of two networks: taken if it is said which, and never by a guess."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("transformers")

from layouts import hub_state, numbers, tiny, write_safetensors
from test_families import CLIP, PLAIN, clip_transformers

import convert
import jaxvit
from benchmarks.originals import randomise
from convert import ConversionError
from convert.__main__ import main
from convert.originals import build_timm, original_of
from convert.verify import Size, compare, random_images

CONFIG = tiny(depth=1)
ENCODER = hub_state(CONFIG, numbers(CONFIG))
HEAD = {f"depth_head.scratch.layer{i}.weight": np.ones((2, 2), np.float32) for i in range(30)}
DEPTH_ANYTHING = {f"pretrained.{name}": array for name, array in ENCODER.items()} | HEAD


def fails(source, *words, **known):
    with pytest.raises(ConversionError) as raised:
        convert.load(source, **known)
    message = str(raised.value)
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message
    return message


# Larger models --------------------------------------------------------------------------------------------------------


def test_depth_anything_says_what_to_type():
    message = fails(DEPTH_ANYTHING, "30 tensors, such as depth_head.scratch.layer0.weight, stand beside pretrained.")
    assert "--prefix pretrained. (prefix='pretrained.')" in message and len(message) < 600


@pytest.mark.parametrize("prefix", ["pretrained.", "pretrained"])
@pytest.mark.parametrize("before", ["", "module.", "_orig_mod."])
def test_a_prefix_takes_the_encoder_alone(tmp_path, prefix, before):
    state = {before + name: array for name, array in DEPTH_ANYTHING.items()}
    prefix = prefix if before == "_orig_mod." else before + prefix
    model, provenance = convert.load_described(state, prefix=prefix)
    np.testing.assert_array_equal(model.norm.scale[...], ENCODER["norm.weight"])
    assert provenance.source["prefix"] == f"{prefix.rstrip('.')}.; 30 tensors outside it not taken"
    assert model.config == convert.load(ENCODER).config
    assert original_of(state, prefix=prefix).config == model.config


def test_a_prefix_on_the_command_line(tmp_path, capsys):
    source = write_safetensors(tmp_path / "depth_anything.safetensors", DEPTH_ANYTHING)
    assert main([str(source), str(tmp_path / "a")]) == 1
    assert "say --prefix pretrained." in capsys.readouterr().err
    assert main([str(source), str(tmp_path / "a"), "--prefix", "pretrained.", "--set", "heads=1"]) == 0
    assert main(["show", str(tmp_path / "a")]) == 0
    assert "prefix: pretrained.; 30 tensors outside it not taken" in capsys.readouterr().out
    again = ["verify", str(tmp_path / "a"), str(source), "--prefix", "pretrained.", "--set", "heads=1"]
    assert main([*again, "--sizes", "14x28"]) == 0


def test_nothing_inside_the_prefix_is_passed_over():
    fails(DEPTH_ANYTHING | {"pretrained.more": np.ones(2)}, "more is not expected", prefix="pretrained.")
    lacking = {name: a for name, a in DEPTH_ANYTHING.items() if name != "pretrained.norm.bias"}
    fails(lacking, "norm.bias is missing", prefix="pretrained.")
    fails(DEPTH_ANYTHING, "no tensor has a name that starts with other.", "pretrained., depth_head.", prefix="other")
    fails(DEPTH_ANYTHING, "no tensor", prefix="pre")


def test_inside_another_model_heads_are_an_assumption():
    """Under a name of no family, the same tensors may be another model's."""
    state = {f"tower.{name}": a.numpy() for name, a in build_timm(PLAIN, positioned=True).state_dict().items()}
    _, alone = convert.load_described({name.removeprefix("tower."): a for name, a in state.items()})
    _, inside = convert.load_described(state, prefix="tower.")
    assert any(line.startswith("heads") for line in inside.assumptions) and set(alone.assumptions) <= {
        *inside.assumptions,
        *alone.assumptions,
    }


def test_a_vision_tower_beside_a_language_model():
    """LLaVA's names. What is asked of the encoder itself comes in the same sentence."""
    tower = {f"vision_tower.{name}": a.numpy() for name, a in clip_transformers(both=False).items()}
    tower = {n: a for n, a in tower.items() if "visual_projection" not in n}
    language = {f"language_model.model.layers.{i}.input_layernorm.weight": np.ones(4, np.float32) for i in range(9)}
    state = tower | language | {"multi_modal_projector.linear_1.weight": np.ones((4, 4), np.float32)}
    prefix = "vision_tower.vision_model."
    fails(state, "activation", "10 tensors, such as language_model.", f"say --prefix {prefix}")
    model = convert.load(state, prefix=prefix, config={"mlp": "quick_gelu"})
    assert model.config.width == CLIP.width and model.config.projection == 0


def test_a_live_model_inside_another():
    encoder = randomise(build_timm(PLAIN, positioned=True))
    whole = torch.nn.ModuleDict({"encoder": encoder, "head": torch.nn.Linear(128, 2)})
    model, provenance = convert.load_described(whole, prefix="encoder.")
    assert model.config == convert.load(encoder).config and provenance.source["prefix"] == "encoder."
    images = random_images(model, Size(16, 16), tokens=20)
    assert compare(model, original_of(whole, prefix="encoder"), images, defaults=False).worst64() <= 1e-10
    fails(whole, "--prefix encoder.")
    fails(whole, "the module holds no other; it holds encoder, head", prefix="other")


# Two networks ---------------------------------------------------------------------------------------------------------


def two(separator):
    """Networks of different numbers, and their heads."""
    state = {}
    for i, which in enumerate(("teacher", "student")):
        own = hub_state(CONFIG, numbers(CONFIG, seed=i))
        state |= {f"{which}{separator}backbone.{name}": a for name, a in own.items()}
        state |= {f"{which}{separator}head.mlp.0.weight": np.ones((2, 2), np.float32)}
    return state


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("branch", ["teacher", "student"])
@pytest.mark.parametrize("safetensors", [True, False])
def test_networks_in_one_state_dict(tmp_path, branch, nested, safetensors):
    state = two("_")
    source = {"state_dict": state} if nested else state
    if safetensors:
        source = write_safetensors(tmp_path / "some.safetensors", state)
    model, provenance = convert.load_described(source, branch=branch)
    np.testing.assert_array_equal(model.norm.scale[...], state[f"{branch}_backbone.norm.weight"])
    assert provenance.source["branch"] == branch
    fails(source, "two networks", "--branch teacher or --branch student")
    fails(source, "holds no ema", branch="ema")


def test_a_backbone_of_a_library_that_trains_any_is_not_dino_s_for_sure():
    state = {f"student_backbone.{n}": a.numpy() for n, a in build_timm(PLAIN, positioned=True).state_dict().items()}
    _, provenance = convert.load_described(state, branch="student")
    assert any(line.startswith("resampling bicubic_offset") for line in provenance.assumptions)


def test_the_moving_average_under_its_names():
    own, other = (hub_state(CONFIG, numbers(CONFIG, seed=i)) for i in range(2))
    state = {f"model.{n}": a for n, a in own.items()} | {f"model_ema.{n}": a for n, a in other.items()}
    for branch, theirs in (("ema", other), ("raw", own)):
        np.testing.assert_array_equal(convert.load(state, branch=branch).norm.scale[...], theirs["norm.weight"])


def test_a_prefix_is_kept_in_the_folder(tmp_path):
    convert.convert(DEPTH_ANYTHING, tmp_path / "a", prefix="pretrained.")
    assert jaxvit.describe(tmp_path / "a").source["prefix"].startswith("pretrained.;")
